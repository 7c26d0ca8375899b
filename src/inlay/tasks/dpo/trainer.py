"""TRL's DPOTrainer on a model with adapters of ours; its reference is the model without them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer import dpo_trainer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from inlay.tasks.dpo.pairs import Pair
from inlay.train.reference import AgainstBase
from inlay.train.trl import unhashed


class PreferenceTrainer(AgainstBase, DPOTrainer):
    """Trains on pairs that come tokenised from the data room.

    The reference's log-probabilities are computed once, before the first step, by the model with
    its adapters off: there is no second model, and no second pass a step.
    """

    shown: ClassVar[Mapping[str, str]] = {
        "rewards/accuracies": "reward_accuracy",
        "rewards/margins": "reward_margin",
    }
    referred: ClassVar[tuple[str, str]] = ("ref_chosen_logps", "ref_rejected_logps")

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pairs: Sequence[Pair],
        args: DPOConfig,
        **kept: Any,
    ) -> None:
        with unhashed(dpo_trainer):
            super().__init__(model, tokenizer, Dataset.from_dict(columns(pairs)), args, **kept)

    @property
    def lengths(self) -> list[int]:
        assert isinstance(self.train_dataset, Dataset)
        return longer_sides(self.train_dataset)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        chosen, rejected = self.by_base(model, inputs).chunk(2, dim=0)
        return chosen, rejected


def columns(pairs: Sequence[Pair]) -> dict[str, list[Any]]:
    """Return pairs as TRL takes them when they are tokenised already, with their numbers."""
    return {
        "row": list(range(len(pairs))),
        "prompt_ids": [pair.chosen.input_ids[: pair.start] for pair in pairs],
        "chosen_ids": [pair.chosen.input_ids[pair.start :] for pair in pairs],
        "rejected_ids": [pair.rejected.input_ids[pair.start :] for pair in pairs],
    }


def longer_sides(pairs: Dataset) -> list[int]:
    columns = (pairs[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    return [len(p) + max(len(c), len(r)) for p, c, r in zip(*columns, strict=True)]
