"""A worker as the comparison sees it: a process that answers, or an error that goes into the record."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any

from candidates import HERE, VARIABLES, Candidate


class WorkerError(RuntimeError):
    """What the worker ``name`` could not do, in its own words; or that it ended, with the last it said."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


class Remote:
    """A candidate's process.

    Args:
        name, candidate: who.
        threads: of its arithmetic.
        patience: seconds that a request may take.

    Raises WorkerError where it cannot be started; ``about`` is what it says of itself.
    """

    def __init__(self, name: str, candidate: Candidate, threads: int = 1, patience: float = 1800) -> None:
        self.name, self.patience = name, patience
        if not candidate.python.exists():
            remedy = f"run `python bench/peers/install.py {candidate.environment}`"
            raise WorkerError(name, f"it is not installed: {remedy}")
        self._said = tempfile.TemporaryFile()  # noqa: SIM115, closed by close()
        self._process = subprocess.Popen(
            [candidate.python, HERE / "worker.py", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env={**os.environ, **VARIABLES, "OMP_NUM_THREADS": str(threads)},
        )
        self._waiting = b""
        try:
            self.about = self.ask("hello", threads=threads)
        except WorkerError:
            self.close()
            raise

    def ask(self, what: str, tell: Callable[[str], object] | None = None, **details: Any) -> dict[str, Any]:
        """Raises WorkerError for what cannot be done, and for a worker that has ended or takes too long."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": what, **details}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self.name, self._ended()) from None
        while "progress" in (answer := self._answer()):
            if tell is not None:
                tell(answer["progress"])
        if "error" in answer:
            raise WorkerError(self.name, answer["error"])
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._waiting:
                if not selector.select(self.patience):
                    self._process.kill()
                    raise WorkerError(self.name, f"no answer within {self.patience:g} s: it was ended")
                part = os.read(self._process.stdout.fileno(), 1 << 16)
                if not part:
                    raise WorkerError(self.name, self._ended())
                self._waiting += part
        line, _, self._waiting = self._waiting.partition(b"\n")
        return json.loads(line)  # type: ignore[no-any-return]

    def _ended(self) -> str:
        code = self._process.wait()
        self._said.seek(0)
        lines = [line for line in self._said.read().decode(errors="replace").splitlines() if line.strip()]
        return f"its process ended with {code}: {' / '.join(lines[-2:])[:400]}"

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._said):
            if file is not None:
                with contextlib.suppress(BrokenPipeError):
                    file.close()


class RemoteTimer:
    """:func:`timing.take_turns` with workers instead of calls in this process: one of them computes at a time."""

    turn, fewest = 10e-3, 3

    def measure(self, call: Any, times: int, settle: bool) -> float:
        seconds: float = call.ask("time", times=times, settle=settle)["seconds"]
        return seconds
