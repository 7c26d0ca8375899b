"""TRL's ORPOTrainer on a model with adapters of ours."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.import_utils import TRLExperimentalWarning

from inlay.kernels.loss import IGNORED
from inlay.tasks.dpo.pairs import Pair
from inlay.tasks.dpo.trainer import columns, longer_sides
from inlay.train.collate import Collate, Items
from inlay.train.reference import Telling, call_of
from inlay.train.scoring import Scoring
from inlay.train.trl import score_by_fused_head

with warnings.catch_warnings():  # that it may change; the tests hold it to its own results
    warnings.simplefilter("ignore", TRLExperimentalWarning)
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer


class OddsTrainer(Telling, ORPOTrainer):
    """Trains on pairs that come tokenised from the data room; there is no reference.

    Logits exist only where a token counts: of a preferred row everywhere, its prompt too, as TRL
    and the paper's authors have it; of a rejected row in the answer.
    """

    shown: ClassVar[Mapping[str, str]] = {
        "rewards/accuracies": "accuracy",
        "log_odds_chosen": "log_odds",
    }

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pairs: Sequence[Pair],
        args: ORPOConfig,
        **kept: Any,
    ) -> None:
        rows = AsTheyCome.from_dict(columns(pairs))
        super().__init__(model, tokenizer, rows, args, **kept)
        score_by_fused_head(model)

    @property
    def lengths(self) -> list[int]:
        assert isinstance(self.train_dataset, Dataset)
        return longer_sides(self.train_dataset)

    @property
    def measured(self) -> dict[str, list[float]]:
        return self._stored_metrics["train"]

    def concatenated_forward(self, model: Any, batch: dict[str, Any]) -> Any:
        """Return both answers' log-probability a token (n,), no logits, and the loss of the chosen.

        The loss is that of prompt and answer, the mean over the batch's tokens; the one that
        balances a mixture's experts comes last, if there is one.
        """
        answers, labels = batch["completion_mask"], counted_labels(batch)
        preferred = slice(0, len(labels) // 2)
        call = call_of(batch)
        if self.aux_loss_enabled:
            call["output_router_logits"] = True
        scores = Scoring(model)(labels=labels, fused_lm_head=True, **call)
        log_probs = scores.log_probs
        assert log_probs is not None
        counted, rows = (labels[preferred, 1:] != IGNORED).sum(), len(labels) // 2
        if self.share.cuts > 1:  # of a part, as many as its rows have in the mean of the pass
            counted = rows * self.mean_in_pass(int(counted), rows)
        loss = -log_probs[preferred].sum() / counted
        means = (log_probs * answers[:, 1:]).sum(dim=1) / answers[:, 1:].sum(dim=1)
        chosen, rejected = means.chunk(2, dim=0)
        no_logits = log_probs.new_zeros(1)
        balance = [scores.aux_loss] if self.aux_loss_enabled else []
        return chosen, rejected, no_logits, no_logits, loss, *balance


@dataclass(frozen=True)
class CountingPrompts:
    """Says of a batch of pairs which tokens of every preferred row count: its prompt's, too."""

    collate: Collate
    pairs: Sequence[Pair]

    def __call__(self, items: Items) -> dict[str, Any]:
        """Return the batch with `counted_mask` (pairs, tokens)."""
        batch = self.collate(items)
        width = batch["input_ids"].shape[1]
        counted = [self.pairs[item["row"]].whole.trained for item in items]
        padded = [[*map(int, row), *[0] * (width - len(row))] for row in counted]
        return {**batch, "counted_mask": torch.tensor(padded)}


def counted_labels(batch: Mapping[str, Tensor]) -> Tensor:
    """Return the labels of a batch of pairs: preferred rows whole, of rejected rows the answer."""
    ids, trained = batch["input_ids"], batch["completion_mask"].clone()
    trained[: len(ids) // 2] = batch["counted_mask"]
    return ids.masked_fill(trained == 0, IGNORED)


class AsTheyCome(Dataset):
    """Rows that are tokenised already: what TRL would do to each has been done."""

    def map(self, *args: Any, **kwargs: Any) -> Dataset:
        del args, kwargs
        return self
