"""Masks: exact counts, ties, what cannot be ranked."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from cases import (
    CASES,
    DEVICES,
    DTYPES,
    Case,
    normal_like,
    quantizer_inputs,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pqk_fast import ops

pytestmark = pytest.mark.usefixtures("poisoned_memory")

NAN, INF = math.nan, math.inf

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
