"""A teacher of its own: frozen, or learning from the student for a while; and phase 1 from the vanilla network."""

import copy
import os
import re
import signal
from functools import partial
from itertools import pairwise

import pytest
import torch
from ranks import on_ranks
from small_run import batches, net, recipe
from torch import nn

from pqk_fast import PQKConfig, cli, param_groups, reference
from pqk_fast.branches import pqk_layers
from pqk_fast.callbacks import Callback
from pqk_fast.checkpoint import load_checkpoint
from pqk_fast.commands import training
from pqk_fast.config import DistillConfig, Phase2Config, PhaseConfig
from pqk_fast.data.load import Splits
from pqk_fast.experiments import run as experiments
from pqk_fast.experiments.run import run_recipe
from pqk_fast.settings import to_dict
from pqk_fast.trainer import Trainer
from pqk_fast.training.interrupts import Interrupted
from pqk_fast.training.objectives import CrossEntropy, MutualDistillation, Objective, SeparateTeacher

STAGES = ("vanilla", "phase1", "distill")
PHASE2 = Phase2Config(
    steps=12, epoch_steps=4, lr_drops=(9,), weight_decay=1e-2, alpha=0.3, beta=0.7, temperature=3.0, distill_start=6
)


def short(co_study=0, **changes):
    options = {
        "stages": STAGES,
        "pqk": PQKConfig(bits=4, sparsity=0.5, mask_interval=4, scope="layer"),
        "phase1": PhaseConfig(steps=12, epoch_steps=6, lr_drops=()),
        "phase2": PHASE2,
        "distill": DistillConfig(co_study),
    }
    return recipe(**(options | changes))


def teacher_net(seed=5):
    """A float network with statistics that are not those of a fresh one."""
    model = net(seed)
    with torch.no_grad():
        for x, _ in batches(3):
            model(x)
    return model


class Watch(Callback):
    """Keeps the objective as it is before the first step, and what is to be seen of it after every one."""

    def begin(self, objective):
        self.objective, self.start, self.after = objective, copy.deepcopy(objective), []

    def on_step(self, stage, step):
        if stage == "distill":
            self.after.append(
                (
                    copy.deepcopy(self.objective.state_dict()),
                    {name: None if p.grad is None else p.grad.clone() for name, p in self.objective.named_parameters()},
                    self.objective.teacher_learns,
                    {module.training for module in self.objective.teacher.modules()},
                )
            )


def distilled(co_study=0, teacher=None, out=None, watch=None, resume=False, callbacks=(), **options):
    """A trainer after phase 1 and distillation from ``teacher``."""
    changes = {"phase2": options.pop("phase2", PHASE2)}
    watching = () if watch is None else (watch,)
    recipe = short(co_study, **changes)
    trainer = Trainer(net(), recipe, out=out, callbacks=(*watching, *callbacks), resume=resume, **options)
    if watch is not None:
        original = trainer._step
        trainer._step = lambda stage, before: watch.begin(stage.objective) or original(stage, before)
    trainer.phase1(batches(0), batches(1))
    trainer.distill(batches(0), batches(1), teacher_net() if teacher is None else teacher)
    return trainer


def assert_same(state, other):
    torch.testing.assert_close(dict(state), dict(other), rtol=0, atol=0)


def of_teacher(state):
    return {name.removeprefix("teacher."): value for name, value in state.items() if name.startswith("teacher.")}


# --- the objective


def test_what_every_objective_has():
    model = nn.Linear(4, 3)
    mutual = MutualDistillation(model, PHASE2, "two_pass")
    others = [Objective(model), CrossEntropy(model), SeparateTeacher(model, nn.Linear(4, 3), PHASE2)]
    for objective in (mutual, *others):
        assert isinstance(objective, Objective)
        assert objective.model is model
        assert objective.mode == ("two_pass" if objective is mutual else None)
        objective.set_step(7)
        assert (objective.further_parameters(), objective.further_state()) == ([], {})
        objective.load_further_state({})
    for objective in others:
        objective.choose_mode(torch.zeros(2, 4))
        assert objective.mode is None


