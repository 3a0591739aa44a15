"""A recipe's stages as tasks, named by all that their results depend on: equal ones are trained once.

Phase 2, finetuning and every other student that starts from one phase 1 share it, as recipes share a vanilla network.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Any

from pqk_fast.config import DistillConfig, FinetuneConfig, Phase2Config, PhaseConfig, PQKConfig, Recipe

# Stages of one offset see the same batches, those of phase 1 and of what is compared with it.
STAGE_SEEDS = {"vanilla": 0, "phase1": 0, "finetune": 1, "distill": 1, "phase2": 1}
NEEDS = {"phase2": ("phase1",), "finetune": ("phase1",), "distill": ("phase1", "vanilla")}


@dataclass(frozen=True)
class Task:
    """One stage, as the part of a recipe on which it depends, and the tasks whose networks it starts from.

    ``parents``' first is the one whose network goes on; a second one is a teacher.
    """

    stage: str
    recipe: Recipe
    parents: tuple[Task, ...] = field(default=(), repr=False)

    @cached_property
    def key(self) -> str:
        """Of the stage, its settings and its parents': 16 hexadecimal digits.

        Settings at their defaults are left out, so that it stays the same when later versions have more of them.
        """
        content = [self.stage, _changed(self.recipe), [parent.key for parent in self.parents]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def steps(self) -> int:
        """Optimizer steps, without those of the parents."""
        recipe = self.recipe
        phase = {"vanilla": recipe.vanilla or recipe.phase1, "phase1": recipe.phase1}.get(self.stage, recipe.phase2)
        return phase.steps

    @property
    def folder(self) -> str:
        """A name that says what it is and is the task's own."""
        recipe = self.recipe
        network = "" if self.stage == "vanilla" else f"-w{recipe.pqk.bits}-p{100 * recipe.pqk.sparsity:.3g}"
        return f"{recipe.model}{network}-{self.stage}-s{recipe.seed}-{self.key[:8]}"


def _changed(config: Any) -> dict[str, Any]:
    """A config's settings that are not at their defaults, as nested plain dicts."""
    changed = {}
    for entry in fields(config):
        value = getattr(config, entry.name)
        if entry.type == "float":
            value = float(value)  # 1 is 1.0
        default = entry.default_factory() if entry.default_factory is not MISSING else entry.default
        if value != default:
            changed[entry.name] = _changed(value) if is_dataclass(value) else value
    return changed


def tasks_of(recipe: Recipe) -> dict[str, Task]:
    """A task for each of the recipe's stages, by stage, in an order in which they can be trained.

    Settings on which a stage does not depend are set to their defaults, the name and the description too.
    """
    tasks: dict[str, Task] = {}
    for stage in STAGE_SEEDS:
        if stage not in recipe.stages:
            continue
        needs = NEEDS.get(stage, ())
        if stage == "phase1" and recipe.phase1_start == "vanilla":
            needs = ("vanilla",)
        tasks[stage] = Task(stage, _what_matters(recipe, stage, needs), tuple(tasks[need] for need in needs))
    return tasks


def _what_matters(recipe: Recipe, stage: str, needs: tuple[str, ...]) -> Recipe:
    default = Phase2Config()
    stages = (*needs, stage)
    if recipe.phase1_start == "vanilla" and "vanilla" not in stages:
        stages = ("vanilla", *stages)
    # a plain network has no step sizes
    plain = replace(
        recipe.vanilla or recipe.phase1, step_lr_scale=default.step_lr_scale, step_lr_rule=default.step_lr_rule
    )
    own = replace(
        recipe,
        name=stage,
        description="",
        stages=stages,
        vanilla=plain if "vanilla" in stages else None,
        finetune=recipe.finetune if stage == "finetune" else FinetuneConfig(),
        distill=recipe.distill if stage == "distill" else DistillConfig(),
    )
    if stage == "vanilla":
        return replace(own, pqk=PQKConfig(), phase1=PhaseConfig(), phase2=Phase2Config(), phase1_start="scratch")
    if stage == "phase1":
        return replace(own, phase2=Phase2Config())
    if stage == "finetune":  # cross-entropy alone, with phase 2's schedule and a rate of its own
        return replace(own, phase2=finetuning(own.phase2))
    if stage == "distill":
        return replace(own, phase2=_without(own.phase2, *OF_THE_FULL_NET))
    return own


OF_THE_FULL_NET = ("distillation", "teacher_rest", "teacher_average", "forward")


def finetuning(phase: Phase2Config) -> Phase2Config:
    """What of phase 2's settings finetuning has a use for; the others as they are by default."""
    return _without(phase, "lr", "alpha", "beta", "temperature", *OF_THE_FULL_NET)


def _without(phase: Phase2Config, *names: str) -> Phase2Config:
    """With these settings as they are by default, and distillation from the first step."""
    return replace(phase, distill_start=0, **{name: getattr(Phase2Config(), name) for name in names})
