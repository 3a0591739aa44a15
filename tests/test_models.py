"""The networks: sizes, key names, the order of res8's residual and BatchNorm, and what they refuse."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pqk_fast.models import MODELS, CifarResNet, create_model, res8, res8_narrow, resnet32

PARAMETERS = {
    ("res8", 12): 110_307,
    ("res8_narrow", 12): 19_905,
    ("resnet20", 100): 278_324,
    ("resnet32", 100): 472_756,
    ("resnet56", 100): 861_620,
}


@pytest.mark.parametrize(("name", "num_classes"), PARAMETERS)
def test_parameter_counts(name: str, num_classes: int) -> None:
    model = create_model(name, num_classes)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name, num_classes]


def test_every_model_is_listed_and_made_of_modules_that_can_be_prepared() -> None:
    assert set(MODELS) == {name for name, _ in PARAMETERS}
    for name in MODELS:
        owners = [m for m in create_model(name, 7).modules() if list(m.parameters(recurse=False))]
        assert {type(m) for m in owners} <= {nn.Conv2d, nn.Linear, nn.BatchNorm2d}


def test_res8_key_names() -> None:
    convolutions = {f"conv{i}.weight" for i in range(7)}
    statistics = {f"bn{i}.{key}" for i in range(1, 7) for key in ("running_mean", "running_var", "num_batches_tracked")}
    assert set(res8_narrow().state_dict()) == convolutions | statistics | {"output.weight", "output.bias"}


def plain_res8(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The definition, written out for a batch's own statistics and standard memory layout."""
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    x = F.avg_pool2d(F.conv2d(x[:, None], weights["conv0.weight"], padding=1).relu(), (4, 3))
    assert x.shape[2:] == (25, 13)
    old = x
    for i in range(1, 7):
        y = F.conv2d(x, weights[f"conv{i}.weight"], padding=1).relu()
        if i % 2 == 0:
            y = y + old
            old = y
        variance, mean = torch.var_mean(y, (0, 2, 3), correction=0, keepdim=True)
        x = (y - mean) / (variance + 1e-5).sqrt()
    return x.mean((2, 3)) @ weights["output.weight"].T + weights["output.bias"]


@pytest.mark.parametrize("make", [res8, res8_narrow])
def test_res8_computes_its_definition(make) -> None:
    torch.manual_seed(0)
    model, x = make(), torch.randn(4, 101, 40)
    torch.testing.assert_close(model(x), plain_res8(model, x), rtol=1e-4, atol=1e-5)


def test_res8_takes_features_with_and_without_channel() -> None:
    torch.manual_seed(0)
    model, x = res8_narrow().eval(), torch.randn(3, 101, 40)
    expected = model(x)
    assert expected.shape == (3, 12)
    for same in (x[:, None], x.transpose(1, 2).contiguous().transpose(1, 2), torch.cat([x, x], 2)[:, :, :40]):
        torch.testing.assert_close(model(same), expected)


@pytest.mark.parametrize("shape", [(2, 3, 101, 40), (101, 40), (2, 3, 40), (2, 101, 2), (2, 1, 1, 101, 40)])
def test_res8_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[B, 101, 40\].*got \[" + ", ".join(map(str, shape))):
        res8_narrow()(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (3, 32, 32)])
def test_resnet_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expects images \[batch, 3, 32, 32\], got \[" + str(shape[0])):
        create_model("resnet20", 10)(torch.zeros(shape))


def test_resnet_halves_the_image_twice_and_starts_from_he_initialisation() -> None:
    torch.manual_seed(0)
    model = resnet32(100)
    x = model.layer3(model.layer2(model.layer1(torch.zeros(2, 16, 32, 32))))
    assert x.shape == (2, 64, 8, 8)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 100)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 4000:
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)


@pytest.mark.parametrize("depth", [2, 0, 33, -4])
def test_resnet_refuses_other_depths(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"6n \+ 2.*got {depth}"):
        CifarResNet(depth)


@pytest.mark.parametrize("name", ["res8_narrow", "resnet20"])
def test_every_parameter_gets_a_finite_gradient(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name, 5)
    x = torch.randn(4, 101, 40) if name.startswith("res8") else torch.randn(4, 3, 32, 32)
    F.cross_entropy(model(x), torch.tensor([0, 1, 2, 4])).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


@pytest.mark.parametrize("name", ["res8_narrow", "resnet20"])
def test_forward_is_one_graph(name: str) -> None:
    model = create_model(name, 5).eval()
    x = torch.randn(2, 101, 40) if name.startswith("res8") else torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


def test_same_seed_same_weights() -> None:
    def make() -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        return create_model("res8-narrow", 12).state_dict()

    first, second = make(), make()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_unknown_name_and_bad_class_count() -> None:
    with pytest.raises(ValueError, match="unknown model 'resnet23': did you mean resnet"):
        create_model("resnet23", 10)
    with pytest.raises(ValueError, match="unknown model 'lstm': known models: res8, res8_narrow, resnet20"):
        create_model("lstm", 10)
    for bad in (0, -1, 2.0, True, "12"):
        with pytest.raises(ValueError, match="num_classes must be a positive integer"):
            create_model("res8", bad)  # type: ignore[arg-type]


def test_models_need_torch_only() -> None:
    others = {"torchvision", "torchaudio", "PIL", "matplotlib"}
    code = f"import sys, pqk_fast.models; sys.exit(bool({others} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
