"""The command line: ``pqk-fast demo | train | eval | reproduce | bench | pareto | sensitivity | export | inspect |
spot | recipes | doctor``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

import pqk_fast
from pqk_fast.commands import about, bench, deploy, pareto, reproduce, sensitivity, training
from pqk_fast.commands.options import console
from pqk_fast.experiments.runner import TaskError
from pqk_fast.training.interrupts import Interrupted
from pqk_fast.training.loop import TrainingDivergedError
from pqk_fast.training.ranks import RanksDifferError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pqk-fast", description="Train sparse, low-bit networks: pruning, quantization, in-network distillation."
    )
    parser.add_argument("--version", action="version", version=f"pqk-fast {pqk_fast.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in (training, reproduce, bench, pareto, sensitivity, deploy, about):
        module.add(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it worked (or what the command says), 1 with a message if the input was wrong, 128 + n
    after signal n."""
    args = _parser().parse_args(arguments)
    try:
        return args.function(args) or 0
    except Interrupted as interrupt:
        again = "; train the same with --resume to go on"
        if os.environ.get("RANK", "0") == "0":
            console.print(f"\n[bold]{interrupt.signal.name}[/]: {escape(str(interrupt))}{again}")
        return 128 + interrupt.signal
    except KeyboardInterrupt:
        console.print("\n[bold]interrupted[/]; a run that has checkpoints goes on with --resume")
        return 130
    except (ValueError, TypeError, OSError, ImportError, TrainingDivergedError, RanksDifferError, TaskError) as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
