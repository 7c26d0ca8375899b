"""A run on labelled answers about images, by TRL's KTOTrainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from inlay.data.labelled import Labelled
from inlay.data.processor import Pictured
from inlay.data.tokens import Encoded
from inlay.memory.devices import Device
from inlay.train import kto, planning
from inlay.train.kto_trainer import LabelledSideBySide
from inlay.train.pictured import Judged
from inlay.train.vision_planning import labelled_to_plan, pictured


class Stages(Judged[Labelled], kto.Stages):
    """A run that trains a model to give desirable answers about images."""

    def shown(self, rows: list[Labelled]) -> list[Pictured]:
        """Return the answer to the images of each row."""
        return pictured([row.answer for row in rows])

    def largest(self, encoded: list[Labelled], device: Device) -> planning.Rows:
        """Return the largest batch, and the largest of answers to other rows' prompts."""
        multiple = planning.padding_multiple(self.config, device)
        return labelled_to_plan(self.config, encoded, self.images, multiple)

    def collate(
        self, model: PreTrainedModel, rows: list[Labelled], others: list[Encoded]
    ) -> Callable[..., Any]:
        """Return what makes a batch of rows with their images."""
        assert self.seeing is not None
        tokens = super().collate(model, rows, others)
        return LabelledSideBySide(tokens, rows, others, self.seeing.inputs)
