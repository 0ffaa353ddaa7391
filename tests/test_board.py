"The board shows what the league holds, from the row's side, and nothing that is in a text becomes markup."

import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser

import ipywidgets as widgets
import matplotlib
import pytest

matplotlib.use("Agg")
from selfplay_nb.core.players import Scripted
from selfplay_nb.methods.league import LeagueTraining
from selfplay_nb.views.league_board import Board, BoardWidget, payoff_table

NAMES = ["fixed", "a", "b", "c"]
HOSTILE = "</pre><script>alert(1)</script><img src=x onerror='alert(2)'> &lt;"


def game(a, b, score, i):
    return dict(
        a=a,
        b=b,
        score=score,
        prompt=f"prompt {i} {HOSTILE}",
        answer_a=f"{a} says x {HOSTILE}",
        answer_b=f"{b} answers {HOSTILE}",
    )


@pytest.fixture
def league():
    league = LeagueTraining(anchors={"fixed": Scripted(lambda prompt, rng: "0")})
    for n in "ab":
        league.add(Scripted(lambda prompt, rng: "1"), n)
    league.add(Scripted(lambda prompt, rng: "1"), "c", "league_exploiter")
    league.record(
        [game("a", "fixed", float(i % 4 > 0), i) for i in range(8)]
        + [game("b", "a", 0.5, 8), game("a", "b", 0.0, 9), game("b", "fixed", 1.0, 10)]
    )
    league.record([dict(a="main", b="a", score=1.0, prompt="p")] * 30)
    return league


