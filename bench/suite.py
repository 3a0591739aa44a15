"""What ``pqk-fast bench`` runs: the tests of the operations, every benchmark, one record and one page.

Each benchmark is a script in a process of its own. After each one ``bench.json`` is written anew:

    {"format": "pqk_fast bench", "version": 1, "created": ISO time, "quick": bool, "commit": str or None,
     "load_before": float, "versions": {...}, "hardware": {...}, "gate": {"summary", "seconds"},
     "stages": {NAME: {"status", "seconds"}}, "records": {NAME: the script's record}}

and, at the end, ``benchmarks.md``, ``benchmarks.html`` and their pictures. What trains for hours, the accuracy of other
libraries (``bench/peers/compare.py accuracy``), is taken in from its record in ``bench/results`` as it stands.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import changes
import figures
import page
from rich.console import Console
from rich.markup import escape

from pqk_fast.files import replacing
from pqk_fast.record import environment

BENCH = Path(__file__).parent
ROOT = BENCH.parent
RESULTS = BENCH / "results"
TAKEN_IN = ("peers-accuracy",)
FORMAT, VERSION = "pqk_fast bench", 1

SHORT = ("--seconds", "0.02", "--threads", "1", "--without", "torch.compile")


@dataclass(frozen=True)
class Benchmark:
    """A script with its options, and those of a trial (``quick``)."""

    script: str
    options: tuple[str, ...] = ()
    quick: tuple[str, ...] = SHORT
    on_cpu: bool = False  # whatever else the machine has
    takes_device: bool = True
    asked_for: bool = False  # runs only with --all, or named by --only

    def command(self, out: Path, quick: bool) -> list[str]:
        device = ("--device", "cpu") if self.on_cpu and self.takes_device else ()
        options = self.quick if quick else self.options
        return [sys.executable, str(BENCH / self.script), *device, *options, "--out", str(out)]


CELL = ("--steps", "34", "--rounds", "2")  # a mask is made every 32 steps
BENCHMARKS = {
    "fake_quant": Benchmark("bench_fake_quant.py", quick=(*SHORT, "--shrink", "256")),
    "topk_mask": Benchmark("bench_topk_mask.py", quick=(*SHORT, "--shrink", "256")),
    "int4": Benchmark("bench_int4.py", quick=(*SHORT, "--shrink", "256")),
    "dual_forward": Benchmark("bench_dual_forward.py", quick=(*SHORT, "--shrink", "32")),
    "step": Benchmark(
        "bench_step.py", ("--model", "res8_narrow", "--model", "res8"), ("--shrink", "32", "--rounds", "3")
    ),
    "overhead": Benchmark(
        "bench_overhead.py", quick=(*SHORT[4:], "--shrink", "32", "--rounds", "3", "--model", "res8_narrow")
    ),
    "scaling": Benchmark("bench_scaling.py", quick=(*SHORT, "--shrink", "1024")),
    "latency": Benchmark("bench_latency.py", quick=(*SHORT, "--only", "res8_narrow"), on_cpu=True),
    "files": Benchmark("bench_files.py", quick=("--only", "res8_narrow"), on_cpu=True),
    "peers": Benchmark(
        "peers/compare.py",
        quick=("--only", "res8-narrow layer", "--rounds", "3", "--seconds", "0.02"),
        takes_device=False,
        on_cpu=True,
        asked_for=True,
    ),
    "cell": Benchmark("whole_cell.py", quick=CELL, takes_device=False, on_cpu=True, asked_for=True),
    "profile": Benchmark("profile_step.py", quick=CELL[:2], takes_device=False, on_cpu=True, asked_for=True),
}

GATE = [f"tests/test_{name}.py" for name in ("fake_quant", "topk_mask", "int4", "dual_forward", "runtime")]
# without what takes long: tests that trace, compile or interpret
GATE += ["-m", "not slow and not interpreter", "-k", "not opcheck and not compile and not large and not trac"]


class GateError(ValueError):
    """The operations' tests fail, so their times mean nothing."""


def child_environment() -> dict[str, str]:
    """This clone is what is measured, installed or not."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def gate(tests: Sequence[str] = tuple(GATE)) -> dict[str, Any]:
    """Run a quick part of the operations' tests. GateError unless all pass, or none is there to run."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
    environ = {**child_environment(), "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environ, check=False)
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-300:]]
    if done.returncode:
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))][:5]
        raise GateError(
            "nothing is measured: before any figure the tests of the operations must pass, and pytest ended with "
            f"status {done.returncode}: {'; '.join(failed) or lines[-1]}. They are run by {' '.join(command[2:])} and "
            "need pip install 'pqk-fast[test]'"
        )
    return {"summary": lines[-1].strip("= "), "seconds": round(time.perf_counter() - start, 1)}


