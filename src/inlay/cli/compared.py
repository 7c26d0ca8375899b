"""Base against tuned on rows of any kind, each by the metrics of its task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from inlay.cli.rows import answers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from inlay.cli.tuned import Tuned
    from inlay.data.rows import Rows
    from inlay.evaluate.record import ComparisonRecord


@dataclass(frozen=True)
class Comparing:
    """Base against tuned on some rows, as the run that they may come from measures them."""

    tuned: Tuned
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rows: Rows
    max_length: int
    """Tokens that a row keeps."""
    limits: dict[str, Any]
    """How much is generated, and at a time; as for `evaluate.run.compare`."""
    longest: int | None = None
    """Tokens that an answer to a prompt may have; None for as many as in the run."""
    max_pixels: int | None = None
    """Pixels that an image keeps."""

    def record(self) -> ComparisonRecord:
        """Return the comparison."""
        kinds = {
            "preference": self.preferences,
            "labelled": self.labelled,
            "prompt": self.rewarded,
        }
        return kinds.get(self.rows.kind, self.supervised)()

    @property
    def beta(self) -> float:
        """How near the run held the model to the base."""
        from inlay.evaluate.preference import BETA

        return self.tuned.run.get("beta") or BETA

    def rewarded(self) -> ComparisonRecord:
        """Return what the answers of each model are worth by the run's rewards."""
        from inlay.evaluate.reward import compare_rewards
        from inlay.run.config import checked_config
        from inlay.train.judge import judge_of
        from inlay.train.judging import judging
        from inlay.train.rows import encode_rows

        config = checked_config(self.tuned.run, source="run.json")
        if self.longest is not None:
            config = config.model_copy(update={"max_completion_tokens": self.longest})
        judge = judge_of(config.rewards or [])
        encoded = encode_rows(self.rows, self.tokenizer, self.max_length)
        prompts = judging(config, judge, self.rows, encoded, "in this evaluation")
        passed = {name: self.limits[name] for name in ("batch_size", "on_progress")}
        return compare_rewards(self.model, self.tokenizer, prompts, **passed)

    def reading(self) -> tuple[Any, dict[str, Any]]:
        """Return what writes the rows as tokens, and the limits with what gives their images."""
        from inlay.cli.reading import reading

        base, revision = self.tuned.base, self.tuned.run.get("revision")
        reader, seeing = reading(
            self.rows, self.model, self.tokenizer, self.max_pixels, base, revision
        )
        return reader, {**self.limits, "seeing": seeing}

    def supervised(self) -> ComparisonRecord:
        """Return how well each model says what the rows do."""
        from inlay.evaluate.run import compare
        from inlay.train.rows import encode_rows

        reader, limits = self.reading()
        encoded = encode_rows(self.rows, reader, self.max_length)
        return compare(self.model, self.tokenizer, self.rows, encoded, **limits).to_dict()

    def preferences(self) -> ComparisonRecord:
        """Return how often each model prefers the better answer, by ORPO's measure after ORPO."""
        from inlay.evaluate.odds import compare_odds
        from inlay.evaluate.preference import compare_pairs
        from inlay.train.rows import encode_pair_rows

        compare = compare_odds if self.tuned.run.get("task") == "orpo" else compare_pairs
        reader, limits = self.reading()
        pairs = encode_pair_rows(self.rows, reader, self.max_length)
        chosen = answers(self.rows)
        return compare(self.model, self.tokenizer, chosen, pairs, beta=self.beta, **limits)

    def labelled(self) -> ComparisonRecord:
        """Return how well each model tells desirable answers from others."""
        from inlay.evaluate.labelled import Weights, compare_labelled
        from inlay.train.mismatched import mismatched
        from inlay.train.rows import encode_labelled_rows

        reader, limits = self.reading()
        encoded = encode_labelled_rows(self.rows, reader, self.max_length)
        return compare_labelled(
            self.model,
            self.tokenizer,
            self.rows,
            answers(self.rows),
            encoded,
            mismatched(encoded, self.max_length),
            beta=self.beta,
            weights=Weights(**self.tuned.record.get("weights", {})),
            **limits,
        )
