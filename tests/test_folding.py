"""BatchNorm folded into convolutions: the same outputs, and kept where that cannot be."""

import pytest
import torch
import torch.nn.functional as F
from test_executor import trained
from test_packed import student
from torch import Tensor, nn

import pqk_fast as pqk
from pqk_fast.folding import fold_batch_norm
from pqk_fast.models import create_model


def norms(model: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) for m in model.modules())


def assert_folded(model: nn.Module, shape: tuple[int, ...], names: list[str]) -> None:
    trained(model, 1.0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) and module.affine:
            module.weight.data.normal_()  # some of them negative
            module.bias.data.normal_()
    x = torch.randn(2, *shape)
    before, count = model(x), norms(model)
    assert fold_batch_norm(model) == names
    assert norms(model) == count - len(names)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert fold_batch_norm(model) == []


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_a_norm_after_a_convolution_is_folded(dims: int, bias: bool, affine: bool) -> None:
    torch.manual_seed(0)
    conv, norm = getattr(nn, f"Conv{dims}d"), getattr(nn, f"BatchNorm{dims}d")
    model = nn.Sequential(conv(2, 4, 3, padding=1, groups=2, bias=bias), norm(4, affine=affine), nn.ReLU())
    assert_folded(model, (2, *(5,) * dims), ["1"])
    assert isinstance(model[1], nn.Identity)


class Kept(nn.Module):
    """Norms that cannot be folded, and one that can."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(2, 2, 1) for _ in range(6))
        self.norms = nn.ModuleList(nn.BatchNorm2d(2) for _ in range(6))
        self.norms[4] = nn.BatchNorm2d(2, track_running_stats=False)
        self.convs[5].weight = self.convs[3].weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](F.relu(self.convs[0](x)))
        y = self.convs[1](x)
        x = self.norms[1](y) + y  # read twice
        x = self.convs[2](self.norms[2](self.convs[2](x)))  # its layer is used twice
        x = self.norms[3](self.convs[3](x)) + self.convs[5](x)  # its weight is another's too
        x = self.norms[4](self.convs[4](x))  # normalizes by the batch
        return self.norms[5](nn.functional.conv2d(x, self.convs[0].weight))


def test_others_are_kept() -> None:
    torch.manual_seed(0)
    model = trained(Kept())
    assert fold_batch_norm(model) == []
    assert norms(model) == 6


def test_what_cannot_be_traced_is_left_with_a_warning() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)) if x.sum() > 0 else x

    with pytest.warns(UserWarning, match="torch.fx cannot trace this model"):
        assert fold_batch_norm(Branch().eval()) == []


@pytest.mark.parametrize(("name", "shape", "left"), [("resnet20", (3, 32, 32), 0), ("res8_narrow", (101, 40), 6)])
@pytest.mark.parametrize("per_channel", [False, True])
def test_converted_students(name: str, shape: tuple[int, ...], left: int, per_channel: bool) -> None:
    torch.manual_seed(0)
    model = student(create_model(name, 12), per_channel=per_channel)
    plain, folded = pqk.convert(model), pqk.convert(model, fold=True)
    x = torch.randn(2, *shape)
    assert norms(folded) == left
    assert torch.equal(plain(x), model(x)), "without fold, bit for bit"
    torch.testing.assert_close(folded(x), plain(x), rtol=1e-4, atol=1e-5)
