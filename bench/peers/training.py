"""Accuracy at equal budget: every candidate trains the same network on the same batches, for as many steps.

Two stages with the recipe's steps, batches, learning rates and weight decay. Masks grow in the first, every 32 steps by
the recipe's schedule, and stay in the second. "after": the first stage trains in fp32, the second with 4 bits, as the
peers' documentations have it (prune, finetune, then quantize and finetune). "with": 4 bits from the beginning. PQK's
own two stages are its phase 1, and its phase 2 or finetuning: by the library's trainer, of the same recipe.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peer import Peer, used_weights
from torch import Tensor, nn
from whole_cell import WIDTH, PlainRes8
from work import exported_bytes, groups

from pqk_fast.callbacks import Callback, Row
from pqk_fast.config import PhaseConfig, Recipe
from pqk_fast.data.load import Splits, load_splits
from pqk_fast.experiments.run import run_recipe
from pqk_fast.recipe_files import load_recipe
from pqk_fast.schedule import learning_rate, sparsity_of_mask
from pqk_fast.training.metrics import accuracy

RECIPE = "kws-res8-narrow-plus-w4-p90"
ORDERS = ("after", "with")
OWN = {"phase 2": "phase2", "finetune": "finetune"}  # PQK's second stages
RESULTS = {"phase 2": "phase2_p", "finetune": "finetune"}
COUNTS = ("lr_warmup", "average_steps", "distill_start", "teacher_rest", "teacher_average")  # settings that are steps
Tell = Callable[[str], None]


def shortened(phase: PhaseConfig, share: float) -> PhaseConfig:
    """The same schedule in a share of the steps."""
    if share == 1:
        return phase
    steps = max(1, round(phase.steps * share))
    drops = tuple(round(drop * share) for drop in phase.lr_drops)
    counts = {name: round(getattr(phase, name) * share) for name in COUNTS if hasattr(phase, name)}
    return replace(phase, steps=steps, epoch_steps=max(10, round(phase.epoch_steps * share)), lr_drops=drops, **counts)


def recipe_of(name: str, steps: int, seed: int) -> Recipe:
    """The recipe, its first stage in ``steps`` (0: as it is) and the second in proportion."""
    recipe = load_recipe(name, ["data.unknown=1.0"])
    share = steps / recipe.phase1.steps if steps else 1.0
    stages = {"phase1": shortened(recipe.phase1, share), "phase2": shortened(recipe.phase2, share)}
    return replace(recipe, seed=seed, **stages)


def endless(batches: Any) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from batches


class Training:
    """One candidate's; :meth:`run` gives what goes into the record."""

    def __init__(self, peer: Peer, recipe: Recipe, splits: Splits, order: str, tell: Tell) -> None:
        self.peer, self.recipe, self.splits, self.order, self.tell = peer, recipe, splits, order, tell
        torch.manual_seed(recipe.seed)
        self.x = next(iter(splits.train(2 * recipe.seed)))[0][:1]  # for libraries that trace
        self.model: nn.Module = peer.add_masks(PlainRes8(WIDTH[recipe.model], recipe.data.classes), self.x)
        if order == "with":
            self.model = peer.quantize(self.model, self.x)
        self.best: dict[str, Any] | None = None

    def run(self) -> dict[str, Any]:
        start = time.perf_counter()
        self._stage("prune", self.recipe.phase1, 2 * self.recipe.seed)
        if self.order == "after":
            self.model = self.peer.quantize(self.model, self.x)
        self._stage("finetune", self.recipe.phase2, 2 * self.recipe.seed + 1)
        used = used_weights(self.model, self.x)
        last = {split: self._accuracy(split) for split in ("validation", "testing")}
        seconds = round(time.perf_counter() - start, 1)
        result = {"last": last, "best_dev": self.best, "used": used, "seconds": seconds}
        try:
            result["file_bytes"] = exported_bytes(self.peer, self.model, self.x)
        except Exception as error:  # whatever a library may raise: its accuracy counts all the same
            result["file_error"] = f"{type(error).__name__}: {str(error)[:300]}"
        return result

    def _stage(self, name: str, phase: PhaseConfig, seed: int) -> None:
        peer, pqk = self.peer, self.recipe.pqk
        prunes = name == "prune"
        model = self.model.train()
        made = groups(peer, model, phase.lr, phase.weight_decay, phase.step_lr_scale)
        optimizer = torch.optim.SGD(made, lr=phase.lr, momentum=phase.momentum)
        objective = peer.objective(model)
        batches = endless(self.splits.train(seed))
        for step in range(phase.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, phase) * group["lr_scale"]
            sparsity = sparsity_of_mask(
                step,
                steps=phase.steps,
                epoch_steps=phase.epoch_steps,
                interval=pqk.mask_interval,
                target=pqk.sparsity,
                initial=pqk.initial_sparsity,
                mask_end=pqk.mask_end,
            )
            if prunes and sparsity is not None:
                peer.set_sparsity(model, sparsity)
            x, y = next(batches)
            optimizer.zero_grad()
            loss = objective(x, y)
            loss.backward()
            optimizer.step()
            if not math.isfinite(loss.item()):
                raise RuntimeError(f"the loss is {loss.item()} at step {step} of {name}")
            if (step + 1) % phase.epoch_steps == 0 or step + 1 == phase.steps:
                self._end_pass(name, step + 1, phase.steps, loss.item(), prunes)
                model.train()

    def _end_pass(self, name: str, done: int, steps: int, loss: float, prunes: bool) -> None:
        validation = self._accuracy("validation")
        self.tell(f"{name} {done} of {steps}: loss {loss:.3f}, validation {validation:.2f} %")
        if not prunes and (self.best is None or validation > self.best["validation"]):
            self.best = {"validation": validation, "testing": self._accuracy("testing"), "step": done}

    def _accuracy(self, split: str) -> float:
        return accuracy(self.model, getattr(self.splits, split))


def by_the_recipe(recipe: Recipe, splits: Splits, order: str, tell: Tell) -> dict[str, Any]:
    """PQK: phase 1 and a second stage by the library's trainer; the accuracy is the pruned student's."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        recipe = replace(recipe, stages=("phase1", OWN[order]))
        record = run_recipe(recipe, splits, folder, callbacks=[Telling(tell)])
    result = record["results"][RESULTS[order]]
    return {key: result[key] for key in ("last", "best_dev")} | {"seconds": round(time.perf_counter() - start, 1)}


class Telling(Callback):
    def __init__(self, tell: Tell) -> None:
        self.tell = tell

    def on_epoch(self, stage: str, row: Row) -> None:
        self.tell(f"{stage} {row['step']}: loss {row['loss']:.3f}, validation {row['validation']:.2f} %")


def train(peer: Peer, data: Path, name: str, steps: int, seed: int, order: str, tell: Tell) -> dict[str, Any]:
    """``name``: of the recipe; an ``order`` of ``OWN`` is PQK itself."""
    recipe = recipe_of(name, steps, seed)
    splits = load_splits(recipe, data)
    if order in OWN:
        result = by_the_recipe(recipe, splits, order, tell)
    else:
        result = Training(peer, recipe, splits, order, tell).run()
    return {**result, "data": {**splits.sizes, "fingerprint": splits.fingerprint}}
