"""Functions of the tests run by several processes at once, which gloo joins: ``on_ranks(function, *args)``.

The processes of one number of ranks start once and serve all test files; after an error or a hang they are ended.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

# One thread each; plain PyTorch rather than interpreted kernels where the C++ library is switched off.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
GRACE = 3.0  # seconds that the other ranks get after one has failed


class RanksFailedError(AssertionError):
    """Holds the tracebacks of the ranks that failed."""


def _serve(rank: int, world: int, store: str, connection: Connection) -> None:
    faulthandler.register(signal.SIGUSR1)  # where it hangs
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timedelta(minutes=5)
    )
    while (job := connection.recv_bytes()) != b"":
        try:
            function, args = pickle.loads(job)
            torch.manual_seed(0)
            answer: tuple[bool, Any] = True, function(*args)
        except BaseException:
            answer = False, traceback.format_exc()
        connection.send_bytes(pickle.dumps(answer))
    dist.destroy_process_group()


class _Processes:
    def __init__(self, world: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        store = str(Path(self.folder.name, "store"))
        pipes = [spawn.Pipe() for _ in range(world)]
        self.connections = [here for here, _ in pipes]
        self.processes = [
            spawn.Process(target=_serve, args=(rank, world, store, there), daemon=True)
            for rank, (_, there) in enumerate(pipes)
        ]
        with mock.patch.dict(os.environ, ENVIRONMENT):
            for process in self.processes:
                process.start()
        for _, there in pipes:
            there.close()

    def run(self, job: bytes, seconds: float) -> list[tuple[bool, Any]]:
        """Every rank's answer, in the order of the ranks."""
        for connection in self.connections:
            connection.send_bytes(job)
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + seconds
        while len(answers) < len(self.connections) and (left := deadline - time.monotonic()) > 0:
            silent = [connection for rank, connection in enumerate(self.connections) if rank not in answers]
            for connection in wait(silent, left):
                rank = self.connections.index(connection)  # type: ignore[arg-type]
                try:
                    answers[rank] = pickle.loads(self.connections[rank].recv_bytes())
                except EOFError:
                    answers[rank] = False, "the process ended without a word"
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE)
        for rank, process in enumerate(self.processes):
            if rank not in answers:
                os.kill(process.pid or 0, signal.SIGUSR1)  # prints its stack
                answers[rank] = False, f"no answer within {seconds} s, or {GRACE} s after another rank had failed"
        return [answers[rank] for rank in range(len(self.processes))]

    def end(self) -> None:
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.send_bytes(b"")
        for process in self.processes:
            process.join(GRACE)
            process.kill()
        self.folder.cleanup()


_running: dict[int, _Processes] = {}


@atexit.register
def _end_all() -> None:
    while _running:
        _running.popitem()[1].end()


def on_ranks(function: Callable[..., Any], *args: Any, world: int = 2, seconds: float = 120.0) -> list[Any]:
    """``function(*args)`` on every rank at once; what each returns, in order.

    ``function`` stands at the top of a test file; arguments and results are pickled. RanksFailedError, with the
    tracebacks, if it raises on a rank or takes longer than ``seconds`` (starting the processes included).
    """
    processes = _running.get(world) or _running.setdefault(world, _Processes(world))
    answers = processes.run(pickle.dumps((function, args)), seconds)
    if not all(fine for fine, _ in answers):
        _running.pop(world).end()
        reports = [f"rank {rank}:\n{text}" for rank, (fine, text) in enumerate(answers) if not fine]
        raise RanksFailedError("\n".join(reports))
    return [result for _, result in answers]


def everywhere(value: Any) -> list[Any]:
    """Called on every rank: the values of all."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
