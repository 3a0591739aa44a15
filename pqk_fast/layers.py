"""Drop-in layers: the latent fp32 weight stays one Parameter named ``weight``; mask and step size sit beside it.

A layer's ``phase`` (1 or 2) and ``branch`` ("student", "teacher" or "stacked") are plain attributes, set for a whole
model by :mod:`pqk_fast.prepare`.

| phase | branch  | forward uses                       | weight gradient reaches | step size |
|-------|---------|------------------------------------|-------------------------|-----------|
| 1     | student | ``wbar`` (Eqs 2-4)                 | all (or kept, by option)| learns    |
| 2     | student | ``wbar``                           | kept (Eq. 11)           | frozen    |
| 2     | teacher | latent ``w`` (Eq. 12)              | pruned (Eq. 12)         | -         |
| 2     | stacked | first half of the batch student's, second half teacher's       ||           |
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pqk_fast import ops
from pqk_fast.config import PQKConfig
from pqk_fast.step_size import initial_step

BRANCHES = ("student", "teacher", "stacked")
Layer = TypeVar("Layer", bound="PQKLayer")


def _own_state(module: nn.Module, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """``module``'s attributes with tables of their own, so that registering here does not change ``module``."""
    items = module.__dict__.items()
    return {
        name: value.copy() if isinstance(value, dict | set) else value for name, value in items if name not in without
    }


