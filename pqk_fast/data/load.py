"""From a recipe's data section to batches: one place that knows the data sets by name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pqk_fast.config import DataConfig, Recipe
from pqk_fast.data.cifar import load_cifar100
from pqk_fast.data.cifar_batches import CifarBatches
from pqk_fast.data.speech_batches import SpeechBatches
from pqk_fast.data.speech_commands import LABELS, SPLITS, SpeechCommands, load_speech_commands, load_word_folders
from pqk_fast.data.spoken_words import make_spoken_words
from pqk_fast.settings import ConfigError

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass
class Splits:
    """Batches of the three splits, of one rank; ``sizes`` are those of all ranks together.

    ``train(seed)`` starts a stream of its own, and raises ValueError for a batch size that the ranks cannot share
    evenly or that is larger than the split. ``validation`` may be None. ``names`` are those of the classes, in the
    order of the labels; ``fingerprint`` is the same for the same data only, order included.
    """

    train: Callable[[int], Batches]
    validation: Batches | None
    testing: Batches
    sizes: dict[str, int]
    names: tuple[str, ...]
    fingerprint: str

    @property
    def classes(self) -> int:
        return len(self.names)


def _fingerprint(*tensors: Tensor) -> str:
    """16 hexadecimal digits of a hash of all bytes (a quarter of a second for 200 MB)."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def speech_splits(
    data: SpeechCommands,
    batch_size: int,
    device: str | torch.device = "cpu",
    *,
    rank: int = 0,
    world: int = 1,
    time_mask: int = 0,
) -> Splits:
    """Splits of a speech data set that is in memory already: the part of rank ``rank`` of ``world``.

    ``batch_size`` is that of all ranks together. Raises ValueError for an empty split.
    """
    make = partial(SpeechBatches, noise=data.noise, batch_size=batch_size, device=device, rank=rank, world=world)
    return Splits(
        train=lambda seed: make(data.train, train=True, seed=seed, time_mask=time_mask),
        validation=make(data.validation, train=False),
        testing=make(data.testing, train=False),
        sizes={split: len(getattr(data, split)) for split in SPLITS},
        names=LABELS,
        fingerprint=_fingerprint(
            *(part for split in (data.train, data.validation, data.testing) for part in (split.clips, split.labels)),
            *(() if data.noise is None else (data.noise.samples,)),
        ),
    )


def make_words(recipe: Recipe, progress: Callable[[int, int], None] | None = None) -> SpeechCommands:
    """The spoken words of a recipe: its seed and fractions; ``progress(speakers done, speakers in all)``."""
    data = recipe.data
    return make_spoken_words(
        unknown_fraction=data.unknown, silence_fraction=data.silence, seed=recipe.seed, progress=progress
    )


def load_splits(
    recipe: Recipe,
    root: str | Path | None,
    device: str | torch.device = "cpu",
    download: bool = False,
    *,
    rank: int = 0,
    world: int = 1,
) -> Splits:
    """The data set that a recipe names, from the folder ``root`` (spoken words are made on the spot if it is None).

    Every rank of ``world`` reads the whole set and makes its own part of the batches (see
    :class:`~pqk_fast.data.batches.DeviceBatches`). With ``download``, let one rank be through before the others start.

    Raises ConfigError without a folder, FileNotFoundError or ValueError for one that does not hold the data set.
    """
    config = recipe.data
    options: dict[str, Any] = {"rank": rank, "world": world, "time_mask": config.time_mask}
    if config.name == "spoken_words" and root is None:
        return speech_splits(make_words(recipe), config.batch_size, device, **options)
    if root is None:
        raise ConfigError(f"the recipe trains on {config.name}: say where it is with --data DIR")
    if config.name == "cifar100":
        images = load_cifar100(root, validation_fraction=config.validation, download=download)
        make = partial(CifarBatches, batch_size=config.batch_size, device=device, rank=rank, world=world)
        return Splits(
            train=lambda seed: make(images.train, train=True, seed=seed),
            validation=make(images.validation, train=False) if len(images.validation) else None,
            testing=make(images.testing, train=False),
            sizes={split: len(getattr(images, split)) for split in SPLITS},
            names=images.classes,
            fingerprint=_fingerprint(
                *(
                    p
                    for split in (images.train, images.validation, images.testing)
                    for p in (split.images, split.labels)
                )
            ),
        )
    speech = load_speech_commands(
        root, unknown_fraction=config.unknown, silence_fraction=config.silence, download=download
    )
    return speech_splits(speech, config.batch_size, device, **options)


def word_folder_batches(config: DataConfig, root: str | Path | None, device: str | torch.device = "cpu") -> Batches:
    """Every clip under the word folders of ``root``, whatever the split; speech only."""
    if config.name == "cifar100":
        raise ConfigError("--split all is for speech: CIFAR-100 has validation and testing")
    if root is None:
        raise ConfigError("say where the word folders are with --data DIR")
    return SpeechBatches(load_word_folders(root), None, batch_size=config.batch_size, train=False, device=device)
