"""The student as a torch.export program: traced once, for any batch size."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from pqk_fast.branches import require_prepared
from pqk_fast.files import replacing
from pqk_fast.prepare import convert

Example = Tensor | tuple[Tensor, ...]
METADATA = "metadata.json"  # among the program's extra files


def export_program(
    model: nn.Module, example: Example, path: str | Path, metadata: Mapping[str, Any] | None = None
) -> int:
    """Write the student of a prepared model as a ``.pt2`` file for ``torch.export.load``; gives its size in bytes.

    The weights are the student's in fp32 (or the model's dtype), the batch size is free. ``metadata`` (plain JSON) and
    the layers' bits are the extra file ``metadata.json``; nothing of ``example`` is kept. The model is untouched.

    Args:
        model: a prepared model, in either phase and mode.
        example: what the network takes, with the batch first: a tensor, or a tuple of them. Values do not matter.
        path: where to write; a file that is there is replaced once the new one is whole.

    Raises:
        TypeError: ``example`` is neither a tensor nor a tuple of tensors.
        ValueError: an unprepared model, an ``example`` that the network does not take, or a network that cannot be
            traced for any batch size.
    """
    program = trace(model, example)
    extra = {METADATA: json.dumps(described(model, metadata))}
    program.example_inputs = None
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    with replacing(path) as file:
        torch.export.save(program, file, extra_files=extra)
    return Path(path).stat().st_size


def described(model: nn.Module, metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """``metadata`` with the layers' "bits": one number, or one for each layer's name if they differ."""
    bits = {name: layer.bits for name, layer in require_prepared(model).items()}
    same = len(set(bits.values())) == 1
    return {**(metadata or {}), "bits": next(iter(bits.values())) if same else bits}


def trace(model: nn.Module, example: Example) -> ExportedProgram:
    """The student's program on the CPU, in evaluation mode, whose batch size is free; errors as of the above."""
    student = convert(model).eval().cpu()
    inputs = _two_rows(example)
    with torch.no_grad():
        _try(student, inputs)
        try:
            return torch.export.export(student, inputs, dynamic_shapes=tuple({0: Dim("batch")} for _ in inputs))
        except Exception as error:  # torch has no common class for what cannot be traced
            raise ValueError(
                f"{type(student).__name__} cannot be traced for any batch size: its forward must neither branch on "
                f"values nor fix the number of rows. torch.export says: {error}"
            ) from error


def _two_rows(example: Example) -> tuple[Tensor, ...]:
    """On the CPU, with at least two rows: torch.export takes a single one for a fixed size."""
    inputs = example if isinstance(example, tuple) else (example,)
    if not inputs or not all(isinstance(x, Tensor) for x in inputs):
        raise TypeError(
            "example must be a tensor or a tuple of tensors, such as torch.zeros(1, 101, 40), got "
            f"{type(example).__name__}"
            + (f" of {', '.join(type(x).__name__ for x in inputs) or 'nothing'}" if isinstance(example, tuple) else "")
        )
    if any(x.dim() == 0 or len(x) == 0 for x in inputs):
        raise ValueError(
            f"example must have the batch as its first dimension, with at least one row, got {_shapes(inputs)}"
        )
    return tuple(torch.cat([x, x]).detach().cpu() for x in inputs)


def _try(student: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    try:
        student(*inputs)
    except Exception as error:
        shapes = _shapes(tuple(x[: len(x) // 2] for x in inputs))
        raise ValueError(
            f"{type(student).__name__} does not take the example ({shapes}): {error}. Give one as the network gets it "
            "in training, with the batch first"
        ) from error


def _shapes(inputs: tuple[Tensor, ...]) -> str:
    return ", ".join(f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" for x in inputs)