@pytest.mark.parametrize("learns", [False, True], ids=["frozen", "co-study"])
def test_loss_and_gradients_by_hand(learns):
    """Eq. 9; while the teacher learns Eqs 9 and 10, each branch's targets being constants."""
    student, teacher = net(1), teacher_net()
    objective = SeparateTeacher(copy.deepcopy(student), copy.deepcopy(teacher), PHASE2, co_study=1 if learns else 0)
    x, y = batches(0)[0]
    weights = (PHASE2.alpha, PHASE2.beta, PHASE2.temperature)
    teacher.train(learns)
    z_student, z_teacher = student(x), teacher(x)
    expected = reference.student_loss(z_student, z_teacher, y, *weights)
    if learns:
        expected = expected + reference.teacher_loss(z_student, z_teacher, y, *weights)
    graphs = []
    objective.teacher.register_forward_hook(lambda module, args, out: graphs.append(out.requires_grad))
    loss = objective(x, y)
    assert graphs == [learns], "no memory for a backward that does not come"
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    for mine, by_hand, there in ((objective.model, student, True), (objective.teacher, teacher, learns)):
        for (name, parameter), other in zip(mine.named_parameters(), by_hand.parameters(), strict=True):
            assert (parameter.grad is not None) == there, name
            if there:
                torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-6)
    assert_same(objective.teacher.state_dict(), teacher.state_dict())  # BatchNorm's statistics, too


def test_further_state_is_a_copy_of_the_teacher_that_learns():
    objective = SeparateTeacher(net(1), teacher_net(), PHASE2, co_study=3)
    assert [id(p) for p in objective.further_parameters()] == [id(p) for p in objective.teacher.parameters()]
    state = objective.further_state()
    assert_same(state, teacher_net().state_dict())
    with torch.no_grad():
        for parameter in objective.teacher.parameters():
            parameter.add_(1)
    assert_same(state, teacher_net().state_dict())
    objective.load_further_state(state)
    assert_same(objective.teacher.state_dict(), teacher_net().state_dict())


# --- the trainer's stage


def test_a_frozen_teacher_stays_what_it_was():
    teacher, watch = teacher_net(), Watch()
    before = copy.deepcopy(teacher.state_dict())
    distilled(0, teacher, watch=watch)
    assert len(watch.after) == 12
    for state, grads, learns, mode in watch.after:
        assert_same(of_teacher(state), before)
        assert all(grad is None for name, grad in grads.items() if name.startswith("teacher."))
        assert (learns, mode) == (False, {False})
    assert_same(teacher.state_dict(), before)
    assert all(module.training for module in teacher.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("co_study", [0, 5])
def test_the_first_loss_and_step_by_hand(co_study):
    """From the first step: ``distill_start`` is phase 2's own. SGD, weight decay and momentum as in the schedule."""
    watch = Watch()
    one = Phase2Config(**{**to_dict(PHASE2), "steps": co_study + 1, "epoch_steps": 1, "distill_start": 0})
    trainer = distilled(co_study, watch=watch, phase2=one)
    objective = watch.start  # as it was before the first step
    student, teacher = objective.model.train(), objective.teacher.train(co_study > 0)
    x, y = batches(0)[0]
    weights = (PHASE2.alpha, PHASE2.beta, PHASE2.temperature)
    loss = reference.student_loss(student(x), teacher(x), y, *weights)
    if co_study:
        loss = loss + reference.teacher_loss(student(x), teacher(x), y, *weights)
    assert trainer.results["distill"].rows[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    groups = param_groups(student, one.lr, weight_decay=one.weight_decay)
    groups[0]["params"] += teacher.parameters() if co_study else []
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    loss.backward()
    optimizer.step()
    state, *_ = watch.after[0]
    for name, parameter in objective.named_parameters():
        torch.testing.assert_close(state[name], parameter.data, rtol=1e-5, atol=1e-6)


def test_masks_and_step_sizes_are_phase1s_and_kept_weights_alone_learn():
    watch = Watch()
    trainer = distilled(0, watch=watch, phase2=Phase2Config(**{**to_dict(PHASE2), "weight_decay": 0.0, "lr_drops": ()}))
    before, after = watch.start.model.state_dict(), trainer.model.state_dict()
    for name, layer in pqk_layers(trainer.model).items():
        mask = before[f"{name}.weight_mask"]
        assert torch.equal(after[f"{name}.weight_mask"], mask)
        assert torch.equal(after[f"{name}.weight_step"], before[f"{name}.weight_step"])
        moved = before[f"{name}.weight"] != after[f"{name}.weight"]
        assert not moved[~mask].any()
        assert moved[mask].float().mean() > 0.5
        assert layer.phase == 2
    for name in ("teacher_weight", "teacher_bias", "teacher_running_mean"):
        assert torch.equal(before[f"1.{name}"], after[f"1.{name}"]), "the full net does not run"


@pytest.mark.parametrize("co_study", [1, 5, 11])
def test_the_teacher_learns_for_so_many_steps_and_then_no_more(co_study):
    """Neither momentum nor weight decay moves it afterwards, nor do its statistics."""
    teacher, watch = teacher_net(), Watch()
    before = copy.deepcopy(teacher.state_dict())
    distilled(co_study, teacher, watch=watch)
    states = [before, *(of_teacher(state) for state, *_ in watch.after)]
    for step, (old, new) in enumerate(pairwise(states)):
        _, grads, learns, training = watch.after[step]
        assert (learns, training) == (step < co_study, {step < co_study})
        assert {grad is not None for name, grad in grads.items() if name.startswith("teacher.")} == {step < co_study}
        if step < co_study:
            assert not any(torch.equal(old[name], new[name]) for name in old), "all of it, statistics and counts too"
        else:
            assert_same(old, new)
    assert_same(teacher.state_dict(), before)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in teacher.parameters())


def test_a_learning_teacher_makes_another_student():
    frozen, learning, again = (distilled(co_study).model.state_dict() for co_study in (0, 5, 5))
    assert not torch.equal(frozen["0.weight"], learning["0.weight"])
    assert_same(learning, again)


class StopAt(Callback):
    def __init__(self, stop):
        self.stop = stop

    def on_step(self, stage, step):
        if stage == "distill" and step + 1 == self.stop:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("co_study", "stop"), [(0, 6), (5, 3), (5, 4), (5, 5), (5, 6), (5, 10)], ids=str)
