"""Initial step sizes: the paper names no rule, so four are offered (see PQKConfig.step_init)."""

from __future__ import annotations

import torch
from torch import Tensor

from pqk_fast import reference
from pqk_fast.config import STEP_INITS
from pqk_fast.settings import check_bits, check_choice

MSE_CANDIDATES = 33
SMALLEST_STEP = 1e-12


def initial_step(weight: Tensor, mask: Tensor, bits: int, method: str = "mean", per_channel: bool = False) -> Tensor:
    """Step size S for a weight: fp32 [1], or [C] with ``per_channel`` (C = size of dimension 0).

    Only kept weights count. ``mean``: ``mean|w|``; ``lsq``: ``2 mean|w| / sqrt(Q)`` (Esser et al., ICLR 2020); ``max``:
    ``max|w| / Q``; ``mse``: the candidate of least squared error out of 33 between .3 and 1.1 of ``max|w| / Q``.
    A weight (or channel) with nothing but zeros gets ``1 / Q``.
    """
    check_bits(bits)
    check_choice("step_init", method, STEP_INITS)
    q = reference.levels(bits)
    channels = weight.shape[0] if per_channel and weight.dim() else 1
    rows = weight.detach().float().reshape(channels, weight.numel() // max(channels, 1))
    kept = mask.reshape(rows.shape)
    magnitude = torch.where(kept, rows, 0.0).abs()
    if magnitude.shape[1] == 0:
        return torch.full((rows.shape[0],), 1.0 / q, device=weight.device)
    mean = magnitude.sum(1) / kept.sum(1).clamp_min(1)
    largest = magnitude.amax(1)
    if method == "mean":
        step = mean
    elif method == "lsq":
        step = 2 * mean / q**0.5
    elif method == "max":
        step = largest / q
    else:
        step = _least_squares(rows, kept, bits, largest / q)
    return torch.where(step > SMALLEST_STEP, step, 1.0 / q)


def _least_squares(rows: Tensor, kept: Tensor, bits: int, scale: Tensor) -> Tensor:
    best, best_error = scale, torch.full_like(scale, torch.inf)
    target = torch.where(kept, rows, 0.0)
    for share in torch.linspace(0.3, 1.1, MSE_CANDIDATES).tolist():
        candidate = (share * scale).clamp_min(SMALLEST_STEP)
        error = (reference.fake_quant(rows, kept, candidate, bits) - target).square().sum(1)
        best = torch.where(error < best_error, candidate, best)
        best_error = torch.minimum(error, best_error)
    return best
