"""The four ways to choose a first step size, by hand; channels, pruned weights and weights without a size."""

import pytest
import torch
from cases import CASES, Case, quantizer_inputs

from pqk_fast import reference
from pqk_fast.config import STEP_INITS
from pqk_fast.settings import ConfigError
from pqk_fast.step_size import initial_step

WEIGHT = torch.tensor([[1.0, -2.0, 100.0], [3.0, 14.0, 0.0]])
MASK = torch.tensor([[True, True, False], [True, True, True]])


@pytest.mark.parametrize(
    ("method", "whole", "channels"),
    [
        ("mean", [4.0], [1.5, 17 / 3]),  # (1 + 2 + 3 + 14 + 0) / 5 | (1 + 2) / 2, (3 + 14 + 0) / 3
        ("lsq", [8 / 7**0.5], [3 / 7**0.5, 34 / 3 / 7**0.5]),  # 2 mean / sqrt 7
        ("max", [2.0], [2 / 7, 2.0]),  # 14 / 7 | 2 / 7, 14 / 7
    ],
)
def test_by_hand(method: str, whole: list[float], channels: list[float]) -> None:
    one = initial_step(WEIGHT, MASK, 4, method)
    assert one.dtype == torch.float32
    torch.testing.assert_close(one, torch.tensor(whole), rtol=2**-22, atol=0)
    each = initial_step(WEIGHT, MASK, 4, method, per_channel=True)
    torch.testing.assert_close(each, torch.tensor(channels), rtol=2**-22, atol=0)


def test_mse_by_hand() -> None:
    # 2 bits: -1, 0, 1. max|w| / Q = 2; candidates are 2 (.3 + .025 i), i in 0..32: .6, .65 ... 2.2.
    # Below S = 2 each +-1 becomes +-S and the 2 becomes S: 4 (S - 1)^2 + (S - 2)^2 is least at S = 6 / 5, candidate 12,
    # with 4 * .04 + .64 = .8. From S = 2 on +-1 becomes 0: an error of 4 or more.
    weight = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0, 0.0])
    step = initial_step(weight, torch.ones(6, dtype=torch.bool), 2, "mse")
    torch.testing.assert_close(step, torch.tensor([1.2]), rtol=2**-22, atol=0)


def squared_error(weight: torch.Tensor, mask: torch.Tensor, step: torch.Tensor, bits: int) -> float:
    return float((reference.fake_quant(weight, mask, step, bits) - weight * mask).square().sum())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mse_beats_the_others_on_heavy_tails(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4096, generator=generator) / torch.rand(4096, generator=generator).clamp_min(0.05)
    mask = torch.rand(4096, generator=generator) < 0.5
    errors = {m: squared_error(weight, mask, initial_step(weight, mask, bits, m), bits) for m in STEP_INITS}
    assert errors["mse"] == min(errors.values())
    # at 8 bits the grid is fine enough to cover the tail, and max|w| / Q itself is the best candidate
    assert errors["mse"] < 0.9 * errors["max"] or bits == 8


@pytest.mark.parametrize("per_channel", [False, True])
def test_mse_is_the_best_of_its_candidates(per_channel: bool) -> None:
    weight, mask, _ = quantizer_inputs(Case((13, 31)))
    step = initial_step(weight, mask, 4, "mse", per_channel)
    rows = [(weight[i], mask[i], step[i]) for i in range(13)] if per_channel else [(weight, mask, step)]
    for row, kept, chosen in rows:
        scale = (row * kept).abs().max() / 7
        shares = [0.3 + 0.025 * i for i in range(33)]
        least = min(squared_error(row, kept, share * scale, 4) for share in shares)
        assert squared_error(row, kept, chosen, 4) <= least * (1 + 1e-5)
        assert 0.299 < chosen / scale < 1.101


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("method", STEP_INITS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_shape_and_sign(case: Case, method: str, per_channel: bool) -> None:
    weight, mask, _ = quantizer_inputs(case)
    before = weight.clone()
    step = initial_step(weight.requires_grad_(), mask, 4, method, per_channel)
    assert step.shape == (weight.shape[0] if per_channel and weight.dim() else 1,)
    assert step.dtype == torch.float32
    assert not step.requires_grad
    assert (step > 0).all()
    assert step.isfinite().all()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("method", STEP_INITS)
def test_each_channel_is_that_channel_alone(method: str) -> None:
    weight, mask, _ = quantizer_inputs(Case((19, 3, 3, 3)))
    each = initial_step(weight, mask, 4, method, per_channel=True)
    alone = torch.cat([initial_step(w, m, 4, method) for w, m in zip(weight, mask, strict=True)])
    torch.testing.assert_close(each, alone, rtol=2**-21, atol=0)  # sums of 27 in another order


@pytest.mark.parametrize("method", STEP_INITS)
@pytest.mark.parametrize(("bits", "fallback"), [(4, 1 / 7), (8, 1 / 127)])
def test_nothing_but_zeros_gets_one_over_q(method: str, bits: int, fallback: float) -> None:
    kept = torch.ones(2, 3, dtype=torch.bool)
    weight = torch.tensor([[0.0, -0.0, 0.0], [5.0, 5.0, 5.0]])
    pruned = torch.tensor([[True], [False]]).expand(2, 3)
    expected = torch.tensor([fallback])
    assert torch.equal(initial_step(weight[:1], kept[:1], bits, method), expected)
    assert torch.equal(initial_step(weight, pruned, bits, method), expected)  # what is left are zeros
    assert torch.equal(initial_step(weight + 5, ~kept, bits, method), expected)  # nothing is left
    assert torch.equal(initial_step(torch.zeros(0), torch.zeros(0, dtype=torch.bool), bits, method), expected)
    channels = initial_step(weight, kept, bits, method, per_channel=True)
    assert channels[0] == expected
    assert channels[1] == initial_step(weight[1], kept[1], bits, method)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="step_init must be one of mean, lsq, max, mse; got 'std'"):
        initial_step(WEIGHT, MASK, 4, "std")
    with pytest.raises(ConfigError, match=r"bits must be an integer in 2\.\.8, got 9"):
        initial_step(WEIGHT, MASK, 9)
