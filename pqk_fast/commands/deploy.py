"""``pqk-fast export``, ``inspect`` and ``spot``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn

from pqk_fast.branches import pqk_layers
from pqk_fast.checkpoint import load_checkpoint
from pqk_fast.commands.options import Commands, command, console
from pqk_fast.config import Recipe, recipe_from_dict
from pqk_fast.data.speech_commands import LABELS, SAMPLE_RATE
from pqk_fast.deploy import sizes
from pqk_fast.deploy.c_source import export_c
from pqk_fast.deploy.executor import compile_network
from pqk_fast.deploy.onnx import export_onnx
from pqk_fast.deploy.packed import fill, save_packed
from pqk_fast.deploy.program import export_program
from pqk_fast.deploy.reader import read_packed
from pqk_fast.deploy.spot import Detector, Spotter, read_pcm_chunks, read_wav_chunks
from pqk_fast.models import create_model
from pqk_fast.prepare import prepare

SPEECH_SHAPE = (1, 101, 40)
INPUT_SHAPES = {"cifar100": (1, 3, 32, 32)}
STAGES = ("phase2", "finetune", "distill", "phase1")  # the student of the first that there is


def _write_packed(model: nn.Module, example: Tensor, path: Path, metadata: dict[str, Any]) -> str:
    return f"{path}: {save_packed(model, path, metadata):,} bytes"


def _write_onnx(model: nn.Module, example: Tensor, path: Path, metadata: dict[str, Any]) -> str:
    return f"{path}: {export_onnx(model, example, path, metadata):,} bytes"


def _write_program(model: nn.Module, example: Tensor, path: Path, metadata: dict[str, Any]) -> str:
    return f"{path}: {export_program(model, example, path, metadata):,} bytes"


def _write_c(model: nn.Module, example: Tensor, path: Path, metadata: dict[str, Any]) -> str:
    report = export_c(model, example, path)
    code = "" if report.code is None else f", {report.code:,} of them code by {report.compiler}"
    return f"{report.source}, {report.header}: flash {report.flash:,} bytes{code}; RAM {report.scratch:,} bytes"


WRITERS = {"packed": _write_packed, "onnx": _write_onnx, "pt2": _write_program, "c": _write_c}


def add(commands: Commands) -> None:
    sub = command(commands, export, "export", "write a run's student as a small file")
    sub.add_argument("run", type=Path, metavar="RUN", help="run folder or checkpoint file")
    sub.add_argument(
        "--format",
        choices=tuple(WRITERS),
        default="packed",
        help="packed: this library's small file; onnx: INT4 or INT8 weights; pt2: torch.export's; c: a C99 source and "
        "header (default: %(default)s)",
    )
    sub.add_argument("--out", type=Path, required=True, metavar="PATH", help="file to write")
    sub.add_argument("--stage", choices=STAGES, help="whose student (default: the last of those that ran)")
    sub.add_argument("--best", action="store_true", help="of the best epoch on validation, not the last")

    sub = command(commands, inspect, "inspect", "what is in a packed student, byte by byte")
    sub.add_argument("file", type=Path, metavar="FILE")
    sub.add_argument("--json", action="store_true", help="as JSON")
    sub.add_argument("--page", type=Path, metavar="DIR", help="also write FILE's name.md and .html into DIR")

    sub = command(commands, spot, "spot", "listen for keywords in a recording or a stream")
    sub.add_argument("audio", metavar="FILE.wav|-", help="a 16 kHz mono WAV file; -: 16 kHz 16-bit PCM from the input")
    sub.add_argument("--model", type=Path, required=True, metavar="FILE", help="a packed student")
    sub.add_argument("--threshold", type=float, default=0.75, help="score to report a word (default: %(default)s)")
    sub.add_argument("--hop", type=float, default=0.1, metavar="S", help="seconds between looks (default: %(default)s)")
    sub.add_argument("--json", action="store_true", help="one JSON object a line")


def load_student(run: Path, stage: str | None = None, best: bool = False) -> tuple[nn.Module, Recipe, str]:
    """A run's prepared student in evaluation mode, its recipe, and the stage that it is of.

    Raises CheckpointError for no run, ValueError for a stage that is not there or has not ended.
    """
    checkpoint = load_checkpoint(run)
    recipe = recipe_from_dict(checkpoint["recipe"])
    stages = {name: saved for name, saved in checkpoint["stages"].items() if saved["prepared"]}
    ended = [name for name in STAGES if name in stages and stages[name]["finished"]]
    if stage is None and not ended:
        raise ValueError(f"{run} has no student yet: train phase1 at least to its end")
    stage = stage or ended[0]
    if stage not in ended:
        raise ValueError(f"{run} has no finished {stage}; it has {', '.join(ended) or 'none'}")
    state = stages[stage]["state"]
    if best:
        found = stages[stage]["best"].get("validation")
        if found is None:
            raise ValueError(f"no epoch of {stage} in {run} qualified as the best: leave --best out")
        state = found["state"]
    model = prepare(create_model(recipe.model, recipe.data.classes), recipe.pqk)
    model.load_state_dict(state)
    return model.eval(), recipe, stage


def metadata_of(recipe: Recipe) -> dict[str, Any]:
    """What a packed file says of the network besides its weights."""
    metadata: dict[str, Any] = {"model": recipe.model, "classes": recipe.data.classes}
    if recipe.data.name != "cifar100" and recipe.data.classes == len(LABELS):
        metadata["labels"] = list(LABELS)
    return metadata


SUFFIXES = {".onnx": "onnx", ".pt2": "pt2", ".c": "c"}


def export(args: argparse.Namespace) -> None:
    named = SUFFIXES.get(args.out.suffix, args.format)
    if named != args.format:
        raise ValueError(f"{args.out.name} is the name of another format than {args.format}: give --format {named}")
    model, recipe, stage = load_student(args.run, args.stage, args.best)
    example = torch.zeros(INPUT_SHAPES.get(recipe.data.name, SPEECH_SHAPE))
    written = WRITERS[args.format](model, example, args.out, metadata_of(recipe))
    weights = sum(layer.weight.numel() for layer in pqk_layers(model).values())
    console.print(escape(f"{written}, the student of {stage} ({recipe.model}, {weights:,} weights)"))


def inspect(args: argparse.Namespace) -> None:
    packed = read_packed(args.file)
    if args.json:
        console.print(json.dumps(sizes.summary(packed), indent=1), markup=False)
    else:
        for table in (sizes.layers_table(packed), sizes.parts_table(packed), sizes.formats_table(packed)):
            console.print(table.rich())
    if args.page:
        paths = sizes.page_of(packed, args.file.name).write(args.page, args.file.stem)
        say = Console(stderr=True) if args.json else console
        say.print(escape(f"written: {', '.join(map(str, paths))}"))


def spot(args: argparse.Namespace) -> None:
    packed = read_packed(args.model)
    labels = packed.metadata.get("labels")
    if not isinstance(labels, list) or len(labels) != packed.metadata.get("classes"):
        raise ValueError(f"{args.model} does not name its classes: export it from a run on speech")
    network = compile_network(fill(packed), torch.zeros(SPEECH_SHAPE))
    spotter = Spotter(network, Detector(labels, args.hop, threshold=args.threshold))
    chunks = read_pcm_chunks(sys.stdin.buffer) if args.audio == "-" else read_wav_chunks(args.audio)
    busy, found = 0.0, 0
    try:
        while True:
            chunk = next(chunks, None)  # waiting for a microphone is no work
            start = time.perf_counter()
            for word in spotter.end() if chunk is None else spotter.feed(chunk):
                found += 1
                line = {"time": round(word.time, 2), "word": word.word, "score": round(word.score, 3)}
                shown = json.dumps(line) if args.json else f"{word.time:8.2f} s  {word.word:8}  {word.score:.2f}"
                print(shown, flush=True)
            busy += time.perf_counter() - start
            if chunk is None:
                break
    finally:
        heard = spotter.samples / SAMPLE_RATE
        factor = busy / heard if heard else 0.0
        about = {"seconds": round(heard, 2), "words": found, "real_time_factor": round(factor, 4)}
        text = f"{found} words in {heard:.1f} s, {factor:.3f} of real time"
        print(json.dumps(about) if args.json else text, file=sys.stdout if args.json else sys.stderr, flush=True)
