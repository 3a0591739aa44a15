"""One candidate in its own environment: reads a request a line from standard input, writes an answer a line.

    python bench/peers/worker.py CANDIDATE      (compare.py starts it)

Requests and answers are JSON objects:

    {"do": "hello", "threads": n}                              -> {"versions", "does", "recycled_memory"}
    {"do": "prepare", "kind": "fake_quant" | "step" | "masks", "case": name}    -> {"about"}
    {"do": "time", "times": n, "settle": bool}                 -> {"seconds"} a call, of what was prepared
    {"do": "memory"}                                           -> {"peak_bytes", "state_bytes"}
    {"do": "file"}                                             -> {"bytes"}
    {"do": "train", "data", "recipe", "steps", "seed", "order"}        -> any number of {"progress"}, then {"result"}
    {"do": "quit"}

What cannot be done is answered by {"error"}, and the next request is waited for. Whatever libraries print goes to
standard error.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from candidates import CANDIDATES


def claim_stdout() -> TextIO:
    """Standard output for answers alone; anybody else's goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


class Worker:
    """Answers one request after the other."""

    def __init__(self, name: str, answers: TextIO) -> None:
        self.candidate, self.answers = CANDIDATES[name], answers
        self.call: Any = None

    def say(self, **answer: Any) -> None:
        self.answers.write(json.dumps(answer) + "\n")
        self.answers.flush()

    def answer(self, request: dict[str, Any]) -> None:
        what = request.pop("do", None)
        if what not in ("hello", "prepare", "time", "memory", "file", "train"):
            self.say(error=f"ValueError: no such request: {what!r}")
            return
        try:
            self.say(**getattr(self, what)(**request))
        except Exception as error:  # whatever a library may raise
            traceback.print_exc()
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            self.say(error=f"{type(error).__name__}: {' / '.join(lines)[:400]}")

    def hello(self, threads: int = 1) -> dict[str, Any]:
        import torch

        from pqk_fast.allocator import recycle_large_tensors
        from pqk_fast.record import environment

        torch.set_num_threads(threads)
        recycled = recycle_large_tensors()
        self.peer = self.candidate.load()
        versions = environment()["versions"]
        if self.peer.package:
            versions[self.peer.package] = metadata.version(self.peer.package)
        return {"versions": versions, "does": self.peer.does, "recycled_memory": recycled}

    def prepare(self, kind: str, case: str) -> dict[str, Any]:
        import work

        self.call = None
        if kind == "step":
            self.call = work.Step(self.peer, memory_format=work.STEPS[case])
            about = self.call.about
        elif kind == "fake_quant":
            self.call, about = work.fake_quant(self.peer, work.FAKE_QUANT[case])
        elif kind == "masks":
            self.call, about = work.masks(self.peer, case)
        else:
            raise ValueError(f"no such kind of case: {kind!r}")
        for _ in range(2):
            self.call()
        return {"about": about}

    def time(self, times: int, settle: bool) -> dict[str, Any]:
        from timing import HostTimer

        if self.call is None:
            raise ValueError("nothing is prepared")
        return {"seconds": HostTimer().measure(self.call, times, settle)}

    def memory(self) -> dict[str, Any]:
        import work

        step = work.Step(self.peer)
        return {"peak_bytes": work.peak_bytes(step), "state_bytes": step.state_bytes()}

    def file(self) -> dict[str, Any]:
        import work

        return work.file_of(self.peer)

    def train(self, data: str, recipe: str, steps: int, seed: int, order: str) -> dict[str, Any]:
        import training

        tell = lambda text: self.say(progress=text)  # noqa: E731
        return {"result": training.train(self.peer, Path(data), recipe, steps, seed, order, tell)}


def main() -> None:
    answers = claim_stdout()
    worker = Worker(sys.argv[1], answers)
    for line in sys.stdin:
        request = json.loads(line)
        if request.get("do") == "quit":
            break
        worker.answer(request)


if __name__ == "__main__":
    main()
