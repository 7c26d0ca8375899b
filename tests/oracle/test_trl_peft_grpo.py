"""The same GRPO run here and in TRL + peft gives the same answers, reward, KL and loss a step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from demo_data.arithmetic import generate_problems
from trl import GRPOConfig, GRPOTrainer
from trl_peers import curve, of_config, own_curve, peers_model, run_file

from inlay.run.config import RunConfig
from inlay.tasks.grpo.order import Group, PromptOrder
from inlay.tasks.grpo.rows import encode_prompts
from inlay.train.rows import rows_of_run
from inlay.train.run import train

STEPS = 6
GROUP = Group(answers=4, step=16, passes=2)
REWARD = """
def letters(completions, **columns):
    return [sum(letter in "aeiou" for letter in c) / (1 + len(c)) for c in completions]
"""


def letters(completions: Sequence[str], **columns: Any) -> list[float]:
    found: dict[str, Any] = {}
    exec(REWARD, found)
    return found["letters"](completions, **columns)


def rewarded(folder: Path, temperature: float) -> RunConfig:
    (folder / "rewards.py").write_text(REWARD)
    keys: dict[str, Any] = {
        "task": "grpo", "rewards": [f"{folder / 'rewards.py'}:letters"], "batch_size": 8,
        "gradient_accumulation": 2, "num_generations": GROUP.answers, "max_completion_tokens": 12,
        "temperature": temperature, "max_steps": STEPS, "learning_rate": 2e-3, "alpha": 16,
        "beta": 0.1, "save_every": STEPS,
    }  # fmt: skip
    return run_file(folder, [{"prompt": p.prompt} for p in generate_problems(12, seed=3)], **keys)


class Peer(GRPOTrainer):
    """TRL's own, given the prompts in our order."""

    prompt_lengths: list[int]

    def _get_train_sampler(self, dataset: Any = None) -> PromptOrder:
        return PromptOrder(self.prompt_lengths, GROUP, seed=0)


def peers_curve(config: RunConfig) -> list[dict[str, Any]]:
    model, tokenizer = peers_model(config)
    args = GRPOConfig(
        **of_config(config),
        gradient_accumulation_steps=2,
        num_generations=GROUP.answers,
        max_completion_length=12,
        temperature=config.temperature,
        seed=0,
        data_seed=0,
    )
    rows = rows_of_run(config).train
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in rows.rows])
    trainer = Peer(model, letters, args, prompts, processing_class=tokenizer)
    lengths = [len(row.input_ids) for row in encode_prompts(rows, tokenizer, 1024)]
    trainer.prompt_lengths = lengths
    return curve(trainer)


SAME = {
    "reward": "reward",
    "reward_std": "reward_std",
    "answer_tokens": "completions/mean_length",
    "cut_off": "completions/clipped_ratio",
}
"""What must be the same where the answers are."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's own, on old names
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_answers_reward_kl_and_loss_agree_with_trl_and_peft(
    tmp_path: Path, temperature: float
) -> None:
    config = rewarded(tmp_path, temperature)
    train(config)
    mine, peers = own_curve(config), peers_curve(config)
    assert len(mine) == len(peers) == STEPS
    assert mine[0]["kl"] == 0 < mine[-1]["kl"]
    for ours, theirs in zip(mine, peers, strict=True):
        for name, other in SAME.items():
            assert ours[name] == pytest.approx(theirs[other], rel=1e-5)
        assert ours["kl"] == pytest.approx(theirs["kl"], rel=0.01, abs=1e-5)
        assert ours["entropy"] == pytest.approx(theirs["entropy"], rel=1e-3)
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.01, abs=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.02)
