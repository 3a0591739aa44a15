"""The progress display: what its line says, that it never wraps, and the time left of a resumed stage."""

import io
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from pqk_fast.callbacks import Callback, ProgressDisplay, Row, state_of

VANILLA: Row = {"epoch": 12, "step": 4321, "loss": 1.2345, "lr": 0.0123, "validation": 82.25}
PHASE1: Row = {**VANILLA, "sparsity": 0.8123, "step_size": [0.02, 0.03]}
PHASE2: Row = {**PHASE1, "validation_f": 83.11}
ROWS = [("vanilla", VANILLA), ("phase1", PHASE1), ("phase2", PHASE2), ("finetune", PHASE1)]


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def terminal(width: int, clock: Callable[[], float] | None = None) -> Console:
    options: dict[str, Any] = {"get_time": clock} if clock else {}
    return Console(file=io.StringIO(), force_terminal=True, width=width, _environ={}, color_system=None, **options)


def bar_lines(display: ProgressDisplay) -> list[str]:
    """What stands on the terminal now."""
    assert display._bar is not None
    lines = display.console.render_lines(display._bar.get_renderable())
    return ["".join(segment.text for segment in line) for line in lines]


def printed(display: ProgressDisplay) -> str:
    assert isinstance(display.console.file, io.StringIO)
    return display.console.file.getvalue()


@pytest.fixture
def display(request: pytest.FixtureRequest):
    """Stops the bar whatever happens: it captures what is printed."""
    display = ProgressDisplay(terminal(request.param))
    yield display
    display.on_stage_end("", 0.0)


@pytest.mark.parametrize("display", [30, 60, 80, 99, 100, 120, 200], indirect=True)
@pytest.mark.parametrize(("stage", "row"), ROWS)
def test_the_bar_is_one_line_at_any_width_and_says_all_from_80_columns_on(display, stage, row) -> None:
    width = display.console.width
    display.on_stage_start(stage, 9022)
    display.on_step(stage, 4320)
    display.on_epoch(stage, row)
    (line,) = bar_lines(display)
    assert len(line) <= width
    if width >= 80:
        expected = {
            "vanilla": "acc 82.2 %",
            "phase1": "acc 82.2 %  sparse 81.2 %  S 0.025",
            "phase2": "acc 82.2 / 83.1 %  sparse 81.2 %  S 0.025",
            "finetune": "acc 82.2 %  sparse 81.2 %  S 0.025",
        }[stage] + ("  loss 1.234" if width >= 100 else "")
        assert line.startswith(f"{stage} ")
        assert " 4321/9022 " in line
        assert line.endswith(f" {expected}")
        assert line.index(" 4321/9022 ") - len(f"{stage} ") >= 12, "room for a bar"
        display.on_stage_end(stage, 12345.6)
        kept = printed(display).rpartition("\x1b[2K")[2].strip("\n")  # what follows the bar's removal
        assert kept == f"{stage:9} 12345.6 s  {expected}"
        assert len(kept) <= width


def test_the_state_says_what_there_is() -> None:
    row: Row = {"loss": 0.5}
    assert state_of(row, 80) == "loss 0.500"
    assert state_of({**row, "validation": None, "sparsity": 0.0, "step_size": []}, 80) == "sparse 0.0 %"


@pytest.mark.parametrize("done", [0, 9000])
def test_time_left_is_that_of_the_steps_that_this_process_took(done: int) -> None:
    """One second a step: a resumed stage of which 22 steps are left takes 22 seconds, not none."""
    clock = Clock()
    display = ProgressDisplay(terminal(120, clock))
    display.on_stage_start("phase1", 9022)
    try:
        assert display._bar is not None
        task = display._bar.tasks[0]
        clock.now += 5
        if done:
            display.on_resume("phase1", done)
        assert task.completed == done
        for step in range(done, done + 10):
            clock.now += 1
            display.on_step("phase1", step)
        assert task.completed == done + 10
        # rich counts from the first step on
        assert task.time_remaining == pytest.approx(9022 - done - 10, rel=0.01, abs=1)
    finally:
        display.on_stage_end("phase1", 1.0)


def test_a_log_has_one_whole_line_an_epoch_at_most_every_so_often(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("pqk_fast.callbacks.time.monotonic", clock)
    display = ProgressDisplay(Console(file=io.StringIO(), width=80, _environ={}), line_seconds=5.0)
    display.on_stage_start("phase2", 9022)
    display.on_resume("phase2", 4000)
    for epoch in range(3):
        display.on_step("phase2", epoch)
        display.on_epoch("phase2", {**PHASE2, "epoch": epoch})
        clock.now += 3
    display.on_stage_end("phase2", 9.0)
    row = "loss 1.234  lr 0.012  sparse 81.2 %  validation 82.2 %  full net 83.1 %"
    assert printed(display).splitlines() == [
        f"phase2    epoch   0  step  4321  {row}",
        f"phase2    epoch   2  step  4321  {row}",
        f"phase2       9.0 s  {row}",
    ]


def test_every_event_of_the_protocol_may_be_left_out() -> None:
    callback = Callback()
    callback.on_stage_start("phase1", 10)
    callback.on_resume("phase1", 5)
    callback.on_step("phase1", 5)
    callback.on_epoch("phase1", PHASE1)
    callback.on_stage_end("phase1", 1.0)
