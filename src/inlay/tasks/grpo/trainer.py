"""TRL's GRPOTrainer on a model with adapters of ours; its reference is the model without them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as functional
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from inlay.data.rows import Rows
from inlay.data.tokens import Encoded
from inlay.errors import TrainingError
from inlay.evaluate.generation import Sampling, continued, end_tokens, settings
from inlay.kernels.loss import IGNORED
from inlay.methods.base import evaluating
from inlay.model.adapters.attach import disabled
from inlay.model.fast.padding import length_multiple
from inlay.model.merge.weights import merged_weights
from inlay.tasks.grpo.guard import RewardGuard
from inlay.tasks.grpo.judge import Answers, Judge
from inlay.tasks.grpo.order import Group, PromptOrder
from inlay.tasks.grpo.shared_answers import Stream, drawn_together
from inlay.train.processes.share import Part
from inlay.train.processes.steps import SharedSteps
from inlay.train.reference import Telling
from inlay.train.scoring import Scoring
from inlay.train.trl import checkpointing_left_on

SHOWN = {
    "reward": "reward",
    "reward_std": "reward_std",
    "kl_to_base": "kl",
    "completions/mean_length": "answer_tokens",
    "completions/clipped_ratio": "cut_off",
    "frac_reward_zero_std": "equal_groups",
    "entropy": "entropy",
}
"""What the metrics of a step are called while it is taken, and what metrics.jsonl calls them."""


class RewardTrainer(Telling, GRPOTrainer):
    """Trains on prompts that come tokenised from the data room, and on answers of the model's own.

    The reference's log-probabilities are the model's with its adapters off: there is no second
    model. Answers are written in evaluation mode, without dropout.
    """

    guard: RewardGuard

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Rows,
        encoded: Sequence[Encoded],
        judge: Judge,
        args: GRPOConfig,
        *,
        beta: float,
        **kept: Any,
    ) -> None:
        self.rows, self.encoded, self.judge = rows, encoded, judge
        self.here: list[int] = []
        """The row that each answer of this step answers."""
        self.policy = torch.empty(0)
        """The log-probabilities of the last pass."""
        self.teaches = False
        """Whether some answers of this step are worth more than others to the same prompt."""
        self.stream = Stream()
        self.worth: list[float] = []
        """Of each answer of this step."""
        self.multiple = length_multiple(model)
        answers = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self.group = Group(args.num_generations or 1, answers, args.gradient_accumulation_steps)
        self.longest = args.max_completion_length or 1
        super().__init__(model, tokenizer, dataset(rows), args, **kept)
        if self.use_vllm:
            pushed: Any = self.vllm_generation
            pushed._iter_named_params = partial(merged_weights, model)
        self.beta = beta
        self.current_gradient_accumulation_steps = self.group.passes  # of the step tried first

    def asks(self, collate: Any) -> dict[str, Any]:
        del collate
        return {"reward_funcs": self.judge.as_functions()}

    @property
    def lengths(self) -> list[int]:
        return [len(row.input_ids) for row in self.encoded]

    @property
    def steps_in_epoch(self) -> int:
        """Optimiser steps that pass over all prompts that fill a step."""
        return len(self.encoded) // (self.group.prompts * self.world.size)

    @property
    def parts(self) -> list[Part]:
        return [Part(0, 1, 1 / self.group.passes, 0, 1)] * self.group.passes

    def get_train_dataloader(self) -> DataLoader[Any]:
        return super(SharedSteps, self).get_train_dataloader()

    def _get_train_sampler(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, train_dataset: Any = None
    ) -> PromptOrder:
        del train_dataset
        return PromptOrder(self.lengths, self.group, int(self.args.seed), self.world)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; raise where no step could teach anything."""
        result = super().train(*args, **kwargs)
        if not self.guard.taught:
            raise TrainingError(
                f"in none of the {self.state.global_step} steps were two answers to one prompt "
                "worth differently, so that there was nothing to learn; check the rewards on a "
                "few answers, take easier prompts, raise num_generations or temperature, or train "
                "on some answers with --task sft first"
            )
        return result

    @property
    def names(self) -> dict[str, str]:
        return SHOWN | self.judge.apart()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.world.alone:
            return super().training_step(*args, **kwargs)
        with self.stream.kept():
            return super().training_step(*args, **kwargs)

    def tokens_in(self, batch: Any) -> int:
        """Count nothing before the answers are there; `_compute_loss` does."""
        del batch
        return 0

    def gradient_is_due(self) -> bool:
        """Return whether this is the first step whose answers to one prompt differ in reward."""
        return self.guard.taught == 1 and self.teaches

    def peak_of(self, rows: Sequence[int]) -> int | None:
        before = self.step_tokens
        peak = super().peak_of(rows)
        self.step_tokens = before
        return peak

    def batch_of(self, rows: Sequence[int]) -> dict[str, Any]:
        """Return a batch of the longest answers to the longest of these prompts."""
        prompt = max((self.encoded[i].input_ids for i in rows), key=len)
        count, longest = self.group.step // self.group.passes, self.longest
        ids = torch.tensor([prompt], device=self.args.device).expand(count, -1)
        answers = ids.new_zeros(count, longest)
        ratio = torch.ones(count, 1, device=self.args.device)
        return {
            "importance_sampling_ratio": ratio,
            "prompt_ids": ids,
            "prompt_mask": torch.ones_like(ids),
            "completion_ids": answers,
            "completion_mask": torch.ones_like(answers),
            "advantages": torch.ones(count, device=self.args.device),
            "num_items_in_batch": torch.tensor(answers.numel(), device=self.args.device),
            "ref_per_token_logps": torch.zeros(count, longest, device=self.args.device),
        }

    # Answers, and what they are worth

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the step's answers as one batch, with what the base gives each of their tokens."""
        self.here = [int(each["row"]) for each in inputs]
        beta, self.beta = self.beta, 0.0  # else TRL looks for a second model, or HF PEFT's adapter
        try:
            with checkpointing_left_on():
                batch = super()._generate_and_score_completions(inputs)
        finally:
            self.beta = beta
        (total,) = self.world.total([float(batch["num_items_in_batch"])])
        batch["num_items_in_batch"] = torch.full_like(batch["num_items_in_batch"], total)
        self.note_worth()
        return batch | {"ref_per_token_logps": self.reference(batch)}

    def note_worth(self) -> None:
        """Note whether the step's answers differ in worth, and tell when first they do not."""
        (differing,) = self.world.total([1 - self.measured["frac_reward_zero_std"][-1]])
        self.teaches = differing > 0
        worth = [value for values in self.world.every(self.worth) for value in values]
        self.measured["reward_std"][-1] = float(torch.tensor(worth).std())
        self.guard.taught += self.teaches
        if not self.teaches and not self.guard.taught and self.state.global_step == 0:
            self.recorder.note(
                "step 1 teaches nothing: all answers to each prompt are worth the same; "
                "equal_groups in metrics.jsonl is the share of such prompts"
            )

    def reference(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the log-probability that the model without adapters gives each answer's tokens."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        width = batch["completion_ids"].shape[1]
        size = self.group.step // self.group.passes
        with torch.no_grad(), disabled(self.adapted):
            found, _, _ = self._get_per_token_logps_and_entropies(
                self.adapted, ids, mask, width, batch_size=size
            )
        return found

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        del prompts
        return [self.encoded[row].input_ids for row in self.here], None, {}

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], *images: Any, **options: Any
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Return an answer to each prompt, drawn in evaluation mode with a key-value cache.

        vLLM writes the answers where it is asked for, from merged weights, and gives their
        log-probabilities, by which TRL corrects for how it computes.
        """
        if self.use_vllm:
            return super()._generate_single_turn(prompt_ids, *images, **options)
        drawn, ends = (
            Sampling(self.temperature, self.top_p),
            end_tokens(self.adapted, self._tokenizer),
        )
        with evaluating(self.adapted), torch.no_grad():
            if self.world.alone:
                config = settings(self.longest, ends, self._tokenizer, drawn)
                return continued(self.adapted, prompt_ids, config), None
            config = settings(self.longest, ends, self._tokenizer, None)
            with self.stream.taken():
                return drawn_together(self.adapted, prompt_ids, config, drawn, self.world), None

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: list[Any], completion_ids_list: Any
    ) -> Tensor:
        """Return what each reward gives each answer, (answers, rewards); every value is checked."""
        del inputs, prompts
        answers = Answers(
            [self.rows.rows[row] for row in self.here],
            [self.rows.where(row) for row in self.here],
            completions,
            completion_ids_list,
        )
        also = {
            "trainer_state": self.state,
            "log_extra": self._log_completion_extra,
            "log_metric": self._log_metric,
        }
        found = self.judge.scores(answers, f"at step {self.state.global_step + 1}", also)
        self.worth = self.judge.totals(found)
        return torch.tensor(found, dtype=torch.float32, device=self.args.device).T

    # The loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = super()._compute_loss(model, inputs)
        mask = inputs["completion_mask"]
        gap = inputs["ref_per_token_logps"] - self.policy
        kl = (gap.exp() - gap - 1) * mask
        self.measured["kl_to_base"].append(float(kl.sum() / mask.sum().clamp(min=1)))
        self.step_tokens += int(inputs["prompt_mask"].sum() + mask.sum())
        return loss

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **images: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        """Return the log-probabilities of the answers' tokens and entropies, (n, logits_to_keep).

        They are the model's own head's, at the temperature that the answers were drawn at.
        """
        del images
        size = batch_size or len(input_ids)
        found = [
            self.scores(model, ids, mask, logits_to_keep)
            for ids, mask in zip(input_ids.split(size), attention_mask.split(size), strict=True)
        ]
        log_probs, entropies = (torch.cat(each) for each in zip(*found, strict=True))
        self.policy = log_probs.detach()
        return log_probs, entropies if compute_entropy else None, None

    def scores(self, model: Any, ids: Tensor, mask: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Return log-probability and entropy of each answer's tokens, zero behind its end.

        The rows come padded on both sides, so that answers begin in one column. They go through
        the model padded on the right, where each token has the place it had when it was written.
        """
        left = mask.argmax(dim=1, keepdim=True)
        start = ids.shape[1] - width - left
        ids, mask = (moved(x, left) for x in (ids, mask))
        ids, mask = (self.fitted(x, int(mask.sum(dim=1).max())) for x in (ids, mask))
        places = torch.arange(ids.shape[1], device=ids.device)
        labels = ids.masked_fill((mask == 0) | (places < start), IGNORED)
        found = Scoring(model, self.temperature)(
            labels=labels,
            fused_lm_head=True,
            input_ids=ids,
            attention_mask=mask,
            use_cache=False,
        )
        assert found.log_probs is not None
        assert found.entropy is not None
        wanted = start - 1 + torch.arange(width, device=ids.device)
        inside = wanted < found.log_probs.shape[1]
        wanted = wanted.clamp(max=found.log_probs.shape[1] - 1)
        log_probs, entropy = (
            x.gather(1, wanted) * inside for x in (found.log_probs, found.entropy)
        )
        return log_probs, entropy

    def fitted(self, x: Tensor, length: int) -> Tensor:
        """Return rows cut, or padded, to a length that the device multiplies fast."""
        whole = -(-length // self.multiple) * self.multiple
        return functional.pad(x[:, :whole], (0, max(0, whole - x.shape[1])))


def moved(x: Tensor, left: Tensor) -> Tensor:
    """Return rows (n, length) moved to the left, each by its own number; what falls off follows."""
    length = x.shape[1]
    return x.gather(1, (torch.arange(length, device=x.device) + left) % length)


def dataset(rows: Rows) -> Dataset:
    prompts = [row["prompt"] for row in rows.rows]
    return Dataset.from_dict({"prompt": prompts, "row": list(range(len(prompts)))})
