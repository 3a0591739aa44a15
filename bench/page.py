"""The benchmarks' page, made from one record (``bench.json``) alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import page_peers
import page_tables as tables
import plots
from figures import Figure, Record, Row, candidates, cases, figure, is_ours, tally

from pqk_fast.pages import Page

PART = " by a quarter"  # in the name of the case that checks how well a part stands for the whole
DOC = (
    "A time is the median of turns that all candidates of a case take in one process, in brackets its quartiles; a "
    "turn is as many calls as take 10 ms (5 on a GPU), after one that is not timed. So a machine that is busy for a "
    "while slows all candidates alike.",
    "The number of threads is fixed for each benchmark, and said in its section. On the CPU malloc keeps freed memory "
    "for the next tensor, as the trainer sets it, for all candidates; `PQK_FAST_MALLOC=default` leaves it alone. On a "
    "GPU calls are captured as one graph and replayed over as many sets of inputs as its L2 cache cannot hold.",
    "A candidate's first result is compared with ours; what computes something else gets no figure, or is marked.",
    "The roof is measured in the same turns: the bytes that a case must move at the rate of torch's copy of 256 MiB "
    "(512 on a GPU), or its arithmetic at that of torch's matrix product. More than 100 % means that data stayed in "
    "caches.",
    "Before the first figure the tests of the operations must pass.",
)


def make_page(record: Mapping[str, Any]) -> Page:
    """All sections; what was not measured is left out."""
    everything: dict[str, Record] = record["records"]
    records = {name: one for name, one in everything.items() if "error" not in one}
    page = Page("Benchmarks")
    _about(record, page)
    _kernels(records, page)
    _steps(records, page)
    if "scaling" in records:
        _scaling(cases(records["scaling"]), records["scaling"], page)
    _latency_and_files(records, page)
    if "cell" in records or "profile" in records:
        _end_to_end(records, page)
    if "peers" in records:
        page_peers.peers(records["peers"], page)
    if "peers-accuracy" in records:
        page_peers.accuracy(records["peers-accuracy"], page)
    _others(everything, page)
    page.heading("What is measured, and how")
    page.items(DOC)
    return page


def _about(record: Mapping[str, Any], page: Page) -> None:
    records = record["records"]
    if record.get("quick"):
        page.text("**A trial: small sizes and few turns. It shows that everything runs; its figures mean nothing.**")
    counts = tally(records)
    if total := sum(counts.values()):
        page.text(
            f"Of {total} comparisons of times, the best of ours with a candidate that computes the same, ours is less "
            f"in **{counts['ours']}**, the other in **{counts['others']}** (listed below), and in {counts['neither']} "
            "the quartiles meet."
        )
    hardware, versions = record["hardware"], record["versions"]
    gpu = f"{hardware['gpu']}, " if hardware.get("gpu") else ""
    lines = [
        f"Machine: {gpu}{hardware['cpu']}, {hardware['cores']} cores, {hardware['memory_gib']} GiB; load average "
        f"before the run {record['load_before']}.",
        f"Versions: {tables.bullets(versions, list(versions))}.",
        f"Measured: {_dates(records)}" + (f"; sources at {record['commit']}." if record.get("commit") else "."),
    ]
    if gate := record.get("gate"):
        lines.append(f"Tests of the operations before the first figure: {gate['summary']}.")
    page.items(lines)
    page.text("To repeat it, in a clone with the library built (`make install`), on a machine that does nothing else:")
    page.code("pqk-fast bench --all                # or: make bench\npqk-fast bench --compare A.json B.json")


def _dates(records: Mapping[str, Record]) -> str:
    """The benchmarks by the day on which they were measured."""
    days: dict[str, list[str]] = {}
    for name, record in records.items():
        days.setdefault(record["created"][:10] if "created" in record else "day not recorded", []).append(name)
    return "; ".join(f"{day}: {', '.join(names)}" for day, names in days.items())


def _settings(record: Record) -> str:
    settings = record.get("settings", {})
    threads = settings.get("threads", record.get("threads"))
    said = [f"{threads} thread{'s' if threads != 1 else ''}"] if threads else []
    said += [f"sizes divided by {settings['shrink']}"] if settings.get("shrink", 1) > 1 else []
    said += [f"without {', '.join(settings['without'])}"] if settings.get("without") else []
    return ", ".join(said)


def _picture(page: Page, name: str, make: Callable[[], bytes], caption: str) -> None:
    """A picture, or a line that says why there is none."""
    try:
        page.picture(name, make(), caption)
    except (ImportError, ValueError) as error:
        page.text(f"No picture: {error}.")


def _sized(rows: Mapping[str, Row], at: Callable[[str, Row], float]) -> dict[str, list[tuple[float, Figure]]]:
    """Each candidate's figures over the cases, by size."""
    series: dict[str, list[tuple[float, Figure]]] = {}
    for case, row in rows.items():
        for name in candidates(row):
            if value := figure(row[name]):
                series.setdefault(name, []).append((at(case, row), value))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in series.items()}


