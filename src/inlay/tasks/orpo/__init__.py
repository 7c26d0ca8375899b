"""The preferred answer as it stands, and rather than the rejected one, by TRL's ORPOTrainer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from inlay.tasks.dpo import Dpo, PreferenceConfig

if TYPE_CHECKING:
    from inlay.tasks.orpo.run import OrpoRun


class Orpo(Dpo):
    name = "orpo"
    about = (
        "the preferred answer as it stands, and rather than the rejected one, by TRL's ORPOTrainer"
    )
    titles = Dpo.titles.with_own({}, curves={"accuracy": "preferred answer more likely"})
    learning_rate_factor = 0.5

    def run(self, config: PreferenceConfig) -> OrpoRun:
        from inlay.tasks.orpo.run import OrpoRun

        return OrpoRun(self, config)
