"""What the command prints: plain text without a terminal, Rich with one."""

from __future__ import annotations

import io
import sys

import pytest

from inlay.cli import show, summary
from inlay.cli.progress import LiveProgress, PlainProgress, progress, sparkline
from inlay.train.output.events import Event


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


STEP = Event(
    "step", step=3, total_steps=9, loss=2.5, learning_rate=1e-4, tokens_per_second=1234.5,
    memory_bytes=2_500_000_000, seconds=4.0, seconds_left=75.0,
)  # fmt: skip


def on_terminal(patch: pytest.MonkeyPatch) -> Terminal:
    """Let stdout be a colour terminal; to be called in the test, after pytest's own capture."""
    stream = Terminal()
    patch.setattr(sys, "stdout", stream)
    for name, value in (("COLUMNS", "120"), ("LINES", "40"), ("TERM", "xterm-256color")):
        patch.setenv(name, value)
    patch.delenv("NO_COLOR", raising=False)
    return stream


def test_a_plain_table_is_aligned() -> None:
    lines = show.plain_table(("metric", "base"), [["loss", "3.2"], ["exact match", "0.125"]])
    assert lines == [
        "  metric        base",
        "  -----------  -----",
        "  loss           3.2",
        "  exact match  0.125",
    ]


def test_a_terminal_gets_the_same_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    show.table(("metric", "[/base]"), [["loss [1, 2]", "3.2"]])
    assert "loss [1, 2]" in terminal.getvalue()
    assert "[/base]" in terminal.getvalue()


def test_without_colour_the_trained_tokens_stand_in_brackets() -> None:
    assert show.bracketed(["In", " put", " out", "</s>"], [False, False, True, True]) == (
        "In put[ out</s>]"
    )


def test_on_a_terminal_every_token_has_its_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    show.masked(["[b]ask", " tell", " more"], [False, True, True])
    written = terminal.getvalue()
    assert "[b]ask" in written
    assert written.count("\x1b[30;42m") == 1
    assert written.count("\x1b[30;102m") == 1


@pytest.mark.parametrize(
    ("count", "text"), [(12, "12 B"), (1500, "1.5 kB"), (2.5e6, "2.5 MB"), (7.25e9, "7.25 GB")]
)
def test_sizes(count: float, text: str) -> None:
    assert show.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.4, "4 s"), (185, "3 min 05 s"), (3720, "1 h 02 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert show.duration(seconds) == text


def test_without_a_terminal_progress_is_plain_lines() -> None:
    stream = io.StringIO()
    with progress(stream) as drawn:
        assert isinstance(drawn, PlainProgress)
        drawn(Event("stage", "training"))
        drawn(STEP)
        drawn(Event("step", step=4, total_steps=9, loss=2.4, seconds=4.5))
        drawn(Event("evaluation", step=9, total_steps=9, eval_loss=2.25))
        drawn(Event("step", step=9, total_steps=9, loss=2.3, seconds=5.0))
    assert stream.getvalue().splitlines() == [
        "training",
        "step 3/9  loss 2.5000  lr 1.00e-04  tokens/s 1,234  memory 2.50 GB  left 1 min 15 s",
        "step 9/9  held-out loss 2.2500",
        "step 9/9  loss 2.3000",
    ]


def test_on_a_terminal_progress_is_a_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = on_terminal(monkeypatch)
    with progress(stream) as drawn:
        assert isinstance(drawn, LiveProgress)
        drawn(Event("stage", "training"))
        drawn(Event("note", "[note] in brackets"))
        drawn(Event("evaluation", step=2, total_steps=9, eval_loss=2.25))
        drawn(STEP)
    written = stream.getvalue()
    for text in ("step 3/9", "loss 2.5000", "memory 2.50 GB", "left 1 min 15 s"):
        assert text in written
    assert "held-out loss 2.2500" in written
    assert "[note] in brackets" in written


def test_a_curve_goes_from_high_to_low() -> None:
    assert sparkline([3.0, 2.0, 1.0]) == "█▅▁"
    assert sparkline([1.0]) == ""


def test_a_comparison_shows_intervals_and_p(capsys: pytest.CaptureFixture[str]) -> None:
    metric = {
        "name": "loss", "better": "lower", "rows": 10, "p_value": 0.0002, "test": "a test",
        "base": {"value": 3.25, "low": 3.0, "high": 3.5},
        "tuned": {"value": 2.0, "low": None, "high": None},
        "difference": {"value": -1.25, "low": -1.5, "high": -1.0},
    }  # fmt: skip
    record = {
        "rows": 10, "tokens": 1234, "generated_rows": 0, "level": 0.95, "metrics": [metric],
        "examples": [],
    }  # fmt: skip
    summary.comparison(record)  # type: ignore[arg-type]
    out = capsys.readouterr().out
    assert "10 held-out rows, 1,234 tokens" in out
    assert "3.25 [3, 3.5]" in out
    assert "-1.25 [-1.5, -1]" in out
    assert "0.0002" in out
    assert "95% bootstrap intervals" in out
