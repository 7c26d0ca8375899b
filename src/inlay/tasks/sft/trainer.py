"""TRL's SFTTrainer on a model with adapters of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from inlay.model.fast.padding import length_multiple
from inlay.run.config import RunConfig
from inlay.train.arguments import shared
from inlay.train.trainer import AdapterLoop


class SupervisedTrainer(AdapterLoop, SFTTrainer):
    """Trains on rows that come tokenised and masked from the data room, as they were shown."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        columns: Mapping[str, Sequence[Any]],
        args: SFTConfig,
        **kept: Any,
    ) -> None:
        super().__init__(model, tokenizer, Dataset.from_dict(dict(columns)), args, **kept)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the sum of the tokens' losses divided by the trained tokens of the whole batch."""
        counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        count = {"num_items_in_batch": num_items_in_batch} if counted else {}
        outputs = model(**inputs, **count, use_cache=False)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def arguments(
    config: RunConfig, model: PreTrainedModel, folder: Path, learning_rate: float
) -> SFTConfig:
    bins = config.packing == "bfd"
    return SFTConfig(
        **shared(SFTConfig, config, model, folder, learning_rate),
        pad_to_multiple_of=None if bins else length_multiple(model),
        max_length=config.max_length if bins else None,
        packing=bins,
        packing_strategy="bfd",
        shuffle_dataset=False,
        dataset_kwargs={"skip_prepare_dataset": not bins},
        completion_only_loss=False,
    )
