"""The fused convolution of student and teacher, on a GPU or interpreted, against two convolutions in fp64."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import (
    KERNEL_DEVICE,
    Case,
    assert_within,
    laid_out,
    needs_triton,
    normal_like,
    on_kernel_device,
    quantizer_inputs,
)
from torch import Tensor

needs_triton()

from pqk_fast import reference
from pqk_fast.triton_kernels import dual_conv2d as forward
from pqk_fast.triton_kernels import dual_conv2d_backward as backward
from pqk_fast.triton_kernels import launch, operands

DEVICE = KERNEL_DEVICE
BITS = 4
pytestmark = [on_kernel_device, pytest.mark.usefixtures("poisoned_memory")]


@dataclass(frozen=True)
class Shape:
    """A convolution of ``half`` student's and as many teacher's images."""

    half: int
    channels: int
    outputs: int
    kernel: tuple[int, int]
    image: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def x(self) -> tuple[int, ...]:
        return (2 * self.half, self.channels, *self.image)

    @property
    def weight(self) -> tuple[int, ...]:
        return (self.outputs, self.channels, *self.kernel)

    @property
    def settings(self) -> tuple[tuple[int, int], ...]:
        return self.stride, self.padding, self.dilation

    def __str__(self) -> str:
        pairs = (self.kernel, self.image, *self.settings)
        return "-".join([f"{self.half}x{self.channels}to{self.outputs}", *("x".join(map(str, pair)) for pair in pairs)])


SHAPES = [
    Shape(3, 3, 7, (3, 3), (5, 4), padding=(1, 1)),
    Shape(1, 1, 19, (3, 3), (7, 8), (2, 3), (2, 1)),
    Shape(3, 5, 1, (1, 1), (5, 3), (2, 2)),
    Shape(1, 3, 19, (5, 5), (5, 6), padding=(2, 1)),
    Shape(1, 5, 7, (3, 3), (8, 7), (2, 1), (1, 1), (2, 1)),
    Shape(1, 3, 1, (3, 3), (7, 6), dilation=(1, 2), stride=(2, 2)),
    Shape(3, 1, 1, (1, 1), (1, 1)),
    Shape(3, 3, 7, (5, 5), (3, 3), padding=(2, 1)),  # a kernel that is larger than the image
    Shape(17, 19, 5, (3, 3), (3, 3)),  # one position an image, two tiles of them
    Shape(1, 17, 33, (1, 2), (3, 4), (1, 2)),  # several tiles of columns
    Shape(0, 3, 7, (3, 3), (5, 4)),
]
LAYOUTS = ["contiguous", "channels_last"]
# dtype of x and of the weight, steps, teacher's weights shared, gradient clipped
VARIANTS = [
    (torch.float32, torch.float32, "[1]", False, True),
    (torch.float16, torch.float32, "[C]", True, False),
]


def small_tiles(channels: int, taps: int, depth: int = 16) -> dict[str, int]:
    """Many tiles in small tests; compiled ones are as small as tensor cores take."""
    size = {"BM": 32, "BN": 16, "BK": depth} if DEVICE.type == "cpu" else {"BM": 64, "BN": 16, "BK": depth}
    at_once = launch.channels_at_once(channels, taps, depth)
    return {**size, "CHANNELS": at_once, "num_warps": 4, "num_stages": 2}


SMALL_GRADIENT = {"BO": 16, "BK": 16, "BR": 16, "AT_ONCE": 2, "num_warps": 4, "num_stages": 2}


@dataclass
class Layer:
    """Operands of a convolution; ``grad`` of its output."""

    shape: Shape
    x: Tensor
    weight: Tensor
    mask: Tensor
    step: Tensor
    bias: Tensor
    grad: Tensor

    @property
    def operands(self) -> tuple[Any, ...]:
        return self.weight, self.mask, self.step, BITS

    def out(self, shared: bool = False, small: bool = True) -> Tensor:
        choice = small_tiles(self.shape.channels, self.shape.kernel[0] * self.shape.kernel[1]) if small else None
        settings = (*self.operands, self.bias, *self.shape.settings, 1, shared, choice)
        return forward.dual_conv2d(self.x, *settings)

    def grad_x(self, shared: bool = False, small: bool = True) -> Tensor:
        choice = small_tiles(self.shape.outputs, self.shape.kernel[0] * self.shape.kernel[1]) if small else None
        settings = (*self.operands, *self.shape.settings, shared, choice)
        return backward.dual_conv2d_input_gradient(self.grad, self.x, *settings)

    def grad_weight(self, clipped: bool = False, splits: int = 3, small: bool = True) -> Tensor:
        choice = (SMALL_GRADIENT, splits) if small else None
        settings = (*self.operands, *self.shape.settings, clipped, choice)
        return backward.dual_conv2d_weight_gradient(self.grad, self.x, *settings)


def make(
    shape: Shape,
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype = torch.float32,
    steps: str = "[1]",
) -> Layer:
    case = Case(shape.weight, steps, layout)
    weight, mask, step = quantizer_inputs(case, BITS, weight_dtype, DEVICE.type)
    x = laid_out(normal_like(torch.empty(shape.x, dtype=dtype, device=DEVICE), seed=2), layout)
    bias = normal_like(torch.empty(shape.outputs, dtype=weight_dtype, device=DEVICE), seed=3)
    grad = laid_out(normal_like(F.conv2d(x.double(), weight.double(), None, *shape.settings), seed=4), layout)
    return Layer(shape, x, weight, mask, step, bias, grad.to(dtype))


def two_convolutions(
    x: Tensor, student: Tensor, teacher: Tensor, bias: Tensor, grad: Tensor, settings: tuple
) -> dict[str, Tensor]:
    """What student's and teacher's convolution give and their gradients."""
    x, student, teacher = (t.detach().requires_grad_() for t in (x, student, teacher))
    halves = x.chunk(2) if x.shape[0] else (x, x)
    out = torch.cat([F.conv2d(half, w, bias, *settings) for half, w in zip(halves, (student, teacher), strict=True)])
    grads = torch.autograd.grad(out, (x, student, teacher), grad)
    return dict(zip(("out", "x", "student", "teacher"), (out.detach(), *grads), strict=True))


def check(layer: Layer, shared: bool = False, clipped: bool = False, small: bool = True) -> None:
    """Outputs and both gradients within the tolerance of their dtype of what fp64 gives."""
    dtype, weight_dtype = layer.x.dtype, layer.weight.dtype
    scaled = reference.scaled(layer.weight, layer.mask, layer.step)
    q = reference.quantize(layer.weight, layer.mask, layer.step, BITS).double()
    wbar = q * reference.per_channel(layer.step, layer.weight).double()
    weight = layer.weight.to(dtype).double()
    teacher = torch.where(layer.mask, wbar, weight) if shared else weight
    passes = (scaled.abs() <= 7) if clipped else torch.ones_like(layer.mask)
    inputs = [t.double() for t in (layer.x, wbar, teacher, layer.bias, layer.grad)]
    truth = two_convolutions(*inputs, layer.shape.settings)
    magnitude = two_convolutions(*[t.abs() for t in inputs], layer.shape.settings)

    out, grad_x = layer.out(shared, small), layer.grad_x(shared, small)
    assert (out.dtype, grad_x.dtype) == (dtype, dtype)
    assert_within(out, truth["out"], magnitude["out"], dtype)
    assert_within(grad_x, truth["x"], magnitude["x"], dtype)
    for each in (out, grad_x):
        layout = torch.channels_last if forward.is_channels_last(layer.x, layer.weight) else torch.contiguous_format
        assert each.is_contiguous(memory_format=layout)

    grad_weight = layer.grad_weight(clipped, small=small)
    selected = {name: torch.where(passes, each["student"], 0.0) for name, each in (("t", truth), ("m", magnitude))}
    expected = torch.where(layer.mask, selected["t"], truth["teacher"])
    allowed = torch.where(layer.mask, selected["m"], magnitude["teacher"])
    assert grad_weight.dtype == weight_dtype
    assert grad_weight.stride() == torch.empty_like(layer.weight).stride()
    assert_within(grad_weight, expected, allowed, weight_dtype)


@pytest.mark.parametrize(("dtype", "weight_dtype", "steps", "shared", "clipped"), VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_two_convolutions(
    shape: Shape,
    layout: str,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    steps: str,
    shared: bool,
    clipped: bool,
) -> None:
    check(make(shape, layout, dtype, weight_dtype, steps), shared, clipped)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_of_low_precision(dtype: torch.dtype) -> None:
    check(make(SHAPES[0], "contiguous", dtype, dtype), shared=True, clipped=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_tiles_as_on_a_gpu(layout: str) -> None:
    shape = Shape(2, 19, 45, (3, 3), (9, 8), padding=(1, 1))
    check(make(shape, layout, steps="[C]"), shared=True, clipped=True, small=False)


@pytest.mark.parametrize("kept", [True, False])
def test_masks_of_one_kind(kept: bool) -> None:
    layer = make(SHAPES[0])
    layer.mask.fill_(kept)
    check(layer, shared=True)
    if not kept:
        assert torch.equal(layer.out()[:3], layer.bias.reshape(-1, 1, 1).expand(3, -1, 5, 4))


def test_offsets_of_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "MOST_OFFSETS", 0)
    for layout in LAYOUTS:
        for shape in (SHAPES[0], SHAPES[4]):
            check(make(shape, layout))


def in_a_frame(values: Tensor) -> Tensor:
    """The same values, each image and channel between others that are NaN."""
    n, c, h, w = values.shape
    memory = values.new_full((n + 1, 2 * c + 1, h + 2, w + 3), torch.nan)
    inner = memory[1:, 1::2, 1:-1, 1:-2]
    return inner.copy_(values)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[4], SHAPES[7]], ids=str)
def test_reads_nothing_beside_the_images(shape: Shape) -> None:
    layer = make(shape)
    layer.x, layer.grad, layer.weight = (in_a_frame(t) for t in (layer.x, layer.grad, layer.weight))
    layer.mask = layer.mask.contiguous(memory_format=torch.channels_last)
    check(layer, clipped=True)


def test_layouts_need_not_agree() -> None:
    layer = make(SHAPES[4])
    layer.weight = layer.weight.contiguous(memory_format=torch.channels_last)
    layer.grad = normal_like(layer.grad[:1, :, :1, :1]).expand(layer.grad.shape)
    check(layer)
    layer = make(SHAPES[4])
    layer.grad = layer.grad.contiguous(memory_format=torch.channels_last)
    layer.weight = layer.weight.transpose(0, 1).contiguous().transpose(0, 1)
    check(layer, clipped=True)


def test_halves_do_not_meet() -> None:
    layer = make(SHAPES[0])
    expected, expected_x = layer.out(), layer.grad_x()
    layer.x[3:], layer.grad[3:] = torch.nan, torch.nan
    layer.weight[~layer.mask] = torch.nan
    assert torch.equal(layer.out()[:3], expected[:3])
    assert torch.equal(layer.grad_x()[:3], expected_x[:3])
    assert layer.grad_weight()[layer.mask].isfinite().all()
    assert layer.grad_weight()[~layer.mask].isnan().all()


@pytest.mark.parametrize("splits", [1, 2, 3, 50])
def test_sums_are_the_same_every_time_and_tickets_come_back(splits: int) -> None:
    layer = make(Shape(3, 3, 19, (3, 3), (5, 4), padding=(1, 1)))
    made = layer.grad_weight(splits=splits)
    assert torch.equal(made, layer.grad_weight(splits=splits))
    assert_within(made, layer.grad_weight(splits=1), layer.grad_weight(splits=1).abs() + 1, torch.float32)
    assert not operands.counters(DEVICE, 1).any()


@pytest.fixture
def flags() -> Iterator[Tensor]:
    flags = operands.error_flags(DEVICE)
    flags.zero_()
    yield flags
    flags.zero_()


@pytest.mark.parametrize("bad", [0.0, -1.0, torch.nan, torch.inf])
@pytest.mark.parametrize("steps", ["[1]", "[C]"])
def test_a_bad_step_raises_the_flag(steps: str, bad: float, flags: Tensor) -> None:
    layer = make(SHAPES[0], steps=steps)
    layer.out()
    assert not flags.any()
    layer.step[-1] = bad
    layer.out()
    assert flags.tolist() == [1, 0]


def test_backward_gives_what_is_needed() -> None:
    layer = make(SHAPES[0])
    for need_x in (False, True):
        for need_weight in (False, True):
            settings = (*layer.operands, *layer.shape.settings, 1, False, False, need_x, need_weight)
            grad_x, grad_weight = backward.dual_conv2d_backward(layer.grad, layer.x, *settings)
            assert grad_x.shape == (layer.x.shape if need_x else (0,))
            assert grad_weight.shape == (layer.weight.shape if need_weight else (0,))


def test_what_it_cannot_do() -> None:
    layer = make(SHAPES[0])
    for settings in ((*layer.shape.settings, 3), ((1, 1), (0, 0), (3, 1), 1)):
        with pytest.raises(ValueError, match="expected groups 1, got"):
            forward.dual_conv2d(layer.x, *layer.operands, None, *settings, False)


def test_division_by_a_product_and_a_shift() -> None:
    random.seed(0)
    divisors = [1, 2, 3, 7, 13, 325, 4040, 2**16, 2**16 + 1, 2**30 - 1, 2**30, 2**31 - 1]
    for d in divisors + [random.randrange(1, 2**31) for _ in range(1000)]:
        multiplier, shift = forward.reciprocal_of(d)
        assert 2**31 <= multiplier < 2**32
        multiples = [random.randrange(2**31 // d + 1) * d for _ in range(20)]
        for n in [0, 1, 2**31 - 1, *multiples, *(m - 1 for m in multiples)]:
            if 0 <= n < 2**31:
                assert (2 * n * multiplier >> 32) >> shift == n // d


def test_blocks_waste_few_lanes() -> None:
    assert [launch.channels_at_once(c, 9, 16) for c in (1, 3, 16, 19, 45, 64)] == [1, 4, 16, 8, 16, 16]
    assert [launch.channels_at_once(c, 1, 16) for c in (1, 16, 17)] == [16, 16, 16]


@pytest.mark.parametrize("size", [(2, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (2, 1, 1, 1), (1, 3, 4, 1), (0, 3, 4, 5)])
def test_layout_is_that_of_torchs_convolution(size: tuple[int, ...]) -> None:
    x, weight = torch.empty(size, device=DEVICE), torch.empty(7, size[1], 1, 1, device=DEVICE)
    like = torch._prims_common.suggest_memory_format
    for a in (x, x.contiguous(memory_format=torch.channels_last), x.permute(0, 2, 3, 1).clone().permute(0, 3, 1, 2)):
        for b in (weight, weight.contiguous(memory_format=torch.channels_last)):
            assert forward.is_channels_last(a, b) == (torch.channels_last in (like(a), like(b)))


def test_a_bias_between_other_values() -> None:
    weight, mask, step = quantizer_inputs(Case((7, 3, 3, 3)), BITS, device=DEVICE.type)
    x = normal_like(torch.empty(4, 3, 6, 5, device=DEVICE))
    biases = normal_like(torch.empty(7, 2, device=DEVICE))
    shape = ([1, 1], [1, 1], [1, 1], 1)
    made, expected = (
        forward.dual_conv2d(x, weight, mask, step, BITS, bias, *shape, False)
        for bias in (biases[:, 0], biases[:, 0].clone())
    )
    assert torch.equal(made, expected)
