"""The page's part on other libraries, whose records the scripts of ``bench/peers/`` write."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import page_tables as tables
from figures import Record, Row, candidates, cases, figure

from pqk_fast.pages import Page, Table


def peers(record: Record, page: Page) -> None:
    """What each candidate is, their times, and bytes of memory and of files."""
    page.heading("Other libraries")
    threads = record.get("settings", {}).get("threads")
    page.text(
        "The same work by each library, in a process and an environment of its own (`bench/peers/`), taking turns"
        + (f", {threads} thread{'s' if threads != 1 else ''}" if threads else "")
        + ". What could not run is listed with its error below."
    )
    about = {name: one for name, one in record.get("candidates", {}).items() if "does" in one}
    if about:
        columns = list(dict.fromkeys(what for one in about.values() for what in one["does"]))
        table = Table("What each does", ("candidate", *columns, "torch", "version"))
        for name, one in about.items():
            does = [str(one["does"].get(what, "")) for what in columns]
            table.rows.append([name, *does, *versions(one.get("versions", {}), record.get("versions", {}))])
        page.table(table)
    by_unit: dict[str, dict[str, Row]] = {}
    for case, row in cases(record).items():
        found = [value.unit for cell in candidates(row).values() if (value := figure(cell))]
        by_unit.setdefault(found[0] if found else "ms", {})[case] = row
    for unit, rows in by_unit.items():
        page.table(tables.cases_table(unit, rows))


def versions(own: Mapping[str, str | None], usual: Mapping[str, str | None]) -> list[str]:
    """torch's, and that of the package which is in no other environment."""
    extra = [f"{name} {version}" for name, version in own.items() if name not in usual and version]
    return [str(own.get("torch") or ""), ", ".join(extra)]


def accuracy(record: Mapping[str, Any], page: Page) -> None:
    """``runs``: "NAME, ORDER, seed N" -> the result, or an error."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for key, run in record.get("runs", {}).items():
        name, order, _ = key.rsplit(", ", 2)
        found.setdefault((name, order), []).append(run)
    if not found:
        return
    page.heading("Accuracy at equal budget")
    page.text(
        "Testing accuracy (%) on speech, 4 bits and 90 % sparse: the same network on the same batches, for as many "
        f"steps at the same rates (those of the recipe {record['settings'].get('recipe')}, "
        f"{record['settings'].get('steps')} steps in the first stage), each library's quantizer and masks as it "
        'documents them. "after": pruned in fp32 first, then trained with 4 bits; "with": 4 bits from the '
        "beginning. After the last step, and at the best validation: means of the seeds."
    )
    table = Table("", ("candidate", "order", "testing, by seed", "mean", "at best validation", "file, bytes"))
    for (name, order), runs in found.items():
        done = [run for run in runs if "last" in run]
        if not done:
            table.rows.append([name, order, "failed", "", "", ""])
            continue
        last, best = ([run[moment]["testing"] for run in done] for moment in ("last", "best_dev"))
        sizes = dict.fromkeys(f"{run['file_bytes']:,}" for run in done if "file_bytes" in run)
        means = [f"{statistics.mean(values):.1f}" for values in (last, best)]
        table.rows.append([name, order, ", ".join(f"{value:.1f}" for value in last), *means, "; ".join(sizes)])
    page.table(table)
    seeds = [[run["last"]["testing"] for run in runs if "last" in run] for runs in found.values()]
    if spread := max((max(values) - min(values) for values in seeds if len(values) > 1), default=0.0):
        page.text(
            f"Seeds of one candidate differ by up to {spread:.1f} points: differences between candidates that are no "
            "larger, of one seed or a few, rank nobody."
        )
