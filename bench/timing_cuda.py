"""How the benchmarks measure on a GPU: captured graphs, replayed, between two events.

A candidate is captured in one CUDA graph that uses it once on every set of inputs, and the graph is replayed: what
Python and launches cost does not count. The sets, whose results all stay alive within the graph, touch three times the
L2 cache before one comes again, so that a call finds its inputs in memory; small cases would take thousands of sets for
that, get 64, and their record says ``"l2_cold": false``. What waits for the host cannot be captured; it is then called
from Python and timed by the same events, and its record says ``"captured": false`` and why.
"""

from __future__ import annotations

import gc
import math
import shutil
import subprocess
import time
from typing import Any

import torch
from timing import SLOW, Call, Run

COLD = 3  # times the L2
MOST_SETS = 64
WARMUP = 3
QUERY = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")


class CudaTimer:
    """The current CUDA device."""

    turn, fewest = 5e-3, 3

    def __init__(self) -> None:
        self.l2_bytes = torch.cuda.get_device_properties().L2_cache_size
        # All work runs on one stream, which is not the default one: that cannot be captured, and what autograd has run
        # there would be waited for within a capture.
        torch.cuda.set_stream(torch.cuda.Stream())
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sets(self, moved: float) -> int:
        return min(MOST_SETS, max(1, math.ceil(COLD * self.l2_bytes / moved)))

    def prepare(self, calls: list[Call], capture: bool) -> Run:
        for number in range(max(WARMUP, len(calls))):
            start = time.perf_counter()
            calls[number % len(calls)]()
            torch.cuda.synchronize()
            if time.perf_counter() - start > SLOW and number + 1 >= len(calls):
                break

        def one_by_one() -> None:
            for call in calls:
                call()

        if not capture:
            return Run(one_by_one, len(calls), {"captured": False})
        try:
            graph = captured(calls)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            return Run(one_by_one, len(calls), {"captured": False, "not_captured_because": reason})
        return Run(graph.replay, len(calls), {"captured": True}, calls)

    def measure(self, call: Call, times: int, settle: bool) -> float:
        if settle:
            call()
        self._start.record()
        for _ in range(times):
            call()
        self._end.record()
        self._end.synchronize()
        return 1e-3 * self._start.elapsed_time(self._end) / times

    def about_case(self, touched: float) -> dict[str, Any]:
        return {"l2_cold": touched >= 2 * self.l2_bytes}

    def free(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def about_device(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties()
        return {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_mib": self.l2_bytes / 2**20,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "now": driver_report(str(properties.uuid)),
        }


def captured(calls: list[Call]) -> torch.cuda.CUDAGraph:
    """A graph that makes all the calls. RuntimeError if one of them waits for the host or cannot be captured."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # a failed capture leaves the random generators unusable: ask first
    try:
        calls[0]()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):  # the outer one also after an error
        results = [call() for call in calls]
    del results  # they had to live until here: with memory used again at once, writes would stay in the cache
    graph.replay()
    torch.cuda.synchronize()
    return graph


def driver_report(uuid: str) -> dict[str, str]:
    """What nvidia-smi says of the device's driver, clocks, power and temperature; it is asked only, nothing is set."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    command = [program, f"--id=GPU-{uuid}", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (subprocess.SubprocessError, OSError) as error:
        return {"error": str(error)}
    return dict(zip(QUERY, (value.strip() for value in found.split(",")), strict=False))
