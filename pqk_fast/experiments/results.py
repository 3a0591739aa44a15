"""What a folder of records says of a recipe's results, over seeds: the raw material of tables and pictures."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from pqk_fast.config import Recipe
from pqk_fast.experiments.run import RESULT_NAMES
from pqk_fast.experiments.runner import Runs
from pqk_fast.experiments.tasks import Task, tasks_of
from pqk_fast.recipe_files import load_recipe

STAGE_OF = {result: stage for (stage, _), result in RESULT_NAMES.items()}


@dataclass(frozen=True)
class Sample:
    """One figure for each seed."""

    values: dict[int, float]

    def __len__(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values.values())

    @property
    def spread(self) -> float | None:
        """The standard deviation of the sample (n - 1); None for fewer than two."""
        return statistics.stdev(self.values.values()) if len(self) > 1 else None

    def minus(self, other: Sample) -> Sample:
        """The differences, of the seeds that both have."""
        return Sample({seed: self.values[seed] - other.values[seed] for seed in self.values if seed in other.values})

    def of(self, seeds: Iterable[int]) -> Sample:
        """Those of these seeds alone."""
        return Sample({seed: self.values[seed] for seed in seeds if seed in self.values})

    def text(self, sign: bool = False) -> str:
        """Such as "81.2 ± 1.3", one figure without the spread, "-" for none."""
        if not self.values:
            return "-"
        mean = f"{self.mean:+.1f}" if sign else f"{self.mean:.1f}"
        return mean if self.spread is None else f"{mean} ± {self.spread:.1f}"


class Results:
    """The records of ``runs`` for recipes with the given ``settings`` (``KEY=VALUE``), seeds 0 to ``seeds`` - 1."""

    def __init__(self, runs: Runs, seeds: int, settings: Sequence[str] = ()) -> None:
        self.runs, self.seeds, self.settings = runs, range(seeds), tuple(settings)
        self._read = cache(load_recipe)  # several hundred times for one page

    def recipe(self, name: str, seed: int = 0, *settings: str) -> Recipe:
        return replace(self._read(name, (*self.settings, *settings)), seed=seed)

    def tasks(self, name: str, stages: Iterable[str], *settings: str) -> Iterator[Task]:
        """Those stages of a recipe for every seed."""
        for seed in self.seeds:
            tasks = tasks_of(self.recipe(name, seed, *settings))
            yield from (tasks[stage] for stage in stages if stage in tasks)

    def records(self, name: str, stage: str, *settings: str) -> dict[int, dict[str, Any]]:
        """By seed, those that there are."""
        found = {task.recipe.seed: self.runs.record(task) for task in self.tasks(name, [stage], *settings)}
        return {seed: record for seed, record in found.items() if record is not None}

    def sample(self, name: str, result: str, *settings: str, split: str = "testing", moment: str = "last") -> Sample:
        """A result's accuracy in percent after the last epoch, or of the best one on validation ("best_dev")."""
        records = self.records(name, STAGE_OF[result], *settings)
        values = {seed: record["results"][result][moment][split] for seed, record in records.items()}
        return Sample({seed: value for seed, value in values.items() if value is not None})
