"""Masks: exact counts, ties, what cannot be ranked."""

import math
from collections.abc import Callable
from functools import partial
from itertools import product

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

from pqk_fast import ops, reference

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


def brute_force_groups(weight: Tensor, keep: int, group: int) -> Tensor:
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    for index in product(*(range(n) for n in (weight.shape[0], weight.shape[1] // group, *weight.shape[2:]))):
        place = [(index[0], index[1] * group + i, *index[2:]) for i in range(group)]
        for at in sorted(place, key=lambda at: (-abs(float(weight[at])), at[1]))[:keep]:
            mask[at] = True
    return mask


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", range(2, 17))
def test_group_mask(group: int, dtype: torch.dtype, device: str) -> None:
    for index, shape in enumerate([(3, 2 * group), (5, group, 3), (2, 3 * group, 2, 2), (1, group), (0, group)]):
        weight = normal_like(torch.empty(shape, dtype=dtype, device=device), seed=group)
        weight[::2] = (weight[::2] * 2).round()  # ties
        keep = 1 + (group + index) % (group - 1)
        mask = ops.group_mask(weight, keep, group)
        assert torch.equal(mask.cpu(), brute_force_groups(weight.cpu(), keep, group))
        assert torch.equal(mask.cpu(), reference.group_mask(weight.cpu(), keep, group))


def test_group_mask_of_other_layouts() -> None:
    weight = normal_like(torch.empty(6, 8, 3, 5))
    for laid_out in (weight.contiguous(memory_format=torch.channels_last), weight.mT.contiguous().mT):
        mask = torch.ones_like(laid_out, dtype=torch.bool)
        strides = mask.stride()
        ops.group_mask_(mask, laid_out, 2, 4)
        assert torch.equal(mask, brute_force_groups(weight, 2, 4))
        assert mask.stride() == strides


@pytest.mark.parametrize("value", [NAN, INF])
def test_groups_that_cannot_be_ranked_leave_the_mask(value: float) -> None:
    weight = torch.ones(3, 8)
    weight[2, 7] = value
    mask = torch.ones(3, 8, dtype=torch.bool)
    with pytest.raises(ops.NonFiniteWeightError, match="holds NaN or inf"):
        ops.group_mask_(mask, weight, 2, 4)
    assert mask.all()


@pytest.mark.parametrize(
    ("shape", "keep", "group", "message"),
    [
        ((3, 8), 4, 4, "expected 0 < keep < group <= 16, such as 2 of 4; got 4 of 4"),
        ((3, 8), 0, 4, "got 0 of 4"),
        ((3, 34), 1, 17, "got 1 of 17"),
        ((3, 6), 2, 4, r"inputs that are a multiple of 4, got shape \(3, 6\); leave the layer out"),
        ((8,), 2, 4, r"need a weight \[out, in, \.\.\.\].*got shape \(8,\)"),
    ],
)
def test_groups_that_do_not_fit_are_refused(shape: tuple, keep: int, group: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.group_mask(torch.ones(shape), keep, group)


@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=4),
    ranks=st.integers(1, 4),
    levels=st.sampled_from([2, 9, 10_000]),
    kept=st.floats(0.01, 1),
    seed=st.integers(0, 99),
)
def test_shards_agree_on_the_mask_of_the_whole(
    sizes: list[int], ranks: int, levels: int, kept: float, seed: int
) -> None:
    """Every process holds a part of each tensor's rows; histograms are summed and tie counts gathered."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randint(-levels, levels + 1, (n,), generator=generator).float() / 7 for n in sizes]
    if not (total := sum(sizes)):
        return
    keep = torch.tensor(max(1, int(kept * total)))
    shards = [[weight.tensor_split(ranks)[rank] for weight in weights] for rank in range(ranks)]

    def all_reduced(level: int, prefix: Tensor) -> Tensor:
        return torch.stack([ops.magnitude_histogram(shard, level, prefix) for shard in shards]).sum(0)

    threshold, ties_kept = ops.topk_threshold(all_reduced, keep)
    ties = torch.stack([ops.tie_counts(shard, threshold) for shard in shards], dim=1)  # [tensors, ranks]
    before = ties.flatten().cumsum(0).reshape(ties.shape) - ties
    mine = (ties_kept - before).clamp(min=torch.zeros_like(ties), max=ties)
    masks = [[torch.empty_like(part, dtype=torch.bool) for part in shard] for shard in shards]
    for rank, shard in enumerate(shards):
        ops.mask_at_threshold_(masks[rank], shard, threshold, mine[:, rank])
    whole = [torch.empty_like(weight, dtype=torch.bool) for weight in weights]
    ops.topk_mask_(whole, weights, keep)
    for index, mask in enumerate(whole):
        assert torch.equal(torch.cat([masks[rank][index] for rank in range(ranks)]), mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_steps_of_a_sharded_selection_are_the_references(dtype: torch.dtype) -> None:
    weights = [normal_like(torch.empty(n, dtype=dtype), seed=n) for n in (257, 0, 33)]
    for level, prefix in ((0, 0), (1, 0x3F8), (2, 0x3F8 << 10), (1, 5)):
        histogram = ops.magnitude_histogram(weights, level, torch.tensor(prefix))
        assert torch.equal(histogram, reference.magnitude_histogram(weights, level, torch.tensor(prefix)))
    threshold = reference.magnitude_key(weights[0])[7]
    assert torch.equal(ops.tie_counts(weights, threshold), reference.tie_counts(weights, threshold))
    masks = [torch.empty_like(weight, dtype=torch.bool) for weight in weights]
    for ties in ([0, 0, 0], [1, 0, 5]):
        ops.mask_at_threshold_(masks, weights, threshold, torch.tensor(ties))
        for mask, expected in zip(
            masks, reference.mask_at_threshold(weights, threshold, torch.tensor(ties)), strict=True
        ):
            assert torch.equal(mask, expected)
    with pytest.raises(ValueError, match="level must be 0, 1 or 2, got 3"):
        ops.magnitude_histogram(weights, 3, torch.tensor(0))
    with pytest.raises(ValueError, match=r"one count for each weight, \[3\], got \(2,\)"):
        ops.mask_at_threshold_(masks, weights, threshold, torch.tensor([1, 2]))


def test_ties_below_zero_keep_none_and_masks_that_overlap_are_refused() -> None:
    weight, mask = torch.tensor([1.0, 1.0, 1.0, 2.0]), torch.zeros(4, dtype=torch.bool)
    ops.mask_at_threshold_([mask], [weight], reference.magnitude_key(weight)[0], torch.tensor([-1]))
    assert mask.tolist() == [False, False, False, True]
    first = torch.zeros(2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"masks\[1\] has several elements in one place \(expand\).*mask.clone\(\)"):
        ops.topk_mask_([first, mask[:1].expand(4)], [torch.ones(2), weight], 3)
    assert not first.any()
