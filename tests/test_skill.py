"Skill levels: prompts, labels, rows, the trend test against enumeration, controls; guidance on a tiny model."

import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
from scipy.stats import binomtest, page_trend_test

from selfplay_nb.core.players import Answer, Scripted
from selfplay_nb.methods.skill import (
    SKILLS,
    AtLevel,
    Guided,
    SkillCheck,
    SkillConditioning,
    at_level,
    by_grade,
    by_quantile,
    by_rating,
    check_levels,
    shuffled,
    skill_rows,
    trend,
    without_level,
)
from selfplay_nb.models.policy import Policy
from selfplay_nb.scoring.reward import exact_number, near_number

CHAT = [
    dict(role="system", content="You add."),
    dict(role="user", content="1 + 1 ="),
    dict(role="assistant", content="2"),
    dict(role="user", content="3 + 4 ="),
]


# prompts


@pytest.mark.parametrize("prompt", ["3 + 4 =", CHAT, CHAT[:2], ""])
@pytest.mark.parametrize("level", SKILLS)
def test_levels_go_in_and_come_out(prompt, level):
    there = at_level(prompt, level)
    assert type(there) is type(prompt) and without_level(there) == prompt == without_level(prompt)
    with pytest.raises(ValueError, match="has a level already"):
        at_level(there, "<novice>")


def test_only_the_last_user_message_changes():
    before = [dict(m) for m in CHAT]
    there = at_level(CHAT, "<expert>")
    assert (
        there[:3] == CHAT[:3] and there[3] == dict(role="user", content="<expert>3 + 4 =") and before == CHAT
    )
    with pytest.raises(ValueError, match="no user message"):
        at_level(CHAT[:1], "<expert>")


def test_a_player_at_a_level_keeps_shapes_and_details():
    echo = Scripted(lambda p, r: p if isinstance(p, str) else p[-1]["content"], "echo")
    player = AtLevel(echo, "<expert>")
    assert (
        player.generate("a") == "<expert>a"
        and player.generate(CHAT) == "<expert>3 + 4 ="
        and player.name == "echo <expert>"
    )
    assert player.generate(["a", "b"], n_samples=2) == [["<expert>a"] * 2, ["<expert>b"] * 2]
    assert not hasattr(player, "sample")  # answers_of asks by this

    class Sampler:
        def sample(self, prompts, n_samples=1, **kwargs):
            return prompts, n_samples, kwargs

    assert AtLevel(Sampler(), "<novice>").sample(["a"], 3, seed=1) == (["<novice>a"], 3, dict(seed=1))


# labels


def test_quantiles_within_a_prompt():
    assert by_quantile([0.9, 0.1, 0.5]) == [2, 0, 1] and by_quantile([1, 2, 3, 4], 2) == [0, 0, 1, 1]
    assert by_quantile([0] * 7 + [1]) == [1] * 7 + [2]  # no novice among those that are all the same
    assert by_quantile([0, 0, 1, 1]) == [0, 0, 2, 2] and by_quantile([3, 3]) == [None, None]
    rng = random.Random(0)
    for _ in range(200):
        r = [rng.choice([0, 0.1, 0.5, rng.random()]) for _ in range(rng.randint(2, 12))]
        levels = by_quantile(r)
        if None in levels:
            continue
        assert set(levels) <= {0, 1, 2}
        assert all(
            (a < b) <= (x <= y) and (a != b or x == y) for a, x in zip(r, levels) for b, y in zip(r, levels)
        )


def test_grades_and_ratings():
    assert by_grade((0.2, 1.0))([0, 0.2, 0.99, 1.0, 1.4]) == [0, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="rising"):
        by_grade((1.0, 0.2))
    assert by_rating(dict(a=10, b=500, c=20, d=-3, e=100, f=90)) == dict(a=0, b=2, c=1, d=0, e=2, f=1)
    assert by_rating(dict(a=1, b=1, c=1)) == dict(a=0, b=0, c=0)
    with pytest.raises(ValueError, match="2 players for 3 levels"):
        by_rating(dict(a=1, b=2))


# rows


