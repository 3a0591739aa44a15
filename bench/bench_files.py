"""Bytes of a sparse 4-bit student as a file, and of its weights alone, in this library's format and in others.

    python bench/bench_files.py [--out bench/results/files.json]

The students are bench_latency.py's: 90 % of each layer's weights pruned, 4 bits, as drawn at the start; what training
changes in them are a few per cent of the entropy-coded bytes. Whole files hold all that a forward pass needs. "weights
alone" are as ``pqk-fast inspect`` counts them; GGUF Q4_0 and NF4 would round the weights to another grid.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_latency import CASES, student, write_fp32, write_int4, write_int8
from report import RUN_ERRORS, Report, described
from torch import nn

import pqk_fast as pqk
from pqk_fast.branches import pqk_layers
from pqk_fast.deploy.packed import save_packed
from pqk_fast.deploy.program import export_program
from pqk_fast.deploy.reader import read_packed
from pqk_fast.deploy.sizes import formats

SPARSITY = 0.9
OURS = "this file's payload"
YARDSTICKS = ("bound of independent weights", "the paper's count")  # no formats
ENCODINGS = ("dense, k bits", "bitmask and k-bit values", "gaps", "entropy")  # of which a packed file takes the best


def whole_files(name: str, model: nn.Module) -> dict[str, Any]:
    plain, x = pqk.convert(model).eval(), torch.zeros(CASES[name][1])

    def packed(folder: Path) -> Path:
        save_packed(model, folder / "student.pqk")
        return folder / "student.pqk"

    def saved(folder: Path) -> Path:
        torch.save(plain.state_dict(), folder / "student.pt")
        return folder / "student.pt"

    def program(folder: Path) -> Path:
        export_program(model, x, folder / "student.pt2")
        return folder / "student.pt2"

    ways: dict[str, Callable[[Path], Path]] = {
        "pqk_fast": packed,
        "torch.save, fp32": saved,
        "torch.export, fp32": program,
        "ONNX, fp32": partial(write_fp32, plain, x),
        "ONNX, INT8 by onnxruntime": partial(write_int8, plain, x, False),
        "ONNX, INT4 weights": partial(write_int4, model, x),
    }
    row: dict[str, Any] = {}
    for way, write in ways.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                row[way] = {"file_bytes": write(Path(folder)).stat().st_size}
            except (*RUN_ERRORS, ImportError) as error:
                row[way] = {"error": described(error)}
    return row


def weights_alone(model: nn.Module) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "student.pqk")
        save_packed(model, path)
        sizes = formats(read_packed(path))
    row: dict[str, Any] = {"pqk_fast": {"file_bytes": sizes.pop(OURS)}}
    row |= {name: round(sizes.pop(name)) for name in YARDSTICKS}
    named = {f"pqk_fast, {name}" if name in ENCODINGS else name: size for name, size in sizes.items()}
    return row | {name: {"file_bytes": round(size)} for name, size in named.items()}


def declare(report: Report) -> None:
    for name in CASES:
        model = student(name, SPARSITY)
        weights = sum(layer.weight.numel() for layer in pqk_layers(model).values())
        report.elsewhere(f"{name}, whole file", weights, partial(whole_files, name, model))
        report.elsewhere(f"{name}, weights alone", weights, partial(weights_alone, model))


def main() -> int:
    report = Report(__doc__, "files", {"sparsity": SPARSITY, "bits": 4}, threads=1)
    declare(report)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
