"""Names of layers, and the patterns by which settings choose among them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pqk_fast.config import ConfigError, nearest, require


def matches(name: str, pattern: str) -> bool:
    """True if ``pattern`` is the module ``name``, one of its parents, or (``re:...``) a regex matching all of it."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return name == pattern or name.startswith(pattern + ".")


def of_layer(setting: str, values: Mapping[str, Any], name: str) -> Any:
    """What ``values`` (pattern -> value) say of the layer ``name``; None if nothing. ConfigError if they disagree."""
    own = [value for pattern, value in values.items() if matches(name, pattern)]
    require(len(set(own)) <= 1, f"{setting} names layer {name!r} by several patterns with {own}")
    return own[0] if own else None


def check_patterns(setting: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    """ConfigError, with the name that is nearest, for a pattern of ``setting`` that chooses none of ``names``."""
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            hint = "" if pattern.startswith("re:") else nearest(pattern, names)
            raise ConfigError(f"{setting}: {pattern!r} matches none of the layers that can be prepared{hint}")
