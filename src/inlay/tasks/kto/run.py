"""A run on labelled rows: desirable answers rather than undesirable ones, by TRL's KTOTrainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from inlay.data.image_inputs import kinds_beside
from inlay.data.rows import Rows
from inlay.data.summary import summarise
from inlay.data.tokens import Encoded
from inlay.errors import DataError
from inlay.evaluate.comparison import Limits
from inlay.evaluate.images import joining
from inlay.evaluate.losses import PADDING
from inlay.evaluate.record import ComparisonRecord
from inlay.model.adapters.attach import disabled
from inlay.model.fast.padding import length_multiple
from inlay.tasks.kto import KtoConfig
from inlay.tasks.kto.compare import Judgements, Weights, compare_labelled, labelled_losses
from inlay.tasks.kto.mismatched import mismatched, mismatched_in_batches
from inlay.tasks.kto.rows import Labelled, by_label, desirable_of, encode_labelled
from inlay.tasks.kto.trainer import LabelledTrainer, columns
from inlay.tasks.kto.weights import advised, weights_of
from inlay.train.answers import check_answers
from inlay.train.arguments import shared
from inlay.train.collate import Collate, WithImages, items_of
from inlay.train.language_run import LanguageRun, Sides
from inlay.train.order import kept_order
from inlay.train.planning import model_loss
from inlay.train.reference import labelled_inputs
from inlay.train.task_run import Setup, Tokens
from inlay.train.trainer import HeldOut

KL = "KL_"
"""What the inputs of the pass without a gradient begin with, as TRL's KTOTrainer names them."""


