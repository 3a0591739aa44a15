"""Reads packed students with numpy alone; the format is described in ``docs/format.md``.

This file imports nothing of the library, nor torch: copy it to where a student is to be used. Nothing in a file is
trusted: every size, count and code is checked before it is used, and a checksum covers all of it.
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

FORMAT, VERSION = "pqk_fast packed", "1"
ENCODINGS = ("dense", "bitmask", "gaps", "entropy")
MOST_INDEX = 1 << 24  # bytes of the index, unpacked
MOST_WEIGHTS = 1 << 28  # unless told otherwise
PROBABILITY_BITS = 14
STATE_LOW = 1 << 16  # an entropy decoder's state is never below, and is this at the end
LANE_WEIGHTS = 1 << 14
MOST_LANES = 1 << 10
FEW_LANES = 16

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Values = np.ndarray[Any, np.dtype[np.int8]]


class PackedError(ValueError):
    """A file that is not a packed student, or is damaged; the message says what was expected and what came."""


@dataclass
class PackedLayer:
    """``q`` int8 of the weight's shape, in ``-Q..Q``; ``step`` fp32 [1] or [C]; the weight is ``q * step``.

    ``payload`` is the number of bytes that ``q`` takes in the file, in the given ``encoding``.
    """

    q: Values
    step: np.ndarray[Any, np.dtype[np.float32]]
    bits: int
    encoding: str
    payload: int

    def weight(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """fp32, bit for bit the student's."""
        step = self.step.reshape(-1, *[1] * (self.q.ndim - 1)) if self.step.size != 1 else self.step.reshape(())
        return self.q.astype(np.float32) * step


@dataclass
class Packed:
    """A file's content: layers by name, all other tensors (fp32), the model's name and ``metadata``, and sizes."""

    layers: dict[str, PackedLayer]
    tensors: dict[str, np.ndarray[Any, np.dtype[np.float32]]]
    metadata: dict[str, Any] = field(default_factory=dict)
    size: int = 0
    header: int = 0  # all bytes that are neither payload nor tensors nor step sizes

    def state_dict(self) -> dict[str, np.ndarray[Any, Any]]:
        """Weights and all other tensors under the names of the float model's state dict."""
        return {**{weight_name(name): layer.weight() for name, layer in self.layers.items()}, **self.tensors}


def weight_name(layer: str) -> str:
    """In a state dict; a model that is itself a layer has no name."""
    return f"{layer}.weight".removeprefix(".")


def read_packed(path: str | Path, most_weights: int = MOST_WEIGHTS) -> Packed:
    """Read a file. Raises PackedError for anything but a whole packed student of at most ``most_weights`` weights."""
    return parse_packed(Path(path).read_bytes(), str(path), most_weights)


def parse_packed(content: bytes, name: str = "the data", most_weights: int = MOST_WEIGHTS) -> Packed:
    """:func:`read_packed` of bytes."""
    try:
        return _parse(content, most_weights)
    except PackedError as error:
        raise PackedError(f"{name}: {error}") from None


def need(ok: object, message: str) -> None:
    if not ok:
        raise PackedError(message)


def _parse(content: bytes, most_weights: int) -> Packed:
    data = _unwrapped(content)
    need(len(data) >= 8, f"expected an index, got {len(data)} bytes of data: the file is cut off")
    packed_length, checksum = (int(n) for n in np.frombuffer(data, "<u4", 2))
    need(packed_length <= len(data) - 8, f"the index is said to take {packed_length} bytes of {len(data) - 8}: damaged")
    need(zlib.crc32(data[8:]) == checksum, "the checksum does not match: the file is damaged")
    layers, tensors, metadata = _index(data[8 : 8 + packed_length])
    need(
        sum(layer["count"] for layer in layers) <= most_weights,
        f"more than {most_weights} weights: give most_weights if that is meant",
    )
    body = memoryview(data)[8 + packed_length :]
    expected = sum(4 * layer["steps"] + layer["payload"] for layer in layers) + sum(4 * t["count"] for t in tensors)
    need(len(body) == expected, f"the index asks for {expected} bytes of content, there are {len(body)}")
    place = 0
    floats: dict[str, np.ndarray[Any, np.dtype[np.float32]]] = {}
    wanted = [(layer["name"], layer["steps"], (layer["steps"],)) for layer in layers]
    steps: list[Any] = []
    for entry in (*wanted, *((t["name"], t["count"], t["shape"]) for t in tensors)):
        values = np.frombuffer(body[place : place + 4 * entry[1]], "<f4").astype(np.float32).reshape(entry[2])
        place += 4 * entry[1]
        if len(steps) < len(layers):
            need(np.isfinite(values).all() and (values > 0).all(), f"layer {entry[0]!r}: a step size is not positive")
            steps.append(values)
        else:
            floats[entry[0]] = values
    made = {}
    for layer, step in zip(layers, steps, strict=True):
        payload = np.frombuffer(body[place : place + layer["payload"]], np.uint8)
        place += layer["payload"]
        try:
            q = decode(payload, layer["count"], layer["bits"], layer["encoding"])
        except PackedError as error:
            raise PackedError(f"layer {layer['name']!r}, {layer['encoding']}: {error}") from None
        made[layer["name"]] = PackedLayer(
            q.reshape(layer["shape"]), step, layer["bits"], layer["encoding"], layer["payload"]
        )
    header = len(content) - expected
    return Packed(made, floats, metadata, len(content), header)


