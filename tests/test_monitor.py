"The monitor on real run folders: it shows what is there, and what a person presses happens."

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from filelock import FileLock

from selfplay_nb.cli import main
from selfplay_nb.loop.callbacks import Live, control, process_begun, read_control
from selfplay_nb.loop.trainer import SelfPlayConfig, SelfPlayTrainer
from selfplay_nb.models.policy import Base
from selfplay_nb.scoring.reward import as_reward, exact_number
from selfplay_nb.tasks.task import ArithmeticTask
from selfplay_nb.views.monitor import Background, Monitor, headline, run_state


class Letters(ArithmeticTask):
    reward = property(lambda self: as_reward(lambda p, r: sum(map(ord, r)) % 97))
    verifier = property(lambda self: exact_number)


def trainer(folder, tiny_folder, **changes):
    settings = (
        dict(
            n_rounds=4,
            prompts_per_round=4,
            n_samples=4,
            max_new_tokens=12,
            eval_size=4,
            eval_every=1,
            update_reference_every=1,
            gate=False,
        )
        | changes
    )
    base = Base.load(tiny_folder, dtype=torch.float32, device="cpu")
    return SelfPlayTrainer(
        SelfPlayConfig(str(folder), **settings), base=base, task=Letters(), callbacks=[Live()]
    )


def wait(until, seconds=120):
    end = time.time() + seconds
    while not until():
        assert time.time() < end
        time.sleep(0.02)


def test_a_run_is_held_changed_and_stopped(tmp_path, tiny_folder):
    run = Background(trainer(tmp_path / "run", tiny_folder))
    monitor = Monitor(tmp_path / "run", every=0.05)
    thread = monitor.watch()
    wait(lambda: monitor.state["history"])
    monitor.pause.click()
    wait(lambda: monitor.state["live"]["paused"])
    assert (
        ": paused;" in monitor.status.value
        and monitor.pause.description == "Go on"
        and not monitor.stop.disabled
        and run.is_alive()
    )
    assert (*monitor.setting.options,) == (
        "learning_rate",
        "beta",
        "sft_weight",
        "temperature",
    ) and monitor.setting.value == "learning_rate"
    monitor.setting.value = "beta"
    assert monitor.value.value == "0.1"
    monitor.value.value = "a lot"
    monitor.apply.click()
    assert "&#x27;a lot&#x27; is no number" in monitor.said.value and read_control(tmp_path / "run") == {
        "pause": True
    }
    monitor.value.value = "-1"
    monitor.apply.click()
    wait(lambda: "beta=-1.0" in monitor.said.value and "Not changed" in monitor.said.value)
    monitor.value.value = "0.2"
    monitor.apply.click()
    wait(lambda: not read_control(tmp_path / "run").get("set"))
    monitor.stop.click()
    run.join(120)
    thread.join(10)
    held = run.trainer.history
    assert (
        run.error is None
        and run.trainer.stopped == "stopped by hand"
        and len(held) < 5
        and not thread.is_alive()
    )
    assert "stopped by hand" in headline(monitor.state) and monitor.pause.disabled and monitor.stop.disabled
    assert "data:image/png" in monitor.curve.value and "text/html" in monitor._still()


def test_what_went_wrong_is_shown(tmp_path, tiny_folder):
    done = trainer(tmp_path / "run", tiny_folder, n_rounds=1)
    done.train()
    file = tmp_path / "run" / "metrics.jsonl"
    rows = file.read_text().splitlines()
    row = json.loads(rows[-1]) | {
        "alarms": ["collapsed: <b>9 %</b> left"],
        "unjudged": {"share": 0.25, "first": "ValueError, <i>no</i>"},
    }
    file.write_text("\n".join([rows[0], json.dumps(row)]) + "\n")
    monitor = Monitor(tmp_path / "run")
    said = monitor.alarms.value
    assert (
        "collapsed: &lt;b&gt;9 %" in said
        and "25 % of the answers could not be judged" in said
        and "<i>" not in said
    )
    assert (
        monitor.look() is False
        and ": finished;" in headline(monitor.state)
        and "chosen" in monitor.pair.value
    )


