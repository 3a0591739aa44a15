"""What memory there is, and the most that a training step holds, which a process of its own measures.

    python bench/memory.py --network res8 --batch 64 --step "phase 1, ours"

On the CPU the peak is that of the process's resident memory (VmHWM, reset after three steps) over five steps, less what
was resident before the network was made; by then one step of a small network has loaded all libraries. malloc keeps its
defaults, so that freed tensors are returned and the peak is what a step needs, unless ``--recycle``. On a GPU it is the
peak of torch's allocated bytes over the same five steps. Prints MiB as JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_overhead import MODELS, Steps
from networks import mlp

from pqk_fast.allocator import recycle_large_tensors
from pqk_fast.models import create_model

MEMINFO, STATUS, CLEAR = (Path("/proc") / name for name in ("meminfo", "self/status", "self/clear_refs"))
WARM_UP, STEPS = 3, 5


def field(path: Path, name: str) -> int:
    """A field of a file of /proc, in bytes."""
    for line in path.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"{path} has no {name}: memory is measured on Linux only")


def available(device: str) -> int:
    """Bytes that a benchmark may still take."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        return field(MEMINFO, "MemAvailable")
    except OSError:  # not Linux
        return 8 << 30


def resident() -> int:
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    return field(STATUS, "VmRSS")


def steps_of(network: str, batch: int, device: str) -> Steps:
    """``network``: one of bench_overhead's, or the width of :func:`networks.mlp`."""
    torch.manual_seed(0)
    if network in MODELS:
        classes, _, shape = MODELS[network]
        plain = create_model(network, classes)
    else:
        classes, shape = int(network), (int(network),)
        plain = mlp(classes)
    x, y = torch.randn(batch, *shape, device=device), torch.randint(classes, (batch,), device=device)
    return Steps(plain, x, y)


def makers(steps: Steps) -> dict[str, Callable[[], Any]]:
    """The steps whose memory is measured. No compiled ones: what the compiler itself leaves behind would count."""
    return {
        "plain": lambda: steps.every(("two_pass",))["plain"](False),
        "phase 1, ours": partial(steps.ours, True, True, False),
        "phase 1, naive": partial(steps.naive, True, True, False),
        "phase 2, ours": partial(steps.ours_phase2, "two_pass", False),
        "phase 2, naive": partial(steps.naive_phase2, False),
    }


def peak(network: str, batch: int, what: str, device: str) -> float:
    """MiB."""
    makers(steps_of("res8_narrow", 2, device))[what]()()
    before = torch.cuda.memory_allocated() if device == "cuda" else resident()
    steps = steps_of(network, batch, device)
    step = makers(steps)[what]()
    steps.plain = torch.nn.Identity()  # the step has a copy of its own
    for _ in range(WARM_UP):
        step()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        resident()
        CLEAR.write_text("5")  # the kernel's way to reset VmHWM
    for _ in range(STEPS):
        step()
    most = torch.cuda.max_memory_allocated() if device == "cuda" else field(STATUS, "VmHWM")
    return round((most - before) / 2**20, 1)


def measured(network: str, batch: int, what: str, device: str, threads: int, recycle: bool = False) -> dict[str, Any]:
    """A record's entry: the peak in a process of its own, or its error."""
    command = [sys.executable, __file__, "--network", network, "--batch", str(batch), "--step", what]
    command += ["--device", device, "--threads", str(threads), *(["--recycle"] if recycle else [])]
    # OMP_NUM_THREADS before the start: threads' own stacks and heaps count, too
    child = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, check=False
    )
    if child.returncode:
        lines = child.stderr.strip().splitlines() or [f"ended with status {child.returncode}, as if out of memory"]
        return {"error": lines[-1][:300]}
    return {"peak_mib": json.loads(child.stdout.splitlines()[-1])}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", required=True, help=f"{', '.join(MODELS)}, or the width of a stack of layers")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--step", default="phase 1, ours")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--recycle", action="store_true", help="let malloc keep freed memory, as the trainer does")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.recycle:
        recycle_large_tensors()
    print(json.dumps(peak(args.network, args.batch, args.step, args.device)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
