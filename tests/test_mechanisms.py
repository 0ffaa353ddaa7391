"Rewards, pairs, rates, tasks and matches: no model needed."

import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest

from selfplay_nb.core.pairs import Ledger, validate_pairs
from selfplay_nb.methods.competitive import CompetitiveSelfPlay
from selfplay_nb.scoring.reward import (
    WeightedReward,
    as_reward,
    exact_number,
    finished,
    format_reward,
    last_number,
    near_number,
    random_reward,
    score,
)
from selfplay_nb.stats.rates import Rate, wilson, win_rate
from selfplay_nb.tasks.task import LEVELS, ArithmeticTask

PAIR = dict(prompt="2 + 2 =", chosen="4", rejected="5", margin=1.0)


# rewards


@pytest.mark.parametrize(
    "text, number",
    [
        ("122", 122),
        ("59 + 63 = 122.", 122),
        ("1,234", 1234),
        ("-3.5!", -3.5),
        ("none", None),
        ("", None),
        ("59-63", 63),
        ("(12)", 12),
        ("3 = -4", -4),
    ],
)
def test_last_number(text, number):
    found = last_number(text)
    assert (None if found is None else float(found)) == number


def test_verifiers_read_conversations_and_cut_off_answers():
    message = [{"role": "assistant", "content": "It is 122"}]
    assert exact_number(
        None, [message, "122", "122"], answer=[122, 122, 121], truncated=[False, True, False]
    ) == [1, 0, 0]
    assert near_number(10)(None, ["120", "x", "500"], answer=[122] * 3) == [0.8, 0, 0]
    assert finished(None, ["a", "a", " "], truncated=[False, True, False]) == [1, 0, 0]
    assert format_reward(r"\d+")(None, ["12", "12a", message]) == [1, 0, 0]


def test_weighted_reward_keeps_its_parts():
    r = WeightedReward(dict(a=as_reward(lambda p, c: 1), b=as_reward(lambda p, c: len(c))), dict(a=2, b=0.5))
    assert r(["p"], ["four"]) == [4] and r.parts(["p"], ["four"]) == dict(a=[1], b=[4])
    with pytest.raises(ValueError, match="same names"):
        WeightedReward(dict(a=finished), dict(b=1))


def test_what_a_trainer_hands_on_beside_the_columns_does_not_count_as_one():
    # GRPOTrainer's
    handed = dict(
        trainer_state=object(), log_extra=lambda *_: None, log_metric=lambda *_: None, environments=None
    )
    r = WeightedReward(dict(right=exact_number), dict(right=2))
    assert r(["a", "b"], ["3", "4"], answer=[3, 3], **handed) == [2, 0]
    with pytest.raises(ValueError, match="column 'answer' has 1 values for 2"):
        r(["a", "b"], ["3", "4"], answer=[3], **handed)


@pytest.mark.parametrize(
    "values, says",
    [
        ([1.0], "returned 1 numbers for 2"),
        ([1.0, math.nan], "nan for completion 1"),
        ([None, 1.0], "None for completion 0"),
        ([math.inf, 1.0], "inf for completion 0"),
    ],
)
def test_a_reward_that_misbehaves_is_named(values, says):
    def moody(prompts, completions, **columns):
        return values

    with pytest.raises(ValueError, match=f"'moody'.*{says}"):
        score(moody, ["a", "b"], ["x", "y"])


def test_the_coin_knows_nothing_and_is_repeatable():
    prompts, answers = [str(i) for i in range(4000)], ["x"] * 4000
    values = random_reward(1)(prompts, answers)
    assert values == random_reward(1)(prompts, answers) != random_reward(2)(prompts, answers)
    assert abs(np.mean(values) - 0.5) < 0.02 and 0 <= min(values) and max(values) < 1


# pairs


def test_every_fault_is_dropped_and_counted():
    bad = [
        PAIR | {"chosen": ""},
        PAIR | {"rejected": " \n"},
        PAIR | {"rejected": "4 "},
        PAIR | {"margin": math.nan},
        PAIR | {"margin": math.inf},
        PAIR | {"chosen_truncated": True},
        PAIR | {"rejected": "5" * 50},
    ]
    good, dropped = validate_pairs([PAIR, *bad], lambda p, c: len(c), 20)
    assert good == [PAIR] and dropped == {
        "empty": 2,
        "identical": 1,
        "non-finite": 2,
        "truncated": 1,
        "over-long": 1,
    }
    with pytest.raises(ValueError, match="pair 0 lacks .'rejected'."):
        validate_pairs([dict(prompt="a", chosen="b")])


