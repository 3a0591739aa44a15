"""Benchmarks of all sizes: parts that stand for the whole, memory, ranks, and kernels under pytest-benchmark."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from cases import package
from test_bench import ROOT, report_of


def test_a_part_stands_for_the_whole(bench: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    timing, scaling = bench("timing"), bench("bench_scaling")
    monkeypatch.setattr(scaling.memory, "available", lambda device: 1000)
    assert scaling.held(5, 100, "cpu") == 5
    assert scaling.held(50, 100, "cpu") == 6  # 60 % of the memory

    def nap() -> None:
        time.sleep(2e-3)

    work = timing.Workload({"pqk_fast": lambda: nap}, lambda seed: ())
    report = report_of(bench, monkeypatch, tmp_path / "trial.json")
    report.case("whole", 1, 0, lambda: scaling.in_part(work, 1))
    report.case("part", 1, 0, lambda: scaling.in_part(work, 0.125))
    whole, part = (report.cases[name]["pqk_fast"] for name in ("whole", "part"))
    assert "part" not in whole
    assert part["part"] == 0.125
    assert part["median_ms"] >= 16.0  # eight times 2 ms
    assert whole["median_ms"] < 16.0


def test_cases_of_all_sizes(bench: Callable) -> None:
    scaling, listing = bench("bench_scaling"), bench("listing")
    found = listing.Listing("cpu", shrink=1024)
    found.elsewhere = lambda name, numel, measure: found.case(name, numel, 0, measure)
    scaling.declare(found)
    names = [case.name for case in found.found]
    assert len(set(names)) == len(names)
    assert {f"{kind}, {size}" for kind in ("fake-quant", "top-k", "phase 1") for size in scaling.SIZES} <= set(names)
    work = scaling.phase1(8 * 16**2, "cpu", False)
    for bind in work.candidates.values():
        bind()()
    assert work.parts == {}


def test_the_peak_of_a_step_is_its_tensors(bench: Callable) -> None:
    """Eight layers of 768 x 768: 18 MiB each of weights, gradients and momentum; besides, at most one more such copy
    (of the optimizer) and what the allocator rounds up."""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    found = bench("memory").measured("768", 2, "plain", "cpu", 1)
    assert 54 <= found["peak_mib"] <= 54 + 18 + 4
    assert "error" in bench("memory").measured("768", 2, "nosuch", "cpu", 1)


def test_the_model_of_cost(bench: Callable) -> None:
    ranks = bench("two_ranks")
    few, many = 0.1 + 4e-6 * ranks.FEW, 0.1 + 4e-6 * ranks.MANY  # 0.1 ms, and 1 GB/s
    model = ranks.cost_model(few, many, 10.0, 8_000_000)
    assert model["latency_us"] == pytest.approx(100)
    assert model["mb_s"] == pytest.approx(1000)
    assert model["predicted_ms"] == {"2": 10 + 0.1 + 8, "4": 10 + 0.3 + 12, "8": 10 + 0.7 + 14, "64": 10 + 6.3 + 15.75}


def test_a_rank_that_fails_is_named(bench: Callable) -> None:
    ranks = bench("two_ranks")
    dead = [SimpleNamespace(exitcode=None), SimpleNamespace(exitcode=-9)]

    class Nothing:
        def get(self, timeout: float) -> None:
            raise ranks.Empty

    with pytest.raises(RuntimeError, match="rank 1 ended with status -9"):
        ranks.received(Nothing(), dead)


def test_kernels_under_pytest_benchmark() -> None:
    package("pytest_benchmark")
    options = ["--shrink", "4096", "-k", "pack_bits and res8 and not compile", "--benchmark-disable"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "bench", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout
