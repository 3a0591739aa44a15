"""``pqk-fast reproduce``."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from pqk_fast.commands.options import (
    Commands,
    add_device,
    add_jobs,
    add_settings,
    add_step_options,
    command,
    console,
    count,
    jobs_of,
    step_options,
)
from pqk_fast.experiments import plus
from pqk_fast.experiments.reproduce import TARGETS, make_page, plan, train_missing
from pqk_fast.experiments.results import Results
from pqk_fast.experiments.runner import Runs
from pqk_fast.settings import ConfigError


def add(commands: Commands) -> None:
    text = "the paper's tables and the baselines: train what is missing, make the page"
    sub = command(commands, reproduce, "reproduce", text)
    names = (*TARGETS, "all", "plus")
    sub.add_argument(
        "targets", nargs="+", choices=names, metavar="TARGET", help=f"{', '.join(names)} (beyond the paper)"
    )
    sub.add_argument("--data", type=Path, metavar="DIR", help="folder of Speech Commands; else nothing is trained")
    sub.add_argument("--cifar", type=Path, metavar="DIR", help="folder of CIFAR-100, for table1's ResNet-32")
    sub.add_argument(
        "--cells", nargs="+", default=[], metavar="RECIPE", help="train these recipes only (plus: rows with a word)"
    )
    sub.add_argument("--seeds", type=count, default=3, metavar="N", help="seeds 0 to N - 1 (default: %(default)s)")
    add_jobs(sub)
    sub.add_argument(
        "--out", type=Path, default=Path("runs/reproduce"), metavar="DIR", help="records (default: %(default)s)"
    )
    sub.add_argument("--page", type=Path, metavar="DIR", help="folder for results.md and .html (default: --out)")
    sub.add_argument("--list", action="store_true", help="only list the trainings, and which are done")
    add_step_options(sub)
    add_settings(sub)
    add_device(sub)


def reproduce(args: argparse.Namespace) -> None:
    if "plus" in args.targets and len(args.targets) > 1:
        raise ConfigError("plus makes a page of its own: give it alone")
    targets = list(TARGETS) if "all" in args.targets else [target for target in TARGETS if target in args.targets]
    results = Results(Runs(args.out), args.seeds, args.set)
    tasks = plan(targets, results, args.cells) if targets else plus.plan(results, args.cells)
    if args.list:
        table = Table("task", "steps", "trained", box=box.SIMPLE_HEAD)
        for task in tasks:
            table.add_row(task.folder, str(task.steps), "-" if results.runs.record(task) is None else "yes")
        console.print(table)
        return
    folders = {"speech_commands": args.data, "cifar100": args.cifar}
    train_missing(tasks, args.out, folders, jobs_of(args), console, args.device, **step_options(args))
    page, name = (make_page(targets, results), "results") if targets else (plus.make_page(results), "plus")
    console.print(escape(f"written: {', '.join(str(path) for path in page.write(args.page or args.out, name))}"))
