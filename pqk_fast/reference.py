"""The definition of PQK: Eqs 1-12 in plain PyTorch, one function an equation.

Everything else in the library (kernels, operations, layers, trainer) is tested against this file. It is written to be
read beside the paper (Kim, Chang, Kwak, "PQK: Model Compression via Pruning, Quantization, and Knowledge Distillation",
Interspeech 2021, arXiv 2106.14681), not to be fast.

Symbols: ``w`` latent weight, ``M`` mask (True = kept), ``S`` step size (> 0; one value, or one per output channel),
``k`` bits, ``Q = 2^(k-1) - 1``, ``z`` logits ``[B, classes]``, ``y`` class indices ``[B]`` (int64), ``T`` temperature.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

STE_MODES = ("identity", "clipped")
TEACHER_WEIGHTS = ("latent", "shared")


def sparsity_at(epoch: float, epochs: int, target: float, initial: float = 0.0, start: float = 0.0) -> float:
    """Eq. 1: cubic sparsity schedule ``p_c = p_t + (p_i - p_t) (1 - (c - c0) / n)^3``.

    ``epoch`` is c, ``epochs`` n, ``target`` p_t, ``initial`` p_i, ``start`` c0. The fraction is held at its ends, so
    that ``epoch < start`` gives p_i and ``epoch >= start + epochs`` gives p_t.
    """
    done = min(max((epoch - start) / epochs, 0.0), 1.0) if epochs > 0 else 1.0
    return target + (initial - target) * (1.0 - done) ** 3


def levels(bits: int) -> int:
    """``Q = 2^(k-1) - 1``: the largest quantized magnitude (4 bits: 7, 8 bits: 127)."""
    return 2 ** (bits - 1) - 1


def per_channel(step: Tensor, weight: Tensor) -> Tensor:
    """``S`` of shape [], [1] or [C] as fp32 that broadcasts against ``weight`` along its dimension 0."""
    step = step.float()
    return step.reshape(-1, *[1] * (weight.dim() - 1)) if step.numel() != 1 else step.reshape(())


def clip(x: Tensor, low: float, high: float) -> Tensor:
    """Eq. 3: ``min(max(x, a), b)``; NaN stays NaN."""
    return x.clamp(low, high)


def scaled(weight: Tensor, mask: Tensor, step: Tensor) -> Tensor:
    """``w M / S`` in fp32, by selection and one reciprocal: the unclipped argument of Eq. 2."""
    kept = torch.where(mask, weight.float(), 0.0)
    return kept * per_channel(step, weight).reciprocal()


def quantize(weight: Tensor, mask: Tensor, step: Tensor, bits: int) -> Tensor:
    """Eq. 2: ``q = round(clip(w M / S, -Q, Q))``, prune first, then quantize; ties to even; never -0. fp32 integers."""
    q = levels(bits)
    return torch.round(clip(scaled(weight, mask, step), -q, q)) + 0.0


def dequantize(q: Tensor, step: Tensor) -> Tensor:
    """Eq. 4: ``wbar = S q`` in fp32."""
    return q * per_channel(step, q)


def fake_quant(weight: Tensor, mask: Tensor, step: Tensor, bits: int, dtype: torch.dtype | None = None) -> Tensor:
    """Eqs 2-4 together, computed in fp32 and rounded once to ``dtype`` (default: the weight's own)."""
    dtype = dtype or weight.dtype
    wbar = dequantize(quantize(weight, mask, step, bits), step)
    # torch.compile loses the gradient of an autograd.Function whose forward ends in a .to() that changes nothing
    return wbar if dtype == torch.float32 else wbar.to(dtype)


def fake_quant_backward(
    grad: Tensor,
    weight: Tensor,
    mask: Tensor,
    step: Tensor,
    bits: int,
    ste: str = "identity",
    mask_gradients: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients of Eqs 2-4 by the straight-through estimator: ``(dL/dw, dL/dS)``.

    ``dL/dw = dL/dwbar`` for every weight (``ste="identity"``), or only where ``|w M / S| <= Q`` (``"clipped"``, LSQ's);
    ``mask_gradients=True`` also zeroes it where pruned. With ``v = clip(w M / S)``, ``dL/dS = sum dL/dwbar (round(v) -
    v [-Q < v < Q])``, without LSQ's ``1/sqrt(N Q)`` factor.
    """
    q = levels(bits)
    v = scaled(weight, mask, step)
    passes = torch.ones_like(mask)
    if ste == "clipped":
        passes = v.abs() <= q
    if mask_gradients:
        passes = passes & mask
    grad_weight = torch.where(passes, grad, 0.0).to(weight.dtype)
    v = clip(v, -q, q)
    slope = torch.round(v) - torch.where(v.abs() < q, v, 0.0)
    terms = grad.float() * slope
    rows = terms.reshape(step.numel(), terms.numel() // max(step.numel(), 1))
    return grad_weight, rows.sum(1).reshape(step.shape)


def softened(logits: Tensor, temperature: float) -> Tensor:
    """Eq. 5: ``p_a = exp(z_a / T) / sum_b exp(z_b / T)``."""
    return torch.softmax(logits / temperature, dim=-1)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Eq. 6: ``-sum_a y_a log p_a`` at T = 1, mean over the batch."""
    picked = softened(logits, 1.0).log().gather(-1, target.unsqueeze(-1))
    return -picked.mean()


def phase1_update(
    weight: Tensor, step: Tensor, grad: Tensor, grad_step: Tensor, lr: float, step_lr_scale: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """Eq. 7: every weight, pruned ones too, ``w - lr dL/dwbar``; ``S - 1e-4 lr dL/dS``."""
    return weight - lr * grad, step - step_lr_scale * lr * grad_step


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Eq. 8: ``KL(p || q) = sum_a p_a log(p_a / q_a)``, mean over the batch."""
    return (p * (p.log() - q.log())).sum(-1).mean()


def student_loss(
    student: Tensor, teacher: Tensor, target: Tensor, alpha: float, beta: float, temperature: float
) -> Tensor:
    """Eq. 9: ``L^S = alpha CE(z_S, y) + beta T^2 KL(p^T || p^S)``, p^T a constant."""
    p_teacher = softened(teacher, temperature).detach()
    distilled = kl_divergence(p_teacher, softened(student, temperature))
    return alpha * cross_entropy(student, target) + beta * temperature**2 * distilled


def teacher_loss(
    student: Tensor, teacher: Tensor, target: Tensor, alpha: float, beta: float, temperature: float
) -> Tensor:
    """Eq. 10: ``L^T = alpha CE(z_T, y) + beta T^2 KL(p^S || p^T)``, p^S a constant."""
    return student_loss(teacher, student, target, alpha, beta, temperature)


def student_update(weight: Tensor, mask: Tensor, grad: Tensor, lr: float) -> Tensor:
    """Eq. 11: ``w - lr dL^S/dwbar`` where M = 1; pruned weights stay."""
    return torch.where(mask, weight - lr * grad, weight)


def teacher_update(weight: Tensor, mask: Tensor, grad: Tensor, lr: float) -> Tensor:
    """Eq. 12: ``w - lr dL^T/dw`` where M = 0; kept weights stay."""
    return torch.where(mask, weight, weight - lr * grad)


def teacher_weight(weight: Tensor, mask: Tensor, step: Tensor, bits: int, teacher_weights: str = "latent") -> Tensor:
    """The full net's weight: the latent ``w`` everywhere, or (``"shared"``) with its kept part fake-quantized."""
    if teacher_weights == "latent":
        return weight
    return torch.where(mask, fake_quant(weight, mask, step, bits), weight)


def topk_mask(weights: Sequence[Tensor], keep: int | Tensor) -> list[Tensor]:
    """Keep exactly ``keep`` weights of largest ``|w|`` over all tensors together.

    One global threshold (paper, section 2.1). Among equal magnitudes the lower flat index, in the order of the list,
    stays.
    """
    magnitude = torch.cat([weight.detach().float().abs().flatten() for weight in weights])
    order = magnitude.argsort(descending=True, stable=True)
    rank_is_kept = torch.arange(order.numel(), device=order.device) < keep
    chosen = torch.empty_like(rank_is_kept).scatter_(0, order, rank_is_kept)
    parts = chosen.split([weight.numel() for weight in weights])
    return [part.reshape(weight.shape) for part, weight in zip(parts, weights, strict=True)]


def pack_int4(q: Tensor) -> Tensor:
    """Two's complement nibbles, low nibble first, flat order; an odd count is padded with 0. uint8 [(n + 1) // 2]."""
    flat = F.pad(q.flatten().to(torch.int16), (0, q.numel() % 2)) & 0xF
    return (flat[0::2] | (flat[1::2] << 4)).to(torch.uint8)


def unpack_int4(packed: Tensor, numel: int) -> Tensor:
    """The inverse of :func:`pack_int4`: int8 ``[numel]`` in -8..7."""
    wide = packed.to(torch.int16)
    nibbles = torch.stack([wide & 0xF, wide >> 4], dim=1).flatten()[:numel]
    return torch.where(nibbles > 7, nibbles - 16, nibbles).to(torch.int8)


def pack_bits(mask: Tensor) -> Tensor:
    """Eight mask bits a byte, least significant bit first, flat order, zero padded. uint8 ``[(n + 7) // 8]``."""
    flat = F.pad(mask.flatten().to(torch.int16), (0, -mask.numel() % 8)).reshape(-1, 8)
    return (flat << torch.arange(8, device=mask.device)).sum(1).to(torch.uint8)


def unpack_bits(packed: Tensor, numel: int) -> Tensor:
    """The inverse of :func:`pack_bits`: bool ``[numel]``."""
    bits = (packed.unsqueeze(1).to(torch.int16) >> torch.arange(8, device=packed.device)) & 1
    return bits.flatten()[:numel].bool()
