"""The nonzero weights of a convolution, and where each finds its inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Taps:
    """By output: ``first`` int32 [outputs + 1] is where each output's begin; of each tap its input ``channel``, its
    place ``y, x`` in the kernel's reach (int64) and its ``value`` (fp32)."""

    first: Any
    channel: Any
    y: Any
    x: Any
    value: Any


def taps_of(weight: Any, groups: int, dilation: tuple[int, int]) -> Taps:
    """Of a weight ``[outputs, inputs / groups, rows, columns]``."""
    output, channel, y, x = np.nonzero(weight)
    first = np.concatenate([[0], np.cumsum(np.bincount(output, minlength=len(weight)))])
    channel = channel + output // max(len(weight) // groups, 1) * weight.shape[1]
    values = weight[weight != 0].astype(np.float32)
    return Taps(first.astype(np.int32), channel, y * dilation[0], x * dilation[1], values)


def in_dealt_planes(taps: Taps, stride: tuple[int, int], plane: int, rows: int, pitch: int) -> Any:
    """Offsets into planes whose rows and columns are dealt by the stride (csrc/sparse_infer.h): ``plane`` values from
    channel to channel, each of ``stride[0] * stride[1]`` parts of ``rows`` rows that are ``pitch`` apart."""
    part = taps.y % stride[0] * stride[1] + taps.x % stride[1]
    return taps.channel * plane + (part * rows + taps.y // stride[0]) * pitch + taps.x // stride[1]


def as_places(offsets: Any, what: str) -> Any:
    """int32. ValueError if an offset does not fit: ``what`` is too large."""
    if np.abs(offsets).max(initial=0) >= 1 << 31:
        raise ValueError(f"{what} is too large for 32-bit places: use a smaller one")
    return offsets.astype(np.int32)
