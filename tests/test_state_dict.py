"""State dicts of prepared models: float ones, those of other devices and older layouts, and what is refused."""

import copy
import io
import warnings
from collections import OrderedDict

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pqk_fast import PQKConfig, PQKLinear, Pruner, param_groups, prepare, start_phase2
from pqk_fast.dual_batch_norm import DualBatchNorm
from pqk_fast.two_phase import TwoPhase

CONFIG = PQKConfig(bits=3, sparsity=0.5)


def net(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))
    model(torch.randn(8, 2, 4, 4))
    return model


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight


def in_phase2(model):
    Pruner(model, 1, 1)
    start_phase2(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, DualBatchNorm) and module.track_running_stats:
                module.teacher_running_mean.fill_(0.25)
    return model


def phases(model):
    return {module.phase for module in model.modules() if isinstance(module, TwoPhase)}


def assert_same(model, state):
    own = model.state_dict()
    assert list(own) == list(state)
    for name, tensor in state.items():
        assert own[name].dtype == tensor.dtype, name
        assert torch.equal(own[name].cpu(), tensor.cpu()), name


def reread(state):
    """As a file holds it: metadata survives torch.save, and so does shared storage."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


FLOAT_CONFIGS = [
    CONFIG,
    PQKConfig(bits=4, step_init="lsq", per_channel=True),
    PQKConfig(bits=2, step_init="max"),
    PQKConfig(bits=8, step_init="mse", per_channel=True),
]


@pytest.mark.parametrize("plain", [False, True], ids=["metadata", "plain-dict"])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("config", FLOAT_CONFIGS, ids=lambda c: f"{c.step_init}-{c.per_channel}")
def test_a_float_checkpoint_makes_the_model_that_prepare_makes_of_it(config, assign, plain):
    state = reread(net(1).state_dict())
    before = {name: tensor.clone() for name, tensor in state.items()}
    model = in_phase2(prepare(net(0), config))
    model.load_state_dict(dict(state) if plain else state, strict=True, assign=assign)
    assert_same(model, prepare(net(1), config).state_dict())
    assert phases(model) == {1}
    assert model[0].weight_step.requires_grad
    assert not model[1].teacher_weight.requires_grad
    assert model[1].running_mean.data_ptr() != model[1].teacher_running_mean.data_ptr()
    assert (model[0].weight.data_ptr() == state["0.weight"].data_ptr()) is assign
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], before[name]) for name in state)
    assert [len(group["params"]) for group in param_groups(model, 0.1)] == [6, 2], "it learns on"


def test_a_float_checkpoint_loads_into_a_model_of_lower_precision_as_if_before_prepare():
    state = net(1).state_dict()
    model, expected = prepare(net(0).bfloat16(), CONFIG), net(0).bfloat16()
    expected.load_state_dict(state)
    model.load_state_dict(state)
    assert_same(model, prepare(expected, CONFIG).state_dict())


@pytest.mark.parametrize("kind", ["float", "prepared"])
def test_meta_models_take_over_whole_checkpoints_by_assign(kind):
    with torch.device("meta"):
        model = prepare(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5)), CONFIG)
    source = net(1) if kind == "float" else in_phase2(prepare(net(1), CONFIG))
    model.load_state_dict(source.state_dict(), assign=True)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    assert_same(model, (prepare(source, CONFIG) if kind == "float" else source).state_dict())
    assert phases(model) == {1 if kind == "float" else 2}
    assert model(torch.randn(3, 2, 4, 4)).isfinite().all()


@pytest.mark.parametrize("kind", ["float", "prepared"])
def test_shared_weights_stay_shared(kind):
    model, source = prepare(Tied(), CONFIG), Tied()
    Pruner(model, 1, 1)
    source = source if kind == "float" else prepare(source, CONFIG)
    if kind == "prepared":
        Pruner(source, 1, 1)
    model.load_state_dict(reread(source.state_dict()))
    assert model.a.weight is model.b.weight
    assert model.a.weight_step is model.b.weight_step
    assert model.a.weight_mask is model.b.weight_mask
    assert_same(model, (prepare(source, CONFIG) if kind == "float" else source).state_dict())


def test_a_part_leaves_the_rest_alone():
    model = in_phase2(prepare(net(0), CONFIG))
    before, other = copy.deepcopy(model.state_dict()), in_phase2(prepare(net(1), CONFIG)).state_dict()
    part = {name: other[name] for name in ("0.weight_mask", "3.bias")}
    model.load_state_dict(part, strict=False)
    assert_same(model, OrderedDict(before | part))
    assert phases(model) == {2}
    with pytest.raises(RuntimeError, match=r"Missing key.*0.weight_step"):
        model.load_state_dict(part)


def test_batch_norms_from_before_num_batches_tracked_load():
    state = {name: tensor for name, tensor in net(1).state_dict().items() if "tracked" not in name}
    model = prepare(net(0), CONFIG)
    model.load_state_dict(state)
    assert model[1].num_batches_tracked == model[1].teacher_num_batches_tracked == 0
    assert torch.equal(model[1].teacher_running_var, state["1.running_var"])


def test_a_batch_norm_without_entries_loads_and_keeps_the_phase():
    def plain():
        return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False, track_running_stats=False))

    model = prepare(plain(), CONFIG)
    model.load_state_dict(plain().state_dict())
    model = in_phase2(model)
    other = prepare(plain(), CONFIG)
    other.load_state_dict(model.state_dict())
    assert phases(other) == {2}
    other.load_state_dict({"0.bias": torch.zeros(3)}, strict=False)
    assert phases(other) == {2}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_prepared_checkpoint_loads_into_a_fresh_model_on_another_device(device, assign):
    for here, there in (("cpu", device), (device, "cpu")):
        source, model = in_phase2(prepare(net(1), CONFIG)).to(there), prepare(net(0), CONFIG).to(here)
        model.load_state_dict(source.state_dict(), assign=assign)
        assert_same(model, source.state_dict())
        assert {t.device.type for t in model.state_dict().values()} == {there if assign else here}
        assert phases(model) == {2}
        assert not model[0].weight_step.requires_grad
        assert model[1].teacher_weight.requires_grad


def test_in_lower_precision_weights_are_rounded_and_steps_are_not():
    source = in_phase2(prepare(net(1), CONFIG))
    model = prepare(net(0), CONFIG).bfloat16()
    model.load_state_dict(source.state_dict())
    assert torch.equal(model[0].weight, source[0].weight.bfloat16())
    assert torch.equal(model[0].weight_step, source[0].weight_step)
    half = {n: t.half() if t.is_floating_point() else t for n, t in source.state_dict().items()}
    model.load_state_dict(half, assign=True)
    assert (model[0].weight.dtype, model[0].weight_step.dtype) == (torch.float16, torch.float32)


def test_the_phase_of_a_state_dict_is_not_moved_by_a_model_that_took_it_over():
    state = prepare(net(1), CONFIG).state_dict()
    model = prepare(net(0), CONFIG)
    model.load_state_dict(state, assign=True)
    in_phase2(model)
    assert state["0.pqk_phase"] == 1


def test_it_loads_by_swapping_tensors_too():
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model = in_phase2(prepare(Tied(), CONFIG))
        source = Tied()
        model.load_state_dict(source.state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_same(model, prepare(source, CONFIG).state_dict())
    assert model.a.weight_step is model.b.weight_step


# What states written by other programs may hold, and what it is here.
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int64, torch.bfloat16], ids=str)
def test_masks_of_zeros_and_ones_become_bool(dtype):
    source, model = in_phase2(prepare(net(1), CONFIG)).state_dict(), prepare(net(0), CONFIG)
    for assign in (False, True):
        model.load_state_dict({**source, "0.weight_mask": source["0.weight_mask"].to(dtype)}, assign=assign)
        assert_same(model, source)


@pytest.mark.parametrize(
    ("per_channel", "shape"), [(False, ()), (False, (1, 1)), (True, (4, 1, 1, 1)), (True, (1, 4))], ids=str
)
def test_steps_of_another_layout_are_reshaped(per_channel, shape):
    config = PQKConfig(bits=3, per_channel=per_channel)
    source, model = prepare(net(1), config).state_dict(), prepare(net(0), config)
    for assign in (False, True):
        step = source["0.weight_step"].reshape(shape).double()
        model.load_state_dict({**source, "0.weight_step": step}, assign=assign)
        assert_same(model, source)


ANEW = "leave weight_mask, weight_step and pqk_phase out to start anew from the weight"
REFUSED = [
    ("0.weight_mask", lambda t: t * 2.0, r"0.weight_mask \(torch.float32\) holds other values than 0 and 1.*" + ANEW),
    ("0.weight_mask", lambda t: t * torch.nan, r"0.weight_mask \(torch.float32\) holds other values"),
    ("0.weight_mask", lambda t: t[:, :1], r"0.weight_mask has shape \[4, 1, 3, 3\], the model's has \[4, 2, 3, 3\]"),
    ("0.weight_mask", None, "0.weight_mask is missing beside weight: give both, or " + ANEW),
    ("0.weight_step", None, "0.weight_step is missing beside weight: give both, or " + ANEW),
    ("0.weight_step", lambda t: t * 0, "0.weight_step is 0 to 0, expected positive numbers.*earlier checkpoint"),
    ("0.weight_step", lambda t: -t, "0.weight_step is -0.* expected positive numbers"),
    ("0.weight_step", lambda t: t * torch.nan, "0.weight_step is nan to nan"),
    ("0.weight_step", lambda t: t * torch.inf, "0.weight_step is inf to inf"),
    (
        "0.weight_step",
        lambda t: t.repeat(4),
        r"0.weight_step holds 4 step sizes, the model's 1: prepare the model with PQKConfig\(per_channel=True\)",
    ),
    ("0.pqk_phase", lambda t: t + 1, "0.pqk_phase is 3, expected 1 or 2: the state dict is damaged"),
    ("0.pqk_phase", lambda t: t.reshape(1, 1), r"0.pqk_phase is \[\[2\]\], expected 1 or 2"),
    ("0.weight", lambda t: t[:1], r"0.weight has shape \[1, 2, 3, 3\].*\(size mismatch\)"),
    ("0.weight", lambda t: t.tolist(), "0.weight is of type list, not a tensor"),
    ("1.teacher_running_var", None, "1.teacher_running_var is missing beside running_var"),
    ("1.pqk_phase", lambda t: t * 0, "1.pqk_phase is 0, expected 1 or 2"),
    ("1.running_mean", lambda t: t[:2], r"1.running_mean has shape \[2\], the model's has \[4\]"),
]


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "loose"])
@pytest.mark.parametrize(("key", "damage", "message"), REFUSED)
def test_what_is_wrong_is_named_and_the_module_keeps_what_it_had(key, damage, message, strict):
    state, model = in_phase2(prepare(net(1), CONFIG)).state_dict(), prepare(net(0), CONFIG)
    before = copy.deepcopy(model.state_dict())
    if damage is None:
        del state[key]
    else:
        state[key] = damage(state[key])
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state, strict=strict)
    index = int(key[0])
    assert model[index].phase == 1
    for name, tensor in model[index].state_dict().items():
        assert torch.equal(tensor, before[f"{index}.{name}"]), name


def test_one_step_for_a_model_of_many_is_refused_with_the_remedy():
    model = prepare(net(0), PQKConfig(bits=3, per_channel=True))
    with pytest.raises(RuntimeError, match=r"0.weight_step holds one step size, the model's 4.*\(per_channel=False\)"):
        model.load_state_dict(prepare(net(1), CONFIG).state_dict())


def test_all_problems_come_in_one_error():
    state, model = prepare(net(1), CONFIG).state_dict(), prepare(net(0), CONFIG)
    state["0.weight_step"] = -state["0.weight_step"]
    state["0.weight_mask"] = state["0.weight_mask"] * 3
    state["3.pqk_phase"] = torch.tensor(7)
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(state)
    for what in ("0.weight_step is -", "0.weight_mask (torch.int64)", "3.pqk_phase is 7"):
        assert what in str(caught.value)


def test_a_float_weight_that_gives_no_step_size_is_refused():
    model = prepare(net(0), PQKConfig(bits=3, per_channel=True))
    before = copy.deepcopy(model[0].state_dict())
    state = net(1).state_dict()
    for bad in (torch.nan, torch.inf):
        damaged = state["0.weight"].clone()
        damaged[0, 0, 0, 0] = bad
        with pytest.raises(RuntimeError, match=r"0.weight holds NaN or infinity, from which no step size can be set"):
            model.load_state_dict({**state, "0.weight": damaged})
    for wrong in (state["0.weight"][:2], state["0.weight"].flatten()):
        with pytest.raises(RuntimeError, match=r"0.weight has shape .*\(size mismatch\)$"):
            model.load_state_dict({**state, "0.weight": wrong})
    with pytest.raises(RuntimeError, match=r"0.weight is torch.float64, expected fp32, bf16 or fp16"):
        model.load_state_dict(net(1).double().state_dict(), assign=True)
    assert_same(model[0], before)
    model.load_state_dict(net(1).double().state_dict())
    assert model[0].weight.dtype == torch.float32


def by_hand(**more):
    """A prepared nn.Sequential(Linear(2, 1), BatchNorm1d(1)) as the first layout has it."""
    return {
        "0.weight": torch.tensor([[0.5, -0.1]]),
        "0.bias": torch.tensor([0.2]),
        "0.weight_step": torch.tensor([0.25]),
        "0.weight_mask": torch.tensor([[True, False]]),
        "1.weight": torch.tensor([1.5]),
        "1.bias": torch.tensor([0.5]),
        "1.teacher_weight": torch.tensor([1.25]),
        "1.teacher_bias": torch.tensor([0.75]),
        "1.running_mean": torch.tensor([0.1]),
        "1.running_var": torch.tensor([2.0]),
        "1.num_batches_tracked": torch.tensor(7),
        "1.teacher_running_mean": torch.tensor([0.3]),
        "1.teacher_running_var": torch.tensor([3.0]),
        "1.teacher_num_batches_tracked": torch.tensor(4),
        **more,
    }


def with_versions(state, layer, batch_norm):
    out = OrderedDict(state)
    if layer is not None:
        out._metadata = OrderedDict({"": {"version": 1}, "0": {"version": layer}, "1": {"version": batch_norm}})
    return out


def small():
    return prepare(nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1)), PQKConfig(sparsity=0.5))


@pytest.mark.parametrize("versions", [(1, 2), (None, None)], ids=["metadata", "plain-dict"])
def test_states_of_the_first_layout_load_and_leave_the_phase_to_the_model(versions):
    state, model = with_versions(by_hand(), *versions), small()
    with pytest.warns(UserWarning, match="does not say in which phase it was written, so the model stays in phase 1"):
        model.load_state_dict(state)
    assert phases(model) == {1}
    start_phase2(model)
    with pytest.warns(UserWarning, match="stays in phase 2"):
        model.load_state_dict(state)
    assert phases(model) == {2}
    loaded = model.state_dict()
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("versions", [(1, 2), (3, 3), (None, None)], ids=str)
def test_states_with_a_phase_load_from_every_version(versions):
    phase = torch.tensor(2, dtype=torch.uint8)
    state, model = by_hand(**{"0.pqk_phase": phase, "1.pqk_phase": phase}), small()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(with_versions(state, *versions))
    assert phases(model) == {2}
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())


def test_states_of_a_newer_layout_are_refused_by_name():
    state, model = small().state_dict(), small()
    assert {state._metadata[name]["version"] for name in ("0", "1")} == {3}, "what this library writes"
    state._metadata["0"] = {"version": 4}
    before = copy.deepcopy(model[0].state_dict())
    with pytest.raises(RuntimeError, match=r"0.pqk_phase: layout 4, this pqk_fast reads up to 3: upgrade pqk_fast"):
        model.load_state_dict(state)
    assert_same(model[0], before)
    float_state = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1)).state_dict()
    float_state._metadata["1"] = {"version": 4}  # torch's number
    model.load_state_dict(float_state)


def test_a_layer_can_be_the_whole_model():
    layer = PQKLinear(3, 2, config=CONFIG)
    layer.load_state_dict(nn.Linear(3, 2).state_dict())
    with pytest.raises(RuntimeError, match=r"\tweight_step is missing beside weight"):
        layer.load_state_dict({n: t for n, t in layer.state_dict().items() if n != "weight_step"})


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_sharded_models_load_their_own_state_and_refuse_a_float_one():
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = fully_shard(prepare(nn.Sequential(nn.Linear(4, 4)), CONFIG))
        state = model.state_dict()
        model.load_state_dict(state)
        with pytest.raises(RuntimeError, match=r"0.weight_step is -.*expected positive numbers"):
            model.load_state_dict({**state, "0.weight_step": -state["0.weight_step"]})
        with pytest.raises(RuntimeError, match=r"0.weight is sharded.*load it before fully_shard"):
            model.load_state_dict(nn.Sequential(nn.Linear(4, 4)).state_dict())
    finally:
        dist.destroy_process_group()


def test_weights_of_other_bits_are_refused_by_name():
    model = prepare(net(), CONFIG)
    other = prepare(net(1), PQKConfig(bits=3, sparsity=0.5, layer_bits={"3": 2}))
    before = copy.deepcopy(other.state_dict())
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    with pytest.raises(RuntimeError, match=r"3\.weight was trained for 3 bits, the model's has 2: prepare the model"):
        other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other[3].weight, before["3.weight"])
    other.load_state_dict(dict(model.state_dict()))  # a plain dict does not say


def test_step_sizes_that_were_frozen_by_hand_stay_so():
    model = prepare(net(), CONFIG)
    model[0].requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    assert [layer.weight_step.requires_grad for layer in (model[0], model[3])] == [False, True]
    Pruner(model, 1, 1)
    start_phase2(model, "learned")
    assert [layer.weight_step.requires_grad for layer in (model[0], model[3])] == [False, True]
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert [layer.weight_step.requires_grad for layer in (model[0], model[3])] == [False, True]
