"The loop on the tiny model: it resumes bit for bit, refuses what it should, and leaves a readable run."

import dataclasses
import json
import math
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from selfplay_nb.cli import main
from selfplay_nb.core.pairs import Ledger
from selfplay_nb.loop.callbacks import default_callbacks, summary
from selfplay_nb.loop.trainer import SelfPlayConfig, SelfPlayTrainer
from selfplay_nb.methods.league import LeagueTraining
from selfplay_nb.models import update
from selfplay_nb.models.base import tiny_model_folder
from selfplay_nb.models.policy import Base, Policy
from selfplay_nb.scoring.reward import as_reward, exact_number
from selfplay_nb.tasks.task import ArithmeticTask

SMALL = dict(
    n_rounds=3,
    prompts_per_round=6,
    n_samples=6,
    max_new_tokens=30,
    eval_size=8,
    eval_every=1,
    temperature=1.0,
    update_reference_every=1,
    gate=False,
)


class Letters(ArithmeticTask):
    "A task that a random character model can be compared on: more of the letter e."

    reward = property(lambda self: as_reward(lambda p, r: sum(map(ord, r)) % 97))
    verifier = property(lambda self: exact_number)


def make(run_dir, folder, callbacks=(), **changes):
    base = Base.load(folder, dtype=torch.float32, device="cpu")
    return SelfPlayTrainer(
        SelfPlayConfig(str(run_dir), **SMALL | changes), base=base, task=Letters(), callbacks=list(callbacks)
    )


class Stop:
    "Raise in the middle of a run."

    def __init__(self, round, stage, error=KeyboardInterrupt):
        self.round, self.stage, self.error = round, stage, error

    def on_stage(self, trainer, stage):
        if trainer.round == self.round and stage == self.stage:
            raise self.error


def outcome(trainer):
    ledger = Ledger(trainer.dir / "pairs.jsonl").rows()
    plain = [{k: v for k, v in m.items() if "second" not in k} for m in trainer.history]
    return trainer.student.state(), trainer.reference.state(), trainer.learner.optimizer, ledger, plain


def equal(a, b):
    if isinstance(a, dict) and a and isinstance(next(iter(a.values())), torch.Tensor):
        return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    return a == b


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_folder):
    trainer = make(tmp_path_factory.mktemp("whole") / "run", tiny_folder)
    trainer.train()
    return outcome(trainer)


def test_a_run_does_something(whole):
    student, reference, optimizer, ledger, history = whole
    assert equal(student, reference) and ledger and optimizer
    assert [m["round"] for m in history] == [0, 1, 2, 3] and all(m["pairs"] for m in history[1:])


@pytest.mark.parametrize("stage", ["sampling", "training", "evaluation"])
@pytest.mark.parametrize("round", [0, 2])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(whole, tmp_path, tiny_folder, stage, round):
    stopped = make(tmp_path / "run", tiny_folder, [Stop(round, stage)])
    stopped.train()
    assert stopped.round < 3 and stopped.interrupted
    resumed = make(tmp_path / "run", tiny_folder)
    resumed.train()
    assert all(equal(a, b) for a, b in zip(whole, outcome(resumed), strict=True))


def test_a_crash_loses_the_round_and_no_more(whole, tmp_path, tiny_folder):
    with pytest.raises(OSError, match="disk"):
        make(tmp_path / "run", tiny_folder, [Stop(1, "training", OSError("disk"))]).train()
    resumed = make(tmp_path / "run", tiny_folder)
    resumed.train()
    assert all(equal(a, b) for a, b in zip(whole, outcome(resumed), strict=True))


def test_what_a_run_leaves(tmp_path, tiny_folder, capsys):
    trainer = make(tmp_path / "run", tiny_folder, default_callbacks())
    trainer.train()
    files = {f.name for f in (tmp_path / "run").iterdir()}
    assert {
        "config.json",
        "metrics.jsonl",
        "pairs.jsonl",
        "live.json",
        "curve.png",
        "report.html",
        "checkpoints",
        "evaluations",
        "against_base.json",
    } <= files
    newest = tmp_path / "run" / "checkpoints" / "round_003"
    assert sorted(f.name for f in newest.iterdir()) == [
        "manifest.json",
        "optimizer.safetensors",
        "reference",
        "state.json",
        "student",
    ]
    assert "| 3 |" in (newest / "student" / "README.md").read_text()
    assert "before" in summary(tmp_path / "run") and "win rate against the base" in summary(tmp_path / "run")
    assert "<table>" in (tmp_path / "run" / "report.html").read_text()
    out = capsys.readouterr()
    assert "round  3" in out.out + out.err and "tok/s" in out.err
    again = make(tmp_path / "run", tiny_folder)
    assert len(again.train()) == 4
    loaded = Policy.load(again.base, newest / "student", "loaded")
    assert equal(loaded.state(), again.student.state())


