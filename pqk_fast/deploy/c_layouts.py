"""Constants of the C source: packed weights, each layer in its smallest layout, tables of floats, and shapes."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from pqk_fast.deploy.encodings import encode
from pqk_fast.deploy.operations import Conv, Op, Pool, Rearrange


@dataclass(frozen=True)
class Integers:
    """``q`` int8 of the weight's shape, ``step`` fp64 [1] or [C]."""

    q: np.ndarray[Any, np.dtype[np.int8]]
    step: np.ndarray[Any, np.dtype[np.float64]]
    bits: int


@dataclass(frozen=True)
class CLayer:
    """A layer's weights in the source: ``bits`` (32: not quantized), how many are not zero, layout, and bytes."""

    name: str
    shape: tuple[int, ...]
    bits: int
    kept: int
    layout: str
    bytes: int

    def __str__(self) -> str:
        shape = " x ".join(map(str, self.shape))
        return (
            f"{self.name}: {shape}, {self.kept} of {math.prod(self.shape)} kept, {self.bits} bits, {self.layout}, "
            f"{self.bytes} bytes"
        )


@dataclass(frozen=True)
class StoredWeights:
    """``arguments`` of read_weights, see :mod:`pqk_fast.deploy.c_helpers`."""

    layer: CLayer
    arguments: str


@dataclass
class Constants:
    """Definitions in order, and how many bytes of flash they take; what is there already is not stored again."""

    texts: list[str] = field(default_factory=list)
    weights: int = 0
    tables: int = 0
    names: dict[tuple[str, str], str] = field(default_factory=dict)
    reserved: frozenset[str] = frozenset()

    def add(self, name: str, kind: str, content: str, about: str, weights: int = 0, tables: int = 0) -> str:
        """``kind`` holds ``@`` where the name comes; gives the name, with a number if another constant has it."""
        if (kind, content) in self.names:
            return self.names[kind, content]
        taken, base, count = {*self.names.values(), *self.reserved}, name, 1
        while name in taken:
            count += 1
            name = f"{base}_{count}"
        self.names[kind, content] = name
        definition = f"static const {kind.replace('@', name)} = {{\n{content}\n}};\n"
        self.texts.append(f"/* {comment(about)} */\n{definition}")
        self.weights += weights
        self.tables += tables
        return name


def store_weights(constants: Constants, op: Conv, layer: Integers | None) -> StoredWeights:
    """The weights of a convolution, packed if it is quantized."""
    name = identifier(op.parameter.removesuffix(".weight"))
    if layer is None:
        floats = op.weight.numpy().reshape(-1)
        made = CLayer(
            op.parameter, tuple(op.weight.shape), 32, int(np.count_nonzero(floats)), "FLOATS", 4 * floats.size
        )
        stored = _store_floats(constants, f"{name}_weights", floats, str(made), op.parameter, weights=True)
        return StoredWeights(made, f"FLOATS, {stored}, {floats.size}, 32, 0, 0")
    q = layer.q.reshape(-1)
    layout, data, count, gap_bits, bit = min(_layouts(q, layer.bits), key=lambda made: len(made[1]))
    made = CLayer(op.parameter, layer.q.shape, layer.bits, int(np.count_nonzero(q)), layout, len(data))
    how = f"{made}" + (f", in fields of {gap_bits} + {layer.bits} bits" if layout == "FIELDS" else "")
    numbers = [f"0x{byte:02x}" for byte in data.tolist()] or ["0x00"]  # C has no empty arrays
    stored = constants.add(f"{name}_weights", f"uint8_t @[{len(numbers)}]", _lines(numbers), how, weights=len(numbers))
    return StoredWeights(made, f"{layout}, {stored}, {count}, {layer.bits}, {gap_bits}, {bit}")


