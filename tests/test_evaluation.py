"""Evaluations and matches: any player, cut-off answers alike in both, rates only of what is right or wrong,
bad values before anything is asked.
"""

import math

import pytest
from scipy import stats

from selfplay_nb.core.players import Answer, Scripted
from selfplay_nb.scoring.evaluation import Evaluation, compare, evaluate, transcripts_html, versus
from selfplay_nb.scoring.judge import RewardJudge, RuleJudge
from selfplay_nb.scoring.reward import Guarded, as_reward, exact_number

PROBLEMS = [dict(prompt=f"{i} + 1 =", answer=i + 1) for i in range(8)]


class Sampler:
    "As a `Policy`: records with what was cut off."

    def __init__(self, answers, name="sampler"):
        self.answers, self.name, self.asked = answers, name, 0

    class Rows(list):
        seconds, n_tokens = 0.0, 0

    def sample(self, prompts, n_samples=1, **kw):
        self.asked += 1
        return self.Rows([[Answer(text, cut)] * n_samples for text, cut in self.answers])


class Texts:
    name = "texts"

    def __init__(self, says):
        self.says, self.asked = says, 0

    def generate(self, prompts, n_samples=1, **kw):
        self.asked += 1
        return [self.says if n_samples == 1 else [self.says] * n_samples for _ in prompts]


right = Scripted(lambda prompt, rng: str(int(prompt.split()[0]) + 1), "right")
length = as_reward(lambda p, c: len(c))


@pytest.mark.parametrize(
    "player, value",
    [(right, 1), (Texts("3"), 1 / 8), (Sampler([(str(i + 1), i > 3) for i in range(8)]), 0.5)],
)
def test_any_player_can_be_examined(player, value):
    evaluation = evaluate(player, PROBLEMS, exact_number)
    assert evaluation.accuracy.value == value and evaluation.accuracy.n == 8 and "right" in repr(evaluation)


def test_a_cut_off_answer_is_wrong_in_an_exam_and_loses_in_a_match():
    answers = [("2 or so", False), ("2 or", True)] * 4
    careless = as_reward(lambda p, c: float("2" in c))  # does not look at what was cut off
    evaluation = evaluate(Sampler(answers), PROBLEMS, careless)
    assert [r["right"] for r in evaluation.rows] == [1, 0] * 4 and evaluation.accuracy.value == 0.5
    whole, cut, asked = Texts("2"), Sampler(answers), []

    def judge(prompt, a, b):
        asked.append(prompt)
        return 0.5

    for judged in RuleJudge(judge), careless, RewardJudge(careless):
        assert (
            versus(cut, whole, PROBLEMS, judged).scores == [[0.5], [0]] * 4
            and versus(whole, cut, PROBLEMS, judged).scores == [[0.5], [1]] * 4
        )
        assert versus(cut, cut, PROBLEMS, judged, n_samples=2).scores == [[0.5, 0.5]] * 8
    # where a cut-off answer decides, nobody is asked
    assert asked and not set(asked) & {p["prompt"] for p in PROBLEMS[1::2]}
    row = versus(cut, whole, PROBLEMS, careless).rows[1]
    assert row["truncated_a"] and "truncated_b" not in row and row["answer_a"] == "2 or"
    every = Sampler([("2", True)] * 8)
    assert (
        versus(every, whole, PROBLEMS, RuleJudge(judge)).win_rate.value == 0
        and evaluate(every, PROBLEMS, careless).accuracy.value == 0
    )


def test_a_negative_reward_of_a_cut_off_answer_stays():
    assert evaluate(Sampler([("x", True)] * 8), PROBLEMS, as_reward(lambda p, c: -3.0)).mean[0] == -3


def test_a_rate_is_of_right_and_wrong_and_a_mean_is_a_mean():
    plain = evaluate(Texts("3"), PROBLEMS, exact_number)
    shares = Evaluation(
        [r | dict(right=v) for r, v in zip(plain.rows, [0.5, 0.25, 1.0, 0.0, 0.5, 0.75, 0.5, 0.5])]
    )
    assert shares.accuracy.value == 0.5 and "of full marks" in repr(shares) and "right" not in repr(shares)
    low, high = shares.accuracy.interval
    assert 0 <= low < 0.5 < high <= 1
    far = evaluate(Scripted(lambda prompt, rng: "x" * (int(prompt[0]) + 15), "long"), PROBLEMS, length)
    assert far.mean == pytest.approx(
        (18.5, *stats.t.interval(0.95, 7, 18.5, stats.sem([15 + i for i in range(8)])))
    )
    assert "%" not in repr(far) and "mean 18.50" in repr(far) and "n=8" in repr(far)
    with pytest.raises(ValueError, match="gave 15: an accuracy needs 1 .right., 0 .wrong. or a share"):
        _ = far.accuracy
    below = evaluate(Texts("x"), PROBLEMS, as_reward(lambda p, c: -0.1))
    assert "mean -0.10" in repr(below)
    with pytest.raises(ValueError, match="gave -0.1"):
        _ = below.accuracy
    one = Evaluation(far.rows[:1])
    assert one.mean == (15, -math.inf, math.inf)


