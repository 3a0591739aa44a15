"""The overhead map: what each part of a training step costs beside the plain network's, ours and written by hand.

    python bench/bench_overhead.py [--device cpu] [--model resnet20] [--rounds 40] [--out bench/results/overhead.json]

Parts: "mask" (pruned weights, no quantization; for ours the Pruner and ``torch.where``, since the library has no layer
that only prunes), "fake-quant" (a mask of ones), "mask + fake-quant" (phase 1) and "phase 2" (student and full net,
two passes on the CPU). "naive" is naive.py. Each eager and, "compiled", with forward and loss under
``torch.compile(fullgraph=True)``; the optimizer (SGD with momentum) is the same for all and eager. ``--without
torch.compile`` leaves the compiled ones out.

All candidates take turns in one process, so that a busy machine slows them alike; given are medians with the quartiles,
and ratios to the plain eager step; "of_compiled" is a compiled step's ratio to the plain compiled one. Steps make new
masks every 32 steps, so the median is a step without; "new masks" is what making them takes, of which a step bears a
32nd. Data is noise, since time does not depend on what it shows.

On a GPU each also "captured" as one CUDA graph (without new masks), and phase 2 also stacked.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import naive
import torch
import torch.nn.functional as F
from bench_step import LR, NEVER, Step, training_step
from report import Report, settings_of_products
from timing import Workload
from torch import Tensor, nn

import pqk_fast as pqk
from pqk_fast import ops
from pqk_fast.branches import pqk_layers
from pqk_fast.models import create_model

# name: classes, batch, shape of a sample
MODELS = {
    "res8_narrow": (12, 64, (101, 40)),
    "res8": (12, 64, (101, 40)),
    "resnet20": (10, 128, (3, 32, 32)),
    "resnet32": (100, 128, (3, 32, 32)),
}
INTERVAL = 32
Objective = Callable[[Tensor, Tensor], Tensor]


class CrossEntropy(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x), y)


class MutualDistillation(nn.Module):
    def __init__(self, model: nn.Module, mode: str) -> None:
        super().__init__()
        self.model, self.mode = model, mode
        self.loss = pqk.MutualDistillationLoss()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = self.loss(*pqk.dual_forward(self.model, x, self.mode), y)
        return loss


def only_masked(layer: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Instead of a PQK layer's ``student_weight``."""
    return torch.where(layer.weight_mask, layer.weight, 0.0)


def compiled(objective: nn.Module) -> Objective:
    """Compiled whole. A code object of its own: all candidates' graphs would count as recompiles of one otherwise."""
    own: Any = type(objective).forward
    own = FunctionType(own.__code__.replace(), own.__globals__, own.__name__, own.__defaults__, own.__closure__)
    objective.forward = MethodType(own, objective)  # type: ignore[method-assign]
    return torch.compile(objective, fullgraph=True)


