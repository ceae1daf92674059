"""Statistics against scipy, closed forms and simulations whose truth is known."""

import itertools
import time

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
    # Hesterberg 2015, section 4.1: tails of Φ(−sqrt(n/(n − 1))·t), so that ten seeds are covered as well.
    tail = truth.norm.cdf(-np.sqrt(14 / 13) * truth.t.ppf(0.975, 13))
    assert tail == pytest.approx(0.0125, abs=5e-5)
    expected = truth.bootstrap(
        (values,), np.mean, confidence_level=1 - 2 * tail, n_resamples=9999, method="BCa", rng=np.random.default_rng(0)
    ).confidence_interval
    assert found.method == "BCa bootstrap"
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-3)
    assert found.level == 0.95
    assert stats.interval(values) == found


def test_one_value_has_no_interval_and_equal_values_a_point():
    assert stats.interval([0.5]) is None
    assert stats.summarize([0.5]) == stats.Summary(1, 0.5, None, 0.5, 0.5, 0.5, 0.5, None)
    assert stats.summarize([]) is None
    point = stats.interval([0.1 + 0.2, 0.3, 0.3] * 4)
    assert point.low == point.high == pytest.approx(0.3)


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="finite"):
        stats.interval([1.0, float("nan")])


def test_summary_by_hand():
    found = stats.summarize([1.0, 2.0, 3.0])
    assert (found.n, found.mean, found.sd, found.low, found.high) == (3, 2.0, 1.0, 1.0, 3.0)
    found = stats.summarize([9.0, 1.0, 2.0, 4.0, 100.0])
    assert (found.mean, found.median, found.iqm) == (23.2, 4.0, 5.0)  # iqm: without 1 and 100


@pytest.mark.parametrize("n", range(1, 14))
def test_iqm_drops_a_quarter_rounded_down_at_each_end(n):
    values = np.random.default_rng(n).exponential(size=n)
    cut = n // 4
    assert stats.iqm(values) == pytest.approx(np.sort(values)[cut : n - cut].mean(), rel=1e-14)
    assert stats.iqm(values) == pytest.approx(truth.trim_mean(values, 0.25), rel=1e-14)


def test_iqm_of_nothing():
    with pytest.raises(ValueError, match="of no values is not defined"):
        stats.iqm([])


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


def test_stratified_intervals_are_quantiles_over_all_resamples_within_strata():
    """All 2² · 3³ · 4⁴ resamples of three small strata, counted out, against the 9,999 that were drawn."""
    strata = [[0.0, 1.0], [10.0, 11.0, 14.0], [-3.0, 0.5, 2.0, 9.0]]
    each = [np.array(list(itertools.product(stratum, repeat=len(stratum)))) for stratum in strata]
    every = np.array([np.concatenate(rows) for rows in itertools.product(*each)])
    assert len(every) == 4 * 27 * 256
    tail = truth.norm.cdf(-np.sqrt(9 / 6) * truth.t.ppf(0.9, 6))
    for name, measure in (
        ("mean", lambda x: x.mean(1)),
        ("iqm", lambda x: np.sort(x, 1)[:, 2:-2].mean(1)),
        ("median", lambda x: np.sort(x, 1)[:, 4]),
    ):
        found, again = stats.stratified(strata, name, 0.8), stats.stratified(strata, name, 0.8)
        assert found == again
        assert (found.level, found.method) == (0.8, "stratified bootstrap")
        values = np.sort(measure(every))
        # The share of all resamples below each end is the tail, within three standard errors of 9,999 draws.
        for end, share in ((found.low, tail), (found.high, 1 - tail)):
            near = 3 * np.sqrt(tail * (1 - tail) / 9999)
            assert np.mean(values < end - 1e-9) <= share + near, name
            assert np.mean(values <= end + 1e-9) >= share - near, name


