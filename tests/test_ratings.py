"Ratings, cycles and Nash averaging, against independent implementations and by simulation."

import math
from itertools import combinations

import numpy as np
import pytest

from selfplay_nb.stats.rates import win_rate
from selfplay_nb.stats.ratings import ELO, Elo, Games, bradley_terry, cycles, nash_averaging


def expect(a, b):
    return 1 / (1 + 10 ** ((b - a) / 400))


def play(P, n, rng, draws=0.3, repeats=1):
    """The row's mean score against the column is P; n prompts a pair, which decide all of their `repeats`
    games.
    """
    g = Games(players=[f"p{i}" for i in range(len(P))])
    for i, j in combinations(range(len(P)), 2):
        d = draws * 2 * min(P[i, j], 1 - P[i, j])
        for k, s in enumerate(rng.choice([1, 0.5, 0], n, p=[P[i, j] - d / 2, d, 1 - P[i, j] - d / 2])):
            for _ in range(repeats):
                g.add(f"p{i}", f"p{j}", s, k if repeats > 1 else None)
    return g


def rated(rng, k, spread):
    r = rng.normal(1000, spread, k)
    r += 1000 - r.mean()
    return r, expect(r[:, None], r)


def ring(p):
    P = np.full((3, 3), 0.5)
    P[[0, 1, 2], [1, 2, 0]], P[[1, 2, 0], [0, 1, 2]] = p, 1 - p
    return P


# results


def test_both_seats_and_draws_are_counted():
    g = Games(
        [
            dict(a="x", b="y", score=1),
            dict(a="y", b="x", score=0.5),
            dict(a="y", b="x", score=0, prompt="q"),
            dict(a="z", b="y", score=0.7),
        ]
    )
    assert g.counts[0, 1].tolist() == [1, 0, 0] and g.counts[1, 0].tolist() == [0, 1, 1]
    assert g.results[0, 1].tolist() == [2, 1, 0] and g.results[1, 0].tolist() == [0, 1, 2]
    assert (
        g.scores[0, 1] == 2.5
        and g.payoff[0, 1] == 2.5 / 3
        and math.isnan(g.payoff[0, 2])
        and g.payoff[1, 1] == 0.5
    )
    assert g.payoff[2, 1] == pytest.approx(0.7) and np.array_equal(
        g.results, g.results.transpose(1, 0, 2)[..., ::-1]
    )
    assert (
        "2-1-0" in repr(g)
        and "2.5/3" in repr(g)
        and "4 games, 3 players, 1 prompts" in repr(g)
        and g._repr_html_().count("<tr>") == 4
    )
    assert (
        Games(players=["<b>", "y"])._repr_html_().count("&lt;b&gt;") == 2
        and len(Games()) == 0
        and "0 games" in repr(Games())
    )


