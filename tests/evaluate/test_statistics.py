from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from inlay.evaluate.statistics import (
    bootstrap_interval,
    compare_statistic,
    paired_test,
    weighted_mean,
)

numbers = st.lists(st.floats(-100, 100), min_size=1, max_size=12)


@given(numbers)
def test_an_interval_lies_within_the_values(values: list[float]):
    interval = bootstrap_interval(values, resamples=50)
    if interval is not None:
        low, high = interval
        assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9


def test_the_interval_is_unknown_where_rows_do_not_vary():
    assert bootstrap_interval([3.0]) is None
    assert bootstrap_interval([3.0, 3.0, 3.0]) is None


def test_the_interval_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        low, high = bootstrap_interval(rng.exponential(2.0, size=80).tolist(), resamples=400)
        covered += low <= 2.0 <= high
    assert 0.90 <= covered / 300 <= 0.985


def test_the_interval_is_the_normal_one_for_many_rows():
    values = np.random.default_rng(2).normal(5, 3, size=2000)
    low, high = bootstrap_interval(values.tolist(), level=0.9)
    half = stats.norm.ppf(0.95) * values.std() / 2000**0.5
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)


def test_the_interval_is_the_same_for_the_same_seed_only():
    values = np.random.default_rng(3).normal(size=30).tolist()
    assert bootstrap_interval(values, seed=4) == bootstrap_interval(values, seed=4)
    assert bootstrap_interval(values, seed=4) != bootstrap_interval(values, seed=5)


def test_a_row_with_weight_two_counts_as_two_rows():
    assert weighted_mean([1.0, 4.0], [2.0, 1.0]) == 2.0
    twice = [1.0, 1.0, 4.0]
    assert paired_test([0.0, 0.0], [1.0, 4.0], weights=[2.0, 1.0]).mean_difference == np.mean(twice)


def test_the_weighted_interval_moves_with_the_weights():
    values, heavy_low = [1.0] * 20 + [4.0] * 20, [9.0] * 20 + [1.0] * 20
    low, high = bootstrap_interval(values, weights=heavy_low)
    assert low < weighted_mean(values, heavy_low) == 1.3 < high < 2.5


def test_the_paired_test_sees_a_small_constant_gain_among_large_row_differences():
    rng = np.random.default_rng(5)
    base = rng.normal(10, 5, size=60)
    tuned = base - 0.2 + rng.normal(0, 0.1, size=60)
    result = paired_test(base.tolist(), tuned.tolist())
    assert result.p_value == pytest.approx(2 / 10_000)
    assert result.mean_difference == pytest.approx(float((tuned - base).mean()))
    assert result.interval[0] < -0.2 < result.interval[1] < 0
    assert (result.n, result.test) == (60, "two-sided sign-flip permutation test")


def test_the_paired_test_rejects_a_true_null_no_more_often_than_it_says():
    rng = np.random.default_rng(6)
    ps = []
    for _ in range(200):
        base = rng.normal(size=12)
        ps.append(paired_test(base.tolist(), (base + rng.standard_t(3, size=12)).tolist()).p_value)
    assert 0.01 <= np.mean(np.array(ps) < 0.05) <= 0.09
    assert 0.4 <= np.mean(ps) <= 0.6


def test_the_paired_test_is_exact_for_few_rows():
    assert paired_test([0.0] * 5, [1.0] * 5).p_value == 2 / 2**5
    # sums of +-1 +-2 +-3 +-4 at least as far from zero as 1 + 2 + 3 - 4 = 2: 14 of 16
    assert paired_test([0.0] * 4, [1.0, 2.0, 3.0, -4.0]).p_value == 14 / 16


def test_equal_models_do_not_differ():
    result = paired_test([1.0, 0.0, 1.0], [1.0, 0.0, 1.0])
    assert (result.mean_difference, result.interval, result.p_value) == (0.0, None, 1.0)


def test_one_row_proves_nothing():
    result = paired_test([1.0], [0.5])
    assert (result.mean_difference, result.interval, result.p_value) == (-0.5, None, None)


@pytest.mark.parametrize(("base", "tuned"), [([], []), ([1.0], [1.0, 2.0])])
def test_the_paired_test_needs_the_same_rows(base: list[float], tuned: list[float]):
    with pytest.raises(ValueError, match="same rows"):
        paired_test(base, tuned)


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=2, max_size=8))
def test_swapping_base_and_tuned_turns_the_difference_and_keeps_the_p_value(
    pairs: list[tuple[float, float]],
):
    base, tuned = (list(side) for side in zip(*pairs, strict=True))
    there, back = paired_test(base, tuned), paired_test(tuned, base)
    assert there.mean_difference == pytest.approx(-back.mean_difference, abs=1e-12)
    assert there.p_value == pytest.approx(back.p_value)
    assert 0 < there.p_value <= 1


def test_swaps_of_whole_rows_are_exact_for_few_rows():
    def mean(rows: np.ndarray) -> np.ndarray:
        return rows[..., 0].mean(axis=-1)

    means, test, sides = compare_statistic(mean, [[0.0]] * 5, [[1.0]] * 5)
    assert (means, test.p_value, sides) == ((0.0, 1.0), 2 / 2**5, [None, None])
    one = compare_statistic(mean, [[0.0]], [[1.0]])[1]
    assert (one.p_value, one.interval, one.n) == (None, None, 1)
