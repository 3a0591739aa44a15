"""A prepared student as one C99 source and header, without dependencies, heap or memory of its own."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pqk_fast.branches import require_prepared
from pqk_fast.deploy.c_helpers import helpers, words
from pqk_fast.deploy.c_layouts import CLayer, Constants, Integers, comment, per_plane, store_struct, store_weights
from pqk_fast.deploy.code_size import code_size
from pqk_fast.deploy.graph import read_graph
from pqk_fast.deploy.integers import integers_of
from pqk_fast.deploy.memory_plan import Plan, Stage, make_plan
from pqk_fast.deploy.operations import INPUT, Add, Affine, Conv, Mean, Network, Op, Pool, Rearrange, Relu
from pqk_fast.deploy.reader import weight_name
from pqk_fast.files import replacing
from pqk_fast.layers import PQKLayer
from pqk_fast.prepare import convert


@dataclass(frozen=True)
class CReport:
    """Files that were written, and bytes: ``flash`` is ``weights + tables + code``, ``scratch`` is RAM.

    ``weights`` are the packed weights, ``tables`` step sizes, biases, BatchNorm and shapes; ``code`` is what
    ``compiler`` made of the functions, None where there is no gcc or cc. The stack takes a few hundred bytes more.
    """

    source: Path
    header: Path
    layers: tuple[CLayer, ...]
    weights: int
    tables: int
    scratch: int
    code: int | None = None
    compiler: str = ""

    @property
    def flash(self) -> int:
        return self.weights + self.tables + (self.code or 0)


def export_c(model: nn.Module, example: Tensor, path: str | Path, name: str = "student") -> CReport:
    """Write ``PATH.c`` and ``PATH.h`` (``PATH/NAME.c`` and ``.h`` if PATH is a folder) with ``NAME_run``.

    ``void NAME_run(const float *input, float *logits, float *scratch)`` computes the student of a prepared model on one
    input, in fp32. It is re-entrant: all that it writes are ``logits`` and ``scratch``, ``NAME_SCRATCH_BYTES`` that
    need no initialization. Weights stay sparse and of k bits in the constants and are decoded as they are used, each
    layer in the layout that takes the fewest bytes.

    Args:
        model: a prepared model of 2 to 8 bits; its phase and mode do not matter and nothing of it changes.
        example: fp32 ``[1, ...]``, whose shape the function's input has.
        path: both files' path without ``.c``; folders are made, old files replaced once both new ones are whole.
        name: what names in the header begin with, a C identifier.

    Raises:
        ValueError: an unprepared model, ``bits=32``, a name that is none in C, an operation that is not supported (by
            its name, with those that are), weights or statistics that are not finite, sizes above 65535.
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
        raise ValueError(f"name must be a C identifier such as 'student', got {name!r}")
    path = Path(path)
    path = path / name if path.is_dir() else path.with_name(re.sub(r"\.[ch]$", "", path.name))
    if not re.fullmatch(r"[\w.+-]+", path.name, re.ASCII):
        raise ValueError(
            f"expected a file name of ASCII letters, digits and '._+-', which #include takes: {path.name!r}"
        )
    require_prepared(model)
    integers = _integers(model)
    network = read_graph(convert(model).cpu().eval(), example.detach().cpu())
    plan = make_plan(network)
    constants = Constants(reserved=words())
    body, used, stored = _Writer(plan, constants, integers).stages()
    source_path, header_path = path.with_name(path.name + ".c"), path.with_name(path.name + ".h")
    report = CReport(
        source_path, header_path, tuple(stored.values()), constants.weights, constants.tables, 4 * plan.floats
    )
    layouts = {layer.layout for layer in stored.values()}
    source = _source(name, header_path.name, body, helpers(used, layouts), constants)
    header = _header(name, network, report)
    measured = code_size(source, header, header_path.name)
    if measured is not None:
        report = replace(report, code=measured[0], compiler=measured[1])
        header = _header(name, network, report)
    with replacing(source_path, "w") as c_file, replacing(header_path, "w") as h_file:
        c_file.write(source)
        h_file.write(header)
    return report


def _integers(model: nn.Module) -> dict[str, Integers]:
    """By the name of the weight in the plain model; a shared layer under each of its names."""
    found = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, PQKLayer):
            q, step = integers_of(name, layer)
            found[weight_name(name)] = Integers(q, step.astype(np.float64), layer.bits)
    return found


