"""Every operation once, small, against its definition: is anything wrong before time is spent on tests and figures?

    python bench/smoke.py [--device cuda]

Exit status 1 if a check fails; the others still run. The tests are the thorough ones.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from report import RUN_ERRORS
from torch import Tensor

import pqk_fast as pqk
from pqk_fast import native, ops, reference
from pqk_fast.models import create_model

BITS = 4


class WrongError(RuntimeError):
    """A result differs from its definition."""


def expect(right: bool | Tensor, what: str) -> None:
    if not right:
        raise WrongError(f"{what} is wrong")


def close(value: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """By the norm of the difference; NaN is never close."""
    value, expected = value.detach().cpu().double(), expected.detach().double()
    error = float((value - expected).norm() / expected.norm())
    expect(error <= tolerance, f"{what} (off by {error:.2g} of its norm, {tolerance:.2g} allowed)")


def layer(*shape: int, channels: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, mask and step on the CPU."""
    weight = torch.randn(shape)
    return weight, torch.rand(shape) < 0.5, 0.2 + 0.1 * torch.rand(channels)


def fake_quant(device: str) -> None:
    for channels in (1, 37):
        weight, mask, step = layer(37, 1023, channels=channels)
        for dtype in reference.WEIGHT_DTYPES:
            w = weight.to(dtype)
            out = ops.fake_quant(w.to(device), mask.to(device), step.to(device), BITS)
            expect(torch.equal(out.cpu(), reference.fake_quant(w, mask, step, BITS)), f"forward in {dtype}")
        for ste in reference.STE_MODES:
            w, s = (t.to(device).requires_grad_() for t in (weight, step))
            grad = torch.randn_like(weight)
            made = torch.autograd.grad(ops.fake_quant(w, mask.to(device), s, BITS, ste), (w, s), grad.to(device))
            truth = reference.fake_quant_backward(grad, weight, mask, step, BITS, ste)
            expect(torch.equal(made[0].cpu(), truth[0]), f"the weight's gradient ({ste})")
            close(made[1], truth[1], 1e-4, f"the step's gradient ({ste})")


def fake_quant_all(device: str) -> None:
    layers = [layer(n) for n in (1, 1023, 4097, 70_001)]
    moved = [[t.to(device) for t in each] for each in zip(*layers, strict=True)]
    for out, each in zip(ops.fake_quant_all(*moved, BITS), layers, strict=True):
        expect(torch.equal(out.cpu(), reference.fake_quant(*each, BITS)), f"a layer of {out.numel()}")


def dual(device: str, operation: Callable[..., Tensor], product: Callable[..., Tensor], x: Tensor, w: Tensor) -> None:
    _, mask, step = layer(*w.shape)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        leaves = [t.to(device).requires_grad_() for t in (x, w)]
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            out = operation(*leaves, mask.to(device), step.to(device), BITS)
        grad = torch.randn(out.shape)
        made = [out, *torch.autograd.grad(out, leaves, grad.to(device, out.dtype))]
        exact = [t.double().requires_grad_() for t in (x, reference.fake_quant(w, mask, step, BITS), w)]
        halves = zip(exact[0].chunk(2), exact[1:], strict=True)
        truth = torch.cat([product(half, weight) for half, weight in halves])
        grads = torch.autograd.grad(truth, exact, grad.double())
        expected = [truth, grads[0], torch.where(mask, grads[1], grads[2])]
        for name, value, right in zip(("result", "x's gradient", "weight's gradient"), made, expected, strict=True):
            close(value, right, tolerance, f"the {name} in {dtype}")


def dual_linear(device: str) -> None:
    for rows, inputs, outputs in ((2, 64, 64), (34, 129, 77), (256, 512, 256)):
        dual(device, ops.dual_linear, F.linear, torch.randn(rows, inputs), torch.randn(outputs, inputs))


def dual_conv2d(device: str) -> None:
    def product(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, padding=1)

    def operation(x: Tensor, weight: Tensor, mask: Tensor, step: Tensor, bits: int) -> Tensor:
        return ops.dual_conv2d(x, weight, mask, step, bits, padding=1)

    for layout in (torch.contiguous_format, torch.channels_last):
        x, weight = torch.randn(6, 19, 25, 13).contiguous(memory_format=layout), torch.randn(45, 19, 3, 3)
        dual(device, operation, product, x, weight)