def test_strata_of_one_or_of_equal_values():
    assert stats.stratified([[1.0, 2.0], [3.0]]) is None
    point = stats.stratified([[1.0, 1.0], [4.0, 4.0, 4.0, 4.0]], "mean")
    assert (point.low, point.high) == (3.0, 3.0)
    with pytest.raises(ValueError, match="one of mean, median, iqm; got 'mode'"):
        stats.stratified([[1.0, 2.0]], "mode")
    with pytest.raises(ValueError, match="one stratum at least"):
        stats.stratified([])


def test_paired_improvement_is_a_share_with_wilsons_interval():
    for wins, n in ((0, 5), (3, 10), (7, 10), (10, 10)):
        found = stats.improvement([1.0] * wins + [-1.0] * (n - wins), 0.9)
        expected = truth.binomtest(wins, n).proportion_ci(0.9, method="wilson")
        assert found.probability == wins / n
        assert (found.interval.low, found.interval.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert stats.improvement([2.0, 0.0, -1.0, 0.0]).probability == 0.5
    assert stats.improvement([]) is None


def test_unpaired_improvement_is_mann_and_whitneys():
    rng = np.random.default_rng(5)
    for m, n in ((1, 1), (4, 7), (10, 10), (3, 20)):
        x, y = rng.integers(0, 6, m) / 2, rng.integers(0, 6, n) / 2
        found, opposite = stats.improvement_unpaired(x, y), stats.improvement_unpaired(y, x)
        assert found.probability == pytest.approx(truth.mannwhitneyu(x, y).statistic / (m * n), abs=1e-14)
        assert opposite.probability == pytest.approx(1 - found.probability, abs=1e-14)
        assert opposite.interval.low == pytest.approx(1 - found.interval.high, abs=1e-9)
        assert 0 <= found.interval.low <= found.probability <= found.interval.high <= 1
    # By hand for m = n = 2, all wins: 1 − θ = z·sqrt(V), so 4(1 − θ) = z²·θ(1 + (1 − θ)/(2 − θ) + θ/(1 + θ)).
    low = stats.improvement_unpaired([3.0, 4.0], [1.0, 2.0], 0.9).interval.low
    z = truth.norm.ppf(0.95)
    assert 4 * (1 - low) == pytest.approx(z**2 * low * (1 + (1 - low) / (2 - low) + low / (1 + low)), abs=1e-9)
    assert stats.improvement_unpaired([3.0, 4.0], [1.0, 2.0]).interval.high == 1.0
    assert stats.improvement_unpaired([], [1.0]) is None


def test_p_values_are_students():
    values = [0.03, -0.01, 0.02, 0.0, 0.015]
    for least in (0.0, 0.01, 0.1):
        assert stats.p_value(values, least) == pytest.approx(truth.ttest_1samp(values, least).pvalue, rel=1e-12)
    assert stats.p_value([1.0]) is None
    assert stats.p_value([0.1 + 0.2, 0.3], 0.3) == 1.0
    assert stats.p_value([0.1 + 0.2, 0.3], 0.2) == 0.0


def test_holm_by_hand():
    # Sorted: 0.01·4, 0.015·3 = 0.045, 0.03·2 = 0.06, 0.04·1 → 0.06 since none is less than the one before.
    assert stats.holm([0.03, 0.01, 0.04, 0.015]) == pytest.approx([0.06, 0.04, 0.06, 0.045])
    assert stats.holm([0.5, 0.9]) == [1.0, 1.0]
    assert stats.holm([0.02]) == [0.02]
    assert stats.holm([]) == []
    for bad in ([0.5, 1.1], [-0.1], [float("nan")]):
        with pytest.raises(ValueError, match="from 0 to 1"):
            stats.holm(bad)


def test_the_least_detectable_effect_is_cohens():
    # G*Power: d = 0.5 two-sided at 0.05 needs n = 34 for 80%, and those have 80.78%.
    assert stats.detectable(33, 1.0) > 0.5 > stats.detectable(34, 1.0)
    assert stats.detectable(34, 1.0, power=0.8078) == pytest.approx(0.5, abs=1e-4)
    for n in (2, 3, 6, 10, 50):
        delta = stats.detectable(n, 0.02, 0.9, 0.7)
        power = truth.nct.sf(truth.t.ppf(0.95, n - 1), n - 1, delta * np.sqrt(n) / 0.02)
        assert power == pytest.approx(0.7, abs=1e-9)
    assert stats.detectable(1, 1.0) is None
    assert stats.detectable(5, 0.0) == 0.0


def test_a_verdict_carries_p_improvement_and_what_was_detectable():
    differences = [0.03, -0.01, 0.02, 0.0, 0.015]
    found = stats.verdict(differences, 0.01)
    assert found.p == pytest.approx(truth.ttest_1samp(differences, 0.01).pvalue)
    assert found.p_holm is None
    assert found.improvement == 0.7
    assert found.detectable == pytest.approx(stats.detectable(5, np.std(differences, ddof=1)))
    one = stats.verdict([0.5])
    assert (one.p, one.improvement, one.detectable) == (None, 1.0, None)
    assert stats.verdict([]).improvement is None


def sample(p, n=6, least=0.01):
    """n differences above `least` whose two-sided t test has exactly the p-value asked for."""
    z = np.linspace(-1, 1, n)
    return list(least + 0.01 * (z + truth.t.ppf(1 - p / 2, n - 1) * z.std(ddof=1) / np.sqrt(n)))


def test_a_family_corrects_all_but_its_first_contrast():
    wanted = [0.04, 0.03, 0.001, 0.2, 0.012]
    below = [0.02 - value for value in sample(0.012)]
    contrasts = [(sample(p), 0.01) for p in wanted[:-1]] + [(below, 0.01), ([0.5], 0.01), ([], 0.0)]
    found = stats.verdicts(contrasts)
    assert [one.p for one in found[:5]] == pytest.approx(wanted, rel=1e-6)
    assert [one.p_holm for one in found] == [None, *map(pytest.approx, (0.06, 0.004, 0.2, 0.036)), None, None]
    assert [one.word for one in found] == [
        *("holds", "undecided", "holds", "undecided", "does not hold", "undecided", "undecided")
    ]
    assert found[0] == stats.verdict(*contrasts[0])
    assert found[3].reason == stats.verdict(*contrasts[3]).reason
    assert "Provisional: 6 seeds, and a claim takes 10. It stands after Holm's correction for the 4" in found[2].reason
    assert "lies above the least gain that counts. It does not stand after Holm's correction" in found[1].reason
    assert "(p = 0.06). About 7 seeds would decide" in found[1].reason
    assert found[1].needed == stats.seeds_needed(contrasts[1][0], 0.01, 0.975) == 7  # 0.05/2: the third of four
    assert stats.verdicts([]) == []
    # One that explains is alone in its family: nothing to correct for.
    assert stats.verdicts(contrasts[:2])[1].word == "holds"
    assert stats.verdicts(contrasts[:2])[1].reason == stats.verdict(*contrasts[1]).reason


def test_thirty_contrasts_are_quick():
    rng = np.random.default_rng(2)
    contrasts = [(rng.normal(0.01, 0.02, 10), 0.01) for _ in range(30)]
    start = time.process_time()
    found = stats.verdicts(contrasts)
    assert time.process_time() - start < 2
    assert stats.verdicts(contrasts) == found


def within(found, share, n):
    """Whether a count out of n lies within three standard errors of its expected share."""
    return abs(found - n * share) <= 3 * np.sqrt(n * share * (1 - share))


@pytest.mark.parametrize("n", [3, 6])
def test_students_interval_covers(n):
    rng = np.random.default_rng(n)
    found = [stats.interval(row) for row in rng.normal(0.3, 2.0, (2000, n))]
    assert within(sum(one.low <= 0.3 <= one.high for one in found), 0.95, 2000)
    found = [stats.interval(row, 0.5) for row in rng.normal(0.3, 2.0, (2000, n))]
    assert within(sum(one.low <= 0.3 <= one.high for one in found), 0.5, 2000)


@pytest.mark.slow
def test_the_bootstrap_covers_at_ten_seeds_and_gives_no_more_false_verdicts_than_it_says():
    """Without Hesterberg's factor about 10% of these would be decided, wrongly."""
    rng = np.random.default_rng(10)
    found = [stats.verdict(row, 0.01) for row in rng.normal(0.01, 0.02, (600, 10))]
    assert {one.interval.method for one in found} == {"BCa bootstrap"}
    assert within(sum(one.word != "undecided" for one in found), 0.05, 600)
    assert within(sum(one.p <= 0.05 for one in found), 0.05, 600)


@pytest.mark.parametrize("statistic", ["mean", "iqm"])
@pytest.mark.slow
def test_stratified_intervals_cover_at_three_runs_a_stratum(statistic):
    """Ten datasets of three runs; the strata lie symmetrically about 0, so that both statistics' truth is 0."""
    rng = np.random.default_rng(11)
    centres = np.linspace(-1, 1, 10)[:, None]
    covered = 0
    for _ in range(300):
        found = stats.stratified(centres + rng.normal(0, 0.5, (10, 3)), statistic)
        covered += found.low <= 0 <= found.high
    assert within(covered, 0.95, 300)


def test_intervals_of_improvement_cover():
    rng = np.random.default_rng(12)
    shift = 0.8
    share = truth.norm.cdf(shift / np.sqrt(2))
    unpaired = paired = 0
    for _ in range(800):
        x, y = rng.normal(shift, 1, 10), rng.normal(0, 1, 10)
        one = stats.improvement_unpaired(x, y).interval
        unpaired += one.low <= share <= one.high
        one = stats.improvement(x - y).interval
        paired += one.low <= share <= one.high
    assert within(unpaired, 0.95, 800)
    # With ten coin throws only eleven intervals are possible: the exact coverage is a sum over them.
    exact = sum(
        truth.binom.pmf(k, 10, share)
        for k in range(11)
        if (ci := truth.binomtest(k, 10).proportion_ci(method="wilson")).low <= share <= ci.high
    )
    assert within(paired, exact, 800)


def test_false_verdicts_of_families():
    """600 families in which every gain is exactly the least that counts: a contrast by itself, and any of five."""
    rng = np.random.default_rng(13)
    first = any_corrected = any_alone = 0
    for _ in range(600):
        found = stats.verdicts([(row, 0.01) for row in rng.normal(0.01, 0.02, (6, 6))])
        first += found[0].word != "undecided"
        any_corrected += any(one.word != "undecided" for one in found[1:])
        any_alone += any(one.p <= 0.05 for one in found[1:])
    assert within(first, 0.05, 600)
    assert within(any_corrected, 1 - 0.99**5, 600)  # Holm's first step is at 0.05/5
    assert within(any_alone, 1 - 0.95**5, 600)  # 23%, were nothing corrected


def test_the_least_detectable_effect_is_detected_four_times_in_five():
    rng = np.random.default_rng(14)
    delta = stats.detectable(6, 0.02)
    held = sum(stats.verdict(row, 0.01).word == "holds" for row in rng.normal(0.01 + delta, 0.02, (1000, 6)))
    assert within(held, 0.8, 1000)
    failed = sum(stats.verdict(row, 0.01).word == "does not hold" for row in rng.normal(0.01 - delta, 0.02, (1000, 6)))
    assert within(failed, 0.8, 1000)


def test_coverage_and_false_verdicts_at_six_seeds():
    """Of 1,000 normal samples with true gain exactly `least`, 5% ± 2% may be decided, and are wrong when they are."""
    rng = np.random.default_rng(1)
    decided = sum(stats.verdict(rng.normal(0.01, 0.02, 6), 0.01).word != "undecided" for _ in range(1000))
    assert 30 <= decided <= 70
