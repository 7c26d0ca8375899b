"""What an answer is worth: built-in functions, each made from its arguments by name.

A reward is called as TRL calls one: with `prompts`, `completions`, `completion_ids` and every
column of the rows by name, one value an answer in each; it returns one number an answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from inlay.errors import UsageError

Function = Callable[..., Sequence[float | None]]
"""Called with what is to be judged, by name; None stands for an answer it does not judge."""


def final_number(*, column: str = "answer") -> Function:
    """Return a reward of 1 where an answer's last number is that of the row's column, else 0.

    In both texts the number is read after the last `####` where there is one, as GSM8K writes it:
    the answer "5 + 2 = 7. #### 7" is worth 1 where the column holds "#### 7", or "7", or 7.0.

    Args:
        column: the column with the right answer.
    """
    check(is_text(column), "final_number", "column", "the name of a column", column)
    from inlay.evaluate.metrics import number_match  # brings much that a run file's checks spare

    def score(completions: Sequence[Any], **columns: Sequence[Any]) -> list[float]:
        pairs = zip(completions, columns[column], strict=True)
        return [number_match(text_of(completion), str(right)) for completion, right in pairs]

    return reading(score, column)


def json_valid(*, keys: Sequence[str] = ()) -> Function:
    """Return a reward of 1 where an answer is JSON, an object with these keys if any, else 0.

    Args:
        keys: what the object must hold; other keys may stand beside them.
    """
    fits = isinstance(keys, list | tuple) and all(map(is_text, keys))
    check(fits, "json", "keys", "a list of names", keys)

    def score(completions: Sequence[Any], **columns: Sequence[Any]) -> list[float]:
        del columns
        return [float(holds(text_of(completion), keys)) for completion in completions]

    return reading(score)


def holds(text: str, keys: Sequence[str]) -> bool:
    try:
        found = json.loads(text, parse_constant=not_json)
    except (ValueError, RecursionError):
        return False
    return not keys or (isinstance(found, dict) and all(key in found for key in keys))


def not_json(word: str) -> float:
    """Refuse NaN and Infinity, which Python reads and JSON does not know."""
    raise ValueError(word)


def regex(*, pattern: str) -> Function:
    r"""Return a reward of 1 where a pattern is found somewhere in an answer, else 0.

    Args:
        pattern: a regular expression of Python's; `^` and `$` are the ends of the answer.
    """
    check(is_text(pattern), "regex", "pattern", "a regular expression", pattern)
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(
            f"the reward 'regex': {pattern!r} is no regular expression: {error}"
        ) from None

    def score(completions: Sequence[Any], **columns: Sequence[Any]) -> list[float]:
        del columns
        return [float(bool(compiled.search(text_of(completion)))) for completion in completions]

    return reading(score)


def length(*, most: int, least: int = 0) -> Function:
    """Return a reward of 1 where an answer has `least` to `most` tokens; outside, less and less.

    n tokens are worth most / n where they are too many, and n / least where they are too few.

    Args:
        most: tokens an answer may have.
        least: tokens an answer must have.
    """
    check(is_count(most) and most > 0, "length", "most", "a whole number of at least 1", most)
    fits = is_count(least) and least <= most
    check(fits, "length", "least", f"a whole number from 0 to {most}", least)

    def score(completion_ids: Sequence[Sequence[int]], **columns: Sequence[Any]) -> list[float]:
        del columns
        counts = [len(ids) for ids in completion_ids]
        return [min(1.0, most / max(n, 1), n / max(least, 1) if least else 1.0) for n in counts]

    return reading(score)


BUILT_IN: Mapping[str, Callable[..., Function]] = {
    "final_number": final_number,
    "json": json_valid,
    "regex": regex,
    "length": length,
}
"""The name of each built-in reward, and what makes it from its arguments."""


def reading(score: Function, *columns: str) -> Function:
    score.columns = columns  # pyright: ignore[reportFunctionMemberAccess]
    return score


def is_text(value: object) -> bool:
    return isinstance(value, str)


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check(fits: bool, reward: str, argument: str, wanted: str, value: object) -> None:
    if not fits:
        raise UsageError(f"the reward {reward!r}: {argument!r} must be {wanted}, not {value!r}")


def text_of(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """Return an answer's text; the answer to a conversation is a list of one message."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
