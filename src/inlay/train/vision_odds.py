"""A run on preferences about images without a reference, by TRL's ORPOTrainer."""

from __future__ import annotations

from inlay.train import orpo, vision_pairs


class Stages(vision_pairs.Stages, orpo.Stages):
    """A run that trains preferred answers about images, and to prefer them, at once."""
