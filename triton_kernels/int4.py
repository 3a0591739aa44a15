"""Low-bit integers as bytes, and back: the layout of :func:`pqk_fast.reference.pack_ints`, for 1 to 8 bits.

Eight values of k bits make a word of k bytes, which is little-endian like the stream. Where k is a power of two whole
words are moved; for other widths, and at the end, the single bytes of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pqk_fast.triton_kernels import operands

WORDS = 512  # a program holds at once: eight values each


@triton.jit
def pointer_to_words(packed, BITS: tl.constexpr):
    """Packed bytes (a multiple of BITS bytes from aligned memory) as a pointer to integers of BITS bytes."""
    if BITS == 8:
        pointer = packed.to(tl.pointer_type(tl.int64))
    elif BITS == 4:
        pointer = packed.to(tl.pointer_type(tl.int32))
    elif BITS == 2:
        pointer = packed.to(tl.pointer_type(tl.int16))
    else:
        pointer = packed.to(tl.pointer_type(tl.int8))
    return pointer


@triton.jit(do_not_specialize=["numel"])
def pack_words(
    values,
    packed,
    outside,
    numel,
    BITS: tl.constexpr,
    CHECKED: tl.constexpr,
    WORDS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """int8 [numel] -> uint8; ``outside`` (int32, zero) becomes 1 if a value needs more bits. BYTES: power of two."""
    word_type: tl.constexpr = tl.int32 if BITS <= 4 else tl.int64
    first = tl.program_id(0).to(tl.int64) * WORDS
    lanes = tl.arange(0, WORDS * 8)
    left = numel - first * 8
    if left >= WORDS * 8:
        each = tl.load(values + first * 8 + lanes)
    else:
        each = tl.load(values + first * 8 + lanes, mask=lanes < left, other=0)
    if CHECKED:
        wide = each.to(tl.int32) + (1 << (BITS - 1))
        if tl.max((wide >> BITS != 0).to(tl.int32), 0) > 0:
            tl.store(outside, 1)
    digits = tl.reshape(each.to(word_type) & ((1 << BITS) - 1), [WORDS, 8])
    words = tl.sum(digits << (tl.arange(0, 8) * BITS).to(word_type)[None, :], 1)
    word = tl.max_contiguous(tl.arange(0, WORDS), 2)  # a thread has 16 values: bytes would be taken 16 at a time, too
    to = packed + first * BITS
    if (8 % BITS == 0) & (left >= WORDS * 8):
        pointer = pointer_to_words(to, BITS)
        tl.store(pointer + word, words.to(pointer.dtype.element_ty))
    else:
        byte = tl.arange(0, BYTES)
        offsets = (word * BITS)[:, None] + byte[None, :]
        inside = (byte < BITS)[None, :] & (offsets < tl.cdiv(left * BITS, 8))
        tl.store(to + offsets, (words[:, None] >> (byte * 8).to(word_type)[None, :]).to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["numel"])
def unpack_words(
    packed,
    values,
    numel,
    BITS: tl.constexpr,
    SIGNED: tl.constexpr,
    ALIGNED: tl.constexpr,
    WORDS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """uint8 -> int8 [numel], sign-extended or not."""
    word_type: tl.constexpr = tl.int32 if BITS <= 4 else tl.int64
    first = tl.program_id(0).to(tl.int64) * WORDS
    left = numel - first * 8
    word = tl.arange(0, WORDS)
    start = packed + first * BITS
    if ALIGNED & (8 % BITS == 0) & (left >= WORDS * 8):
        words = tl.load(pointer_to_words(start, BITS) + word).to(word_type)
    else:
        byte = tl.arange(0, BYTES)
        offsets = (word * BITS)[:, None] + byte[None, :]
        inside = (byte < BITS)[None, :] & (offsets < tl.cdiv(left * BITS, 8))
        each = tl.load(start + offsets, mask=inside, other=0).to(word_type)
        words = tl.sum(each << (byte * 8).to(word_type)[None, :], 1)
    digits = (words[:, None] >> (tl.arange(0, 8) * BITS).to(word_type)[None, :]).to(tl.int32)
    digits = (digits << (32 - BITS)) >> (32 - BITS) if SIGNED else digits & ((1 << BITS) - 1)
    each = tl.reshape(digits.to(tl.int8), [WORDS * 8])
    lanes = tl.arange(0, WORDS * 8)
    if left >= WORDS * 8:
        tl.store(values + first * 8 + lanes, each)
    else:
        tl.store(values + first * 8 + lanes, each, mask=lanes < left)


def _grid(numel: int) -> tuple[int]:
    return (triton.cdiv(numel, WORDS * 8),)


def _pack(values: Tensor, bits: int, outside: Tensor | None) -> Tensor:
    """Of int8 or bool values; ``outside``: where to say that one has too many bits."""
    numel = values.numel()
    packed = torch.empty(triton.cdiv(numel * bits, 8), dtype=torch.uint8, device=values.device)
    if numel:
        with operands.on(values):
            pack_words[_grid(numel)](
                values.contiguous().view(torch.int8),
                packed,
                outside,
                numel,
                BITS=bits,
                CHECKED=outside is not None,
                WORDS=WORDS,
                BYTES=triton.next_power_of_2(bits),
            )
    return packed


def _unpack(packed: Tensor, numel: int, bits: int, dtype: torch.dtype) -> Tensor:
    values = torch.empty(numel, dtype=dtype, device=packed.device)
    packed = packed.contiguous()
    if numel:
        with operands.on(packed):
            unpack_words[_grid(numel)](
                packed,
                values.view(torch.int8),
                numel,
                BITS=bits,
                SIGNED=dtype == torch.int8,
                ALIGNED=operands.aligned((packed,)),
                WORDS=WORDS,
                BYTES=triton.next_power_of_2(bits),
            )
    return values


def pack_ints(q: Tensor, bits: int) -> Tensor:
    """``q`` int8 of any shape -> uint8 ``[ceil(n bits / 8)]``. RuntimeError for values with more bits: it waits."""
    outside = torch.zeros((), dtype=torch.int32, device=q.device) if bits < 8 else None
    packed = _pack(q, bits, outside)
    if outside is not None and outside.item():
        raise RuntimeError(f"expected values of {bits} bits")
    return packed


def unpack_ints(packed: Tensor, numel: int, bits: int) -> Tensor:
    """uint8 -> int8 ``[numel]``."""
    return _unpack(packed, numel, bits, torch.int8)


def pack_bits(mask: Tensor) -> Tensor:
    """bool of any shape -> uint8 ``[ceil(n / 8)]``."""
    return _pack(mask, 1, None)


def unpack_bits(packed: Tensor, numel: int) -> Tensor:
    """uint8 -> bool ``[numel]``."""
    return _unpack(packed, numel, 1, torch.bool)
