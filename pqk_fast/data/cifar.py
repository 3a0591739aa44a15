"""CIFAR-100 (Krizhevsky, "Learning multiple layers of features from tiny images", 2009), held in memory as uint8, and
batches of it that are augmented as whole tensors.

Reading the files needs torchvision (official archive) or pillow (class folders of PNG); the batches need torch only.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["MEAN", "STD", "Cifar", "CifarBatches", "CifarSplit", "load_cifar100"]

MEAN = (0.5071, 0.4865, 0.4409)
"""Channel means of CIFAR-100's 50 000 training images, pixels in 0..1."""
STD = (0.2673, 0.2564, 0.2762)
"""Channel standard deviations of CIFAR-100's 50 000 training images, pixels in 0..1."""

SIZE = 32  # pixels, height and width
PADDING = 4  # black pixels on each side before the random crop


@dataclass(frozen=True, eq=False)
class CifarSplit:
    """Images uint8 `[N, 3, 32, 32]` and their labels int64 `[N]`.

    Raises:
        ValueError: another dtype or shape, or the lengths differ.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.images.shape)
        if self.images.dtype != torch.uint8 or len(shape) != 4 or shape[1:] != (3, SIZE, SIZE):
            raise ValueError(f"images must be uint8 [N, 3, 32, 32], got {self.images.dtype} {list(shape)}")
        if self.labels.dtype != torch.int64 or tuple(self.labels.shape) != shape[:1]:
            got = f"{self.labels.dtype} {list(self.labels.shape)}"
            raise ValueError(f"labels must be int64 [{shape[0]}], one an image, got {got}")

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Cifar:
    """The three parts of the data set, and the class names in the order of the labels."""

    train: CifarSplit
    validation: CifarSplit
    testing: CifarSplit
    classes: tuple[str, ...]


def load_cifar100(
    root: str | Path, *, validation_fraction: float = 0.1, seed: int = 0, download: bool = False
) -> Cifar:
    """Read CIFAR-100 from `root`, in one of two layouts:

    - `root/cifar-100-python/`: the official files, read with torchvision;
    - `root/train/<class>/*.png` and `root/test/<class>/*.png`: read with pillow. Any classes of 32x32 images will do.

    Args:
        root: folder that holds either layout; the official files are used if both are there.
        validation_fraction: part of each class's training images that is set aside for validation, in [0, 1). CIFAR
            has no validation set of its own: with 0 the validation split is empty, and all images train.
        seed: decides which images are set aside.
        download: fetch the official archive into `root` if neither layout is there.

    Raises:
        FileNotFoundError: neither layout is there.
        ImportError: torchvision or pillow is missing or does not load.
        RuntimeError: the official files are damaged or could not be fetched.
        ValueError: `validation_fraction` is out of range or leaves a class no training image; an image cannot be read
            or is not 32x32; train and test have different classes.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction must be in [0, 1), got {validation_fraction}")
    root = Path(root)
    has_folders = (root / "train").is_dir() and (root / "test").is_dir()
    if (root / "cifar-100-python").is_dir() or (download and not has_folders):
        train, testing, classes = _read_official(root, download)
    elif has_folders:
        train, classes = _read_folders(root / "train")
        testing, test_classes = _read_folders(root / "test")
        if test_classes != classes:
            odd = ", ".join(sorted(set(classes) ^ set(test_classes)))
            raise ValueError(f"{root}/train and {root}/test must have the same classes; only one has: {odd}")
    else:
        raise FileNotFoundError(
            f"no CIFAR-100 in {root}: expected the official files in {root}/cifar-100-python/ (--download, or "
            f"download=True, fetches them), or PNG images in {root}/train/<class>/ and {root}/test/<class>/"
        )
    train, validation = _set_aside(train, classes, validation_fraction, seed)
    return Cifar(train, validation, testing, classes)


