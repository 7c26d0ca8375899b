"""A run on texts that belong together: sentence embeddings, by sentence-transformers' losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from inlay.data.rows import Rows
from inlay.errors import UsageError
from inlay.evaluate.label_metrics import pearson, spearman
from inlay.evaluate.outputs import padding_of
from inlay.evaluate.record import ComparisonRecord
from inlay.evaluate.similar import Candidates, ranks
from inlay.memory.devices import Device
from inlay.methods.base import evaluating
from inlay.model.fast.padding import length_multiple
from inlay.model.load.heads import Head
from inlay.train import planning
from inlay.train.arguments import shared
from inlay.train.embedder import Embedder, check_installed, embedder, prompts_in
from inlay.train.guard import FAR_TOO_HIGH
from inlay.train.processes.share import ranges
from inlay.train.rows import RunRows
from inlay.train.running import Running, Tokens
from inlay.train.similar import (
    HIDDEN,
    SCALE,
    PadSimilar,
    SimilarRow,
    columns_in,
    compare_similar,
    encode_similar,
    longest_text,
    rows_to_plan,
    vectors_of,
)
from inlay.train.trainer import AdapterLoop, HeldOut

FEW = 16
"""Rows in a batch below which each anchor has few negatives to be told from."""


class SimilarityLoss(nn.Module):
    """sentence-transformers' loss for a kind of rows: CoSENT of scores, else ranked negatives.

    A text of the batch that is no negative of a row, because it is the same as its positive or
    belongs to an equal anchor, is left out of the row's softmax.
    """

    def __init__(self, whole: Embedder, scored: bool) -> None:
        super().__init__()
        from sentence_transformers.sentence_transformer.losses import (
            CoSENTLoss,
            MultipleNegativesRankingLoss,
        )

        self.whole, self.scored = whole, scored
        self.same: Tensor | None = None
        kind: Any = CoSENTLoss if scored else MultipleNegativesRankingLoss
        given: dict[str, Any] = {} if scored else {"similarity_fct": self.similarity}
        self.loss = kind(whole, **given)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the loss of a batch that `PadSimilar` made."""
        vectors = [self.whole(column)["sentence_embedding"] for column in columns_in(batch)]
        return self.of_vectors(vectors, batch)

    def of_vectors(self, vectors: list[Tensor], batch: dict[str, Tensor]) -> Tensor:
        """Return the loss of a batch whose texts have these vectors, (rows, width) a column."""
        if self.scored:
            return self.loss.compute_loss_from_embeddings(vectors, batch["score"])
        self.same = batch["same"]
        return self.loss.compute_loss_from_embeddings(vectors, None)

    def similarity(self, anchors: Tensor, others: Tensor) -> Tensor:
        """Return the cosines (anchors, others), those of no negatives at minus infinity."""
        from sentence_transformers.util import cos_sim

        assert self.same is not None
        return cos_sim(anchors, others).masked_fill(self.same, -torch.inf)


class EmbedTrainer(AdapterLoop):
    """Trains on rows that come tokenised from the data room.

    A row is told from all others of its pass. Where several processes run a pass, each embeds its
    own rows and takes the others' vectors as they are: the gradients through each process's rows
    add up to the pass's.
    """

    whole_passes: ClassVar[bool] = True

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[SimilarRow],
        args: TrainingArguments,
        loss: SimilarityLoss,
        **kept: Any,
    ) -> None:
        self.loss = loss
        self.sharing = True
        """Whether other processes run parts of the same pass, should it be cut."""
        collate = PadSimilar(padding_of(model), length_multiple(model))
        super().__init__(model, tokenizer, dataset(rows), args, collate=collate, **kept)
        self.model_accepts_loss_kwargs = False

    @property
    def lengths(self) -> list[int]:
        """How many tokens the longest text of each row has."""
        assert isinstance(self.train_dataset, Dataset)
        return [max(len(ids) for ids in texts) for texts in self.train_dataset["texts"]]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a batch; its negatives are the batch's own."""
        del model, num_items_in_batch
        cut = self.sharing and self.share.cuts > 1
        loss = self.shared_loss(inputs) if cut else self.loss(inputs)
        return (loss, {}) if return_outputs else loss

    def shared_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the loss of a whole pass; only this process's rows have a gradient."""
        own = [{name: x[self.own] for name, x in c.items()} for c in columns_in(batch)]
        mine = torch.stack([self.loss.whole(column)["sentence_embedding"] for column in own])
        spare = self.share.pass_rows - mine.shape[1]
        padded = nn.functional.pad(mine.detach(), (0, 0, 0, spare))
        found = self.world.every_tensor(padded)
        if not self.pass_counts:
            return 0.0 * mine.sum()
        part, first = self.part, self.share.companions[0]
        lengths = [b - a for a, b in ranges(part.first, part.last, self.share.pass_rows)]
        others = [found[first + number][:, :length] for number, length in enumerate(lengths)]
        others[self.world.rank - first] = mine
        return self.loss.of_vectors(list(torch.cat(others, dim=1)), batch)

    @property
    def own(self) -> slice:
        """Which rows of a pass are this process's."""
        part = self.part
        whole = self.share.cuts == 1
        return slice(None) if whole else slice(part.start - part.first, part.stop - part.first)

    def peak_of(self, rows: Sequence[int]) -> int | None:
        """Return the most memory that a pass over these rows holds; nothing is trained by it."""
        self.sharing = False
        try:
            return super().peak_of(rows)
        finally:
            self.sharing = True

    def tokens_in(self, batch: dict[str, Tensor]) -> int:
        """Count the tokens of every column of this process's rows, padding left out."""
        masks = [x[self.own] for name, x in batch.items() if name.endswith("attention_mask")]
        return sum(int(mask.sum()) for mask in masks)

    def evaluate_held_out(self) -> None:
        """Measure and record; one batch's loss may be the worst that cosines can give.

        It is then near 2 * scale, which is no sign of a run that diverges.
        """
        super().evaluate_held_out()
        if self.guard.reference is not None:
            self.guard.reference = max(self.guard.reference, 2 * SCALE / FAR_TOO_HIGH)


