"""Packing and unpacking of low-bit integers and of mask bits, on the CPU.

    python bench/bench_int4.py [--threads 2] [--out bench/results/int4.json]

Against the same in eager PyTorch, with torch.compile, and with numpy (``packbits`` for masks; torch has no operation of
its own that packs, numpy none for nibbles). Bytes moved: those of the integers (one each) and of the packed array.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from timing import Report
from torch import Tensor

from pqk_fast import ops

SIZES = {"res8-narrow layer": 3250, "64 k": 1 << 16, "1 M": 1 << 20, "16 M": 1 << 24, "64 M": 1 << 26}


def eager_pack(q: Tensor) -> Tensor:
    """Nibbles, low one first."""
    pairs = q.view(torch.uint8).view(-1, 2)
    return (pairs[:, 0] & 0xF) | (pairs[:, 1] << 4)


def eager_unpack(packed: Tensor) -> Tensor:
    low, high = (packed << 4).view(torch.int8) >> 4, packed.view(torch.int8) >> 4
    return torch.stack([low, high], dim=1).flatten()


def numpy_pack(q: np.ndarray) -> np.ndarray:
    unsigned = q.view(np.uint8)
    return (unsigned[0::2] & 0xF) | (unsigned[1::2] << 4)


def pack_int4(numel: int) -> dict[str, Callable[[], Any]]:
    q = torch.randint(-8, 8, (numel,), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    return {
        "pqk_fast": partial(ops.pack_int4, q),
        "eager": partial(eager_pack, q),
        "torch.compile": partial(torch.compile(eager_pack), q),
        "numpy": partial(numpy_pack, q.numpy()),
    }


def unpack_int4(numel: int) -> dict[str, Callable[[], Any]]:
    packed = torch.randint(0, 256, (numel // 2,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return {
        "pqk_fast": partial(ops.unpack_int4, packed, numel),
        "eager": partial(eager_unpack, packed),
        "torch.compile": partial(torch.compile(eager_unpack), packed),
    }


def pack_bits(numel: int) -> dict[str, Callable[[], Any]]:
    mask = torch.rand(numel, generator=torch.Generator().manual_seed(0)) < 0.1

    def eager_bits(values: Tensor) -> Tensor:
        packed = values[0::8].clone()
        for bit in range(1, 8):
            packed |= values[bit::8] << bit
        return packed

    whole = mask[: numel // 8 * 8].view(torch.uint8)  # whole bytes only

    return {
        "pqk_fast": partial(ops.pack_bits, mask),
        "eager": partial(eager_bits, whole),
        "torch.compile": partial(torch.compile(eager_bits), whole),
        "numpy": lambda: np.packbits(mask.numpy(), bitorder="little"),
    }


OPERATIONS = {"pack_int4": (pack_int4, 1.5), "unpack_int4": (unpack_int4, 1.5), "pack_bits": (pack_bits, 1.125)}


def checked(candidates: dict[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    """No figure for a candidate that gives other bytes."""
    truth = candidates["pqk_fast"]()
    for name, run in candidates.items():
        result = torch.as_tensor(run())
        assert torch.equal(result, truth[: len(result)]), f"{name} gives other bytes"
    return candidates


def main() -> None:
    report = Report(__doc__, "int4")
    for operation, (make, bytes_each) in OPERATIONS.items():
        for size, numel in SIZES.items():
            report.case(f"{operation}, {size}", numel, bytes_each * numel, lambda m=make, n=numel: checked(m(n)))
    report.finish()


if __name__ == "__main__":
    main()