class Page(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.attributes = [], "", set()
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {k for k, _ in attrs}

    def handle_data(self, data):
        self.text += data


def test_the_table_has_the_numbers_and_marks_one_cell(league):
    html = payoff_table(league, ("a", "fixed"))
    page = Page(html)
    assert "▸ 0.75n=8" in page.text and html.count("▸") == html.count("3px solid") == 1
    assert "0.25n=8" in page.text and "0.75n=2" in page.text and "1.00n=1" in page.text
    assert [t.count("·") for t in html.split("<tr>")][-1] == 4  # c never played
    assert payoff_table(league).count("▸") == 0


def test_the_static_board_has_it_all(league):
    board = Board(league, current_performance=1100)
    for text in repr(board), Page(board._repr_html_()).text:
        for n in *NAMES, "main at 1100 plays", "95 % interval", "league_exploiter":
            assert n in text
    figure = board.plot()
    left, middle, right = figure.axes[:3]
    assert (
        [t.get_text() for t in left.get_yticklabels()]
        == [t.get_text() for t in right.get_yticklabels()]
        == NAMES
    )
    assert "0.75" in [t.get_text() for t in left.texts] and [
        t.get_text() for t in middle.get_xticklabels()
    ] == ["a", "b"]
    assert [b.get_width() for b in right.patches] == pytest.approx(league.compute_matchmaking_probs(1100))
    assert [t.get_text() for t in right.texts] == [f"{p:.2f}" for p in league.compute_matchmaking_probs(1100)]


@pytest.mark.parametrize("role", ["main", "league_exploiter"])
def test_the_slider_shows_who_would_be_drawn(league, role):
    view = BoardWidget(league)
    view.role.value = role
    seen = set()
    for skill in view.skill.min, 1000, view.skill.max:
        view.skill.value = skill
        p = [float(x) for x in re.findall(r"<td>(\d\.\d{3})</td>", view.drawn.value)]
        assert (
            p == pytest.approx(league.compute_matchmaking_probs(skill, role), abs=5e-4)
            and f"{role} at {skill}" in view.drawn.value
        )
        seen.add(tuple(p))
    assert len(seen) == (3 if role == "main" else 1)  # the exploiter's opponents do not depend on skill


def test_the_games_behind_a_cell_are_told_from_its_row(league):
    view = BoardWidget(league)
    view.row.value, view.column.value = "b", "a"
    assert (view.game.value, view.game.max) == (1, 2) and "n=2" in view.payoff.value.split("▸")[1][:40]
    assert "Game 1 of 2: b draws against a (0.50)" in view.prompt.value
    view.game.value = 2
    page = Page(view.prompt.value + view.left.value + view.right.value)
    assert "Game 2 of 2: b wins against a (1.00)" in page.text and page.text.index(
        "b answers"
    ) < page.text.index("a says x")
    view.row.value, view.column.value = "a", "b"
    assert view.game.value == 1
    view.game.value = 2
    assert (
        "Game 2 of 2: a loses against b (0.00)" in view.prompt.value
        and "a says x" in view.left.value
        and "b answers" in view.right.value
    )
    for row, column in ("c", "a"), ("a", "a"):
        view.row.value, view.column.value = row, column
        assert (
            view.game.max == 1
            and "No games" in view.prompt.value
            and view.left.value == view.right.value == ""
        )


def test_drawing_again_takes_in_what_was_played(league):
    view = BoardWidget(league)
    before = view.curve.value
    view.row.value, view.column.value = "b", "fixed"
    league.add(Scripted(lambda prompt, rng: "2"), "d")
    league.record([game("d", "b", 1.0, 11)] * 9)
    assert "d" not in view.row.options
    view.refresh.click()
    assert list(view.row.options) == list(view.column.options) == [*NAMES, "d"] and (
        view.row.value,
        view.column.value,
    ) == ("b", "fixed")
    assert (
        view.curve.value != before
        and "<th>d</th>" in view.payoff.value
        and "<td>d</td>" in view.drawn.value
        and "<td>d</td>" in view.members.value
    )


def test_members_may_leave_between_two_looks():
    league = LeagueTraining(2)
    for n in "ab":
        league.add(Scripted(lambda prompt, rng: "1"), n)
    league.record([game("a", "b", 1.0, 0)] * 5)
    view = BoardWidget(league)
    assert (view.row.value, view.column.value) == ("b", "a")
    league.add(Scripted(lambda prompt, rng: "1"), "c")
    league.record([game("c", "a", 1.0, 0)] * 5)
    view.refresh.click()
    assert (
        list(view.row.options) == ["a", "c"]
        and (view.row.value, view.column.value) == ("c", "a")
        and "▸" in view.payoff.value
    )


def test_hostile_text_is_text(league):
    view = BoardWidget(league)
    view.row.value, view.column.value = "a", "fixed"
    for box in view.prompt, view.left, view.right:
        page = Page(box.value)
        assert set(page.tags) <= {"b", "pre"} and page.attributes <= {"style"} and HOSTILE in page.text
    everything = "".join(v for w in widgets_of(view) for v in w.get_state().values() if isinstance(v, str))
    assert "<script" not in everything and "<img src=x" not in everything


def widgets_of(w):
    yield w
    for child in getattr(w, "children", ()):
        yield from widgets_of(child)


def test_only_controls_that_both_versions_have_and_a_picture_in_words(league):
    view = BoardWidget(league)
    controls = {widgets.Button, widgets.IntSlider, widgets.SelectionSlider, widgets.ToggleButtons}
    assert {type(w) for w in widgets_of(view)} == {BoardWidget, widgets.HBox, widgets.HTML} | controls
    assert all(w.description for w in widgets_of(view) if type(w) in controls)
    alt = unescape(re.search(r'alt="([^"]*)"', view.curve.value)[1])
    assert all(
        f"{n} {view_rating:.0f}" in alt
        for n, view_rating in zip(Board(league).ratings.players, Board(league).ratings.ratings)
    )
    assert len(view.curve.value) < 60_000 and repr(view) == repr(league)


def test_a_league_without_games_is_told():
    with pytest.raises(ValueError, match="no games between members"):
        BoardWidget(LeagueTraining(anchors={"a": Scripted(lambda p, r: "1")}))


def test_light_imports():
    code = (
        "import sys, selfplay_nb.views.league_board; sys.exit(bool({'torch', 'transformers', 'scipy',"
        " 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