def _layouts(q: np.ndarray[Any, np.dtype[np.int8]], bits: int) -> list[tuple[str, Any, int, int, int]]:
    """Layout, bytes, count of fields or weights, bits of a gap, first bit of fields or values; see C's comments.

    They are encodings of the packed file, of which the third begins with the gaps' width and the number of fields.
    """
    gaps = encode(q, bits, "gaps")
    return [
        ("FIELDS", encode(q, bits, "dense"), q.size, 0, 0),
        ("BITMAP", encode(q, bits, "bitmask"), q.size, 0, (q.size + 7) // 8 * 8),
        ("FIELDS", gaps[5:], int.from_bytes(gaps[1:5].tobytes(), "little"), int(gaps[0]), 0),
    ]


def per_plane(constants: Constants, op: Op, scale: Tensor, shift: Tensor, c: str) -> tuple[str, str]:
    """What each plane is multiplied with and what is added: expressions of ``c``, from tables where planes differ."""
    name = identifier(op.module or op.output)
    where = op.module or op.output
    return (
        _plane_value(constants, f"{name}_scale", scale, f"{where}: what each plane is multiplied with", where, c),
        _plane_value(constants, f"{name}_shift", shift, f"{where}: what is then added", where, c),
    )


def _plane_value(constants: Constants, name: str, values: Tensor, about: str, where: str, c: str) -> str:
    floats = values.numpy().astype(np.float32)
    if (floats == floats[0]).all():
        return literal(floats[0], where)
    return f"{_store_floats(constants, name, floats, about, where)}[{c}]"


def _store_floats(constants: Constants, name: str, floats: Any, about: str, where: str, weights: bool = False) -> str:
    size = {"weights" if weights else "tables": 4 * floats.size}
    text = _lines([literal(value, where) for value in floats])
    return constants.add(name, f"float @[{floats.size}]", text, about, **size)


def literal(value: Any, where: str) -> str:
    """A fp32 number so that C reads the same bits."""
    if not math.isfinite(value):
        raise ValueError(f"{where}: a weight, step size, bias or statistic is {value}: the network is broken")
    text = f"{float(value):.9g}"
    return f"{text}f" if re.search(r"[.e]", text) else f"{text}.0f"


def store_struct(constants: Constants, op: Conv | Pool | Rearrange) -> str:
    """The shape of an operation; operations of the same shape share it."""
    if isinstance(op, Rearrange):
        sizes, strides = (", ".join(map(str, values)) for values in (op.sizes, op.strides))
        content = f"    {op.offset}, {{{sizes}}}, {{{strides}}}"
        return constants.add("order", "arrangement @", content, "where values are taken from", tables=36)
    if isinstance(op, Conv):
        inputs = op.weight.shape[1]
        pairs: list[tuple[str, Sequence[int]]] = [
            ("inputs, outputs", (inputs, op.planes // op.groups)),
            ("rows, columns", op.rows_columns),
            ("out_rows, out_columns", op.out),
            ("kernel", tuple(op.weight.shape[2:])),
            ("stride", op.stride),
            ("top, left", op.padding),
            ("dilation", op.dilation),
        ]
        kind = "conv"
    else:
        pairs = [
            ("rows, columns", op.rows_columns),
            ("out_rows, out_columns", op.out),
            ("kernel", op.kernel),
            ("stride", op.stride),
            ("top, left", op.padding),
            ("count_padding", (int(op.count_padding),)),
        ]
        kind = "pool"
    numbers = [number for _, group in pairs for number in group]
    if max(numbers) > 0xFFFF:
        raise ValueError(
            f"{op.module or op.output}: expected sizes up to 65535, which the C source counts with, got {max(numbers)}"
        )
    content = "\n".join(f"    {', '.join(map(str, group))}, /* {what} */" for what, group in pairs)
    about = "shape of a convolution" if kind == "conv" else "shape of a pooling"
    return constants.add(
        "shape" if kind == "conv" else "window", f"{kind}_shape @", content, about, tables=2 * len(numbers)
    )


def comment(text: str) -> str:
    """Text that ends no comment and begins none."""
    return re.sub(r"[^ -~]|[*?\\]", "_", text)


def identifier(name: str) -> str:
    """A name of modules as part of a C name."""
    text = re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")
    return text if re.match(r"[A-Za-z]", text) else f"layer_{text}".rstrip("_")


def _lines(numbers: Sequence[str]) -> str:
    return textwrap.fill(", ".join(numbers), 116, initial_indent="    ", subsequent_indent="    ")