def test_a_pairs_rate_is_corrected_for_prompts():
    g = Games()
    for k in range(10):
        game = ("x", "y", float(k < 6)) if k % 2 else ("y", "x", float(k >= 6))
        for _ in range(8):
            g.add(*game, prompt=[{"role": "user", "content": str(k)}])
    assert (
        g.rate("x", "y").interval == win_rate([[1.0] * 8] * 6 + [[0.0] * 8] * 4).interval
        and g.rate("y", "x").value == 0.4
    )


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: Games([dict(a="x", b="y")]), "game 0 lacks .'score'."),
        (lambda: Games().add("x", "x", 1), "'x' plays itself"),
        (lambda: Games().add("x", "y", 2), "score 2"),
        (lambda: Games().add("x", "y", None), "score None"),
        (lambda: Games().add("x", "y", math.nan), "score nan"),
        (lambda: bradley_terry(Games()), "no games"),
        (
            lambda: bradley_terry(Games([dict(a="x", b="y", score=1)]), anchors=dict(z=0)),
            "anchors .'z'. did not play",
        ),
        (lambda: bradley_terry(Games([dict(a="x", b="y", score=1)]), prior=-1), "prior is -1"),
        (lambda: bradley_terry(Games([dict(a="x", b="y", score=1)]), resamples=0), "resamples is 0"),
        (
            lambda: bradley_terry(Games([dict(a="x", b="y", score=1)]), prior=0),
            "no finite ratings with prior=0",
        ),
        (lambda: bradley_terry(Games([dict(a="x", b="y", score=1)]))["q"], "no player 'q'"),
        (lambda: Elo(k=0), "k is 0"),
        (lambda: Elo().update("x", "y", 3), "score 3"),
        (lambda: Elo().update("x", "x", 1), "'x' plays itself"),
        (lambda: nash_averaging([[0.5, 0.7], [0.3, 0.5]]), "subtract 0.5"),
        (lambda: nash_averaging(np.zeros((2, 3))), "shape .2, 3."),
        (lambda: nash_averaging(Games([dict(a="x", b="y", score=1)], players=["z"])), "never met"),
        (lambda: nash_averaging(np.zeros((2, 2)), ["x"]), "1 names for 2"),
        (lambda: nash_averaging([[0, math.nan], [math.nan, 0]]), "not antisymmetric"),
    ],
)
def test_bad_input_is_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()


# Elo


def test_elo_moves_towards_the_score_and_keeps_the_sum():
    elo = Elo(k=20, start=1500)
    elo.update("x", "y", 1)
    assert (elo["x"], elo["y"], elo["newcomer"]) == (1510, 1490, 1500) and elo.expected(
        "x", "y"
    ) == pytest.approx(expect(1510, 1490))
    elo.update("y", "z", 0.5)
    assert (
        sum(elo.ratings.values()) == pytest.approx(4500)
        and 1490 < elo["y"] < 1500
        and repr(elo).startswith("Elo: x 1510")
    )


# Bradley-Terry


@pytest.mark.parametrize("seed", range(3))
def test_bradley_terry_equals_choix(seed):
    choix = pytest.importorskip("choix")
    rng = np.random.default_rng(seed)
    k = 4 + 3 * seed
    _, P = rated(rng, k, 200)
    wins = [
        (int(a), int(b)) if rng.random() < P[a, b] else (int(b), int(a))
        for a, b in (rng.choice(k, 2, replace=False) for _ in range(80 * k))
    ]
    fit = bradley_terry(Games(dict(a=str(w), b=str(x), score=1) for w, x in wins), prior=0, resamples=1)
    theirs = choix.opt_pairwise(k, wins, tol=1e-9)
    np.testing.assert_allclose(
        [(fit[str(i)] - 1000) / ELO for i in range(k)], theirs - theirs.mean(), atol=1e-4
    )


def test_a_draw_is_half_a_win_and_seats_do_not_matter():
    halves = Games([dict(a="x", b="y", score=s) for s in [1] * 3 + [0.5] * 6 + [0]])
    wins = Games([dict(a="y", b="x", score=s) for s in [0] * 6 + [1] * 4])
    a, b = (bradley_terry(g, prior=0, anchors=dict(y=0)) for g in (halves, wins))
    assert a["x"] == pytest.approx(b["x"]) == pytest.approx(400 * math.log10(1.5)) and a.expected(
        "x", "y"
    ) == pytest.approx(0.6)
    np.testing.assert_allclose(a.difference("x", "y")[0], -a.difference("y", "x")[0])


def test_anchors_shift_and_nothing_else():
    rng = np.random.default_rng(0)
    g = play(rated(rng, 4, 150)[1], 20, rng)
    free, fixed, two = (bradley_terry(g, anchors=a) for a in (None, dict(p1=1500), dict(p1=1500, p2=1600)))
    assert (
        fixed["p1"] == 1500
        and np.mean([two["p1"], two["p2"]]) == pytest.approx(1550)
        and free.ratings.mean() == pytest.approx(1000)
    )
    assert fixed.players == free.players and np.allclose(np.diff(fixed.ratings), np.diff(free.ratings))
    assert (
        fixed.difference("p0", "p2") == pytest.approx(free.difference("p0", "p2"))
        and "fixed" in repr(fixed)
        and "fixed" not in repr(two)
    )
    assert np.array_equal(bradley_terry(g, seed=1).samples, bradley_terry(g, seed=1).samples)
    assert not np.array_equal(bradley_terry(g, seed=1).samples, bradley_terry(g, seed=2).samples)


