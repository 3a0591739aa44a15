"""A layer's weights as the integers that every file format stores."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pqk_fast import reference
from pqk_fast.layers import PQKLayer
from pqk_fast.settings import is_quantized

Int8s = np.ndarray[Any, np.dtype[np.int8]]
Floats = np.ndarray[Any, np.dtype[np.float32]]
REMEDY = "pqk_fast.guards.find_problems(model) says what is wrong"


@torch.no_grad()
def integers_of(name: str, layer: PQKLayer) -> tuple[Int8s, Floats]:
    """Of the student: ``q`` of Eq. 2 (int8 of the weight's shape, 0 where pruned) and the step size (fp32 [] or [C]).

    Raises ValueError, by the layer's name, for ``bits=32``, weights that are not finite, or step sizes that are not
    finite and positive.
    """
    if not is_quantized(layer.bits):
        raise ValueError(
            f"layer {name!r}: bits=32 prunes without quantizing, so there are no integers to pack: save the state dict"
        )
    step = layer.weight_step.detach()
    if not (torch.isfinite(step) & (step > 0)).all():
        raise ValueError(f"layer {name!r}: expected step sizes that are finite and positive: {REMEDY}")
    q = reference.quantize(layer.weight, layer.weight_mask, step, layer.bits)
    if not torch.isfinite(q).all() or not torch.isfinite(layer.weight[layer.weight_mask]).all():
        raise ValueError(f"layer {name!r}: some weights are not finite: {REMEDY}")
    return q.to(torch.int8).cpu().numpy(), step.float().cpu().numpy()
