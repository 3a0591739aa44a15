"""``pqk-fast pareto``."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from rich.markup import escape

from pqk_fast.commands.deploy import load_student, metadata_of
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
from pqk_fast.deploy.packed import save_packed
from pqk_fast.experiments import pareto
from pqk_fast.experiments.runner import Runs
from pqk_fast.files import replacing
from pqk_fast.record import environment


def add(commands: Commands) -> None:
    text = "accuracy against bytes of the file, over models, bits and sparsities: what to train for 3 KB"
    sub = command(commands, run_pareto, "pareto", text)
    sub.add_argument("--data", type=Path, metavar="DIR", help="folder of Speech Commands; else nothing is trained")
    sub.add_argument("--models", nargs="+", default=["res8_narrow", "res8"], metavar="NAME")
    sub.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8], metavar="K", help="(default: %(default)s)")
    sub.add_argument(
        "--sparsities", type=float, nargs="+", default=[0.5, 0.8, 0.9, 0.95, 0.98], metavar="P", help="(%(default)s)"
    )
    sub.add_argument("--steps", type=count, default=3000, help="budget of each student (default: %(default)s)")
    sub.add_argument(
        "--dense-steps", type=count, default=9022, metavar="N", help="of the networks they start from (%(default)s)"
    )
    sub.add_argument("--seeds", type=count, default=1, metavar="N", help="seeds 0 to N - 1 (default: %(default)s)")
    add_jobs(sub)
    sub.add_argument(
        "--out", type=Path, default=Path("runs/pareto"), metavar="DIR", help="runs, pareto.json (default: %(default)s)"
    )
    sub.add_argument("--page", type=Path, metavar="DIR", help="folder for pareto.md and .html (default: --out)")
    sub.add_argument("--bytes", type=count, metavar="N", help="also say what to train for files of N bytes")
    add_step_options(sub)
    add_settings(sub)
    add_device(sub)


def run_pareto(args: argparse.Namespace) -> None:
    tasks = pareto.plan(args.models, args.bits, args.sparsities, args.steps, args.dense_steps, args.seeds, args.set)
    runs = Runs(args.out / "runs", args.data, args.device, **step_options(args))
    if args.data is not None:
        runs.train_all(tasks, jobs_of(args), console)
    path = args.out / "pareto.json"
    sizes = {task.folder: _bytes(runs.out / task.folder) for task in tasks if runs.record(task) is not None}
    points = list(pareto.points_of(runs, tasks, lambda task: sizes[task.folder]))
    if not points:
        raise ValueError(f"{args.out} has none of these {len(tasks)} students yet: give --data to train them")
    about = {"benchmark": "pareto", "command": _command(args), "steps": args.steps, **environment()}
    record = pareto.as_json(points, pareto.dense_of(runs, tasks), about)
    with replacing(path, "w") as file:
        file.write(json.dumps(record, indent=1) + "\n")
    console.print(pareto.table_of("Students that none with as few bytes beats", pareto.front(points)).rich())
    if missing := len(tasks) - sum(len(point.validation) for point in points):
        console.print(f"{missing} of {len(tasks)} are not trained yet")
    if args.bytes:
        best = pareto.best_within(points, args.bytes)
        console.print(f"for {args.bytes:,} bytes: {best.name}: {best.sample.text()} % in {best.bytes:,} bytes")
    paths = pareto.make_page(record).write(args.page or args.out, "pareto")
    console.print(escape(f"written: {', '.join(map(str, [path, *paths]))}"))


def _bytes(run: Path) -> int:
    """Of the packed file of the run's student, as ``pqk-fast export`` writes it."""
    model, recipe, _ = load_student(run, "phase1")
    with tempfile.TemporaryDirectory() as folder:
        return save_packed(model, Path(folder, "student.pqk"), metadata_of(recipe))


def _command(args: argparse.Namespace) -> str:
    lists = {"models": args.models, "bits": args.bits, "sparsities": args.sparsities}
    parts = [f"--{name} {' '.join(map(str, values))}" for name, values in lists.items()]
    parts += [
        f"--steps {args.steps} --dense-steps {args.dense_steps} --seeds {args.seeds}",
        *(f"--set {setting}" for setting in args.set),
    ]
    return f"pqk-fast pareto --data DIR {' '.join(parts)}"
