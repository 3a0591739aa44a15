"""Run a recipe's stages and write its record: vanilla and phase 1, then what starts from the same phase 1."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pqk_fast.branches import pqk_layers
from pqk_fast.callbacks import Callback
from pqk_fast.checkpoint import Checkpoints
from pqk_fast.config import Recipe
from pqk_fast.data.load import Splits
from pqk_fast.experiments.tasks import STAGE_SEEDS
from pqk_fast.models import create_model
from pqk_fast.record import environment, write_record
from pqk_fast.settings import ConfigError, to_dict
from pqk_fast.trainer import Trainer
from pqk_fast.training.loop import StageResult, copy_of_state
from pqk_fast.training.metrics import accuracy, confusion, layer_statistics
from pqk_fast.training.ranks import Ranks

# (stage, view of it) -> its name in the record and in the paper's tables
RESULT_NAMES = {
    ("vanilla", "validation"): "vanilla",
    ("phase1", "validation"): "phase1_p",
    ("phase2", "validation"): "phase2_p",
    ("phase2", "validation_f"): "phase2_f",
    ("finetune", "validation"): "finetune",
    ("distill", "validation"): "distill",
}
MOST_CLASSES = 40  # of a confusion matrix in a record


def _measure(result: StageResult, view: str, splits: Splits, ranks: Ranks) -> dict[str, Any]:
    """Accuracy of the last epoch and of the best one by validation; the test split is looked at here only."""
    model, forward = result.model, result.views[view]
    matrix = confusion(model, splits.testing, splits.classes, forward, ranks)
    testing = 100.0 * int(matrix.trace()) / int(matrix.sum())
    measured: dict[str, Any] = {"last": {"validation": result.rows[-1][view], "testing": testing}}
    if splits.classes <= MOST_CLASSES:
        measured["confusion"] = matrix.tolist()
    if view not in result.best:
        return {**measured, "best_dev": {"validation": None, "testing": None, "epoch": None}}
    row, state = result.best[view]
    final = copy_of_state(model)
    model.load_state_dict(state)
    testing = accuracy(model, splits.testing, forward, ranks)
    best = {"validation": row[view], "testing": testing, "epoch": row["epoch"]}
    model.load_state_dict(final)
    return {**measured, "best_dev": best}


def check_run(recipe: Recipe, out: str | Path, resume: bool = False) -> None:
    """What can be wrong before data is read: FileExistsError for another run, ValueError for the model's name."""
    if (Path(out) / "record.json").exists():
        raise FileExistsError(f"{out} holds a finished run (record.json): choose another folder or remove it first")
    if not resume and Checkpoints(out).paths():
        raise FileExistsError(
            f"{out} holds a run that was begun before: go on with --resume, choose another folder or remove it first"
        )
    create_model(recipe.model, recipe.data.classes)


def run_recipe(
    recipe: Recipe,
    splits: Splits,
    out: str | Path,
    device: str | torch.device = "cpu",
    callbacks: Sequence[Callback] = (),
    *,
    resume: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Train every stage of the recipe; write ``record.json`` and ``checkpoints`` into the folder ``out``.

    Vanilla and phase 1 start from the same weights and see the same batches; so do phase 2 and finetune. With
    ``resume`` a run that was interrupted goes on. ``options`` are those of :class:`Trainer`. Where torch.distributed is
    initialized all ranks call this, with their own parts of the splits, and rank 0 writes.

    Raises:
        FileExistsError: ``out`` holds a finished run already, or one that was begun, without ``resume``.
        TrainingDivergedError: NaN or infinity.
        Interrupted: SIGINT or SIGTERM; the checkpoint is written.
    """
    check_run(recipe, out, resume)
    check_classes(recipe, splits)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    first = Trainer(new_model(recipe), recipe, device=device, out=out, callbacks=callbacks, resume=resume, **options)
    last = first
    for stage in STAGE_SEEDS:
        if stage in recipe.stages:
            if stage == "phase1" and recipe.phase1_start == "vanilla":
                first.model = copy.deepcopy(first.results["vanilla"].model)
            last = first if stage == "phase1" else first.copy()
            teacher = first.results["vanilla"].model if stage == "distill" else None
            train_stage(last, stage, splits, teacher)
    record = record_of(last, splits)
    if first.ranks.main:
        write_record(out / "record.json", record)
    return record


def check_classes(recipe: Recipe, splits: Splits) -> None:
    if splits.classes != recipe.data.classes:
        raise ConfigError(f"data.classes is {recipe.data.classes}, but {recipe.data.name} has {splits.classes} classes")


def new_model(recipe: Recipe) -> nn.Module:
    """The network before training, which depends on the seed alone."""
    torch.manual_seed(recipe.seed)
    return create_model(recipe.model, recipe.data.classes)


def train_stage(trainer: Trainer, stage: str, splits: Splits, teacher: nn.Module | None = None) -> None:
    """One stage of the trainer's recipe, from the trainer's model; ``teacher`` is for "distill".

    Its draws, dropout too, depend on the recipe's seed alone and not on which stages ran before. Ranks see different
    samples, and drop different units.
    """
    seed = 2 * trainer.recipe.seed + STAGE_SEEDS[stage]
    torch.manual_seed(seed + 1_000_003 * trainer.ranks.rank)
    more = () if teacher is None else (teacher,)
    getattr(trainer, stage)(splits.train(seed), splits.validation, *more)


def record_of(trainer: Trainer, splits: Splits) -> dict[str, Any]:
    """The record of the stages that the trainer has been through; layers are those of its model."""
    recipe, stages = trainer.recipe, trainer.results
    record: dict[str, Any] = {
        "recipe": to_dict(recipe),
        "options": asdict(trainer.options),
        **environment(),
        "device": str(trainer.device),
        "seed": recipe.seed,
        "data": {"name": recipe.data.name, **splits.sizes, "fingerprint": splits.fingerprint},
        "curves": {stage: result.rows for stage, result in stages.items()},
        "results": {
            name: _measure(stages[stage], view, splits, trainer.ranks)
            for (stage, view), name in RESULT_NAMES.items()
            if stage in stages
        },
        "seconds": {stage: result.seconds for stage, result in stages.items()},
    }
    if len(splits.names) <= MOST_CLASSES:
        record["data"]["classes"] = list(splits.names)
    if pqk_layers(trainer.model):
        layers = layer_statistics(trainer.model)
        record["kept_fraction"] = sum(x["kept"] for x in layers) / sum(x["weights"] for x in layers)
        record["layers"] = layers
    return record
