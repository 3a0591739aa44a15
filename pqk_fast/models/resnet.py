"""Residual networks for 32x32 images (He et al., "Deep residual learning for image recognition", CVPR 2016,
section 4.2): 6n + 2 layers of 16, 32 and 64 channels, with projection shortcuts (the paper's option B)."""

import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CifarResNet", "resnet20", "resnet32", "resnet56"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut: identity, or 1x1 convolution with BatchNorm where the
    shape changes. `[B, in_channels, H, W]` -> `[B, channels, H / stride, W / stride]`."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


@torch.fx.wrap  # so that it can be traced
def _checked(images: Tensor) -> Tensor:
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"CifarResNet expects images [batch, 3, 32, 32], got {list(images.shape)}")
    return images


class CifarResNet(nn.Module):
    """6n + 2 layers: a 3x3 convolution, three stages of n blocks, global average pooling, a linear classifier.

    Convolutions start from He's normal distribution (fan-out), BatchNorm from scale 1 and shift 0.

    Args:
        depth: number of layers, 6n + 2 with n >= 1: 20, 32, 56.
        num_classes: rows of the classifier.

    Raises:
        ValueError: `depth` is not 6n + 2.
    """

    def __init__(self, depth: int, num_classes: int = 100) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"the depth of a CIFAR ResNet is 6n + 2 with n >= 1 (20, 32, 56), got {depth}")
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, stride=1)
        self.layer2 = self._stage(16, 32, blocks, stride=2)
        self.layer3 = self._stage(32, 64, blocks, stride=2)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, channels, stride)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images float `[B, 3, 32, 32]` -> logits `[B, num_classes]`.

        Raises:
            ValueError: the images have another number of dimensions or channels.
        """
        x = F.relu(self.bn1(self.conv1(_checked(images))))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def resnet20(num_classes: int = 100) -> CifarResNet:
    """ResNet-20: 278 324 parameters with 100 classes."""
    return CifarResNet(20, num_classes)


def resnet32(num_classes: int = 100) -> CifarResNet:
    """ResNet-32: 472 756 parameters with 100 classes."""
    return CifarResNet(32, num_classes)


def resnet56(num_classes: int = 100) -> CifarResNet:
    """ResNet-56: 861 620 parameters with 100 classes."""
    return CifarResNet(56, num_classes)
