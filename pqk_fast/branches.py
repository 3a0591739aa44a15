"""Student and full net of phase 2 inside one model: choose a branch, or run both at once."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pqk_fast.config import PQKConfig
from pqk_fast.layers import PQKLayer
from pqk_fast.settings import check_choice
from pqk_fast.two_phase import TwoPhase

MODES = ("auto", "two_pass", "stacked")


def pqk_layers(model: nn.Module) -> dict[str, PQKLayer]:
    """The model's PQK layers by module name, in order; a layer used twice appears once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PQKLayer)}


def require_prepared(model: nn.Module) -> dict[str, PQKLayer]:
    """:func:`pqk_layers`, or ValueError if there are none."""
    layers = pqk_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no PQK layers: call pqk_fast.prepare(model, config) first")
    return layers


def require_phase2(model: nn.Module) -> None:
    """ValueError unless the model is in phase 2: before it there is no full net to run or to teach."""
    if any(layer.phase != 2 for layer in require_prepared(model).values()):
        raise ValueError("the model is in phase 1, where only the student runs: call start_phase2(model) first")


def config_of(model: nn.Module) -> PQKConfig:
    """The config that the model's layers were prepared with; ValueError if they differ (parts prepared apart)."""
    configs = [layer.config for layer in require_prepared(model).values()]
    if any(config != configs[0] for config in configs):
        raise ValueError("the model's parts were prepared with different configs: give the one to use")
    return configs[0]


