"Length control: what it takes away, and what it must not."

import warnings

import numpy as np
import pytest

from selfplay_nb.scoring.judge import without_length


@pytest.mark.parametrize("n", [1, 3, 10, 29])
def test_few_matches_are_left_as_they_are_with_a_warning(n):
    rng = np.random.default_rng(n)
    p, lengths = rng.random(n), rng.normal(size=n)
    with pytest.warns(UserWarning, match=f"{n} matches do not tell"):
        assert without_length(p, lengths).tolist() == p.tolist()


def test_the_hard_wins_of_the_report_stay():
    with pytest.warns(UserWarning, match="3 matches"):
        assert without_length([1.0, 1.0, 0.0], [100, 50, -20]).tolist() == [1, 1, 0]


@pytest.mark.parametrize("n", [30, 50, 200])
@pytest.mark.parametrize("bias", [0.0, 1.0, 5.0])
def test_a_hard_verdict_is_never_turned_round(n, bias):
    rng = np.random.default_rng(n)
    for _ in range(100):
        lengths = rng.normal(100, 50, n)
        p = (rng.random(n) < 1 / (1 + np.exp(-bias * (lengths - 100) / 50))).astype(float)
        assert ((without_length(p, lengths) - 0.5) * (p - 0.5) >= 0).all()


@pytest.mark.parametrize("n", [30, 100])
@pytest.mark.parametrize(
    "make",
    [
        lambda rng, won: won * 1.0,
        lambda rng, won: np.where(won, 0.95, 0.05),
        lambda rng, won: np.clip(rng.normal(0.7, 0.1, len(won)), 0.05, 0.95),
    ],
    ids=["hard", "nearly", "soft"],
)
def test_where_length_means_nothing_the_win_rate_stays(n, make):
    rng, change = np.random.default_rng(0), []
    for _ in range(200):
        p = make(rng, rng.random(n) < 0.7)
        change.append(
            np.mean(np.sign(without_length(p, rng.normal(100, 50, n)) - 0.5) - np.sign(p - 0.5)) / 2
        )
    assert abs(np.mean(change)) < 0.02 and np.quantile(np.abs(change), 0.9) <= 0.05


def test_a_bias_is_taken_out_and_nothing_is_said():
    rng = np.random.default_rng(0)
    lengths, better = rng.normal(20, 50, 400), rng.random(400) < 0.6
    p = 1 / (1 + np.exp(-(np.where(better, 1.4, -1.4) + lengths / 25)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        q = without_length(p, lengths)
        assert without_length(p, np.zeros(400)).tolist() == p.tolist()
    assert np.mean((p > 0.5) == better) < 0.85 and np.mean((q > 0.5) == better) > 0.95
