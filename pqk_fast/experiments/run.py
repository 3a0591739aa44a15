"""Run a recipe's stages and write its record: vanilla, phase 1, then phase 2 and finetune from the same phase 1."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pqk_fast.branches import pqk_layers
from pqk_fast.callbacks import Callback
from pqk_fast.config import ConfigError, Recipe, to_dict
from pqk_fast.data.load import Splits
from pqk_fast.models import create_model
from pqk_fast.record import environment, write_record
from pqk_fast.trainer import StageResult, Trainer, accuracy, layer_statistics

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


def _measure(result: StageResult, view: str, splits: Splits) -> dict[str, Any]:
    """Accuracy of the last epoch and of the best one by validation; the test split is looked at here only."""
    model, forward = result.model, result.views[view]
    last = {"validation": result.rows[-1][view], "testing": accuracy(model, splits.testing, forward)}
    if view not in result.best:
        return {"last": last, "best_dev": {"validation": None, "testing": None, "epoch": None}}
    row, state = result.best[view]
    final = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    best = {"validation": row[view], "testing": accuracy(model, splits.testing, forward), "epoch": row["epoch"]}
    model.load_state_dict(final)
    return {"last": last, "best_dev": best}


def check_run(recipe: Recipe, out: str | Path) -> None:
    """What can be wrong before data is read: FileExistsError for a finished run, ValueError for the model's name."""
    if (Path(out) / "record.json").exists():
        raise FileExistsError(f"{out} holds a finished run (record.json): choose another folder or remove it first")
    create_model(recipe.model, recipe.data.classes)


def run_recipe(
    recipe: Recipe,
    splits: Splits,
    out: str | Path,
    device: str | torch.device = "cpu",
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any]:
    """Train every stage of the recipe; write ``record.json`` and ``checkpoint.pt`` into the folder ``out``.

    Vanilla and phase 1 start from the same weights and see the same batches; so do phase 2 and finetune.

    Raises:
        FileExistsError: ``out`` holds a finished run already.
        TrainingDivergedError: NaN or infinity.
    """
    check_run(recipe, out)
    if splits.classes != recipe.data.classes:
        raise ConfigError(f"data.classes is {recipe.data.classes}, but {recipe.data.name} has {splits.classes} classes")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    first = Trainer(
        create_model(recipe.model, recipe.data.classes), recipe, device=device, out=out, callbacks=callbacks
    )
    last = first
    for stage, offset in STAGE_SEEDS.items():
        if stage in recipe.stages:
            # each stage's draws, dropout too, depend on the seed alone and not on which stages ran before
            seed = 2 * recipe.seed + offset
            torch.manual_seed(seed)
            last = first if stage == "phase1" else first.copy()
            getattr(last, stage)(splits.train(seed), splits.validation)
    results = {
        name: _measure(first.results[stage], view, splits)
        for (stage, view), name in RESULT_NAMES.items()
        if stage in first.results
    }
    record: dict[str, Any] = {
        "recipe": to_dict(recipe),
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
    write_record(out / "record.json", record)
    return record
