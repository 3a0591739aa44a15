"""What ``pqk-fast reproduce`` can make, and the tasks that each of it needs."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from pqk_fast.experiments import paper
from pqk_fast.experiments.results import STAGE_OF, Results
from pqk_fast.experiments.tables import METHODS, table2_rows
from pqk_fast.experiments.tasks import Task
from pqk_fast.settings import ConfigError, nearest

TARGETS = ("table1", "table2", "fig2", "baselines")


def cells_of(target: str) -> list[str]:
    """The recipes of which a target is made."""
    if target == "table1":
        return [name.format(bits=f"w{bits}") for name in paper.COLUMNS for bits in (8, 4)]
    if target == "baselines":
        return list(dict.fromkeys(method.recipe for method in METHODS))
    return [paper.TABLE2_RECIPE]


def check_cells(targets: Collection[str], cells: Collection[str]) -> None:
    """ConfigError for a cell that none of the targets has."""
    known = {name for target in targets for name in cells_of(target)}
    for cell in cells:
        if cell not in known:
            raise ConfigError(f"{' and '.join(targets)} have no cell {cell!r}{nearest(cell, known)}")


def tasks_for(target: str, results: Results, cells: Collection[str]) -> Iterator[Task]:
    """The tasks of a target's cells, those with every seed of one stage together."""
    if target == "table1":
        for name in cells:
            yield from results.tasks(name, ("vanilla", "phase1", "phase2"))
    elif target == "baselines":
        for method in METHODS:
            if method.recipe in cells:
                yield from results.tasks(method.recipe, [STAGE_OF[method.result]])
    elif cells:
        for _, _, result, settings in table2_rows():
            if target == "table2" or settings in ((), ("finetune.lr=0.1",)):
                yield from results.tasks(paper.TABLE2_RECIPE, [STAGE_OF[result]], *settings)