class Steps:
    """Makes, of one plain network, the steps that are compared; each has a network of its own."""

    def __init__(self, plain: nn.Module, x: Tensor, y: Tensor, interval: int = INTERVAL) -> None:
        self.plain, self.x, self.y, self.interval = plain, x, y, interval

    def network(self) -> nn.Module:
        return copy.deepcopy(self.plain).to(self.x.device)

    def step(self, objective: nn.Module, compile_: bool, after: Step = lambda: None) -> Step:
        call = compiled(objective) if compile_ else objective
        return training_step(objective.model, lambda _: call(self.x, self.y), after)  # type: ignore[arg-type]

    def ours(self, masked: bool, quantized: bool, compile_: bool) -> Step:
        config = pqk.PQKConfig(initial_sparsity=0.9, sparsity=0.9, mask_interval=self.interval)
        model = pqk.prepare(self.network(), config)
        after = pqk.Pruner(model, steps=NEVER, epoch_steps=347).step if masked else lambda: None
        if not quantized:
            for layer in pqk_layers(model).values():
                layer.student_weight = MethodType(only_masked, layer)  # type: ignore[method-assign]
        return self.step(CrossEntropy(model), compile_, after)

    def ours_phase2(self, mode: str, compile_: bool) -> Step:
        model = pqk.prepare(self.network(), pqk.PQKConfig(mask_interval=1))
        pqk.Pruner(model, 1, 1)
        pqk.start_phase2(model)
        return self.step(MutualDistillation(model, mode).to(self.x.device), compile_)

    def naive(self, masked: bool, quantized: bool, compile_: bool) -> Step:
        model = self.network()
        layers = naive.compress(model, masked, quantized)
        count = 0

        def prune() -> None:
            nonlocal count
            count += 1
            if count % self.interval == 0:
                naive.make_masks(layers)

        if masked:
            naive.make_masks(layers)
        return self.step(CrossEntropy(model), compile_, prune if masked else lambda: None)

    def naive_phase2(self, compile_: bool) -> Step:
        model = self.network()
        layers = naive.compress(model)
        naive.make_masks(layers)
        naive.start_phase2(model, layers)
        return self.step(naive.MutualDistillation(model.to(self.x.device)), compile_)

    def masks(self) -> Step:
        weights = [p.detach().to(self.x.device) for p in self.plain.parameters() if p.dim() > 1]
        masks = [torch.ones_like(weight, dtype=torch.bool) for weight in weights]
        keep = sum(weight.numel() for weight in weights) - ops.masked_count(weights, 0.9)
        return partial(ops.topk_mask_, masks, weights, torch.tensor(keep, device=self.x.device))

    def naive_masks(self) -> Step:
        return partial(naive.make_masks, naive.compress(self.network()))

    def every(self, modes: tuple[str, ...]) -> dict[str, Callable[[bool], Step]]:
        parts = {"mask": (True, False), "fake-quant": (False, True), "mask + fake-quant": (True, True)}
        made: dict[str, Callable[[bool], Step]] = {"plain": lambda c: self.step(CrossEntropy(self.network()), c)}
        for part, which in parts.items():
            made[f"{part}, ours"] = partial(self.ours, *which)
            made[f"{part}, naive"] = partial(self.naive, *which)
        for mode in modes:
            made["phase 2, ours" + (f", {mode}" if len(modes) > 1 else "")] = partial(self.ours_phase2, mode)
        return made | {"phase 2, naive": self.naive_phase2}


def workload(name: str, size: int, device: str, cases_of: str, compile_until: float | None) -> Workload:
    """Nothing is compiled after ``compile_until`` (of ``time.perf_counter``; None: nothing at all)."""
    torch.manual_seed(0)
    classes, _, shape = MODELS[name]
    plain = create_model(name, classes)
    x, y = torch.randn(size, *shape, device=device), torch.randint(classes, (size,), device=device)

    def build(make: Callable[[bool], Step], compile_: bool) -> Step:
        if compile_ and compile_until is not None and time.perf_counter() > compile_until:
            raise RuntimeError("not compiled for want of time")
        return make(compile_)

    steps = Steps(plain, x, y)
    modes = ("two_pass",) if cases_of == "cpu" else ("two_pass", "stacked")
    ways = {"": False} if compile_until is None else {"": False, ", compiled": True}
    candidates: dict[str, Any] = {}
    for way, compile_ in ways.items():
        for what, make in steps.every(modes).items():
            candidates[what + way] = partial(build, make, compile_)
    candidates |= {"new masks, ours": steps.masks, "new masks, naive": steps.naive_masks}
    uncaptured = list(candidates)
    if cases_of == "cuda":
        for way, compile_ in ways.items():
            for what, make in Steps(plain, x, y, NEVER).every(modes).items():
                candidates[f"{what}{way}, captured"] = partial(build, make, compile_)
    return Workload(candidates, lambda seed: (), uncaptured=uncaptured, reference="plain", rotate=False)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", action="append", choices=MODELS, help="repeatable; default: res8 and resnet20")
    parser.add_argument("--rounds", type=int, default=40)


def main() -> int:
    sizes = {name: batch for name, (_, batch, _) in MODELS.items()}
    settings = {"batch": sizes, "lr": LR, **settings_of_products()}
    report = Report(__doc__, "overhead", settings, seconds=0.0, threads=1, add_options=add_options)
    report.fewest_rounds = report.timer.fewest = report.options.rounds
    start, budget = time.perf_counter(), report.options.budget
    until = None if "torch.compile" in report.options.without else start + budget / 2
    for model in report.options.model or ["res8", "resnet20"]:
        weights = sum(p.numel() for p in create_model(model, MODELS[model][0]).parameters())
        size = report.size(sizes[model], 2)
        report.case(model, weights, 0, partial(workload, model, size, report.device, report.cases_of, until))
        row = report.cases[model]
        base = row.get("plain, compiled", {}).get("median_ms")
        for candidate, cell in row.items():
            if base and candidate.endswith(", compiled") and "median_ms" in cell:
                cell["of_compiled"] = round(cell["median_ms"] / base, 3)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
