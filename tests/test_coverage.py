"""Every interval of the library contains the truth as often as it says at 4, 8, 32 and 200 prompts: 93 to 97
% of the time, or more where it is conservative.

Computed exactly where the outcomes can be counted, else simulated with a fixed seed; twice the error of
the simulation is allowed for.
"""

import math
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest

from selfplay_nb.scoring.human import HumanRatings
from selfplay_nb.stats.diversity import entropy
from selfplay_nb.stats.rates import SPRT, Rate, agreement, mean_interval, ratio_interval, win_rate
from selfplay_nb.stats.ratings import Games, bradley_terry
from selfplay_nb.stats.retention import Perplexity, paired_change, perplexity_ratio

SIZES, RATES = (4, 8, 32, 200), (0.5, 0.8, 0.95)


def binomial(n, p):
    return np.array([math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)])


def holds(covered, runs=None, least=0.93, most=1.0):
    "Is this share of intervals within the bounds, allowing for the error of `runs` simulations?"
    error = 2 * math.sqrt(0.05 * 0.95 / runs) if runs else 0
    return least - error <= covered <= most + error + 1e-9


# rates


@pytest.mark.parametrize("n", [1, 3, *SIZES])
def test_a_rate_of_independent_observations(n):
    low, high = np.array([Rate(k, n).interval for k in range(n + 1)]).T
    covered = lambda p: binomial(n, p)[(low <= p) & (p <= high)].sum()
    assert all(holds(covered(p), least=0.93 if n >= 30 else 0.95) for p in RATES)
    if n >= 30:
        assert all(covered(p) <= 0.981 for p in RATES)
    if n < 30:
        assert min(map(covered, np.linspace(0.005, 0.995, 199))) >= 0.95  # exact, whatever the rate


def test_intervals_grow_narrower_and_contain_their_rate():
    for share in 0, 0.25, 0.5, 1:
        intervals = [Rate(share * n, n).interval for n in range(4, 60, 4)]
        widths = [high - low for low, high in intervals]
        assert widths == sorted(widths, reverse=True) and all(low <= share <= high for low, high in intervals)


def played(rng, runs, prompts, games, p, correlation, how):
    "(runs, prompts, games) scores of which those on a prompt correlate."
    shape = runs, prompts, games
    if correlation == 0:
        return (rng.random(shape) < p) * 1.0
    if how == "difficulty":  # prompts differ in difficulty
        a = 1 / correlation - 1
        return (rng.random(shape) < rng.beta(a * p, a * (1 - p), (runs, prompts, 1))) * 1.0
    alone = (rng.random(shape) < p) * 1.0
    together = (rng.random((runs, prompts, 1)) < p) * 1.0
    if how == "some prompts decide":
        return np.where(rng.random((runs, prompts, 1)) < correlation, together, alone)
    # each game may follow its prompt
    return np.where(rng.random(shape) < math.sqrt(correlation), together, alone)


@pytest.mark.parametrize(
    "correlation, how",
    [(0, ""), (0.5, "difficulty"), (0.5, "some prompts decide"), (0.5, "some games follow")],
)
@pytest.mark.parametrize("prompts", SIZES)
def test_a_win_rate_over_prompts(prompts, correlation, how):
    rng = np.random.default_rng(0)
    runs = {4: 1000, 8: 1000, 32: 300, 200: 100}[prompts]
    for p, games in product(RATES, (2, 8)):
        intervals = np.array(
            [win_rate(s).interval for s in played(rng, runs, prompts, games, p, correlation, how)]
        )
        low, high = intervals.T
        assert holds(np.mean((low <= p) & (p <= high)), runs), (p, games)
        if prompts == 200:
            assert holds(np.mean((low <= p) & (p <= high)), runs, most=0.97), (p, games)


def test_what_not_knowing_the_correlation_costs():
    "Length beside that of an interval that knows there is none."
    rng = np.random.default_rng(0)
    width = lambda interval: interval[1] - interval[0]
    cost = {
        n: np.mean(
            [
                width(win_rate(s).interval) / width(Rate(s.sum(), s.size).interval)
                for s in played(rng, 200, n, 8, 0.5, 0, "")
            ]
        )
        for n in SIZES
    }
    assert cost[4] < 2 and cost[8] < 1.7 and cost[32] < 1.25 and cost[200] < 1.1


