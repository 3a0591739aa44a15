"""Packing and unpacking of low-bit integers and of mask bits.

    python bench/bench_int4.py [--device cpu] [--threads 2] [--out bench/results/int4.json]

Against the same in eager PyTorch, with torch.compile, and on the CPU with numpy (``packbits`` for masks; torch has no
operation of its own that packs, numpy none for nibbles). Bytes moved: those of the integers (one each) and of the
packed array.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from report import Report
from timing import Bind, Workload, called
from torch import Tensor

from pqk_fast import ops

SIZES = {
    "cpu": {"res8-narrow layer": 3250, "64 k": 1 << 16, "1 M": 1 << 20, "16 M": 1 << 24, "64 M": 1 << 26},
    "cuda": {"64 M": 1 << 26, "1 M": 1 << 20},
}


def eager_pack(q: Tensor) -> Tensor:
    """Nibbles, low one first."""
    pairs = q.view(torch.uint8).view(-1, 2)
    return (pairs[:, 0] & 0xF) | (pairs[:, 1] << 4)


def eager_unpack(packed: Tensor) -> Tensor:
    low, high = (packed << 4).view(torch.int8) >> 4, packed.view(torch.int8) >> 4
    return torch.stack([low, high], dim=1).flatten()


def whole_bytes(mask: Tensor) -> Tensor:
    return mask[: mask.numel() // 8 * 8].view(torch.uint8)


def eager_bits(values: Tensor) -> Tensor:
    packed = values[0::8].clone()
    for bit in range(1, 8):
        packed |= values[bit::8] << bit
    return packed


def eager_mask(packed: Tensor) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & 1).bool().flatten()


def numpy_pack(q: np.ndarray) -> np.ndarray:
    unsigned = q.view(np.uint8)
    return (unsigned[0::2] & 0xF) | (unsigned[1::2] << 4)


def integers(low: int, high: int, numel: int, dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randint(low, high, (numel,), dtype=dtype, generator=generator, device=device),)


def flags(numel: int, device: str, seed: int) -> tuple[Tensor]:
    return (torch.rand(numel, generator=torch.Generator(device).manual_seed(seed), device=device) < 0.1,)


def check(result: Any, truth: Tensor, inputs: tuple[Any, ...]) -> str | None:
    same = torch.equal(torch.as_tensor(result), truth[: len(result)])
    return None if same else "gives other bytes"


def workload(
    ours: Callable[[Tensor], Tensor],
    eager: Callable[[Tensor], Tensor],
    inputs: Callable[[int], tuple[Tensor]],
    by_numpy: Callable[[Tensor], Any] | None,
) -> Workload:
    candidates = {"pqk_fast": ours, "eager": eager, "torch.compile": torch.compile(eager)}
    if by_numpy:
        candidates["numpy"] = by_numpy
    return Workload({name: called(function) for name, function in candidates.items()}, inputs, check)


def pack_int4(numel: int, device: str) -> Workload:
    inputs = partial(integers, -8, 8, numel, torch.int8, device)
    by_numpy = (lambda q: numpy_pack(q.numpy())) if device == "cpu" else None
    return workload(ops.pack_int4, eager_pack, inputs, by_numpy)


def unpack_int4(numel: int, device: str) -> Workload:
    inputs = partial(integers, 0, 256, numel // 2, torch.uint8, device)
    return workload(lambda packed: ops.unpack_int4(packed, numel), eager_unpack, inputs, None)


def pack_bits(numel: int, device: str) -> Workload:
    compiled = torch.compile(eager_bits)
    candidates: dict[str, Bind] = {
        "pqk_fast": called(ops.pack_bits),
        "eager": lambda mask: partial(eager_bits, whole_bytes(mask)),
        "torch.compile": lambda mask: partial(compiled, whole_bytes(mask)),
    }
    if device == "cpu":
        candidates["numpy"] = called(lambda mask: np.packbits(mask.numpy(), bitorder="little"))
    return Workload(candidates, partial(flags, numel, device), check)


def unpack_bits(numel: int, device: str) -> Workload:
    inputs = partial(integers, 0, 256, numel // 8, torch.uint8, device)
    return workload(lambda packed: ops.unpack_bits(packed, packed.numel() * 8), eager_mask, inputs, None)


OPERATIONS = {"pack_int4": (pack_int4, 1.5), "unpack_int4": (unpack_int4, 1.5), "pack_bits": (pack_bits, 1.125)}
ON_GPU = {**OPERATIONS, "unpack_bits": (unpack_bits, 1.125)}


def declare(report: Report) -> None:
    for operation, (make, bytes_each) in (OPERATIONS if report.cases_of == "cpu" else ON_GPU).items():
        for name, full in SIZES[report.cases_of].items():
            numel = report.size(full) // 2 * 2
            report.case(f"{operation}, {name}", numel, bytes_each * numel, partial(make, numel, report.device))


def main() -> int:
    report = Report(__doc__, "int4")
    declare(report)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
