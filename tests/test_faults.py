"""What goes wrong in a run is counted and shown, none of it reaches the optimizer, and too much of it stops
the run with a reason.
"""

import json
import math
import random
import statistics
import threading
import time
import warnings

import pytest
import torch

from selfplay_nb.core.pairs import Ledger, loops, validate_pairs
from selfplay_nb.core.players import Scripted
from selfplay_nb.loop.callbacks import Live, ReportTo, control, flat, read_control
from selfplay_nb.loop.gate import SequentialGate
from selfplay_nb.loop.trainer import Learner, SelfPlayConfig, SelfPlayTrainer
from selfplay_nb.loop.vitals import Vitals, alarms, vitals
from selfplay_nb.methods.competitive import CompetitiveSelfPlay
from selfplay_nb.methods.league import LeagueTraining
from selfplay_nb.methods.refinement import IterativeRefiner
from selfplay_nb.models import sampling, update
from selfplay_nb.models.policy import Base, Policy
from selfplay_nb.scoring.reward import Guarded, exact_number, score
from selfplay_nb.stats.retention import PASSAGES
from selfplay_nb.tasks.task import ArithmeticTask

SMALL = dict(
    n_rounds=2,
    prompts_per_round=6,
    n_samples=6,
    max_new_tokens=12,
    eval_size=4,
    eval_every=1,
    update_reference_every=1,
    gate=False,
)


def make(run_dir, folder, reward=None, callbacks=(), **changes):
    class Letters(ArithmeticTask):
        verifier = property(lambda self: exact_number)

    def letters(prompts, completions, **columns):
        return [float(sum(map(ord, c)) % 97) for c in completions]

    Letters.reward = property(lambda self: reward or letters)
    base = folder and Base.load(folder, dtype=torch.float32, device="cpu")
    return SelfPlayTrainer(
        SelfPlayConfig(str(run_dir), **SMALL | changes), base=base, task=Letters(), callbacks=list(callbacks)
    )


# rewards that fail


def length(prompts, completions, **columns):
    return [float(len(c)) for c in completions]


def raising(prompts, completions, **columns):
    return [1 / (len(c) - 3) for c in completions]


def silent(prompts, completions, **columns):
    return [None if len(c) == 3 else math.nan if len(c) == 4 else float(len(c)) for c in completions]


def short(prompts, completions, **columns):
    return [float(len(c)) for c in completions if len(c) != 3]


def hanging(prompts, completions, **columns):
    if any(len(c) == 3 for c in completions):
        time.sleep(5)
    return length(prompts, completions)


@pytest.mark.parametrize(
    "reward, lost, why",
    [
        (raising, [2], {"ZeroDivisionError": 1}),
        (silent, [2, 3], {"no number": 2}),
        (short, [2], {"wrong length": 1}),
        (hanging, [2], {"TimeoutError": 1}),
    ],
)
def test_a_failing_reward_costs_the_answers_it_concerns(reward, lost, why):
    guarded = Guarded(reward, timeout=0.2)
    answers = ["a", "ab", "abc", "abcd", "abcde"]
    got = score(guarded, ["?"] * 5, answers)
    assert (
        [i for i, v in enumerate(got) if math.isnan(v)] == lost
        and guarded.failures == why
        and guarded.asked == 5
        and guarded.first
    )
    right = (
        dict(enumerate(length([], answers)))
        if reward is not raising
        else {i: 1 / (len(a) - 3) for i, a in enumerate(answers) if i != 2}
    )
    assert all(v == right[i] for i, v in enumerate(got) if i not in lost)
    with pytest.raises((ValueError, ZeroDivisionError)):
        (
            score(reward, ["?"] * 5, answers)
            if reward is not hanging
            else score(lambda **k: [math.nan] * 5, ["?"] * 5, answers)
        )


def test_a_reward_that_always_hangs_is_given_up():
    guarded = Guarded(lambda prompts, completions: time.sleep(3), timeout=0.05)
    begun = time.time()
    assert (
        all(map(math.isnan, score(guarded, ["?"] * 256, ["a"] * 256)))
        and time.time() - begun < 2
        and guarded.share == 1
    )


def test_columns_go_with_their_answers():
    def reward(prompts, completions, answer, step, **columns):
        return [1 / (a != 2) * (a + step) for a in answer]

    assert score(Guarded(reward), ["?"] * 4, ["x"] * 4, answer=[0, 1, 2, 3], step=10)[3] == 13.0


