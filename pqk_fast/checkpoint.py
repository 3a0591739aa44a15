"""Checkpoints: written whole or not at all, the newest whole one found, read without running foreign code."""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pqk_fast.files import replacing
from pqk_fast.packing import pack_bits, unpack_bits

FORMAT = "pqk_fast checkpoint"
VERSION = 2
FOLDER = "checkpoints"
BEFORE_FOLDERS = "checkpoint.pt"  # version 1 wrote this one file into the run folder

_NAME = re.compile(r"step-(\d{9,})\.pt")
_BITS = "packed bits"


class CheckpointError(ValueError):
    """A checkpoint that is missing, torn, foreign, or of another version."""


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write ``content`` (tensors, numbers, strings, dicts, lists) atomically; bool tensors take one bit an element."""
    with replacing(path) as file:
        torch.save({"format": FORMAT, "version": VERSION, **_packed(content)}, file)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote, onto the CPU: a file, or the newest whole one of a run folder.

    Version 1 files are brought up to date as far as they go: their networks can be evaluated, their training cannot go
    on. Raises CheckpointError, which says what is wrong, for anything else.
    """
    path = Path(path)
    if path.is_dir():
        return Checkpoints(path).newest()
    return _up_to_date(_read(path), path)


class Checkpoints:
    """The checkpoints of a run folder: ``checkpoints/step-000009022.pt``, the ``keep`` newest of them."""

    def __init__(self, run: str | Path, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"at least one checkpoint must be kept, got keep={keep}")
        self.folder = Path(run) / FOLDER
        self.old = Path(run) / BEFORE_FOLDERS
        self.keep = keep

    def paths(self) -> list[Path]:
        """All of them, oldest first."""
        names = [path for path in self.folder.glob("step-*.pt") if _NAME.fullmatch(path.name)]
        found = sorted(names, key=lambda path: int(path.stem.removeprefix("step-")))
        return [self.old, *found] if self.old.is_file() else found

    def save(self, step: int, content: dict[str, Any]) -> Path:
        """Write the checkpoint of ``step``, then remove those that are too many, and any of later steps.

        Those can only be damaged ones, which the run went back from.
        """
        path = self.folder / f"step-{step:09d}.pt"
        save_checkpoint(path, content)
        paths = self.paths()
        for later in paths[paths.index(path) + 1 :]:
            later.unlink(missing_ok=True)
        torn = self.folder.glob(".step-*.tmp")  # by a process that was killed while it wrote
        for old in (*self.paths()[: -self.keep], *torn):
            old.unlink(missing_ok=True)
        return path

    def newest(self) -> dict[str, Any]:
        """The newest that can be read. One that is torn is passed over with a warning."""
        paths = self.paths()
        if not paths:
            raise CheckpointError(f"no checkpoint in {self.folder.parent}; training writes one once a minute or epoch")
        problems: list[str] = []
        for path in reversed(paths):
            try:
                content = load_checkpoint(path)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            for problem in problems:
                warnings.warn(f"{problem}; going back to {path.name}", stacklevel=3)
            return content
        raise CheckpointError("no checkpoint can be read: " + "; ".join(problems))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums
        if damaged is not None:
            raise ValueError(f"{damaged} does not match its checksum")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no checkpoint can make the unpickler raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
        raise CheckpointError(f"{path} is torn or not a checkpoint of this library: {reason}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this library: expected format {FORMAT!r}")
    return content


def _up_to_date(content: dict[str, Any], path: Path) -> dict[str, Any]:
    version = content.get("version")
    if version == 1:
        stages = {
            name: {"rows": [], "seconds": 0.0, "finished": False, **stage} for name, stage in content["stages"].items()
        }
        return {**content, "version": VERSION, "stages": stages, "options": None, "position": None}
    if version != VERSION:
        newer = isinstance(version, int) and version > VERSION
        remedy = "it comes from a newer pqk_fast: upgrade this one" if newer else "it cannot be read"
        raise CheckpointError(f"{path} has version {version!r}, this library reads 1 to {VERSION}: {remedy}")
    try:
        unpacked: dict[str, Any] = _unpacked(content)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} holds a mask that cannot be unpacked: {error}") from error
    return unpacked


def _packed(tree: Any) -> Any:
    if isinstance(tree, Tensor) and tree.dtype == torch.bool:
        return {_BITS: pack_bits(tree.detach().cpu()), "shape": list(tree.shape)}
    if isinstance(tree, dict):
        return {key: _packed(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_packed(value) for value in tree)
    return tree


def _unpacked(tree: Any) -> Any:
    if isinstance(tree, dict):
        if _BITS in tree:
            shape = tree["shape"]
            return unpack_bits(tree[_BITS], torch.Size(shape).numel()).view(shape)
        return {key: _unpacked(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_unpacked(value) for value in tree)
    return tree
