"""``pqk-fast pareto``."""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from rich.markup import escape

from pqk_fast.branches import pqk_layers
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
from pqk_fast.commands.sensitivity import measured
from pqk_fast.deploy.packed import save_packed
from pqk_fast.deploy.sensitivity import Row, choose_bits, least_bytes, payload
from pqk_fast.experiments import pareto
from pqk_fast.experiments.runner import Runs
from pqk_fast.experiments.tasks import Task
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
    sub.add_argument(
        "--mixed",
        action="store_true",
        help="also students of as many bytes with bits for each layer, by the sensitivity of those of most bits",
    )
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
    if args.mixed:
        mixed = _mixed(runs, tasks, args)
        if args.data is not None:
            runs.train_all(mixed, jobs_of(args), console)
        tasks += mixed
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
    paths = pareto.make_page(record).write(args.page or args.out, "pareto")
    console.print(escape(f"written: {', '.join(map(str, [path, *paths]))}"))
    if args.bytes:
        best = pareto.best_within(points, args.bytes)
        console.print(f"for {args.bytes:,} bytes: {best.name}: {best.sample.text()} % in {best.bytes:,} bytes")


def _mixed(runs: Runs, tasks: list[Task], args: argparse.Namespace) -> list[Task]:
    """For every trained student the one of at most its bytes of weights whose layers' bits were chosen for them, but
    where none fits into those, or nothing else was chosen than it has."""
    found = []
    for task, source in pareto.with_most_bits(tasks):
        if runs.record(task) is None or runs.record(source) is None:
            continue
        student, _, _ = load_student(runs.out / task.folder, "phase1")
        budget = sum(payload(name, layer) for name, layer in pqk_layers(student).items())
        rows = _sensitivity(runs, source, args)
        if budget < least_bytes(rows):
            continue
        chosen = choose_bits(rows, budget)
        if set(chosen.values()) != {task.recipe.pqk.bits}:
            found.append(pareto.with_layer_bits(task, chosen))
    return found


def _sensitivity(runs: Runs, task: Task, args: argparse.Namespace) -> list[Row]:
    """Of a student's layers, measured once; kept beside the runs."""
    path = args.out / "sensitivity" / f"{task.folder}.json"
    bits = sorted({number for number in args.bits if number <= task.recipe.pqk.bits})
    saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if saved.get("bits") == bits:
        return [Row(**row) for row in saved["rows"]]
    if args.data is None:
        raise ValueError(f"{path} has no sensitivity of {bits} bits yet: give --data to measure it")
    model, recipe, _ = load_student(runs.out / task.folder, "phase1")
    rows = measured(model, runs.splits(recipe), bits)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, "w") as file:
        json.dump({"bits": bits, "rows": [asdict(row) for row in rows]}, file, indent=1)
    return rows


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
        *(["--mixed"] if args.mixed else []),
        *(f"--set {setting}" for setting in args.set),
    ]
    return f"pqk-fast pareto --data DIR {' '.join(parts)}"
