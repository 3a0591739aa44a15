"""``pqk-fast demo``, ``train`` and ``eval``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from pqk_fast import report
from pqk_fast.allocator import recycle_large_tensors
from pqk_fast.branches import branch
from pqk_fast.callbacks import Callback, ProgressDisplay
from pqk_fast.checkpoint import Checkpoints, load_checkpoint
from pqk_fast.commands.options import (
    Commands,
    add_device,
    add_settings,
    add_step_options,
    command,
    console,
    step_options,
)
from pqk_fast.config import Recipe, recipe_from_dict
from pqk_fast.data.load import Batches, Splits, load_splits, make_words, speech_splits, word_folder_batches
from pqk_fast.data.spoken_words import write_spoken_words
from pqk_fast.experiments.run import RESULT_NAMES, check_run, run_recipe
from pqk_fast.models import create_model
from pqk_fast.prepare import prepare
from pqk_fast.recipe_files import load_recipe
from pqk_fast.record import read_record
from pqk_fast.settings import to_dict
from pqk_fast.tensorboard import TensorBoardCallback
from pqk_fast.training.metrics import accuracy
from pqk_fast.training.ranks import Ranks, join, leave
from pqk_fast.training.run_state import first_difference


def add(commands: Commands) -> None:
    sub = command(commands, demo, "demo", "make spoken words on the spot and train the paper's four networks on them")
    sub.add_argument("--out", type=Path, default=Path("runs/demo"), help="run folder (default: %(default)s)")
    sub.add_argument("--keep-data", type=Path, metavar="DIR", help="also write the words as WAV files, to listen to")
    add_settings(sub)
    add_device(sub)

    sub = command(commands, train, "train", "train a recipe, stage by stage, with a record of it all")
    sub.add_argument("--recipe", help="a name from `pqk-fast recipes`, or a TOML file")
    sub.add_argument("--data", type=Path, metavar="DIR", help="folder of the data set")
    sub.add_argument("--out", type=Path, metavar="RUN", help="run folder to write (default: runs/RECIPE)")
    sub.add_argument("--download", action="store_true", help="fetch the official data set into DIR first")
    sub.add_argument("--resume", action="store_true", help="go on with the run in RUN from its newest checkpoint")
    sub.add_argument(
        "--keep-checkpoints", type=int, default=3, metavar="N", help="newest checkpoints to keep (default: %(default)s)"
    )
    add_step_options(sub)
    sub.add_argument("--sync-batch-norm", action="store_true", help="many GPUs: batch statistics over all of them")
    sub.add_argument("--tensorboard", action="store_true", help="also write scalars for TensorBoard into RUN")
    add_settings(sub)
    add_device(sub)

    sub = command(commands, evaluate, "eval", "accuracy of a finished run's networks on a data set")
    sub.add_argument("run", type=Path, metavar="RUN", help="run folder or checkpoint file")
    sub.add_argument("--data", type=Path, metavar="DIR", help="folder of the data set")
    sub.add_argument(
        "--split",
        choices=("validation", "testing", "all"),
        default="testing",
        help="all: every clip under the word folders, also without list files (default: %(default)s)",
    )
    add_device(sub)


def _run(recipe: Recipe, splits: Splits, out: Path, device: str, **options: Any) -> None:
    """Train, then show the table and say where everything is."""
    ranks = Ranks()
    callbacks: list[Callback] = [ProgressDisplay(console)]
    if options.pop("tensorboard", False):
        callbacks.append(TensorBoardCallback(out / "tensorboard"))
    if not ranks.main:
        run_recipe(recipe, splits, out, device, (), **options)
        return
    sizes = ", ".join(f"{count} {split}" for split, count in splits.sizes.items())
    console.print(f"[bold]{recipe.name}[/]: {recipe.model} on {recipe.data.name} ({sizes}), device {device}")
    if ranks.world > 1:
        console.print(
            f"{ranks.world} ranks, each with {recipe.data.batch_size // ranks.world} of a batch's "
            f"{recipe.data.batch_size}"
        )
    if device == "cpu" and options.get("recycle_memory", True) and recycle_large_tensors():
        console.print("malloc keeps large tensors' memory for the next (--no-recycle leaves it alone)")
    record = run_recipe(recipe, splits, out, device, callbacks, **options)
    console.print(report.results_table(record))
    if "layers" in record:
        console.print(report.layers_table(record))
    written = ["record.json", "checkpoints"]
    try:
        report.plot_curves(record, out / "curves.png")
        written.append("curves.png")
    except (ImportError, ValueError) as error:
        console.print(escape(f"no picture of the curves: {error}"))
    console.print(escape(f"{out}: {', '.join(written)}"))


def _seconds_since(start: float) -> str:
    return f"{time.perf_counter() - start:.1f} s"


def demo(args: argparse.Namespace) -> None:
    recipe = load_recipe("demo", args.set)
    _clear_old_demo(recipe, args.out)
    check_run(recipe, args.out)
    start = time.perf_counter()
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("synthesizing spoken words")
        data = make_words(recipe, lambda done, total: bar.update(task, completed=done, total=total))
    console.print(f"spoken words made in {_seconds_since(start)}")
    if args.keep_data:
        write_spoken_words(data, args.keep_data)
        console.print(escape(f"written to {args.keep_data}"))
    _run(recipe, speech_splits(data, recipe.data.batch_size, args.device), args.out, args.device)
    console.print(f"whole demo: {_seconds_since(start)}")


def _clear_old_demo(recipe: Recipe, out: Path) -> None:
    """A demo is made to be run again, with the same result; any other run is kept."""
    record, checkpoints = out / "record.json", Checkpoints(out)
    if record.exists():
        old = read_record(record)
    elif checkpoints.paths():
        old = checkpoints.newest()
    else:
        return
    if first_difference(old["recipe"], to_dict(recipe), "recipe") is None:
        record.unlink(missing_ok=True)
        for path in checkpoints.paths():
            path.unlink()


def train(args: argparse.Namespace) -> None:
    recipe, out = _recipe_and_folder(args)
    if args.resume and (out / "record.json").exists():
        if difference := first_difference(read_record(out / "record.json")["recipe"], to_dict(recipe), "recipe"):
            raise ValueError(f"{out} holds the finished run of another recipe: {difference}; choose another folder")
        console.print(escape(f"{out} holds the finished run: nothing to do"))
        console.print(report.results_table(read_record(out / "record.json")))
        return
    check_run(recipe, out, args.resume)
    if args.resume and not Checkpoints(out).paths():
        console.print(escape(f"no checkpoint in {out} yet: starting from the beginning"))
    device = join(args.device)
    try:
        ranks = Ranks()
        if args.download and not ranks.main:
            raise ValueError("--download is for one process: fetch the data first, then start the ranks without it")
        splits = load_splits(recipe, args.data, device, args.download, rank=ranks.rank, world=ranks.world)
        _run(
            recipe,
            splits,
            out,
            device,
            resume=args.resume,
            keep_checkpoints=args.keep_checkpoints,
            sync_batch_norm=args.sync_batch_norm,
            tensorboard=args.tensorboard,
            **step_options(args),
        )
    finally:
        leave()


def _recipe_and_folder(args: argparse.Namespace) -> tuple[Recipe, Path]:
    """What --recipe and --out say; to resume, one of them is enough."""
    if args.recipe is not None:
        recipe = load_recipe(args.recipe, args.set)
        return recipe, args.out or Path("runs") / recipe.name
    if not (args.resume and args.out):
        raise ValueError("say what to train with --recipe NAME, or which run goes on with --resume --out RUN")
    if args.set:
        raise ValueError("--set changes a recipe; a run goes on with the recipe that it was started with")
    record = args.out / "record.json"
    saved = read_record(record) if record.exists() else Checkpoints(args.out).newest()
    return recipe_from_dict(saved["recipe"]), args.out


def _saved_models(recipe: Recipe, saved: dict[str, Any], view: str, device: str) -> Iterator[torch.nn.Module | None]:
    """One stage's network as it was after the last epoch, then after its best one (None: no epoch qualified)."""
    model = create_model(recipe.model, recipe.data.classes)
    if saved["prepared"]:
        prepare(model, recipe.pqk)
    model.to(device)
    best = saved["best"].get(view)
    for state in (saved["state"], best and best["state"]):
        if state is not None:
            model.load_state_dict(state)
        yield model if state is not None else None


