"""The README's tables of speed, from the suite's record.

    python bench/headlines.py [bench/results/bench.json]

Medians in ms, in brackets as a multiple of ours (of the best of ours in the first table); "other" is the fastest of all
the rest that does the same.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import figures
from figures import Row, best, candidates, number

COMMITTED = Path(__file__).parent / "results" / "bench.json"
# (what, of which benchmark, its case)
LINES = (
    ("fake-quantize 1 M weights, forward and backward", "peers", "fake-quant, 1 M"),
    ("the same, 16 M weights", "peers", "fake-quant, 16 M"),
    ("the same, all layers of res8-narrow at once", "fake_quant", "res8-narrow, all layers"),
    ("a phase-1 step of res8-narrow", "peers", "phase-1 step, res8-narrow"),
    ("the same in `channels_last`", "peers", "phase-1 step, res8-narrow, channels_last"),
    ("new masks, all layers of res8-narrow", "peers", "masks, res8-narrow, all layers"),
    ("new masks, 1 M weights", "peers", "masks, 1 M"),
    ("top-k mask of 10 M weights", "topk_mask", "10 M"),
    ("pack 16 M values to 4 bits", "int4", "pack_int4, 16 M"),
)
OURS, EAGER, COMPILED = "pqk_fast", "eager", "torch.compile"


def line(what: str, row: Row) -> str:
    """A row of the table, in Markdown."""
    found = {name: value for name, cell in candidates(row).items() if (value := figures.figure(cell))}
    same = {name: value for name, value in found.items() if not row[name].get("unchecked")}
    own = best({name: value for name, value in found.items() if figures.is_ours(name, row)})
    own = own if found[OURS].above(found[own]) else OURS  # another way of ours where it pays
    ours, way = found[own], own.removeprefix(OURS)

    def shown(name: str, label: str = "") -> str:
        if name not in found:
            return ""
        return f"{label}{number(found[name].median)} ({found[name].median / ours.median:.2f})"

    others = {n: v for n, v in same.items() if not figures.is_ours(n, row) and n not in (EAGER, COMPILED)}
    other = best(others) if others else ""
    cells = [what, f"**{number(ours.median)}**{way}", shown(EAGER), shown(COMPILED), shown(other, f"{other} ")]
    return f"| {' | '.join(cells)} |"


def table(record: Mapping[str, Any]) -> str:
    rows = [line(what, figures.cases(record["records"][name])[case]) for what, name, case in LINES]
    return "\n".join(["| ms | pqk_fast | eager PyTorch | torch.compile | other |", "|---|---|---|---|---|", *rows])


def latency(record: Mapping[str, Any]) -> str:
    """A row a network, a column a candidate, and the share of the roof."""
    rows = figures.cases(record["records"]["latency"])
    names = list(dict.fromkeys(name for row in rows.values() for name in candidates(row)))
    head = ["one input, one thread, ms", *names, "of the roof"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for case, row in rows.items():
        ours = row[OURS]["median_ms"]
        cells = [f"{number(row[name]['median_ms'])} ({row[name]['median_ms'] / ours:.2f})" for name in names]
        cells[names.index(OURS)] = f"**{number(ours)}**"
        lines.append(f"| {' | '.join([case, *cells, format(row[OURS]['of_roof'], '.0%')])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    made = figures.read(sys.argv[1] if len(sys.argv) > 1 else COMMITTED)
    print(table(made), latency(made), sep="\n\n")