class branch:
    """One branch of a prepared model: ``branch(model, "teacher")(x)``, or ``with branch(model, "teacher"): ...``.

    "student" is what ``model(x)`` is anyway; "teacher" is the full net (latent weights, its own BatchNorm); "stacked"
    takes ``[x_student; x_teacher]`` of 2B rows (see :func:`dual_forward`). Outside, every module is as it was; what the
    call form computed knows its branch in backward too, for activation checkpointing.

    Raises ValueError for another name, an unprepared model, or in phase 1 for any branch but the student.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        check_choice("branch", name, ("student", "teacher", "stacked"))
        if name == "student":
            require_prepared(model)
        else:
            require_phase2(model)
        self.model = model
        self.name = name
        self._before: list[list[tuple[TwoPhase, str]]] = []

    def __enter__(self) -> nn.Module:
        modules = [module for module in self.model.modules() if isinstance(module, TwoPhase)]
        self._before.append([(module, module.branch) for module in modules])
        for module in modules:
            module.branch = self.name
            module.branch_held += 1
        return self.model

    def __exit__(self, *_: object) -> None:
        for module, name in self._before.pop():
            module.branch = name
            module.branch_held -= 1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            with self:
                return self.model(*args, **kwargs)
        first = torch._C._autograd._get_sequence_nr()
        with self:
            out = self.model(*args, **kwargs)
            modules = [module for module, _ in self._before[-1]]
        if nodes := range(first, torch._C._autograd._get_sequence_nr()):
            _each_tensor(out, lambda tensor: _remember(tensor, modules, self.name, nodes))
        return out


def _remember(out: Tensor, modules: list[TwoPhase], name: str, nodes: range) -> None:
    """Tell the modules, once backward comes to ``out``, what branch they ran in when autograd's ``nodes`` were made."""

    def tell(_: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        for module in modules:
            module.__dict__["recomputed"] = task, name, nodes

    if out.requires_grad:
        out.register_hook(tell)


def _each_tensor(tree: Any, function: Callable[[Tensor], object]) -> None:
    """``function`` of all tensors in tuples, lists and dicts."""
    if isinstance(tree, Tensor):
        function(tree)
    elif isinstance(tree, dict | list | tuple):
        for value in tree.values() if isinstance(tree, dict) else tree:
            _each_tensor(value, function)


def _map(function: Callable[[Tensor], Any], tree: Any, what: str) -> Any:
    """``function`` of every tensor of a tensor, tuple, list or dict; other leaves of an input pass through."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        mapped = {key: _map(function, value, what) for key, value in tree.items()}
        if type(tree) is dict:
            return mapped
        out = copy.copy(tree)  # a ModelOutput, say, whose entries are attributes too
        for key, value in mapped.items():
            out[key] = value
        return out
    if isinstance(tree, list | tuple):
        values = [_map(function, value, what) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(
        f"a stacked forward can join and split tensors, tuples, lists and dicts; the model's {what} holds a "
        f"{type(tree).__name__}: use mode='two_pass'"
    )


def _stacked(model: nn.Module, x: Any, index: Tensor | None = None) -> tuple[Any, Any]:
    """One forward of ``[x; x]``, or of ``[x; x[index]]``."""
    both = branch(model, "stacked")(_map(lambda t: torch.cat([t, t if index is None else t[index]]), x, "input"))
    return tuple(_map(lambda t, half=half: t.chunk(2)[half], both, "output") for half in (0, 1))  # type: ignore[misc]


def _two_pass(model: nn.Module, x: Any, index: Tensor | None = None) -> tuple[Any, Any]:
    x_teacher = x if index is None else _map(lambda t: t[index], x, "input")
    return branch(model, "student")(x), branch(model, "teacher")(x_teacher)


def _put_back(buffers: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Write to those alone that have changed, or a graph that was made before would find its masks written to."""
    for buffer, value in buffers:
        if not torch.equal(buffer, value):
            buffer.copy_(value)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """No gradients, dropout, autocast or cuDNN's TF32; buffers and random state are afterwards what they were."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    rates: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        for name, kinds in (("p", nn.modules.dropout._DropoutNd), ("dropout", (nn.MultiheadAttention, nn.RNNBase))):
            if isinstance(module, kinds):
                rates.append((module, name, getattr(module, name)))
                setattr(module, name, 0.0)
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    cudnn: Any = torch.backends.cudnn
    # Set one by one: allow_tf32, which is for both, cannot even be read where they differ.
    precisions = [(setting, setting.fp32_precision) for setting in (cudnn.conv, cudnn.rnn)]
    try:
        for setting, _ in precisions:
            setting.fp32_precision = "ieee"
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=sorted(devices)),
            torch.autocast("cuda" if devices else "cpu", enabled=False),
        ):
            yield
    finally:
        for setting, precision in precisions:
            setting.fp32_precision = precision
        _put_back(buffers)
        for module, name, rate in rates:
            setattr(module, name, rate)


def _tensors(tree: Any, what: str) -> list[Tensor]:
    found: list[Tensor] = []
    _map(found.append, tree, what)
    return found


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    scale = float(b.abs().amax()) if b.numel() else 0.0
    # of the same sums in another blocking; in bf16 a hundred roundings would let anything pass
    tolerance = min(100 * torch.finfo(a.dtype).eps, 2e-2)
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def why_not_stacked(model: nn.Module, x: Any) -> str | None:
    """None if one stacked forward of ``x`` equals two passes, in outputs and buffers; otherwise what differs.

    Dropout is off for the comparison; buffers, gradients and random state are left as they were. Stacking is right only
    where dimension 0 is the batch everywhere and samples do not meet: not for sequence-first transformers, operations
    over the batch, or a division by the batch size.
    """
    model = getattr(model, "_orig_mod", model)  # a compiled model would be compiled twice more for this
    try:
        sizes = {tensor.shape[:1] for tensor in _tensors(x, "input")}
    except TypeError as error:
        return str(error)
    if len(sizes) != 1 or sizes == {torch.Size()}:
        return f"the input's tensors have no batch dimension in common: sizes of dimension 0 are {sorted(sizes)}"
    if torch.is_autocast_enabled(_tensors(x, "input")[0].device.type):  # it is off for the comparison
        dtype = next(model.parameters()).dtype
        x = _map(lambda t: t.to(dtype) if t.is_floating_point() else t, x, "input")
    # The teacher gets every other sample twice: from two equal halves, a mean over the batch, say, would look right.
    index = torch.arange(sizes.pop()[0], device=_tensors(x, "input")[0].device) // 2
    with _undisturbed(model):
        start = [buffer.clone() for buffer in model.buffers()]
        expected = _two_pass(model, x, index)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        _put_back(zip(model.buffers(), start, strict=True))
        try:
            got = _stacked(model, x, index)
            pairs = list(zip(_tensors(got, "output"), _tensors(expected, "output"), strict=True))
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            return f"the stacked forward failed: {error}"
        for a, b in pairs:
            if a.shape != b.shape:
                return f"an output has shape {tuple(a.shape)} stacked and {tuple(b.shape)} in two passes"
            if not _close(a, b):
                return (
                    f"outputs differ by up to {float((a - b).abs().max()):.3g}: dimension 0 is not the batch "
                    "everywhere, or samples of a batch meet"
                )
        for name, buffer in model.named_buffers():
            if not _close(buffer, buffers[name]):
                return f"buffer {name!r} is updated differently"
    return None


def choose_mode(model: nn.Module, x: Any, mode: str = "auto") -> str:
    """ "two_pass" or "stacked": what :func:`dual_forward` does with ``mode``, "auto" decided by one batch ``x``.

    The decision is kept in ``model.stacked_is_right`` (one made in evaluation mode, until the model trains);
    ``start_phase2`` resets it. It takes four forwards that no compiler can trace, so call this before compiling what
    calls :func:`dual_forward`. Raises as that does.
    """
    check_choice("mode", mode, MODES)
    require_phase2(model)
    if mode != "auto":
        return mode
    known = getattr(model, "stacked_is_right", None) is not None
    if not known or (model.training and not model.stacked_when_training):
        if torch.compiler.is_compiling():
            raise RuntimeError("call pqk_fast.branches.choose_mode(model, x, mode) once, before compiling")
        reason = why_not_stacked(model, x)
        model.stacked_is_right = reason is None  # type: ignore[assignment]
        model.stacked_when_training = model.training  # type: ignore[assignment]
        if reason is not None:
            warnings.warn(f"dual_forward falls back to two passes: {reason}", stacklevel=3)
    on_gpu = next(model.parameters()).is_cuda
    return "stacked" if model.stacked_is_right and on_gpu else "two_pass"


def dual_forward(model: nn.Module, x: Any, mode: str = "auto") -> tuple[Any, Any]:
    """Student's and teacher's outputs for one batch ``x`` (a tensor, or tuple, list or dict of tensors).

    ``two_pass`` runs the model twice and is always right. ``stacked`` runs ``[x; x]`` through it once, every PQK layer
    giving the first half the student's weights and the second half the teacher's; it needs dimension 0 to be the batch
    everywhere and samples that do not meet, which is *not* checked. ``auto`` compares the two on the model's first
    batch (:func:`why_not_stacked`), warns and stays with two_pass if they differ; if they agree it takes the faster:
    stacked on a GPU, two_pass on the CPU (:func:`choose_mode`).

    Models that use activation checkpointing, which computes the forward again during backward, may do so.

    Raises ValueError for another mode, an unprepared model, or phase 1; or for two passes through a
    DistributedDataParallel that broadcasts buffers.
    """
    if choose_mode(model, x, mode) == "stacked":
        return _stacked(model, x)
    if torch.is_grad_enabled() and getattr(model, "broadcast_buffers", False):
        raise ValueError(
            "DistributedDataParallel writes the masks anew before the second of two passes, and backward would refuse "
            "them: wrap the model with broadcast_buffers=False, or use mode='stacked'"
        )
    return _two_pass(model, x)