def _unwrapped(content: bytes) -> bytes:
    """The one tensor of a safetensors file."""
    need(len(content) >= 8, f"expected a safetensors file, got {len(content)} bytes")
    length = int.from_bytes(content[:8], "little")
    need(length <= min(len(content) - 8, MOST_INDEX), "not a safetensors file, or it is cut off within its header")
    try:
        header = json.loads(content[8 : 8 + length].decode())
    except (ValueError, RecursionError) as error:
        raise PackedError(f"not a safetensors file, or its header is damaged ({str(error)[:80]})") from None
    size = len(content) - 8 - length
    need(isinstance(header, dict), "not a safetensors file: its header is not an object")
    metadata = header.get("__metadata__")
    need(
        isinstance(metadata, dict) and metadata.get("format") == FORMAT,
        f"not a packed student: its metadata must have the format {FORMAT!r}",
    )
    need(
        metadata.get("version") == VERSION,
        f"version {str(metadata.get('version'))[:20]!r}, this reader knows {VERSION!r}: use a newer pqk_fast",
    )
    expected = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    need(
        set(header) == {"__metadata__", "data"} and header["data"] == expected,
        f"expected one tensor 'data' of the {size} bytes that follow the header: the file is cut off or damaged",
    )
    return content[8 + length :]


def _index(packed: bytes) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """``[[name, shape, bits, encoding, steps, payload], ...]``, ``[[name, shape], ...]`` and metadata, checked."""
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(packed, MOST_INDEX)
        need(unpacker.eof and not unpacker.unused_data, "the index is cut off, or larger than any that is written")
        layers, tensors, metadata = json.loads(text.decode())
        read = [_layer_entry(*entry) for entry in layers], [_tensor_entry(*entry) for entry in tensors], metadata
    except (zlib.error, ValueError, TypeError, RecursionError) as error:
        if isinstance(error, PackedError):
            raise
        raise PackedError(f"the index is damaged ({str(error)[:80]})") from None
    names = [weight_name(layer["name"]) for layer in read[0]] + [tensor["name"] for tensor in read[1]]
    need(len(set(names)) == len(names), "the index names a tensor twice")
    need(isinstance(metadata, dict), "the index has no metadata")
    return read


def _whole(value: Any, low: int, high: int, what: str) -> int:
    need(type(value) is int and low <= value <= high, f"{what} must be a whole number in {low}..{high}")
    return int(value)


def _shape(name: Any, shape: Any) -> dict[str, Any]:
    need(isinstance(name, str) and len(name) < 4096, "a name in the index is not text")
    need(isinstance(shape, list) and len(shape) <= 8, f"{name!r}: expected a shape of at most 8 sizes")
    sizes = tuple(_whole(size, 0, 1 << 40, f"{name!r}: a size") for size in shape)
    count = math.prod(sizes)
    need(count < 1 << 48, f"{name!r}: a shape of {count} values")
    return {"name": name, "shape": sizes, "count": count}


