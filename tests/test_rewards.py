"""What comes back from a reward, and what is done with it: numbers, gaps, other things, too late, or in
another form.
"""

import json
import math
import threading
import time
import warnings
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from selfplay_nb.core.players import Answer, Scripted
from selfplay_nb.methods.adversarial import AdversarialFilter, Screened
from selfplay_nb.methods.competitive import CompetitiveSelfPlay
from selfplay_nb.methods.constitutional import ConstitutionalReviser, ConstitutionalRewardWrapper
from selfplay_nb.methods.refinement import IterativeRefiner
from selfplay_nb.methods.skill import SkillConditioning, by_grade, by_quantile, check_levels
from selfplay_nb.scoring.judge import ModelJudge, Panel, RewardJudge, RuleJudge, as_labels
from selfplay_nb.scoring.reward import (
    Guarded,
    WeightedReward,
    as_reward,
    conversational,
    exact_number,
    finished,
    format_reward,
    is_judge,
    near_number,
    random_reward,
    rewards_of,
    rows_of,
    score,
    score_samples,
)

THREE = ["a", "bb", "cccc"]
NAN = math.nan


def returns(fn, name="odd"):
    def reward(prompts, completions, **columns):
        return fn(completions)

    reward.__name__ = name
    return reward


def same(a, b):
    return len(a) == len(b) and all(x == y or (x != x and y != y) for x, y in zip(a, b))


def chance(letters="12345"):
    return Scripted(lambda p, rng: rng.choice(letters), "chance")


# numbers, and what is none


@pytest.mark.parametrize(
    "fn",
    [
        lambda c: [len(x) for x in c],
        lambda c: tuple(float(len(x)) for x in c),
        lambda c: (len(x) for x in c),
        lambda c: np.array([len(x) for x in c]),
        lambda c: [np.float32(len(x)) for x in c],
        lambda c: [np.int64(len(x)) for x in c],
        lambda c: [np.array(len(x)) for x in c],
        lambda c: [Decimal(len(x)) for x in c],
        lambda c: [Fraction(len(x)) for x in c],
    ],
)
def test_whatever_is_a_number_is_taken_as_one(fn):
    for values in (
        rewards_of(returns(fn), ["?"] * 3, THREE),
        score(returns(fn), ["?"] * 3, THREE),
        Guarded(returns(fn))(["?"] * 3, THREE),
    ):
        assert values == [1.0, 2.0, 4.0] and {type(v) for v in values} == {float}
    assert rewards_of(returns(lambda c: [len(x) > 2 for x in c]), ["?"] * 3, THREE) == rewards_of(
        returns(lambda c: np.array([0, 0, 1], bool)), ["?"] * 3, THREE
    )


def test_tensors_are_numbers_too():
    torch = pytest.importorskip("torch")
    for fn in (
        lambda c: torch.tensor([1.0, 2.0, 4.0]),
        lambda c: [torch.tensor(float(len(x))) for x in c],
        lambda c: torch.tensor([1.0, 2.0, 4.0], requires_grad=True),
        lambda c: torch.tensor([1.0, 2.0, 4.0], dtype=torch.bfloat16),
    ):
        assert rewards_of(returns(fn), ["?"] * 3, THREE) == [1.0, 2.0, 4.0]
    for fn in lambda c: torch.tensor([[1.0], [2.0], [4.0]]), lambda c: torch.tensor(1.0):
        with pytest.raises(
            ValueError, match=r"reward 'odd' returned an array of shape .*expected a flat list of 3 numbers"
        ):
            rewards_of(returns(fn), ["?"] * 3, THREE)


