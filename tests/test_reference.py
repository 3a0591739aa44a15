"""Eqs 1-12 against numbers worked out by hand, and against two other engines: NumPy forward, autograd backward."""

import math

import numpy as np
import pytest
import torch
from cases import CASES, Case, assert_within, normal_like, quantizer_inputs, step_gradient_magnitude
from torch import Tensor

from pqk_fast import reference

NAN, INF = math.nan, math.inf


def tensor(*values: float, **options) -> Tensor:
    return torch.tensor(values, **options)


def logits(*values: float) -> Tensor:
    """A batch of one, in fp64."""
    return torch.tensor([values], dtype=torch.float64, requires_grad=True)


def close(actual: Tensor, expected: list) -> None:
    """Equal to hand-worked fp64 numbers but for their last digits."""
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-15)


# --- Eq. 1


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [
        (0, 0.0),  # .8 - .8 * 1
        (1, 0.4625),  # .8 (1 - 27/64) = .8 * 37/64
        (2, 0.7),  # .8 (1 - 1/8)
        (3, 0.7875),  # .8 (1 - 1/64): the last epoch is still below the target
        (4, 0.8),
        (5, 0.8),  # held
    ],
)
def test_eq1_sparsity(epoch: int, expected: float) -> None:
    assert reference.sparsity_at(epoch, 4, 0.8) == pytest.approx(expected, abs=1e-15)


def test_eq1_starts_from_another_sparsity_and_epoch() -> None:
    # .8 + (.2 - .8) * (1 - 2/4)^3 = .8 - .6 / 8
    assert reference.sparsity_at(2, 4, 0.8, initial=0.2) == pytest.approx(0.725, abs=1e-15)
    assert reference.sparsity_at(5, 4, 0.8, initial=0.2, start=3) == pytest.approx(0.725, abs=1e-15)
    assert reference.sparsity_at(1, 4, 0.8, initial=0.2, start=3) == pytest.approx(0.2, abs=1e-15)
    assert reference.sparsity_at(0, 0, 0.8, initial=0.2) == 0.8


# --- Eqs 2-4


def test_levels() -> None:
    assert [reference.levels(bits) for bits in range(2, 9)] == [1, 3, 7, 15, 31, 63, 127]


@pytest.mark.parametrize(
    ("bits", "step", "weights", "expected"),
    [
        (4, 1.0, [0.5, 1.5, 2.5, 3.5, -1.5, -2.5, -3.5], [0, 2, 2, 4, -2, -2, -4]),  # ties to even
        (4, 0.25, [0.3, -0.3, 0.125, 0.375, 0.49], [1, -1, 0, 2, 2]),  # v = 1.2, -1.2, .5, 1.5, 1.96
        (4, 1.0, [6.4, 6.5, 6.6, 7.0, 7.6, 1e30, INF], [6, 6, 7, 7, 7, 7, 7]),  # the grid ends at +-7
        (4, 1.0, [-6.4, -6.5, -6.6, -7.0, -7.6, -1e30, -INF], [-6, -6, -7, -7, -7, -7, -7]),
        (8, 1.0, [125.5, 126.5, 127.5, 128.0, -127.5, -200.0], [126, 126, 127, 127, -127, -127]),  # at +-127
        (2, 0.5, [0.25, 0.26, 0.75, -0.25, -9.0], [0, 1, 1, 0, -1]),  # v = .5, .52, 1.5, -.5, -18; at +-1
    ],
)
def test_eq2_quantize(bits: int, step: float, weights: list[float], expected: list[int]) -> None:
    weight = torch.tensor(weights)
    q = reference.quantize(weight, torch.ones_like(weight, dtype=torch.bool), tensor(step), bits)
    assert q.tolist() == expected


def test_eq2_prunes_before_it_quantizes() -> None:
    weight, mask = tensor(1e30, -INF, NAN, 1.0), tensor(False, False, False, True)
    assert reference.quantize(weight, mask, tensor(1.0), 4).tolist() == [0, 0, 0, 1]


def test_eq2_has_no_negative_zero() -> None:
    weight, mask = tensor(-0.0, -0.4, -0.5, -3.0), tensor(True, True, True, False)
    q = reference.quantize(weight, mask, tensor(1.0), 4)
    assert q.tolist() == [0, 0, 0, 0]
    assert not torch.signbit(q).any()
    assert not torch.signbit(reference.dequantize(q, tensor(0.1))).any()


