"""The plain mode, which logs see. On a terminal the same calls feed rich's bars."""

from __future__ import annotations

import io

import pytest
from rich.console import Console as RichConsole

from pixrec import console as console_module
from pixrec.console import Console, Rate


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(console_module, "time", clock)
    return clock


def test_what_ends_at_once_is_said_once(clock: Clock, capsys: pytest.CaptureFixture[str]):
    with Console() as console:
        for done in range(1, 101):
            console.progress("embed", done, 100)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "embed 100/100\n")


def test_what_lasts_is_said_every_five_seconds(clock: Clock, capsys: pytest.CaptureFixture[str]):
    with Console() as console:
        for done in range(21):
            console.progress("embed", done, 100, "fast")
            clock.now += 1
    assert capsys.readouterr().err.splitlines() == [
        "embed 5/100 (0:01:35 left) fast",
        "embed 10/100 (0:01:30 left) fast",
        "embed 15/100 (0:01:25 left) fast",
        "embed 20/100 (0:01:20 left) fast",
    ]


def test_what_was_there_at_the_beginning_says_nothing_of_the_pace(clock: Clock, capsys: pytest.CaptureFixture[str]):
    with Console() as console:
        console.progress("embed", 900, 1000)
        clock.now += 6
        console.progress("embed", 900, 1000)
        clock.now += 6
        console.progress("embed", 910, 1000)
    assert capsys.readouterr().err.splitlines() == ["embed 900/1000", "embed 910/1000 (0:01:48 left)"]


def test_a_rate_counts_from_its_beginning(clock: Clock):
    rate = Rate()
    assert rate.add(5, "pictures/s") == "5 pictures/s", "the first second counts as one"
    clock.now += 10
    assert rate.add(11995, "pictures/s") == "1,200 pictures/s"


def test_what_fails_at_once_leaves_no_line(clock: Clock, capsys: pytest.CaptureFixture[str]):
    with Console() as console:
        console.progress("reading items", 0, None)
    assert capsys.readouterr().err == ""


def test_a_total_that_nobody_knows(clock: Clock, capsys: pytest.CaptureFixture[str]):
    with Console() as console:
        console.progress("reading", 0, None)
        clock.now += 5
        console.progress("reading", 7, None)
    assert capsys.readouterr().err == "reading\n"


def test_training_rows(clock: Clock, capsys: pytest.CaptureFixture[str]):
    with Console() as console:
        console.training({"part": "both", "step": 1, "total_steps": 9, "loss": 2.0, "loss_ut": 2.0, "seconds": 0.1})
        clock.now += 5
        console.training({"part": "both", "step": 2, "total_steps": 9, "loss": 1.5, "loss_ut": 1.25, "seconds": 0.1})
        console.training({"part": "text", "step": 4, "total_steps": 9, "valid_mrr": 0.25, "valid_recall@10": 0.5})
        console.training({"part": "text", "step": 4, "total_steps": 9, "seconds": 0.1})  # a validation without users
    assert capsys.readouterr().err.splitlines() == [
        "train both 2/9 (0:00:35 left) loss 1.500  loss_ut 1.250",
        "train text step 4: mrr 0.2500  recall@10 0.5000",
    ]


def test_a_line_is_said_as_it_is(capsys: pytest.CaptureFixture[str]):
    line = "[bold]not markup[/bold] " + "long " * 60
    with Console() as console:
        console.say(line)
    captured = capsys.readouterr()
    assert (captured.out, captured.err.rstrip("\n")) == ("", line)


def test_a_terminal_sees_bars(monkeypatch: pytest.MonkeyPatch):
    screen = io.StringIO()
    monkeypatch.setattr(
        console_module, "RichConsole", lambda stderr: RichConsole(file=screen, force_terminal=True, width=100)
    )
    with Console() as console:
        console.progress("embed", 3, 10)
        console.progress("embed", 10, 10, "done it")
        console.say("[a line]")
    assert "embed" in screen.getvalue()
    assert "10/10" in screen.getvalue()
    assert "done it" in screen.getvalue()
    assert "[a line]" in screen.getvalue()
