"""A plain network for one input as a few kinds of operations, read from its exported program."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from pqk_fast.deploy.operations import INPUT, Add, Affine, Conv, Mean, Network, Op, Pair, Pool, Rearrange, Relu
from pqk_fast.layers import PQKLayer


def read_graph(model: nn.Module, example: Tensor) -> Network:
    """The operations of ``model`` (in evaluation mode) on one fp32 input of the shape of ``example``, ``[1, ...]``.

    Views cost nothing and vanish; a BatchNorm that alone reads a convolution becomes its scale and shift.

    Raises ValueError for an operation that is not supported, by its name and with the list of those that are, for
    more than one input or output, another dtype, or a batch. torch.export's own errors pass through.
    """
    if any(isinstance(module, PQKLayer) for module in model.modules()):
        raise ValueError("expected a plain network, got a prepared one: give pqk_fast.convert(model).eval()")
    if any(module.training and isinstance(module, _BatchNorm | _DropoutNd) for module in model.modules()):
        raise ValueError("expected a network in evaluation mode: call model.eval() first")
    if example.dim() < 1 or example.shape[0] != 1 or example.dtype != torch.float32:
        raise ValueError(
            f"expected an example of one fp32 input, shape [1, ...], got {example.dtype} {list(example.shape)}: "
            "give example[:1].float()"
        )
    with torch.no_grad():
        program = torch.export.export(model, (example,))
        if any(_changes_its_input(node) for node in program.graph.nodes):
            program = program.run_decompositions({})
    return _Reader(program).network()


def _changes_its_input(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def shape_of(node: Node) -> tuple[int, ...]:
    return tuple(int(size) for size in node.meta["val"].shape)


def planes_of(shape: Sequence[int]) -> Pair:
    """Number of planes and values in each, of a value with a batch dimension of 1."""
    if len(shape) >= 2 and shape[0] == 1:
        return shape[1], math.prod(shape[2:])
    return 1, math.prod(shape)


def pair(values: Any, dims: int, fill: int) -> Pair:
    """Rows and columns from PyTorch's one or two numbers; in one dimension there is one row."""
    numbers = list(values) if isinstance(values, list | tuple) else [values]
    if len(numbers) == 1:
        numbers *= dims
    rows, columns = [fill] * (2 - dims) + numbers
    return int(rows), int(columns)


