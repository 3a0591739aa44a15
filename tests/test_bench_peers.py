"""The comparison with other libraries: the protocol, cases on tiny sizes, and what happens where a peer cannot run.

No peer's environment is needed: pqk_fast and plain PyTorch stand for them.
"""

from __future__ import annotations

import importlib
import io
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

PEERS = Path(__file__).parent.parent / "bench" / "peers"
HERE = ("pqk_fast", "eager", "torch's own op")  # candidates that need no other environment, without the compiler

Import = Callable[[str], types.ModuleType]


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Import:
    """Imports a file of ``bench/peers`` as its scripts do."""
    monkeypatch.syspath_prepend(str(PEERS.parent))
    monkeypatch.syspath_prepend(str(PEERS))
    monkeypatch.setattr(sys, "path", list(sys.path))  # candidates.py adds to it
    return importlib.import_module


class Talk:
    """A worker in this process: give it requests, get its answers."""

    def __init__(self, peers: Import, name: str) -> None:
        self.lines = io.StringIO()
        self.worker = peers("worker").Worker(name, self.lines)
        self.worker.peer = peers("candidates").CANDIDATES[name].load()

    def ask(self, **request: Any) -> list[dict[str, Any]]:
        self.lines.seek(0)
        self.lines.truncate()
        self.worker.answer(request)
        return [json.loads(line) for line in self.lines.getvalue().splitlines()]


@pytest.fixture
def tiny(peers: Import, monkeypatch: pytest.MonkeyPatch) -> None:
    """A narrow network and a small batch."""
    work = peers("work")
    monkeypatch.setattr(work, "FAKE_QUANT", {"small": (6, 50)})
    monkeypatch.setattr(work.Step.__init__, "__defaults__", (4, 3, torch.contiguous_format))
    monkeypatch.setattr(work, "STEPS_BEFORE_FILE", 1)


def conv_weights(talk: Talk) -> list[torch.Tensor]:
    return [weight for weight in talk.worker.call.model.parameters() if weight.dim() == 4]


@pytest.mark.parametrize("name", HERE)
@pytest.mark.usefixtures("tiny")
def test_a_worker_answers(peers: Import, name: str) -> None:
    talk = Talk(peers, name)
    (ready,) = talk.ask(do="prepare", kind="fake_quant", case="small")
    assert ready["about"]["learned"] == 1
    assert 2 <= ready["about"]["levels"] <= 15
    (timed,) = talk.ask(do="time", times=2, settle=True)
    assert timed["seconds"] > 0
    for case in peers("compare").STEPS:
        (ready,) = talk.ask(do="prepare", kind="step", case=case)
        about = ready["about"]
        assert about["weights"] == 4 * 9 + 6 * 16 * 9 + 4 * 12
        assert about["pruned"] == pytest.approx(0.9, abs=1e-3)
        assert (2 <= about["levels"] <= 15, about["learned"]) == (True, 8)
        weights = {weight.is_contiguous(memory_format=peers("work").STEPS[case]) for weight in conv_weights(talk)}
        assert weights == {True}
    (asked,) = talk.ask(do="memory")
    assert asked["peak_bytes"] > 3 * 4 * 101 * 40 * 4  # one activation at least
    assert talk.ask(do="file")[0]["bytes"] > 0


@pytest.mark.usefixtures("tiny")
def test_what_a_worker_cannot_do_is_answered(peers: Import, capsys: pytest.CaptureFixture[str]) -> None:
    talk = Talk(peers, "eager")
    assert "nothing is prepared" in talk.ask(do="time", times=1, settle=False)[0]["error"]
    assert "no such request: 'peel'" in talk.ask(do="peel")[0]["error"]
    assert "no such kind of case: 'cake'" in talk.ask(do="prepare", kind="cake", case="small")[0]["error"]
    assert talk.ask(do="prepare", kind="fake_quant", case="large")[0]["error"].startswith("KeyError")
    assert "Traceback" in capsys.readouterr().err


def test_candidates_compute_the_same(peers: Import) -> None:
    """Values and gradients of the masked quantizer."""
    torch.manual_seed(0)
    weight, grad = torch.randn(6, 50), torch.randn(6, 50)
    mask = torch.rand(6, 50) > 0.5
    results = []
    for name in HERE:
        function, learned = peers("candidates").CANDIDATES[name].load().quantizer(weight, mask)
        w = weight.clone().requires_grad_()
        out = function(w)
        results.append([out.detach(), *torch.autograd.grad(out, [w, *learned], grad)])
    for other in results[1:]:
        for value, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(value, expected, atol=1e-4, rtol=1e-4)


