"""The default recipe: the learning rate from the model's width and the method."""

from __future__ import annotations

from dataclasses import dataclass

from inlay.run.config import RunConfig
from inlay.train.task import TASKS

FULL_FINE_TUNING = 5e-5
"""The learning rate that suits full fine-tuning of a model 2000 wide."""
LORA_OVER_FULL = 10
"""How much higher LoRA's best learning rate is, at every width."""
WIDTH_POWERS = {"qwen": 0.0775}
"""How fast the best learning rate falls with the width, by the family of the model."""
LLAMA_POWER = 0.781
NARROWEST = 256
"""The narrowest model the formula was tried on; below it, the rate is the one of this width."""


@dataclass(frozen=True)
class LearningRate:
    """A peak learning rate and how it came about."""

    value: float
    reason: str


def learning_rate(config: RunConfig, hidden: int, family: str, factor: float) -> LearningRate:
    """Return the run's learning rate: the user's, or the formula's times the method's factor.

    `5e-5 * 10 * (2000 / hidden)^P * factor`, with P = 0.781, and 0.0775 for Qwen ("LoRA Without
    Regret", Schulman et al. 2025), where the factor is the
    method's times the task's; no width under 256 is put in, where the formula was not tried.

    Args:
        config: the run; its `learning_rate` is a number or `auto`.
        hidden: the width of the model's residual stream.
        family: the model type, such as `llama` or `qwen3`.
        factor: the method's learning rate relative to LoRA's.
    """
    if config.learning_rate != "auto":
        return LearningRate(config.learning_rate, "given by the user")
    power = next((p for name, p in WIDTH_POWERS.items() if family.startswith(name)), LLAMA_POWER)
    width = max(hidden, NARROWEST)
    factor *= TASKS[config.task].learning_rate_factor
    value = FULL_FINE_TUNING * LORA_OVER_FULL * (2000 / width) ** power * factor
    whose = f"{config.method}, {config.task}"
    reason = f"5e-5 * 10 * (2000 / {width})^{power} * {factor:g} ({whose})"
    if width != hidden:
        reason += f"; the model is {hidden} wide, and the formula is used from {NARROWEST} up"
    return LearningRate(value, reason)
