"""What nobody decided: ties, abstentions, failed calls of a judge and cut-off answers, in every mechanism."""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch

from selfplay_nb import as_task
from selfplay_nb.core.players import Scripted
from selfplay_nb.games.debate import FACTS, Debate, truth
from selfplay_nb.games.play import play
from selfplay_nb.loop.run_evaluation import compared_with
from selfplay_nb.loop.trainer import SelfPlayConfig, SelfPlayTrainer
from selfplay_nb.methods.competitive import CompetitiveSelfPlay
from selfplay_nb.methods.league import LeagueTraining, _verdicts
from selfplay_nb.models.policy import Base
from selfplay_nb.scoring.evaluation import Evaluation, compare, evaluate, versus
from selfplay_nb.scoring.judge import Panel, RuleJudge, as_judge
from selfplay_nb.scoring.reward import Guarded

PROBLEMS = [dict(prompt=f"Say something about {k}.") for k in range(60)]


def shorter(prompt, a, b):
    return len(a) < len(b)


def always(text):
    return Scripted(lambda prompt, rng: text, text)


def words(prompt, rng):
    return "x" * rng.randrange(1, 4)


def longest(prompt, a, b):
    return float(len(a) > len(b)) if len(a) != len(b) else 0.5


def test_a_rule_that_says_true_or_false_ties_equal_players():
    match = versus(Scripted(words, "one"), Scripted(words, "two"), PROBLEMS, shorter, n_samples=4)
    low, high = match.win_rate.interval
    assert low < 0.5 < high
    step = CompetitiveSelfPlay(Scripted(words, "one"), Scripted(words, "two"), as_judge(shorter), n_samples=4)
    low, high = step.train_step([p["prompt"] for p in PROBLEMS]).win_rate.interval
    assert low < 0.5 < high
    row = lambda k, p: dict(prompt=p["prompt"], answer="x" * (k % 3), right=0.0, truncated=False)
    said = Evaluation([row(k, p) for k, p in enumerate(PROBLEMS)])
    assert compared_with(said, said, PROBLEMS, shorter).values == [0.5] * 60


@pytest.mark.parametrize("judge", ["rule", "reward"])
def test_a_league_asks_nobody_about_cut_off_games(judge):
    asked = []

    def compare(prompts, a, b):
        asked.extend(zip(a, b))
        return [1.0] * len(a)

    rewards = lambda prompts, completions, **k: [0.0] * len(prompts)
    judge = SimpleNamespace(compare=compare) if judge == "rule" else rewards
    whole, cut = SimpleNamespace(text="yes", truncated=False), SimpleNamespace(text="ye", truncated=True)
    said = dict(a=[whole, whole, cut, cut], b=[whole, cut, whole, cut])
    [found] = _verdicts(judge, [("a", "b")], list("pqrs"), said, {})
    assert found[1:] == [1.0, 0.0, 0.5]
    assert asked in ([], [("yes", "yes")])


def test_what_a_rule_is_asked():
    judge = RuleJudge(shorter)
    assert judge.compare(["p"] * 4, ["a", "aa", "a", "ab"], ["aa", "a", "a", "cd"]) == [True, False, 0.5, 0.5]
    always, asked = RuleJudge(lambda p, a, b: True), []
    assert always.compare(["p"], ["a"], ["b"]) == [0.5]  # whoever is first: no verdict on the answers

    def number(p, a, b):
        asked.append((a, b))
        return 0.7

    assert RuleJudge(number).compare(["p"] * 2, ["a", "a"], ["b", "a"]) == [0.7, 0.5]
    assert asked == [("a", "b")]


def test_a_panel_whose_members_abstain_by_none():
    raw = SimpleNamespace(compare=lambda prompts, a, b, **columns: [None] * len(prompts))
    said = Panel(dict(one=RuleJudge(longest), two=raw)).compare(["p"] * 2, ["aa", "a"], ["a", "b"])
    assert list(said) == [1.0, 0.5]


def test_an_evaluation_leaves_out_what_was_not_judged():
    def verifier(prompts, completions, **columns):
        return [math.nan if "7" in p else float("1" in p) for p in prompts]

    problems = PROBLEMS[:20]
    e = evaluate(always("yes"), problems, Guarded(verifier))
    assert [r["right"] is None for r in e.rows] == ["7" in p["prompt"] for p in problems]
    assert e.accuracy.n == 18 and "2 not judged" in repr(e) and len(e.show(20).splitlines()) == 20
    assert e.mean[0] == pytest.approx(sum(e.values) / 18)
    after = Evaluation([r | dict(right=1.0) for r in e.rows])
    assert compare(e, after).n == 18
    cut = evaluate(Cut(None, "cut"), problems, Guarded(verifier))
    assert cut.accuracy.n == 20 and not any(cut.values)  # it is known to be wrong


class Answers(list):
    seconds, n_tokens = 1.0, 1


class Cut(Scripted):
    "Always talks until it is cut off."

    def sample(self, prompts, n_samples=1, **settings):
        answer = SimpleNamespace(text="x" * 99, truncated=True, token_ids=[1], logprobs=None)
        return Answers([[answer] * n_samples for _ in prompts])


