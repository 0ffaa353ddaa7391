"""The league: probabilities that never break, results counted once, snapshots that stay what they were, and a
run that goes on as if never stopped.
"""

import json
import math
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfplay_nb.core.players import Scripted
from selfplay_nb.methods.competitive import CompetitiveSelfPlay
from selfplay_nb.methods.league import DISTRIBUTIONS, ROLES, LeagueTraining, PolicySnapshot, near_skill, pfsp
from selfplay_nb.scoring.judge import RuleJudge
from selfplay_nb.scoring.reward import Guarded, as_reward, exact_number
from selfplay_nb.stats.rates import SPRT
from selfplay_nb.stats.ratings import bradley_terry

# the same examples every time
settings.register_profile("same", derandomize=True, deadline=None, max_examples=50, database=None)
settings.load_profile("same")
MOVES = ["rock", "paper", "scissors"]
rule = RuleJudge(lambda prompt, a, b: 0.5 if a == b else float((MOVES.index(a) - MOVES.index(b)) % 3 == 1))
larger = RuleJudge(lambda prompt, a, b: 0.5 + 0.5 * ((float(a) > float(b)) - (float(a) < float(b))))


def mover(move):
    return Scripted(lambda prompt, rng: move, move)


def strong(s):
    return Scripted(lambda prompt, rng: str(s - 400 / math.log(10) * math.log(-math.log(1 - rng.random()))))


def problems(n, tag=""):
    return [dict(prompt=f"{tag} {i}") for i in range(n)]


def league_of(names, **kwargs):
    league = LeagueTraining(**({"n_leagues": 50} | kwargs))
    for name in names:
        league.add(mover("rock"), name)
    return league


# distributions

shares = st.lists(st.integers(0, 1000).map(lambda n: n / 1000), min_size=1, max_size=12)
ratings = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12)


@given(shares, st.sampled_from(["hard", "even"]), st.floats(0, 50))
def test_pfsp_is_a_distribution_that_follows_its_weight(x, weighting, power):
    p = pfsp(x, weighting, power)
    assert len(p) == len(x) and (p >= 0).all() and p.sum() == pytest.approx(1, abs=1e-12)
    assert pfsp(x[::-1], weighting, power) == pytest.approx(p[::-1])
    order = np.argsort(x) if weighting == "hard" else np.argsort(np.abs(np.array(x) - 0.5))
    if not {0, 1} >= set(x):
        assert (np.diff(p[order]) <= 1e-12).all()  # the hardest, the most open, first
    if weighting == "even":
        assert pfsp([1 - v for v in x], "even") == pytest.approx(p, abs=1e-9)


@given(ratings, st.floats(-1e6, 1e6), st.floats(0, 200), st.floats(1, 500))
def test_near_skill_is_a_distribution_around_a_little_more(r, performance, lean, width):
    p = near_skill(r, performance, lean, width)
    assert (p >= 0).all() and p.sum() == pytest.approx(1, abs=1e-12)
    assert p[np.argmin(np.abs(np.array(r) - performance - lean))] == p.max()
    assert near_skill(np.array(r) + 1000, performance + 1000, lean, width) == pytest.approx(p, abs=1e-6)


