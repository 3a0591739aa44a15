"""The public operations; those on masks and packed bits come from modules of their own.

Signatures are stable; :mod:`pqk_fast.dispatch` chooses the implementation by the tensors' device.

Shapes and dtypes, unless a function says otherwise: ``weight`` floating point (fp32, bf16, fp16) of any shape; ``mask``
bool of the same shape, True = kept; ``step`` fp32 of shape [], [1] or [C] (one for each slice along dimension 0), > 0;
``bits`` an int in 2..8. Gradients follow :mod:`pqk_fast.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pqk_fast import dispatch, reference
from pqk_fast.autograd import FakeQuant, FakeQuantAll, PrunedOnly, apply
from pqk_fast.dual_ops import DualConv2d, DualLinear
from pqk_fast.packing import pack_bits, pack_int4, pack_ints, unpack_bits, unpack_int4, unpack_ints
from pqk_fast.reference import WEIGHT_DTYPES
from pqk_fast.selection import (
    NonFiniteWeightError,
    group_mask,
    group_mask_,
    magnitude_histogram,
    mask_at_threshold_,
    masked_count,
    tie_counts,
    topk_mask,
    topk_mask_,
    topk_threshold,
)
from pqk_fast.settings import check_bits, check_choice, is_quantized

__all__ = [
    "NonFiniteWeightError",
    "dual_conv2d",
    "dual_linear",
    "fake_quant",
    "fake_quant_all",
    "group_mask",
    "group_mask_",
    "magnitude_histogram",
    "mask_at_threshold_",
    "masked_count",
    "output_dtype",
    "pack_bits",
    "pack_int4",
    "pack_ints",
    "prune",
    "teacher_weight",
    "tie_counts",
    "topk_mask",
    "topk_mask_",
    "topk_threshold",
    "unpack_bits",
    "unpack_int4",
    "unpack_ints",
]


def _check_pruned(weight: Tensor, mask: Tensor) -> None:
    if weight.dtype not in WEIGHT_DTYPES:
        raise TypeError(f"weight must be floating point (fp32, bf16 or fp16), got {weight.dtype}; use weight.float()")
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise ValueError(
            f"mask must be bool of the weight's shape {tuple(weight.shape)}, got {mask.dtype} {tuple(mask.shape)}; "
            "make one with torch.ones_like(weight, dtype=torch.bool)"
        )


def _check_quantizer(weight: Tensor, mask: Tensor, step: Tensor, bits: int, ste: str = "identity") -> None:
    check_bits(bits)
    check_choice("ste", ste, reference.STE_MODES)
    _check_pruned(weight, mask)
    channels = weight.shape[0] if weight.dim() else 1
    if not step.is_floating_point() or step.dim() > 1 or step.numel() not in (1, channels):
        raise ValueError(
            f"step must be floating point of shape [], [1] or [{channels}] (one value per output channel), "
            f"got {step.dtype} {tuple(step.shape)}"
        )


def output_dtype(weight: Tensor, dtype: torch.dtype | None = None) -> torch.dtype:
    """What :func:`fake_quant` gives: ``dtype``, or the autocast dtype of the weight's device, or the weight's own."""
    if dtype is not None:
        if dtype not in WEIGHT_DTYPES:
            raise TypeError(f"dtype must be floating point (fp32, bf16 or fp16), got {dtype}")
        return dtype
    return torch.get_autocast_dtype(weight.device.type) if _autocasts(weight) else weight.dtype


def _autocasts(tensor: Tensor) -> bool:
    device = tensor.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def fake_quant(
    weight: Tensor,
    mask: Tensor,
    step: Tensor,
    bits: int,
    ste: str = "identity",
    mask_gradients: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Prune, then quantize and dequantize: ``S clip(round(w M / S), -Q, Q)`` (Eqs 2-4), ``Q = 2^(bits-1) - 1``.

    Computed in fp32; the result has the weight's shape and ``dtype`` (default: the autocast dtype, else the weight's).
    Backward: straight-through for the weight, ``ste="identity"`` (the paper's: every weight, pruned ones too) or
    ``"clipped"`` (LSQ's: zero where ``|w M / S| > Q``); ``mask_gradients=True`` zeroes it where pruned. The step gets
    LSQ's gradient without its scale.

    Raises ValueError or TypeError for bits outside 2..8, an unknown ``ste``, a mask or step of wrong shape or dtype.
    """
    _check_quantizer(weight, mask, step, bits, ste)
    out: Tensor = apply(FakeQuant, weight, mask, step, bits, ste, mask_gradients, output_dtype(weight, dtype))
    return out


