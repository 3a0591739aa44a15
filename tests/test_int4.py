"""Packed nibbles and mask bits, byte by byte."""

import pytest
import torch
from cases import CASES, Case, on_threads, quantizer_inputs
from hypothesis import given
from hypothesis import strategies as st

from pqk_fast import ops, reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")


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


def plain_bytes(values: list[int], bits: int) -> list[int]:
    """The layout in plain Python: one large integer, its bytes from the lowest."""
    stream = sum((value % 2**bits) << (i * bits) for i, value in enumerate(values))
    return list(stream.to_bytes((len(values) * bits + 7) // 8, "little"))


@given(data=st.data(), bits=st.integers(2, 8), dtype=st.sampled_from([torch.int8, torch.int16, torch.int64]))
def test_every_width(data: st.DataObject, bits: int, dtype: torch.dtype) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    values = data.draw(st.lists(st.integers(low, high), max_size=70))
    values *= data.draw(st.sampled_from([1, 1, 17]))  # beyond one vector
    packed = ops.pack_ints(torch.tensor(values, dtype=dtype), bits)
    assert packed.tolist() == plain_bytes(values, bits) == reference.pack_ints(torch.tensor(values), bits).tolist()
    assert ops.unpack_ints(packed, len(values), bits).tolist() == values
    assert reference.unpack_ints(packed, len(values), bits).tolist() == values


@given(bits=st.integers(2, 8), size=st.integers(1, 300), at=st.floats(0, 1, exclude_max=True), above=st.booleans())
def test_one_value_out_of_range_is_found(bits: int, size: int, at: float, above: bool) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    q = torch.zeros(size, dtype=torch.int16)
    q[int(at * size)] = high + 1 if above else low - 1
    for values in (q, *([q.to(torch.int8)] if bits < 8 else [])):
        with pytest.raises(ValueError, match=rf"q must lie in {low}\.\.{high}, got"):
            ops.pack_ints(values, bits)


def test_padding_bits_do_not_count() -> None:
    assert ops.unpack_ints(torch.tensor([0b11111101], dtype=torch.uint8), 1, 3).tolist() == [-3]
    assert ops.unpack_bits(torch.tensor([0b11111101], dtype=torch.uint8), 2).tolist() == [True, False]


@pytest.mark.parametrize("threads", [1, 2])
def test_large_and_odd_sizes(threads: int) -> None:
    with on_threads(threads):
        for bits in range(2, 9):
            q = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (1_000_003,), dtype=torch.int8)
            packed = ops.pack_ints(q, bits)
            assert torch.equal(packed[-5000:], reference.pack_ints(q[-40_003 // 8 * 8 - 3 :], bits)[-5000:])
            assert torch.equal(ops.unpack_ints(packed, q.numel(), bits), q)
        mask = torch.rand(1_000_003) < 0.1
        assert torch.equal(ops.unpack_bits(ops.pack_bits(mask), mask.numel()), mask)


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