def test_masks_of_torch_survive_another_quantizer(peers: Import) -> None:
    """As for peers without pruning: masks are lifted, layers changed, masks put on again, and made anew."""
    peer = peers("peer")

    class Rounding(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, (self.weight * 4).round() / 4, self.bias)

    class Rounds(peer.Requantized):
        def quantizer(self, weight: Any, mask: Any) -> Any: ...
        def export(self, model: Any, x: Any, folder: Any) -> Any: ...
        def _quantize(self, model: Any, x: Any) -> Any:
            assert not hasattr(model[0], "weight_mask")
            model[0].__class__ = Rounding
            return model

    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(16, 8)), torch.randn(2, 16)
    rounds = Rounds()
    model = rounds.add_masks(model, x)
    rounds.set_sparsity(model, 0.75)
    before = model[0].weight_mask.clone()
    assert int(before.sum()) == 32
    model = rounds.quantize(model, x)
    assert torch.equal(model[0].weight_mask, before)
    used = peer.used_weights(model, x)
    assert used["pruned"] >= 0.75
    assert used["levels"] <= 3  # within 1/4, rounded to quarters
    rounds.set_sparsity(model, 0.0)
    assert bool(model[0].weight_mask.all())


def test_peak_memory_is_what_is_held_at_once(peers: Import) -> None:
    class Step:
        def __init__(self) -> None:
            self.optimizer = types.SimpleNamespace(zero_grad=lambda: None)

        def __call__(self) -> None:
            first = torch.ones(1000, 100)
            second = first + 1
            del first
            second.mul(2)

    assert 800_000 <= peers("work").peak_bytes(Step()) < 801_000


def comparison(peers: Import, out: Path, *names: str, only: str) -> tuple[int, dict[str, Any]]:
    arguments = ["--peers", *names, "--only", only, "--rounds", "2", "--seconds", "0", "--out", str(out)]
    status = peers("compare").compare(arguments)
    return status, json.loads(out.read_text())