def test_a_judge_that_fails():
    class Judge:
        __name__ = "judge"

        def compare(self, prompts, a, b, **columns):
            return [1 / (x != "3") * (x > y) for x, y in zip(a, b)]

    answer = Scripted(lambda p, rng: rng.choice("12345"), "chance")
    guarded = Guarded(Judge())
    prefs = CompetitiveSelfPlay(answer, answer, guarded, n_samples=4).train_step([f"{i}?" for i in range(20)])
    lost = sum(a == "3" for row in prefs.answers for a in row)
    assert (
        lost
        and guarded.failures["ZeroDivisionError"] == prefs.dropped["unjudged"] == 4 * lost
        and prefs.win_rate.n == 20 * 16 - 4 * lost
    )
    assert not hasattr(Guarded(length), "compare") and all(math.isfinite(p["margin"]) for p in prefs)


def test_unjudged_answers_in_other_mechanisms(tmp_path):
    answer = Scripted(lambda p, rng: "x" * rng.randint(1, 5), "chance")
    traces = IterativeRefiner(answer, reward=Guarded(silent)).refine_batch([f"{i}?" for i in range(20)], 2)
    scores, (pairs, dropped) = [v.score for t in traces for v in t.versions], traces.pairs()
    assert (
        None in scores
        and all(s is None or math.isfinite(s) for s in scores)
        and pairs
        and all(p["margin"] > 0 for p in pairs)
    )
    blind = (
        IterativeRefiner(answer, reward=Guarded(lambda **k: [math.nan] * len(k["prompts"])))
        .refine_batch([f"{i}?" for i in range(20)], 2)
        .pairs()
    )
    assert blind[0] == [] and blind[1]["unjudged"] and dropped["unjudged"]
    league = LeagueTraining(anchors={"chance": answer}, folder=tmp_path)
    league.train_step(
        CompetitiveSelfPlay(answer, None, Guarded(lambda **k: [math.nan] * len(k["prompts"]))), ["a?", "b?"]
    )
    assert league.rows == []


@pytest.mark.parametrize(
    "reward, why, of",
    [(raising, "ZeroDivisionError", 7), (silent, "no number", 7), (hanging, "TimeoutError", 31)],
)
def test_a_run_counts_and_goes_on(tmp_path, tiny_folder, reward, why, of):
    def size(c):
        return sum(map(ord, c)) % of

    trainer = make(
        tmp_path / "run",
        tiny_folder,
        lambda prompts, completions, **columns: reward(prompts, ["x" * size(c) for c in completions]),
        n_rounds=1,
        judge_timeout=0.3,
        max_unjudged=0.9,
    )
    [_, row] = trainer.train()
    pairs = Ledger(tmp_path / "run" / "pairs.jsonl").rows()
    assert (
        row["unjudged"][why]
        and row["unjudged"]["first"]
        and row["dropped"]["unjudged"]
        and 0 < len(pairs) == row["pairs"]
    )
    assert {size(p[k]) for p in pairs for k in ("chosen", "rejected")}.isdisjoint(
        {3, 4} if reward is silent else {3}
    )
    assert all(v.isfinite().all() for v in trainer.student.state().values())


def test_too_few_survivors_stop_the_run_and_nothing_is_trained_on(tmp_path, tiny_folder):
    broken = []

    def breaks(prompts, completions, **columns):
        if broken:
            raise ConnectionError("the endpoint is gone")
        return [float(sum(map(ord, c)) % 97) for c in completions]

    class Break:
        def on_round_begin(self, trainer):
            broken.extend([1] * (trainer.round == 1))

    trainer = make(tmp_path / "run", tiny_folder, breaks, [Break()])
    says = "ConnectionError.*endpoint is gone.*a server, a file.*the same call goes on"
    with pytest.raises(
        RuntimeError, match=r"round 2: the reward 'breaks' failed on 72 of 72 answers.*" + says
    ):
        trainer.train()
    n = len(Ledger(tmp_path / "run" / "pairs.jsonl").rows())
    assert n == trainer.history[-1]["pairs"] and trainer.round == 1
    broken.clear()
    again = make(tmp_path / "run", tiny_folder, breaks)
    again.train()
    whole = make(tmp_path / "whole", tiny_folder, breaks)
    whole.train()
    assert all(
        torch.equal(a, b) for a, b in zip(again.student.state().values(), whole.student.state().values())
    )