def commit() -> str | None:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def start_record(path: Path, quick: bool, keep: bool) -> dict[str, Any]:
    """A new record; ``keep``: with the records of benchmarks that the one at ``path`` has.

    ValueError if those were made elsewhere, with other versions, or as a trial while this is none.
    """
    about = environment()
    record = {
        "format": FORMAT,
        "version": VERSION,
        "created": now(),
        "quick": quick,
        "commit": commit(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "versions": about["versions"],
        "hardware": about["hardware"],
        "stages": {},
        "records": {},
    }
    if keep and path.exists():
        old = figures.read(path)
        for part in ("quick", "versions", "hardware"):
            if old.get(part) != record[part]:
                raise ValueError(
                    f"{path} has {part} {old.get(part)!r}, and this run {record[part]!r}: one record is of one machine "
                    "and one kind of run; give another folder with --out"
                )
        record |= {part: old[part] for part in ("stages", "records")}
    return record


def write(path: Path, record: Mapping[str, Any]) -> None:
    with replacing(path, "w") as file:
        file.write(json.dumps(record, indent=1) + "\n")


def chosen(only: Sequence[str], everything: bool) -> list[str]:
    """Names of the benchmarks to run, in order. ValueError for an unknown one."""
    if unknown := [name for name in only if name not in BENCHMARKS]:
        raise ValueError(f"no benchmark {', '.join(unknown)}; there are: {', '.join(BENCHMARKS)}")
    return [name for name, one in BENCHMARKS.items() if (name in only if only else everything or not one.asked_for)]


def measure(
    out: Path,
    quick: bool,
    only: Sequence[str],
    everything: bool,
    console: Console,
    check: Callable[[], dict[str, Any]] = gate,
) -> dict[str, Any]:
    """Run the benchmarks, writing ``out/bench.json`` after each; gives the record."""
    path, names = out / "bench.json", chosen(only, everything)
    record = start_record(path, quick, keep=bool(only))
    console.print("tests of the operations ...")
    record["gate"] = check()
    console.print(escape(record["gate"]["summary"]))
    for name in names:
        console.print(f"\n[bold]{name}[/]")
        record["stages"][name], made = one_benchmark(BENCHMARKS[name], quick)
        record["records"][name] = made
        write(path, record)
    for name in TAKEN_IN:
        if (made_there := RESULTS / f"{name}.json").exists():
            record["records"][name] = json.loads(made_there.read_text(encoding="utf-8"))
    write(path, record)
    return record


def one_benchmark(benchmark: Benchmark, quick: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Its exit status and seconds, and its record, or an error where it left none."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "record.json")
        done = subprocess.run(benchmark.command(out, quick), cwd=ROOT, env=child_environment(), check=False)
        stage = {"status": done.returncode, "seconds": round(time.perf_counter() - start, 1)}
        if out.exists():
            return stage, {"created": now(), **json.loads(out.read_text(encoding="utf-8"))}
    name = benchmark.script.removesuffix(".py")
    return stage, {"benchmark": name, "error": f"ended with status {done.returncode} and left no record"}


def compare_files(a: Path, b: Path, console: Console) -> int:
    """Show what changed from A to B; 1 if ours regressed."""
    found = changes.compare(figures.read(a), figures.read(b))
    wide = Console(width=max(console.width, 170), highlight=False)  # numbers are not to be cut off
    wide.print(changes.table_of(found).rich())
    bad = [change for change in found if change.regressed]
    least = f"{100 * changes.LEAST:.0f} %"
    console.print(f"{len(found)} compared, {len(bad)} regressed (by more than {least} and both quartile distances)")
    return 1 if bad else 0


def run(args: Any, console: Console) -> int:
    """``pqk-fast bench``: 0, or 1 if a benchmark failed or ``--compare`` found a regression."""
    if args.compare:
        return compare_files(*args.compare, console)
    if args.made:
        record = figures.read(args.made)
        if "hardware" not in record:
            raise ValueError(f"{args.made} is the record of one benchmark; a page is made of a bench.json")
    else:
        record = measure(args.out, args.quick, args.only, args.all, console)
    written = page.make_page(record).write(args.page or args.out, "benchmarks")
    console.print(escape(f"written: {', '.join(map(str, written))}"))
    failed = [name for name, stage in record["stages"].items() if stage["status"]]
    if failed:
        console.print(f"[bold red]failed:[/] {', '.join(failed)}")
    return 1 if failed and not args.made else 0
