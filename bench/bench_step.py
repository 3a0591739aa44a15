"""Time of making a batch and of whole training steps.

    python bench/bench_step.py [--device cpu] [--model res8_narrow] [--rounds 40] [--out bench/results/step.json]

Clips and images are made on the spot (noise: time does not depend on what they show). All candidates take turns in one
process, so that a busy machine slows them alike; given are medians with the quartiles. "features, torchaudio" is the
plain way: honk's augmentation with a Python loop over the clips and torchaudio's MelSpectrogram. A step is that of the
network and its optimizer, and excludes making the batch; ratios are to the plain network's step.

On a GPU: res8-narrow, res8 and ResNet-32 unless ``--model`` chooses (repeatable), phase 2 both ways, phase 1 also with
``fuse``; each as Python calls it and, "captured", as one CUDA graph. A captured step of phase 1 makes no masks, which
31 of 32 steps do not; "masks" is what making them takes.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from report import Report, settings_of_products
from timing import Bind, Workload, called
from torch import Tensor, nn

import pqk_fast as pqk
from pqk_fast import ops
from pqk_fast.branches import pqk_layers
from pqk_fast.data.cifar import CifarSplit
from pqk_fast.data.cifar_batches import CifarBatches
from pqk_fast.data.features import dct_matrix
from pqk_fast.data.speech_batches import SpeechBatches
from pqk_fast.data.speech_commands import CLIP_SAMPLES, Noise, SpeechSet
from pqk_fast.models import create_model

LR = 1e-4
MODELS = {"res8_narrow": 12, "res8": 12, "resnet32": 100}  # and their classes
BATCH = {"res8_narrow": 64, "res8": 64, "resnet32": 128}
NEVER = 1 << 30
Step = Callable[[], object]


def plain_features(clips: Tensor, noise: Tensor, batch_size: int) -> Callable[[], Tensor]:
    """One batch the plain way: clip by clip, then torchaudio."""
    from torchaudio.transforms import MelSpectrogram

    mel = MelSpectrogram(
        16_000, 480, hop_length=160, f_min=20, f_max=4000, n_mels=40, power=2, norm="slaney", mel_scale="slaney"
    )
    dct = dct_matrix(40, 40).float()

    def batch() -> Tensor:
        waves = []
        for i in torch.randint(len(clips), (batch_size,)).tolist():
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


def endless(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from batches


def batches(model: str, size: int, device: str) -> dict[str, Step]:
    """The ways to make a batch; the first gives what the steps train on."""
    if model == "resnet32":
        images = torch.randint(0, 256, (8 * size, 3, 32, 32), dtype=torch.uint8)
        split = CifarSplit(images, torch.randint(100, (len(images),)))
        stream = endless(CifarBatches(split, batch_size=size, train=True, device=device))
        return {"images": lambda: next(stream)}
    clips = torch.randint(-8000, 8000, (8 * size, CLIP_SAMPLES), dtype=torch.int16)
    noise = torch.randint(-8000, 8000, (20 * CLIP_SAMPLES,), dtype=torch.int16)
    words = SpeechSet(clips, torch.randint(1, 12, (len(clips),)), ["noise"] * len(clips))
    recordings = Noise(noise, [0, len(noise)])
    features = endless(SpeechBatches(words, recordings, batch_size=size, train=True, device=device))
    made: dict[str, Step] = {"features": lambda: next(features)}
    if device == "cpu":
        made["features, torchaudio"] = plain_features(clips, noise, size)
    return made


def training_step(model: nn.Module, loss: Callable[[nn.Module], Tensor], after: Step = lambda: None) -> Step:
    """Forward, backward, SGD with momentum, and what comes after it."""
    prepared = pqk_layers(model)
    optimizer = torch.optim.SGD(pqk.param_groups(model, LR) if prepared else model.parameters(), lr=LR, momentum=0.9)

    def run() -> None:
        value = loss(model)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        after()

    return run


class Networks:
    """Makes, of one plain network, the steps that are compared; each has a network of its own."""

    def __init__(self, name: str, x: Tensor, y: Tensor) -> None:
        torch.manual_seed(0)
        self.plain = create_model(name, MODELS[name])
        self.x, self.y = x, y

    def cross_entropy(self, model: nn.Module) -> Tensor:
        return F.cross_entropy(model(self.x), self.y)

    def vanilla(self) -> Step:
        return training_step(copy.deepcopy(self.plain).to(self.x.device), self.cross_entropy)

    def phase1(self, interval: int = 32, fused: bool = False) -> Step:
        model = pqk.prepare(copy.deepcopy(self.plain), pqk.PQKConfig(mask_interval=interval)).to(self.x.device)
        if fused:
            pqk.fuse(model)
        pruner = pqk.Pruner(model, steps=NEVER, epoch_steps=347)
        return training_step(model, self.cross_entropy, pruner.step)

    def phase2(self, mode: str) -> Step:
        model = pqk.prepare(copy.deepcopy(self.plain), pqk.PQKConfig(mask_interval=1)).to(self.x.device)
        pqk.Pruner(model, 1, 1)
        pqk.start_phase2(model)
        mutual = pqk.MutualDistillationLoss().to(self.x.device)
        return training_step(model, lambda model: mutual(*pqk.dual_forward(model, self.x, mode), self.y))

    def masks(self) -> Step:
        weights = [p.detach().to(self.x.device) for p in self.plain.parameters() if p.dim() > 1]
        masks = [torch.ones_like(weight, dtype=torch.bool) for weight in weights]
        keep = sum(weight.numel() for weight in weights) - ops.masked_count(weights, 0.9)
        return partial(ops.topk_mask_, masks, weights, torch.tensor(keep, device=self.x.device))


def workload(model: str, batch_size: int, device: str, cases_of: str) -> Workload:
    makes = batches(model, batch_size, device)
    networks = Networks(model, *next(iter(makes.values()))())  # type: ignore[misc]
    steps: dict[str, Callable[[], Step]] = {"vanilla": networks.vanilla, "phase 1": networks.phase1}
    if cases_of == "cpu":
        steps["phase 2"] = partial(networks.phase2, "two_pass")
    else:
        steps["phase 1, fused"] = partial(networks.phase1, fused=True)
        steps |= {f"phase 2, {mode}": partial(networks.phase2, mode) for mode in ("two_pass", "stacked")}
    candidates: dict[str, Bind] = {name: called(make) for name, make in makes.items()}
    candidates |= {name: lambda make=make: make() for name, make in steps.items()}
    uncaptured = list(candidates)
    if cases_of == "cuda":
        steps["phase 1"] = partial(networks.phase1, NEVER)
        steps["phase 1, fused"] = partial(networks.phase1, NEVER, fused=True)
        candidates |= {f"{name}, captured": lambda make=make: make() for name, make in steps.items()}
        candidates["masks"] = networks.masks
    return Workload(candidates, lambda seed: (), uncaptured=uncaptured, reference="vanilla", rotate=False)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", action="append", choices=MODELS, help="repeatable")
    parser.add_argument("--rounds", type=int, default=40)


def main() -> int:
    report = Report(
        __doc__, "step", {"batch": BATCH, **settings_of_products()}, seconds=0.0, threads=1, add_options=add_options
    )
    report.fewest_rounds = report.options.rounds
    default = ["res8_narrow"] if report.cases_of == "cpu" else list(MODELS)
    for model in report.options.model or default:
        size = report.size(BATCH[model], 2)
        weights = sum(p.numel() for p in create_model(model, MODELS[model]).parameters())
        report.case(model, weights, 0, partial(workload, model, size, report.device, report.cases_of))
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