def test_an_interrupted_run_is_readable(tmp_path, tiny_folder, capsys):
    make(tmp_path / "run", tiny_folder, [*default_callbacks(), Stop(1, "training")]).train()
    assert "Rounds up to 1 are saved" in "".join(capsys.readouterr())
    assert "1 rounds" in summary(tmp_path / "run") and (tmp_path / "run" / "report.html").exists()


def test_another_configuration_is_refused_and_more_rounds_are_not(tmp_path, tiny_folder):
    make(tmp_path / "run", tiny_folder, n_rounds=1).train()
    with pytest.raises(ValueError, match="beta: 0.1 there, 0.5 now"):
        make(tmp_path / "run", tiny_folder, beta=0.5).train()
    assert len(make(tmp_path / "run", tiny_folder, n_rounds=2).train()) == 3


def test_two_writers(tmp_path, tiny_folder):
    class Second:
        def on_round_begin(self, trainer):
            with pytest.raises(RuntimeError, match="another process"):
                make(tmp_path / "run", tiny_folder).train()
            self.seen = True

    callback = Second()
    make(tmp_path / "run", tiny_folder, [callback], n_rounds=1).train()
    assert callback.seen


def test_start_anew_spares_a_strangers_folder(tmp_path, tiny_folder):
    (tmp_path / "thesis.txt").write_text("years of work")
    for act in SelfPlayTrainer.start_anew, SelfPlayTrainer.train:
        with pytest.raises(ValueError, match="left alone"):
            act(make(tmp_path, tiny_folder))
    trainer = make(tmp_path / "run", tiny_folder, n_rounds=1)
    trainer.train()
    trainer.start_anew()
    assert not (tmp_path / "run" / "config.json").exists() and (tmp_path / "thesis.txt").exists()


def test_a_reference_that_stays_for_two_rounds(tmp_path, tiny_folder):
    trainer = make(tmp_path / "run", tiny_folder, update_reference_every=2)
    trainer.train()
    assert trainer.history[-1]["pairs"]
    assert not equal(trainer.student.state(), trainer.reference.state())
    assert trainer.base.adapters == ["student", "reference"] or set(trainer.base.adapters) == {
        "student",
        "reference",
    }


@pytest.mark.parametrize("stage", ["sampling", "training", "evaluation", "saved"])
def test_a_run_with_a_league_goes_on_with_its_league(tmp_path, tiny_folder, stage, monkeypatch):
    league = dict(opponents="league", league_size=2)  # the third snapshot takes somebody's place
    whole = make(tmp_path / "whole", tiny_folder, **league)
    whole.train()
    if stage == "saved":  # between the trainer's state and the league's own
        kept, calls = LeagueTraining.save, []

        def save(self):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt  # made, rounds 0, 1, 2
            return kept(self)

        with monkeypatch.context() as m:
            m.setattr(LeagueTraining, "save", save)
            make(tmp_path / "parts", tiny_folder, **league).train()
        assert len(calls) == 4
    else:
        make(tmp_path / "parts", tiny_folder, [Stop(2, stage)], **league).train()
    parts = make(tmp_path / "parts", tiny_folder, **league)
    parts.train()
    assert all(equal(a, b) for a, b in zip(outcome(whole), outcome(parts)))
    assert whole.league.state() == parts.league.state() and whole.league.rows == parts.league.rows
    assert (
        [m.name for m in whole.league.members][0] == "base"
        and len(whole.league.members) == 3
        and parts.base.adapters == ["student", "reference"]
    )
    met = [m["opponents"] for m in whole.history[1:]]
    assert met[0] == {"base": 6} and all(sum(m.values()) == 6 for m in met)
    folders = [
        {
            f.relative_to(tmp_path / x): f.read_bytes()
            for f in (tmp_path / x / "league").rglob("*.safetensors")
        }
        for x in ("whole", "parts")
    ]
    assert folders[0] == folders[1] and len(folders[0]) == 2


def test_own_prompts(tmp_path, tiny_folder):
    mine = [dict(prompt=f"say {i}", answer=i) for i in range(9)]
    make(tmp_path / "other", tiny_folder, n_rounds=1).train(mine)
    assert {p["prompt"] for p in Ledger(tmp_path / "other" / "pairs.jsonl").rows()} <= {
        p["prompt"] for p in mine
    }


