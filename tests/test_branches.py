"""Student and full net in one model: two passes, one stacked pass, and when the latter is refused."""

import copy
import warnings
from collections import OrderedDict

import pytest
import torch
from cases import package
from torch import nn

from pqk_fast import ConfigError, MutualDistillationLoss, PQKConfig, Pruner, branch, dual_forward, prepare, start_phase2
from pqk_fast.branches import choose_mode, pqk_layers, why_not_stacked
from pqk_fast.models import create_model

pytestmark = pytest.mark.filterwarnings("ignore:left in floating point")


def in_phase2(model, sparsity=0.7, **options):
    model = prepare(model, PQKConfig(sparsity=sparsity, mask_interval=1, **options))
    Pruner(model, 1, 1)
    return start_phase2(model)


def torchvision_model(name, **options):
    return getattr(package("torchvision.models"), name)(num_classes=7, **options)


def conv1d_net():
    return nn.Sequential(
        nn.Conv1d(3, 8, 5, padding=2), nn.BatchNorm1d(8), nn.ReLU(), nn.AdaptiveAvgPool1d(4), nn.Flatten(),
        nn.Dropout(0.3), nn.Linear(32, 7),
    )  # fmt: skip


def vit():
    return package("torchvision.models").VisionTransformer(32, 8, 2, 4, 32, 64, dropout=0.1, num_classes=7)


MODELS = [
    pytest.param(lambda: create_model("res8_narrow", 7), (3, 101, 40), id="res8"),
    pytest.param(lambda: create_model("resnet20", 7), (4, 3, 16, 16), id="resnet20"),
    pytest.param(conv1d_net, (4, 3, 20), id="conv1d"),
    pytest.param(lambda: torchvision_model("resnet18"), (3, 3, 64, 64), id="resnet18"),
    pytest.param(lambda: torchvision_model("mobilenet_v2"), (3, 3, 64, 64), id="mobilenet_v2"),
    pytest.param(vit, (3, 3, 32, 32), id="vit"),
    pytest.param(lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (3, 5, 8), id="batch-first"),
]