def test_a_run_stopped_anywhere_ends_in_the_same_bits(tmp_path, co_study, stop):
    whole = Watch()
    expected = distilled(co_study, watch=whole)
    with pytest.raises(Interrupted, match=f"distill stopped after step {stop} of 12"):
        distilled(co_study, out=tmp_path, callbacks=[StopAt(stop)])
    assert load_checkpoint(tmp_path)["stages"]["distill"]["step"] == stop
    teacher, watch = teacher_net(), Watch()
    again = distilled(co_study, teacher, out=tmp_path, resume=True, watch=watch)
    assert len(watch.after) == 12 - stop
    for (state, *_), (other, *_) in zip(watch.after, whole.after[stop:], strict=True):
        assert_same(state, other)
    assert_same(again.model.state_dict(), expected.model.state_dict())
    for row, other in zip(again.results["distill"].rows, expected.results["distill"].rows, strict=True):
        assert {**row, "seconds": 0} == {**other, "seconds": 0}
    assert_same(teacher.state_dict(), teacher_net().state_dict())


@pytest.mark.parametrize("co_study", [0, 5])
def test_compiled_it_is_one_graph_for_each_kind_of_teacher(co_study, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    eager = distilled(co_study)
    counts = {}

    class Count(Callback):
        def on_step(self, stage, step):
            counts[stage, step] = torch._dynamo.utils.counters["stats"]["unique_graphs"]

    torch._dynamo.utils.counters.clear()
    compiled = distilled(co_study, compile=True, callbacks=[Count()])
    first = counts["phase1", 11]
    assert [counts["distill", step] - first for step in range(12)] == [1] * (co_study or 12) + [2] * (
        12 - (co_study or 12)
    )
    for row, other in zip(compiled.results["distill"].rows, eager.results["distill"].rows, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=0.02)
    torch.compiler.reset()


def test_mixed_precision():
    watch = Watch()
    rows = distilled(5, watch=watch, precision="bf16").results["distill"].rows
    assert rows[-1]["loss"] == pytest.approx(distilled(5).results["distill"].rows[-1]["loss"], abs=0.1)
    assert {value.dtype for value in of_teacher(watch.after[-1][0]).values()} == {torch.float32, torch.int64}


# --- what is refused


MANY = "distill.co_study, a teacher that learns for a while, is for one process, not captured"


def refused_on_rank():
    trainer = Trainer(net(), short(5))
    trainer.phase1(batches(0))
    with pytest.raises(ValueError, match=re.escape(MANY)):
        trainer.distill(batches(0), None, teacher_net())
    assert all(layer.phase == 1 for layer in pqk_layers(trainer.model).values()), "nothing has begun"
    frozen = Trainer(net(), short(0))
    frozen.phase1(batches(0))
    frozen.distill(batches(0), None, teacher_net())
    return {name: value.clone() for name, value in frozen.model.state_dict().items()}


def test_ranks_take_a_frozen_teacher_only():
    one, two = on_ranks(refused_on_rank)
    assert_same(one, two)


def test_a_learning_teacher_is_not_captured():
    trainer = Trainer(net(), short(5), capture=True)
    trainer.model = distilled(5).model
    with pytest.raises(ValueError, match=re.escape(MANY)):
        trainer.distill(batches(0), None, teacher_net())


def test_the_vanilla_network_has_its_own_schedule():
    whole = short(vanilla=PhaseConfig(steps=4, epoch_steps=2, lr=0.02, lr_drops=()))
    rows = Trainer(net(), whole).vanilla(batches(0)).rows
    assert [(row["step"], row["lr"]) for row in rows] == [(2, 0.02), (4, 0.02)]
    rows = Trainer(net(), short()).vanilla(batches(0)).rows
    assert [(row["step"], row["lr"]) for row in rows] == [(6, 0.1), (12, 0.1)]


# --- whole runs


def splits():
    sizes = {"train": 192, "validation": 192, "testing": 192}
    return Splits(lambda seed: batches(seed), batches(10), batches(11), sizes, ("a", "b", "c"), "0" * 16)


@pytest.fixture
def small_model(monkeypatch):
    monkeypatch.setattr(experiments, "create_model", lambda name, classes: net(torch.initial_seed()))


def starts(trainer_of_stage, monkeypatch):
    """Records, in ``trainer_of_stage``, each stage's weights before its first step."""
    original = Trainer._run

    def run(self, stage, train, val):
        trainer_of_stage[stage.name] = copy.deepcopy(stage.model.state_dict())
        if stage.name == "distill":
            trainer_of_stage["teacher"] = copy.deepcopy(stage.objective.teacher.state_dict())
        return original(self, stage, train, val)

    monkeypatch.setattr(Trainer, "_run", run)


@pytest.mark.parametrize("start", ["scratch", "vanilla"])
@pytest.mark.usefixtures("small_model")
def test_phase1_starts_where_the_recipe_says_and_the_vanilla_network_teaches(tmp_path, monkeypatch, start):
    seen = {}
    starts(seen, monkeypatch)
    record = run_recipe(short(5, phase1_start=start), splits(), tmp_path)
    saved = {name: stage["state"] for name, stage in load_checkpoint(tmp_path)["stages"].items()}
    first = saved["vanilla"] if start == "vanilla" else seen["vanilla"]
    for name, value in seen["phase1"].items():
        if name in first:
            assert torch.equal(value, first[name]), name
    assert not torch.equal(saved["vanilla"]["0.weight"], seen["vanilla"]["0.weight"])
    assert_same(seen["teacher"], saved["vanilla"])
    for name in ("0.weight", "0.weight_mask", "0.weight_step", "1.running_mean"):
        assert torch.equal(seen["distill"][name], saved["phase1"][name])
    assert set(record["results"]) == {"vanilla", "phase1_p", "distill"}
    assert [row["step"] for row in record["curves"]["distill"]] == [4, 8, 12]
    assert record["recipe"]["distill"] == {"co_study": 5}
    assert set(record["seconds"]) == set(STAGES)


@pytest.mark.usefixtures("small_model")
def test_a_whole_run_stopped_in_distill_goes_on(tmp_path):
    whole = short(5, phase1_start="vanilla")
    expected = run_recipe(whole, splits(), tmp_path / "whole")
    with pytest.raises(Interrupted):
        run_recipe(whole, splits(), tmp_path / "stopped", callbacks=[StopAt(3)])
    again = run_recipe(whole, splits(), tmp_path / "stopped", resume=True)
    assert again["results"] == expected["results"]
    assert_same(*(load_checkpoint(tmp_path / name)["stages"]["distill"]["state"] for name in ("whole", "stopped")))


@pytest.mark.usefixtures("small_model")
def test_eval_of_a_run_with_a_distill_stage(tmp_path, monkeypatch, capsys):
    whole = short(5, stages=(*STAGES, "phase2"))
    record = run_recipe(whole, splits(), tmp_path)
    monkeypatch.setattr(training, "create_model", lambda name, classes: net())
    monkeypatch.setattr(training, "load_splits", lambda recipe, data, device: splits())
    for split in ("validation", "testing"):
        assert cli.main(["eval", str(tmp_path), "--data", "x", "--split", split, "--device", "cpu"]) == 0
        printed = capsys.readouterr().out
        for name, result in record["results"].items():
            row = next(line for line in printed.splitlines() if f" {name} " in line)
            shown = [cell.strip() for cell in row.split("│")[2:4]]
            assert shown == [f"{result[moment][split]:.1f}" for moment in ("last", "best_dev")], name
    assert {"distill", "phase2_f"} <= set(record["results"])
