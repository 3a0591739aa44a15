"""From a recipe's data section to batches: one place that knows the data sets by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pqk_fast.config import ConfigError, DataConfig, Recipe
from pqk_fast.data.cifar import CifarBatches, load_cifar100
from pqk_fast.data.speech_commands import LABELS, SpeechBatches, SpeechCommands, load_speech_commands, load_word_folders
from pqk_fast.data.spoken_words import make_spoken_words

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass
class Splits:
    """Batches of the three splits. ``train(seed)`` starts a stream of its own; ``validation`` may be None."""

    train: Callable[[int], Batches]
    validation: Batches | None
    testing: Batches
    sizes: dict[str, int]
    classes: int


def speech_splits(data: SpeechCommands, batch_size: int, device: str | torch.device = "cpu") -> Splits:
    """Splits of a speech data set that is in memory already."""

    def batches(split: str, train: bool, seed: int) -> SpeechBatches:
        return SpeechBatches(
            getattr(data, split), data.noise, batch_size=batch_size, train=train, seed=seed, device=device
        )

    sizes = {split: len(getattr(data, split).labels) for split in ("train", "validation", "testing")}
    validation, testing = (batches(split, False, 0) for split in ("validation", "testing"))
    return Splits(lambda seed: batches("train", True, seed), validation, testing, sizes, len(LABELS))


def make_words(recipe: Recipe, progress: Callable[[int, int], None] | None = None) -> SpeechCommands:
    """The spoken words of a recipe: its seed and fractions; ``progress(speakers done, speakers in all)``."""
    data = recipe.data
    return make_spoken_words(
        unknown_fraction=data.unknown, silence_fraction=data.silence, seed=recipe.seed, progress=progress
    )


def load_splits(
    recipe: Recipe, root: str | Path | None, device: str | torch.device = "cpu", download: bool = False
) -> Splits:
    """The data set that a recipe names, from the folder ``root`` (spoken words are made on the spot if it is None).

    Raises ConfigError without a folder, FileNotFoundError or ValueError for one that does not hold the data set.
    """
    config = recipe.data
    if config.name == "spoken_words" and root is None:
        return speech_splits(make_words(recipe), config.batch_size, device)
    if root is None:
        raise ConfigError(f"the recipe trains on {config.name}: say where it is with --data DIR")
    if config.name == "cifar100":
        images = load_cifar100(root, validation_fraction=config.validation, download=download)
        sizes = {split: len(getattr(images, split).labels) for split in ("train", "validation", "testing")}

        def batches(split: str, train: bool, seed: int) -> CifarBatches:
            return CifarBatches(
                getattr(images, split), batch_size=config.batch_size, train=train, seed=seed, device=device
            )

        validation = batches("validation", False, 0) if sizes["validation"] else None
        testing = batches("testing", False, 0)
        return Splits(lambda seed: batches("train", True, seed), validation, testing, sizes, len(images.classes))
    speech = load_speech_commands(
        root, unknown_fraction=config.unknown, silence_fraction=config.silence, download=download
    )
    return speech_splits(speech, config.batch_size, device)


def word_folder_batches(config: DataConfig, root: str | Path | None, device: str | torch.device = "cpu") -> Batches:
    """Every clip under the word folders of ``root``, whatever the split; speech only."""
    if config.name == "cifar100":
        raise ConfigError("--split all is for speech: CIFAR-100 has validation and testing")
    if root is None:
        raise ConfigError("say where the word folders are with --data DIR")
    return SpeechBatches(load_word_folders(root), None, batch_size=config.batch_size, train=False, device=device)
