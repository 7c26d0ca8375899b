"""Base against tuned on rows of any kind, each by the metrics of its task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from inlay.cli.rows import answers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from inlay.cli.tuned import Tuned
    from inlay.data.rows import Rows
    from inlay.evaluate.record import ComparisonRecord


def compared(
    tuned: Tuned,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    max_length: int,
    limits: dict[str, Any],
) -> ComparisonRecord:
    """Return base against tuned on rows, as the run that they may come from measures them.

    Args:
        tuned: the adapter, and its run if there is one.
        model: the base with the adapter on it.
        tokenizer: the model's tokenizer.
        rows: the rows.
        max_length: tokens that a row keeps.
        limits: how much is generated, and at a time; as for `evaluate.run.compare`.
    """
    if rows.kind == "preference":
        return preferences(tuned, model, tokenizer, rows, max_length, limits)
    if rows.kind == "labelled":
        return labelled(tuned, model, tokenizer, rows, max_length, limits)
    from inlay.evaluate.run import compare
    from inlay.train.rows import encode_rows

    encoded = encode_rows(rows, tokenizer, max_length)
    return compare(model, tokenizer, rows, encoded, **limits).to_dict()


def preferences(
    tuned: Tuned,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    max_length: int,
    limits: dict[str, Any],
) -> ComparisonRecord:
    """Return how often each model prefers the better answer, by ORPO's measure after such a run."""
    from inlay.evaluate.odds import compare_odds
    from inlay.evaluate.preference import BETA, compare_pairs
    from inlay.train.rows import encode_pair_rows

    compare = compare_odds if tuned.run.get("task") == "orpo" else compare_pairs
    pairs = encode_pair_rows(rows, tokenizer, max_length)
    beta = tuned.run.get("beta") or BETA
    return compare(model, tokenizer, answers(rows), pairs, beta=beta, **limits)


def labelled(
    tuned: Tuned,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    max_length: int,
    limits: dict[str, Any],
) -> ComparisonRecord:
    """Return how well each model tells desirable answers from others."""
    from inlay.evaluate.labelled import Weights, compare_labelled
    from inlay.evaluate.preference import BETA
    from inlay.train.mismatched import mismatched
    from inlay.train.rows import encode_labelled_rows

    encoded = encode_labelled_rows(rows, tokenizer, max_length)
    return compare_labelled(
        model,
        tokenizer,
        rows,
        answers(rows),
        encoded,
        mismatched(encoded, max_length),
        beta=tuned.run.get("beta") or BETA,
        weights=Weights(**tuned.record.get("weights", {})),
        **limits,
    )