# answers that nobody should learn


def test_empty_looping_and_over_long_answers_are_counted_and_left_out():
    texts = {"good": "The answer is 12.", "empty": " \n", "looping": "so it is " + "very " * 12}
    play = CompetitiveSelfPlay(
        Scripted(lambda p, rng: texts[p], "one"),
        Scripted(lambda p, rng: f"bad {rng.random()}", "other"),
        lambda prompts, completions, **columns: [float(not c.startswith("bad")) for c in completions],
        n_samples=2,
    )
    prefs = play.train_step(list(texts))
    assert {p["chosen"] for p in prefs} == {texts["good"]} and prefs.dropped == {"empty": 4, "looping": 4}
    pair = dict(prompt="p", chosen="a", rejected="b")
    bad = [pair | {"chosen_truncated": True}, pair | {"chosen": "a" * 90}, pair | {"rejected": "b " * 900}]
    assert validate_pairs(bad, lambda p, c: len(c), 100)[1] == {"truncated": 1, "looping": 1, "over-long": 1}


def test_what_loops():
    assert all(
        map(
            loops,
            [
                "ha" * 12,
                "x" * 24,
                "One. " + "I am sorry. " * 8,
                "a\n" * 30,
                "the end and " + "the end and " * 9 + "  \n",
            ],
        )
    )
    fine = [
        "",
        "1000000000",
        "ha" * 7,
        "very " * 7,
        "x" * 23,
        "3.14159265358979323846264338327950288",
        "I am sorry. " * 7,
        "no, no, no, no!",
        "a" * 30 + "b",
    ]
    assert not any(map(loops, fine))


# memory


def memory_for(n, monkeypatch, where, name, size):
    "Let batches of more than `n` fail as PyTorch does; how often they did."
    real, failed = getattr(where, name), []

    def limited(*args, **kwargs):
        if size(*args, **kwargs) > n:
            failed.append(1)
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(where, name, limited)
    return failed


def test_sampling_in_halves_gives_the_same_answers(tiny, monkeypatch):
    student = Policy(tiny, "student")
    prompts = [f"{i} + 1 =" for i in range(5)]
    whole = student.sample(prompts, 4, 8, seed=0)
    budget = tiny.max_batch_tokens
    failed = memory_for(6, monkeypatch, sampling, "decode", lambda model, batch, *rest, **more: len(batch))
    with pytest.warns(UserWarning, match="out of memory: a batch of 20 was halved"):
        halves = student.sample(prompts, 4, 8, seed=0)
    assert halves.texts == whole.texts and failed and tiny.max_batch_tokens < budget
    tiny.max_batch_tokens = 200  # ten rows: several batches that all do not fit cost one halving
    with warnings.catch_warnings(action="ignore"):
        again = student.sample(prompts * 4, 4, 8, seed=0)
    assert again.texts[:5] == whole.texts and tiny.max_batch_tokens >= 50
    memory_for(0, monkeypatch, sampling, "decode", lambda *args, **more: 1)
    with pytest.raises(RuntimeError, match="can't allocate"), warnings.catch_warnings(action="ignore"):
        student.sample(prompts[0], 1, 8, seed=0)


def test_an_update_in_halves_keeps_the_effective_batch(tiny, monkeypatch):
    rows = [dict(prompt=f"{i} + 1 =", completion=f"{i + 1}") for i in range(16)]
    monkeypatch.setattr(tiny, "max_train_tokens", 10_000)  # so that an update begins with all rows at once

    def train(**settings):
        student = Policy(tiny, "student")
        result = update.sft(student, rows, **settings)
        state = student.state()
        student.delete()
        return state, result

    parts, _ = train(per_device_train_batch_size=4, gradient_accumulation_steps=4)
    failed = memory_for(4, monkeypatch, update, "token_logprobs", lambda base, prompts, answers: len(prompts))
    with pytest.warns(UserWarning, match="begins again with 4 rows at a time, 4 times a step"):
        halved, result = train()
    assert (
        len(failed) == 2
        and len(result.losses) == 1
        and all(torch.equal(parts[k], halved[k]) for k in parts)
        and tiny.adapters == []
    )


