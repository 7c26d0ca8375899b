"""What the tests of a task's verbs share: rows in a file, one sentence, a run and what it held."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from inlay.cli.main import main

every_reading_verb = pytest.mark.parametrize("verb", ["train", "data"])


def write(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def as_json(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    """Run a verb, and return what it writes for a machine."""
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def run_on(folder: Path, train: list[str], rows: Iterable[dict[str, Any]]) -> Path:
    """Train on rows in a folder, by the command; return the folder."""
    data = write(folder / "rows.jsonl", rows)
    assert main([*train, "--data", str(data), "--output", str(folder / "run")]) == 0
    return folder


def check_sentence(
    words: list[str], sentence: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check that a verb ends in one sentence, exit code 2, and leaves nothing behind."""
    line = [*words, "--model", "pocket", "--max-length", "64", "--output", str(folder / "out")]
    assert main([*line, "--split", "1", "0", "0"]) == 2
    err = capsys.readouterr().err
    (only,) = [text for text in err.splitlines() if "--help" not in text and "reading" not in text]
    assert sentence in only
    assert not (folder / "out").exists()


def evaluated(
    run: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measure a run's adapter on the rows it held out; return these values and the run's own."""
    line = ["eval", "--adapter", str(run / "run"), *words]
    assert main([*line, "--data", str(run / "rows.jsonl"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    own = json.loads((run / "run" / "run.json").read_text())["comparison"]
    assert found["rows_held_out_by_the_run"] is True
    now, then = (
        {m["name"]: m["tuned"]["value"] for m in record["metrics"]} for record in (found, own)
    )
    return now, then


def generated(run: Path, count: int, capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    """Return what a run's adapter writes for the first of its rows."""
    line = ["generate", "--adapter", str(run / "run"), "--generate-tokens", "3", "--json"]
    assert main([*line, "--data", str(run / "rows.jsonl"), "--max-rows", str(count)]) == 0
    return json.loads(capsys.readouterr().out)


def check_merges(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that a run's adapter merges, held to its base on rows of the run."""
    line = ["merge", "--adapter", str(run / "run"), "--output", str(run / "merged"), "--json"]
    assert main(line) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["inputs"], report["positions"] > 0) == ("given", True)
