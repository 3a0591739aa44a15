"""Layers alone: what each branch computes and which weights its gradient reaches."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pqk_fast import PQKConfig, reference
from pqk_fast.dual_batch_norm import DualBatchNorm, DualBatchNorm2d
from pqk_fast.layers import PQKConv1d, PQKConv2d, PQKLinear

CONFIG = PQKConfig(bits=3, step_init="max")

FLOATS = [
    pytest.param(lambda: nn.Linear(5, 3), PQKLinear, (4, 5), id="linear"),
    pytest.param(lambda: nn.Linear(5, 3, bias=False), PQKLinear, (2, 4, 5), id="linear-3d-no-bias"),
    pytest.param(lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), PQKConv1d, (2, 4, 9), id="conv1d"),
    pytest.param(lambda: nn.Conv1d(4, 6, 3, padding="same", dilation=2), PQKConv1d, (2, 4, 9), id="conv1d-same"),
    pytest.param(
        lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), PQKConv1d, (2, 4, 9), id="conv1d-circular"
    ),
    pytest.param(lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), PQKConv2d, (2, 4, 7, 9), id="conv2d"),
    pytest.param(lambda: nn.Conv2d(4, 4, (3, 1), groups=4, dilation=2), PQKConv2d, (2, 4, 7, 9), id="depthwise"),
    pytest.param(
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), PQKConv2d, (2, 4, 7, 9), id="conv2d-reflect"
    ),
]


def pruned(layer, seed=1):
    """Mask about half of the layer's weights."""
    generator = torch.Generator().manual_seed(seed)
    layer.weight_mask.copy_(torch.rand(layer.weight.shape, generator=generator) < 0.5)
    return layer


def float_forward(module, weight, x):
    """What the float module gives with another weight."""
    twin = copy.deepcopy(module)
    twin.weight = nn.Parameter(weight.detach().clone())
    return twin(x)


@pytest.mark.parametrize(("make", "kind", "shape"), FLOATS)
def test_student_is_the_float_layer_with_quantized_kept_weights(make, kind, shape):
    torch.manual_seed(0)
    module, x = make(), torch.randn(shape)
    layer = pruned(kind.from_float(module, CONFIG))
    wbar = reference.fake_quant(layer.weight, layer.weight_mask, layer.weight_step, 3)
    assert layer.weight is module.weight
    torch.testing.assert_close(layer(x), float_forward(module, wbar, x), rtol=0, atol=0)


@pytest.mark.parametrize(("make", "kind", "shape"), FLOATS)
def test_teacher_is_the_latent_float_layer_exactly(make, kind, shape):
    torch.manual_seed(0)
    module, x = make(), torch.randn(shape)
    layer = pruned(kind.from_float(module, CONFIG))
    layer.phase, layer.branch = 2, "teacher"
    torch.testing.assert_close(layer(x), module(x), rtol=0, atol=0)


@pytest.mark.parametrize(("make", "kind", "shape"), FLOATS)
@pytest.mark.parametrize("teacher_weights", ["latent", "shared"])
def test_stacked_equals_two_passes_in_outputs_and_gradients(make, kind, shape, teacher_weights):
    torch.manual_seed(0)
    config = PQKConfig(bits=3, step_init="mean", ste="clipped", teacher_weights=teacher_weights)
    layer = pruned(kind.from_float(make(), config))
    layer.phase = 2
    x_student = torch.randn(shape, requires_grad=True)
    x_teacher = torch.randn(shape, requires_grad=True)
    inputs = [p for p in (layer.weight, layer.bias, x_student, x_teacher) if p is not None]

    student, outputs = layer(x_student), []
    layer.branch = "teacher"
    outputs.append(torch.cat([student, layer(x_teacher)]))
    layer.branch = "stacked"
    outputs.append(layer(torch.cat([x_student, x_teacher])))
    grad = torch.randn_like(outputs[0])
    two_pass, stacked = ([out, *torch.autograd.grad(out, inputs, grad)] for out in outputs)
    for ours, expected in zip(stacked, two_pass, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("make", "kind", "shape"), FLOATS)
