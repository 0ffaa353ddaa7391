"The monitor on real run folders: it shows what is there, and what a person presses happens."
import json
import os
import subprocess
import sys
import time

import pytest
import torch

from selfplay_nb.__main__ import main
from selfplay_nb.callbacks import Live, control, read_control
from selfplay_nb.monitor import Background, Monitor, headline, run_state
from selfplay_nb.policy import Base
from selfplay_nb.reward import as_reward, exact_number
from selfplay_nb.tasks import ArithmeticTask
from selfplay_nb.trainer import SelfPlayConfig, SelfPlayTrainer


class Letters(ArithmeticTask):
    reward = property(lambda self: as_reward(lambda p, r: sum(map(ord, r)) % 97))
    verifier = property(lambda self: exact_number)


def trainer(folder, tiny_folder, **changes):
    settings = dict(n_rounds=4, prompts_per_round=4, n_samples=4, max_new_tokens=12, exam_size=4, exam_every=1, renew_every=1, gate=False) | changes
    base = Base.load(tiny_folder, dtype=torch.float32, device="cpu")
    return SelfPlayTrainer(SelfPlayConfig(str(folder), **settings), base=base, task=Letters(), callbacks=[Live()])


def wait(until, seconds=120):
    end = time.time() + seconds
    while not until():
        assert time.time() < end
        time.sleep(.02)


def test_a_run_is_held_changed_and_stopped(tmp_path, tiny_folder):
    run = Background(trainer(tmp_path/"run", tiny_folder))
    monitor = Monitor(tmp_path/"run", every=.05); thread = monitor.watch()
    wait(lambda: monitor.state["history"])
    monitor.pause.click(); wait(lambda: monitor.state["live"]["paused"])
    assert ": paused;" in monitor.status.value and monitor.pause.description == "Go on" and not monitor.stop.disabled and run.is_alive()
    assert (*monitor.setting.options,) == ("learning_rate", "beta", "sft_weight", "temperature") and monitor.setting.value == "learning_rate"
    monitor.setting.value = "beta"
    assert monitor.value.value == "0.1"
    monitor.value.value = "a lot"; monitor.apply.click()
    assert "&#x27;a lot&#x27; is no number" in monitor.said.value and read_control(tmp_path/"run") == {"pause": True}
    monitor.value.value = "-1"; monitor.apply.click(); wait(lambda: "beta=-1.0" in monitor.said.value and "Not changed" in monitor.said.value)
    monitor.value.value = "0.2"; monitor.apply.click(); wait(lambda: not read_control(tmp_path/"run").get("set"))
    monitor.stop.click(); run.join(120); thread.join(10)
    held = run.trainer.history
    assert run.error is None and run.trainer.stopped == "stopped by hand" and len(held) < 5 and not thread.is_alive()
    assert "stopped by hand" in headline(monitor.state) and monitor.pause.disabled and monitor.stop.disabled
    assert "data:image/png" in monitor.curve.value and "text/html" in monitor._still()


def test_what_went_wrong_is_shown(tmp_path, tiny_folder):
    done = trainer(tmp_path/"run", tiny_folder, n_rounds=1); done.train()
    file = tmp_path/"run"/"metrics.jsonl"; rows = file.read_text().splitlines()
    row = json.loads(rows[-1]) | {"alarms": ["collapsed: <b>9 %</b> left"], "unjudged": {"share": .25, "first": "ValueError, <i>no</i>"}}
    file.write_text("\n".join([rows[0], json.dumps(row)]) + "\n")
    monitor = Monitor(tmp_path/"run")
    said = monitor.alarms.value
    assert "collapsed: &lt;b&gt;9 %" in said and "25 % of the answers could not be judged" in said and "<i>" not in said
    assert monitor.look() is False and ": finished;" in headline(monitor.state) and "chosen" in monitor.pair.value


def test_a_process_that_is_gone(tmp_path, tiny_folder):
    done = trainer(tmp_path/"run", tiny_folder, n_rounds=1); done.train()
    gone = subprocess.Popen([sys.executable, "-c", ""]); gone.wait()
    file = tmp_path/"run"/"live.json"; live = json.loads(file.read_text())
    for pid, alive in (gone.pid, False), (os.getpid(), True):
        file.write_text(json.dumps(live | {"stage": "training", "pid": pid}))
        assert run_state(tmp_path/"run")["alive"] is alive and (": not running;" in headline(run_state(tmp_path/"run"))) is not alive
    file.write_text("{")
    assert headline(run_state(tmp_path/"run")) == "The run has not begun."
    with pytest.raises(ValueError, match="holds no run"):
        Monitor(tmp_path)


def test_an_error_of_a_run_in_the_background_is_kept(tmp_path, tiny_folder):
    (tmp_path/"thesis.txt").write_text("years of work")
    run = Background(trainer(tmp_path, tiny_folder)); run.join(60)
    assert isinstance(run.error, ValueError) and "left alone" in str(run.error)


def test_a_word_from_the_command_line(tmp_path, tiny_folder, monkeypatch, capsys):
    monkeypatch.setattr("selfplay_nb.__main__._keep_freed_memory", lambda: None)  # it is for good, and these are in this process
    done = trainer(tmp_path/"run", tiny_folder, n_rounds=1); done.train()
    def tell(*args): main(["control", *args])
    tell("--run-dir", str(tmp_path/"run"), "--pause", "--set", "learning_rate=1e-4")
    assert read_control(tmp_path/"run") == {"pause": True, "set": {"learning_rate": 1e-4}}
    tell("--run-dir", str(tmp_path/"run"), "--no-pause", "--stop")
    assert read_control(tmp_path/"run") == {"stop": True, "set": {"learning_rate": 1e-4}}
    with pytest.raises(SystemExit, match="holds no run"): tell("--run-dir", str(tmp_path))
    with pytest.raises(SystemExit): tell("--set", "x")
    assert "expected NAME=NUMBER" in capsys.readouterr().err
    control(tmp_path/"run", set=None)
