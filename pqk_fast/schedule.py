"""Sparsity and learning rate as pure functions of the step."""

from __future__ import annotations

import math

from pqk_fast.config import PhaseConfig
from pqk_fast.reference import sparsity_at


def last_mask_step(steps: int, interval: int, mask_end: float = 1.0) -> int:
    """The last step of the phase at which the mask moves: the largest multiple of ``interval`` before its end."""
    return (_mask_steps(steps, mask_end) - 1) // interval * interval


def _mask_steps(steps: int, mask_end: float) -> int:
    """Steps in which the mask may move, at least 1; 100 * .07 counts as 7, though as floats it is above."""
    return max(1, math.ceil(steps * mask_end - 1e-6))


def sparsity_of_mask(
    step: int,
    *,
    steps: int,
    epoch_steps: int,
    interval: int,
    target: float,
    initial: float = 0.0,
    mask_end: float = 1.0,
) -> float | None:
    """Sparsity of the mask made before iteration ``step``, or None if the mask stays as it is there.

    Masks are made at multiples of ``interval``, by Eq. 1 at that iteration's epoch; the last one has ``target`` itself,
    which Eq. 1 would miss (at epoch n - 1 it is still below).
    """
    last = last_mask_step(steps, interval, mask_end)
    if step % interval or step > last:
        return None
    if step == last:
        return target
    epochs = math.ceil(_mask_steps(steps, mask_end) / epoch_steps)
    return sparsity_at(step // epoch_steps, epochs, target, initial)


def learning_rate(step: int, phase: PhaseConfig) -> float:
    """The learning rate of iteration ``step`` (from 0)."""
    rate = phase.lr
    if phase.lr_schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / phase.steps))
    elif phase.lr_schedule == "drops":
        rate *= phase.lr_gamma ** sum(step >= drop for drop in phase.lr_drops)
    return rate * min(1.0, (step + 1) / phase.lr_warmup) if phase.lr_warmup else rate
