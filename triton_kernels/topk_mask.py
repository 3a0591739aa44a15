"""Masks that keep the weights of largest ``|w|`` over all tensors together: an exact radix search, no host sync.

Digits of the keys, from the top, are counted one launch each among the keys that begin with the digits found so far;
each launch first finds the digit in the counts of the one before. The last launch writes the masks. An fp32 weight is
read five times and its mask written once: 21 bytes a weight (fp16 four times, 9 bytes; bf16 three times, 7 bytes).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pqk_fast.reference import RADIX_BITS
from pqk_fast.triton_kernels import operands
from pqk_fast.triton_kernels.segments import (
    COLUMNS,
    Ranked,
    as_key,
    digit_counts,
    keys_at,
    segment_of,
    sum_between,
    write_segment,
)

# Bits of the digits, at most 8 each; what they leave below is zero in every key of that dtype. The first is the
# exponent, whose largest value means infinity or NaN. To count, a warp takes 2^bits / 32 population counts for every 32
# keys: with more than 8 bits that is slower than to read them once more.
DIGITS = {torch.float32: (8, 8, 8, 7), torch.float16: (8, 5, 5), torch.bfloat16: (8, 7)}

# The search's workspace, int64 zeros: ABSENT less the index of the first tensor that cannot be ranked (0: none); then
# for every digit the prefix and rank before it; then 256 counts for every digit.
ABSENT = tl.constexpr(1 << 31)
STATES = tl.constexpr(1)
COUNTS = tl.constexpr(STATES.value + 2 * 8)

NOT_FINITE = tl.constexpr(operands.NOT_FINITE)


@triton.jit
def found_digit(keep, work, LEVEL: tl.constexpr, BITS: tl.constexpr):
    """Prefix (int32) and rank among the keys that begin with it (int64), after the digit of LEVEL has been counted."""
    if LEVEL == 0:
        prefix = tl.zeros([], tl.int64)
        rank = tl.maximum(tl.load(keep).to(tl.int64), 0)
    else:
        prefix = tl.load(work + STATES + 2 * LEVEL)
        rank = tl.load(work + STATES + 2 * LEVEL + 1)
    digits = tl.arange(0, 1 << BITS)
    counts = tl.load(work + COUNTS + LEVEL * 256 + digits)
    rank = tl.minimum(rank, tl.sum(counts, 0))
    # No key kept (rank 0): the largest key, and none of those equal to it.
    reached = tl.cumsum(counts, 0, reverse=True) >= tl.maximum(rank, 1)
    digit = tl.sum(reached.to(tl.int32), 0) - 1
    rank -= tl.sum(tl.where(digits > digit, counts, 0), 0)
    return (prefix.to(tl.int32) << BITS) | digit, rank


@triton.jit
def count_digit(
    weights,
    table,
    keep,
    work,
    ties,
    LEVEL: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    BEFORE: tl.constexpr,
    LAST: tl.constexpr,
    COUNT: tl.constexpr,
    TILE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Count the digit of LEVEL, of BITS bits above SHIFT others; BEFORE: the bits of the digit before it.

    The last digit's counts are also left for each segment: ``ties [2^BITS, segments]``, int32.
    """
    segment = tl.program_id(0)
    prefix = tl.zeros([], tl.int32)
    if LEVEL > 0:
        prefix, rank = found_digit(keep, work, LEVEL - 1, BEFORE)
        if segment == 0:
            tl.store(work + STATES + 2 * LEVEL, prefix.to(tl.int64))
            tl.store(work + STATES + 2 * LEVEL + 1, rank)
    base, length = segment_of(weights, table, COUNT, ALIGNED)
    counts = digit_counts(base, length, prefix, SHIFT, BITS, TILE)
    digits = tl.arange(0, 1 << BITS)
    tl.atomic_add(work + COUNTS + LEVEL * 256 + digits, counts.to(tl.int64), mask=counts > 0, sem="relaxed")
    if LEVEL == 0 and tl.sum(tl.where(digits == (1 << BITS) - 1, counts, 0), 0) > 0:
        tl.atomic_max(work, ABSENT - tl.load(table + segment * COLUMNS + 1), sem="relaxed")
    if LAST:
        tl.store(ties + digits.to(tl.int64) * tl.num_programs(0) + segment, counts)


