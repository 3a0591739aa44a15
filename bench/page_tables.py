"""Tables of the benchmarks' page: cases by candidates, and steps by part and by way of computing it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from figures import WAYS, Beaten, Figure, Record, Row, beaten, best, candidates, errors, figure, groups, is_ours, number

from pqk_fast.pages import Table

SMALL = 0.05  # ms
# what a candidate leaves out, or does besides
NOTES = {
    "torch.topk": "finds the places only, makes no mask",
    "torch.kthvalue": "finds the threshold only, makes no mask",
    "numpy.partition": "finds the threshold only, makes no mask",
    "torch's own (clipped)": "always the clipped estimator",
    "onnxruntime int8": "rounds activations, too",
    "GGUF Q4_0": "another grid: rounds the weights again",
    "bitsandbytes NF4": "another grid: rounds the weights again",
}
# the columns of steps, in order
COLUMNS = ("", "torchaudio", "ours", "naive", "compiled", "ours, compiled", "naive, compiled")


def said(value: Figure) -> str:
    spread = f" ({number(value.low)}-{number(value.high)})" if value.spread else ""
    return number(value.median) + spread


def shown(cell: Any) -> str:
    value = figure(cell)
    if value is not None:
        return said(value)
    return "failed" if isinstance(cell, dict) and "error" in cell else ""


def ordered(rows: Mapping[str, Row]) -> list[str]:
    """All candidates, ours first, then as the records have them."""
    names = {name: is_ours(name, row) for row in rows.values() for name in candidates(row)}
    return sorted(names, key=lambda name: not names[name])


def cases_table(title: str, rows: Mapping[str, Row], first: str = "case", roof: bool = False) -> Table:
    """A row a case, a column a candidate; bold is the least of those that compute the same thing as one of ours.

    ``roof``: also the best of ours' share of it.
    """
    names = ordered(rows)
    table = Table(title, (first, *names, *(["ours, of the roof"] if roof else [])))
    for case, row in rows.items():
        cells = [shown(row.get(name)) for name in names]
        for group in groups(row):
            same = {name: value for name, value in group.others.items() if not row[name].get("unchecked")}
            if same:
                table.bold.add((len(table.rows), 1 + names.index(best(group.ours | same))))
        if roof:
            ours = {name: value for name in names if (value := figure(row.get(name))) and is_ours(name, row)}
            share = row[best(ours)].get("of_roof") if ours else None
            cells.append("" if share is None else f"{100 * share:.0f} %")
        table.rows.append([case, *cells])
    return table


def steps_table(title: str, row: Row, plain: str) -> Table:
    """A row a part of the step, a column a way to compute it, with the ratio to the plain network's; ``plain`` names
    the column of what has one way only."""
    found: dict[str, dict[str, str]] = {}
    for name in candidates(row):
        parts = name.split(", ")
        part = ", ".join(each for each in parts if each not in WAYS)
        way = ", ".join(each for each in parts if each in WAYS)
        ratio = row[name].get("ratio")
        found.setdefault(part, {})[way] = shown(row[name]) + (f": {ratio:.2f}" if ratio is not None else "")
    ways = {way for part in found.values() for way in part}
    columns = [*(way for way in COLUMNS if way in ways), *sorted(ways - set(COLUMNS))]
    table = Table(title, ("part", *(way or plain for way in columns)))
    table.rows = [[part, *(cells.get(way, "") for way in columns)] for part, cells in found.items()]
    return table


def beaten_table(records: Mapping[str, Record]) -> Table:
    """Every candidate that needs less than the best of ours, beyond the quartiles; the largest lead first."""
    table = Table(
        "Candidates that need less than the best of ours", ("case", "ours", "needs", "other", "needs", "times", "note")
    )
    found = [one for name, record in records.items() for one in beaten(name, record)]
    for one in sorted(found, key=lambda one: -one.times):
        unit = one.figure.unit
        note = remark(one)
        case = f"{one.benchmark}: {one.case}"
        needs = [f"{said(value)} {unit}" for value in (one.our_figure, one.figure)]
        table.rows.append([case, one.ours, needs[0], one.other, needs[1], f"{one.times:.2f}", note])
    return table


def remark(one: Beaten) -> str:
    notes = [NOTES[one.other]] if one.other in NOTES else ["computes something else"] if one.unchecked else []
    if one.our_figure.unit == "ms" and one.our_figure.median < SMALL:
        notes.append(f"under {SMALL:g} ms the call itself counts")
    return "; ".join(notes)


def errors_table(records: Mapping[str, Record]) -> Table:
    table = Table("Without a figure", ("case", "candidate", "error"))
    for benchmark, case, candidate, error in errors(records):
        table.rows.append([f"{benchmark}: {case}" if case else benchmark, candidate or "all", error])
    return table


def ranks_table(row: Row) -> Table:
    """The steps that were measured, by the number of ranks, and what the model of cost says of more."""
    kinds = dict.fromkeys(name.rpartition(", ")[0] for name in candidates(row) if name.endswith((" rank", " ranks")))
    table = Table("ms a step, the same batch on each rank", ("step", "1 rank", "2 ranks", "2 ranks / 1"))
    for kind in kinds:
        one, two = (figure(row.get(f"{kind}, {count}")) for count in ("1 rank", "2 ranks"))
        ratio = f"{two.median / one.median:.2f}" if one and two else ""
        table.rows.append([kind, *(said(value) if value else "failed" for value in (one, two)), ratio])
    return table


def model_table(model: Mapping[str, Any]) -> Table:
    predicted = model["predicted_ms"]
    table = Table("Phase 1, ours: the model of cost, ms a step", ("", *(f"{ranks} ranks" for ranks in predicted)))
    table.rows = [["predicted", *(number(value) for value in predicted.values())]]
    return table


def bullets(values: Mapping[str, Any], names: Sequence[str]) -> str:
    return ", ".join(f"{name} {values[name]}" for name in names if values.get(name) is not None)
