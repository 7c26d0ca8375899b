"""Rows as tokens, each with whether it is trained on, exactly as TRL's SFTTrainer prepares them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self, TypeVar

from inlay.data.rows import Rows, first_lines
from inlay.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Encoded", "Lengths", "Piece", "Summary", "encode", "pieces", "summarise"]

Row = TypeVar("Row", bound="Encoded")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Encoded:
    """A row as tokens."""

    input_ids: list[int]
    trained: list[bool]
    """Which tokens are trained on; as long as `input_ids`."""
    length: int
    """Tokens before the row was cut to max_length."""
    prompt_kept: bool = True
    """Whether the prompt alone is tokenised as it is within the row."""
    ends: bool = False
    """Whether the last trained token is one at which generation stops."""

    @property
    def truncated(self) -> bool:
        """Whether tokens were cut off."""
        return self.length > len(self.input_ids)

    @property
    def identity(self) -> tuple[Any, ...]:
        """What tells the row from others: its tokens."""
        return tuple(self.input_ids)

    def followed_by(self, start: int, answer: Encoded, begin: int) -> Self:
        """Return the first `start` tokens before another row's from `begin` on, which train."""
        ids = self.input_ids[:start] + answer.input_ids[begin:]
        trained = [False] * start + [True] * (len(ids) - start)
        return replace(self, input_ids=ids, trained=trained, length=len(ids), ends=False)

    def everywhere(self) -> Self:
        """Return the row with all its tokens counted, its prompt's too."""
        return replace(self, trained=[True] * len(self.input_ids))

    @property
    def trained_tokens(self) -> int:
        """How many tokens the loss counts: the first has nothing before it to be predicted from."""
        return sum(self.trained[1:])


@dataclass(frozen=True)
class Lengths:
    """Tokens a row, before anything was cut."""

    min: int
    median: int
    p95: int
    max: int


@dataclass(frozen=True)
class Summary:
    """What training will see of the rows."""

    rows: int
    tokens: int
    """Tokens of all rows, after cutting."""
    trained_tokens: int
    lengths: Lengths
    truncated: list[int]
    """Lines of the rows that were cut."""
    unended: list[int]
    """Lines of the uncut rows that do not train the token at which generation stops."""
    unlike_prompt: list[int]
    """Lines of the rows whose prompt is tokenised otherwise on its own, as in generation."""
    skipped: list[int]
    """Lines of the rows that were left out because a field was empty."""

    @property
    def ends_trained(self) -> int:
        """How many rows train the token at which generation stops."""
        return self.rows - len(self.truncated) - len(self.unended)


@dataclass(frozen=True)
class Piece:
    """The text of one token, or of several that share a character."""

    text: str
    trained: bool


def encode(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    chat_template: str | None = None,
) -> list[Encoded]:
    """Return the rows as tokens, cut at the end to `max_length`.

    Text trains every token and the end; a completion trains its own tokens and the end, its
    prompt none; of messages the assistant's turns train.

    Args:
        rows: the rows.
        tokenizer: the model's tokenizer.
        max_length: tokens a row keeps at most.
        chat_template: used instead of the tokenizer's own, for one that marks what is generated.

    Raises:
        DataError: a row has no trained token left; names the lines and the length needed.
        ModelError: the tokenizer has no end token, or no chat template that fits the messages.
    """
    if rows.kind == "messages":
        whole = [chat_tokens(rows, i, tokenizer, chat_template) for i in range(len(rows))]
    elif rows.kind == "prompt_completion":
        whole = completion_tokens(rows, tokenizer)
    else:
        whole = text_tokens(rows, tokenizer)
    check_trained(whole, rows, max_length)
    stops = stop_tokens(tokenizer)
    cut = [cut_to(row, max_length) for row in whole]
    return [replace(row, ends=last_trained(row, tokenizer) in stops) for row in cut]


def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens at which generation can stop: the end token and those of chat turns."""
    vocabulary: Any = tokenizer
    return {*vocabulary.get_added_vocab().values(), vocabulary.eos_token_id}


def cut_to(row: Row, max_length: int) -> Row:
    """Return a row's first tokens."""
    ids, trained = row.input_ids[:max_length], row.trained[:max_length]
    return replace(row, input_ids=ids, trained=trained)


def check_trained(whole: Sequence[Encoded], rows: Rows, max_length: int) -> None:
    """Raise when a row has nothing to train on within `max_length`."""
    masked = [i for i, row in enumerate(whole) if not any(row.trained[1:max_length])]
    if not masked:
        return
    never = [i for i in masked if not any(whole[i].trained[1:])]
    if never:
        raise DataError(
            f"{named(rows, never)}: no token is trained on, so that there is nothing to learn; "
            "check the row and the chat template's generation marks"
        )
    needed = max(whole[i].length for i in masked)
    raise DataError(
        f"{named(rows, masked)}: the prompt fills all {max_length} tokens, so that no token is "
        f"left to train on; max_length {needed} keeps these rows whole"
    )


def named(rows: Rows, indices: Sequence[int]) -> str:
    """Return `data.csv, line 3 and 2 others (4, 9)`."""
    first = rows.where(indices[0])
    others = indices[1:]
    if not others:
        return first
    return f"{first} and {len(others)} more ({first_lines([rows.lines[i] for i in others])})"


# Text


def end_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of the token at which generation stops.

    Raises:
        ModelError: there is none, so that a tuned model could not stop.
    """
    end = tokenizer.eos_token
    if not isinstance(end, str) or not end:
        raise ModelError(
            "the tokenizer has no end token (eos_token), so that a tuned model would never stop; "
            "set it in the model's tokenizer_config.json"
        )
    return end


def ended(text: str, end: str) -> str:
    """Return text that ends with the end token."""
    return text if text.endswith(end) else text + end


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return each text's tokens, with the tokenizer's own special tokens around them."""
    encoding: Any = tokenizer(texts, verbose=False)
    return [list(ids) for ids in encoding["input_ids"]]


