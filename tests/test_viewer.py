"""The viewer and the seat by program: what is on show is the transcript's, clicks are moves, hidden things
stay hidden, errors are seen.
"""

import copy
import json
import re
from html.parser import HTMLParser

import ipywidgets as widgets
import pytest

from selfplay_nb.core.players import Scripted
from selfplay_nb.games.play import MinimaxBot, OpenSpielGame, Played, RandomPlayer, Transcript, play, replay
from selfplay_nb.views.game_viewer import GameViewer, PlaySeat, board_html, board_svg

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror='alert(2)'> \" ' &amp;"


class Pile:
    def __init__(self, left, seat=0):
        self.left, self.seat, self.outcome = left, seat, None

    def copy(self):
        return copy.copy(self)

    def __str__(self):
        return "o" * self.left + HOSTILE

    prompt = property(lambda self: f"{self.left} stones {HOSTILE}")
    legal = property(lambda self: [str(k) for k in range(1, min(3, self.left) + 1)])

    def move(self, text):
        if text not in ("1", "2", "3") or int(text) > self.left:
            raise ValueError(f"{text!r} is no number of stones {HOSTILE}")
        self.left -= int(text)
        last, self.seat = self.seat, 1 - self.seat
        if not self.left:
            self.seat, self.outcome = None, [float(s == last) for s in (0, 1)]


class Stones:
    name, seats, perfect = "stones", 2, True

    def start(self, seed):
        return Pile(7)


class FreePile(Pile):
    legal = None


class Free(Stones):
    name, perfect = "free stones", False

    def start(self, seed):
        return FreePile(7)


one = Scripted(lambda p, rng: "1", "one")


def odd(p, rng):
    return "1" if rng.random() < 0.6 else HOSTILE


