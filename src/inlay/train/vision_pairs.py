"""A run on preferences about images: the better answer to what is seen, by TRL's DPOTrainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from inlay.data.preference import Pair
from inlay.data.processor import Pictured
from inlay.memory.devices import Device
from inlay.train import dpo, planning
from inlay.train.pictured import Judged
from inlay.train.preference_trainer import PairsSideBySide
from inlay.train.vision_planning import pairs_to_plan, pictured


class Stages(Judged[Pair], dpo.Stages):
    """A run that trains a model to prefer one answer about images to another."""

    def shown(self, rows: list[Pair]) -> list[Pictured]:
        """Return the preferred answer to the images of each pair."""
        return pictured([pair.chosen for pair in rows])

    def largest(self, encoded: list[Pair], device: Device) -> planning.Rows:
        """Return the largest batch, both sides of each pair in it, their images prepared."""
        multiple = planning.padding_multiple(self.config, device)
        return pairs_to_plan(self.config, encoded, self.images, multiple)

    def collate(self, model: PreTrainedModel, pairs: list[Pair]) -> Callable[..., Any]:
        """Return what makes a batch of pairs with their images."""
        assert self.seeing is not None
        return PairsSideBySide(super().collate(model, pairs), pairs, self.seeing.inputs)
