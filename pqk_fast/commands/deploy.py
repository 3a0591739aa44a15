"""``pqk-fast export`` and ``inspect``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.markup import escape
from torch import nn

from pqk_fast.branches import pqk_layers
from pqk_fast.checkpoint import load_checkpoint
from pqk_fast.commands.options import Commands, command, console
from pqk_fast.config import Recipe, recipe_from_dict
from pqk_fast.data.speech_commands import LABELS
from pqk_fast.deploy import sizes
from pqk_fast.deploy.packed import save_packed
from pqk_fast.deploy.reader import read_packed
from pqk_fast.models import create_model
from pqk_fast.prepare import prepare

STAGES = ("phase2", "finetune", "distill", "phase1")  # the student of the first that there is


def add(commands: Commands) -> None:
    sub = command(commands, export, "export", "write a run's student as a small file")
    sub.add_argument("run", type=Path, metavar="RUN", help="run folder or checkpoint file")
    sub.add_argument("--format", choices=("packed",), default="packed", help="(default: %(default)s)")
    sub.add_argument("--out", type=Path, required=True, metavar="PATH", help="file to write")
    sub.add_argument("--stage", choices=STAGES, help="whose student (default: the last of those that ran)")
    sub.add_argument("--best", action="store_true", help="of the best epoch on validation, not the last")

    sub = command(commands, inspect, "inspect", "what is in a packed student, byte by byte")
    sub.add_argument("file", type=Path, metavar="FILE")
    sub.add_argument("--json", action="store_true", help="as JSON")
    sub.add_argument("--page", type=Path, metavar="DIR", help="also write FILE's name.md and .html into DIR")


def load_student(run: Path, stage: str | None = None, best: bool = False) -> tuple[nn.Module, Recipe, str]:
    """A run's prepared student in evaluation mode, its recipe, and the stage that it is of.

    Raises CheckpointError for no run, ValueError for a stage that is not there or has not ended.
    """
    checkpoint = load_checkpoint(run)
    recipe = recipe_from_dict(checkpoint["recipe"])
    stages = {name: saved for name, saved in checkpoint["stages"].items() if saved["prepared"]}
    ended = [name for name in STAGES if name in stages and stages[name]["finished"]]
    if stage is None and not ended:
        raise ValueError(f"{run} has no student yet: train phase1 at least to its end")
    stage = stage or ended[0]
    if stage not in ended:
        raise ValueError(f"{run} has no finished {stage}; it has {', '.join(ended) or 'none'}")
    state = stages[stage]["state"]
    if best:
        found = stages[stage]["best"].get("validation")
        if found is None:
            raise ValueError(f"no epoch of {stage} in {run} qualified as the best: leave --best out")
        state = found["state"]
    model = prepare(create_model(recipe.model, recipe.data.classes), recipe.pqk)
    model.load_state_dict(state)
    return model.eval(), recipe, stage


def export(args: argparse.Namespace) -> None:
    model, recipe, stage = load_student(args.run, args.stage, args.best)
    metadata: dict[str, Any] = {"model": recipe.model, "classes": recipe.data.classes}
    if recipe.data.name != "cifar100" and recipe.data.classes == len(LABELS):
        metadata["labels"] = list(LABELS)
    size = save_packed(model, args.out, metadata)
    weights = sum(layer.weight.numel() for layer in pqk_layers(model).values())
    console.print(escape(f"{args.out}: {size:,} bytes, the student of {stage} ({recipe.model}, {weights:,} weights)"))


def inspect(args: argparse.Namespace) -> None:
    packed = read_packed(args.file)
    if args.json:
        console.print(json.dumps(sizes.summary(packed), indent=1), markup=False)
    else:
        for table in (sizes.layers_table(packed), sizes.parts_table(packed), sizes.formats_table(packed)):
            console.print(table.rich())
    if args.page:
        paths = sizes.page_of(packed, args.file.name).write(args.page, args.file.stem)
        console.print(escape(f"written: {', '.join(map(str, paths))}"))
