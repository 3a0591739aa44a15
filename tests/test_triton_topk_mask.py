"""The kernels of selection, on a GPU or in Triton's interpreter: the masks of the reference, bit for bit."""

import math

import pytest
import torch
from cases import CASES, DTYPES, KERNEL_DEVICE, laid_out, needs_triton, normal_like, on_kernel_device, quantizer_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

needs_triton()

from pqk_fast import dispatch, reference
from pqk_fast.triton_kernels import group_mask, operands, segments, topk_mask

DEVICE = KERNEL_DEVICE
pytestmark = [on_kernel_device, pytest.mark.usefixtures("poisoned_memory", "small_tiles")]

SIZES = [[1], [2, 1], [257], [0, 7, 0, 300, 1031, 0], [63, 64, 65, 128, 129], [509, 1, 0, 1021]]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted: many tiles a segment, many segments a tensor. Compiled tiles are at least as large as a block."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(segments, "TILE", 64)
        monkeypatch.setattr(segments, "SEGMENTS", 2)
        monkeypatch.setattr(group_mask, "TILE", 64)


def normal(sizes: list[int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [normal_like(torch.empty(n, dtype=dtype, device=DEVICE), seed=n) for n in sizes]


def empty_masks(weights: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(weight, dtype=torch.bool) for weight in weights]


def number(value: int) -> Tensor:
    return torch.tensor(value, device=DEVICE)


def check(weights: list[Tensor], *keeps: int) -> None:
    """The launcher's masks are those of the reference."""
    weights = [weight.to(DEVICE) for weight in weights]
    total = sum(weight.numel() for weight in weights)
    for keep in keeps:
        masks = empty_masks(weights)
        status = topk_mask.topk_mask_(masks, weights, number(keep))
        assert (status.shape, status.dtype, status.device, status.item()) == ((), torch.int64, DEVICE, -1)
        expected = reference.topk_mask(weights, min(max(keep, 0), total))
        assert all(map(torch.equal, masks, expected)), f"keep {keep} of {total}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_topk_mask(sizes: list[int], dtype: torch.dtype) -> None:
    check(normal(sizes, dtype), 1, sum(sizes) // 3, sum(sizes) - 1)


def test_any_number_may_be_kept() -> None:
    check(normal([65, 0, 130]), -(2**40), -1, 0, 1, 194, 195, 196, 2**40)


def test_with_tiles_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert segments.TILE > 1000
    check(normal([10_007, 2 * segments.TILE, 3]), 5000)


@pytest.mark.parametrize("mixed", [False, True])
def test_topk_mask_of_all_shapes_and_layouts(mixed: bool) -> None:
    check([quantizer_inputs(case, dtype=DTYPES[i % 3 * mixed], seed=i)[0] for i, case in enumerate(CASES)], 0, 1000)


def test_strided_masks_are_written_and_nothing_beside_them() -> None:
    whole = torch.ones(34, 69, dtype=torch.bool, device=DEVICE)
    weight = normal([391])[0].reshape(17, 23)
    topk_mask.topk_mask_([whole[::2, 1::3]], [weight], number(11))
    assert torch.equal(whole[::2, 1::3], reference.topk_mask([weight], 11)[0])
    assert whole.sum() == whole.numel() - weight.numel() + 11
    topk_mask.topk_mask_([whole[::2, 1::3]], [torch.full_like(weight, math.nan)], number(30))
    assert whole.sum() == whole.numel() - weight.numel() + 11


def test_memory_that_is_not_aligned() -> None:
    weights = [weight[3:] for weight in normal([300, 200])]
    masks = [torch.ones(weight.numel() + 1, dtype=torch.bool, device=DEVICE)[1:] for weight in weights]
    topk_mask.topk_mask_(masks, weights, number(100))
    assert all(map(torch.equal, masks, reference.topk_mask(weights, 100)))


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_equal_magnitudes_stay_in_order(value: float) -> None:
    """Those of negative zeros, too."""
    weights = [torch.full((n,), value) * (1 - 2 * (torch.arange(n) % 2)) for n in (257, 0, 65, 700)]
    check(weights, 0, 1, 256, 257, 300, 1021, 1022)


@settings(max_examples=20)
@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=4),
    kept=st.floats(0, 1),
    seed=st.integers(0, 99),
    levels=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
)
def test_topk_mask_with_many_ties(sizes: list[int], kept: float, seed: int, levels: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randint(-levels, levels + 1, (n,), generator=generator).to(dtype) for n in sizes]
    check(weights, int(kept * sum(sizes)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_and_large_magnitudes_are_told_apart(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    # denormals, too
    powers = info.smallest_normal * 0.5 ** torch.arange(-4, 8 if dtype == torch.bfloat16 else 12).double()
    weight = torch.cat([powers, -powers * 1.5, torch.tensor([0.0, -0.0, info.max, -info.max, 1.0, 1.0 + info.eps])])
    weight = weight.to(dtype)
    check([weight, weight.flip(0)], *range(0, 2 * weight.numel() + 1, 5))


def test_lists_of_empty_weights() -> None:
    for weights in ([torch.empty(0, device=DEVICE)], [torch.empty(0, 3, device=DEVICE)] * 2):
        check(weights, 0, 3)
        assert topk_mask.tie_counts(weights, number(1)).tolist() == [0] * len(weights)
        assert not topk_mask.magnitude_histogram(weights, 0, number(0)).any()
        topk_mask.mask_at_threshold_(empty_masks(weights), weights, number(1), number(0).expand(len(weights)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_the_number_kept_is_one_integer(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weights = normal([103, 30])
    masks = empty_masks(weights)
    topk_mask.topk_mask_(masks, weights, torch.full(shape, 70, dtype=dtype, device=DEVICE))
    assert all(map(torch.equal, masks, reference.topk_mask(weights, 70)))


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_tensor_that_cannot_be_ranked_is_named(value: float, dtype: torch.dtype) -> None:
    weights = normal([0, 65, 700, 3, 300], dtype)
    masks = [weight > 0 for weight in weights]
    before = [mask.clone() for mask in masks]
    flags = operands.error_flags(DEVICE).zero_()
    for index, place in ((4, 299), (2, 650), (2, 1)):
        weights[index][place] = value
        assert topk_mask.topk_mask_(masks, weights, number(500)).item() == index
        assert all(map(torch.equal, masks, before))
    assert flags.nonzero().tolist() == [[operands.NOT_FINITE]]
    flags.zero_()


@pytest.mark.native
def test_masks_are_those_of_the_cpp_library() -> None:
    weights = normal([509, 0, 1031])
    host = [weight.cpu() for weight in weights]
    for keep in (0, 1, 1000, 1540):
        masks, expected = empty_masks(weights), empty_masks(host)
        topk_mask.topk_mask_(masks, weights, number(keep))
        dispatch.topk_mask_(expected, host, torch.tensor(keep))
        assert all(torch.equal(mask.cpu(), also) for mask, also in zip(masks, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_digits_are_counted_as_by_the_reference(dtype: torch.dtype) -> None:
    weights = normal([257, 0, 700], dtype)
    weights.append(laid_out(weights[2][:391].reshape(17, 23), "strided"))
    key = int(reference.magnitude_key(weights[0])[7])
    for level, prefix in ((0, 0), (1, key >> 20), (2, key >> 10), (1, 5), (0, 1), (2, -1), (1, 2**40)):
        counts = topk_mask.magnitude_histogram(weights, level, number(prefix))
        assert counts.dtype == torch.int64
        assert torch.equal(counts, reference.magnitude_histogram(weights, level, number(prefix)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_at_a_threshold(dtype: torch.dtype) -> None:
    weights = [(4 * weight).round() / 3 for weight in normal([257, 0, 700, 3], dtype)]
    weights.append(laid_out(weights[2][:391].reshape(17, 23), "transposed"))
    key = int(reference.magnitude_key(weights[0])[7])
    for threshold in (key, 0, -1, -(2**40), 2**40):
        counts = topk_mask.tie_counts(weights, number(threshold))
        expected = reference.tie_counts(weights, number(threshold))
        assert counts.dtype == torch.int64
        assert torch.equal(counts, expected)
        for kept in (expected, expected // 2, expected * 0 - 1)[: 3 if threshold == key else 1]:
            masks = empty_masks(weights)
            topk_mask.mask_at_threshold_(masks, weights, number(threshold), kept)
            assert all(map(torch.equal, masks, reference.mask_at_threshold(weights, number(threshold), kept)))


@pytest.mark.parametrize("group", range(2, 17))
def test_group_mask(group: int) -> None:
    for index, shape in enumerate([(3, 2 * group), (5, group, 3), (2, 3 * group, 2, 2), (1, group), (0, group)]):
        weight = normal([math.prod(shape)], DTYPES[(group + index) % 3])[0].reshape(shape)
        weight[::2] = (weight[::2] * 2).round()  # ties
        keep = 1 + (group + index) % (group - 1)
        mask = torch.empty_like(weight, dtype=torch.bool)
        assert group_mask.group_mask_(mask, weight, keep, group).item() == -1
        assert torch.equal(mask, reference.group_mask(weight, keep, group))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_groups_of_other_layouts(layout: str) -> None:
    weight = laid_out(normal([720])[0].reshape(6, 8, 3, 5), layout)
    mask = torch.ones_like(weight, dtype=torch.bool)
    strides = mask.stride()
    assert group_mask.group_mask_(mask, weight, 2, 4).item() == -1
    assert torch.equal(mask, reference.group_mask(weight, 2, 4))
    assert mask.stride() == strides


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_that_cannot_be_ranked(value: float, dtype: torch.dtype) -> None:
    weight = torch.ones(3, 80, dtype=dtype, device=DEVICE)
    mask = weight > 0
    flags = operands.error_flags(DEVICE).zero_()
    weight[2, 79] = value
    assert group_mask.group_mask_(mask, weight, 2, 4).item() == 0
    assert mask.all()
    assert flags.nonzero().tolist() == [[operands.NOT_FINITE]]
    flags.zero_()


def test_segments_cover_each_tensor_in_whole_tiles() -> None:
    for sizes in ((1,), (0, 5, 0), (1000, 1, 64, 65), (2**33 + 7, 3), (2**24,) * 40, tuple(range(0, 5000, 97))):
        rows = segments.segment_table(sizes, 64, 12, torch.device("cpu")).tolist()
        assert len(rows) <= 12 + len(sizes)
        full = [index for index, size in enumerate(sizes) if size]
        assert [full[slot] for slot, *_ in rows] == [tensor for _, tensor, *_ in rows]
        for tensor in full:
            mine = [row for row in rows if row[1] == tensor]
            assert [begin for *_, begin, _, _ in mine] == [0, *(end for *_, end, _ in mine[:-1])]
            assert mine[-1][3] == sizes[tensor]
            assert all(begin % 64 == 0 and begin < end for *_, begin, end, _ in mine)
            assert {rows[first][1:3] == [tensor, 0] for *_, first in mine} == {True}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("levels", [2, 1000, 0])
def test_millions_of_weights(levels: int, dtype: torch.dtype) -> None:
    weights = normal([5_000_011, 0, 70_000, 3, 2**20], dtype)
    if levels:  # ties
        weights = [(weight * levels).round() / levels for weight in weights]
    total = sum(weight.numel() for weight in weights)
    check(weights, 1, total // 10, total // 2, total - 7)
    for level, prefix in ((0, 0), (1, 0x3F8), (2, 0x3F8 << 10)):
        counts = topk_mask.magnitude_histogram(weights, level, number(prefix))
        assert torch.equal(counts, reference.magnitude_histogram(weights, level, number(prefix)))
    mask, weight = torch.empty(2000, 2500, dtype=torch.bool, device=DEVICE), weights[0][:5_000_000].reshape(2000, 2500)
    group_mask.group_mask_(mask, weight, 2, 4)
    assert torch.equal(mask, reference.group_mask(weight, 2, 4))


@pytest.mark.gpu
def test_a_cuda_graph_selects_anew_at_each_replay() -> None:
    weights, keep = normal([300_007, 10, 70_000]), number(5)
    masks = empty_masks(weights)
    topk_mask.topk_mask_(masks, weights, keep)  # compiles, and makes the table
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        status = topk_mask.topk_mask_(masks, weights, keep)
    for kept in (70_000, 1, 200_000):
        keep.fill_(kept)
        weights[0].normal_()
        graph.replay()
        assert status.item() == -1
        assert all(map(torch.equal, masks, reference.topk_mask(weights, kept)))
