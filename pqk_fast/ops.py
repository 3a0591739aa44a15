"""The public operations. Signatures are stable; the implementation behind each may be exchanged for a faster one.

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

from pqk_fast import reference
from pqk_fast.autograd import FakeQuant, PrunedOnly
from pqk_fast.config import check_bits, check_choice, check_sparsity

__all__ = [
    "NonFiniteWeightError",
    "dual_conv2d",
    "dual_linear",
    "fake_quant",
    "fake_quant_all",
    "masked_count",
    "pack_bits",
    "pack_int4",
    "teacher_weight",
    "topk_mask",
    "topk_mask_",
    "unpack_bits",
    "unpack_int4",
]


# fp64 is not among them: all is computed in fp32, which would silently lose half of it.
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _check_quantizer(weight: Tensor, mask: Tensor, step: Tensor, bits: int, ste: str = "identity") -> None:
    check_bits(bits)
    check_choice("ste", ste, reference.STE_MODES)
    if weight.dtype not in WEIGHT_DTYPES:
        raise TypeError(f"weight must be floating point (fp32, bf16 or fp16), got {weight.dtype}; use weight.float()")
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise ValueError(
            f"mask must be bool of the weight's shape {tuple(weight.shape)}, got {mask.dtype} {tuple(mask.shape)}; "
            "make one with torch.ones_like(weight, dtype=torch.bool)"
        )
    channels = weight.shape[0] if weight.dim() else 1
    if not step.is_floating_point() or step.dim() > 1 or step.numel() not in (1, channels):
        raise ValueError(
            f"step must be floating point of shape [], [1] or [{channels}] (one value per output channel), "
            f"got {step.dtype} {tuple(step.shape)}"
        )


def _output_dtype(weight: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is not None:
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be floating point (fp32, bf16 or fp16), got {dtype}")
        return dtype
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


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
    out: Tensor = FakeQuant.apply(weight, mask, step, bits, ste, mask_gradients, _output_dtype(weight, dtype))
    return out


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
    layers = zip(weights, masks, steps, each, strict=True)
    return [fake_quant(w, m, s, k, ste, mask_gradients, dtype) for w, m, s, k in layers]


def teacher_weight(weight: Tensor, mask: Tensor, step: Tensor, bits: int, teacher_weights: str = "latent") -> Tensor:
    """The full net's weight in phase 2, in the weight's dtype; its gradient reaches the pruned weights only (Eq. 12).

    ``"latent"``: the weight itself, no copy. ``"shared"``: the kept part fake-quantized, as the student has it.
    """
    _check_quantizer(weight, mask, step, bits)
    check_choice("teacher_weights", teacher_weights, reference.TEACHER_WEIGHTS)
    full: Tensor = PrunedOnly.apply(weight, mask)
    if teacher_weights == "latent":
        return full
    return torch.where(mask, reference.fake_quant(weight.detach(), mask, step.detach(), bits), full)


def _dual_weights(
    weight: Tensor, mask: Tensor, step: Tensor, bits: int, teacher_weights: str, ste: str
) -> tuple[Tensor, Tensor]:
    """Student's and teacher's weight of phase 2: S frozen, gradients to complementary sets (Eqs 11, 12)."""
    student = fake_quant(weight, mask, step.detach(), bits, ste, mask_gradients=True)
    return student, teacher_weight(weight, mask, step, bits, teacher_weights)


def _halves(x: Tensor, shape: str, fits: bool) -> tuple[Tensor, Tensor]:
    if not fits or x.shape[0] % 2:
        raise ValueError(
            f"x must be {shape}, student rows first, then as many teacher rows; got {tuple(x.shape)}; "
            "stack it with torch.cat([x_student, x_teacher])"
        )
    student, teacher = x.chunk(2) if x.shape[0] else (x, x)
    return student, teacher


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
    x_student, x_teacher = _halves(x, "[2B, ..., in]", x.dim() >= 2)
    student, teacher = _dual_weights(weight, mask, step, bits, teacher_weights, ste)
    bias_teacher = None if bias is None else bias.detach()
    return torch.cat([F.linear(x_student, student, bias), F.linear(x_teacher, teacher, bias_teacher)])


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
    x_student, x_teacher = _halves(x, "[2B, C, H, W]", x.dim() == 4)
    student, teacher = _dual_weights(weight, mask, step, bits, teacher_weights, ste)
    bias_teacher = None if bias is None else bias.detach()
    shape: Any = (stride, padding, dilation, groups)
    return torch.cat([F.conv2d(x_student, student, bias, *shape), F.conv2d(x_teacher, teacher, bias_teacher, *shape)])


def masked_count(weights: Sequence[Tensor], sparsity: float) -> int:
    """How many weights a sparsity masks: ``int(p N)``, in double precision on the host."""
    return int(check_sparsity(sparsity) * sum(weight.numel() for weight in weights))


class NonFiniteWeightError(ValueError):
    """Magnitudes with NaN or infinity cannot be ranked; ``index`` says which tensor of the list holds one."""

    def __init__(self, index: int, weight: Tensor, name: str | None = None) -> None:
        self.index = index
        what = f"weights[{index}]" if name is None else f"the weight of layer {name!r}"
        super().__init__(
            f"{what} of shape {tuple(weight.shape)} holds NaN or infinity: magnitudes cannot be ranked; training has "
            "diverged, go back to the last good checkpoint and lower the learning rate"
        )


def _check_selectable(weights: Sequence[Tensor]) -> None:
    if not weights:
        raise ValueError("expected at least one weight tensor to select from, got an empty list")
    for index, weight in enumerate(weights):
        if not weight.is_floating_point():
            raise TypeError(f"weights[{index}] must be floating point, got {weight.dtype}")
        if weight.device.type == "cpu" and not torch.isfinite(weight).all():
            raise NonFiniteWeightError(index, weight)


def topk_mask(weights: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    """Masks that prune exactly ``int(sparsity * N)`` of the N weights of all tensors together, the smallest ``|w|``.

    Among equal magnitudes the lower flat index (in the order of the list) stays. Returns one bool mask for each weight.
    Raises ValueError for an empty list, a sparsity outside [0, 1), or NaN or infinity in a weight (naming its index).
    """
    _check_selectable(weights)
    keep = sum(weight.numel() for weight in weights) - masked_count(weights, sparsity)
    return reference.topk_mask(weights, keep)


def topk_mask_(masks: Sequence[Tensor], weights: Sequence[Tensor], k: Tensor | int) -> None:
    """Set ``masks`` in place so that exactly the ``k`` weights of largest ``|w|`` are kept, over all tensors together.

    ``k`` is the number kept, an int or an integer tensor with one element (read on the device, no host sync). Ties and
    errors as in :func:`topk_mask`; ValueError also for masks that are not bool or do not fit their weights, and for an
    int outside 0..N (the value of a tensor is not read).
    """
    _check_selectable(weights)
    total = sum(weight.numel() for weight in weights)
    if isinstance(k, Tensor):
        if k.numel() != 1 or k.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"k must be an int32 or int64 tensor with one element, got {k.dtype} {tuple(k.shape)}")
    elif isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= total:
        raise ValueError(f"k must be an integer in 0..{total}, the number of weights kept; got {k!r}")
    if len(masks) != len(weights):
        raise ValueError(f"expected one mask for each weight, got {len(masks)} masks and {len(weights)} weights")
    for index, (mask, weight) in enumerate(zip(masks, weights, strict=True)):
        if mask.dtype != torch.bool or mask.shape != weight.shape:
            raise ValueError(
                f"masks[{index}] must be bool of shape {tuple(weight.shape)}, got {mask.dtype} {tuple(mask.shape)}"
            )
    for mask, chosen in zip(masks, reference.topk_mask(weights, k), strict=True):
        mask.copy_(chosen)


def _check_integers(name: str, values: Tensor, low: int, high: int) -> None:
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{name} must be an integer tensor, got {values.dtype}")
    if values.numel() and not low <= int(values.min()) <= int(values.max()) <= high:
        raise ValueError(f"{name} must lie in {low}..{high}, got {int(values.min())}..{int(values.max())}")


def _check_packed(packed: Tensor, numel: int, size: int, what: str) -> None:
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise TypeError(f"packed must be a flat uint8 tensor, got {packed.dtype} {tuple(packed.shape)}")
    if numel < 0 or packed.numel() != size:
        raise ValueError(
            f"{numel} {what} take {max(size, 0)} bytes, got {packed.numel()}: wrong count or a torn buffer"
        )


def pack_int4(q: Tensor) -> Tensor:
    """Pack integers in -8..7 as two's complement nibbles, low nibble first: uint8 ``[(n + 1) // 2]``."""
    _check_integers("q", q, -8, 7)
    return reference.pack_int4(q)


def unpack_int4(packed: Tensor, numel: int) -> Tensor:
    """The inverse of :func:`pack_int4`: int8 ``[numel]``. Raises ValueError if ``packed`` has another size."""
    _check_packed(packed, numel, (numel + 1) // 2, "4-bit values")
    return reference.unpack_int4(packed, numel)


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a bool mask eight bits a byte, least significant bit first: uint8 ``[(n + 7) // 8]``."""
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    return reference.pack_bits(mask)


def unpack_bits(packed: Tensor, numel: int) -> Tensor:
    """The inverse of :func:`pack_bits`: bool ``[numel]``. Raises ValueError if ``packed`` has another size."""
    _check_packed(packed, numel, (numel + 7) // 8, "mask bits")
    return reference.unpack_bits(packed, numel)
