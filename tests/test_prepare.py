"""prepare, start_phase2, convert, param_groups: swapping modules without losing what users rely on."""

import copy
import pickle

import pytest
import torch
from torch import nn

from pqk_fast import (
    ConfigError,
    DualBatchNorm,
    PQKConfig,
    PQKConv1d,
    PQKLinear,
    Pruner,
    branch,
    convert,
    dual_forward,
    fuse,
    param_groups,
    prepare,
    start_phase2,
)
from pqk_fast.branches import config_of, pqk_layers
from pqk_fast.deploy.packed import load_packed, save_packed
from pqk_fast.deploy.reader import read_packed
from pqk_fast.reference import levels


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 10)
    )


def in_phase2(model, sparsity=0.5):
    pruner = Pruner(prepare(model, PQKConfig(sparsity=sparsity, mask_interval=1)), 1, 1)
    assert pruner.finished
    return start_phase2(model)


def test_prepare_swaps_in_place_and_keeps_parameters_and_names():
    model = net()
    before = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepared = prepare(model)
    assert prepared is model
    assert isinstance(model[0], PQKConv1d)
    assert isinstance(model[1], DualBatchNorm)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert set(after) - set(before) == {
        "0.weight_step", "5.weight_step", "1.teacher_weight", "1.teacher_bias"
    }  # fmt: skip
    latent = model[0].weight.detach().clone()
    model(torch.randn(4, 3, 8)).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, latent), "an optimizer made before still trains it"


@pytest.mark.parametrize("step_init", ["mean", "mse"])
def test_what_joins_a_model_is_on_its_device(step_init):
    model = prepare(net().to("meta"), PQKConfig(step_init=step_init, per_channel=True))
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert {name for name, tensor in tensors.items() if not tensor.is_meta} == set()


def test_hooks_and_training_flags_survive():
    model = net().eval()
    seen = []
    model[5].register_forward_hook(lambda *_: seen.append("linear"))
    prepare(model)
    assert not model[0].training
    model(torch.randn(2, 3, 8))
    assert seen == ["linear"]


def test_a_layer_can_be_the_model_itself():
    linear = nn.Linear(3, 2)
    model = prepare(linear)
    assert isinstance(model, PQKLinear)
    assert model.weight is linear.weight


def test_filter_and_exclude_leave_modules_alone():
    model = prepare(net(), filter_fn=lambda module, name: not isinstance(module, nn.Conv1d))
    assert list(pqk_layers(model)) == ["5"]
    nested = nn.ModuleDict({"body": net(), "head": nn.Linear(10, 2)})
    prepare(nested, PQKConfig(exclude=("body.5", "re:he.*")))
    assert list(pqk_layers(nested)) == ["body.0"]
    nested = prepare(nn.ModuleDict({"body": net(), "head": nn.Linear(10, 2)}), PQKConfig(exclude=("body",)))
    assert list(pqk_layers(nested)) == ["head"]


