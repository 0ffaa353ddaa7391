"The scoreboard shows the records it was given, and nothing else."

import random

import matplotlib
import pytest

matplotlib.use("Agg")
from selfplay_nb.stats.diversity import diversity
from selfplay_nb.stats.ratings import Games
from selfplay_nb.views.scoreboard import Scoreboard, plot_rating_curve

PLAYERS = ["base", "round_0", "round_1", "round_2"]


@pytest.fixture(scope="module")
def games():
    rng = random.Random(0)
    return Games(
        [
            dict(a=PLAYERS[j], b=PLAYERS[i], score=float(rng.random() < 0.5 + 0.15 * (j - i)), prompt=str(k))
            for k in range(60)
            for i in range(4)
            for j in range(i + 1, 4)
        ],
        players=PLAYERS,
    )


def test_every_part_is_on_the_page(games):
    spoken = [diversity([[f"an answer {i}", f"another {i + r}"] for i in range(4)]) for r in range(3)]
    board = Scoreboard(games, PLAYERS[1:], {"base": 1000}, spoken, judge="<b>a judge's check</b>")
    text, html = repr(board), board._repr_html_()
    for title in "RATINGS", "CYCLES", "GAMES", "DIVERSITY OF ROUND_0", "DIVERSITY OF ROUND_2", "JUDGE":
        assert title in text
    for p in PLAYERS:
        assert p in text and p in html
    assert "<b>" not in html and "&lt;b&gt;" in html
    assert (
        board.ratings["base"] == pytest.approx(1000) and board.ratings["round_2"] > board.ratings["round_0"]
    )
    figure = board.plot()
    labels = [t.get_text() for axes in figure.axes for t in axes.get_xticklabels()]
    # curve, heat map, strip; the anchor is in the heat map
    assert labels.count("round_1") == 3 and "base" in labels


def test_the_curve_is_the_ratings(games):
    ratings = Scoreboard(games).ratings
    ax = plot_rating_curve(ratings, PLAYERS[1:])
    assert ax.lines[0].get_ydata().tolist() == [ratings[p] for p in PLAYERS[1:]]
    assert ax.lines[1].get_ydata()[0] == ratings["base"]


def test_bad_input_is_named(games):
    with pytest.raises(ValueError, match=r"order names \['nobody'\]"):
        Scoreboard(games, ["nobody"])
    with pytest.raises(ValueError, match="1 records of diversity for 3"):
        Scoreboard(games, PLAYERS[1:], diversity=[None])
    with pytest.raises(ValueError, match=r"order has \['nobody'\]"):
        plot_rating_curve(Scoreboard(games).ratings, ["nobody"])
