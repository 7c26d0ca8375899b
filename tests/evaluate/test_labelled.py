"""KTO's and ORPO's measures against TRL's own formulas, and the tests of two groups of rows."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional

from inlay.errors import DataError
from inlay.evaluate.losses import RowLoss
from inlay.evaluate.statistics import auc, compare_groups, difference_of_means, ranks
from inlay.tasks.dpo.compare import LogProbs
from inlay.tasks.kto.compare import Judgements, LabelledLosses, Weights, check_both
from inlay.tasks.kto.weights import advised, weights_of
from inlay.tasks.orpo.compare import OddsRatios, log1mexp, log_odds_ratio
from inlay.tasks.orpo.trainer import ORPOTrainer


def judgements(shift: float = 0.0) -> Judgements:
    random = np.random.default_rng(0)
    model, reference, kl, kl_reference = random.uniform(5, 9, (4, 6))
    return Judgements(
        LabelledLosses([RowLoss(3, x) for x in model], [RowLoss(3, x - shift) for x in kl]),
        LabelledLosses([RowLoss(3, x) for x in reference], [RowLoss(3, x) for x in kl_reference]),
        [True, False, True, True, False, True],
        beta=0.3,
        weights=Weights(1.5, 0.5),
    )


@pytest.mark.parametrize("shift", [0.0, 2.0, -9.0])
def test_the_loss_is_trls(shift: float):
    found = judgements(shift)
    model, reference = (
        torch.tensor([-row.nll for row in side.answers]) for side in (found.model, found.reference)
    )
    drift = [
        theirs.nll - own.nll
        for own, theirs in zip(found.model.mismatched, found.reference.mismatched, strict=True)
    ]
    kl = torch.tensor(drift).mean().clamp(min=0)
    ratio, good = model - reference, torch.tensor(found.desirable)
    expected = torch.where(
        good,
        1.5 * (1 - functional.sigmoid(0.3 * (ratio - kl))),
        0.5 * (1 - functional.sigmoid(0.3 * (kl - ratio))),
    )
    assert found.losses == pytest.approx(expected.tolist(), rel=1e-5)
    assert found.kl == pytest.approx(float(kl), rel=1e-5)
    means = found.means()
    assert means["reward_desirable"] == pytest.approx(0.3 * float(ratio[good].mean()), rel=1e-5)
    assert means["reward_margin"] == pytest.approx(
        0.3 * float(ratio[good].mean() - ratio[~good].mean()), rel=1e-5
    )


def test_a_base_seen_from_itself_has_half_the_weights_and_no_margin():
    found = judgements()
    base = Judgements(found.reference, found.reference, found.desirable, 0.3, Weights())
    assert base.losses == [0.5] * 6
    assert base.means() == {
        "loss": 0.5, "kl": 0.0, "reward_desirable": 0.0, "reward_undesirable": 0.0,
        "reward_margin": 0.0, "reward_auc": 0.5,
    }  # fmt: skip


def test_rows_of_one_label_have_no_margin():
    found = judgements()
    only = Judgements(found.model, found.reference, [True] * 6, 0.3, Weights())
    assert set(only.means()) == {"loss", "kl", "reward_desirable"}
    with pytest.raises(DataError, match=r"6 desirable rows and 0 others .* expected some of both"):
        check_both(only.desirable)


def test_the_odds_ratio_is_trls():
    chosen, rejected = torch.tensor([-0.2, -1.5, -4.0]), torch.tensor([-0.9, -0.3, -4.1])
    trl: Any = SimpleNamespace(beta=0.4, accelerator=SimpleNamespace(device="cpu"))
    ratios, *_, log_odds = ORPOTrainer.odds_ratio_loss(trl, chosen, rejected)
    pairs = [LogProbs(c, r) for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    found = OddsRatios(pairs, [1.0, 2.0, 3.0], 0.4)
    expected = torch.tensor([1.0, 2.0, 3.0]) - ratios
    assert found.losses == pytest.approx(expected.tolist(), rel=1e-5)
    assert found.means()["log_odds"] == pytest.approx(float(log_odds), rel=1e-5)
    assert found.means()["accuracy"] == pytest.approx(2 / 3)


def test_the_odds_of_near_certain_and_impossible_answers_are_exact():
    assert log1mexp(-1e-20) == pytest.approx(math.log(1e-20))
    assert log1mexp(-100.0) == pytest.approx(-math.exp(-100.0))
    assert log1mexp(0.0) == -math.inf
    assert log_odds_ratio(LogProbs(-1e-9, -30.0)) == pytest.approx(30 + 9 * math.log(10), rel=1e-6)


# Two groups of rows


def test_auc_counts_pairs_and_ties_by_half():
    random = np.random.default_rng(0)
    high, low = random.integers(0, 5, 20).astype(float), random.integers(0, 4, 15).astype(float)
    by_hand = np.mean([(h > x) + 0.5 * (h == x) for h in high for x in low])
    assert auc(high, low) == pytest.approx(by_hand)
    assert auc(high, low) == pytest.approx(stats.mannwhitneyu(high, low).statistic / (20 * 15))


def scores(better: float) -> tuple[list[float], list[float], list[bool]]:
    random = np.random.default_rng(1)
    high = [i % 2 == 0 for i in range(60)]
    base = random.normal(size=60)
    tuned = base + better * np.asarray(high) + 0.4 * random.normal(size=60)
    return base.tolist(), tuned.tolist(), high


def test_a_tuned_model_that_separates_better_is_found():
    base, tuned, high = scores(1.0)
    test, sides = compare_groups(ranks(base), ranks(tuned), high, auc)
    assert test.mean_difference > 0.1
    assert test.p_value is not None
    assert test.p_value < 0.001
    assert test.interval is not None
    assert test.interval[0] > 0
    assert all(side is not None and side[0] < side[1] for side in sides)


def test_models_that_do_not_differ_are_seldom_called_different():
    random = np.random.default_rng(2)
    called = 0
    for _ in range(40):
        high = (random.random(24) < 0.4).tolist()
        skill = np.asarray(high) * 0.8
        base, tuned = (skill + random.normal(size=24) for _ in range(2))
        test, _ = compare_groups(ranks(base.tolist()), ranks(tuned.tolist()), high, auc)
        called += (test.p_value or 0) < 0.05
    assert called <= 6


def test_the_test_of_a_margin_is_the_one_that_flips_signs():
    _, tuned, high = scores(0.2)
    test, sides = compare_groups([0.0] * 60, tuned, high, difference_of_means)
    signed = np.where(high, 1.0, -1.0) * np.asarray(tuned) / 30
    flips = np.random.default_rng(3).choice([-1.0, 1.0], (20000, 60))
    p = (np.abs(flips @ signed) >= abs(signed.sum())).mean()
    assert test.mean_difference == pytest.approx(signed.sum())
    assert test.p_value == pytest.approx(p, abs=0.02)
    assert sides[0] is None


def test_a_group_of_one_row_has_no_interval():
    test, sides = compare_groups([1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [True, False, False], auc)
    assert (test.interval, sides) == (None, [None, None])
    assert test.p_value is not None


# Weights


@pytest.mark.parametrize(
    ("counts", "given", "expected"),
    [
        ((10, 10), ("auto", "auto"), (1, 1)),
        ((12, 10), ("auto", "auto"), (1, 1)),
        ((30, 10), ("auto", "auto"), (1, 2.25)),
        ((10, 40), ("auto", "auto"), (4, 1)),
        ((10, 40), (2.0, "auto"), (2, 0.5)),
        ((30, 10), ("auto", 3.0), (1, 3)),
        ((30, 10), ("auto", 0.5), (2 / 9, 0.5)),
        ((30, 10), (5.0, 7.0), (5, 7)),
    ],
)
def test_weights_left_open_bring_the_labels_into_balance(
    counts: tuple[int, int], given: tuple[Any, Any], expected: tuple[float, float]
):
    config: Any = SimpleNamespace(desirable_weight=given[0], undesirable_weight=given[1])
    found = weights_of(config, *counts)
    assert (found.desirable, found.undesirable) == pytest.approx(expected)
    balance = found.desirable * counts[0] / (found.undesirable * counts[1])
    said = "within" if 1 <= round(balance, 9) <= round(4 / 3, 9) else "outside"
    assert f"{balance:.3g} to 1 in all, {said} the 1 to 4/3" in advised(found, *counts)
    assert said == "within" or "auto" not in given
