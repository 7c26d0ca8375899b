"""The output folder of a run: what lies where, whether it may be used, and what it says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from inlay.errors import UsageError
from inlay.files import remove_whole, write_json
from inlay.run.config import RunConfig
from inlay.train.output import checkpoints
from inlay.train.output.saving import saving

FREE_TO_CHANGE = frozenset(
    {"resume", "overwrite", "output", "threads", "keep_checkpoints", "parallel"}
    | {"evaluate", "generate_rows", "generate_tokens"}
)
"""Keys that a resumed run may change: none of them changes what is trained."""

INPUTS = {
    "data_sha256": "data",
    "base_sha256": "base model",
    "rewards_sha256": "file of reward functions",
}
"""The hashes in run.json of what a run reads, and what they are of."""

State = Literal["new", "interrupted", "finished"]


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run's output."""

    path: Path

    @property
    def run(self) -> Path:
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def state(self) -> State:
        if not self.run.is_file():
            return "new"
        return "finished" if self.record().get("finished") else "interrupted"

    def record(self) -> dict[str, Any]:
        """Return the contents of run.json."""
        try:
            found = json.loads(self.run.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(
                f"{self.run} cannot be read ({error}); give another output folder, or --overwrite"
            ) from None
        if not isinstance(found, dict):
            raise UsageError(
                f"{self.run} is not the record of a run; give another output folder, or --overwrite"
            )
        return found

    def write_record(self, record: Mapping[str, Any]) -> None:
        with saving("run.json", self.run):
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.run, dict(record))


def open_folder(config: RunConfig) -> tuple[RunFolder, State]:
    """Return the run's folder and what lies in it, ready to be used."""
    folder = RunFolder(Path(config.output).expanduser())
    if folder.path.exists() and not folder.path.is_dir():
        raise UsageError(f"output {config.output!r} is a file; name a folder")
    if config.overwrite:
        clear(folder)
    state = folder.state
    if state == "new":
        check_nothing_foreign(folder)
    elif not config.resume:
        said = "a finished run" if state == "finished" else "a run that was interrupted"
        wanted = "--overwrite" if state == "finished" else "--resume or --overwrite"
        raise UsageError(f"{config.output} holds {said}; give another output folder, or {wanted}")
    else:
        check_same_run(config, folder)
    checkpoints.remove_leftovers(folder.checkpoints)
    return folder, state


def clear(folder: RunFolder) -> None:
    """Remove what a run has written; other files in the folder stay."""
    with saving("the emptied output folder", folder.path):
        for path in (folder.checkpoints, folder.adapter):
            remove_whole(path)
        for path in (folder.run, folder.metrics, folder.report):
            path.unlink(missing_ok=True)


def check_nothing_foreign(folder: RunFolder) -> None:
    """Raise when a new run would write over something that no run.json accounts for."""
    for path in (folder.adapter, folder.metrics, folder.checkpoints, folder.report):
        if path.exists():
            raise UsageError(
                f"{path} exists and {folder.run} does not, so it is not known whose it is; give "
                "another output folder, or --overwrite"
            )


def check_same_run(config: RunConfig, folder: RunFolder) -> None:
    """Raise when a run is resumed with another configuration than it was begun with."""
    begun = folder.record().get("config")
    if not isinstance(begun, dict):
        raise UsageError(f"{folder.run} has no config; give another output folder, or --overwrite")
    now = config.model_dump()
    changed = [
        f"{key!r} was {begun.get(key)!r} and is {now[key]!r}"
        for key in now
        if key not in FREE_TO_CHANGE and begun.get(key) != now[key]
    ]
    if changed:
        raise UsageError(
            f"{config.output} cannot be resumed with another configuration: {'; '.join(changed)}. "
            "Undo the change, give another output folder, or --overwrite"
        )


def check_same_inputs(begun: Mapping[str, Any], now: Mapping[str, Any], folder: RunFolder) -> None:
    """Raise when the data or the base is not what an interrupted run was begun with."""
    for key, what in INPUTS.items():
        if begun.get(key) != now.get(key):
            raise UsageError(
                f"{folder.path} cannot be resumed: the {what} has changed since the run was begun; "
                "bring it back, give another output folder, or --overwrite"
            )
