"""Settings as dataclasses, from plain values and back. What cannot be is refused, with what was expected."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any


class ConfigError(ValueError):
    """A setting that cannot be: the message says what was expected, what came and how to mend it."""


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """``"; did you mean 'x'?"`` with the closest known name, or the list of them all; ``prefix`` goes before each."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {prefix + close[0]!r}?" if close else f"; known: {', '.join(prefix + k for k in known)}"


def check_bits(bits: int, otherwise: str = "") -> int:
    """``bits`` itself if it is an int in 2..8, else ConfigError, whose message ends in ``otherwise``."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ConfigError(f"bits must be an integer in 2..8, got {bits!r}{otherwise}")
    return bits


def is_quantized(bits: int) -> bool:
    """False for 32 bits: weights are pruned, but stay as they are otherwise."""
    return bits != 32


def check_sparsity(sparsity: float, name: str = "sparsity") -> float:
    """``sparsity`` itself if it lies in [0, 1), else ConfigError."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise ConfigError(f"{name} must lie in [0, 1): the fraction of weights pruned; got {sparsity!r}")
    return sparsity


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def require(ok: bool, message: str) -> None:
    """ConfigError with ``message`` unless ``ok``."""
    if not ok:
        raise ConfigError(message)


def to_dict(recipe: Any) -> dict[str, Any]:
    """A recipe (or part of one) as nested plain dicts, ready for JSON."""
    plain: dict[str, Any] = dataclasses.asdict(recipe)
    return plain


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A table by layers' names, which TOML without quotes takes apart at their dots."""
    for name, value in table.items():
        require(isinstance(name, str), f"patterns are module names or 're:...', got {name!r}")
        yield from _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]


def _convert(value: Any, kind: Any, where: str) -> Any:
    """``value`` from TOML as the type that the field declares; ConfigError if it is another."""
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        require(isinstance(value, Mapping), f"{where} must be a table ([{where}]), got {value!r}")
        return build(kind, value, where + ".")
    origin = typing.get_origin(kind)
    if origin is tuple:
        require(isinstance(value, list | tuple), f"{where} must be a list, got {value!r}")
        return tuple(_convert(v, typing.get_args(kind)[0], where) for v in value)
    if origin is not None:
        require(isinstance(value, Mapping), f"{where} must be a table, got {value!r}")
        return dict(_flat(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    require(
        isinstance(value, kind) and (kind is bool or not isinstance(value, bool)),
        f"{where} must be {kind.__name__}, got {value!r} ({type(value).__name__})",
    )
    require(kind is not float or math.isfinite(value), f"{where} must be finite, got {value!r}")
    return value


@functools.cache
def _kinds(cls: Any) -> dict[str, Any]:
    """The types of a config's fields: slow to find, and asked for again and again."""
    return typing.get_type_hints(cls)


def check_types(config: Any) -> None:
    """Every field holds what it declares, a finite number where it is a float; else ConfigError."""
    for name, kind in _kinds(type(config)).items():  # type: ignore[arg-type]
        _convert(getattr(config, name), kind, name)


def build(cls: Callable[..., Any], values: Mapping[str, Any], where: str = "") -> Any:
    kinds = _kinds(cls)
    for key in values:
        if key not in kinds:
            raise ConfigError(f"unknown key {where + key!r}{nearest(key, kinds, where)}")
    return cls(**{key: _convert(value, kinds[key], where + key) for key, value in values.items()})
