"""Texts that belong together as a run reads, encodes, plans and measures them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from inlay.data.inputs import InputRow, encode_texts
from inlay.data.rows import Rows
from inlay.data.similar import SIMILAR
from inlay.errors import DataError
from inlay.evaluate.outputs import accepted, padded_inputs
from inlay.evaluate.record import ComparisonRecord
from inlay.evaluate.run import Stage, Told, named
from inlay.evaluate.similar import Candidates, compared_retrieval, compared_scores
from inlay.evaluate.statistics import LEVEL
from inlay.memory.devices import Device
from inlay.model.adapters.attach import disabled
from inlay.model.load.heads import Head
from inlay.run.config import RunConfig
from inlay.train import planning
from inlay.train.embedder import Embedder, embedder, longest_in, save_modules
from inlay.train.head_planning import Planned, full_row, longest_row, reader
from inlay.train.overview import Example, Reading, example_of

HIDDEN = Head("embedding")
"""What a model of embeddings gives: its hidden states."""
SCALE = 20.0
"""What cosines are multiplied with before a softmax, as in sentence-transformers."""


@dataclass(frozen=True)
class SimilarRow:
    """The texts of a row as tokens, and how alike the first two are where the row says so."""

    texts: tuple[InputRow, ...]
    score: float | None = None

    @property
    def length(self) -> int:
        """How many tokens the longest text has, after cutting."""
        return max(len(row.input_ids) for row in self.texts)


def encode_similar(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[SimilarRow]:
    """Return the texts of every row as tokens, each cut at the end to `max_length`.

    Raises:
        DataError: a text gives no token.
    """
    names = SIMILAR[rows.kind]
    encoded = [encode_texts([r[name] for r in rows.rows], tokenizer, max_length) for name in names]
    for name, column in zip(names, encoded, strict=True):
        empty = next((i for i, row in enumerate(column) if not row.input_ids), None)
        if empty is not None:
            raise DataError(f"{rows.where(empty)}: {name!r} gives no token; take the row out")
    return [
        SimilarRow(texts, row.get("score"))
        for row, texts in zip(rows.rows, zip(*encoded, strict=True), strict=True)
    ]


def longest_text(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens a text may have with this model."""
    own = longest_in(config.model, config.revision)
    return min(longest_row(config, tokenizer), own or config.max_length)


