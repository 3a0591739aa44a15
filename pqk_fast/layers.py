"""Drop-in layers: the latent fp32 weight stays one Parameter named ``weight``; mask and step size sit beside it.

A layer's ``phase`` (1 or 2) and ``branch`` ("student", "teacher" or "stacked") are plain Python attributes, set for a
whole model by :mod:`pqk_fast.prepare` and :mod:`pqk_fast.branches`. The phase is in the state dict as well
(``pqk_phase``), so that a model loaded from phase 2 goes on in phase 2.

| phase | branch  | forward uses                       | weight gradient reaches | step size |
|-------|---------|------------------------------------|-------------------------|-----------|
| 1     | student | ``wbar`` (Eqs 2-4)                 | all (or kept, by option)| learns    |
| 2     | student | ``wbar``                           | kept (Eq. 11)           | by option |
| 2     | teacher | latent ``w`` (Eq. 12)              | pruned (Eq. 12)         | -         |
| 2     | stacked | first half of the batch student's, second half teacher's       ||           |
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqk_fast import ops, sharding
from pqk_fast.config import PQKConfig
from pqk_fast.settings import is_quantized
from pqk_fast.step_size import initial_step
from pqk_fast.two_phase import TwoPhase, plain_copy, take_over, within_backward

Layer = TypeVar("Layer", bound="PQKLayer")


# The remedy that is always at hand.
_ANEW = "leave weight_mask, weight_step and pqk_phase out to start anew from the weight"


class PQKLayer(TwoPhase):
    """What the three layers share. Not instantiated itself.

    Attributes: ``weight`` (latent, Parameter), ``weight_mask`` (bool buffer, True = kept), ``weight_step`` (fp32
    Parameter [1] or [C]), ``config``, ``bits``, ``phase``, ``branch``, ``ran`` (True once a forward has used the
    layer).
    """

    float_type: type[nn.Module]
    added = ("weight_mask", "weight_step")
    weight: Tensor
    bias: Any
    weight_mask: Tensor
    weight_step: nn.Parameter
    bits: int
    phase2_step = "frozen"  # or "learned"
    own_sparsity: float | None = None  # what layer_sparsity says of it
    fused: bool  # see pqk_fast.fusion
    fed: tuple[Tensor, Any] | None  # the student's weight for the forward under way, and what it was made from

    def __init__(self, *args: Any, config: PQKConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._attach(config or PQKConfig())

    def _attach(self, config: PQKConfig, bits: int | None = None) -> None:
        mask = torch.ones_like(self.weight, dtype=torch.bool)
        self.register_buffer("weight_mask", mask)
        self.config = config
        self.bits = config.bits if bits is None else bits
        self.weight_step = nn.Parameter(self._first_step(self.weight, mask), is_quantized(self.bits))
        self.ran, self.fused, self.fed = False, False, None
        self._start()

    def _first_step(self, weight: Tensor, mask: Tensor) -> Tensor:
        if not is_quantized(self.bits):
            return torch.ones(1, dtype=torch.float32, device=weight.device)
        return initial_step(weight, mask, self.bits, self.config.step_init, self.config.per_channel)

    def set_phase(self, phase: int) -> None:
        """Phase 2 freezes the step size, unless ``start_phase2`` was told otherwise; the mask is the Pruner's, which
        refuses phase 2."""
        learned = self._step_learns()
        super().set_phase(phase)
        self._let_step_learn(learned)

    def set_phase2_step(self, step_size: str) -> None:
        """Whether in phase 2 the step size is "frozen" or "learned"."""
        learned = self._step_learns()
        self.phase2_step = step_size
        self._let_step_learn(learned)

    def _let_step_learn(self, before: bool) -> None:
        """Or not: if that is another than before, so that one that the user has frozen stays so."""
        if (now := self._step_learns()) != before:
            self.weight_step.requires_grad_(now and self.weight.requires_grad)
        self.weight_step.grad = None

    def _step_learns(self) -> bool:
        return is_quantized(self.bits) and (self.phase == 1 or self.phase2_step == "learned")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves and casts as ever, but the step size stays fp32: in fp16 its smallest value is 0, in bf16 it stalls."""
        step = self.weight_step.detach()
        super()._apply(fn, recurse)
        if self.weight_step.dtype != torch.float32:
            self.weight_step.data = step.to(self.weight_step.device)
        return self

    def _read_float(self, entries: dict[str, Tensor], metadata: dict[str, Any]) -> Iterator[str]:
        """A float layer's weight: the mask keeps all of it and the step size is set from it, as ``prepare`` does."""
        yield from self._refuse_dtype(entries, metadata)
        if "weight" not in entries:
            return
        weight = entries["weight"].detach()
        if any(hasattr(tensor, "full_tensor") for tensor in (weight, self.weight)):
            yield "weight is sharded: a float state dict sets the step size anew, so load it before fully_shard"
        elif weight.shape == self.weight.shape:
            if not metadata.get("assign_to_params_buffers"):
                weight = weight.to(self.weight.dtype)
            if not weight.is_meta and not weight.isfinite().all():
                yield "weight holds NaN or infinity, from which no step size can be set: load a good checkpoint"
            mask = torch.ones_like(weight, dtype=torch.bool)
            entries["weight_mask"] = mask
            entries["weight_step"] = self._first_step(weight, mask)
        yield from super()._read_float(entries, metadata)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """With the bits in the metadata, which a plain dict lacks: then nobody knows whether they fit."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if metadata := getattr(destination, "_metadata", {}).get(prefix[:-1]):
            metadata["bits"] = self.bits

    def _read_prepared(self, entries: dict[str, Tensor], metadata: dict[str, Any]) -> Iterator[str]:
        bits = metadata.get("bits", self.bits)
        if bits != self.bits:
            wants = f"prepare the model with PQKConfig(bits={bits}), or layer_bits"
            yield f"weight was trained for {bits} bits, the model's has {self.bits}: {wants}, or {_ANEW}"
        yield from self._refuse_dtype(entries, metadata)
        missing = [name for name in self.added if name not in entries]
        if "weight" in entries and missing:
            yield f"{missing[0]} is missing beside weight: give both, or {_ANEW}"
        if "weight_mask" in entries:
            yield from self._read_mask(entries)
        if "weight_step" in entries:
            yield from self._read_step(entries)
        yield from super()._read_prepared(entries, metadata)

    @staticmethod
    def _refuse_dtype(entries: dict[str, Tensor], metadata: dict[str, Any]) -> Iterator[str]:
        weight = entries.get("weight")
        if weight is not None and metadata.get("assign_to_params_buffers") and weight.dtype not in ops.WEIGHT_DTYPES:
            yield f"weight is {weight.dtype}, expected fp32, bf16 or fp16: cast it, or load without assign=True"

    @staticmethod
    def _read_mask(entries: dict[str, Tensor]) -> Iterator[str]:
        """Any dtype that holds nothing but 0 and 1."""
        mask = entries["weight_mask"]
        if mask.dtype == torch.bool:
            return
        if not mask.is_meta and not ((mask == 0) | (mask == 1)).all():
            yield f"weight_mask ({mask.dtype}) holds other values than 0 and 1: make it bool, True = kept, or {_ANEW}"
        entries["weight_mask"] = mask.bool()

    def _read_step(self, entries: dict[str, Tensor]) -> Iterator[str]:
        """Positive and finite; in any layout of one number for the layer or one for each channel, as the layer has."""
        step, own = entries["weight_step"].detach(), self.weight_step
        if step.numel() != own.numel():
            if 1 in (step.numel(), own.numel()):
                has = "one step size" if step.numel() == 1 else f"{step.numel()} step sizes"
                wants = f"prepare the model with PQKConfig(per_channel={step.numel() != 1})"
                yield f"weight_step holds {has}, the model's {own.numel()}: {wants}, or {_ANEW}"
            return  # else a size mismatch like any other
        if step.shape != own.shape and step.squeeze().dim() <= 1:
            step = step.reshape(own.shape)
        if not step.is_meta:
            values = sharding.local(step).float()
            if not ((values > 0) & values.isfinite()).all():
                yield (
                    f"weight_step is {float(values.min()):g} to {float(values.max()):g}, expected positive numbers: "
                    f"training had diverged; load an earlier checkpoint, or {_ANEW}"
                )
        if step.shape != entries["weight_step"].shape or step.dtype != torch.float32:
            entries["weight_step"] = step.float()

    @classmethod
    def from_float(cls: type[Layer], module: nn.Module, config: PQKConfig, bits: int | None = None) -> Layer:
        """The layer around ``module``'s own parameters (shared, not copied). Masks keep everything at first.

        ``bits`` are the layer's own, by default the config's.

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
        take_over(layer, module)
        layer._attach(config, bits)
        return layer

    @torch.no_grad()
    def to_float(self, branch: str = "student") -> nn.Module:
        """A plain float layer with this branch's weight baked in; nothing is shared with the PQK layer."""
        weight = self.student_weight(self.weight.dtype) if branch == "student" else self.full_weight()
        return plain_copy(self, self.float_type, {"weight": weight, "bias": self.bias})

    def student_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """``wbar``: masked, fake-quantized. In phase 2 its gradient reaches kept weights only; S is a constant, unless
        ``start_phase2`` was told otherwise."""
        weight, mask, _, bits, _, hard = arguments = self.student_arguments()
        return ops.fake_quant(*arguments, dtype) if is_quantized(bits) else ops.prune(weight, mask, hard, dtype)

    def student_arguments(self) -> tuple[Tensor, Tensor, Tensor, int, str, bool]:
        """What :func:`pqk_fast.ops.fake_quant` takes for the student's weight: weight, mask, step, bits, ste, hard."""
        frozen = self.phase == 2
        step: Tensor = self.weight_step
        if step.requires_grad and not self._step_learns():
            step = step.detach()
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

    def _begin_forward(self) -> str:
        """The branch to compute."""
        self.ran = True
        if self.weight_step.dtype != torch.float32:  # kept fp32 always, so somebody casts parameters for the forward
            raise TypeError(
                f"the step size reaches the forward as {self.weight_step.dtype}, and so does the latent weight: both "
                "must stay fp32; with fully_shard leave MixedPrecisionPolicy's param_dtype unset (reduce_dtype may be "
                "set) and use torch.autocast"
            )
        if self.fused and self.fed is None and within_backward():
            raise RuntimeError(
                "a prepared layer was computed again during backward (activation checkpointing), when the weight that "
                "fuse(model) made for it is gone: call unfuse(model)"
            )
        return self.branch_now()

    def _weight_and_bias(self, branch: str) -> tuple[Tensor, Tensor | None]:
        if branch == "student":
            fed = self.fed
            return fed[0] if fed and fed[1] == self.fed_from() else self.student_weight(), self.bias
        # Biases follow the student's loss alone.
        return self.full_weight(), None if self.bias is None else self.bias.detach()

    def _is_fused(self) -> bool:
        """Whether the stacked branch is one operation: those quantize, and know no gradient of the step size."""
        return is_quantized(self.bits) and not self._step_learns()

    def _by_halves(self, x: Tensor) -> Tensor:
        """The stacked branch where the fused operations are no help."""
        if x.shape[0] % 2:
            raise ValueError(f"x must hold student rows first, then as many teacher rows; got {tuple(x.shape)}")
        halves = zip(x.chunk(2), ("student", "teacher"), strict=True)
        return torch.cat([self._layer(half, *self._weight_and_bias(branch)) for half, branch in halves])

    def _layer(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The float layer, with this weight and bias."""
        raise NotImplementedError

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
        branch = self._begin_forward()
        if branch != "stacked":
            return self._layer(x, *self._weight_and_bias(branch))
        if not self._is_fused():
            return self._by_halves(x)
        return ops.dual_linear(x, *self._dual_arguments(), **self._dual_options())

    def _layer(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class PQKConv2d(PQKLayer, nn.Conv2d):
    """nn.Conv2d with a masked, fake-quantized weight: ``x [B, C, H, W]``."""

    float_type = nn.Conv2d

    def forward(self, x: Tensor) -> Tensor:
        branch = self._begin_forward()
        if branch != "stacked":
            return self._layer(x, *self._weight_and_bias(branch))
        if not self._is_fused():
            return self._by_halves(x)
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        shape: Any = (self.stride, padding, self.dilation, self.groups)
        return ops.dual_conv2d(x, *self._dual_arguments(), *shape, **self._dual_options())

    def _layer(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)


class PQKConv1d(PQKLayer, nn.Conv1d):
    """nn.Conv1d with a masked, fake-quantized weight: ``x [B, C, L]``."""

    float_type = nn.Conv1d

    def forward(self, x: Tensor) -> Tensor:
        branch = self._begin_forward()
        if branch != "stacked":
            return self._layer(x, *self._weight_and_bias(branch))
        if not self._is_fused():
            return self._by_halves(x)
        padding: Any = self.padding if isinstance(self.padding, str) else (0, self.padding[0])
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        weight, mask, step, bits, bias = self._dual_arguments()
        # A convolution along the second of two spatial dimensions, the first of size 1.
        shape: Any = ((1, self.stride[0]), padding, (1, self.dilation[0]), self.groups)
        flat = (weight.unsqueeze(2), mask.unsqueeze(2), step, bits, bias)
        return ops.dual_conv2d(x.unsqueeze(2), *flat, *shape, **self._dual_options()).squeeze(2)

    def _layer(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)


PQK_LAYERS: tuple[type[PQKLayer], ...] = (PQKLinear, PQKConv1d, PQKConv2d)
