"""Training steps on two ranks, beside the same on one of them: DistributedDataParallel over gloo, one thread a rank.

Both processes go through all candidates in turn, round by round. For those of one rank the other waits without
computing. A rank's batch is the same in all (twice the examples on two ranks). Times are rank 0's, from one barrier to
its own end of the calls; gradients are averaged within them.

The model of cost for P ranks: a step takes the one rank's time and that of a ring all-reduce of all gradients after it,

    t(P) = t(1) + (P - 1) a + 2 (P - 1) / P * n / b

with n the gradients' bytes, and a and b from all-reduces of few and of many bytes on two ranks, where one takes
a + n / b. It assumes that every rank has cores of its own and a link as good as the one measured, and that nothing of
the all-reduce is hidden behind the backward pass. Masks cost no message: every rank makes the same from the same
weights.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import Empty
from typing import Any

import naive
import torch
import torch.distributed as dist
import torch.nn.functional as F
from bench_overhead import INTERVAL, MODELS, NEVER, Step, training_step
from timing import Timing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import pqk_fast as pqk
from pqk_fast.allocator import recycle_large_tensors
from pqk_fast.models import create_model

WORLD = 2
RANKS = (2, 4, 8, 64)  # that the model of cost is asked for
FEW, MANY = 1 << 10, 1 << 22  # fp32 numbers of an all-reduce
PATIENCE = 600.0  # seconds


def step_of(kind: str, name: str, batch: int, many: bool) -> Step:
    """A step of one rank alone, or of one of many."""
    torch.manual_seed(0)
    classes, _, shape = MODELS[name]
    model: nn.Module = create_model(name, classes)
    x, y = torch.randn(batch, *shape), torch.randint(classes, (batch,))
    after: Step = lambda: None  # noqa: E731
    if kind == "phase 1, ours":
        model = pqk.prepare(model, pqk.PQKConfig(initial_sparsity=0.9, sparsity=0.9, mask_interval=INTERVAL))
        after = pqk.Pruner(model, steps=NEVER, epoch_steps=347).step
    elif kind == "phase 1, naive":
        layers, count = naive.compress(model), 0
        naive.make_masks(layers)

        def after() -> None:
            nonlocal count
            count += 1
            if count % INTERVAL == 0:
                naive.make_masks(layers)

    wrapped = DistributedDataParallel(model, broadcast_buffers=False) if many else model

    def loss(module: nn.Module) -> Tensor:
        return F.cross_entropy(module(x), y)

    return training_step(wrapped, loss, after)


def candidates(rank: int, name: str, batch: int) -> dict[str, tuple[Step | None, int]]:
    """Each with the calls of a turn; None: this rank only waits."""
    made: dict[str, tuple[Step | None, int]] = {}
    for kind in ("plain", "phase 1, ours", "phase 1, naive"):
        alone = step_of(kind, name, batch, False) if rank == 0 else None
        made[f"{kind}, 1 rank"] = alone, 1
        made[f"{kind}, {WORLD} ranks"] = step_of(kind, name, batch, True), 1
    for label, count, calls in (("few", FEW, 20), ("many", MANY, 2)):
        made[f"all-reduce of {label}"] = partial(dist.all_reduce, torch.zeros(count)), calls
    return made


def work(rank: int, store: str, name: str, batch: int, rounds: int, answer: Any) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Grad strides do not match")  # layouts of gradients, in all candidates
    recycle_large_tensors()
    dist.init_process_group("gloo", store=dist.FileStore(store, WORLD), rank=rank, world_size=WORLD)
    made = candidates(rank, name, batch)
    times: dict[str, list[float]] = {key: [] for key in made}
    for number in range(rounds + 1):  # the first is not counted
        for key, (call, calls) in made.items():
            dist.barrier()
            start = time.perf_counter()
            if call is not None:
                for _ in range(calls):
                    call()
            if number:
                times[key].append((time.perf_counter() - start) / calls)
    dist.barrier()
    if rank == 0:
        answer.put(times)
    dist.destroy_process_group()


def in_ranks(name: str, batch: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each turn, by candidate. RuntimeError if a rank fails."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        answer = spawn.Queue()
        settings = str(Path(folder, "store")), name, batch, max(2, rounds), answer
        ranks = [spawn.Process(target=work, args=(rank, *settings), daemon=True) for rank in range(WORLD)]
        for process in ranks:
            process.start()
        try:
            return received(answer, ranks)
        finally:
            for process in ranks:
                process.join(timeout=10)
                process.kill()


def received(answer: Any, ranks: list[Any]) -> dict[str, list[float]]:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            times: dict[str, list[float]] = answer.get(timeout=1.0)
            return times
        except Empty:
            if failed := [number for number, process in enumerate(ranks) if process.exitcode]:
                raise RuntimeError(f"rank {failed[0]} ended with status {ranks[failed[0]].exitcode}") from None
    raise RuntimeError(f"no answer within {PATIENCE:g} s")


def cost_model(few: float, many: float, alone: float, gradient_bytes: int) -> dict[str, Any]:
    """``few`` and ``many``: ms of the two all-reduces; ``alone``: ms of a step on one rank."""
    ms_a_byte = max(0.0, (many - few) / (4 * (MANY - FEW)))
    latency = max(0.0, few - 4 * FEW * ms_a_byte)

    def predicted(ranks: int) -> float:
        return alone + (ranks - 1) * latency + 2 * (ranks - 1) / ranks * gradient_bytes * ms_a_byte

    return {
        "latency_us": round(1e3 * latency, 1),
        "mb_s": round(1e-3 / ms_a_byte, 1) if ms_a_byte else None,
        "gradient_bytes": gradient_bytes,
        "predicted_ms": {str(ranks): round(predicted(ranks), 2) for ranks in RANKS},
    }


def row(name: str, batch: int, rounds: int, run: Callable[..., dict[str, list[float]]] = in_ranks) -> dict[str, Any]:
    """A record's row: each candidate, and the model of cost of phase 1."""
    timings = {key: Timing.of(seconds) for key, seconds in run(name, batch, rounds).items()}
    weights = sum(p.numel() for p in create_model(name, MODELS[name][0]).parameters())
    cells: dict[str, Any] = {key: timing.as_json() for key, timing in timings.items()}
    medians = [timings[key].median for key in ("all-reduce of few", "all-reduce of many", "phase 1, ours, 1 rank")]
    return cells | {"model": cost_model(*medians, 4 * weights)}