def length(prompts, completions, **columns):
    return [float(len(c)) for c in completions]


@pytest.mark.parametrize("judge", [RuleJudge(longest), length], ids=["judge", "reward"])
def test_a_league_and_a_match_agree_on_cut_off_answers(judge):
    short = always("short")
    assert versus(Cut(None, "cut"), short, PROBLEMS, judge).win_rate.value == 0
    league = LeagueTraining()
    league.add(short, "short")
    league.add(Cut(None, "cut"), "cut")
    rows = league.play(None, PROBLEMS, judge)
    scores = {(r["a"], r["b"]): r["score"] for r in rows}
    assert scores in ({("cut", "short"): 0.0}, {("short", "cut"): 1.0})
    assert all("truncated_a" in r or "truncated_b" in r for r in rows)


def test_a_debate_that_is_not_judged_is_drawn():
    silent = SimpleNamespace(compare=lambda prompts, a, b, **columns: [math.nan] * len(prompts))
    with pytest.warns(UserWarning, match="were not judged: they count as drawn"):
        played = play(Debate(silent, FACTS), [always("So it is."), always("No.")], 2)
    assert all(t.outcome == [0.5, 0.5] for t in played)
    states = [Debate(silent, FACTS).start(k) for k in range(3)]
    assert truth(states, silent).alone.n == 0


def test_a_judge_may_abstain_from_ties(tmp_path, tiny_folder):
    class Longer:
        name = "longer"

        def compare(self, prompts, a, b, **columns):
            return [None if len(x) == len(y) else float(len(x) > len(y)) for x, y in zip(a, b)]

    config = SelfPlayConfig(
        str(tmp_path / "run"),
        n_rounds=1,
        prompts_per_round=4,
        n_samples=2,
        max_new_tokens=6,
        eval_size=4,
        max_unjudged=1.0,
    )
    base = Base.load(tiny_folder, dtype=torch.float32, device="cpu")
    trainer = SelfPlayTrainer(config, base, as_task(PROBLEMS, judge=Longer()), callbacks=[])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        history = trainer.train()
    assert history[0]["accuracy"]["value"] == 0.5


class Flaky:
    "Prefers the larger text; its server is busy for some prompts at a stage of the run."

    name = "flaky"

    def __init__(self, stage, most=2):
        self.stage, self.most = stage, most
        self.now, self.failed = "", set()

    def on_stage(self, trainer, stage):
        self.now = stage

    def compare(self, prompts, a, b, **columns):
        for prompt in prompts:
            if self.now == self.stage and (prompt in self.failed or len(self.failed) < self.most):
                self.failed.add(prompt)
                raise ConnectionError("server busy")
        return [0.5 + 0.5 * ((x > y) - (x < y)) for x, y in zip(a, b)]

    def __call__(self, prompts, completions, **columns):
        self.compare(prompts, completions, completions)
        return [float(len(set(c))) for c in completions]


@pytest.mark.parametrize("judged", [True, False], ids=["judge", "reward"])
def test_a_judge_that_fails_at_the_gate_does_not_end_a_run(judged, tmp_path, tiny_folder):
    flaky = Flaky("gate")
    own = dict(judge=flaky) if judged else dict(reward=flaky.__call__)
    config = SelfPlayConfig(
        str(tmp_path / "run"),
        n_rounds=2,
        prompts_per_round=4,
        n_samples=2,
        max_new_tokens=8,
        eval_size=4,
        update_reference_every=1,
        gate_prompts=16,
    )
    base = Base.load(tiny_folder, dtype=torch.float32, device="cpu")
    trainer = SelfPlayTrainer(config, base, as_task(PROBLEMS, **own), callbacks=[flaky])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        history = trainer.train()
    assert flaky.failed and len(history) == 3
    assert any("server busy" in str(w.message) for w in said)


@pytest.mark.parametrize("most", [2, 60])
def test_a_judge_that_fails_in_the_evaluation(most, tmp_path):
    flaky = Flaky("evaluation", most)
    config = SelfPlayConfig(str(tmp_path / "run"), prompts_per_round=4, eval_size=8, gate=False)
    trainer = SelfPlayTrainer(config, task=as_task(PROBLEMS, judge=flaky), callbacks=[])
    said = lambda text: Evaluation(
        [dict(prompt=p["prompt"], answer=text, right=0.0, truncated=False) for p in trainer.eval_problems]
    )

    flaky.on_stage(trainer, "evaluation")

    def compared():
        with trainer.watched("the evaluation"):
            return compared_with(said("a"), said("b"), trainer.eval_problems, trainer.examiner)

    if most == 60:
        with pytest.raises(RuntimeError, match="failed on 8 of 8 matches"):
            compared()
    else:
        with pytest.warns(UserWarning, match="failed on 2 of 8 matches .*server busy"):
            values = compared().values
        assert sorted(values) == [0.5, 0.5] + [1.0] * 6