def test_limits_of_the_distributions():
    even = np.full(4, 0.25)
    for weighting in "hard", "even":
        for x in 0.5, 0.0, 1.0:
            assert pfsp([x] * 4, weighting) == pytest.approx(even)
    assert near_skill([700.0] * 4, 1e5) == pytest.approx(even)
    assert pfsp([0, 1, 1, 1]) == pytest.approx([1, 0, 0, 0]) and pfsp([0.5, 1, 0], "even") == pytest.approx(
        [1, 0, 0]
    )
    assert pfsp([0.9, 0.5, 0.1], power=2) == pytest.approx(np.array([0.01, 0.25, 0.81]) / 1.07)
    better, worse, far = near_skill([1100, 900, 2000], 1000)
    assert better > 1.5 * worse and far < 1e-6


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: pfsp([0.5, math.nan]), "win rates"),
        (lambda: pfsp([1.1]), "win rates"),
        (lambda: pfsp([0.5], "soft"), "'soft'"),
        (lambda: near_skill([1000, math.inf], 0), "finite"),
        (lambda: near_skill([1000], math.nan), "finite"),
        (lambda: LeagueTraining(0), "n_leagues is 0"),
        (lambda: LeagueTraining(resident=0), "resident is 0"),
        (lambda: LeagueTraining(prior=0), "prior is 0"),
        (lambda: LeagueTraining(matchmaking={"main": {"nearest": 1}}), "nearest"),
        (lambda: LeagueTraining(matchmaking={"main": {"near": 0}}), "above 0"),
        (lambda: LeagueTraining(matchmaking={"main": {"near": -1, "hard": 2}}), "at least 0"),
        (lambda: LeagueTraining().compute_matchmaking_probs("strong"), "current_performance is 'strong'"),
        (lambda: LeagueTraining().compute_matchmaking_probs(math.nan), "nan"),
        (lambda: LeagueTraining().sample_opponent(1000, role="coach"), "'coach'"),
        (lambda: LeagueTraining().add(mover("rock"), "a b"), "'a b'"),
        (lambda: LeagueTraining().add(mover("rock"), "main"), "'main' was used"),
        (lambda: LeagueTraining().add(mover("rock"), role="fan"), "'fan'"),
        (lambda: LeagueTraining().add(None), "bare base"),
        (lambda: LeagueTraining().sample_opponent(1000).generate("a"), "nothing to play with"),
        (lambda: LeagueTraining()["nobody"], "no member 'nobody'"),
        (lambda: league_of(["a"]).play([("a", "b")], problems(1), rule), "no member 'b'"),
        (lambda: league_of(["a"]).play(None, [], rule), "no problems"),
        (
            lambda: league_of(["a"]).play(
                [("coach", "a")], problems(1), rule, guests={"coach": mover("rock")}
            ),
            r"guests \['coach'\]",
        ),
        (lambda: LeagueTraining().gate(None, problems(1), rule), "no members"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


# the method's own calls


def test_the_calls_of_the_method():
    league = LeagueTraining(n_leagues=5)
    probs = league.compute_matchmaking_probs(current_performance=0.6)
    assert probs == pytest.approx([0.2] * 5) and len(league.leagues) == 5
    assert isinstance(league.sample_opponent(current_performance=0.6), PolicySnapshot)
    league = LeagueTraining(n_leagues=5)
    for r in 700, 880, 1050, 1190, 1400:
        league.elo.ratings[league.add(mover("rock")).name] = r
    p = league.compute_matchmaking_probs(current_performance=1000)
    assert p.argmax() == 2 and p[3] > p[1] and p.sum() == pytest.approx(1)
    drawn = Counter(league.sample_opponent(1000).name for _ in range(4000))
    assert np.array([drawn[f"league_{i}"] / 4000 for i in range(5)]) == pytest.approx(p, abs=0.03)


@st.composite
def tables(draw):
    "Results of a league: any pair may never have met, be all won or all lost."
    k = draw(st.integers(1, 5))
    names = [f"p{i}" for i in range(k)]
    seats = st.sampled_from([*names, *ROLES])
    games = draw(
        st.lists(st.tuples(seats, seats, st.sampled_from([0.0, 0.0, 1.0, 1.0, 0.5, 0.3])), max_size=30)
    )
    return names, [dict(a=a, b=b, score=s) for a, b, s in games if a != b]


mixtures = st.dictionaries(st.sampled_from(list(DISTRIBUTIONS)), st.floats(0, 10), min_size=1).filter(
    lambda m: sum(m.values()) > 1e-6
)


@given(
    tables(),
    mixtures,
    st.sampled_from(list(ROLES)),
    st.one_of(st.none(), st.floats(-1e7, 1e7)),
    st.lists(st.sampled_from([*ROLES, "anchor"]), min_size=5, max_size=5),
)
def test_probabilities_never_break(table, mixture, role, performance, roles):
    names, rows = table
    league = LeagueTraining(50)
    for name, r in zip(names, roles):
        league.add(mover("rock"), name, r)
    league.record(rows)
    for m in (mixture, None):
        p = league.compute_matchmaking_probs(performance, role, m)
        assert len(p) == len(names) and (p >= 0).all() and p.sum() == pytest.approx(1, abs=1e-12)
        assert p[names.index(league.sample_opponent(performance, role, m).name)] > 0
    P = league.payoff()
    assert P + P.T == pytest.approx(np.ones_like(P)) and (P > 0).all() and (P < 1).all()
    for i, a in enumerate(names):  # the mean of a Beta(1, 1) that saw these games
        for j, b in enumerate(names):
            s = [r["score"] for r in rows if (r["a"], r["b"]) == (a, b)] + [
                1 - r["score"] for r in rows if (r["b"], r["a"]) == (a, b)
            ]
            assert P[i, j] == pytest.approx((sum(s) + 1) / (len(s) + 2))


@pytest.mark.parametrize("kind", ["near", "hard", "even", "uniform", "nash"])
def test_nobody_played(kind):
    assert league_of("abcd").compute_matchmaking_probs(mixture={kind: 1}) == pytest.approx(
        [0.25] * 4, abs=1e-6
    )


def test_one_dominant_member():
    league = league_of("abcd")
    league.record(
        [
            dict(a=x, b=y, score=1.0)
            for x, all_ in (("d", ["a", "b", "c", "main"]), ("main", "abc"))
            for y in all_
            for _ in range(100)
        ]
    )
    p = {kind: league.compute_matchmaking_probs(mixture={kind: 1}) for kind in DISTRIBUTIONS}
    assert (
        p["hard"][3] > 0.99
        and p["nash"] == pytest.approx([0, 0, 0, 1], abs=1e-6)
        and p["latest"].tolist() == [0, 0, 0, 1]
    )
    assert p["even"] == pytest.approx([0.25] * 4, abs=0.01)
    assert league.compute_matchmaking_probs(600, mixture={"near": 1})[3] < 0.1 and p["near"][3] < p["hard"][3]


def test_roles_play_whom_they_should():
    league = LeagueTraining(50, anchors={"fixed": mover("rock")})
    for i in range(3):
        league.add(mover("rock"), f"main_{i}", "main")
    for r in "main_exploiter", "league_exploiter":
        league.add(mover("rock"), f"old_{r}", r)
    names = [m.name for m in league.leagues]
    played = lambda role: {n for n, p in zip(names, league.compute_matchmaking_probs(role=role)) if p}
    assert played("main") == played("league_exploiter") == set(names)
    assert played("main_exploiter") == {"main_2"}  # not the exploiters, which joined later
    league.record(
        [dict(a="main_exploiter", b="main_2", score=0.0)] * 30
        + [dict(a="main_exploiter", b="main_0", score=s) for s in (0.0, 1.0) * 15]
    )
    p = dict(zip(names, league.compute_matchmaking_probs(role="main_exploiter")))
    assert (
        sum(p[f"main_{i}"] for i in range(3)) == pytest.approx(1)
        and p["main_0"] >= p["main_1"] > 5 * p["main_2"] > 0
    )


# results


def test_only_a_learners_last_games_count():
    league = league_of("ab", window=10)
    league.record([dict(a="main", b="a", score=0.0)] * 40 + [dict(a="a", b="main", score=0.0)] * 10)
    assert league.win_rates("main") == pytest.approx([11 / 12, 0.5]) and not league._score
    league.reset("main", "a")
    assert (
        league.win_rates("main") == pytest.approx([0.5, 0.5])
        and league.elo["main"] == league.elo["a"] != 1000
    )
    with pytest.raises(ValueError, match="no member 'c'"):
        league.reset("main", "c")
    league.reset("main")
    assert league.elo["main"] == 1000 and len(league.rows) == 50


def test_a_bad_game_leaves_no_trace(tmp_path):
    league = league_of("ab", folder=tmp_path)
    good = dict(a="a", b="b", score=1.0)
    for bad in (
        good | {"b": "a"},
        good | {"b": "z"},
        good | {"score": 1.1},
        dict(a="a", b="b"),
        good | {"score": math.nan},
    ):
        with pytest.raises(ValueError, match="game 1"):
            league.record([good, bad])
    assert (
        league.rows == []
        and len(league.ledger) == 0
        and league.payoff() == pytest.approx(np.full((2, 2), 0.5))
        and league.elo["a"] == 1000
    )


class Counting(Scripted):
    def generate(self, prompts, n_samples=1, **kwargs):
        self.calls = getattr(self, "calls", 0) + 1
        return super().generate(prompts, n_samples=n_samples, **kwargs)


def test_a_player_is_asked_once_and_answers_alike_in_any_company():
    def league():
        league = LeagueTraining()
        for n in "abc":
            league.add(Counting(lambda prompt, rng: str(rng.random())), n)
        return league

    whole, part = league(), league()
    rows = whole.play(None, problems(5), larger, n_samples=2)
    assert [whole[n].player.calls for n in "abc"] == [1, 1, 1] and len(rows) == 3 * 5 * 2
    for a, b, score in {(r["answer_a"], r["answer_b"], r["score"]) for r in rows}:
        assert score == float(float(a) > float(b))
    some = part.play([("b", "a")], problems(5)[2:], larger, n_samples=2)
    assert all(r in rows for r in some) and whole.play(None, problems(5), larger) == []
    assert len({r["answer_a"] for r in some}) == 6  # samples of a prompt differ
    rewarded = league().play(None, problems(5), as_reward(lambda p, r: float(r)), n_samples=2)
    assert rewarded == rows


def test_an_answer_that_was_cut_off_is_none():
    class Answers(list):
        seconds, n_tokens = 1.0, 1

    class Cut:
        def __init__(self, cut):
            self.cut = cut

        def sample(self, prompts, n_samples=1, **kwargs):
            return Answers(
                [[type("A", (), dict(text="4", truncated=self.cut))()] * n_samples for _ in prompts]
            )

    league = LeagueTraining()
    league.add(Cut(False), "done")
    league.add(Cut(True), "cut")
    assert [
        r["score"] for r in league.play([("done", "cut")], [dict(prompt="2 + 2 =", answer=4)], exact_number)
    ] == [1.0]


def test_the_order_is_found():
    truth = dict(zip("abcdef", [600, 800, 1000, 1200, 1400, 1600]))
    for seed in range(3):
        league = LeagueTraining(6)
        for n in random.Random(seed).sample(sorted(truth), 6):
            league.add(strong(truth[n]), n)
        league.play(None, problems(60, seed), larger, seed=seed)
        assert bradley_terry(league.games, resamples=1).players == list("fedcba")
        assert sorted(truth, key=lambda n: league.elo[n]) == list("abcdef")
        assert league.nash().weights[[m.name for m in league.members].index("f")] == pytest.approx(
            1, abs=1e-3
        )


def test_nash_holds_rock_paper_and_scissors_however_often_they_are_there():
    league = LeagueTraining(9)
    for m in ["rock"] * 4 + ["paper"] * 2 + ["scissors"]:
        league.add(mover(m))
    league.play(None, problems(100), rule)
    p = league.compute_matchmaking_probs(mixture={"nash": 1})
    assert [p[:4].sum(), p[4:6].sum(), p[6]] == pytest.approx([1 / 3] * 3, abs=0.01)


# joining and leaving


def test_who_leaves_is_no_anchor_and_nobody_whom_the_mixture_needs():
    league = LeagueTraining(4, anchors={"hopeless": Scripted(lambda prompt, rng: "lizard")})
    judge = RuleJudge(
        lambda p, a, b: (
            rule.rule(p, a, b) if a in MOVES and b in MOVES else 0.5 if a == b else float(a in MOVES)
        )
    )
    for m in "scissors", "paper", "rock":
        league.add(mover(m), m)
    league.add(Scripted(lambda prompt, rng: "spock"), "loser")
    league.play(None, problems(30), judge)
    league.add(mover("rock"), "new")
    assert [m.name for m in league.members] == ["hopeless", "scissors", "paper", "rock", "new"]
    for i in range(3):
        league.play(None, problems(30), judge)
        league.add(mover("rock"), f"newer_{i}")
    assert {"hopeless", "scissors", "paper"} <= {m.name for m in league.members} and len(league.members) == 5
    with pytest.raises(ValueError, match="'loser' was used before"):
        league.add(mover("rock"), "loser")
    assert set(league.games.players) == {m.name for m in league.members}


def test_a_snapshot_begins_with_its_learners_rating():
    league = league_of("a")
    league.record([dict(a="main", b="a", score=1.0)] * 10)
    assert league.elo["main"] > 1020 and league.elo[league.add(mover("rock")).name] == league.elo["main"]
    assert league.elo[league.add(mover("rock"), role="league_exploiter").name] == 1000


def test_the_gate_lets_the_better_in_and_time_the_rest():
    league = LeagueTraining()
    league.add(strong(1000), "first")
    assert (
        league.gate(strong(1000), problems(400, 'gate'), larger).verdict == "reject"
        and league.promote(strong(1000), problems(400, 'gate'), larger) is None
    )
    better = league.promote(strong(1300), problems(400, 'gate'), larger)
    assert better.name == "league_1" and league["league_1"].generate("x", seed=3) == strong(1300).generate(
        "x", seed=3
    )
    assert (
        league.gate(strong(1300), problems(400, 'gate'), larger).scores[:3]
        != league.gate(strong(1300), problems(400, "other"), larger).scores[:3]
    )
    # the gate's games are nobody's record
    assert len(league.games) == 0 and {r["a"] for r in league.rows} == {"main"}
    assert [
        league.promote(strong(1300), problems(400, 'gate'), larger, patience=2) is None for _ in range(4)
    ] == [True, True, False, True]
    undecided = league.gate(strong(1300), problems(2), larger, sprt=SPRT(0.5, 0.8), n_samples=3)
    assert undecided.verdict == "undecided" and undecided.n == 2


def test_a_step_deals_its_prompts_to_the_opponents():
    league = LeagueTraining(matchmaking={"main": {"uniform": 1}})
    for i in range(4):
        league.add(Counting(lambda prompt, rng, i=i: str(i)), f"p{i}")
    play = CompetitiveSelfPlay(
        Counting(lambda prompt, rng: prompt.split()[0]), None, as_reward(lambda p, r: float(r)), n_samples=2
    )
    prompts = [f"{i % 5}.5 {i}" for i in range(20)]
    prefs = league.train_step(play, prompts, seed=1, round=3, opponents=6)
    assert [r["prompt"] for r in league.rows] == prompts and {r["round"] for r in league.rows} == {3}
    for r, s, said in zip(league.rows, prefs.scores, prefs.answers):
        assert (
            s == [float(float(r["prompt"].split()[0]) > int(r["b"][1]))] * 4
            and r["score"] == s[0]
            and said == [r["prompt"].split()[0]] * 2
        )
    met = {r["prompt"]: r["b"] for r in league.rows}
    assert (
        prefs
        and all(p["opponent"] == met[p["prompt"]] for p in prefs)
        and {p["round"] for p in prefs} == {3}
        and play.policy.calls == 1
    )
    assert len({r["b"] for r in league.rows}) > 1 and all(
        m.player.calls == 1 for m in league.members if m.name in {r["b"] for r in league.rows}
    )
    assert prefs.win_rate.n == 80 and "20 prompts" in repr(prefs)


# on disk


def season(league, steps, crash=None):
    "A league's life; saved after each step, or left in the middle of the step `crash`."
    for t in steps:
        play = CompetitiveSelfPlay(strong(1000 + 20 * t), None, as_reward(lambda p, r: float(r)), n_samples=2)
        league.train_step(play, [f"{t} {i}" for i in range(8)], seed=t, round=t)
        if t % 3 == 2:
            league.add(strong(1000 + 20 * t), f"s{t}")
            league.play(None, problems(4, t), larger, seed=t)
        if t % 4 == 3:
            league.reset("league_exploiter")
            league.promote(strong(1000), problems(8, t), larger, role="league_exploiter", name=f"e{t}")
        if t == crash:
            return
        league.save()


@pytest.mark.parametrize("crash", [0, 2, 3, 7, 11])
def test_a_killed_league_goes_on_as_if_nothing_had_happened(tmp_path, crash):
    given = {"fixed": strong(1000)} | {f"s{t}": strong(1000 + 20 * t) for t in range(20)}

    def make(name):
        return LeagueTraining(
            3,
            folder=tmp_path / name,
            anchors=given if (tmp_path / name / "state.json").exists() else {"fixed": strong(1000)},
        )

    season(make("whole"), range(12))
    league = make("broken")
    season(league, range(crash + 1), crash)
    with open(league.ledger.path, "a") as f:
        f.write('{"a": "main", "b"')  # killed in the middle of a line
    season(make("broken"), range(crash, 12))
    for name in "state.json", "games.jsonl":
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()
    a, b = make("whole"), make("broken")
    assert [m.name for m in a.members] == [m.name for m in b.members]
    assert (a.payoff() == b.payoff()).all() and (a.win_rates("main") == b.win_rates("main")).all()
    assert [a.sample_opponent().name for _ in range(20)] == [b.sample_opponent().name for _ in range(20)]


def test_a_full_disk_leaves_the_old_league(tmp_path, monkeypatch):
    league = LeagueTraining(folder=tmp_path, anchors={"a": mover("rock"), "b": mover("paper")})
    league.record([dict(a="a", b="b", score=0.0)])
    league.save()
    before = (tmp_path / "state.json").read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    league.record([dict(a="a", b="b", score=1.0)])
    with monkeypatch.context() as m:
        m.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            league.save()
    assert (tmp_path / "state.json").read_bytes() == before
    assert len(LeagueTraining(folder=tmp_path, anchors={"a": mover("rock"), "b": mover("paper")}).rows) == 1


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no league"):
        LeagueTraining(folder=tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]


def test_what_cannot_go_on_is_told(tmp_path):
    LeagueTraining(folder=tmp_path, anchors={"a": mover("rock")}).save()
    with pytest.raises(ValueError, match=r"\['a'\].*give them again"):
        LeagueTraining(folder=tmp_path)
    with pytest.raises(ValueError, match="'window': 200"):
        LeagueTraining(folder=tmp_path, window=7, anchors={"a": mover("rock")})
    state = json.loads((tmp_path / "state.json").read_text())
    state["members"][0]["plays"] = "adapter"
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="expected a `base`"):
        LeagueTraining(folder=tmp_path)