def test_rows_are_balanced_clean_and_counted():
    said = [
        [
            Answer("x"),
            Answer("x"),
            Answer("y"),
            Answer("z", truncated=True),
            Answer(" "),
            Answer("v"),
            Answer("w"),
        ],
        ["p", "q"],
    ]
    rows = skill_rows(["a", CHAT], said, [[0, 0, 1, 1, 2, 2, 0], [2, None]], round=4)
    assert (
        len(rows) == 3
        and {r["level"] for r in rows} == set(SKILLS)
        and all(r["round"] == 4 and r["source"] == "skill" for r in rows)
    )
    assert rows.dropped == {"twice": 1, "truncated": 1, "empty": 1, "of no level": 1, "to balance": 2}
    assert all(
        without_level(r["prompt"]) in ("a", CHAT)
        and r["prompt"] == at_level(without_level(r["prompt"]), r["level"])
        for r in rows
    )
    assert "1 <expert>" in repr(rows) and "1 twice" in repr(rows)
    assert rows == skill_rows(["a", CHAT], said, [[0, 0, 1, 1, 2, 2, 0], [2, None]], round=4)


@pytest.mark.parametrize(
    "args, says",
    [
        ((["a"], [["x"]], [[0]]), "a level has no answers.*<expert>.: 0"),
        ((["a"], [["x"]], [[0, 1]]), "a label for each"),
        ((["a", "b"], [["x"]], [[0]]), "2 prompts, 1 lists"),
        ((["<expert>a"], [["x"]], [[0]]), "has a level already"),
    ],
)
def test_bad_rows_are_named(args, says):
    with pytest.raises(ValueError, match=says):
        skill_rows(*args)


@pytest.mark.parametrize(
    "kwargs, says",
    [
        (dict(n_samples=0), "n_samples is 0"),
        (dict(levels=["<a>"]), "at least two"),
        (dict(levels=["<a>", "<a>"]), "different"),
    ],
)
def test_bad_settings_are_named(kwargs, says):
    with pytest.raises(ValueError, match=says):
        SkillConditioning(Scripted(lambda p, r: "1"), exact_number, **kwargs)


def test_shuffling_breaks_nothing_but_the_bond():
    prompts = [f"{i}" for i in range(60)]
    rows = skill_rows(prompts, [["bad", "fair", "good"]] * 60, [[0, 1, 2]] * 60)
    control = shuffled(rows, seed=3)
    plain = [(without_level(r["prompt"]), r["completion"]) for r in rows]
    assert plain == [(without_level(r["prompt"]), r["completion"]) for r in control]
    counts = Counter((r["level"], r["completion"]) for r in control)
    assert len(counts) == 9 and set(counts.values()) == {20}  # each new level has as many of each old one
    assert control == shuffled(rows, seed=3) != shuffled(rows, seed=4) and all(
        r["prompt"].startswith(r["level"]) for r in control
    )


# the trend test


def by_enumeration(x):
    "P(sum of rises >= the observed), over all orders of each row."
    k = x.shape[1]
    c = np.arange(k) - (k - 1) / 2
    sums = {0.0: 1.0}
    for row in x:
        new = {}
        orders = Counter(round(float(np.dot(order, c)), 9) for order in itertools.permutations(row))
        for (d, times), (s, p) in itertools.product(orders.items(), sums.items()):
            t = round(s + d, 9)
            new[t] = new.get(t, 0) + p * times / math.factorial(k)
        sums = new
    seen = round(float((x @ c).sum()), 9)
    return sum(p for s, p in sums.items() if s >= seen), sum(p for s, p in sums.items() if s <= seen)


@pytest.mark.parametrize("k, grid", [(2, 2), (3, 2), (3, 5), (4, 2)])
@pytest.mark.parametrize("seed", range(4))
def test_p_against_all_orders(k, grid, seed):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, grid, (24, k)) / (grid - 1)
    x = np.clip(x + (seed > 1) * np.linspace(-0.5, 0.5, k), 0, 1)
    t, (up, down) = trend(x), by_enumeration(x)
    assert t.p == pytest.approx(up, abs=0.012) and t.p_down == pytest.approx(down, abs=0.012)


def test_two_levels_are_mcnemars_and_ranks_are_pages():
    x = np.array([[0, 1]] * 19 + [[1, 0]] * 8 + [[1, 1]] * 30 + [[0, 0]] * 30)
    assert trend(x).p == pytest.approx(binomtest(19, 27, alternative="greater").pvalue, abs=0.005)
    ranks = np.argsort(np.random.default_rng(0).random((80, 4)) + [0, 0.1, 0.1, 0.2], axis=1).argsort(axis=1)
    page = page_trend_test(ranks + 1, ranked=True, method="asymptotic").pvalue
    assert trend(ranks / 3).p == pytest.approx(page, rel=0.1)


