"""Checkpoints: written whole or not at all, read without running foreign code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pqk_fast.files import replacing

FORMAT = "pqk_fast checkpoint"
VERSION = 1


class CheckpointError(ValueError):
    """A checkpoint that is missing, torn, foreign, or of another version."""


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write ``content`` (tensors, numbers, strings, dicts, lists) atomically."""
    with replacing(path) as file:
        torch.save({"format": FORMAT, "version": VERSION, **content}, file)


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote. CheckpointError says what is wrong with any other file."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; a run folder holds one once its first epoch is done")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # bytes that are no checkpoint can make the unpickler raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
        raise CheckpointError(f"{path} is torn or not a checkpoint of this library: {reason}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this library: expected format {FORMAT!r}")
    if content.get("version") != VERSION:
        raise CheckpointError(f"{path} has version {content.get('version')!r}; this library reads version {VERSION}")
    return content