@pytest.mark.parametrize(
    ("step", "weight", "expected"),
    [
        (0.9, "0x1.599998p+0", 2),  # w (1 / S) is 1.5, a tie; w / S would be the next number below it
        (0.01, "0x1.70a3d8p-5", 4),  # w (1 / S) is 4.5, a tie; w / S would be the next number above it
    ],
)
def test_eq2_takes_the_reciprocal_of_the_step(step: float, weight: str, expected: int) -> None:
    assert reference.quantize(tensor(float.fromhex(weight)), tensor(True), tensor(step), 4).tolist() == [expected]


def test_eq3_clip_passes_nan() -> None:
    clipped = reference.clip(tensor(-8.0, -7.0, 0.5, 7.5, NAN), -7, 7)
    assert clipped[:4].tolist() == [-7, -7, 0.5, 7]
    assert clipped[4].isnan()
    assert reference.quantize(tensor(NAN), tensor(True), tensor(1.0), 4).isnan().all()


def test_eq4_dequantize() -> None:
    assert reference.dequantize(tensor(-7.0, 0.0, 3.0), tensor(0.5)).tolist() == [-3.5, 0, 1.5]
    q = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    assert reference.dequantize(q, tensor(0.5, 0.25)).tolist() == [[0.5, -1.0], [0.75, 1.0]]


def test_fake_quant_rounds_to_the_output_dtype_once() -> None:
    # v = 9 / .3 = 30 -> 7; S q = 2.1; there bf16 counts in 1/64: 134.4 -> 134 / 64, fp16 in 1/512: 1075.2 -> 1075 / 512
    weight, mask, step = tensor(9.0), tensor(True), tensor(0.3)
    assert reference.fake_quant(weight, mask, step, 4).item() == np.float32(7) * np.float32(0.3)
    assert reference.fake_quant(weight, mask, step, 4, torch.bfloat16).item() == 134 / 64
    assert reference.fake_quant(weight.half(), mask, step, 4).item() == 1075 / 512
    assert reference.fake_quant(weight.half(), mask, step, 4, torch.float32).dtype == torch.float32


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fake_quant_has_the_same_bits_as_numpy(case: Case, bits: int) -> None:
    weight, mask, step = quantizer_inputs(case, bits)
    w, m, q = weight.numpy(), mask.numpy(), np.float32(2 ** (bits - 1) - 1)
    s = step.numpy().reshape(-1, *[1] * (w.ndim - 1)) if case.step == "[C]" else step.numpy().reshape(())
    v = np.where(m, w, np.float32(0)) * (np.float32(1) / s)
    expected = (np.rint(np.minimum(np.maximum(v, -q), q)) + np.float32(0)) * s
    assert expected.dtype == np.float32
    actual = reference.fake_quant(weight, mask, step, bits)
    assert actual.shape == weight.shape
    np.testing.assert_array_equal(actual.numpy().view(np.int32), np.asarray(expected).view(np.int32))


# --- straight-through estimator and step-size gradient

# S = .5, Q = 7:      v = 1.25   10    -10    pruned  -2.75   7 (on the end)
WEIGHT = tensor(0.625, 5.0, -5.0, 0.9, -1.375, 3.5)
MASK = tensor(True, True, True, False, True, True)
GRAD = tensor(1.0, 2.0, 3.0, 4.0, 5.0, 6.0)


@pytest.mark.parametrize(
    ("ste", "mask_gradients", "expected"),
    [
        ("identity", False, [1, 2, 3, 4, 5, 6]),
        ("identity", True, [1, 2, 3, 0, 5, 6]),
        ("clipped", False, [1, 0, 0, 4, 5, 6]),
        ("clipped", True, [1, 0, 0, 0, 5, 6]),
    ],
)
def test_straight_through_weight_gradient(ste: str, mask_gradients: bool, expected: list[int]) -> None:
    grad_weight, grad_step = reference.fake_quant_backward(GRAD, WEIGHT, MASK, tensor(0.5), 4, ste, mask_gradients)
    assert grad_weight.tolist() == expected
    # round(v) - v [|v| < 7]: 1 - 1.25, 7, -7, 0, -3 + 2.75, 7; times 1..6: -.25 + 14 - 21 + 0 - 1.25 + 42 = 33.5
    assert grad_step.tolist() == [33.5]