class Texts(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert not any(k.startswith("on") for k, _ in attrs)

    def handle_data(self, data):
        self.text += data


def widgets_of(w):
    yield w
    for child in getattr(w, "children", ()):
        yield from widgets_of(child)


def everything(view):
    return "".join(w.value for w in widgets_of(view) if isinstance(w, widgets.HTML))


@pytest.fixture
def played():
    return play(Stones(), [Scripted(odd, "odd"), one], n=3, seed=4, illegal="random")


@pytest.fixture
def ttt():
    pytest.importorskip("pyspiel")
    return OpenSpielGame("tic_tac_toe")


# stepping through


@pytest.mark.parametrize("with_game", [True, False])
def test_every_turn_is_shown_as_it_was(played, with_game):
    view = GameViewer(played, Stones() if with_game else None)
    for n, t in enumerate(played, 1):
        view.number.value = n
        states = replay(Stones(), t)
        assert (
            view.transcript is t and view.step.value == view.play.value == 0 and view.step.max == len(t.turns)
        )
        for k, turn in enumerate(t.turns):
            (view.play if k % 2 else view.step).value = k
            assert (
                turn.prompt in Texts(view.prompt.value).text and turn.answer in Texts(view.answer.value).text
            )
            assert (
                f"Turn {k}" in view.verdict.value
                and f"(seat {turn.seat})" in view.verdict.value
                and ("ILLEGAL" in view.verdict.value) == (not turn.legal)
            )
            if not turn.legal:
                assert f"{turn.move} was played at random" in view.verdict.value
            assert (str(states[k]) in Texts(view.board.value).text) == with_game
            assert f"turn {k} {turn.value:.2f} (shown)" in view.curve.value
        view.last.click()
        assert (
            "The end" in view.verdict.value
            and t.result in view.verdict.value
            and "end " in view.curve.value
            and t.end in Texts(view.board.value).text
        )


def test_buttons_move_one_turn_and_stop_at_the_ends(played):
    view = GameViewer(played[0], Stones())
    n = len(played[0].turns)
    seen = [view.step.value]
    assert view.previous.disabled and view.first.disabled and view.number.disabled
    for _ in range(n + 2):
        view.next.click()
        seen.append(view.step.value)
    assert seen == [*range(n + 1), n, n] and view.next.disabled and not view.previous.disabled
    view.previous.click()
    assert view.step.value == n - 1 and not view.next.disabled
    view.first.click()
    view.previous.click()
    assert view.step.value == 0


def test_the_game_of_another_is_told_and_the_rest_is_shown(played):
    class Other(Stones):
        name = "other"

        def start(self, seed):
            return Pile(2)

    view = GameViewer(played, Other())
    assert (
        "No board" in view.title.value
        and "ValueError" in view.title.value
        and played[0].turns[0].prompt in Texts(view.prompt.value).text
    )

    class Broken:
        def start(self, seed):
            raise RuntimeError("no rules today")

    assert "RuntimeError: no rules today" in GameViewer(played, Broken()).title.value
    with pytest.raises(ValueError, match="no transcripts"):
        GameViewer([])


def test_a_forfeit_and_unknown_values():
    t = play(Free(), [Scripted(lambda p, rng: "four", "bad"), one], n=1, swap=False)[0]
    view = GameViewer(t, Free())
    view.last.click()
    assert (
        view.step.value == 3
        and "loses by illegal answers" in view.verdict.value
        and "No exact values" in view.curve.value
    )
    empty = Transcript("g", 0, ["a", "b"], outcome=[1.0, 0.0], end="all gone")
    assert "all gone" in GameViewer(empty).board.value and "The end" in GameViewer(empty).verdict.value


def test_a_long_game_has_the_turn_on_show_in_its_curve(ttt):
    class Long(Stones):
        def start(self, seed):
            return Pile(30)

    view = GameViewer(play(Long(), [one, one], n=1, swap=False), Long())
    for k in range(31):
        view.step.value = k
        assert (
            re.findall(r"(turn \d+|end) [\d.]+ \(shown\)", view.curve.value)
            == [f"turn {k}" if k < 30 else "end"]
            and view.curve.value.count("r='3'") <= 12
        )


def test_boards_in_marks_and_words(ttt):
    t = play(ttt, [RandomPlayer(), MinimaxBot(ttt)], n=1)[0]
    view = GameViewer(t, ttt)
    for k, state in enumerate(replay(ttt, t)):
        view.step.value = k
        svg = view.board.value
        assert svg.count("<circle") == str(state.spiel).count("o") and svg.count("<path") == str(
            state.spiel
        ).count("x")
        assert (
            " / ".join(state.grid) in svg
            and svg.count("stroke-dasharray") == (k > 0)
            and "fill='none'" in svg
        )
    four = OpenSpielGame("connect_four").start(0)
    four.move("x3")
    assert board_html(four).count("<rect") == 42 and "...x..." in board_html(four)
    assert "<svg" not in board_html(OpenSpielGame("nim").start(0)) and board_svg([".x"]).count("<rect") == 2


def test_no_text_becomes_markup(played, tmp_path):
    named = Played([Transcript(**{**t.__dict__, "players": [HOSTILE, "b"], "game": HOSTILE}) for t in played])
    view = GameViewer(named, Stones())
    seat = PlaySeat(Stones(), Scripted(lambda p, rng: HOSTILE, HOSTILE), path=tmp_path / "<script>")
    for k in range(view.step.max + 1):
        view.step.value = k
        page = Texts(everything(view) + view._still()["text/html"])
        assert not {"script", "img"} & set(page.tags) and "<script>alert(1)</script>" in page.text
    seat.choose("3")
    seat.choose(HOSTILE)
    page = Texts(everything(seat) + seat._still()["text/html"])
    assert not {"script", "img"} & set(page.tags) and seat.live.over


# a seat


def click(seat, move):
    next(b for b in seat.moves.children if b.description == move).click()


def test_a_game_by_clicks_is_a_transcript():
    seat = PlaySeat(Stones(), one)
    assert (
        [b.description for b in seat.moves.children] == ["1", "2", "3"]
        and seat.entry.layout.display == "none"
        and "Your move" in seat.status.value
    )
    click(seat, "2")
    assert seat.live.state.left == 4 and "one (seat 1): 1" in seat.status.value
    click(seat, "3")
    assert (
        seat.live.over
        and "one (seat 1) wins" in seat.status.value
        and len(seat.played) == 1
        and not seat.moves.children
    )
    t = seat.played[0]
    assert (
        t.moves == ["2", "1", "3", "1"]
        and t.players == ["person", "one"]
        and replay(Stones(), t)[-1].outcome == t.outcome == [0.0, 1.0]
    )
    assert (
        t.turns[0].value == 1
        and t.turns[0].prompt == Pile(7).prompt
        and seat.played.win_rate("person").value == 0
    )
    seat.new.click()
    assert seat.live.transcript.number == 1 and len(seat.played) == 1 and not seat.live.over


def test_the_second_seat_waits_and_luck_is_the_seeds():
    def some(p, rng):
        return str(rng.randint(1, 3))

    a, b, c = (PlaySeat(Stones(), Scripted(some), seat=1, seed=s) for s in (1, 1, 2))
    for s in a, b, c:
        assert s.live.state.seat == 1 and len(s.live.transcript.turns) == 1
        for _ in range(4):
            s.new.click()
    for s in a, b:
        click(s, "1")
    assert a.live.transcript == b.live.transcript
    with pytest.raises(ValueError, match="seat 2"):
        PlaySeat(Stones(), one, seat=2)


def test_free_text_has_a_box_and_mistakes_cost_nothing():
    seat = PlaySeat(Free(), one)
    assert not seat.moves.children and seat.entry.layout.display is None and not seat.text.disabled
    seat.text.value = "nine"
    seat.submit.click()
    assert "Not played: &#x27;nine&#x27; is no number" in seat.status.value and not seat.live.transcript.turns
    seat.text.value = "2"
    seat.submit.click()
    assert [t.answer for t in seat.live.transcript.turns] == ["2", "1"] and seat.text.value == ""
    many = Stones()
    many.start = lambda seed: type(
        "Many", (Pile,), dict(legal=property(lambda s: [str(k) for k in range(1, 60)]))
    )(7)
    assert not PlaySeat(many, one).moves.children and PlaySeat(many, one).entry.layout.display is None


def test_a_late_click_is_not_a_move():
    seat = PlaySeat(Stones(), one)
    old = seat.moves.children[0]
    old.click()
    n = len(seat.live.transcript.turns)
    old.click()
    assert len(seat.live.transcript.turns) == n and "earlier position" in seat.status.value
    other = seat.moves.children[0]
    seat.new.click()
    other.click()
    assert not seat.live.transcript.turns
    click(seat, "3")
    click(seat, "3")
    assert seat.live.over
    old.click()
    assert len(seat.played) == 1


def test_all_inputs_are_off_while_the_opponent_thinks():
    seen = []

    class Slow:
        name = "slow"

        def act(self, state, rng):
            if seats:
                seen.append(
                    [c.disabled for c in widgets_of(seats[0]) if hasattr(c, "disabled")]
                    + [seats[0].status.value]
                )
            return "1"

    seats = []
    seats.append(PlaySeat(Stones(), Slow()))
    click(seats[0], "1")
    assert (
        all(seen[0][:-1])
        and "thinks" in seen[0][-1]
        and not any(b.disabled for b in seats[0].moves.children)
        and not seats[0].new.disabled
    )


def test_an_opponent_that_fails_can_be_asked_again():
    class Shaky:
        name, calls = "shaky", 0

        def act(self, state, rng):
            self.calls += 1
            if self.calls == 1:
                raise ConnectionError(HOSTILE)
            if self.calls == 2:
                raise KeyboardInterrupt
            return "1"

    seat = PlaySeat(Stones(), Shaky())
    click(seat, "1")
    assert (
        "ConnectionError" in seat.status.value
        and "role='alert'" in seat.status.value
        and "script" not in Texts(seat.status.value).tags
    )
    assert not seat.again.disabled and not seat.moves.children and len(seat.live.transcript.turns) == 1
    seat.again.click()
    assert "Interrupted" in seat.status.value and not seat.again.disabled
    seat.again.click()
    assert "Your move" in seat.status.value and seat.again.disabled


def test_an_opponents_illegal_answers_follow_the_rule():
    seat = PlaySeat(Stones(), Scripted(lambda p, rng: "?", "bad"), retries=1)
    click(seat, "1")
    assert (
        seat.live.transcript.forfeit == 1
        and seat.played[0].outcome == [1.0, 0.0]
        and "illegal" in seat.status.value
    )
    seat = PlaySeat(Stones(), Scripted(lambda p, rng: "?", "bad"), illegal="random")
    click(seat, "1")
    assert not seat.live.over and seat.live.transcript.illegal == [0, 1]


def test_cards_stay_hidden_until_the_end():
    pytest.importorskip("pyspiel")
    kuhn = OpenSpielGame("kuhn_poker")
    for seed in range(6):
        seat = PlaySeat(kuhn, RandomPlayer(), seed=seed)
        while not seat.live.over:
            cards = seat.live.state.record[:2]
            shown = Texts(everything(seat) + seat._still()["text/html"]).text
            assert f"your card: {cards[0]}" in shown and "cards: " not in shown
            seat.moves.children[0].click()
        assert f"cards: {cards[0]}, {cards[1]}" in everything(seat)


def test_finished_games_are_saved_once(tmp_path):
    file = tmp_path / "mine.jsonl"
    seat = PlaySeat(Stones(), one, path=file)
    assert seat.save.disabled
    for _ in range(2):
        while not seat.live.over:
            seat.moves.children[-1].click()
        seat.save.click()
        assert "Saved 1 game." in seat.status.value
        seat.save.click()
        assert "Saved 0 games." in seat.status.value
        seat.new.click()
    assert (
        Played.load(file) == seat.played
        and len(seat.played) == 2
        and Played.load(file).players == ["person", "one"]
    )
    seat.file.value = str(tmp_path)
    seat.save.click()
    assert "Not saved" in seat.status.value
    seat.file.value = " "
    seat.save.click()
    assert "no file is named" in seat.status.value


# the form of both


def test_saving_goes_to_the_runs_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "games.jsonl").write_text("mine")
    seat = PlaySeat(OpenSpielGame("nim"), RandomPlayer())
    while not seat.live.over:
        seat.moves.children[0].click()
    seat.save.click()
    assert len(Played.load("runs/games.jsonl")) == 1 and (tmp_path / "games.jsonl").read_text() == "mine"


