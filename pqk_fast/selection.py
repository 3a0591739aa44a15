"""Which weights stay: exact selections by magnitude, over all tensors together or in groups of inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pqk_fast import dispatch, reference
from pqk_fast.reference import WEIGHT_DTYPES
from pqk_fast.settings import check_sparsity


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
        if weight.dtype not in WEIGHT_DTYPES:
            if not weight.is_floating_point():
                raise TypeError(f"weights[{index}] must be floating point, got {weight.dtype}")
            raise TypeError(f"weights[{index}] must be fp32, bf16 or fp16, got {weight.dtype}; use weight.float()")


def _check_masks(masks: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    if len(masks) != len(weights):
        raise ValueError(f"expected one mask for each weight, got {len(masks)} masks and {len(weights)} weights")
    for index, (mask, weight) in enumerate(zip(masks, weights, strict=True)):
        if mask.dtype != torch.bool or mask.shape != weight.shape:
            raise ValueError(
                f"masks[{index}] must be bool of shape {tuple(weight.shape)}, got {mask.dtype} {tuple(mask.shape)}"
            )
        if not mask.is_contiguous() and any(n > 1 and s == 0 for n, s in zip(mask.shape, mask.stride(), strict=True)):
            raise ValueError(
                f"masks[{index}] has several elements in one place (expand): it cannot be written; use mask.clone()"
            )


def _changed(masks: Sequence[Tensor]) -> None:
    """Let autograd know, so that a backward that was to use the old masks fails instead of using the new ones."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(masks)


def _refuse_not_finite(status: Tensor, weights: Sequence[Tensor]) -> None:
    """On the CPU at once; a device is not waited for."""
    if status.device.type == "cpu" and not torch.compiler.is_compiling() and (index := int(status)) >= 0:
        raise NonFiniteWeightError(index, weights[index])


def topk_mask(weights: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    """Masks that prune exactly ``int(sparsity * N)`` of the N weights of all tensors together, the smallest ``|w|``.

    Among equal magnitudes the lower flat index (in the order of the list) stays. Returns one bool mask for each weight.
    Raises ValueError for an empty list, a sparsity outside [0, 1), or NaN or infinity in a weight (naming its index).
    """
    _check_selectable(weights)
    masks = [torch.empty_like(weight, dtype=torch.bool, requires_grad=False) for weight in weights]
    topk_mask_(masks, weights, sum(weight.numel() for weight in weights) - masked_count(weights, sparsity))
    return masks


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
    _check_masks(masks, weights)
    # full, not tensor: a GPU would wait for a copy from the host
    keep = k if isinstance(k, Tensor) else torch.full((), k, device=weights[0].device)
    status = dispatch.topk_mask_(list(masks), list(weights), keep)
    _changed(masks)
    _refuse_not_finite(status, weights)


def group_mask(weight: Tensor, keep: int, group: int) -> Tensor:
    """N:M sparsity: keep ``keep`` of every ``group`` inputs, those of largest ``|w|``. A bool mask of weight's shape.

    ``weight [out, in, ...]``; the groups follow each other along dimension 1, for each output (and each place of a
    convolution's kernel) by itself: 2 of 4 is what sparse tensor cores take. Among equal magnitudes the lower input
    stays. Raises ValueError unless ``0 < keep < group <= 16`` and the inputs are a multiple of ``group``, and for NaN
    or infinity.
    """
    mask = torch.empty_like(weight, dtype=torch.bool, requires_grad=False)
    group_mask_(mask, weight, keep, group)
    return mask


def group_mask_(mask: Tensor, weight: Tensor, keep: int, group: int) -> None:
    """:func:`group_mask` in place."""
    _check_selectable([weight])
    _check_masks([mask], [weight])
    if not 0 < keep < group <= 16:
        raise ValueError(f"expected 0 < keep < group <= 16, such as 2 of 4; got {keep} of {group}")
    if weight.dim() < 2 or weight.shape[1] % group:
        raise ValueError(
            f"groups of {group} need a weight [out, in, ...] with inputs that are a multiple of {group}, got shape "
            f"{tuple(weight.shape)}; leave the layer out"
        )
    status = dispatch.group_mask_(mask, weight, keep, group)
    _changed([mask])
    _refuse_not_finite(status, [weight])


def topk_threshold(histogram: Callable[[int, Tensor], Tensor], keep: Tensor) -> tuple[Tensor, Tensor]:
    """The selection of :func:`topk_mask_` for weights that are spread over processes: where the cut lies.

    ``histogram(level, prefix)`` gives :func:`magnitude_histogram` summed over all processes (an all-reduce), for level
    0, 1 and 2; ``keep`` (int64 [], at least 1) is the number of weights kept over all. Returns the threshold, and how
    many of the weights that tie with it stay (both int64 []). :func:`tie_counts`, gathered, tell each process how many
    of those are its own; :func:`mask_at_threshold_` then makes its masks.
    """
    prefix, rank = torch.zeros_like(keep), keep
    for level, bits in enumerate(reference.RADIX_BITS):
        digit, rank = reference.radix_digit(histogram(level, prefix), rank)
        prefix = (prefix << bits) | digit
    return prefix, rank


def magnitude_histogram(weights: Sequence[Tensor], level: int, prefix: Tensor) -> Tensor:
    """How often each digit occurs among the magnitudes of these weights: int64 ``[2048]`` (level 0) or ``[1024]``.

    See :func:`topk_threshold`. At level 0 the last eight bins (2040..2047) count NaN and infinity.
    """
    _check_selectable(weights)
    if level not in range(len(reference.RADIX_BITS)):
        raise ValueError(f"level must be 0, 1 or 2, got {level!r}")
    out: Tensor = dispatch.magnitude_histogram(list(weights), level, prefix)
    return out


def tie_counts(weights: Sequence[Tensor], threshold: Tensor) -> Tensor:
    """How many weights of each tensor lie exactly at the threshold: int64 ``[tensors]``. See :func:`topk_threshold`."""
    _check_selectable(weights)
    out: Tensor = dispatch.tie_counts(list(weights), threshold)
    return out


def mask_at_threshold_(
    masks: Sequence[Tensor], weights: Sequence[Tensor], threshold: Tensor, ties_kept: Tensor
) -> None:
    """Keep what lies above ``threshold``, and in tensor i the first ``ties_kept[i]`` (int64) of what lies at it."""
    _check_selectable(weights)
    _check_masks(masks, weights)
    if ties_kept.shape != (len(weights),):
        raise ValueError(
            f"ties_kept must have one count for each weight, [{len(weights)}], got {tuple(ties_kept.shape)}"
        )
    dispatch.mask_at_threshold_(list(masks), list(weights), threshold, ties_kept)
    _changed(masks)
