"""Packed nibbles and mask bits, byte by byte."""

import pytest
import torch
from cases import (
    CASES,
    Case,
    quantizer_inputs,
)
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
