"""What runs of a language model share, whatever they train it for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from inlay.data.rows import Rows
from inlay.data.summary import Piece, summarise
from inlay.data.tokens import Encoded, encode
from inlay.evaluate.comparison import Limits
from inlay.evaluate.generation import Fill
from inlay.evaluate.images import Seeing
from inlay.evaluate.losses import padded
from inlay.evaluate.samples import choose_samples
from inlay.model.load.causal import check_continues
from inlay.train.overview import RowShown, TextRows, parts_of
from inlay.train.planning import model_loss
from inlay.train.rows import RunRows
from inlay.train.task_run import Config, Row, TaskRun

Sides = dict[str, tuple[Rows, Sequence[Encoded]]]
"""The name of each side of rows -> the rows that have it, and that side as tokens."""


@dataclass(frozen=True)
class Prompts:
    """Prompts to continue."""

    tokens: Sequence[Any]
    """Each as tokens, or as text."""
    shown: Sequence[dict[str, str]]
    """What is shown of each."""
    fill: Fill | None = None
    """What gives the model their images."""


class LanguageRun(TaskRun[Config, Row]):
    """A run that trains a model to write."""

    @property
    def seeing(self) -> Seeing | None:
        return None if self.images is None else self.images.seeing

    def check_model(self, model: PreTrainedModel) -> None:
        if self.images is None:
            check_continues(model)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model_loss(model, batch)

    def trained_tokens(self, rows: Sequence[Row]) -> int:
        return sum(text.trained_tokens for row in rows for text in self.texts(row))

    def sides(self, rows: Rows, encoded: list[Row]) -> Sides:
        """Return the rows and their tokens by the name of each side."""
        return {"": (rows, [text for row in encoded for text in self.texts(row)])}

    def overview(self, rows: RunRows, show: int) -> TextRows:
        parts = {name: self.sides(part, self.encode(part)) for name, part in parts_of(rows).items()}
        summaries = {
            f"{name} {side}".strip(): summarise(tokens, part)
            for name, sides in parts.items()
            for side, (part, tokens) in sides.items()
        }
        shown = [
            self.shown(rows.train, index, parts["train"])
            for index in range(min(show, len(rows.train)))
        ]
        return TextRows(self.in_words(rows.train), summaries, shown)

    def in_words(self, rows: Rows) -> str:
        own = self.task.rows_in_words
        if rows.kind in own:
            return own[rows.kind] + " about images" * rows.pictured
        return rows.kind.replace("_", " and ")

    def shown(self, rows: Rows, index: int, sides: Sides) -> RowShown:
        found: dict[str, Sequence[Piece]] = {}
        for side, (part, tokens) in sides.items():
            for own, text in zip(part.rows, tokens, strict=True):
                if own is rows.rows[index]:
                    found[side] = self.reader.pieces(text)
        return RowShown(rows.where(index), found, self.columns_shown(rows.rows[index]))

    def columns_shown(self, row: Mapping[str, object]) -> dict[str, object]:
        del row
        return {}

    # Measuring

    def limits(self) -> Limits:
        return {
            "generate_rows": self.config.generate_rows,
            "max_new_tokens": self.config.generate_tokens,
            **super().limits(),
        }

    def encode_answers(self, rows: Rows) -> list[Encoded]:
        return encode(rows, self.reader, self.config.max_length)

    def prompts(self, rows: Rows) -> Prompts:
        """Return the prompts of the rows of `answers`; none of rows of plain text."""
        encoded = self.encode_answers(rows)
        samples = choose_samples(rows, encoded, len(rows))
        decoded = [self.text(sample.prompt) for sample in samples]
        shown = [
            {"line": str(sample.line), "prompt": text, "expected": sample.reference}
            for sample, text in zip(samples, decoded, strict=True)
        ]
        fill = None if self.seeing is None else self.seeing.filling(encoded, samples)
        return Prompts([sample.prompt for sample in samples], shown, fill)

    def text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()

    def merge_inputs(self, model: PreTrainedModel, rows: Rows) -> list[dict[str, Tensor]]:
        join = padded if self.seeing is None else self.seeing.join
        calls = [join([row], 1).call for row in self.encode_answers(rows)]
        return [{name: x.to(model.device) for name, x in call.items()} for call in calls]