@pytest.mark.parametrize(("make", "shape"), MODELS)
def test_stacked_equals_two_passes_in_outputs_gradients_and_buffers(make, shape):
    torch.manual_seed(0)
    model = in_phase2(make())
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.TransformerEncoderLayer):
            module.self_attn.dropout = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    x = torch.randn(shape)
    found = {}
    for mode in ("two_pass", "stacked"):
        twin = copy.deepcopy(model)
        student, teacher = dual_forward(twin, x, mode)
        (student.square().mean() + 2 * teacher.square().mean()).backward()
        grads = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
        found[mode] = ({"student": student, "teacher": teacher}, grads, dict(twin.named_buffers()))
    for two_pass, stacked in zip(found["two_pass"], found["stacked"], strict=True):
        assert two_pass.keys() == stacked.keys()
        for name, expected in two_pass.items():
            scale = max(1e-3, float(expected.detach().float().abs().max())) if expected.numel() else 1.0
            torch.testing.assert_close(
                stacked[name], expected, rtol=1e-4, atol=2e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize(("make", "shape"), MODELS)
def test_auto_finds_stacking_right_and_leaves_no_trace(make, shape):
    torch.manual_seed(0)
    model = in_phase2(make())
    before = copy.deepcopy(model.state_dict())
    rates = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    random_state = torch.get_rng_state()
    assert why_not_stacked(model, torch.randn(shape, generator=torch.Generator().manual_seed(1))) is None
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == rates
    assert all(layer.branch == "student" for layer in pqk_layers(model).values())


class CentredOverBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        return self.linear(x - x.mean(0))


class DividedByBatchSize(CentredOverBatch):
    def forward(self, x):
        return self.linear(x) / x.shape[0]


class FixedLength(CentredOverBatch):
    """Sequence first with learned positions: twice the length does not fit."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.randn(5, 1, 6))

    def forward(self, x):
        return self.linear(x + self.position)


class ReturnsObject(CentredOverBatch):
    def forward(self, x):
        return type("Output", (), {"logits": self.linear(x)})()


@pytest.mark.parametrize(
    ("make", "why"),
    [
        pytest.param(
            lambda: nn.TransformerEncoderLayer(6, 2, 16),
            "dimension 0 is not the batch",
            id="sequence-first transformer",
        ),
        pytest.param(CentredOverBatch, "samples of a batch meet", id="batch mean"),
        pytest.param(DividedByBatchSize, "outputs differ by up to", id="division by the batch size"),
        pytest.param(FixedLength, "the stacked forward failed", id="fixed length"),
    ],
)
def test_auto_falls_back_to_two_passes_and_says_why(make, why):
    torch.manual_seed(0)
    model = in_phase2(make()).eval()
    x = torch.randn(5, 4, 6)
    with pytest.warns(UserWarning, match=f"falls back to two passes: .*{why}"):
        student, teacher = dual_forward(model, x)
    torch.testing.assert_close(student, model(x))
    torch.testing.assert_close(teacher, branch(model, "teacher")(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dual_forward(model, x)  # decided once, said once


def test_inputs_without_a_common_batch_dimension_fall_back():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, inputs):
            return self.linear(inputs[0]) * inputs[1]

    model = in_phase2(Scaled())
    with pytest.warns(UserWarning, match="no batch dimension in common"):
        student, _ = dual_forward(model, (torch.randn(4, 6), torch.tensor(2.0)))
    assert student.shape == (4, 6)


@pytest.mark.parametrize("how", ["autocast", "bf16 weights"])
def test_low_precision_does_not_blind_the_comparison(how):
    class SlightlyMixed(CentredOverBatch):
        def forward(self, x):
            h = self.linear(x)
            return h - 0.5 * h.mean(0)

    torch.manual_seed(0)
    model = SlightlyMixed()
    x = torch.randn(8, 6)
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            reason = why_not_stacked(in_phase2(model), x)
    else:
        reason = why_not_stacked(in_phase2(model.bfloat16()), x.bfloat16())
    assert reason is not None
    assert "samples of a batch meet" in reason


@pytest.mark.parametrize("name", ["conv", "rnn"])
def test_precisions_of_cudnn_that_differ_stay_as_they_are(name):
    """torch's allow_tf32, which stands for both, cannot be read then."""
    settings = [torch.backends.cudnn.conv, torch.backends.cudnn.rnn]
    before = [setting.fp32_precision for setting in settings]
    changed = getattr(torch.backends.cudnn, name)
    changed.fp32_precision = "ieee" if changed.fp32_precision == "tf32" else "tf32"
    mixed = [setting.fp32_precision for setting in settings]
    seen = []

    class Looks(CentredOverBatch):
        def forward(self, x):
            seen.append([setting.fp32_precision for setting in settings])
            return self.linear(x)

    try:
        assert len(set(mixed)) == 2
        assert why_not_stacked(in_phase2(Looks()), torch.randn(4, 6)) is None
        assert set(map(tuple, seen)) == {("ieee", "ieee")}
        assert [setting.fp32_precision for setting in settings] == mixed
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


def test_the_mode_is_chosen_before_the_first_forward():
    model = in_phase2(conv1d_net())
    x = torch.randn(4, 3, 20)
    assert [choose_mode(model, x, mode) for mode in ("two_pass", "stacked")] == ["two_pass", "stacked"]
    assert model.stacked_is_right is None  # not asked for
    assert choose_mode(model, x) == "two_pass"  # on a CPU
    assert model.stacked_is_right is True
    model.stacked_is_right = None
    with pytest.raises(ConfigError, match="mode must be one of"):
        choose_mode(model, x, "both")
    with pytest.raises(ValueError, match="phase 1"):
        choose_mode(prepare(conv1d_net(), PQKConfig()), x, "two_pass")


def test_the_decision_is_made_anew_in_phase2():
    model = in_phase2(conv1d_net())
    assert model.stacked_is_right is None
    dual_forward(model, torch.randn(4, 3, 20))
    assert model.stacked_is_right is True


def test_two_pass_takes_any_output_and_stacked_refuses_what_it_cannot_split():
    model = in_phase2(ReturnsObject())
    x = torch.randn(4, 6)
    student, teacher = dual_forward(model, x, "two_pass")
    assert student.logits.shape == teacher.logits.shape == (4, 6)
    with pytest.raises(TypeError, match="output holds a Output: use mode='two_pass'"):
        dual_forward(model, x, "stacked")
    with pytest.warns(UserWarning, match="output holds a Output"):
        dual_forward(model, x)

    class Unwraps(CentredOverBatch):
        def forward(self, batch):
            return self.linear(batch.x)

    batch = type("Batch", (), {"x": x})()
    with pytest.warns(UserWarning, match="input holds a Batch"):
        student, _ = dual_forward(in_phase2(Unwraps()), batch)
    assert student.shape == (4, 6)


def test_inputs_and_outputs_may_be_nested():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, inputs):
            out = self.linear(inputs["x"])
            return {"logits": out, "parts": (out + 1, [out + 2]), "flag": None}

    model = in_phase2(Nested())
    x = {"x": torch.randn(4, 3)}
    for mode in ("two_pass", "stacked", "auto"):
        student, teacher = dual_forward(model, x, mode)
        torch.testing.assert_close(student["parts"][1][0], model(x)["logits"] + 2)
        torch.testing.assert_close(teacher["logits"], branch(model, "teacher")(x)["logits"])


def test_branch_is_a_call_and_a_context_and_restores():
    model = in_phase2(conv1d_net()).eval()
    x = torch.randn(2, 3, 20)
    outside = model(x)
    with branch(model, "teacher") as full:
        inside = full(x)
        torch.testing.assert_close(branch(model, "student")(x), outside)
        torch.testing.assert_close(model(x), inside)
    torch.testing.assert_close(model(x), outside)
    assert not torch.allclose(inside, outside)
    with pytest.raises(RuntimeError, match="boom"), branch(model, "teacher"):
        raise RuntimeError("boom")
    torch.testing.assert_close(model(x), outside)