def text_tokens(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """Return plain texts, trained from start to end."""
    end = end_token(tokenizer)
    found = token_ids(tokenizer, [ended(row["text"], end) for row in rows.rows])
    return [Encoded(ids, [True] * len(ids), len(ids)) for ids in found]


def completion_tokens(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """Return prompts and completions, trained from where the prompt alone and the row differ."""
    end = end_token(tokenizer)
    prompts = token_ids(tokenizer, [row["prompt"] for row in rows.rows])
    texts = [row["prompt"] + ended(row["completion"], end) for row in rows.rows]
    found: list[Encoded] = []
    for prompt, ids in zip(prompts, token_ids(tokenizer, texts), strict=True):
        start = common_prefix(prompt, ids)
        trained = [False] * start + [True] * (len(ids) - start)
        found.append(Encoded(ids, trained, len(ids), prompt_kept=start == len(prompt)))
    return found


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two sequences share at their start."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


# Messages


def chat_tokens(
    rows: Rows, index: int, tokenizer: PreTrainedTokenizerBase, chat_template: str | None
) -> Encoded:
    """Return a conversation, trained where the assistant speaks.

    Raises:
        DataError: the template refuses the conversation.
        ModelError: there is no template, or none that shows what the assistant generates.
    """
    from jinja2 import TemplateError

    template = chat_template or own_template(tokenizer)
    messages = rows.rows[index]["messages"]
    try:
        if GENERATION.search(template):
            return marked_chat(tokenizer, messages, template)
        return plain_chat(tokenizer, messages, template)
    except TemplateError as error:
        raise DataError(
            f"{rows.where(index)}: the model's chat template refuses the messages: {error}"
        ) from error


def own_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the tokenizer's chat template.

    Raises:
        ModelError: it has none.
    """
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str):
        raise ModelError(
            "the model's tokenizer has no chat template, which messages need; take a chat model, "
            "or write the rows as prompt and completion"
        )
    return template


def marked_chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], template: str
) -> Encoded:
    """Return a conversation whose template marks what is generated."""
    found: Any = tokenizer.apply_chat_template(
        messages,
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"verbose": False},
    )
    ids = list(found["input_ids"])
    return Encoded(ids, [bool(mark) for mark in found["assistant_masks"]], len(ids))


def plain_chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], template: str
) -> Encoded:
    """Return a conversation whose template marks nothing: what each turn adds is generated."""

    def render(upto: int, generate: bool) -> str:
        text: Any = tokenizer.apply_chat_template(
            messages[:upto],
            chat_template=template,
            tokenize=False,
            add_generation_prompt=generate,
        )
        return text

    text = render(len(messages), False)
    spans: list[tuple[int, int]] = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = render(number, True), render(number + 1, False).rstrip()
            if not (text.startswith(after) and after.startswith(before)):
                raise ModelError(
                    "the model's chat template writes a turn otherwise once more turns follow, so "
                    "that what the assistant generates cannot be told; give a template with "
                    "{% generation %} marks"
                )
            spans.append((len(before), len(after)))
    encoding: Any = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    trained = [
        any(start < to and begin < end for begin, to in spans)
        for start, end in encoding["offset_mapping"]
    ]
    return Encoded(list(encoding["input_ids"]), trained, len(trained))


# What is shown


def summarise(encoded: Sequence[Encoded], rows: Rows) -> Summary:
    """Return the counts, lengths and lines a user should know before training."""

    def lines(chosen: Iterator[bool]) -> list[int]:
        return [line for line, is_chosen in zip(rows.lines, chosen, strict=True) if is_chosen]

    return Summary(
        rows=len(encoded),
        tokens=sum(len(row.input_ids) for row in encoded),
        trained_tokens=sum(row.trained_tokens for row in encoded),
        lengths=lengths([row.length for row in encoded]),
        truncated=lines(row.truncated for row in encoded),
        unended=lines(not row.truncated and not row.ends for row in encoded),
        unlike_prompt=lines(not row.prompt_kept for row in encoded),
        skipped=list(rows.skipped),
    )


def lengths(counts: Sequence[int]) -> Lengths:
    """Return the nearest-rank quantiles of token counts."""
    ordered = sorted(counts)

    def rank(q: float) -> int:
        return ordered[max(0, math.ceil(q * len(ordered)) - 1)]

    return Lengths(ordered[0], rank(0.5), rank(0.95), ordered[-1])


def last_trained(row: Encoded, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the last trained token that is not white space."""
    for token, trained in zip(reversed(row.input_ids), reversed(row.trained), strict=True):
        if trained and str(tokenizer.decode([token])).strip():
            return token
    return None


def pieces(row: Encoded, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """Return a row's text token by token, to be coloured by whether it is trained on.

    Tokens that hold only part of a character are shown together with the rest of it.
    """
    found: list[Piece] = []
    before: list[int] = []
    pending: list[int] = []
    for position, (token, trained) in enumerate(zip(row.input_ids, row.trained, strict=True)):
        pending.append(token)
        text = text_after(tokenizer, before, pending)
        following = row.trained[position + 1 : position + 2]
        if text.endswith("\ufffd") and following == [trained]:
            continue
        found.append(Piece(text, trained))
        before, pending = pending, []
    return found


def text_after(tokenizer: PreTrainedTokenizerBase, before: list[int], ids: list[int]) -> str:
    """Return the text of tokens as it is after others: some tokenizers drop a leading space."""
    whole, first = str(tokenizer.decode(before + ids)), str(tokenizer.decode(before))
    return whole.removeprefix(first)