BREAKS = {  # what is returned for three answers, and what is said about it
    "one scalar": (lambda c: 1.0, r"1\.0 \(float\)"),
    "none at all": (lambda c: None, r"None \(NoneType\)"),
    "a column": (lambda c: np.ones((3, 1)), r"shape \(3, 1\)"),
    "a row": (lambda c: np.ones((1, 3)), r"shape \(1, 3\)"),
    "an array of no dimension": (lambda c: np.array(1.0), r"shape \(\)"),
    "a word": (lambda c: "good", "'good'"),
    "a dict": (lambda c: {x: 1.0 for x in c}, "dict"),
    "a set": (lambda c: {1.0, 2.0, 3.0}, "set"),
    "an object": (lambda c: object(), "object"),
}
WRONG = {
    "words": (lambda c: ["good"] * 3, "'good' for completion 0"),
    "numbers in words": (lambda c: [1.0, "2", 3.0], "'2' for completion 1"),
    "complex": (lambda c: [1.0, 2.0, 1j], "1j for completion 2"),
    "lists": (lambda c: [[1.0]] * 3, r"\[1.0\] for completion 0"),
    "tuples": (lambda c: [(1.0, 2.0)] * 3, "completion 0"),
    "infinite": (lambda c: [1.0, math.inf, 2.0], "inf for completion 1"),
    "beyond a float": (lambda c: [1.0, 10**400, 2.0], "1000.* for completion 1"),
    "a signaling nan": (lambda c: [1, Decimal("sNaN"), 1], "sNaN.* for completion 1"),
}
LENGTH = {
    "too few": (lambda c: [1.0, 2.0], "returned 2 numbers for 3"),
    "too many": (lambda c: [1.0] * 4, "returned 4 numbers for 3"),
    "nothing": (lambda c: [], "returned 0 numbers for 3"),
}


@pytest.mark.parametrize(
    "fn, says", [*BREAKS.values(), *WRONG.values(), *LENGTH.values()], ids=[*BREAKS, *WRONG, *LENGTH]
)
def test_what_is_no_list_of_numbers_is_refused_by_name(fn, says):
    reward, answer = returns(fn), Scripted(lambda p, rng: "xyz", "says")
    told = rf"(?s)reward 'odd' returned.*{says}.*expected|reward 'odd' {says}.*expected"
    calls = [
        lambda: rewards_of(reward, ["?"] * 3, THREE),
        lambda: score(reward, ["?"] * 3, THREE),
        lambda: WeightedReward({"a": reward}, {"a": 1})(["?"] * 3, THREE),
        lambda: ConstitutionalRewardWrapper(reward).attribution(["?"] * 3, THREE),
        lambda: AdversarialFilter(answer, reward, n_samples=3).find_adversarial_examples(
            ["a"], progress=False
        ),
        lambda: IterativeRefiner(answer, reward=reward).refine_batch(["a", "b", "c"]),
        lambda: SkillConditioning(answer, reward, n_samples=3).collect(["a"]),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=told):
            call()


@pytest.mark.parametrize(
    "fn, says", [(fn, says) for what, (fn, says) in BREAKS.items() if what != "none at all"]
)
def test_a_guard_passes_on_what_no_answer_is_to_blame_for(fn, says):
    calls = []
    guarded = Guarded(returns(lambda c: calls.append(len(c)) or fn(c)))
    with pytest.raises(ValueError, match=rf"reward 'odd' returned.*{says}"):
        guarded(["?"] * 3, THREE)
    assert calls == [3]


@pytest.mark.parametrize("n", [4, 7, 16, 94, 256])
def test_one_number_for_a_whole_batch_is_found_out_at_once(n):
    calls = []

    def mean(prompts, completions, **columns):
        calls.append(len(completions))
        return [sum(map(len, completions)) / len(completions)]

    with pytest.raises(
        ValueError, match=f"reward 'mean' returned 1 numbers for {n} completions, and as many for each half"
    ):
        Guarded(mean)(["?"] * n, ["x"] * n)
    assert len(calls) == 3
    with pytest.raises(ValueError, match="'mean' returned 1 numbers"):
        score(mean, ["?"] * n, ["x"] * n)