def test_misuse_is_refused():
    model = in_phase2(conv1d_net())
    with pytest.raises(ConfigError, match="mode must be one of auto, two_pass, stacked; got 'both'"):
        dual_forward(model, torch.randn(2, 3, 20), "both")
    with pytest.raises(ConfigError, match="branch must be one of"):
        branch(model, "full")
    with pytest.raises(ValueError, match="no PQK layers"):
        branch(conv1d_net(), "teacher")


@pytest.mark.parametrize("mode", ["two_pass", "stacked"])
def test_one_step_equals_two_separate_updates(mode):
    """Eqs 11 and 12: one summed loss, one backward, one SGD step = the student's step and the teacher's step."""
    torch.manual_seed(0)
    model = in_phase2(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)), sparsity=0.5)
    x, y, lr = torch.randn(16, 6), torch.randint(3, (16,)), 0.1
    loss = MutualDistillationLoss(0.5, 0.5, 2.0)
    layers = pqk_layers(model)
    start = {name: layer.weight.detach().clone() for name, layer in layers.items()}

    expected = {}
    for which in ("student", "teacher"):
        twin = copy.deepcopy(model)
        student, teacher = dual_forward(twin, x, "two_pass")
        own = super(MutualDistillationLoss, loss).forward
        (own(student, teacher, y) if which == "student" else own(teacher, student, y)).backward()
        for name, layer in pqk_layers(twin).items():
            reached = layer.weight_mask if which == "student" else ~layer.weight_mask
            assert torch.equal(layer.weight.grad != 0, reached & (layer.weight.grad != 0))
            moved = start[name] - lr * layer.weight.grad
            expected[name] = torch.where(reached, moved, expected.get(name, start[name]))

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    loss(*dual_forward(model, x, mode), y).backward()
    optimizer.step()
    for name, layer in layers.items():
        assert not torch.equal(layer.weight, start[name])
        torch.testing.assert_close(layer.weight.detach(), expected[name], rtol=1e-5, atol=1e-7)
        assert layer.weight_step.grad is None


def test_batch_norm_statistics_of_the_branches_never_mix():
    torch.manual_seed(0)
    model = in_phase2(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)), sparsity=0.9)
    for mode in ("two_pass", "stacked"):
        reference = {"student": nn.BatchNorm1d(8), "teacher": nn.BatchNorm1d(8)}
        norm = model[1]
        for name, prefix in (("student", ""), ("teacher", "teacher_")):
            for key in ("running_mean", "running_var", "num_batches_tracked"):
                reference[name].state_dict()[key].copy_(getattr(norm, prefix + key))
        for _ in range(4):
            x = torch.randn(16, 6) + 1
            dual_forward(model, x, mode)
            for name, own in reference.items():
                with branch(model, name):
                    own(model[0](x))
        for name, prefix in (("student", ""), ("teacher", "teacher_")):
            for key in ("running_mean", "running_var", "num_batches_tracked"):
                torch.testing.assert_close(getattr(norm, prefix + key), getattr(reference[name], key))
        assert not torch.allclose(norm.running_var, norm.teacher_running_var)


def test_the_comparison_takes_inputs_of_low_precision_under_autocast():
    model = in_phase2(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)))
    x = torch.randn(4, 6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")
        student, _ = dual_forward(model, x)
        torch.testing.assert_close(student, dual_forward(model, x, "two_pass")[0])
    assert model.stacked_is_right is True


def test_the_comparison_does_not_touch_what_an_earlier_graph_needs():
    model = in_phase2(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)))
    earlier = model.eval()(torch.randn(4, 6))
    student, teacher = dual_forward(model, torch.randn(4, 6))
    (earlier.sum() + student.sum() + teacher.sum()).backward()


def test_a_decision_of_evaluation_is_made_again_in_training():
    class Mixes(nn.BatchNorm1d):
        """Left as it is: student and teacher would share a batch's statistics."""

    model = in_phase2(nn.Sequential(nn.Linear(6, 6), Mixes(6))).eval()
    x = torch.randn(8, 6)
    dual_forward(model, x)
    assert model.stacked_is_right is True
    with pytest.warns(UserWarning, match="falls back to two passes: outputs differ"):
        dual_forward(model.train(), x)
    assert model.stacked_is_right is False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dual_forward(model, x)
        dual_forward(model.eval(), x)


def test_outputs_keep_their_kind_of_dict():
    class Out(OrderedDict):
        """As transformers' ModelOutput: entries are attributes too."""

        def __setitem__(self, key, value):
            super().__setitem__(key, value)
            self.__dict__[key] = value

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, x):
            return Out(logits=self.linear(x))

    model = in_phase2(Model())
    x = torch.randn(4, 6)
    for one, other in zip(dual_forward(model, x, "stacked"), dual_forward(model, x, "two_pass"), strict=True):
        assert type(one) is Out
        torch.testing.assert_close(one.logits, other.logits)
