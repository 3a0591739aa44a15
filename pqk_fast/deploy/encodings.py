"""Writes a layer's integers in each encoding of the packed file; :mod:`pqk_fast.deploy.reader` reads and defines them.

All in numpy. ``q`` is int8 [n] in ``-Q..Q``; what is given is the payload, uint8.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pqk_fast.deploy.reader import (
    PROBABILITY_BITS,
    STATE_LOW,
    Bytes,
    Values,
    frequencies,
    lanes_of,
)

Ints = np.ndarray[Any, np.dtype[np.int64]]


def smallest(q: Values, bits: int) -> tuple[str, Bytes]:
    """The encoding that takes the fewest bytes, and its payload; of equal ones the simplest."""
    made = {name: encode(q, bits, name) for name in ("dense", "bitmask", "gaps", "entropy")}
    name = min(made, key=lambda name: len(made[name]))
    return name, made[name]


def encode(q: Values, bits: int, encoding: str) -> Bytes:
    """``q`` in one encoding. Raises ValueError for values outside ``-Q..Q`` or an unknown name."""
    most = (1 << (bits - 1)) - 1
    if len(q) and not -most <= int(q.min()) <= int(q.max()) <= most:
        raise ValueError(f"expected values in -{most}..{most} for {bits} bits, got {q.min()}..{q.max()}")
    writers = {"dense": _dense, "bitmask": _bitmask, "gaps": _gaps, "entropy": _entropy}
    if encoding not in writers:
        raise ValueError(f"expected one of {', '.join(writers)}, got {encoding!r}")
    return writers[encoding](q, bits)


def entropy_bound(q: Values) -> float:
    """Bytes that no code of independent weights can beat: ``N H(density) + kept H(values)``, with ``q``'s own
    frequencies (zero order), which need no table."""
    kept = q[q != 0]
    density = len(kept) / max(len(q), 1)
    return (len(q) * _entropy_of([density, 1 - density]) + len(kept) * _entropy_of(_shares(kept))) / 8


def _shares(values: Values) -> list[float]:
    return (np.unique(values, return_counts=True)[1] / max(len(values), 1)).tolist()


def _entropy_of(shares: list[float]) -> float:
    return -sum(share * math.log2(share) for share in shares if share > 0)


def pack_fields(fields: Ints, bits: int) -> Bytes:
    """Unsigned numbers of ``bits`` bits as a little-endian bit stream, padded with zeros to whole bytes."""
    stream = (fields[:, None] >> np.arange(bits)) & 1
    return np.packbits(stream.astype(np.uint8).reshape(-1), bitorder="little")


def _fields(q: Values, bits: int) -> Ints:
    return q.astype(np.int64) & ((1 << bits) - 1)


def _dense(q: Values, bits: int) -> Bytes:
    return pack_fields(_fields(q, bits), bits)


def _bitmask(q: Values, bits: int) -> Bytes:
    kept = q != 0
    return np.concatenate([np.packbits(kept, bitorder="little"), pack_fields(_fields(q[kept], bits), bits)])


def _gaps(q: Values, bits: int) -> Bytes:
    """With the width that gives the fewest bytes."""
    places = np.flatnonzero(q)
    zeros = np.diff(places, prepend=-1) - 1  # before each value
    widths = range(1, 17)
    sizes = [int((zeros >> width).sum() + len(zeros)) * (width + bits) for width in widths]
    width = widths[int(np.argmin(sizes))]
    fillers = zeros >> width  # fields that stand for 2^width zeros
    total = int(fillers.sum()) + len(zeros)
    gaps = np.full(total, (1 << width) - 1, np.int64)
    values = np.zeros(total, np.int64)
    ends = np.cumsum(fillers + 1) - 1
    gaps[ends] = zeros & ((1 << width) - 1)
    values[ends] = _fields(q[places], bits)
    head = np.frombuffer(bytes([width]) + total.to_bytes(4, "little"), np.uint8)
    return np.concatenate([head, pack_fields(gaps | values << width, width + bits)])


def _entropy(q: Values, bits: int) -> Bytes:
    """Values within the stream or apart, whichever is smaller."""
    most = (1 << (bits - 1)) - 1
    kept = q != 0
    within = _stream(q.astype(np.int64) + most, 2 * most + 1)
    apart = np.concatenate([_stream(kept.astype(np.int64), 2), pack_fields(_fields(q[kept], bits), bits)])
    kind, made = min(((0, within), (1, apart)), key=lambda pair: len(pair[1]))
    return np.concatenate([np.array([kind], np.uint8), made])


def _stream(symbols: Ints, count: int) -> Bytes:
    """Codes of the frequencies, states, number of words, words."""
    codes = frequency_codes(np.bincount(symbols, minlength=count))
    states, words = encode_symbols(symbols, frequencies(codes), lanes_of(len(symbols)))
    parts = (states.astype("<u4"), np.array([len(words)], "<u4"), words.astype("<u2"))
    return np.concatenate([codes, *(np.frombuffer(part.tobytes(), np.uint8) for part in parts)])


def frequency_codes(counts: Ints) -> Bytes:
    """For every symbol the code nearest to its count; see :func:`pqk_fast.deploy.reader.frequencies`."""
    codes = np.zeros(len(counts), np.uint8)
    if not counts.any():  # no weights at all
        codes[0] = 1
        return codes
    # relative to the most frequent, so that a rare symbol is not lost to the codes' range
    scale = max(1.0, 2.0**20 / int(counts.max()))
    for i in np.flatnonzero(counts):
        value = max(8.0, float(counts[i]) * scale)
        exponent = int(math.log2(value / 8))
        mantissa = round(value / 2**exponent) - 8
        codes[i] = max(1, 8 * exponent + mantissa)
    return codes


def encode_symbols(symbols: Ints, frequency: Ints, lanes: int) -> tuple[Ints, Ints]:
    """States to begin with and words in the order in which they are read; the reverse of decoding, from the end."""
    first = np.cumsum(frequency) - frequency
    states = np.full(lanes, STATE_LOW, np.int64)
    words: list[Ints] = []
    for begin in range((len(symbols) - 1) // lanes * lanes, -1, -lanes) if len(symbols) else ():
        part = symbols[begin : begin + lanes]
        x, f = states[: len(part)], frequency[part]
        large = x >= f << (32 - PROBABILITY_BITS)
        words.append((x[large] & 0xFFFF)[::-1])
        x = np.where(large, x >> 16, x)
        states[: len(part)] = (x // f << PROBABILITY_BITS) + x % f + first[part]
    read = np.concatenate(words)[::-1] if words else np.zeros(0, np.int64)
    return states, read