@pytest.mark.parametrize(
    "lost", [{0}, {0, 1, 2, 3}, {4, 5, 6, 7}, set(range(1, 16)), {15}, set(range(0, 16, 2))]
)
def test_a_reward_that_leaves_answers_out_costs_only_these(lost):
    said = [str(i) for i in range(16)]
    guarded = Guarded(returns(lambda c: [float(x) for x in c if int(x) not in lost]))
    assert same(
        guarded(["?"] * 16, said), [NAN if i in lost else float(i) for i in range(16)]
    ) and guarded.failures == {"wrong length": len(lost)}


@pytest.mark.parametrize(
    "value", [10**400, -(10**400), math.inf, Decimal("sNaN"), Decimal("NaN"), "7", None, [1.0], 1j, object()]
)
def test_a_guard_counts_what_is_no_number(value):
    guarded = Guarded(returns(lambda c: [value if x == "bb" else 1.0 for x in c]))
    assert same(guarded(["?"] * 3, THREE), [1.0, NAN, 1.0]) and guarded.failures == {"no number": 1}


def test_what_a_reward_raises_is_passed_on_with_its_name():
    def picky(prompts, completions, **columns):
        return [c["role"] for c in completions]

    with pytest.raises(TypeError) as e:
        rewards_of(picky, ["?"], ["x"], answer=[1])
    assert any(
        "'picky'" in note and "answer" in note and "conversational" in note for note in e.value.__notes__
    )


# gaps


def gaps(prompts, completions, **columns):
    return [None if c == "3" else NAN if c == "4" else float(c) for c in completions]


@pytest.mark.parametrize(
    "reward",
    [
        gaps,
        Guarded(gaps),
        WeightedReward({"g": gaps}, {"g": 1.0}),
        WeightedReward({"g": Guarded(gaps), "f": finished}, {"g": 1.0, "f": 0.0}),
    ],
)
def test_an_answer_that_a_reward_abstains_from_is_left_out_and_counted(reward, tmp_path):
    prompts = [f"{i}?" for i in range(20)]
    prefs = CompetitiveSelfPlay(chance(), chance(), reward, n_samples=4).train_step(prompts)
    gone = sum(a in "34" for row in prefs.answers for a in row)
    assert prefs and gone and prefs.dropped["unjudged"] == 20 * 16 - prefs.win_rate.n > 4 * gone
    assert {p[k] for p in prefs for k in ("chosen", "rejected")} <= set("125") and math.isfinite(
        prefs.mean_reward
    )

    found = AdversarialFilter(
        chance(), reward, n_samples=6, right_from=5, ledger=tmp_path / "l.jsonl"
    ).find_adversarial_examples(prompts, early_stop=False, progress=False)
    again = AdversarialFilter(
        chance(), reward, n_samples=6, right_from=5, ledger=tmp_path / "l.jsonl"
    ).find_adversarial_examples(prompts, early_stop=False, progress=False)
    assert (
        found
        and repr(again) == repr(found)
        and found.unjudged == sum(a in "34" for s in found.screened for a in s.answers) > 0
    )
    assert all(
        math.isfinite(v)
        for e in found
        for v in (e["spread"], e["uncertainty"], e["margin"], e["best_reward"], e["probability"])
    )
    assert {e[k] for e in found for k in ("best", "worst")} <= set("125") and json.dumps(
        list(found), allow_nan=False
    )
    assert all(s.success.n == sum(a in "125" for a in s.answers) for s in found.screened)
    pairs, dropped = found.pairs(3)
    assert (
        pairs
        and {p[k] for p in pairs for k in ("chosen", "rejected")} <= set("125")
        and dropped["unjudged"] > 0
    )

    rows = SkillConditioning(chance(), reward, n_samples=6).collect(prompts)
    assert rows and {r["completion"] for r in rows} <= set("125") and rows.dropped["unjudged"] > 0
    traces = IterativeRefiner(chance(), reward=reward).refine_batch(prompts, 2)
    assert all((v.score is None) == (v.text in "34") for t in traces for v in t.versions)
    assert {r["completion"] for r in traces.sft_rows()[0]} <= set("125")
    assert traces.sft_rows(version=0)[1]["unjudged"] == sum(t.versions[0].text in "34" for t in traces)