def test_step_gradient_of_one_channel_each() -> None:
    weight = torch.tensor([[0.625, 5.0], [0.9, -0.34375]])  # v = 1.25, 10 | pruned, -1.375
    mask = torch.tensor([[True, True], [False, True]])
    grad = torch.tensor([[1.0, 2.0], [4.0, 5.0]])
    _, grad_step = reference.fake_quant_backward(grad, weight, mask, tensor(0.5, 0.25), 4)
    assert grad_step.tolist() == [13.75, 1.875]  # -.25 * 1 + 7 * 2 | 0 + (-1 + 1.375) * 5


def test_step_gradient_has_the_shape_of_the_step() -> None:
    for step in (torch.tensor(0.5), tensor(0.5)):
        assert reference.fake_quant_backward(GRAD, WEIGHT, MASK, step, 4)[1].shape == step.shape


def naive_lsq(weight: Tensor, mask: Tensor, step: Tensor, bits: int) -> Tensor:
    """LSQ by autograd: rounding passes its gradient, pruning and clipping stop theirs."""
    q = 2 ** (bits - 1) - 1
    if step.numel() != 1:
        step = step.reshape(-1, *[1] * (weight.dim() - 1))
    v = torch.clamp(weight * mask / step, -q, q)
    return ((v + (v.round() - v).detach()) * step).reshape(weight.shape)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_naive_autograd_lsq(case: Case, bits: int) -> None:
    weight, mask, step = quantizer_inputs(case, bits)
    grad = normal_like(weight)
    w, s = weight.double().requires_grad_(), step.double().requires_grad_()
    naive_lsq(w, mask, s, bits).backward(grad.double())

    grad_weight, grad_step = reference.fake_quant_backward(grad, weight, mask, step, bits, "clipped", True)
    assert torch.equal(grad_weight.double(), w.grad)
    assert_within(grad_step, s.grad, step_gradient_magnitude(grad, weight, mask, step, bits), torch.float32)


# --- Eqs 5-8


def test_eq5_softened() -> None:
    close(reference.softened(logits(0, math.log(3)), 1.0), [[0.25, 0.75]])
    close(reference.softened(logits(0, math.log(9)), 2.0), [[0.25, 0.75]])  # log 9 / 2 = log 3
    z = logits(0, math.log(9))
    reference.softened(z, 2.0)[0, 1].backward()
    close(z.grad, [[-0.09375, 0.09375]])  # dp_1/dz = p_1 (e_1 - p) / T = .75 (-.25, .25) / 2


def test_eq6_cross_entropy() -> None:
    z = torch.tensor([[0, math.log(3)]] * 2, dtype=torch.float64, requires_grad=True)  # p = .25, .75
    loss = reference.cross_entropy(z, torch.tensor([1, 0]))
    close(loss, 0.8369882167858358)  # (-log .75 - log .25) / 2 = (0.2876820724517809 + 1.3862943611198906) / 2
    loss.backward()
    close(z.grad, [[0.125, -0.125], [-0.375, 0.375]])  # (p - y) / 2


def test_eq7_updates_every_weight_and_the_step() -> None:
    grad_weight, grad_step = reference.fake_quant_backward(GRAD, WEIGHT, MASK, tensor(0.5), 4)
    grads = grad_weight.double(), grad_step.double()
    weight, step = reference.phase1_update(WEIGHT.double(), tensor(0.5).double(), *grads, lr=0.5)
    # w - .5 g, the pruned fourth weight too: .9 - .5 * 4 = -1.1
    close(weight, [0.125, 4.0, -6.5, float(np.float32(0.9)) - 2, -3.875, 0.5])
    close(step, [0.498325])  # .5 - 1e-4 * .5 * 33.5 = .5 - .001675


def test_eq8_kl_divergence() -> None:
    p, q = tensor(0.25, 0.75, dtype=torch.float64), tensor(0.5, 0.5, dtype=torch.float64, requires_grad=True)
    close(reference.kl_divergence(p, q), 0.130812035941137)  # .25 log .5 + .75 log 1.5 = -.17328680 + .30409883
    close(reference.kl_divergence(q, p), 0.14384103622589042)  # .5 log 2 + .5 log(2/3): not symmetric
    assert reference.kl_divergence(p, p).item() == 0
    reference.kl_divergence(p, q).backward()
    close(q.grad, [-0.5, -1.5])  # -p / q
    two_rows = reference.kl_divergence(torch.stack([p, p]), torch.stack([q, p]))
    close(two_rows, 0.130812035941137 / 2)  # mean over the batch


# --- Eqs 9, 10: alpha = beta = .5, T = 2, y = 1
# z_S = 0, log 9: p^S = .1, .9 at T = 1 and .25, .75 at T = 2.    z_T = 0, 0: p^T = .5, .5 at both.


