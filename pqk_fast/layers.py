"""Drop-in layers: the latent fp32 weight stays one Parameter named ``weight``; mask and step size sit beside it.

A layer's ``phase`` (1 or 2) and ``branch`` ("student", "teacher" or "stacked") are plain Python attributes, set for a
whole model by :mod:`pqk_fast.prepare` and :mod:`pqk_fast.branches`. The phase is in the state dict as well
(``pqk_phase``), so that a model loaded from phase 2 goes on in phase 2.

| phase | branch  | forward uses                       | weight gradient reaches | step size |
|-------|---------|------------------------------------|-------------------------|-----------|
| 1     | student | ``wbar`` (Eqs 2-4)                 | all (or kept, by option)| learns    |
| 2     | student | ``wbar``                           | kept (Eq. 11)           | frozen    |
| 2     | teacher | latent ``w`` (Eq. 12)              | pruned (Eq. 12)         | -         |
| 2     | stacked | first half of the batch student's, second half teacher's       ||           |
"""

from __future__ import annotations

import threading
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pqk_fast import ops
from pqk_fast.batch_norm import batch_norm
from pqk_fast.config import PQKConfig
from pqk_fast.step_size import initial_step

Layer = TypeVar("Layer", bound="PQKLayer")


def _take_over(new: Any, old: nn.Module) -> None:
    """Make ``new`` stand for ``old``: the same parameters, buffers, hooks and attributes, in tables of its own.

    Hooks stay in the same tables, so that handles to them keep working.
    """
    tables = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    new.__dict__ = {name: value.copy() if name in tables else value for name, value in old.__dict__.items()}


