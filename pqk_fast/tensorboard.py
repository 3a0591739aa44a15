"""Scalars of a training run for TensorBoard: ``Trainer(..., callbacks=[TensorBoardCallback("runs/mine/scalars")])``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from pqk_fast.branches import pqk_layers
from pqk_fast.callbacks import Callback, Row
from pqk_fast.files import replacing

# Of a row, these say when it was.
_CLOCK = ("epoch", "step", "seconds")


class TensorBoardCallback(Callback):
    """Every number of an epoch's row as ``stage/name``, and those of a layer as ``stage/name/layer``.

    So ``phase1/loss``, ``phase1/lr``, ``phase1/sparsity``, ``phase1/validation``, in phase 2 ``phase2/validation_f``
    (the full net), ``phase1/kept/conv1`` (weights), ``phase1/step_size/conv1``. The x-axis counts optimizer steps
    through all stages: each begins where the one before it ended, which the folder's ``stages.json`` remembers. A stage
    that is run again, or goes on from a checkpoint, replaces the points that it repeats.

    Args:
        folder: where the event files go; made if missing.
        model: the model that is trained, for its layers' names (it may be prepared later); without it layers are
            counted from 0.

    Raises ImportError if tensorboard is not installed.
    """

    def __init__(self, folder: str | Path, model: nn.Module | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                f"TensorBoardCallback needs the package tensorboard ({error}): pip install 'pqk-fast[tensorboard]'"
            ) from error
        self.folder = Path(folder)
        self.model = model
        self._make_writer = SummaryWriter
        self._writer: Any = None
        self._start = self._done = 0

    def on_stage_start(self, stage: str, steps: int) -> None:
        self._start, self._done = self._place(stage, steps), 0

    def on_resume(self, stage: str, step: int) -> None:
        self._done = step

    def on_epoch(self, stage: str, row: Row) -> None:
        if self._writer is None:
            # hides all points of earlier processes that come after what is done
            first = self._start + self._done + 1
            self._writer = self._make_writer(str(self.folder), purge_step=first)
        step = self._start + row["step"]
        for name, value in row.items():
            if name in _CLOCK or value is None:
                continue
            if isinstance(value, list | tuple):
                for layer, number in zip(self._layers(len(value)), value, strict=True):
                    self._writer.add_scalar(f"{stage}/{name}/{layer}", number, step)
            else:
                self._writer.add_scalar(f"{stage}/{name}", value, step)
        self._writer.flush()

    def on_stage_end(self, stage: str, seconds: float) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _place(self, stage: str, steps: int) -> int:
        """The stage's first step on the x-axis: where it was before, or after all others."""
        file = self.folder / "stages.json"
        known: dict[str, list[int]] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        start = known[stage][0] if stage in known else max((end for _, end in known.values()), default=0)
        known = {name: place for name, place in known.items() if place[0] < start} | {stage: [start, start + steps]}
        with replacing(file, "w") as out:
            json.dump(known, out)
        return start

    def _layers(self, count: int) -> list[str]:
        """Names in a row's order: layers that share a weight are listed once, by the first's name."""
        names: dict[int, str] = {}
        for name, layer in pqk_layers(self.model).items() if self.model is not None else ():
            names.setdefault(id(layer.weight), name)
        return list(names.values()) if len(names) == count else [str(index) for index in range(count)]