def test_it_prints_itself():
    league = league_of(["a", "b"])
    league.play(None, problems(3), rule)
    assert (
        "2 of 50 places taken" in repr(league)
        and "3 games" in repr(league)
        and "<td>a</td>" in league._repr_html_()
    )
    table = league.matchmaking(1234)
    assert "main at 1234" in repr(table) and "0.500" in repr(table) and "<table>" in table._repr_html_()


def test_it_needs_no_torch():
    subprocess.run(
        [
            sys.executable,
            "-c",
            (
                "import sys, selfplay_nb.methods.league; sys.exit(bool({'torch', 'transformers', 'scipy'} &"
                " set(sys.modules)))"
            ),
        ],
        check=True,
    )


# adapters


@pytest.fixture
def noisy(tiny):
    "A student with weights of its own, and a way to move it."
    import torch

    from selfplay_nb.models.policy import Policy

    student, g = Policy(tiny, "student", r=2), torch.Generator().manual_seed(0)

    def move():
        student.load_state(
            {k: v + 0.3 * torch.randn(v.shape, generator=g) for k, v in student.state().items()}
        )

    return student, move


def ask(player):
    return player.generate(["a", "bc"], n_samples=4, max_new_tokens=6, seed=5)


def test_thirty_members_on_disk_with_four_in_memory(noisy, tmp_path):
    student, move = noisy
    league, said = LeagueTraining(30, student.base, tmp_path, resident=4), {}
    for _ in range(30):
        move()
        said[league.add(student).name] = ask(student)
    assert len({str(s) for s in said.values()}) > 24 and student.base.adapters == ["student"]
    rng = random.Random(0)
    for n in [*said, *rng.choices(list(said), k=15)]:
        assert ask(league[n]) == said[n] and len(student.base.adapters) <= 5 and league[n].where == "memory"
    # the one that was asked last stays
    for n in "league_1", "league_2", "league_3", "league_4", "league_1", "league_5":
        assert league[n].player
    assert [m.name for m in league.members if m.where == "memory"] == [
        "league_1",
        "league_3",
        "league_4",
        "league_5",
    ]
    league.play(
        [("league_7", f"league_{i}") for i in range(7)] + [("league_7", "base")],
        problems(3),
        larger_text,
        max_new_tokens=4,
    )
    assert len(student.base.adapters) <= 5 and len(league.games) == 24
    league.save()
    league.unload()
    assert student.base.adapters == ["student"]
    again = LeagueTraining(30, student.base, tmp_path)
    assert ask(again["league_9"]) == said["league_9"] and ask(again["base"]) == ask(
        LeagueTraining(base=student.base)["base"]
    )
    # nothing pickled
    assert not [
        f
        for f in tmp_path.rglob("*")
        if f.is_file() and f.suffix not in (".json", ".jsonl", ".safetensors", ".md")
    ]