def test_a_reward_that_abstains_from_everything():
    nothing, prompts = returns(lambda c: [None] * len(c)), ["a", "b"]
    with pytest.warns(UserWarning, match="no match was judged"):
        prefs = CompetitiveSelfPlay(chance(), chance(), nothing, n_samples=2).train_step(prompts)
    assert prefs == [] and prefs.win_rate.n == 0 and prefs.dropped == {"unjudged": 8}
    found = AdversarialFilter(chance(), nothing, n_samples=3).find_adversarial_examples(
        prompts, early_stop=False, progress=False
    )
    assert (
        found == []
        and found.unjudged == 6
        and all(r.successes == 0 for r in found.counts.values())
        and "6" in repr(found)
    )
    with pytest.raises(ValueError, match=r"(?s)no answers.*unjudged.*12"):
        SkillConditioning(chance(), nothing, n_samples=6).collect(prompts)


def test_judges_abstain():
    for reward in gaps, Guarded(gaps):
        v = RewardJudge(reward).compare(["?"] * 5, list("12345"), list("21121"))
        assert (
            same(v, [0.0, 1.0, NAN, NAN, 1.0])
            and v.wins.n == 3
            and v.abstained == 2
            and "2 without a verdict" in repr(v)
        )
        assert same(
            RewardJudge(reward, scale=1).compare(["?"] * 2, ["3", "1"], ["1", "1"]), [NAN, 0.5]
        ) and as_labels(v) == [0.0, 1.0, None, None, 1.0]
    unsure = RuleJudge(lambda p, a, b: None if "3" in a + b else a > b)
    assert same(unsure.compare(["?"] * 3, list("132"), list("211")), [0.0, NAN, 1.0])
    panel = Panel({"a": RewardJudge(gaps), "b": unsure, "c": RuleJudge(lambda p, a, b: 0.5)}).compare(
        ["?"] * 3, list("134"), list("221")
    )
    assert same(panel, [1 / 6, 0.5, 0.75]) and panel.agreements()["a", "b"].n == 1
    silent = Panel({"a": unsure, "b": unsure}).compare(["?"], ["3"], ["2"])
    assert same(silent, [NAN])
    checked = RewardJudge(returns(lambda c: [None] * len(c))).check(
        ["?"] * 3, ["5"] * 3, {"empty": lambda q, a: ""}
    )
    assert checked.beaten_by == ["empty"]  # nothing was shown
    for bad in "good", 1.5, -0.1, math.inf:
        with pytest.raises(ValueError, match="match 0: expected a probability"):
            RuleJudge(lambda p, a, b: bad).compare(["?"], ["1"], ["2"])
    games = CompetitiveSelfPlay(chance(), chance(), unsure, n_samples=4).train_step(["a", "b", "c"])
    assert (
        games
        and games.dropped["unjudged"]
        and {p[k] for p in games for k in ("chosen", "rejected")}.isdisjoint("3")
        and math.isfinite(games.mean_reward)
    )


@pytest.mark.parametrize(
    "rewards, levels",
    [
        ([1, NAN, 3], [0, None, 2]),
        ([NAN, NAN], [None, None]),
        ([1, NAN, 1], [None] * 3),
        ([None, 2, 1], [None, 2, 0]),
        ([5.0, NAN], [None] * 2),
    ],
)
def test_quantiles_leave_gaps_out(rewards, levels):
    assert by_quantile(rewards, 3) == levels
    assert by_grade((0.5,))(rewards) == [None if r is None or r != r else 1 for r in rewards]


def test_an_examiner_that_abstains():
    problems = [dict(prompt=f"{i}?") for i in range(30)]
    check = check_levels(chance("15"), problems, returns(lambda c: [None if x == "5" else 1.0 for x in c]))
    assert check.unjudged == sum(a == ["5"] for row in check.answers for a in row) > 0 and all(
        r.value == 1 for r in check.rates.values()
    )
    assert check.trend.n == sum(
        row == [["1"]] * 3 for row in check.answers
    ) > 0 and f"{check.unjudged}" in repr(check)


