"""The command line: files of a user's own are loaded as Python loads them, and what is wrong is said before
long work begins.
"""

import argparse
import json
import sys

import pytest

from selfplay_nb import cli
from selfplay_nb.core.checkpoint import content
from selfplay_nb.core.pairs import load_rows

PROMPTS = "".join(json.dumps(dict(prompt=f"Name {k} things.")) + "\n" for k in range(20))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("selfplay_nb.cli._keep_freed_memory", lambda: None)
    before = set(sys.modules)
    (tmp_path / "q.jsonl").write_text(PROMPTS)
    yield tmp_path
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if file.startswith(str(tmp_path)):
            del sys.modules[name]


def test_files_are_loaded_as_python_loads_them(here):
    (here / "helper_beside.py").write_text("def score(answer): return 2.0\n")
    (here / "sib.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from helper_beside import score\n"
        "count = []\n"
        "@dataclass\n"
        "class Kept:\n"
        "    letter: str = 'e'\n"
        "def reward(prompt, answer): return score(answer)\n"
        "def right(prompt, answer): return float(Kept().letter in answer)\n"
    )
    reward, right = cli.named_in("sib.py:reward"), cli.named_in("sib.py:right")
    assert reward("p", "a") == 2 and right("p", "e") == 1
    assert reward.__globals__ is right.__globals__  # run once
    import pickle

    assert pickle.loads(pickle.dumps(reward)) is reward  # other processes find it by its name
    (here / "sib.py").write_text("def reward(prompt, answer): return 3.0\n")
    import os

    os.utime(here / "sib.py", (1, 1))
    assert cli.named_in("sib.py:reward")("p", "a") == 3


@pytest.mark.parametrize(
    "text, says", [("import sys\nsys.exit(0)\n", "SystemExit"), ("1 / 0\n", "ZeroDivisionError")]
)
def test_a_file_that_cannot_be_run_is_said(here, text, says):
    (here / "broken_file.py").write_text(text)
    with pytest.raises(ValueError, match=f"broken_file.py could not be run: {says}"):
        cli.named_in("broken_file.py:reward")
    assert "broken_file" not in sys.modules


@pytest.mark.parametrize("name", ["code.py", "statistics.py", "plain_one.py"])
def test_a_changed_reward_is_another_reward(here, name):
    found = []
    for k in 1, 2:
        (here / name).write_text(f"def reward(prompt, answer): return {k}.0 * len(answer)\n")
        import os

        os.utime(here / name, (k, k))
        found.append(content(cli.named_in(f"{name}:reward")))
    assert found[0] != found[1] and "code" in found[0]


def test_a_changed_helper_module_is_another_reward(here):
    found = []
    for k in 1, 2:
        (here / "helper_two.py").write_text(f"LIMIT = {k}\ndef score(answer): return {k}.0\n")
        (here / "uses_it.py").write_text(
            "import helper_two\ndef reward(prompt, answer): return helper_two.score(answer)\n"
        )
        import os

        os.utime(here / "uses_it.py", (k, k))
        sys.modules.pop("helper_two", None)
        sys.path_importer_cache.clear()
        sys.dont_write_bytecode, kept = True, sys.dont_write_bytecode
        found.append(content(cli.named_in("uses_it.py:reward")))
        sys.dont_write_bytecode = kept
    assert found[0] != found[1]


def settings(**given):
    import dataclasses

    from selfplay_nb.loop.trainer import SelfPlayConfig

    names = [f.name for f in dataclasses.fields(SelfPlayConfig)]
    options = dict.fromkeys([*names, "prompts", "reward", "verifier", "task", "held_out", "config"])
    return argparse.Namespace(**options | given)