@pytest.mark.parametrize("size, steps", [(5, 5), (6, 4), (7, 3)])
def test_parts_of_any_batch_make_the_same_step(tiny, size, steps, monkeypatch):
    rows = [dict(prompt=f"{i} + 1 =", completion=str(i + 1)) for i in range(21)]

    def train(limit):
        monkeypatch.setattr(tiny, "max_train_tokens", limit)
        student = Policy(tiny, "student", seed=0)
        result = update.sft(student, rows, per_device_train_batch_size=size)
        state = student.state()
        student.delete()
        return result.losses, state

    (whole, a), (parts, b) = train(10**6), train(40)
    assert (
        len(whole) == len(parts) == steps
        and parts == pytest.approx(whole, abs=1e-5)
        and all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)
    )


# the gate


def right_with(p, name):
    return Scripted(
        lambda prompt, rng: str(eval(prompt[-1]["content"].split("=")[0]) if rng.random() < p else -1), name
    )


@pytest.mark.parametrize(
    "middle, p, q, true, most",
    [
        pytest.param(0.5, 0.4, 0.5, 0.4, 0.05 / 2, marks=pytest.mark.long),
        pytest.param(0.5, 0.6, 0.5, 0.6, 0.05, marks=pytest.mark.long),
        (0.6, 0.5, 0.5, 0.5, 0.05 / 2),
        (0.6, 0.14 / 0.23, 0.4, 0.7, 0.05),
    ],
)
def test_the_gate_errs_as_seldom_as_it_says(tmp_path, middle, p, q, true, most):
    assert abs(p * (1 - q) / (p * (1 - q) + q * (1 - p)) - true) < 1e-9
    settings = dict(gate=True, gate_win_rate=middle, gate_prompts=640, n_rounds=12, update_reference_every=3)
    trainer = make(tmp_path / "run", None, **settings)
    trainer.learner = Learner("main", right_with(p, "student"), right_with(q, "reference"))
    told = []
    for trainer.config.seed in range(200):
        told.append(trainer.gate.decide(trainer))

    # as many as chance explains, had it the error it may have
    def chance(share):
        return 200 * share + 2 * math.sqrt(200 * share * (1 - share))

    right, wrong = ("accept", "reject") if true > middle else ("reject", "accept")
    assert sum(t["verdict"] != right for t in told) <= chance(0.05) and sum(
        t["verdict"] == wrong for t in told
    ) <= chance(most)
    assert all(0 < t["decided"] <= t["prompts"] <= 640 and t["win_rate"]["n"] == t["decided"] for t in told)
    assert abs(sum(t["won"] for t in told) / sum(t["decided"] for t in told) - true) < 0.05
    # corrected for having stopped: half of them are too high, and 95 % of the intervals hold
    rates = [t["win_rate"] for t in told]
    assert abs(statistics.median(r["value"] for r in rates) - true) < 0.05
    assert sum(r["low"] <= true <= r["high"] for r in rates) >= 0.92 * len(rates)


def round_of(n, verdict=None, **more):
    return {"round": n, **({"gate": {"verdict": verdict}} if verdict else {}), **more}


@pytest.mark.parametrize("before, games", [(0, 9), (1, 12), (2, 14), (3, 15)])
def test_each_gate_is_stricter_than_the_one_before(tmp_path, before, games):
    trainer = make(tmp_path / "run", None, gate=True)
    trainer.learner = Learner("main", right_with(1.0, "student"), right_with(0.0, "reference"))
    trainer.history = [round_of(0), *(round_of(n, "undecided") for n in range(1, before + 1))]
    trainer.round = before
    told = trainer.gate.decide(trainer)
    assert told["verdict"] == "accept" and told["decided"] == games == math.ceil(
        math.log(0.95 * 20 * (before + 1) * (before + 2)) / math.log(0.6 / 0.4)
    )


