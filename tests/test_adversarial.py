"The adversarial filter: planted difficulties, a killed run, pairs, curriculum, proposer. No model needed."

import itertools
import json
import random
from types import SimpleNamespace

import pytest
from scipy.stats import beta

from selfplay_nb.core.players import Scripted
from selfplay_nb.methods.adversarial import (
    KINDS,
    AdversarialFilter,
    Curriculum,
    ProposerReward,
    Screened,
    class_probabilities,
    informative,
)
from selfplay_nb.scoring.reward import as_reward, exact_number, random_reward

CORRECT = as_reward(lambda prompt, answer: float(answer == "yes"))


def plant(seed, n=240):
    "Prompts with known chances, and a player who has them."
    rng, chance, kind = random.Random(seed), {}, {}
    for i in range(n):
        kind[f"{i}?"] = k = rng.choice(["easy", "hard", "mixed"])
        chance[f"{i}?"] = rng.uniform(*dict(easy=(0.96, 1), hard=(0, 0.04), mixed=(0.3, 0.7))[k])
    return kind, Scripted(lambda p, r: "yes" if r.random() < chance[p] else "no", "planted")


class Counting:
    "A player that counts what it is asked, and may break down."

    name = "planted"

    def __init__(self, player, breaks_after=10**9):
        self.player, self.left, self.batches = player, breaks_after, []

    def generate(self, prompts, **kwargs):
        if len(self.batches) == self.left:
            raise ConnectionError("gone")
        self.batches.append(list(prompts))
        return self.player.generate(prompts, **kwargs)


def screened(rewards, answers=None, truncated=None):
    n = len(rewards)
    return Screened(
        {"prompt": "p"}, answers or [f"a{i}" for i in range(n)], rewards, truncated or [False] * n
    )


