"""Settings, collectors, methods and data that do not go together are refused before anything is loaded; a
round that happens to teach nothing is no reason to end.
"""

import warnings
from types import SimpleNamespace

import pytest
import torch

from selfplay_nb import as_task
from selfplay_nb.loop.collectors import Propose, Shares, named
from selfplay_nb.loop.rounds import METHODS, Compete, Experience, Groups, Refine, check_fit
from selfplay_nb.loop.trainer import SelfPlayConfig, SelfPlayTrainer
from selfplay_nb.models.policy import Base
from selfplay_nb.models.update import Settings

PROMPTS = [f"Name {k} things." for k in range(30)]
ROWS = [dict(prompt=p, answer=str(k)) for k, p in enumerate(PROMPTS)]
SMALL = dict(n_rounds=2, prompts_per_round=4, n_samples=3, max_new_tokens=8, eval_size=4, gate=False)


def length(prompt, answer):
    return float(len(answer))


def constant(prompt, answer):
    return 1.0


def near(prompts, completions, answer, **columns):
    return [float(a in c) for c, a in zip(completions, answer)]


def made(folder, task=None, **changes):
    config = SelfPlayConfig(str(folder / "run"), **SMALL | changes)
    return SelfPlayTrainer(config, task=task or as_task(PROMPTS, length), callbacks=[])


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(opponents="league", method="reinforce"), "plays no opponent"),
        (dict(opponents="league", method="grpo"), "plays no opponent"),
        (dict(opponents="league", method="spin"), "plays no opponent"),
        (dict(opponents="league", method="sft", collect="groups"), "plays no opponent"),
        (dict(opponents="league", collect="screen"), "plays no opponent"),
        (dict(opponents="league", compete=False, refine_iterations=1), "plays no opponent"),
        (dict(refine_iterations=2, method="grpo"), "refines nothing"),
        (dict(refine_iterations=2, method="spin"), "refines nothing"),
        (dict(refine_iterations=2, collect="compete"), "refines nothing"),
        (dict(compete=False), "nothing to learn from"),
        (dict(method="dpo", collect="groups"), "learns from pairs, and the collectors make answers"),
        (dict(method="grpo", collect="compete"), "learns from answers, and the collectors make pairs"),
        (dict(method="grpo", collect="compete 0.5, screen 0.5"), "make pairs"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        made(tmp_path, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        dict(compete=False, method="grpo"),
        dict(compete=False, collect="groups", method="sft"),
        dict(opponents="league"),
        dict(opponents="league", collect="compete 0.7, screen 0.3"),
        dict(refine_iterations=1, collect="refine"),
        dict(method="sft"),
    ],
)
def test_what_goes_together_is_taken(changes, tmp_path):
    made(tmp_path, **changes)


class Own:
    def collect(self, run, problems):
        return Experience()


class BestOfGroup(Groups):
    def collect(self, run, problems):
        return Experience()


def test_kinds():
    dpo, grpo, imitation = (METHODS[name]() for name in ("dpo", "grpo", "sft"))
    for collector in Compete(), Refine(), Groups():
        check_fit([collector], imitation)
    check_fit([Compete(), Groups()], dpo)
    check_fit([object()], dpo)  # it does not say
    propose = Propose("ask", dict, Compete())
    check_fit([propose], dpo)
    check_fit([propose], grpo)
    check_fit([Propose("ask", dict, Shares((Own(), 1), (Compete(), 1)))], dpo)  # nobody knows what Own makes
    check_fit([Propose("ask", dict, Own())], dpo)
    check_fit([BestOfGroup()], dpo)  # it collects in its own way
    check_fit([Compete()], SimpleNamespace(takes="stories"))
    with pytest.raises(ValueError, match="make pairs"):
        check_fit(named("compete, screen", SelfPlayConfig()), grpo)


@pytest.mark.parametrize(
    "changes",
    [
        dict(method="sft", collect="groups"),
        dict(method="dpo", collect="compete 0.5, groups 0.5"),
        dict(method="grpo"),
        dict(),
    ],
)
def test_a_round_that_teaches_nothing_does_not_end_a_run(changes, tmp_path, tiny_folder):
    config = SelfPlayConfig(str(tmp_path / "run"), **SMALL | changes)
    base = Base.load(tiny_folder, dtype=torch.float32, device="cpu")
    trainer = SelfPlayTrainer(config, base, as_task(PROMPTS, constant), callbacks=[])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        history = trainer.train()
    assert len(history) == 3
    assert any("to learn from" in str(w.message) for w in said)


def never(*args, **kwargs):
    raise AssertionError("a model was loaded")


@pytest.mark.parametrize(
    "begin, says",
    [
        (lambda t: t(as_task(ROWS, near)).train([dict(prompt="Another one?")]), "answer"),
        (lambda t: t(as_task(ROWS, length), method="spin").train(), "completion"),
        (lambda t: t(as_task(ROWS, length)).train(n_iterations="3"), "n_iterations is '3'"),
        (lambda t: t(as_task(ROWS, length)).train(n_iterations=2.5), "n_iterations is 2.5"),
        (lambda t: t(as_task(ROWS, length), warm_up=4).train(), "completion"),
    ],
)
def test_bad_input_is_said_before_a_model_is_loaded(begin, says, tmp_path, monkeypatch):
    monkeypatch.setattr(Base, "load", never)
    with pytest.raises(ValueError, match=says):
        begin(lambda task, **changes: made(tmp_path, task, **changes))
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("given", [dict(warmup_ratio=0.5), dict(warmup_steps=4)])
def test_a_warm_up_that_the_schedule_has_not_is_refused(given):
    with pytest.raises(ValueError, match="constant_with_warmup"):
        Settings(**given)


@pytest.mark.parametrize(
    "given, rates",
    [
        (dict(warmup_ratio=1.0), [0.0, 0.25, 0.5, 0.75]),
        (dict(warmup_ratio=0.5), [0.0, 0.5, 1.0, 1.0]),
        (dict(warmup_steps=2), [0.0, 0.5, 1.0, 1.0]),
        (dict(warmup_steps=0.5), [0.0, 0.5, 1.0, 1.0]),
        (dict(), [1.0] * 4),
    ],
)
def test_a_warm_up_is_as_long_as_it_says(given, rates, tiny):
    from selfplay_nb.models import update
    from selfplay_nb.models.policy import Policy

    Policy(tiny, "p")
    seen = []
    weights = [w for n, w in tiny.model.named_parameters() if ".p." in n]
    s = Settings(learning_rate=1.0, lr_scheduler_type="constant_with_warmup", **given)
    optimizer, schedule = update._optimizer(weights, s, 4)
    for _ in range(4):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert seen == pytest.approx(rates)


def test_a_model_card_says_what_was_done(tmp_path, tiny_folder):
    config = SelfPlayConfig(str(tmp_path / "run"), **SMALL | dict(n_rounds=1, method="grpo"))
    base = Base.load(tiny_folder, dtype=torch.float32, device="cpu")
    trainer = SelfPlayTrainer(config, base, as_task(PROMPTS, length), callbacks=[])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    card = trainer.card()
    assert f"base_model: {tiny_folder.name}" in card and f"- model_name: {tiny_folder.name}" in card
    assert "tags: [self-play, grpo, selfplay_nb]" in card
    assert "| round | better than before training |" in card and str(tiny_folder) not in card
