"""When masks move, how sparse they are, and the learning rate: at every boundary."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pqk_fast.config import PhaseConfig
from pqk_fast.schedule import last_mask_step, learning_rate, sparsity_of_mask

# 100 steps in epochs of 25, masks every 8 steps: the last multiple of 8 below 100 is 96
PHASE = {"steps": 100, "epoch_steps": 25, "interval": 8, "target": 0.8}


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.0),
        (8, 0.0),
        (24, 0.0),  # still epoch 0
        (32, 0.4625),  # epoch 1 of 4: .8 (1 - 27/64)
        (48, 0.4625),
        (56, 0.7),  # epoch 2: .8 (1 - 1/8)
        (80, 0.7875),  # epoch 3: .8 (1 - 1/64)
        (88, 0.7875),
        (96, 0.8),  # the last mask: the target, though Eq. 1 gives .7875 in this epoch
    ],
)
def test_masks_follow_eq1_at_their_iterations_epoch(step: int, expected: float) -> None:
    assert sparsity_of_mask(step, **PHASE) == pytest.approx(expected, abs=1e-15)


def test_masks_move_at_multiples_of_the_interval_only() -> None:
    moves = [step for step in range(200) if sparsity_of_mask(step, **PHASE) is not None]
    assert moves == [0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96]


def test_initial_sparsity() -> None:
    assert sparsity_of_mask(0, **PHASE, initial=0.2) == pytest.approx(0.2, abs=1e-15)
    assert sparsity_of_mask(56, **PHASE, initial=0.2) == pytest.approx(0.725, abs=1e-15)  # .8 - .6 / 8
    assert sparsity_of_mask(96, **PHASE, initial=0.2) == 0.8


def test_masks_can_end_before_the_phase() -> None:
    # half of 100 steps: two epochs, the last multiple of 8 below 50 is 48
    early = {**PHASE, "mask_end": 0.5}
    assert last_mask_step(100, 8, 0.5) == 48
    assert sparsity_of_mask(24, **early) == 0.0
    assert sparsity_of_mask(32, **early) == pytest.approx(0.7, abs=1e-15)  # epoch 1 of 2
    assert sparsity_of_mask(48, **early) == 0.8
    assert [sparsity_of_mask(step, **early) for step in range(49, 200)] == [None] * 151


@pytest.mark.parametrize(
    ("steps", "interval", "mask_end", "expected"),
    [
        (9022, 32, 1.0, 8992),  # 281 * 32
        (64, 32, 1.0, 32),  # 64 would come after the last step
        (65, 32, 1.0, 64),
        (32, 32, 1.0, 0),
        (1, 32, 1.0, 0),
        (10, 1, 1.0, 9),
        (100, 7, 0.07, 0),  # ends after 7 steps, 0..6, though 100 * .07 is above 7 as floats
        (100, 7, 0.08, 7),
        (100, 8, 0.001, 0),  # never less than one step
    ],
)
def test_last_mask_step(steps: int, interval: int, mask_end: float, expected: int) -> None:
    assert last_mask_step(steps, interval, mask_end) == expected
    sizes = {"steps": steps, "epoch_steps": 10, "interval": interval, "mask_end": mask_end}
    assert sparsity_of_mask(expected, **sizes, target=0.9) == 0.9
    assert sparsity_of_mask(expected + interval, **sizes, target=0.9) is None


def test_the_number_of_epochs_is_whole_though_the_floats_are_not() -> None:
    # .55 * 1000 is above 550 as floats: 11 epochs of 50, not 12; epoch 10 of 11: 1 - (1/11)^3
    sparsity = sparsity_of_mask(500, steps=1000, epoch_steps=50, interval=20, target=0.5, mask_end=0.55)
    assert sparsity == pytest.approx(0.5 * (1 - 1 / 1331), abs=1e-15)


@given(
    steps=st.integers(1, 500),
    epoch_steps=st.integers(1, 100),
    interval=st.integers(1, 60),
    target=st.floats(0, 1, exclude_max=True),
    share=st.floats(0, 1),
    mask_end=st.floats(0, 1, exclude_min=True),
)
def test_sparsity_only_rises_and_ends_at_the_target(
    steps: int, epoch_steps: int, interval: int, target: float, share: float, mask_end: float
) -> None:
    phase = {"steps": steps, "epoch_steps": epoch_steps, "interval": interval, "mask_end": mask_end}
    found = [sparsity_of_mask(step, **phase, target=target, initial=share * target) for step in range(steps)]
    masks = [sparsity for sparsity in found if sparsity is not None]
    assert found[0] is not None
    assert masks[-1] == target
    assert all(later >= earlier - 1e-15 for earlier, later in pairwise(masks))


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.1), (2999, 0.1), (3000, 0.01), (5999, 0.01), (6000, 0.001), (9021, 0.001)],
)
def test_learning_rate_drops(step: int, expected: float) -> None:
    assert learning_rate(step, PhaseConfig()) == pytest.approx(expected, rel=1e-15)


def test_learning_rate_drops_by_gamma() -> None:
    phase = PhaseConfig(lr=0.8, lr_drops=(0, 2, 2), lr_gamma=0.5)
    assert [learning_rate(step, phase) for step in range(4)] == [0.4, 0.4, 0.1, 0.1]
    assert learning_rate(10**6, PhaseConfig(lr=0.8, lr_drops=())) == 0.8


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.2),
        (1, 0.17071067811865476),  # .1 (1 + cos(pi / 4)) = .1 (1 + 1 / sqrt 2)
        (2, 0.1),
        (3, 0.029289321881345254),
        (4, 0.0),
    ],
)
def test_cosine_learning_rate(step: int, expected: float) -> None:
    phase = PhaseConfig(steps=4, lr=0.2, lr_schedule="cosine")
    assert learning_rate(step, phase) == pytest.approx(expected, abs=1e-16)


@pytest.mark.parametrize("schedule", ["drops", "cosine", "constant"])
def test_warm_up_rises_in_a_line_to_the_schedule(schedule: str) -> None:
    plain = PhaseConfig(steps=40, lr=0.2, lr_schedule=schedule, lr_drops=(3, 20))
    warm = replace(plain, lr_warmup=5)
    shares = [learning_rate(step, warm) / learning_rate(step, plain) for step in range(40)]
    assert shares == pytest.approx([0.2, 0.4, 0.6, 0.8, *[1.0] * 36])


def test_constant_learning_rate() -> None:
    phase = PhaseConfig(lr=0.3, lr_schedule="constant")
    assert {learning_rate(step, phase) for step in (0, 2999, 3000, 9021)} == {0.3}
