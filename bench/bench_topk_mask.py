"""Exact global top-k masks: 90 % of all weights pruned.

    python bench/bench_topk_mask.py [--device cpu] [--threads 2] [--out bench/results/topk_mask.json]

Sizes from one layer of res8-narrow to 64 M weights (on a GPU 1 M to 100 M), and all layers of networks together.
Against what finds the threshold or the indices but makes no mask, ``torch.kthvalue``, ``torch.topk`` and
``numpy.partition`` of ``|w|``; against what makes the mask, too: kthvalue, or ``numpy.partition``, and a comparison
(which keeps too many where magnitudes tie), or the indices that ``torch.topk`` gives, scattered; and against
torch.compile of the eager way. On a GPU the eager way is topk and scatter, and k is a tensor there. Bytes moved: 4 read
and 1 written for each weight.
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
from pqk_fast.models import create_model

SPARSITY = 0.9
SIZES = {
    "cpu": {"res8-narrow layer": 3249, "64 k": 1 << 16, "1 M": 1 << 20, "10 M": 10_000_000, "64 M": 1 << 26},
    "cuda": {"100 M": 100_000_000, "10 M": 10_000_000, "1 M": 1_000_000},
}
MODELS = {"cpu": {"res8_narrow": 12, "res8": 12}, "cuda": {"res8_narrow": 12, "res8": 12, "resnet32": 100}}
TARGETS = {"100 M": {"torch.topk": 5.0}}


def flat_magnitudes(weights: list[Tensor]) -> Tensor:
    magnitudes = [weight.abs().flatten() for weight in weights]
    return torch.cat(magnitudes) if len(magnitudes) > 1 else magnitudes[0]


def by_kthvalue(weights: list[Tensor], pruned: int) -> list[Tensor]:
    """The usual way: the magnitude of the last pruned weight, and what lies above it."""
    threshold = flat_magnitudes(weights).kthvalue(pruned).values
    return [weight.abs() > threshold for weight in weights]


def by_topk(weights: list[Tensor], kept: int) -> list[Tensor]:
    """The usual way on a GPU: the places of the largest, and ones there."""
    magnitude = flat_magnitudes(weights)
    chosen = magnitude.topk(kept, sorted=False).indices
    mask = torch.zeros_like(magnitude, dtype=torch.bool).scatter_(0, chosen, True)
    return list(mask.split([weight.numel() for weight in weights]))


def by_numpy(weights: list[Tensor], pruned: int) -> list[np.ndarray]:
    magnitudes = [np.abs(weight.numpy()) for weight in weights]
    flat = np.concatenate(magnitudes) if len(magnitudes) > 1 else magnitudes[0]
    threshold = np.partition(flat, pruned)[pruned]
    return [magnitude >= threshold for magnitude in magnitudes]


def inputs(sizes: list[int], device: str, seed: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Weights, the masks that ours writes, and all weights in one tensor."""
    generator = torch.Generator(device).manual_seed(seed)
    weights = [torch.randn(size, generator=generator, device=device) for size in sizes]
    masks = [torch.empty(size, dtype=torch.bool, device=device) for size in sizes]
    return weights, masks, torch.cat(weights)


def check(result: list[Any], truth: list[Tensor], sets: tuple[Any, ...]) -> str | None:
    weights, _, flat = sets
    threshold = flat[torch.cat(truth)].abs().min()
    for weight, mask, other in zip(weights, truth, result, strict=True):
        if not ((mask == torch.as_tensor(other)) | (weight.abs() == threshold)).all():
            return "selects other weights"
    return None


def workload(sizes: list[int], device: str, eager: str) -> Workload:
    """``eager``: which device's usual way to compare with."""
    total = sum(sizes)
    pruned = ops.masked_count([torch.empty(size, device="meta") for size in sizes], SPARSITY)
    kept = total - pruned
    k = torch.tensor(kept, device=device)

    def ours(weights: list[Tensor], masks: list[Tensor], flat: Tensor) -> Callable[[], list[Tensor]]:
        def call() -> list[Tensor]:
            ops.topk_mask_(masks, weights, k)
            return masks

        return call

    def of_weights(function: Callable[..., Any], count: int) -> Bind:
        return lambda weights, masks, flat: partial(function, weights, count)

    candidates: dict[str, Bind] = {"pqk_fast": ours}
    if eager == "cpu":
        candidates["eager"] = of_weights(by_kthvalue, pruned)
        candidates["torch.compile"] = of_weights(torch.compile(by_kthvalue), pruned)
    else:
        candidates["eager"] = of_weights(by_topk, kept)
        candidates["torch.compile"] = of_weights(torch.compile(by_topk), kept)
    candidates["torch.topk"] = called(lambda weights, masks, flat: flat.abs().topk(kept, sorted=False))
    candidates["torch.kthvalue"] = called(lambda weights, masks, flat: flat.abs().kthvalue(pruned))
    if device == "cpu":
        partition = called(lambda weights, masks, flat: np.partition(np.abs(flat.numpy()), pruned))
        candidates["numpy.partition"] = partition
        candidates["numpy.partition and mask"] = of_weights(by_numpy, pruned)
    thresholds = ("torch.topk", "torch.kthvalue", "numpy.partition")
    return Workload(candidates, partial(inputs, sizes, device), check, unchecked=thresholds)


def declare(report: Report) -> None:
    cases = {name: [report.size(size, 2)] for name, size in SIZES[report.cases_of].items()}
    for model, classes in MODELS[report.cases_of].items():
        cases[f"{model}, all layers"] = [p.numel() for p in create_model(model, classes).parameters() if p.dim() > 1]
    for name, sizes in cases.items():
        make = partial(workload, sizes, report.device, report.cases_of)
        report.case(name, sum(sizes), 5 * sum(sizes), make, targets=TARGETS.get(name))


def main() -> int:
    report = Report(__doc__, "topk_mask", {"sparsity": SPARSITY})
    declare(report)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
