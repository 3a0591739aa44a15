"""Time of one whole cell of the paper's tables (phase 1, phase 2, finetuning): ours against a plain PyTorch script.

    python bench/whole_cell.py [--model res8_narrow] [--steps 150] [--rounds 5] [--out bench/results/cell.json]

"plain" is the script that one writes by hand: the network as the paper draws it, naive.py's masks and quantizer,
augmentation clip by clip and torchaudio's features, torch's memory allocation as it is. "ours" is
``Trainer``, with everything that it does besides: curves, checks, checkpoints. Each stage runs for ``--steps`` steps
and one evaluation of 685 clips, in a process of its own, ours and plain in turn; its time a step, evaluation included,
makes the whole by the recipe's steps. Clips are noise: time does not depend on what is said.

The record has, for each: ms a step of each stage (median and quartiles over the rounds), minutes of the whole cell, and
the ratio of the wholes, round by round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import naive
import torch
import torch.nn.functional as F
from bench_step import plain_features
from torch import Tensor, nn

from pqk_fast.data.load import Splits, speech_splits
from pqk_fast.data.speech_commands import CLIP_SAMPLES, Noise, SpeechCommands, SpeechSet
from pqk_fast.files import replacing
from pqk_fast.models import create_model
from pqk_fast.recipe_files import load_recipe
from pqk_fast.record import environment
from pqk_fast.trainer import Trainer

WIDTH = {"res8_narrow": 19, "res8": 45}
RECIPE = {"res8_narrow": "kws-res8-narrow-w4-p90", "res8": "kws-res8-w4-p90"}
VALIDATION = 685
STAGES = ("phase1", "phase2", "finetune")
BATCH = 64


class PlainRes8(nn.Module):
    """As the paper's sources draw it (Tang and Lin, 2018)."""

    def __init__(self, width: int, classes: int = 12) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(6))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width, affine=False) for _ in range(6))
        self.output = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = old = F.avg_pool2d(F.relu(self.conv0(x.unsqueeze(1))), (4, 3))
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True), 1):
            x = F.relu(conv(x))
            if i % 2 == 0:
                x = old = x + old
            x = norm(x)
        return self.output(x.mean((2, 3)))


def clips(count: int, seed: int) -> SpeechSet:
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randint(-8000, 8000, (count, CLIP_SAMPLES), dtype=torch.int16, generator=generator)
    return SpeechSet(samples, torch.randint(1, 12, (count,), generator=generator), ["noise"] * count)


def plain(model_name: str, steps: int) -> dict[str, float]:
    """Seconds a step of each stage."""
    words, heard = clips(8 * BATCH, 0), clips(VALIDATION, 1)
    noise = torch.randint(-8000, 8000, (20 * CLIP_SAMPLES,), dtype=torch.int16)
    make, evaluate = plain_features(words.clips, noise, BATCH), plain_features(heard.clips, noise, VALIDATION)
    seen = evaluate()  # the features of evaluation are made once
    model = PlainRes8(WIDTH[model_name])
    layers = naive.compress(model)

    def train(objective: Callable[[Tensor, Tensor], Tensor], interval: int = 0) -> float:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-5)
        start = time.perf_counter()
        for step in range(steps):
            if interval and step % interval == 0:
                naive.make_masks(layers)
            loss = objective(make(), words.labels[:BATCH])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            for part in seen.split(BATCH):
                model(part)
        model.train()
        return (time.perf_counter() - start) / steps

    def cross_entropy(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    times = {"phase1": train(cross_entropy, 32), "finetune": train(cross_entropy)}
    naive.start_phase2(model, layers)
    times["phase2"] = train(naive.MutualDistillation(model))
    return times


def noise_splits(examples: int) -> Splits:
    """So many training clips, and as many others as the speech set of the README has for validation."""
    noise = Noise(torch.randint(-8000, 8000, (20 * CLIP_SAMPLES,), dtype=torch.int16), [0, 20 * CLIP_SAMPLES])
    return speech_splits(SpeechCommands(clips(examples, 0), clips(VALIDATION, 1), clips(BATCH, 2), noise), BATCH)


def ours(model_name: str, steps: int) -> dict[str, float]:
    """The same by the trainer, as the command line calls it."""
    recipe = load_recipe(
        RECIPE[model_name],
        [
            *(f"{phase}.{length}={steps}" for phase in ("phase1", "phase2") for length in ("steps", "epoch_steps")),
            "phase2.distill_start=0",
        ],
    )
    splits = noise_splits(8 * BATCH)
    assert splits.validation is not None
    list(splits.validation)  # as above
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(create_model(recipe.model, 12), recipe, out=out)
        trainer.phase1(splits.train(0), splits.validation)
        for stage in ("finetune", "phase2"):
            getattr(trainer.copy(), stage)(splits.train(1), splits.validation)
    return {stage: result.seconds / steps for stage, result in trainer.results.items()}


def summary(values: list[float], digits: int = 2) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(middle, digits), "low": round(low, digits), "high": round(high, digits)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(WIDTH), default="res8_narrow")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("bench/results/cell.json"))
    parser.add_argument("--only", choices=("plain", "ours"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        torch.set_num_threads(args.threads)
        torch.manual_seed(0)
        print(json.dumps((plain if args.only == "plain" else ours)(args.model, args.steps)))
        return 0
    recipe = load_recipe(RECIPE[args.model])
    steps = {"phase1": recipe.phase1.steps, "phase2": recipe.phase2.steps, "finetune": recipe.phase2.steps}
    measured: dict[str, list[dict[str, float]]] = {"plain": [], "ours": []}
    for number in range(args.rounds):
        for who in sorted(measured, reverse=number % 2 == 1):
            command = [sys.executable, __file__, "--only", who, "--model", args.model, "--steps", str(args.steps)]
            child = subprocess.run(
                [*command, "--threads", str(args.threads)],
                env={**os.environ, "OMP_NUM_THREADS": str(args.threads)},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            measured[who].append(json.loads(child.stdout.splitlines()[-1]))
            print(
                f"round {number + 1} {who:5}",
                {k: f"{1e3 * v:.1f} ms" for k, v in measured[who][-1].items()},
                flush=True,
            )
    wholes = {who: [sum(steps[s] * one[s] for s in STAGES) / 60 for one in rounds] for who, rounds in measured.items()}
    record: dict[str, Any] = {
        "benchmark": "cell",
        "model": args.model,
        "steps": steps,
        "measured_steps": args.steps,
        "rounds": args.rounds,
        "threads": args.threads,
        **environment(),
        "ms_a_step": {
            who: {stage: summary([1e3 * one[stage] for one in rounds]) for stage in STAGES}
            for who, rounds in measured.items()
        },
        "minutes": {who: summary(values) for who, values in wholes.items()},
        "ratio": summary([a / b for a, b in zip(wholes["ours"], wholes["plain"], strict=True)], 3),
    }
    record["hardware"]["threads"] = args.threads
    with replacing(args.out, "w") as file:
        file.write(json.dumps(record, indent=1) + "\n")
    print(json.dumps({key: record[key] for key in ("ms_a_step", "minutes", "ratio")}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
