"""What several commands share: the console, and options."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console

from pqk_fast.training.steps import PRECISIONS

console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())

Commands = Any  # what add_subparsers gives
MOST_JOBS = 8  # trainings at a time unless told otherwise: each takes a gigabyte


def command(commands: Commands, function: Callable[[argparse.Namespace], int | None], name: str, text: str) -> Any:
    """A parser for ``pqk-fast name``, which calls ``function`` with its arguments; an integer is the exit status."""
    sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    sub.set_defaults(function=function)
    return sub


def add_device(sub: argparse.ArgumentParser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    sub.add_argument("--device", type=_device, default=default, help="where to compute (default: %(default)s)")


def add_jobs(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--jobs", type=count, metavar="N", help="trainings at a time (default: one a core, 1 on a GPU)")


def jobs_of(args: argparse.Namespace) -> int:
    jobs: int = args.jobs or (min(os.cpu_count() or 1, MOST_JOBS) if args.device == "cpu" else 1)
    return jobs


def add_settings(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting, as pqk.bits=8; repeatable",
    )


def add_step_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--precision",
        choices=tuple(PRECISIONS),
        default="fp32",
        help="bf16, fp16: mixed precision by autocast (default: %(default)s)",
    )
    sub.add_argument("--compile", action="store_true", help="torch.compile forward and loss, once a stage")
    sub.add_argument("--capture", action="store_true", help="on a GPU: whole steps as CUDA graphs")
    sub.add_argument("--no-recycle", action="store_true", help="leave malloc's settings alone (CPU)")


def step_options(args: argparse.Namespace) -> dict[str, Any]:
    """How steps are computed, as Trainer calls it."""
    return {
        "precision": args.precision,
        "compile": args.compile,
        "capture": args.capture,
        "recycle_memory": not args.no_recycle,
    }


def _device(text: str) -> str:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a device to train on; expected cpu, cuda or cuda:0")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(
            f"{text!r} is not there: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices; use cpu"
        )
    return text


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)
