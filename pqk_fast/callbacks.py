"""What a training run tells the outside: a small protocol, and the progress display."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

Row = dict[str, Any]

WIDE = 100  # columns of a terminal from which the line also has room for the loss


class Callback:
    """Override what you need. ``row`` is one line of the curves: epoch, step, loss, lr, sparsity, validation, ..."""

    def on_stage_start(self, stage: str, steps: int) -> None:
        """A stage ("vanilla", "phase1", "phase2", "finetune") of ``steps`` optimizer steps begins."""

    def on_resume(self, stage: str, step: int) -> None:
        """Right after ``on_stage_start``: the stage goes on from a checkpoint, with ``step`` steps done before."""

    def on_step(self, stage: str, step: int) -> None:
        """Optimizer step ``step`` (from 0) is done."""

    def on_epoch(self, stage: str, row: Row) -> None:
        """An epoch is done and evaluated."""

    def on_stage_end(self, stage: str, seconds: float) -> None:
        """The stage is over (also after an error or an interrupt)."""


def describe(row: Row) -> str:
    """One epoch in one line, for a log."""
    parts = [f"loss {row['loss']:.3f}", f"lr {row['lr']:.2g}"]
    if row.get("sparsity"):
        parts.append(f"sparse {100 * row['sparsity']:.1f} %")
    if row.get("validation") is not None:
        parts.append(f"validation {row['validation']:.1f} %")
    if row.get("validation_f") is not None:
        parts.append(f"full net {row['validation_f']:.1f} %")
    return "  ".join(parts)


def state_of(row: Row, width: int) -> str:
    """One epoch for a terminal of ``width`` columns: accuracy on validation (student's / full net's), sparsity, mean
    step size over the layers, and where there is room the loss."""
    parts = []
    accuracies = [f"{row[view]:.1f}" for view in ("validation", "validation_f") if row.get(view) is not None]
    if accuracies:
        parts.append(f"acc {' / '.join(accuracies)} %")
    if "sparsity" in row:
        parts.append(f"sparse {100 * row['sparsity']:.1f} %")
    if row.get("step_size"):
        parts.append(f"S {sum(row['step_size']) / len(row['step_size']):.3g}")
    if width >= WIDE or not parts:
        parts.append(f"loss {row['loss']:.3f}")
    return "  ".join(parts)


class ProgressDisplay(Callback):
    """A live bar on a terminal; elsewhere one line an epoch, at most one every ``line_seconds``.

    The bar's line: stage, steps, time left, and the last epoch as in :func:`state_of`. It is never longer than the
    terminal is wide. When the stage is over, one line stays.
    """

    def __init__(self, console: Console | None = None, line_seconds: float = 5.0) -> None:
        self.console = console or Console()
        self.line_seconds = line_seconds
        self._last_line = 0.0
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._row: Row = {}

    def on_stage_start(self, stage: str, steps: int) -> None:
        self._row = {}
        if self.console.is_terminal:
            whole = Column(no_wrap=True)
            self._bar = Progress(
                TextColumn("[bold]{task.description}", table_column=whole),
                BarColumn(None, table_column=Column(ratio=1, min_width=4)),  # takes the room that is left
                MofNCompleteColumn(table_column=whole),
                TimeRemainingColumn(table_column=whole),
                TextColumn("{task.fields[state]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
                console=self.console,
                transient=True,
                expand=True,
            )
            self._task = self._bar.add_task(stage, total=steps, state="")
            self._bar.start()

    def on_resume(self, stage: str, step: int) -> None:
        if self._bar is not None:
            # not an update: steps of an earlier process say nothing about the time that those left will take
            self._bar.reset(self._task, completed=step)

    def on_step(self, stage: str, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step + 1)

    def on_epoch(self, stage: str, row: Row) -> None:
        self._row = row
        if self._bar is not None:
            self._bar.update(self._task, state=state_of(row, self.console.width))
        elif time.monotonic() - self._last_line >= self.line_seconds:
            self._last_line = time.monotonic()
            self._print(f"{stage:9} epoch {row['epoch']:3}  step {row['step']:5}  {describe(row)}")

    def on_stage_end(self, stage: str, seconds: float) -> None:
        live = self._bar is not None
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._row:
            state = state_of(self._row, self.console.width) if live else describe(self._row)
            self._print(f"{stage:9} {seconds:6.1f} s  {state}")

    def _print(self, line: str) -> None:
        # A file has no width: a log's line stays one line.
        self.console.print(line, highlight=False, soft_wrap=True)
