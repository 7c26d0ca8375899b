"""TRL's trainers on a model with adapters of ours: what they save, resume and watch."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from inlay.checkpoint.adapter import save_adapter
from inlay.memory.probe import measuring
from inlay.train.arguments import warmup_steps
from inlay.train.guard import DivergedError, Guard, check_gradients, check_same, fingerprints
from inlay.train.output import checkpoints
from inlay.train.output.adapter_state import load_tensors, tensors_of
from inlay.train.output.recorder import Recorder
from inlay.train.output.state import load_tree, random_state, restore_random_state, save_tree
from inlay.train.processes.share import Share
from inlay.train.processes.steps import SharedSteps
from inlay.train.trl import as_trl_expects

HeldOut = Callable[[], Mapping[str, float]]
"""Measures the held-out `loss`, if the task has one, and what else it measures by name."""


class AdapterLoop(SharedSteps, ABC):
    """What every task's trainer does: saves and resumes one adapter of a model, never the model.

    It stands before a trainer of TRL's among the bases of a class. The model is plain, with layers
    of ours in it, and nothing of HF PEFT.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Dataset,
        args: TrainingArguments,
        *,
        recorder: Recorder,
        guard: Guard,
        share: Share | None = None,
        collate: Callable[..., Any] | None = None,
        held_out: HeldOut | None = None,
        warmup: float = 0.0,
        keep_checkpoints: int = 2,
        adapter: str = "default",
    ) -> None:
        self.recorder, self.guard, self.held_out = recorder, guard, held_out
        alone = Share(args.per_device_train_batch_size, args.gradient_accumulation_steps)
        self.take_share(alone if share is None or share.world.alone else share)
        self.keep_checkpoints, self.adapter, self.adapted = keep_checkpoints, adapter, model
        self.folder = Path(args.output_dir or "")
        self.step_loss, self.step_tokens = 0.0, 0
        self.resumed: Mapping[str, Any] = {}
        with as_trl_expects(model):
            super().__init__(
                model=model,
                args=args,
                train_dataset=rows,
                processing_class=tokenizer,
                callbacks=[Moments(self)],
                **self.asks(collate),
            )
        self.remove_callback(PrinterCallback)
        self.recorder.total_steps = self.total_steps
        self.args.warmup_steps = warmup_steps(warmup, self.total_steps)

    def asks(self, collate: Callable[..., Any] | None) -> dict[str, Any]:
        """Return the arguments of this task's TRL trainer beyond those of all tasks."""
        return {"data_collator": collate}

    @property
    def lengths(self) -> list[int]:
        """How many tokens each row has, or each pack of rows."""
        assert isinstance(self.train_dataset, Dataset)
        return [len(ids) for ids in self.train_dataset["input_ids"]]

    @property
    def stateful(self) -> dict[str, Any]:
        """The optimiser and the schedule, which a checkpoint holds."""
        return {"optimizer": self.optimizer, "scheduler": self.lr_scheduler}

    @property
    def total_steps(self) -> int:
        limit = int(self.args.max_steps)
        return limit if limit > 0 else math.ceil(self.args.num_train_epochs * self.steps_in_epoch)

    def evaluation_due(self, step: int) -> bool:
        return step % self.steps_in_epoch == 0 or step == self.total_steps

    def begin(self) -> None:
        """Measure the untrained model and write checkpoint 0: the disk is tried at once, too."""
        if not self.resumed:
            self.recorder.start_over()
            self.evaluate_held_out()
            self.save_checkpoint()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; when the run diverges, first keep the state from before the step that did."""
        try:
            return super().train(*args, **kwargs)
        except DivergedError:
            if not self.guard.suspicious:
                self.save_checkpoint()
            raise

    # One step: its loss, watched before the optimiser acts on it.

    def peak_of(self, rows: Sequence[int]) -> int | None:
        """Return the most memory that a pass over these rows holds; nothing is trained by it."""
        batch = self.batch_of(rows)
        self.tokens_in(batch)
        device = self.args.device
        gpus = [device] if device.type == "cuda" else []
        self.adapted.train()
        with torch.random.fork_rng(gpus), measuring(device) as found:
            loss: Any = self.compute_loss(self.adapted, batch)
            loss.backward()
            del loss
        self.adapted.zero_grad()
        return found.peak

    def batch_of(self, rows: Sequence[int]) -> dict[str, Any]:
        assert isinstance(self.train_dataset, Dataset)
        collate: Any = self.data_collator
        return self._prepare_inputs(collate([self.train_dataset[i] for i in rows]))

    def tokens_in(self, batch: Any) -> int:
        """Count a batch's tokens, padding left out; take out what only counting needs."""
        return take_token_count(batch)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run one forward and backward pass; raise on a loss that is not finite."""
        tokens = self.tokens_in(args[1])
        self.step_tokens += tokens if self.pass_counts else 0
        loss: Tensor = super().training_step(*args, **kwargs)
        self.step_loss += float(loss)
        if self.world.alone:
            self.guard.check_loss(float(loss), self.state.global_step + 1)
        return loss

    def combine(self) -> None:
        """Add up what all processes found in their passes; each sees a loss that is not finite."""
        self.sum_gradients(p for p in self.adapted.parameters() if p.requires_grad)
        self.step_loss, tokens = self.world.total([self.step_loss, self.step_tokens])
        self.step_tokens = int(tokens)
        self.guard.check_loss(self.step_loss, self.state.global_step + 1)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if not self.world.alone:
            self.combine()
        norm: Any = super()._clip_grad_norm(model)
        self.guard.check_gradient(float(norm), self.state.global_step + 1)
        if self.gradient_is_due():
            check_gradients(model, self.adapter)
        return norm

    def gradient_is_due(self) -> bool:
        """Return whether this is the first step that must reach every place of the adapter."""
        return self.state.global_step == 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Record one optimiser step; other logs of the Trainer are not ours."""
        del start_time
        if "loss" not in logs:
            return
        step, loss, tokens = self.state.global_step, self.step_loss, self.step_tokens
        self.step_loss, self.step_tokens = 0.0, 0
        epoch = step / self.steps_in_epoch
        rate, norm = float(logs["learning_rate"]), float(logs["grad_norm"])
        self.recorder.step(step, epoch, loss, rate, norm, tokens, self.also())
        self.guard.observe(loss, step)

    def also(self) -> dict[str, float]:
        """Return what the task measures of a step beside its loss."""
        return {}

    def evaluate_held_out(self) -> None:
        """Measure and record the held-out loss, if there are rows to measure it on."""
        if self.held_out is not None:
            step, found = self.state.global_step, dict(self.held_out())
            loss = found.pop("loss", None)
            self.recorder.evaluation(step, step / self.steps_in_epoch, loss, found)
            if step == 0 and loss is not None:
                self.guard.reference = loss

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False
    ) -> dict[str, float]:
        del trial, ignore_keys_for_eval, skip_scheduler
        self.evaluate_held_out()
        return {}

    # Checkpoints: whole or not there, and without the model.

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        del model, trial
        if self.guard.suspicious:
            self.recorder.note(
                f"no checkpoint at step {self.state.global_step}: its loss is far above the loss "
                "before training"
            )
            return
        self.save_checkpoint()

    def save_checkpoint(self) -> None:
        """Write the adapter and all that a resumed run needs, then drop the oldest checkpoint.

        Every process holds all of it, and the first one writes.
        """
        self.check_agreement()
        if not self.world.leads:
            return
        folder = checkpoints.folder_of(self.folder, self.state.global_step)
        checkpoints.write(folder, self.fill_checkpoint)
        checkpoints.rotate(folder.parent, self.keep_checkpoints)
        self.recorder.checkpoint(folder, self.state.global_step)

    def check_agreement(self) -> None:
        """Raise unless every process holds the same adapter, bit for bit."""
        found = self.world.every(fingerprints(self.adapted, self.adapter))
        check_same(found, self.state.global_step)

    def fill_checkpoint(self, folder: Path) -> None:
        save_adapter(self.adapted, folder / "adapter", self.adapter)
        self.state.save_to_json(str(folder / checkpoints.TRAINER_STATE))
        tree = {
            "parameters": tensors_of(self.adapted, self.adapter),
            **{name: part.state_dict() for name, part in self.stateful.items()},
            "random": random_state(),
            "recorder": self.recorder.state(),
            "guard": self.guard.state(),
        }
        save_tree(folder / checkpoints.TRAINING_STATE, tree)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        del model
        self.restore(Path(resume_from_checkpoint))

    def restore(self, folder: Path) -> None:
        self.resumed = load_tree(folder / checkpoints.TRAINING_STATE)
        load_tensors(self.adapted, self.adapter, self.resumed["parameters"], folder)
        self.recorder.restore(self.resumed["recorder"])
        self.guard.restore(self.resumed["guard"])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            for name, part in self.stateful.items():
                part.load_state_dict(self.resumed[name])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            restore_random_state(self.resumed["random"])


class Moments(TrainerCallback):
    """Measures the held-out loss before the first step, and after an epoch's last one."""

    def __init__(self, trainer: AdapterLoop) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        del args, state, control, kwargs
        self.trainer.begin()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for a held-out loss if one is due; it comes before this step is saved."""
        del args, kwargs
        control.should_evaluate = self.trainer.evaluation_due(state.global_step)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the request back: the epoch's last step has been measured."""
        del args, state, kwargs
        control.should_evaluate = False


def take_token_count(batch: dict[str, Tensor]) -> int:
    mask, padding = batch.get("attention_mask"), batch.pop("padding", 0)
    return batch["input_ids"].numel() - int(padding) if mask is None else int(mask.sum())
