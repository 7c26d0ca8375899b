"""A run on texts that belong together: sentence embeddings, by sentence-transformers' losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from inlay.data.inputs import InputRow
from inlay.data.rows import Rows
from inlay.errors import UsageError
from inlay.evaluate.comparison import Limits, pace
from inlay.evaluate.outputs import accepted, padded_inputs
from inlay.evaluate.record import ComparisonRecord
from inlay.evaluate.statistics import pearson, spearman
from inlay.methods.base import evaluating
from inlay.model.fast.padding import length_multiple
from inlay.model.load.heads import Head
from inlay.tasks.embed import EmbedConfig
from inlay.tasks.embed.compare import Candidates, compare_similar, ranks, vectors_of
from inlay.tasks.embed.embedder import (
    Embedder,
    check_installed,
    embedder,
    longest_in,
    prompts_in,
    save_modules,
)
from inlay.tasks.embed.rows import SIMILAR
from inlay.tasks.embed.texts import PadSimilar, SimilarRow, columns_in, encode_similar
from inlay.tasks.embed.trainer import SCALE, EmbedTrainer, SimilarityLoss, columns
from inlay.train.arguments import shared
from inlay.train.collate import Collate, items_of
from inlay.train.head_run import HeadRun, longest_row
from inlay.train.overview import Example
from inlay.train.rows import RunRows
from inlay.train.task_run import Setup
from inlay.train.trainer import HeldOut

FEW = 16
"""Rows in a batch below which each anchor has few negatives to be told from."""


class EmbedRun(HeadRun[EmbedConfig, SimilarRow]):
    """A run that trains a model's embeddings."""

    whole: Embedder
    """The model with its pooling; there once the model is."""

    @property
    def head(self) -> Head:
        return Head("embedding")

    @cached_property
    def longest(self) -> int:
        own = longest_in(self.config.model, self.config.revision)
        return min(longest_row(self.config, self.tokenizer), own or self.config.max_length)

    def learn(self, rows: RunRows) -> None:
        check_installed()
        self.note(f"rows of {self.kind_of(rows.train)}")
        prompts = prompts_in(self.config.model, self.config.revision)
        if prompts:
            self.note(
                f"the model was trained with words before its texts, such as {prompts[0]!r}; they "
                "are not added here: write them into a template, such as 'query: {question}'"
            )

    def recall(self, model: PreTrainedModel, rows: Rows, record: Mapping[str, Any]) -> None:
        super().recall(model, rows, record)
        self.pool(model)

    def pool(self, model: PreTrainedModel) -> Embedder:
        config = self.config
        self.whole = embedder(model, config.model, config.revision, config.pooling)
        return self.whole

    def encode(self, rows: Rows) -> list[SimilarRow]:
        return encode_similar(rows, self.tokenizer, self.longest)

    def check(self, rows: Rows, encoded: list[SimilarRow]) -> None:
        self.note_shorter_model("texts")
        pairs = zip(encoded, rows.lines, strict=True)
        cut = [line for row, line in pairs if any(text.truncated for text in row.texts)]
        self.note_lines(cut, f"with a text that is cut at {self.longest} tokens")
        self.note_lines(rows.skipped, "left out: a field is empty")
        together = self.share.rows
        if rows.kind != "triplets" and together == 1:
            raise UsageError(
                "'batch_size' 1 leaves a row nothing to be told from, so that nothing is learned; "
                "32 and more are usual"
            )
        if rows.kind != "scored_pairs" and together < FEW:
            self.note(
                f"batch_size {together} gives each anchor few texts to be told from; "
                "32 and more are usual"
            )

    def texts(self, row: SimilarRow) -> Sequence[InputRow]:
        return row.texts

    def examples(self, rows: Rows, index: int, row: SimilarRow) -> list[Example]:
        score = "" if row.score is None else f", score {row.score:g}"
        named = zip(SIMILAR[rows.kind], row.texts, strict=True)
        return [self.example(rows.where(index), text, name + score) for name, text in named]

    # A step

    def columns(self, rows: Sequence[SimilarRow]) -> dict[str, list[Any]]:
        return columns(rows)

    def collator(self, rows: Sequence[SimilarRow], multiple: int) -> Collate:
        del rows
        return PadSimilar(self.padding, multiple)

    def planned_inputs(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {**batch, "input_ids": batch["0_input_ids"]}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return a loss that holds what training's does: mean vectors, and their cosines."""
        vectors: list[Tensor] = []
        for column in columns_in(batch):
            hidden = model(**accepted(model, column)).last_hidden_state
            mask = column["attention_mask"][..., None].to(hidden.dtype)
            vectors.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
        scores = SCALE * vectors[0] @ torch.cat(vectors[1:]).T
        return F.cross_entropy(scores, torch.arange(len(scores)))

    def full_row(self) -> SimilarRow:
        return SimilarRow((self.full_text(), self.full_text()))

    # Training

    def trainer(self, setup: Setup[SimilarRow]) -> EmbedTrainer:
        model, rows, rate = setup.model, setup.tokens.train, setup.learning_rate
        loss = SimilarityLoss(self.pool(model), scored=rows[0].score is not None)
        return EmbedTrainer(
            model,
            setup.tokenizer,
            self.columns(rows),
            TrainingArguments(
                **shared(TrainingArguments, self.config, model, setup.checkpoints, rate),
                remove_unused_columns=False,
            ),
            loss,
            collate=self.collator(rows, length_multiple(model)),
            held_out=self.held_out(model, loss, setup.tokens.validation),
            **setup.watched,
        )

    def held_out(
        self, model: PreTrainedModel, loss: SimilarityLoss, rows: list[SimilarRow]
    ) -> HeldOut | None:
        size = self.share.rows
        if not rows:
            return None
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        collate = self.collator(rows, length_multiple(model))
        batches = [collate(items_of(self.columns(part))) for part in parts]

        def measure() -> dict[str, float]:
            with evaluating(model), torch.no_grad():
                here = [{n: x.to(model.device) for n, x in batch.items()} for batch in batches]
                losses = [float(loss(batch)) for batch in here]
            weighed = zip(losses, parts, strict=True)
            mean = sum(value * len(part) for value, part in weighed) / len(rows)
            return {"loss": mean, **self.held_out_metrics(rows)}

        return measure

    def held_out_metrics(self, rows: list[SimilarRow]) -> dict[str, float]:
        found = vectors_of(self.whole, rows, max(self.config.batch_size, 8), None)
        if rows[0].score is None:
            texts = ([str(row.texts[i].input_ids) for row in rows] for i in (0, 1))
            places = ranks(found[0], found[1], Candidates.of(*texts))
            return {"recall_at_1": sum(place == 1 for place in places) / len(places)}
        cosines = F.cosine_similarity(found[0], found[1])
        pairs = torch.stack([torch.tensor([row.score for row in rows]), cosines], dim=1)
        values = pairs.double().numpy()
        return {"spearman": float(spearman(values)), "pearson": float(pearson(values))}

    # Measuring

    def compare(
        self, model: PreTrainedModel, rows: Rows, encoded: list[SimilarRow], limits: Limits
    ) -> ComparisonRecord:
        return compare_similar(model, self.whole, rows, encoded, **pace(limits))

    def merge_inputs(self, model: PreTrainedModel, rows: Rows) -> list[dict[str, Tensor]]:
        batches = [padded_inputs([row.texts[0]], 0, 1) for row in self.encode(rows)]
        return [accepted(model, batch) for batch in batches]

    def finish_merged(self, model: PreTrainedModel, folder: Path) -> None:
        save_modules(folder, list(self.pool(model).behind), self.longest)