def test_own_prompts_are_looked_at_first(tmp_path, tiny_folder):
    trainer = make(tmp_path / "run", tiny_folder)
    for prompts, says in [
        ([], "no prompts"),
        ([dict(answer=1)], "row 0 has no column 'prompt'"),
        ([dict(prompt="a", answer=1), "b"], "row 1 of the prompts has"),
        ([trainer.eval_problems[3]], "row 0 of the prompts asks a held-out problem"),
        ("prompts.jsonl", "no file 'prompts.jsonl'"),
    ]:
        with pytest.raises(ValueError, match=says):
            trainer.train(prompts)
    assert not (tmp_path / "run").exists()


def test_a_held_out_question_is_refused_in_every_spelling(tmp_path, tiny_folder):
    trainer = make(tmp_path / "run", tiny_folder)
    held = trainer.eval_problems[3]["prompt"]
    question = held[-1]["content"]
    for row in (
        question,
        question.replace(" ", ""),
        held,
        held[-1:],
        dict(prompt=question, answer=1),
        [dict(role="system", content="Be brief."), held[-1]],
    ):
        with pytest.raises(ValueError, match="held-out problem"):
            trainer.train([row])


def test_prompts_come_in_every_container(tmp_path, tiny_folder):
    rows = [dict(prompt=f"say {i}", answer=i) for i in range(9)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    trainer = make(tmp_path / "run", tiny_folder)
    assert (
        trainer.check_prompts(str(file))
        == trainer.check_prompts(dict(train=rows))
        == trainer.check_prompts(rows)
        == rows
    )


def test_prompts_without_a_task_are_not_evaluated_on_sums(tmp_path):
    trainer = SelfPlayTrainer(SelfPlayConfig(str(tmp_path / "run")), callbacks=[])
    with pytest.raises(ValueError, match="come without a task.*task="):
        trainer.train(["Write a poem about the sea.", "Say 4."])
    assert trainer.check_prompts([dict(prompt="1000 + 1 =", answer=1001)])  # sums are what it evaluates


def test_a_task_whose_splits_are_one_is_refused(tmp_path):
    class One(Letters):
        def problems(self, split, n, seed=0):
            return super().problems("train", n, 0)

    with pytest.raises(ValueError, match="the two have to differ"):
        SelfPlayTrainer(SelfPlayConfig(str(tmp_path / "run")), task=One(), callbacks=[])


def test_no_two_rounds_of_two_seeds_meet(tmp_path):
    def drawn(seed, round):
        trainer = SelfPlayTrainer(SelfPlayConfig(str(tmp_path / "run"), seed=seed), callbacks=[])
        return json.dumps(trainer.draw(round))

    assert (
        len({drawn(seed, round) for seed in (0, 1, 2, 1000) for round in (0, 1, 999, 1000, 1001, 2000)}) == 24
    )


# the same run


class Kind(Letters):
    reward = property(lambda self: as_reward(lambda p, r: sum(map(ord, r)) % 89))


def test_another_run_is_refused_with_a_sentence(tmp_path, tiny_folder, monkeypatch):
    make(tmp_path / "run", tiny_folder, n_rounds=1).train()
    base = Base.load(tiny_folder, dtype=torch.float32, device="cpu")

    def again(task=None, base=base, **changes):
        return SelfPlayTrainer(
            SelfPlayConfig(str(tmp_path / "run"), **SMALL | changes),
            base=base,
            task=task or Letters(),
            callbacks=[],
        ).train()

    before = {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()}
    other = Base.load(tiny_model_folder(tmp_path / "other", seed=5), dtype=torch.float32, device="cpu")
    for said, given in [
        ("task.system: 'You add numbers.' there, 'Add.' now", dict(task=Letters(system="Add."))),
        ("reward", dict(task=Kind())),
        ("base: '[0-9a-f]+' there", dict(base=other)),
        ("task.shots: 2 there, 0 now", dict(task=Letters(shots=0))),
    ]:
        with pytest.raises(ValueError, match=f"another configuration .*{said}"):
            again(**given)
    with monkeypatch.context() as m:
        m.setitem(update.DPO, "per_device_train_batch_size", 4)
        with pytest.raises(ValueError, match="update.per_device_train_batch_size: 16 there, 4 now"):
            again()
    assert {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()} == before
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    for text, said in (
        ("{", "damaged"),
        (json.dumps(config | {"format": 99}), "format 99"),
        (json.dumps(config | {"kind": "pipeline"}), "holds 'pipeline'"),
    ):
        (tmp_path / "run" / "config.json").write_text(text)
        with pytest.raises(ValueError, match=said):
            again()
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    shutil.copytree(tiny_folder, tmp_path / "moved")
    # another folder, the same weights
    assert len(again(n_rounds=1, base=Base.load(tmp_path / "moved", dtype=torch.float32, device="cpu"))) == 2


def test_a_signal_to_end_is_an_interruption(tmp_path, tiny_folder):
    class Told:
        def on_stage(self, trainer, stage):
            signal.raise_signal(signal.SIGTERM) if stage == "training" else None

    trainer = make(tmp_path / "run", tiny_folder, [Told(), *default_callbacks()])
    with pytest.raises(SystemExit):
        trainer.train()
    assert trainer.interrupted and trainer.round == 0 and (tmp_path / "run" / "report.html").exists()


def test_a_report_that_fails_does_not_hide_why_the_run_did(tmp_path, tiny_folder):
    class Report:
        def on_train_end(self, trainer):
            raise FileNotFoundError("no metrics")

    with (
        pytest.raises(OSError, match="disk is full"),
        pytest.warns(UserWarning, match="a callback failed too.*no metrics"),
    ):
        make(
            tmp_path / "run", tiny_folder, [Stop(0, "saving", OSError("the disk is full")), Report()]
        ).train()
    with pytest.raises(FileNotFoundError):
        make(tmp_path / "other", tiny_folder, [Report()], n_rounds=0).train()


def test_members_of_a_league_meet_when_one_joins(tmp_path, tiny_folder):
    trainer = make(tmp_path / "run", tiny_folder, opponents="nash", league_size=2)
    trainer.train()
    league = trainer.league
    names = [m.name for m in league.members]
    assert len(names) == 3 and all(
        len(league.between(a, b)) == 6 for i, a in enumerate(names) for b in names[:i]
    )
    assert not np.allclose(league.payoff(), 0.5)


def test_a_round_that_teaches_nothing_says_so(tmp_path, tiny_folder):
    class Same(Letters):
        reward = property(lambda self: as_reward(lambda p, r: 0.5))

    with pytest.warns(
        UserWarning, match="round 1: no pair to learn from: the reward was 0.5 for every answer"
    ):
        SelfPlayTrainer(
            SelfPlayConfig(str(tmp_path / "run"), **SMALL | {"n_rounds": 2}),
            base=Base.load(tiny_folder, dtype=torch.float32, device="cpu"),
            task=Same(),
            callbacks=[],
        ).train()


def test_a_task_that_is_too_small_is_known_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="fewer than 200 different held-out"):
        SelfPlayTrainer(SelfPlayConfig(str(tmp_path / "run"), level=1))


