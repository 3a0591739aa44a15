"""What several tasks tell while they are trained: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from pqk_fast.callbacks import Row, describe, state_of

LINE_SECONDS = 15.0


class Board:
    """Within ``with Board(tasks) as board``, shows what :meth:`take` gets.

    ``tasks`` are names and steps. A terminal has a bar for all of them and one for each that is being trained;
    elsewhere there is a line when a task ends and, for each at most every 15 seconds, one when an epoch does.
    """

    def __init__(self, tasks: Sequence[tuple[str, int]], console: Console | None = None) -> None:
        self.console = console or Console()
        self._steps = dict(tasks)
        self._done = dict.fromkeys(self._steps, 0)
        self._line: dict[str, float] = {}
        self._bars: dict[str, TaskID] = {}
        whole = Column(no_wrap=True)
        self._progress = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            BarColumn(None, table_column=Column(ratio=1, min_width=4)),
            MofNCompleteColumn(table_column=whole),
            TimeRemainingColumn(table_column=whole),
            TextColumn("{task.fields[state]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=self.console,
            transient=True,
            expand=True,
            disable=not self.console.is_terminal,
        )
        count = f"{len(tasks)} task{'s' if len(tasks) != 1 else ''}"
        self._all = self._progress.add_task(f"[bold]{count}", total=sum(self._steps.values()), state="")
        self._count = 0

    def __enter__(self) -> Board:
        self._progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def take(self, news: tuple[str, int, Row | None]) -> None:
        """A task's name, its steps done, and the row of the epoch that has just ended."""
        name, step, row = news
        total, self._done[name] = self._steps[name], step
        if name not in self._bars:
            self._line[name] = time.monotonic()
            self._bars[name] = self._progress.add_task(name, total=total, completed=step, state="")
            self._progress.reset(self._all, completed=sum(self._done.values()))  # an earlier process's take no time
        bar = self._bars[name]
        self._progress.update(self._all, completed=sum(self._done.values()))
        self._progress.update(bar, completed=step)
        if row is None:
            return
        self._progress.update(bar, state=state_of(row, self.console.width))
        now = time.monotonic()
        if step == total:
            self._count += 1
            self._progress.update(bar, visible=False)
            self._print(f"{self._count}/{len(self._steps)} {name}: {row['seconds']:.0f} s  {describe(row)}")
        elif not self.console.is_terminal and now - self._line[name] > LINE_SECONDS:
            self._line[name] = now
            self._print(f"{name}: step {step} of {total}  {describe(row)}")

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)