@pytest.mark.parametrize("k, n", [(1, 2), (3, 10), (5, 10), (10, 10), (1, 3)])
def test_uncertainty_is_right_in_the_mean(k, n):
    "Over all answers a prompt of chance p may get, the estimate of 4p(1-p) is 4p(1-p)."
    assert Screened(
        {"prompt": "?"}, ["x"] * n, [1.0] * k + [0.0] * (n - k), [False] * n
    ).uncertainty == pytest.approx(4 * k * (n - k) / (n * (n - 1)))
    p = k / (n + 1)
    mean = sum(
        math.comb(n, j)
        * p**j
        * (1 - p) ** (n - j)
        * Screened({"prompt": "?"}, ["x"] * n, [1.0] * j + [0.0] * (n - j), [False] * n).uncertainty
        for j in range(n + 1)
    )
    assert mean == pytest.approx(4 * p * (1 - p))


# a reward, or a judge?


class Both:
    "Scores by length, and would compare the other way round."

    __name__ = "both"

    def __init__(self):
        self.scored = self.compared = 0

    def __call__(self, prompts, completions, **columns):
        self.scored += len(completions)
        return [float(len(c)) for c in completions]

    def compare(self, prompts, a, b, **columns):
        self.compared += len(a)
        return [float(len(x) < len(y)) for x, y in zip(a, b)]


def test_what_is_both_is_told_which_it_is_meant_to_be():
    words = Scripted(lambda p, rng: "x" * rng.randint(1, 9), "words")
    both = Both()
    as_a_reward = CompetitiveSelfPlay(words, words, both, n_samples=4).train_step(["a", "b"])
    assert (
        (both.scored, both.compared) == (16, 0)
        and all(len(p["chosen"]) > len(p["rejected"]) for p in as_a_reward)
        and as_a_reward[0]["margin"] > 1
    )
    both = Both()
    guarded = Guarded(both)
    assert (
        CompetitiveSelfPlay(words, words, guarded, n_samples=4).train_step(["a", "b"]) == as_a_reward
        and not hasattr(guarded, "compare")
        and not is_judge(guarded)
    )
    judge = Both()
    judge.judges = True
    games = CompetitiveSelfPlay(words, words, judge, n_samples=4).train_step(["a", "b"])
    assert (judge.scored, judge.compared) == (0, 32) and all(
        len(p["chosen"]) < len(p["rejected"]) for p in games
    )
    assert (
        is_judge(Guarded(judge))
        and CompetitiveSelfPlay(words, words, Guarded(judge), n_samples=4).train_step(["a", "b"]) == games
    )
    for make in (
        lambda: IterativeRefiner(words, reward=judge),
        lambda: AdversarialFilter(words, judge),
        lambda: SkillConditioning(words, judge),
        lambda: as_reward(judge),
        lambda: RewardJudge(judge),
        lambda: IterativeRefiner(words, reward=RuleJudge(lambda p, a, b: 1.0)),
    ):
        with pytest.raises(ValueError, match="judge.*expected a reward"):
            make()


def test_the_constitution_is_a_reward_until_it_is_told_to_judge():
    answer = Scripted(
        lambda p, rng: rng.choice(
            ["Perhaps a year.", "A year, certainly.", "It depends, because some learn faster.", "No."]
        ),
        "answers",
    )
    wrapper = ConstitutionalRewardWrapper()
    prefs = CompetitiveSelfPlay(answer, answer, wrapper, n_samples=4).train_step(["How long?"])
    assert (
        prefs
        and any(0 < p["margin"] < 1 and p["margin"] != 1.0 for p in prefs)
        and sum(len(prefs.answers[0]) for _ in wrapper.history) == 8
    )
    judged = CompetitiveSelfPlay(answer, answer, RewardJudge(wrapper), n_samples=4).train_step(["How long?"])
    assert {p["margin"] for p in judged} == {1.0} and is_judge(RewardJudge(wrapper)) and not is_judge(wrapper)