def _curves(
    page: Page,
    name: str,
    rows: Mapping[str, Row],
    title: str,
    caption: str,
    *,
    xlabel: str = "weights",
    unit: str = "ms",
    at: Callable[[str, Row], float] = lambda case, row: row["numel"],
) -> None:
    ours = {each for row in rows.values() for each in candidates(row) if is_ours(each, row)}
    order = sorted(ours, key=lambda each: (len(each), each))
    _picture(
        page, name, lambda: plots.against_size(_sized(rows, at), order, title, xlabel, f"{unit}, logarithmic"), caption
    )


def _dots(page: Page, name: str, row: Row, title: str, xlabel: str, caption: str) -> None:
    rows = {each: value for each in candidates(row) if (value := figure(row[each]))}
    ours = [each for each in rows if is_ours(each, row)]
    ordered = dict(sorted(rows.items(), key=lambda pair: pair[1].median))
    _picture(page, name, lambda: plots.side_by_side(ordered, ours, title, xlabel), caption)


def sized(case: str) -> bool:
    """One tensor, whose size the case says; not all layers of a network."""
    return "all layers" not in case


def _kernels(records: Mapping[str, Record], page: Page) -> None:
    about = {
        "fake_quant": (
            "Fake-quantization, ms, forward and backward",
            "Masked fake-quantization with a learned step size, 4 bits, 90 % pruned. Eager and compiled are the same "
            "equations in PyTorch.",
        ),
        "topk_mask": (
            "Top-k masks, ms",
            "Masks of the 10 % largest magnitudes of all weights, exactly. torch.topk, kthvalue and partition alone "
            "find the places or the threshold and make no mask; eager is kthvalue and a comparison (topk and scatter "
            "on a GPU).",
        ),
        "int4": ("Packing, ms", "Integers to nibbles and back, and mask bits."),
        "dual_forward": (
            "Student and teacher in one operation, ms",
            "Phase 2's layers, both branches, against two products of weights made in plain PyTorch (eager, compiled) "
            "and made by our operations.",
        ),
    }
    if not any(name in records for name in about):
        return
    page.heading("Kernels")
    for name, (title, text) in about.items():
        if name not in records:
            continue
        rows = cases(records[name])
        page.text(f"**{title}** ({_settings(records[name])}). {text}")
        page.table(tables.cases_table("", rows, roof=True))
        kind = {"fake_quant": "identity", "int4": "pack_int4"}.get(name, "")
        plotted = {case: row for case, row in rows.items() if kind in ["", *case.split(", ")] and sized(case)}
        if name != "dual_forward":
            what = f" ({kind})" if kind else ""
            _curves(page, name, plotted, f"{title}{what}", f"Time against size{what}; bars are quartiles.")


