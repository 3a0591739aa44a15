"""The launchers of dual_linear themselves, on a GPU or interpreted: sizes, layouts and splits that fuse or not."""

from functools import partial

import pytest
import torch
from cases import (
    DTYPES,
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
from pqk_fast.triton_kernels import dual_forward, dual_weight, launch, operands

DEVICE = KERNEL_DEVICE
pytestmark = [on_kernel_device, pytest.mark.usefixtures("poisoned_memory")]

CASES = [
    (3, Case((13, 31))),
    (3, Case((13, 31), step="[C]")),
    (1, Case((1, 1))),
    (1, Case((64, 64))),
    (10, Case((17, 23), layout="strided")),
    (6, Case((17, 23), step="[C]", layout="transposed")),
    (0, Case((13, 31))),
    (67, Case((257, 127), step="[C]")),
    (17, Case((5, 1000))),
]


def normal(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return normal_like(torch.empty(shape, dtype=dtype, device=DEVICE), seed=seed)


def products(x: Tensor, grad: Tensor, layer: tuple, clipped: bool, shared: bool, bias: Tensor | None) -> list[Tensor]:
    """out, dx and dw in fp64 (or of the magnitudes of all factors), from two products."""
    student, teacher, passes, mask = layer
    half = x.shape[0] // 2
    out = torch.cat([x[:half] @ student.T, x[half:] @ teacher.T]) + (0 if bias is None else bias)
    grad_x = torch.cat([grad[:half] @ student, grad[half:] @ teacher])
    of_student, of_teacher = grad[:half].T @ x[:half], grad[half:].T @ x[half:]
    return [out, grad_x, torch.where(mask, torch.where(passes, of_student, 0.0), of_teacher)]


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "case"), CASES, ids=str)
def test_is_two_products(rows: int, case: Case, dtype: torch.dtype, shared: bool, clipped: bool) -> None:
    bits = 4
    weight, mask, step = quantizer_inputs(case, bits, dtype, DEVICE.type)
    outs, ins = case.shape
    x, grad = normal(2 * rows, ins, dtype=dtype, seed=2), normal(2 * rows, outs, dtype=dtype, seed=3)
    bias = laid_out(normal(2, outs, dtype=dtype, seed=4).T.contiguous().T, "contiguous")[0]  # not contiguous
    made = [
        dual_forward.dual_linear(x, weight, mask, step, bits, bias, shared),
        *dual_forward.dual_linear_backward(grad, x, weight, mask, step, bits, clipped, shared, True, True),
    ]
    student = reference.quantize(weight, mask, step, bits).double() * reference.per_channel(step, weight).double()
    teacher = torch.where(mask, student, weight.double()) if shared else weight.double()
    passes = reference.scaled(weight, mask, step).abs() <= reference.levels(bits) if clipped else torch.ones_like(mask)
    of = partial(products, clipped=clipped, shared=shared)
    truth = of(x.double(), grad.double(), (student, teacher, passes, mask), bias=bias.double())
    sizes = of(
        x.double().abs(),
        grad.double().abs(),
        (student.abs(), teacher.abs(), torch.ones_like(mask), mask),
        bias=bias.double().abs(),
    )
    low = [t.to(dtype) for t in (student, teacher)]
    baseline = of(x, grad, (*low, passes, mask), bias=bias)
    for actual, expected, size, theirs in zip(made, truth, sizes, baseline, strict=True):
        assert actual.dtype == dtype
        assert_within(actual, expected, size, dtype, theirs)
    assert made[2].stride() == torch.empty_like(weight).stride()


@pytest.mark.parametrize("splits", [1, 2, 8])
def test_sums_over_programs_are_the_same_every_time(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "splits", lambda *sizes: splits)
    weight, mask, step = quantizer_inputs(Case((70, 700)), 4, device=DEVICE.type)
    x = normal(10, 700, dtype=torch.float32, seed=2)
    first, again = (dual_forward.dual_linear(x, weight, mask, step, 4, None, False) for _ in range(2))
    assert torch.equal(first, again)
    student = reference.fake_quant(weight, mask, step, 4).double()
    truth = torch.cat([x[:5].double() @ student.T, x[5:].double() @ weight.double().T])
    size = torch.cat([x[:5].double().abs() @ student.abs().T, x[5:].double().abs() @ weight.double().abs().T])
    assert_within(first, truth, size, torch.float32)
    assert all(not tickets.any() for tickets in operands._counters.values())


@pytest.mark.parametrize("clipped", [False, True])
def test_selection_of_gradients_in_a_frame(clipped: bool) -> None:
    """Rows of no whole loads, in memory that holds NaN on both sides: nothing beside them is read or written."""
    weight, mask, step = quantizer_inputs(Case((1, 37)), 4, device=DEVICE.type)
    frame = torch.full((3, 37 + 48), torch.nan, device=DEVICE)
    parts = frame[:, 16:53]
    parts.copy_(normal(3, 37, dtype=torch.float32, seed=5))
    student, teacher, latent = (part[None] for part in parts)
    made = dual_weight.dual_weight_backward(student, teacher, latent, mask, step, 4, clipped)
    passed, _ = reference.fake_quant_backward(student, latent, mask, step, 4, "clipped" if clipped else "identity")
    assert torch.equal(made, torch.where(mask, passed, teacher))
    assert weight.shape == made.shape
