"""How the benchmarks measure: candidates take turns in one process, and the machine's copy speed is measured with them.

A candidate is called in rounds, one call each in turn, so that a busy machine slows all of them alike; given are the
median and the quartiles. Memory is recycled (see pqk_fast.allocator): otherwise page faults, not operations, are timed.
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

WARMUP = 5
ROOF_BYTES = 256 << 20  # larger than any cache


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: median and quartiles of ``n`` calls."""

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
    candidates: dict[str, Callable[[], Any]],
    seconds: float = 6.0,
    rounds: tuple[int, int] = (15, 400),
    slow: frozenset[str] = frozenset(),
) -> dict[str, Timing]:
    """Time every candidate; about ``seconds`` for all, within ``rounds``. Those in ``slow`` run every eighth round."""
    for _ in range(WARMUP):
        start = time.perf_counter()
        for run in candidates.values():
            run()
        turn = time.perf_counter() - start
    count = min(max(int(seconds / turn), rounds[0]), rounds[1])
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(count):
        for name, run in candidates.items():
            if name in slow and index % 8:
                continue
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: Timing.of(values) for name, values in times.items()}


def copy_candidate() -> Callable[[], Any]:
    """A copy of ``ROOF_BYTES`` by torch, on all its threads: reads and writes as many bytes."""
    source = torch.ones(ROOF_BYTES // 4)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def bytes_per_second(timing: Timing) -> float:
    """The roof that a timing of :func:`copy_candidate` gives."""
    return 2 * ROOF_BYTES / (timing.median / 1e3)


def arguments(doc: str | None, out: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=6.0, help="time a case, all candidates together")
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
