"""``--compare A B``: whether ours became slower (or larger) from record A to record B, beyond what measuring varies.

A candidate of ours that is in both records has regressed if its median in B is above that in A by more than 5 % and by
more than the distance between the quartiles in A and in B, each; or if it had a figure in A and has an error in B. What
is measured once (memory, files) has no quartiles: there 5 % count alone. Of times the same must hold once they are
divided by what became of the case's other candidates, which a slower machine slows alike (at most by a fifth: nothing
that doubles is put down to the machine).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from figures import Figure, candidates, cases, figure, is_ours, other_change

from pqk_fast.pages import Table

LEAST, DRIFT = 0.05, 0.2


@dataclass(frozen=True)
class Change:
    benchmark: str
    case: str
    candidate: str
    before: Figure
    after: Figure | None  # None: an error in B
    error: str = ""
    others: float | None = None  # B's figures over A's, of the case's candidates that are not ours

    @property
    def ratio(self) -> float:
        return self.after.median / self.before.median if self.after and self.before.median else float("inf")

    @staticmethod
    def beyond(one: Figure, two: Figure) -> bool:
        """Whether ``two`` is above ``one`` beyond the spread."""
        rise = two.median - one.median
        return rise > LEAST * one.median and rise > one.spread and rise > two.spread

    def on_the_same_machine(self, after: Figure) -> Figure:
        """B's time as if the others had taken what they took in A."""
        slower = self.others if self.others and after.unit in ("ms", "minutes") else 1.0
        slower = min(max(slower, 1 - DRIFT), 1 + DRIFT)
        return Figure(after.median / slower, after.low / slower, after.high / slower, after.unit)

    @property
    def verdict(self) -> str:
        if self.after is None:
            return "REGRESSED: no figure"
        both = (self.after, self.on_the_same_machine(self.after))
        if all(self.beyond(self.before, after) for after in both):
            return "REGRESSED"
        return "improved" if all(self.beyond(after, self.before) for after in both) else "as before"

    @property
    def regressed(self) -> bool:
        return self.verdict.startswith("REGRESSED")


def changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Change]:
    """All candidates of ours that have a figure in A and an entry in B."""
    for benchmark, before in a["records"].items():
        there = cases(b["records"].get(benchmark, {}))
        for case, row in cases(before).items():
            if case not in there:
                continue
            for name, cell in candidates(row).items():
                one, entry = figure(cell), there[case].get(name)
                if one is None or not is_ours(name, row):
                    continue
                error = str(there[case].get("error", "")) if entry is None else str(entry.get("error", ""))
                two = figure(entry)
                if two is None and not error:
                    continue  # left out of B
                if two is not None and one.unit != two.unit:
                    raise ValueError(f"{benchmark}, {case}, {name}: {one.unit} in A and {two.unit} in B do not compare")
                yield Change(benchmark, case, name, one, two, error, other_change(row, there[case]))


def table_of(found: list[Change]) -> Table:
    columns = ("case", "candidate", "A", "B", "B / A", "others, B / A", "verdict")
    table = Table("B against A, ours: median (quartiles)", columns)
    for change in sorted(found, key=lambda change: (not change.regressed, -change.ratio)):
        others = "-" if change.others is None else f"{change.others:.2f}"
        after = said(change.after) if change.after else change.error
        ratio = f"{change.ratio:.2f}" if change.after else "-"
        case = f"{change.benchmark}: {change.case}"
        table.rows.append([case, change.candidate, said(change.before), after, ratio, others, change.verdict])
        if change.regressed:
            table.bold.add((len(table.rows) - 1, len(columns) - 1))
    return table


def said(value: Figure) -> str:
    spread = f" ({value.low:.4g}-{value.high:.4g})" if value.spread else ""
    return f"{value.median:.4g}{spread} {value.unit}"


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Change]:
    """ValueError if the records have no case in common, or were made with other sizes or threads."""
    for benchmark in a["records"].keys() & b["records"].keys():
        for setting in ("shrink", "threads"):
            values = [one["records"][benchmark].get("settings", {}).get(setting) for one in (a, b)]
            if values[0] != values[1]:
                raise ValueError(
                    f"{benchmark}: {setting} is {values[0]} in A and {values[1]} in B, so their times do not compare; "
                    "measure both in the same way"
                )
    found = list(changes(a, b))
    if not found:
        raise ValueError(
            f"nothing to compare: A has {', '.join(a['records']) or 'nothing'}, B has "
            f"{', '.join(b['records']) or 'nothing'}; give two records of the same benchmarks and sizes"
        )
    return found
