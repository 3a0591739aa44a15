"""The dual operations of phase 2: student and teacher of one layer, and of a whole network, in one call.

    python bench/bench_dual_forward.py [--device cuda] [--out bench/results/dual_forward-cuda.json]

``dual_linear``, ``dual_conv2d`` and ``dual_forward`` of res8, 90 % of the weights pruned, 4 bits, in fp32 as IEEE has
it, tf32 (fp32 whose factors are rounded; GPU only) and bf16 (autocast). ``x`` is [2B, ...], student rows first. Against
"eager": two products, of weights made in plain PyTorch; torch.compile of the same; and "two products": those of torch,
with the student's weight made by our ``fake_quant``. They get the halves of x apart, and need not join their results.

Floor: ``2 * 2B * out * in`` operations for a forward (of a convolution: for each place of its result, times the
kernel's, those in the padding too), thrice that with backward; bytes: x, result, weight (fp32) and mask once, and in
backward the incoming gradient, x, weight and mask again, and both gradients. Of a network: its input, weights, masks
and results.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from dual_rivals import BITS, Student, TwoNetworks, teacher_weight
from report import Report
from timing import Bind, Workload, called
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import pqk_fast as pqk
from pqk_fast import ops
from pqk_fast.models import create_model

STEP = 0.3
# ||difference|| / ||result||: roundings, and one weight in many on another level where w / S and w (1 / S) differ
TOLERANCE = {"fp32": 1e-3, "tf32": 5e-3, "bf16": 3e-2}
Product = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One layer: ``x [2 batch, inputs, *image]``, ``weight [outputs, inputs, *kernel]``; no image: a linear layer."""

    layer: str
    batch: int
    inputs: int
    outputs: int
    image: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    arithmetic: str = "bf16"
    channels_last: bool = False
    backward: bool = False

    @property
    def name(self) -> str:
        layout = ["channels_last"] if self.channels_last else []
        direction = "forward and backward" if self.backward else "forward"
        return ", ".join([self.layer, f"B = {self.batch}", self.arithmetic, *layout, direction])

    @property
    def padding(self) -> int:
        return self.kernel[0] // 2 if self.kernel else 0

    @property
    def weights(self) -> int:
        return self.outputs * self.inputs * (self.kernel[0] ** 2 if self.kernel else 1)

    @property
    def places(self) -> int:
        """Rows of the product: samples times positions."""
        return 2 * self.batch * (self.image[0] * self.image[1] if self.image else 1)

    @property
    def flop(self) -> float:
        return 2.0 * self.places * self.weights * (3 if self.backward else 1)

    @property
    def moved(self) -> float:
        each = 2 if self.arithmetic == "bf16" else 4
        x, out, weight = each * self.places * self.inputs, each * self.places * self.outputs, 5 * self.weights
        return x + weight + out + (out + x + weight + 4 * self.weights + x if self.backward else 0)

    def tensors(self, device: str, seed: int) -> tuple[Tensor, ...]:
        """x, weight, mask, step and incoming gradient."""
        generator = torch.Generator(device).manual_seed(seed)
        dtype = torch.bfloat16 if self.arithmetic == "bf16" else torch.float32

        def normal(*shape: int) -> Tensor:
            values = torch.randn(shape, generator=generator, device=device)
            return values.contiguous(memory_format=torch.channels_last) if self.channels_last else values

        x, grad = (normal(2 * self.batch, n, *self.image).to(dtype) for n in (self.inputs, self.outputs))
        weight = normal(self.outputs, self.inputs, *self.kernel)
        mask = torch.rand(weight.shape, generator=generator, device=device) > 0.9
        mask = mask.contiguous(memory_format=torch.channels_last) if self.channels_last else mask
        return x, weight, mask, torch.full((1,), STEP, device=device), grad

    def ours(self, x: Tensor, weight: Tensor, mask: Tensor, step: Tensor) -> Tensor:
        if self.kernel:
            return ops.dual_conv2d(x, weight, mask, step, BITS, padding=self.padding)
        return ops.dual_linear(x, weight, mask, step, BITS)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, padding=self.padding) if self.kernel else F.linear(x, weight)

    def check(self, result: tuple[Tensor, ...], truth: tuple[Tensor, ...], sets: tuple[Any, ...]) -> str | None:
        joined = (torch.cat(result[:2]), *([torch.cat(result[2:4]), result[4]] if self.backward else []))
        for index, (value, expected) in enumerate(zip(joined, truth, strict=True)):
            error = float((value.float() - expected.float()).norm() / expected.float().norm())
            if not error <= TOLERANCE[self.arithmetic]:
                return f"result {index} is off by {error:.2g} of its norm"
        return None

    def workload(self, device: str) -> Workload:
        plain = partial(two_products, self.product, naive_weights)
        with_ours = partial(two_products, self.product, our_weights)
        candidates = {
            "pqk_fast": dual(self.ours, self.backward),
            "eager": halves(plain, self.backward),
            "torch.compile": halves(torch.compile(plain, dynamic=False), self.backward),
            "two products": halves(with_ours, self.backward),
        }
        return Workload(candidates, partial(self.tensors, device), self.check)


