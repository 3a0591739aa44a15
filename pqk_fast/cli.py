"""The command line: ``pqk-fast demo | train | reproduce | eval | recipes | doctor``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

import pqk_fast
from pqk_fast import native, report
from pqk_fast.allocator import recycle_large_tensors
from pqk_fast.branches import branch
from pqk_fast.callbacks import Callback, ProgressDisplay
from pqk_fast.checkpoint import Checkpoints, load_checkpoint
from pqk_fast.config import Recipe, recipe_from_dict, to_dict
from pqk_fast.data.load import Batches, Splits, load_splits, make_words, speech_splits, word_folder_batches
from pqk_fast.data.spoken_words import write_spoken_words
from pqk_fast.experiments.reproduce import TARGETS, make_page, plan, train_missing
from pqk_fast.experiments.results import Results
from pqk_fast.experiments.run import RESULT_NAMES, check_run, run_recipe
from pqk_fast.experiments.runner import Runs, TaskError
from pqk_fast.models import create_model
from pqk_fast.prepare import prepare
from pqk_fast.recipe_files import load_recipe, recipe_names
from pqk_fast.record import environment, read_record
from pqk_fast.tensorboard import TensorBoardCallback
from pqk_fast.training.interrupts import Interrupted
from pqk_fast.training.loop import TrainingDivergedError
from pqk_fast.training.metrics import accuracy
from pqk_fast.training.ranks import Ranks, RanksDifferError, join, leave
from pqk_fast.training.run_state import first_difference
from pqk_fast.training.steps import PRECISIONS

MOST_JOBS = 8  # trainings at a time unless told otherwise: each takes a gigabyte

console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())


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
            **_step_options(args),
        )
    finally:
        leave()


def reproduce(args: argparse.Namespace) -> None:
    targets = list(TARGETS) if "all" in args.targets else [target for target in TARGETS if target in args.targets]
    results = Results(Runs(args.out), args.seeds, args.set)
    tasks = plan(targets, results, args.cells)
    if args.list:
        table = Table("task", "steps", "trained", box=box.SIMPLE_HEAD)
        for task in tasks:
            table.add_row(task.folder, str(task.steps), "-" if results.runs.record(task) is None else "yes")
        console.print(table)
        return
    folders = {"speech_commands": args.data, "cifar100": args.cifar}
    jobs = args.jobs or (min(os.cpu_count() or 1, MOST_JOBS) if args.device == "cpu" else 1)
    train_missing(tasks, args.out, folders, jobs, console, args.device, **_step_options(args))
    page = make_page(targets, results)
    console.print(escape(f"written: {', '.join(str(path) for path in page.write(args.page or args.out, 'results'))}"))


def _step_options(args: argparse.Namespace) -> dict[str, Any]:
    """How steps are computed, as Trainer calls it."""
    return {
        "precision": args.precision,
        "compile": args.compile,
        "capture": args.capture,
        "recycle_memory": not args.no_recycle,
    }


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
    for column in ("last epoch", "best epoch"):
        table.add_column(column, justify="right")
    for (stage, view), result in RESULT_NAMES.items():
        if stage in checkpoint["stages"]:
            cells = []
            for model in _saved_models(recipe, checkpoint["stages"][stage], view, args.device):
                forward = model if model is None or view == "validation" else branch(model, "teacher")
                cells.append("-" if model is None else f"{accuracy(model, batches, forward):.1f}")
            table.add_row(result, *cells)
    console.print(table)


def recipes(args: argparse.Namespace) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("recipe", no_wrap=True)
    table.add_column("steps", no_wrap=True)
    table.add_column("what it is")
    for name in recipe_names():
        recipe = load_recipe(name)
        table.add_row(name, f"{recipe.phase1.steps} + {recipe.phase2.steps}", recipe.description)
    console.print(table)


def doctor(args: argparse.Namespace) -> None:
    about = environment()
    table = Table("what", "found", title=f"pqk_fast {pqk_fast.__version__}", box=box.SIMPLE_HEAD)
    for name, value in {**about["versions"], **native.optional_packages(), **about["hardware"]}.items():
        table.add_row(name, "-" if value is None else str(value))
    table.add_row("C++ library", escape(str(native.library())))
    console.print(table)
    table = Table("operation", "device", "runs on", "why not something faster", box=box.SIMPLE_HEAD)
    for row in native.backends():
        table.add_row(row.operation, row.device, row.implementation, row.why_not_faster)
    console.print(table)


def _device(text: str) -> str:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a device to train on; expected cpu, cuda or cuda:0")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(
            f"{text!r} is not there: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices; use cpu"
        )
    return text


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pqk-fast", description="Train sparse, low-bit networks: pruning, quantization, in-network distillation."
    )
    parser.add_argument("--version", action="version", version=f"pqk-fast {pqk_fast.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(function: Any, name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(function=function)
        return sub

    def common(sub: argparse.ArgumentParser) -> None:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        sub.add_argument("--device", type=_device, default=default, help="where to compute (default: %(default)s)")

    def settable(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="change a setting, as pqk.bits=8; repeatable",
        )

    def computed(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--precision",
            choices=tuple(PRECISIONS),
            default="fp32",
            help="bf16, fp16: mixed precision by autocast (default: %(default)s)",
        )
        sub.add_argument("--compile", action="store_true", help="torch.compile forward and loss, once a stage")
        sub.add_argument("--capture", action="store_true", help="on a GPU: whole steps as CUDA graphs")
        sub.add_argument("--no-recycle", action="store_true", help="leave malloc's settings alone (CPU)")

    sub = command(demo, "demo", "make spoken words on the spot and train the paper's four networks on them")
    sub.add_argument("--out", type=Path, default=Path("runs/demo"), help="run folder (default: %(default)s)")
    sub.add_argument("--keep-data", type=Path, metavar="DIR", help="also write the words as WAV files, to listen to")
    settable(sub)
    common(sub)

    sub = command(train, "train", "train a recipe: vanilla, phase 1, finetune and phase 2, with a record of it all")
    sub.add_argument("--recipe", help="a name from `pqk-fast recipes`, or a TOML file")
    sub.add_argument("--data", type=Path, metavar="DIR", help="folder of the data set")
    sub.add_argument("--out", type=Path, metavar="RUN", help="run folder to write (default: runs/RECIPE)")
    sub.add_argument("--download", action="store_true", help="fetch the official data set into DIR first")
    sub.add_argument("--resume", action="store_true", help="go on with the run in RUN from its newest checkpoint")
    sub.add_argument(
        "--keep-checkpoints", type=int, default=3, metavar="N", help="newest checkpoints to keep (default: %(default)s)"
    )
    computed(sub)
    sub.add_argument("--sync-batch-norm", action="store_true", help="many GPUs: batch statistics over all of them")
    sub.add_argument("--tensorboard", action="store_true", help="also write scalars for TensorBoard into RUN")
    settable(sub)
    common(sub)

    sub = command(reproduce, "reproduce", "the paper's tables and the baselines: train what is missing, make the page")
    sub.add_argument(
        "targets", nargs="+", choices=(*TARGETS, "all"), metavar="TARGET", help=", ".join((*TARGETS, "all"))
    )
    sub.add_argument(
        "--data", type=Path, metavar="DIR", help="folder of Speech Commands; without it records are read only"
    )
    sub.add_argument("--cifar", type=Path, metavar="DIR", help="folder of CIFAR-100, for table1's ResNet-32")
    sub.add_argument("--cells", nargs="+", default=[], metavar="RECIPE", help="train these recipes only")
    sub.add_argument("--seeds", type=_count, default=3, metavar="N", help="seeds 0 to N - 1 (default: %(default)s)")
    sub.add_argument("--jobs", type=_count, metavar="N", help="trainings at a time (default: one a core, 1 on a GPU)")
    sub.add_argument(
        "--out", type=Path, default=Path("runs/reproduce"), metavar="DIR", help="records (default: %(default)s)"
    )
    sub.add_argument(
        "--page", type=Path, metavar="DIR", help="folder for results.md and .html (default: that of --out)"
    )
    sub.add_argument("--list", action="store_true", help="only list the trainings, and which are done")
    computed(sub)
    settable(sub)
    common(sub)

    sub = command(evaluate, "eval", "accuracy of a finished run's networks on a data set")
    sub.add_argument("run", type=Path, metavar="RUN", help="run folder or checkpoint file")
    sub.add_argument("--data", type=Path, metavar="DIR", help="folder of the data set")
    sub.add_argument(
        "--split",
        choices=("validation", "testing", "all"),
        default="testing",
        help="all: every clip under the word folders, also without list files (default: %(default)s)",
    )
    common(sub)

    command(recipes, "recipes", "list the recipes that come with the library")
    command(doctor, "doctor", "what is installed, what runs each operation, and why not something faster")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it worked, 1 with a message if the input was wrong, 128 + n after signal n."""
    args = _parser().parse_args(arguments)
    try:
        args.function(args)
    except Interrupted as interrupt:
        again = "; train the same with --resume to go on"
        if os.environ.get("RANK", "0") == "0":
            console.print(f"\n[bold]{interrupt.signal.name}[/]: {escape(str(interrupt))}{again}")
        return 128 + interrupt.signal
    except KeyboardInterrupt:
        console.print("\n[bold]interrupted[/]; a run that has checkpoints goes on with --resume")
        return 130
    except (ValueError, TypeError, OSError, ImportError, TrainingDivergedError, RanksDifferError, TaskError) as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