def _layer_entry(name: Any, shape: Any, bits: Any, encoding: Any, steps: Any, payload: Any) -> dict[str, Any]:
    entry = _shape(name, shape)
    channels = entry["shape"][0] if entry["shape"] else 1
    need(type(steps) is int and steps in (1, channels), f"layer {name!r}: expected 1 or {channels} step sizes")
    return {
        **entry,
        "bits": _whole(bits, 2, 8, f"layer {name!r}: bits"),
        "encoding": ENCODINGS[_whole(encoding, 0, len(ENCODINGS) - 1, f"layer {name!r}: the encoding")],
        "steps": steps,
        "payload": _whole(payload, 0, 1 << 48, f"layer {name!r}: the payload"),
    }


def _tensor_entry(name: Any, shape: Any) -> dict[str, Any]:
    return _shape(name, shape)


# -- the encodings: each gives int8 values in -Q..Q and has used all bytes


def decode(payload: Bytes, count: int, bits: int, encoding: str) -> Values:
    """``count`` values of ``bits`` bits. PackedError if the payload holds anything else."""
    q = {"dense": _dense, "bitmask": _bitmask, "gaps": _gaps, "entropy": _entropy}[encoding](payload, count, bits)
    most = (1 << (bits - 1)) - 1
    need(q.size == count and (not count or -most <= q.min() <= q.max() <= most), f"a value is outside -{most}..{most}")
    return q


