"Collectors beyond competitive play: what they make, that they train, and what they refuse."

import random
from types import SimpleNamespace

import pytest
import torch

from selfplay_nb import as_task
from selfplay_nb.loop.collectors import COLLECTORS, Levels, Propose, Screen, Shares, named
from selfplay_nb.loop.rounds import Compete, Experience
from selfplay_nb.loop.trainer import SelfPlayConfig, SelfPlayTrainer
from selfplay_nb.models.policy import Base
from selfplay_nb.models.sampling import Samples
from selfplay_nb.scoring.reward import as_reward

PROMPTS = [f"Describe a {thing}." for thing in "river bridge coffee window garden piano train bread".split()]
SMALL = dict(n_rounds=2, prompts_per_round=5, n_samples=6, max_new_tokens=24, eval_every=2, gate=False)


def variety(prompt, answer):
    return len(set(answer)) / 30


def trainer(tmp_path, tiny_folder, **settings):
    base = Base.load(tiny_folder, dtype=torch.float32, device="cpu")
    parts = {k: settings.pop(k) for k in ("collectors", "task") if k in settings}
    task = parts.pop("task", None) or as_task(PROMPTS, reward=variety)
    config = SelfPlayConfig(str(tmp_path / "run"), **SMALL | settings)
    return SelfPlayTrainer(config, base=base, task=task, callbacks=[], **parts)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "collect, method",
    [
        ("screen", "dpo"),
        ("levels", "sft"),
        ("compete 0.6, screen 0.4", "dpo"),
        ("groups", "grpo"),
        ("groups", "sft"),
    ],
)
def test_named_collectors_train(tmp_path, tiny_folder, collect, method):
    # nothing of the length: random weights seldom end an answer, and what is cut off teaches nothing
    task = as_task(PROMPTS, reward=lambda prompt, answer: sum(map(ord, answer)) % 7)
    made = trainer(tmp_path, tiny_folder, task=task, collect=collect, method=method, n_samples=24)
    history = made.train()
    assert any(m.get("loss") is not None for m in history), history
    assert any(v.abs().sum() > 0 for k, v in made.student.state().items() if "lora_B" in k)


class Seen:
    "In place of a collector: what it was given."

    def __init__(self):
        self.given = []

    def collect(self, run, problems):
        self.given.append(problems)
        return Experience(pairs=[dict(n=len(problems))])


@pytest.mark.parametrize(
    "shares, expected", [((1, 1), (5, 5)), ((0.7, 0.3), (7, 3)), ((1, 2, 7), (1, 2, 7)), ((99, 1), (10,))]
)
def test_shares_divide_a_round(shares, expected):
    parts = [(Seen(), share) for share in shares]
    made = Shares(*parts).collect(None, list(range(10)))
    assert [row["n"] for row in made.pairs] == list(expected)
    assert sum((g for seen, _ in parts for g in seen.given), []) == list(range(10))


def test_a_proposer_is_paid_for_what_it_is_uncertain_about(tmp_path, tiny_folder):
    "Problems that are proposed go on; held-out ones and no problems do not, and earn nothing."
    words = iter(["p one", "p two", "p two", "none", "p held", "p three"])
    solved = {"one": 0.5, "two": 0.5, "three": 1.0, "held": 0.5}
    rng = random.Random(0)

    class Student:
        name = "student"

        def sample(self, prompts, n_samples, **sampling):
            if prompts == ["propose"]:
                texts = [[next(words) for _ in range(n_samples)]]
            else:
                texts = [[str(int(rng.random() < solved[p])) for _ in range(n_samples)] for p in prompts]
            rows = [[SimpleNamespace(text=t, token_ids=[1], truncated=False) for t in row] for row in texts]
            return Samples(rows, 0.0, 0)

    seen = Seen()
    run = SimpleNamespace(
        student=Student(),
        reward=as_reward(lambda prompt, answer: float(answer)),
        sampling={},
        round=0,
        seed=lambda what: 0,
        stage=lambda name: None,
        progress=lambda answers, tokens: None,
        asks=lambda row: row["prompt"] == "held",
    )
    parse = lambda text: dict(prompt=text[2:]) if text.startswith("p ") else None
    made = Propose("propose", parse, seen, n_proposals=6, n_samples=400).collect(run, [])
    worth = [row["reward"] for row in made.answers]
    assert worth[3] == worth[4] == 0 and worth[5] == pytest.approx(0, abs=0.01)
    assert worth[0] == pytest.approx(1, abs=0.02) and worth[1] == worth[2] == pytest.approx(0.5, abs=0.02)
    assert seen.given == [[dict(prompt="one"), dict(prompt="two"), dict(prompt="three")]]
    assert made.answers[0]["advantage"] > 0 > made.answers[3]["advantage"]


@pytest.mark.parametrize(
    "text", ["compete, nothing", "screen much", "compete 1 2", "screen 0", "compete -1, screen", ""]
)
def test_what_is_no_collector_is_said(text):
    config = SelfPlayConfig(collect=text or ",")
    with pytest.raises(ValueError, match="collect has|shares"):
        config.check()
    assert named("screen", config)[0].parts[0][0].n_samples == config.n_samples and set(COLLECTORS) >= {
        "compete",
        "levels",
    }


def test_a_judge_of_pairs_cannot_screen(tmp_path, tiny_folder):
    task = as_task(PROMPTS, judge=lambda prompt, a, b: float(len(a) < len(b)))
    for collect in "screen", "levels", "refine":
        with pytest.raises(ValueError, match="need a reward that scores single answers"):
            trainer(tmp_path, tiny_folder, task=task, collect=collect)


def test_parts_have_defaults():
    assert Screen().n_samples == Levels().n_samples == Compete().n_samples == 8


def test_what_was_cut_off_is_not_imitated():
    rows = [dict(prompt="q", completion=str(i), advantage=a, truncated=t) for i, (a, t) in enumerate(CUT)]
    assert [r["completion"] for r in Experience(answers=rows).demonstrations] == ["0"]
    assert Experience(answers=[dict(prompt="q", completion="x", advantage=1.0)]).demonstrations


CUT = (1.0, False), (1.0, True), (-1.0, False), (0.0, False)


def test_counts_of_two_collectors_add_up():
    one = Experience(metrics=dict(pairs=2, reward=0.5, dropped={"empty": 1, "truncated": 2}))
    other = Experience(metrics=dict(pairs=3, reward=0.1, dropped={"truncated": 3}, informative=4))
    expected = dict(pairs=5, reward=0.5, dropped={"empty": 1, "truncated": 5}, informative=4)
    assert (one + other).metrics == expected


def test_a_level_without_answers_is_advice_and_another_error_is_an_error(tmp_path, tiny_folder):
    task = as_task(PROMPTS, reward=lambda prompt, answer: 1.0)
    made = trainer(tmp_path, tiny_folder, task=task, collect="levels", method="sft")
    with made.running(1):
        experience = Levels(2).collect(made, made.draw(0))
        assert not experience and "a level has no answers" in experience.advice
        with pytest.raises(ValueError, match="a label for each answer"):
            Levels(4, label=lambda rewards: [0]).collect(made, made.draw(0))
