"""Exact global top-k masks on the CPU: 90 % of all weights pruned.

    python bench/bench_topk_mask.py [--threads 2] [--out bench/results/topk_mask.json]

Sizes from one layer of res8-narrow to 64 M weights, and all layers of res8-narrow and res8 together. Against what finds
the threshold or the indices but makes no mask, ``torch.kthvalue``, ``torch.topk`` and ``numpy.partition`` of ``|w|``;
against what makes the mask, ``numpy.partition`` and a comparison; and against torch.compile of kthvalue and comparison.
(A mask by comparison keeps too many where magnitudes tie.) Bytes moved: 4 read and 1 written for each weight.
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
from pqk_fast.models import create_model

SPARSITY = 0.9
SIZES = {"res8-narrow layer": 3249, "64 k": 1 << 16, "1 M": 1 << 20, "10 M": 10_000_000, "64 M": 1 << 26}


def eager(weights: list[Tensor], pruned: int) -> list[Tensor]:
    """The usual way: the magnitude of the last pruned weight, and what lies above it."""
    magnitudes = [weight.abs() for weight in weights]
    magnitude = torch.cat(magnitudes) if len(magnitudes) > 1 else magnitudes[0]
    threshold = magnitude.kthvalue(pruned).values
    return [magnitude > threshold for magnitude in magnitudes]


def by_numpy(weights: list[Tensor], pruned: int) -> list[np.ndarray]:
    magnitudes = [np.abs(weight.numpy()) for weight in weights]
    flat = np.concatenate(magnitudes) if len(magnitudes) > 1 else magnitudes[0]
    threshold = np.partition(flat, pruned)[pruned]
    return [magnitude >= threshold for magnitude in magnitudes]


def candidates(sizes: list[int]) -> dict[str, Callable[[], Any]]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(size, generator=generator) for size in sizes]
    masks = [torch.empty(size, dtype=torch.bool) for size in sizes]
    total, pruned = sum(sizes), ops.masked_count(weights, SPARSITY)
    flat = torch.cat(weights)
    ours = partial(ops.topk_mask_, masks, weights, total - pruned)
    found = {
        "pqk_fast": ours,
        "eager": partial(eager, weights, pruned),
        "torch.compile": partial(torch.compile(eager), weights, pruned),
        "torch.kthvalue": lambda: flat.abs().kthvalue(pruned),
        "torch.topk": lambda: flat.abs().topk(total - pruned, sorted=False),
        "numpy.partition": lambda: np.partition(np.abs(flat.numpy()), pruned),
        "numpy.partition and mask": partial(by_numpy, weights, pruned),
    }
    ours()
    threshold = flat[torch.cat(masks)].abs().min()
    for name in ("eager", "torch.compile", "numpy.partition and mask"):
        for weight, mask, other in zip(weights, masks, found[name](), strict=True):
            agrees = (mask == torch.as_tensor(other)) | (weight.abs() == threshold)
            assert agrees.all(), f"{name} selects other weights"
    return found


def main() -> None:
    report = Report(__doc__, "topk_mask")
    cases = {name: [size] for name, size in SIZES.items()}
    for model in ("res8_narrow", "res8"):
        cases[f"{model}, all layers"] = [p.numel() for p in create_model(model, 12).parameters() if p.dim() > 1]
    for name, sizes in cases.items():
        report.case(name, sum(sizes), 5 * sum(sizes), partial(candidates, sizes))
    report.finish(sparsity=SPARSITY)


if __name__ == "__main__":
    main()
