from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from inlay.evaluate.metrics import (
    METRICS,
    exact_match,
    final_number,
    metrics_for,
    number_match,
    rouge_l,
    token_f1,
)

text = st.text(alphabet=st.sampled_from("abc the,.!-_ 12\n"), max_size=40)
ascii_text = st.text(alphabet=st.characters(max_codepoint=127), max_size=60)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("No acute disease.", "no  acute disease", 1.0),
        ("The heart is normal", "heart is normal!", 1.0),
        ("no acute disease", "acute disease", 0.0),
        ("theatre", "atre", 0.0),
        ("", "", 1.0),
        ("", "x", 0.0),
    ],
)
def test_exact_match(prediction: str, reference: str, expected: float):
    assert exact_match(prediction, reference) == expected


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("a b c d", "b c", 2 * (2 / 3) * 1 / (2 / 3 + 1)),  # the article "a" does not count
        ("x x y", "x y y", 2 / 3),  # each occurrence matches once
        ("p q", "r s", 0.0),
        ("", "r", 0.0),
        ("the", "an", 1.0),  # both empty once normalised
    ],
)
def test_token_f1(prediction: str, reference: str, expected: float):
    assert token_f1(prediction, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        # Lin (2004): "police killed the gunman", LCS of 3 and of 2 words among 4
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("a b", "a b c d", 2 * 1 * 0.5 / 1.5),
        ("", "a", 0.0),
        ("сердце в норме", "Сердце в норме.", 1.0),
        ("größer", "größe", 0.0),
        ("हृदय सामान्य है", "हृदय सामन्य है", 2 / 3),  # a vowel's sign is part of its word
        ("normal \u2764\ufe0f", "normal", 1.0),
    ],
)
def test_rouge_l(prediction: str, reference: str, expected: float):
    assert rouge_l(prediction, reference) == pytest.approx(expected)


@given(ascii_text, ascii_text)
def test_rouge_l_is_the_packages_own_on_ascii(prediction: str, reference: str):
    theirs = RougeScorer(["rougeL"]).score(reference, prediction)["rougeL"].fmeasure
    assert rouge_l(prediction, reference) == theirs


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("so she has 18.", "9 * 2 = <<9*2=18>>18\n#### 18", 1.0),
        ("#### 1,234.50 dollars, 7 cents", "#### 7", 1.0),
        ("The total is $1,234.50", "#### 1234.5", 1.0),
        ("#### -3", "#### 3", 0.0),
        ("10-3", "#### 3", 1.0),
        ("none", "#### 3", 0.0),
        ("none", "none either", 0.0),
        ("#### 18 #### 19", "#### 19", 1.0),
        ("version 1.2.", "#### 1.2", 1.0),
        ("it is **−5**", "-5", 1.0),
        ("it is −5", "5", 0.0),
        ("a loss of -$1,200", "-1200", 1.0),
        ("about .5", "0.5", 1.0),
        ("0.00001", str(0.00001), 1.0),  # 1e-05
        ("5", str(0.00001), 0.0),
        ("10000000000000000", str(1e16), 1.0),
        ("1/4", "3/4", 0.0),
        ("0.75", "3/4", 1.0),
        ("so 120/2", "#### 60", 1.0),
        ("1/0", "0", 1.0),
        ("on 03/04/2021", "2021", 1.0),
        ("1" * 5000, "1" * 5000, 1.0),  # more digits than int() reads
        ("1e99999999999999999999", "1", 1.0),
    ],
)
def test_number_match(prediction: str, reference: str, expected: float):
    assert number_match(prediction, reference) == expected


def test_number_match_joins_where_every_reference_has_an_answer():
    assert "number_match" in metrics_for(["#### 1", "so #### 2"])
    assert "number_match" not in metrics_for(["#### 1", "two"])
    assert "number_match" not in metrics_for([])


@pytest.mark.parametrize("name", METRICS)
@given(a=text, b=text)
def test_metrics_are_bounded_and_symmetric(name: str, a: str, b: str):
    value = METRICS[name](a, b)
    assert 0 <= value <= 1
    assert value == pytest.approx(METRICS[name](b, a))


@given(text)
def test_a_text_matches_itself(a: str):
    assert exact_match(a, a) == token_f1(a, a) == 1
    assert rouge_l(a, a) == float(any(c.isalnum() for c in a))
    assert number_match(a, a) == float(final_number(a) is not None)


@given(text, text)
def test_an_exact_match_is_a_full_f1(a: str, b: str):
    assert token_f1(a, b) >= exact_match(a, b)
