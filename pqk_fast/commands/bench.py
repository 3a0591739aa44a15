"""``pqk-fast bench``."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import pqk_fast.files
from pqk_fast.commands.options import Commands, command, console

BENCH = Path(pqk_fast.files.__file__).resolve().parents[1] / "bench"


def add(commands: Commands) -> None:
    text = "measure kernels, training steps, memory, latency and files on this machine: one record, one page"
    sub = command(commands, bench, "bench", text)
    sub.add_argument(
        "--out", type=Path, default=Path("runs/bench"), metavar="DIR", help="for bench.json (default: %(default)s)"
    )
    sub.add_argument("--page", type=Path, metavar="DIR", help="folder for benchmarks.md and .html (default: --out)")
    sub.add_argument("--quick", action="store_true", help="a trial with small sizes; its figures mean nothing")
    sub.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these benchmarks; --out keeps the others")
    sub.add_argument(
        "--all", action="store_true", help="also other libraries, a whole cell against a plain script, a step's profile"
    )
    sub.add_argument("--from", dest="made", type=Path, metavar="FILE", help="only make the page, of this bench.json")
    sub.add_argument(
        "--compare", nargs=2, type=Path, metavar=("A", "B"), help="measure nothing: exit status 1 if B is slower than A"
    )


def bench(args: argparse.Namespace) -> int:
    if not (BENCH / "suite.py").exists():
        raise ValueError(
            f"the benchmarks are in the sources' folder bench/, which an installed package does not have ({BENCH} is "
            "not there): get a clone of the sources, run `make install` in it, which builds the library and a .venv, "
            "and then `make bench` there, or `.venv/bin/pqk-fast bench`"
        )
    sys.path.insert(0, str(BENCH))  # its files import one another by their names
    try:
        status: int = importlib.import_module("suite").run(args, console)
    finally:
        sys.path.remove(str(BENCH))
    return status
