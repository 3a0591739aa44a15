"""Recipes as TOML files: those that come with the library, and anybody's own."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pqk_fast.config import Recipe, recipe_from_dict
from pqk_fast.settings import ConfigError, nearest, require

RECIPES = Path(str(resources.files("pqk_fast"))) / "recipes"


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = _merge(out[key], value) if both else value
    return out


def _assignments(pairs: Iterable[str]) -> dict[str, Any]:
    """``["pqk.bits=8", "seed=1"]`` as nested dicts; values are Python literals, anything else is a string."""
    out: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        require(bool(equals and key.strip()), f"expected KEY=VALUE such as pqk.bits=8, got {pair!r}")
        try:
            value = ast.literal_eval({"true": "True", "false": "False"}.get(text.strip(), text.strip()))
        except (ValueError, SyntaxError, TypeError):
            value = text.strip()
        for part in reversed(key.strip().split(".")):
            value = {part: value}
        out = _merge(out, value)
    return out


def recipe_names() -> list[str]:
    """Names of the recipes that come with the library."""
    return sorted(f.stem for f in RECIPES.glob("*.toml") if not f.name.startswith("_"))


def _read_toml(path: Path, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """One recipe file, laid over the one that its ``extends`` names (beside it, or the library's)."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name} is not valid TOML: {error}") from None
    parent = values.pop("extends", None)
    if parent is None:
        return values
    require(parent not in seen, f"{path.name}: 'extends' goes round in a circle: {' -> '.join((*seen, parent))}")
    source = next((f for f in (path.parent / f"{parent}.toml", RECIPES / f"{parent}.toml") if f.is_file()), None)
    if source is None:
        raise ConfigError(f"{path.name} extends {parent!r}, but there is no {parent}.toml beside it or in the library")
    return _merge(_read_toml(source, (*seen, parent)), values)


def load_recipe(source: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """A recipe by name or TOML file, with ``KEY=VALUE`` overrides (``pqk.bits=8``).

    Raises ConfigError for an unknown name or key (with the nearest one) and for any setting that cannot be.
    """
    path = Path(source)
    if not (path.suffix == ".toml" and path.is_file()):
        if path.suffix == ".toml":
            raise ConfigError(f"no recipe file {path}; `pqk-fast recipes` lists the named ones")
        if str(source) not in recipe_names():
            raise ConfigError(f"no recipe named {str(source)!r}{nearest(str(source), recipe_names())}")
        path = RECIPES / f"{source}.toml"
    return recipe_from_dict(_merge(_read_toml(path), _assignments(overrides)), path.name)
