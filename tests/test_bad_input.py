"""Whatever comes in from outside: what cannot be used is refused with a sentence of this library, before a
model is loaded.
"""

import math
import re
import traceback
from pathlib import Path

import numpy as np
import pytest

from selfplay_nb.core.pairs import validate_pairs
from selfplay_nb.core.players import Scripted
from selfplay_nb.loop.trainer import SelfPlayConfig, SelfPlayTrainer
from selfplay_nb.methods.adversarial import AdversarialFilter
from selfplay_nb.methods.competitive import CompetitiveSelfPlay
from selfplay_nb.methods.league import LeagueTraining
from selfplay_nb.methods.refinement import IterativeRefiner
from selfplay_nb.methods.skill import SkillConditioning, check_levels
from selfplay_nb.models.policy import Base, Policy
from selfplay_nb.models.update import dpo, reinforce, sft
from selfplay_nb.scoring.evaluation import evaluate, versus
from selfplay_nb.scoring.judge import RewardJudge, RuleJudge
from selfplay_nb.scoring.reward import score

LIBRARY = Path(__file__).parents[1] / "selfplay_nb"


def refused(call, value):
    "`call(value)` must raise an error that this library wrote, and which says what is expected."
    try:
        call(value)
    except Exception as e:
        error = e
    else:
        pytest.fail(f"accepted {value!r:.80}")
    told = "".join(traceback.format_exception(error))[-1500:]
    ours = type(error) in (ValueError, TypeError) or type(error).__module__.startswith("selfplay_nb")
    assert ours and isinstance(
        error, (ValueError, TypeError)
    ), f"{type(error).__name__} for {value!r:.80}\n{told}"
    origin = traceback.extract_tb(error.__traceback__)[-1]
    written = Path(origin.filename).is_relative_to(LIBRARY) and "raise " in origin.line
    assert written, f"raised by {origin.filename}, {origin.line}\n{told}"
    text = str(error)
    assert len(text.split()) >= 5 and re.search("expected|[Gg]ive |there is no file", text), text


def never(*args, **kwargs):
    raise AssertionError("a model was loaded before the arguments were looked at")


def length(prompts, completions, **columns):
    return [float(len(c)) for c in completions]


def right(prompts, completions, **columns):
    return [float("7" in c) for c in completions]


def player():
    return Scripted(lambda prompt, rng: rng.choice("123456789"))


def duel():
    return CompetitiveSelfPlay(player(), player(), length, n_samples=2)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "A folder for a run, where nothing can be loaded."
    monkeypatch.setattr(Base, "load", never)
    monkeypatch.chdir(tmp_path)
    return tmp_path


SAY = {"role": "user", "content": "Hi"}
PROMPTS = {
    "a number": 5,
    "a fraction": 2.5,
    "not a number": math.nan,
    "a truth value": True,
    "bytes": b"Hi",
    "a function": len,
    "an object": object(),
    "an empty list": [],
    "an empty tuple": (),
    "an empty dict": {},
    "an empty array": np.array([]),
    "None in a list": ["Hi", None],
    "a number in a list": ["Hi", 3],
    "a truth value in a list": ["Hi", False],
    "bytes in a list": ["Hi", b"Hi"],
    "a nested list": [["Hi"]],
    "an empty prompt": ["Hi", ""],
    "a blank prompt": ["Hi", " \n\t"],
    "an empty conversation": ["Hi", []],
    "a message without content": [[{"role": "user"}]],
    "a message without role": [[{"content": "Hi"}]],
    "content None": [[{"role": "user", "content": None}]],
    "a number as content": [[{"role": "user", "content": 3}]],
    "a number as role": [[{"role": 3, "content": "Hi"}]],
    "an unhashable role": [[{"role": ["user"], "content": "Hi"}]],
    "text among messages": [[SAY, "Hi"]],
    "None among messages": [[SAY, None]],
    "an image": [[{"role": "user", "content": [{"type": "image", "url": "x.png"}]}]],
    "splits": {"train": ["Hi"], "test": ["Ho"]},
    "a set of numbers": {1, 2},
    "an array of numbers": np.arange(3),
    "a row without prompt": [{"question": "Hi"}],
    "a row with prompt None": [{"prompt": None}],
    "a row with an empty prompt": [{"prompt": ""}],
    "a row with a number as prompt": [{"prompt": 3}],
}
ASKED = {
    "compete": lambda prompts: duel().train_step(prompts),
    "refine one": lambda prompt: list(IterativeRefiner(player()).refine(prompt)),
    "refine many": lambda prompts: IterativeRefiner(player()).refine_batch(prompts, 1),
    "filter": (
        lambda prompts: AdversarialFilter(player(), right, n_samples=2).find_adversarial_examples(
            prompts, progress=False
        )
    ),
    "skill rows": lambda prompts: SkillConditioning(player(), right, n_samples=4).collect(prompts),
    "a player": lambda prompts: player().generate(prompts),
    "examine": lambda problems: evaluate(player(), problems, right),
    "versus": lambda problems: versus(player(), player(), problems, RewardJudge(length)),
    "check levels": lambda problems: check_levels(player(), problems, right),
    "a judge": lambda prompts: RewardJudge(length).compare(prompts, ["a"], ["b"]),
    "a rule": lambda prompts: RuleJudge(lambda prompt, a, b: 1.0).compare(prompts, ["a"], ["b"]),
}


