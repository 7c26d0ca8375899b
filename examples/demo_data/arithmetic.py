"""Generated arithmetic problems of one and two steps, worded and answered as GSM8K's are.

A story begins with a number of things, counted or multiplied, and up to two changes follow. The
answer works them out, a step a line, and ends in `#### n`. The numbers are small, so that a small
model can learn them: one factor is at most 5, one summand at most 9, and a result at most 43.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

__all__ = ["Problem", "generate_problems"]

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Julia", "Karl")
THINGS = ("apples", "books", "cards", "coins", "eggs", "marbles", "pens", "stamps", "shells")
COUNTED = ("{name} has {n} {things}.", "There are {n} {things} on {name}'s table.")
PACKED = (
    "{name} has {k} boxes with {n} {things} in each.",
    "{name} buys {k} bags of {n} {things}.",
)
GAINED = (
    "{name} finds {n} more.",
    "{friend} gives {name} {n} more {things}.",
    "Then {name} buys another {n}.",
)
LOST = (
    "{name} gives {n} of them to {friend}.",
    "Then {name} loses {n} of the {things}.",
    "{name} sells {n}.",
)
ASKED = (
    "How many {things} does {name} have now?",
    "How many {things} does {name} have in the end?",
)
PACKED_SHARE = 0.3
TWO_STEPS_SHARE = 0.5
LARGEST_START = 12
LARGEST_FACTOR = 5
LARGEST_CHANGE = 9


@dataclass(frozen=True)
class Problem:
    """One problem."""

    uid: str
    question: str
    answer: str
    """The steps, one a line, then `#### n`."""
    steps: int

    @property
    def prompt(self) -> str:
        """The prompt that asks a model the question."""
        return f"Question: {self.question}\nAnswer:"


def generate_problems(count: int, seed: int) -> list[Problem]:
    """Return that many problems, no two with the same question; the same seed gives the same.

    Fewer problems with the same seed are the first ones of more.
    """
    random = Random(seed)
    found: dict[str, Problem] = {}
    while len(found) < count:
        question, lines, result = story(random)
        if question not in found:
            answer = "\n".join([*lines, f"#### {result}"])
            uid = f"a{seed}-{len(found) + 1:05d}"
            found[question] = Problem(uid, question, answer, len(lines))
    return list(found.values())


def story(random: Random) -> tuple[str, list[str], int]:
    """Return a question, the steps that answer it, and the result."""
    name, friend = random.sample(NAMES, 2)
    words = {"name": name, "friend": friend, "things": random.choice(THINGS)}
    steps = 2 if random.random() < TWO_STEPS_SHARE else 1
    sentences: list[str] = []
    lines: list[str] = []
    if random.random() < PACKED_SHARE:
        k, n = random.randint(2, LARGEST_FACTOR), random.randint(2, LARGEST_FACTOR)
        total = k * n
        sentences.append(random.choice(PACKED).format(k=k, n=n, **words))
        lines.append(f"{k} * {n} = {total}.")
    else:
        total = random.randint(2, LARGEST_START)
        sentences.append(random.choice(COUNTED).format(n=total, **words))
    while len(lines) < steps:
        sentence, line, total = change(total, random, words)
        sentences.append(sentence)
        lines.append(line)
    asked = random.choice(ASKED).format(**words)
    return " ".join([*sentences, asked]), lines, total


def change(total: int, random: Random, words: dict[str, str]) -> tuple[str, str, int]:
    """Return a sentence about a change, its calculation, and the new number."""
    gains = total == 0 or random.random() < 0.5
    n = random.randint(1, LARGEST_CHANGE if gains else min(total, LARGEST_CHANGE))
    left = total + n if gains else total - n
    sentence = random.choice(GAINED if gains else LOST).format(n=n, **words)
    return sentence, f"{total} {'+' if gains else '-'} {n} = {left}.", left
