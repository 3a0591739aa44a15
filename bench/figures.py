"""What records say: figures with their spread, which candidates are ours, and where others need less.

A record's ``cases`` are rows by name; a row has, besides numbers about the case, a dictionary for each candidate, with
a time (median and quartiles), a peak of memory, a file's size, or an error.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
Record = Mapping[str, Any]

# where a candidate's figure stands, and its unit
KINDS = {
    "median_ms": "ms",
    "median_minutes": "minutes",
    "peak_mib": "MiB",
    "peak_bytes": "bytes",
    "file_bytes": "bytes",
    "bytes": "bytes",
}
OURS = {"features", "phase 1", "phase 2", "masks", "new masks"}  # in cases without a "pqk_fast"
WAYS = {"ours", "naive", "torchaudio", "compiled", "two_pass", "stacked"}  # of doing the same


@dataclass(frozen=True)
class Figure:
    """A median and its quartiles; what is measured once has no spread."""

    median: float
    low: float
    high: float
    unit: str

    @property
    def spread(self) -> float:
        return self.high - self.low

    def above(self, other: Figure) -> bool:
        """Larger, and the quartiles do not meet."""
        return self.median > other.median and self.low > other.high


@dataclass(frozen=True)
class Group:
    """Candidates of a case that do the same, so that they compare."""

    label: str
    ours: dict[str, Figure] = field(default_factory=dict)
    others: dict[str, Figure] = field(default_factory=dict)


@dataclass(frozen=True)
class Beaten:
    """A candidate that needs less than the best of ours in its case."""

    benchmark: str
    case: str
    ours: str
    our_figure: Figure
    other: str
    figure: Figure
    unchecked: bool  # it computes less, or something else

    @property
    def times(self) -> float:
        return self.our_figure.median / self.figure.median


def number(value: float) -> str:
    """Three digits, more only before the point."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def figure(cell: Any) -> Figure | None:
    """What a candidate's entry states; None for an error, or what is no candidate."""
    if not isinstance(cell, dict):
        return None
    for kind, unit in KINDS.items():
        if kind in cell:
            low, high = cell.get(f"quartiles_{unit}", (cell[kind], cell[kind]))
            return Figure(cell[kind], low, high, unit)
    return None


def cases(record: Record) -> Mapping[str, Row]:
    """The rows of a record; those of a whole cell are made from its summaries. None of what left no record."""
    if record.get("benchmark") != "cell" or "error" in record:
        found: Mapping[str, Row] = record.get("cases", {})
        return found

    def row(parts: Mapping[str, Mapping[str, float]], unit: str) -> Row:
        ranges = {who: (one["median"], [one["low"], one["high"]]) for who, one in parts.items()}
        return {who: {f"median_{unit}": m, f"quartiles_{unit}": q} for who, (m, q) in ranges.items()}

    steps, whos = record["ms_a_step"], list(record["minutes"])
    rows = {f"a step of {stage}": row({who: steps[who][stage] for who in whos}, "ms") for stage in steps[whos[0]]}
    return rows | {"the whole cell": row(record["minutes"], "minutes")}


def candidates(row: Row) -> dict[str, Mapping[str, Any]]:
    return {name: cell for name, cell in row.items() if isinstance(cell, dict) and (figure(cell) or "error" in cell)}


def split(candidate: str, row: Row) -> tuple[str, bool | None]:
    """The group of a candidate within its case, and whether it is ours (None: neither, as the plain network)."""
    parts = candidate.split(", ")
    if any(name == "pqk_fast" or name.startswith("pqk_fast, ") for name in row):
        return "", parts[0] == "pqk_fast"
    if "ours" in parts or "naive" in parts or (parts[0] == "features" and len(parts) > 1):
        return ", ".join(part for part in parts if part not in WAYS), "ours" in parts
    if parts == ["plain"] and "ours" in row:  # a whole cell, by a plain script
        return "", False
    return parts[0], True if parts[0] in OURS else None


def groups(row: Row) -> list[Group]:
    """Those of a case that have one of ours."""
    found: dict[str, Group] = {}
    for name, cell in candidates(row).items():
        label, ours = split(name, row)
        value = figure(cell)
        if value is not None and ours is not None:
            group = found.setdefault(label, Group(label))
            (group.ours if ours else group.others)[name] = value
    return [group for group in found.values() if group.ours]


def is_ours(candidate: str, row: Row) -> bool:
    return split(candidate, row)[1] is True


def best(figures: Mapping[str, Figure]) -> str:
    return min(figures, key=lambda name: figures[name].median)


def beaten(benchmark: str, record: Record) -> list[Beaten]:
    """Every candidate that is below the best of ours beyond the quartiles."""
    found = []
    for case, row in cases(record).items():
        for group in groups(row):
            ours = best(group.ours)
            for name, value in group.others.items():
                if group.ours[ours].above(value):
                    unchecked = bool(row[name].get("unchecked"))
                    found.append(Beaten(benchmark, case, ours, group.ours[ours], name, value, unchecked))
    return found


def tally(records: Mapping[str, Record]) -> dict[str, int]:
    """Comparisons of times, the best of ours with each other candidate that computes the same, by how they end."""
    count = {"ours": 0, "neither": 0, "others": 0}
    for record in records.values():
        for row in cases(record).values():
            for group in groups(row):
                ours = group.ours[best(group.ours)]
                for name, value in group.others.items():
                    if value.unit in ("ms", "minutes") and not row[name].get("unchecked"):
                        winner = "others" if ours.above(value) else "ours" if value.above(ours) else "neither"
                        count[winner] += 1
    return count


def errors(records: Mapping[str, Record]) -> Iterator[tuple[str, str, str, str]]:
    """(benchmark, case, candidate, error) of what has no figure; the candidate is "" for a whole case."""
    for benchmark, record in records.items():
        if "error" in record:
            yield benchmark, "", "", str(record["error"])
        for name, about in record.get("candidates", {}).items():  # that could not even start
            if "error" in about:
                yield benchmark, "", name, str(about["error"])
        for key, run in record.get("runs", {}).items():
            if "error" in run:
                yield benchmark, key, "", str(run["error"])
        for case, row in cases(record).items():
            for key in ("error", "skipped"):
                if isinstance(row.get(key), str):
                    yield benchmark, case, "", row[key]
            for name, cell in candidates(row).items():
                if "error" in cell:
                    yield benchmark, case, name, str(cell["error"])


def other_change(before: Row, after: Row) -> float | None:
    """By how much the candidates of a case that are not ours changed, at the median."""
    ratios = []
    for name, cell in candidates(before).items():
        one, two = figure(cell), figure(after.get(name))
        if one and two and one.median and not is_ours(name, before):
            ratios.append(two.median / one.median)
    return statistics.median(ratios) if ratios else None


def read(path: str | Path) -> dict[str, Any]:
    """A suite's record, or that of one benchmark as if it were one. ValueError says what was expected."""
    path = Path(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no record of benchmarks: it is torn or not JSON ({error})") from error
    if isinstance(record, dict) and isinstance(record.get("records"), dict):
        return record
    if isinstance(record, dict) and isinstance(record.get("benchmark"), str):
        return {"records": {record["benchmark"]: record}}
    raise ValueError(
        f'{path} is no record of benchmarks: expected "records" (as pqk-fast bench writes) or "benchmark" (as '
        "bench/bench_*.py write); give a bench.json or a file of bench/results"
    )
