"""The student as ONNX: INT4 and INT8 weights with their step sizes, which the graph dequantizes (QDQ, opset 21).

torch's exporter writes the plain fp32 student. Each PQK weight among its initializers then becomes the integers of
Eq. 2 and a DequantizeLinear whose output has the weight's own name, so that nothing else in the graph has to change.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from pqk_fast import reference
from pqk_fast.branches import require_prepared
from pqk_fast.deploy.encodings import encode
from pqk_fast.deploy.integers import integers_of
from pqk_fast.deploy.program import Example, described, trace
from pqk_fast.deploy.reader import weight_name
from pqk_fast.files import replacing
from pqk_fast.layers import PQKLayer
from pqk_fast.settings import is_quantized

OPSET = 21  # the first with INT4


class Grid(NamedTuple):
    """A weight as ``q`` (int8 of its shape, -Q..Q) times ``step`` (fp32 [], or [C] along dimension 0)."""

    q: np.ndarray[Any, np.dtype[np.int8]]
    step: np.ndarray[Any, np.dtype[np.float32]]
    width: int  # bits of an integer in the file: 4 or 8


def export_onnx(model: nn.Module, example: Example, path: str | Path, metadata: Mapping[str, Any] | None = None) -> int:
    """Write the student of a prepared model as an ONNX file (opset 21); gives its size in bytes.

    Weights of PQK layers are INT4 (up to 4 bits) or INT8 (5 to 8 bits) with their step size as the scale, for the
    tensor or for each output channel, and no zero point. All else is fp32. The batch size is free ("batch"); one input
    is called "input", one output "output", several as ``forward`` calls them. The file's metadata properties are
    ``metadata`` (text, or JSON of anything else; "model" and "labels" are usual) and the layers' "bits". The model is
    untouched.

    Checked before it is written: by onnx's checker, and that the file's integers and scales give the student's weights
    bit for bit.

    Args:
        model: a prepared model, in either phase and mode.
        example: what the network takes, with the batch first: a tensor, or a tuple of them. Values do not matter.
        path: where to write; a file that is there is replaced once the new one is whole.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        TypeError: ``example`` is neither a tensor nor a tuple of tensors.
        ValueError: an unprepared model, an ``example`` that the network does not take, weights that no integers give
            exactly (``bits=32``, bf16 or fp16, not finite), or a network that torch's exporter cannot express.
    """
    try:
        import onnx
        import onnxscript.optimizer
    except ImportError as error:
        raise ImportError(
            f"export_onnx needs the packages onnx and onnxscript ({error}): pip install 'pqk-fast[onnx]'"
        ) from error
    layers = require_prepared(model)
    for name, layer in layers.items():
        _refuse(name, layer)
    program = trace(model, example)
    grids = _grids(model, program)
    proto = _fp32_proto(program)
    _quantize(proto.graph, grids)
    proto = onnxscript.optimizer.optimize(proto)  # not before: it folds weights with what follows them
    _tidy(proto)
    onnx.helper.set_model_props(
        proto,
        {
            key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for key, value in described(model, metadata).items()
        },
    )
    _check(proto, grids, program.state_dict)
    content = proto.SerializeToString()
    with replacing(path) as file:
        file.write(content)
    return len(content)


def _refuse(name: str, layer: PQKLayer) -> None:
    if not is_quantized(layer.bits):
        raise ValueError(
            f"layer {name!r}: bits=32 prunes without quantizing, so there are no integers to write; "
            "torch.onnx.export(pqk_fast.convert(model).eval(), ...) writes it in fp32"
        )
    if layer.weight.dtype != torch.float32:
        raise ValueError(
            f"layer {name!r} is {layer.weight.dtype}: its dequantized weights are rounded once more, which the file "
            "cannot say; call model.float() first"
        )


@torch.no_grad()
def _grids(model: nn.Module, program: ExportedProgram) -> dict[str, Grid]:
    """Of every PQK weight that the program reads, under each name that it may have there."""
    parameters = program.graph_signature.inputs_to_parameters
    read = {parameters[node.name] for node in program.graph.nodes if node.name in parameters and node.users}
    grids = {}
    for module, layer in model.named_modules(remove_duplicate=False):
        name = weight_name(module)
        if isinstance(layer, PQKLayer) and name in read:
            q, scale = integers_of(module, layer)
            given = reference.dequantize(torch.from_numpy(q).float(), torch.from_numpy(scale))
            if not torch.equal(given, program.state_dict[name]):
                raise ValueError(f"{name}: the weights are not integers times the step size")
            width = 4 if layer.bits <= 4 else 8
            grids[name] = Grid(q, scale.reshape(()) if scale.size == 1 else scale, width)
    return grids


def _fp32_proto(program: ExportedProgram) -> Any:
    """The program as torch's exporter writes it, with all its initializers as they are."""
    signature = program.graph_signature
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # torch about its own code
            exported = torch.onnx.export(
                program,
                input_names=["input"] if len(signature.user_inputs) == 1 else None,
                output_names=["output"] if len(signature.user_outputs) == 1 else None,
                opset_version=OPSET,
                custom_translation_table={torch.ops.aten.linear.default: _linear},
                dynamo=True,
                optimize=False,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ValueError(f"the network cannot be written as ONNX: {error.__cause__ or error}") from error
    assert exported is not None
    return exported.model_proto


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """``F.linear`` as a Gemm, of more than two dimensions too.

    torch's own is then a MatMul, which onnxruntime merges with an INT8 DequantizeLinear into MatMulNBits; that rounds
    the activations to 8 bits unless the session is told not to, and is off by a hundredth.
    """
    from onnxscript import opset18 as op  # in which torch writes; it converts all of it afterwards

    if len(x.shape) == 2:
        return op.Gemm(x, weight, bias, transB=1)
    rows, inputs = weight.shape
    flat = op.Gemm(op.Reshape(x, op.Constant(value_ints=[-1, inputs])), weight, bias, transB=1)
    return op.Reshape(flat, op.Concat(op.Shape(x, end=-1), op.Constant(value_ints=[rows]), axis=0))


def _quantize(graph: Any, grids: Mapping[str, Grid]) -> None:
    """Initializers that are PQK weights become integers, a scale and a DequantizeLinear."""
    from onnx import TensorProto, helper, numpy_helper

    initializers, nodes = [], []
    for tensor in graph.initializer:
        grid = grids.get(tensor.name)
        if grid is None:
            initializers.append(tensor)
            continue
        parts = [f"{tensor.name}/quantized", f"{tensor.name}/scale"]  # no parameter has a slash in its name
        packed = encode(grid.q.reshape(-1), grid.width, "dense").tobytes()  # INT4: two in a byte, the low half first
        kind = TensorProto.INT4 if grid.width == 4 else TensorProto.INT8
        initializers.append(helper.make_tensor(parts[0], kind, grid.q.shape, packed, raw=True))
        initializers.append(numpy_helper.from_array(grid.step, parts[1]))
        axis = {"axis": 0} if grid.step.ndim else {}
        nodes.append(helper.make_node("DequantizeLinear", parts, [tensor.name], f"{tensor.name}/dequantize", **axis))
    nodes.extend(graph.node)
    for field, values in (("initializer", initializers), ("node", nodes)):
        graph.ClearField(field)
        getattr(graph, field).extend(values)


def _tidy(proto: Any) -> None:
    """Leave out the exporter's notes (paths of this machine among them), and call the batch size so."""
    graph = proto.graph
    for part in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    graph.ClearField("value_info")
    symbol = re.escape(graph.input[0].type.tensor_type.shape.dim[0].dim_param)
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(rf"\b{symbol}\b", "batch", dim.dim_param)


def _check(proto: Any, grids: Mapping[str, Grid], weights: Mapping[str, Tensor]) -> None:
    """onnx's checker, and that each PQK weight is what one of the DequantizeLinear nodes gives, bit for bit."""
    import onnx

    onnx.checker.check_model(proto, full_check=True)
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    given = set()
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear":
            q, step = (stored[name] for name in node.input)
            weight = q.astype(np.float32) * step.reshape(-1, *[1] * (q.ndim - 1))
            given.add((weight.shape, weight.tobytes()))
    for name in grids:
        weight = weights[name].detach().numpy()
        if (weight.shape, weight.tobytes()) not in given:
            raise RuntimeError(
                f"{name} did not come out of the exporter as integers that give it exactly, so nothing was written: "
                "use the versions of torch, onnx and onnxscript that constraints.txt names"
            )