@pytest.mark.parametrize("value", PROMPTS)
@pytest.mark.parametrize("entry", ASKED)
def test_prompts_of_a_mechanism(entry, value):
    refused(ASKED[entry], PROMPTS[value])


@pytest.mark.parametrize("entry", ASKED)
def test_no_prompts_at_all(entry):
    refused(ASKED[entry], None)


@pytest.mark.parametrize("value", [*PROMPTS, "unequal columns", "a missing file", "one word"])
def test_prompts_of_the_trainer(folder, value):
    values = PROMPTS | {
        "unequal columns": [{"prompt": "Hi", "answer": 1}, {"prompt": "Ho"}],
        "a missing file": "prompts.jsonl",
        "one word": "train",
    }
    trainer = SelfPlayTrainer(SelfPlayConfig(str(folder / "run")), callbacks=[])
    refused(trainer.train, values[value])
    assert not (folder / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("value", PROMPTS)
@pytest.mark.parametrize("stage", ["self-play", "grpo"])
def test_prompts_of_the_pipeline(folder, stage, value):
    from selfplay_nb.loop.pipeline import RLHFOrchestrator

    o = RLHFOrchestrator(folder / "run", progress=False)
    calls = {
        "self-play": lambda v: o.run_self_play(prompts=v),
        "grpo": lambda v: o.run_policy_optimization("grpo", v),
    }
    refused(calls[stage], PROMPTS[value])


def test_prompts_of_a_league(tiny, tmp_path):
    league = LeagueTraining(3, tiny, tmp_path / "league")
    student = Policy(tiny, "student")
    league.add(student)
    play = CompetitiveSelfPlay(student, student, length, n_samples=1, max_new_tokens=2)
    for value in PROMPTS.values():
        refused(lambda v: league.train_step(play, v), value)


def test_prompts_of_a_policy(tiny):
    student = Policy(tiny, "student")
    for value in [None, *PROMPTS.values()]:
        refused(lambda v: student.generate(v, max_new_tokens=1), value)
        refused(lambda v: student.sample(v, max_new_tokens=1), value)
        refused(lambda v: student.logprobs(v, ["a"]), value)


def row(prompt, answer, **more):
    "A row of every kind: the answer as completion, chosen and rejected."
    return (
        dict(
            prompt=prompt,
            completion=answer,
            chosen=answer,
            rejected=answer if answer != "7" else "8",
            advantage=1.0,
        )
        | more
    )


ROWS = {
    "None": None,
    "a number": 5,
    "text": "rows",
    "an empty list": [],
    "None in a list": [None],
    "text in a list": ["Hi"],
    "an empty row": [{}],
    "another column": [
        {"question": "Hi", "completion": "7", "chosen": "7", "rejected": "8", "advantage": 1.0}
    ],
    "a prompt alone": [{"prompt": "Hi"}],
    "prompt None": [row(None, "7")],
    "a number as prompt": [row(3, "7")],
    "answers None": [row("Hi", None)],
    "numbers as answers": [row("Hi", 7)],
    "lists of text as answers": [row("Hi", ["7"])],
    "messages without content": [row("Hi", [{"role": "assistant"}])],
    "token ids out of range": [row("Hi", "7", completion_ids=[10**9], chosen_ids=[10**9], rejected_ids=[-1])],
}
UPDATES = {
    "sft": lambda policy, rows: sft(policy, rows),
    "dpo": lambda policy, rows: dpo(policy, rows, Policy(policy.base, "base")),
    "reinforce": lambda policy, rows: reinforce(policy, rows),
}


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("value", [v for v in ROWS if v != "token ids out of range"])
def test_rows_of_an_update(tiny, update, value):
    student = Policy(tiny, "student")
    before = {k: v.clone() for k, v in student.state().items()}
    refused(lambda rows: UPDATES[update](student, rows), ROWS[value])
    assert all((v == before[k]).all() for k, v in student.state().items())
    assert set(tiny.adapters) == {"student"}


def test_unknown_tokens_are_refused(tiny):
    student = Policy(tiny, "student")
    for update in "dpo", "reinforce":
        refused(lambda rows: UPDATES[update](student, rows), ROWS["token ids out of range"])


@pytest.mark.parametrize(
    "value",
    [
        "None",
        "a number",
        "an empty list",
        "None in a list",
        "an empty row",
        "another column",
        "a prompt alone",
        "prompt None",
        "a number as prompt",
        "answers None",
        "numbers as answers",
        "lists of text as answers",
        "messages without content",
    ],
)
@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_data_of_the_pipeline(folder, kind, value):
    from selfplay_nb.loop.pipeline import RLHFOrchestrator

    o = RLHFOrchestrator(folder / "run", progress=False)
    calls = {"sft": o.run_sft, "preference": o.run_reward_model_training}
    refused(calls[kind], ROWS[value])


REWARDS = {
    "None": lambda prompts, completions, **columns: None,
    "a number": lambda prompts, completions, **columns: 1.0,
    "text": lambda prompts, completions, **columns: "1" * len(completions),
    "strings": lambda prompts, completions, **columns: ["1"] * len(completions),
    "a truth value less": lambda prompts, completions, **columns: [1.0] * (len(completions) - 1),
    "one more": lambda prompts, completions, **columns: [1.0] * (len(completions) + 1),
    "a column of an array": lambda prompts, completions, **columns: np.ones((len(completions), 1)),
    "dicts": lambda prompts, completions, **columns: [{"score": 1.0}] * len(completions),
    "complex numbers": lambda prompts, completions, **columns: [1j] * len(completions),
    "infinite": lambda prompts, completions, **columns: [math.inf] * len(completions),
    "too large a number": lambda prompts, completions, **columns: [10**400] * len(completions),
    "a generator of text": lambda prompts, completions, **columns: (c for c in completions),
    "a dict": lambda prompts, completions, **columns: {i: 1.0 for i in range(len(completions))},
    "lists": lambda prompts, completions, **columns: [[1.0]] * len(completions),
}
SCORED = {
    "score": lambda reward: score(reward, ["Hi"], ["7"]),
    "compete": lambda reward: CompetitiveSelfPlay(player(), player(), reward, n_samples=2).train_step(["Hi"]),
    "refine": lambda reward: IterativeRefiner(player(), reward=reward).refine_batch(["Hi"], 1),
    "filter": (
        lambda reward: AdversarialFilter(player(), reward, n_samples=2).find_adversarial_examples(
            ["Hi"], progress=False
        )
    ),
    "skill": lambda reward: SkillConditioning(player(), reward, n_samples=4).collect(["Hi"]),
    "examine": lambda reward: evaluate(player(), [{"prompt": "Hi"}], reward),
    "judge": lambda reward: RewardJudge(reward).compare(["Hi"], ["7"], ["8"]),
    "levels": lambda reward: check_levels(player(), [{"prompt": "Hi"}], reward),
}


@pytest.mark.parametrize("entry", SCORED)
@pytest.mark.parametrize("value", REWARDS)
def test_values_of_a_reward(entry, value):
    refused(SCORED[entry], REWARDS[value])


@pytest.mark.parametrize("entry", SCORED)
def test_something_that_is_no_reward(entry):
    for thing in None, 5, "reward", [], object():
        if (entry, thing) != ("refine", None):  # a refiner can do without
            refused(SCORED[entry], thing)


NUMBERS = {
    "zero": 0,
    "negative": -1,
    "a fraction": 1.5,
    "text": "2",
    "None": None,
    "not a number": math.nan,
    "infinite": math.inf,
    "a truth value": True,
    "a list": [2],
}
COUNTS = {
    "samples of a duel": lambda n: CompetitiveSelfPlay(player(), player(), length, n_samples=n),
    "pairs of a duel": lambda n: CompetitiveSelfPlay(player(), player(), length, pairs_per_prompt=n),
    "samples of a filter": lambda n: AdversarialFilter(player(), right, n_samples=n),
    "batch of a filter": lambda n: AdversarialFilter(player(), right, batch_size=n),
    "examples": (
        lambda n: AdversarialFilter(player(), right, n_samples=2).find_adversarial_examples(
            ["Hi"], n, progress=False
        )
    ),
    "samples of levels": lambda n: SkillConditioning(player(), right, n_samples=n),
    "samples of a comparison": lambda n: check_levels(player(), [{"prompt": "Hi"}], right, n_samples=n),
    "samples of a match": lambda n: versus(
        player(), player(), [{"prompt": "Hi"}], RewardJudge(length), n_samples=n
    ),
    "leagues": lambda n: LeagueTraining(n),
    "rounds": lambda n: SelfPlayConfig(prompts_per_round=n).check(),
    "samples of a run": lambda n: SelfPlayConfig(n_samples=n).check(),
    "evaluation": lambda n: SelfPlayConfig(eval_size=n).check(),
    "tokens of a run": lambda n: SelfPlayConfig(max_new_tokens=n).check(),
    "rank": lambda n: SelfPlayConfig(r=n).check(),
}


@pytest.mark.parametrize("entry", COUNTS)
@pytest.mark.parametrize("value", NUMBERS)
def test_counts(entry, value):
    refused(COUNTS[entry], NUMBERS[value])


SIZES = {
    "games": lambda o, n: o.run_self_play(n_games=n),
    "samples": lambda o, n: o.run_self_play(n_samples=n),
    "batch": lambda o, n: o.run_self_play(batch=n),
    "prompts of grpo": lambda o, n: o.run_policy_optimization("grpo", n_prompts=n),
    "group": lambda o, n: o.run_policy_optimization("grpo", group=n),
}


@pytest.mark.parametrize("entry", SIZES)
@pytest.mark.parametrize("value", NUMBERS)
def test_counts_of_the_pipeline(folder, entry, value):
    from selfplay_nb.loop.pipeline import RLHFOrchestrator

    o = RLHFOrchestrator(folder / "run", progress=False)
    refused(lambda n: SIZES[entry](o, n), NUMBERS[value])


SAMPLING = {
    "tokens": lambda policy, n: policy.generate("Hi", max_new_tokens=n),
    "samples": lambda policy, n: policy.generate("Hi", n_samples=n),
    "rank": lambda policy, n: Policy(policy.base, "other", r=n),
}


@pytest.mark.parametrize("entry", SAMPLING)
def test_counts_of_a_policy(tiny, entry):
    student = Policy(tiny, "student")
    for value in NUMBERS.values():
        refused(lambda n: SAMPLING[entry](student, n), value)
    assert tiny.adapters == ["student"]


@pytest.mark.parametrize("name", ["temperature", "top_p"])
def test_temperature_and_nucleus(tiny, name):
    student = Policy(tiny, "student")
    for value in -1, math.nan, math.inf, "1", None, [1.0], True:
        refused(lambda v: student.generate("Hi", max_new_tokens=1, **{name: v}), value)


def test_pairs_in_another_form():
    for value in (
        None,
        5,
        "pairs",
        [None],
        ["Hi"],
        [{}],
        [{"prompt": "Hi"}],
        [{"question": "Hi", "chosen": "7", "rejected": "8"}],
    ):
        refused(validate_pairs, value)
