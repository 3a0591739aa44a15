"""Who is compared: each candidate's adapter, and the environment that it runs in (None: the one of pqk_fast).

Importing this lets the other files of ``bench`` and pqk_fast itself be imported, from wherever a script is started.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "peers"
sys.path[:0] = [str(HERE.parent), str(ROOT)]
VARIABLES = {  # of the environment, for all peers
    "NNCF_CI": "1",  # or NNCF would report its use
    "NNCF_EXTENSION_LOAD_TIMEOUT": "0",  # its C++ library takes as long to build as it takes
    "TORCH_EXTENSIONS_DIR": str(BUILD / "nncf" / "extensions"),
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Candidate:
    """``adapter``: a module beside this one and the class in it; ``variant``: one that trains as another one does."""

    adapter: str
    environment: str | None = None
    variant: bool = False

    def load(self) -> Any:
        module, _, name = self.adapter.partition(":")
        return getattr(importlib.import_module(module), name)()

    @property
    def python(self) -> Path:
        """The interpreter; for an environment that is not there, where it would be."""
        return Path(sys.executable) if self.environment is None else python_of(self.environment)


CANDIDATES = {
    "pqk_fast": Candidate("with_pqk_fast:Ours"),
    "pqk_fast, compiled": Candidate("with_pqk_fast:OursCompiled", variant=True),
    "eager": Candidate("with_torch:Eager"),
    "torch's own op": Candidate("with_torch:OwnOp", variant=True),
    "torch.compile": Candidate("with_torch:Compiled", variant=True),
    "torchao": Candidate("with_torchao:Torchao", "torchao"),
    "nncf": Candidate("with_nncf:Nncf", "nncf"),
    "brevitas": Candidate("with_brevitas:Brevitas", "brevitas"),
    "modelopt": Candidate("with_modelopt:ModelOpt", "modelopt"),
}
OURS = "pqk_fast"
ENVIRONMENTS = tuple(each.environment for each in CANDIDATES.values() if each.environment is not None)


def python_of(environment: str) -> Path:
    return BUILD / environment / "bin" / "python"


def chosen(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """The known names that are asked for, all if none is. ValueError for one that is not known."""
    known, names = list(known), list(names)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown: {', '.join(unknown)}; known are {', '.join(known)}")
    return [name for name in known if name in names] if names else known
