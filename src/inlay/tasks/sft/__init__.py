"""Answers as the rows give them, by TRL's SFTTrainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from inlay.data.images import normalise_shown
from inlay.data.raw import RawRow
from inlay.data.rows import Rows
from inlay.run.config import RunWithImages
from inlay.train.task import Task

if TYPE_CHECKING:
    from inlay.tasks.sft.run import SftRun


class Sft(Task):
    name = "sft"
    about = "answers as the rows give them"
    options = RunWithImages

    def read(self, raw: Sequence[RawRow], config: RunWithImages, group: str | None) -> Rows:
        return normalise_shown(
            raw,
            allow_urls=bool(config.allow_urls),
            skip_empty=config.skip_empty,
            prompt=config.prompt,
            completion=config.completion,
            text=config.text,
            format=config.format,
            group=group,
        )

    def fits(self, row: RawRow, keys: Mapping[str, Any]) -> bool:
        return True

    def run(self, config: RunWithImages) -> SftRun:
        from inlay.tasks.sft.run import SftRun

        return SftRun(self, config)