class PQKLayer(nn.Module):
    """What the three layers share. Not instantiated itself.

    Attributes: ``weight`` (latent, Parameter), ``weight_mask`` (bool buffer, True = kept), ``weight_step`` (fp32
    Parameter [1] or [C]), ``bits``, ``phase``, ``branch``, ``ran`` (True once a forward has used the layer).
    """

    float_type: type[nn.Module]
    weight: Tensor
    bias: Any
    weight_mask: Tensor
    weight_step: nn.Parameter

    def __init__(self, *args: Any, config: PQKConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._attach(config or PQKConfig())

    def _attach(self, config: PQKConfig) -> None:
        mask = torch.ones_like(self.weight, dtype=torch.bool)
        step = initial_step(self.weight, mask, config.bits, config.step_init, config.per_channel)
        self.register_buffer("weight_mask", mask)
        self.weight_step = nn.Parameter(step)
        self.bits = config.bits
        self.ste = config.ste
        self.mask_gradients = config.mask_gradients
        self.teacher_weights = config.teacher_weights
        self.phase = 1
        self.branch = "student"
        self.ran = False

    @classmethod
    def from_float(cls: type[Layer], module: nn.Module, config: PQKConfig) -> Layer:
        """The layer around ``module``'s own parameters (shared, not copied). Masks keep everything at first.

        Raises TypeError if ``module`` is not exactly the float layer that this class stands for, or if its weight is
        not a floating-point Parameter (weight_norm, parametrizations).
        """
        if type(module) is not cls.float_type:
            raise TypeError(f"{cls.__name__}.from_float takes a {cls.float_type.__name__}, got {type(module).__name__}")
        if not isinstance(module._parameters.get("weight"), nn.Parameter):
            raise TypeError(
                f"{type(module).__name__}.weight is computed from other parameters (weight_norm, spectral_norm); "
                "remove that first (torch.nn.utils.remove_weight_norm)"
            )
        layer = cls.__new__(cls)
        layer.__dict__ = _own_state(module)
        layer._attach(config)
        return layer

    @torch.no_grad()
    def to_float(self, branch: str = "student") -> nn.Module:
        """A plain float layer with this branch's weight baked in; nothing is shared with the PQK layer."""
        names = ("bits", "ste", "mask_gradients", "teacher_weights", "phase", "branch", "ran")
        module = self.float_type.__new__(self.float_type)
        module.__dict__ = _own_state(self, without=names)
        module._buffers = {}
        weight = self.student_weight(self.weight.dtype) if branch == "student" else self.full_weight()
        module._parameters = {
            "weight": nn.Parameter(weight.clone()),
            "bias": None if self.bias is None else nn.Parameter(self.bias.clone()),
        }
        return module

    def student_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """``wbar``: masked, fake-quantized. In phase 2 its gradient reaches kept weights only and S is a constant."""
        frozen = self.phase == 2
        step = self.weight_step.detach() if frozen else self.weight_step
        hard = frozen or self.mask_gradients
        return ops.fake_quant(self.weight, self.weight_mask, step, self.bits, self.ste, hard, dtype)

    def full_weight(self) -> Tensor:
        """The teacher's weight: latent, or with its kept part quantized; its gradient reaches pruned weights only."""
        return ops.teacher_weight(self.weight, self.weight_mask, self.weight_step, self.bits, self.teacher_weights)

    def _weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        if self.branch == "student":
            return self.student_weight(), self.bias
        # Biases follow the student's loss alone.
        return self.full_weight(), None if self.bias is None else self.bias.detach()

    def _dual_arguments(self) -> tuple[Any, ...]:
        return self.weight, self.weight_mask, self.weight_step, self.bits, self.bias

    def _dual_options(self) -> dict[str, Any]:
        return {"teacher_weights": self.teacher_weights, "ste": self.ste}

    def extra_repr(self) -> str:
        channels = "" if self.weight_step.numel() == 1 else ", per channel"
        return f"{super().extra_repr()}, bits={self.bits}{channels}, phase={self.phase}"


class PQKLinear(PQKLayer, nn.Linear):
    """nn.Linear with a masked, fake-quantized weight: ``x [..., in] -> [..., out]``."""

    float_type = nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        self.ran = True
        if self.branch == "stacked":
            return ops.dual_linear(x, *self._dual_arguments(), **self._dual_options())
        return F.linear(x, *self._weight_and_bias())


class PQKConv2d(PQKLayer, nn.Conv2d):
    """nn.Conv2d with a masked, fake-quantized weight: ``x [B, C, H, W]``."""

    float_type = nn.Conv2d

    def forward(self, x: Tensor) -> Tensor:
        self.ran = True
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
        self.ran = True
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


class DualBatchNorm(_BatchNorm):
    """BatchNorm with one set of statistics and affine parameters for the student, another for the full net.

    The student's keep the original names (``weight``, ``running_mean``, ...), the full net's are prefixed with
    ``teacher_`` and exist from the start, so that shapes never change; a float state dict loads strictly (the full
    net's entries then follow the student's). Made by :meth:`from_float`; a class each for BatchNorm1d, 2d and 3d.
    """

    float_type: type[_BatchNorm]
    branch: str
    teacher_weight: nn.Parameter | None
    teacher_bias: nn.Parameter | None
    teacher_running_mean: Tensor | None
    teacher_running_var: Tensor | None
    teacher_num_batches_tracked: Tensor | None

    @classmethod
    def from_float(cls, module: nn.Module) -> DualBatchNorm:
        """The dual layer around ``module``'s own parameters; TypeError for anything but BatchNorm1d, 2d or 3d."""
        kind = _DUAL_TYPES.get(type(module))
        if kind is None:
            raise TypeError(f"DualBatchNorm.from_float takes BatchNorm1d, 2d or 3d, got {type(module).__name__}")
        dual = kind.__new__(kind)
        dual.__dict__ = _own_state(module)
        for name in ("weight", "bias"):
            own = getattr(module, name)
            frozen = None if own is None else nn.Parameter(own.detach().clone(), requires_grad=False)
            dual.register_parameter(f"teacher_{name}", frozen)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            own = getattr(module, name)
            dual.register_buffer(f"teacher_{name}", None if own is None else own.clone())
        dual.branch = "student"
        return dual

    @torch.no_grad()
    def to_float(self, branch: str = "student") -> nn.Module:
        """A plain BatchNorm with this branch's statistics and affine parameters; nothing is shared."""
        module = self.float_type.__new__(self.float_type)
        module.__dict__ = _own_state(self, without=("branch",))
        prefix = "teacher_" if branch == "teacher" else ""
        parameters = {name: getattr(self, prefix + name) for name in ("weight", "bias")}
        module._parameters = {n: None if p is None else nn.Parameter(p.clone()) for n, p in parameters.items()}
        buffers = {n: getattr(self, prefix + n) for n in ("running_mean", "running_var", "num_batches_tracked")}
        module._buffers = {n: None if b is None else b.clone() for n, b in buffers.items()}
        return module

    @torch.no_grad()
    def start_teacher(self, how: str) -> None:
        """Start the full net's set ``"fresh"`` (mean 0, variance 1, affine 1 and 0) or as a ``"copy"``."""
        fresh = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0, "num_batches_tracked": 0}
        for name, value in fresh.items():
            teacher = getattr(self, f"teacher_{name}")
            if teacher is None:
                continue
            if how == "copy":
                teacher.copy_(getattr(self, name))
            else:
                teacher.fill_(value)
            if isinstance(teacher, nn.Parameter):
                teacher.requires_grad_(True)

    def _normalize(self, x: Tensor, prefix: str) -> Tensor:
        mean, var = getattr(self, f"{prefix}running_mean"), getattr(self, f"{prefix}running_var")
        factor = 0.0 if self.momentum is None else self.momentum
        tracked = getattr(self, f"{prefix}num_batches_tracked")
        if self.training and self.track_running_stats and tracked is not None:
            tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(tracked)
        update = not self.training or self.track_running_stats
        return F.batch_norm(
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
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            if f"{prefix}teacher_{name}" not in state_dict and f"{prefix}{name}" in state_dict:
                state_dict[f"{prefix}teacher_{name}"] = state_dict[f"{prefix}{name}"]
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
