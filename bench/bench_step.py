"""Time of features and of whole training steps, keyword spotting, on the CPU.

    python bench/bench_step.py [--threads 1] [--model res8_narrow] [--rounds 40] [--out bench/results/step.json]

The clips are made on the spot (noise: time does not depend on what is said). All candidates take turns in one process,
so that a busy machine slows them alike; given are medians with the quartiles. "torchaudio" is the plain way: honk's
augmentation with a Python loop over the clips and torchaudio's MelSpectrogram. A step's network time excludes features.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import pqk_fast as pqk
from pqk_fast.allocator import recycle_large_tensors
from pqk_fast.data.features import dct_matrix
from pqk_fast.data.speech_commands import CLIP_SAMPLES, Noise, SpeechBatches, SpeechSet
from pqk_fast.files import replacing
from pqk_fast.models import create_model
from pqk_fast.record import environment

BATCH = 64


def plain_features(clips: torch.Tensor, noise: torch.Tensor) -> Callable[[], torch.Tensor]:
    """One batch the plain way: clip by clip, then torchaudio."""
    from torchaudio.transforms import MelSpectrogram

    mel = MelSpectrogram(
        16_000, 480, hop_length=160, f_min=20, f_max=4000, n_mels=40, power=2, norm="slaney", mel_scale="slaney"
    )
    dct = dct_matrix(40, 40).float()

    def batch() -> torch.Tensor:
        waves = []
        for i in torch.randint(len(clips), (BATCH,)).tolist():
            wave = clips[i].float() / 32768
            shift = int(torch.randint(-1600, 1601, ()))
            wave = F.pad(wave, (max(shift, 0), max(-shift, 0)))[max(-shift, 0) :][:CLIP_SAMPLES]
            if torch.rand(()) < 0.8:
                start = int(torch.randint(len(noise) - CLIP_SAMPLES, ()))
                wave = wave + torch.rand(()) * 0.1 * noise[start : start + CLIP_SAMPLES].float() / 32768
            waves.append(wave.clamp(-1, 1))
        energy = mel(torch.stack(waves)).transpose(1, 2)
        return torch.where(energy > 0, energy.log(), 0.0) @ dct

    return batch


def steps(model_name: str, x: torch.Tensor, y: torch.Tensor) -> dict[str, Callable[[], object]]:
    """The network's part of a training step: vanilla, phase 1, phase 2, finetune (all with SGD and momentum)."""
    torch.manual_seed(0)
    plain = create_model(model_name, 12)
    phase1 = pqk.prepare(copy.deepcopy(plain))
    pruner = pqk.Pruner(phase1, steps=1 << 30, epoch_steps=347)
    phase2 = pqk.prepare(copy.deepcopy(plain), pqk.PQKConfig(mask_interval=1))
    pqk.Pruner(phase2, 1, 1)
    pqk.start_phase2(phase2)
    mutual = pqk.MutualDistillationLoss()

    def step(model: torch.nn.Module, loss: Callable[[], torch.Tensor], after: Callable[[], object]) -> Callable:
        groups = model.parameters() if model is plain else pqk.param_groups(model, 1e-4)
        optimizer = torch.optim.SGD(groups, lr=1e-4, momentum=0.9)

        def run() -> None:
            value = loss()
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            after()

        return run

    return {
        "vanilla": step(plain, lambda: F.cross_entropy(plain(x), y), lambda: None),
        "phase 1": step(phase1, lambda: F.cross_entropy(phase1(x), y), pruner.step),
        "phase 2": step(phase2, lambda: mutual(*pqk.dual_forward(phase2, x, "two_pass"), y), lambda: None),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", default="res8_narrow")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("bench/results/step.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recycled = recycle_large_tensors()
    clips = torch.randint(-8000, 8000, (512, CLIP_SAMPLES), dtype=torch.int16)
    noise = torch.randint(-8000, 8000, (20 * CLIP_SAMPLES,), dtype=torch.int16)
    split = SpeechSet(clips, torch.randint(1, 12, (512,)), ["noise"] * 512)

    def endless():
        batches = SpeechBatches(split, Noise(noise, [0, len(noise)]), batch_size=BATCH, train=True)
        while True:
            yield from batches

    stream = endless()
    x, y = next(stream)
    candidates: dict[str, Callable[[], object]] = {
        "features": lambda: next(stream),
        "features, torchaudio": plain_features(clips, noise),
        **steps(args.model, x, y),
    }
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(args.rounds + 5):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if round_ >= 5:
                times[name].append(1e3 * (time.perf_counter() - start))
    rows = {}
    table = Table("", "median ms", "quartiles", title=f"{args.model}, batch {BATCH}, {args.threads} thread(s)")
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        rows[name] = {"median_ms": round(median, 3), "quartiles_ms": [round(low, 3), round(high, 3)], "n": len(values)}
        table.add_row(name, f"{median:.1f}", f"{low:.1f} .. {high:.1f}")
    console = Console()
    console.print(table)
    settings = {"model": args.model, "batch": BATCH, "threads": args.threads, "recycled_memory": recycled}
    with replacing(args.out, "w") as file:
        json.dump({"benchmark": "step", **environment(), "settings": settings, "times": rows}, file, indent=1)
    console.print(f"{args.out} written")


if __name__ == "__main__":
    main()
