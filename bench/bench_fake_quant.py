"""Forward + backward of masked fake-quantization with a learnable step size, on the CPU.

    python bench/bench_fake_quant.py [--threads 2] [--out bench/results/fake_quant.json]

Sizes from one layer of res8-narrow to 64 M weights, 90 % of them pruned, 4 bits. Against: the same equations in eager
PyTorch with autograd, torch's own ``_fake_quantize_learnable_per_tensor_affine`` (with the mask applied before it), and
torch.compile of the same equations. Then all layers of res8-narrow at once.

Phase 1 takes the identity estimator: the weight's gradient is the incoming one, and a weight moves 18 bytes (forward
reads 4 + 1 for the mask and writes 4, backward reads 4 for the gradient + 4 + 1). "clipped" is LSQ's estimator with the
gradient masked, which writes 4 more. The share of the roof is these bytes a second against those of torch's copy of
256 MiB in the same rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timing import Report
from torch import Tensor

from pqk_fast import ops
from pqk_fast.models import create_model

BITS, Q = 4, 7
SIZES = {"res8-narrow layer": 3249, "64 k": 1 << 16, "1 M": 1 << 20, "4 M": 1 << 22, "16 M": 1 << 24, "64 M": 1 << 26}


def clipped(weight: Tensor, mask: Tensor, step: Tensor) -> Tensor:
    """Masked LSQ as it is usually written: autograd derives the gradients, straight-through by ``detach``."""
    v = torch.clamp(torch.where(mask, weight, 0.0) / step, -Q, Q)
    return (v + (v.round() - v).detach()) * step


class Identity(torch.autograd.Function):
    """The paper's estimator as it is usually written: the weight's gradient is the incoming one."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, step: Tensor) -> Tensor:
        ctx.save_for_backward(weight, mask, step)
        return torch.clamp(torch.where(mask, weight, 0.0) / step, -Q, Q).round() * step

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        weight, mask, step = ctx.saved_tensors
        v = torch.where(mask, weight, 0.0) / step
        slope = torch.where(v.abs() < Q, v.round() - v, v.clamp(-Q, Q))
        return grad, None, (grad * slope).sum().reshape(step.shape)


def naive(weight: Tensor, mask: Tensor, step: Tensor, ste: str = "identity") -> Tensor:
    out: Tensor = Identity.apply(weight, mask, step) if ste == "identity" else clipped(weight, mask, step)
    return out


def torchs_own(weight: Tensor, mask: Tensor, step: Tensor) -> Tensor:
    zero = torch.zeros_like(step)
    return torch._fake_quantize_learnable_per_tensor_affine(torch.where(mask, weight, 0.0), step, zero, -Q, Q, 1.0)


def forward_backward(function: Callable[..., Tensor], weight: Tensor, mask: Tensor, step: Tensor) -> Callable:
    w, s = weight.clone().requires_grad_(), step.clone().requires_grad_()
    grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    return lambda: torch.autograd.grad(function(w, mask, s), (w, s), grad)


def inputs(numel: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(numel, generator=generator)
    mask = torch.rand(numel, generator=generator) > 0.9
    return weight, mask, torch.full((1,), 0.3)


def checked(candidates: dict[str, Callable]) -> dict[str, Callable]:
    """No figure for a candidate that computes something else (torch's own has no other estimator than the clipped)."""
    truth = candidates["pqk_fast"]()
    for name in ("eager", "torch.compile"):
        for value, expected in zip(candidates[name](), truth, strict=True):
            # w / S and w (1 / S) may round to different levels, one weight in many
            wrong = (value - expected).abs() > 1e-3 * expected.abs().max()
            assert wrong.sum() <= 1 + 1e-4 * wrong.numel(), f"{name} computes something else"
    return candidates


def whole_model() -> dict[str, Callable]:
    model = create_model("res8_narrow", 12)
    layers = [inputs(p.numel(), i) for i, p in enumerate(model.parameters()) if p.dim() > 1]
    weights = [w.requires_grad_() for w, _, _ in layers]
    masks = [m for _, m, _ in layers]
    steps = [s.requires_grad_() for _, _, s in layers]
    grads = [torch.randn_like(w) for w in weights]

    def run(function: Callable[..., list[Tensor]]) -> Callable:
        return lambda: torch.autograd.grad(function(weights, masks, steps), [*weights, *steps], grads)

    def each(function: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
        return lambda *lists: [function(*layer) for layer in zip(*lists, strict=True)]

    candidates = {
        "pqk_fast": run(lambda *lists: ops.fake_quant_all(*lists, BITS)),
        "pqk_fast, layer by layer": run(each(lambda *layer: ops.fake_quant(*layer, BITS))),
        "eager": run(each(naive)),
        "torch.compile": run(torch.compile(each(naive))),
        "torch's own (clipped)": run(each(torchs_own)),
    }
    return checked(candidates)


def one_layer(numel: int, ste: str) -> dict[str, Callable]:
    layer = inputs(numel)
    naive_ste = partial(naive, ste=ste)
    ours = partial(ops.fake_quant, bits=BITS, ste=ste, mask_gradients=ste == "clipped")
    functions = {"pqk_fast": ours, "eager": naive_ste, "torch.compile": torch.compile(naive_ste)}
    functions["torch's own (clipped)"] = torchs_own
    return checked({name: forward_backward(function, *layer) for name, function in functions.items()})


def main() -> None:
    report = Report(__doc__, "fake_quant")
    for name, numel in SIZES.items():
        for ste, moved in (("identity", 18), ("clipped", 22)):
            report.case(f"{name}, {ste}", numel, moved * numel, partial(one_layer, numel, ste))
    narrow = sum(p.numel() for p in create_model("res8_narrow", 12).parameters() if p.dim() > 1)
    report.case("res8-narrow, all layers", narrow, 18 * narrow, whole_model)
    report.finish(bits=BITS)


if __name__ == "__main__":
    main()