def test_all_won_all_lost_and_unplayed_are_finite_and_admit_ignorance():
    g = Games(
        [dict(a="best", b="mid", score=1)] * 20
        + [dict(a="mid", b="worst", score=1)] * 20
        + [dict(a="mid", b="rival", score=s) for s in [0, 1] * 20],
        players=["idle"],
    )
    fit = bradley_terry(g)
    width = dict(zip(fit.players, (fit.intervals[:, 1] - fit.intervals[:, 0]).tolist()))
    assert np.isfinite(fit.samples).all() and fit.players[0] == "best" and fit.players[-1] == "worst"
    assert (
        width["idle"] > 800
        and min(width["best"], width["worst"]) > 200
        and fit.separated("best", "mid")
        and not fit.separated("mid", "rival")
    )
    two = bradley_terry(Games([dict(a="x", b="y", score=1)] * 20), anchors=dict(y=0), resamples=4000)
    assert 0.7 < expect(two.intervals[two.players.index("x"), 0], 0) < 0.9 and "20" in repr(two)
    assert (
        bradley_terry(Games([dict(a="x", b="y", score=0.5, prompt="one")] * 3)).separated("x", "y") is False
    )


def test_the_table_says_what_cannot_be_separated():
    r = np.array([1300.0, 1010.0, 1000.0])
    fit = bradley_terry(play(expect(r[:, None], r), 60, np.random.default_rng(0)))
    lines = repr(fit).splitlines()
    assert (
        lines[0].split()[:3] == ["rank", "player", "rating"]
        and "cannot" not in lines[1]
        and f"cannot be separated from {fit.players[2]}" in lines[2]
    )
    assert fit._repr_html_().count("<tr>") == 4 and fit.separated(fit.players[0], fit.players[1])


def test_without_a_prior_the_resamples_stay_finite():
    fit = bradley_terry(Games([dict(a="x", b="y", score=s) for s in [1] * 30 + [0]]), prior=0, resamples=300)
    assert np.isfinite(fit.samples).all() and fit["x"] - fit["y"] == pytest.approx(400 * math.log10(30))


@pytest.mark.parametrize("kind", [dict(n=20), dict(n=12, repeats=4)], ids=["by game", "by prompt"])
def test_500_leagues_intervals_cover(kind):
    rng, hits = np.random.default_rng(0), []
    for seed in range(500 if "repeats" not in kind else 250):
        r, P = rated(rng, 5, 150)
        fit = bradley_terry(play(P, rng=rng, **kind), resamples=300, seed=seed)
        hits += [low <= r[int(p[1:])] <= high for p, (low, high) in zip(fit.players, fit.intervals)]
    assert 0.92 <= np.mean(hits) <= 0.98, np.mean(hits)


def test_without_the_prompts_intervals_are_too_narrow():
    g = play(
        expect(np.array([100.0, 0, -100])[:, None], np.array([100.0, 0, -100])),
        15,
        np.random.default_rng(0),
        repeats=6,
    )
    alone = Games(dict(a=g.players[a], b=g.players[b], score=s) for a, b, s, _ in g._rows)
    wide, narrow = (np.diff(bradley_terry(x).intervals).mean() for x in (g, alone))
    assert 1.8 < wide / narrow < 4  # independent games would be worth sqrt(6) times as much


# cycles


