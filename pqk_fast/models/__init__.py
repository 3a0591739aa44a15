"""The networks of the paper's tables, by name: keyword spotting (res8) and CIFAR (resnet)."""

import difflib
from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import nn

from pqk_fast.models.res8 import Res8, res8, res8_narrow
from pqk_fast.models.resnet import CifarResNet, resnet20, resnet32, resnet56

__all__ = [
    "MODELS",
    "CifarResNet",
    "Res8",
    "create_model",
    "res8",
    "res8_narrow",
    "resnet20",
    "resnet32",
    "resnet56",
]

MODELS: Mapping[str, Callable[[int], nn.Module]] = MappingProxyType(
    {
        "res8": res8,
        "res8_narrow": res8_narrow,
        "resnet20": resnet20,
        "resnet32": resnet32,
        "resnet56": resnet56,
    }
)
"""Name -> function that takes the number of classes and returns a freshly initialised network."""


def create_model(name: str, num_classes: int) -> nn.Module:
    """Make a freshly initialised network by its name, a key of `MODELS` ("-" and "_" count as the same).

    The weights depend only on torch's default generator: call `torch.manual_seed` first for repeatable ones.

    Raises:
        ValueError: unknown name (the message has the nearest ones), or `num_classes` is not a positive integer.
    """
    key = name.replace("-", "_")
    if key not in MODELS:
        near = difflib.get_close_matches(key, MODELS, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known models: {', '.join(MODELS)}"
        raise ValueError(f"unknown model {name!r}: {hint}")
    if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 1:
        raise ValueError(f"num_classes must be a positive integer, got {num_classes!r}")
    return MODELS[key](num_classes)
