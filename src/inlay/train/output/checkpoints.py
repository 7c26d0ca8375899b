"""The checkpoints of a run: folders named `checkpoint-<step>`, each complete or not there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from inlay.files import remove, remove_whole, write_folder
from inlay.train.output.saving import saving

TRAINER_STATE = "trainer_state.json"
TRAINING_STATE = "training.safetensors"
NEEDED = (TRAINER_STATE, TRAINING_STATE)
"""The files without which a checkpoint is not resumed from."""


def folder_of(parent: Path, step: int) -> Path:
    return parent / f"checkpoint-{step}"


def write(folder: Path, fill: Callable[[Path], None]) -> None:
    """Write a checkpoint; it appears when it is complete."""
    with saving("the checkpoint", folder):
        write_folder(folder, fill)


def rotate(parent: Path, keep: int) -> None:
    with saving("the list of checkpoints", parent):
        for folder in complete(parent)[:-keep]:
            remove_whole(folder)


def complete(parent: Path) -> list[Path]:
    named = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in parent.glob("*")]
    steps = {int(name[1]): path for name, path in named if name}
    return [
        path
        for _, path in sorted(steps.items())
        if all((path / needed).is_file() for needed in NEEDED)
    ]


def latest(parent: Path) -> Path | None:
    return next(reversed(complete(parent)), None)


def remove_leftovers(parent: Path) -> None:
    """Remove what a killed run had begun to write or to remove."""
    with saving("the list of checkpoints", parent):
        for path in parent.glob("*.tmp"):
            if path.is_dir():
                remove(path)
            else:
                path.unlink()


def step_of(checkpoint: Path) -> int:
    state = json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
    return int(state["global_step"])
