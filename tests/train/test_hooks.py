"""Every private method of TRL's and transformers' trainers that is overridden is in one table."""

from __future__ import annotations

import inspect

import pytest
from transformers import Trainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

from inlay.tasks.classify.trainer import HeadTrainer
from inlay.tasks.dpo.trainer import PreferenceTrainer
from inlay.tasks.embed.trainer import EmbedTrainer
from inlay.tasks.grpo.trainer import RewardTrainer
from inlay.tasks.kto.trainer import LabelledTrainer
from inlay.tasks.orpo.trainer import OddsTrainer
from inlay.tasks.reward.trainer import RewardLoop
from inlay.tasks.sft.trainer import SupervisedTrainer
from inlay.train.trl import HOOKS

LIBRARY = {"Trainer": Trainer, "DPOTrainer": DPOTrainer, "KTOTrainer": KTOTrainer}
LIBRARY |= {"GRPOTrainer": GRPOTrainer}
OURS = (
    SupervisedTrainer, PreferenceTrainer, OddsTrainer, LabelledTrainer, RewardTrainer, RewardLoop,
    HeadTrainer, EmbedTrainer,
)  # fmt: skip


@pytest.mark.parametrize(
    ("trainer", "hook"), [(name, hook) for name, hooks in HOOKS.items() for hook in hooks]
)
def test_a_hook_has_the_parameters_that_are_expected(trainer: str, hook: str) -> None:
    found = inspect.signature(getattr(LIBRARY[trainer], hook)).parameters
    expected = HOOKS[trainer][hook]
    assert tuple(found)[1 : 1 + len(expected)] == expected


@pytest.mark.parametrize("ours", OURS)
def test_every_hook_that_is_overridden_is_in_the_table(ours: type) -> None:
    own = [cls for cls in ours.__mro__ if cls.__module__.startswith("inlay")]
    for name in {name for cls in own for name in vars(cls)}:
        if not name.startswith("_") or name.startswith("__") or name == "_abc_impl":
            continue
        home = next(
            cls for cls in ours.__mro__ if cls not in own and name in vars(cls)
        )  # an own private method would have none
        known = HOOKS.get(home.__name__, {})
        assert name in known or name in HOOKS["Trainer"], f"{home.__name__}.{name}"
