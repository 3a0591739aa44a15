"""Whether a trained student stays the same student in every form that it can be written in.

    python bench/accuracy_of_forms.py RUN --data DIR [--out bench/results/forms.json]

RUN is a run's folder on speech. Every clip of the testing split goes through the prepared student, ``convert`` (with
and without BatchNorm folded), the packed file read back as a float model, as packed layers and as one call, the ONNX
file in onnxruntime, the torch.export program, and the C source compiled. The record has each form's accuracy, how many
clips it calls otherwise than the prepared student, and its largest difference as a part of the largest logit.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_latency import in_c, in_onnxruntime
from torch import Tensor

import pqk_fast as pqk
from pqk_fast.commands.deploy import SPEECH_SHAPE, load_student
from pqk_fast.data.load import load_splits
from pqk_fast.deploy.executor import compile_network
from pqk_fast.deploy.onnx import export_onnx
from pqk_fast.deploy.packed import load_packed, save_packed
from pqk_fast.deploy.program import export_program
from pqk_fast.deploy.runtime import load_runtime
from pqk_fast.files import replacing
from pqk_fast.record import environment

Form = Callable[[Tensor], Tensor]


def clip_by_clip(bind: Any, clips: Tensor) -> Tensor:
    """What a form gives that takes one input, in a place that stays the same."""
    place = torch.empty(1, *clips.shape[1:])
    call = bind(place)
    made = []
    for clip in clips:
        place[0] = clip
        made.append(call().clone())
    return torch.cat(made)


def forms(model: torch.nn.Module, folder: Path, classes: int) -> dict[str, Form]:
    example = torch.zeros(SPEECH_SHAPE)
    packed, onnx_file, program = folder / "student.pqk", folder / "student.onnx", folder / "student.pt2"
    save_packed(model, packed)
    export_onnx(model, example, onnx_file)
    export_program(model, example, program)
    plain = pqk.convert(model).eval()
    return {
        "prepared": model,
        "converted": plain,
        "converted, folded": pqk.convert(model, fold=True).eval(),
        "packed file": load_packed(packed, pqk.convert(model)),
        "packed layers": load_runtime(packed, pqk.convert(model)),
        "one call": compile_network(load_packed(packed, pqk.convert(model)), example),
        "ONNX": lambda x: clip_by_clip(in_onnxruntime(lambda _: onnx_file, 1), x),
        "torch.export": torch.export.load(str(program)).module(),
        "C source": lambda x: clip_by_clip(in_c(model, classes), x),
    }


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("bench/results/forms.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, recipe, stage = load_student(options.run)
    splits = load_splits(recipe, options.data)
    batches = list(splits.testing)
    x, labels = (torch.cat([batch[i] for batch in batches]) for i in (0, 1))
    record: dict[str, Any] = {"benchmark": "forms", **environment(), "recipe": recipe.name, "stage": stage}
    record |= {"clips": len(x), "forms": {}}
    with tempfile.TemporaryDirectory() as folder:
        truth = None
        for name, form in forms(model, Path(folder), recipe.data.classes).items():
            made = torch.cat([form(part) for part in x.split(64)])
            truth = made if truth is None else truth
            record["forms"][name] = row = {
                "accuracy": round(100 * float((made.argmax(1) == labels).double().mean()), 3),
                "called_otherwise": int((made.argmax(1) != truth.argmax(1)).sum()),
                "largest_difference": float((made - truth).abs().max() / truth.abs().max()),
            }
            print(name, row, flush=True)
    with replacing(options.out, "w") as file:
        json.dump(record, file, indent=1)
    return 0 if all(row["called_otherwise"] == 0 for row in record["forms"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
