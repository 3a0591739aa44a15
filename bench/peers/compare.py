"""The same work done by pqk_fast, by plain PyTorch, and by the libraries that one would take instead.

    python bench/peers/install.py all
    python bench/peers/compare.py [--only CASE] [--peers NAME ...] [--rounds 11] [--out bench/results/peers.json]
    python bench/peers/compare.py accuracy --data DIR ...        (see its own --help)

Each candidate is a process in its own environment; all take turns, round by round, one computing at a time, so that a
busy machine slows them alike. Given are the median of the turns, the quartiles, and the ratio to ours; what the cases
are stands in work.py. Besides time: the most memory that one step takes, and the bytes of the exported file. All run
with freed memory kept for the next tensor, as training with pqk_fast sets it, unless PQK_FAST_MALLOC=default.

A candidate that cannot start, or cannot do a case, is in the record and in the table with its error. The record is
written anew after each case; the exit status is 1 if ours failed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from candidates import CANDIDATES, OURS
from install import installed
from options import parsed, parser_of, write
from remote import Remote, RemoteTimer, WorkerError
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from timing import Run, take_turns

from pqk_fast.record import environment

FAKE_QUANT = ("res8-narrow layer", "1 M", "16 M")
STEPS = ("res8-narrow", "res8-narrow, channels_last")
MASKS = ("res8-narrow, all layers", "1 M")
TIMED = {
    **{f"fake-quant, {name}": ("fake_quant", name) for name in FAKE_QUANT},
    **{f"phase-1 step, {name}": ("step", name) for name in STEPS},
    **{f"masks, {name}": ("masks", name) for name in MASKS},
}
ASKED = {"memory of a step": ("memory", "peak_bytes"), "exported file": ("file", "bytes")}


class Comparison:
    """The workers, and the record as far as it is."""

    def __init__(self, names: list[str], options: argparse.Namespace) -> None:
        self.options = options
        self.cases: dict[str, dict[str, Any]] = {}
        self.about: dict[str, dict[str, Any]] = {}
        self.workers: dict[str, Remote] = {}
        for name in names:
            self.about[name] = self._start(name)
            print(f"{name}: {self.about[name].get('error', 'ready')}", flush=True)
        settings = {"bits": 4, "sparsity": 0.9, "threads": options.threads, "rounds": options.rounds}
        self.record = {
            "benchmark": "peers",
            **environment(),
            "settings": settings,
            "candidates": self.about,
            "cases": self.cases,
        }
        self.record["hardware"]["threads"] = options.threads

    def _start(self, name: str) -> dict[str, Any]:
        """What goes into the record of a candidate; a worker for it if it can be."""
        candidate, about = CANDIDATES[name], {}
        found = installed(candidate.environment) if candidate.environment else None
        if found is not None:
            about["installed"] = {key: found[key] for key in ("megabytes", "seconds", "error") if key in found}
        try:
            worker = Remote(name, candidate, self.options.threads, self.options.patience)
        except WorkerError as error:
            failed = about.get("installed", {}).get("error")
            return {**about, "error": f"not installed: {failed}" if failed else str(error)}
        self.workers[name] = worker
        return {**about, **worker.about}

    def timed(self, case: str, kind: str, name: str) -> None:
        row: dict[str, Any] = {}
        ready: dict[str, Run] = {}
        for candidate, worker in self.workers.items():
            try:
                ready[candidate] = Run(worker, about=worker.ask("prepare", kind=kind, case=name)["about"])  # type: ignore[arg-type]
            except WorkerError as error:
                row[candidate] = {"error": str(error)}
        times = None
        while ready and times is None:
            try:
                times = take_turns(ready, RemoteTimer(), self.options.seconds, self.options.rounds)  # type: ignore[arg-type]
            except WorkerError as error:  # the others begin anew without it
                row[error.name] = {"error": str(error)}
                del ready[error.name]
        for candidate, timing in (times or {}).items():
            row[candidate] = timing.as_json() | ready[candidate].about
        self._add(case, row, "median_ms")

    def asked(self, case: str, what: str, figure: str) -> None:
        row: dict[str, Any] = {}
        for candidate, worker in self.workers.items():
            try:
                row[candidate] = worker.ask(what)
            except WorkerError as error:
                row[candidate] = {"error": str(error)}
        self._add(case, row, figure)

    def _add(self, case: str, row: dict[str, Any], figure: str) -> None:
        """Ratios to ours, and the record."""
        ours = row.get(OURS, {}).get(figure)
        for cell in row.values():
            if ours and figure in cell:
                cell["ratio"] = round(cell[figure] / ours, 3)
        self.cases[case] = {name: row[name] for name in self.about if name in row}
        parts = (f"{name} {cell.get(figure, cell.get('error'))}" for name, cell in self.cases[case].items())
        print(f"{case}: {'; '.join(parts)}", flush=True)
        write(self.options.out, self.record)

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()


def table_of(record: dict[str, Any]) -> Table:
    table = Table("case", "candidate", "median", "quartiles", "to ours", box=SIMPLE_HEAD)
    for name, about in record["candidates"].items():
        if "error" in about:
            table.add_row("(start)", name, escape(about["error"]), "", "")
    for case, row in record["cases"].items():
        for name, cell in row.items():
            ratio = f"{cell['ratio']:.2f}x" if "ratio" in cell else ""
            table.add_row(case, name, *shown(cell), ratio)
    return table


def shown(cell: dict[str, Any]) -> tuple[str, str]:
    if "error" in cell:
        return escape(cell["error"]), ""
    if "median_ms" in cell:
        low, high = cell["quartiles_ms"]
        return f"{cell['median_ms']} ms", f"{low} .. {high}"
    return f"{cell.get('peak_bytes', cell.get('bytes')):,} bytes", ""


def compare(arguments: list[str]) -> int:
    parser = parser_of(__doc__, "bench/results/peers.json")
    parser.add_argument("--only", default="", help="only the cases with this in their name")
    parser.add_argument("--rounds", type=int, default=11, help="of turns, at least")
    parser.add_argument("--seconds", type=float, default=6.0, help="time a case, all candidates together")
    options, names = parsed(parser, arguments)
    comparison = Comparison(names, options)
    todo: dict[str, Callable[[], None]] = {
        case: lambda case=case, of=of: comparison.timed(case, *of)
        for case, of in TIMED.items()  # type: ignore[misc]
    }
    todo |= {case: lambda case=case, of=of: comparison.asked(case, *of) for case, of in ASKED.items()}  # type: ignore[misc]
    try:
        for case, measure in todo.items():
            if options.only in case:
                measure()
    finally:
        comparison.close()
    write(options.out, comparison.record)
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    console.print(table_of(comparison.record))
    console.print(f"{options.out} written")
    failed = [case for case, row in comparison.cases.items() if "error" in row.get(OURS, {})]
    return int(bool(failed) or "error" in comparison.about.get(OURS, {}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["accuracy"]:
        import accuracy

        sys.exit(accuracy.main(sys.argv[2:]))
    sys.exit(compare(sys.argv[1:]))