def test_a_process_that_is_gone(tmp_path, tiny_folder):
    done = trainer(tmp_path / "run", tiny_folder, n_rounds=1)
    done.train()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    file = tmp_path / "run" / "live.json"
    live = json.loads(file.read_text())
    for pid, alive in (gone.pid, False), (os.getpid(), True):
        file.write_text(json.dumps(live | {"stage": "training", "pid": pid}))
        assert (
            run_state(tmp_path / "run")["alive"] is alive
            and (": not running;" in headline(run_state(tmp_path / "run"))) is not alive
        )
    file.write_text("{")
    assert headline(run_state(tmp_path / "run")) == "The run has not begun."
    with pytest.raises(ValueError, match="holds no run"):
        Monitor(tmp_path)


def test_an_error_of_a_run_in_the_background_is_kept(tmp_path, tiny_folder):
    (tmp_path / "thesis.txt").write_text("years of work")
    run = Background(trainer(tmp_path, tiny_folder))
    run.join(60)
    assert isinstance(run.error, ValueError) and "left alone" in str(run.error)


def test_a_word_from_the_command_line(tmp_path, tiny_folder, monkeypatch, capsys):
    # it is for good, and these are in this process
    monkeypatch.setattr("selfplay_nb.cli._keep_freed_memory", lambda: None)
    done = trainer(tmp_path / "run", tiny_folder, n_rounds=1)
    done.train()

    def tell(*args):
        main(["control", *args])

    with pytest.raises(SystemExit, match="is not running.*finished"):
        tell("--run-dir", str(tmp_path / "run"), "--stop")
    assert read_control(tmp_path / "run") == {} and "Told" not in capsys.readouterr().out
    # as while it runs
    file = tmp_path / "run" / "live.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"stage": "training"}))
    tell("--run-dir", str(tmp_path / "run"), "--pause", "--set", "learning_rate=1e-4")
    assert (
        read_control(tmp_path / "run") == {"pause": True, "set": {"learning_rate": 1e-4}}
        and "Told" in capsys.readouterr().out
    )
    tell("--run-dir", str(tmp_path / "run"), "--no-pause", "--stop")
    assert read_control(tmp_path / "run") == {"stop": True, "set": {"learning_rate": 1e-4}}
    for wish, said in (
        (["--set", "r=8"], "'r'. cannot change"),
        (["--set", "learning_rate=1e308"], "from 0 to 1"),
        ([], "nothing to tell"),
    ):
        with pytest.raises(SystemExit, match=said):
            tell("--run-dir", str(tmp_path / "run"), *wish)
    assert read_control(tmp_path / "run") == {"stop": True, "set": {"learning_rate": 1e-4}}
    with pytest.raises(SystemExit, match="holds no run"):
        tell("--run-dir", str(tmp_path), "--stop")
    with pytest.raises(SystemExit):
        tell("--set", "x")
    assert "expected NAME=NUMBER" in capsys.readouterr().err
    control(tmp_path / "run", set=None)


HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture
def folder(tmp_path):
    "Of a run, as far as a monitor can see."
    (tmp_path / "config.json").write_text("{}")

    def put(live, metrics=""):
        (tmp_path / "live.json").write_text(live if isinstance(live, str) else json.dumps(live))
        (tmp_path / "metrics.jsonl").write_text(metrics)
        return tmp_path

    return put


LIVE = dict(
    pid=os.getpid(),
    round=1,
    total=3,
    stage="sampling",
    paused=False,
    tokens_per_second=1.0,
    memory_mb=1.0,
    seconds_left=3.0,
    settings={"beta": 0.1},
    last_pair=None,
    stopping="",
    refused="",
)


