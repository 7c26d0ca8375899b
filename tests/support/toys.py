"""A copy of Inlay's source with one more file, and what is run on it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "inlay"


def with_file(folder: Path, place: str, text: str) -> Path:
    """Copy Inlay's source and write one new file there; return the folder to import it from."""
    shutil.copytree(SOURCE, folder / "inlay", ignore=shutil.ignore_patterns("__pycache__"))
    file = folder / "inlay" / place
    assert not file.exists()
    file.write_text(text)
    return folder


def python(source: Path, *words: str, folder: Path) -> str:
    """Run Python on this source; return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(source), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def command(source: Path, words: Sequence[str], folder: Path) -> str:
    """Run the command `inlay`."""
    return python(source, "-m", "inlay", *words, folder=folder)


TRAIN = (
    "train", "--model", "pocket", "--data", "arithmetic", "--max-rows", "48", "--max-steps", "3",
    "--max-length", "96", "--batch-size", "2", "--gradient-accumulation", "1", "--eval-rows", "4",
    "--no-evaluate", "--output", "run",
)  # fmt: skip
