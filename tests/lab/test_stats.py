"""Statistics against scipy, closed forms and simulations whose truth is known."""

import numpy as np
import pytest
from scipy import stats as truth

from normwright.lab import stats


def test_few_values_take_students_t():
    values = [0.1, 0.4, 0.2, 0.25]
    found = stats.interval(values)
    expected = truth.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found.method == "Student's t"
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_many_values_take_the_bootstrap_and_repeat():
    values = np.random.default_rng(3).exponential(size=14)
    found = stats.interval(values)
    expected = truth.bootstrap(
        (values,), np.mean, n_resamples=9999, method="BCa", rng=np.random.default_rng(0)
    ).confidence_interval
    assert found.method == "BCa bootstrap"
    assert (found.low, found.high) == (expected.low, expected.high)
    assert stats.interval(values) == found


def test_one_value_has_no_interval_and_equal_values_a_point():
    assert stats.interval([0.5]) is None
    assert stats.summarize([0.5]) == stats.Summary(1, 0.5, None, 0.5, 0.5, None)
    assert stats.summarize([]) is None
    point = stats.interval([0.1 + 0.2, 0.3, 0.3] * 4)
    assert point.low == point.high == pytest.approx(0.3)


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="finite"):
        stats.interval([1.0, float("nan")])


def test_summary_by_hand():
    found = stats.summarize([1.0, 2.0, 3.0])
    assert (found.n, found.mean, found.sd, found.low, found.high) == (3, 2.0, 1.0, 1.0, 3.0)


def test_pairs_are_by_seed():
    assert stats.paired({0: 3.0, 2: 5.0, 7: 1.0}, {2: 1.5, 0: 1.0, 4: 9.0}) == {0: 2.0, 2: 3.5}


@pytest.mark.parametrize(
    ("differences", "least", "word"),
    [
        ([0.05, 0.06, 0.055], 0.01, "holds"),
        ([0.001, 0.002, 0.0], 0.01, "does not hold"),
        ([0.05, -0.04, 0.01], 0.01, "undecided"),
        ([0.5], 0.01, "undecided"),
        ([], 0.01, "undecided"),
    ],
)
def test_verdicts(differences, least, word):
    found = stats.verdict(differences, least)
    assert found.word == word
    assert found.n == len(differences)


def test_one_seed_says_so():
    assert "One seed has no interval" in stats.verdict([0.5]).reason


def test_a_verdict_of_few_seeds_is_provisional_and_of_ten_is_not():
    assert "Provisional" in stats.verdict([0.05, 0.06, 0.055]).reason
    assert "Provisional" not in stats.verdict(list(np.linspace(0.05, 0.06, 10))).reason


def test_seeds_needed_is_the_smallest_number_that_decides():
    differences = [0.03, -0.01, 0.02, 0.0, 0.015]
    mean, sd = np.mean(differences), np.std(differences, ddof=1)
    half = {n: truth.t.ppf(0.975, n - 1) * sd / np.sqrt(n) for n in range(2, 200)}
    assert stats.seeds_needed(differences) == next(n for n, h in half.items() if h < mean)
    assert stats.seeds_needed([1.0, -1.0]) is None
    assert stats.seeds_needed([1.0]) is None


def test_coverage_and_false_verdicts_at_six_seeds():
    """Of 1,000 normal samples with true gain exactly `least`, 5% ± 2% may be decided, and are wrong when they are."""
    rng = np.random.default_rng(1)
    decided = sum(stats.verdict(rng.normal(0.01, 0.02, 6), 0.01).word != "undecided" for _ in range(1000))
    assert 30 <= decided <= 70
