"Where learners start from: the base, an adapter, or what demonstrations taught"

import json
import shutil

import pytest
import torch

from selfplay_nb import SelfPlayConfig, SelfPlayTrainer, as_task
from selfplay_nb.games.play import find_move
from selfplay_nb.models.policy import Base, Policy
from selfplay_nb.models.update import sft

GAME = dict(
    game="sticks",
    method="reinforce",
    n_rounds=1,
    prompts_per_round=2,
    eval_size=2,
    eval_every=1,
    max_new_tokens=3,
    update_reference_every=1,
    gate=False,
    r=4,
)


def trainer(folder, tiny_folder, task=None, callbacks=(), **settings):
    base = Base.load(tiny_folder, dtype=torch.float32, device="cpu")
    config = SelfPlayConfig(str(folder), **settings)
    return SelfPlayTrainer(config, base, task=task, callbacks=list(callbacks))


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_warm_up_is_supervised_training_on_legal_moves(tmp_path, tiny_folder):
    t = trainer(tmp_path / "run", tiny_folder, warm_up=60, **GAME)
    t.train(n_iterations=0)
    rows = t.arena.demonstrations(t, 60)
    assert len(rows) == 60
    for row in rows:
        there = int(row["prompt"][-1]["content"].split()[2])
        assert find_move(row["completion"], ["1", "2", "3"][:there]) == row["completion"]
    by_hand = Policy(t.base, "by_hand", r=4, seed=0)
    sft(by_hand, rows, seed=t.seed("warm-up", 0))
    assert equal(t.student.state(), by_hand.state())
    assert equal(t.student.state(), t.reference.state())
    assert any(w.abs().sum() > 0 for k, w in t.student.state().items() if "lora_B" in k)
    assert equal(t.student.state(), Policy.load(t.base, tmp_path / "run" / "start", "again").state())


def test_no_warm_up_changes_nothing(tmp_path, tiny_folder):
    t = trainer(tmp_path / "run", tiny_folder, **GAME)
    t.train(n_iterations=0)
    assert equal(t.student.state(), Policy(t.base, "new", r=4, seed=0).state())
    assert not (tmp_path / "run" / "start").exists()


class Break:
    "Stops the run at the first stage of a name."

    def __init__(self, name):
        self.name = name

    def on_stage(self, run, stage):
        if stage == self.name:
            raise InterruptedError("killed")


@pytest.mark.parametrize("where", ["evaluation", "saving", "playing"])
def test_a_run_that_died_after_its_warm_up_goes_on_as_if_it_had_not(tmp_path, tiny_folder, where):
    settings = GAME | dict(warm_up=20)
    whole = trainer(tmp_path / "whole", tiny_folder, **settings)
    whole.train()
    broken = trainer(tmp_path / "broken", tiny_folder, callbacks=[Break(where)], **settings)
    with pytest.raises(InterruptedError):
        broken.train()
    resumed = trainer(tmp_path / "broken", tiny_folder, **settings)
    resumed.train()
    assert equal(whole.student.state(), resumed.student.state())
    lines = [(tmp_path / name / "samples.jsonl").read_text() for name in ("whole", "broken")]
    assert lines[0] == lines[1] != ""


def test_every_learner_starts_from_the_warm_up_and_comes_back_to_it(tmp_path, tiny_folder):
    settings = GAME | dict(warm_up=20, opponents="league", learners="main, main_exploiter")
    t = trainer(tmp_path / "run", tiny_folder, **settings)
    t.train(n_iterations=0)
    main, exploiter = t.learners
    assert equal(main.policy.state(), exploiter.policy.state())
    assert equal(main.policy.state(), exploiter.reference.state())
    start = {k: w.clone() for k, w in main.policy.state().items()}
    t.train(n_iterations=1)  # after which the exploiter begins anew
    assert equal(t.learners[1].policy.state(), start)
    t.start_anew()
    assert not (tmp_path / "run").exists() or not (tmp_path / "run" / "start").exists()


ROWS = [dict(prompt=f"Say {w}.", completion=w) for w in "one two three four five six seven eight".split()]
SMALL = dict(n_rounds=1, prompts_per_round=2, n_samples=2, eval_every=1, eval_size=2, max_new_tokens=3, r=4)


def test_a_task_is_warmed_up_by_its_demonstrations(tmp_path, tiny_folder):
    right = lambda prompt, answer, completion: float(answer == completion)
    t = trainer(tmp_path / "run", tiny_folder, as_task(ROWS, reward=right), warm_up=4, gate=False, **SMALL)
    t.train(n_iterations=0)
    rows = t.arena.demonstrations(t, 4)
    assert len(rows) == 4 and all(r in ROWS for r in rows)
    assert not any(t.asks(r) for r in rows)
    bare = as_task([r["prompt"] for r in ROWS], reward=lambda prompt, answer: 1.0)
    lacking = trainer(tmp_path / "bare", tiny_folder, bare, warm_up=4, gate=False, **SMALL)
    with pytest.raises(ValueError, match="warm-up imitates the column 'completion'"):
        lacking.train()
    assert not (tmp_path / "bare" / "config.json").exists()


def test_a_run_starts_from_an_adapter(tmp_path, tiny_folder):
    first = trainer(tmp_path / "first", tiny_folder, warm_up=20, **GAME)
    first.train()
    folder = first.student.save(tmp_path / "adapter")
    settings = GAME | dict(start_from=str(folder))
    t = trainer(tmp_path / "second", tiny_folder, **settings)
    t.train(n_iterations=0)
    assert equal(t.student.state(), first.student.state())
    assert equal(t.reference.state(), first.student.state())
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    trainer(tmp_path / "second", tiny_folder, **settings | dict(start_from=str(moved))).train(n_iterations=0)
    Policy(t.base, "other", r=4, seed=3).save(folder)
    with pytest.raises(ValueError, match="start"):
        trainer(tmp_path / "second", tiny_folder, **settings).train(n_iterations=1)
    with pytest.raises(ValueError, match="expected an adapter folder"):
        trainer(tmp_path / "third", tiny_folder, **GAME | dict(start_from=str(tmp_path)))


def test_moves_that_would_be_cut_off_are_told_before_anything_is_played(tmp_path, tiny_folder):
    t = trainer(tmp_path / "run", tiny_folder, **GAME | dict(max_new_tokens=1))
    with pytest.raises(ValueError, match="max_new_tokens=1 cuts off moves of sticks: '1' takes 2 tokens"):
        t.train()
    assert not (tmp_path / "run" / "config.json").exists()  # so that the same folder takes a better setting
    again = trainer(tmp_path / "run", tiny_folder, **GAME)
    again.train(n_iterations=0)
    assert [m["round"] for m in again.history] == [0]


def test_an_illegal_move_may_cost_less(tmp_path, tiny_folder):
    t = trainer(tmp_path / "run", tiny_folder, illegal="random", **GAME)
    t.train(n_iterations=0)
    assert t.task.illegal == "random"
    games = t.task.play([t.student, t.reference], t.task.problems("train", 2), max_new_tokens=3)
    assert all(g.forfeit is None and g.moves for g in games)


def test_illegal_moves_are_the_advice(tmp_path, tiny_folder):
    t = trainer(tmp_path / "run", tiny_folder, **GAME)
    with pytest.warns(UserWarning, match=r"moves were illegal, such as .*warm_up=256"):
        t.train()
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["illegal"] == last["turns"] > 0
