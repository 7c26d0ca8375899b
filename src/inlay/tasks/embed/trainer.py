"""transformers' Trainer on the losses of sentence-transformers, with adapters of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from inlay.tasks.embed.embedder import Embedder
from inlay.tasks.embed.texts import SimilarRow, columns_in
from inlay.train.guard import FAR_TOO_HIGH
from inlay.train.processes.share import ranges
from inlay.train.trainer import AdapterLoop

SCALE = 20.0
"""What cosines are multiplied with before a softmax, as in sentence-transformers."""


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
        vectors = [self.whole(column)["sentence_embedding"] for column in columns_in(batch)]
        return self.of_vectors(vectors, batch)

    def of_vectors(self, vectors: list[Tensor], batch: dict[str, Tensor]) -> Tensor:
        """Return the loss of a batch whose texts have these vectors, (rows, width) a column."""
        if self.scored:
            return self.loss.compute_loss_from_embeddings(vectors, batch["score"])
        self.same = batch["same"]
        return self.loss.compute_loss_from_embeddings(vectors, None)

    def similarity(self, anchors: Tensor, others: Tensor) -> Tensor:
        """Return the cosines (anchors, others); minus infinity where a text is no negative."""
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
        columns: Mapping[str, Sequence[Any]],
        args: TrainingArguments,
        loss: SimilarityLoss,
        **kept: Any,
    ) -> None:
        self.loss = loss
        self.sharing = True
        """Whether other processes run parts of the same pass, should it be cut."""
        super().__init__(model, tokenizer, Dataset.from_dict(dict(columns)), args, **kept)
        self.model_accepts_loss_kwargs = False

    @property
    def lengths(self) -> list[int]:
        assert isinstance(self.train_dataset, Dataset)
        return [max(len(ids) for ids in texts) for texts in self.train_dataset["texts"]]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
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
        """This process's rows of a pass."""
        part = self.part
        whole = self.share.cuts == 1
        return slice(None) if whole else slice(part.start - part.first, part.stop - part.first)

    def peak_of(self, rows: Sequence[int]) -> int | None:
        self.sharing = False
        try:
            return super().peak_of(rows)
        finally:
            self.sharing = True

    def tokens_in(self, batch: dict[str, Tensor]) -> int:
        masks = [x[self.own] for name, x in batch.items() if name.endswith("attention_mask")]
        return sum(int(mask.sum()) for mask in masks)

    def evaluate_held_out(self) -> None:
        """Measure and record; one batch's loss may be the worst that cosines can give.

        It is then near 2 * scale, which is no sign of a run that diverges.
        """
        super().evaluate_held_out()
        if self.guard.reference is not None:
            self.guard.reference = max(self.guard.reference, 2 * SCALE / FAR_TOO_HIGH)


def columns(rows: Sequence[SimilarRow]) -> dict[str, list[Any]]:
    types = [[text.types for text in row.texts] for row in rows]
    return {
        "texts": [[text.input_ids for text in row.texts] for row in rows],
        "types": types if types[0][0] is not None else [None] * len(rows),
        "score": [row.score for row in rows],
    }
