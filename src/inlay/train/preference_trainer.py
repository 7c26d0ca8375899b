"""TRL's DPOTrainer on a model with adapters of ours; its reference is the model without them."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer import dpo_trainer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from inlay.data.preference import Pair
from inlay.evaluate.losses import buckets
from inlay.model.attach import disabled
from inlay.model.fast.causal_lm import IGNORED, FastCausalLM, ScoredOutput
from inlay.train.trainer import AdapterLoop

SHOWN = {"rewards/accuracies": "reward_accuracy", "rewards/margins": "reward_margin"}
"""What TRL calls the metrics of a step, and what metrics.jsonl does."""


class PreferenceTrainer(AdapterLoop, DPOTrainer):
    """Trains on pairs that come tokenised from the data room.

    The reference's log-probabilities are computed once, before the first step, by the model with
    its adapters off: there is no second model, and no second pass a step.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pairs: Sequence[Pair],
        args: DPOConfig,
        **kept: Any,
    ) -> None:
        with unhashed():
            super().__init__(model, tokenizer, dataset(pairs), args, **kept)

    @property
    def lengths(self) -> list[int]:
        """How many tokens the longer side of each pair has."""
        assert isinstance(self.train_dataset, Dataset)
        columns = (
            self.train_dataset[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")
        )
        return [len(p) + max(len(c), len(r)) for p, c, r in zip(*columns, strict=True)]

    def also(self) -> dict[str, float]:
        """Return how often, and by how much, the step's preferred answers were preferred."""
        found = self._metrics["train"]
        means = {ours: sum(found[name]) / len(found[name]) for name, ours in SHOWN.items()}
        found.clear()
        return means

    def peak_of(self, rows: Sequence[int]) -> int | None:
        """Return the most memory that a pass over these rows holds; nothing is trained by it."""
        peak = super().peak_of(rows)
        self._metrics["train"].clear()
        return peak

    # What TRL would do otherwise

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        """Take the pairs as they come."""
        del processing_class, args, dataset_name
        return dataset

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        return super()._compute_loss(Scoring(model), inputs, return_outputs)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities of both answers, by the model without its adapters."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        labels = ids.masked_fill(inputs["completion_mask"] == 0, IGNORED)
        call = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        with torch.no_grad(), disabled(self.adapted):
            found = Scoring(model)(labels=labels, fused_lm_head=True, **call)
        assert found.log_probs is not None
        chosen, rejected = found.log_probs.sum(dim=1).chunk(2, dim=0)
        return chosen, rejected

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Return the pairs with the reference's log-probabilities, computed as training would."""
        del name
        self.recorder.stage("computing what the base gives both answers of every pair")
        found: dict[int, tuple[float, float]] = {}
        collate: Any = self.data_collator
        with training(self.adapted):
            for batch in buckets(lengths_of(dataset), batch_size):
                inputs = self._prepare_inputs(collate([dataset[i] for i in batch]))
                sides = self.compute_ref_log_probs(self.model, inputs)
                chosen, rejected = (side.tolist() for side in sides)
                found.update(zip(batch, zip(chosen, rejected, strict=True), strict=True))
        for place, column in enumerate(("ref_chosen_logps", "ref_rejected_logps")):
            dataset = dataset.add_column(column, [found[i][place] for i in range(len(dataset))])
        return dataset


@dataclass(frozen=True)
class Scoring:
    """A model that is asked for each token's log-probability, by its own output head.

    TRL's head reads `lm_head.weight`, past an adapter or a quantised storage.
    """

    model: Any

    def __call__(self, *, labels: Tensor, fused_lm_head: bool, **call: Any) -> ScoredOutput:
        """Return the log-probability of each labelled token from its predecessor, (n, length-1)."""
        if isinstance(self.model, FastCausalLM) and self.model.takes_chunks():
            found = self.model(**call, labels=labels, fused_lm_head=fused_lm_head)
        else:
            found = scored(self.model(**call).logits, labels)
        assert found.log_probs is not None
        if found.mean_logits is None:
            found.mean_logits = torch.zeros_like(found.log_probs)
        return found


def scored(logits: Tensor, labels: Tensor) -> ScoredOutput:
    """Return scores from logits; entropy and top-1 hits, which nobody asks for, as zeros."""
    wanted = labels[:, 1:]
    mask = wanted != IGNORED
    rows = logits[:, :-1][mask]
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    picked = rows.log_softmax(-1).gather(1, wanted[mask][:, None]).squeeze(1)
    log_probs = picked.new_zeros(mask.shape).masked_scatter(mask, picked)
    nothing = torch.zeros_like(log_probs)
    return ScoredOutput(log_probs=log_probs, entropy=nothing, is_top1=nothing.bool())


def dataset(pairs: Sequence[Pair]) -> Dataset:
    """Return pairs as TRL takes them when they are tokenised already."""
    return Dataset.from_dict(
        {
            "prompt_ids": [pair.chosen.input_ids[: pair.start] for pair in pairs],
            "chosen_ids": [pair.chosen.input_ids[pair.start :] for pair in pairs],
            "rejected_ids": [pair.rejected.input_ids[pair.start :] for pair in pairs],
        }
    )


def lengths_of(pairs: Dataset) -> list[int]:
    """Return how many tokens the longer side of each pair has."""
    columns = (pairs[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    return [len(p) + max(len(c), len(r)) for p, c, r in zip(*columns, strict=True)]


@contextmanager
def unhashed() -> Generator[None]:
    """Spare TRL the hash of every weight: it names a file of references, which we do not write."""
    trl: Any = dpo_trainer
    before = trl.hash_module
    trl.hash_module = lambda module: ""
    try:
        yield
    finally:
        trl.hash_module = before


@contextmanager
def training(model: PreTrainedModel) -> Generator[None]:
    """Let a model compute as it does in training, and then as it did before."""
    before = model.training
    model.train()
    try:
        yield
    finally:
        model.train(before)