def test_a_file_of_settings_holds_what_the_options_hold(here):
    (here / "mine_one.py").write_text("def judge(prompt, a, b): return len(a) < len(b)\n")
    (here / "run.yaml").write_text("judge: mine_one.py:judge\nprompts: q.jsonl\nn_rounds: 2\nheld_out: 0.5\n")
    args = settings(config="run.yaml")
    config = cli.settings_of(args)
    task = cli.task_of(args)
    assert config.judge == "rule" and config.n_rounds == 2
    assert repr(task) == "PromptTask('q': 10 train and 10 held-out prompts)"
    (here / "run.yaml").write_text("judge: random\n")
    assert cli.settings_of(settings(config="run.yaml")).judge == "random"
    assert cli.settings_of(settings(config="run.yaml", judge="rule")).judge == "rule"


@pytest.mark.parametrize(
    "text",
    [
        "learners: [main]",
        "learners: 3",
        "collect: [compete]",
        "collect: {compete: 0.7}",
        "start_from: 3",
        "null: 3\n1: 2",
        "run_dir: 5",
        "run_dir: null",
        "game: 3",
        "model_name: null",
        "n_round: 3",
    ],
)
def test_wrong_settings_are_said_in_words(here, text):
    (here / "run.yaml").write_text(text + "\n")
    with pytest.raises(ValueError, match="expected"):
        cli.settings_of(settings(config="run.yaml"))


def test_a_share_without_prompts_is_refused(here):
    with pytest.raises(SystemExit, match="held-out without --prompts"):
        cli.main(["train", "--held-out", "0.5", "--run-dir", "r"])


def test_a_missing_extra_is_a_sentence(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyspiel", None)
    with pytest.raises(SystemExit, match=r'pip install "selfplay_nb\[games\]"'):
        cli.main(["train", "--game", "kuhn_poker", "--run-dir", "r"])


STAGES = {
    "a misspelled argument": ("self_play: {n_gmes: 8}", "n_gmes"),
    "an argument of nothing": ("selection: {x: 1}", "'x'"),
    "a word for a number": ("grpo: {kl: low}", "kl is 'low'"),
    "a text for a number": ("self_play: {n_games: '8'}", "n_games"),
    "a refiner's": ("self_play: {refinement_iterations: 1, refiner: {nonsense: 3}}", "nonsense"),
    "no file": ("dpo: {data: nix.jsonl}", "nix.jsonl"),
    "a misspelled setting": ("dpo: {data: pref.jsonl, learning_rat: 1}", "learning_rat"),
    "YAML's 1e-4": ("dpo: {data: pref.jsonl, learning_rate: 1e-4}", "learning_rate"),
    "no self-play before": ("dpo: {with_self_play: true}", "no self_play"),
    "no data": ("ipo", "no data"),
    "a share as a text": ("reward_model: {data: pref.jsonl, test_share: '0.2'}", "test_share"),
    "no rank": ("reward_model: {data: pref.jsonl, r: 0}", "r is 0"),
    "another kind of data": ("dpo: {data: q.jsonl}", "chosen"),
    "a misspelled judge": ("self_play: {judge: tsk}", "judge is 'tsk'"),
    "another misspelled judge": ("grpo: {judge: reward-model}", "judge is 'reward-model'"),
    "no reward model before": ("self_play: {judge: reward_model}", "no such stage stands before it"),
    "what the run holds already": ("dpo: {data: run/there.jsonl}", "chosen"),
}


@pytest.mark.parametrize("what", STAGES)
def test_a_wrong_stage_is_said_before_the_first_begins(here, what):
    stage, says = STAGES[what]
    (here / "mine_two.py").write_text(
        "def reward(prompt, answer): return float(len(answer))\ndef right(prompt, answer): return 1.0\n"
    )
    (here / "pref.jsonl").write_text(
        "".join(json.dumps(dict(prompt=f"q{k}", chosen="a", rejected="b")) + "\n" for k in range(8))
    )
    (here / "run").mkdir()
    (here / "run" / "there.jsonl").write_text((here / "q.jsonl").read_text())
    first = "- selection" if "before" in what else "- self_play: {n_games: 16}\n- selection"
    (here / "p.yaml").write_text(
        "run_dir: run\nmodel: no-such-model\nprompts: q.jsonl\nreward: mine_two.py:reward\n"
        f"verifier: mine_two.py:right\nstages:\n{first}\n- {stage}\n"
    )
    with pytest.raises(ValueError, match=says):
        cli.run_pipeline(here / "p.yaml")
    assert not list(here.glob("run/stages/*"))


@pytest.mark.parametrize("stages", ["{self_play: {n_games: 8}}", "3", "null", "[]"])
def test_stages_are_a_list(here, stages):
    (here / "p.yaml").write_text(f"run_dir: run\nmodel: no-such-model\nstages: {stages}\n")
    with pytest.raises(ValueError, match="stages"):
        cli.run_pipeline(here / "p.yaml")


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_file_in_another_encoding_is_named(here, encoding):
    text = '{"prompt": "a"}\n{"prompt": "é"}\n'
    (here / "w.jsonl").write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match=r"w.jsonl, line \d is not UTF-8"):
        load_rows(here / "w.jsonl", "prompts")
    (here / "w.jsonl").write_bytes(text.encode("utf-8-sig"))  # as Notepad writes it
    assert [r["prompt"] for r in load_rows(here / "w.jsonl", "prompts")] == ["a", "é"]


