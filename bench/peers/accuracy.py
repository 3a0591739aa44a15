"""Accuracy at equal budget on the real speech set, 4 bits and 90 % sparse.

    python bench/peers/compare.py accuracy --data DIR [--peers NAME ...] [--orders after with] [--steps 9022]
        [--recipe NAME] [--seeds 3] [--records bench/results/reproduce] [--out bench/results/peers-accuracy.json]

What is trained, and how, stands in training.py. One candidate at a time, one process and one thread; a finished one
stands in the record and is not trained again, so that the same command goes on after an interruption. PQK itself is
trained by the library's own trainer in as many steps, or, with ``--records``, taken from the records of
``pqk-fast reproduce`` that are of the same recipe and data. ``--steps`` is for trials: the length of the first stage,
the second in proportion.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from candidates import CANDIDATES, OURS
from options import parsed, parser_of, write
from remote import Remote, WorkerError
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from training import ORDERS, OWN, RECIPE, RESULTS, recipe_of

from pqk_fast.config import Recipe, recipe_from_dict
from pqk_fast.data.load import load_splits
from pqk_fast.experiments.tasks import finetuning
from pqk_fast.record import environment, read_record


def matter(recipe: Recipe, order: str) -> dict[str, Any]:
    """What two recipes have to share for the same second stage: finetuning does not distil."""
    second = finetuning(recipe.phase2) if order == "finetune" else recipe.phase2
    shared = {key: getattr(recipe, key) for key in ("model", "seed", "data", "pqk", "phase1", "phase1_start")}
    return {**shared, "phase2": second, "finetune": recipe.finetune}


def from_records(folder: Path, order: str, name: str, steps: int, fingerprint: str) -> dict[int, dict[str, Any]]:
    """PQK's results by seed, of the records that are of this recipe and data."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        record = read_record(path)
        result = record["results"].get(RESULTS[order])
        seed = record["seed"]
        if result is None:
            continue
        if matter(recipe_from_dict(record["recipe"]), order) != matter(recipe_of(name, steps, seed), order):
            continue
        if record["data"]["fingerprint"] != fingerprint:
            continue
        found[seed] = {key: result[key] for key in ("last", "best_dev")} | {"from": path.name, "data": record["data"]}
    return found


def key_of(name: str, order: str, seed: int) -> str:
    return f"{name}, {order}, seed {seed}"


def table_of(runs: dict[str, Any], plan: list[tuple[str, str, int]]) -> Table:
    """A row for a candidate and order: each seed's testing accuracy after the last step, and their mean."""
    table = Table("candidate", "order", "testing %, by seed", "mean", "at best validation", "file", box=SIMPLE_HEAD)
    for name, order in dict.fromkeys((name, order) for name, order, _ in plan):
        mine = [runs.get(key_of(name, order, seed), {}) for n, o, seed in plan if (n, o) == (name, order)]
        if error := next((run["error"] for run in mine if "error" in run), None):
            table.add_row(name, order, escape(error), "", "", "")
            continue
        done = [run for run in mine if "last" in run]
        last = [run["last"]["testing"] for run in done]
        best = [run["best_dev"]["testing"] for run in done]
        sizes = [str(run["file_bytes"]) for run in done if "file_bytes" in run]
        means = [f"{statistics.mean(values):.1f}" if values else "" for values in (last, best)]
        table.add_row(name, order, ", ".join(f"{value:.1f}" for value in last), *means, ", ".join(sizes))
    return table


def trained(name: str, order: str, seed: int, options: Any) -> dict[str, Any]:
    """The result of one training, or its error."""
    try:
        worker = Remote(name, CANDIDATES[name], options.threads, options.patience)
    except WorkerError as error:
        return {"error": str(error)}
    details = {"data": str(options.data), "recipe": options.recipe, "steps": options.steps, "seed": seed}
    try:
        answer = worker.ask("train", lambda text: print(f"  {text}", flush=True), order=order, **details)
        return answer["result"] | {"versions": worker.about["versions"], "does": worker.about["does"]}
    except WorkerError as error:
        return {"error": str(error)}
    finally:
        worker.close()


def opened(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The record as far as it is, a new one if there is none. ValueError for one with other settings."""
    if not path.exists():
        return {"benchmark": "peers, accuracy", **environment(), "settings": settings, "runs": {}}
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if record.get("settings") != settings:
        raise ValueError(
            f"{path} was made with {record.get('settings')}, not {settings}: give another --out, or move it"
        )
    return record


def main(arguments: list[str]) -> int:
    parser = parser_of(__doc__, "bench/results/peers-accuracy.json")
    parser.add_argument("--data", type=Path, required=True, help="the speech set's folder")
    parser.add_argument("--recipe", default=RECIPE, help="its steps, batches and rates are everyone's")
    parser.add_argument("--steps", type=int, default=0, help="of the first stage; default: the recipe's")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=["after"], help="of pruning and 4 bits")
    parser.add_argument("--records", type=Path, help="folder of records to take PQK's figures from")
    parser.add_argument("--again", action="store_true", help="also what is in the record with an error")
    options, names = parsed(parser, arguments)
    if not options.peers:
        names = [name for name in names if not CANDIDATES[name].variant]
    try:
        steps = recipe_of(options.recipe, options.steps, 0).phase1.steps
        record = opened(options.out, {"recipe": options.recipe, "steps": steps, "threads": options.threads})
    except ValueError as error:
        parser.error(str(error))
    runs: dict[str, Any] = record["runs"]
    plan = [
        (name, order, seed)
        for seed in range(options.seeds)
        for name in names
        for order in (OWN if name == OURS else options.orders)
    ]
    if options.records is not None:
        data = load_splits(recipe_of(options.recipe, options.steps, 0), options.data).fingerprint
        for order in OWN:
            for seed, result in from_records(options.records, order, options.recipe, options.steps, data).items():
                if seed < options.seeds:
                    runs[key_of(OURS, order, seed)] = result
    for name, order, seed in plan:
        key = key_of(name, order, seed)
        if key in runs and not (options.again and "error" in runs[key]):
            continue
        print(f"{key}:", flush=True)
        runs[key] = trained(name, order, seed, options)
        print(f"  {runs[key].get('error', runs[key].get('last'))}", flush=True)
        write(options.out, record)
    fingerprints = {run["data"]["fingerprint"] for run in runs.values() if "data" in run}
    write(options.out, record)
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    console.print(table_of(runs, plan))
    console.print(f"{options.out} written")
    if len(fingerprints) > 1:
        console.print(f"FAILED: the runs are of different data: {', '.join(sorted(fingerprints))}")
    return int(len(fingerprints) > 1 or any("error" in runs[key_of(*each)] for each in plan if each[0] == OURS))
