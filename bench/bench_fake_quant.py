"""Masked fake-quantization with a learnable step size: forward and backward.

    python bench/bench_fake_quant.py [--device cpu] [--threads 2] [--out bench/results/fake_quant.json]

Sizes from one layer of res8-narrow to 64 M weights (on a GPU 1 M to 64 M), 90 % of them pruned, 4 bits. Against: the
same equations in eager PyTorch with autograd, torch's own ``_fake_quantize_learnable_per_tensor_affine`` or
``_per_channel_affine`` (with the mask applied before it), and torch.compile of the same equations. Then all layers of
whole networks at once.

Phase 1 takes the identity estimator: the weight's gradient is the incoming one, and a weight moves 18 bytes (forward
reads 4 + 1 for the mask and writes 4, backward reads 4 for the gradient + 4 + 1). "clipped" is LSQ's estimator with the
gradient masked, which writes 4 more. The share of the roof is these bytes a second against those of torch's copy of
256 MiB (512 on a GPU) in the same rounds. A GPU also gets each direction alone, a step size for each channel, and bf16
weights (half of all but the mask's byte).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch._functorch.config
from report import Report
from timing import Bind, Workload
from torch import Tensor

from pqk_fast import ops
from pqk_fast.models import create_model

BITS, Q = 4, 7
CPU_SIZES = {
    "res8-narrow layer": 3249,
    "64 k": 1 << 16,
    "1 M": 1 << 20,
    "4 M": 1 << 22,
    "16 M": 1 << 24,
    "64 M": 1 << 26,
}
CPU_MODELS = {"res8_narrow": 12}
GPU_MODELS = {"res8_narrow": 12, "res8": 12, "resnet32": 100}
CHANNELS = 4096  # of a weight with a step size for each
TARGETS = {"forward": {"of_roof": 0.90}, "backward": {"of_roof": 0.85}}

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def clipped(weight: Tensor, mask: Tensor, step: Tensor) -> Tensor:
    """Masked LSQ as it is usually written: autograd derives the gradients, straight-through by ``detach``."""
    v = torch.clamp(torch.where(mask, weight, 0.0) / along(step, weight), -Q, Q)
    return rounded_to((v + (v.round() - v).detach()) * along(step, weight), weight.dtype)


def rounded_to(values: Tensor, dtype: torch.dtype) -> Tensor:
    """torch.compile loses the gradient of an autograd.Function whose forward ends in a .to() that changes nothing."""
    return values if values.dtype == dtype else values.to(dtype)


def along(step: Tensor, weight: Tensor) -> Tensor:
    """The step size of each channel, or of all, as it broadcasts against the weight."""
    return step.reshape(-1, *[1] * (weight.dim() - 1))


class Identity(torch.autograd.Function):
    """The paper's estimator as it is usually written: the weight's gradient is the incoming one."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, step: Tensor) -> Tensor:
        ctx.save_for_backward(weight, mask, step)
        size = along(step, weight)
        wbar = torch.clamp(torch.where(mask, weight, 0.0) / size, -Q, Q).round() * size
        return rounded_to(wbar, weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        weight, mask, step = ctx.saved_tensors
        v = torch.where(mask, weight, 0.0) / along(step, weight)
        slope = torch.where(v.abs() < Q, v.round() - v, v.clamp(-Q, Q))
        rows = (grad * slope).reshape(step.numel(), -1)
        return grad, None, rows.sum(1).reshape(step.shape)


def naive(weight: Tensor, mask: Tensor, step: Tensor, ste: str = "identity") -> Tensor:
    out: Tensor = Identity.apply(weight, mask, step) if ste == "identity" else clipped(weight, mask, step)
    return out


def torchs_own(weight: Tensor, mask: Tensor, step: Tensor) -> Tensor:
    zero, masked = torch.zeros_like(step), torch.where(mask, weight, 0.0)
    if step.numel() > 1:
        return torch._fake_quantize_learnable_per_channel_affine(masked, step, zero, 0, -Q, Q, 1.0)
    return torch._fake_quantize_learnable_per_tensor_affine(masked, step, zero, -Q, Q, 1.0)


def candidate(function: Callable[..., Tensor], direction: str) -> Bind:
    """``function`` of weight, mask and step: its forward, its backward, or "both"."""

    def bind(weight: Tensor, mask: Tensor, step: Tensor, grad: Tensor) -> Callable[[], Any]:
        if direction == "forward":

            def forward() -> tuple[Tensor]:
                with torch.no_grad():
                    return (function(weight, mask, step),)

            return forward
        w, s = weight.detach().requires_grad_(), step.detach().requires_grad_()
        if direction == "backward":
            out = function(w, mask, s)
            return lambda: torch.autograd.grad(out, (w, s), grad, retain_graph=True)
        return lambda: torch.autograd.grad(function(w, mask, s), (w, s), grad)

    return bind


def inputs(numel: int, channels: int, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Weight, mask, step size and incoming gradient."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (numel,) if channels == 1 else (channels, numel // channels)
    weight, grad = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2))
    mask = torch.rand(shape, generator=generator, device=device) > 0.9
    return weight, mask, torch.full((channels,), 0.3, device=device), grad