def test_measurements_refuse_a_foreign_file_at_once(here):
    from selfplay_nb.studies.costs import costs
    from selfplay_nb.studies.gpu import gpu_check

    (here / "mine.json").write_text('{"my": "file"}')
    (here / "mine.jsonl").write_text('{"my": "file"}\n')
    (here / "g.md").write_text("my notes")
    for out in "mine.json", "g.md", "g.json":
        with pytest.raises(ValueError, match="holds no table|name of a .json file"):
            gpu_check(["no such model"], out)
    with pytest.raises(ValueError, match="something else than measurements"):
        costs("mine.jsonl")


def test_each_file_has_the_helpers_beside_it(here):
    import os

    for k, folder in enumerate("ab", 1):
        (here / folder).mkdir()
        (here / folder / "helper_three.py").write_text(f"V = {k}.0\n")
        (here / folder / f"r{k}.py").write_text(
            "from helper_three import V\ndef reward(prompt, answer): return V\n"
        )
    assert cli.named_in("a/r1.py:reward")("", "") == 1
    assert cli.named_in("b/r2.py:reward")("", "") == 2
    (here / "a" / "helper_three.py").write_text("V = 30.0\n")
    os.utime(here / "a" / "r1.py", (1, 1))
    assert cli.named_in("a/r1.py:reward")("", "") == 30


def test_a_file_with_the_name_of_a_package_hides_nothing(here):
    import importlib

    (here / "sklearn.py").write_text("def reward(prompt, answer): return 1.0\n")
    (here / "my-reward.py").write_text("def reward(prompt, answer): return 2.0\n")
    before = importlib.util.find_spec("sklearn")
    if before and "sklearn" not in sys.modules:
        assert cli.named_in("sklearn.py:reward")("", "") == 1
        assert importlib.util.find_spec("sklearn").origin == before.origin
    assert cli.named_in("my-reward.py:reward")("", "") == 2


def test_data_that_an_earlier_stage_writes_and_skipped_stages_are_left_alone(here):
    (here / "mine_three.py").write_text(
        "def reward(prompt, answer): return float(len(answer))\ndef right(prompt, answer): return 1.0\n"
    )
    (here / "p.yaml").write_text(
        "run_dir: run\nmodel: no-such-model\nprompts: q.jsonl\nreward: mine_three.py:reward\n"
        "verifier: mine_three.py:right\nskip: [reward_model]\n"
        "stages:\n- reward_model: {data: nowhere.jsonl}\n- self_play\n- dpo: {data: run/pairs.jsonl}\n"
    )
    with pytest.raises((RuntimeError, ValueError), match="no-such-model"):  # the first to be missed
        cli.run_pipeline(here / "p.yaml")
