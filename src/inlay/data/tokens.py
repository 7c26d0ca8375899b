"""Rows as tokens, each with whether it is trained on, exactly as TRL's SFTTrainer prepares them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, Self

from inlay.data.picture import Picture
from inlay.data.rows import Rows, first_lines
from inlay.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from inlay.data.summary import Piece

UNCUT = 1 << 60
"""More tokens than any row has."""


@dataclass(frozen=True)
class Encoded:
    """A row as tokens, with the images that go into it."""

    input_ids: list[int]
    trained: list[bool]
    """Which tokens are trained on; as long as `input_ids`."""
    length: int
    """Tokens before the row was cut to max_length."""
    prompt_kept: bool = True
    """Whether the prompt alone is tokenised as it is within the row."""
    ends: bool = False
    """Whether the last trained token is one at which generation stops."""
    text: str = ""
    """The row as its chat template writes it, where it has images."""
    pictures: tuple[Picture, ...] = ()
    kinds: Mapping[str, Sequence[int]] = field(default_factory=dict[str, Sequence[int]])
    """Further inputs of a token each, uncut, such as whether an image stands there."""
    image_tokens: frozenset[int] = frozenset()
    """The tokens that stand for images."""

    @property
    def truncated(self) -> bool:
        return self.length > len(self.input_ids)

    @property
    def images(self) -> tuple[str, ...]:
        """The hashes of the row's images."""
        return tuple(picture.sha256 for picture in self.pictures)

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal for rows of the same images and tokens."""
        return (self.images, *self.input_ids)

    def followed_by(self, start: int, answer: Encoded, begin: int) -> Self:
        """Return the first `start` tokens before another row's from `begin` on, which train."""
        ids = self.input_ids[:start] + answer.input_ids[begin:]
        trained = [False] * start + [True] * (len(ids) - start)
        kinds = {n: [*own[:start], *answer.kinds[n][begin:]] for n, own in self.kinds.items()}
        return replace(
            self, input_ids=ids, trained=trained, length=len(ids), ends=False, kinds=kinds
        )

    def everywhere(self) -> Self:
        """Return the row with all its tokens trained, its prompt's too, and without images."""
        return replace(self, trained=[token not in self.image_tokens for token in self.input_ids])

    @property
    def trained_tokens(self) -> int:
        """The number of tokens that the loss counts; the first has no token before it."""
        return sum(self.trained[1:])


class Reader(Protocol):
    """What writes rows as tokens: a tokenizer, or a processor where rows have images."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    def whole(self, sides: Sequence[Rows], max_length: int) -> Sequence[list[Encoded]]:
        """Return the rows of every side as tokens, uncut; sides of a row show the same images."""
        ...

    def pieces(self, row: Encoded) -> list[Piece]:
        """Return a row's text token by token."""
        ...


def encode(rows: Rows, reader: Reader, max_length: int) -> list[Encoded]:
    """Return the rows as tokens, cut at the end to `max_length`.

    Text trains every token and the end; a completion trains its own tokens and the end, its
    prompt none; of messages the assistant's turns train.
    """
    (whole,) = reader.whole([rows], max_length)
    check_trained(whole, rows, max_length)
    return with_ends([cut_to(row, max_length) for row in whole], reader.tokenizer)


def encode_whole(sides: Sequence[Rows], reader: Reader, max_length: int) -> list[list[Encoded]]:
    """Return the rows of every side as tokens, uncut; the errors are those of `encode`."""
    found = reader.whole(sides, max_length)
    for rows, whole in zip(sides, found, strict=True):
        check_trained(whole, rows, UNCUT)
    return [with_ends(whole, reader.tokenizer) for whole in found]


def with_ends(rows: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """Set for each row whether its last trained token is one at which generation stops."""
    stops = stop_tokens(tokenizer)
    return [replace(row, ends=last_trained(row, tokenizer) in stops) for row in rows]


def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens at which generation can stop: the end token and those of chat turns."""
    vocabulary: Any = tokenizer
    return {*vocabulary.get_added_vocab().values(), vocabulary.eos_token_id}


def cut_to(row: Encoded, max_length: int) -> Encoded:
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


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def last_trained(row: Encoded, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the last trained token that is not white space, or None."""
    for token, trained in zip(reversed(row.input_ids), reversed(row.trained), strict=True):
        if trained and str(tokenizer.decode([token])).strip():
            return token
    return None
