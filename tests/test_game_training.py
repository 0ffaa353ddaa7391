"From transcripts to rows: advantages and pairs from games whose values are known."

import random
from collections import Counter
from statistics import mean

import pytest

from selfplay_nb.games.play import Played, RandomPlayer, Transcript, Turn, play
from selfplay_nb.methods.game_training import SeatBaseline, Sticks, advantages, position_pairs


class Pick:
    "One move each: the higher number wins; the second seat sees nothing of the first."

    name, seats = "pick", 2

    def start(self, seed):
        return Position(random.Random(seed).randint(0, 1))


class Position:
    def __init__(self, kind, seat=0, first=None):
        self.kind = kind
        self.seat = seat
        self.first = first
        self.outcome = None

    legal = ["1", "2", "3"]
    prompt = property(lambda self: f"kind {self.kind}, seat {self.seat}")

    def copy(self):
        return Position(self.kind, self.seat, self.first)

    def __str__(self):
        return f"{self.kind} {self.first}"

    def move(self, text):
        if self.seat == 0:
            self.first, self.seat = text, 1
            return
        a, b = int(self.first), int(text)
        self.seat = None
        self.outcome = [float(a > b) + 0.5 * (a == b), float(b > a) + 0.5 * (a == b)]


@pytest.fixture(scope="module")
def games():
    return play(Pick(), [RandomPlayer(), RandomPlayer()], 300, seed=1)


def test_advantages_of_a_position_cancel_and_the_best_move_has_the_most(games):
    rows = advantages(games)
    assert len(rows) == sum(len(g.turns) for g in games) == 1200
    for prompt in {r["prompt"] for r in rows}:
        here = [r for r in rows if r["prompt"] == prompt]
        assert sum(r["advantage"] for r in here) == pytest.approx(0, abs=1e-9)
        by_move = {m: mean(r["advantage"] for r in here if r["completion"] == m) for m in "123"}
        assert by_move["1"] < -0.2 < abs(by_move["2"]) < 0.1 + 0.1 and by_move["3"] > 0.2


def test_only_one_players_moves(games):
    first, second = games.players
    assert len(advantages(games, first)) == len(advantages(games, second)) == 600
    with pytest.raises(ValueError, match="no moves of 'nobody'"):
        advantages(games, "nobody")


def test_a_seats_baseline_follows_what_was_and_not_what_is():
    def game(o):
        return Transcript(
            "g", 0, ["a", "b"], turns=[Turn(0, "p", "x", "x"), Turn(1, "q", "y", "y")], outcome=[o, 1 - o]
        )

    b = SeatBaseline(decay=0.5)
    first = advantages(Played([game(1.0), game(0.0)]), baseline=b)
    assert [r["advantage"] for r in first] == [0.5, -0.5, -0.5, 0.5] and b.means == {
        ("g", 0): 0.5,
        ("g", 1): 0.5,
    }
    second = advantages(Played([game(1.0)] * 4), baseline=b)
    assert [r["advantage"] for r in second] == [0.5, -0.5] * 4 and b.means == {("g", 0): 0.75, ("g", 1): 0.25}


def test_each_game_has_a_baseline_of_its_own():
    def game(name, o):
        return Transcript(
            name, 0, ["a", "b"], turns=[Turn(0, "p", "x", "x"), Turn(1, "q", "y", "y")], outcome=[o, 1 - o]
        )

    mixed = Played([game("g", 1.0), game("h", 0.0), game("g", 1.0), game("h", 0.0)])
    for b in {}, {"baseline": SeatBaseline()}:
        assert [r["advantage"] for r in advantages(mixed, **b)] == [0] * 8


def match(name, outcome, *prompts, seats=None):
    "A match in which the seats take turns at `prompts`."
    seats = seats or [k % 2 for k in range(len(prompts))]
    return Transcript(
        name,
        0,
        ["a", "b"],
        turns=[Turn(s, p, "x", "x") for s, p in zip(seats, prompts)],
        outcome=[outcome, 1 - outcome],
    )


def found(matches, **settings):
    return [r["advantage"] for r in advantages(Played(matches), **settings)]


@pytest.mark.parametrize("n", [2, 3, 10])
def test_what_was_expected_knows_nothing_of_the_match_itself(n):
    won = n // 2
    assert found([match("g", float(k < won), "p") for k in range(n)]) == [
        pytest.approx(float(k < won) - (won - (k < won)) / (n - 1)) for k in range(n)
    ]
    # whatever a match's own outcome is, the same was expected of it
    for o in 0.0, 1.0:
        assert found([match("g", o, "p"), match("g", 0.5, "p"), match("g", 1.0, "p")])[0] == o - 0.75


def test_a_position_that_came_up_once_is_held_against_its_seat():
    matches = [
        match("g", 1.0, "p", "only here"),
        match("g", 0.0, "p", "q"),
        match("g", 1.0, "p", "q"),
        match("h", 1.0, "p", "q"),
    ]
    assert found(matches) == [0.5, -0.5, -1.0, 1.0, 0.5, -1.0, 0, 0]  # of h there is no other match
    assert found([match("g", 1.0, "p", "q")]) == [0, 0]


def test_the_turns_of_a_match_do_not_stand_in_for_each_other():
    # three times in the same position, with one outcome
    again = [match("g", 1.0, *"pqpqpq"), match("g", 0.0, "p", "q")]
    assert found(again) == [1.0, -1.0] * 3 + [-1.0, 1.0]
    # both seats see the same, and one's win is the other's loss
    both = [match("g", 1.0, "p", "p"), match("g", 0.0, "p", "p")]
    assert found(both) == [0.5, -0.5, -0.5, 0.5]