def test_core_controls_only_each_with_a_name(played):
    allowed = {
        widgets.HBox,
        widgets.VBox,
        widgets.HTML,
        widgets.Button,
        widgets.Text,
        widgets.IntSlider,
        widgets.Play,
        GameViewer,
        PlaySeat,
    }
    for view in GameViewer(played, Stones()), PlaySeat(Stones(), one):
        assert {type(w) for w in widgets_of(view)} <= allowed
        assert all(
            w.description
            for w in widgets_of(view)
            if isinstance(w, (widgets.Button, widgets.Text, widgets.IntSlider))
        )
        assert all(w.tooltip for w in widgets_of(view) if isinstance(w, widgets.Button))
        for name in "open", "send", "close", "keys":
            assert getattr(type(view), name) is getattr(widgets.VBox, name) and name not in view.__dict__


def test_there_is_a_form_without_a_kernel(played, monkeypatch):
    shown = []

    class Handle:
        def update(self, data, raw):
            shown.append(data)

    def display(data, raw, display_id=False):
        assert raw
        shown.append(data)
        return Handle() if display_id else None

    monkeypatch.setattr("IPython.display.display", display)
    view = GameViewer(played, Stones())
    view._ipython_display_()
    assert (
        shown[0]["application/vnd.jupyter.widget-view+json"]["model_id"] == view.model_id
        and played[0]._repr_html_() in shown[1]["text/html"]
    )
    seat = PlaySeat(Stones(), one)
    seat._ipython_display_()
    n = len(shown)
    while not seat.live.over:
        seat.moves.children[-1].click()
    assert len(shown) > n and seat.played[0]._repr_html_() in shown[-1]["text/html"]
    json.dumps(shown)
    assert repr(seat) == repr(seat.played)
