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
# fp64 is not among them: all is computed in fp32, which would silently lose half of it.
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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


# A magnitude's key: its 31 bits as fp32, which order as the magnitudes do. Digits of 11, 10 and 10 bits from the top.
RADIX_BITS = (11, 10, 10)


def magnitude_key(weight: Tensor) -> Tensor:
    """``|w|`` as the integer that its fp32 bits are; lower precision is widened first. int64 of the weight's shape."""
    return weight.detach().float().abs().contiguous().view(torch.int32).long()


def magnitude_histogram(weights: Sequence[Tensor], level: int, prefix: Tensor) -> Tensor:
    """Counts of the ``level``-th digit over the keys whose higher digits are ``prefix``. int64 ``[2048 or 1024]``."""
    keys = torch.cat([magnitude_key(weight).flatten() for weight in weights]) >> sum(RADIX_BITS[level + 1 :])
    bins = 2 ** RADIX_BITS[level]
    return torch.bincount((keys % bins)[keys // bins == prefix], minlength=bins)


def radix_digit(histogram: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """The digit of the key of a ``rank`` (1: the largest), and its rank among the keys with that digit. int64 []."""
    above = histogram.flip(0).cumsum(0).flip(0) - histogram  # keys with a larger digit
    digit = (above < rank).int().argmax()
    return digit, rank - above[digit]


def tie_counts(weights: Sequence[Tensor], threshold: Tensor) -> Tensor:
    """How many keys of each tensor equal ``threshold``. int64 ``[tensors]``."""
    return torch.stack([(magnitude_key(weight) == threshold).sum() for weight in weights])


def mask_at_threshold(weights: Sequence[Tensor], threshold: Tensor, ties_kept: Tensor) -> list[Tensor]:
    """Keep the keys above ``threshold`` and in each tensor the first ``ties_kept`` of those equal to it."""
    masks = []
    for weight, kept in zip(weights, ties_kept, strict=True):
        key = magnitude_key(weight)
        tie = key == threshold
        order = tie.flatten().cumsum(0).reshape(key.shape)
        masks.append((key > threshold) | (tie & (order <= kept)))
    return masks


def group_mask(weight: Tensor, keep: int, group: int) -> Tensor:
    """N:M sparsity: the ``keep`` largest ``|w|`` of every ``group`` inputs that follow each other along dimension 1.

    Among equal magnitudes the lower input stays. The inputs are a multiple of ``group``.
    """
    groups = weight.detach().float().abs().unflatten(1, (-1, group))
    order = groups.argsort(dim=2, descending=True, stable=True)
    rank = order.argsort(dim=2)
    return (rank < keep).flatten(1, 2)


def pack_ints(q: Tensor, bits: int) -> Tensor:
    """``bits``-bit two's complement (1..8) as a little-endian bit stream in flat order: uint8 ``[ceil(n bits / 8)]``.

    Value i takes bits ``i k .. i k + k - 1`` of the stream, whose bit b is bit ``b % 8`` of byte ``b // 8``; the last
    byte is filled with zeros. For 4 bits that is the low nibble first.
    """
    digits = (q.flatten().unsqueeze(1).to(torch.int16) >> torch.arange(bits, device=q.device)) & 1
    stream = F.pad(digits.flatten(), (0, -digits.numel() % 8)).reshape(-1, 8)
    return (stream << torch.arange(8, device=q.device)).sum(1).to(torch.uint8)


def unpack_ints(packed: Tensor, numel: int, bits: int) -> Tensor:
    """The inverse of :func:`pack_ints`: int8 ``[numel]`` in ``-2^(k-1) .. 2^(k-1) - 1``."""
    stream = (packed.unsqueeze(1).to(torch.int16) >> torch.arange(8, device=packed.device)) & 1
    digits = stream.flatten()[: numel * bits].reshape(numel, bits)
    unsigned = (digits << torch.arange(bits, device=packed.device)).sum(1)
    return torch.where(unsigned < 2 ** (bits - 1), unsigned, unsigned - 2**bits).to(torch.int8)


def pack_bits(mask: Tensor) -> Tensor:
    """A bool mask as :func:`pack_ints` of one bit: the least significant bit first."""
    return pack_ints(mask, 1)


def unpack_bits(packed: Tensor, numel: int) -> Tensor:
    """The inverse of :func:`pack_bits`: bool ``[numel]``."""
    return unpack_ints(packed, numel, 1) != 0


def relu_avg_pool2d(x: Tensor, kernel: tuple[int, int]) -> Tensor:
    """Mean of ``max(x, 0)`` over windows that neither overlap nor are padded: ``[B, C, H, W] -> [B, C, H', W']``."""
    return F.avg_pool2d(F.relu(x), kernel)


def sparse_conv2d(
    x: Tensor,
    first: Tensor,
    offset: Tensor,
    value: Tensor,
    bias: Tensor | None,
    geometry: Sequence[int],
    relu: bool = False,
) -> Tensor:
    """A convolution by its nonzero weights alone, ``x [B, C, H, W] -> [B, outputs, H', W']``.

    ``geometry`` is the kernel's reach, stride and padding, two each. The padded input is dealt out to stride x stride
    planes, in whose memory the input of position p (row * pitch + column) of an output is at ``offset + p``.
    """
    (kernel_h, kernel_w), (stride_h, stride_w), (pad_h, pad_w) = zip(*[iter(geometry)] * 2, strict=True)
    height, width = x.shape[2] + 2 * pad_h, x.shape[3] + 2 * pad_w
    rows, pitch = -(-height // stride_h), -(-width // stride_w)
    fill = (pad_w, pitch * stride_w - width + pad_w, pad_h, rows * stride_h - height + pad_h)
    padded = torch.nn.functional.pad(x, fill).unflatten(2, (rows, stride_h)).unflatten(4, (pitch, stride_w))
    planes = padded.permute(0, 1, 3, 5, 2, 4).flatten(1)  # [B, C * stride_h * stride_w * rows * pitch]
    out_h, out_w = (height - kernel_h) // stride_h + 1, (width - kernel_w) // stride_w + 1
    places = (torch.arange(out_h)[:, None] * pitch + torch.arange(out_w)).flatten().to(x.device)
    terms = planes[:, offset.long()[:, None] + places] * value[:, None]
    counts = first.diff()
    owner = torch.repeat_interleave(torch.arange(len(counts), device=x.device), counts.long())
    out = terms.new_zeros(x.shape[0], len(counts), len(places)).index_add_(1, owner, terms)
    if bias is not None:
        out = out + bias[:, None]
    return (out.relu() if relu else out).unflatten(2, (out_h, out_w))
