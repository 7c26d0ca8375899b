"""TRL's KTOTrainer on a model with adapters of ours; its reference is the model without them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer import kto_trainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

from inlay.data.tokens import Encoded
from inlay.tasks.kto.rows import Labelled
from inlay.train.order import kept_order
from inlay.train.reference import AgainstBase
from inlay.train.trl import unhashed


class LabelledTrainer(AgainstBase, KTOTrainer):
    """Trains on labelled rows that come tokenised from the data room.

    The KL of a batch is estimated from its prompts with its own answers, one row further. A batch's
    rows are the same in every epoch, so that the base's log-probabilities of these, too, can be
    computed once, before the first step. They are drawn at random, not by length: rows of one
    prompt, and answers of one label, would otherwise stand together.
    """

    shown: ClassVar[Mapping[str, str]] = {
        "rewards/chosen": "reward_desirable",
        "rewards/rejected": "reward_undesirable",
        "kl": "kl",
    }
    referred: ClassVar[tuple[str, str]] = ("ref_logps", "ref_KL_logps")

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        columns: Mapping[str, Sequence[Any]],
        args: KTOConfig,
        **kept: Any,
    ) -> None:
        dataset = Dataset.from_dict(dict(columns))
        with unhashed(kto_trainer):
            super().__init__(model, tokenizer, dataset, args, **kept)

    @property
    def lengths(self) -> list[int]:
        assert isinstance(self.train_dataset, Dataset)
        columns = (self.train_dataset[name] for name in ("prompt_ids", "completion_ids"))
        return [len(p) + len(c) for p, c in zip(*columns, strict=True)]

    def arrange(self, lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[int]:
        return kept_order(lengths, batch_size, seed, epoch)

    def _compute_kl_logps(self, model: Any, batch: dict[str, Any]) -> Tensor:
        """Return the log-probabilities of mismatched answers.

        They are moved so that their mean ratio to the base's is the whole pass's, of which this
        process may run a part.
        """
        found: Any = super()._compute_kl_logps(model, batch)
        if self.share.cuts == 1:
            return found
        ratios = found - batch["ref_KL_logps"]
        mean = self.mean_in_pass(float(ratios.sum()), len(ratios))
        return found + (mean - ratios.mean())

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        found = super()._compute_loss(model, inputs, return_outputs)
        if self.share.cuts > 1:
            good = sum(map(bool, inputs["label"]))
            self.tell_of_pass("rewards/chosen", good)
            self.tell_of_pass("rewards/rejected", len(inputs["label"]) - good)
        return found

    def tell_of_pass(self, name: str, rows: int) -> None:
        """Replace the mean over this many rows of this process by the mean over the whole pass."""
        own = self.measured.pop(name, [0.0])[-1]
        mean = self.mean_in_pass(rows * own, rows)
        if not math.isnan(mean):
            self.measured[name] = [mean]

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return self.by_base(model, inputs), self.by_base(model, inputs, "KL_")


def columns(rows: Sequence[Labelled], mismatched: Sequence[Encoded]) -> dict[str, list[Any]]:
    both = list(zip(rows, mismatched, strict=True))
    return {
        "row": list(range(len(rows))),
        "prompt_ids": [row.answer.input_ids[: row.start] for row in rows],
        "completion_ids": [row.answer.input_ids[row.start :] for row in rows],
        "KL_completion_ids": [other.input_ids[row.start :] for row, other in both],
        "label": [row.desirable for row in rows],
    }