def prune(weight: Tensor, mask: Tensor, mask_gradients: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    """``w M`` alone, for networks that are pruned and not quantized; shapes and gradients as in :func:`fake_quant`.

    Raises TypeError for a weight, ValueError for a mask of wrong shape or dtype.
    """
    _check_pruned(weight, mask)
    zero = 0.0 if mask_gradients else weight - weight.detach()  # 0, through which the gradient passes
    pruned = torch.where(mask, weight, zero)
    return pruned.to(output_dtype(weight, dtype))


def fake_quant_all(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    steps: Sequence[Tensor],
    bits: int | Sequence[int],
    ste: str = "identity",
    mask_gradients: bool = False,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """:func:`fake_quant` for every layer of a model; ``bits`` is one int or one for each weight.

    Raises ValueError if the lists differ in length.
    """
    each = list(bits) if isinstance(bits, Sequence) else [bits] * len(weights)
    if not len(weights) == len(masks) == len(steps) == len(each):
        raise ValueError(
            "weights, masks, steps and bits must have one entry for each layer, "
            f"got {len(weights)}, {len(masks)}, {len(steps)} and {len(each)}"
        )
    if not each:
        return []
    for weight, mask, step, k in zip(weights, masks, steps, each, strict=True):
        _check_quantizer(weight, mask, step, k, ste)
    if len({(weight.dtype, weight.device) for weight in weights}) > 1:  # only lists of one kind go together
        layers = zip(weights, masks, steps, each, strict=True)
        return [fake_quant(w, m, s, k, ste, mask_gradients, dtype) for w, m, s, k in layers]
    common = (list(masks), each, ste, mask_gradients, output_dtype(weights[0], dtype))
    return list(apply(FakeQuantAll, *common, *_distinct(weights), *_distinct(steps)))


def _distinct(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A tensor that comes again (tied layers) is replaced by an alias.

    torch.compile keeps only the last of the gradients that an autograd.Function gives for one tensor (torch 2.11).
    """
    if len({id(tensor) for tensor in tensors}) == len(tensors):
        return list(tensors)
    first = {id(tensor): index for index, tensor in reversed(list(enumerate(tensors)))}
    return [t if first[id(t)] == index else t.view_as(t) for index, t in enumerate(tensors)]


def teacher_weight(weight: Tensor, mask: Tensor, step: Tensor, bits: int, teacher_weights: str = "latent") -> Tensor:
    """The full net's weight in phase 2, in the weight's dtype; its gradient reaches the pruned weights only (Eq. 12).

    ``"latent"``: the weight itself, no copy. ``"shared"``: the kept part fake-quantized, as the student has it; with
    ``bits=32``, where nothing is quantized, that is the weight itself too.
    """
    if is_quantized(bits):
        _check_quantizer(weight, mask, step, bits)
    else:
        _check_pruned(weight, mask)
    check_choice("teacher_weights", teacher_weights, reference.TEACHER_WEIGHTS)
    full: Tensor = apply(PrunedOnly, weight, mask)
    if teacher_weights == "latent" or not is_quantized(bits):
        return full
    quantized = dispatch.fake_quant(weight.detach(), mask, step.detach(), bits, weight.dtype)
    return torch.where(mask, quantized, full)


def _dual_input(x: Tensor, weight: Tensor, shape: str, fits: bool) -> Tensor:
    """``x`` in the dtype of the products, if it has two halves; its dtype must be the weight's without autocast."""
    if not fits or x.shape[0] % 2:
        raise ValueError(
            f"x must be {shape}, student rows first, then as many teacher rows; got {tuple(x.shape)}; "
            "stack it with torch.cat([x_student, x_teacher])"
        )
    dtype = output_dtype(weight)
    if x.dtype != dtype and not _autocasts(x):
        raise TypeError(f"x must have the weight's dtype {weight.dtype}, got {x.dtype}; use autocast, or x.to(weight)")
    return x.to(dtype)


def _check_dual(
    weight: Tensor, mask: Tensor, step: Tensor, bits: int, bias: Tensor | None, teacher_weights: str, ste: str
) -> None:
    _check_quantizer(weight, mask, step, bits, ste)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have one value per output, [{weight.shape[0]}], got {tuple(bias.shape)}")
    check_choice("teacher_weights", teacher_weights, reference.TEACHER_WEIGHTS)


def dual_linear(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    step: Tensor,
    bits: int,
    bias: Tensor | None = None,
    teacher_weights: str = "latent",
    ste: str = "identity",
) -> Tensor:
    """Student and teacher linear layer of phase 2 in one call.

    ``x [2B, ..., in]``, student rows first; ``weight [out, in]``; ``bias [out]``; result ``[2B, ..., out]``. The first
    half is ``x @ wbar.T + b``, the second ``x @ w.T + b``. Backward: ``dw = M g_S + (1 - M) g_T`` (Eqs 11, 12), ``dx``
    of both halves, ``db`` from the student rows only, none for the step.

    Raises ValueError for an odd number of rows and as :func:`fake_quant` does.
    """
    _check_dual(weight, mask, step, bits, bias, teacher_weights, ste)
    if weight.dim() != 2:
        raise ValueError(f"weight must be [out, in], got {tuple(weight.shape)}")
    ins = weight.shape[1]
    x = _dual_input(x, weight, f"[2B, ..., {ins}]", x.dim() >= 2 and x.shape[-1] == ins)
    constants = (mask, step.detach(), bits, ste, teacher_weights == "shared")
    out: Tensor = apply(DualLinear, x.flatten(0, -2), weight, bias, *constants)
    return out.unflatten(0, x.shape[:-1])


def dual_conv2d(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    step: Tensor,
    bits: int,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    teacher_weights: str = "latent",
    ste: str = "identity",
) -> Tensor:
    """:func:`dual_linear` for convolution: ``x [2B, C_in, H, W]``, ``weight [C_out, C_in / groups, kh, kw]``."""
    _check_dual(weight, mask, step, bits, bias, teacher_weights, ste)
    if weight.dim() != 4 or groups < 1 or weight.shape[0] % groups:
        raise ValueError(
            f"weight must be [C_out, C_in / groups, kh, kw] with C_out a multiple of groups, got {tuple(weight.shape)} "
            f"and groups={groups}"
        )
    channels = weight.shape[1] * groups
    x = _dual_input(x, weight, f"[2B, {channels}, H, W]", x.dim() == 4 and x.shape[1] == channels)
    steps, spread = _pair(stride), _pair(dilation)
    around = [0, 0]
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(spread, weight.shape[2:], strict=True)]
        around = [t // 2 for t in total]
        x = F.pad(x, (0, total[1] % 2, 0, total[0] % 2))
    elif padding != "valid":
        around = _pair(padding)
    constants = (mask, step.detach(), bits, ste, teacher_weights == "shared")
    out: Tensor = apply(DualConv2d, x, weight, bias, *constants, steps, around, spread, groups)
    return out


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)