class _Reader:
    def __init__(self, program: torch.export.ExportedProgram) -> None:
        signature = program.graph_signature
        named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        tensors = {**program.constants, **program.state_dict}
        self.tensors = {node: (name, tensors[name].detach()) for node, name in named.items()}
        self.inputs = signature.user_inputs
        self.graph = program.graph
        self.values: dict[Node, str] = {}
        self.ops: dict[str, Op] = {}

    def network(self) -> Network:
        (results,) = (node.args[0] for node in self.graph.nodes if node.op == "output")
        if not isinstance(results, list | tuple) or len(results) != 1 or not isinstance(results[0], Node):
            raise ValueError("expected a network that gives one tensor")
        if len(self.inputs) != 1:
            raise ValueError(f"expected a network with one input, got {len(self.inputs)}")
        result = results[0]
        needed, found = {result}, [result]
        while found:
            new = set(found.pop().all_input_nodes) - needed
            needed |= new
            found += new
        shape: tuple[int, ...] = ()
        for node in self.graph.nodes:
            if node.name in self.inputs:
                self.values[node], shape = INPUT, shape_of(node)[1:]
            elif node.op == "call_function" and node in needed:
                self._read(node)
        output = self.values.get(result, INPUT)
        if output == INPUT:
            raise ValueError("the network computes nothing from its input")
        result_shape = shape_of(result)
        return Network(tuple(self.ops.values()), output, shape, result_shape[result_shape[:1] == (1,) :])

    def _read(self, node: Node) -> None:
        kind = node.target._schema.name.removeprefix("aten::") if _is_op(node) else node.target.__name__  # type: ignore[union-attr]
        handler = HANDLERS.get(kind)
        if handler is None:
            raise refused(node, f"{node.target} is not supported")
        value = node.meta["val"]
        if (value[0] if isinstance(value, list | tuple) else value).dtype != torch.float32:
            raise refused(node, f"expected fp32 throughout, got {value.dtype}: call .float() on the model")
        self.values[node] = handler(self, node, _arguments(node) if _is_op(node) else {})

    # -- each handler gives the name of the node's value

    def _add_op(self, kind: type[Op], node: Node, inputs: Sequence[Node], source: int, size: int, **more: Any) -> str:
        names = tuple(self._value(node, source) for source in inputs)
        op = kind(output=node.name, inputs=names, size=size, source=source, module=module_of(node), **more)
        self.ops[op.output] = op
        return op.output

    def _value(self, node: Node, source: Any) -> str:
        if source not in self.values:
            raise refused(node, "expected values that are computed from the input, got a constant or a parameter")
        return self.values[source]

    def _tensor(self, node: Node, source: Any) -> tuple[str, Tensor]:
        if not isinstance(source, Node) or source.name not in self.tensors:
            raise refused(node, "expected parameters and buffers, not values computed from others")
        return self.tensors[source.name]

    def conv(self, node: Node, given: dict[str, Any]) -> str:
        name, weight = self._tensor(node, given["weight"])
        dims = weight.dim() - 2
        shape = self._batched(node, given["input"], dims)
        stride, dilation = pair(given["stride"], dims, 1), pair(given["dilation"], dims, 1)
        if dims == 1:
            weight = weight.unsqueeze(2)
        kernel = weight.shape[2:]
        if given["padding"] == "same":
            padding = tuple(dilation[i] * (kernel[i] - 1) // 2 for i in range(2))
        else:
            padding = (0, 0) if given["padding"] == "valid" else pair(given["padding"], dims, 0)
        return self._add_conv(
            node, given, name, weight,
            rows_columns=pair(shape[2:], dims, 1), out=pair(shape_of(node)[2:], dims, 1),
            stride=stride, padding=padding, dilation=dilation, groups=given["groups"],
        )  # fmt: skip

    def linear(self, node: Node, given: dict[str, Any]) -> str:
        name, weight = self._tensor(node, given["weight"])
        if math.prod(shape_of(given["input"])) != weight.shape[1]:
            raise refused(node, f"expected one row of inputs, got {list(shape_of(given['input']))}")
        return self._add_conv(node, given, name, weight[:, :, None, None], rows_columns=(1, 1), out=(1, 1))

    def _add_conv(self, node: Node, given: dict[str, Any], name: str, weight: Tensor, **more: Any) -> str:
        planes, size = len(weight), math.prod(more["out"])
        scale = torch.ones(planes, dtype=torch.float64)
        shift = torch.zeros_like(scale) if given["bias"] is None else self._tensor(node, given["bias"])[1].double()
        return self._add_op(
            Conv, node, [given["input"]], math.prod(more["rows_columns"]), size, planes=planes,
            parameter=name, weight=weight, scale=scale, shift=shift, **more,
        )  # fmt: skip

    def batch_norm(self, node: Node, given: dict[str, Any]) -> str:
        source = given["input"]
        planes, size = planes_of(shape_of(source))
        if given.get("training") or given["running_mean"] is None:
            raise refused(node, "expected the statistics of training, not the batch's own")
        mean, variance = (self._tensor(node, given[f"running_{name}"])[1].double() for name in ("mean", "var"))
        if len(mean) != planes:
            raise refused(node, f"expected a value [1, {len(mean)}, ...], got {list(shape_of(source))}")
        scale = (variance + given["eps"]).rsqrt()
        if given["weight"] is not None:
            scale = scale * self._tensor(node, given["weight"])[1].double()
        shift = -mean * scale
        if given["bias"] is not None:
            shift = shift + self._tensor(node, given["bias"])[1].double()
        before = self.ops.get(source.name)
        if isinstance(before, Conv) and len(source.users) == 1:
            self.ops[before.output] = replace(before, scale=before.scale * scale, shift=before.shift * scale + shift)
            return before.output
        return self._add_op(Affine, node, [source], size, size, planes=planes, scale=scale, shift=shift)

    def relu(self, node: Node, given: dict[str, Any]) -> str:
        planes, size = planes_of(shape_of(node))
        return self._add_op(Relu, node, [given["self"]], size, size, planes=planes)

    def add(self, node: Node, given: dict[str, Any]) -> str:
        planes, size = planes_of(shape_of(node))
        inputs = [given["self"], given["other"]]
        names = [self._value(node, source) for source in inputs]
        if given["alpha"] != 1 or any(shape_of(source) != shape_of(node) for source in inputs):
            raise refused(node, f"expected two values of one shape and alpha=1, got {' and '.join(names)}")
        return self._add_op(Add, node, inputs, size, size, planes=planes)

    def pool(self, node: Node, given: dict[str, Any]) -> str:
        largest = "dilation" in given
        dims = 1 if node.target._schema.name.endswith("1d") else 2  # type: ignore[union-attr]
        shape = self._batched(node, given["self"], dims)
        kernel = pair(given["kernel_size"], dims, 1)
        stride = pair(given["stride"], dims, 1) if given["stride"] else kernel
        if largest and pair(given["dilation"], dims, 1) != (1, 1):
            raise refused(node, "a dilation is not supported")
        if given.get("divisor_override"):
            raise refused(node, "divisor_override is not supported")
        rows_columns, out = pair(shape[2:], dims, 1), pair(shape_of(node)[2:], dims, 1)
        return self._add_op(
            Pool, node, [given["self"]], math.prod(rows_columns), math.prod(out), planes=shape[1], largest=largest,
            rows_columns=rows_columns, out=out, kernel=kernel, stride=stride, padding=pair(given["padding"], dims, 0),
            count_padding=bool(given.get("count_include_pad")),
        )  # fmt: skip

    def adaptive_pool(self, node: Node, given: dict[str, Any]) -> str:
        dims = 1 if node.target._schema.name.endswith("1d") else 2  # type: ignore[union-attr]
        shape = self._batched(node, given["self"], dims)
        rows_columns, out = pair(shape[2:], dims, 1), pair(shape_of(node)[2:], dims, 1)
        if out == (1, 1):
            return self._add_op(Mean, node, [given["self"]], math.prod(rows_columns), 1, planes=shape[1])
        if rows_columns[0] % out[0] or rows_columns[1] % out[1]:
            raise refused(node, f"expected an output that divides {list(shape[2:])}, got {list(shape_of(node)[2:])}")
        kernel = (rows_columns[0] // out[0], rows_columns[1] // out[1])
        return self._add_op(
            Pool, node, [given["self"]], math.prod(rows_columns), math.prod(out), planes=shape[1], largest=False,
            rows_columns=rows_columns, out=out, kernel=kernel, stride=kernel, padding=(0, 0),
        )  # fmt: skip

    def mean(self, node: Node, given: dict[str, Any]) -> str:
        shape = shape_of(given["self"])
        over = {dim % len(shape) for dim in given.get("dim") or range(len(shape))}
        size = math.prod(shape[dim] for dim in over)
        planes = math.prod(shape) // size
        if max((dim for dim in range(len(shape)) if dim not in over and shape[dim] > 1), default=-1) > min(
            (dim for dim in over if shape[dim] > 1), default=len(shape)
        ):
            raise refused(node, f"expected a mean over the last dimensions, got {sorted(over)} of {list(shape)}")
        return self._add_op(Mean, node, [given["self"]], size, 1, planes=planes)

    def view(self, node: Node, given: dict[str, Any]) -> str:
        source = node.args[0]
        assert isinstance(source, Node)
        if math.prod(shape_of(source)) != math.prod(shape_of(node)):
            raise refused(node, f"cannot make {list(shape_of(node))} of {list(shape_of(source))} without a copy")
        return self._value(node, source)

    def dropout(self, node: Node, given: dict[str, Any]) -> str:
        if given["train"]:
            raise refused(node, "it is in training mode: pass training=self.training")
        return self._value(node, given["input"])

    def getitem(self, node: Node, given: dict[str, Any]) -> str:
        """The first of the results of BatchNorm, which is the only one that has several."""
        source, index = node.args
        if index != 0:
            raise refused(node, "expected the first of several results")
        return self._value(node, source)

    def permute(self, node: Node, given: dict[str, Any]) -> str:
        shape = shape_of(given["self"])
        order = list(range(len(shape)))
        if "dims" in given:
            order = [dim % len(shape) for dim in given["dims"]]
        else:
            first, second = given["dim0"], given["dim1"]
            order[first], order[second] = order[second], order[first]
        strides = _strides(shape)
        return self._strided(node, given["self"], [shape[i] for i in order], [strides[i] for i in order], 0)

    def part(self, node: Node, given: dict[str, Any]) -> str:
        shape = shape_of(given["self"])
        dim = given["dim"] % len(shape)
        strides = _strides(shape)
        if "index" in given:  # select
            start, step = given["index"] % shape[dim], 1
            sizes = [*shape[:dim], 1, *shape[dim + 1 :]]
        else:
            start, _, step = slice(given["start"], given["end"], given["step"]).indices(shape[dim])
            sizes = list(shape_of(node))
        offset = start * strides[dim]
        strides[dim] *= step
        return self._strided(node, given["self"], sizes, strides, offset)

    def _strided(self, node: Node, source: Node, sizes: list[int], strides: list[int], offset: int) -> str:
        """The source's own values if they stay in their order, otherwise a copy."""
        merged: list[list[int]] = []
        for size, stride in zip(sizes, strides, strict=True):
            if merged and merged[-1][1] == size * stride:
                merged[-1] = [merged[-1][0] * size, stride]
            elif size > 1:
                merged.append([size, stride])
        count = math.prod(sizes)
        if count == math.prod(shape_of(source)) and len(merged) <= 1:
            return self._value(node, source)
        if len(merged) > 4:
            raise refused(node, "more than four dimensions change places")
        filled = [[1, 0]] * (4 - len(merged)) + merged
        return self._add_op(
            Rearrange, node, [source], math.prod(shape_of(source)), count, planes=1,
            sizes=tuple(size for size, _ in filled), strides=tuple(stride for _, stride in filled), offset=offset,
        )  # fmt: skip

    def _batched(self, node: Node, source: Node, dims: int) -> tuple[int, ...]:
        shape = shape_of(source)
        if len(shape) != dims + 2 or shape[0] != 1:
            raise refused(node, f"expected a value [1, channels{', size' * dims}], got {list(shape)}")
        return shape


VIEWS = (
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "contiguous", "clone", "detach",
    "alias", "_unsafe_view",
)  # fmt: skip
Handler = Callable[[_Reader, Node, dict[str, Any]], str]
HANDLERS: dict[str, Handler] = {
    "conv2d": _Reader.conv,
    "conv1d": _Reader.conv,
    "linear": _Reader.linear,
    "batch_norm": _Reader.batch_norm,
    "_native_batch_norm_legit_no_training": _Reader.batch_norm,
    "relu": _Reader.relu,
    "add": _Reader.add,
    "max_pool2d": _Reader.pool,
    "max_pool1d": _Reader.pool,
    "avg_pool2d": _Reader.pool,
    "avg_pool1d": _Reader.pool,
    "adaptive_avg_pool2d": _Reader.adaptive_pool,
    "adaptive_avg_pool1d": _Reader.adaptive_pool,
    "mean": _Reader.mean,
    "permute": _Reader.permute,
    "transpose": _Reader.permute,
    "slice": _Reader.part,
    "select": _Reader.part,
    "dropout": _Reader.dropout,
    "getitem": _Reader.getitem,
    **dict.fromkeys(VIEWS, _Reader.view),
}


def refused(node: Node, why: str) -> ValueError:
    names = ", ".join(name for name in HANDLERS if name != "getitem" and not name.startswith("_"))
    where = f" in module {module_of(node)!r}" if module_of(node) else ""
    return ValueError(f"{node.name}{where}: {why}. Known are: {names}")


def module_of(node: Node) -> str:
    """Name of the innermost module; empty for the network itself."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def _is_op(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload)


def _arguments(node: Node) -> dict[str, Any]:
    """All arguments by name, defaults too."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    given.update(zip((argument.name for argument in schema), node.args, strict=False))
    return {**given, **node.kwargs}


def _strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