def _set_aside(
    split: CifarSplit, classes: tuple[str, ...], fraction: float, seed: int
) -> tuple[CifarSplit, CifarSplit]:
    """Split off the same fraction of every class, at least one image each; both parts keep the original order."""
    chosen = torch.zeros(len(split), dtype=torch.bool)
    if fraction > 0:
        generator = torch.Generator().manual_seed(seed)
        for label, name in enumerate(classes):
            members = (split.labels == label).nonzero().flatten()
            count = max(1, round(fraction * len(members)))
            if count >= len(members):
                raise ValueError(
                    f"class {name!r} has {len(members)} training image(s): validation_fraction={fraction} would leave "
                    "none to train on; use 0 for no validation split"
                )
            chosen[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    kept = ~chosen
    return CifarSplit(split.images[kept], split.labels[kept]), CifarSplit(split.images[chosen], split.labels[chosen])


def _read_official(root: Path, download: bool) -> tuple[CifarSplit, CifarSplit, tuple[str, ...]]:
    try:
        from torchvision.datasets import CIFAR100
    except (ImportError, RuntimeError, OSError) as error:  # a build for another torch fails in its own ways
        raise ImportError(
            "reading the official CIFAR-100 files needs a torchvision that matches torch (torchvision 0.26.0 goes with "
            f"torch 2.11.0, yours is {torch.__version__}): pip install torchvision. Importing it failed with: {error}"
        ) from error
    try:
        parts = [CIFAR100(str(root), train=train, download=download) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        raise RuntimeError(
            f"cannot read CIFAR-100 in {root}/cifar-100-python ({error}); delete that folder and fetch the files anew "
            "with --download (download=True)"
        ) from error
    train, testing = (
        CifarSplit(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in parts
    )
    return train, testing, tuple(parts[0].classes)


def _read_folders(folder: Path) -> tuple[CifarSplit, tuple[str, ...]]:
    try:
        import numpy as np
        from PIL import Image
    except ImportError as error:
        raise ImportError(f"reading PNG images needs pillow and numpy: pip install pillow numpy ({error})") from error
    classes = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))
    images, labels = [], []
    for label, name in enumerate(classes):
        paths = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() == ".png")
        if not paths:
            raise ValueError(f"{folder / name} has no .png images")
        for path in paths:
            try:
                with Image.open(path) as image:
                    pixels = np.asarray(image.convert("RGB"))
            except OSError as error:  # pillow's UnidentifiedImageError is one
                raise ValueError(f"cannot read {path} as an image: {error}") from error
            if pixels.shape != (SIZE, SIZE, 3):
                raise ValueError(f"{path} must be 32x32 pixels, got {pixels.shape[1]}x{pixels.shape[0]}")
            images.append(pixels)
        labels += [label] * len(paths)
    if not classes:
        raise ValueError(f"{folder} has no class folders")
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return CifarSplit(stacked, torch.tensor(labels)), classes