def naive_weights(weight: Tensor, mask: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    return Student.apply(weight, mask, step), teacher_weight(weight, mask)


def our_weights(weight: Tensor, mask: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    student = ops.fake_quant(weight, mask, step, BITS, mask_gradients=True)
    return student, ops.teacher_weight(weight, mask, step, BITS)


def two_products(
    product: Product, weights: Callable[..., tuple[Tensor, Tensor]], x_student: Tensor, x_teacher: Tensor, *layer: Any
) -> tuple[Tensor, Tensor]:
    student, teacher = weights(*layer)
    return product(x_student, student), product(x_teacher, teacher)


def dual(function: Callable[..., Tensor], backward: bool) -> Bind:
    """One call for both halves: its result, with ``backward`` also the gradients of x and of the weight."""

    def bind(x: Tensor, weight: Tensor, mask: Tensor, step: Tensor, grad: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        if not backward:
            return without_gradients(lambda: (function(x, weight, mask, step),))
        leaves = [tensor.detach().requires_grad_() for tensor in (x, weight)]

        def call() -> tuple[Tensor, ...]:
            out = function(*leaves, mask, step)
            return out.detach(), *torch.autograd.grad(out, leaves, grad)

        return call

    return bind


def halves(function: Callable[..., tuple[Tensor, Tensor]], backward: bool) -> Bind:
    """The same with halves that are apart: both results, with ``backward`` both gradients of x, and the weight's."""

    def bind(x: Tensor, weight: Tensor, mask: Tensor, step: Tensor, grad: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        x_student, x_teacher = x.chunk(2)
        if not backward:
            return without_gradients(lambda: function(x_student, x_teacher, weight, mask, step))
        leaves = [tensor.detach().requires_grad_() for tensor in (x_student, x_teacher, weight)]
        grads = grad.chunk(2)

        def call() -> tuple[Tensor, ...]:
            out = function(*leaves, mask, step)
            return out[0].detach(), out[1].detach(), *torch.autograd.grad(out, leaves, grads)

        return call

    return bind


def without_gradients(function: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    def call() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return function()

    return call


@dataclass(frozen=True)
class Network:
    """The dual forward of a whole network, in training mode: what phase 2 runs in every step."""

    model: str
    batch: int
    classes: int = 12
    shape: tuple[int, ...] = (101, 40)

    def models(self, device: str) -> tuple[torch.nn.Module, TwoNetworks]:
        torch.manual_seed(0)
        plain = create_model(self.model, self.classes)
        prepared = pqk.prepare(copy.deepcopy(plain), pqk.PQKConfig(bits=BITS, sparsity=0.9, mask_interval=1))
        pqk.Pruner(prepared, 1, 1)
        pqk.start_phase2(prepared)
        return prepared.to(device), TwoNetworks(plain, prepared).to(device)

    def work(self) -> tuple[int, float, float]:
        """Weights, bytes and operations."""
        _, naive = self.models("cpu")
        weights = sum(p.numel() for p in naive.teacher.parameters())
        x = torch.randn(self.batch, *self.shape)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            out = naive(x)
        return weights, 4 * x.numel() + 5 * weights + 4 * sum(each.numel() for each in out), counter.get_total_flops()

    def tensors(self, device: str, seed: int) -> tuple[Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        return (torch.randn(self.batch, *self.shape, generator=generator, device=device),)

    @staticmethod
    def check(result: tuple[Tensor, ...], truth: tuple[Tensor, ...], sets: tuple[Any, ...]) -> str | None:
        for value, expected in zip(result, truth, strict=True):
            error = float((value - expected).norm() / expected.norm())
            if not error <= 2e-2:  # of up to 34 layers in tf32
                return f"is off by {error:.2g} of its norm"
        return None

    def workload(self, device: str) -> Workload:
        ours, naive = self.models(device)

        def quiet(function: Callable[[Tensor], tuple[Tensor, ...]]) -> Bind:
            return called(torch.no_grad()(function))

        def in_mode(mode: str) -> Bind:
            return quiet(lambda x: pqk.dual_forward(ours, x, mode))

        candidates = {
            "pqk_fast": in_mode("stacked"),
            "pqk_fast, two_pass": in_mode("two_pass"),
            "eager": quiet(naive),
            "torch.compile": quiet(torch.compile(naive, dynamic=False)),
            "pqk_fast, not captured": in_mode("stacked"),
            "eager, not captured": quiet(naive),
        }
        uncaptured = [name for name in candidates if name.endswith("not captured")]
        if device == "cpu":
            candidates = {name: bind for name, bind in candidates.items() if name not in uncaptured}
        return Workload(candidates, partial(self.tensors, device), self.check, uncaptured=uncaptured, rotate=False)


def linear(batch: int, arithmetic: str, backward: bool = False, features: int = 4096) -> Case:
    name = f"linear {features}x{features}"
    return Case(name, batch, features, features, arithmetic=arithmetic, backward=backward)


def cpu_cases() -> list[Case]:
    res8 = Case("res8's convolution", 4, 45, 45, (25, 13), (3, 3), "fp32", channels_last=True)
    linears = [linear(16, "fp32", both, 512) for both in (False, True)] + [linear(16, "bf16", features=512)]
    return [*linears, res8, replace(res8, backward=True), replace(res8, channels_last=False)]


def gpu_cases() -> list[Case]:
    """In order of value: a run may be cut short."""
    res8 = partial(Case, "res8's convolution", 64, 45, 45, (25, 13), (3, 3))
    resnet32 = partial(Case, "ResNet-32's last stage", 128, 64, 64, (8, 8), (3, 3))
    resnet50 = partial(Case, "ResNet-50's third stage", 64, 256, 256, (14, 14), (3, 3))
    pointwise = partial(Case, "ResNet-50's third stage, 1x1", 64, 1024, 256, (14, 14), (1, 1))
    return [
        *(linear(batch, "bf16") for batch in (16, 64, 8)),
        *(res8(arithmetic, layout) for arithmetic, layout in (("tf32", False), ("bf16", True), ("fp32", False))),
        *(linear(batch, "bf16") for batch in (1024, 256, 4096)),
        *(linear(batch, "bf16", True) for batch in (64, 1024)),
        *(linear(batch, arithmetic) for arithmetic in ("tf32", "fp32") for batch in (16, 1024)),
        res8("tf32", False, True),
        *(layer("bf16", True) for layer in (resnet50, pointwise, resnet32)),
        *(layer("tf32", False) for layer in (resnet50, pointwise, resnet32)),
        *(res8(arithmetic, layout) for arithmetic, layout in (("tf32", True), ("bf16", False), ("fp32", True))),
        res8("bf16", True, True),
        *(linear(64, arithmetic, True) for arithmetic in ("tf32", "fp32")),
    ]


def targets(case: Case) -> dict[str, float]:
    """Where the weight's bytes are the floor, one reading of them should pay; elsewhere nothing should be lost."""
    if not case.image and case.arithmetic == "bf16" and case.batch <= 64 and not case.backward:
        return {"torch.compile": 2.0}
    return {"best": 0.95}


def declare(report: Report) -> None:
    on_cpu = report.cases_of == "cpu"
    cases = cpu_cases() if on_cpu else gpu_cases()
    network = Network("res8", 8 if on_cpu else 64)

    def whole_network() -> None:
        model = replace(network, batch=report.size(network.batch, 2))
        weights, moved, flop = model.work()
        aims = {"eager": 1.5, "eager, not captured": 3.0}
        make = partial(model.workload, report.device)
        name = f"{model.model}, dual forward, B = {network.batch}"
        for arithmetic in ("fp32",) if on_cpu else ("tf32", "fp32"):
            report.case(f"{name}, {arithmetic}", weights, moved, make, flop=flop, arithmetic=arithmetic, targets=aims)

    for number, case in enumerate(cases):
        if number == 3:
            whole_network()
        batch, inputs, outputs = (report.size(n, 2) for n in (case.batch, case.inputs, case.outputs))
        small = replace(case, batch=batch, inputs=inputs, outputs=outputs)
        make, aims = partial(small.workload, report.device), targets(case)
        about = (case.name, small.weights, small.moved, make)
        report.case(*about, flop=small.flop, arithmetic=case.arithmetic, targets=aims)


def main() -> int:
    report = Report(__doc__, "dual_forward", {"bits": BITS})
    declare(report)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
