"""How time and memory grow: with the number of weights, with the batch, with ranks.

    python bench/bench_scaling.py [--device cpu] [--threads 2] [--out bench/results/scaling.json]

"fake-quant" (forward and backward, identity) and "top-k" are those of bench_fake_quant.py and bench_topk_mask.py on one
tensor; "phase 1" is a training step without new masks of eight square linear layers, batch 64, against the plain
network's and naive.py's, eager and compiled. Sizes from 20 k to 1 G weights.

Where memory is short, a part of the state stands for all of it: one tensor, or eight layers, of as many weights as fit,
and times are multiplied accordingly ("part" in the record, the same for all candidates of a case). What is large enough
for that streams from memory weight by weight, so time is proportional; "phase 1, 20 M by a quarter" measures how well
that holds, the whole and the part in the same rounds.

"batch": phase 1 of res8-narrow by batch size. "memory": the most that a training step holds (memory.py). "ranks":
two_ranks.py, CPU only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import bench_fake_quant
import bench_topk_mask
import memory
import torch
import two_ranks
from bench_overhead import MODELS, NEVER, Steps
from networks import DEPTH, mlp, width_of
from report import Report
from timing import Workload

from pqk_fast.models import create_model

SIZES = {
    "20 k": 20_000,
    "200 k": 200_000,
    "2 M": 2_000_000,
    "20 M": 20_000_000,
    "200 M": 200_000_000,
    "1 G": 1_000_000_000,
}
# bytes a weight of all candidates of a case together: inputs, results and what stays between forward and backward
BYTES = {"fake-quant": 60, "top-k": 40, "phase 1": 250}
SHARE = 0.6  # of the memory that is free
BATCH = 64
BATCHES = (1, 4, 16, 64, 256)
MEMORY_SIZES = ("2 M", "20 M", "200 M")
STEP_BYTES = 50  # a weight, of the one step that needs most


def held(numel: int, bytes_each: int, device: str) -> int:
    """How many of so many weights fit into memory."""
    return min(numel, int(SHARE * memory.available(device) / bytes_each))


def in_part(work: Workload, part: float) -> Workload:
    return work if part == 1 else replace(work, parts=dict.fromkeys(work.candidates, part))


def fake_quant(numel: int, device: str) -> Workload:
    fits = held(numel, BYTES["fake-quant"], device)
    return in_part(bench_fake_quant.Case("", fits).workload(device), fits / numel)


def top_k(numel: int, device: str, cases_of: str) -> Workload:
    fits = held(numel, BYTES["top-k"], device)
    return in_part(bench_topk_mask.workload([fits], device, cases_of), fits / numel)


def stack(width: int, device: str) -> Steps:
    torch.manual_seed(0)
    x, y = torch.randn(BATCH, width, device=device), torch.randint(width, (BATCH,), device=device)
    return Steps(mlp(width), x, y, NEVER)


def compared(steps: Steps, compile_: bool) -> Workload:
    """Phase 1, ours and written by hand, beside the plain step."""
    every = steps.every(("two_pass",))
    ways = {
        "plain": lambda: every["plain"](False),
        "phase 1, ours": lambda: every["mask + fake-quant, ours"](False),
        "phase 1, naive": lambda: every["mask + fake-quant, naive"](False),
    }
    if compile_:
        ways["phase 1, ours, compiled"] = lambda: every["mask + fake-quant, ours"](True)
        ways["phase 1, naive, compiled"] = lambda: every["mask + fake-quant, naive"](True)
    return Workload(ways, lambda seed: (), uncaptured=list(ways), reference="plain", rotate=False)


def phase1(numel: int, device: str, compile_: bool) -> Workload:
    width = width_of(held(numel, BYTES["phase 1"], device))
    return in_part(compared(stack(width, device), compile_), DEPTH * width**2 / numel)


def part_for_whole(numel: int, device: str) -> Workload:
    """Whether a quarter of the weights takes a quarter of the time."""
    name = "phase 1, ours"
    whole, width, part = width_of(numel), width_of(numel // 4), f"{name}, a quarter"
    ways: dict[str, Callable[[], Callable[[], object]]] = {
        name: lambda: stack(whole, device).ours(True, True, False),
        part: lambda: stack(width, device).ours(True, True, False),
    }
    parts = {part: (width / whole) ** 2}
    return Workload(ways, lambda seed: (), uncaptured=list(ways), reference=name, rotate=False, parts=parts)


def by_batch(batch: int, device: str, compile_: bool) -> Workload:
    return compared(memory.steps_of("res8_narrow", batch, device), compile_)


def memory_row(network: str, batch: int, numel: int, device: str, threads: int, kinds: list[str]) -> dict[str, object]:
    """Peaks of each kind of step, one process after the other."""
    if numel * STEP_BYTES > (1 - (1 - SHARE) / 2) * memory.available(device):
        need, free = numel * STEP_BYTES / 2**30, memory.available(device) / 2**30
        raise_by_name = f"may take {need:.0f} GiB of the {free:.0f} that are free"
        return {kind: {"error": raise_by_name} for kind in kinds}
    row: dict[str, object] = {kind: memory.measured(network, batch, kind, device, threads) for kind in kinds}
    if device == "cpu" and "phase 1, ours" in row:
        row["phase 1, ours, recycled"] = memory.measured(network, batch, "phase 1, ours", device, threads, True)
    return row


def declare(report: Report) -> None:
    device, small = report.device, report.options.shrink > 1
    compile_ = "torch.compile" not in report.options.without
    sizes = {name: report.size(numel, 512) for name, numel in SIZES.items()}
    # in processes of their own, while this one is small
    kinds = ["plain", "phase 1, ours", "phase 1, naive", "phase 2, ours", "phase 2, naive"]
    peak = partial(memory_row, device=device, threads=report.options.threads, kinds=kinds[: 3 if small else None])
    for name in ("res8_narrow", "res8", "resnet20")[: 1 if small else None]:
        batch = report.size(MODELS[name][1], 2)
        weights = sum(p.numel() for p in create_model(name, MODELS[name][0]).parameters())
        report.elsewhere(f"memory, {name}", weights, partial(peak, name, batch, weights))
    for name in MEMORY_SIZES[: 1 if small else None]:
        width = width_of(sizes[name])
        weights = DEPTH * width**2
        report.elsewhere(f"memory, {name}", weights, partial(peak, str(width), BATCH, weights))
    for name, numel in sizes.items():
        report.case(f"fake-quant, {name}", numel, 18 * numel, partial(fake_quant, numel, device))
        report.case(f"top-k, {name}", numel, 5 * numel, partial(top_k, numel, device, report.cases_of))
    for name, numel in sizes.items():
        weights = DEPTH * width_of(numel) ** 2
        report.case(f"phase 1, {name}", weights, 0, partial(phase1, weights, device, compile_))
    report.case("phase 1, 20 M by a quarter", sizes["20 M"], 0, partial(part_for_whole, sizes["20 M"], device))
    narrow = sum(p.numel() for p in create_model("res8_narrow", MODELS["res8_narrow"][0]).parameters())
    for batch in BATCHES[: 2 if small else None]:
        report.case(f"batch {batch}, res8_narrow", narrow, 0, partial(by_batch, batch, device, compile_))
    if device == "cpu":
        batch, rounds = report.size(BATCH, 2), 3 if small else 25
        report.elsewhere("ranks, res8_narrow", narrow, partial(two_ranks.row, "res8_narrow", batch, rounds))


def main() -> int:
    settings = {"batch": BATCH, "layers": DEPTH, "share_of_memory": SHARE, "threads_a_rank": 1}
    report = Report(__doc__, "scaling", settings)
    declare(report)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