@pytest.mark.parametrize(
    "fn, lifted",
    [
        (lambda p, r: 1.0, True),
        (lambda prompt, response, weight=2: 1.0, True),
        (lambda prompts, completions, **columns: [1.0] * len(completions), False),
        (lambda p, r, **more: 1.0, True),
        (lambda completions, **kwargs: [1.0] * len(completions), False),
        (lambda **kwargs: [1.0] * len(kwargs["completions"]), False),
    ],
)
def test_either_form_of_a_reward_is_taken_everywhere(fn, lifted):
    assert (as_reward(fn) is not fn) == lifted and score(as_reward(fn), ["?"] * 2, ["x", "y"]) == [1.0, 1.0]
    words = chance()
    with warnings.catch_warnings(action="ignore"):
        CompetitiveSelfPlay(words, words, fn, n_samples=2).train_step(["a"])
    assert AdversarialFilter(words, fn, n_samples=2).find_adversarial_examples(["a"], progress=False) == []
    assert IterativeRefiner(words, reward=fn).refine_batch(["a"], 1)[0].versions[
        0
    ].score == 1.0 and RewardJudge(fn).compare(["?"], ["x"], ["y"]) == [0.5]
    assert ConstitutionalRewardWrapper(fn).attribution(["?"], ["x"]).base == [1.0] and Guarded(fn)(
        ["?"], ["x"]
    ) == [1.0]


@pytest.mark.parametrize("bad", [None, 3, "reward", ["a"]])
def test_what_cannot_be_called_is_refused_before_anything_is_asked(bad):
    for make in (
        lambda: CompetitiveSelfPlay(chance(), chance(), bad),
        lambda: AdversarialFilter(chance(), bad),
        lambda: SkillConditioning(chance(), bad),
        lambda: RewardJudge(bad),
    ):
        with pytest.raises(ValueError, match="cannot be called: expected reward"):
            make()


# TRL's conversational form


def chat(text):
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    "reward, columns",
    [
        (exact_number, dict(answer=[12, 3])),
        (near_number(9), dict(answer=[12, 3])),
        (finished, dict(truncated=[False, True])),
        (format_reward(r"\d+"), {}),
        (random_reward(3), {}),
        (as_reward(lambda p, r: len(r)), {}),
        (WeightedReward({"f": finished, "e": exact_number}, {"f": 1, "e": 2}), dict(answer=[12, 3])),
        (Guarded(exact_number), dict(answer=[12, 3])),
        (ConstitutionalRewardWrapper(), {}),
        (conversational(lambda prompts, completions, **c: [len(x[0]["content"]) for x in completions]), {}),
    ],
)
def test_a_completion_as_messages_is_worth_what_its_text_is(reward, columns):
    prompts = [[{"role": "user", "content": "?"}]] * 2
    assert rewards_of(reward, prompts, ["12", "4 apples"], **columns) == rewards_of(
        reward, prompts, [chat("12"), chat("4 apples")], **columns
    )


def test_rewards_written_for_messages():
    seen = []

    def trl(prompts, completions, **columns):
        seen.append((prompts, completions))
        return [len(c[0]["content"]) for c in completions]

    reward = conversational(trl)
    said = [[Answer("four")], [Answer(chat("two!!"))]]
    assert score_samples(reward, ["text", chat("x")], said) == [[4.0], [5.0]] and reward.__name__ == "trl"
    assert seen[0] == ([[{"role": "user", "content": "text"}], chat("x")], [chat("four"), chat("two!!")])


# columns and prompts

ODD = dict(
    round=[1, 2],
    seed=[5, 6],
    progress=["x", "y"],
    role=["a", "b"],
    reward=[1, 2],
    policy=[1, 2],
    n_samples=[3, 4],
    name=["p", "q"],
)


