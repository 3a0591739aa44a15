"""The two phases end to end on a small problem, and what happens when training goes wrong."""

import math

import pytest
import torch
import torch.nn.functional as F
from small_run import batches, net, recipe
from torch import nn

from pqk_fast import PQKConfig, branch, convert, prepare, start_phase2
from pqk_fast.branches import pqk_layers
from pqk_fast.callbacks import Callback
from pqk_fast.checkpoint import load_checkpoint
from pqk_fast.config import Phase2Config, PhaseConfig
from pqk_fast.trainer import Trainer
from pqk_fast.training.loop import TrainingDivergedError
from pqk_fast.training.metrics import accuracy, confusion, layer_statistics


class Log(Callback):
    def __init__(self):
        self.events = []
        self.steps = 0

    def on_stage_start(self, stage, steps):
        self.events.append(("start", stage, steps))

    def on_step(self, stage, step):
        self.steps += 1

    def on_epoch(self, stage, row):
        self.events.append(("epoch", stage, row["step"]))

    def on_stage_end(self, stage, seconds):
        self.events.append(("end", stage))


def test_fit_runs_both_phases_and_ends_with_a_sparse_low_bit_student_and_its_teacher(tmp_path):
    log = Log()
    trainer = Trainer(net(), recipe(), out=tmp_path, callbacks=[log])
    results = trainer.fit(batches(0), batches(1))
    assert list(results) == ["phase1", "phase2"]
    assert [(r["epoch"], r["step"]) for r in results["phase1"].rows] == [(i, 20 * i) for i in range(1, 7)]
    assert [r["lr"] for r in results["phase1"].rows] == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.01, 0.01])
    sparsities = [r["sparsity"] for r in results["phase1"].rows]
    assert sparsities == sorted(sparsities)
    total = sum(layer.weight.numel() for layer in pqk_layers(trainer.model).values())
    assert sparsities[-1] == pytest.approx(int(0.7 * total) / total)
    assert [r["sparsity"] for r in results["phase2"].rows] == [sparsities[-1]] * 3
    assert results["phase2"].rows[-1]["validation"] > 85
    assert results["phase2"].rows[-1]["validation_f"] > 85
    assert log.steps == 180
    assert log.events[0] == ("start", "phase1", 120)
    assert log.events[-1] == ("end", "phase2")
    student = convert(trainer.model)
    for layer in (student[0], student[3]):
        assert layer.weight.unique().numel() <= 15
    saved = load_checkpoint(tmp_path)
    assert saved["stages"]["phase1"]["prepared"]
    assert set(saved["stages"]["phase2"]["best"]) == {"validation", "validation_f"}
    assert saved["stages"]["phase2"]["step"] == 60
    torch.testing.assert_close(saved["stages"]["phase2"]["state"], dict(trainer.model.state_dict()), rtol=0, atol=0)


def test_phase2_warms_up_with_cross_entropy_alone():
    """Before step s the loss is CE(student) + CE(teacher); afterwards alpha and beta of the recipe."""
    seen = {}
    for start in (0, 1, 2):
        trainer = Trainer(net(), recipe(phase2=Phase2Config(steps=3, epoch_steps=1, distill_start=start)))
        trainer.phase1(batches(0))
        model = trainer.model
        twin = trainer.copy()
        seen[start] = [row["loss"] for row in twin.phase2(batches(0)).rows]
        assert model is trainer.model is not twin.model
    x, y = batches(0)[0]
    trainer = Trainer(net(), recipe())
    trainer.phase1(batches(0))
    model = start_phase2(trainer.model)
    model.train()
    with torch.no_grad():
        logits = model(x), branch(model, "teacher")(x)
    plain = sum(float(F.cross_entropy(z, y)) for z in logits)
    assert seen[1][0] == pytest.approx(plain, rel=1e-5)
    assert seen[2][0] == pytest.approx(plain, rel=1e-5)
    assert seen[0][0] != pytest.approx(plain, rel=1e-3)
    assert seen[1][1] != pytest.approx(seen[2][1], rel=1e-3)


def test_finetune_keeps_masks_and_steps_and_touches_kept_weights_only():
    trainer = Trainer(net(), recipe(phase2=Phase2Config(steps=20, epoch_steps=20, weight_decay=0.0, distill_start=0)))
    trainer.phase1(batches(0))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.finetune(batches(0))
    after = trainer.model.state_dict()
    for name in ("0", "3"):
        mask = before[f"{name}.weight_mask"]
        assert torch.equal(mask, after[f"{name}.weight_mask"])
        assert torch.equal(before[f"{name}.weight_step"], after[f"{name}.weight_step"])
        moved = before[f"{name}.weight"] != after[f"{name}.weight"]
        assert not moved[~mask].any()
        assert moved[mask].float().mean() > 0.5


def test_vanilla_trains_a_float_model():
    trainer = Trainer(net(), recipe())
    result = trainer.vanilla(batches(0), batches(1))
    assert not pqk_layers(trainer.model)
    assert result.rows[-1]["validation"] > 85
    assert "sparsity" not in result.rows[-1]


def test_runs_repeat_bit_for_bit():
    states = []
    for _ in range(2):
        trainer = Trainer(net(), recipe())
        trainer.fit(batches(0), batches(1))
        states.append(trainer.model.state_dict())
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_best_epoch_of_phase1_is_never_one_that_was_denser_than_asked_for():
    trainer = Trainer(net(), recipe())
    row, state = trainer.phase1(batches(0), batches(1)).best["validation"]
    assert row["step"] == 120, "the only epoch whose end has the last mask"
    assert torch.equal(state["0.weight_mask"], trainer.model.state_dict()["0.weight_mask"])