class CifarBatches:
    """Iterates over a split in batches `(images, labels)`: images float32 `[B, 3, 32, 32]`, normalised by `MEAN` and
    `STD`, labels int64 `[B]`, both on `device`. `len()` is the number of batches in a pass.

    In training every pass has a new order, every image is padded by 4 black pixels and cropped at random, and half of
    the images are mirrored; the last partial batch is dropped. All of it depends on `seed` alone, not on the device or
    on other random numbers drawn. In evaluation the order is fixed, nothing is augmented, no image is left out.

    A pass can be continued exactly: load `state_dict()` taken after batch i into a new `CifarBatches` with the same
    arguments, and its first pass starts at batch i + 1 (and has no batches if i was the last one).

    Args:
        split: where the images come from. They are moved to `device` once, as uint8.
        batch_size: images a batch.
        train: training or evaluation.
        seed: of order and augmentation.
        device: where the batches are made.

    Raises:
        ValueError: `batch_size` is not positive, or the split has too few images for one training batch.
    """

    def __init__(
        self, split: CifarSplit, *, batch_size: int, train: bool, seed: int = 0, device: str | torch.device = "cpu"
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        if train and len(split) < batch_size:
            raise ValueError(
                f"training drops the last partial batch, so {len(split)} images make no batch of {batch_size}: use a "
                f"batch_size of at most {len(split)}"
            )
        self.batch_size = batch_size
        self.train = train
        self._images = split.images.to(device)
        self._labels = split.labels.to(device)
        # (pixel / 255 - mean) / std as one multiplication and one addition
        std = torch.tensor(STD, device=device).view(3, 1, 1)
        self._scale = 1 / (255 * std)
        self._shift = -torch.tensor(MEAN, device=device).view(3, 1, 1) / std
        self._generator = torch.Generator().manual_seed(seed)
        self._pass_start = self._generator.get_state()  # of the pass under way or, between passes, of the next one
        self._position = 0  # batches of that pass handed out
        self._continue = False

    def __len__(self) -> int:
        count = len(self._labels)
        return count // self.batch_size if self.train else -(-count // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if not self._continue:
            self._pass_start, self._position = self._generator.get_state(), 0
        self._continue = False
        draw = self._draw() if self.train else None
        for i in range(self._position, len(self)):
            rows = slice(i * self.batch_size, (i + 1) * self.batch_size)
            if draw is None:
                images, labels = self._images[rows], self._labels[rows]
            else:
                order, top, left, mirror = (values[rows] for values in draw)
                images, labels = crop_and_mirror(self._images[order], top, left, mirror), self._labels[order]
            self._position = i + 1
            yield images.float().mul_(self._scale).add_(self._shift), labels
        self._pass_start, self._position = self._generator.get_state(), 0

    def _draw(self) -> tuple[Tensor, ...]:
        """All random numbers of a pass, from the CPU's generator so that they are the same on every device: the order,
        top and left edge of each crop, and which images are mirrored."""
        count, generator = len(self._labels), self._generator
        order = torch.randperm(count, generator=generator)
        top, left = torch.randint(0, 2 * PADDING + 1, (2, count), generator=generator)
        mirror = torch.randint(0, 2, (count,), generator=generator).bool()
        return tuple(values.to(self._images.device) for values in (order, top, left, mirror))

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration stands: `generator` (uint8, the generator's state at the start of the pass), `position`
        (batches of the pass handed out), and `examples` and `batch_size`, against which a load is checked."""
        return {
            "generator": self._pass_start.clone(),
            "position": self._position,
            "examples": len(self._labels),
            "batch_size": self.batch_size,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`: the next pass begins with the batch after the last one handed out then.

        Raises:
            ValueError: `state` is not complete, or was made with other data or another batch size.
        """
        mine = self.state_dict()
        if missing := [key for key in mine if key not in state]:
            raise ValueError(f"not a state of CifarBatches: {', '.join(missing)} missing")
        for key in ("examples", "batch_size"):
            if state[key] != mine[key]:
                raise ValueError(
                    f"the saved state has {key} {state[key]}, this iteration {mine[key]}: resume with the same data "
                    "and batch size"
                )
        generator, position = state["generator"], state["position"]
        expected = mine["generator"]
        if not isinstance(generator, Tensor) or (generator.dtype, generator.shape) != (expected.dtype, expected.shape):
            raise ValueError(f"generator must be the state of a torch.Generator, uint8 {list(expected.shape)}")
        if not isinstance(position, int) or not 0 <= position <= len(self):
            raise ValueError(f"position must be a whole number in 0..{len(self)}, got {position!r}")
        self._generator.set_state(generator.cpu())
        self._pass_start, self._position, self._continue = generator.cpu().clone(), position, True


def crop_and_mirror(images: Tensor, top: Tensor, left: Tensor, mirror: Tensor) -> Tensor:
    """Pad each image by 4 zeros on every side, cut out 32x32 pixels at its own place, and mirror some left to right.

    Images `[B, C, 32, 32]` of any dtype; `top` and `left` int64 `[B]` in 0..8, 4 being the middle; `mirror` bool `[B]`.
    Returns `[B, C, 32, 32]`. One gather for the whole batch.
    """
    padded = F.pad(images, (PADDING,) * 4)
    width = padded.shape[-1]
    pixel = torch.arange(SIZE, device=images.device)
    rows = top[:, None] + pixel
    columns = left[:, None] + torch.where(mirror[:, None], pixel.flip(0), pixel)
    source = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)
    return padded.flatten(2).gather(2, source[:, None].expand(-1, images.shape[1], -1)).view(images.shape)
