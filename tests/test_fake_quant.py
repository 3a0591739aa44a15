"""fake_quant, fake_quant_all and the teacher's weight: forward and every gradient against the reference."""

import math

import pytest
import torch
from cases import (
    CASES,
    DEVICES,
    DTYPES,
    STE,
    Case,
    assert_within,
    normal_like,
    quantizer_inputs,
    same_bits,
    step_gradient_magnitude,
    with_gradients,
)
from hypothesis import given
from hypothesis import strategies as st

from pqk_fast import ops, reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

NAN, INF = math.nan, math.inf


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


@pytest.mark.parametrize(("ste", "mask_gradients"), STE)
def test_gradients_of_gradients(ste: str, mask_gradients: bool) -> None:
    """A Hessian-vector product of sum(wbar^3), by hand: 6 wbar where the estimator passes both times."""
    weight, mask, step = (
        torch.tensor([0.9, -0.3, 0.4, 5.0]),
        torch.tensor([True, True, False, True]),
        torch.tensor([0.3]),
    )
    w = weight.clone().requires_grad_()
    for make in (
        lambda: ops.fake_quant(w, mask, step, 4, ste, mask_gradients),
        lambda: ops.fake_quant_all([w], [mask], [step], 4, ste, mask_gradients)[0],
    ):
        out = make()
        (first,) = torch.autograd.grad(out.pow(3).sum(), w, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), w)
        passes = torch.tensor([True, True, not mask_gradients, ste == "identity"])
        torch.testing.assert_close(second, torch.where(passes, 6 * out.detach(), 0.0))
        torch.testing.assert_close(first.detach(), torch.where(passes, 3 * out.detach().square(), 0.0))


def test_any_nonzero_byte_of_a_mask_keeps() -> None:
    mask = torch.tensor([0, 1, 2, 128], dtype=torch.uint8).view(torch.bool)
    w = torch.tensor([0.5, 0.5, 0.5, 0.5], requires_grad=True)
    out = ops.fake_quant(w, mask, torch.tensor([0.5]), 4, mask_gradients=True)
    out.sum().backward()
    assert out.tolist() == w.grad.mul(0.5).tolist() == [0.0, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn], ids=str)
def test_other_floating_dtypes_are_refused(dtype: torch.dtype) -> None:
    weight, mask, step = quantizer_inputs(Case((3,)))
    with pytest.raises(TypeError, match=r"dtype must be floating point \(fp32, bf16 or fp16\), got"):
        ops.fake_quant(weight, mask, step, 4, dtype=dtype)
