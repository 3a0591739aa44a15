"""Where a training step's time goes on the CPU: the profiler's operations, grouped, for phase 1 and phase 2.

    python bench/profile_step.py [--model res8_narrow] [--steps 40] [--threads 1] [--out bench/results/profile.json]

A step here is all of it: features and augmentation, forward, loss, backward, optimizer, masks. Given are each group's
ms a step (self time of its operations) and the share of the whole; "Python" is what no operation accounts for.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from whole_cell import BATCH, RECIPE, WIDTH, noise_splits

from pqk_fast.callbacks import Callback
from pqk_fast.files import replacing
from pqk_fast.models import create_model
from pqk_fast.recipe_files import load_recipe
from pqk_fast.record import environment
from pqk_fast.trainer import Trainer

WARM_UP = 6
# The first that is part of an operation's name
GROUPS = {
    "convolution": ("convolution",),
    "ReLU and pooling": ("threshold", "clamp_min", "relu", "avg_pool", "fill_"),
    "BatchNorm": ("batch_norm", "BatchNorm"),
    "fake-quantization and masks": ("fake_quant", "FakeQuant", "topk", "PrunedOnly", "teacher_weight"),
    "optimizer": ("sgd", "SGD", "_foreach"),
    "loss": ("softmax", "nll", "kl_div", "addmm", "mean", "xlogy"),
    "features": ("fft", "aten::mm", "index", "addcmul", "pow", "log", "unfold", "aten::cat", "_to_copy", "copy_"),
}


def group_of(operation: str) -> str:
    return next((group for group, parts in GROUPS.items() if any(p in operation for p in parts)), "other operations")


class Profiler(Callback):
    """Profiles all steps of a stage but the first ``WARM_UP``."""

    def on_stage_start(self, stage: str, steps: int) -> None:
        self.profile = profile(activities=[ProfilerActivity.CPU])
        self.steps = steps - WARM_UP

    def on_step(self, stage: str, step: int) -> None:
        if step == WARM_UP - 1:
            self.profile.start()
            self.start = time.perf_counter()
        elif step == WARM_UP + self.steps - 1:
            self.seconds = time.perf_counter() - self.start
            self.profile.stop()

    def table(self) -> dict[str, Any]:
        groups: Counter[str] = Counter()
        for event in self.profile.key_averages():
            groups[group_of(event.key)] += event.self_cpu_time_total / 1e6
        groups["Python"] = self.seconds - sum(groups.values())
        shares = {
            name: {"ms": round(1e3 * seconds / self.steps, 2), "share": round(seconds / self.seconds, 3)}
            for name, seconds in groups.most_common()
        }
        return {"ms": round(1e3 * self.seconds / self.steps, 2), "groups": shares}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(WIDTH), default="res8_narrow")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("bench/results/profile.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    steps = WARM_UP + args.steps
    recipe = load_recipe(
        RECIPE[args.model],
        [
            *(f"{p}.{k}={steps}" for p in ("phase1", "phase2") for k in ("steps", "epoch_steps")),
            "phase2.distill_start=0",
        ],
    )
    splits, profiler = noise_splits(8 * BATCH), Profiler()
    trainer = Trainer(create_model(recipe.model, 12), recipe, callbacks=[profiler])
    stages = {}
    for stage in ("phase1", "phase2"):
        getattr(trainer, stage)(splits.train(0))
        stages[stage] = profiler.table()
    record = {"benchmark": "profile", "model": args.model, "steps": args.steps, **environment(), "stages": stages}
    with replacing(args.out, "w") as file:
        file.write(json.dumps(record, indent=1) + "\n")
    print(json.dumps(stages, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