def test_shared_modules_stay_shared():
    shared = nn.Linear(4, 4)
    model = prepare(nn.ModuleDict({"a": shared, "b": shared, "c": nn.Sequential(shared)}))
    assert isinstance(model["a"], PQKLinear)
    assert model["a"] is model["b"] is model["c"][0]
    assert len(pqk_layers(model)) == 1


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match=r"nothing to prepare in Sequential: expected at least one nn\.Linear.*ReLU"):
        prepare(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="nothing to prepare"):
        prepare(net(), filter_fn=lambda module, name: False)
    with pytest.raises(ValueError, match="prepared already"):
        prepare(prepare(net()))
    with pytest.raises(ConfigError, match=r"exclude: 'hed' matches none of the layers.*did you mean 'head'"):
        prepare(nn.ModuleDict({"head": nn.Linear(3, 3)}), PQKConfig(exclude=("hed",)))
    with pytest.raises(ConfigError, match=r"layer_sparsity: '1' matches none of the layers"):
        prepare(net(), PQKConfig(layer_sparsity={"1": 0.5}))
    with pytest.raises(ConfigError, match=r"layer_bits: '1' matches none of the layers"):
        prepare(net(), PQKConfig(layer_bits={"1": 8}))
    with pytest.raises(ConfigError, match=r"layer_bits names layer '0' by several patterns with \[8, 2\]"):
        prepare(net(), PQKConfig(layer_bits={"0": 8, "re:.*": 2}))
    with pytest.raises(TypeError, match=r"config must be a PQKConfig, got dict"):
        prepare(net(), {"bits": 4})
    late = nn.SyncBatchNorm.convert_sync_batchnorm(prepare(net(), PQKConfig(sparsity=0.5, initial_sparsity=0.5)))
    Pruner(late, 1, 1)
    with pytest.raises(ValueError, match=r"is a SyncBatchNorm.*convert_sync_batchnorm\(model\) before prepare"):
        start_phase2(late)
    with pytest.raises(ValueError, match="no PQK layers: call"):
        start_phase2(net())
    with pytest.raises(ValueError, match="no weight is pruned"):
        start_phase2(prepare(net()))
    with pytest.raises(ValueError, match="in phase 2 already"):
        start_phase2(in_phase2(net()))
    with pytest.raises(ConfigError, match="branch must be one of student, teacher; got 'both'"):
        convert(prepare(net()), "both")
    for refused in (lambda m: convert(m, "teacher"), lambda m: branch(m, "teacher"), lambda m: dual_forward(m, None)):
        with pytest.raises(ValueError, match="in phase 1, where only the student runs: call start_phase2"):
            refused(prepare(net()))
    with pytest.raises(ValueError, match="lr must be positive, got 0"):
        param_groups(prepare(net()), 0)


def test_a_model_that_is_refused_is_left_as_it_was():
    model = net()
    before = list(model.modules())
    with pytest.raises(ConfigError):
        prepare(model, PQKConfig(layer_sparsity={"nowhere": 0.5}))
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))


def test_a_weight_shared_with_a_module_that_is_not_prepared_is_refused():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    with pytest.raises(ValueError, match=r"head.weight is also a parameter of embed \(Embedding\).*exclude"):
        prepare(model)
    assert type(model["head"]) is nn.Linear
    prepare(model, PQKConfig(exclude=("head",)))
    assert list(pqk_layers(model)) == ["body"]


def test_shared_modules_are_known_by_each_of_their_names():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(4, 4)})
    assert list(pqk_layers(prepare(copy.deepcopy(model), PQKConfig(exclude=("b",))))) == ["c"]
    layers = pqk_layers(prepare(copy.deepcopy(model), PQKConfig(bits=8, layer_bits={"b": 2})))
    assert {name: layer.bits for name, layer in layers.items()} == {"a": 2, "c": 8}
    config = PQKConfig(sparsity=0.5, initial_sparsity=0.5, layer_sparsity={"b": 0.25})
    pruned = prepare(copy.deepcopy(model), config)
    Pruner(pruned, 1, 1)
    assert {name: int((~layer.weight_mask).sum()) for name, layer in pqk_layers(pruned).items()} == {"a": 4, "c": 8}
    with pytest.raises(ConfigError, match=r"layer_bits names layer 'a' = 'b' by several patterns with \[4, 2\]"):
        prepare(model, PQKConfig(layer_bits={"a": 4, "b": 2}))


def test_layers_of_one_weight_have_its_bits():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    assert [layer.bits for layer in pqk_layers(prepare(model, PQKConfig(layer_bits={"b": 2}))).values()] == [2, 2]


def test_norms_that_will_share_statistics_are_named():
    class MyNorm(nn.BatchNorm1d):
        pass

    with pytest.warns(UserWarning, match=r"1 \(MyNorm: both branches will share its statistics\)"):
        prepare(nn.Sequential(nn.Linear(3, 3), MyNorm(3)))


def test_a_state_dict_of_phase2_goes_on_in_phase2():
    model = in_phase2(net())
    for name in ("student", "teacher"):
        branch(model, name)(torch.randn(16, 3, 8) + 2)
    other = prepare(net(1))
    other.load_state_dict(model.state_dict())
    assert all(layer.phase == 2 and not layer.weight_step.requires_grad for layer in pqk_layers(other).values())
    assert other[1].teacher_weight.requires_grad
    x = torch.randn(4, 3, 8)
    for name in ("student", "teacher"):
        torch.testing.assert_close(branch(other.eval(), name)(x), branch(model.eval(), name)(x), rtol=0, atol=0)