def _plain_copy(source: nn.Module, kind: type[nn.Module], tensors: dict[str, Tensor | None]) -> nn.Module:
    """A ``kind`` with ``source``'s settings and copies of ``tensors``; weight and bias keep their ``requires_grad``."""
    module = kind.__new__(kind)
    module.__dict__ = {
        name: value.copy() if isinstance(value, dict | set) else value
        for name, value in source.__dict__.items()
        if name not in ("phase", "branch", "branch_held", "config", "ran", "fused", "fed")
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


class TwoPhase(nn.Module):
    """A module that knows the phase and the branch. The phase travels in the state dict as ``pqk_phase`` (uint8 [])."""

    phase: int
    branch: str
    branch_held: int  # how many `with branch(...)` are open around the module
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

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if f"{prefix}pqk_phase" in state_dict and not self.pqk_phase.is_meta:
            self.set_phase(int(self.pqk_phase))


class PQKLayer(TwoPhase):
    """What the three layers share. Not instantiated itself.

    Attributes: ``weight`` (latent, Parameter), ``weight_mask`` (bool buffer, True = kept), ``weight_step`` (fp32
    Parameter [1] or [C]), ``config``, ``phase``, ``branch``, ``ran`` (True once a forward has used the layer).
    """

    float_type: type[nn.Module]
    weight: Tensor
    bias: Any
    weight_mask: Tensor
    weight_step: nn.Parameter
    fused: bool  # see pqk_fast.fusion
    fed: tuple[Tensor, Any] | None  # the student's weight for the forward under way, and what it was made from

    def __init__(self, *args: Any, config: PQKConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._attach(config or PQKConfig())

    def _attach(self, config: PQKConfig) -> None:
        mask = torch.ones_like(self.weight, dtype=torch.bool)
        step = initial_step(self.weight, mask, config.bits, config.step_init, config.per_channel)
        self.register_buffer("weight_mask", mask)
        self.weight_step = nn.Parameter(step)
        self.config = config
        self.ran, self.fused, self.fed = False, False, None
        self._start()

    @property
    def bits(self) -> int:
        return self.config.bits

    def set_phase(self, phase: int) -> None:
        """Phase 2 freezes the step size; the mask is the Pruner's, which refuses phase 2."""
        super().set_phase(phase)
        self.weight_step.requires_grad_(phase == 1)
        self.weight_step.grad = None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves and casts as ever, but the step size stays fp32: in fp16 its smallest value is 0, in bf16 it stalls."""
        step = self.weight_step.detach()
        super()._apply(fn, recurse)
        if self.weight_step.dtype != torch.float32:
            self.weight_step.data = step.to(self.weight_step.device)
        return self

    @classmethod
    def from_float(cls: type[Layer], module: nn.Module, config: PQKConfig) -> Layer:
        """The layer around ``module``'s own parameters (shared, not copied). Masks keep everything at first.

        Raises TypeError if ``module`` is not exactly the float layer that this class stands for, or if its weight is
        not an fp32, bf16 or fp16 Parameter (weight_norm).
        """
        if type(module) is not cls.float_type:
            raise TypeError(f"{cls.__name__}.from_float takes a {cls.float_type.__name__}, got {type(module).__name__}")
        if not isinstance(module._parameters.get("weight"), nn.Parameter):
            raise TypeError(
                f"{type(module).__name__}.weight is computed from other parameters (weight_norm, spectral_norm); "
                "remove that first (torch.nn.utils.remove_weight_norm)"
            )
        if module.weight.dtype not in ops.WEIGHT_DTYPES:
            raise TypeError(f"weights must be fp32, bf16 or fp16, got {module.weight.dtype}; use model.float() first")
        layer = cls.__new__(cls)
        _take_over(layer, module)
        layer._attach(config)
        return layer

    @torch.no_grad()
    def to_float(self, branch: str = "student") -> nn.Module:
        """A plain float layer with this branch's weight baked in; nothing is shared with the PQK layer."""
        weight = self.student_weight(self.weight.dtype) if branch == "student" else self.full_weight()
        return _plain_copy(self, self.float_type, {"weight": weight, "bias": self.bias})

    def student_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """``wbar``: masked, fake-quantized. In phase 2 its gradient reaches kept weights only and S is a constant."""
        return ops.fake_quant(*self.student_arguments(), dtype)

    def student_arguments(self) -> tuple[Tensor, Tensor, Tensor, int, str, bool]:
        """What :func:`pqk_fast.ops.fake_quant` takes for the student's weight: weight, mask, step, bits, ste, hard."""
        frozen = self.phase == 2
        step = self.weight_step.detach() if frozen else self.weight_step
        return self.weight, self.weight_mask, step, self.bits, self.config.ste, frozen or self.config.mask_gradients

    def fed_from(self) -> tuple[Any, ...]:
        """What a weight made before the forward depends on: if any of it has changed, the weight is stale."""
        learns = torch.is_grad_enabled() and (self.weight.requires_grad or self.weight_step.requires_grad)
        common = (learns, ops.output_dtype(self.weight), self.phase)
        if torch.compiler.is_compiling():
            return common
        tensors = (self.weight, self.weight_mask, self.weight_step)
        return *common, threading.get_ident(), *((id(t), -1 if t.is_inference() else t._version) for t in tensors)

    def __getstate__(self) -> dict[str, Any]:
        """Without what an interrupted forward may have left, which could be neither copied nor pickled."""
        return {**self.__dict__, "fed": None}

    def full_weight(self) -> Tensor:
        """The teacher's weight: latent, or with its kept part quantized; its gradient reaches pruned weights only."""
        how = self.config.teacher_weights
        return ops.teacher_weight(self.weight, self.weight_mask, self.weight_step, self.bits, how)

    def _begin_forward(self) -> None:
        self.ran = True
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            return
        # Activation checkpointing runs the forward again within backward, after dual_forward has closed its branch.
        if self.phase == 2 and not self.branch_held:
            raise RuntimeError(
                "a prepared layer was computed again during backward (activation checkpointing), when the branch that "
                'it ran in is no longer set: run forward and backward inside `with branch(model, "stacked")` (or '
                '"student") in phase 2'
            )
        if self.fused and self.fed is None:
            raise RuntimeError(
                "a prepared layer was computed again during backward (activation checkpointing), when the weight that "
                "fuse(model) made for it is gone: call unfuse(model)"
            )

    def _weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        if self.branch == "student":
            fed = self.fed
            return fed[0] if fed and fed[1] == self.fed_from() else self.student_weight(), self.bias
        # Biases follow the student's loss alone.
        return self.full_weight(), None if self.bias is None else self.bias.detach()

    def _dual_arguments(self) -> tuple[Any, ...]:
        return self.weight, self.weight_mask, self.weight_step, self.bits, self.bias

    def _dual_options(self) -> dict[str, Any]:
        return {"teacher_weights": self.config.teacher_weights, "ste": self.config.ste}

    def extra_repr(self) -> str:
        channels = "" if self.weight_step.numel() == 1 else ", per channel"
        return f"{super().extra_repr()}, bits={self.bits}{channels}, phase={self.phase}"


class PQKLinear(PQKLayer, nn.Linear):
    """nn.Linear with a masked, fake-quantized weight: ``x [..., in] -> [..., out]``."""

    float_type = nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        self._begin_forward()
        if self.branch == "stacked":
            return ops.dual_linear(x, *self._dual_arguments(), **self._dual_options())
        return F.linear(x, *self._weight_and_bias())


class PQKConv2d(PQKLayer, nn.Conv2d):
    """nn.Conv2d with a masked, fake-quantized weight: ``x [B, C, H, W]``."""

    float_type = nn.Conv2d

    def forward(self, x: Tensor) -> Tensor:
        self._begin_forward()
        if self.branch != "stacked":
            return self._conv_forward(x, *self._weight_and_bias())
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        shape: Any = (self.stride, padding, self.dilation, self.groups)
        return ops.dual_conv2d(x, *self._dual_arguments(), *shape, **self._dual_options())


class PQKConv1d(PQKLayer, nn.Conv1d):
    """nn.Conv1d with a masked, fake-quantized weight: ``x [B, C, L]``."""

    float_type = nn.Conv1d

    def forward(self, x: Tensor) -> Tensor:
        self._begin_forward()
        if self.branch != "stacked":
            return self._conv_forward(x, *self._weight_and_bias())
        padding: Any = self.padding if isinstance(self.padding, str) else (0, self.padding[0])
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        weight, mask, step, bits, bias = self._dual_arguments()
        # A convolution along the second of two spatial dimensions, the first of size 1.
        shape: Any = ((1, self.stride[0]), padding, (1, self.dilation[0]), self.groups)
        flat = (weight.unsqueeze(2), mask.unsqueeze(2), step, bits, bias)
        return ops.dual_conv2d(x.unsqueeze(2), *flat, *shape, **self._dual_options()).squeeze(2)


PQK_LAYERS: tuple[type[PQKLayer], ...] = (PQKLinear, PQKConv1d, PQKConv2d)


BATCH_NORM_STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class DualBatchNorm(TwoPhase, _BatchNorm):
    """BatchNorm with one set of statistics and affine parameters for the student, another for the full net.

    The student's keep the original names (``weight``, ``running_mean``, ...), the full net's are prefixed with
    ``teacher_`` and exist from the start, so that shapes never change; a float state dict loads strictly (the full
    net's entries then follow the student's). A class each for BatchNorm1d, 2d and 3d.
    """

    float_type: type[_BatchNorm]
    teacher_weight: nn.Parameter | None
    teacher_bias: nn.Parameter | None
    teacher_running_mean: Tensor | None
    teacher_running_var: Tensor | None
    teacher_num_batches_tracked: Tensor | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._attach()

    def _attach(self) -> None:
        for name in BATCH_NORM_STATE:
            own = getattr(self, name)
            if name in ("weight", "bias"):
                frozen = None if own is None else nn.Parameter(own.detach().clone(), requires_grad=False)
                self.register_parameter(f"teacher_{name}", frozen)
            else:
                self.register_buffer(f"teacher_{name}", None if own is None else own.clone())
        self._start()

    def set_phase(self, phase: int) -> None:
        """The full net's affine parameters learn in phase 2, where the student's do."""
        super().set_phase(phase)
        for name in ("weight", "bias"):
            own = getattr(self, name)
            if own is not None:
                getattr(self, f"teacher_{name}").requires_grad_(phase == 2 and own.requires_grad)

    @classmethod
    def from_float(cls, module: nn.Module) -> DualBatchNorm:
        """The dual layer around ``module``'s own parameters; TypeError for anything but BatchNorm1d, 2d or 3d."""
        kind = _DUAL_TYPES.get(type(module))
        if kind is None:
            raise TypeError(f"DualBatchNorm.from_float takes BatchNorm1d, 2d or 3d, got {type(module).__name__}")
        dual = kind.__new__(kind)
        _take_over(dual, module)
        dual._attach()
        return dual

    @torch.no_grad()
    def to_float(self, branch: str = "student") -> nn.Module:
        """A plain BatchNorm with this branch's statistics and affine parameters; nothing is shared."""
        prefix = "teacher_" if branch == "teacher" else ""
        return _plain_copy(self, self.float_type, {name: getattr(self, prefix + name) for name in BATCH_NORM_STATE})

    @torch.no_grad()
    def start_teacher(self, how: str) -> None:
        """Start the full net's set ``"fresh"`` (mean 0, variance 1, affine 1 and 0) or as a ``"copy"``.

        A frozen BatchNorm (affine parameters that do not learn) is copied in any case: a fresh one could not adapt.
        """
        frozen = self.weight is not None and not self.weight.requires_grad
        fresh = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0, "num_batches_tracked": 0}
        for name, value in fresh.items():
            teacher = getattr(self, f"teacher_{name}")
            if teacher is None:
                continue
            if how == "copy" or frozen:
                teacher.copy_(getattr(self, name))
            else:
                teacher.fill_(value)

    def _normalize(self, x: Tensor, prefix: str) -> Tensor:
        mean, var = getattr(self, f"{prefix}running_mean"), getattr(self, f"{prefix}running_var")
        factor = 0.0 if self.momentum is None else self.momentum
        tracked = getattr(self, f"{prefix}num_batches_tracked")
        if self.training and self.track_running_stats and tracked is not None:
            tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(tracked)
        update = not self.training or self.track_running_stats
        return batch_norm(
            x,
            mean if update else None,
            var if update else None,
            getattr(self, f"{prefix}weight"),
            getattr(self, f"{prefix}bias"),
            self.training or mean is None,
            factor,
            self.eps,
        )

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if self.branch != "stacked":
            return self._normalize(x, "teacher_" if self.branch == "teacher" else "")
        student, teacher = x.chunk(2)
        return torch.cat([self._normalize(student, ""), self._normalize(teacher, "teacher_")])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if f"{prefix}pqk_phase" not in state_dict:  # a float state dict
            for name in BATCH_NORM_STATE:
                if f"{prefix}{name}" in state_dict:
                    state_dict[f"{prefix}teacher_{name}"] = state_dict[f"{prefix}{name}"].clone()
            state_dict[f"{prefix}pqk_phase"] = self.pqk_phase.clone()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class DualBatchNorm1d(DualBatchNorm, nn.BatchNorm1d):
    float_type = nn.BatchNorm1d


class DualBatchNorm2d(DualBatchNorm, nn.BatchNorm2d):
    float_type = nn.BatchNorm2d


class DualBatchNorm3d(DualBatchNorm, nn.BatchNorm3d):
    float_type = nn.BatchNorm3d


_DUAL_TYPES: dict[type, type[DualBatchNorm]] = {
    dual.float_type: dual for dual in (DualBatchNorm1d, DualBatchNorm2d, DualBatchNorm3d)
}
