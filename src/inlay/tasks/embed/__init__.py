"""Texts that belong together near each other, by sentence-transformers' losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from inlay.data.raw import RawRow
from inlay.data.rows import Rows
from inlay.evaluate.titles import Titles
from inlay.run.config import RunConfig, Text
from inlay.tasks.embed.rows import normalise_similar
from inlay.train.rows import check_both
from inlay.train.task import HEADED, Fixed, Task

if TYPE_CHECKING:
    from inlay.tasks.embed.run import EmbedRun

NAMED = "anchor, positive, negative and score name its columns"


class EmbedConfig(RunConfig):
    """A run on texts that belong together."""

    anchor: Text | None = Field(
        None,
        description="embed: column or template of the first text; default: anchor, or sentence1",
    )
    positive: Text | None = Field(
        None,
        description="embed: column or template of a text that matches the anchor; default: "
        "positive, or sentence2",
    )
    negative: Text | None = Field(
        None,
        description="embed: column or template of a text that does not match the anchor; default: "
        "negative, if there is one",
    )
    score: Text | None = Field(
        None, description="embed: column with the similarity of the two texts; default: score"
    )
    pooling: Literal["auto", "mean", "cls", "max", "lasttoken"] = Field(
        "auto",
        description="embed: how token vectors become one vector per text; auto: the model's own "
        "pooling, else mean",
    )


class Embed(Task):
    name = "embed"
    about = "texts that belong together near each other, by sentence-transformers' losses"
    options = EmbedConfig
    fixed = HEADED | dict.fromkeys(("prompt", "completion", "text"), Fixed(None, NAMED))
    titles = Titles(
        {
            "mrr": "mean reciprocal rank",
            "pearson": "Pearson correlation",
            "spearman": "Spearman correlation",
        },
    )
    learning_rate_factor = 0.5
    has_head = True

    def read(self, raw: Sequence[RawRow], config: EmbedConfig, group: str | None) -> Rows:
        return normalise_similar(
            raw,
            anchor=config.anchor,
            positive=config.positive,
            negative=config.negative,
            score=config.score,
            group=group,
            skip_empty=config.skip_empty,
        )

    def read_held_out(self, raw: Sequence[RawRow], config: EmbedConfig, train: Rows) -> Rows:
        found = self.read(raw, config, None)
        scored = [(rows, rows.kind == "scored_pairs") for rows in (train, found)]
        check_both("scores", *scored)
        return found

    def trained(self, head: Mapping[str, Any]) -> bool:
        return head.get("purpose") == "embedding"

    def merged_readers(self, folder: str) -> list[str]:
        return [f"Or, with its pooling: SentenceTransformer({folder!r})."]

    def run(self, config: EmbedConfig) -> EmbedRun:
        from inlay.tasks.embed.run import EmbedRun

        return EmbedRun(self, config)