def _steps(records: Mapping[str, Record], page: Page) -> None:
    if not {"step", "overhead"} & set(records):
        return
    page.heading("Training steps")
    if "step" in records:
        page.text(
            f"Forward, loss, backward and optimizer ({_settings(records['step'])}); making the batch apart as "
            '"features". Median ms (quartiles): ratio to the plain network.'
        )
        for case, row in cases(records["step"]).items():
            page.table(tables.steps_table(case, row, "this library, or the plain network"))
    if "overhead" in records:
        page.text(
            f"What each part adds to a step ({_settings(records['overhead'])}): ours, and as one writes it by hand "
            "(`bench/naive.py`), eager and under torch.compile. Median ms (quartiles): ratio to the plain eager step."
        )
        for case, row in cases(records["overhead"]).items():
            page.table(tables.steps_table(case, row, "eager"))
            caption = f"{case}: a training step by what is computed; vermilion is ours, bars are quartiles."
            steps = {name: cell for name, cell in candidates(row).items() if "new masks" not in name}
            _dots(page, f"overhead-{case}", steps, f"A training step of {case}", "ms", caption)


def _scaling(rows: Mapping[str, Row], record: Record, page: Page) -> None:
    def under(prefix: str) -> dict[str, Row]:
        """The cases of one kind, without the kind in their names."""
        found = {case: row for case, row in rows.items() if case.startswith(prefix)}
        return {case.removeprefix(prefix).removeprefix(", ").strip(): row for case, row in found.items()}

    page.heading("Scaling")
    parts = {case: part for case, row in rows.items() for part in _parts(row) if PART not in case}
    page.text(
        f"Time against the number of weights, 20 k to 1 G ({_settings(record)}): the operations on one tensor, and "
        "phase 1's step of eight square linear layers with 64 rows. "
        + (
            "Memory did not hold all of these, so a part was computed and times multiplied: "
            + ", ".join(f"{case} ({100 * part:.0f} %)" for case, part in parts.items())
            + "."
            if parts
            else "Memory held all of them whole."
        )
    )
    titles = {"fake-quant": "Fake-quantization", "top-k": "Top-k masks", "phase 1": "A phase-1 step"}
    for prefix, title in titles.items():
        sized = {case: row for case, row in under(prefix).items() if PART not in case}
        if sized:
            page.table(tables.cases_table(f"{title}, ms", sized, first="weights", roof=prefix != "phase 1"))
            caption = f"{title} against the number of weights; bars are quartiles."
            _curves(page, f"scaling-{prefix.replace(' ', '-')}", sized, title, caption)
    if checks := {case: row for case, row in rows.items() if PART in case}:
        page.text("How well a part stands for the whole: the same step whole, and by a quarter of its weights.")
        page.table(tables.cases_table("", checks))
    if batches := under("batch"):
        named = {case.partition(",")[0]: row for case, row in batches.items()}
        page.text("Against the batch: phase 1 of res8-narrow, without new masks in the median.")
        page.table(tables.cases_table("res8-narrow, ms a step", named, first="batch"))
        _curves(
            page,
            "scaling-batch",
            named,
            "A step of res8-narrow by batch",
            "Time of a step against the batch; bars are quartiles.",
            xlabel="batch",
            at=lambda case, row: float(case),
        )
    for case, row in under("ranks").items():
        _ranks(case, row, page)
    if memory := under("memory"):
        _memory(memory, page)


def _parts(row: Row) -> set[float]:
    return {cell["part"] for cell in candidates(row).values() if "part" in cell}


def _ranks(case: str, row: Row, page: Page) -> None:
    page.text(
        f"Against ranks: {case}, DistributedDataParallel over gloo, one thread a rank, the same batch on each; masks "
        "are made by every rank and cost no message."
    )
    page.table(tables.ranks_table(row))
    model = row.get("model")
    if model:
        rate = f"{model['mb_s']:,.0f} MB/s" if model["mb_s"] else "a rate too high to tell"
        page.text(
            f"The model: t(P) = t(1) + (P - 1) a + 2 (P - 1) / P n / b, with n = {model['gradient_bytes']:,} bytes of "
            f"gradients; measured on two ranks: a = {model['latency_us']:,.0f} us and b = {rate}. It assumes a core "
            "and a link like this one for every rank, a ring, and that nothing of the all-reduce hides behind "
            "backward. What it says of 2 ranks can be held against what was measured."
        )
        page.table(tables.model_table(model))