@pytest.mark.parametrize(
    "live",
    [
        "[1]",
        "[" * 100_000,
        "{",
        LIVE | dict(tokens_per_second="x"),
        {k: v for k, v in LIVE.items() if k != "stage"},
        LIVE | dict(pid=-1),
        LIVE | dict(pid=2**70),
        LIVE | dict(settings=[1]),
        LIVE | dict(last_pair={"prompt": []}),
        LIVE | dict(round="one"),
        LIVE | dict(last_pair=dict(prompt=3, chosen=None, rejected=[])),
        {k: HOSTILE for k in LIVE},
        LIVE
        | dict(
            last_pair=dict(prompt=HOSTILE, chosen=HOSTILE, rejected=HOSTILE),
            refused=HOSTILE,
            settings={HOSTILE: 0.1},
        ),
    ],
)
def test_a_monitor_falls_over_nothing(folder, live):
    acc = dict(value=0.5, low=0.1, high=0.9, n=5)
    rows = [
        dict(round=HOSTILE, accuracy=acc, alarms=["x"]),
        dict(round=1, alarms=[HOSTILE], unjudged=dict(share=0.5, first=HOSTILE)),
        [1],
        dict(round=2, alarms=None),
    ]
    monitor = Monitor(folder(live, "".join(json.dumps(r) + "\n" for r in rows) + '{"round": 3, "acc'))
    shown = "".join(
        w.value for w in (monitor.status, monitor.said, monitor.alarms, monitor.pair, monitor.curve)
    )
    assert (
        HOSTILE not in shown
        and headline(monitor.state)
        and [m["round"] for m in monitor.state["history"]] == [1, 2]
        and "<b>Round 1</b>" in shown
    )


def test_a_process_number_that_was_given_again_is_no_life(folder):
    mine = process_begun(os.getpid())
    assert (
        run_state(folder(LIVE | dict(begun=mine)))["alive"]
        and not run_state(folder(LIVE | dict(begun=mine - 60)))["alive"]
    )


@pytest.mark.parametrize(
    "wish",
    [
        "{",
        "[1]",
        '{"set": ["learning_rate"]}',
        '{"set": "x"}',
        '{"set": 5}',
        '{"set": {"self": 1}}',
        '{"set": {"run_dir": "/"}}',
        '{"set": {"learning_rate": 1e308}}',
        '{"set": {"learning_rate": Infinity}}',
        '{"set": {"beta": "a"}}',
        '{"set": {"beta": {"a": 1}}}',
        '{"set": {"beta": true}}',
        "[" * 100_000,
        "\x00",
        '{"set": {"beta": ' + "9" * 400 + "}}",
        '{"set": {"beta": ' + "9" * 5000 + "}}",
        '{"stop": "no"}',
        '{"pause": "no"}',
    ],
)
def test_no_wish_breaks_a_run(tmp_path, wish):
    run = SelfPlayTrainer(SelfPlayConfig(str(tmp_path / "run")), base=object(), callbacks=[])
    run.dir.mkdir()
    live = Live()
    live.on_train_begin(run, 3)
    (run.dir / "control.json").write_text(wish)
    live._obey(run)
    assert (
        run.changes == {}
        and run.stopped == ""
        and bool(live.refused) == (wish.startswith('{"set"') and "9" * 5000 not in wish)
    )


def test_a_run_does_not_wait_for_whoever_holds_its_control(tmp_path):
    run = SelfPlayTrainer(SelfPlayConfig(str(tmp_path / "run")), base=object(), callbacks=[])
    run.dir.mkdir()
    live = Live()
    live.on_train_begin(run, 3)
    control(run.dir, stop=True)
    with FileLock(run.dir / ".control.lock"):
        begun = time.time()
        thread = threading.Thread(target=live._obey, args=(run,))
        thread.start()
        thread.join(20)
    assert not thread.is_alive() and time.time() - begun < 20 and run.stopped == ""
    live._obey(run)
    assert run.stopped == "stopped by hand"


def test_a_clock_that_is_set_back_does_not_stop_the_heartbeat(tmp_path, monkeypatch):
    run = SelfPlayTrainer(SelfPlayConfig(str(tmp_path / "run")), base=object(), callbacks=[])
    run.dir.mkdir()
    live, now = Live(), time.time()
    live.on_train_begin(run, 3)
    monkeypatch.setattr("time.time", lambda: now - 3600)
    time.sleep(1.1)
    live.on_progress(run, 1, 10)
    assert json.loads((run.dir / "live.json").read_text())["time"] == now - 3600