def test_layer_statistics_by_hand():
    trainer = Trainer(nn.Linear(4, 1, bias=False), recipe())
    model = prepare(trainer.model, PQKConfig(bits=2))
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5, -3.0, 1.0, 9.0]]))
        model.weight_mask.copy_(torch.tensor([[True, True, True, False]]))
        model.weight_step.fill_(2.0)
    assert layer_statistics(model) == [
        {"name": "", "shape": [1, 4], "weights": 4, "kept": 3, "step_size": 2.0, "clipped_fraction": 1 / 3}
    ]


def test_a_model_prepared_otherwise_than_the_recipe_says_is_refused():
    with pytest.raises(ValueError, match="another config than the recipe's"):
        Trainer(prepare(net(), PQKConfig(bits=8)), recipe()).phase1(batches(0))


def test_accuracy_by_hand_and_without_data():
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(2))
    data = [
        (torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])),
        (torch.tensor([[2.0, 1.0]]), torch.tensor([0])),
    ]
    assert accuracy(model, data) == pytest.approx(100 * 2 / 3)
    assert accuracy(model, data, lambda x: -model(x)) == pytest.approx(100 / 3)
    assert model.training
    with pytest.raises(ValueError, match="nothing to evaluate"):
        accuracy(model, [])
    mixed = nn.Sequential(model, nn.BatchNorm1d(2).eval())
    accuracy(mixed, data)
    assert (model.training, mixed[1].training) == (True, False), "each module as it was"


def test_confusion_by_hand_and_without_data():
    """Rows are labels, columns what they were taken for; the diagonal is the accuracy."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Dropout(0.9))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3))
    taken_for = {0: (0, 2, 2), 2: (2, 2, 2, 2, 1)}  # label 1 is missing
    pairs = [(label, column) for label, columns in taken_for.items() for column in columns]
    x, y = torch.eye(3)[[column for _, column in pairs]], torch.tensor([label for label, _ in pairs])
    for size in (1, 3, 8):
        data = list(zip(x.split(size), y.split(size), strict=True))
        matrix = confusion(model, data, 3)
        assert matrix.tolist() == [[1, 0, 2], [0, 0, 0], [0, 1, 4]]
        assert (matrix.dtype, matrix.device.type) == (torch.int64, "cpu")
        assert 100 * int(matrix.trace()) / int(matrix.sum()) == accuracy(model, data) == 62.5
    assert confusion(model, data, 5)[:3, :3].tolist() == matrix.tolist()
    assert confusion(model, data, 3, lambda x: model(x).roll(1, -1)).tolist() == [[2, 1, 0], [0, 0, 0], [4, 0, 1]]
    assert model.training
    with pytest.raises(ValueError, match="nothing to evaluate"):
        confusion(model, [], 3)


def test_nan_input_stops_with_step_and_cause_and_keeps_the_last_good_checkpoint(tmp_path):
    good = batches(0, count=30)
    good[25][0][3, 2] = math.nan
    trainer = Trainer(net(), recipe(), out=tmp_path)
    with pytest.raises(
        TrainingDivergedError, match=r"phase1 stopped at step 25: the loss is nan; the input batch is not"
    ) as e:
        trainer.phase1(good, batches(1))
    assert str(tmp_path / "checkpoints") in str(e.value)
    saved = load_checkpoint(tmp_path)["stages"]["phase1"]
    assert saved["step"] == 20
    assert all(torch.isfinite(tensor).all() for tensor in saved["state"].values())


def test_divergence_names_the_layer():
    class Explodes(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            x = self.first(x)
            return self.third(self.second(x * math.inf if self.calls > 5 else x))

    with pytest.raises(TrainingDivergedError, match=r"vanilla stopped at step 5: .*layer 'second' gives the first"):
        Trainer(Explodes(), recipe()).vanilla(batches(0))
    weights = net()
    with torch.no_grad():
        weights[3].weight[0, 0] = math.inf
    with pytest.raises(TrainingDivergedError, match=r"step 0: .*parameter '3.weight' is not finite"):
        Trainer(weights, recipe()).vanilla(batches(0))


def test_weights_that_cannot_be_ranked_are_a_divergence_with_its_step():
    class Spoils(Callback):
        def on_step(self, stage, step):
            if step == 14:
                with torch.no_grad():
                    trainer.model[3].weight_mask.fill_(False)  # so that the loss stays finite
                    trainer.model[3].weight[0, 0] = math.inf

    trainer = Trainer(net(), recipe(), callbacks=[Spoils()])
    with pytest.raises(TrainingDivergedError, match=r"phase1 stopped at step 15: the weight of layer '3' .*parameter"):
        trainer.phase1(batches(0))


def test_too_large_a_learning_rate_is_caught():
    wild = recipe(phase1=PhaseConfig(steps=200, epoch_steps=20, lr=1e20, lr_drops=()))
    with pytest.raises(TrainingDivergedError, match=r"lower the learning rate \(now 1e\+20\)"):
        Trainer(net(), wild).vanilla(batches(0))


def test_no_training_data_is_an_error():
    with pytest.raises(ValueError, match="training data gives no batch"):
        Trainer(net(), recipe()).vanilla([])


def test_stage_end_is_told_after_an_interrupt():
    class Stop(Log):
        def on_step(self, stage, step):
            if step == 30:
                raise KeyboardInterrupt

    log = Stop()
    with pytest.raises(KeyboardInterrupt):
        Trainer(net(), recipe(), callbacks=[log]).vanilla(batches(0))
    assert log.events[-1] == ("end", "vanilla")
