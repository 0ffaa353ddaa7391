"""Kill a run at many points, let it go on, and compare: `python tests/killed.py TINY_MODEL_FOLDER FOLDER
POINTS`.

The points are evenly spaced over everything a run does to its folder (each opening for writing, renaming,
linking, deleting, cutting) and over its stages. The processes are forks of one that has loaded the
libraries, so that a point costs a few seconds. Prints what differs, and `n of n equal`.
"""

import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import torch

from selfplay_nb.loop.trainer import SelfPlayConfig, SelfPlayTrainer
from selfplay_nb.models.policy import Base
from selfplay_nb.scoring.reward import as_reward, exact_number
from selfplay_nb.tasks.task import ArithmeticTask

WRITES = {
    "os.rename",
    "os.truncate",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "shutil.rmtree",
    "shutil.copyfile",
}


class Letters(ArithmeticTask):
    """Something that a random character model can be compared on; it also uses the common generator, which a
    resumed run must go on with.
    """

    reward = property(lambda self: as_reward(lambda p, r: sum(map(ord, r)) % 97 + random.random()))
    verifier = property(lambda self: exact_number)


class Points:
    "Counts what happens to a folder, and kills the process at the `at`-th."

    def __init__(self, folder, at):
        self.folder, self.at, self.n = str(folder), at, 0

    def on_stage(self, trainer, stage):
        self.count()

    def hook(self, event, args):
        if (
            event in WRITES
            or event == "open"
            and isinstance(args[2], int)
            and args[2] & (os.O_WRONLY | os.O_RDWR)
        ):
            if any(isinstance(a, (str, os.PathLike)) and os.fspath(a).startswith(self.folder) for a in args):
                self.count()

    def count(self):
        self.n += 1
        if self.n == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def run(base, folder, at=0):
    "In a child: a run, killed at a point; its exit status, and how many points there were."
    read, write = os.pipe()
    if child := os.fork():
        os.close(write)
        n = os.read(read, 100)
        os.close(read)
        return os.waitpid(child, 0)[1], int(n or 0)
    try:
        points = Points(folder, at)
        sys.addaudithook(points.hook)
        random.seed(1)
        config = SelfPlayConfig(
            str(folder),
            n_rounds=2,
            prompts_per_round=4,
            n_samples=4,
            max_new_tokens=12,
            eval_size=4,
            eval_every=2,
            opponents="league",
            league_size=2,
            learners="main, main_exploiter",
            update_reference_every=1,
            gate=False,
        )
        SelfPlayTrainer(config, base=base, task=Letters(), callbacks=[points]).train()
        os.write(write, str(points.n).encode())
    except BaseException as e:
        print(f"{type(e).__name__}: {e}", flush=True)
        os._exit(1)
    os._exit(0)


def timeless(metrics):
    "Without what a clock says."
    if isinstance(metrics, list):
        return [timeless(m) for m in metrics]
    if not isinstance(metrics, dict):
        return metrics
    return {k: timeless(v) for k, v in metrics.items() if "second" not in k}


def outcome(folder):
    "All that a run is: weights, optimizer, ratings, ledgers, metrics without their seconds."
    newest = max((folder / "checkpoints").iterdir())
    state = json.loads((newest / "state.json").read_text())
    history = timeless(state["history"])
    weights = {f.relative_to(newest).as_posix(): f.read_bytes() for f in newest.rglob("*.safetensors")}
    league = [(folder / "league" / n).read_bytes() for n in ("state.json", "games.jsonl")]
    return newest.name, weights, history, state["random"], league, (folder / "pairs.jsonl").read_bytes()


def main(tiny, folder, points):
    torch.set_num_threads(1)
    base = Base.load(tiny, dtype=torch.float32, device="cpu")
    folder = Path(folder)
    status, n = run(base, folder / "whole")
    assert status == 0 and n > points, (status, n)
    whole, equal = outcome(folder / "whole"), 0
    assert len(whole[1]) >= 5 and whole[-1]
    for k in range(points):
        at, mine = 1 + k * n // points, folder / f"killed_{k}"
        killed = os.waitstatus_to_exitcode(run(base, mine, at)[0])
        status, _ = run(base, mine)
        same = killed == -signal.SIGKILL and status == 0 and outcome(mine) == whole
        if not same:
            print(f"point {at} of {n}: killed {killed}, then {status}; the outcome differs", flush=True)
        equal += same
        if same:
            shutil.rmtree(mine)
    print(f"{equal} of {points} equal, {n} points in a run")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
