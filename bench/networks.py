"""The network whose size is scaled: eight square linear layers with ReLU between them, no biases."""

from __future__ import annotations

from torch import nn

DEPTH = 8


def mlp(width: int, depth: int = DEPTH) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def width_of(numel: int) -> int:
    """Of the network with about so many weights."""
    return max(2, round((numel / DEPTH) ** 0.5))
