"""What is watched of a run on rewards, whose loss does not say how good the model is."""

from __future__ import annotations

from inlay.train.guard import Guard


class RewardGuard(Guard):
    """Watches a loss that is near zero at every step and does not say how good the model is.

    What is watched beside losses and gradients that are not finite: whether any step could teach.
    """

    def __init__(self) -> None:
        super().__init__()
        self.taught = 0
        """The steps in which some answers to one prompt were worth more than others."""

    def observe(self, loss: float, step: int) -> None:
        """Take a step's loss as it is."""

    def state(self) -> dict[str, object]:
        return {"taught": self.taught}
