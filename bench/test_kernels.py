"""Ours, eager PyTorch and torch.compile on every kernel's cases, timed by pytest-benchmark.

    pytest bench [--shrink 64] [--without torch.compile] [-k topk_mask] [--benchmark-autosave] [--benchmark-compare]

The cases are those of ``bench_*.py``. Candidates do not take turns here, so a busy machine may slow one and not the
others: figures that are stated anywhere come from ``pqk-fast bench``. A result that is not ours fails; what cannot run
is skipped with its error.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from listing import DEVICE, Listed
from report import RUN_ERRORS, described
from roofs import arithmetic_of
from timing import HostTimer, Timer, Workload

from pqk_fast.allocator import recycle_large_tensors


def timer() -> Timer:
    if DEVICE == "cpu":
        return HostTimer()
    from timing_cuda import CudaTimer

    return CudaTimer()


@lru_cache(maxsize=1)  # the cases may be large; a case's candidates come one after the other
def prepared(case: Listed) -> tuple[Workload, list[tuple[Any, ...]], Any]:
    """The workload, its inputs and our result."""
    recycle_large_tensors()
    torch.compiler.reset()
    work = case.make()
    sets = [work.inputs(0)]
    return work, sets, work.candidates[work.reference](*sets[0])()


def waited_for(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> None:
        call()
        torch.cuda.synchronize()

    return call if DEVICE == "cpu" else run


def test_kernel(case: Listed, candidate: str, benchmark: Any) -> None:
    with arithmetic_of(case.arithmetic or "fp32", DEVICE):
        work, sets, truth = prepared(case)
        if candidate not in work.candidates:
            pytest.skip(f"has no {candidate}")
        try:
            calls = [work.candidates[candidate](*each) for each in sets]
            result = calls[0]()
            run = timer().prepare(calls, candidate not in work.uncaptured)
        except RUN_ERRORS as error:
            if candidate == work.reference:
                raise
            pytest.skip(described(error))
        if work.check and candidate != work.reference and candidate not in work.unchecked:
            assert (problem := work.check(result, truth, sets[0])) is None, problem
        benchmark.group = f"{case.benchmark}: {case.name}"
        benchmark.extra_info.update({"candidate": candidate, "device": DEVICE, **run.about})
        benchmark(waited_for(run.call))