@pytest.mark.parametrize("verdict", ["undecided", "accept", "reject"])
def test_the_gate_asks_the_users_prompts_and_nothing_that_the_student_was_trained_on(
    tmp_path, tiny_folder, verdict, monkeypatch
):
    pool = [dict(prompt=f"say {i}", answer=i) for i in range(30)]
    gates = []
    asked = []
    play, ask = CompetitiveSelfPlay.train_step, SequentialGate.decide

    def spy(self, rows, *args, **kwargs):
        if self.n_samples == 1:
            asked.extend(row["prompt"] for row in rows)
        return play(self, rows, *args, **kwargs)

    def gate(self, run):
        asked.clear()
        told = ask(self, run)
        gates.append(set(asked))
        return told | {"verdict": verdict}

    monkeypatch.setattr(CompetitiveSelfPlay, "train_step", spy)
    monkeypatch.setattr(SequentialGate, "decide", gate)

    class Curriculum:
        "Trains on some of the pool, and leaves its own choice in the place of the prompts."

        trained = []

        def on_round_begin(self, trainer):
            trainer.prompts = pool[6 * trainer.round : 6 * trainer.round + 6]
            self.trained.append({p["prompt"] for p in trainer.prompts})

    for rounds in 1, 3:  # the second goes on with what the first one trained on
        trainer = make(tmp_path / "run", tiny_folder, None, [Curriculum()], gate=True, n_rounds=rounds)
        with pytest.warns(
            UserWarning, match="the gate found .* prompts that the student was not trained on, of 256"
        ):
            trainer.train(pool)
    for n, seen in enumerate(gates):
        since = set().union(*Curriculum.trained[0 if verdict == "undecided" else n : n + 1])
        assert seen == {p["prompt"] for p in pool} - since


def test_a_gated_run_renews_only_what_passed(tmp_path, tiny_folder):
    trainer = make(tmp_path / "run", tiny_folder, gate=True)
    start = None

    class See:
        def on_round_begin(self, trainer):
            nonlocal start
            start = start or trainer.reference.state()

    trainer.callbacks.append(See())
    trainer.train()
    assert [m["gate"]["verdict"] for m in trainer.history[1:]] == ["undecided"] * 2 and trainer.history[1][
        "gate"
    ]["prompts"] == 256
    assert (
        all(torch.equal(v, start[k]) for k, v in trainer.reference.state().items())
        and "best" not in trainer.marks
    )
    assert not all(torch.equal(v, start[k]) for k, v in trainer.student.state().items())


@pytest.mark.parametrize("verdict", ["accept", "reject", "undecided"])
def test_what_a_verdict_does(tmp_path, tiny_folder, verdict, monkeypatch):
    monkeypatch.setattr(SequentialGate, "decide", lambda self, run: dict(verdict=verdict))
    trainer, seen = make(tmp_path / "run", tiny_folder, gate=True), []

    class See:
        def on_stage(self, trainer, stage):
            if stage in ("sampling", "evaluation", "final"):
                seen.append([p.state() for p in (trainer.student, trainer.reference)])

    trainer.callbacks.append(See())
    trainer.train()

    def same(a, b):
        return all(torch.equal(v, b[k]) for k, v in a.items())

    (start, _), *after = seen[1:]  # the first evaluation is that of the start
    for student, reference in after:
        assert same(student, reference) == (verdict != "undecided") and same(reference, start) == (
            verdict != "accept"
        )
        assert same(student, start) == (verdict == "reject")
    assert (trainer.learner.optimizer is None) == (verdict == "reject") and trainer.marks.get("best") == (
        2 if verdict == "accept" else None
    )
    parts = make(tmp_path / "parts", tiny_folder, gate=True)
    parts.train(n_iterations=1)
    parts = make(tmp_path / "parts", tiny_folder, gate=True)
    parts.train()  # goes on as the whole run did
    assert all(
        same(a.state(), b.state())
        for a, b in [(parts.student, trainer.student), (parts.reference, trainer.reference)]
    )
    again = make(tmp_path / "run", tiny_folder, gate=True)
    again.train()
    assert same(again.student.state(), trainer.student.state()) and (again.learner.optimizer is None) == (
        verdict == "reject"
    )


def test_a_rejected_students_games_do_not_count_for_its_reference(tmp_path, tiny_folder, monkeypatch):
    verdicts = iter(["accept", "reject", "undecided"] * 3)
    monkeypatch.setattr(SequentialGate, "decide", lambda self, run: dict(verdict=next(verdicts)))

    def play(name, *rounds):
        for n in rounds:
            trainer = make(tmp_path / name, tiny_folder, gate=True, opponents="league", n_rounds=n)
            trainer.train()
            if n == 2:
                assert trainer.league.elo["main"] == trainer.league.elo["league_0"] and set(
                    trainer.league.win_rates("main")
                ) == {0.5}
        return trainer

    whole, parts = play("whole", 3), play("parts", 1, 2, 3)
    assert whole.league.state() == parts.league.state() and [m.name for m in whole.league.members] == [
        "base",
        "league_0",
    ]
    games = [r for r in whole.league.rows if r["a"] == "main"]
    assert len(games) == 18 and sum(map(len, whole.league._live.values())) == 6