def test_shares_are_shown_as_they_are():
    evaluation = Evaluation(
        [dict(prompt="a", answer="x", right=v, truncated=False) for v in (1.0, 0.0, 0.25)]
        + [dict(prompt="a", answer="<b>", right=0.0, truncated=True)]
    )
    assert [line[:4].strip().split(" ")[0] for line in evaluation.show().split("\n")] == [
        "+",
        "-",
        "0.25",
        "-",
    ]
    html = transcripts_html(evaluation, evaluation)
    assert (
        all(html.count(f"<td>{word}</td>") == 2 for word in ("right", "wrong", "0.25", "cut off"))
        and "&lt;b&gt;" in html
    )
    assert repr(
        compare(evaluation, Evaluation([r | dict(right=r["right"] + 0.5) for r in evaluation.rows]))
    ).startswith("4 gained, 0 lost of 4")


def test_a_judge_is_no_verifier_and_says_so():
    player = Texts("3")
    for judge in RewardJudge(exact_number), RuleJudge(lambda p, a, b: 1):
        with pytest.raises(ValueError, match="a judge, which compares two answers"):
            evaluate(player, PROBLEMS, judge)
    for verifier in None, "exact", 3:
        with pytest.raises(ValueError, match="no reward: expected verifier"):
            evaluate(player, PROBLEMS, verifier)
    with pytest.raises(ValueError, match="judge is None: expected one with compare"):
        versus(player, player, PROBLEMS, None)
    assert player.asked == 0
    # a reward compares by itself
    assert versus(right, player, PROBLEMS, exact_number).win_rate.value == pytest.approx((7 + 0.5) / 8)


@pytest.mark.parametrize(
    "problems, says",
    [
        ([], "no problems"),
        ("problems.jsonl", "no problems"),
        (None, "no problems"),
        ({"prompt": ["a"]}, "no problems"),
        (["a"], "problem 0 is 'a'"),
        ([{"question": "a"}], "problem 0"),
        ([dict(prompt="a", answer=1), dict(prompt="b")], "problem 1 has the columns"),
        ([dict(prompt="a", truncated=1)], "column 'truncated'"),
        ([dict(prompt="a", prompts=1)], "column 'prompts'"),
        ([dict(prompt="a", completions=1)], "column 'completions'"),
        ([dict(prompt="a", self=1)], "column 'self'"),
    ],
)
def test_bad_problems_are_named_before_anybody_is_asked(problems, says):
    player = Texts("3")
    with pytest.raises(ValueError, match=says):
        evaluate(player, problems, exact_number)
    with pytest.raises(ValueError, match=says):
        versus(player, player, problems, RuleJudge(lambda p, a, b: 1))
    assert player.asked == 0


def test_bad_players_answers_and_columns_are_named_before_anybody_is_asked():
    player = Texts("3")
    for nobody in None, "gpt", 3, Texts:
        with pytest.raises(ValueError, match=r"cannot answer: expected a player|is the class"):
            evaluate(nobody, PROBLEMS, exact_number)
        with pytest.raises(ValueError, match=r"cannot answer: expected a player|is the class"):
            versus(player, nobody, PROBLEMS, exact_number)
    wrong = [*PROBLEMS, dict(prompt="?", answer=None)]
    for verifier in exact_number, Guarded(exact_number):
        with pytest.raises(ValueError, match="row 8 is None"):
            evaluate(player, wrong, verifier)
    with pytest.raises(ValueError, match="row 8 is None"):
        versus(player, player, wrong, exact_number)
    for n in 0, -1, 1.5, None:
        with pytest.raises(ValueError, match="n_samples is"):
            versus(player, player, PROBLEMS, exact_number, n_samples=n)
    assert player.asked == 0


def test_a_judge_that_abstains_is_counted():
    class Shy:
        name = "shy"

        def compare(self, prompts, a, b, **columns):
            return [None if i == 0 else math.nan if i == 1 else 1.0 for i in range(len(prompts))]

    match = versus(right, Texts("3"), PROBLEMS, Shy())
    assert (
        match.unjudged == 2
        and match.win_rate.n == 6
        and match.paired.n == 6
        and "2 games not judged" in repr(match)
    )


def test_columns_of_a_judge_are_taken_only_in_a_match():
    rows = [p | dict(a=1, b=2) for p in PROBLEMS]
    assert evaluate(right, rows, exact_number).accuracy.value == 1
    with pytest.raises(ValueError, match="column 'a'"):
        versus(right, right, rows, exact_number)
