"""Where a run of several stages stands: what its checkpoints say, and what the next one will."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pqk_fast.checkpoint import CheckpointError, Checkpoints
from pqk_fast.config import Recipe, recipe_from_dict
from pqk_fast.settings import ConfigError, check_choice, to_dict
from pqk_fast.training.ranks import Ranks
from pqk_fast.training.steps import PRECISIONS


@dataclass(frozen=True)
class Options:
    """How steps are computed, as against what is trained (the recipe): part of what a resumed run must repeat."""

    precision: str = "fp32"
    compile: bool = False
    capture: bool = False
    sync_batch_norm: bool = False
    world: int = 1

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, tuple(PRECISIONS))


class RunState:
    """The stages of a run: ``stages[name]`` is what is kept of each, ``position`` where the last one stands.

    Args:
        out: the run folder; None keeps all in memory.
        resume: go on from the newest whole checkpoint of ``out``, if there is one.

    Raises:
        FileExistsError: ``out`` has checkpoints and ``resume`` is False.
        ConfigError: the checkpoint is of another recipe, or of other options; the message names the first difference.
        CheckpointError: it can be evaluated, but not gone on with; or none can be read.
    """

    def __init__(
        self, recipe: Recipe, options: Options, ranks: Ranks, out: str | Path | None, keep: int, resume: bool
    ) -> None:
        self.recipe, self.options, self._ranks = to_dict(recipe), options, ranks
        self.files = None if out is None else Checkpoints(out, keep)
        self.stages: dict[str, dict[str, Any]] = {}
        self.position: dict[str, Any] | None = None
        self._begun: set[str] = set()
        if self.files is None:
            return
        found = bool(self.files.paths())
        if found and not resume:
            raise FileExistsError(
                f"{out} holds a run that was begun before: resume it (--resume, or resume=True), remove the folder, or "
                "choose another"
            )
        if found:
            self._take(self.files.newest())
        places = ranks.gather({name: entry["step"] for name, entry in self.stages.items()})
        if any(place != places[0] for place in places):
            raise CheckpointError(
                f"the ranks find different checkpoints in {out} ({places}): the run folder must be one that all share"
            )

    def _take(self, content: dict[str, Any]) -> None:
        if content["position"] is None:
            raise CheckpointError(
                "the checkpoint was written by a version that kept networks only: it can be evaluated, its training "
                "cannot go on; start it again in another folder"
            )
        for what, saved, own in (
            ("recipe", to_dict(recipe_from_dict(content["recipe"])), self.recipe),  # with settings that are new since
            ("options", content["options"], dataclasses.asdict(self.options)),
        ):
            if difference := first_difference(saved, own, what):
                raise ConfigError(f"the run cannot go on as another one: {difference}; give what it was started with")
        unfinished = not content["stages"][content["position"]["stage"]]["finished"]
        if unfinished and content["threads"] != torch.get_num_threads():
            warnings.warn(
                f"the run was begun with {content['threads']} threads and goes on with {torch.get_num_threads()}: it "
                "will not end in the same bits (OMP_NUM_THREADS)",
                stacklevel=5,
            )
        self.stages, self.position = content["stages"], content["position"]

    def position_in(self, stage: str) -> dict[str, Any] | None:
        """Where this stage stands, if it is the one that was last at work; asked once, it is forgotten."""
        if self.position is None or self.position["stage"] != stage:
            return None
        position, self.position = self.position, None
        return position

    def begin(self, stage: str) -> None:
        """Note that this process runs the stage, now or to its end; RuntimeError if it has done so before."""
        if stage in self._begun:
            raise RuntimeError(
                f"{stage} was begun by this trainer, or a copy of it, before: what it left would be mixed up with a "
                "new run. Make a new Trainer; with resume=True and the same folder it goes on where this one was"
            )
        self._begun.add(stage)

    def save(self, stage: str, entry: dict[str, Any], position: dict[str, Any]) -> None:
        """Keep a stage's entry; rank 0 writes the checkpoint, if there is a folder."""
        self.stages[stage] = entry
        if self.files is None or not self._ranks.main:
            return
        content = {
            "recipe": self.recipe,
            "options": dataclasses.asdict(self.options),
            "threads": torch.get_num_threads(),
            "stages": self.stages,
            "position": {"stage": stage, **position},
        }
        self.files.save(sum(entry["step"] for entry in self.stages.values()), content)

    @property
    def newest(self) -> Path | None:
        """The newest checkpoint's file, if one has been written."""
        paths = self.files.paths() if self.files is not None else []
        return paths[-1] if paths else None


def first_difference(saved: Any, own: Any, where: str) -> str | None:
    """Where two nested plain structures first differ, in words; tuples and lists are the same."""
    if isinstance(saved, dict) and isinstance(own, dict):
        for key in sorted({*saved, *own}):
            if key not in saved or key not in own:
                return f"{where}.{key} is in one of them only"
            if difference := first_difference(saved[key], own[key], f"{where}.{key}"):
                return difference
        return None
    if isinstance(saved, list | tuple) and isinstance(own, list | tuple):
        saved, own = list(saved), list(own)
    return None if saved == own else f"{where} was {saved!r}, now it is {own!r}"
