"""The weights of many tensors as one sequence that is ranked: their keys, segments, and what is done to one segment.

A weight's key is the 31 bits of ``|w|`` as fp32, which order as the magnitudes do. Work is cut into segments, each of
one tensor and one program. A segment's row of the table: ``slot`` (which pointer), ``tensor`` (its index in the list,
where empty ones count), ``begin``, ``end`` and ``first`` (the first segment of the tensor).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from torch import Tensor

from pqk_fast.triton_kernels import operands
from pqk_fast.triton_kernels.tile_math import pick

TILE = 2048  # weights a program holds at once; segments begin at multiples of it
WARPS = 4
SEGMENTS = 6  # about, for each multiprocessor

COLUMNS = tl.constexpr(5)


@triton.jit
def keys_of(values):
    """Magnitudes as integers of the same order: 31 bits, int32."""
    return values.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def as_key(pointer):
    """The int64 at ``pointer`` as int32; what no key can be becomes the largest, or less than -1 (no key at all)."""
    value = tl.load(pointer)
    return tl.where(value < 0, -2, tl.minimum(value, 0x7FFFFFFF)).to(tl.int32)


@triton.jit
def segment_of(pointers, table, COUNT: tl.constexpr, ALIGNED: tl.constexpr):
    """Where this program's segment begins in memory, and its length (int32)."""
    row = table + tl.program_id(0) * COLUMNS
    begin = tl.load(row + 2)
    base = pick(pointers, tl.load(row).to(tl.int32), COUNT) + begin
    if ALIGNED:
        base = tl.multiple_of(base, 16)
    return base, (tl.load(row + 3) - begin).to(tl.int32)


@triton.jit
def keys_at(base, at, length, TILE: tl.constexpr):
    """The keys ``at .. at + TILE`` of a segment of this length; -1 past its end. int32 [TILE]."""
    lanes = tl.arange(0, TILE)
    if at + TILE <= length:  # a branch of its own: masked loads are not of 16 bytes
        keys = keys_of(tl.load(base + at + lanes))
    else:
        inside = lanes < length - at
        keys = tl.where(inside, keys_of(tl.load(base + at + lanes, mask=inside, other=0.0)), -1)
    return keys


@triton.jit
def digit_counts(base, length, prefix, SHIFT: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr):
    """How often each digit ``(key >> SHIFT) % 2^BITS`` follows ``prefix`` in a segment. int32 [2^BITS]."""
    counts = tl.zeros([1 << BITS], tl.int32)
    for at in range(0, length, TILE):
        digits = keys_at(base, at, length, TILE) >> SHIFT
        counts += tl.histogram(digits & ((1 << BITS) - 1), 1 << BITS, mask=(digits >> BITS) == prefix)
    return counts


@triton.jit
def sum_between(counts, first, end, BLOCK: tl.constexpr):
    """The sum of ``counts[first:end]`` (int32), as int64."""
    total = tl.zeros([], tl.int64)
    for at in range(first, end, BLOCK):
        each = at + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(counts + each, mask=each < end, other=0).to(tl.int64), 0)
    return total


@triton.jit
def write_above(mask, base, length, key, TILE: tl.constexpr, VECTOR: tl.constexpr):
    """Keep the keys above ``key``."""
    # a thread takes as many bytes at a time as it has weights: both in one layout
    lanes = tl.max_contiguous(tl.arange(0, TILE), VECTOR)
    for at in range(0, length, TILE):
        chosen = keys_at(base, at, length, TILE) > key
        if at + TILE <= length:
            tl.store(mask + at + lanes, chosen)
        else:
            tl.store(mask + at + lanes, chosen, mask=lanes < length - at)


@triton.jit
def write_with_ties(mask, base, length, key, kept, BLOCK: tl.constexpr):
    """Keep the keys above ``key`` and the first ``kept`` of those that equal it."""
    lanes = tl.arange(0, BLOCK)
    for at in range(0, length, BLOCK):
        keys = keys_at(base, at, length, BLOCK)
        ties = (keys == key).to(tl.int32)
        chosen = (keys > key) | ((ties > 0) & (tl.cumsum(ties, 0) <= kept))
        tl.store(mask + at + lanes, chosen, mask=lanes < length - at)
        kept -= tl.sum(ties, 0)


@triton.jit
def write_segment(mask, base, length, threshold, kept, ties, TILE: tl.constexpr, VECTOR: tl.constexpr):
    """Keep the keys above ``threshold`` and the first ``kept`` of the ``ties`` keys of the segment that equal it."""
    if (kept > 0) & (kept < ties):  # so in at most one segment of those that share a count: it need not be fast
        write_with_ties(mask, base, length, threshold, kept, TILE // 8)
    else:
        write_above(mask, base, length, threshold - (kept > 0).to(tl.int32), TILE, VECTOR)


@functools.cache  # without a limit: captured graphs know the tables by their addresses
def segment_table(sizes: tuple[int, ...], tile: int, programs: int, device: torch.device) -> Tensor:
    """Rows (slot, tensor, begin, end, first) of the segments, int64: about ``programs`` of whole tiles."""
    largest = triton.cdiv(max(sum(sizes), 1), programs * tile) * tile
    rows: list[tuple[int, ...]] = []
    slot = 0
    for tensor, size in enumerate(sizes):
        if not size:
            continue
        length = triton.cdiv(size, triton.cdiv(size, largest) * tile) * tile
        first = len(rows)
        rows += [(slot, tensor, begin, min(begin + length, size), first) for begin in range(0, size, length)]
        slot += 1
    table = torch.tensor(rows, dtype=torch.int64).reshape(-1, COLUMNS.value)
    return operands.lasting(lambda: table.to(device), device)


class Ranked:
    """A list of weights as kernels take it: those with elements, contiguous, of one dtype, cut into segments.

    ``reading``: the compile-time arguments of kernels that only read them.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        mixed = len({weight.dtype for weight in weights}) > 1  # keys are those of fp32 in any case
        self.device = weights[0].device
        programs = SEGMENTS * operands.multiprocessors(self.device)
        self.table = segment_table(tuple(weight.numel() for weight in weights), TILE, programs, self.device)
        self.segments = len(self.table)
        self.values = tuple((weight.float() if mixed else weight).contiguous() for weight in weights if weight.numel())
        self.dtype = self.values[0].dtype if self.values else torch.float32
        self.reading = {
            "COUNT": len(self.values),
            "TILE": TILE,
            "ALIGNED": operands.aligned(self.values),
            "num_warps": WARPS,
        }

    def writing(self, masks: Sequence[Tensor]) -> dict[str, int]:
        """The compile-time arguments of kernels that write masks."""
        aligned = self.reading["ALIGNED"] and operands.aligned(masks)
        return {**self.reading, "ALIGNED": aligned, "VECTOR": 16 // self.dtype.itemsize}

    @contextmanager
    def written(self, masks: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        """The masks of the weights with elements, contiguous; copied back afterwards if they are not so themselves."""
        masks = [mask for mask in masks if mask.numel()]
        contiguous = tuple(mask.contiguous() for mask in masks)
        yield contiguous
        for mask, copy in zip(masks, contiguous, strict=True):
            if copy is not mask:
                mask.copy_(copy)
