"""How the benchmarks measure: candidates take turns in one process, and the machine's copy speed is measured with them.

Candidates are called in rounds, each in its turn, so that a busy machine slows all of them alike. A turn is one call that
is not timed, so that each finds the caches as it leaves them, and then as many as take 10 ms, of which the mean counts.
Given are the median of the turns and the quartiles. The roof is torch's copy of 256 MiB, before and after the rounds.
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
    candidates: dict[str, Callable[[], Any]], seconds: float = 6.0, rounds: tuple[int, int] = (15, 400)
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
    while len(times[name]) < rounds[0] or (time.perf_counter() - begin < seconds and len(times[name]) < rounds[1]):
        for name, run in candidates.items():
            run()
            start = time.perf_counter()
            for _ in range(calls[name]):
                run()
            times[name].append((time.perf_counter() - start) / calls[name])
    return {name: Timing.of(values) for name, values in times.items()}


class Roof:
    """Bytes a second that torch's copy moves (read and written) on all its threads, as long as it is measured."""

    def __init__(self) -> None:
        self._source = torch.ones(ROOF_BYTES // 4)
        self._target = torch.empty_like(self._source)
        self._seconds: list[float] = []

    def measure(self, calls: int = 8) -> None:
        self._target.copy_(self._source)
        for _ in range(calls):
            start = time.perf_counter()
            self._target.copy_(self._source)
            self._seconds.append(time.perf_counter() - start)

    @property
    def bytes_per_second(self) -> float:
        return 2 * ROOF_BYTES / statistics.median(self._seconds)


def arguments(doc: str | None, out: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=6.0, help="time a case, all candidates together")
    parser.add_argument("--only", default="", help="only the cases with this in their name")
    parser.add_argument("--out", type=Path, default=Path("bench/results") / out)
    return parser


def start(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    recycle_large_tensors()


def write(args: argparse.Namespace, benchmark: str, table: Table, **content: Any) -> None:
    """Show the table and write the record, whole or not at all."""
    console = Console()
    console.print(table)
    settings = {"threads": args.threads, "recycled_memory": True}
    with replacing(args.out, "w") as file:
        json.dump({"benchmark": benchmark, **environment(), "settings": settings, **content}, file, indent=1)
    console.print(f"{args.out} written")