def options(settings):
    "Of the command line."
    named = [("--" + k.replace("_", "-"), v) for k, v in settings.items()]
    return [
        x for o, v in named for x in ([o if v else "--no-" + o[2:]] if isinstance(v, bool) else [o, str(v)])
    ]


def test_a_killed_run_ends_as_one_that_was_not(tmp_path, tiny_folder):
    small = options(SMALL)

    def start(name):
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "selfplay_nb",
                "train",
                "--model-name",
                str(tiny_folder),
                "--run-dir",
                str(tmp_path / name),
                *small,
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    whole = start("whole")
    assert whole.wait() == 0
    run, begun = start("killed"), time.time()
    seen = tmp_path / "killed" / "pairs.jsonl"
    while run.poll() is None and time.time() - begun < 60 and not seen.exists():
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL  # or it was over, and nothing was shown
    assert start("killed").wait() == 0

    def files(name):
        folder = tmp_path / name / "checkpoints" / "round_003"
        return {f.relative_to(folder): f.read_bytes() for f in folder.rglob("*.safetensors")}, (
            tmp_path / name / "pairs.jsonl"
        ).read_bytes()

    assert files("whole") == files("killed") and len(files("whole")[0]) == 3


def test_bad_configuration_names_all_fields():
    with pytest.raises(ValueError, match="n_samples=0.*beta=nan.*judge='vibes'|judge"):
        SelfPlayConfig(n_samples=0, beta=float("nan"), judge="vibes").check()
    for bad in (
        dict(n_rounds=-1),
        dict(r=1.5),
        dict(eval_size=True),
        dict(temperature=-1.0),
        dict(opponents="nobody"),
        dict(league_size=0),
        dict(level=77),
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            SelfPlayConfig(**bad).check()


def test_command_line(tmp_path, tiny_folder, monkeypatch, capsys):
    command = [
        "train",
        "--model-name",
        str(tiny_folder),
        "--run-dir",
        str(tmp_path / "run"),
        *options(SMALL),
        "--n-rounds",
        "1",
    ]
    first = subprocess.run([sys.executable, "-m", "selfplay_nb", *command], capture_output=True, text=True)
    assert first.returncode == 0 and "before" in first.stdout, first.stderr
    # it is for good, and these are in this process
    monkeypatch.setattr("selfplay_nb.cli._keep_freed_memory", lambda: None)
    main(command)
    assert "Going on after round 1" in capsys.readouterr().out
    main([*command, "--fresh"])
    assert "Going on" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="beta: 0.1 there, 2.0 now"):
        main([*command, "--beta", "2"])
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (
        saved.items()
        >= dataclasses.asdict(
            SelfPlayConfig(str(tmp_path / "run"), str(tiny_folder), **SMALL | {"n_rounds": 1})
        ).items()
    )


