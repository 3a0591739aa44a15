"""Ctrl-C and SIGTERM as requests that a loop answers between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """Training stopped as asked, and its state was saved. ``signal`` is what asked for it (here or on another rank)."""

    def __init__(self, number: int | None, message: str) -> None:
        super().__init__(message)
        self.signal = signal.SIGTERM if number is None else signal.Signals(number)


class Interrupts:
    """Within ``with Interrupts() as interrupts`` the first SIGINT or SIGTERM only sets ``interrupts.requested``.

    What nobody has answered at the end raises :class:`Interrupted` there. A second SIGINT acts at once, as a
    KeyboardInterrupt, unless ``patient``: launchers of many processes pass on what each of them has got already. Does
    nothing outside of the main thread, which alone may handle signals, or if ``enabled`` is False.
    """

    def __init__(self, enabled: bool = True, patient: bool = False) -> None:
        self.requested: int | None = None
        self._enabled, self._patient = enabled, patient
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if self._enabled and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if kind is None and self.requested is not None:
            raise Interrupted(self.requested, "stopped at the end of a stage, which is saved")

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None and number == signal.SIGINT and not self._patient:
            raise KeyboardInterrupt
        self.requested = self.requested or number
