"""Runs the cases of one benchmark, shows them as a table and writes them as a record.

The record is written anew after every case, so that what was measured stays if a run is cut short. A candidate that
cannot run, or gives other results than ours, is recorded with its error and no figure.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from roofs import Roof, arithmetic_of, copy_roof, product_roof
from timing import ROUNDS, HostTimer, Run, Timer, Workload, take_turns

from pqk_fast.allocator import recycle_large_tensors
from pqk_fast.files import replacing
from pqk_fast.record import environment

try:
    from triton.errors import TritonError
except ImportError:  # no GPU, and a build of torch without it
    TritonError = RuntimeError  # type: ignore[assignment, misc]


class MismatchError(RuntimeError):
    """A candidate computes something else than the reference."""


# Compilers', CUDA's and out-of-memory errors are RuntimeErrors; the other two are how operations refuse their input.
RUN_ERRORS = (RuntimeError, TritonError, ValueError, TypeError)


def described(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()[:300] if lines else ''}"


class Report:
    """One benchmark's run: give it the cases, then :meth:`finish` it. ``settings`` go into the record."""

    def __init__(
        self,
        doc: str | None,
        benchmark: str,
        settings: dict[str, Any] | None = None,
        *,
        seconds: float = 6.0,
        threads: int = 2,
        add_options: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
    ) -> None:
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
        parser.add_argument("--threads", type=int, default=threads, help="of the CPU")
        parser.add_argument("--seconds", type=float, default=seconds, help="time a case, all candidates together")
        parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no case is begun")
        parser.add_argument("--only", default="", help="only the cases with this in their name")
        parser.add_argument("--without", action="append", default=[], metavar="CANDIDATE", help="repeatable")
        parser.add_argument("--cases", choices=("cpu", "cuda"), help="the other device's list, to try it out")
        parser.add_argument("--shrink", type=int, default=1, help="divide the sizes by this, to try the cases out")
        parser.add_argument("--out", type=Path, help="default: bench/results/NAME.json, NAME-cuda.json on a GPU")
        add_options(parser)
        self.options = parser.parse_args()
        self.device: str = self.options.device
        self.cases_of: str = self.options.cases or self.device
        suffix = "" if self.device == "cpu" else "-cuda"
        self.out: Path = self.options.out or Path(f"bench/results/{benchmark}{suffix}.json")
        torch.set_num_threads(self.options.threads)
        self.timer = self._timer()
        options = {"threads": self.options.threads, "recycled_memory": recycle_large_tensors()}
        created = datetime.now(UTC).isoformat(timespec="seconds")
        self.record: dict[str, Any] = {"benchmark": benchmark, "created": created, **environment()}
        if about := self.timer.about_device():
            self.record["gpu"] = about
        self.record["settings"] = options | ({"shrink": self.options.shrink} if self.options.shrink > 1 else {})
        self.record["settings"] |= {"without": self.options.without} if self.options.without else {}
        self.record["settings"] |= settings or {}
        self.cases: dict[str, dict[str, Any]] = {}
        self.record["cases"] = self.cases
        self.failed: list[str] = []
        self.fewest_rounds = ROUNDS[0]
        self._roofs: dict[str, tuple[Roof, Run]] = {}
        self._begin = time.perf_counter()
        self.console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
        versions, hardware = self.record["versions"], self.record["hardware"]
        processor = hardware["cpu"] if self.device == "cpu" else f"{hardware['gpu']}, {self.record['gpu']['now']}"
        print(f"{processor}; torch {versions['torch']}, triton {versions['triton']}", flush=True)

    def _timer(self) -> Timer:
        if self.device == "cpu":
            return HostTimer()
        from timing_cuda import CudaTimer  # the CPU's side needs none of it

        return CudaTimer()

    def size(self, full: int, least: int = 1) -> int:
        """A size of a case, smaller in a trial."""
        return max(least, full // self.options.shrink)

    def case(
        self,
        name: str,
        numel: int,
        moved: float,
        make: Callable[[], Workload],
        *,
        flop: float = 0.0,
        arithmetic: str | None = None,
        targets: dict[str, float] | None = None,
    ) -> None:
        """Time the candidates that ``make`` gives; a call moves ``moved`` bytes and makes ``flop`` operations at least
        (0: not known, and no share of a roof is given).

        ``arithmetic`` is one of ``roofs.ARITHMETICS``; None leaves torch's settings alone. ``targets``: what to reach
        on a GPU, a share of the roof ("of_roof") or how many times as fast as a candidate, or as the "best" of them.
        """

        def measure(row: dict[str, Any]) -> None:
            torch.compiler.reset()
            self.timer.free()
            if arithmetic is None:
                self._measure(name, row, make(), flop, "fp32")
            else:
                with arithmetic_of(arithmetic, self.device):
                    self._measure(name, row, make(), flop, arithmetic)
            if targets and self.device == "cuda" and self.options.shrink == 1:
                row["targets"] = reached(row, targets)

        self._enter(name, {"numel": numel, "bytes": int(moved)}, measure)

    def elsewhere(self, name: str, numel: int, measure: Callable[[], Mapping[str, Any]]) -> None:
        """A case that other processes measure: ``measure`` gives its row, a dictionary for each candidate."""
        self._enter(name, {"numel": numel}, lambda row: row.update(measure()))

    def _enter(self, name: str, row: dict[str, Any], measure: Callable[[dict[str, Any]], None]) -> None:
        """Fill a row, unless it was not asked for or time is up, and write the record."""
        if self.options.only not in name:
            return
        if time.perf_counter() - self._begin > self.options.budget:
            row["skipped"] = f"begun after the budget of {self.options.budget:g} s"
        else:
            try:
                measure(row)
            except RUN_ERRORS as error:
                row["error"] = self._fault(name, error)
            except KeyboardInterrupt:  # or INT by a time limit: no more cases, but the table of those there are
                row["skipped"] = "interrupted"
                self.options.budget = 0.0
                self.failed.append(f"{name}, interrupted")
        self.cases[name] = row
        self._say(name, row)
        self._write()

    def _measure(self, name: str, row: dict[str, Any], work: Workload, flop: float, arithmetic: str) -> None:
        moved = row["bytes"]
        count = self.timer.sets(moved) if work.rotate else 1
        sets = [work.inputs(seed) for seed in range(count)]
        if about := self.timer.about_case(moved * count):
            row |= {"sets": count, **about}
        runs = self._ready(name, row, work, sets)
        if not runs:
            raise RuntimeError("no candidate could run")
        roofs: dict[str, tuple[Roof, Run]] = {}
        if moved:
            roofs["copy"] = self._roof("copy", lambda: copy_roof(self.device))
        if flop:
            roofs["product"] = self._roof(arithmetic, lambda: product_roof(self.device, arithmetic))
        everything = {**runs, **{key: run for key, (_, run) in roofs.items()}}
        times = take_turns(everything, self.timer, self.options.seconds, self.fewest_rounds)
        rates = {key: roof.work / (1e-3 * times[key].median) for key, (roof, _) in roofs.items()}
        floors = {key: work / rates[key] for key, work in (("copy", moved), ("product", flop)) if work}
        if moved:
            row["roof_gb_s"] = round(rates["copy"] / 1e9, 2)
        if flop:
            row |= {"flop": int(flop), "roof_tflop_s": round(rates["product"] / 1e12, 3)}
            row["bound"] = max(floors, key=lambda key: floors[key])
        for candidate, run in runs.items():
            timing = times[candidate]
            cell = timing.as_json() | run.about
            if floors:
                cell["of_roof"] = round(1e3 * max(floors.values()) / timing.median, 3)
            if candidate in work.unchecked:
                cell["unchecked"] = True
            if work.reference in times:
                cell["ratio"] = round(timing.median / times[work.reference].median, 2)
            row[candidate] = cell

    def _ready(self, name: str, row: dict[str, Any], work: Workload, sets: list[tuple[Any, ...]]) -> dict[str, Run]:
        """The candidates that run and compute the same; the others are entered with their errors."""
        runs: dict[str, Run] = {}
        truth = None
        for candidate, bind in work.candidates.items():
            if candidate in self.options.without:
                continue
            try:
                calls = [bind(*each) for each in sets]
                result = calls[0]()
                if candidate == work.reference:
                    truth = result
                elif work.check and truth is not None and candidate not in work.unchecked:
                    problem = work.check(result, truth, sets[0])
                    if problem:
                        raise MismatchError(problem)
                del result
                run = self.timer.prepare(calls, candidate not in work.uncaptured)
                if part := work.parts.get(candidate):
                    run = replace(run, uses=run.uses * part, about=run.about | {"part": round(part, 6)})
                runs[candidate] = run
            except RUN_ERRORS as error:
                is_fault = candidate == work.reference or isinstance(error, MismatchError)
                problem = self._fault(f"{name}, {candidate}", error) if is_fault else described(error)
                row[candidate] = {"error": problem}
        return runs

    def _fault(self, where: str, error: BaseException) -> str:
        """An error that is not a rival's own: the benchmark fails by it."""
        self.failed.append(where)
        if not isinstance(error, MismatchError):
            traceback.print_exception(error)
        return described(error)

    def _roof(self, name: str, make: Callable[[], Roof]) -> tuple[Roof, Run]:
        if name not in self._roofs:
            roof = make()
            self._roofs[name] = roof, self.timer.prepare([roof.call], True)
        return self._roofs[name]

    def _say(self, name: str, row: dict[str, Any]) -> None:
        cells = {key: cell for key, cell in row.items() if isinstance(cell, dict)}
        parts = [row[key] for key in ("skipped", "error") if key in row]
        for key, cell in cells.items():
            said = [str(cell[kind]) for kind in ("median_ms", "peak_mib", "file_bytes", "error") if kind in cell]
            parts.append(f"{key} {''.join(said)}")
            if "not_captured_because" in cell:
                parts[-1] += f" (not captured: {cell['not_captured_because']})"
        print(f"{name}: {'; '.join(parts)}", flush=True)

    def _write(self) -> None:
        """The record as it is now, whole or not at all."""
        with replacing(self.out, "w") as file:
            json.dump(self.record | {"failed": self.failed}, file, indent=1)

    def finish(self) -> int:
        """Show the table; 0, or 1 if ours could not run or results differ."""
        table = Table(
            "case", "candidate", "median ms", "quartiles", "of the roof", "ratio", "captured", box=SIMPLE_HEAD
        )
        aims = Table("case", "target", "at least", "measured", title="targets", box=SIMPLE_HEAD)
        for name, row in self.cases.items():
            for candidate, cell in row.items():
                if isinstance(cell, dict):
                    table.add_row(name, candidate, *shown(cell))
            for aim in row.get("targets", ()):
                aims.add_row(name, aim["target"], str(aim["at_least"]), str(aim["measured"]))
        self.console.print(table)
        if aims.row_count:
            self.console.print(aims)
        if about := self.timer.about_device():
            self.record["gpu"]["afterwards"] = about["now"]
        self._write()
        self.console.print(f"{self.out} written")
        if skipped := [name for name, row in self.cases.items() if "skipped" in row]:
            self.console.print(escape(f"skipped for want of time: {'; '.join(skipped)}"))
        for where in self.failed:
            self.console.print(escape(f"FAILED: {where}"))
        return 1 if self.failed else 0


def shown(cell: dict[str, Any]) -> list[str]:
    """A candidate's figures as they stand in the table."""
    if "error" in cell:
        return [escape(cell["error"]), "", "", "", ""]
    if "median_ms" not in cell:
        return [", ".join(f"{key} {value}" for key, value in cell.items()), "", "", "", ""]
    low, high = cell["quartiles_ms"]
    ratio = f"{cell['ratio']}x" if "ratio" in cell else ""
    share = f"{100 * cell['of_roof']:.0f} %" if "of_roof" in cell else ""
    captured = {True: "yes", False: "no", None: ""}[cell.get("captured")]
    return [str(cell["median_ms"]), f"{low} .. {high}", share, ratio, captured]


def reached(row: dict[str, Any], targets: dict[str, float]) -> list[dict[str, Any]]:
    """Each target and what was measured in this row, None where it could not be."""
    medians = {name: cell["median_ms"] for name, cell in row.items() if isinstance(cell, dict) and "median_ms" in cell}
    ours = medians.get("pqk_fast")
    others = [median for name, median in medians.items() if not name.startswith("pqk_fast")]
    rows = []
    for target, least in targets.items():
        measured: float | None = None
        if ours is not None and target == "of_roof":
            measured = row["pqk_fast"]["of_roof"]
        elif ours is not None and (rival := min(others, default=None) if target == "best" else medians.get(target)):
            measured = round(rival / ours, 3)
        rows.append({"target": target, "at_least": least, "measured": measured})
    return rows


def settings_of_products() -> dict[str, str]:
    """Whether torch rounds fp32 products to tf32, as it is set now."""
    return {
        "cudnn_allow_tf32": str(torch.backends.cudnn.allow_tf32),
        "matmul_allow_tf32": str(torch.backends.cuda.matmul.allow_tf32),
    }
