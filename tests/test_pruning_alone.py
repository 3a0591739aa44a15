"""bits=32: weights are pruned and not quantized, in both phases, by every way through the library."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, normal_like
from small_run import batches, net, recipe
from torch import nn
from torch._dynamo.utils import counters

import pqk_fast as pqk
from pqk_fast import ops
from pqk_fast.branches import pqk_layers
from pqk_fast.config import Phase2Config
from pqk_fast.guards import find_problems
from pqk_fast.settings import ConfigError
from pqk_fast.trainer import Trainer

CONFIG = pqk.PQKConfig(bits=32, sparsity=0.7, mask_interval=8, scope="layer")
FLOATS = {
    "linear": (lambda: nn.Linear(6, 5), (4, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular"), (4, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 4, 3, stride=2, groups=2), (4, 4, 9, 7)),
}
KINDS = pytest.mark.parametrize("kind", FLOATS)
HARD = pytest.mark.parametrize("hard", [False, True], ids=["all learn", "kept learn"])


def made(kind, **config):
    """A float layer, the prepared one with half of its weights pruned, an input."""
    build, shape = FLOATS[kind]
    torch.manual_seed(0)
    plain = build()
    layer = pqk.prepare(copy.deepcopy(plain), pqk.PQKConfig(bits=32, sparsity=0.5, mask_interval=1, **config))
    pqk.Pruner(layer, 1, 1)
    assert 0 < layer.weight_mask.sum() < layer.weight_mask.numel()
    return plain, layer, torch.randn(shape, requires_grad=True)


def pruned(layer):
    return torch.where(layer.weight_mask, layer.weight.detach(), 0.0)


def bits_of(tensor):
    return tensor.contiguous().view({4: torch.int32, 2: torch.int16}[tensor.element_size()])


def phase2(model, **config):
    pqk.prepare(model, pqk.PQKConfig(bits=32, sparsity=0.5, mask_interval=1, **config))
    pqk.Pruner(model, 1, 1)
    return pqk.start_phase2(model)


# --- the operation


@HARD
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prune_selects_and_passes_gradients_on(dtype, hard):
    weight = normal_like(torch.empty(7, 11, dtype=dtype))
    weight[0, :4] = torch.tensor([-0.0, torch.finfo(dtype).tiny, torch.finfo(dtype).max, -1.0])
    mask = normal_like(torch.empty(7, 11), seed=2) > 0
    mask[0, :4] = True
    weight.requires_grad_()
    out = ops.prune(weight, mask, hard)
    assert out.dtype == dtype
    assert torch.equal(bits_of(out.detach()), bits_of(torch.where(mask, weight.detach(), 0.0)))
    grad = normal_like(out, seed=3)
    out.backward(grad)
    assert torch.equal(weight.grad, torch.where(mask, grad, 0.0) if hard else grad)


def test_what_prune_refuses():
    weight, mask = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"mask must be bool of the weight's shape \(2, 3\), got torch.bool \(3, 2\)"):
        ops.prune(weight, mask.T)
    with pytest.raises(ValueError, match=r"got torch.float32 \(2, 3\)"):
        ops.prune(weight, mask.float())
    with pytest.raises(TypeError, match=r"weight must be floating point .*, got torch.int64"):
        ops.prune(weight.long(), mask)
    with pytest.raises(ConfigError, match=r"bits must be an integer in 2\.\.8, got 32$"):
        ops.fake_quant(weight, mask, torch.ones(1), 32)


@pytest.mark.parametrize("bits", [16, 1, 9, 31, 33, 0, True])
def test_other_numbers_of_bits_are_refused_and_32_is_named(bits):
    with pytest.raises(ConfigError, match=rf"bits must be an integer in 2\.\.8, got {bits}; or 32, to prune without q"):
        pqk.PQKConfig(bits=bits)


# --- layers


@HARD
@KINDS
def test_phase1_is_the_float_layer_with_pruned_weights(kind, hard):
    plain, layer, x = made(kind, mask_gradients=hard)
    twin = x.detach().clone().requires_grad_()
    with torch.no_grad():
        plain.weight.copy_(pruned(layer))
    out, expected = layer(x), plain(twin)
    assert torch.equal(out, expected)
    grad = normal_like(out)
    out.backward(grad)
    expected.backward(grad)
    all_of_them = plain.weight.grad
    assert torch.equal(layer.weight.grad, torch.where(layer.weight_mask, all_of_them, 0.0) if hard else all_of_them)
    assert (layer.weight.grad[~layer.weight_mask] != 0).any() != hard
    assert torch.equal(layer.bias.grad, plain.bias.grad)
    assert torch.equal(x.grad, twin.grad)


@pytest.mark.parametrize("how", ["latent", "shared"])
@KINDS
def test_phase2_splits_the_gradient(kind, how):
    plain, layer, x = made(kind, teacher_weights=how)
    pqk.start_phase2(layer)
    student, teacher = pqk.dual_forward(layer, x.detach(), "two_pass")
    assert torch.equal(teacher, plain(x))
    with torch.no_grad():
        plain.weight.copy_(pruned(layer))
    assert torch.equal(student, plain(x))
    for out, learns in ((student, layer.weight_mask), (teacher, ~layer.weight_mask)):
        layer.weight.grad = None
        out.sum().backward()
        assert not layer.weight.grad[~learns].any()
        assert layer.weight.grad[learns].all()


@pytest.mark.parametrize("how", ["latent", "shared"])
@KINDS
def test_a_stacked_forward_is_two_passes(kind, how):
    _, layer, x = made(kind, teacher_weights=how)
    pqk.start_phase2(layer)
    runs = []
    for mode in ("two_pass", "stacked"):
        layer.zero_grad()
        x.grad = None
        student, teacher = pqk.dual_forward(layer, x, mode)
        (student.square().sum() + teacher.pow(3).sum()).backward()
        runs.append([student, teacher, layer.weight.grad, layer.bias.grad, x.grad])
    for value, expected in zip(*runs, strict=True):
        assert torch.equal(value, expected)
    with pqk.branch(layer, "stacked"), pytest.raises(ValueError, match="student rows first, then as many teacher rows"):
        layer(x[:3])


@pytest.mark.parametrize("config", [{}, {"per_channel": True}, {"step_init": "lsq"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_step_size_is_one_and_does_not_learn(config, dtype):
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = pqk.prepare(net(), pqk.PQKConfig(bits=32, **config))
    finally:
        torch.set_default_dtype(default)
    for layer in pqk_layers(model).values():
        assert layer.weight_step.tolist() == [1.0]
        assert layer.weight_step.dtype == torch.float32
        assert not layer.weight_step.requires_grad
    pqk.Pruner(model, 1, 1)
    pqk.start_phase2(model)
    assert not any(layer.weight_step.requires_grad for layer in pqk_layers(model).values())


@pytest.mark.parametrize("rule", ["flat", "lsq"])
def test_step_sizes_are_in_no_optimizer_group(rule):
    model = pqk.prepare(net(), CONFIG)
    (group,) = pqk.param_groups(model, 0.1, step_lr_rule=rule)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(parameter)] for parameter in group["params"]} == {
        "0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"
    }  # fmt: skip


# --- models


def test_phase1_by_hand_prunes_and_leaves_step_sizes_alone():
    model = pqk.prepare(net(), CONFIG)
    optimizer = torch.optim.SGD(pqk.param_groups(model, 0.1, weight_decay=1e-2), momentum=0.9)
    pruner = pqk.Pruner(model, 24, 6)
    for x, y in batches(0) * 4:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        assert all(layer.weight_step.grad is None for layer in pqk_layers(model).values())
        optimizer.step()
        pruner.step()
    for layer in pqk_layers(model).values():
        assert layer.weight_step.item() == 1.0
        assert int(layer.weight_mask.sum()) == layer.weight.numel() - int(0.7 * layer.weight.numel())
        assert layer.weight[~layer.weight_mask].any(), "pruned weights stay what they are"
    assert find_problems(model) == []


def test_guards_still_name_what_is_wrong():
    model = pqk.prepare(net(), CONFIG)
    assert max(layer.weight.abs().max() for layer in pqk_layers(model).values()) < 0.5, "half of the step size"
    assert find_problems(model) == []
    with torch.no_grad():
        model[0].weight_mask.fill_(False)
        model[3].weight[0, 0] = torch.inf
    assert {(problem.layer, problem.kind) for problem in find_problems(model)} == {("0", "dead"), ("3", "weight")}


def test_a_run_of_the_trainer_ends_in_a_sparse_float_student():
    trainer = Trainer(
        net(), recipe(pqk=CONFIG, phase2=Phase2Config(steps=40, epoch_steps=20, weight_decay=0.0, distill_start=0))
    )
    trainer.phase1(batches(0), batches(1))
    before = copy.deepcopy(trainer.model.state_dict())
    rows = trainer.finetune(batches(0), batches(1)).rows
    assert rows[-1]["validation"] > 85
    assert rows[-1]["step_size"] == [1.0, 1.0]
    student = pqk.convert(trainer.model)
    for name in ("0", "3"):
        mask = before[f"{name}.weight_mask"]
        after = trainer.model.state_dict()[f"{name}.weight"]
        assert torch.equal(after[~mask], before[f"{name}.weight"][~mask])
        kept = student.get_submodule(name).weight[mask]
        assert kept.unique().numel() == kept.numel(), "no grid"
        assert not student.get_submodule(name).weight[~mask].any()


def test_convert_bakes_each_branch_in():
    model = phase2(net())
    latent = {name: layer.weight.detach().clone() for name, layer in pqk_layers(model).items()}
    student, teacher = pqk.convert(model), pqk.convert(model, "teacher")
    for name, layer in pqk_layers(model).items():
        assert type(student.get_submodule(name)) is nn.Linear
        assert torch.equal(student.get_submodule(name).weight, pruned(layer))
        assert torch.equal(teacher.get_submodule(name).weight, latent[name])
    x = batches(1)[0][0]
    assert torch.equal(student.eval()(x), model.eval()(x))
    assert torch.equal(teacher.eval()(x), pqk.branch(model, "teacher")(x))


def test_states_of_prepared_and_of_float_models_load():
    x = batches(1)[0][0]
    model = phase2(net())
    other = pqk.prepare(net(1), CONFIG)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other.eval()(x), model.eval()(x))
    assert torch.equal(pqk.branch(other, "teacher")(x), pqk.branch(model, "teacher")(x))
    other.load_state_dict(net(2).state_dict(), strict=True)  # anew
    assert torch.equal(other(x), net(2).eval()(x))
    assert [layer.weight_step.tolist() for layer in pqk_layers(other).values()] == [[1.0], [1.0]]
    assert not any(layer.weight_step.requires_grad for layer in pqk_layers(other).values())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_models_can_be_copied_and_pickled(copied):
    model = phase2(net()).eval()
    twin = copied(model)
    x = batches(1)[0][0]
    for value, expected in zip(pqk.dual_forward(twin, x), pqk.dual_forward(model, x), strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("mixed", [False, True], ids=["all 32", "one of 4 bits"])
@pytest.mark.parametrize("branch", ["phase 1", "student", "teacher", "stacked"])
def test_fused_is_the_same(mixed, branch):
    model = pqk.prepare(net(), pqk.PQKConfig(bits=32, sparsity=0.5, mask_interval=1))
    pqk.Pruner(model, 1, 1)
    if branch != "phase 1":
        pqk.start_phase2(model)
    if mixed:
        model[3].config = pqk.PQKConfig(bits=4)
        model[3].weight_step.data.fill_(0.02)
        model[3].weight_step.requires_grad_(branch == "phase 1")
    fused = pqk.fuse(copy.deepcopy(model))
    x = batches(0)[0][0]
    runs = []
    for each in (model, fused):
        out = each(x) if branch == "phase 1" else pqk.branch(each, branch)(x)
        out.backward(normal_like(out))
        runs.append([out, *(parameter.grad for parameter in each.parameters())])
    for value, expected in zip(*runs, strict=True):
        assert (value is None) == (expected is None)
        assert value is None or torch.equal(value, expected)
    assert torch.equal(pqk.unfuse(fused).eval()(x), model.eval()(x))


@HARD
def test_compiled_phase1_is_one_graph_with_the_eager_gradients(hard):
    model = pqk.prepare(net(), pqk.PQKConfig(bits=32, sparsity=0.5, mask_interval=1, mask_gradients=hard))
    pruner = pqk.Pruner(model, 3, 1)
    x, y = batches(0)[0]
    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(lambda x, y: F.cross_entropy(model(x), y), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        grads = []
        for run in (compiled, compiled.__wrapped__):
            model.zero_grad()
            run(x, y).backward()
            grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        assert grads[0].keys() == grads[1].keys() == {f"{n}.{w}" for n in (0, 1, 3) for w in ("weight", "bias")}
        torch.testing.assert_close(*grads)
        pruner.step()  # another mask: the same graph
    assert counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()


@pytest.mark.parametrize("phase", [1, 2])
def test_autocast(phase):
    model = phase2(net()) if phase == 2 else pqk.prepare(net(), CONFIG)
    x = batches(0)[0][0]
    with torch.autocast("cpu", torch.bfloat16):
        weight = model[0].student_weight()
        outs = pqk.dual_forward(model, x, "stacked") if phase == 2 else [model(x)]
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, pruned(model[0]).bfloat16())
    assert {out.dtype for out in outs} == {torch.bfloat16}
    sum(out.float().square().sum() for out in outs).backward()
    assert model[0].weight.grad.dtype == torch.float32
    mask = model[0].weight_mask
    for learns in (mask, ~mask) if phase == 2 else (mask,):
        assert model[0].weight.grad[learns].any()