def test_start_phase2_drops_the_steps_old_gradients():
    model = prepare(net(), PQKConfig(sparsity=0.5, mask_interval=1))
    model(torch.randn(4, 3, 8)).sum().backward()
    assert model[0].weight_step.grad is not None
    Pruner(model, 1, 1)
    start_phase2(model)
    assert model[0].weight_step.grad is None


def test_frozen_parameters_stay_frozen_in_the_plain_model():
    model = net()
    model[0].weight.requires_grad_(False)
    plain = convert(in_phase2(model))
    assert not plain[0].weight.requires_grad
    assert plain[0].bias.requires_grad


def test_functional_transforms_work():
    model = in_phase2(net())
    parameters = dict(model.named_parameters())

    def loss(values, x):
        return torch.func.functional_call(model, values, (x,)).square().sum()

    x = torch.randn(4, 3, 8)
    model.eval()
    grads = torch.func.grad(loss)(parameters, x)
    loss(parameters, x).backward()
    torch.testing.assert_close(grads["0.weight"], model[0].weight.grad)


def test_subclasses_with_code_of_their_own_are_left_and_named():
    with pytest.warns(UserWarning, match=r"left in floating point.*out_proj \(NonDynamicallyQuantizableLinear\)"):
        model = prepare(nn.TransformerEncoderLayer(8, 2, 16))
    assert set(pqk_layers(model)) == {"linear1", "linear2"}


@pytest.mark.filterwarnings("ignore:left in floating point")
def test_the_transformer_fast_path_does_not_bypass_the_student():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(copy.deepcopy(layer), 2).eval()
    x = torch.randn(3, 5, 8)
    dense = model(x)
    in_phase2(model, sparsity=0.9)
    with torch.no_grad():
        student = model(x)  # without gradients evaluation takes the fast path, where there is one
        teacher = branch(model, "teacher")(x)
    assert not torch.allclose(student, dense, atol=1e-3)
    torch.testing.assert_close(teacher, dense, rtol=1e-5, atol=1e-6)
    plain = convert(model)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), student, rtol=1e-5, atol=1e-6)
    assert plain.layers[0].activation_relu_or_gelu == layer.activation_relu_or_gelu, "the fast path is back"