def _memory(rows: Mapping[str, Row], page: Page) -> None:
    page.heading("Memory")
    page.text(
        "The most that a training step holds, MiB: on the CPU the peak of a process's resident memory over five steps, "
        "less what was resident before the network was made, with malloc's defaults, so that freed tensors go back "
        '("recycled": with freed memory kept, as the trainer sets it); on a GPU the peak of torch\'s allocated bytes. '
        "Each in a process of its own, measured once. Sizes are stacks of eight linear layers, batch 64; res8 and "
        "res8-narrow have batch 64, resnet20 128."
    )
    page.table(tables.cases_table("", rows, first="network"))
    sized = {case: row for case, row in rows.items() if case[0].isdigit()}
    caption = "Peak memory of a training step against the number of weights."
    _curves(page, "memory", sized, "Peak memory of a step", caption, unit="MiB")


def _latency_and_files(records: Mapping[str, Record], page: Page) -> None:
    if "latency" in records:
        page.heading("Latency")
        page.text(
            f"One input at a time on the CPU ({_settings(records['latency'])}), ms: the student as one C++ call "
            "(`pqk_fast`), and the same student in other runtimes. onnxruntime's INT8 quantizes activations, too. "
            f"onnxruntime {records['latency'].get('settings', {}).get('onnxruntime') or 'was not installed'}."
        )
        page.table(tables.cases_table("", cases(records["latency"]), first="student"))
        for number, (case, row) in enumerate(cases(records["latency"]).items()):
            _dots(page, f"latency-{number}", row, case, "ms", f"Latency of {case}; bars are quartiles.")
    if "files" in records:
        page.heading("Files")
        page.text(
            "Bytes of the student, 90 % of each layer pruned, 4 bits, with weights as drawn at the start. GGUF Q4_0 "
            "and NF4 are counted by their definitions and would round the weights to another grid."
        )
        for kind in ("whole file", "weights alone"):
            rows = {
                case.removesuffix(f", {kind}"): row for case, row in cases(records["files"]).items() if kind in case
            }
            page.table(tables.cases_table(f"Bytes, {kind}", rows, first="student"))
            for case, row in list(rows.items())[:1]:
                name, caption = f"files-{kind.split()[0]}", f"Bytes of {case}, {kind}."
                _dots(page, name, row, f"{case}: {kind}", "bytes", caption)


def _end_to_end(records: Mapping[str, Record], page: Page) -> None:
    page.heading("End to end")
    if "cell" in records:
        record = records["cell"]
        ratio = record["ratio"]
        page.text(
            f"A whole cell of the paper's tables ({record['model']}, {sum(record['steps'].values()):,} steps, "
            f"{_settings(record)}) by the trainer and by a plain PyTorch script, data, features, checks and "
            f"checkpoints included. Ours takes {ratio['median']} ({ratio['low']}-{ratio['high']}) of the plain "
            "script's time."
        )
        rows = cases(record)
        steps = {case: row for case, row in rows.items() if case.startswith("a step")}
        page.table(tables.cases_table("ms a step", steps))
        page.table(tables.cases_table("minutes", {case: row for case, row in rows.items() if case not in steps}))
    if "profile" in records:
        record = records["profile"]
        page.text(f"Where a step's time goes ({record['model']}), by the profiler: ms, and share of the step.")
        groups = dict.fromkeys(name for stage in record["stages"].values() for name in stage["groups"])
        table = tables.Table("", ("part", *record["stages"]))
        for group in groups:
            found = [stage["groups"].get(group) for stage in record["stages"].values()]
            table.rows.append([group, *(f"{one['ms']} ({100 * one['share']:.0f} %)" if one else "" for one in found)])
        page.table(table)


def _others(records: Mapping[str, Record], page: Page) -> None:
    page.heading("Where others are faster")
    faster = tables.beaten_table(records)
    if faster.rows:
        page.text(
            "Every candidate of this record whose median is below that of the best of ours in its case, with quartiles "
            "that do not meet; also where it takes less memory or fewer bytes."
        )
        page.table(faster)
    else:
        page.text("In this record no candidate is below the best of ours beyond the quartiles.")
    if (failed := tables.errors_table(records)).rows:
        page.heading("What could not be measured")
        page.table(failed)
