"Agreement of raters and the sequential test; rates themselves are tested with the mechanisms."

import json
import math

import numpy as np
import pytest

from selfplay_nb.stats.rates import SPRT, Rate, agreement, finite, rate_interval, wilson, win_rate


def verdicts(table):
    pairs = [(i, j) for i, row in enumerate(table) for j, n in enumerate(row) for _ in range(n)]
    return [list(x) for x in zip(*pairs)]


# rates


def test_few_observations_get_the_exact_interval_and_many_wilsons():
    scipy = pytest.importorskip("scipy.stats")
    for n in 1, 4, 8, 29:
        for k in range(n + 1):
            assert rate_interval(k, n) == pytest.approx(
                tuple(scipy.binomtest(k, n).proportion_ci(method="exact"))
            )
    for k, n in (0, 30), (30, 30), (81, 263):
        assert rate_interval(k, n) == wilson(k, n) == Rate(k, n).interval
    assert rate_interval(0, 0) == (0, 1) and rate_interval(3, 8, 0.5) == pytest.approx(
        tuple(scipy.binomtest(3, 8).proportion_ci(0.5, "exact"))
    )
    low, high = rate_interval(2.5, 5)
    assert low == pytest.approx(1 - high) and rate_interval(2, 5)[0] < low < rate_interval(3, 5)[0]
    with pytest.raises(ValueError, match="5 successes out of 4"):
        rate_interval(5, 4)


@pytest.mark.parametrize(
    "rate",
    [Rate(0, 0), Rate(3, 4), Rate(2.5, 64, 7.25), Rate(0, 9), win_rate([[1, 0], [1, 1]]), win_rate([])],
)
def test_a_rate_goes_to_json_and_back(rate):
    d = json.loads(json.dumps(rate.to_dict(), allow_nan=False))
    again = Rate.from_dict(d)
    assert (
        set(d) >= {"value", "n", "low", "high"}
        and (d["value"] is None) == (rate.n == 0)
        and (d["low"], d["high"]) == rate.interval
    )
    assert (again.n, again.n_effective, repr(again)) == (
        rate.n,
        rate.n_effective,
        repr(rate),
    ) and again.interval == pytest.approx(rate.interval)
    # as older files have it
    assert Rate.from_dict({k: d[k] for k in ("value", "n", "low", "high")}).n == rate.n


def test_what_is_not_finite_is_null():
    x = {"a": [1.0, math.nan, (math.inf, 2)], "b": {"c": -math.inf, "d": "nan", "e": True}}
    assert finite(x) == {"a": [1.0, None, [None, 2]], "b": {"c": None, "d": "nan", "e": True}}


# agreement


@pytest.mark.parametrize(
    "table, kappa, low, high",
    [  # statsmodels 0.15.0, cohens_kappa
        ([[20, 5, 1], [10, 15, 3], [2, 4, 40]], 0.613721, 0.487920, 0.739521),
        ([[420, 60], [40, 380]], 0.777448, 0.736366, 0.818530),
        ([[90, 5], [5, 0]], -0.052632, -0.085207, -0.020056),
    ],
)
def test_kappa_against_statsmodels(table, kappa, low, high):
    r = agreement(*verdicts(table))
    assert r.kappa == pytest.approx(kappa, abs=1e-6)
    assert r.raw.interval == wilson(np.trace(table), np.sum(table)) and r.n == np.sum(table)
    # Wilson's form: never past 1, else near the usual one
    if kappa > 0:
        assert r.interval == pytest.approx((low, high), abs=0.025)
    # nobody has proved disagreement beyond chance with an empty cell
    else:
        assert r.interval[0] < low and r.interval[1] > 0 > high


def test_perfect_agreement_is_not_certainty_and_more_tells_more():
    few, many = (agreement([0, 1] * n, [0, 1] * n) for n in (5, 100))
    assert (
        few.kappa == many.kappa == few.interval[1] == 1 and few.interval[0] < 0.6 < 0.9 < many.interval[0] < 1
    )
    swapped = agreement([0, 1] * 50, [1, 0] * 50)
    assert swapped.kappa == pytest.approx(-1) and swapped.raw.value == 0


@pytest.mark.parametrize("n, share", [(30, 0.5), (50, 0.9), (200, 0.0), (200, 0.5)])
def test_kappa_interval_covers(n, share):
    rng, hits = np.random.default_rng(0), 0
    for _ in range(500):
        x = rng.choice(3, n, p=[0.5, 0.3, 0.2])
        y = np.where(rng.random(n) < share, x, rng.choice(3, n, p=[0.5, 0.3, 0.2]))
        low, high = agreement(x.tolist(), y.tolist()).interval
        hits += low <= share <= high
    assert 0.92 <= hits / 500 <= 0.985


def test_skipped_and_any_labels():
    r = agreement(["a", "tie", None, "b", "a", math.nan], ["a", "b", "a", None, "a", "b"])
    assert (r.n, r.skipped, r.raw.successes) == (3, 3, 2) and r.counts == {("a", "a"): 2, ("tie", "b"): 1}
    assert "3 skipped" in repr(r)
    same = agreement([1, 0.5, 0, 1], [True, 0.5, 0.0, 0])
    assert same.raw.successes == 3 and set(same.counts) == {(1, 1), (0.5, 0.5), (0, 0), (1, 0)}