def test_prompts_with_few_games_limit_what_the_games_are_worth():
    assert (
        win_rate([[1, 0] * 50, [1], [0], [1]]).n_effective < 6
        and win_rate([[1]]).interval == Rate(1, 1).interval
    )
    assert (
        win_rate([[1.0] * 64]).interval == Rate(1, 1).interval and win_rate([[0.5] * 8] * 4).interval[0] > 0
    )


def test_counts_that_share_prompts_come_from_the_same_place(tmp_path):
    scores, games = [[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0]], Games()
    for k, row in enumerate(scores):
        for s in row:
            games.add("x", "y", s, str(k))
    ratings = HumanRatings(
        tmp_path / "r.jsonl",
        [dict(prompt=str(k), a=f"a{k}{i}", b=f"b{k}{i}") for k in range(4) for i in range(2)],
    )
    for side, s in zip(ratings.sides, sum(scores, [])):
        ratings.rate("left" if (side == "a") == (s == 1) else "right")
    assert games.rate("x", "y") == ratings.win_rate == win_rate(scores)


# paired comparison

CHANGES = [
    (p, q, c)
    for p, q in [(0.5, 0.5), (0.8, 0.8), (0.95, 0.95), (0.5, 0.8), (0.8, 0.95), (0.5, 0.95)]
    for c in (0, 0.4, 0.5)
]


@pytest.mark.parametrize("n", [4, 8, 32])
def test_a_paired_change(n):
    ends = {}
    for gained, lost in product(range(n + 1), repeat=2):
        kept = n - gained - lost
        if kept >= 0:
            ends[gained, lost] = paired_change(
                [0] * gained + [1] * lost + [1] * kept, [1] * gained + [0] * lost + [1] * kept
            )
    factorial = [math.factorial(k) for k in range(n + 1)]
    for p, q, c in CHANGES:
        both = p * q + c * math.sqrt(p * (1 - p) * q * (1 - q))
        up, down = q - both, p - both
        if min(up, down, 1 - up - down) < 0:
            continue
        ways = lambda gained, lost: (
            factorial[n] // factorial[gained] // factorial[lost] // factorial[n - gained - lost]
        )
        covered = 0
        for (g, k), e in ends.items():  # gained, lost
            if e.low <= q - p + 1e-12 and q - p - 1e-12 <= e.high:
                covered += ways(g, k) * up**g * down**k * (1 - up - down) ** (n - g - k)
        assert holds(covered), (p, q, c)


def test_a_paired_change_of_200():
    rng, runs = np.random.default_rng(0), 1000
    for p, q in [(0.5, 0.5), (0.8, 0.95), (0.95, 0.95)]:
        before = rng.random((runs, 200)) < p
        after = rng.random((runs, 200)) < q
        found = [paired_change(b.tolist(), a.tolist()) for b, a in zip(before, after)]
        assert holds(np.mean([e.low <= q - p <= e.high for e in found]), runs, most=0.97), (p, q)


# means: entropy, perplexity, divergence

DRAWS = {
    "normal": lambda rng, shape: rng.normal(1, 0.5, shape),
    "gamma": lambda rng, shape: rng.gamma(2, 0.5, shape),
    "exponential": lambda rng, shape: rng.exponential(1, shape),
    "around zero": lambda rng, shape: rng.normal(0.3, 1, shape),
}


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("n", SIZES)
def test_a_mean(n, draw):
    rng, runs = np.random.default_rng(n), 2000
    found = np.array([mean_interval(x) for x in DRAWS[draw](rng, (runs, n))])
    true = 0.3 if draw == "around zero" else 1
    assert holds(np.mean((found[:, 0] <= true) & (true <= found[:, 1])), runs, most=0.97)


@pytest.mark.parametrize("n", SIZES)
def test_an_entropy_and_a_ratio(n):
    rng, runs, answers = np.random.default_rng(n), 500 if n < 200 else 150, 3
    covered = []
    for _ in range(runs):  # prompts differ in entropy, answers in length
        nats = rng.gamma(4, 0.25, (n, answers)).mean(1)
        tokens = rng.integers(5, 15, (n, answers))
        rows = [[SimpleNamespace(logprobs=[-x] * t) for t in row] for x, row in zip(nats, tokens.tolist())]
        e = entropy(rows)
        covered.append(e.low <= 1 <= e.high)
        assert (e.low, e.high) == pytest.approx(ratio_interval(nats * tokens.sum(1), tokens.sum(1)))
    assert holds(np.mean(covered), runs, most=0.975)


