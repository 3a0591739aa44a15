"""The losses against Eqs 9 and 10 of the reference, by value and by gradient."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pqk_fast import reference
from pqk_fast.losses import DistillationLoss, MutualDistillationLoss

WEIGHTS = [(0.5, 0.5, 2.0), (1.0, 0.0, 2.0), (0.0, 1.0, 1.0), (0.25, 3.0, 5.0)]


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of two branches ``[17, 12]`` in fp64, that learn, and labels."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(2, 17, 12, generator=generator, dtype=torch.float64)).unbind()
    labels = torch.randint(12, (17,), generator=generator)
    return student.requires_grad_(), teacher.requires_grad_(), labels


def same(actual: Tensor, expected: Tensor) -> None:
    """Equal but for the last digits of fp64: two ways to write a softmax."""
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("alpha", "beta", "temperature"), WEIGHTS)
def test_distillation_is_eq9_and_with_roles_exchanged_eq10(alpha: float, beta: float, temperature: float) -> None:
    student, teacher, labels = batch()
    loss = DistillationLoss(alpha, beta, temperature)
    for one, other, equation in (
        (student, teacher, reference.student_loss),
        (teacher, student, lambda t, s, *rest: reference.teacher_loss(s, t, *rest)),
    ):
        value, expected = loss(one, other, labels), equation(one, other, labels, alpha, beta, temperature)
        assert value.shape == ()
        same(value, expected)
        (gradient,) = torch.autograd.grad(value, one, retain_graph=True)
        same(gradient, torch.autograd.grad(expected, one)[0])
        assert torch.autograd.grad(value, other, allow_unused=True) == (None,)


@pytest.mark.parametrize(("alpha", "beta", "temperature"), WEIGHTS)
def test_mutual_is_the_sum_and_mixes_no_gradients(alpha: float, beta: float, temperature: float) -> None:
    student, teacher, labels = batch()
    value = MutualDistillationLoss(alpha, beta, temperature)(student, teacher, labels)
    rest = (student, teacher, labels, alpha, beta, temperature)
    of_student, of_teacher = reference.student_loss(*rest), reference.teacher_loss(*rest)
    same(value, of_student + of_teacher)
    value.backward()
    same(student.grad, torch.autograd.grad(of_student, student)[0])
    same(teacher.grad, torch.autograd.grad(of_teacher, teacher)[0])


def test_the_teacher_may_have_weights_of_its_own() -> None:
    student, teacher, labels = batch()
    loss = MutualDistillationLoss()
    loss.set_weights(0.25, 3.0, teacher=(1.0, 0.0))
    value = loss(student, teacher, labels)
    same(value, DistillationLoss(0.25, 3.0)(student, teacher, labels) + F.cross_entropy(teacher, labels))
    value.backward()
    assert teacher.grad.abs().max() > 0
    loss.set_weights(0.25, 3.0, teacher=(0.0, 0.0))
    student.grad, teacher.grad = None, None
    loss(student, teacher, labels).backward()
    assert student.grad.abs().max() > 0
    assert teacher.grad.abs().max() == 0
    loss.set_weights(0.5, 0.5)
    same(loss(student, teacher, labels), MutualDistillationLoss()(student, teacher, labels))


def test_label_smoothing_is_the_cross_entropys() -> None:
    student, teacher, labels = batch()
    for kind in (DistillationLoss, MutualDistillationLoss):
        plain, smooth = (kind(0.5, 0.5, label_smoothing=part)(student, teacher, labels) for part in (0.0, 0.1))
        sides = (student,) if kind is DistillationLoss else (student, teacher)
        change = sum(F.cross_entropy(x, labels, label_smoothing=0.1) - F.cross_entropy(x, labels) for x in sides)
        same(smooth - plain, 0.5 * change)


def test_by_hand() -> None:
    # alpha = beta = .5, T = 2, y = 1; p^S = .1, .9 (T = 1) and .25, .75 (T = 2), p^T = .5, .5: see test_reference.py
    student = torch.tensor([[0, math.log(9)]], dtype=torch.float64, requires_grad=True)
    teacher = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    value = MutualDistillationLoss()(student, teacher, torch.tensor([1]))
    same(value, torch.tensor(0.340362330280694 + 0.6081976621622466, dtype=torch.float64))
    value.backward()
    same(student.grad, torch.tensor([[-0.2, 0.2]], dtype=torch.float64))
    same(teacher.grad, torch.tensor([[0.5, -0.5]], dtype=torch.float64))


@pytest.mark.parametrize("kind", [DistillationLoss, MutualDistillationLoss])
def test_set_weights_changes_the_buffers_in_place(kind: type[DistillationLoss]) -> None:
    student, teacher, labels = batch()
    loss = kind(0.5, 0.5, 2.0)
    addresses = loss.alpha.data_ptr(), loss.beta.data_ptr()
    loss.set_weights(1.0, 0.0)
    assert (loss.alpha.item(), loss.beta.item()) == (1.0, 0.0)
    assert addresses == (loss.alpha.data_ptr(), loss.beta.data_ptr())
    assert torch.equal(loss(student, teacher, labels), kind(1.0, 0.0, 2.0)(student, teacher, labels))
    same(DistillationLoss(1.0, 0.0)(student, teacher, labels), reference.cross_entropy(student, labels))


def test_nothing_is_saved_and_nothing_learns() -> None:
    loss = MutualDistillationLoss()
    assert loss.state_dict() == {}
    assert list(loss.parameters()) == []
    assert {name for name, _ in loss.named_buffers()} == {"alpha", "beta", "teacher_alpha", "teacher_beta"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits(dtype: torch.dtype) -> None:
    student, teacher, labels = batch()
    low = [logits.detach().to(dtype).requires_grad_() for logits in (student, teacher)]
    rounded = [logits.detach().float().requires_grad_() for logits in low]
    value, expected = (MutualDistillationLoss()(*pair, labels) for pair in (low, rounded))
    value.backward()
    expected.backward()
    assert low[0].grad.dtype == dtype
    eps = torch.finfo(dtype).eps
    # log-probabilities up to 20 are rounded, and so are the loss's few terms
    torch.testing.assert_close(value.float(), expected, rtol=4 * eps, atol=0)
    for actual, wanted in zip(low, rounded, strict=True):
        torch.testing.assert_close(actual.grad.float(), wanted.grad, rtol=0, atol=4 * eps * wanted.grad.abs().max())


def test_logits_that_are_certain_stay_finite() -> None:
    student = torch.tensor([[0.0, 1e4]], requires_grad=True)
    value = MutualDistillationLoss()(student, torch.tensor([[1e4, 0.0]]), torch.tensor([0]))
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


BAD = [(-0.1, 0.5), (0.5, -0.1), (math.nan, 0.5), (0.5, math.nan), (math.inf, 0.5)]


@pytest.mark.parametrize("kind", [DistillationLoss, MutualDistillationLoss])
@pytest.mark.parametrize(("alpha", "beta"), BAD)
def test_bad_weights_are_refused(kind: type[DistillationLoss], alpha: float, beta: float) -> None:
    message = f"alpha and beta must not be negative, and finite; got {alpha} and {beta}"
    with pytest.raises(ValueError, match=message):
        kind(alpha, beta)
    loss = kind()
    with pytest.raises(ValueError, match=message):
        loss.set_weights(alpha, beta)
    assert (loss.alpha.item(), loss.beta.item()) == (0.5, 0.5)


@pytest.mark.parametrize("temperature", [0.0, -2.0, math.nan, math.inf])
def test_bad_temperatures_are_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature must be positive and finite, got {temperature}"):
        DistillationLoss(temperature=temperature)


@pytest.mark.parametrize("shapes", [((2, 3, 4, 4), (2, 3, 4, 4)), ((3,), (3,)), ((2, 3), (2, 4))])
def test_logits_of_another_form_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    student, teacher = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=r"expected two logits \[B, classes\], got"):
        MutualDistillationLoss()(student, teacher, torch.zeros(2, dtype=torch.int64))


def test_a_divergence_of_neighbours_survives_low_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(64, 100, generator=generator).bfloat16()
    other = (one.float() + 0.1 * torch.randn(64, 100, generator=generator)).bfloat16()
    labels = torch.zeros(64, dtype=torch.long)
    loss = DistillationLoss(alpha=0.0, beta=1.0)
    expected = loss(one.double(), other.double(), labels)
    torch.testing.assert_close(loss(one, other, labels).double(), expected, rtol=1e-3, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(loss(one, other, labels).double(), expected, rtol=1e-3, atol=0)
