"""Latency of a small sparse student on the CPU: one input at a time.

    python bench/bench_latency.py [--threads 1] [--out bench/results/latency.json]

The student is the network with 90 % of each layer's weights pruned and 4 bits, from its packed file: time does not
depend on what it learned. Against the same student as a float PyTorch model, called as it is and through torch.compile
(without max-autotune), and in onnxruntime: fp32, INT8 weights and activations (static quantization of every supported
operation by onnxruntime itself, the faster of signed and unsigned activations), and INT4 weights (``export_onnx``). "C
source" is ``export_c``'s, which is written for small memory, compiled with ``cc -O3 -march=native``.

Floating-point operations counted are those of the weights that are not zero. INT8 rounds: its result is not compared.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import Report
from timing import Bind, Call, Workload
from torch import Tensor, nn

import pqk_fast as pqk
from pqk_fast.branches import pqk_layers
from pqk_fast.deploy.c_source import export_c
from pqk_fast.deploy.executor import compile_network
from pqk_fast.deploy.graph import read_graph
from pqk_fast.deploy.onnx import export_onnx
from pqk_fast.deploy.operations import Conv
from pqk_fast.deploy.packed import load_packed, save_packed
from pqk_fast.deploy.runtime import choose_by_time, load_runtime
from pqk_fast.models import create_model

CASES = {  # classes, shape of an input, sparsities
    "res8_narrow": (12, (1, 101, 40), (0.9,)),
    "res8": (12, (1, 101, 40), (0.9, 0.7, 0.5)),
    "resnet32": (100, (1, 3, 32, 32), (0.9, 0.5)),
}
CALIBRATION = 64  # inputs for the ranges of onnxruntime's activations


def student(name: str, sparsity: float) -> nn.Module:
    torch.manual_seed(0)
    config = pqk.PQKConfig(bits=4, sparsity=sparsity, scope="layer", mask_interval=1)
    model = pqk.prepare(create_model(name, CASES[name][0]), config)
    pqk.Pruner(model, 1, 1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for statistic, (low, high) in {"running_mean": (-0.1, 0.1), "running_var": (0.5, 2.0)}.items():
                getattr(module, statistic).uniform_(low, high)
    return model.eval()


def operations(plain: nn.Module, x: Tensor) -> float:
    convs = [op for op in read_graph(plain, x).ops if isinstance(op, Conv)]
    return sum(2.0 * int(op.weight.count_nonzero()) * op.size for op in convs)


def in_pytorch(model: nn.Module) -> Bind:
    def bind(x: Tensor) -> Call:
        def call() -> Tensor:
            with torch.inference_mode():
                out: Tensor = model(x)
                return out

        return call

    return bind


def in_onnxruntime(make: Callable[[Path], Path], threads: int) -> Bind:
    """``make`` writes the file into a folder and gives its path."""

    def bind(x: Tensor) -> Call:
        try:
            import onnxruntime
        except ImportError as error:
            raise RuntimeError(f"onnxruntime is not installed: {error}") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        with tempfile.TemporaryDirectory() as folder:
            try:
                path = make(Path(folder))
                session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            except Exception as error:  # recorded as this candidate's
                raise RuntimeError(f"{type(error).__name__}: {error}") from error
        inputs = {session.get_inputs()[0].name: x.numpy()}
        return lambda: torch.from_numpy(session.run(None, inputs)[0])

    return bind


def write_fp32(plain: nn.Module, x: Tensor, folder: Path) -> Path:
    path = folder / "fp32.onnx"
    torch.onnx.export(plain, (x,), str(path), dynamo=True, opset_version=21, external_data=False, verbose=False)
    return path


def write_int8(plain: nn.Module, x: Tensor, signed: bool, folder: Path) -> Path:
    import onnx
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    fp32 = write_fp32(plain, x, folder)
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randn(x.shape, generator=generator).numpy() for _ in range(CALIBRATION)]

    class Drawn(q.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest = iter(drawn)

        def get_next(self) -> dict[str, np.ndarray] | None:
            sample = next(self.rest, None)
            return None if sample is None else {name: sample}

    name = onnx.load(str(fp32)).graph.input[0].name
    ready, path = folder / "ready.onnx", folder / "int8.onnx"
    quant_pre_process(str(fp32), str(ready), skip_symbolic_shape=True)
    activations = q.QuantType.QInt8 if signed else q.QuantType.QUInt8
    q.quantize_static(
        str(ready), str(path), Drawn(), quant_format=q.QuantFormat.QDQ, per_channel=True,
        activation_type=activations, weight_type=q.QuantType.QInt8,
    )  # fmt: skip
    return path


def write_int4(model: nn.Module, x: Tensor, folder: Path) -> Path:
    path = folder / "int4.onnx"
    export_onnx(model, x, path)
    return path


def faster(one: Bind, other: Bind) -> Bind:
    """Of two ways the one that is the faster, in a first look."""

    def bind(x: Tensor) -> Call:
        calls = [one(x), other(x)]
        times: list[list[float]] = [[], []]
        for _ in range(200):
            for call, taken in zip(calls, times, strict=True):
                start = time.perf_counter()
                call()
                taken.append(time.perf_counter() - start)
        return min(zip(times, calls, strict=True), key=lambda pair: float(np.median(pair[0])))[1]

    return bind


def in_c(model: nn.Module, outputs: int) -> Bind:
    def bind(x: Tensor) -> Call:
        compiler = shutil.which("cc")
        if compiler is None:
            raise RuntimeError("no C compiler")
        with tempfile.TemporaryDirectory() as folder:
            report = export_c(model, x, Path(folder, "student.c"))
            library = Path(folder, "student.so")
            options = ["-O3", "-march=native", "-std=c99", "-shared", "-fPIC"]
            subprocess.run([compiler, *options, str(report.source), "-o", str(library)], check=True)
            run = ctypes.CDLL(str(library)).student_run
        scratch, out = torch.empty(report.scratch // 4), torch.empty(1, outputs)
        places = [ctypes.c_void_p(t.data_ptr()) for t in (x, out, scratch)]

        def call(keep: Any = (scratch,)) -> Tensor:
            run(*places)
            return out

        return call

    return bind


def check(result: Tensor, truth: Tensor, inputs: Any) -> str | None:
    worst = float((result - truth).abs().max())
    return None if worst <= 1e-4 * float(truth.abs().max()) else f"differs by {worst:.2g}"


def workload(model: nn.Module, x: Tensor, threads: int) -> Workload:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "student.pqk")
        save_packed(model, path)
        plain, layers = (load(path, pqk.convert(model)) for load in (load_packed, load_runtime))
    plain = plain.eval()
    choose_by_time(layers, x)
    whole = compile_network(plain, x)
    if not whole.takes(x):
        raise RuntimeError("the C++ library is not used")
    candidates: dict[str, Bind] = {
        "pqk_fast": in_pytorch(whole),
        "pqk_fast, layer by layer": in_pytorch(layers),
        "pqk_fast, C source": in_c(model, whole.output_shape[0]),
        "eager": in_pytorch(plain),
        "torch.compile": in_pytorch(torch.compile(plain)),
        "onnxruntime fp32": in_onnxruntime(partial(write_fp32, plain, x), threads),
        "onnxruntime int8": faster(
            *(in_onnxruntime(partial(write_int8, plain, x, signed), threads) for signed in (False, True))
        ),
        "onnxruntime int4 weights": in_onnxruntime(partial(write_int4, model, x), threads),
    }
    return Workload(candidates, lambda seed: (x,), check, unchecked=("onnxruntime int8",))


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def declare(report: Report) -> None:
    for name, (_, shape, sparsities) in CASES.items():
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        for sparsity in sparsities:
            model = student(name, sparsity)
            weights = sum(layer.weight.numel() for layer in pqk_layers(model).values())
            make = partial(workload, model, x, report.options.threads)
            flop = operations(pqk.convert(model).eval(), x)
            report.case(f"{name}, {100 * sparsity:.0f} % sparse", weights, 0.0, make, flop=flop)


def main() -> int:
    report = Report(__doc__, "latency", {"onnxruntime": version_of("onnxruntime")}, threads=1)
    declare(report)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