def test_start_phase2_freezes_steps_and_starts_the_full_nets_batch_norm():
    model = net()
    model(torch.randn(16, 3, 8) + 3)
    in_phase2(model)
    assert all(layer.phase == 2 and not layer.weight_step.requires_grad for layer in pqk_layers(model).values())
    assert model[1].teacher_running_mean.abs().max() == 0
    assert model[1].running_mean.abs().max() > 0
    copied = net()
    copied(torch.randn(16, 3, 8) + 3)
    prepare(copied, PQKConfig(sparsity=0.5, teacher_bn="copy", mask_interval=1))
    Pruner(copied, 1, 1)
    start_phase2(copied)
    assert torch.equal(copied[1].teacher_running_mean, copied[1].running_mean)


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_convert_gives_a_plain_model_with_the_same_outputs(which):
    float_net = net()
    model = in_phase2(copy.deepcopy(float_net))
    for name in ("student", "teacher"):
        branch(model, name)(torch.randn(16, 3, 8) + 2)
    model.eval()
    x = torch.randn(4, 3, 8)
    expected = branch(model, which)(x)
    plain = convert(model, which)
    assert [type(m) for m in plain.modules()] == [type(m) for m in float_net.modules()]
    assert set(plain.state_dict()) == set(float_net.state_dict())
    float_net.load_state_dict(plain.state_dict(), strict=True)
    torch.testing.assert_close(plain(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(float_net.eval()(x), expected, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    torch.testing.assert_close(branch(model, which)(x), expected, rtol=0, atol=0)


def test_prepared_models_can_be_copied_averaged_and_pickled(tmp_path):
    model = in_phase2(net())
    x = torch.randn(4, 3, 8)
    torch.nn.functional.mse_loss(model(x), torch.zeros(4, 10)).backward()
    twin = copy.deepcopy(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (twin, loaded):
        torch.testing.assert_close(other.eval()(x), model.eval()(x), rtol=0, atol=0)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    torch.testing.assert_close(averaged.eval()(x), model.eval()(x), rtol=0, atol=0)


def test_state_dict_round_trip_is_strict():
    model = in_phase2(net(0))
    other = prepare(net(1))
    other.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(4, 3, 8)
    torch.testing.assert_close(other.eval()(x), model.eval()(x), rtol=0, atol=0)


def test_param_groups():
    model = prepare(net())
    weights, steps = param_groups(model, lr=0.2, weight_decay=1e-3)
    assert [group["lr"] for group in (weights, steps)] == pytest.approx([0.2, 2e-5])
    assert [group["weight_decay"] for group in (weights, steps)] == [1e-3, 0.0]
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in steps["params"]} == {"0.weight_step", "5.weight_step"}
    assert {names[id(p)] for p in weights["params"]} == {
        "0.weight", "0.bias", "1.weight", "1.bias", "5.weight", "5.bias"
    }  # fmt: skip
    assert param_groups(model, lr=0.2, step_lr=0.1)[1]["lr"] == pytest.approx(0.1)
    Pruner(model, 1, 1)
    start_phase2(model)
    (only,) = param_groups(model, lr=0.2)
    assert {names[id(p)] for p in only["params"]} == {
        "0.weight", "0.bias", "1.weight", "1.bias", "1.teacher_weight", "1.teacher_bias", "5.weight", "5.bias"
    }  # fmt: skip
    with pytest.raises(ValueError, match="no PQK layers"):
        param_groups(net(), 0.1)


@pytest.mark.parametrize("made", [False, True], ids=["as prepared", "fused"])
def test_layers_have_bits_of_their_own(made, tmp_path):
    """Mixed precision: steps, weights, copies, both phases and the packed file follow each layer's bits."""
    config = PQKConfig(bits=3, sparsity=0.5, step_init="max", layer_bits={"0": 8, "re:5": 2}, mask_interval=1)
    model = prepare(net(), config)
    bits = {name: layer.bits for name, layer in pqk_layers(model).items()}
    assert bits == {"0": 8, "5": 2}
    assert config_of(model) == config
    for layer in pqk_layers(model).values():
        assert layer.weight_step.item() == pytest.approx(float(layer.weight.abs().max()) / levels(layer.bits))
    Pruner(model, 1, 1)
    if made:
        fuse(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), start_phase2(model)):
        for name, layer in pqk_layers(other).items():
            assert layer.bits == bits[name]
            values = layer.student_weight() / layer.weight_step
            assert values.abs().max().round() == levels(layer.bits)
    save_packed(model.eval(), tmp_path / "s.pqk")
    assert {name: layer.bits for name, layer in read_packed(tmp_path / "s.pqk").layers.items()} == bits
    plain = convert(model)
    assert not any(hasattr(module, "bits") for module in plain.modules())
    x = torch.randn(4, 3, 8)
    assert torch.equal(load_packed(tmp_path / "s.pqk", net())(x), model(x))


def test_a_weight_that_is_parametrized_is_refused():
    from torch.nn.utils.parametrizations import weight_norm

    model = nn.ModuleDict({"body": weight_norm(nn.Linear(4, 4)), "head": nn.Linear(4, 4)})
    with pytest.raises(TypeError, match=r"body\.weight is computed from other parameters .*remove_parametrizations"):
        prepare(model)
    assert list(pqk_layers(prepare(model, PQKConfig(exclude=("body",))))) == ["head"]


def test_parts_of_different_configs_go_into_phase_2():
    parts = {bits: prepare(nn.Sequential(nn.Linear(8, 8)), PQKConfig(bits=bits, sparsity=0.5)) for bits in (4, 8)}
    model = nn.Sequential(*parts.values())
    Pruner(model, 1, 1, config=PQKConfig(sparsity=0.5))
    start_phase2(model)
    assert {layer.phase for layer in pqk_layers(model).values()} == {2}
    parts = [prepare(nn.Linear(8, 8), PQKConfig(sparsity=0.5, teacher_bn=how)) for how in ("fresh", "copy")]
    model = nn.Sequential(*parts)
    Pruner(model, 1, 1, config=PQKConfig(sparsity=0.5))
    with pytest.raises(ValueError, match="different teacher_bn, copy and fresh: call start_phase2 on each part"):
        start_phase2(model)
