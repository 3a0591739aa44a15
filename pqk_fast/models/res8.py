"""res8 and res8-narrow for keyword spotting (Tang & Lin, "Deep residual learning for small-footprint keyword
spotting", ICASSP 2018), the networks of the paper's speech experiments."""

import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from pqk_fast.pooling import relu_avg_pool2d

torch.fx.wrap("relu_avg_pool2d")

__all__ = ["Res8", "res8", "res8_narrow"]


@torch.fx.wrap  # so that it can be traced
def _laid_out(features: Tensor) -> Tensor:
    """``[B, 1, frames, coefficients]``, checked."""
    if features.dim() == 4 and features.shape[1] == 1:
        features = features.squeeze(1)
    smallest = Res8.POOL
    if features.dim() != 3 or features.shape[1] < smallest[0] or features.shape[2] < smallest[1]:
        raise ValueError(
            "Res8 expects features [batch, frames, coefficients] such as [B, 101, 40], or [B, 1, 101, 40]; "
            f"got {list(features.shape)}"
        )
    if features.device.type != "cpu":
        return features.unsqueeze(1)
    # One channel has the same memory in either layout. With strides that say channels_last, all that follows runs in
    # that layout, which makes a training step on one CPU thread about a fifth faster.
    return features.unsqueeze(-1).permute(0, 3, 1, 2)


class Res8(nn.Module):
    """Seven 3x3 convolutions with three residual connections, global average pooling and a linear classifier.

    Convolution i >= 1 is followed by ReLU, the residual sum (even i) and BatchNorm without affine parameters, in this
    order: the residual that is carried on is the one before BatchNorm. There is no BatchNorm after conv0.

    Args:
        width: channels of every convolution, 45 in res8 and 19 in res8-narrow.
        num_classes: rows of the classifier.
    """

    LAYERS = 6  # convolutions after conv0
    POOL = (4, 3)  # 101 frames x 40 coefficients -> 25 x 13

    def __init__(self, width: int, num_classes: int = 12) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        for i in range(1, self.LAYERS + 1):
            self.add_module(f"conv{i}", nn.Conv2d(width, width, 3, padding=1, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(width, affine=False))
        self.output = nn.Linear(width, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Features float `[B, 101, 40]` or `[B, 1, 101, 40]` (frames x coefficients) -> logits `[B, num_classes]`.

        Other lengths work too, down to 4 frames and 3 coefficients.

        Raises:
            ValueError: the features have another shape.
        """
        x = _laid_out(features)
        x = relu_avg_pool2d(self.conv0(x), self.POOL)
        residual = x
        for i in range(1, self.LAYERS + 1):
            x = F.relu(getattr(self, f"conv{i}")(x))
            if i % 2 == 0:
                x = residual = x + residual
            x = getattr(self, f"bn{i}")(x)
        return self.output(x.mean((2, 3)))


def res8(num_classes: int = 12) -> Res8:
    """res8: 45 channels, 110 307 parameters with 12 classes."""
    return Res8(45, num_classes)


def res8_narrow(num_classes: int = 12) -> Res8:
    """res8-narrow: 19 channels, 19 905 parameters with 12 classes."""
    return Res8(19, num_classes)
