"""The public operations: forward and every gradient against the reference, exact masks and bytes, and every refusal."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import (
    CASES,
    DEVICES,
    DTYPES,
    TOLERANCES,
    Case,
    assert_within,
    normal_like,
    quantizer_inputs,
    step_gradient_magnitude,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pqk_fast import ops, reference
from pqk_fast.config import ConfigError

pytestmark = pytest.mark.usefixtures("poisoned_memory")

STE = [("identity", False), ("identity", True), ("clipped", False), ("clipped", True)]
NAN, INF = math.nan, math.inf


def same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal in shape, dtype and value, and no negative zero."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(actual, expected)
    assert not (torch.signbit(actual) & (actual == 0)).any()


def with_gradients(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in tensors]


# --- fake_quant


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fake_quant(case: Case, dtype: torch.dtype, device: str) -> None:
    for bits in (2, 4, 8):
        weight, mask, step = quantizer_inputs(case, bits, dtype, device)
        before = [x.clone() for x in (weight, mask, step)]
        expected = reference.fake_quant(weight.cpu(), mask.cpu(), step.cpu(), bits).to(device)
        same_bits(ops.fake_quant(weight, mask, step, bits), expected)
        for tensor, old in zip((weight, mask, step), before, strict=True):
            assert torch.equal(tensor, old)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("ste", "mask_gradients"), STE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fake_quant_gradients(case: Case, dtype: torch.dtype, ste: str, mask_gradients: bool, device: str) -> None:
    bits = 4
    weight, mask, step = quantizer_inputs(case, bits, dtype, device)
    w, s = with_gradients(weight, step)
    out = ops.fake_quant(w, mask, s, bits, ste, mask_gradients)
    grad = normal_like(out)
    out.backward(grad)

    inputs = [x.cpu() for x in (grad, weight, mask, step)]
    grad_weight, grad_step = reference.fake_quant_backward(*inputs, bits, ste, mask_gradients)
    assert torch.equal(w.grad.cpu(), grad_weight)
    assert (s.grad.dtype, w.grad.dtype) == (torch.float32, dtype)
    assert_within(s.grad.cpu(), grad_step, step_gradient_magnitude(*inputs, bits), torch.float32)


@given(
    bits=st.integers(2, 8),
    halves=st.lists(st.integers(-600, 600), min_size=1, max_size=60),
    exponent=st.integers(-3, 3),
    columns=st.integers(1, 4),
)
def test_fake_quant_on_the_ties(bits: int, halves: list[int], exponent: int, columns: int) -> None:
    """Multiples of S / 2 divide exactly, so that plain Python says what must come out."""
    halves = (halves * columns)[: len(halves) // columns * columns or columns]
    step, q = 2.0**exponent, 2 ** (bits - 1) - 1
    weight = torch.tensor(halves).reshape(-1, columns) * (step / 2)
    mask = torch.arange(weight.numel()).reshape(weight.shape) % 3 > 0
    expected = [step * max(-q, min(q, round(h / 2))) if i % 3 else 0.0 for i, h in enumerate(halves)]
    out = ops.fake_quant(weight, mask, torch.tensor([step]), bits)
    same_bits(out, torch.tensor(expected).reshape(weight.shape))


def test_fake_quant_of_values_without_a_number() -> None:
    weight = torch.tensor([NAN, NAN, INF, -INF, 1e-45, -0.0])
    mask = torch.tensor([True, False, True, True, True, True])
    out = ops.fake_quant(weight, mask, torch.tensor([0.5]), 4)
    assert out[0].isnan()
    same_bits(out[1:], torch.tensor([0.0, 3.5, -3.5, 0.0, 0.0]))


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_of_the_result(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    weight, mask, step = quantizer_inputs(Case((13, 31)), 4, dtype)
    w, s = with_gradients(weight, step)
    out = ops.fake_quant(w, mask, s, 4, dtype=out_dtype)
    same_bits(out, reference.fake_quant(weight, mask, step, 4, out_dtype))
    grad = normal_like(out)
    out.backward(grad)
    grad_weight, grad_step = reference.fake_quant_backward(grad, weight, mask, step, 4)
    assert torch.equal(w.grad, grad_weight)
    assert_within(s.grad, grad_step, step_gradient_magnitude(grad, weight, mask, step, 4), torch.float32)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_decides_the_dtype_unless_told(autocast: torch.dtype) -> None:
    weight, mask, step = quantizer_inputs(Case((13, 31)))
    w, s = with_gradients(weight, step)
    with torch.autocast("cpu", autocast):
        out = ops.fake_quant(w, mask, s, 4)
        (one,) = ops.fake_quant_all([weight], [mask], [step], 4)
        told = ops.fake_quant(weight, mask, step, 4, dtype=torch.float32)
    same_bits(out, reference.fake_quant(weight, mask, step, 4, autocast))
    same_bits(one, out.detach())
    assert told.dtype == torch.float32
    out.sum().backward()
    assert (w.grad.dtype, s.grad.dtype) == (torch.float32, torch.float32)
    with torch.autocast("cpu", enabled=False):
        assert ops.fake_quant(weight, mask, step, 4).dtype == torch.float32


@pytest.mark.parametrize("ste", ["identity", "clipped"])
@pytest.mark.parametrize(("weight_learns", "step_learns"), [(True, False), (False, True), (False, False)])
def test_gradients_only_where_asked(ste: str, weight_learns: bool, step_learns: bool) -> None:
    weight, mask, step = quantizer_inputs(Case((13, 31)))
    w, s = weight.clone().requires_grad_(weight_learns), step.clone().requires_grad_(step_learns)
    out = ops.fake_quant(w, mask, s, 4, ste)
    assert out.requires_grad == (weight_learns or step_learns)
    if out.requires_grad:
        out.backward(torch.ones_like(out))
    grad_weight, grad_step = reference.fake_quant_backward(torch.ones_like(weight), weight, mask, step, 4, ste)
    assert torch.equal(w.grad, grad_weight) if weight_learns else w.grad is None
    if step_learns:
        magnitude = step_gradient_magnitude(torch.ones_like(weight), weight, mask, step, 4)
        assert_within(s.grad, grad_step, magnitude, torch.float32)
    else:
        assert s.grad is None


def test_backward_twice_gives_the_same_and_accumulates() -> None:
    weight, mask, step = quantizer_inputs(Case((13, 31), step="[C]"))
    w, s = with_gradients(weight, step)
    out = ops.fake_quant(w, mask, s, 4, "clipped")
    grad = normal_like(out)
    kept = grad.clone()
    first = torch.autograd.grad(out, (w, s), grad, retain_graph=True)
    second = torch.autograd.grad(out, (w, s), grad, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(grad, kept)
    out.backward(grad, retain_graph=True)
    out.backward(grad)
    assert torch.equal(w.grad, 2 * first[0])


def test_a_mask_that_changes_before_backward_is_an_error() -> None:
    weight, mask, step = quantizer_inputs(Case((13, 31)))
    out = ops.fake_quant(weight.requires_grad_(), mask, step, 4, mask_gradients=True)
    ops.topk_mask_([mask], [weight], 3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# --- fake_quant_all


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("ste", "mask_gradients"), STE)
def test_fake_quant_all_is_fake_quant_of_each(ste: str, mask_gradients: bool, device: str) -> None:
    bits = [2 + i % 7 for i in range(len(CASES))]
    layers = [quantizer_inputs(c, k, device=device, seed=i) for i, (c, k) in enumerate(zip(CASES, bits, strict=True))]
    weights, masks, steps = zip(*layers, strict=True)
    w, s = with_gradients(*weights), with_gradients(*steps)
    outs = ops.fake_quant_all(w, masks, s, bits, ste, mask_gradients)
    grads = [normal_like(out) for out in outs]
    torch.autograd.backward(outs, grads)
    for i, (weight, mask, step) in enumerate(layers):
        wi, si = with_gradients(weight, step)
        one = ops.fake_quant(wi, mask, si, bits[i], ste, mask_gradients)
        one.backward(grads[i])
        same_bits(outs[i].detach(), one.detach())
        assert torch.equal(w[i].grad, wi.grad)
        magnitude = step_gradient_magnitude(grads[i], weight, mask, step, bits[i])
        assert_within(s[i].grad, si.grad, magnitude, torch.float32)


def test_fake_quant_all_takes_one_number_of_bits_and_a_dtype() -> None:
    layers = [quantizer_inputs(case, 8) for case in CASES]
    outs = ops.fake_quant_all(*zip(*layers, strict=True), bits=8, dtype=torch.bfloat16)
    for out, layer in zip(outs, layers, strict=True):
        same_bits(out, reference.fake_quant(*layer, 8, torch.bfloat16))
    assert ops.fake_quant_all([], [], [], 4) == []


# --- phase 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("teacher_weights", reference.TEACHER_WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_teacher_weight(case: Case, dtype: torch.dtype, teacher_weights: str, device: str) -> None:
    weight, mask, step = quantizer_inputs(case, 4, dtype, device)
    w, s = with_gradients(weight, step)
    out = ops.teacher_weight(w, mask, s, 4, teacher_weights)
    assert torch.equal(out, reference.teacher_weight(weight, mask, step, 4, teacher_weights))
    if teacher_weights == "latent":
        assert out.data_ptr() == weight.data_ptr()
    grad = normal_like(out)
    out.backward(grad)
    assert torch.equal(w.grad, torch.where(mask, torch.zeros_like(grad), grad))
    assert s.grad is None


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


@pytest.mark.parametrize(
    "operation",
    [
        lambda x, *layer: ops.fake_quant(*layer),
        lambda x, *layer: ops.fake_quant(*layer, ste="clipped"),
        lambda x, *layer: ops.fake_quant(*layer, mask_gradients=True, dtype=torch.bfloat16),
        lambda x, *layer: torch.cat(ops.fake_quant_all(*[[value, value] for value in layer[:3]], bits=[4, 2])),
        lambda x, *layer: ops.teacher_weight(*layer),
        ops.dual_linear,
        lambda x, *layer: ops.dual_linear(x, *layer, teacher_weights="shared", ste="clipped"),
        lambda x, *layer: ops.dual_conv2d(
            x[..., None, None], layer[0][..., None, None], layer[1][..., None, None], *layer[2:]
        ),
    ],
    ids=["identity", "clipped", "masked-bf16", "all", "teacher", "dual_linear", "dual_linear-shared", "dual_conv2d"],
)
def test_compiles_as_one_graph(operation: Callable[..., Tensor]) -> None:
    weight, mask, step = quantizer_inputs(Case((13, 31), step="[C]"))
    rows = normal_like(torch.empty(6, 31), seed=2)

    def run(function: Callable[..., Tensor]) -> list[Tensor | None]:
        x, w, s = with_gradients(rows, weight.clone(), step.clone())
        out = function(x, w, mask, s, 4)
        out.backward(normal_like(out))
        return [out.detach(), x.grad, w.grad, s.grad]

    torch.compiler.reset()
    compiled, eager = run(torch.compile(operation, fullgraph=True, backend="aot_eager")), run(operation)
    assert eager[2].any()
    for value, expected in zip(compiled, eager, strict=True):
        assert (value is None) == (expected is None)
        assert expected is None or torch.equal(value, expected)


# --- topk_mask

SELECTIONS = [[0], [1], [1, 0, 0], [7, 3], [257], [10, 20, 70], [33, 0, 67], [1023, 1025]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SELECTIONS, ids=str)
@pytest.mark.parametrize("sparsity", [0, 0.0, 0.1, 0.29, 0.5, 0.57, 0.7, 0.9, 0.999])
def test_topk_mask_prunes_exactly_int_p_n(sizes: list[int], sparsity: float, dtype: torch.dtype, device: str) -> None:
    weights = [normal_like(torch.empty(n, dtype=dtype, device=device), seed=n) for n in sizes]
    masks = ops.topk_mask(weights, sparsity)
    total, pruned = sum(sizes), int(sparsity * sum(sizes))
    assert [mask.shape for mask in masks] == [weight.shape for weight in weights]
    assert {mask.dtype for mask in masks} == {torch.bool}
    assert sum(int((~mask).sum()) for mask in masks) == ops.masked_count(weights, sparsity) == pruned

    # a stable sort of plain numbers: larger magnitudes first, then the lower index
    magnitudes = [abs(value) for weight in weights for value in weight.tolist()]
    kept = set(sorted(range(total), key=lambda i: (-magnitudes[i], i))[: total - pruned])
    assert torch.cat(masks).tolist() == [i in kept for i in range(total)]


def test_the_floats_that_bite_do() -> None:
    assert int(0.29 * 100) == 28  # .29 * 100 = 28.999...: what the operation promises is Python's own int(p N)
    assert ops.masked_count([torch.zeros(100)], 0.29) == 28
    assert ops.masked_count([torch.zeros(33), torch.zeros(()), torch.zeros(66)], 0.57) == 56


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    sparsity=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 99),
    levels=st.integers(1, 9),
)
def test_topk_mask_with_many_ties(sizes: list[int], sparsity: float, seed: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randint(-levels, levels + 1, (n,), generator=generator).float() for n in sizes]
    magnitudes = torch.cat(weights).abs().tolist()
    keep = len(magnitudes) - int(sparsity * len(magnitudes))
    kept = set(sorted(range(len(magnitudes)), key=lambda i: (-magnitudes[i], i))[:keep])
    assert torch.cat(ops.topk_mask(weights, sparsity)).tolist() == [i in kept for i in range(len(magnitudes))]


def test_topk_mask_of_mixed_shapes_layouts_and_dtypes() -> None:
    weights = [quantizer_inputs(case, dtype=DTYPES[i % 3], seed=i)[0] for i, case in enumerate(CASES)]
    assert {weight.dim() for weight in weights} == {0, 1, 2, 4}
    masks = ops.topk_mask(weights, 0.7)
    assert [mask.shape for mask in masks] == [weight.shape for weight in weights]
    flat = torch.cat([weight.float().flatten() for weight in weights])
    expected = ops.topk_mask([flat], 0.7)[0]
    assert torch.equal(torch.cat([mask.flatten() for mask in masks]), expected)
    assert (~expected).sum() == int(0.7 * flat.numel())


def test_negative_zero_ties_with_zero_and_denormals_rank_above() -> None:
    weight = torch.tensor([-0.0, 0.0, -0.0, 0.0])
    assert ops.topk_mask([weight], 0.5)[0].tolist() == [True, True, False, False]
    weight = torch.tensor([0.0, -1e-45, 1e-40, -0.0])
    assert ops.topk_mask([weight], 0.5)[0].tolist() == [False, True, True, False]
    assert ops.topk_mask([weight], 0.75)[0].tolist() == [False, False, True, False]
    weight = torch.tensor([0.0, -6e-8, 0.0, -1.2e-7], dtype=torch.float16)  # the two smallest of fp16
    assert ops.topk_mask([weight], 0.75)[0].tolist() == [False, False, False, True]


def test_neighbouring_magnitudes_are_told_apart() -> None:
    one = torch.tensor([1.0])
    above = torch.nextafter(one, 2 * one)
    assert ops.topk_mask([torch.cat([one, -above])], 0.5)[0].tolist() == [False, True]
    top = torch.finfo(torch.float32).max
    below = torch.nextafter(torch.tensor([-top]), one)
    assert ops.topk_mask([below, torch.tensor([top])], 0.5)[1].tolist() == [True]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("as_tensor", [int, torch.tensor, lambda k: torch.tensor([k], dtype=torch.int32)])
def test_topk_mask_in_place(as_tensor: Callable, device: str) -> None:
    weights = [quantizer_inputs(case, seed=i, device=device)[0] for i, case in enumerate(CASES)]
    masks = [quantizer_inputs(case, seed=i, device=device)[1] for i, case in enumerate(CASES)]
    total = sum(weight.numel() for weight in weights)
    addresses = [(mask.data_ptr(), mask.stride()) for mask in masks]
    for sparsity in (0.0, 0.29, 0.9, 0.1):  # masked weights come back, too
        k = as_tensor(total - int(sparsity * total))
        k = k.to(device) if isinstance(k, Tensor) else k
        assert ops.topk_mask_(masks, weights, k) is None
        expected = ops.topk_mask(weights, sparsity)
        assert all(torch.equal(mask, fresh) for mask, fresh in zip(masks, expected, strict=True))
    assert addresses == [(mask.data_ptr(), mask.stride()) for mask in masks]
    ops.topk_mask_(masks, weights, as_tensor(0).to(device) if as_tensor is not int else 0)
    assert not any(mask.any() for mask in masks)


def test_topk_mask_in_place_stays_within_a_strided_mask() -> None:
    whole = torch.ones(34, 69, dtype=torch.bool)
    weight = quantizer_inputs(Case((17, 23)))[0]
    ops.topk_mask_([whole[::2, 1::3]], [weight], 11)
    assert whole[::2, 1::3].sum() == 11
    assert whole.sum() == whole.numel() - 17 * 23 + 11


def test_weights_that_learn_can_be_ranked() -> None:
    weight = torch.tensor([1.0, 3.0, 2.0], requires_grad=True)
    (mask,) = ops.topk_mask([weight], 0.5)
    assert mask.tolist() == [False, True, True]
    assert not mask.requires_grad


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_cannot_be_ranked_is_named(value: float, dtype: torch.dtype) -> None:
    weights = [torch.ones(3), torch.ones((), dtype=dtype), torch.tensor([[0.0, value]], dtype=dtype)]
    masks = [torch.ones_like(weight, dtype=torch.bool) for weight in weights]
    for select in (partial(ops.topk_mask, weights, 0.5), partial(ops.topk_mask_, masks, weights, 2)):
        with pytest.raises(ops.NonFiniteWeightError, match=r"weights\[2\] of shape \(1, 2\) holds NaN or inf") as error:
            select()
        assert error.value.index == 2
    assert all(mask.all() for mask in masks)


# --- packing


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], []),
        ([-1], [0x0F]),
        ([-8, 7], [0x78]),
        ([0, 1, 2], [0x10, 0x02]),
        ([-2, -3, 5, -7, 6], [0xDE, 0x95, 0x06]),
    ],
)
def test_int4_bytes(values: list[int], expected: list[int]) -> None:
    packed = ops.pack_int4(torch.tensor(values, dtype=torch.int8))
    assert packed.dtype == torch.uint8
    assert packed.tolist() == expected
    unpacked = ops.unpack_int4(packed, len(values))
    assert unpacked.dtype == torch.int8
    assert unpacked.tolist() == values


@pytest.mark.parametrize(
    ("bits", "expected"), [("", []), ("1", [1]), ("00000001", [128]), ("1100000001", [3, 2]), ("111111111", [255, 1])]
)
def test_mask_bytes(bits: str, expected: list[int]) -> None:
    mask = torch.tensor([bit == "1" for bit in bits], dtype=torch.bool)
    packed = ops.pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == expected
    unpacked = ops.unpack_bits(packed, len(bits))
    assert unpacked.dtype == torch.bool
    assert torch.equal(unpacked, mask)


@given(values=st.lists(st.integers(-8, 7), max_size=70), dtype=st.sampled_from([torch.int8, torch.int32, torch.int64]))
def test_int4_round_trip(values: list[int], dtype: torch.dtype) -> None:
    packed = ops.pack_int4(torch.tensor(values, dtype=dtype))
    assert packed.shape == ((len(values) + 1) // 2,)
    assert ops.unpack_int4(packed, len(values)).tolist() == values


@given(st.lists(st.booleans(), max_size=70))
def test_mask_round_trip(bits: list[bool]) -> None:
    packed = ops.pack_bits(torch.tensor(bits, dtype=torch.bool))
    assert packed.shape == ((len(bits) + 7) // 8,)
    assert ops.unpack_bits(packed, len(bits)).tolist() == bits


@pytest.mark.parametrize("case", CASES, ids=str)
def test_packing_goes_by_flat_order(case: Case) -> None:
    weight, mask, step = quantizer_inputs(case)
    q = reference.quantize(weight, mask, step, 4).to(torch.int8)
    assert ops.unpack_int4(ops.pack_int4(q), q.numel()).tolist() == q.reshape(-1).tolist()
    assert ops.unpack_bits(ops.pack_bits(mask), mask.numel()).tolist() == mask.reshape(-1).tolist()


# --- what is refused

W, M, S = quantizer_inputs(Case((4, 3)))
X = torch.zeros(2, 3)
BYTES = torch.zeros(2, dtype=torch.uint8)
CALLS = {
    "fake_quant": ops.fake_quant,
    "fake_quant_all": lambda w, m, s, k, **options: ops.fake_quant_all([w], [m], [s], k, **options),
    "teacher_weight": ops.teacher_weight,
    "dual_linear": partial(ops.dual_linear, X),
    "dual_conv2d": partial(ops.dual_conv2d, torch.zeros(2, 3, 5, 5)),
}
QUANTIZER_ERRORS = [
    *[
        ((W, M, S, bits), ConfigError, rf"bits must be an integer in 2\.\.8, got {bits}")
        for bits in (1, 9, True, 4.0, -4)
    ],
    ((W, M.float(), S, 4), ValueError, r"mask must be bool .* \(4, 3\), got torch.float32 \(4, 3\)"),
    ((W, M.T, S, 4), ValueError, r"mask must be bool of the weight's shape \(4, 3\), got torch.bool \(3, 4\)"),
    ((W, M[0], S, 4), ValueError, r"mask must be bool of the weight's shape \(4, 3\), got torch.bool \(3,\)"),
    ((W, M, S.expand(3), 4), ValueError, r"shape \[\], \[1\] or \[4\] .* got torch.float32 \(3,\)"),
    ((W, M, S.expand(4, 1), 4), ValueError, r"shape \[\], \[1\] or \[4\] .* got torch.float32 \(4, 1\)"),
    ((W, M, S.int(), 4), ValueError, r"step must be floating point .* got torch.int32 \(1,\)"),
    ((W[0, 0], M[0, 0], S.expand(2), 4), ValueError, r"\[\], \[1\] or \[1\] .* got torch.float32 \(2,\)"),
    ((W.int(), M, S, 4), TypeError, r"weight must be floating point \(fp32, bf16 or fp16\), got torch.int32"),
]


@pytest.mark.parametrize("operation", CALLS)
@pytest.mark.parametrize(
    ("args", "error", "message"), QUANTIZER_ERRORS, ids=[message for *_, message in QUANTIZER_ERRORS]
)
def test_bad_quantizer_inputs_are_refused(operation: str, args: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CALLS[operation](*args)


@pytest.mark.parametrize("operation", [name for name in CALLS if name != "teacher_weight"])
def test_an_unknown_ste_is_refused(operation: str) -> None:
    with pytest.raises(ConfigError, match="ste must be one of identity, clipped; got 'lsq'"):
        CALLS[operation](W, M, S, 4, ste="lsq")


@pytest.mark.parametrize("operation", ["teacher_weight", "dual_linear", "dual_conv2d"])
def test_unknown_teacher_weights_are_refused(operation: str) -> None:
    with pytest.raises(ConfigError, match="teacher_weights must be one of latent, shared; got 'full'"):
        CALLS[operation](W, M, S, 4, teacher_weights="full")


@pytest.mark.parametrize("operation", ["fake_quant", "fake_quant_all"])
def test_an_integer_result_is_refused(operation: str) -> None:
    with pytest.raises(TypeError, match=r"dtype must be floating point .*, got torch.int8"):
        CALLS[operation](W, M, S, 4, dtype=torch.int8)


@pytest.mark.parametrize("counts", [(1, 2, 2, 2), (2, 1, 2, 2), (2, 2, 3, 2), (2, 2, 2, 1)])
def test_lists_of_other_lengths_are_refused(counts: tuple[int, int, int, int]) -> None:
    lists = [[value] * count for value, count in zip((W, M, S, 4), counts, strict=True)]
    got = "{}, {}, {} and {}".format(*counts)
    with pytest.raises(ValueError, match=f"one entry for each layer, got {got}"):
        ops.fake_quant_all(*lists)


@pytest.mark.parametrize(
    ("operation", "x", "message"),
    [
        ("dual_linear", torch.zeros(5, 3), r"at least 2 dimensions.* got \(5, 3\); .*torch.cat"),
        ("dual_linear", torch.zeros(4), r"at least 2 dimensions.* got \(4,\)"),
        ("dual_conv2d", torch.zeros(3, 3, 5, 5), r"at least 4 dimensions.* got \(3, 3, 5, 5\)"),
        ("dual_conv2d", torch.zeros(2, 5, 5), r"at least 4 dimensions.* got \(2, 5, 5\)"),
    ],
)
def test_what_cannot_be_halved_is_refused(operation: str, x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(ops, operation)(x, W, M, S, 4)


MASKS = [torch.ones(4, 3, dtype=torch.bool)]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        *[
            (partial(ops.topk_mask, [W], p), ConfigError, rf"sparsity must lie in \[0, 1\).* got {p!r}")
            for p in (1.0, 1, -0.1, NAN, INF, True, "0.5")
        ],
        (partial(ops.masked_count, [W], 1.5), ConfigError, r"sparsity must lie in \[0, 1\).* got 1.5"),
        (partial(ops.topk_mask, [], 0.5), ValueError, "at least one weight tensor .* got an empty list"),
        (partial(ops.topk_mask, [W, W.int()], 0.5), TypeError, r"weights\[1\] must be floating point, got torch.int32"),
        (partial(ops.topk_mask_, [], [], 0), ValueError, "at least one weight tensor .* got an empty list"),
        (partial(ops.topk_mask_, MASKS, [W, W], 1), ValueError, "one mask for each weight, got 1 masks and 2 weights"),
        (
            partial(ops.topk_mask_, [W], [W], 1),
            ValueError,
            r"masks\[0\] must be bool of shape \(4, 3\), got torch.float",
        ),
        (
            partial(ops.topk_mask_, [*MASKS, M.T], [W, W], 1),
            ValueError,
            r"masks\[1\] must be bool of shape \(4, 3\), got torch.bool \(3, 4\)",
        ),
        *[
            (partial(ops.topk_mask_, MASKS, [W], k), ValueError, rf"k must be an integer in 0\.\.12.* got {k!r}")
            for k in (-1, 13, 2.0, True, None)
        ],
        *[
            (partial(ops.topk_mask_, MASKS, [W], k), ValueError, rf"k must be an int32 or int64 tensor .* got {got}")
            for k, got in [
                (torch.tensor([1, 2]), r"torch.int64 \(2,\)"),
                (torch.tensor(2.0), r"torch.float32 \(\)"),
                (torch.tensor(True), r"torch.bool \(\)"),
            ]
        ],
        (partial(ops.pack_int4, torch.tensor([8])), ValueError, r"q must lie in -8\.\.7, got 8\.\.8"),
        (partial(ops.pack_int4, torch.tensor([-9, 3])), ValueError, r"q must lie in -8\.\.7, got -9\.\.3"),
        (partial(ops.pack_int4, torch.tensor([1.0])), TypeError, "q must be an integer tensor, got torch.float32"),
        (partial(ops.pack_int4, torch.tensor([True])), TypeError, "q must be an integer tensor, got torch.bool"),
        (partial(ops.pack_bits, torch.tensor([1])), TypeError, "mask must be bool, got torch.int64"),
        (partial(ops.unpack_int4, BYTES, 2), ValueError, "2 4-bit values take 1 bytes, got 2"),
        (partial(ops.unpack_int4, BYTES, 5), ValueError, "5 4-bit values take 3 bytes, got 2"),
        (partial(ops.unpack_int4, BYTES[:0], -1), ValueError, "-1 4-bit values take 0 bytes, got 0"),
        (partial(ops.unpack_bits, BYTES, 8), ValueError, "8 mask bits take 1 bytes, got 2"),
        (partial(ops.unpack_bits, BYTES, 17), ValueError, "17 mask bits take 3 bytes, got 2"),
        (partial(ops.unpack_bits, BYTES[:0], -7), ValueError, "-7 mask bits take 0 bytes, got 0"),
        (partial(ops.unpack_int4, BYTES.char(), 4), TypeError, r"flat uint8 tensor, got torch.int8 \(2,\)"),
        (partial(ops.unpack_bits, BYTES[None], 16), TypeError, r"flat uint8 tensor, got torch.uint8 \(1, 2\)"),
    ],
)
def test_bad_selections_and_bytes_are_refused(call: Callable, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
    assert MASKS[0].all()


def test_tolerances_are_roundings_of_their_dtype() -> None:
    """A table that is loosened by mistake shows: no entry is above 16 roundings of its dtype."""
    for dtype, tolerance in TOLERANCES.items():
        assert tolerance <= 8 * torch.finfo(dtype).eps