class KtoRun(LanguageRun[KtoConfig, Labelled]):
    """A run that trains a model to give desirable answers rather than undesirable ones."""

    weights: Weights = Weights()
    """How much a row of each label weighs; settled once the training rows are known."""

    def recall(self, model: PreTrainedModel, rows: Rows, record: Mapping[str, Any]) -> None:
        super().recall(model, rows, record)
        self.weights = Weights(**record.get("weights", {}))

    def encode(self, rows: Rows) -> list[Labelled]:
        return encode_labelled(rows, self.reader, self.config.max_length)

    def check(self, rows: Rows, encoded: list[Labelled]) -> None:
        check_labels(rows, "to train on")
        good, bad = (
            summarise([encoded[i].answer for i in part], rows.take(part)) for part in by_label(rows)
        )
        kinds, longest = ("desirable", "undesirable"), self.config.max_length
        check_answers(good, bad, kinds, longest, rows.source, self.note_lines)
        self.weights = weights_of(self.config, good.rows, bad.rows)
        self.note(advised(self.weights, good.rows, bad.rows))

    def check_held_out(self, rows: Rows) -> None:
        check_labels(rows, "held out to compare base and tuned on")

    def texts(self, row: Labelled) -> Sequence[Encoded]:
        return [row.answer]

    def sides(self, rows: Rows, encoded: list[Labelled]) -> Sides:
        parts = dict(zip(("desirable", "undesirable"), by_label(rows), strict=True))
        return {
            name: (rows.take(part), [encoded[i].answer for i in part])
            for name, part in parts.items()
            if part
        }

    # A step

    def arrange(self, lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[int]:
        return kept_order(lengths, batch_size, seed, epoch)

    def columns(self, rows: Sequence[Labelled]) -> dict[str, list[Any]]:
        return columns(rows, self.others(rows))

    def others(self, rows: Sequence[Labelled]) -> list[Encoded]:
        """Return each row's prompt with the answer of the row before it in its batch."""
        config = self.config
        return mismatched_in_batches(rows, self.share.rows, config.seed, config.max_length)

    def collator(self, rows: Sequence[Labelled], multiple: int) -> Collate:
        return self.collator_with(rows, self.others(rows), multiple)

    def batch_of(
        self, rows: Sequence[Labelled], numbers: Sequence[int], multiple: int
    ) -> dict[str, Any]:
        every = self.others(rows)
        chosen, others = [rows[i] for i in numbers], [every[i] for i in numbers]
        return self.collator_with(chosen, others, multiple)(items_of(columns(chosen, others)))

    def collator_with(
        self, rows: Sequence[Labelled], others: Sequence[Encoded], multiple: int
    ) -> Collate:
        collate = DataCollatorForUnpairedPreference(PADDING, pad_to_multiple_of=multiple)
        if self.images is None:
            return collate
        inputs = self.images.inputs

        def seen(numbers: Sequence[int], batch: dict[str, Any]) -> dict[str, Tensor]:
            widths = [batch[f"{prefix}input_ids"].shape[1] for prefix in ("", KL)]
            kinds = kinds_beside([others[number] for number in numbers], widths[1])
            own = inputs([rows[number].answer for number in numbers], width=widths[0])
            return {**own, **{f"{KL}{name}": value for name, value in kinds.items()}}

        return WithImages(collate, seen)

    def planned_inputs(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        other = labelled_inputs(batch, KL)
        return {**labelled_inputs(batch), **{f"{KL}{n}": value for n, value in other.items()}}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return the loss of own answers, after a pass over mismatched ones without a gradient."""
        own = {name: value for name, value in batch.items() if not name.startswith(KL)}
        other = {n.removeprefix(KL): x for n, x in batch.items() if n.startswith(KL)}
        with torch.no_grad():
            model(**other, use_cache=False)
        return model_loss(model, own)

    def full_row(self) -> Labelled:
        length = self.config.max_length
        return Labelled(Encoded([0] * length, [True] * length, length), True)

    # Training

    def images_come_again(self, rows: int) -> bool:
        """Return True: each row is shown twice, and to the reference."""
        del rows
        return True

    def prepare(
        self, model: PreTrainedModel, tokens: Tokens[Labelled], record: dict[str, Any]
    ) -> None:
        """Record the weights of both labels in run.json, where `eval` reads them."""
        del model, tokens
        record["weights"] = asdict(self.weights)

    def trainer(self, setup: Setup[Labelled]) -> LabelledTrainer:
        """Return the trainer, nothing trained yet; the reference is measured here.

        TRL refuses passes of one row, which may be the part of a pass that one process runs.
        """
        model, rows = setup.model, setup.tokens.train
        ours = shared(KTOConfig, self.config, model, setup.checkpoints, setup.learning_rate)
        ours["per_device_train_batch_size"] = self.share.rows
        return LabelledTrainer(
            model,
            setup.tokenizer,
            self.columns(rows),
            KTOConfig(
                **ours,
                beta=self.config.beta,
                desirable_weight=self.weights.desirable,
                undesirable_weight=self.weights.undesirable,
                loss_type="kto",
                disable_dropout=True,
                precompute_ref_log_probs=True,
                train_sampling_strategy="sequential",
                max_length=None,
                remove_unused_columns=False,
            ),
            collate=self.collator(rows, length_multiple(model)),
            held_out=self.held_out(model, setup.tokens.validation),
            **setup.watched,
        )

    def held_out(self, model: PreTrainedModel, rows: list[Labelled]) -> HeldOut | None:
        if not rows:
            return None
        size, join = max(self.config.batch_size, 8), joining(self.seeing)
        labels, others = [row.desirable for row in rows], mismatched(rows, self.config.max_length)
        if len(set(labels)) == 1:
            self.note("the validation rows have one label: no margin or AUC is measured on them")
        with disabled(model):
            reference = labelled_losses(model, rows, others, size, join=join)

        def measure() -> Mapping[str, float]:
            found = labelled_losses(model, rows, others, size, join=join)
            return Judgements(found, reference, labels, self.config.beta, self.weights).means()

        return measure

    # Measuring

    def answers(self, rows: Rows) -> Rows:
        return desirable_of(rows)

    def compare(
        self, model: PreTrainedModel, rows: Rows, encoded: list[Labelled], limits: Limits
    ) -> ComparisonRecord:
        return compare_labelled(
            model,
            self.tokenizer,
            rows,
            self.answers(rows),
            encoded,
            mismatched(encoded, self.config.max_length),
            beta=self.config.beta,
            weights=self.weights,
            **{**limits, "seeing": self.seeing},
        )


def check_labels(rows: Rows, purpose: str) -> None:
    good, bad = by_label(rows)
    if not good or not bad:
        raise DataError(
            f"{rows.source}: the {len(rows)} rows {purpose} are all "
            f"{'desirable' if good else 'undesirable'}, and both are needed; give more rows, "
            "another split, or eval_data with both"
        )
