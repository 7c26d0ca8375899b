"""A supervised run on rows with images: the loop and the measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from inlay.data.processor import Pictured
from inlay.data.rows import Rows
from inlay.data.tokens import summarise
from inlay.data.vision import ImageInputs
from inlay.evaluate.images import Seeing
from inlay.evaluate.losses import losses
from inlay.evaluate.record import ComparisonRecord
from inlay.evaluate.run import compare
from inlay.memory.devices import Device
from inlay.model.fast.padding import length_multiple
from inlay.train import planning
from inlay.train.arguments import arguments
from inlay.train.pictured import Pictures
from inlay.train.rows import encode_rows
from inlay.train.running import Tokens
from inlay.train.supervised import check_ends
from inlay.train.trainer import AdapterTrainer, HeldOut, dataset
from inlay.train.vision_planning import pictured, rows_to_plan, side_by_side


class Stages(Pictures[Pictured]):
    """A run that trains answers about images."""

    def encode(self, rows: Rows, tokenizer: Any) -> list[Pictured]:
        """Return rows as tokens; every image is read once."""
        return pictured(encode_rows(rows, tokenizer, self.config.max_length))

    def check_rows(self, rows: Rows, encoded: list[Pictured]) -> None:
        """Raise when no row trains the end token; tell of rows that were cut or left out."""
        summary = summarise(encoded, rows)
        check_ends(summary, rows, self.config.max_length)
        for lines, what in (
            (summary.truncated, f"cut at max_length {self.config.max_length}"),
            (summary.skipped, "left out: a field is empty"),
            (summary.unended, "without a trained end token"),
        ):
            self.note_lines(lines, what)

    def largest(self, encoded: list[Pictured], device: Device) -> planning.Rows:
        """Return the largest batch, its images prepared."""
        multiple = planning.padding_multiple(self.config, device)
        return rows_to_plan(self.config, encoded, self.images, multiple)

    def trainer(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tokens: Tokens[Pictured],
        record: dict[str, Any],
    ) -> PicturedTrainer:
        """Return the trainer, nothing trained yet; it is here that a tower's output is kept."""
        config, rate = self.config, record["learning_rate"]["value"]
        watched = self.watched()
        seeing = self.see(model, tokens.train, tokens.validation)
        args = arguments(config, model, self.folder.checkpoints, rate)
        args.remove_unused_columns = False
        return PicturedTrainer(
            model,
            tokenizer,
            tokens.train,
            args,
            collate=SideBySide(tokens.train, seeing.inputs, length_multiple(model)),
            held_out=held_out(model, tokens.validation, seeing, config.batch_size),
            **watched,
        )

    def measured(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Tokens[Pictured]
    ) -> ComparisonRecord:
        """Return base against tuned on the test rows."""
        return compare(
            model,
            tokenizer,
            tokens.test_rows,
            tokens.test,
            generate_rows=self.config.generate_rows,
            max_new_tokens=self.config.generate_tokens,
            batch_size=max(self.config.batch_size, 8),
            seeing=self.see_afresh(model),
        ).to_dict()


class PicturedTrainer(AdapterTrainer):
    """Trains on rows whose images are prepared when a batch needs them."""

    def dataset_of(self, rows: Sequence[Any]) -> Dataset:
        """Return rows as tokens, with their numbers."""
        return dataset(rows).add_column("row", list(range(len(rows))))


@dataclass(frozen=True)
class SideBySide:
    """Pads rows on the right to the longest, each with its images."""

    rows: Sequence[Pictured]
    inputs: ImageInputs
    multiple: int

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return input_ids, labels, attention_mask (rows, tokens) and what the model sees."""
        return side_by_side([self.rows[item["row"]] for item in items], self.inputs, self.multiple)


def held_out(
    model: PreTrainedModel, rows: list[Pictured], seeing: Seeing, batch_size: int
) -> HeldOut | None:
    """Return what measures the mean loss of held-out rows, or None when there are none."""
    if not rows:
        return None

    def measure() -> dict[str, float]:
        found = losses(model, rows, max(batch_size, 8), join=seeing.join)
        return {"loss": sum(row.nll for row in found) / sum(row.tokens for row in found)}

    return measure