def topk_mask(device: str) -> None:
    weights = [torch.randn(n).mul(8).round() for n in (1, 1023, 50_000)]  # with many ties
    total = sum(w.numel() for w in weights)
    for keep in (0, 1, total // 10, total):
        masks = [torch.zeros_like(w, dtype=torch.bool, device=device) for w in weights]
        ops.topk_mask_(masks, [w.to(device) for w in weights], torch.tensor(keep, device=device))
        for mask, right in zip(masks, reference.topk_mask(weights, torch.tensor(keep)), strict=True):
            expect(torch.equal(mask.cpu(), right), f"the selection of {keep}")


def group_mask(device: str) -> None:
    weight = torch.randn(33, 64, 3)
    expect(torch.equal(ops.group_mask(weight.to(device), 2, 4).cpu(), reference.group_mask(weight, 2, 4)), "2:4")


def packing(device: str) -> None:
    for bits in range(2, 9):
        q = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (10_007,), dtype=torch.int8)
        packed = ops.pack_ints(q.to(device), bits)
        expect(torch.equal(packed.cpu(), reference.pack_ints(q, bits)), f"packing of {bits} bits")
        expect(torch.equal(ops.unpack_ints(packed, len(q), bits).cpu(), q), f"unpacking of {bits} bits")
    mask = torch.rand(10_007) < 0.1
    packed = ops.pack_bits(mask.to(device))
    expect(torch.equal(packed.cpu(), reference.pack_bits(mask)), "packing of a mask")
    expect(torch.equal(ops.unpack_bits(packed, len(mask)).cpu(), mask), "unpacking of a mask")


def training(device: str) -> None:
    """Some steps of both phases; stacked and in two passes the full net and the student give the same."""
    model = pqk.prepare(create_model("res8_narrow", 12), pqk.PQKConfig(mask_interval=2)).to(device)
    x, y = torch.randn(8, 101, 40, device=device), torch.randint(12, (8,)).to(device)
    pruner = pqk.Pruner(model, 4, 1)
    optimizer = torch.optim.SGD(pqk.param_groups(model, 0.01), momentum=0.9)
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        pruner.step()
    kept = sum(int(mask.sum()) for name, mask in model.named_buffers() if name.endswith("weight_mask"))
    total = sum(mask.numel() for name, mask in model.named_buffers() if name.endswith("weight_mask"))
    expect(kept == total - int(0.9 * total), f"the number of kept weights, {kept} of {total},")
    pqk.start_phase2(model)
    loss = pqk.MutualDistillationLoss().to(device)
    loss(*pqk.dual_forward(model, x), y).backward()
    expect(all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters()), "a gradient")
    with torch.no_grad():
        for stacked, apart in zip(*(pqk.dual_forward(model, x, mode) for mode in ("stacked", "two_pass")), strict=True):
            close(stacked, apart.cpu(), 1e-3, "the stacked forward")


def capture(device: str) -> None:
    """A graph of what the benchmarks capture: forward and backward, with all that one call allocates."""
    if device == "cpu":
        return
    from timing_cuda import CudaTimer, captured

    CudaTimer()  # from here on all work is on a stream that can be captured
    weight, mask, step = (t.to(device) for t in layer(64, 1024))
    weight.requires_grad_()
    step.requires_grad_()
    results: list[tuple[Tensor, ...]] = []

    def call() -> tuple[Tensor, ...]:
        results[:] = [torch.autograd.grad(ops.fake_quant(weight, mask, step, BITS).square().sum(), (weight, step))]
        return results[0]

    before = [grad.clone() for grad in call()]
    graph = captured([call])
    for grad in results[0]:
        grad.zero_()
    graph.replay()
    for grad, right in zip(results[0], before, strict=True):
        close(grad, right.cpu(), 1e-4, "what a captured graph computes")


CHECKS = (fake_quant, fake_quant_all, dual_linear, dual_conv2d, topk_mask, group_mask, packing, training, capture)


def failures(device: str) -> Iterator[str]:
    for check in CHECKS:
        torch.manual_seed(0)
        start = time.perf_counter()
        try:
            check(device)
            verdict = "ok"
        except RUN_ERRORS as error:
            if not isinstance(error, WrongError):
                traceback.print_exception(error)
            verdict = f"FAILED: {error}"
            yield check.__name__
        print(f"{check.__name__}: {verdict} ({time.perf_counter() - start:.1f} s)", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}")
    for row in native.backends():
        if row.device == device:
            print(f"{row.operation} runs on {row.implementation} {row.why_not_faster}")
    return 1 if list(failures(device)) else 0


if __name__ == "__main__":
    sys.exit(main())