def test_agresti_and_mins_interval_for_matched_proportions():
    # n12 = 1, n21 = 7 of 30; half a count is added to each cell
    x = np.array([[0, 1]] * 7 + [[1, 0]] * 1 + [[1, 1]] * 5 + [[0, 0]] * 17)
    d, n = (7.5 - 1.5) / 32, 32
    half = 1.96 * math.sqrt((7.5 + 1.5) - (7.5 - 1.5) ** 2 / n) / n
    assert (trend(x).low, trend(x).high) == pytest.approx((d - half, d + half)) and trend(
        x
    ).rise == pytest.approx(6 / 30)


@pytest.mark.parametrize("k, n", [(3, 30), (3, 200), (2, 60)])
def test_false_alarms_and_coverage(k, n):
    rng = np.random.default_rng(k + n)
    chance = rng.beta(0.4, 0.4, (1500, n, 1))
    same = (rng.random((1500, n, k)) < chance).astype(float)
    assert 0.02 <= np.mean([trend(x).p < 0.05 for x in same]) <= 0.065
    tilted = np.clip(chance + np.linspace(-0.1, 0.1, k), 0, 1)
    true = (tilted[..., -1] - tilted[..., 0]).mean(1)
    found = [trend(x) for x in (rng.random(tilted.shape) < tilted).astype(float)]
    assert np.mean([t.low <= v <= t.high for t, v in zip(found, true)]) >= 0.93
    assert np.mean([t.p < 0.05 for t in found]) > 0.3


def test_nothing_at_all_is_no_trend():
    t = trend(np.zeros((50, 3)))
    assert t.p == t.p_down == 1 and t.low < 0 < t.high and t.rise == 0
    assert trend([[0, 0, 0], [1, 1, 1]]).p == 1


@pytest.mark.parametrize("bad", [[[0, 2]], [[0], [1]], [0, 1], [[0, math.nan]], np.zeros((0, 3))])
def test_bad_scores_are_refused(bad):
    with pytest.raises(ValueError, match="scores of shape"):
        trend(bad)


def check(columns):
    return SkillCheck(
        SKILLS, ["p"] * len(columns[0]), [[[float(v)] for v in row] for row in zip(*columns)], None
    )


def test_verdicts():
    lots, few = [1] * 60 + [0] * 40, [1] * 5 + [0] * 95
    assert check([few, [1] * 30 + [0] * 70, lots]).verdict == "ordered"
    assert check([few, few, lots]).verdict == "trend" and check([few, lots, lots]).verdict == "trend"
    assert check([few, [1] * 90 + [0] * 10, lots]).verdict == "uneven"
    assert (
        check([lots, [1] * 30 + [0] * 70, few]).verdict == "reversed"
        and check([few, few, few]).verdict == "no trend"
    )
    c = check([few, few, lots])
    assert (
        c.rates["<expert>"].value == 0.6 and c.rates["<novice>"].interval[1] < c.rates["<expert>"].interval[0]
    )
    assert "verdict" in repr(c) and "&lt;novice&gt;" in c._repr_html_()


# the whole mechanism, with a pupil that learns exactly what its rows say


class Pupil:
    def __init__(self, rows):
        self.off = {
            level: [
                int(r["completion"]) - eval(without_level(r["prompt"])) for r in rows if r["level"] == level
            ]
            for level in SKILLS
        }

    def generate(self, prompts, n_samples=1, seed=0, **kwargs):
        return Scripted(
            lambda p, r: str(eval(without_level(p)) + r.choice(self.off[p[: p.index(">") + 1]]))
        ).generate(prompts, n_samples, seed)


@pytest.mark.parametrize("seed", range(3))
def test_levels_are_learned_and_shuffled_ones_are_not(seed):
    adder = Scripted(lambda p, r: str(eval(p) + r.choice([0, 0, 1, 2, 3, 5, 8, 12])))
    sums = [f"{a} + {b}" for a in range(20, 60) for b in range(11, 21)]
    train = sums[::2]
    evaluation = [dict(prompt=s, answer=eval(s)) for s in sums[1::2]]
    rows = SkillConditioning(adder, near_number(20), n_samples=9).collect(
        train, seed=seed, answer=[eval(s) for s in train]
    )
    learned = check_levels(Pupil(rows), evaluation, near_number(20), seed=seed)
    assert learned.verdict == "ordered"
    assert learned.rates["<novice>"].interval[1] < learned.rates["<expert>"].interval[0]
    control = [
        check_levels(Pupil(shuffled(rows, s)), evaluation, near_number(20), seed=s).trend for s in range(8)
    ]
    assert sum(t.p < 0.05 for t in control) <= 2 and sum(t.p_down < 0.05 for t in control) <= 2