def dataset(rows: Sequence[SimilarRow]) -> Dataset:
    """Return rows as Trainer takes them."""
    types = [[text.types for text in row.texts] for row in rows]
    return Dataset.from_dict(
        {
            "texts": [[text.input_ids for text in row.texts] for row in rows],
            "types": types if types[0][0] is not None else [None] * len(rows),
            "score": [row.score for row in rows],
        }
    )


class Stages(Running[SimilarRow]):
    """A run that trains a model's embeddings."""

    longest: int
    whole: Embedder

    @property
    def head(self) -> Head:
        """The hidden states, of which the pooling makes a vector."""
        return HIDDEN

    def look_at(self, rows: RunRows, tokenizer: PreTrainedTokenizerBase) -> None:
        """Learn how long a text may be."""
        check_installed()
        self.longest = longest_text(self.config, tokenizer)
        self.note(f"rows of {rows.train.kind.replace('_', ' ')}")
        prompts = prompts_in(self.config.model, self.config.revision)
        if prompts:
            self.note(
                f"the model was trained with words before its texts, such as {prompts[0]!r}; they "
                "are not added here: write them into a template, such as 'query: {question}'"
            )

    def encode(self, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[SimilarRow]:
        """Return rows as tokens."""
        return encode_similar(rows, tokenizer, self.longest)

    def check_rows(self, rows: Rows, encoded: list[SimilarRow]) -> None:
        """Tell of rows that were cut or left out, and of batches with few negatives."""
        if self.longest < self.config.max_length:
            self.note(f"the model takes texts of {self.longest} tokens, fewer than max_length")
        cut = [
            line
            for row, line in zip(encoded, rows.lines, strict=True)
            if any(text.truncated for text in row.texts)
        ]
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

    def largest(self, encoded: list[SimilarRow], device: Device) -> planning.Rows:
        """Return the largest batch, every text of its rows in it."""
        multiple = planning.padding_multiple(self.config, device)
        return rows_to_plan(self.config, encoded, multiple)

    def trainer(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tokens: Tokens[SimilarRow],
        record: dict[str, Any],
    ) -> EmbedTrainer:
        """Return the trainer, nothing trained yet."""
        rate = record["learning_rate"]["value"]
        config = self.config
        self.whole = embedder(model, config.model, config.revision, config.pooling or "auto")
        loss = SimilarityLoss(self.whole, scored=tokens.train[0].score is not None)
        return EmbedTrainer(
            model,
            tokenizer,
            tokens.train,
            TrainingArguments(
                **shared(TrainingArguments, config, model, self.folder.checkpoints, rate),
                remove_unused_columns=False,
            ),
            loss,
            held_out=self.held_out(model, loss, tokens),
            **self.watched(),
        )

    def held_out(
        self, model: PreTrainedModel, loss: SimilarityLoss, tokens: Tokens[SimilarRow]
    ) -> HeldOut | None:
        """Return what measures held-out rows, or None when there are none."""
        rows, size = tokens.validation, self.share.rows
        if not rows:
            return None
        collate = PadSimilar(padding_of(model), length_multiple(model))
        batches = [collate(rows[i : i + size]) for i in range(0, len(rows), size)]
        counts = [min(size, len(rows) - i) for i in range(0, len(rows), size)]

        def measure() -> dict[str, float]:
            with evaluating(model), torch.no_grad():
                here = [{n: x.to(model.device) for n, x in batch.items()} for batch in batches]
                losses = [float(loss(batch)) for batch in here]
            mean = sum(a * n for a, n in zip(losses, counts, strict=True)) / len(rows)
            return {"loss": mean, **self.held_out_metrics(rows)}

        return measure

    def held_out_metrics(self, rows: list[SimilarRow]) -> dict[str, float]:
        """Return what the embeddings as they are do on rows."""
        found = vectors_of(self.whole, rows, max(self.config.batch_size, 8), None)
        if rows[0].score is None:
            texts = ([str(row.texts[i].input_ids) for row in rows] for i in (0, 1))
            places = ranks(found[0], found[1], Candidates.of(*texts))
            return {"recall_at_1": sum(place == 1 for place in places) / len(places)}
        cosines = nn.functional.cosine_similarity(found[0], found[1])
        pairs = torch.stack([torch.tensor([row.score for row in rows]), cosines], dim=1)
        values = pairs.double().numpy()
        return {"spearman": float(spearman(values)), "pearson": float(pearson(values))}

    def measured(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Tokens[SimilarRow]
    ) -> ComparisonRecord:
        """Return base against tuned on the test rows."""
        del tokenizer
        size = max(self.config.batch_size, 8)
        return compare_similar(model, self.whole, tokens.test_rows, tokens.test, size)
