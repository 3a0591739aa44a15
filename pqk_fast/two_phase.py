"""What prepared modules have in common: a phase, a branch, and how they take a float module's place."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import is_tensor_like as is_tensor


def take_over(new: Any, old: nn.Module) -> None:
    """Make ``new`` stand for ``old``: the same parameters, buffers, hooks and attributes, in tables of its own.

    Hooks stay in the same tables, so that handles to them keep working.
    """
    tables = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    new.__dict__ = {name: value.copy() if name in tables else value for name, value in old.__dict__.items()}


_OF_PREPARED = {
    *("phase", "branch", "branch_held", "config", "bits", "own_sparsity", "ran", "phase2_step"),
    *("fused", "fed", "recomputed"),
}


def plain_copy(source: nn.Module, kind: type[nn.Module], tensors: dict[str, Tensor | None]) -> nn.Module:
    """A ``kind`` with ``source``'s settings and copies of ``tensors``; weight and bias keep their ``requires_grad``."""
    module = kind.__new__(kind)
    module.__dict__ = {
        name: value.copy() if isinstance(value, dict | set) else value
        for name, value in source.__dict__.items()
        if name not in _OF_PREPARED
    }
    module._parameters, module._buffers = {}, {}
    for name, value in tensors.items():
        if name not in ("weight", "bias"):
            module._buffers[name] = None if value is None else value.clone()
        elif value is None:
            module._parameters[name] = None
        else:
            module._parameters[name] = nn.Parameter(value.clone(), getattr(source, name).requires_grad)
    return module


def within_backward() -> bool:
    """True while autograd runs a backward in this thread: a forward now is activation checkpointing's."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class TwoPhase(nn.Module):
    """A module that knows the phase and the branch. The phase travels in the state dict as ``pqk_phase`` (uint8 []).

    Layouts of the state dict, by the version in its metadata (which a plain dict lacks; then the keys decide):
    1 (layers) and 2 (BatchNorm), torch's own numbers: a float module's, or a prepared one's, at first without
    ``pqk_phase``; 3: with ``pqk_phase``. All are read. What cannot be read is refused by name, a module at a time, in
    ``load_state_dict``'s one RuntimeError, and the refused module keeps what it had.
    """

    _version = 3
    added: tuple[str, ...]  # entries that the float module does not have, other than pqk_phase
    phase: int = 1
    branch: str
    branch_held: int  # how many `with branch(...)` are open around the module
    # The running backward, what branch its forward was, and which of autograd's nodes it made; see pqk_fast.branches.
    recomputed: tuple[int, str, range] | None = None
    pqk_phase: Tensor

    def _start(self) -> None:
        self.branch, self.branch_held = "student", 0
        own = next(chain(self.parameters(), self.buffers()), torch.empty(0))
        self.register_buffer("pqk_phase", torch.ones((), dtype=torch.uint8, device=own.device))
        self.set_phase(1)

    def set_phase(self, phase: int) -> None:
        """1 or 2; what learns in it is the subclass's to say."""
        self.phase = phase
        self.pqk_phase.fill_(phase)

    def branch_now(self) -> str:
        """The branch of the forward that is under way.

        Activation checkpointing runs a forward again within backward, when ``branch`` is no longer what it was.
        RuntimeError if it cannot be told then what it was.
        """
        if not within_backward() or self.phase == 1 or self.branch_held:
            return self.branch
        if self.recomputed is not None:
            task, name, nodes = self.recomputed
            node = torch._C._current_autograd_node()
            if task == torch._C._current_graph_task_id() and node is not None and node._sequence_nr() in nodes:
                return name
        raise RuntimeError(
            "a prepared module was computed again during backward (activation checkpointing), and it cannot be told "
            "whether as student or as teacher: in phase 2 call the model by dual_forward(model, x) or "
            'branch(model, "student")(x), without checkpoints inside checkpoints of the reentrant kind, or run forward '
            "and backward inside `with branch(model, ...)`"
        )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        entries = {name: state_dict[prefix + name] for name in self._names() if prefix + name in state_dict}
        problems = list(self._read(entries, local_metadata))
        if problems:
            error_msgs += [f"{prefix}{problem}" for problem in problems]
            return
        state_dict.update({prefix + name: value for name, value in entries.items()})
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if "pqk_phase" in entries and not self.pqk_phase.is_meta:
            self.set_phase(int(self.pqk_phase))

    def _read(self, entries: dict[str, Any], metadata: dict[str, Any]) -> Iterator[str]:
        """Bring a module's entries of any layout to this one's, in place; yields what is wrong with them."""
        version = metadata.get("version")
        prepared = any(name in entries for name in (*self.added, "pqk_phase"))
        if prepared and isinstance(version, int) and version > self._version:
            yield f"pqk_phase: layout {version}, this pqk_fast reads up to {self._version}: upgrade pqk_fast"
            return
        foreign = [f"{n} is of type {type(v).__name__}, not a tensor" for n, v in entries.items() if not is_tensor(v)]
        if foreign:
            yield from foreign
            return
        yield from (self._read_prepared if prepared else self._read_float)(entries, metadata)
        yield from self._read_phase(entries)
        for name, value in entries.items():
            expected = getattr(self, name).shape
            if value.shape != expected and (value.shape, expected) != ((1,), ()):  # which torch takes as well
                yield f"{name} has shape {list(value.shape)}, the model's has {list(expected)} (size mismatch)"

    def _read_prepared(self, entries: dict[str, Tensor], metadata: dict[str, Any]) -> Iterator[str]:
        """A prepared module's entries; those of the first layout have no phase."""
        if set(self._names()) - entries.keys() == {"pqk_phase"}:
            warnings.warn(
                f"the state dict does not say in which phase it was written, so the model stays in phase {self.phase}; "
                "if it is phase 2's, call start_phase2 once it is loaded, and load it again",
                stacklevel=7,
            )
            entries["pqk_phase"] = self._phase_tensor(self.phase, entries)
        yield from ()

    def _read_float(self, entries: dict[str, Tensor], metadata: dict[str, Any]) -> Iterator[str]:
        """A float module's entries: what preparation adds starts anew, in phase 1."""
        if entries or self._names() == ["pqk_phase"]:
            entries["pqk_phase"] = self._phase_tensor(1 if entries else self.phase, entries)
        yield from ()

    def _read_phase(self, entries: dict[str, Tensor]) -> Iterator[str]:
        phase = entries.get("pqk_phase")
        if phase is None or phase.is_meta:
            return
        value = phase.tolist()
        if value not in (1, 2, [1], [2]):
            yield f"pqk_phase is {value}, expected 1 or 2: the state dict is damaged, load another"
        else:
            entries["pqk_phase"] = phase.to(torch.uint8, copy=True)  # set_phase must not write to the caller's

    def _phase_tensor(self, phase: int, entries: dict[str, Tensor]) -> Tensor:
        like = next(iter(entries.values()), self.pqk_phase)
        return torch.full((), phase, dtype=torch.uint8, device=like.device)

    def _names(self) -> list[str]:
        """Names of the module's own entries in a state dict."""
        return [name for name, tensor in chain(self._parameters.items(), self._buffers.items()) if tensor is not None]
