"""CIFAR-100 (Krizhevsky, "Learning multiple layers of features from tiny images", 2009), read into memory as uint8.

The official archive is read with torchvision, class folders of PNG with pillow.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["SIZE", "Cifar", "CifarSplit", "load_cifar100"]

SIZE = 32  # pixels, height and width


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