def check(result: tuple[Tensor, ...], truth: tuple[Tensor, ...], sets: tuple[Any, ...]) -> str | None:
    """No figure for what computes something else."""
    grads = sets[-1] if isinstance(sets[-1], list) else [sets[-1]]
    # a step's gradient is a sum of terms of either sign: it is compared with the size of such a sum
    noise = max(float(grad.float().norm()) for grad in grads)
    for index, (value, expected) in enumerate(zip(result, truth, strict=True)):
        is_step = expected.numel() <= CHANNELS and expected.numel() not in [grad.numel() for grad in grads]
        allowed = 1e-2 * noise if is_step else (1e-2 if value.dtype == torch.bfloat16 else 1e-3) * expected.abs().max()
        # w / S and w (1 / S) may round to different levels, one weight in many
        wrong = (value.float() - expected.float()).abs() > allowed
        if wrong.sum() > wrong.numel() // 1000:
            return f"result {index} differs in {int(wrong.sum())} of {wrong.numel()} places"
    return None


@dataclass(frozen=True)
class Case:
    """One layer: what is done with it, and the bytes that one weight moves."""

    size: str
    numel: int
    ste: str = "identity"
    direction: str = "both"
    channels: int = 1
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        parts = [self.size, self.ste] if self.direction == "both" else [self.size, self.ste, self.direction]
        parts += ["per channel"] if self.channels > 1 else []
        return ", ".join(parts + (["bf16"] if self.dtype == torch.bfloat16 else []))

    @property
    def bytes_each(self) -> int:
        size = self.dtype.itemsize
        forward, backward = 2 * size + 1, 2 * size + 1 + (size if self.ste == "clipped" else 0)
        return {"forward": forward, "backward": backward, "both": forward + backward}[self.direction]

    def workload(self, device: str) -> Workload:
        # torch.compile would otherwise refuse to run a backward twice
        torch._functorch.config.donated_buffer = self.direction != "backward"
        plain = partial(naive, ste=self.ste)
        functions: dict[str, Callable[..., Tensor]] = {
            "pqk_fast": partial(ops.fake_quant, bits=BITS, ste=self.ste, mask_gradients=self.ste == "clipped"),
            "eager": plain,
            "torch.compile": torch.compile(plain),
            "torch's own (clipped)": torchs_own,
        }
        return Workload(
            {name: candidate(function, self.direction) for name, function in functions.items()},
            partial(inputs, self.numel, self.channels, self.dtype, device),
            check,
            unchecked=("torch's own (clipped)",),  # it has no other estimator
        )


def cpu_cases() -> list[Case]:
    return [Case(name, numel, ste) for name, numel in CPU_SIZES.items() for ste in ("identity", "clipped")]


def gpu_cases() -> list[Case]:
    large = ("64 M", 1 << 26)
    cases = [Case(*large, direction=direction) for direction in ("forward", "backward", "both")]
    return cases + [Case(*large, ste="clipped", direction=direction) for direction in ("backward", "both")]


def more_gpu_cases() -> list[Case]:
    large, bf16 = ("64 M", 1 << 26), torch.bfloat16
    cases = [Case(*large, direction=direction, channels=CHANNELS) for direction in ("forward", "backward")]
    cases += [Case(*large, direction=direction, dtype=bf16) for direction in ("forward", "backward")]
    for smaller in (("16 M", 1 << 24), ("1 M", 1 << 20)):
        cases += [Case(*smaller, direction=direction) for direction in ("forward", "backward", "both")]
    return cases


def whole_model(sizes: list[int], device: str) -> Workload:
    torch._functorch.config.donated_buffer = True

    def lists(seed: int) -> tuple[list[Tensor], ...]:
        layers = [inputs(n, 1, torch.float32, device, 1000 * seed + i) for i, n in enumerate(sizes)]
        return tuple(list(each) for each in zip(*layers, strict=True))

    def both(function: Callable[..., list[Tensor]]) -> Bind:
        def bind(weights: list[Tensor], masks: list[Tensor], steps: list[Tensor], grads: list[Tensor]) -> Callable:
            w, s = ([tensor.detach().requires_grad_() for tensor in each] for each in (weights, steps))
            return lambda: torch.autograd.grad(function(w, masks, s), [*w, *s], grads)

        return bind

    def each(function: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
        return lambda *lists: [function(*layer) for layer in zip(*lists, strict=True)]

    candidates = {
        "pqk_fast": both(lambda *lists: ops.fake_quant_all(*lists, BITS)),
        "pqk_fast, layer by layer": both(each(lambda *layer: ops.fake_quant(*layer, BITS))),
        "eager": both(each(naive)),
        "torch.compile": both(torch.compile(each(naive))),
        "torch's own (clipped)": both(each(torchs_own)),
    }
    return Workload(candidates, lists, check, unchecked=("torch's own (clipped)",))


def declare(report: Report) -> None:
    on_cpu = report.cases_of == "cpu"

    def layers(cases: list[Case]) -> None:
        for full in cases:
            channels = report.size(full.channels)
            numel = report.size(full.numel) // channels * channels
            case = replace(full, numel=numel, channels=channels)
            aims = TARGETS.get(case.direction) if case.size == "64 M" else None
            make = partial(case.workload, report.device)
            report.case(case.name, numel, case.bytes_each * numel, make, targets=aims)

    layers(cpu_cases() if on_cpu else gpu_cases())
    for model, classes in (CPU_MODELS if on_cpu else GPU_MODELS).items():
        sizes = [p.numel() for p in create_model(model, classes).parameters() if p.dim() > 1]
        make = partial(whole_model, sizes, report.device)
        report.case(f"{model.replace('_', '-')}, all layers", sum(sizes), 18 * sum(sizes), make)
    if not on_cpu:  # last, since a run may be cut short
        layers(more_gpu_cases())


def main() -> int:
    report = Report(__doc__, "fake_quant", {"bits": BITS})
    declare(report)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