def test_a_long_match_counts_once_for_its_seat():
    b = SeatBaseline(decay=0.5)
    found([match("g", 1.0, *"pqpqpqpq"), match("g", 0.0, "p", "q")], baseline=b)
    assert b.means == {("g", 0): 0.5, ("g", 1): 0.5}
    found([match("g", 1.0, *"pqpqpqpq"), match("g", 0.0, "p", "q"), match("g", 0.0, "p", "q")], baseline=b)
    assert b.means == {
        ("g", 0): pytest.approx(0.5 * 0.5 + 0.5 / 3),
        ("g", 1): pytest.approx(0.5 * 0.5 + 0.5 * 2 / 3),
    }


@pytest.mark.parametrize("baseline", [None, SeatBaseline])
def test_equal_matches_leave_no_rounding_behind(baseline):
    settings = {"baseline": baseline()} if baseline else {}
    assert found([match("g", 0.1, "p", "q")] * 7, **settings) == [0.0] * 14


def test_the_gradient_is_unbiased(games):
    "The mean advantage of a move over all pairs of matches is what the move is worth, and not a half of it."
    moves = [(g, t) for g in games for t in g.turns if t.prompt == games[0].turns[0].prompt]
    worth = {m: mean(g.outcome[t.seat] for g, t in moves if t.answer == m) for m in "123"}

    def alone(g, t):
        return Transcript("pick", 0, g.players, turns=[t], outcome=g.outcome)

    rng, seen = random.Random(0), {m: [] for m in "123"}
    for _ in range(4000):
        pair = rng.sample(moves, 2)
        for (_, t), a in zip(pair, found([alone(*x) for x in pair])):
            seen[t.answer].append(a)
    for m in "123":
        assert mean(seen[m]) == pytest.approx(worth[m] - mean(g.outcome[t.seat] for g, t in moves), abs=0.04)


def test_surprise_is_paid():
    def game(answer, logprobs):
        return Transcript(
            "g", 0, ["a", "b"], turns=[Turn(0, "p", answer, answer, logprobs=logprobs)], outcome=[0.5, 0.5]
        )

    rows = advantages(Played([game("x", [-1.0, -2.0]), game("y", [-0.5])]), entropy=0.1)
    assert [r["advantage"] for r in rows] == pytest.approx([0.25, -0.25])  # each against the other
    assert [r["advantage"] for r in advantages(Played([game("x", [-1.0, -2.0]), game("y", [-0.5])]))] == [
        0,
        0,
    ]
    odd = game("z", [-9.0])
    odd.turns[0].legal = False  # nonsense is always a surprise, and lost: 0 less the other's 0.5
    assert advantages(Played([game("x", [-1.0, -2.0]), odd]), entropy=0.1)[1]["advantage"] == pytest.approx(
        -0.8
    )


def test_pairs_prefer_what_did_better_in_the_same_position(games):
    pairs, dropped = position_pairs(games, per_position=2, round=3)
    # two kinds, two seats
    assert (
        Counter((p["chosen"], p["rejected"]) for p in pairs) == {("3", "1"): 4, ("3", "2"): 4} and not dropped
    )
    assert all(
        p["margin"] > 0.1 and p["source"] == "game" and p["judge"] == "pick" and p["round"] == 3
        for p in pairs
    )
    assert all(p["probability"] == 0.5 + p["margin"] / 2 for p in pairs)
    widest, _ = position_pairs(games, per_position=1)
    assert {p["rejected"] for p in widest} == {"1"}


def test_too_few_games_make_no_pair_and_a_cut_answer_is_never_chosen():
    def game(answer, o, cut=False, ids=None):
        return Transcript(
            "g",
            0,
            ["a", "b"],
            turns=[Turn(0, "p", answer, answer, truncated=cut, token_ids=ids)],
            outcome=[o, 1 - o],
        )

    assert position_pairs(Played([game("x", 1.0), game("y", 0.0)])) == ([], Counter())
    pairs, _ = position_pairs(Played([game("x", 1.0, ids=[5]), game("y", 0.0, ids=[6])]), least=1)
    assert pairs[0]["chosen_ids"] == [5] and pairs[0]["rejected_ids"] == [6]
    assert position_pairs(Played([game("x", 1.0, cut=True), game("y", 0.0)]), least=1) == (
        [],
        Counter({"truncated": 1}),
    )
    assert position_pairs(Played([game("x", 1.0), game("y", 0.0, cut=True)]), least=1)[0][0][
        "rejected_truncated"
    ]


class Rude:
    "Says hello half of the time, and plays well once it was told off."

    name = "rude"

    def act(self, state, rng):
        return "hello" if rng.random() < 0.5 else max(state.legal, key=lambda m: (state.n - int(m)) % 4 == 0)


@pytest.mark.parametrize("illegal", ["lose", "retry", "random"])
def test_an_illegal_answer_is_never_preferred(illegal):
    played = play(Sticks(5, 7), [Rude(), RandomPlayer()], 60, seed=1, illegal=illegal)
    rows = advantages(played, "rude")
    rude = [r["advantage"] for r in rows if r["completion"] == "hello"]
    assert len(rude) > 20
    assert mean(rude) < 0 < mean(r["advantage"] for r in rows if r["completion"] != "hello")
    pairs, _ = position_pairs(played)
    assert pairs and "hello" not in {p["chosen"] for p in pairs}
    assert "hello" in {p["rejected"] for p in pairs}