def test_phase1_gradient_reaches_every_weight_unless_masked(make, kind, shape):
    for hard in (False, True):
        torch.manual_seed(0)
        layer = pruned(kind.from_float(make(), PQKConfig(bits=3, mask_gradients=hard)))
        x = torch.randn(shape)
        wbar = layer.student_weight().detach().requires_grad_()
        grad_wbar = torch.autograd.grad(float_forward_with(layer, wbar, x).square().sum(), wbar)[0]
        layer(x).square().sum().backward()
        expected = torch.where(layer.weight_mask, grad_wbar, 0.0) if hard else grad_wbar
        torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-5, atol=1e-6)
        assert layer.weight_step.grad is not None


def float_forward_with(layer, weight, x):
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, layer.bias)
    return layer._conv_forward(x, weight, layer.bias)


@pytest.mark.parametrize(("make", "kind", "shape"), FLOATS)
def test_phase2_student_and_teacher_gradients_are_complementary(make, kind, shape):
    torch.manual_seed(0)
    layer = pruned(kind.from_float(make(), CONFIG))
    layer.phase = 2
    layer.weight_step.requires_grad_(False)
    x = torch.randn(shape)
    for branch, reached in (("student", layer.weight_mask), ("teacher", ~layer.weight_mask)):
        layer.zero_grad()
        layer.branch = branch
        layer(x).square().sum().backward()
        assert torch.equal(layer.weight.grad != 0, reached)
        assert layer.weight_step.grad is None
        if layer.bias is not None:
            assert (layer.bias.grad is not None) == (branch == "student")


@pytest.mark.parametrize(("make", "kind", "shape"), FLOATS)
def test_to_float_bakes_one_branch_and_shares_nothing(make, kind, shape):
    torch.manual_seed(0)
    module, x = make(), torch.randn(shape)
    layer = pruned(kind.from_float(module, CONFIG))
    plain = layer.to_float()
    assert type(plain) is type(module)
    assert set(plain.state_dict()) == set(module.state_dict())
    torch.testing.assert_close(plain(x), layer(x), rtol=0, atol=0)
    torch.testing.assert_close(layer.to_float("teacher")(x), module(x), rtol=0, atol=0)
    before = layer(x)
    with torch.no_grad():
        plain.weight.zero_()
    torch.testing.assert_close(layer(x), before, rtol=0, atol=0)


def test_layers_can_be_built_like_their_float_forms():
    layer = PQKLinear(7, 3, bias=False, config=PQKConfig(bits=2, per_channel=True))
    assert layer.weight_step.shape == (3,)
    assert layer(torch.randn(2, 7)).shape == (2, 3)
    assert "bits=2, per channel" in repr(layer)


def test_from_float_refuses_other_modules_and_computed_weights():
    with pytest.raises(TypeError, match=r"takes a Linear, got Conv2d"):
        PQKLinear.from_float(nn.Conv2d(1, 1, 1), CONFIG)
    with pytest.raises(TypeError, match="takes BatchNorm1d, 2d, 3d or SyncBatchNorm, got LayerNorm"):
        DualBatchNorm.from_float(nn.LayerNorm(3))
    with pytest.raises(TypeError, match=r"must be fp32, bf16 or fp16, got torch.float64; use model.float"):
        PQKLinear.from_float(nn.Linear(3, 3).double(), CONFIG)
    with pytest.warns(FutureWarning, match="weight_norm"):
        weird = torch.nn.utils.weight_norm(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="remove_weight_norm"):
        PQKLinear.from_float(weird, CONFIG)


BATCH_NORMS = [
    pytest.param(lambda: nn.BatchNorm1d(4), (6, 4), id="1d"),
    pytest.param(lambda: nn.BatchNorm1d(4, momentum=None), (6, 4, 3), id="1d-cumulative"),
    pytest.param(lambda: nn.BatchNorm2d(4, affine=False), (6, 4, 3, 2), id="2d-not-affine"),
    pytest.param(lambda: nn.BatchNorm2d(4, track_running_stats=False), (6, 4, 3, 2), id="2d-untracked"),
    pytest.param(lambda: nn.BatchNorm3d(4), (6, 4, 3, 2, 2), id="3d"),
]