@pytest.mark.parametrize(
    "a, b, note",
    [
        ([1] * 9, [1] * 9, "the first always says 1 and the second always says 1"),
        ([1, 0, 1], [0.5] * 3, "the second always says 0.5"),
        ([None], [1], "no match has both"),
        ([], [], "no match has both"),
    ],
)
def test_constant_raters_have_no_kappa(a, b, note):
    r = agreement(a, b)
    assert math.isnan(r.kappa) and all(map(math.isnan, r.interval)) and note in r.note and note in repr(r)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="2 verdicts of a and 1 of b"):
        agreement([1, 0], [1])


# sequential test


def test_the_ratio_is_the_likelihood_ratio_and_the_bounds_are_walds():
    t = SPRT(0.4, 0.7, 0.01, 0.2)
    t.add([1, 1, 0, 0.5])
    assert t.llr == pytest.approx(math.log(0.7**2.5 * 0.3**1.5 / (0.4**2.5 * 0.6**1.5))) and len(t.path) == 5
    assert (t.low, t.high) == pytest.approx((math.log(0.2 / 0.99), math.log(0.8 / 0.01)))


def test_a_decision_stands():
    t = SPRT()
    assert t.add([1] * 16) == "undecided" and t.update(1) == "accept" and t.n == 17
    llr = t.llr
    assert t.add([0] * 500) == "accept" and (t.n, t.llr, t.unused) == (17, llr, 500)
    assert (
        "accept after 17" in repr(t)
        and "0.6 explains the scores better than 0.5" in repr(t)
        and "500 more" in repr(t)
    )
    assert (
        SPRT().add([0] * 500) == "reject"
        and SPRT().add([0.5] * 500) == "reject"
        and "play on" in repr(SPRT())
    )


def exactly(test, p, draws, most=3000):
    """Probabilities of accept and reject and the expected number of games, by following the distribution of
    the total from game to game.
    """
    # share[k]: still undecided with k half points
    share = np.array([1.0])
    accept = 0.0
    reject = 0.0
    games = 0.0
    k = np.arange(2 * most + 1)
    for n in range(1, most + 1):
        games += share.sum()
        share = np.convolve(share, [1 - p - draws / 2, draws, p - draws / 2])
        llr = k[: 2 * n + 1] / 2 * test.weight(1) + (n - k[: 2 * n + 1] / 2) * test.weight(0)
        up, down = llr >= test.high, llr <= test.low
        accept += share[up].sum()
        reject += share[down].sum()
        share[up | down] = 0
    return accept, reject, games


@pytest.mark.parametrize("draws", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("p0, p1", [(0.5, 0.6), (0.55, 0.7), (0.4, 0.6)])
def test_error_rates_hold_and_games_are_saved(p0, p1, draws):
    # games of a fixed test with the same errors
    test = SPRT(p0, p1)
    fixed = (2 * 1.6449) ** 2 * p0 * (1 - p0) / (p1 - p0) ** 2
    (false_accept, _, n0), (_, false_reject, n1) = (exactly(test, p, draws) for p in (p0, p1))
    assert max(false_accept, false_reject) <= 0.05 and max(n0, n1) < 0.65 * fixed
    if draws == 0:
        assert min(false_accept, false_reject) > 0.03  # not by never deciding
    assert exactly(test, p0, draws, 100)[0] <= false_accept


def test_simulated_games_agree_with_the_exact_errors():
    rng, n = np.random.default_rng(1), []
    for row in rng.random((400, 1000)) < 0.5:
        t = SPRT()
        t.add(row.astype(float)[:300])
        n.append((t.verdict == "accept", min(t.n, 300)))
    accept, _, games = exactly(SPRT(), 0.5, 0.0, 300)
    mean = np.mean(n, 0)
    assert abs(mean[0] - accept) < 0.035 and abs(mean[1] / games - 1) < 0.12


def test_a_prompts_mean_score_is_one_score():
    rng = np.random.default_rng(2)
    prompts = (rng.random((300, 400)) < 0.5).astype(float)
    as_games, as_prompts = (
        np.mean([SPRT().add(np.repeat(p, k)) == "accept" for p in prompts]) for k in (8, 1)
    )
    assert as_games > 0.15 and as_prompts <= 0.05


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: SPRT(0.6, 0.5), "p0 is 0.6 and p1 is 0.5"),
        (lambda: SPRT(0, 0.5), "0 < p0"),
        (lambda: SPRT(alpha=0), "alpha is 0"),
        (lambda: SPRT(beta=0.5), "beta is 0.5"),
        (lambda: SPRT().update(1.5), "score 1.5"),
        (lambda: SPRT().update(math.nan), "score nan"),
        (lambda: SPRT().update(None), "score None"),
    ],
)
def test_bad_input_is_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_plot():
    import matplotlib

    matplotlib.use("Agg")
    t = SPRT()
    t.add([1, 0, 1])
    assert t.plot().lines[-1].get_ydata().tolist() == t.path
