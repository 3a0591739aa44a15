"""The encodings of the packed file: every one gives back what it got, takes the bytes it should, and trusts nothing."""

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pqk_fast import ops
from pqk_fast.deploy import encodings, reader
from pqk_fast.deploy.encodings import encode, entropy_bound, smallest
from pqk_fast.deploy.reader import ENCODINGS, PackedError, decode


def values(count: int, bits: int, density: float, seed: int = 0) -> np.ndarray:
    """Bell-shaped, clipped at the ends of the grid, with so many zeros."""
    generator = np.random.default_rng(seed)
    most = 2 ** (bits - 1) - 1
    drawn = np.clip(np.round(generator.normal(size=count) * most / 2), -most, most)
    return np.where(generator.random(count) < density, drawn, 0).astype(np.int8)


COUNTS = (0, 1, 7, 255, 3249, reader.LANE_WEIGHTS * 3 + 5, reader.LANE_WEIGHTS * (reader.FEW_LANES + 1) + 11)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", COUNTS)
def test_what_is_encoded_comes_back(count: int, bits: int, encoding: str) -> None:
    for density in (0.0, 0.1, 1.0) if count < 10_000 else (0.1,):
        q = values(count, bits, density)
        payload = encode(q, bits, encoding)
        back = decode(payload, count, bits, encoding)
        assert payload.dtype == np.uint8
        assert back.dtype == np.int8
        assert np.array_equal(back, q)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8).flatmap(lambda bits: st.tuples(
    st.just(bits), st.lists(st.integers(1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1), max_size=300)
)))  # fmt: skip
def test_any_integers_come_back(case: tuple[int, list[int]]) -> None:
    bits, drawn = case
    q = np.array(drawn, np.int8)
    for encoding in ENCODINGS:
        assert np.array_equal(decode(encode(q, bits, encoding), len(q), bits, encoding), q)


@pytest.mark.parametrize("bits", [2, 4, 5, 8])
def test_dense_is_the_librarys_packing(bits: int) -> None:
    q = values(1001, bits, 0.7)
    assert np.array_equal(encode(q, bits, "dense"), ops.pack_ints(torch.from_numpy(q), bits).numpy())
    mask = encode(q, bits, "bitmask")[: (len(q) + 7) // 8]
    assert np.array_equal(mask, ops.pack_bits(torch.from_numpy(q != 0)).numpy())


@pytest.mark.parametrize(("bits", "density"), [(2, 0.1), (4, 0.02), (4, 0.1), (4, 0.5), (8, 1.0)])
def test_entropy_coding_comes_near_its_bound(bits: int, density: float) -> None:
    """Within 2 % and 40 bytes: tables, a lane's state, the length."""
    q = values(30_000, bits, density)
    bound, size = entropy_bound(q), len(encode(q, bits, "entropy"))
    assert bound < size < 1.02 * bound + (40 if bits < 8 else 300)


def test_the_bound_is_that_of_the_formula() -> None:
    q = np.array([0] * 6 + [1, 1], np.int8)
    assert entropy_bound(q) == pytest.approx(8 * (0.25 * 2 + 0.75 * np.log2(4 / 3)) / 8)
    q = np.array([0, 0, 0, 0, 1, -1, 2, 3], np.int8)
    assert entropy_bound(q) == pytest.approx((8 * 1 + 4 * 2) / 8)
    assert entropy_bound(np.zeros(0, np.int8)) == 0


def test_the_smallest_is_chosen() -> None:
    for bits, density in ((4, 1.0), (4, 0.5), (8, 0.01), (2, 0.3)):
        q = values(5000, bits, density)
        name, payload = smallest(q, bits)
        sizes = {encoding: len(encode(q, bits, encoding)) for encoding in ENCODINGS}
        assert sizes[name] == len(payload) == min(sizes.values())
    assert smallest(np.zeros(0, np.int8), 4)[0] == "dense"


def test_values_off_the_grid_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected values in -7\.\.7 for 4 bits, got -8\.\.0"):
        encode(np.array([0, -8], np.int8), 4, "dense")
    with pytest.raises(ValueError, match="expected one of dense"):
        encode(np.zeros(3, np.int8), 4, "zip")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_payload_that_is_cut_off_or_too_long_is_refused(encoding: str) -> None:
    q = values(301, 4, 0.3)
    payload = encode(q, 4, encoding)
    for size in range(len(payload)):
        with pytest.raises(PackedError):
            decode(payload[:size], len(q), 4, encoding)
    with pytest.raises(PackedError):
        decode(np.append(payload, np.uint8(1)), len(q), 4, encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_flipped_bits_raise_nothing_but_packed_errors(encoding: str) -> None:
    """Values may be others, which the file's checksum is for; but they are on the grid, and as many."""
    q = values(301, 4, 0.3)
    payload = encode(q, 4, encoding)
    refused = 0
    for place in range(len(payload)):
        for bit in range(8):
            flipped = payload.copy()
            flipped[place] ^= 1 << bit
            try:
                back = decode(flipped, len(q), 4, encoding)
            except PackedError:
                refused += 1
            else:
                assert back.shape == q.shape
                assert np.abs(back).max() <= 7
    assert refused or encoding == "dense"


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_noise_raises_nothing_but_packed_errors(encoding: str) -> None:
    generator = np.random.default_rng(1)
    for size in (0, 1, 4, 5, 6, 30, 200):
        for _ in range(50):
            noise = generator.integers(0, 256, size, dtype=np.uint8)
            with contextlib.suppress(PackedError):
                assert np.abs(decode(noise, 97, 4, encoding)).max() <= 7


def test_an_empty_table_of_frequencies_is_refused() -> None:
    with pytest.raises(PackedError, match="table of frequencies is empty"):
        reader.frequencies(np.zeros(15, np.uint8))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=255).filter(any))
def test_frequencies_sum_up_and_keep_every_symbol(counts: list[int]) -> None:
    codes = encodings.frequency_codes(np.array(counts, np.int64))
    frequency = reader.frequencies(codes)
    assert frequency.sum() == 1 << reader.PROBABILITY_BITS
    assert ((frequency > 0) == (np.array(counts) > 0)).all()
