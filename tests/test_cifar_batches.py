"""Crop, mirror and normalisation of CIFAR-100's batches."""

import torch
from torch import Tensor

from pqk_fast.data.batches import pass_generator
from pqk_fast.data.cifar import CifarSplit
from pqk_fast.data.cifar_batches import MEAN, STD, CifarBatches, crop_and_mirror


def random_split(count: int) -> CifarSplit:
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return CifarSplit(images, torch.arange(count) % 5)


def normalise(images: Tensor) -> Tensor:
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


def test_evaluation_batches_are_in_order_and_complete() -> None:
    split = random_split(10)
    batches = CifarBatches(split, batch_size=4, train=False)
    assert len(batches) == 3
    for _ in range(2):
        got = list(batches)
        assert [len(labels) for _, labels in got] == [4, 4, 2]
        torch.testing.assert_close(torch.cat([images for images, _ in got]), normalise(split.images))
        assert torch.equal(torch.cat([labels for _, labels in got]), split.labels)
        assert got[0][0].dtype == torch.float32


def test_crop_and_mirror_against_one_image_at_a_time() -> None:
    images = random_split(81 * 2).images
    top, left = (torch.arange(9).repeat_interleave(9).repeat(2), torch.arange(9).repeat(18))
    mirror = torch.arange(81 * 2) >= 81
    got = crop_and_mirror(images, top, left, mirror)
    for i, image in enumerate(images):
        padded = torch.zeros(3, 40, 40, dtype=torch.uint8)
        padded[:, 4:36, 4:36] = image
        expected = padded[:, top[i] : top[i] + 32, left[i] : left[i] + 32]
        assert torch.equal(got[i], expected.flip(-1) if mirror[i] else expected)
    middle = torch.full((4,), 4)
    assert torch.equal(crop_and_mirror(images[:4], middle, middle, torch.zeros(4, dtype=torch.bool)), images[:4])


def test_training_passes_shuffle_and_drop_the_rest() -> None:
    count = 43
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32).contiguous()
    batches = CifarBatches(CifarSplit(images, torch.arange(count)), batch_size=8, train=True)
    assert len(batches) == 5
    orders = []
    for _ in range(2):
        got = list(batches)
        order = torch.cat([labels for _, labels in got])
        assert len(order) == len(order.unique()) == 40
        # the middle of a constant image survives any crop: images and labels stay together
        torch.testing.assert_close(torch.cat([x for x, _ in got])[:, :, 16, 16], normalise(images[order])[:, :, 0, 0])
        orders.append(order.tolist())
    assert orders[0] != orders[1] != list(range(40))


def test_every_crop_and_both_sides_occur_evenly() -> None:
    pixels = torch.arange(32 * 32).remainder(251).view(32, 32).to(torch.uint8)
    split = CifarSplit(pixels.expand(2000, 3, -1, -1).contiguous(), torch.zeros(2000, dtype=torch.int64))
    batches = CifarBatches(split, batch_size=2000, train=True)
    _, top, left, mirror = batches.draw(pass_generator(0, 0))
    for edge in (top, left):
        assert edge.bincount(minlength=9).min() > 150
        assert edge.bincount().shape == (9,)
    assert 900 < mirror.sum() < 1100
    assert torch.corrcoef(torch.stack([top, left, mirror]).double()).triu(1).abs().max() < 0.1
