"From transcripts to rows: advantages and pairs from games whose values are known."
import random
from collections import Counter
from statistics import mean

import pytest

from selfplay_nb.game_training import SeatBaseline, advantages, position_pairs
from selfplay_nb.games import Played, RandomPlayer, Transcript, Turn, play


class Pick:
    "One move each: the higher number wins; the second seat sees nothing of the first."
    name, seats = "pick", 2
    def start(self, seed): return Position(random.Random(seed).randint(0, 1))


class Position:
    def __init__(self, kind, seat=0, first=None): self.kind, self.seat, self.first, self.outcome = kind, seat, first, None
    legal = ["1", "2", "3"]
    prompt = property(lambda self: f"kind {self.kind}, seat {self.seat}")
    def copy(self): return Position(self.kind, self.seat, self.first)
    def __str__(self): return f"{self.kind} {self.first}"
    def move(self, text):
        if self.seat == 0: self.first, self.seat = text, 1; return
        a, b = int(self.first), int(text); self.seat, self.outcome = None, [float(a > b) + .5*(a == b), float(b > a) + .5*(a == b)]


@pytest.fixture(scope="module")
def games(): return play(Pick(), [RandomPlayer(), RandomPlayer()], 300, seed=1)


def test_advantages_of_a_position_cancel_and_the_best_move_has_the_most(games):
    rows = advantages(games)
    assert len(rows) == sum(len(g.turns) for g in games) == 1200
    for prompt in {r["prompt"] for r in rows}:
        here = [r for r in rows if r["prompt"] == prompt]
        assert sum(r["advantage"] for r in here) == pytest.approx(0, abs=1e-9)
        by_move = {m: mean(r["advantage"] for r in here if r["completion"] == m) for m in "123"}
        assert by_move["1"] < -.2 < abs(by_move["2"]) < .1 + .1 and by_move["3"] > .2


def test_only_one_players_moves(games):
    first, second = games.players
    assert len(advantages(games, first)) == len(advantages(games, second)) == 600
    with pytest.raises(ValueError, match="no moves of 'nobody'"): advantages(games, "nobody")


def test_a_seats_baseline_follows_what_was_and_not_what_is():
    def game(o): return Transcript("g", 0, ["a", "b"], turns=[Turn(0, "p", "x", "x"), Turn(1, "q", "y", "y")], outcome=[o, 1 - o])
    b = SeatBaseline(decay=.5)
    first = advantages(Played([game(1.), game(0.)]), baseline=b)
    assert [r["advantage"] for r in first] == [.5, -.5, -.5, .5] and b.means == {("g", 0): .5, ("g", 1): .5}
    second = advantages(Played([game(1.)]*4), baseline=b)
    assert [r["advantage"] for r in second] == [.5, -.5]*4 and b.means == {("g", 0): .75, ("g", 1): .25}


def test_each_game_has_a_baseline_of_its_own():
    def game(name, o): return Transcript(name, 0, ["a", "b"], turns=[Turn(0, "p", "x", "x"), Turn(1, "q", "y", "y")], outcome=[o, 1 - o])
    mixed = Played([game("g", 1.), game("h", 0.), game("g", 1.), game("h", 0.)])
    for b in {}, {"baseline": SeatBaseline()}: assert [r["advantage"] for r in advantages(mixed, **b)] == [0]*8


def test_surprise_is_paid():
    def game(answer, logprobs): return Transcript("g", 0, ["a", "b"], turns=[Turn(0, "p", answer, answer, logprobs=logprobs)], outcome=[.5, .5])
    rows = advantages(Played([game("x", [-1., -2.]), game("y", [-.5])]), entropy=.1)
    assert [r["advantage"] for r in rows] == pytest.approx([.125, -.125])
    assert [r["advantage"] for r in advantages(Played([game("x", [-1., -2.]), game("y", [-.5])]))] == [0, 0]
    odd = game("z", [-9.]); odd.turns[0].legal = False  # nonsense is always a surprise
    assert advantages(Played([game("x", [-1., -2.]), odd]), entropy=.1)[1]["advantage"] == pytest.approx(-.15)


def test_pairs_prefer_what_did_better_in_the_same_position(games):
    pairs, dropped = position_pairs(games, per_position=2, round=3)
    assert Counter((p["chosen"], p["rejected"]) for p in pairs) == {("3", "1"): 4, ("3", "2"): 4} and not dropped  # two kinds, two seats
    assert all(p["margin"] > .1 and p["source"] == "game" and p["judge"] == "pick" and p["round"] == 3 for p in pairs)
    widest, _ = position_pairs(games, per_position=1)
    assert {p["rejected"] for p in widest} == {"1"}


def test_too_few_games_make_no_pair_and_a_cut_answer_is_never_chosen():
    def game(answer, o, cut=False, ids=None):
        return Transcript("g", 0, ["a", "b"], turns=[Turn(0, "p", answer, None if cut else answer, not cut, truncated=cut, token_ids=ids)], outcome=[o, 1 - o])
    assert position_pairs(Played([game("x", 1.), game("y", 0.)])) == ([], Counter())
    pairs, _ = position_pairs(Played([game("x", 1., ids=[5]), game("y", 0., ids=[6])]), least=1)
    assert pairs[0]["chosen_ids"] == [5] and pairs[0]["rejected_ids"] == [6]
    assert position_pairs(Played([game("x", 1., cut=True), game("y", 0.)]), least=1) == ([], Counter({"truncated": 1}))
    assert position_pairs(Played([game("x", 1.), game("y", 0., cut=True)]), least=1)[0][0]["rejected_truncated"]
