"""Names of layers, and the patterns by which settings choose among them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pqk_fast.settings import ConfigError, nearest, require


def matches(name: str, pattern: str) -> bool:
    """True if ``pattern`` is the module ``name``, one of its parents, or (``re:...``) a regex matching all of it."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return name == pattern or name.startswith(pattern + ".")


def names_by_weight(layers: Mapping[str, Any]) -> dict[Any, list[str]]:
    """Each weight's names: several if a module has them, or layers share the weight."""
    names: dict[Any, list[str]] = {}
    for name, layer in layers.items():
        names.setdefault(layer.weight, []).append(name)
    return names


def of_layer(setting: str, values: Mapping[str, Any], names: Sequence[str]) -> Any:
    """What ``values`` (pattern -> value) say of the layer that has these names; None if nothing. ConfigError if they
    disagree."""
    own = [value for pattern, value in values.items() if any(matches(name, pattern) for name in names)]
    layer = " = ".join(map(repr, names))
    require(len(set(own)) <= 1, f"{setting} names layer {layer} by several patterns with {own}: give it one value")
    return own[0] if own else None


def check_patterns(setting: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    """ConfigError, with the name that is nearest, for a pattern of ``setting`` that chooses none of ``names``."""
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            hint = "" if pattern.startswith("re:") else nearest(pattern, names)
            raise ConfigError(f"{setting}: {pattern!r} matches none of the layers that can be prepared{hint}")