def verdicts_of_a_control(folder, middle):
    "Of gates of a student that wins nearly every game, where chance says who wins."
    settings = dict(gate=True, gate_win_rate=middle, judge="random", n_rounds=12, update_reference_every=3)
    trainer = make(folder, None, **settings)
    trainer.learner = Learner("main", right_with(0.9, "student"), right_with(0.1, "reference"))
    told = []
    for trainer.config.seed in range(60):
        told.append(trainer.gate.decide(trainer)["verdict"])
    return told


def test_the_gate_of_a_control_knows_nothing(tmp_path):
    told = verdicts_of_a_control(tmp_path / "run", 0.5)
    accepted, rejected = told.count("accept"), told.count("reject")
    assert accepted + rejected > 40
    assert abs(accepted - rejected) <= 2 * math.sqrt(accepted + rejected), told  # as coins fall


def test_a_strict_gate_of_a_control_rejects(tmp_path):
    told = verdicts_of_a_control(tmp_path / "run", 0.6)
    assert told.count("accept") <= 60 * 0.05 / 2 + 2 * math.sqrt(60 * 0.05 / 2), told
    assert told.count("reject") > 50


# vital signs


def test_vitals_of_a_new_policy(tiny):
    student = Policy(tiny, "student")
    prompts = [f"{i} + 1 =" for i in range(8)]
    start = vitals(student, prompts, 4, 12)
    assert (
        abs(start.kl.value) < 1e-5
        and alarms(start, start) == []
        and Vitals.from_dict(json.loads(json.dumps(start.to_dict()))) == start
    )


@pytest.mark.long
def test_vitals_tell_a_policy_that_breaks_from_one_that_learns():
    "On the real model, in the number format of the machine."
    real = Base.load(device="cpu")
    problems = ArithmeticTask(2).problems("train", 6)
    prompts, start = [p["prompt"] for p in problems], None

    def after(completions, **settings):
        nonlocal start
        student = Policy(real, "student")
        start = start or vitals(student, prompts, 4, 6, passages=PASSAGES[:12])
        update.sft(student, [dict(prompt=p, completion=c) for p, c in zip(prompts, completions)], **settings)
        now = vitals(student, prompts, 4, 6, passages=PASSAGES[:12])
        student.delete()
        return now

    learns = after([str(p["answer"]) for p in problems], num_train_epochs=4)
    breaks = after(["17"] * 6, learning_rate=4e-3, num_train_epochs=8)
    assert alarms(learns, start) == [] and learns.kl.low > 0
    assert any("collapsed" in a and "17" in a for a in alarms(breaks, start)) and any(
        "forgetting" in a for a in alarms(breaks, start)
    )
    assert breaks.kl.low > learns.kl.high and alarms(start, breaks) == []


@pytest.mark.parametrize("on_alarm", ["warn", "stop", "rollback"])
def test_an_alarm_has_its_consequence(tmp_path, tiny_folder, on_alarm, monkeypatch):
    seen = []

    # from the third evaluation on
    def rings(now, start):
        seen.append(1)
        return ["collapsed: everything is 17"] * (len(seen) > 2)

    monkeypatch.setattr("selfplay_nb.loop.trainer.alarms", rings)
    trainer = make(tmp_path / "run", tiny_folder, watch=True, on_alarm=on_alarm, n_rounds=6)
    trainer.train()
    assert [bool(m["alarms"]) for m in trainer.history][:3] == [False, False, True]
    if on_alarm == "warn":
        assert trainer.round == 6 and not trainer.stopped
    if on_alarm == "stop":
        assert trainer.round == 2 and trainer.stopped == "collapsed: everything is 17"
    if on_alarm == "rollback":
        assert (
            trainer.round == 4
            and trainer.stopped == "rolled back three times in a row: collapsed: everything is 17"
        )
        assert [m.get("rolled_back_to") for m in trainer.history] == [None, None, 1, 1, 1] and trainer.marks[
            "best"
        ] <= 1
        rate = SelfPlayConfig().learning_rate
        assert [m.get("changed") for m in trainer.history[2:]] == [
            None,
            {"learning_rate": rate / 2},
            {"learning_rate": rate / 4},
        ]
        healthy = Policy.load(
            trainer.base, tmp_path / "run" / "checkpoints" / "round_001" / "student", "healthy"
        ).state()
        assert all(torch.equal(v, healthy[k]) for k, v in trainer.student.state().items())