@pytest.mark.parametrize("seed", range(5))
def test_rock_paper_scissors_is_flagged(seed):
    c = cycles(play(ring(0.8), 30, np.random.default_rng(seed)))
    assert c.flagged and c.n_triangles == 1 and "flagged (p = 0.001)" in repr(c)
    assert "p0p1p2" in "".join(c.cycle * 2)  # in the direction of who beats whom
    assert all(won > lost for won, _, lost in c.links) and sum(map(sum, c.links)) == 90


def test_a_cycle_among_others_is_found_and_reversed_names_do_not_matter():
    P = np.full((6, 6), 0.5)
    P[:3, :3] = ring(0.2)
    P[:3, 3:], P[3:, :3] = 0.8, 0.2
    c = cycles(play(P, 40, np.random.default_rng(0)))
    assert c.flagged and "p2p1p0" in "".join(c.cycle * 2)


LADDER = np.where(np.triu(np.ones((5, 5)), 1) > 0, 0.9, 0.1)
np.fill_diagonal(LADDER, 0.5)


@pytest.mark.parametrize(
    "make, n, more",
    [
        (lambda rng: rated(rng, 5, 150)[1], 20, {}),
        (lambda rng: np.full((5, 5), 0.5), 10, dict(draws=0)),
        (lambda rng: np.full((4, 4), 0.5), 12, dict(repeats=4)),
        (lambda rng: LADDER, 30, {}),
    ],
    ids=["rated", "equal", "equal, prompts decide", "a clear order that no rating explains"],
)
def test_transitive_leagues_are_rarely_flagged(make, n, more):
    rng, leagues = np.random.default_rng(0), 300
    assert (
        sum(cycles(play(make(rng), n, rng, **more), resamples=200, seed=s).flagged for s in range(leagues))
        <= 0.05 * leagues
    )


def test_cycles_without_triangles_or_without_a_ring():
    assert (
        repr(cycles(Games([dict(a="x", b="y", score=1), dict(a="y", b="z", score=1)])))
        == "not tested: no three players have all met"
    )
    g = Games([dict(a=a, b=b, score=1) for a, b in ("xy", "yz", "xz") for _ in range(9)])
    assert not cycles(g).flagged and "none of 1 triangles goes round" in repr(cycles(g))
    one_prompt = Games(
        [dict(a=a, b=b, score=1, prompt="q") for a, b in ("xy", "yz", "zx") for _ in range(50)]
    )
    assert cycles(one_prompt).n_cycles == 1
    even = Games([dict(a=a, b=b, score=0.5) for a, b in ("xy", "yz", "zx") for _ in range(9)])
    assert cycles(even).p == 1 and cycles(g, seed=1) == cycles(g, seed=1)


# Nash

# the agent-against-agent games of OpenSpiel 2.0.2's nash_averaging_test
TRANSITIVE = np.array([[0, -1, -1], [1, 0, -1], [1, 1, 0.0]])
RPS = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0.0]])
DOMINATED = np.array([[0, 234, 34, -270], [-234, 0, -38, -464], [-34, 38, 0, -270], [270, 464, 270, 0.0]])


@pytest.mark.parametrize(
    "A, weights, skill",
    [
        (TRANSITIVE, [0, 0, 1], [-1, -1, 0]),
        (RPS, [1 / 3] * 3, [0] * 3),
        (DOMINATED, [0, 0, 0, 1], [-270, -464, -270, 0]),
    ],
)
def test_nash_on_openspiels_test_games(A, weights, skill):
    nash = nash_averaging(A)
    np.testing.assert_allclose(nash.weights, weights, atol=1e-5)
    np.testing.assert_allclose(nash.skill, skill, atol=1e-4)


def matrices(rng):
    for t in range(40):
        k = int(rng.integers(2, 10))
        A = np.triu([rng.normal(size=(k, k)), rng.integers(-1, 2, (k, k))][t % 2], 1)
        yield A - A.T