@dataclass(frozen=True)
class PadSimilar:
    """Pads each column of texts by itself, and says which texts of a batch are the same."""

    padding: int
    multiple: int

    def __call__(self, rows: Sequence[SimilarRow | Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return `<n>_input_ids`, ... for each column, `same` or the `score`."""
        found = [row if isinstance(row, SimilarRow) else as_row(row) for row in rows]
        columns = list(zip(*(row.texts for row in found), strict=True))
        batch = {
            f"{number}_{name}": x
            for number, column in enumerate(columns)
            for name, x in padded_inputs(column, self.padding, self.multiple).items()
        }
        if found[0].score is not None:
            return {**batch, "score": torch.tensor([row.score for row in found])}
        return {**batch, "same": same_texts(columns)}


def as_row(values: Mapping[str, Any]) -> SimilarRow:
    """Return a row of a data set as `encode_similar` does."""
    types = values["types"] or [None] * len(values["texts"])
    pairs = zip(values["texts"], types, strict=True)
    texts = tuple(InputRow(ids, len(ids), types=types) for ids, types in pairs)
    return SimilarRow(texts, values["score"])


def same_texts(columns: Sequence[Sequence[InputRow]]) -> Tensor:
    """Return (rows, rows * other columns): whether a text is no negative of a row.

    It is its own positive's text in another row, or belongs to an equal anchor.
    """
    anchors, positives = (
        [tuple(row.input_ids) for row in column] for column in (columns[0], columns[1])
    )
    others = [tuple(row.input_ids) for column in columns[1:] for row in column]
    found = torch.tensor([[other == mine for other in others] for mine in positives])
    equal = torch.tensor([[other == mine for other in anchors] for mine in anchors])
    found[:, : len(anchors)] |= equal
    return found & ~torch.eye(len(anchors), len(others), dtype=torch.bool)


def columns_in(batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return the features of each column of texts."""
    numbers = sorted({int(n.split("_")[0]) for n in batch if n[0].isdigit()})
    return [
        {n.removeprefix(f"{i}_"): x for n, x in batch.items() if n.startswith(f"{i}_")}
        for i in numbers
    ]


# The plan


def rows_to_plan(config: RunConfig, encoded: Sequence[SimilarRow], multiple: int) -> planning.Rows:
    """Return the largest batch that the run's order yields, and how much data there is."""
    chosen = planning.largest_batch(config, [row.length for row in encoded])
    batch = PadSimilar(0, multiple)([encoded[i] for i in chosen])
    tokens = sum(len(text.input_ids) for row in encoded for text in row.texts)
    shown = {**batch, "input_ids": batch["0_input_ids"]}
    return planning.Rows(shown, len(encoded), tokens, len(encoded), step=step_loss, head=HIDDEN)


def step_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return a loss that keeps what training keeps: mean vectors, and their cosines."""
    vectors: list[Tensor] = []
    for column in columns_in(batch):
        hidden = model(**accepted(model, column)).last_hidden_state
        mask = column["attention_mask"][..., None].to(hidden.dtype)
        vectors.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    scores = SCALE * vectors[0] @ torch.cat(vectors[1:]).T
    return F.cross_entropy(scores, torch.arange(len(scores)))


def row_reader(
    config: RunConfig, device: Device, has_data: bool
) -> Callable[[RunConfig], planning.Rows]:
    """Return what works out a run's largest batch; without data, pairs of full length."""

    def prepare(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Planned:
        encoded = encode_similar(rows, tokenizer, longest_text(config, tokenizer))
        return lambda changed, multiple: rows_to_plan(changed, encoded, multiple)

    return reader(config, device, prepare if has_data else None, assumed_rows)


def assumed_rows(config: RunConfig) -> planning.Rows:
    """Return a batch of pairs as long as the run and the model allow."""
    rows = [SimilarRow((full_row(config), full_row(config)))] * config.batch_size
    planned = rows_to_plan(config, rows, 1)
    return replace(planned, count=0, tokens=0, trained_tokens=0, assumed=True)


# What the verbs ask for


def reading(
    config: RunConfig, train: Rows, tokenizer: PreTrainedTokenizerBase
) -> Reading[SimilarRow]:
    """Return how texts that belong together are read and shown."""
    longest = longest_text(config, tokenizer)

    def examples(index: int, row: SimilarRow) -> list[Example]:
        score = "" if row.score is None else f", score {row.score:g}"
        named = zip(SIMILAR[train.kind], row.texts, strict=True)
        where = train.where(index)
        return [example_of(where, text, tokenizer, name + score) for name, text in named]

    return Reading(
        train.kind.replace("_", " "),
        longest,
        lambda part: encode_similar(part, tokenizer, longest),
        lambda row: row.texts,
        examples,
    )


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    config: RunConfig,
    **told: Unpack[Told],
) -> ComparisonRecord:
    """Return base against tuned on texts that belong together."""
    whole = embedder(model, config.model, config.revision, config.pooling or "auto")
    encoded = encode_similar(rows, tokenizer, longest_text(config, tokenizer))
    return compare_similar(model, whole, rows, encoded, **told)


def compare_similar(
    model: PreTrainedModel,
    whole: Embedder,
    rows: Rows,
    encoded: Sequence[SimilarRow],
    batch_size: int,
    on_progress: Stage | None = None,
) -> ComparisonRecord:
    """Measure the embeddings with the model's active adapters, and without, on the same rows.

    Raises:
        DataError: there are no rows.
        ModelError: an embedding is not finite.
    """
    if not encoded:
        raise DataError("there are no held-out rows; give more rows or another split")
    tuned = vectors_of(whole, encoded, batch_size, named("tuned", on_progress))
    with disabled(model):
        base = vectors_of(whole, encoded, batch_size, named("base", on_progress))
    if rows.kind == "scored_pairs":
        metrics = compared_scores(base, tuned, [row["score"] for row in rows.rows])
    else:
        metrics = compared_retrieval(base, tuned, candidates_of(rows))
    return {
        "rows": len(encoded),
        "tokens": sum(len(text.input_ids) for row in encoded for text in row.texts),
        "counted": "tokens",
        "generated_rows": 0,
        "level": LEVEL,
        "metrics": metrics,
        "examples": [],
    }


def candidates_of(rows: Rows) -> Candidates:
    """Return what the rows' anchors are to find, and among what."""
    return Candidates.of(*([row[name] for row in rows.rows] for name in ("anchor", "positive")))


def vectors_of(
    whole: Embedder, encoded: Sequence[SimilarRow], batch_size: int, on_progress: Stage | None
) -> list[Tensor]:
    """Return the vectors of every column of texts, each (rows, width)."""
    columns = list(zip(*(row.texts for row in encoded), strict=True))
    flat = [text for column in columns for text in column]
    told = on_progress and (lambda done, total: on_progress("embeddings", done, total))
    return list(whole.embed(flat, batch_size, told).chunk(len(columns)))


def inputs_of(
    model: PreTrainedModel, rows: Rows, tokenizer: PreTrainedTokenizerBase, config: RunConfig
) -> list[dict[str, Tensor]]:
    """Return each anchor as a batch of its own."""
    encoded = encode_similar(rows, tokenizer, longest_text(config, tokenizer))
    return [accepted(model, padded_inputs([row.texts[0]], 0, 1)) for row in encoded]


def finish_merged(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, config: RunConfig
) -> None:
    """Make a merged model's folder one that sentence-transformers loads."""
    whole = embedder(model, config.model, config.revision, config.pooling or "auto")
    save_modules(folder, list(whole.behind), longest_text(config, tokenizer))
