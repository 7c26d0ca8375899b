"""A trainer whose reference is the base: the model with its adapters off, asked once."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from inlay.evaluate.losses import buckets
from inlay.kernels.loss import IGNORED
from inlay.model.adapters.attach import disabled
from inlay.train.processes.share import Share
from inlay.train.scoring import Scoring
from inlay.train.trainer import AdapterLoop

NOT_THE_MODELS = ("completion_mask", "counted_mask", "label")
OTHERS = ("KL_", "ref_")
"""What inputs of a batch are called, or begin with, that the model does not read as they are."""


class Telling(AdapterLoop):
    """Takes into metrics.jsonl what TRL measures of a step beside its loss."""

    shown: ClassVar[Mapping[str, str]]
    """What TRL calls the metrics of a step, and what metrics.jsonl does."""

    @property
    def names(self) -> Mapping[str, str]:
        """The metrics that this run shows, named as in `shown`."""
        return self.shown

    @property
    def measured(self) -> dict[str, list[float]]:
        """The metrics of the present pass."""
        own: Any = self
        return own._metrics["train"]

    def take_share(self, share: Share) -> None:
        super().take_share(share)
        self.told: list[tuple[float, dict[str, float]]] = []
        """Of each pass since the last step: how much it counts, and its metrics."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run one forward and backward pass, and keep its metrics."""
        weight = self.part.weight
        loss = super().training_step(*args, **kwargs)
        found = self.measured
        values = {name: float(found[name][-1]) for name in self.names if found.get(name)}
        there = {name: value for name, value in values.items() if not math.isnan(value)}
        self.told.append((weight, there))
        found.clear()
        return loss

    def also(self) -> dict[str, float]:
        """Return the mean over all processes' passes of each metric that is shown."""
        weighed = [
            sum(weight * values.get(name, 0.0) for weight, values in self.told)
            for name in self.names
        ]
        weights = [
            sum(weight for weight, values in self.told if name in values) for name in self.names
        ]
        self.told.clear()
        totals = self.world.total([*weighed, *weights])
        sums = zip(self.names.values(), totals, totals[len(weighed) :], strict=False)
        return {ours: value / weight for ours, value, weight in sums if weight}

    def peak_of(self, rows: Sequence[int]) -> int | None:
        peak = super().peak_of(rows)
        self.measured.clear()
        return peak


class AgainstBase(Telling):
    """Computes the reference's log-probabilities of every row before the first step."""

    referred: ClassVar[tuple[str, str]]
    """The columns that they go to."""

    @abstractmethod
    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the two log-probabilities of each row of a batch, by the base."""

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        """Return the rows as they are: they are tokens already."""
        del processing_class, args, dataset_name
        return dataset

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        trl: Any = super()
        return trl._compute_loss(Scoring(model), inputs, return_outputs)

    def by_base(self, model: Any, inputs: dict[str, Any], prefix: str = "") -> Tensor:
        """Return the log-probability of each answer (n,), by the model without its adapters."""
        call = labelled_inputs(inputs, prefix)
        with torch.no_grad(), disabled(self.adapted):
            found = Scoring(model)(fused_lm_head=True, use_cache=False, **call)
        assert found.log_probs is not None
        return found.log_probs.sum(dim=1)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Return the rows with the reference's log-probabilities, computed as training would."""
        del name
        self.recorder.stage("computing what the base gives every answer")
        found: dict[int, tuple[float, float]] = {}
        collate: Any = self.data_collator
        with training(self.adapted):
            for batch in buckets(self.lengths, batch_size):
                inputs = self._prepare_inputs(collate([dataset[i] for i in batch]))
                both = self.compute_ref_log_probs(self.model, inputs)
                first, second = (values.tolist() for values in both)
                found.update(zip(batch, zip(first, second, strict=True), strict=True))
        for place, column in enumerate(self.referred):
            dataset = dataset.add_column(column, [found[i][place] for i in range(len(dataset))])
        return dataset


def call_of(inputs: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return what a model is called with on a batch: tokens, and what it sees beside them.

    With a prefix, the tokens are those of the inputs that begin with it.
    """
    shared = {
        name: value
        for name, value in inputs.items()
        if name not in NOT_THE_MODELS and not name.startswith(OTHERS)
    }
    own = {n.removeprefix(prefix): x for n, x in inputs.items() if prefix and n.startswith(prefix)}
    own.pop("completion_mask", None)
    return {**shared, **own, "use_cache": False}


def labelled_inputs(batch: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Return what a model is called with on a batch of answers, and the answers as labels."""
    call = call_of(batch, prefix)
    call.pop("use_cache")
    answers = batch[f"{prefix}completion_mask"]
    return {**call, "labels": call["input_ids"].masked_fill(answers == 0, IGNORED)}


@contextmanager
def training(model: PreTrainedModel) -> Generator[None]:
    """Let a model compute as it does in training, and then as it did before."""
    before = model.training
    model.train()
    try:
        yield
    finally:
        model.train(before)
