"""The C++ library: where it is, whether it fits, and what runs each operation on this machine.

Environment: ``PQK_FAST_REQUIRE_NATIVE=1`` makes a missing library an error, ``PQK_FAST_NATIVE=0`` leaves it alone,
``PQK_FAST_LIBRARY`` names another file (one built with sanitizers, say).
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import importlib.metadata
import os
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from pqk_fast import gpu

PACKAGE = Path(__file__).parent
REMEDY = "build it with: pip install --no-build-isolation --no-deps -e . (or reinstall pqk-fast)"

OPERATIONS = (
    "fake_quant",
    "fake_quant_all",
    "dual_linear",
    "dual_conv2d",
    "topk_mask",
    "group_mask",
    "pack_int4",
    "pack_bits",
)


class NativeLibraryError(ImportError):
    """The C++ library is required (``PQK_FAST_REQUIRE_NATIVE=1``) and cannot be used; the message says why."""


@dataclass(frozen=True)
class Library:
    """The C++ library as it was found: ``path`` if it was loaded, else ``problem``; ``build`` says what made it."""

    path: Path | None
    problem: str
    build: str = ""

    def __str__(self) -> str:
        """One line for people."""
        if self.path is None:
            return f"not used: {self.problem}"
        instruction_set = ctypes.CDLL(str(self.path)).pqk_fast_isa
        instruction_set.restype = ctypes.c_char_p
        return f"{self.path}, built from {self.build}; runs {instruction_set().decode()} code here"


def build_of(path: Path) -> dict[str, str]:
    """What a library says of its making (``sources``, ``torch``, ``compiler``), read without loading it."""
    found = re.search(rb"pqk_fast build: ([^\n\0]*)\n", path.read_bytes())
    text = found[1].decode("ascii", "replace") if found else ""
    return dict(re.findall(r"(\w+)=(.*?)(?= \w+=|$)", text))


def sources_digest(folder: Path) -> str | None:
    """The digest that ``setup.py`` builds in, of the sources beside the package; None where there are none."""
    if not (folder / "library.cpp").is_file():
        return None
    files = sorted(folder.glob("*.[ch]*"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _candidates() -> list[Path]:
    """The library of this package; run from a source tree, also that of a regular installation."""
    if named := os.environ.get("PQK_FAST_LIBRARY"):
        return [Path(named)]
    installed = importlib.metadata.distributions(name="pqk-fast")
    folders = dict.fromkeys([PACKAGE, *(Path(str(each.locate_file("pqk_fast"))) for each in installed)])
    return [path for folder in folders for path in sorted(folder.glob("_C*.so"))]


def load() -> Library:
    """Find the library and register its operations. Does not raise: what went wrong is in ``problem``."""
    if os.environ.get("PQK_FAST_NATIVE") == "0":
        return Library(None, "switched off by PQK_FAST_NATIVE=0")
    problem = f"no C++ library was built; {REMEDY}"
    expected = sources_digest(PACKAGE.parent / "csrc")
    for path in _candidates():
        if not path.is_file():
            problem = f"there is no file {path} (from PQK_FAST_LIBRARY); {REMEDY}"
            continue
        build = build_of(path)
        made = ", ".join(f"{name} {value}" for name, value in build.items()) or "it does not say what"
        if expected and build.get("sources") != expected:
            problem = (
                f"{path} was built from other sources ({made}) than those beside this package ({expected}); {REMEDY}"
            )
            continue
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            running = f"torch {torch.__version__}, Python {sys.version.split()[0]}"
            problem = f"{path} was built with {made}, this is {running}; it cannot be loaded: {error}; {REMEDY}"
            continue
        return Library(path, "", made)
    return Library(None, problem)


_library: Library | None = None
_warned = False


def library() -> Library:
    """The library, loaded at the first call.

    Raises NativeLibraryError if it cannot be used and ``PQK_FAST_REQUIRE_NATIVE=1``.
    """
    global _library
    if _library is None:
        _library = load()
    if _library.path is None and os.environ.get("PQK_FAST_REQUIRE_NATIVE") == "1":
        raise NativeLibraryError(f"PQK_FAST_REQUIRE_NATIVE=1, but {_library.problem}")
    return _library


def warn_of_fallback() -> None:
    """Say once that the CPU runs plain PyTorch; not if that was asked for."""
    global _warned
    if not _warned and library().path is None and os.environ.get("PQK_FAST_NATIVE") != "0":
        warnings.warn(f"operations on the CPU run in plain PyTorch, slowly: {library().problem}", stacklevel=3)
    _warned = True


@dataclass(frozen=True)
class Backend:
    """One operation on one device: what runs it, and why nothing faster does."""

    operation: str
    device: str
    implementation: str
    why_not_faster: str


def backends() -> list[Backend]:
    """The implementation of every operation on every device that this machine has."""
    found = library()
    cpu = ("C++", "") if found.path else ("PyTorch", "the C++ library is not used")
    if gpu.interpreted() and not found.path:
        cpu = ("Triton", "TRITON_INTERPRET=1 runs the GPU's kernels in plain Python, for tests")
    table = [Backend(operation, "cpu", *cpu) for operation in OPERATIONS]
    if torch.cuda.is_available():
        cuda = ("Triton", "") if not gpu.problem() else ("PyTorch", gpu.problem())
        table += [Backend(operation, "cuda", *cuda) for operation in OPERATIONS]
    return table


def optional_packages() -> dict[str, str]:
    """For each optional package: its version, or why it cannot be imported."""
    found = {}
    for name in ("triton", "torchvision", "torchaudio", "matplotlib", "PIL", "espeakng_loader"):
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:
            found[name] = f"not usable: {str(error).splitlines()[0]}"
        else:
            found[name] = str(getattr(module, "__version__", "installed"))
    return found
