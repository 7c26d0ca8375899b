"""Metrics of a generated text against its reference."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from functools import cache
from unicodedata import category

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

Metric = Callable[[str, str], float]
"""(prediction, reference) -> a score from 0 (worst) to 1 (best)."""

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
WORD = re.compile(r"[^\W_]+")
NUMBER = re.compile(
    r"(?<![\w.])[-−]?[$€£]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}\b|(?:/\d+)+)?"
)
"""A number as people and Python write one: -3, −3, -$1,234.50, .5, 1e-05, 3/4."""
WRITTEN = str.maketrans("−", "-", ",$€£")
ANSWER = "####"


def normalised(text: str) -> str:
    """Lower-case a text, and remove punctuation, English articles and extra white space (SQuAD).

    >>> normalised("The  heart is normal.")
    'heart is normal'
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(prediction: str, reference: str) -> float:
    """Return 1.0 where both texts are equal after normalisation, else 0.0."""
    return float(normalised(prediction) == normalised(reference))


def token_f1(prediction: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall over normalised words (SQuAD).

    >>> token_f1("no acute disease", "No acute cardiopulmonary disease.")
    0.8571428571428571
    """
    found, expected = normalised(prediction).split(), normalised(reference).split()
    if not found or not expected:
        return float(found == expected)
    shared = sum((Counter(found) & Counter(expected)).values())
    return 2 * shared / (len(found) + len(expected))


def rouge_l(prediction: str, reference: str) -> float:
    """Return the F1 of the longest common subsequence of words (Lin 2004), without stemming.

    Equal to the rouge-score package on ASCII text; words of other scripts count too.

    >>> rouge_l("the heart is normal", "heart size is normal")
    0.75
    """
    return float(scorer().score(reference, prediction)["rougeL"].fmeasure)


def number_match(prediction: str, reference: str) -> float:
    """Return 1.0 where the last numbers of both texts are equal; `####` marks the final answer.

    >>> number_match("5 + 2 = 7, so the answer is 1,007.0", "Add them. #### 1007")
    1.0
    """
    found, expected = final_number(prediction), final_number(reference)
    return float(found is not None and found == expected)


def final_number(text: str) -> Fraction | None:
    """Return the last number after the last `####`; without one, of the whole text.

    >>> final_number("half of −3 is −3/2")
    Fraction(-3, 2)
    """
    numbers = NUMBER.findall(text.rsplit(ANSWER, 1)[-1])
    return value_of(numbers[-1].translate(WRITTEN)) if numbers else None


def value_of(number: str) -> Fraction:
    """Return the value of a written number; with several slashes, as in a date, its last part."""
    parts = [Fraction(Decimal(part)) for part in number.split("/")]
    if len(parts) == 2 and parts[1]:
        return parts[0] / parts[1]
    return parts[-1]


METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "token_f1": token_f1,
    "rouge_l": rouge_l,
}


def metrics_for(references: Sequence[str]) -> dict[str, Metric]:
    """Return the metrics for some references; `####` in all of them adds `number_match`."""
    if references and all(ANSWER in reference for reference in references):
        return {"number_match": number_match, **METRICS}
    return METRICS


class Words(Tokenizer):
    """A tokenizer for rouge-score that keeps the letters of every script."""

    def tokenize(self, text: str) -> list[str]:
        """Split a text into lower-case words; combining marks are part of a word."""
        kept = (c if c.isalnum() or category(c)[0] == "M" else " " for c in text.lower())
        return [word for word in "".join(kept).split() if WORD.search(word)]


@cache
def scorer() -> RougeScorer:
    return RougeScorer(["rougeL"], tokenizer=Words())