def evaluate(args: argparse.Namespace) -> None:
    checkpoint = load_checkpoint(args.run)
    recipe = recipe_from_dict(checkpoint["recipe"])
    batches: Batches | None
    if args.split == "all":
        batches = word_folder_batches(recipe.data, args.data, args.device)
    else:
        batches = getattr(load_splits(recipe, args.data, args.device), args.split)
    if batches is None:
        raise ValueError(f"{recipe.data.name} has no {args.split} split with this recipe (data.validation = 0)")
    table = Table(title=f"{recipe.name}, {'all clips' if args.split == 'all' else args.split}: accuracy (%)")
    table.add_column("network")
    unfinished: list[str] = []
    for column in ("last epoch", "best epoch"):
        table.add_column(column, justify="right")
    for (stage, view), result in RESULT_NAMES.items():
        saved = checkpoint["stages"].get(stage)
        if saved is None or not any(view in row for row in saved["rows"] or [{"validation": None}]):
            continue
        cells = []
        for model in _saved_models(recipe, saved, view, args.device):
            forward = model if model is None or view == "validation" else branch(model, "teacher")
            cells.append("-" if model is None else f"{accuracy(model, batches, forward):.1f}")
        if not saved["finished"]:
            unfinished.append(f"{stage} has not ended: its network is that of step {saved['step']}")
        table.add_row(result if saved["finished"] else f"{result}, unfinished", *cells)
    console.print(table)
    for line in dict.fromkeys(unfinished):
        console.print(line)