larger_text = RuleJudge(lambda prompt, a, b: 0.5 + 0.5 * ((a > b) - (a < b)))


def test_who_left_is_gone_from_memory_and_disk(noisy, tmp_path):
    student, move = noisy
    league = LeagueTraining(2, student.base, tmp_path)
    for _ in range(2):
        move()
        assert league.add(student).player
    league.save()
    move()
    league.add(student)
    assert len(list((tmp_path / "members").iterdir())) == 3  # the saved state still names the one that left
    left = ({"league_0", "league_1"} - {m.name for m in league.members}).pop()
    assert not any(a.startswith(left) for a in student.base.adapters)
    league.save()
    assert sorted(f.name for f in (tmp_path / "members").iterdir()) == sorted(
        m.name for m in league.members if m.folder
    )


def test_leagues_on_one_base_do_not_mix(noisy, tmp_path):
    student, move = noisy
    leagues = [LeagueTraining(5, student.base, tmp_path / x) for x in "ab"]
    said = []
    for league in leagues:
        move()
        league.add(student)
        said.append(ask(student))
    for _ in range(2):
        assert [ask(league["league_0"]) for league in leagues] == said
    # begun anew in the same folder: what is resident there is of the earlier one
    again = LeagueTraining(5, student.base, tmp_path / "a")
    move()
    again.add(student)
    assert ask(again["league_0"]) == ask(student)
    from selfplay_nb.models.policy import Base

    other = LeagueTraining(base=Base(student.base.model, student.base.tokenizer))
    with pytest.raises(ValueError, match="not on this league's base"):
        other.add(student)