# a person's wishes


def test_pause_stop_and_change(tmp_path, tiny_folder):
    whole = make(tmp_path / "whole", tiny_folder, n_rounds=3)
    whole.train()
    paused = make(tmp_path / "run", tiny_folder, None, [Live()], n_rounds=3)
    thread = threading.Thread(target=paused.train)
    thread.start()

    def live():
        try:
            return json.loads((tmp_path / "run" / "live.json").read_text())
        except (OSError, ValueError):
            return {}

    until = time.time() + 120
    while live().get("round") != 1 and time.time() < until:
        time.sleep(0.01)
    control(tmp_path / "run", pause=True)
    while not live().get("paused") and time.time() < until:
        time.sleep(0.01)
    stage = live()["stage"]
    time.sleep(0.5)
    assert live()["paused"] and live()["stage"] == stage and thread.is_alive() and live()["memory_mb"] > 10
    control(tmp_path / "run", pause=False, set={"learning_rate": 2e-4, "r": 8})
    while not live().get("refused") and time.time() < until:
        time.sleep(0.01)
    assert "['r'] cannot change" in live()["refused"]
    control(tmp_path / "run", set={"learning_rate": 2e-4})
    thread.join(120)
    assert live()["refused"] == "" and live()["stage"] == "finished" and read_control(tmp_path / "run") == {}
    changed = [m["round"] for m in paused.history if "changed" in m]
    assert (
        len(changed) == 1
        and paused.config.learning_rate == 2e-4
        and paused.given.learning_rate == SelfPlayConfig().learning_rate
    )
    assert paused.history[1]["loss"] == whole.history[1]["loss"]
    more = make(tmp_path / "run", tiny_folder, n_rounds=4)
    more.train()
    assert more.config.learning_rate == 2e-4 and more.round == 4


def test_stop_after_this_round(tmp_path, tiny_folder):
    class Wish:
        def on_stage(self, trainer, stage):
            control(trainer.dir, stop=True) if trainer.round == 1 and stage == "training" else None

    stopped = make(tmp_path / "run", tiny_folder, None, [Wish(), Live()], n_rounds=4)
    stopped.train()
    assert (
        stopped.round == 2
        and stopped.stopped == "stopped by hand"
        and json.loads((tmp_path / "run" / "live.json").read_text())["stage"] == "stopped by hand"
    )
    again = make(tmp_path / "run", tiny_folder, None, [Live()], n_rounds=4)
    again.train()
    assert again.round == 4 and not again.stopped


def test_trackers(tmp_path, tiny_folder):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    make(tmp_path / "run", tiny_folder, None, [ReportTo("tensorboard")], n_rounds=1).train()
    [file] = (tmp_path / "run").rglob("events.out.tfevents*")
    events = EventAccumulator(str(file))
    events.Reload()
    assert any("accuracy/value" in tag for tag in events.Tags()["scalars"])


def test_flat():
    assert flat({"a": 1, "b": {"c": 2.0, "d": {"e": 3}}, "f": "text", "g": True, "h": None}) == {
        "a": 1,
        "b/c": 2.0,
        "b/d/e": 3,
    }


# a long run


def test_a_long_run_stays_small_and_fast(tmp_path, tiny_folder):
    import psutil

    n, seen = 24, []

    class See:
        def on_round_end(self, trainer, metrics):
            files = [f for f in trainer.dir.rglob("*") if f.is_file() and f.suffix not in (".jsonl", ".json")]
            seen.append(
                (len(files), sum(f.stat().st_size for f in files), psutil.Process().memory_info().rss / 1e6)
            )

    trainer = make(
        tmp_path / "run",
        tiny_folder,
        None,
        [See()],
        n_rounds=n,
        prompts_per_round=3,
        n_samples=3,
        eval_every=100,
    )
    random.seed(0)
    trainer.train()
    # two newest, the best, and one that is being written
    assert max(f for f, _, _ in seen) <= 4 * 3 and max(b for _, b, _ in seen) < 1.3e6, seen
    assert seen[-1][2] - seen[n // 2][2] < 10, seen  # MB
    assert {f.name for f in (tmp_path / "run" / "checkpoints").iterdir()} >= {
        f"round_{n - 1:03d}",
        f"round_{n:03d}",
    }
