"""How the benchmarks measure: candidates take turns in one process, and the machine's copy speed is measured with them.

Candidates are called in rounds, each in its turn, so that a busy machine slows all of them alike. A turn is one call
that is not timed, so that each finds the caches as it leaves them, and then as many as take 10 ms: their mean counts.
Given are the median of the turns and the quartiles. The roof is torch's copy of 256 MiB in the same rounds.
Memory is recycled (see pqk_fast.allocator): otherwise page faults would be timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pqk_fast.allocator import recycle_large_tensors
from pqk_fast.files import replacing
from pqk_fast.record import environment

WARMUP = 4
TURN = 10e-3  # seconds
ROOF_BYTES = 256 << 20  # larger than any cache


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: median and quartiles of ``n`` turns."""

    median: float
    low: float
    high: float
    n: int

    @staticmethod
    def of(seconds: list[float]) -> Timing:
        low, median, high = statistics.quantiles(seconds, n=4)
        return Timing(1e3 * median, 1e3 * low, 1e3 * high, len(seconds))

    def as_json(self) -> dict[str, Any]:
        digits = {"median_ms": self.median, "quartiles_ms": [self.low, self.high]}
        return json.loads(json.dumps(digits), parse_float=lambda text: float(f"{float(text):.4g}")) | {"n": self.n}


def take_turns(
    candidates: dict[str, Callable[[], Any]], seconds: float = 6.0, rounds: tuple[int, int] = (11, 400)
) -> dict[str, Timing]:
    """Time every candidate in turn; about ``seconds`` for all together, within so many rounds."""
    calls = {}
    for name, run in candidates.items():
        for _ in range(WARMUP):
            start = time.perf_counter()
            run()
            once = time.perf_counter() - start
        calls[name] = max(1, int(TURN / once))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    begin = time.perf_counter()
    for turn in range(rounds[1]):
        if turn >= rounds[0] and time.perf_counter() - begin > seconds:
            break
        for name, run in candidates.items():
            run()
            start = time.perf_counter()
            for _ in range(calls[name]):
                run()
            times[name].append((time.perf_counter() - start) / calls[name])
    return {name: Timing.of(values) for name, values in times.items()}


def copy_of_roof_bytes() -> Callable[[], Any]:
    """torch's copy of ``ROOF_BYTES`` on all its threads, which are read and written."""
    source = torch.ones(ROOF_BYTES // 4)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


class Report:
    """Runs the cases of one benchmark, shows them as a table and writes them as a record.

    Options: ``--threads``, ``--seconds`` (a case), ``--only`` (cases with this in their name), ``--out``.
    """

    def __init__(self, doc: str | None, benchmark: str) -> None:
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--threads", type=int, default=2)
        parser.add_argument("--seconds", type=float, default=6.0, help="time a case, all candidates together")
        parser.add_argument("--only", default="", help="only the cases with this in their name")
        parser.add_argument("--out", type=Path, default=Path(f"bench/results/{benchmark}.json"))
        self.options = parser.parse_args()
        self.benchmark = benchmark
        self.cases: dict[str, dict[str, Any]] = {}
        torch.set_num_threads(self.options.threads)
        self.recycled = recycle_large_tensors()

    def case(self, name: str, numel: int, moved: float, make: Callable[[], dict[str, Callable[[], Any]]]) -> None:
        """Time what ``make`` gives, ``"pqk_fast"`` and others; each moves ``moved`` bytes at least."""
        if self.options.only not in name:
            return
        torch.compiler.reset()
        times = take_turns({**make(), "copy": copy_of_roof_bytes()}, self.options.seconds)
        roof = 2 * ROOF_BYTES / (times.pop("copy").median / 1e3)
        row: dict[str, Any] = {"numel": numel, "bytes": int(moved), "roof_gb_s": round(roof / 1e9, 2)}
        for candidate, timing in times.items():
            share = moved / (timing.median / 1e3) / roof
            ratio = timing.median / times["pqk_fast"].median
            row[candidate] = timing.as_json() | {"of_roof": round(share, 3), "ratio": round(ratio, 2)}
        self.cases[name] = row

    def finish(self, **content: Any) -> None:
        """Show the table and write the record, whole or not at all."""
        table = Table("case", "candidate", "median ms", "quartiles", "of the roof", "pqk_fast is faster by")
        for name, row in self.cases.items():
            for candidate, cell in row.items():
                if isinstance(cell, dict):
                    low, high = cell["quartiles_ms"]
                    share = f"{100 * cell['of_roof']:.0f} %"
                    spread, ratio = f"{low} .. {high}", f"{cell['ratio']}x"
                    table.add_row(name, candidate, str(cell["median_ms"]), spread, share, ratio)
        console = Console()
        console.print(table)
        settings = {"threads": self.options.threads, "recycled_memory": self.recycled, **content}
        record = {"benchmark": self.benchmark, **environment(), "settings": settings, "cases": self.cases}
        with replacing(self.options.out, "w") as file:
            json.dump(record, file, indent=1)
        console.print(f"{self.options.out} written")