@pytest.mark.parametrize("n, edge", [(1, 0.2), (10, 0.2), (10, 0.1), (400, 0.05), (3000, 0.3)])
def test_class_probabilities_are_those_of_a_beta_distribution(n, edge):
    for k in {0, 1, n // 3, n - 1, n}:
        p = beta(k + 1, n - k + 1)
        expected = p.cdf(edge), p.cdf(1 - edge) - p.cdf(edge), p.sf(1 - edge)
        assert list(class_probabilities(k, n, edge).values()) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("args", [(11, 10), (-1, 10), (1, 10, 0.0), (1, 10, 0.5)])
def test_impossible_counts_and_boundaries_are_refused(args):
    with pytest.raises(ValueError, match="expected 0 <= k <= n"):
        class_probabilities(*args)


def test_the_planted_are_found():
    tp = fp = fn = 0
    for seed in range(8):
        kind, player = plant(seed)
        for s in AdversarialFilter(player, CORRECT, seed=seed).screen(list(kind)):
            said, true = s.kind == "uncertain", kind[s.prompt] == "mixed"
            tp = tp + (said and true)
            fp = fp + (said and not true)
            fn = fn + (true and not said)
            if s.kind != "uncertain" and not true:
                assert s.kind == dict(easy="always right", hard="always fails")[kind[s.prompt]]
    assert tp / (tp + fp) >= 0.9 and tp / (tp + fn) >= 0.9


def test_probabilities_mean_what_they_say():
    """Of prompts whose chances are drawn evenly, those called a class with probability q belong to it about
    that often.
    """
    rng = random.Random(0)
    chance = {f"{i}": rng.random() for i in range(3000)}
    player = Scripted(lambda p, r: "yes" if r.random() < chance[p] else "no")
    claimed = right = 0
    for s in AdversarialFilter(player, CORRECT, batch_size=500).screen(list(chance)):
        true = KINDS[(chance[s.prompt] > 0.2) + (chance[s.prompt] > 0.8)]
        claimed, right = claimed + s.kinds[s.kind], right + (s.kind == true)
    assert right == pytest.approx(claimed, abs=3 * (3000 * 0.15 * 0.85) ** 0.5)


def test_what_users_get():
    kind, player = plant(1)
    found = AdversarialFilter(player, CORRECT).find_adversarial_examples(
        list(kind), n_examples=20, progress=False
    )
    assert len(found) == 20 and all(
        {"prompt", "best", "worst"} <= set(e) and (e["best"], e["worst"]) == ("yes", "no") for e in found
    )
    assert [e["uncertainty"] for e in found] == sorted((e["uncertainty"] for e in found), reverse=True)
    assert found.problems[0] == {"prompt": found[0]["prompt"]}
    assert sum(r.successes for r in found.counts.values()) == len(found.screened)
    assert "20 examples" in repr(found) and "uncertain" in repr(found) and "<table>" in found._repr_html_()
    only = AdversarialFilter(player, CORRECT).find_adversarial_examples(
        list(kind), kinds=("uncertain",), progress=False
    )
    assert only and {e["kind"] for e in only} == {"uncertain"}


def test_threshold_and_order():
    graded = Scripted(lambda p, r: str(r.randint(0, int(p))))
    f = AdversarialFilter(graded, as_reward(lambda p, a: float(a)), threshold=6, right_from=10**9)
    found = f.find_adversarial_examples([str(i) for i in range(20)], early_stop=False, progress=False)
    assert found and all(e["best_reward"] - e["worst_reward"] == e["spread"] > 6 for e in found)
    # none is right: the margin decides
    assert [e["margin"] for e in found] == sorted((e["margin"] for e in found), reverse=True)
    half = screened([1.0] * 5 + [0.0] * 5)
    slip = screened([1.0] * 9 + [0.0])
    none = screened([0.0] * 9 + [0.9])
    assert informative([none, slip, half]) == [half, slip, none]


def test_stops_when_enough_are_found_and_asks_in_batches():
    kind, player = plant(2)
    counting = Counting(player)
    # endless
    AdversarialFilter(counting, CORRECT, batch_size=8).find_adversarial_examples(
        itertools.cycle(kind), n_examples=5, progress=False
    )
    assert 1 <= len(counting.batches) <= 6 and {len(b) for b in counting.batches} == {8}
    counting = Counting(player)
    AdversarialFilter(counting, CORRECT, batch_size=8).find_adversarial_examples(
        list(kind), 5, early_stop=False, progress=False
    )
    assert len(counting.batches) == 30


def test_twins_are_asked_once_and_batches_do_not_matter():
    kind, player = plant(3, 40)
    counting, prompts = Counting(player), list(kind)
    one = list(AdversarialFilter(counting, CORRECT, batch_size=7).screen(prompts + prompts[::-1]))
    assert (
        sorted(p for b in counting.batches for p in b) == sorted(prompts)
        and [s.prompt for s in one] == prompts
    )
    assert one == list(AdversarialFilter(player, CORRECT, batch_size=40).screen(prompts))
    assert one != list(AdversarialFilter(player, CORRECT, batch_size=40, seed=1).screen(prompts))
    # the same prompt with another answer is another row
    columns = [dict(prompt="1?", answer=a) for a in (1, 2)]
    assert len(list(AdversarialFilter(player, CORRECT).screen(columns))) == 2


@pytest.mark.parametrize("breaks_after", range(1, 5))
def test_a_killed_run_goes_on(tmp_path, breaks_after):
    kind, player = plant(4, 64)
    rows = [dict(prompt=[dict(role="user", content=p)], note="–") for p in kind]  # messages, and a column
    player = Scripted(lambda m, r, fn=player.fn: fn(m[0]["content"], r), "planted")

    def run(player, **kwargs):
        return AdversarialFilter(player, CORRECT, batch_size=10, **kwargs).find_adversarial_examples(
            rows, early_stop=False, progress=False
        )

    whole, file = run(player), tmp_path / "screened.jsonl"
    first, second = Counting(player, breaks_after), Counting(player)
    with pytest.raises(ConnectionError):
        run(first, ledger=file)
    file.write_bytes(file.read_bytes()[:-9])  # and the last line is torn
    assert run(second, ledger=file) == whole
    assert sum(map(len, second.batches)) == 64 - 10 * breaks_after + 1
    third = Counting(player, 0)
    assert run(third, ledger=file) == whole  # nothing is left to ask


@pytest.mark.parametrize(
    "other, says",
    [
        (dict(seed=1), "seed: 0 there, 1 now"),
        (dict(n_samples=5), "n_samples"),
        (dict(round=2), "round"),
        (dict(temperature=0.5), "sampling"),
    ],
)
def test_a_ledger_of_another_screening_is_refused(tmp_path, other, says):
    kind, player = plant(5, 20)
    list(AdversarialFilter(player, CORRECT, ledger=tmp_path / "a.jsonl").screen(list(kind)))
    with pytest.raises(ValueError, match=says):
        AdversarialFilter(player, CORRECT, ledger=tmp_path / "a.jsonl", **other)
    with pytest.raises(ValueError, match="another screening.*policy"):
        AdversarialFilter(Scripted(player.fn, "somebody else"), CORRECT, ledger=tmp_path / "a.jsonl")


def test_pairs_are_clean_and_know_where_they_come_from():
    f = AdversarialFilter(Scripted(lambda p, r: ""), CORRECT, round=3)

    class Stub(type(f.find_adversarial_examples(["x"], progress=False))):
        pass

    s = screened(
        [1.0, 1.0, 0.4, 0.4, 0.2, 0.0, 0.0],
        ["cut", "good", "fair", "fair", "good ", "bad", ""],
        [True] + [False] * 6,
    )
    found = Stub([s], [s], f.about)
    rows, dropped = found.pairs(per_prompt=9)
    assert [(r["chosen"], r["rejected"]) for r in rows] == [
        ("good", "bad"),
        ("good", "fair"),
        ("fair", "good "),
    ]
    assert rows[0]["margin"] == 1 and (rows[0]["source"], rows[0]["round"], rows[0]["judge"]) == (
        "adversarial",
        3,
        "<lambda>",
    )
    assert dropped["truncated"] == 4 and dropped["empty"] == 5 and dropped["identical"] == 1
    assert len(found.pairs()[0]) == 1
    json.dumps(rows, allow_nan=False)


def test_token_ids_travel_into_the_pairs(tmp_path):
    class Sampler:
        name = "sampler"

        def sample(self, prompts, n_samples, seed, progress=None, **kwargs):
            rows = [
                [
                    SimpleNamespace(text=t, truncated=False, token_ids=[len(p), k])
                    for k, t in enumerate(["yes", "no"] * (n_samples // 2))
                ]
                for p in prompts
            ]
            return type("S", (list,), dict(seconds=1.0, n_tokens=2))(rows)

    for _ in range(2):  # asked, then read from the ledger
        found = AdversarialFilter(Sampler(), CORRECT, ledger=tmp_path / "a.jsonl").find_adversarial_examples(
            ["abc"], progress=False
        )
        assert found.pairs()[0][0]["chosen_ids"] == [3, 0] and found.pairs()[0][0]["rejected_ids"] == [3, 1]


def test_noise_of_the_reward_is_told_from_doubt_of_the_policy():
    kind, player = plant(6, 60)
    calm = AdversarialFilter(player, CORRECT).find_adversarial_examples(
        list(kind), early_stop=False, progress=False
    )
    noisy = AdversarialFilter(player, random_reward(0), right_from=0.5).find_adversarial_examples(
        list(kind), early_stop=False, progress=False
    )
    assert calm.noise.value == 0 and noisy.noise.value == 1 and len(noisy) == 60
    assert noisy.noise.n_effective == 60


@pytest.mark.parametrize(
    "kwargs, says",
    [
        (dict(n_samples=1), "n_samples is 1"),
        (dict(batch_size=0), "batch_size"),
        (dict(threshold=-1), "threshold"),
        (dict(threshold=float("nan")), "threshold"),
        (dict(edge=0.5), "edge"),
    ],
)
def test_bad_settings_are_named(kwargs, says):
    with pytest.raises(ValueError, match=says):
        AdversarialFilter(Scripted(lambda p, r: "x"), CORRECT, **kwargs)


@pytest.mark.parametrize(
    "data, says",
    [
        ([], "no prompts"),
        (["a", 3], "row 1 is 3"),
        ([dict(answer=1)], "row 0"),
        (
            [dict(prompt="a", answer=1), dict(prompt="b")],
            "row 1 has .'prompt'.: expected .'answer', 'prompt'.",
        ),
    ],
)
def test_bad_data_is_named_before_anything_is_asked(data, says):
    counting = Counting(plant(0)[1])
    with pytest.raises(ValueError, match=says):
        AdversarialFilter(counting, CORRECT).find_adversarial_examples(data, progress=False)
    assert not counting.batches


def test_bad_requests_are_named():
    f = AdversarialFilter(plant(0)[1], CORRECT)
    with pytest.raises(ValueError, match="n_examples is 0"):
        f.find_adversarial_examples(["0?"], 0)
    with pytest.raises(ValueError, match="kinds are"):
        f.find_adversarial_examples(["0?"], kinds=("hard",))


def trainer(player, prompts=None, n=12, seed=0, round=0):
    task = SimpleNamespace(
        problems=lambda split, n, seed: [
            dict(prompt=f"{i}?") for i in random.Random(seed).sample(range(240), n)
        ]
    )
    return SimpleNamespace(
        config=SimpleNamespace(prompts_per_round=n, seed=seed, max_new_tokens=8, temperature=1.0),
        round=round,
        prompts=prompts,
        task=task,
        student=player,
        reward=CORRECT,
        call=lambda *a, **k: None,
    )


def test_curriculum_leaves_the_problems_nearest_one_half():
    kind, player = plant(7)
    t, lesson = trainer(player), Curriculum(pool=4, n_samples=4)
    lesson.on_train_begin(t, 1)
    lesson.on_round_begin(t)
    assert len(lesson.screened) == 48 and len(t.prompts) == 12

    def mixed(prompts):
        return sum(kind[p["prompt"]] == "mixed" for p in prompts)

    assert mixed(t.prompts) >= 0.7 * min(12, mixed([s.row for s in lesson.screened]))
    worst = min(s.uncertainty for s in lesson.screened if s.row in t.prompts)
    assert all(s.uncertainty <= worst for s in lesson.screened if s.row not in t.prompts)
    first = t.prompts
    lesson.on_round_begin(t)
    assert t.prompts == first  # the same round again
    t.round = 1
    lesson.on_round_begin(t)
    assert t.prompts != first


def test_curriculum_draws_from_the_given_prompts():
    kind, player = plant(7)
    given = [dict(prompt=f"{i}?") for i in range(30)]
    t, lesson = trainer(player, given), Curriculum(pool=4)
    lesson.on_train_begin(t, 2)
    for t.round in range(2):
        lesson.on_round_begin(t)
        assert len(lesson.screened) == 30 and len(t.prompts) == 12 and all(p in given for p in t.prompts)


def test_the_proposer_is_paid_for_doubt_and_copies_share():
    solver = Scripted(lambda p, r: p if r.random() < {"1": 1, "2": 0.5, "3": 0}[p] else "0")

    def parse(text):
        return {"prompt": text, "answer": int(text)} if text.isdigit() else None

    reward = ProposerReward(AdversarialFilter(solver, exact_number, n_samples=200), parse)
    easy, doubt, hard, copy, none = reward(["ask"] * 5, ["1", "2", "3", "2", "x"])
    assert easy == hard == none == 0 and doubt == copy == pytest.approx(0.5, abs=0.02)
    assert reward(["ask"], ["2"]) == [2 * doubt] and reward(["ask"], ["x"]) == [0]