class _Writer:
    """Writes the calls of each stage, and stores what they need as constants."""

    def __init__(self, plan: Plan, constants: Constants, integers: dict[str, Integers]) -> None:
        self.plan = plan
        self.constants = constants
        self.integers = integers
        places = dict.fromkeys((buffer.offset, buffer.floats, buffer.whole) for buffer in plan.buffers)
        self.pointers = {place: f"{'x' if place[2] else 'plane'}{i}" for i, place in enumerate(places)}
        self.layers: dict[str, CLayer] = {}
        self.functions: set[str] = set()

    def stages(self) -> tuple[str, set[str], dict[str, CLayer]]:
        """The function's body, the helpers that it calls, and its layers by their weights' names."""
        calls = [self._stage(stage) for stage in self.plan.stages]
        pointers = [
            f"    float *const {name} = scratch + {offset}; /* {floats}{'' if whole else ', one plane'} */\n"
            for (offset, floats, whole), name in self.pointers.items()
        ]
        if any(stage[0].planes > 1 for stage in self.plan.stages):
            pointers.append("    uint32_t c;\n")
        if not self.plan.buffers:
            calls.insert(0, "    (void)scratch; /* nothing is kept between layers */\n")
        return "".join(pointers) + "\n" + "\n".join(calls), self.functions, self.layers

    def _stage(self, stage: Stage) -> str:
        planes, conv = stage[0].planes, stage[0]
        title = ", ".join(f"{op.verb} {op.module}".rstrip() for op in stage)
        lines = [f"/* {comment(title)}: {planes} plane{'s' * (planes > 1)} */"]
        lines += self._start(conv) if isinstance(conv, Conv) else []
        calls = [self._call(op, "c" if planes > 1 else "0") for op in stage]
        if planes > 1:
            lines += [f"for (c = 0; c < {planes}; c++) {{", *(f"    {call}" for call in calls), "}"]
        else:
            lines += calls
        if isinstance(conv, Conv):
            lines = [lines[0], "{", *(f"    {line}" for line in lines[1:]), "}"]
        return "".join(f"    {line}\n" for line in lines)

    def _start(self, op: Conv) -> list[str]:
        """Declares the reader of the weights."""
        self.functions.add("convolve")
        stored = store_weights(self.constants, op, self.integers.get(op.parameter))
        self.layers[op.parameter] = stored.layer
        return [f"weight_reader weights = read_weights({stored.arguments});"]

    def _call(self, op: Op, c: str) -> str:
        ins = [self._place(name, op.source, c, whole=not op.by_plane) for name in op.inputs]
        out = self._place(op.output, op.size, c)
        function, arguments = self._function(op, c, ins, out)
        self.functions.add(function)
        return f"{function}({', '.join(arguments)});"

    def _function(self, op: Op, c: str, ins: list[str], out: str) -> tuple[str, list[str]]:
        store = self.constants
        if isinstance(op, Conv):
            layer = self.integers.get(op.parameter)
            step = torch.from_numpy(layer.step) if layer else 1.0
            last = per_plane(store, op, op.scale * step, op.shift, c)
            return "convolve", [f"&{store_struct(store, op)}", "&weights", c, *ins, out, *last]
        if isinstance(op, Affine):
            return "scale_and_shift", [str(op.size), *ins, out, *per_plane(store, op, op.scale, op.shift, c)]
        if isinstance(op, Pool):
            return "max_pool" if op.largest else "average_pool", [f"&{store_struct(store, op)}", *ins, out]
        if isinstance(op, Rearrange):
            return "rearrange", [f"&{store_struct(store, op)}", *ins, out]
        simple: dict[type[Op], str] = {Relu: "relu", Add: "add", Mean: "mean"}
        return simple[type(op)], [str(op.source), *ins, out]

    def _place(self, name: str, size: int, c: str, whole: bool = False) -> str:
        """Pointer to plane c of a result, or to all of it."""
        one = False
        if name == INPUT:
            pointer = "input"
        elif self.plan.of[name] is self.plan.result:
            pointer = "logits"
        else:
            buffer = self.plan.of[name]
            pointer, one = self.pointers[buffer.offset, buffer.floats, buffer.whole], not buffer.whole
        if whole or one or c == "0":
            return pointer
        return f"{pointer} + {size} * c" if size > 1 else f"{pointer} + c"


def _source(name: str, header: str, body: str, functions: str, constants: Constants) -> str:
    return "\n".join(
        [
            f"/* {name}: see {header}. Written by pqk_fast. */\n",
            f'#include "{header}"\n\n#include <stdint.h>\n',
            functions,
            *constants.texts,
            f"void {name}_run(const float *input, float *logits, float *scratch)\n{{\n{body}}}\n",
        ]
    )


def _header(name: str, network: Network, report: CReport) -> str:
    upper = name.upper()
    counts = {"INPUT": network.input_shape, "OUTPUT": network.output_shape}
    shapes = {key: " x ".join(map(str, shape)) or "1" for key, shape in counts.items()}
    sizes = {key: int(np.prod(shape)) for key, shape in counts.items()}
    code = "not measured" if report.code is None else f"{report.code} bytes ({report.compiler})"
    total = "" if report.code is None else f", {report.flash} bytes in all"
    floats = report.scratch // 4
    layers = "".join(f" *   {comment(str(layer))}\n" for layer in report.layers)
    return f"""\
/* {name}: a sparse network of few bits, with all of its weights. Written by pqk_fast.
 *
 *     static float scratch[{upper}_SCRATCH_FLOATS];
 *     {name}_run(input, logits, scratch);
 *
 * input:   {shapes["INPUT"]} floats, the last dimension contiguous
 * logits:  {shapes["OUTPUT"]} floats
 * scratch: {floats} floats of working memory, which need no initialization and hold nothing between calls
 *
 * Nothing else is written: calls with scratch of their own may run at the same time. input stays as it is; it, logits
 * and scratch must not overlap.
 *
 * Flash: weights {report.weights} bytes, tables {report.tables} bytes, code {code}{total}.
 * RAM: scratch {report.scratch} bytes.
 *
 * Layers, with the bytes of their weights:
{layers} */
#ifndef {upper}_H
#define {upper}_H

#define {upper}_INPUT_FLOATS {sizes["INPUT"]}
#define {upper}_OUTPUT_FLOATS {sizes["OUTPUT"]}
#define {upper}_SCRATCH_FLOATS {max(floats, 1)}
#define {upper}_SCRATCH_BYTES ({upper}_SCRATCH_FLOATS * sizeof(float))

#ifdef __cplusplus
extern "C" {{
#endif

void {name}_run(const float *input, float *logits, float *scratch);

#ifdef __cplusplus
}}
#endif

#endif
"""