def test_nash_equals_openspiel():
    pytest.importorskip("cvxpy")
    spiel = pytest.importorskip("open_spiel.python.algorithms.nash_averaging")
    import pyspiel

    for A in TRANSITIVE, RPS, DOMINATED:
        weights, skill = spiel.nash_averaging(pyspiel.create_matrix_game(A, -A))
        nash = nash_averaging(A)
        np.testing.assert_allclose(nash.weights, weights.ravel(), atol=1e-5)
        np.testing.assert_allclose(nash.skill, skill.ravel(), atol=1e-4)
    blotto = spiel.game_payoffs_array(pyspiel.load_matrix_game("blotto(players=2,coins=6,fields=3)"))[0]
    for A in blotto, *matrices(np.random.default_rng(0)):
        np.testing.assert_allclose(
            nash_averaging(A).weights, spiel._max_entropy_symmetric_nash(A, eps=0.0).ravel(), atol=2e-4
        )


def test_nash_is_an_equilibrium_of_the_largest_entropy():
    from scipy.optimize import linprog

    rng = np.random.default_rng(1)
    entropy = lambda p: -sum(x * math.log(x) for x in p if x > 1e-12)
    for A in matrices(rng):
        nash, k = nash_averaging(A), len(A)
        assert nash.skill.max() < 1e-6 and nash.weights.min() >= 0 and nash.weights.sum() == pytest.approx(1)
        for _ in range(3):  # no other equilibrium has a larger one
            lp = linprog(rng.normal(size=k), A, np.zeros(k), np.ones((1, k)), [1], bounds=(0, 1))
            assert (
                entropy(lp.x) <= entropy(nash.weights) + 1e-6
                and entropy((lp.x + nash.weights) / 2) <= entropy(nash.weights) + 1e-6
            )


def test_copies_change_nothing():
    k = [0, 0, 0, 1, 2]
    nash = nash_averaging(RPS[np.ix_(k, k)])
    np.testing.assert_allclose(nash.weights, [1 / 9] * 3 + [1 / 3] * 2, atol=1e-6)
    np.testing.assert_allclose(nash.skill, 0, atol=1e-6)


def test_nash_of_games_uses_win_rates():
    g = Games([dict(a="x", b="y", score=s) for s in (1, 1, 0.5, 0)])
    players, weights, skill = nash_averaging(g)
    assert (
        players == ["x", "y"]
        and weights == pytest.approx([1, 0])
        and skill == pytest.approx([0, 0.375 - 0.5])
    )
    assert repr(nash_averaging(g)).splitlines()[1].split() == ["x", "1.000", "+0.000"]


# pictures


def test_plots_show_what_they_are_given():
    import matplotlib

    matplotlib.use("Agg")
    rng = np.random.default_rng(0)
    g = play(rated(rng, 4, 200)[1], 10, rng)
    fit = bradley_terry(g)
    assert [t.get_text() for t in fit.plot().get_yticklabels()] == fit.players
    ax = g.plot(fit.players)
    i, j = (g.players.index(p) for p in fit.players[:2])
    assert len(ax.texts) == 12 and ax.texts[0].get_text() == f"{g.payoff[i, j]:.2f}"


def test_ratings_need_neither_torch_nor_scipy_to_import():
    import subprocess
    import sys

    code = (
        "import sys, selfplay_nb.stats.ratings; sys.exit(any(m in sys.modules for m in ('torch', 'scipy',"
        " 'matplotlib', 'pandas')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nash_of_payoffs_that_are_rounding():
    "Antisymmetric up to rounding is enough, however small the payoffs are beside it."
    assert nash_averaging(np.array([[1e-17]])).weights.tolist() == [1.0]
    rng = np.random.default_rng(0)
    for scale in 1e-9, 1e-7, 1e-3:
        G = rng.normal(size=(28, 28)) * scale
        nash = nash_averaging(G - G.T + rng.normal(size=(28, 28)) * 1e-10)
        assert nash.weights.sum() == pytest.approx(1) and nash.weights.min() >= 0
        assert nash.skill.max() <= 1e-6 * np.abs(G).max() + 1e-9