def test_an_exam_without_problems_or_with_another_scale_is_refused():
    player = Scripted(lambda p, r: "1")
    with pytest.raises(ValueError, match="no prompts"):
        check_levels(player, [], exact_number)

    def large(prompts, completions, **columns):
        return [2.0] * len(completions)

    with pytest.raises(ValueError, match="outside"):
        check_levels(player, [dict(prompt="a")], large)


# guidance, on a tiny random model


@pytest.fixture
def policy(tiny):
    import torch

    from selfplay_nb.models.policy import Policy

    policy = Policy(tiny, "student")
    g = torch.Generator().manual_seed(1)
    policy.load_state({k: v + 0.3 * torch.randn(v.shape, generator=g) for k, v in policy.state().items()})
    return policy


def test_guidance_at_the_ends_is_the_levels_themselves(policy):
    prompts = ["a", [dict(role="user", content="a much longer prompt")], "bb", "a"]
    args = dict(n_samples=3, max_new_tokens=7, seed=5)
    plain = AtLevel(policy, "<expert>").sample(prompts, **args)
    guided = Guided(policy, scale=1.0).sample(prompts, **args)
    assert guided.texts == plain.texts and [s.finish_reason for r in guided for s in r] == [
        s.finish_reason for r in plain for s in r
    ]
    assert np.allclose(
        [x for r in guided for s in r for x in s.logprobs],
        [x for r in plain for s in r for x in s.logprobs],
        atol=1e-3,
    )
    greedy = dict(max_new_tokens=7, temperature=0)
    for scale, level in (0.0, "<novice>"), (1.0, "<expert>"):
        assert Guided(policy, scale=scale).generate(prompts, **greedy) == AtLevel(policy, level).generate(
            prompts, **greedy
        )
    policy.base.max_batch_tokens = 200  # in small batches
    assert Guided(policy, scale=1.0).sample(prompts, **args).texts == plain.texts


def test_guidance_does_what_the_formula_says(policy):
    import torch

    high = policy.base.encode("<expert>q")
    low = policy.base.encode("<novice>q")
    with policy.base.running("student") as model:
        high, low = (model(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in (high, low))
    first = Guided(policy, scale=3.0).sample("q", n_samples=2000, max_new_tokens=1, seed=0)[0]
    probs = (low + 3 * (high - low)).softmax(-1)
    counts = torch.bincount(torch.tensor([s.token_ids[0] for s in first]), minlength=len(probs)) / 2000
    assert (counts - probs).abs().max() < 0.04
    assert first[0].logprobs[0] == pytest.approx(float(probs[first[0].token_ids[0]].log()), abs=1e-3)
    assert isinstance(Guided(policy).generate("q", max_new_tokens=2), str)
    with pytest.raises(ValueError, match="no logits"):
        Guided(Scripted(lambda p, r: "x"))
    with pytest.raises(ValueError, match="finite"):
        Guided(policy, scale=math.inf)


# seeds


def test_an_answer_at_a_level_does_not_depend_on_the_batch():
    guess = Scripted(lambda p, rng: f"{p} {rng.random()}", "guess")
    at = AtLevel(guess, "<expert>")
    assert at.takes_seeds and at.generate(["a", "b", "c"], seed=[5, 6, 7]) == [
        at.generate([p], seed=[s])[0] for p, s in zip("abc", (5, 6, 7))
    ]
    assert at.generate(["a", "a"], seed=[5, 6]) != at.generate(["a", "a"], seed=[5, 5])

    class Plain:
        def generate(self, prompts, n_samples=1, seed=0):
            return [f"{seed}" for _ in prompts]

    assert not AtLevel(Plain(), "<expert>").takes_seeds


def test_policies_at_a_level_take_seeds(tiny):
    policy = Policy(tiny, "student", seed=0)
    for player in AtLevel(policy, "<expert>"), Guided(policy, scale=1.5):
        together = player.generate(["a", "b", "a"], seed=[5, 6, 6], max_new_tokens=6)
        assert player.takes_seeds and together == [
            player.generate([p], seed=[s], max_new_tokens=6)[0] for p, s in zip("aba", (5, 6, 6))
        ]
    with pytest.raises(ValueError, match="2 seeds for 1 prompts"):
        Guided(policy).generate(["a"], seed=[1, 2])