@pytest.mark.parametrize("column", ODD)
def test_columns_of_a_data_set_have_any_name_in_rows(column):
    seen = []

    def reward(prompts, completions, **columns):
        seen.append(columns[column])
        return [float(c) for c in completions]

    rows = [{"prompt": p, column: v} for p, v in zip("ab", ODD[column])]
    with warnings.catch_warnings(action="ignore"):
        CompetitiveSelfPlay(chance(), chance(), reward, n_samples=2).train_step(rows, seed=3, round=1)
    AdversarialFilter(chance(), reward, n_samples=2).find_adversarial_examples(rows, progress=False)
    IterativeRefiner(chance(), reward=reward).refine_batch(rows, 1, seed=2)
    list(IterativeRefiner(chance(), reward=reward).refine(rows[0], 1))
    SkillConditioning(chance(), reward, n_samples=9).collect(rows)
    check_levels(chance("01"), rows, reward)
    assert len(seen) > 5 and all(set(s) <= set(ODD[column]) for s in seen)


@pytest.mark.parametrize("column", ["prompts", "completions", "truncated", "self"])
def test_names_that_rewards_are_called_with_are_refused_in_a_sentence(column):
    asked, answer = [], Scripted(lambda p, rng: asked.append(p) or "1", "counts")
    rows = [{"prompt": "a", column: 1}, {"prompt": "b", column: 2}]
    reward = returns(lambda c: [1.0] * len(c))
    for call in (
        lambda: CompetitiveSelfPlay(answer, answer, reward).train_step(rows),
        lambda: IterativeRefiner(answer, reward=reward).refine_batch(rows),
        lambda: SkillConditioning(answer, reward).collect(rows),
        lambda: AdversarialFilter(answer, reward).find_adversarial_examples(rows, progress=False),
        lambda: check_levels(answer, rows, reward),
        lambda: score_samples(reward, ["a"], [[Answer("1")]], **{column: [1]}),
        lambda: IterativeRefiner(answer, reward=reward).refine(rows[0]),
    ):
        with pytest.raises(ValueError, match=f"column is named '{column}'.*another name"):
            call()
    assert not asked


def test_columns_that_a_judge_is_called_with():
    with pytest.raises(ValueError, match="column is named 'a'"):
        CompetitiveSelfPlay(chance(), chance(), RuleJudge(lambda p, a, b: 1.0)).train_step(
            [{"prompt": "1 + 2", "a": 1}]
        )


@pytest.mark.parametrize(
    "settings, says",
    [
        (dict(seed=[1, 2]), r"seed is \[1, 2\].*give rows"),
        (dict(round=[1, 2]), r"round is \[1, 2\].*give rows"),
        (dict(answer="ab"), "column 'answer' is 'ab'"),
        (dict(answer=[1]), "column 'answer' has 1 values for 2"),
        (dict(answer=3), "column 'answer' is 3"),
    ],
)
def test_columns_given_beside_the_prompts(settings, says):
    for call in (
        CompetitiveSelfPlay(chance(), chance(), finished).train_step,
        SkillConditioning(chance(), finished).collect,
        IterativeRefiner(chance()).refine_batch,
    ):
        if "round" in settings and call.__name__ == "refine_batch":
            continue
        with pytest.raises(ValueError, match=says):
            call(["a", "b"], **settings)


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "  \n",
        [{"role": "user", "content": ""}],
        [{"role": "system", "content": " "}, {"role": "user", "content": None}],
    ],
)
def test_an_empty_prompt_is_refused_before_anything_is_asked(prompt):
    asked, answer = [], Scripted(lambda p, rng: asked.append(p) or "1", "counts")
    refiner = IterativeRefiner(answer)
    calls = [
        lambda: refiner.refine(prompt),
        lambda: refiner.refine_batch(["a", prompt]),
        lambda: refiner.begin(prompt),
        lambda: CompetitiveSelfPlay(answer, answer, finished).train_step(["a", prompt]),
        lambda: SkillConditioning(answer, finished).collect([prompt]),
        lambda: AdversarialFilter(answer, finished).find_adversarial_examples(["a", prompt], progress=False),
        lambda: ConstitutionalReviser(answer).revise(prompt),
        lambda: check_levels(answer, [{"prompt": prompt}], finished),
        lambda: rows_of([{"prompt": prompt}], {}),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="is empty|empty prompt|has the content None"):
            call()
    assert not asked


