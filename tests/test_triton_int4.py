"""The packing kernels, on a GPU or in Triton's interpreter: the bytes of the reference."""

import pytest
import torch
from cases import CASES, KERNEL_DEVICE, Case, needs_triton, on_kernel_device, quantizer_inputs

needs_triton()

from pqk_fast import dispatch, reference
from pqk_fast.triton_kernels import int4

DEVICE = KERNEL_DEVICE
pytestmark = [on_kernel_device, pytest.mark.usefixtures("poisoned_memory", "small_tiles")]

COUNTS = [0, 1, 2, 7, 8, 9, 127, 128, 129, 257, 1024]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, 128 values a program. Compiled tiles are at least as large as a block."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(int4, "WORDS", 16)


def integers(count: int, bits: int) -> torch.Tensor:
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (count,), dtype=torch.int8, device=DEVICE)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width(bits: int, count: int) -> None:
    q = integers(count, bits)
    packed = int4.pack_ints(q, bits)
    assert packed.dtype == torch.uint8
    assert torch.equal(packed, reference.pack_ints(q, bits))
    unpacked = int4.unpack_ints(packed, count, bits)
    assert unpacked.dtype == torch.int8
    assert torch.equal(unpacked, q)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_with_tiles_as_on_a_gpu(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    q = integers(2 * 8 * int4.WORDS + 13, bits)
    packed = int4.pack_ints(q, bits)
    assert torch.equal(packed, reference.pack_ints(q, bits))
    assert torch.equal(int4.unpack_ints(packed, q.numel(), bits), q)


@pytest.mark.parametrize("count", COUNTS)
def test_masks(count: int) -> None:
    mask = torch.rand(count, device=DEVICE) < 0.5
    packed = int4.pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert torch.equal(packed, reference.pack_bits(mask))
    unpacked = int4.unpack_bits(packed, count)
    assert unpacked.dtype == torch.bool
    assert torch.equal(unpacked, mask)
    assert set(unpacked.view(torch.uint8).tolist()) <= {0, 1}


@pytest.mark.parametrize("bits", range(1, 8))
def test_one_value_out_of_range_is_found(bits: int) -> None:
    for place, value in ((0, 2 ** (bits - 1)), (130, -(2 ** (bits - 1)) - 1), (256, 127), (200, -128)):
        q = integers(257, bits)
        q[place] = value
        with pytest.raises(RuntimeError, match=f"expected values of {bits} bits"):
            int4.pack_ints(q, bits)


@pytest.mark.parametrize("bits", [1, 3, 4])
def test_bits_after_the_last_value_do_not_count(bits: int) -> None:
    for count in (1, 5, 129):
        q = integers(count, bits)
        packed = reference.pack_ints(q, bits)
        packed[-1] |= 0xFF << (count * bits % 8 or 8) & 0xFF
        assert torch.equal(int4.unpack_ints(packed, count, bits), q)


@pytest.mark.parametrize("bits", range(1, 9))
def test_bytes_that_are_not_aligned_or_not_contiguous(bits: int) -> None:
    q = integers(512, bits)
    packed = reference.pack_ints(q, bits)
    memory = torch.empty(2 * packed.numel() + 1, dtype=torch.uint8, device=DEVICE)
    memory[1 : packed.numel() + 1] = packed
    assert torch.equal(int4.unpack_ints(memory[1 : packed.numel() + 1], 512, bits), q)
    memory[1::2] = packed
    assert torch.equal(int4.unpack_ints(memory[1::2], 512, bits), q)
    assert torch.equal(int4.pack_ints(q[1:], bits), reference.pack_ints(q[1:], bits))
    assert torch.equal(int4.pack_ints(q[::3], bits), reference.pack_ints(q[::3], bits))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_packing_goes_by_flat_order(case: Case) -> None:
    weight, mask, step = quantizer_inputs(case, device=DEVICE.type)
    q = reference.quantize(weight, mask, step, 4).to(torch.int8)
    assert torch.equal(int4.pack_ints(q, 4), reference.pack_ints(q, 4))
    assert torch.equal(int4.pack_bits(mask), reference.pack_bits(mask))


@pytest.mark.native
@pytest.mark.parametrize("bits", range(2, 9))
def test_bytes_are_those_of_the_cpp_library(bits: int) -> None:
    q = integers(1009, bits)
    packed = int4.pack_ints(q, bits)
    assert torch.equal(packed.cpu(), dispatch.pack_ints(q.cpu(), bits))
    assert torch.equal(int4.unpack_ints(packed, 1009, bits).cpu(), dispatch.unpack_ints(packed.cpu(), 1009, bits))
    mask = q > 0
    assert torch.equal(int4.pack_bits(mask).cpu(), dispatch.pack_bits(mask.cpu()))
    assert torch.equal(int4.unpack_bits(packed[:100], 800).cpu(), dispatch.unpack_bits(packed[:100].cpu(), 800))
