"""The few kinds of operations that the networks of :mod:`pqk_fast.deploy.graph` are made of."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

INPUT = "input"  # the network's input among the names of values
Pair = tuple[int, int]  # rows and columns


@dataclass(frozen=True, kw_only=True, eq=False)
class Op:
    """One operation; its result has ``planes`` planes (channels) of ``size`` values, in row-major order.

    ``inputs`` name the results that it reads (or INPUT), ``source`` is the number of values in a plane of those.
    ``module`` is the module that it came from, for people.
    """

    output: str
    inputs: tuple[str, ...]
    planes: int
    size: int
    source: int
    module: str

    by_plane: ClassVar[bool] = True  # a plane of the result needs only that plane of the inputs
    in_place: ClassVar[bool] = False  # a value needs only that value of the inputs, so it may take its place
    verb: ClassVar[str]


@dataclass(frozen=True, kw_only=True, eq=False)
class Conv(Op):
    """Convolution, and ``linear`` as the convolution of planes of one value; then ``scale`` and ``shift``, and a ReLU
    with ``relu`` (by :func:`with_fused_relu`).

    ``weight`` fp32 ``[planes, inputs of a group, kernel rows, columns]``, the parameter called ``parameter``; ``scale``
    and ``shift`` fp64 ``[planes]`` (bias and BatchNorm); ``padding`` is above and to the left, zeros to the right and
    below are as many as ``out`` needs.
    """

    parameter: str
    weight: Tensor
    scale: Tensor
    shift: Tensor
    rows_columns: Pair  # of the input
    out: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    relu: bool = False
    by_plane = False
    verb = "convolution"


@dataclass(frozen=True, kw_only=True, eq=False)
class Affine(Op):
    """``x scale + shift`` with fp64 ``[planes]`` each: BatchNorm in evaluation."""

    scale: Tensor
    shift: Tensor
    in_place = True
    verb = "scale and shift"


@dataclass(frozen=True, kw_only=True, eq=False)
class Relu(Op):
    in_place = True
    verb = "ReLU"


@dataclass(frozen=True, kw_only=True, eq=False)
class Add(Op):
    in_place = True
    verb = "sum"


@dataclass(frozen=True, kw_only=True, eq=False)
class Pool(Op):
    """Largest value or mean of each window, as PyTorch defines them (``count_padding``: ``count_include_pad``)."""

    largest: bool
    rows_columns: Pair
    out: Pair
    kernel: Pair
    stride: Pair
    padding: Pair
    count_padding: bool = False
    verb = "pooling"


@dataclass(frozen=True, kw_only=True, eq=False)
class Mean(Op):
    """Of each plane."""

    verb = "mean"


@dataclass(frozen=True, kw_only=True, eq=False)
class Rearrange(Op):
    """Value ``(i, j, k, l)`` of ``sizes`` is the input's at ``offset + i strides[0] + ...``."""

    sizes: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]
    offset: int
    by_plane = False
    verb = "rearrangement"


@dataclass(frozen=True)
class Network:
    """Operations in the order of their computation; ``output`` is the result's name. Shapes are without the batch."""

    ops: tuple[Op, ...]
    output: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


def with_fused_relu(network: Network) -> Network:
    """The same, with each Relu that alone reads a convolution as part of it."""
    readers = Counter(name for op in network.ops for name in op.inputs)
    made = {op.output: op for op in network.ops}
    ops: dict[str, Op] = {}
    for op in network.ops:
        before = made.get(op.inputs[0])
        if (
            isinstance(op, Relu)
            and isinstance(before, Conv)
            and readers[before.output] == 1
            and before.output != network.output
            and (before.planes, before.size) == (op.planes, op.size)
        ):
            del ops[before.output]
            ops[op.output] = replace(before, output=op.output, relu=True)
        else:
            ops[op.output] = op
    return replace(network, ops=tuple(ops.values()))