# too late


def test_what_has_a_time_limit_cannot_touch_the_model(tiny):
    from selfplay_nb.models.policy import Policy

    policy = Policy(tiny, "judge", seed=0)

    def asks(prompts, completions, **columns):
        return policy.logprobs(prompts, completions).tolist()

    def samples(prompts, completions, **columns):
        return [len(t) for t in policy.generate(prompts, max_new_tokens=8)]

    for reward in asks, samples, ModelJudge(policy, "", "{rubric}{prompt}{a}{b}"):  # its context is small
        guarded = Guarded(reward, timeout=60)
        with pytest.raises(RuntimeError, match=r"time limit.*judge_timeout=0"):
            guarded.compare(["?"], ["a"], ["b"]) if is_judge(reward) else guarded(["?"] * 4, ["a"] * 4)
    assert all(map(math.isfinite, Guarded(asks)(["?"], ["a"])))


def test_what_was_given_up_on_finds_the_model_closed(tiny):
    from selfplay_nb.models.policy import Policy

    policy, told, go = Policy(tiny, "student", seed=0), [], threading.Event()

    def late(prompts, completions, **columns):
        go.wait(20)
        try:
            policy.generate(prompts, max_new_tokens=2)
        except RuntimeError as e:
            told.append(str(e))
        return [1.0] * len(completions)

    guarded = Guarded(late, timeout=0.05, patience=1)
    assert same(guarded(["?"], ["a"]), [NAN]) and guarded.failures == {"TimeoutError": 1}
    go.set()
    for _ in range(200):
        if told:
            break
        time.sleep(0.02)
    assert "time limit" in told[0]


# advice


def advice(play, prompts=("a", "b", "c"), **columns):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        play.train_step(list(prompts), **columns)
    return [str(w.message) for w in caught]


class Cut(Scripted):
    "Says it all, but is cut off."

    def sample(self, prompts, n_samples=1, **kwargs):
        rows = [[Answer(f"{k} is cut off", True) for k in range(n_samples)] for p in prompts]

        class Rows(list):
            seconds, n_tokens = 1.0, 1

        return Rows(rows)


def test_what_teaches_nothing_says_what_to_change():
    constant = returns(lambda c: [1.0] * len(c))
    length = as_reward(lambda p, r: float(r[0]))
    [said] = advice(CompetitiveSelfPlay(chance(), chance(), constant, n_samples=3))
    assert "the same for all answers" in said
    [said] = advice(CompetitiveSelfPlay(chance("1"), chance("1"), length, n_samples=3))
    assert "raise temperature" in said
    [said] = advice(
        CompetitiveSelfPlay(Cut(None, "cut"), Cut(None, "cut"), length, n_samples=3, max_new_tokens=7)
    )
    assert "raise max_new_tokens (now 7)" in said
    [said] = advice(
        CompetitiveSelfPlay(
            Scripted(lambda p, rng: ""),
            Scripted(lambda p, rng: "x"),
            as_reward(lambda p, r: float(not r)),
            n_samples=2,
        )
    )
    assert "no match made a pair" in said
    assert advice(CompetitiveSelfPlay(chance(), chance(), length, n_samples=3)) == []


def test_the_advice_is_given_once_and_not_in_every_round():
    constant = returns(lambda c: [float("x" in x) for x in c])

    def rounds(n):
        for k in range(n):
            CompetitiveSelfPlay(chance(), chance(), constant, n_samples=2).train_step(
                [f"{k} {i}" for i in range(2 + k)], seed=k, round=k
            )

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        rounds(5)
    assert len(caught) == 1