@triton.jit
def write_topk(
    masks,
    weights,
    table,
    keep,
    work,
    ties,
    status,
    flags,
    LEVEL: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    COUNT: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The masks, once the last digit (LEVEL) has been counted; and the status. Not finite: the masks stay."""
    segment = tl.program_id(0)
    absent = tl.load(work)
    if segment == 0:
        tl.store(status, tl.where(absent > 0, ABSENT - absent, -1))
        tl.store(flags + NOT_FINITE, 1, mask=absent > 0)
    if absent == 0:
        key, rank = found_digit(keep, work, LEVEL, BITS)
        equal = ties + (key & ((1 << BITS) - 1)).to(tl.int64) * tl.num_programs(0)
        mine = tl.load(equal + segment)
        kept = rank - sum_between(equal, 0, segment, 1024)
        kept = tl.minimum(tl.maximum(kept, 0), mine.to(tl.int64)).to(tl.int32)
        base, length = segment_of(weights, table, COUNT, ALIGNED)
        mask, length = segment_of(masks, table, COUNT, ALIGNED)
        write_segment(mask, base, length, key << SHIFT, kept, mine, TILE, VECTOR)


@triton.jit
def count_digit_after(
    weights,
    table,
    prefix,
    histogram,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    COUNT: tl.constexpr,
    TILE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """``histogram [2^BITS]``, int64 zeros: how often each digit follows the prefix."""
    base, length = segment_of(weights, table, COUNT, ALIGNED)
    wanted = as_key(prefix)
    if (SHIFT + BITS < 31) | (wanted == 0):
        counts = digit_counts(base, length, wanted, SHIFT, BITS, TILE)
        tl.atomic_add(histogram + tl.arange(0, 1 << BITS), counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@triton.jit
def count_ties(weights, table, threshold, ties, totals, COUNT: tl.constexpr, TILE: tl.constexpr, ALIGNED: tl.constexpr):
    """How many keys equal the threshold, in every segment (``ties``, int32) and tensor (``totals``, int64 zeros)."""
    segment = tl.program_id(0)
    base, length = segment_of(weights, table, COUNT, ALIGNED)
    key = as_key(threshold)
    counts = tl.zeros([TILE], tl.int32)
    for at in range(0, length, TILE):
        counts += (keys_at(base, at, length, TILE) == key).to(tl.int32)
    count = tl.sum(counts, 0)
    tl.store(ties + segment, count)
    if count > 0:
        tl.atomic_add(totals + tl.load(table + segment * COLUMNS + 1), count.to(tl.int64), sem="relaxed")


@triton.jit
def write_at_threshold(
    masks,
    weights,
    table,
    threshold,
    ties_kept,
    ties,
    COUNT: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The masks for a given threshold and number of ties kept in every tensor; ``ties``: how many each segment has."""
    segment = tl.program_id(0)
    row = table + segment * COLUMNS
    mine = tl.load(ties + segment)
    kept = tl.load(ties_kept + tl.load(row + 1)) - sum_between(ties, tl.load(row + 4).to(tl.int32), segment, 1024)
    kept = tl.minimum(tl.maximum(kept, 0), mine.to(tl.int64)).to(tl.int32)
    base, length = segment_of(weights, table, COUNT, ALIGNED)
    mask, length = segment_of(masks, table, COUNT, ALIGNED)
    write_segment(mask, base, length, as_key(threshold), kept, mine, TILE, VECTOR)


def topk_mask_(masks: Sequence[Tensor], weights: Sequence[Tensor], keep: Tensor) -> Tensor:
    """Keep the ``keep`` (int32 or int64, one element) weights of largest magnitude; see dispatch.topk_mask_."""
    ranked = Ranked(weights)
    status = torch.empty((), dtype=torch.int64, device=ranked.device)
    if not ranked.values:
        return status.fill_(-1)
    keep = keep.to(ranked.device)
    digits = DIGITS[ranked.dtype]
    last = len(digits) - 1
    work = torch.zeros(COUNTS.value + 256 * len(digits), dtype=torch.int64, device=ranked.device)
    ties = torch.empty(2 ** digits[-1] * ranked.segments, dtype=torch.int32, device=ranked.device)
    with operands.on(status), ranked.written(masks) as written:
        for level, bits in enumerate(digits):
            count_digit[(ranked.segments,)](
                ranked.values,
                ranked.table,
                keep,
                work,
                ties,
                LEVEL=level,
                SHIFT=31 - sum(digits[: level + 1]),
                BITS=bits,
                BEFORE=digits[level - 1],
                LAST=level == last,
                **ranked.reading,
            )
        write_topk[(ranked.segments,)](
            written,
            ranked.values,
            ranked.table,
            keep,
            work,
            ties,
            status,
            operands.error_flags(ranked.device),
            LEVEL=last,
            SHIFT=31 - sum(digits),
            BITS=digits[last],
            **ranked.writing(written),
        )
    return status


def magnitude_histogram(weights: Sequence[Tensor], level: int, prefix: Tensor) -> Tensor:
    """Counts of digit ``level`` of reference.RADIX_BITS after ``prefix`` (int64): int64 ``[2048]`` or ``[1024]``."""
    ranked = Ranked(weights)
    bits = RADIX_BITS[level]
    histogram = torch.zeros(2**bits, dtype=torch.int64, device=ranked.device)
    if ranked.values:
        with operands.on(histogram):
            count_digit_after[(ranked.segments,)](
                ranked.values,
                ranked.table,
                prefix.to(ranked.device),
                histogram,
                SHIFT=sum(RADIX_BITS[level + 1 :]),
                BITS=bits,
                **ranked.reading | {"num_warps": 8},  # with 4, so many bins take all the registers there are
            )
    return histogram


def _tie_counts(ranked: Ranked, threshold: Tensor, tensors: int) -> tuple[Tensor, Tensor]:
    """How many keys equal the threshold, in each segment (int32) and in each tensor (int64)."""
    ties = torch.empty(ranked.segments, dtype=torch.int32, device=ranked.device)
    totals = torch.zeros(tensors, dtype=torch.int64, device=ranked.device)
    if ranked.values:
        with operands.on(ties):
            count_ties[(ranked.segments,)](ranked.values, ranked.table, threshold, ties, totals, **ranked.reading)
    return ties, totals


def tie_counts(weights: Sequence[Tensor], threshold: Tensor) -> Tensor:
    """How many keys of each tensor equal ``threshold`` (int64): int64 ``[tensors]``."""
    ranked = Ranked(weights)
    return _tie_counts(ranked, threshold.to(ranked.device), len(weights))[1]


def mask_at_threshold_(
    masks: Sequence[Tensor], weights: Sequence[Tensor], threshold: Tensor, ties_kept: Tensor
) -> None:
    """Keep the keys above ``threshold``, and in tensor i the first ``ties_kept[i]`` (int64) of those equal to it."""
    ranked = Ranked(weights)
    threshold = threshold.to(ranked.device)
    ties, _ = _tie_counts(ranked, threshold, len(weights))
    if not ranked.values:
        return
    with operands.on(ties), ranked.written(masks) as written:
        write_at_threshold[(ranked.segments,)](
            written,
            ranked.values,
            ranked.table,
            threshold,
            ties_kept.to(ranked.device).contiguous(),
            ties,
            **ranked.writing(written),
        )