def test_eight_members_weigh_a_quarter_of_eight_copies(tiny):
    from selfplay_nb.models.policy import Policy

    student = Policy(tiny, "student", r=1)
    league = LeagueTraining(8, tiny, resident=8)
    for _ in range(8):
        league.add(student)
    student.delete()
    alone = tiny.model.get_memory_footprint()
    for m in league.members:
        assert m.player
    sizes = league.weight_bytes()
    base = sizes.pop("base")
    assert len(sizes) == 8 and all(v > 0 for v in sizes.values()) and base == alone
    assert base + sum(sizes.values()) == tiny.model.get_memory_footprint() <= 0.25 * 8 * base


def test_a_member_is_a_standard_adapter_folder(noisy, tmp_path):
    student, move = noisy
    move()
    league = LeagueTraining(2, student.base, tmp_path)
    league.add(student)
    assert {f.name for f in Path(league["league_0"].folder).iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_before_anybody_has_joined_the_places_are_the_same_ones():
    league = LeagueTraining(5)
    assert (
        league.sample_opponent(1000.0) in league.leagues
        and len(league.leagues) == 5
        and league.leagues[0] is league.leagues[0]
    )


def test_a_snapshots_answer_does_not_depend_on_the_batch(noisy, tmp_path):
    student, move = noisy
    move()
    league = LeagueTraining(3, student.base, tmp_path)
    member = league.add(student)
    assert (
        member.takes_seeds
        and not PolicySnapshot("x", player=type("Plain", (), {"generate": None})()).takes_seeds
    )
    prompts, seeds = ["a", "b", "a"], [3, 4, 5]
    whole = member.generate(prompts, max_new_tokens=6, seed=seeds)
    assert whole == [member.generate(p, max_new_tokens=6, seed=s) for p, s in zip(prompts, seeds)]


def test_games_that_nobody_could_judge_are_left_out(tmp_path):
    def some(prompts, completions, **columns):
        return [math.nan if p == "b" else float(len(c)) for p, c in zip(prompts, completions)]

    class Abstains:
        def compare(self, prompts, a, b, **columns):
            return [None if p == "b" else 1.0 for p in prompts]

    for k, judge in enumerate((Guarded(some), Abstains())):
        league = LeagueTraining(
            anchors={"x": Scripted(lambda p, rng: "xx", "x"), "y": Scripted(lambda p, rng: "y", "y")},
            folder=tmp_path / str(k),
        )
        rows = league.play([("x", "y")], [dict(prompt=p) for p in "abc"], judge)
        assert [(r["prompt"], r["score"]) for r in rows] == [("a", 1.0), ("c", 1.0)] and len(
            league.games
        ) == 2


def test_what_others_left_among_the_members_stays(noisy, tmp_path):
    student, move = noisy
    league = LeagueTraining(1, student.base, tmp_path)
    league.add(student)
    (tmp_path / "members" / ".DS_Store").write_text("x")
    (tmp_path / "members" / "mine").mkdir()
    league.add(student)
    league.save()
    assert {f.name for f in (tmp_path / "members").iterdir()} == {"league_1", ".DS_Store", "mine"}
