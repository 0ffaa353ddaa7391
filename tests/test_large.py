"""A league of 300 members and a ledger of 200,000 rows open, show and draw in about a second and in little
memory.
"""

import json
import random
import time
import tracemalloc

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")
from selfplay_nb.core.pairs import Ledger
from selfplay_nb.core.players import Scripted
from selfplay_nb.methods.league import LeagueTraining
from selfplay_nb.stats.ratings import MOST, Games, bradley_terry, cycles
from selfplay_nb.views.league_board import Board
from selfplay_nb.views.scoreboard import Scoreboard

MEMBERS, ROWS = 300, 200_000
# of the processor: half of it is for slow machines
SECONDS = 2.0
MEGABYTES = 300


def measured(call):
    "What a call gives; it may take no more of the processor's time and of memory than this."
    begun = time.process_time()
    result = call()
    seconds = time.process_time() - begun
    assert seconds < SECONDS, f"{seconds:.1f} s"
    return result


def memory(call):
    tracemalloc.start()
    try:
        call()
        peak = tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()
    assert peak < MEGABYTES, f"{peak:.0f} MB"


def results(names, games, seed=0):
    rng = random.Random(seed)
    strength = {n: rng.gauss(0, 150) for n in names}

    def score(a, b):
        return float(rng.random() < 1 / (1 + 10 ** ((strength[b] - strength[a]) / 400)))

    pairings = [rng.sample(names, 2) for _ in range(games)]
    return [dict(a=a, b=b, score=score(a, b), prompt=f"{i}") for i, (a, b) in enumerate(pairings)]


@pytest.fixture(scope="module")
def league(tmp_path_factory):
    players = {f"m{i}": Scripted(lambda p, rng: "1") for i in range(MEMBERS)}
    league = LeagueTraining(2, folder=tmp_path_factory.mktemp("league") / "league", anchors=players)
    league.record(results([*players], 20 * MEMBERS))
    league.save()
    return league


def test_a_large_league_is_shown(league):
    board = measured(lambda: Board(league))
    html, text = measured(board._repr_html_), measured(board.__repr__)
    assert (
        len(html) < 500_000
        and len(text) < 200_000
        and "300" in text
        and f"{MOST} with the most games" in html
    )
    figure = measured(board.plot)
    measured(lambda: figure.savefig("/dev/null", format="png", dpi=60))
    assert max(figure.get_size_inches()) < 20


def test_a_large_league_opens(league):
    again = measured(
        lambda: LeagueTraining(
            2, folder=league.folder, anchors={m.name: Scripted(lambda p, rng: "1") for m in league.members}
        )
    )
    assert (
        len(again.members) == MEMBERS
        and len(again.rows) == 20 * MEMBERS
        and again.elo.ratings == league.elo.ratings
    )
    measured(again.sample_opponent)


def test_a_large_scoreboard(league):
    board = measured(lambda: Scoreboard(league.games))
    assert len(measured(board._repr_html_)) < 500_000 and len(measured(board.__repr__)) < 200_000
    measured(board.plot)
    measured(board.ratings.plot)


def test_memory(league):
    games = league.games
    memory(lambda: bradley_terry(games))
    memory(lambda: cycles(games))
    memory(lambda: Board(league)._repr_html_())


def test_ratings_of_many_are_those_of_few_with_fewer_resamples():
    "Sixty players are the first for whom there are fewer: the ratings are the same, the intervals nearly."
    games = Games(results([f"m{i}" for i in range(60)], 1800))
    few, many = bradley_terry(games), bradley_terry(games, resamples=1000)
    assert (
        few.players == many.players
        and np.allclose(few.ratings, many.ratings, atol=1e-6)
        and len(few.samples) == 2_500_000 // 3600
    )
    width = lambda r: np.diff(r.intervals).mean()
    assert width(few) == pytest.approx(width(many), rel=0.05)


