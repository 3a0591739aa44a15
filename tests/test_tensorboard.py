"""TensorBoard's scalars, read back as TensorBoard reads them."""

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import package
from torch import nn

from pqk_fast import PQKConfig, prepare
from pqk_fast.callbacks import Row
from pqk_fast.config import DataConfig, Phase2Config, PhaseConfig, Recipe
from pqk_fast.tensorboard import TensorBoardCallback
from pqk_fast.trainer import Trainer

Points = dict[str, list[tuple[int, float]]]


@pytest.fixture
def tensorboard() -> Any:
    return package("tensorboard")


with_tensorboard = pytest.mark.usefixtures("tensorboard")


def points(folder: Path) -> Points:
    """Tag -> its (step, value) pairs, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def row(step: int, **more: Any) -> Row:
    return {"epoch": step // 10, "step": step, "seconds": 1.5, "loss": 1 / step, "lr": 0.1, "validation": None, **more}


def steps_of(folder: Path, tag: str) -> list[int]:
    return [step for step, _ in points(folder)[tag]]


@with_tensorboard
def test_a_run_of_the_trainer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    recipe = Recipe(
        name="small",
        model="none",
        data=DataConfig(classes=3),
        pqk=PQKConfig(sparsity=0.5, mask_interval=4),
        phase1=PhaseConfig(steps=20, epoch_steps=10, lr_drops=(15,)),
        phase2=Phase2Config(steps=10, epoch_steps=5, lr_drops=(), distill_start=5),
    )
    batches = [(torch.randn(16, 8), torch.randint(3, (16,))) for _ in range(5)]
    results = Trainer(model, recipe, callbacks=[TensorBoardCallback(tmp_path, model)]).fit(batches, batches)
    shown = points(tmp_path)
    layer_tags = {f"{name}/{layer}" for name in ("kept", "step_size", "clipped_fraction") for layer in ("0", "3")}
    scalars = {"loss", "lr", "sparsity", "validation"}
    assert set(shown) == {f"phase1/{tag}" for tag in scalars | layer_tags} | {
        f"phase2/{tag}" for tag in scalars | layer_tags | {"validation_f"}
    }
    for stage, begin in (("phase1", 0), ("phase2", 20)):
        for name in scalars:
            expected = [(begin + r["step"], pytest.approx(r[name])) for r in results[stage].rows]
            assert shown[f"{stage}/{name}"] == expected
    kept = results["phase1"].rows[-1]["kept"]
    assert kept[0] != kept[1], "or the order of the layers would not show"
    assert [shown[f"phase1/kept/{layer}"][-1] for layer in ("0", "3")] == [(20, kept[0]), (20, kept[1])]


@with_tensorboard
def test_layers_are_counted_where_the_model_is_not_known_and_named_where_it_is_prepared_later(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight  # a row has one number for both
    named = TensorBoardCallback(tmp_path / "named", model)
    counted = TensorBoardCallback(tmp_path / "counted")
    prepare(model)
    for callback in (named, counted):
        callback.on_stage_start("phase1", 10)
        callback.on_epoch("phase1", row(10, kept=[5, 6]))
        callback.on_stage_end("phase1", 1.0)
    assert {tag for tag in points(tmp_path / "named") if "kept" in tag} == {"phase1/kept/0", "phase1/kept/2"}
    assert {tag for tag in points(tmp_path / "counted") if "kept" in tag} == {"phase1/kept/0", "phase1/kept/1"}


def stage(folder: Path, name: str, steps: int, epochs: list[int], done: int = 0) -> None:
    """A stage in a process of its own: rows after each of ``epochs`` steps."""
    # TensorBoard reads files in the order of their names: the second, then a number ("10" before "9") by the process.
    time.sleep(1 - time.time() % 1)
    callback = TensorBoardCallback(folder)
    callback.on_stage_start(name, steps)
    if done:
        callback.on_resume(name, done)
    for step in epochs:
        callback.on_epoch(name, row(step))
    callback.on_stage_end(name, 1.0)


@with_tensorboard
@pytest.mark.parametrize("done", [15, 20, 25])
def test_a_resumed_stage_shows_every_epoch_once(tmp_path: Path, done: int) -> None:
    """The checkpoint is that of step 15, 20 or 25; the process died at 38, after it had shown 30."""
    stage(tmp_path, "phase1", 40, [10, 20, 30])
    stage(tmp_path, "phase1", 40, [step for step in (20, 30, 40) if step > done], done)
    assert steps_of(tmp_path, "phase1/loss") == [10, 20, 30, 40]


@with_tensorboard
def test_a_later_process_puts_its_stages_where_they_belong(tmp_path: Path) -> None:
    stage(tmp_path, "vanilla", 20, [10, 20])
    stage(tmp_path, "phase1", 40, [20, 40])
    stage(tmp_path, "phase2", 30, [10])
    stage(tmp_path, "phase2", 30, [10, 20, 30], done=5)  # resumed
    assert {tag: [s for s, _ in values] for tag, values in points(tmp_path).items() if tag.endswith("loss")} == {
        "vanilla/loss": [10, 20],
        "phase1/loss": [40, 60],
        "phase2/loss": [70, 80, 90],
    }


@with_tensorboard
def test_a_run_from_the_start_hides_the_one_before(tmp_path: Path) -> None:
    for _ in range(2):
        stage(tmp_path, "phase1", 40, [10, 20, 30, 40])
        stage(tmp_path, "phase2", 20, [10, 20])
    stage(tmp_path, "phase1", 20, [10, 20])
    assert steps_of(tmp_path, "phase1/loss") == [10, 20]
    assert not points(tmp_path).get("phase2/loss")
    stage(tmp_path, "phase2", 20, [10, 20])
    assert steps_of(tmp_path, "phase2/loss") == [30, 40], "after the new, shorter phase 1"


@with_tensorboard
def test_the_file_is_closed_after_an_error_too(tmp_path: Path) -> None:
    callback = TensorBoardCallback(tmp_path)
    callback.on_stage_start("phase1", 20)
    callback.on_stage_end("phase1", 0.0)  # before the first epoch: nothing was opened
    assert not list(tmp_path.glob("events*"))
    callback.on_stage_start("phase1", 20)
    callback.on_epoch("phase1", row(10))
    writer = callback._writer
    assert steps_of(tmp_path, "phase1/loss") == [10], "shown at once, not only at the end"
    callback.on_stage_end("phase1", 1.0)
    assert callback._writer is None
    assert writer.file_writer is None, "SummaryWriter.close has run"


def test_without_tensorboard_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("torch.utils.tensorboard", "torch.utils.tensorboard.writer"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=r"needs the package tensorboard .*pip install 'pqk-fast\[tensorboard\]'"):
        TensorBoardCallback(tmp_path)