def test_eq9_student_loss() -> None:
    student, teacher = logits(0, math.log(9)), logits(0, 0)
    loss = reference.student_loss(student, teacher, torch.tensor([1]), 0.5, 0.5, 2.0)
    # .5 * -log .9 + .5 * 4 * KL(p^T || p^S) = .5 * .10536051565782628 + 2 * .14384103622589042
    close(loss, 0.340362330280694)
    loss.backward()
    close(student.grad, [[-0.2, 0.2]])  # .5 (.1, -.1) + .5 * 4 / 2 (p^S - p^T) = (.05, -.05) + (-.25, .25)
    assert teacher.grad is None


def test_eq10_teacher_loss() -> None:
    student, teacher = logits(0, math.log(9)), logits(0, 0)
    loss = reference.teacher_loss(student, teacher, torch.tensor([1]), 0.5, 0.5, 2.0)
    # .5 * log 2 + .5 * 4 * KL(p^S || p^T) = .5 * .6931471805599453 + 2 * .130812035941137
    close(loss, 0.6081976621622466)
    loss.backward()
    close(teacher.grad, [[0.5, -0.5]])  # .5 (.5, -.5) + .5 * 4 / 2 (p^T - p^S) = (.25, -.25) + (.25, -.25)
    assert student.grad is None


# --- Eqs 11, 12


def test_eqs_11_and_12_move_complementary_weights() -> None:
    weight, mask = tensor(1.0, 2.0, 3.0, dtype=torch.float64), tensor(True, False, True)
    of_student, of_teacher = tensor(1.0, 2.0, 3.0), tensor(4.0, 5.0, 6.0)
    student = reference.student_update(weight, mask, of_student, lr=0.5)
    teacher = reference.teacher_update(weight, mask, of_teacher, lr=0.5)
    close(student, [0.5, 2.0, 1.5])  # 1 - .5 * 1, stays, 3 - .5 * 3
    close(teacher, [1.0, -0.5, 3.0])  # stays, 2 - .5 * 5, stays
    close(reference.teacher_update(student, mask, of_teacher, lr=0.5), [0.5, -0.5, 1.5])
    close(reference.student_update(teacher, mask, of_student, lr=0.5), [0.5, -0.5, 1.5])  # in either order


def test_teacher_weight() -> None:
    weight, mask, step = tensor(0.6, 0.6, 9.0), tensor(True, False, True), tensor(0.5)
    assert torch.equal(reference.teacher_weight(weight, mask, step, 4), weight)
    shared = reference.teacher_weight(weight, mask, step, 4, "shared")
    assert shared.tolist() == [0.5, weight[1].item(), 3.5]  # v = 1.2 -> 1, the pruned weight itself, v = 18 -> 7


# --- masks and packing


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (0, [[False, False], [False, False, False]]),
        (1, [[True, False], [False, False, False]]),  # |-3|
        (2, [[True, False], [True, False, False]]),  # 2 at flat index 2, before the equal one at 4
        (3, [[True, False], [True, False, True]]),
        (4, [[True, True], [True, False, True]]),  # 1 at flat index 1, before the equal one at 3
        (5, [[True, True], [True, True, True]]),
    ],
)
def test_topk_mask_keeps_the_largest_over_all_tensors(keep: int, expected: list) -> None:
    weights = [tensor(-3.0, 1.0), tensor(2.0, -1.0, -2.0)]
    for k in (keep, torch.tensor(keep), torch.tensor([keep])):
        assert [mask.tolist() for mask in reference.topk_mask(weights, k)] == expected


def test_int4_bytes() -> None:
    # nibbles 1, F (-1), 7, 8 (-8), D (-3), low nibble first, one of padding
    q = torch.tensor([1, -1, 7, -8, -3], dtype=torch.int8)
    packed = reference.pack_ints(q, 4)
    assert packed.tolist() == [0xF1, 0x87, 0x0D]
    assert packed.dtype == torch.uint8
    assert torch.equal(reference.unpack_ints(packed, 5, 4), q)


def test_mask_bytes() -> None:
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 0, 1, 0, 1], dtype=torch.bool)
    packed = reference.pack_bits(mask)
    assert packed.tolist() == [0b10001101, 0b10]  # least significant bit first
    assert packed.dtype == torch.uint8
    assert torch.equal(reference.unpack_bits(packed, 10), mask)
