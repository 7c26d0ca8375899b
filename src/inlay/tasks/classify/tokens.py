"""Labelled rows as tokens: a text or two, or words of which the first piece carries the tag."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from inlay.data.inputs import InputRow, encode_texts
from inlay.data.rows import Rows
from inlay.errors import DataError, ModelError
from inlay.kernels.loss import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_labels(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int, classes: Sequence[str]
) -> list[InputRow]:
    """Return the rows as tokens, cut at the end to `max_length`, with their labels as numbers.

    Args:
        rows: rows that `normalise_labels` returned.
        tokenizer: the model's tokenizer.
        max_length: tokens a row keeps at most.
        classes: the classes in the order of the model's outputs; none where labels are numbers.
    """
    if rows.kind == "tags":
        return tagged_rows(rows, tokenizer, max_length, classes)
    second = [row["text_pair"] for row in rows.rows] if "text_pair" in rows.rows[0] else None
    found = encode_texts([row["text"] for row in rows.rows], tokenizer, max_length, second)
    place = {label: number for number, label in enumerate(classes)}
    for index, row in enumerate(found):
        if not row.input_ids:
            raise DataError(f"{rows.where(index)}: the text gives no token; take the row out")
    return [
        InputRow(row.input_ids, row.length, numbered(raw["label"], place), row.types)
        for row, raw in zip(found, rows.rows, strict=True)
    ]


def numbered(label: Any, place: dict[str, int]) -> int | float | list[float]:
    if isinstance(label, list):
        return [float(name in label) for name in place]
    return place[label] if isinstance(label, str) else float(label)


def tagged_rows(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int, classes: Sequence[str]
) -> list[InputRow]:
    """Return words as tokens; the first token of a word carries its tag, the others none.

    The words are joined by spaces, and a token belongs to the word its last character is of: so
    it holds for tokenizers that split at spaces and for those that keep them.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            "tags of words need a tokenizer that says which characters a token stands for, and "
            f"{type(tokenizer).__name__} does not; use a model with a tokenizer.json"
        )
    texts = [" ".join(row["tokens"]) for row in rows.rows]
    whole: Any = tokenizer(texts, verbose=False, return_offsets_mapping=True)["offset_mapping"]
    limit: dict[str, Any] = {"truncation": True, "max_length": max_length}
    cut: Any = tokenizer(texts, verbose=False, return_offsets_mapping=True, **limit)
    place = {label: number for number, label in enumerate(classes)}
    found: list[InputRow] = []
    for index, row in enumerate(rows.rows):
        check_words(rows, index, row["tokens"], first_tokens(row["tokens"], whole[index]))
        labels = [IGNORED] * len(cut["input_ids"][index])
        for word, token in first_tokens(row["tokens"], cut["offset_mapping"][index]).items():
            labels[token] = place[row["tags"][word]]
        types = list(cut["token_type_ids"][index]) if "token_type_ids" in cut else None
        ids = list(cut["input_ids"][index])
        found.append(InputRow(ids, len(whole[index]), labels, types))
    return found


def first_tokens(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Return the number of each word's first token, given the characters tokens stand for."""
    owner = [n for n, word in enumerate(words) for _ in range(len(word) + 1)]
    text = " ".join(words)
    found: dict[int, int] = {}
    for number, (start, end) in enumerate(offsets):
        if end > start and not text[end - 1].isspace():
            found.setdefault(owner[end - 1], number)
    return found


def check_words(rows: Rows, index: int, words: Sequence[str], firsts: dict[int, int]) -> None:
    """Raise when a word has no token of its own, so that its tag would be lost."""
    lost = next((number for number in range(len(words)) if number not in firsts), None)
    if lost is not None:
        raise DataError(
            f"{rows.where(index)}: word {lost + 1}, {words[lost]!r}, has no token of its own with "
            "this tokenizer, so that its tag would be lost; join it with its neighbour"
        )
