"""Batches of CIFAR-100, augmented as whole tensors on the device that holds the images."""

import torch
from torch import Tensor
from torch.nn import functional as F

from pqk_fast.data.batches import Batch, DeviceBatches
from pqk_fast.data.cifar import SIZE, CifarSplit

__all__ = ["MEAN", "STD", "CifarBatches", "crop_and_mirror"]

MEAN = (0.5071, 0.4865, 0.4409)
"""Channel means of CIFAR-100's 50 000 training images, pixels in 0..1."""
STD = (0.2673, 0.2564, 0.2762)
"""Channel standard deviations of CIFAR-100's 50 000 training images, pixels in 0..1."""

PADDING = 4  # black pixels on each side before the random crop


class CifarBatches(DeviceBatches):
    """Batches `(images, labels)`: images float32 `[B, 3, 32, 32]`, normalised by `MEAN` and `STD`, labels int64 `[B]`,
    both on `device`. Order, resume and ranks: see `DeviceBatches`.

    In training every image is padded by 4 black pixels and cropped at random, and half of the images are mirrored. In
    evaluation nothing is augmented.

    Args:
        split: where the images come from. They are moved to `device` once, as uint8.
        batch_size, train, seed, device, rank, world: see `DeviceBatches`, also for the errors raised.
    """

    def __init__(
        self,
        split: CifarSplit,
        *,
        batch_size: int,
        train: bool,
        seed: int = 0,
        device: str | torch.device = "cpu",
        rank: int = 0,
        world: int = 1,
    ) -> None:
        super().__init__(
            len(split), batch_size=batch_size, train=train, seed=seed, device=device, rank=rank, world=world
        )
        self._images = split.images.to(self.device)
        self._labels = split.labels.to(self.device)
        # (pixel / 255 - mean) / std as one multiplication and one addition
        std = torch.tensor(STD, device=self.device).view(3, 1, 1)
        self._scale = 1 / (255 * std)
        self._shift = -torch.tensor(MEAN, device=self.device).view(3, 1, 1) / std

    def draw(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Which image; in training also the top and left edge of its crop, and whether it is mirrored."""
        if not self.train:
            return (torch.arange(self.examples),)
        order = torch.randperm(self.examples, generator=generator)
        top, left = torch.randint(0, 2 * PADDING + 1, (2, self.examples), generator=generator)
        mirror = torch.randint(0, 2, (self.examples,), generator=generator).bool()
        return order, top, left, mirror

    def make(self, index: Tensor, *augmentation: Tensor) -> Batch:
        """Images gathered, cropped and mirrored as uint8, then normalised."""
        images = self._images[index]
        if augmentation:
            images = crop_and_mirror(images, *augmentation)
        return images.float().mul_(self._scale).add_(self._shift), self._labels[index]


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
