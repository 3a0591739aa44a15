"""The cases of the benchmarks without their timing: what a script declares, to be timed by something else."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from timing import Workload

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = ("fake_quant", "topk_mask", "int4", "dual_forward", "latency")


@dataclass(frozen=True)
class Listed:
    benchmark: str
    name: str
    make: Callable[[], Workload]
    arithmetic: str | None = None


@dataclass
class Listing:
    """Takes a Report's place in a script's ``declare``: keeps the cases."""

    device: str
    shrink: int = 1
    benchmark: str = ""
    found: list[Listed] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cases_of = self.device
        self.options = SimpleNamespace(shrink=self.shrink, threads=1, without=[])

    def size(self, full: int, least: int = 1) -> int:
        return max(least, full // self.shrink)

    def case(self, name: str, numel: int, moved: float, make: Callable[[], Workload], **about: Any) -> None:
        self.found.append(Listed(self.benchmark, name, make, about.get("arithmetic")))


def listed(device: str, shrink: int, benchmarks: Sequence[str] = KERNELS) -> list[Listed]:
    listing = Listing(device, shrink)
    for listing.benchmark in benchmarks:
        importlib.import_module(f"bench_{listing.benchmark}").declare(listing)
    return listing.found
