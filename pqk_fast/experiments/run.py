"""Run a recipe's stages and write its record: vanilla, phase 1, then phase 2 and finetune from the same phase 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pqk_fast.branches import pqk_layers
from pqk_fast.callbacks import Callback
from pqk_fast.checkpoint import Checkpoints
from pqk_fast.config import ConfigError, Recipe, to_dict
from pqk_fast.data.load import Splits
from pqk_fast.models import create_model
from pqk_fast.record import environment, write_record
from pqk_fast.trainer import Trainer
from pqk_fast.training.loop import StageResult, copy_of_state
from pqk_fast.training.metrics import accuracy, layer_statistics
from pqk_fast.training.ranks import Ranks

# In this order: phase 2 and finetune start from copies of phase 1's network. The pairs see the same batches.
STAGE_SEEDS = {"vanilla": 0, "phase1": 0, "finetune": 1, "phase2": 1}
# (stage, view of it) -> its name in the record and in the paper's tables
RESULT_NAMES = {
    ("vanilla", "validation"): "vanilla",
    ("phase1", "validation"): "phase1_p",
    ("phase2", "validation"): "phase2_p",
    ("phase2", "validation_f"): "phase2_f",
    ("finetune", "validation"): "finetune",
}


def _measure(result: StageResult, view: str, splits: Splits, ranks: Ranks) -> dict[str, Any]:
    """Accuracy of the last epoch and of the best one by validation; the test split is looked at here only."""
    model, forward = result.model, result.views[view]
    last = {"validation": result.rows[-1][view], "testing": accuracy(model, splits.testing, forward, ranks)}
    if view not in result.best:
        return {"last": last, "best_dev": {"validation": None, "testing": None, "epoch": None}}
    row, state = result.best[view]
    final = copy_of_state(model)
    model.load_state_dict(state)
    testing = accuracy(model, splits.testing, forward, ranks)
    best = {"validation": row[view], "testing": testing, "epoch": row["epoch"]}
    model.load_state_dict(final)
    return {"last": last, "best_dev": best}


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
    if splits.classes != recipe.data.classes:
        raise ConfigError(f"data.classes is {recipe.data.classes}, but {recipe.data.name} has {splits.classes} classes")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    model = create_model(recipe.model, recipe.data.classes)
    first = Trainer(model, recipe, device=device, out=out, callbacks=callbacks, resume=resume, **options)
    ranks, last = first.ranks, first
    for stage, offset in STAGE_SEEDS.items():
        if stage in recipe.stages:
            # Each stage's draws, dropout too, depend on the seed alone and not on which stages ran before. Ranks see
            # different samples, and drop different units.
            seed = 2 * recipe.seed + offset
            torch.manual_seed(seed + 1_000_003 * ranks.rank)
            last = first if stage == "phase1" else first.copy()
            getattr(last, stage)(splits.train(seed), splits.validation)
    results = {
        name: _measure(first.results[stage], view, splits, ranks)
        for (stage, view), name in RESULT_NAMES.items()
        if stage in first.results
    }
    record: dict[str, Any] = {
        "recipe": to_dict(recipe),
        "options": asdict(first.options),
        **environment(),
        "device": str(device),
        "seed": recipe.seed,
        "data": {"name": recipe.data.name, **splits.sizes},
        "curves": {stage: result.rows for stage, result in first.results.items()},
        "results": results,
        "seconds": {stage: result.seconds for stage, result in first.results.items()},
    }
    if pqk_layers(last.model):
        layers = layer_statistics(last.model)
        record["kept_fraction"] = sum(x["kept"] for x in layers) / sum(x["weights"] for x in layers)
        record["layers"] = layers
    if ranks.main:
        write_record(out / "record.json", record)
    return record
