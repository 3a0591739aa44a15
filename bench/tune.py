"""Searches launch choices on the GPU at hand: what stands in ``triton_kernels/launch.py`` comes from its tables.

    python bench/tune.py [--only forward] [--out bench/results/tune-cuda.json]

Each candidate is a choice: tiles, warps, stages, and among how many programs the depth is divided. "now" is what
launch.py says. A choice that does not compile, or does not fit, is recorded with its error. All of it compiles more
than a thousand kernels: choose a part by --only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import torch
from report import Report
from timing import Bind, Call, Workload
from torch import Tensor

from pqk_fast.triton_kernels import launch

BITS = 4


@contextmanager
def chosen(choices: dict[str, Any]) -> Iterator[None]:
    """Functions of launch.py answer with these, whatever they are asked."""
    before = {name: getattr(launch, name) for name in choices}
    for name, choice in choices.items():
        setattr(launch, name, lambda *args, choice=choice: choice)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(launch, name, function)


def with_choice(choices: dict[str, Any], run: Callable[..., Any]) -> Bind:
    def bind(*inputs: Any) -> Call:
        def call() -> Any:
            with chosen(choices):
                return run(*inputs)

        return call

    return bind


def layer(device: str, outs: int, ins: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.randn(outs, ins, generator=generator, device=device).to(dtype)
    mask = torch.rand(outs, ins, generator=generator, device=device) > 0.9
    return weight, mask, torch.full((1,), 0.3, device=device)


def element_wise(report: Report, dtype: torch.dtype) -> None:
    from pqk_fast.triton_kernels import fake_quant

    size, vector = dtype.itemsize, launch.LOAD_BYTES // dtype.itemsize
    outs, ins = report.size(8192), report.size(8192)

    def tile(warps: int, each: int) -> launch.Tile:
        width = warps * launch.WARP * vector
        return launch.Tile(each * warps * launch.WARP // width, width, warps, vector)

    tiles = {
        f"{warps} warps, {each} weights a thread": {"element_wise": tile(warps, each)}
        for warps, each in product((2, 4, 8), (8, 16, 32))
        if each >= vector
    }

    def forward(weight: Tensor, mask: Tensor, step: Tensor) -> Tensor:
        return fake_quant.fake_quant(weight, mask, step, BITS, dtype)

    def backward(clipped: bool, weight: Tensor, mask: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        return fake_quant.fake_quant_backward(weight, weight, mask, step, BITS, clipped, False, clipped, True)

    runs = {
        "forward": (forward, 2 * size + 1),
        "backward": (partial(backward, False), 2 * size + 1),
        "backward clipped": (partial(backward, True), 3 * size + 1),
    }
    for name, (run, each) in runs.items():
        candidates = {"now": with_choice({}, run)} | {key: with_choice(value, run) for key, value in tiles.items()}
        work = partial(Workload, candidates, partial(layer, report.device, outs, ins, dtype), agrees, reference="now")
        report.case(f"fake_quant {name}, {outs * ins} weights, {dtype}", outs * ins, each * outs * ins, work)


def products(report: Report, rows: int, arithmetic: str) -> None:
    from pqk_fast.triton_kernels import dual_forward

    dtype = torch.bfloat16 if arithmetic == "bf16" else torch.float32
    outs = ins = report.size(4096, 64)

    def inputs(seed: int) -> tuple[Tensor, ...]:
        x = torch.randn(2 * rows, ins, device=report.device).to(dtype)
        return x, x.clone(), *layer(report.device, outs, ins, torch.float32, seed)

    def forward(x: Tensor, grad: Tensor, *weights: Tensor) -> Tensor:
        return dual_forward.dual_linear(x, *weights, BITS, None, False)

    def backward(needs: tuple[bool, bool], x: Tensor, grad: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return dual_forward.dual_linear_backward(grad, x, *weights, BITS, False, False, *needs)

    tall = sorted({min(launch.next_power_of_2(max(rows, 16)), 128), 16, 64} & set(range(max(rows, 16) + 1)))
    shapes = [
        launch.Product(m, n, k, warps, stages)
        for m, n, k, warps, stages in product(tall, (64, 128), (32, 64), (4, 8), (2, 4))
        if m * n <= 128 * 64
    ]
    with_weight = {
        f"{s}, {splits} splits": {"dual_product": s, "splits": splits} for s, splits in product(shapes, (1, 4, 8))
    }
    of_weight = {str(s): {"dual_weight_gradient": s} for s in shapes}
    item, flop = dtype.itemsize, 4.0 * rows * outs * ins
    moved = 5 * outs * ins + 2 * rows * item * (ins + outs)
    runs: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "forward": (forward, with_weight),
        "dx": (partial(backward, (True, False)), with_weight),
        "dw": (partial(backward, (False, True)), of_weight),
    }
    for name, (run, choices) in runs.items():
        candidates = {"now": with_choice({}, run)} | {key: with_choice(value, run) for key, value in choices.items()}
        case = f"dual_linear {name}, B = {rows}, {outs}x{ins}, {arithmetic}"
        work = partial(Workload, candidates, inputs, agrees, reference="now")
        report.case(case, outs * ins, moved, work, flop=flop, arithmetic=arithmetic)


def agrees(result: Any, truth: Any, inputs: Any) -> str | None:
    """A choice changes no more than the order of sums."""
    pairs = zip(*map(torch.utils._pytree.tree_leaves, (result, truth)), strict=True)
    errors = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs if b.numel()]
    return None if all(error < 1e-2 for error in errors) else f"results differ by {max(errors):.2g} of their norm"


def convolutions(report: Report, arithmetic: str) -> None:
    """A layer of res8, 64 images a half."""
    from pqk_fast.triton_kernels import dual_conv2d, dual_conv2d_backward

    images, dtype = report.size(64, 1), torch.bfloat16 if arithmetic == "bf16" else torch.float32
    shape = ([1, 1], [1, 1], [1, 1], 1)

    def inputs(seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(report.device).manual_seed(seed)
        x = torch.randn(2 * images, 45, 25, 13, generator=generator, device=report.device).to(dtype)
        weight, mask, step = layer(report.device, 45, 405, torch.float32, seed)
        return x, x.clone(), weight.view(45, 45, 3, 3), mask.view(45, 45, 3, 3), step

    def forward(x: Tensor, grad: Tensor, *weights: Tensor) -> Tensor:
        return dual_conv2d.dual_conv2d(x, *weights, BITS, None, *shape, False)

    def backward(needs: tuple[bool, bool], x: Tensor, grad: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return dual_conv2d_backward.dual_conv2d_backward(grad, x, *weights, BITS, *shape, False, False, *needs)

    tile = launch.convolution(45, 45, 9, arithmetic == "fp32")
    changes = [
        {"BM": m, "BK": k, "CHANNELS": launch.channels_at_once(45, 9, k), "num_warps": warps, "num_stages": stages}
        for m, k, warps, stages in product((32, 64, 128), (16, 32), (4, 8), (1, 2, 3))
    ]
    tiles = {str(change): {"convolution": {**tile, **change}} for change in changes}
    sums = {
        f"{change}, {splits} splits": {"convolution_gradient": ({**base, **change}, splits)}
        for base, _ in [launch.convolution_gradient(images * 325, 45, 405, dtype.itemsize, 132)]
        for change in ({"BR": r, "num_warps": warps} for r, warps in product((16, 32, 64), (4, 8)))
        for splits in (8, 16, 32, 64)
    }
    runs: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "forward": (forward, tiles),
        "dx": (partial(backward, (True, False)), tiles),
        "dw": (partial(backward, (False, True)), sums),
    }
    weights, flop = 45 * 405, 4.0 * images * 325 * 45 * 405
    moved = 4 * images * 325 * 45 * dtype.itemsize + 5 * weights
    for name, (run, choices) in runs.items():
        candidates = {"now": with_choice({}, run)} | {key: with_choice(value, run) for key, value in choices.items()}
        work = partial(Workload, candidates, inputs, agrees, reference="now")
        report.case(f"dual_conv2d {name} of res8, {arithmetic}", weights, moved, work, flop=flop, arithmetic=arithmetic)


def main() -> int:
    report = Report(__doc__, "tune", {"bits": BITS}, seconds=4.0)
    for dtype in (torch.float32, torch.bfloat16):
        element_wise(report, dtype)
    for rows, arithmetic in product((16, 64, 256), ("bf16", "tf32")):
        products(report, rows, arithmetic)
    for arithmetic in ("tf32", "bf16", "fp32"):
        convolutions(report, arithmetic)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