@pytest.mark.parametrize("n", SIZES)
def test_a_ratio_of_perplexities(n):
    rng, runs, true = np.random.default_rng(n), 800, math.log(1.1)
    tokens = rng.integers(30, 80, (runs, n))
    change = tokens * rng.normal(true, 0.1, (runs, n))
    found = [
        perplexity_ratio(
            Perplexity([3.0 * x for x in t], t), Perplexity([3.0 * x + y for x, y in zip(t, d)], t)
        )
        for t, d in zip(tokens.tolist(), change.tolist())
    ]
    assert holds(np.mean([e.low <= 1.1 <= e.high for e in found]), runs, most=0.97)


@pytest.mark.parametrize("make", [lambda: mean_interval([1.0]), lambda: ratio_interval([3.0], [2.0])])
def test_one_prompt_has_no_interval(make):
    assert all(map(math.isnan, make()))


def test_what_has_no_interval_says_so():
    e = entropy([[SimpleNamespace(logprobs=[-1.0, -2.0])]])
    r = perplexity_ratio(Perplexity([3.0], [2]), Perplexity([4.0], [2]))
    assert (
        e.value == 1.5
        and "no interval: one prompt" in repr(e)
        and r.value == pytest.approx(math.exp(0.5))
        and "no interval" in repr(r)
    )
    assert "nan" not in repr(e) + repr(r) + repr(Rate(0, 0))


# agreement of raters


@pytest.mark.parametrize("habit", [(0.5, 0.5), (0.6, 0.3, 0.1), (0.8, 0.2)])
@pytest.mark.parametrize("n", SIZES)
def test_kappa(n, habit):
    rng, runs, known = np.random.default_rng(0), 800 if n < 200 else 300, {}
    for share in RATES:  # they agree on purpose with this probability, which is the true kappa
        a = rng.choice(len(habit), (runs, n), p=habit)
        b = np.where(rng.random((runs, n)) < share, a, rng.choice(len(habit), (runs, n), p=habit))
        covered = []
        for x, y in zip(a, b):
            table = tuple(np.bincount(x * len(habit) + y, minlength=len(habit) ** 2).tolist())
            if table not in known:
                known[table] = agreement(x.tolist(), y.tolist())
            if not known[table].note:
                covered.append(known[table].interval[0] <= share <= known[table].interval[1])
        assert holds(np.mean(covered), len(covered)) and all(
            -1 <= r.interval[0] <= r.interval[1] <= 1 for r in known.values() if not r.note
        ), share


# ratings


@pytest.mark.parametrize("n", SIZES)
def test_ratings_of_two(n):
    fits = {}
    for k in range(n + 1):
        if max(binomial(n, p)[k] for p in RATES) > 2e-3:
            fits[k] = bradley_terry(
                Games(dict(a="x", b="y", score=float(i < k)) for i in range(n)), resamples=1000
            ).difference("x", "y")
    for p in RATES:
        true = 400 * math.log10(p / (1 - p))
        covered = sum(binomial(n, p)[k] for k, (_, low, high) in fits.items() if low <= true <= high)
        assert holds(covered, least=0.925) and (n < 30 or covered <= 0.985), (p, covered)


# a win rate after a sequential test


@pytest.mark.parametrize("p", [0.3, 0.5, 0.6, 0.7, 0.8, 0.95])
def test_a_win_rate_after_a_test_that_stopped(p):
    rng = np.random.default_rng(0)
    runs = 1000
    known = {}
    above = 0
    covered = 0
    for row in (rng.random((runs, 60)) < p).astype(float).tolist():
        test = SPRT(0.5, 0.7)
        test.add(row)
        key = test.verdict, test.n, sum(test.scores)
        if key not in known:
            known[key] = test.estimate()
        value, low, high = known[key]
        covered += low <= p <= high
        above += (value > p) + 0.5 * (value == p)
        assert 0 <= low <= value <= high <= 1
    assert holds(covered / runs, runs, least=0.94)
    if p < 0.9:
        assert abs(above / runs - 0.5) < 0.1  # too high as often as too low; the share won is not


def test_an_estimate_needs_decided_games():
    assert all(map(math.isnan, SPRT().estimate()))
    test = SPRT()
    test.add([1, 0.5, 0])
    assert all(map(math.isnan, test.estimate()))
    test = SPRT()
    test.add([1, 0, 1, 1, 0, 1])  # undecided, as if the number of games had been fixed
    assert test.estimate()[1:] == pytest.approx(Rate(4, 6).interval, abs=1e-6)