def test_ledger_survives_a_torn_line_at_every_byte(tmp_path):
    ledger = Ledger(tmp_path / "a.jsonl")
    ledger.append([PAIR, PAIR | {"chosen": "vier – 四\u2028\u0085\n"}])
    whole = ledger.path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(len(whole)):
        (tmp_path / "b.jsonl").write_bytes(whole[:cut])
        # without its end, a whole line is a row
        assert len(Ledger(tmp_path / "b.jsonl")) == (cut >= first - 1) + (cut == len(whole) - 1)
        assert (tmp_path / "b.jsonl").read_bytes() == whole[:cut]
        Ledger(tmp_path / "b.jsonl").append([PAIR])
        assert Ledger(tmp_path / "b.jsonl").rows() == ledger.rows()[
            : (cut >= first - 1) + (cut == len(whole) - 1)
        ] + [PAIR]


def test_ledger_refuses_damage_elsewhere_and_rewinds(tmp_path):
    ledger = Ledger(tmp_path / "a.jsonl")
    ledger.append([PAIR])
    position = ledger.position
    ledger.append([PAIR] * 3)
    with pytest.raises(ValueError, match="JSON"):
        ledger.append([PAIR, PAIR | {"margin": math.nan}])
    assert len(ledger) == 4
    ledger.rewind(position)
    assert len(ledger) == 1
    with pytest.raises(ValueError, match="outside"):
        ledger.rewind(10**9)
    ledger.path.write_text(json.dumps({"prompt": 1}) + "\n" + json.dumps(PAIR) + "\n")
    with pytest.raises(ValueError, match="line 1 is damaged"):
        Ledger(ledger.path)


@pytest.mark.parametrize(
    "content", ["my notes, no end of line", json.dumps(PAIR) + "\nmy notes", "a\nb", "{}\n{", "[1]\n{"]
)
def test_a_file_of_something_else_is_left_as_it_is(tmp_path, content):
    file = tmp_path / "notes.txt"
    file.write_text(content)
    with pytest.raises(ValueError, match="notes.txt"):
        Ledger(file)
    assert file.read_text() == content


def test_a_full_disk_leaves_no_half_of_it(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path / "a.jsonl")
    ledger.append([PAIR])

    def full(fd):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            ledger.append([PAIR] * 2)
    assert len(Ledger(ledger.path)) == 1
    ledger.append([PAIR])
    assert len(Ledger(ledger.path)) == 2


# rates


def test_wilson_against_known_values():
    # Newcombe (1998), Statistics in Medicine 17, method 3
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20)[0] == 0 and wilson(20, 20)[1] == 1
    with pytest.raises(ValueError, match="21 successes out of 20"):
        wilson(21, 20)


def test_win_rate_interval_counts_prompts_not_games():
    one_game = win_rate([[1.0]] * 20 + [[0.0]] * 12)
    eight_equal_games = win_rate([[1.0] * 8] * 20 + [[0.0] * 8] * 12)
    assert eight_equal_games.value == one_game.value == 20 / 32
    assert eight_equal_games.interval == pytest.approx(one_game.interval, abs=0.01)
    assert win_rate([[1.0] * 64] * 32).interval == wilson(32, 32) and win_rate([[1.0] * 64]).interval[0] < 0.3
    assert win_rate([[0.5] * 4] * 3).value == 0.5 and win_rate([]).interval == (0, 1)
    assert repr(Rate(1, 2)).startswith("50.0 % [")


# tasks


@pytest.mark.parametrize("level", LEVELS)
def test_splits_are_disjoint_seeded_and_right(level):
    task = ArithmeticTask(level)
    n = 8 if level == 1 else 100
    train, evaluation = task.problems("train", n, 1), task.problems("held-out", n)

    def keys(ps):
        return {tuple(sorted(p["prompt"][-1]["content"].split()[0:3:2])) for p in ps}

    assert len(keys(train)) == len(keys(evaluation)) == n and not keys(train) & keys(evaluation)
    assert train == task.problems("train", n, 1) and (n < 50 or train != task.problems("train", n, 2))
    for p in train:
        assert eval(p["prompt"][-1]["content"].rstrip("=")) == p["answer"]


@pytest.mark.parametrize("level", LEVELS)
def test_solved_examples_are_shown_and_never_asked(level):
    task, bare = ArithmeticTask(level), ArithmeticTask(level, shots=0)
    asked = [
        p for seed in range(30) for split in ("train", "held-out") for p in task.problems(split, 6, seed)
    ]
    system, *shown, question = asked[0]["prompt"]
    assert [m["role"] for m in shown] == ["user", "assistant"] * 2
    for q, a in zip(shown[::2], shown[1::2]):
        assert eval(q["content"].rstrip("=")) == int(a["content"])
    numbers = lambda text: sorted(text.split()[0:3:2])
    assert not {tuple(numbers(q["content"])) for q in shown[::2]} & {
        tuple(numbers(p["prompt"][-1]["content"])) for p in asked
    }
    assert len(bare.problems("train", 1)[0]["prompt"]) == 2
    with pytest.raises(ValueError, match="shots is 3"):
        ArithmeticTask(level, shots=3)


