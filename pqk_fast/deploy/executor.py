"""A whole network as one call of the C++ library, for the latency of small sparse networks on the CPU.

What a call of each PyTorch operation costs is longer than what a sparse layer of a small network takes. Here the
network is read once and written as a list of steps (csrc/network.h), each convolution as its nonzero weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pqk_fast import dispatch, native
from pqk_fast.deploy.graph import read_graph
from pqk_fast.deploy.layouts import Deal, Layouts, shape_made, shape_read
from pqk_fast.deploy.memory_plan import make_plan, place
from pqk_fast.deploy.operations import INPUT, Add, Affine, Conv, Mean, Op, Pool, Rearrange, Relu, with_fused_relu
from pqk_fast.deploy.taps import as_places, in_dealt_planes, taps_of

PLACES = {"input": 0, "output": 1, "block": 2, "plane": 3}
KINDS: dict[type[Op], int] = {Deal: 0, Conv: 1, Affine: 2, Relu: 3, Add: 4, Pool: 5, Mean: 6, Rearrange: 7}
SETTINGS = 9
MARGIN = 512  # floats that vectors may read past a value, at least csrc's sum_margin()


def _missing(*_: object) -> Tensor:
    raise RuntimeError("run_network is an operation of the C++ library, which is not used here: call the model")


# x: fp32 [B, ...]; steps, places, numbers: what this module writes; sizes: floats of one input and output, of the
# block and of each thread's planes. Gives fp32 [B, output].
run_network = dispatch.define(
    "run_network(Tensor x, Tensor steps, Tensor places, Tensor numbers, int[] sizes) -> Tensor",
    _missing,
    lambda x, steps, places, numbers, sizes: x.new_empty(x.numel() // sizes[0], sizes[1]),
)


class NetworkRuntime(nn.Module):
    """``model`` for inference on fp32 ``[B, *example.shape[1:]]`` on the CPU, one sample after the other, with torch's
    threads; whatever else comes goes through ``model`` itself, as everything does without the C++ library.

    Made by :func:`compile_network`.
    """

    steps: Tensor
    places: Tensor
    numbers: Tensor

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        super().__init__()
        self.model = model
        network = read_graph(model, example)
        writer = _Writer(Layouts(with_fused_relu(network)))
        self.sizes = writer.sizes(int(np.prod(network.input_shape)), int(np.prod(network.output_shape)))
        self.input_shape, self.output_shape = network.input_shape, network.output_shape
        self.register_buffer("steps", torch.tensor(writer.steps, dtype=torch.int64), persistent=False)
        self.register_buffer("places", torch.tensor(np.concatenate(writer.places)), persistent=False)
        self.register_buffer("numbers", torch.tensor(np.concatenate(writer.numbers)), persistent=False)

    def takes(self, x: Tensor) -> bool:
        """Whether ``x`` goes through the C++ library."""
        fits = x.dtype == torch.float32 and x.device.type == "cpu" and tuple(x.shape[1:]) == self.input_shape
        return fits and native.library().path is not None

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        if not self.takes(x):
            made: Tensor = self.model(x)
            return made
        out: Tensor = run_network(x, self.steps, self.places, self.numbers, self.sizes)
        return out.view(len(x), *self.output_shape)


def compile_network(model: nn.Module, example: Tensor) -> NetworkRuntime:
    """``model`` (plain, in evaluation mode) as one call for inputs of the shape of ``example``, fp32 ``[B, ...]``.

    The batch may have any size; its samples are computed one after the other. Weights are taken as they are now. Raises
    ValueError, by :func:`~pqk_fast.deploy.graph.read_graph`, for an operation that is not supported.
    """
    return NetworkRuntime(model, example[:1])


class _Writer:
    """The numbers of csrc/network.h's Program."""

    def __init__(self, layouts: Layouts) -> None:
        self.layouts = layouts
        self.plan = make_plan(layouts.network, layouts.floats)
        self.places: list[Any] = [np.zeros(0, np.int32)]
        self.numbers: list[Any] = [np.zeros(0, np.float32)]
        self._counts = {"places": 0, "numbers": 0}
        ops = layouts.network.ops
        self.scratch = max([MARGIN, *(self._scratch_of(op) for op in ops)])
        whole = [buffer for buffer in self.plan.buffers if buffer.whole]
        self.block = place(whole) + MARGIN
        self.plane = self.scratch + place([buffer for buffer in self.plan.buffers if not buffer.whole]) + MARGIN
        self.steps = [self._step(op, joined=op is not stage[0]) for stage in self.plan.stages for op in stage]

    def sizes(self, inputs: int, outputs: int) -> list[int]:
        return [inputs, outputs, self.block, self.plane]

    def _scratch_of(self, op: Op) -> int:
        if isinstance(op, Conv):
            return self._positions(op)[0] + MARGIN
        if isinstance(op, Pool):  # csrc's pool_scratch
            columns, (_, before), (_, kernel), (_, stride) = op.rows_columns[1], op.padding, op.kernel, op.stride
            return 2 * op.out[0] * max(columns + 2 * before, (op.out[1] - 1) * stride + kernel)
        return 0

    def _positions(self, op: Conv) -> tuple[int, int]:
        pitch = self.layouts.of(op.inputs[0], op.rows_columns).pitch
        return (op.out[0] - 1) * pitch + op.out[1], pitch

    def _step(self, op: Op, joined: bool) -> list[int]:
        inputs = [self._value(name, shape_read(op)) for name in op.inputs]
        out = self._value(op.output, shape_made(op))
        zeros = [0, 0]
        if self.layouts.needs_zeros(op.output):
            layout = self.layouts.of(op.output, shape_made(op))
            zeros = [layout.lead, layout.pitch - layout.columns]
        numbers = 0
        if isinstance(op, Conv | Affine):
            numbers = self._add("numbers", torch.cat([op.scale, op.shift]).float().numpy())
        settings = self._settings(op)
        settings += [0] * (SETTINGS - len(settings))
        first, second = (inputs * 2)[:2]
        return [KINDS[type(op)], op.planes, int(joined), *zeros, *first, *second, *out, numbers, *settings]

    def _value(self, name: str, shape: tuple[int, int]) -> list[int]:
        """csrc's Value."""
        layout = self.layouts.of(name, shape)
        rest = [layout.rows, layout.columns, layout.pitch]
        if name == INPUT:
            return [PLACES["input"], 0, layout.stride, *rest]
        buffer = self.plan.of[name]
        if buffer is self.plan.result:
            return [PLACES["output"], 0, layout.stride, *rest]
        if buffer.whole:
            return [PLACES["block"], buffer.offset + layout.lead, layout.stride, *rest]
        return [PLACES["plane"], self.scratch + buffer.offset + layout.lead, 0, *rest]

    def _add(self, kind: str, values: Any) -> int:
        """Appends values; gives where they begin."""
        begin = self._counts[kind]
        getattr(self, kind).append(values)
        self._counts[kind] += len(values)
        return begin

    def _settings(self, op: Op) -> list[int]:
        if isinstance(op, Deal):
            return [*op.stride, *op.padding]
        if isinstance(op, Pool):
            return [*op.kernel, *op.stride, *op.padding, int(op.largest), int(op.count_padding)]
        if isinstance(op, Rearrange):
            return [*op.sizes, *op.strides, op.offset]
        return self._taps(op) if isinstance(op, Conv) else []

    def _taps(self, op: Conv) -> list[int]:
        taps = taps_of(op.weight.numpy(), op.groups, op.dilation)
        layout = self.layouts.of(op.inputs[0], op.rows_columns)
        if self.layouts.is_dealt(op.inputs[0]):
            offsets = in_dealt_planes(taps, op.stride, layout.stride, layout.rows, layout.pitch)
        else:
            rows, columns = taps.y - op.padding[0], taps.x - op.padding[1]
            offsets = taps.channel * layout.stride + rows * layout.pitch + columns
        first = self._add("places", taps.first)
        places = self._add("places", as_places(offsets, f"{op.module}: its input of {op.rows_columns}"))
        return [*self._positions(op), first, places, self._add("numbers", taps.value), int(op.relu)]
