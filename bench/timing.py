"""What a case of a benchmark is, how its candidates take turns, and the host's clock.

Candidates are called in rounds, each in its turn, so that a busy machine slows all of them alike. A turn is one call
that is not timed, so that each finds the caches as it leaves them, and then as many as take 10 ms (5 on a GPU): their
mean counts. Given are the median of the turns and the quartiles. How a GPU is timed stands in timing_cuda.py.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

Call = Callable[[], Any]
Bind = Callable[..., Call]

ROUNDS = (11, 400)
SLOW = 0.1  # seconds: what takes longer neither needs warm caches nor gets them


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


@dataclass(frozen=True)
class Workload:
    """The candidates of one case, and their inputs.

    A candidate takes one set of inputs and gives the call that is timed. ``inputs(seed)`` makes a set; a GPU gets
    several, and uses them in turn, unless ``rotate`` is False. ``check(result, truth, inputs)`` says what is wrong with
    a result (None: nothing), compared with that of ``reference``, which comes first; ``unchecked`` compute something
    else and say so in their names. ``uncaptured`` are to be called from Python on a GPU, too. ``parts``: candidates
    whose call does only so much of the work (a part of 1), because memory is short; their times are divided by it.
    """

    candidates: Mapping[str, Bind]
    inputs: Callable[[int], tuple[Any, ...]]
    check: Callable[[Any, Any, tuple[Any, ...]], str | None] | None = None
    unchecked: Collection[str] = ()
    uncaptured: Collection[str] = ()
    reference: str = "pqk_fast"
    rotate: bool = True
    parts: Mapping[str, float] = field(default_factory=dict)


def called(function: Callable[..., Any]) -> Bind:
    """The candidate that calls ``function`` with the inputs as they are."""
    return lambda *inputs: partial(function, *inputs)


@dataclass(frozen=True)
class Run:
    """A candidate, ready to be timed: ``call`` uses it ``uses`` times, or a part of once (Workload.parts); ``about``
    goes into the record.

    ``keeps`` is what must stay alive meanwhile: a captured graph knows addresses only.
    """

    call: Call
    uses: float = 1
    about: dict[str, Any] = field(default_factory=dict)
    keeps: list[Call] = field(default_factory=list)


class Timer(Protocol):
    """How one kind of device is timed."""

    turn: float  # seconds that a turn takes, where a call takes less
    fewest: int  # turns that a candidate gets even if they take long

    def sets(self, moved: float) -> int:
        """How many sets of inputs to rotate, if one call moves so many bytes."""
        ...

    def prepare(self, calls: list[Call], capture: bool) -> Run:
        """Warm up; ``calls`` is the same candidate for each set of inputs."""
        ...

    def measure(self, call: Call, times: int, settle: bool) -> float:
        """Mean seconds of ``times`` calls, after one that is not timed (``settle``)."""
        ...

    def about_case(self, touched: float) -> dict[str, Any]:
        """For the record of a case that touches so many bytes in a round of its inputs."""
        ...

    def free(self) -> None:
        """Called before each case."""
        ...

    def about_device(self) -> dict[str, Any]:
        """For the record: what the device is and how it is set now."""
        ...


class HostTimer:
    """The CPU: one set of inputs, Python calls, the host's clock."""

    turn, fewest, warmup = 10e-3, ROUNDS[0], 2

    def sets(self, moved: float) -> int:
        return 1

    def prepare(self, calls: list[Call], capture: bool) -> Run:
        for _ in range(self.warmup):
            calls[0]()
        return Run(calls[0])

    def measure(self, call: Call, times: int, settle: bool) -> float:
        if settle:
            call()
        start = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - start) / times

    def about_case(self, touched: float) -> dict[str, Any]:
        return {}

    def free(self) -> None:
        pass

    def about_device(self) -> dict[str, Any]:
        return {}


def take_turns(
    runs: Mapping[str, Run], timer: Timer, seconds: float, fewest_rounds: int = ROUNDS[0]
) -> dict[str, Timing]:
    """Time every candidate in turn; about ``seconds`` for all together, and no more than that for a slow one."""
    once = {name: timer.measure(run.call, 1, True) for name, run in runs.items()}
    calls = {name: max(1, int(timer.turn / each)) for name, each in once.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    spent = dict.fromkeys(runs, 0.0)
    begin = time.perf_counter()
    for round_ in range(ROUNDS[1]):
        if round_ >= fewest_rounds and time.perf_counter() - begin > seconds:
            break
        for name, run in runs.items():
            if spent[name] > max(seconds, 1.0) and len(times[name]) >= timer.fewest:
                continue
            start = time.perf_counter()
            times[name].append(timer.measure(run.call, calls[name], once[name] < SLOW) / run.uses)
            spent[name] += time.perf_counter() - start
    return {name: Timing.of(values) for name, values in times.items()}
