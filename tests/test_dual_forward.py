"""dual_linear and dual_conv2d against two layers run apart, in outputs and every gradient."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import (
    DEVICES,
    DTYPES,
    Case,
    assert_within,
    normal_like,
    quantizer_inputs,
    with_gradients,
)
from torch import Tensor

from pqk_fast import ops, reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")


Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def two_layers(
    product: Product, x: Tensor, student: Tensor, teacher: Tensor, bias: Tensor | None, grad: Tensor
) -> dict[str, Tensor]:
    """A student's and a teacher's layer run apart on the halves of ``x``: the outputs and all their gradients."""
    x, student, teacher = with_gradients(x, student, teacher)
    b = None if bias is None else bias.detach().requires_grad_()
    half = x.shape[0] // 2
    out_student = product(x[:half], student, b)
    out_teacher = product(x[half:], teacher, None if b is None else b.detach())
    torch.autograd.backward([out_student, out_teacher], [grad[:half], grad[half:]])
    out = torch.cat([out_student, out_teacher]).detach()
    found = {"out": out, "x": x.grad, "student": student.grad, "teacher": teacher.grad}
    return found if b is None else {**found, "bias": b.grad}


def check_dual(
    operation: Callable[..., Tensor],
    product: Product,
    x: Tensor,
    layer: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    teacher_weights: str,
    ste: str,
    dtype: torch.dtype,
) -> None:
    """``operation`` against two separate layers: output, dx, ``dw = M g_S + (1 - M) g_T``, db, none for the step."""
    bits = 4
    weight, mask, step = layer
    leaves = with_gradients(x, weight, step) + ([] if bias is None else with_gradients(bias))
    before = [leaf.detach().clone() for leaf in leaves]
    out = operation(leaves[0], leaves[1], mask, leaves[2], bits, *leaves[3:], teacher_weights=teacher_weights, ste=ste)
    assert out.dtype == dtype
    grad = normal_like(out)
    out.backward(grad)
    assert all(torch.equal(leaf, old) for leaf, old in zip(leaves, before, strict=True))
    assert leaves[2].grad is None

    q = reference.quantize(weight, mask, step, bits).double()
    student = q * reference.per_channel(step, weight).double()
    teacher = weight.double() if teacher_weights == "latent" else torch.where(mask, student, weight.double())
    passes = mask if ste == "identity" else mask & (reference.scaled(weight, mask, step).abs() <= 7)
    inputs = [x, student, teacher, bias, grad]
    truth = two_layers(product, *[None if t is None else t.double() for t in inputs])
    size = two_layers(product, *[None if t is None else t.double().abs() for t in inputs])
    baseline = two_layers(product, *[None if t is None else t.to(dtype) for t in inputs])
    for found in (truth, size, baseline):
        of_student, of_teacher = found.pop("student"), found.pop("teacher")
        found["weight"] = torch.where(mask, torch.where(passes, of_student, 0.0), of_teacher)
    actual = {"out": out.detach(), "x": leaves[0].grad, "weight": leaves[1].grad}
    if bias is not None:
        actual["bias"] = leaves[3].grad
    assert actual.keys() == truth.keys()
    for name, value in actual.items():
        assert_within(value, truth[name], size[name], dtype, baseline[name])
    stopped = mask & ~passes
    assert (leaves[1].grad[stopped] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ste", reference.STE_MODES)
@pytest.mark.parametrize("teacher_weights", reference.TEACHER_WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("x_shape", "case", "with_bias"),
    [
        ((6, 31), Case((13, 31)), True),
        ((6, 31), Case((13, 31), step="[C]"), False),
        ((2, 1), Case((1, 1)), True),
        ((4, 5, 23), Case((17, 23), layout="strided"), True),  # 3-D: rows are dimension 0
        ((4, 3, 2, 23), Case((17, 23), step="[C]", layout="transposed"), False),
        ((0, 31), Case((13, 31)), True),
        ((134, 127), Case((257, 127), step="[C]"), True),
    ],
    ids=str,
)
def test_dual_linear(
    x_shape: tuple[int, ...],
    case: Case,
    with_bias: bool,
    dtype: torch.dtype,
    teacher_weights: str,
    ste: str,
    device: str,
) -> None:
    layer = quantizer_inputs(case, 4, dtype, device)
    x = normal_like(torch.empty(x_shape, dtype=dtype, device=device), seed=2)
    bias = normal_like(x.new_empty(case.shape[0]), seed=3) if with_bias else None
    check_dual(ops.dual_linear, F.linear, x, layer, bias, teacher_weights, ste, dtype)


CONVOLUTIONS = [
    ((4, 3, 9, 7), Case((19, 3, 3, 3)), {}),
    ((4, 3, 9, 7), Case((19, 3, 3, 3), step="[C]"), {"stride": 2, "padding": 1}),
    ((2, 5, 9, 8), Case((8, 5, 3, 3), step="[C]", layout="channels_last"), {"stride": (2, 1), "padding": (0, 1)}),
    ((2, 5, 9, 7), Case((8, 5, 4, 3)), {"padding": "same", "dilation": (1, 2)}),
    ((2, 5, 9, 7), Case((8, 5, 3, 3)), {"padding": "valid"}),
    ((2, 6, 9, 7), Case((9, 2, 3, 3), step="[C]"), {"groups": 3, "dilation": 2, "padding": 2}),
    ((2, 8, 5, 5), Case((8, 1, 3, 3)), {"groups": 8, "padding": 1}),  # depthwise
    ((2, 1, 3, 3), Case((1, 1, 1, 1)), {}),
    ((0, 3, 9, 7), Case((19, 3, 3, 3)), {}),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ste", reference.STE_MODES)
@pytest.mark.parametrize("teacher_weights", reference.TEACHER_WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("x_shape", "case", "options"), CONVOLUTIONS, ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
def test_dual_conv2d(
    x_shape: tuple[int, ...],
    case: Case,
    options: dict,
    with_bias: bool,
    dtype: torch.dtype,
    teacher_weights: str,
    ste: str,
    device: str,
) -> None:
    layer = quantizer_inputs(case, 4, dtype, device)
    x = normal_like(torch.empty(x_shape, dtype=dtype, device=device), seed=2)
    bias = normal_like(x.new_empty(case.shape[0]), seed=3) if with_bias else None
    operation, product = partial(ops.dual_conv2d, **options), partial(F.conv2d, **options)
    check_dual(operation, product, x, layer, bias, teacher_weights, ste, dtype)


@pytest.mark.parametrize("teacher_weights", reference.TEACHER_WEIGHTS)
def test_dual_operations_under_autocast(teacher_weights: str) -> None:
    weight, mask, step = quantizer_inputs(Case((13, 31)))
    x = normal_like(torch.empty(6, 31), seed=2)

    def autocast(operation: Callable[..., Tensor], *args, **options) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return operation(*args, **options)

    # x and the weights are rounded to bf16 first, so the fp64 layers get them rounded
    rounded, kernel = x.bfloat16().float(), weight[..., None, None]
    exact = (weight.bfloat16().float(), mask, step)
    same_q = torch.equal(reference.quantize(exact[0], mask, step, 4), reference.quantize(weight, mask, step, 4))
    assert same_q, "choose a seed whose rounded weights fall into the same cells"
    options = {"teacher_weights": teacher_weights, "ste": "identity", "dtype": torch.bfloat16}
    check_dual(partial(autocast, ops.dual_linear), F.linear, rounded, exact, None, **options)
    image, kernel = rounded[..., None, None], tuple(t if t is step else t[..., None, None] for t in exact)
    check_dual(partial(autocast, ops.dual_conv2d), F.conv2d, image, kernel, None, **options)


def test_dual_linear_with_frozen_parts() -> None:
    weight, mask, step = quantizer_inputs(Case((13, 31)))
    x = normal_like(torch.empty(6, 31)).requires_grad_()
    frozen = ops.dual_linear(x, weight, mask, step, 4)
    frozen.sum().backward()
    assert weight.grad is None
    assert x.grad is not None
    assert not ops.dual_linear(x.detach(), weight, mask, step.clone().requires_grad_(), 4).requires_grad


@pytest.mark.parametrize("teacher_weights", reference.TEACHER_WEIGHTS)
@pytest.mark.parametrize("convolution", [False, True])
def test_torch_func_and_gradients_of_gradients(convolution: bool, teacher_weights: str) -> None:
    """vjp, jacrev and double backward agree with two layers that autograd differentiates itself."""
    weight, mask, step = quantizer_inputs(Case((4, 3)))
    x = normal_like(torch.empty(4, 3), seed=2)
    if convolution:
        weight, mask, x = (t[..., None, None] for t in (weight, mask, x))
    operation, product = (ops.dual_conv2d, F.conv2d) if convolution else (ops.dual_linear, F.linear)

    def dual(x: Tensor, w: Tensor) -> Tensor:
        return operation(x, w, mask, step, 4, teacher_weights=teacher_weights)

    def two(x: Tensor, w: Tensor) -> Tensor:
        student = ops.fake_quant(w, mask, step.detach(), 4, mask_gradients=True)
        teacher = ops.teacher_weight(w, mask, step, 4, teacher_weights)
        return torch.cat([product(x[:2], student), product(x[2:], teacher)])

    grad = normal_like(dual(x, weight), seed=3)
    for made, expected in zip(
        torch.func.vjp(dual, x, weight)[1](grad), torch.func.vjp(two, x, weight)[1](grad), strict=True
    ):
        torch.testing.assert_close(made, expected)
    jacobians = [torch.func.jacrev(function, argnums=(0, 1))(x, weight) for function in (dual, two)]
    torch.testing.assert_close(*jacobians)
    second = []
    for function in (dual, two):
        leaves = with_gradients(x, weight)
        first = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
        second.append(torch.autograd.grad(sum(each.square().sum() for each in first), leaves))
    torch.testing.assert_close(*second)
