"""A run on labelled rows: desirable answers rather than undesirable ones, by TRL's KTOTrainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.kto_config import KTOConfig

from inlay.data.labelled import Labelled, by_label, desirable_of
from inlay.data.rows import Rows
from inlay.data.tokens import Encoded, summarise
from inlay.errors import DataError
from inlay.evaluate.images import joining
from inlay.evaluate.labelled import Judgements, Weights, compare_labelled, labelled_losses
from inlay.evaluate.record import ComparisonRecord
from inlay.memory.devices import Device
from inlay.model.adapters.attach import disabled
from inlay.model.fast.padding import length_multiple
from inlay.train import planning
from inlay.train.answers import check_answers
from inlay.train.arguments import shared
from inlay.train.kto_trainer import LabelledTrainer, labelled_batch
from inlay.train.mismatched import mismatched, mismatched_in_batches
from inlay.train.rows import RunRows, encode_labelled_rows
from inlay.train.running import Running, Tokens
from inlay.train.trainer import HeldOut
from inlay.train.weights import advised, weights_of


class Stages(Running[Labelled]):
    """A run that trains a model to give desirable answers rather than undesirable ones."""

    weights: Weights
    """How much a row of each label weighs; settled once the training rows are known."""

    @property
    def beta(self) -> float:
        """How near the model is held to the base."""
        assert self.config.beta is not None
        return self.config.beta

    def encode(self, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[Labelled]:
        """Return rows as tokens."""
        return encode_labelled_rows(rows, tokenizer, self.config.max_length)

    def check_rows(self, rows: Rows, encoded: list[Labelled]) -> None:
        """Raise when one label is missing or no desirable answer ends; tell of what was cut."""
        check_labels(rows, "to train on")
        good, bad = (
            summarise([encoded[i].answer for i in part], rows.take(part)) for part in by_label(rows)
        )
        kinds, longest = ("desirable", "undesirable"), self.config.max_length
        check_answers(good, bad, kinds, longest, rows.source, self.note_lines)
        self.weights = weights_of(self.config, good.rows, bad.rows)
        self.note(advised(self.weights, good.rows, bad.rows))

    def tokens(self) -> tuple[Tokens[Labelled], RunRows]:
        """Read the rows and encode them; raise where the end's comparison would lack a label."""
        tokens, rows = super().tokens()
        if self.config.evaluate and tokens.test:
            check_labels(tokens.test_rows, "held out to compare base and tuned on")
        return tokens, rows

    def largest(self, encoded: list[Labelled], device: Device) -> planning.Rows:
        """Return the largest batch, and the largest of answers to other rows' prompts."""
        multiple = planning.padding_multiple(self.config, device)
        return planning.labelled_to_plan(self.config, encoded, multiple)

    def prepare(
        self, model: PreTrainedModel, tokens: Tokens[Labelled], record: dict[str, Any]
    ) -> None:
        """Keep the weights of both labels in the run's record, from which `eval` takes them."""
        del model, tokens
        record["weights"] = asdict(self.weights)

    def trainer(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tokens: Tokens[Labelled],
        record: dict[str, Any],
    ) -> LabelledTrainer:
        """Return the trainer, nothing trained yet; the reference is measured here."""
        config, rows = self.config, tokens.train
        others = mismatched_in_batches(rows, self.share.rows, config.seed, config.max_length)
        return LabelledTrainer(
            model,
            tokenizer,
            rows,
            others,
            self.arguments(model, record["learning_rate"]["value"]),
            collate=self.collate(model, rows, others),
            held_out=self.held_out(model, tokens.validation),
            **self.watched(),
        )

    def collate(
        self, model: PreTrainedModel, rows: list[Labelled], others: list[Encoded]
    ) -> Callable[..., Any]:
        """Return what makes a batch of rows, each with its own answer and another row's."""
        del rows, others
        return labelled_batch(length_multiple(model))

    def arguments(self, model: PreTrainedModel, learning_rate: float) -> KTOConfig:
        """Return TRL's arguments; the loss is the one of the paper.

        TRL refuses passes of one row, which may be the part of a pass that one process runs.
        """
        ours = shared(KTOConfig, self.config, model, self.folder.checkpoints, learning_rate)
        ours["per_device_train_batch_size"] = self.share.rows
        return KTOConfig(
            **ours,
            beta=self.beta,
            desirable_weight=self.weights.desirable,
            undesirable_weight=self.weights.undesirable,
            loss_type="kto",
            disable_dropout=True,
            precompute_ref_log_probs=True,
            train_sampling_strategy="sequential",
            max_length=None,
        )

    def held_out(self, model: PreTrainedModel, rows: list[Labelled]) -> HeldOut | None:
        """Return what measures the loss on held-out rows, or None when there are none."""
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
            return Judgements(found, reference, labels, self.beta, self.weights).means()

        return measure

    def measured(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Tokens[Labelled]
    ) -> ComparisonRecord:
        """Return base against tuned on the test rows."""
        return compare_labelled(
            model,
            tokenizer,
            tokens.test_rows,
            desirable_of(tokens.test_rows),
            tokens.test,
            mismatched(tokens.test, self.config.max_length),
            beta=self.beta,
            weights=self.weights,
            generate_rows=self.config.generate_rows,
            max_new_tokens=self.config.generate_tokens,
            batch_size=max(self.config.batch_size, 8),
            seeing=self.seeing,
        )


def check_labels(rows: Rows, purpose: str) -> None:
    """Raise unless a part of the rows has both labels."""
    good, bad = by_label(rows)
    if not good or not bad:
        raise DataError(
            f"{rows.source}: the {len(rows)} rows {purpose} are all "
            f"{'desirable' if good else 'undesirable'}, and both are needed; give more rows, "
            "another split, or eval_data with both"
        )