def test_task_errors():
    with pytest.raises(ValueError, match="level 9"):
        ArithmeticTask(9)
    with pytest.raises(ValueError, match="fewer than 500 different held-out"):
        ArithmeticTask(1).problems("held-out", 500)
    with pytest.raises(ValueError, match="'train' or 'held-out'"):
        ArithmeticTask().problems("test", 5)
    with pytest.raises(ValueError, match="n is 0"):
        ArithmeticTask().problems("train", 0)


# matches


class Scripted:
    def __init__(self, answers):
        self.answers = answers

    def generate(self, prompts, n_samples=1, **kwargs):
        rows = [[self.answers[k % len(self.answers)] for k in range(n_samples)] for _ in prompts]
        return rows if n_samples > 1 else [r[0] for r in rows]


def test_a_win_of_either_side_makes_a_pair_and_ties_are_counted():
    play = CompetitiveSelfPlay(
        Scripted(["4", "5"]), Scripted(["5", "4"]), exact_number, n_samples=2, pairs_per_prompt=9
    )
    prefs = play.train_step(["2 + 2 ="] * 3, answer=[4] * 3)
    assert (prefs.wins, prefs.draws, prefs.losses) == (3, 6, 3) and prefs.win_rate.value == 0.5
    assert all(
        (p["chosen"], p["rejected"], p["margin"], p["opponent"], p["judge"])
        == ("4", "5", 1.0, "Scripted", "exact_number")
        for p in prefs
    )
    assert len(prefs) == 3 and {p["winner"] for p in prefs} <= {"policy", "opponent"}
    assert "3 won, 6 drawn, 3 lost" in repr(prefs)
    one = CompetitiveSelfPlay(Scripted(["5"]), Scripted(["4"]), exact_number, n_samples=1).train_step(
        ["2 + 2 ="], answer=[4]
    )
    assert one[0]["winner"] == "opponent" and one.win_rate.value == 0


def test_pairs_per_prompt_and_dropped():
    small = as_reward(lambda p, r: len(r) and 10 - int(r))
    prefs = CompetitiveSelfPlay(
        Scripted(["4", "3", "", "9"]), Scripted(["7", "8"]), small, n_samples=4, pairs_per_prompt=2
    ).train_step(["x"])
    assert (
        len(prefs) == 2
        and len({p["rejected"] for p in prefs}) == 2
        and prefs[0]["margin"] >= prefs[1]["margin"]
    )
    assert prefs.dropped["empty"] == 4


def test_cut_off_answers_are_never_chosen():
    class Answers(list):
        seconds, n_tokens = 1.0, 1

        @property
        def texts(self):
            return [[x.text for x in row] for row in self]

    class Cut(Scripted):
        def sample(self, prompts, n_samples=1, **kwargs):
            return Answers(
                [[SimpleNamespace(text=t, truncated=True) for t in self.answers[:n_samples]] for _ in prompts]
            )

    play = CompetitiveSelfPlay(
        Cut(["4"]), Scripted(["5"]), as_reward(lambda p, r: float(r == "4")), n_samples=1
    )
    prefs = play.train_step(["2 + 2 ="])
    assert list(prefs) == [] and prefs.dropped == {"truncated": 1} and prefs.wins == 1
    play = CompetitiveSelfPlay(
        Cut(["5"]), Scripted(["4"]), as_reward(lambda p, r: float(r == "4")), n_samples=1
    )
    assert [p["rejected_truncated"] for p in play.train_step(["2 + 2 ="])] == [True]


def test_the_same_seed_selects_the_same_pairs():
    rng = random.Random(0)
    answers = [str(rng.randint(0, 9)) for _ in range(16)]
    play = CompetitiveSelfPlay(Scripted(answers[:8]), Scripted(answers[8:]), exact_number, n_samples=8)

    def step(seed):
        return list(play.train_step(["p"] * 9, seed=seed, answer=[4] * 9))

    assert step(3) == step(3)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: CompetitiveSelfPlay(None, None, None, n_samples=0), "n_samples is 0"),
        (
            lambda: CompetitiveSelfPlay(Scripted("4"), Scripted("5"), exact_number).train_step([]),
            "no prompts",
        ),
        (
            lambda: CompetitiveSelfPlay(Scripted("4"), Scripted("5"), exact_number).train_step(
                ["p"], answer=[4, 5]
            ),
            "column 'answer'",
        ),
    ],
)
def test_bad_input_is_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_a_policy_that_answers_in_another_shape_is_named():
    class Short(Scripted):
        def generate(self, prompts, n_samples=1, **kwargs):
            return [["4"] for _ in prompts]

    with pytest.raises(
        ValueError,
        match="the player .Short. gave .1, 1. answers: expected a list of 2 texts for each of 2 prompts",
    ):
        CompetitiveSelfPlay(Short("4"), Scripted("5"), exact_number, n_samples=2).train_step(
            ["p", "q"], answer=[4, 4]
        )
