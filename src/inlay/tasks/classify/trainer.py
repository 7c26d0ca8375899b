"""transformers' Trainer on a model with a head and adapters of ours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from inlay.data.inputs import InputRow
from inlay.data.padding import pad
from inlay.evaluate.outputs import accepted, padded_inputs
from inlay.kernels.loss import IGNORED
from inlay.model.load.heads import Head, head_loss
from inlay.train.collate import Items
from inlay.train.trainer import AdapterLoop


class HeadTrainer(AdapterLoop):
    """Trains on rows that come tokenised from the data room, each with its label."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        columns: Mapping[str, Sequence[Any]],
        args: TrainingArguments,
        head: Head,
        **kept: Any,
    ) -> None:
        self.head = head
        super().__init__(model, tokenizer, Dataset.from_dict(dict(columns)), args, **kept)
        # Only the mean over tokens needs their number in the whole batch.
        self.model_accepts_loss_kwargs = head.purpose == "tokens"

    def evaluate_held_out(self) -> None:
        """Measure and record; a loss no worse than that of knowing nothing is not divergence."""
        super().evaluate_held_out()
        if self.guard.reference is not None:
            self.guard.reference = max(self.guard.reference, self.of_no_knowledge)

    @property
    def of_no_knowledge(self) -> float:
        """The loss of equally likely classes, or of the number farthest away."""
        if self.head.problem == "regression":
            assert isinstance(self.train_dataset, Dataset)
            labels = torch.tensor(self.train_dataset["label"])
            return float((labels - labels.mean()).square().max())
        several = self.head.problem == "multi_label_classification"
        return math.log(2 if several else len(self.head.labels))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        labels = inputs["labels"]
        outputs = model(**accepted(self.adapted, inputs))
        count = num_items_in_batch if self.head.purpose == "tokens" else None
        loss = head_loss(self.head, outputs.logits, labels, count)
        return (loss, outputs) if return_outputs else loss


@dataclass(frozen=True)
class PadLabelled:
    """Pads rows on the right; labels of tokens with them."""

    padding: int
    multiple: int
    of_tokens: bool

    def __call__(self, rows: Items) -> dict[str, Tensor]:
        """Return input_ids and attention_mask, each (rows, longest), and the labels."""
        found = [as_row(row) for row in rows]
        batch = padded_inputs(found, self.padding, self.multiple)
        labels = [row.label for row in found]
        found = pad(labels, IGNORED, self.multiple) if self.of_tokens else torch.tensor(labels)
        return {**batch, "labels": found}


def as_row(values: Mapping[str, Any]) -> InputRow:
    ids = values["input_ids"]
    return InputRow(ids, len(ids), values["label"], values["types"])


def columns(rows: Sequence[InputRow]) -> dict[str, list[Any]]:
    return {
        "input_ids": [row.input_ids for row in rows],
        "types": [row.types for row in rows],
        "label": [row.label for row in rows],
    }