def test_exploiters_learn_and_join_the_league(tmp_path, tiny_folder):
    trainer = make(
        tmp_path / "run",
        tiny_folder,
        n_rounds=3,
        opponents="league",
        learners="main, main_exploiter, league_exploiter",
        league_size=12,
    )
    began = None

    class Look:
        def on_train_begin(self, trainer, total):
            nonlocal began
            began = [learner.policy.state() for learner in trainer.learners]

    trainer.callbacks = [Look()]
    history = trainer.train()
    assert [learner.role for learner in trainer.learners] == ["main", "main_exploiter", "league_exploiter"]
    for number, role in enumerate(["main_exploiter", "league_exploiter"], 1):
        told = [m["learners"][role] for m in history[1:]]
        assert all(math.isfinite(m["loss"]) and m["pairs"] for m in told)
        joined = [m for m in trainer.league.members if m.role == role]
        assert len(joined) == 3
        # what joined is not what it began as, and not the main agent
        for member in joined:
            weights = Policy.load(trainer.base, member.folder, "look").state()
            trainer.base.policy("look").delete()
            assert not equal(weights, began[number]) and not equal(weights, trainer.student.state())
    # a main exploiter meets the main agent's newest snapshot, or before there is one anybody, and begins anew
    met = [m["learners"]["main_exploiter"]["opponents"] for m in history[2:]]
    main = {m.name for m in trainer.league.members if m.role == "main"}
    assert all(set(names) <= main for names in met)
    assert equal(trainer.learners[1].policy.state(), began[1])
    rows = Ledger(trainer.dir / "pairs.jsonl").rows()
    assert {r.get("learner") for r in rows} == {None, "main_exploiter", "league_exploiter"}
    trainer.league.unload()


def test_after_an_error_in_an_exploiters_turn_the_main_agent_is_seen(tmp_path, tiny_folder):
    class Fails:
        def on_stage(self, trainer, stage):
            if stage == "main_exploiter":
                raise KeyboardInterrupt

    settings = dict(opponents="league", learners="main, main_exploiter")
    trainer = make(tmp_path / "run", tiny_folder, [Fails()], **settings)
    trainer.train()
    assert trainer.interrupted and trainer.role == "main" and trainer.student.name == "student"


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(learners="main_exploiter"), "expected 'main', and after it"),
        (dict(learners="main, boss"), "expected 'main', and after it"),
        (dict(learners="main, main"), "expected 'main', and after it"),
        (dict(learners="main, main_exploiter"), "give opponents='league'"),
    ],
)
def test_learners_are_checked(settings, said):
    with pytest.raises(ValueError, match=said):
        SelfPlayConfig(**settings).check()


def test_precision_and_attention_are_settings(tmp_path, tiny_folder):
    "A run in whole weights with another attention; another setting is another run."
    config = SelfPlayConfig(
        str(tmp_path / "run"),
        model_name=str(tiny_folder),
        load_in_4bit=False,
        dtype="float32",
        attn_implementation="eager",
        **SMALL | dict(n_rounds=1),
    )
    trainer = SelfPlayTrainer(config, task=Letters(), callbacks=[])
    history = trainer.train()
    assert history[1]["pairs"] and math.isfinite(history[1]["loss"])
    assert trainer.base.model.config._attn_implementation == "eager"
    assert {p.dtype for p in trainer.base.model.parameters()} == {torch.float32}
    with pytest.raises(ValueError, match="attn_implementation"):
        SelfPlayTrainer(dataclasses.replace(config, attn_implementation="sdpa"), task=Letters()).train()
    with pytest.raises(ValueError, match="dtype='half'"):
        dataclasses.replace(config, dtype="half").check()