@pytest.mark.parametrize(("make", "shape"), BATCH_NORMS)
def test_each_branch_of_a_dual_batch_norm_is_a_batch_norm_of_its_own(make, shape):
    torch.manual_seed(0)
    student, teacher = make(), make()
    dual = DualBatchNorm.from_float(copy.deepcopy(student))
    assert isinstance(dual, type(student))
    dual.start_teacher("fresh")
    for _ in range(3):
        x_student, x_teacher = torch.randn(shape) + 1, 3 * torch.randn(shape)
        expected = torch.cat([student(x_student), teacher(x_teacher)])
        dual.branch = "stacked"
        torch.testing.assert_close(dual(torch.cat([x_student, x_teacher])), expected, rtol=0, atol=0)
        dual.branch = "student"
        torch.testing.assert_close(dual(x_student), student(x_student), rtol=0, atol=0)
        dual.branch = "teacher"
        torch.testing.assert_close(dual(x_teacher), teacher(x_teacher), rtol=0, atol=0)
    for module in (student, teacher, dual):
        module.eval()
    x = torch.randn(shape)
    torch.testing.assert_close(dual(x), teacher(x), rtol=0, atol=0)
    for name, branch, own in (("student", "student", student), ("teacher", "teacher", teacher)):
        plain = dual.to_float(branch)
        assert type(plain) is type(own), name
        torch.testing.assert_close(plain.state_dict(), own.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("how", ["fresh", "copy"])
def test_the_full_nets_batch_norm_starts_fresh_or_as_a_copy(how):
    module = nn.BatchNorm1d(3)
    with torch.no_grad():
        module.weight.fill_(2.0)
        module.running_mean.fill_(5.0)
    dual = DualBatchNorm.from_float(module)
    assert not dual.teacher_weight.requires_grad
    dual.start_teacher(how)
    dual.set_phase(2)
    assert dual.teacher_weight.requires_grad
    assert dual.teacher_weight.tolist() == ([2.0] * 3 if how == "copy" else [1.0] * 3)
    assert dual.teacher_running_mean.tolist() == ([5.0] * 3 if how == "copy" else [0.0] * 3)
    assert dual.running_mean.tolist() == [5.0] * 3


def test_a_frozen_batch_norm_is_copied_and_stays_frozen():
    module = nn.BatchNorm1d(3).requires_grad_(False)
    module.running_mean.fill_(5.0)
    dual = DualBatchNorm.from_float(module)
    dual.start_teacher("fresh")
    dual.set_phase(2)
    assert dual.teacher_running_mean.tolist() == [5.0] * 3
    assert not dual.teacher_weight.requires_grad


def test_dual_batch_norms_can_be_built_like_their_float_forms():
    dual = DualBatchNorm2d(4, affine=False)
    assert dual(torch.randn(2, 4, 3, 3)).shape == (2, 4, 3, 3)
    assert "teacher_running_mean" in dual.state_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_step_sizes_stay_fp32_whatever_the_model_is_cast_to(dtype):
    layer = PQKLinear(7, 3)
    step = layer.weight_step.detach().clone()
    layer.to(dtype)
    assert layer.weight.dtype == dtype
    assert layer.weight_step.dtype == torch.float32
    assert torch.equal(layer.weight_step, step), "not rounded on the way"
    layer(torch.randn(2, 7, dtype=dtype)).sum().backward()
    assert layer.weight_step.grad is not None


def test_a_hook_can_be_removed_by_the_handle_that_it_had_before():
    module, calls = nn.Linear(3, 3), []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    layer = PQKLinear.from_float(module, CONFIG)
    layer(torch.randn(1, 3))
    handle.remove()
    layer(torch.randn(1, 3))
    assert calls == [1]


def test_a_float_state_dict_loads_strictly_into_a_dual_batch_norm():
    source = nn.BatchNorm2d(3)
    source(torch.randn(4, 3, 2, 2))
    state = source.state_dict()
    dual = DualBatchNorm.from_float(nn.BatchNorm2d(3))
    dual.load_state_dict(state, strict=True)
    assert torch.equal(dual.running_mean, source.running_mean)
    assert torch.equal(dual.teacher_running_mean, source.running_mean)
    assert set(state) == set(source.state_dict()), "the caller's dict is left as it was"
    dual.load_state_dict(state, strict=True, assign=True)
    assert dual.running_mean is not dual.teacher_running_mean


def test_wrong_input_dimensions_are_refused_as_by_batch_norm():
    with pytest.raises(ValueError, match="expected 4D input"):
        DualBatchNorm.from_float(nn.BatchNorm2d(3))(torch.randn(4, 3))
