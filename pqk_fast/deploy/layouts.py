"""Where the values of a network lie in memory when the C++ library runs it: see csrc/network.h."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from pqk_fast.deploy.operations import INPUT, Add, Affine, Conv, Network, Op, Pair, Pool, Rearrange, Relu


@dataclass(frozen=True, kw_only=True, eq=False)
class Deal(Op):
    """The padded input dealt out to ``stride[0] * stride[1]`` planes of ``out``, to be read without a stride."""

    rows_columns: Pair  # of the input
    out: Pair
    stride: Pair
    padding: Pair
    verb = "padding"


@dataclass(frozen=True)
class Layout:
    """Planes are ``stride`` apart; each has ``lead`` zeros, then rows that are ``pitch`` apart."""

    rows: int
    columns: int
    pitch: int
    stride: int
    lead: int = 0


class _Group:
    """Values that lie alike: ``shapes`` are the planes' sizes that operations see in them, ``border`` the zeros that
    they need around their rows, ``pitch`` the least that suits what makes them; a plain one has no zeros."""

    def __init__(self) -> None:
        self.shapes: set[Pair] = set()
        self.is_plain = False
        self.border = (0, 0)
        self.pitch = 0

    def plain(self) -> bool:
        return self.is_plain or len(self.shapes) != 1


class Layouts:
    """``network`` is the given one with a Deal before each convolution that needs it."""

    def __init__(self, network: Network) -> None:
        self._groups = {name: _Group() for name in [INPUT, *(op.output for op in network.ops)]}
        self._made = {op.output: op for op in network.ops}
        self._join(network)
        for name in (INPUT, network.output):
            self._groups[name].is_plain = True
        self._output = network.output
        ops: list[Op] = []
        for op in network.ops:
            if isinstance(op, Conv) and self._must_deal(op):
                deal = _deal(op)
                group = self._groups[op.output]
                group.pitch = max(group.pitch, deal.out[1])
                ops += [deal, replace(op, inputs=(deal.output,), source=deal.size)]
            else:
                ops.append(op)
        # borders once every direct convolution is known
        for op in ops:
            if isinstance(op, Conv) and op.inputs[0] in self._groups:
                group, border = self._groups[op.inputs[0]], _border(op)
                group.border = (max(group.border[0], border[0]), max(group.border[1], border[1]))
                group.pitch = max(group.pitch, op.out[1])  # padded by more than it takes away
        self.network = replace(network, ops=tuple(ops))
        self._deals = {op.output: op for op in ops if isinstance(op, Deal)}
        self._convolved = {op.inputs[0] for op in ops if isinstance(op, Conv)} - set(self._deals)

    def _join(self, network: Network) -> None:
        for op in network.ops:
            if isinstance(op, Pool) and any(
                k > n + 2 * p for k, n, p in zip(op.kernel, op.rows_columns, op.padding, strict=True)
            ):
                raise ValueError(
                    f"a {op.verb} of {op.kernel} windows over {op.rows_columns} values (ceil_mode) is not supported: "
                    "call the model itself"
                )
            if isinstance(op, Conv | Pool):
                self._groups[op.inputs[0]].shapes.add(op.rows_columns)
                self._groups[op.output].shapes.add(op.out)
            if isinstance(op, Affine | Relu | Add):
                self._unite([*op.inputs, op.output])
            elif isinstance(op, Conv) and op.inputs[0] != INPUT and op.stride == (1, 1) and op.out == op.rows_columns:
                self._unite([op.inputs[0], op.output])
            elif isinstance(op, Rearrange):
                for name in (op.inputs[0], op.output):
                    self._groups[name].is_plain = True
            for name in op.inputs:
                made = self._made.get(name)
                if made is not None and (made.planes, made.size) != (planes_read(op), op.source):
                    self._groups[name].is_plain = True

    def _unite(self, names: Iterable[str]) -> None:
        first, *others = (self._groups[name] for name in names)
        for group in others:
            first.shapes |= group.shapes
            first.is_plain |= group.is_plain
            for name, old in self._groups.items():
                if old is group:
                    self._groups[name] = first

    def _must_deal(self, op: Conv) -> bool:
        name = op.inputs[0]
        outside = name in (INPUT, self._output)  # vectors read past the end
        needs_border = _border(op) != (0, 0) and self._groups[name].plain()
        return outside or needs_border or op.stride != (1, 1)

    def of(self, name: str, shape: Pair) -> Layout:
        """Of a value that an operation sees as planes of ``shape``."""
        if name in self._deals:
            rows, columns = self._deals[name].out
            return Layout(rows, columns, columns, self._deals[name].size)
        group = self._groups[name]
        if group.plain():
            return Layout(*shape, shape[1], shape[0] * shape[1])
        ((rows, columns),) = group.shapes
        pitch = max(columns + group.border[1], group.pitch)
        lead = group.border[0] * pitch + group.border[1]
        return Layout(rows, columns, pitch, lead + rows * pitch, lead)

    def needs_zeros(self, name: str) -> bool:
        """Whether a convolution reads the value over its borders."""
        return name in self._convolved

    def is_dealt(self, name: str) -> bool:
        return name in self._deals

    def floats(self, op: Op, whole: bool) -> int:
        """Memory for an operation's result, all planes of it or one."""
        layout = self.of(op.output, shape_made(op))
        return layout.stride * (op.planes if whole else 1) + layout.lead


def planes_read(op: Op) -> int:
    """How many planes an operation sees in its inputs."""
    return op.weight.shape[1] * op.groups if isinstance(op, Conv) else op.planes


def shape_read(op: Op) -> Pair:
    return op.rows_columns if isinstance(op, Conv | Pool | Deal) else (1, op.source)


def shape_made(op: Op) -> Pair:
    return op.out if isinstance(op, Conv | Pool) else (1, op.size)


def reach(op: Conv) -> Pair:
    rows, columns = ((size - 1) * dilation + 1 for size, dilation in zip(op.weight.shape[2:], op.dilation, strict=True))
    return rows, columns


def _after(op: Conv) -> Pair:
    """Zeros below and to the right."""
    need = zip(op.out, op.stride, reach(op), op.padding, op.rows_columns, strict=True)
    rows, columns = (max(0, (out - 1) * stride + size - before - given) for out, stride, size, before, given in need)
    return rows, columns


def _border(op: Conv) -> Pair:
    after = _after(op)
    return max(op.padding[0], after[0]), max(op.padding[1], after[1])


def _deal(op: Conv) -> Deal:
    sizes = zip(op.rows_columns, op.padding, _after(op), op.stride, strict=True)
    rows, columns = (-(-(given + before + after) // stride) for given, before, after, stride in sizes)
    size = op.stride[0] * op.stride[1] * rows * columns
    return Deal(
        output=f"{op.output} dealt", inputs=op.inputs, planes=planes_read(op), size=size, source=op.source,
        module=op.module, rows_columns=op.rows_columns, out=(rows, columns), stride=op.stride, padding=op.padding,
    )  # fmt: skip
