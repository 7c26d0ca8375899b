"""TRL's KTOTrainer on a model with adapters of ours; its reference is the model without them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from datasets import Dataset
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer import kto_trainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

from inlay.data.labelled import Labelled
from inlay.data.tokens import Encoded
from inlay.train.order import TrainingOrder, kept_order
from inlay.train.reference import AgainstBase, unhashed


class LabelledTrainer(AgainstBase, KTOTrainer):
    """Trains on labelled rows that come tokenised from the data room.

    The KL of a batch is estimated from its prompts with its own answers, one row further. A batch's
    rows are the same in every epoch, so that the base's log-probabilities of these, too, can be
    computed once, before the first step. They are drawn at random, not by length: rows of one
    prompt, and answers of one label, would otherwise stand together.
    """

    shown: ClassVar[dict[str, str]] = {
        "rewards/chosen": "reward_desirable",
        "rewards/rejected": "reward_undesirable",
        "kl": "kl",
    }
    referred: ClassVar[tuple[str, str]] = ("ref_logps", "ref_KL_logps")

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Labelled],
        mismatched: Sequence[Encoded],
        args: KTOConfig,
        **kept: Any,
    ) -> None:
        dataset = Dataset.from_dict(columns(rows, mismatched))
        with unhashed(kto_trainer):
            super().__init__(model, tokenizer, dataset, args, **kept)

    @property
    def lengths(self) -> list[int]:
        """How many tokens each row has."""
        assert isinstance(self.train_dataset, Dataset)
        columns = (self.train_dataset[name] for name in ("prompt_ids", "completion_ids"))
        return [len(p) + len(c) for p, c in zip(*columns, strict=True)]

    # What TRL would do otherwise

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        del train_dataset
        size, seed = self.args.per_device_train_batch_size, self.args.seed
        return TrainingOrder(self.lengths, size, seed, kept_order)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities of answers, own and mismatched, without the adapters."""
        return self.by_base(model, inputs), self.by_base(model, inputs, "KL_")


def columns(rows: Sequence[Labelled], mismatched: Sequence[Encoded]) -> dict[str, list[Any]]:
    """Return labelled rows as TRL takes them when they are tokenised already."""
    both = list(zip(rows, mismatched, strict=True))
    return {
        "prompt_ids": [row.answer.input_ids[: row.start] for row in rows],
        "completion_ids": [row.answer.input_ids[row.start :] for row in rows],
        "KL_completion_ids": [other.input_ids[row.start :] for row, other in both],
        "label": [row.desirable for row in rows],
    }