def test_a_peer_that_cannot_run_is_recorded(
    peers: Import, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that is not installed, one whose adapter fails, one that ends: ours is compared all the same."""
    candidates = peers("candidates")
    monkeypatch.setattr(candidates, "BUILD", tmp_path)
    dies = tmp_path / "nncf" / "bin" / "python"
    dies.parent.mkdir(parents=True)
    dies.write_text("#!/bin/sh\necho 'illegal instruction' >&2\nexit 7\n")
    dies.chmod(0o755)
    broken = tmp_path / "brevitas" / "bin" / "python"
    broken.parent.mkdir(parents=True)
    broken.symlink_to(sys.executable)  # without Brevitas
    monkeypatch.setattr(peers("install"), "BUILD", tmp_path)
    (tmp_path / "modelopt.json").write_text(json.dumps({"error": "RuntimeError: no such version", "seconds": 1.0}))
    names = ("pqk_fast", "torchao", "nncf", "brevitas", "modelopt")
    status, record = comparison(peers, tmp_path / "out.json", *names, only="masks, res8")
    about = record["candidates"]
    assert status == 0
    assert "install.py torchao" in about["torchao"]["error"]
    assert about["nncf"]["error"] == "its process ended with 7: illegal instruction"
    assert "ModuleNotFoundError" in about["brevitas"]["error"]
    assert about["modelopt"]["error"] == "not installed: RuntimeError: no such version"
    (row,) = record["cases"].values()
    assert set(row) == {"pqk_fast"}
    assert row["pqk_fast"]["ratio"] == 1.0
    assert about["pqk_fast"]["versions"]["torch"]
    assert "illegal instruction" in capsys.readouterr().out


def test_an_unknown_peer_is_refused(peers: Import, capsys: pytest.CaptureFixture[str]) -> None:
    for call in (peers("compare").compare, lambda arguments: peers("install").main(arguments[1:])):
        with pytest.raises(SystemExit) as stop:
            call(["--peers", "tensorflow"])
        assert stop.value.code == 2
        assert "unknown: tensorflow; known are" in capsys.readouterr().err


def test_a_failed_installation_leaves_its_error(
    peers: Import, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install = peers("install")
    monkeypatch.setattr(install, "BUILD", tmp_path)

    def fails(command: list[Any]) -> None:
        raise RuntimeError("pip install ended with 1: no such version")

    monkeypatch.setattr(install, "run", fails)
    assert install.main(["torchao"]) == 1
    assert "no such version" in capsys.readouterr().out
    assert "no such version" in install.installed("torchao")["error"]
    assert not install.is_current("torchao")


def test_every_peer_is_pinned(peers: Import) -> None:
    candidates, install = peers("candidates"), peers("install")
    for name in candidates.ENVIRONMENTS:
        lines = [line for line in install.requirements(name).splitlines() if line and not line.startswith("#")]
        assert lines
        assert all(line.count("==") == 1 for line in lines)
        assert not any(line.startswith("torch=") for line in lines)  # every candidate computes with ours


def test_the_schedule_is_the_recipes(peers: Import) -> None:
    training = peers("training")
    whole, trial = (training.recipe_of(training.RECIPE, steps, 1) for steps in (0, 902))
    assert (whole.phase1.steps, whole.phase2.steps, whole.seed) == (9022, 3123, 1)
    assert (trial.phase1.steps, trial.phase2.steps) == (902, 312)
    assert trial.phase1.lr_drops == (300, 600)
    assert (trial.phase2.distill_start, trial.phase2.teacher_rest, trial.phase2.teacher_average) == (150, 162, 75)


class Split:
    """Two classes, told apart by the sign of the first row."""

    def __init__(self, peers: Import) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(64, 101, 40, generator=generator)
        y = torch.arange(64) % 2
        self.batches = [(x + 2 * y[:, None, None] - 1, y)]
        self.validation = self.testing = self.batches

    def train(self, seed: int) -> list[Any]:
        return self.batches


@pytest.mark.parametrize("order", ["after", "with"])
def test_training_prunes_and_quantizes(peers: Import, monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    training = peers("training")
    monkeypatch.setitem(training.WIDTH, "res8_narrow", 6)
    said: list[str] = []
    peer = peers("candidates").CANDIDATES["eager"].load()
    result = training.Training(peer, training.recipe_of(training.RECIPE, 40, 0), Split(peers), order, said.append).run()
    assert result["last"]["testing"] > 90
    assert result["used"]["pruned"] >= 0.89
    assert result["used"]["levels"] <= 15
    assert result["best_dev"]["validation"] >= result["last"]["validation"]
    assert said[-1].startswith("finetune 14 of 14")
    assert result["file_bytes"] > 0


def test_accuracy_goes_on_where_it_was(
    peers: Import, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    accuracy = peers("accuracy")
    asked: list[tuple[str, str, int]] = []

    def trained(name: str, order: str, seed: int, options: Any) -> dict[str, Any]:
        asked.append((name, order, seed))
        if name == "torchao":
            return {"error": "RuntimeError: the loss is nan at step 3 of finetune"}
        accuracies = {"validation": 80.0, "testing": 75.0}
        return {"last": accuracies, "best_dev": accuracies, "data": {"fingerprint": "f"}}

    monkeypatch.setattr(accuracy, "trained", trained)
    out = ["--out", str(tmp_path / "out.json"), "--data", str(tmp_path)]
    assert accuracy.main([*out, "--peers", "pqk_fast", "eager", "--seeds", "1"]) == 0
    assert asked == [("pqk_fast", "phase 2", 0), ("pqk_fast", "finetune", 0), ("eager", "after", 0)]
    asked.clear()
    assert accuracy.main([*out, "--peers", "eager", "torchao", "--seeds", "1", "--orders", "after", "with"]) == 0
    assert asked == [("eager", "with", 0), ("torchao", "after", 0), ("torchao", "with", 0)]
    assert "the loss is nan" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        accuracy.main([*out, "--steps", "60"])
    assert "give another --out" in capsys.readouterr().err


@pytest.mark.parametrize(("order", "stage"), [("phase 2", "phase2"), ("finetune", "finetune")])
@pytest.mark.parametrize("recipe", ["kws-res8-narrow-w4-p90", "kws-res8-narrow-plus-w4-p90"])
def test_pqk_is_taken_from_records(peers: Import, recipe: str, order: str, stage: str) -> None:
    """Those in the repository that are of the recipe itself, and no others."""
    folder = PEERS.parent / "results" / "reproduce"
    found = peers("accuracy").from_records(folder, order, recipe, 0, "89b59065c02616aa")
    assert set(found) >= {0, 1, 2}
    assert all(stage in result["from"] and "w4-p90" in result["from"] for result in found.values())
    tracked = {
        json.loads((folder / result["from"]).read_text())["recipe"]["pqk"].get("step_tracking", 0)
        for result in found.values()
    }
    assert tracked == {10 if "plus" in recipe else 0}
    assert peers("accuracy").from_records(folder, order, recipe, 60, "89b59065c02616aa") == {}
    assert peers("accuracy").from_records(folder, order, recipe, 0, "other data") == {}
