"""SIGTERM and SIGHUP, as a preempted machine or a closed terminal sends them, end a run as Ctrl-C does:
whole, readable, and to be gone on with.
"""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from selfplay_nb.loop.pipeline import RLHFOrchestrator
from selfplay_nb.tasks.task import ArithmeticTask

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
SMALL = (
    "--n-rounds 400 --prompts-per-round 4 --n-samples 2 --eval-size 4 --eval-every 100 --no-gate"
    " --update-reference-every 1 --max-new-tokens 4"
).split()


def ended_by(number, run, model):
    """Begin a run from the command line, send it a signal in a round, and return how it ended, what it said
    last, and what its folder says.
    """
    command = [
        sys.executable,
        "-m",
        "selfplay_nb",
        "train",
        "--run-dir",
        str(run),
        "--model-name",
        str(model),
        *SMALL,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}

    def as_from_a_terminal():  # whoever runs the tests in the background has some of them ignored
        for each in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
            signal.signal(each, signal.SIG_DFL)

    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        preexec_fn=as_from_a_terminal,
    )
    try:
        end = time.monotonic() + 120
        while (
            not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < 3
        ):
            assert time.monotonic() < end and process.poll() is None, process.communicate()[0][-1000:]
            time.sleep(0.1)
        process.send_signal(number)
        said = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    return process.returncode, said, json.loads((run / "live.json").read_text())["stage"]


def test_a_run_of_the_command_line(tmp_path, tiny_folder):
    names = "SIGINT", "SIGTERM", "SIGHUP"
    with ThreadPoolExecutor() as threads:
        ends = dict(
            zip(
                names,
                threads.map(
                    lambda name: ended_by(getattr(signal, name), tmp_path / name, tiny_folder), names
                ),
            )
        )
    for name, (code, said, stage) in ends.items():
        assert "Traceback" not in said and stage == "interrupted", (name, said[-1000:])
        assert (tmp_path / name / "report.html").exists() and [
            *(tmp_path / name / "checkpoints").glob("round_*")
        ]
        assert code == 128 + getattr(signal, name)
    last = {
        name: [
            line
            for line in said.replace("\r", "\n").splitlines()
            if "Stopped" in line or "Interrupted" in line
        ]
        for name, (_, said, _) in ends.items()
    }
    assert last["SIGINT"] and len({len(lines) for lines in last.values()}) == 1  # each says what Ctrl-C says


# batches that were scored, and the signal that comes with the second
asked = []
told = []


class Task(ArithmeticTask):
    @property
    def reward(self):
        return lengths


def lengths(prompts, completions, **columns):
    asked.append(len(prompts))
    if len(asked) == 2:
        signal.raise_signal(told[0])
    return [float(len(c)) for c in completions]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_stage_of_the_pipeline(tiny, tmp_path, name):
    number = getattr(signal, name)
    if signal.getsignal(number) is not signal.SIG_DFL:
        pytest.skip(f"{name} has another use here")
    asked[:], told[:] = [], [number]
    tiny.model.generation_config.eos_token_id = [*range(2, 35)]
    games = dict(n_games=32, n_samples=2, batch=4)

    def begin():
        return RLHFOrchestrator(
            tmp_path / "run",
            tiny,
            Task(2),
            eval_size=8,
            validation_size=0,
            r=2,
            max_new_tokens=4,
            progress=False,
        )

    with pytest.raises(SystemExit) as ended:
        begin().run_self_play(**games)
    assert ended.value.code == 128 + number and signal.getsignal(number) is signal.SIG_DFL
    assert tiny.adapters == []  # nothing is left on the base, and the folder is free
    again = begin()
    again.run_self_play(**games)
    assert again.stages[1].metrics["games"] == 32
