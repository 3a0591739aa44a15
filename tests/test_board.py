"""The board of several tasks: its bars on a terminal, its lines elsewhere."""

import io
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Task as Bar

from pqk_fast.callbacks import Row
from pqk_fast.experiments.board import Board

FIRST, SECOND = "res8_narrow-vanilla-s0-0123abcd", "res8_narrow-w4-p90-phase1-s0-4567cdef"
TASKS = [(FIRST, 9022), (SECOND, 3123)]


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def row(step: int, **more: Any) -> Row:
    return {"epoch": 1, "step": step, "loss": 1.2345, "lr": 0.0123, "validation": 82.25, "seconds": 61.4, **more}


def board(width: int = 120, is_terminal: bool = True, clock: Clock | None = None, tasks: Any = TASKS) -> Board:
    options: dict[str, Any] = {"get_time": clock} if clock else {}
    console = Console(
        file=io.StringIO(), force_terminal=is_terminal, width=width, _environ={}, color_system=None, **options
    )
    return Board(tasks, console)


def printed(shown: Board) -> str:
    assert isinstance(shown.console.file, io.StringIO)
    return shown.console.file.getvalue()


def lines(shown: Board) -> list[str]:
    """What stands on the terminal now."""
    rendered = shown.console.render_lines(shown._progress.get_renderable())
    return ["".join(segment.text for segment in line) for line in rendered]


def bar(shown: Board, name: str) -> Bar:
    (found,) = [task for task in shown._progress.tasks if name in task.description]
    return found


@pytest.mark.parametrize("width", [30, 60, 80, 100, 160])
def test_a_terminal_has_a_line_for_all_and_one_for_each_task_at_work(width: int) -> None:
    with board(width) as shown:
        assert len(lines(shown)) == 1, "none is at work"
        shown.take((FIRST, 1, None))
        shown.take((SECOND, 400, None))
        shown.take((FIRST, 347, row(347)))
        every, first, second = lines(shown)
        assert max(map(len, (every, first, second))) <= width
        if width == 160:
            assert every.startswith("2 tasks ")
            assert " 747/12145 " in every
            assert first.startswith(f"{FIRST} ")
            assert " 347/9022 " in first
            assert first.endswith("acc 82.2 %  loss 1.234")
            assert second.startswith(f"{SECOND} ")
            assert " 400/3123 " in second
        shown.take((FIRST, 9022, row(9022)))
        every, second = lines(shown)
        assert " 9422/12145 " in every or width < 160
        assert SECOND in second or width < 80
    said = printed(shown)
    assert f"1/2 {FIRST}: 61 s  loss 1.234  lr 0.012  validation 82.2 %\n" in said
    assert "2/2" not in said


def test_one_task_is_one() -> None:
    with board(tasks=TASKS[:1]) as shown:
        assert lines(shown)[0].startswith("1 task ")


def test_elsewhere_there_is_a_line_at_each_end_and_few_between(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("pqk_fast.experiments.board.time.monotonic", clock)
    with board(40, is_terminal=False) as shown:
        for step in range(10, 100, 10):  # 5 seconds each
            shown.take((FIRST, step, row(step)))
            shown.take((FIRST, step + 1, None))
            clock.now += 5
        shown.take((SECOND, 3123, row(3123, sparsity=0.9)))
        shown.take((FIRST, 9022, row(9022)))
    what = "loss 1.234  lr 0.012  validation 82.2 %"
    assert printed(shown).splitlines() == [
        f"{FIRST}: step 50 of 9022  {what}",
        f"{FIRST}: step 90 of 9022  {what}",
        f"1/2 {SECOND}: 61 s  loss 1.234  lr 0.012  sparse 90.0 %  validation 82.2 %",
        f"2/2 {FIRST}: 61 s  {what}",
    ]


def test_a_terminal_gets_no_lines_between(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("pqk_fast.experiments.board.time.monotonic", clock)
    with board() as shown:
        for step in (10, 20, 30):
            shown.take((FIRST, step, row(step)))
            clock.now += 100
    assert "step 2" not in printed(shown)


def test_the_steps_of_an_earlier_process_take_no_time() -> None:
    """One second a step, of two tasks at once: those that are left take their seconds, not fewer."""
    clock = Clock()
    with board(clock=clock) as shown:
        for step in range(1, 11):
            shown.take((SECOND, step, None))
            clock.now += 1
        for step in range(11):
            shown.take((FIRST, 9000 + step, None))
            shown.take((SECOND, 11 + step, None))
            clock.now += 1
        assert bar(shown, FIRST).completed == 9010
        assert bar(shown, FIRST).time_remaining == pytest.approx(12, abs=1)
        assert bar(shown, SECOND).time_remaining == pytest.approx(3102, abs=1)
        assert bar(shown, "2 tasks").completed == 9010 + 21
        assert bar(shown, "2 tasks").time_remaining == pytest.approx((12 + 3102) / 2, rel=0.1)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_no_news_are_no_problem(is_terminal: bool) -> None:
    """A task that was finished but for its record tells nothing, one that failed stops in the middle."""
    with board(is_terminal=is_terminal) as shown:
        pass
    with board(is_terminal=is_terminal) as shown:
        shown.take((SECOND, 12, None))
    with board(is_terminal=is_terminal) as shown:
        shown.take((FIRST, 9022, row(9022, validation=None)))
        shown.take((FIRST, 9022, None))
    assert f"1/2 {FIRST}: 61 s  loss 1.234  lr 0.012\n" in printed(shown)
    assert f"2/2 {FIRST}" not in printed(shown), "a task ends with a row"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_an_error_passes_and_leaves_the_terminal_as_it_was(is_terminal: bool) -> None:
    shown = board(is_terminal=is_terminal)
    with pytest.raises(KeyError, match="nobody"), shown:
        shown.take(("nobody", 12, None))
    assert not shown._progress.live.is_started
    if is_terminal:
        assert printed(shown).rpartition("\x1b[?25l")[2].count("\x1b[?25h") == 1, "the cursor is back"


def test_brackets_are_text() -> None:
    with board(200, is_terminal=False, tasks=[("a[bold]b", 5)]) as shown:
        shown.take(("a[bold]b", 5, row(5)))
    assert "1/1 a[bold]b: 61 s" in printed(shown)