def test_intervals_of_a_large_league_hold():
    "The intervals of 300 ratings, from 40 resamples, contain the truth as often as they say."
    rng, covered = random.Random(1), []
    names = [f"m{i}" for i in range(MEMBERS)]
    strength = np.array([rng.gauss(0, 150) for _ in names])
    rows = []
    for i in range(20 * MEMBERS):
        a, b = rng.sample(range(MEMBERS), 2)
        rows.append(
            dict(
                a=names[a],
                b=names[b],
                score=float(rng.random() < 1 / (1 + 10 ** ((strength[b] - strength[a]) / 400))),
                prompt=f"{i}",
            )
        )
    fit = bradley_terry(Games(rows, players=names))
    truth = dict(zip(names, 1000 + strength - strength.mean()))
    covered = [low <= truth[p] <= high for p, (low, high) in zip(fit.players, fit.intervals)]
    assert 0.9 <= np.mean(covered) <= 0.99  # 95 %, with the errors of 300 and of 40


def test_of_many_the_strongest_cycle_between_those_who_played_most():
    names = [f"m{i}" for i in range(60)]
    rows = results(names, 600)
    for k in range(30):
        rows += [
            dict(a=a, b=b, score=1.0, prompt=f"c{k}")
            for a, b in (("m7", "m33"), ("m33", "m51"), ("m51", "m7"))
        ]
    found = cycles(Games(rows, players=names))
    assert found.flagged and set(found.cycle) == {"m7", "m33", "m51"}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("ledger") / "pairs.jsonl"
    row = '{"prompt": "%d + 5 =", "chosen": "%d", "rejected": "no", "source": "%s", "round": %d}\n'
    path.write_text(
        "".join(row % (i, i + 5, "competitive" if i % 4 else "refinement", i // 100) for i in range(ROWS))
    )
    return path


def test_a_large_ledger(path):
    ledger = measured(lambda: Ledger(path))
    begun = time.process_time()
    assert (
        len(ledger) == ROWS
        and repr(ledger) == "Ledger(pairs.jsonl: 200000 rows, {'refinement': 50000, 'competitive': 150000})"
    )
    ledger.append([dict(prompt="p", chosen="a", rejected="b", source="mine")])
    assert len(ledger) == ROWS + 1 and "'mine': 1" in repr(ledger)
    assert time.process_time() - begun < 0.2  # nothing is read again
    other = Ledger(path)
    other.append([dict(prompt="p", chosen="a", rejected="b", source="another's")])
    assert len(ledger) == ROWS + 2 == len(other) and "another's" in repr(ledger)
    ledger.rewind(path.stat().st_size - len(path.read_bytes().splitlines()[-1]) - 1)
    assert len(ledger) == ROWS + 1 == len(other) and "another's" not in repr(other)


def test_memory_of_a_ledger(path):
    small = path.with_name("small.jsonl")
    small.write_text("".join(path.open().readlines()[:20_000]))
    memory(lambda: Ledger(small))
    tracemalloc.start()
    repr(Ledger(small))
    assert tracemalloc.get_traced_memory()[1] < 20e6  # a block at a time, however many there are
    tracemalloc.stop()


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[1]",
        b"{}",
        b'{"prompt": "a"}',
        b'{"prompt": "\xff", "chosen": "", "rejected": ""}',
        b"",
        b'{"a": 1}, {"b": 2}',
    ],
)
def test_damage_in_a_block_is_named_by_its_line(path, tmp_path, line):
    lines = path.read_bytes().split(b"\n")[:5000]
    lines[4321] = line
    (tmp_path / "l.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(ValueError, match="line 4322 is damaged"):
        Ledger(tmp_path / "l.jsonl")


@pytest.mark.parametrize("content", ['{"my": "precious config"}', '{"volume": 11}', "[1, 2]", "{}"])
def test_json_of_somebody_else_is_never_cut_off(tmp_path, content):
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(ValueError, match="is whole and no|ends with"):
        Ledger(file).append([dict(prompt="p", chosen="a", rejected="b")])
    ledger = tmp_path / "pairs.jsonl"
    whole = json.dumps(dict(prompt="p", chosen="a", rejected="b")) + "\n"
    ledger.write_text(whole + content)
    with pytest.raises(ValueError):
        Ledger(ledger)
    assert file.read_text() == content and ledger.read_text() == whole + content