def unpack_fields(data: Bytes, count: int, bits: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """``count`` unsigned numbers of ``bits`` bits from a little-endian bit stream, whose last bits are zero."""
    size = (count * bits + 7) // 8
    need(len(data) == size, f"expected {size} bytes for {count} fields of {bits} bits, got {len(data)}")
    stream = np.unpackbits(data, bitorder="little")
    need(not stream[count * bits :].any(), "bits after the last field are set")
    return stream[: count * bits].reshape(count, bits).astype(np.int64) @ (1 << np.arange(bits))


def _signed(fields: np.ndarray[Any, np.dtype[np.int64]], bits: int) -> Values:
    return np.where(fields >= 1 << (bits - 1), fields - (1 << bits), fields).astype(np.int8)


def _dense(payload: Bytes, count: int, bits: int) -> Values:
    return _signed(unpack_fields(payload, count, bits), bits)


def _bitmask(payload: Bytes, count: int, bits: int) -> Values:
    size = (count + 7) // 8
    need(len(payload) >= size, f"expected a mask of {size} bytes, got {len(payload)}")
    kept = unpack_fields(payload[:size], count, 1).astype(bool)
    q = np.zeros(count, np.int8)
    q[kept] = _signed(unpack_fields(payload[size:], int(kept.sum()), bits), bits)
    return q


def _gaps(payload: Bytes, count: int, bits: int) -> Values:
    """A byte with the width g, then fields of g + bits bits: zeros before the value, and the value.

    A value of 0 stands for one more zero, so that a longer gap takes several fields.
    """
    need(len(payload) >= 5, f"expected a width and a count, got {len(payload)} bytes")
    width, fields = int(payload[0]), int.from_bytes(payload[1:5].tobytes(), "little")
    need(1 <= width <= 16, f"the width of a gap must lie in 1..16, got {width}")
    need(fields <= count, f"{fields} fields for {count} weights")
    pairs = unpack_fields(payload[5:], fields, width + bits)
    values = _signed(pairs >> width, bits)
    places = np.cumsum((pairs & ((1 << width) - 1)) + 1) - 1
    need(not fields or places[-1] < count, "the gaps run past the last weight")
    q = np.zeros(count, np.int8)
    q[places] = values
    return q


def frequencies(codes: Bytes) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Frequencies of symbols from their codes, a sum of 2^14: 0 is never, c = 8 e + m stands for (8 + m) 2^e."""
    weights = np.where(codes, (8 + codes.astype(np.int64) % 8) << (codes.astype(np.int64) // 8), 0)
    total, scale = int(weights.sum()), 1 << PROBABILITY_BITS
    need(total, "the table of frequencies is empty")
    scaled = np.where(weights, np.maximum(weights * scale // total, 1), 0)
    largest = int(scaled.argmax())
    scaled[largest] += scale - int(scaled.sum())
    need(scaled[largest] > 0, "the table of frequencies does not add up")
    return scaled


def lanes_of(count: int) -> int:
    """Decoders that take turns, so that many weights are decoded at once."""
    return min(MOST_LANES, max(1, count // LANE_WEIGHTS))


def _entropy(payload: Bytes, count: int, bits: int) -> Values:
    """An interleaved rANS stream (Duda, 2013) of zeros and values, or of zeros and others with the values apart.

    A byte says which (0 or 1); then a code for the frequency of every symbol (see :func:`frequencies`), the states of
    all lanes (u32), the number of 16-bit words (u32), the words; in the second case then the values, dense.
    """
    need(len(payload) >= 1, "the payload is empty")
    apart = int(payload[0])
    need(apart in (0, 1), f"expected 0 or 1 as the kind, got {apart}")
    most = (1 << (bits - 1)) - 1
    symbols, lanes = 2 if apart else 2 * most + 1, lanes_of(count)
    start = 1 + symbols + 4 * lanes
    need(len(payload) >= start + 4, f"expected at least {start + 4} bytes, got {len(payload)}")
    states = np.frombuffer(payload[1 + symbols : start].tobytes(), "<u4").astype(np.int64)
    words = int.from_bytes(payload[start : start + 4].tobytes(), "little")
    end = start + 4 + 2 * words
    need(end <= len(payload), f"{words} words do not fit into {len(payload)} bytes")
    stream = np.frombuffer(payload[start + 4 : end].tobytes(), "<u2").astype(np.int64)
    found = decode_symbols(stream, states, frequencies(payload[1 : 1 + symbols]), count)
    if not apart:
        need(end == len(payload), "bytes are left over")
        return (found - most).astype(np.int8)
    kept = found.astype(bool)
    q = np.zeros(count, np.int8)
    q[kept] = _signed(unpack_fields(payload[end:], int(kept.sum()), bits), bits)
    return q


def decode_symbols(
    stream: np.ndarray[Any, np.dtype[np.int64]],
    states: np.ndarray[Any, np.dtype[np.int64]],
    frequency: np.ndarray[Any, np.dtype[np.int64]],
    count: int,
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """``count`` symbols; every state must have come to its beginning and every word be used."""
    need((states >= STATE_LOW).all(), "a decoder's state is out of range")
    run = _few_lanes if len(states) < FEW_LANES else _many_lanes
    out, used, ends = run(stream, states, frequency, count)
    need(used == len(stream) and ends == STATE_LOW, "the words do not end with the weights: damaged")
    return out


def _few_lanes(stream: Any, states: Any, frequency: Any, count: int) -> tuple[Any, int, int]:
    """A weight at a time: numpy takes longer for a handful."""
    first, symbol_of = _tables(frequency)
    frequency, first, symbol_of = frequency.tolist(), first.tolist(), symbol_of.tolist()
    lanes, words, x = len(states), stream.tolist(), states.tolist()
    mask, place = (1 << PROBABILITY_BITS) - 1, 0
    out = [0] * count
    for i in range(count):
        state = x[i % lanes]
        slot = state & mask
        out[i] = symbol = symbol_of[slot]
        state = frequency[symbol] * (state >> PROBABILITY_BITS) + slot - first[symbol]
        if state < STATE_LOW:
            need(place < len(words), "the words end early")
            state = state << 16 | words[place]
            place += 1
        x[i % lanes] = state
    return np.array(out, np.int64), place, max(x) if min(x) == STATE_LOW else -1


def _many_lanes(stream: Any, states: Any, frequency: Any, count: int) -> tuple[Any, int, int]:
    first, symbol_of = _tables(frequency)
    lanes, place = len(states), 0
    out = np.zeros(count, np.int64)
    for begin in range(0, count, lanes):
        active = min(lanes, count - begin)
        x = states[:active]
        slot = x & ((1 << PROBABILITY_BITS) - 1)
        symbol = symbol_of[slot]
        out[begin : begin + active] = symbol
        x = frequency[symbol] * (x >> PROBABILITY_BITS) + slot - first[symbol]
        short = x < STATE_LOW
        wanted = int(short.sum())
        need(place + wanted <= len(stream), "the words end early")
        x[short] = (x[short] << 16) | stream[place : place + wanted]
        place += wanted
        states[:active] = x
    return out, place, int(states.max()) if int(states.min()) == STATE_LOW else -1


def _tables(frequency: Any) -> tuple[Any, Any]:
    """Where each symbol's slots begin, and the symbol of every slot."""
    return np.cumsum(frequency) - frequency, np.repeat(np.arange(len(frequency)), frequency)
