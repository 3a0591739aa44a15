"""What a training run tells the outside: a small protocol, and the progress display."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

Row = dict[str, Any]


class Callback:
    """Override what you need. ``row`` is one line of the curves: epoch, step, loss, lr, sparsity, validation, ..."""

    def on_stage_start(self, stage: str, steps: int) -> None:
        """A stage ("vanilla", "phase1", "phase2", "finetune") of ``steps`` optimizer steps begins."""

    def on_step(self, stage: str, step: int) -> None:
        """Optimizer step ``step`` (from 0) is done."""

    def on_epoch(self, stage: str, row: Row) -> None:
        """An epoch is done and evaluated."""

    def on_stage_end(self, stage: str, seconds: float) -> None:
        """The stage is over (also after an error or an interrupt)."""


def describe(row: Row) -> str:
    """One epoch in one line."""
    parts = [f"loss {row['loss']:.3f}", f"lr {row['lr']:.2g}"]
    if row.get("sparsity"):
        parts.append(f"sparse {100 * row['sparsity']:.1f} %")
    if row.get("validation") is not None:
        parts.append(f"validation {row['validation']:.1f} %")
    if row.get("validation_f") is not None:
        parts.append(f"full net {row['validation_f']:.1f} %")
    return "  ".join(parts)


class ProgressDisplay(Callback):
    """A live bar on a terminal; elsewhere one line an epoch, at most one every ``line_seconds``."""

    def __init__(self, console: Console | None = None, line_seconds: float = 5.0) -> None:
        self.console = console or Console()
        self.line_seconds = line_seconds
        self._last_line = 0.0
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._row: Row = {}
        self._epoch = ""

    def on_stage_start(self, stage: str, steps: int) -> None:
        self._row = {}
        if self.console.is_terminal:
            columns = (
                TextColumn("[bold]{task.description:9}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, TextColumn("{task.fields[state]}"), console=self.console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(stage, total=steps, state="")

    def on_step(self, stage: str, step: int) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step + 1)

    def on_epoch(self, stage: str, row: Row) -> None:
        self._row = row
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, state=describe(row))
        elif time.monotonic() - self._last_line >= self.line_seconds:
            self._last_line = time.monotonic()
            self.console.print(
                f"{stage:9} epoch {row['epoch']:3}  step {row['step']:5}  {describe(row)}", highlight=False
            )

    def on_stage_end(self, stage: str, seconds: float) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._row:
            self.console.print(f"{stage:9} {seconds:6.1f} s  {describe(self._row)}", highlight=False)
