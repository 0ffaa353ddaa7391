"""Units of work on Ray's processes: their number changes nothing, a lost one costs nothing, and what was
finished is not done again.
"""

import copy
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import torch

from selfplay_nb.core.pairs import Ledger
from selfplay_nb.core.players import Scripted
from selfplay_nb.loop.collectors import Screen, Shares
from selfplay_nb.loop.game_rounds import GameMoves
from selfplay_nb.loop.pipeline import StageRun
from selfplay_nb.loop.rounds import Compete, Experience, Groups, Refine
from selfplay_nb.loop.trainer import SelfPlayConfig, SelfPlayTrainer
from selfplay_nb.methods.game_training import Sticks
from selfplay_nb.models.policy import Base, Policy
from selfplay_nb.models.reward_model import RewardModel
from selfplay_nb.scale.workers import (
    Spread,
    SpreadPlayer,
    UnitRun,
    Workers,
    joined,
    start_ray,
    units_of,
)
from selfplay_nb.scoring.evaluation import evaluate
from selfplay_nb.scoring.reward import Guarded
from selfplay_nb.tasks.task import ArithmeticTask

PROBLEMS = [dict(prompt=f"{i} + {i} =") for i in range(10)]
SAMPLING = dict(max_new_tokens=30, temperature=1.0)


def letters(prompts, completions, **columns):
    return [sum(map(ord, c)) % 97 / 97 for c in completions]


def noisy(base, name, seed):
    policy = Policy(base, name, seed=seed)
    g = torch.Generator().manual_seed(seed)
    policy.load_state({k: v + 0.1 * torch.randn(v.shape, generator=g) for k, v in policy.state().items()})
    return policy


def stage(base, reward=letters, seed=0):
    "A run of two policies that are made anew, always the same."
    for name in list(base.adapters):
        Policy.resident(base, name).delete()
    players = noisy(base, "student", 1), noisy(base, "reference", 2)
    return StageRun(*players, SAMPLING, 0, ("games", seed), Guarded(reward))


def alone(run, reward, unit):
    "The run of a unit in this process, which no worker has touched."
    players = run.student, run.reference, Guarded(reward)
    return UnitRun(*players, SAMPLING, 0, "main", None, None, None, unit.seed)


@pytest.fixture(scope="module")
def base(tiny_folder):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the workers have
    yield Base.load(tiny_folder, dtype=torch.float32, device="cpu")
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def crowd(base):
    "Three workers, of a Ray that has room for one more."
    started = start_ray(4)
    with Workers(3, base) as workers:
        yield workers
    if started:
        import ray

        ray.shutdown()


def some(crowd, n, kept=None):
    "`n` of the workers, as `Workers(n, base, kept=kept)` would have them."
    few = copy.copy(crowd)
    few.count, few.actors, few.used = n, crowd.actors[:n], copy.copy(crowd.used)
    few.used.clear()
    few.ledger = Ledger(kept, ("key", "made")) if kept else None
    few.known = {row["key"] for row in few.ledger.rows()} if kept else set()
    return few


# the number of workers


def config(folder, **changes):
    small = dict(n_rounds=2, prompts_per_round=10, eval_size=4, eval_every=2)
    small |= SAMPLING | dict(update_reference_every=1, gate=False)
    return SelfPlayConfig(str(folder), **small | changes)


class Sums(ArithmeticTask):
    reward = property(lambda self: letters)


def trained(folder, base, collectors, task=None, **changes):
    trainer = SelfPlayTrainer(config(folder, **changes), base, task or Sums(), [], collectors)
    trainer.train()
    return trainer, [(Path(folder) / f"{name}.jsonl").read_bytes() for name in ("pairs", "samples")]


def test_one_and_three_workers_write_the_same_ledgers(crowd, base, tmp_path):
    found = []
    for n in 1, 3:
        workers = some(crowd, n)
        parts = [Spread(Compete(4, 2), workers, 3), Spread(Groups(2), workers, 4)]
        trainer, ledgers = trained(tmp_path / str(n), base, parts)
        found.append((ledgers, trainer.student.state(), trainer.made_of))
        assert workers.used["done"] == 2 * (4 + 3)
    assert found[0][0][0].count(b"competitive") > 5 and found[0][0][1].count(b"group") == 40
    for ledgers, state, identity in found[1:]:
        assert ledgers == found[0][0]
        assert all(torch.equal(w, found[0][1][k]) for k, w in state.items())
        assert identity == found[0][2]  # so that a run goes on with another number


def mutter(prompt, rng):
    return "".join(rng.choice("abcd") for _ in range(5))


def test_one_and_three_workers_refine_alike(crowd, base):
    found = []
    for n in 1, 3:
        run = stage(base)
        run.student = Scripted(mutter, "mutterer")  # the tiny model does not end its answers
        found.append(Spread(Refine(3), some(crowd, n), 3).collect(run, PROBLEMS).pairs)
    assert len({p["chosen"] for p in found[0]}) > 5 and {p["source"] for p in found[0]} == {"refinement"}
    assert found[0] == found[1]
    [unit] = units_of(PROBLEMS, 10, run.seed("units"))
    here = Refine(3).collect(alone(run, letters, unit), PROBLEMS)
    assert here.pairs == Spread(Refine(3), some(crowd, 2), 10).collect(run, PROBLEMS).pairs != found[0]


def test_one_and_three_workers_play_the_same_games(crowd, base, tmp_path):
    found = []
    for n in 1, 3:
        parts = [Spread(GameMoves(), some(crowd, n), 2)]
        trainer, ledgers = trained(
            tmp_path / str(n), base, parts, Sticks(), method="reinforce", max_new_tokens=4, illegal="random"
        )
        found.append(ledgers)
        played = trainer.history[1]
        assert played["wins"] + played["draws"] + played["losses"] == 20 == played["win_rate"]["n"]
    assert found[0][1].count(b"\n") > 20
    assert found[1] == found[0]


def test_a_league_meets_each_opponent_once_a_unit(crowd, base, tmp_path):
    found = []
    for n in 1, 3:
        parts = [Spread(Compete(3, 2), some(crowd, n), 4)]
        trainer, ledgers = trained(tmp_path / str(n), base, parts, opponents="league", league_size=2)
        league = [r for r in trainer.league.ledger.rows() if "round" in r]
        assert len(league) == sum(sum(m["opponents"].values()) for m in trainer.history[1:]) > 10
        assert {r["b"] for r in league} == {"base", "league_0"}
        found.append((ledgers, league))
    assert found[0] == found[1]
    row = json.loads(found[0][0][0].split(b"\n")[0])
    assert row["opponent"] in ("base", "league_0")


def test_a_unit_is_what_the_collector_makes_of_it_here(crowd, base):
    run = stage(base)
    for collector in Compete(4, 2), Groups(4), Screen(4), Shares((Compete(2), 1), (Groups(2), 1)):
        [unit] = units_of(PROBLEMS[:4], 4, run.seed("units"))
        here = collector.collect(alone(run, letters, unit), unit.problems)
        there = Spread(collector, some(crowd, 2), 4).collect(run, PROBLEMS[:4])
        assert len(here)
        for name in "pairs", "answers", "scores", "advice", "by_reference":
            assert getattr(there, name) == getattr(here, name), name
        rates = there.metrics.keys() - {"tokens_per_second"}
        assert {k: there.metrics[k] for k in rates} == {k: here.metrics[k] for k in rates}


# what is lost


class Deadly:
    "A collector in which its process is killed, once at each of these points."

    def __init__(self, inner, folder, points):
        self.inner, self.folder, self.points = inner, str(folder), points

    def strike(self, point):
        if point not in self.points:
            return
        try:
            os.close(os.open(f"{self.folder}/{point}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)

    def collect(self, run, problems):
        which, told, steps = problems[0]["prompt"].split()[0], run.progress, iter(range(1000))

        def progress(answers, tokens):
            told(answers, tokens)
            self.strike(f"{which} step {next(steps)}")

        run.progress = progress
        self.strike(f"{which} before")
        made = self.inner.collect(run, problems)
        self.strike(f"{which} after")
        return made


# each costs some seconds: a worker loads its base again
FEW = ["2 step 5"]
MANY = "0 before,4 after,8 step 1,0 step 0,0 after,2 step 29,4 before,6 step 10,8 before".split(",")


@pytest.mark.parametrize("points", [FEW, pytest.param(MANY, marks=pytest.mark.long)], ids=["few", "many"])
def test_a_worker_killed_at_many_points_costs_nothing_and_doubles_nothing(crowd, base, tmp_path, points):
    run = stage(base)
    whole = Spread(Compete(4, 2), some(crowd, 2), 2).collect(run, PROBLEMS)
    told, asked = [], run.reward.asked
    run.bar = type("Bar", (), dict(update=lambda self, n: told.append(n)))()
    workers = some(crowd, 2, tmp_path / "units.jsonl")
    made = Spread(Deadly(Compete(4, 2), tmp_path, points), workers, 2).collect(run, PROBLEMS)
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".jsonl") == sorted(points)  # all struck
    assert len(made.pairs) > 3 and (made.pairs, made.scores) == (whole.pairs, whole.scores)
    rows = workers.ledger.rows()
    assert len(rows) == 5 == len({row["key"] for row in rows})
    assert sum(told) == 2 * 4 * 10 and run.reward.asked == 2 * asked


def test_a_unit_that_always_loses_its_process_is_given_up(crowd, base, tmp_path):
    workers = some(crowd, 1, tmp_path / "units.jsonl")
    workers.again = 0
    (tmp_path / "struck").mkdir()
    deadly = Deadly(Compete(2, 1), tmp_path / "struck", ["4 after"])
    with pytest.raises(RuntimeError, match="lost its process more than 0 times"):
        Spread(deadly, workers, 2).collect(stage(base), PROBLEMS)
    assert len(workers.ledger) == 2  # those before it are kept


DRIVER = """
import os, signal, sys
sys.path.insert(0, sys.argv[3])
import test_ray
from test_ray import *

class Bar:
    left = 3
    def update(self, n):
        Bar.left -= 1
        if not Bar.left:
            os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
base = Base.load(sys.argv[1], dtype=torch.float32, device="cpu")
run = stage(base)
run.bar = Bar()
Spread(Compete(4, 2), Workers(1, base, kept=sys.argv[2]), 2).collect(run, PROBLEMS)
"""


def test_a_killed_driver_goes_on_with_what_was_finished(crowd, base, tiny_folder, tmp_path):
    import ray

    there = dict(os.environ, RAY_ADDRESS=ray.get_runtime_context().gcs_address)
    kept = tmp_path / "units.jsonl"
    command = [sys.executable, "-c", DRIVER, str(tiny_folder), str(kept), str(Path(__file__).parent)]
    done = subprocess.run(command, env=there, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(Ledger(kept, ("key", "made"))) == 3
    workers = some(crowd, 2, kept)
    made = Spread(Compete(4, 2), workers, 2).collect(stage(base), PROBLEMS)
    assert workers.used == {"kept": 3, "done": 2}
    whole = Spread(Compete(4, 2), some(crowd, 3), 2).collect(stage(base), PROBLEMS)
    assert made.pairs == whole.pairs and made.scores == whole.scores


def test_an_error_is_the_users_own_and_what_was_finished_is_kept(crowd, base, tmp_path):
    class Picky:
        def collect(self, run, problems):
            if problems[0]["prompt"].startswith("6"):
                raise KeyError("no such thing")
            return Experience(scores=[[1.0]] * len(problems))

    workers = some(crowd, 1, tmp_path / "units.jsonl")
    with pytest.raises(KeyError, match="no such thing"):
        Spread(Picky(), workers, 2).collect(stage(base), PROBLEMS)
    assert len(workers.ledger) == 3


# keys


def other_letters(prompts, completions, **columns):
    return [sum(map(ord, c)) % 89 / 89 for c in completions]


def test_a_key_is_all_that_a_result_depends_on(crowd, base, tmp_path):
    kept = tmp_path / "units.jsonl"

    def again(collector=None, run=None, size=5, **changes):
        run = run or stage(base)
        for k, v in changes.items():
            setattr(run, k, v)
        workers = some(crowd, 2, kept)
        Spread(collector or Compete(2, 1), workers, size).collect(run, PROBLEMS)
        return workers.used["kept"]

    assert again() == 0
    assert again() == 2  # a control: the same again is taken from the file, by a new object too
    changed = stage(base)
    changed.student.load_state({k: v * 1.0001 for k, v in changed.student.state().items()})
    assert again(run=changed) == 0
    changed = stage(base)
    changed.reference.load_state(changed.student.state())
    assert again(run=changed) == 0
    assert again(run=stage(base, other_letters)) == 0
    assert again(run=stage(base, seed=1)) == 0
    assert again(Compete(2, 2)) == 0
    assert again(size=4) == 0
    assert again(round=1) == 0
    assert again(sampling=SAMPLING | dict(temperature=0.9)) == 0
    assert again() == 2


def test_a_unit_that_comes_twice_is_played_twice(crowd, base):
    made = Spread(Groups(2), some(crowd, 2), 2).collect(stage(base), PROBLEMS[:2] * 2)
    texts = [r["completion"] for r in made.answers]
    assert texts[:4] != texts[4:]
    assert [u.seed for u in units_of(PROBLEMS, 2, 7)] == [u.seed for u in units_of(PROBLEMS, 2, 7)]
    assert len({u.seed for u in units_of(PROBLEMS[:2] * 3, 2, 7)}) == 3


def test_units_are_put_together_in_their_order():
    parts = []
    for i, v in enumerate((0.0, 1.0, 1.0)):
        rates = dict(win_rate=dict(value=v, n=1), reward=v, abstained=None)
        parts.append(Experience([i], metrics=rates | dict(pairs=1, dropped={"empty": 1}), scores=[[v]]))
    made = joined(parts, [4, 4, 2])
    assert (made.pairs, made.metrics["pairs"], made.metrics["dropped"]) == ([0, 1, 2], 3, {"empty": 3})
    assert made.metrics["reward"] == pytest.approx(0.6) and made.metrics["abstained"] is None
    assert made.metrics["win_rate"]["value"] == pytest.approx(2 / 3) and made.metrics["win_rate"]["n"] == 3


# what is told on the way


def fails_at_times(prompts, completions, **columns):
    if any("x" in c for c in completions):
        raise OSError("out of order")
    return letters(prompts, completions)


def test_failures_and_warnings_come_home(crowd, base):
    run = stage(base, fails_at_times)
    with pytest.warns(UserWarning, match="pairs were dropped"):
        made = Spread(Compete(6, 2), some(crowd, 2), 5).collect(run, PROBLEMS)
    own = stage(base, fails_at_times).reward
    here = [s for unit in units_of(PROBLEMS, 5, run.seed("units")) for s in unit.problems]
    assert len(here) == 10 and run.reward.asked == 120
    assert 0 < sum(run.reward.failures.values()) < 120 and "out of order" in run.reward.first
    assert own.asked == 0 and len(made.scores) == 10


def test_a_reward_model_judges_on_the_workers_own_base(crowd, base):
    run = stage(base)
    model = RewardModel(base, "reward", seed=3)
    model.head.normal_(generator=torch.Generator().manual_seed(0))
    run.reward = Guarded(model)
    [unit] = units_of(PROBLEMS[:4], 4, run.seed("units"))
    here = Groups(3).collect(alone(run, model, unit), unit.problems)
    there = Spread(Groups(3), some(crowd, 1), 4).collect(run, PROBLEMS[:4])
    assert len({r["reward"] for r in here.answers}) > 6 and there.answers == here.answers


# a player


def test_an_evaluation_is_the_same(crowd, base, tmp_path):
    run, kept = stage(base), tmp_path / "units.jsonl"
    problems = ArithmeticTask(1).problems("held-out", 10)
    player = SpreadPlayer(run.student, some(crowd, 3, kept), 3)
    told = []
    spread = evaluate(player, problems, letters, progress=lambda n, tokens: told.append(n))
    assert spread == evaluate(run.student, problems, letters)
    assert sum(told) == 10 and len(told) == 4
    again = SpreadPlayer(run.student, some(crowd, 1, kept), 3)
    assert evaluate(again, problems, letters) == spread and again.workers.used == {"kept": 4}
    prompts = ["a", "b", "a", "c", "a"]
    for settings in dict(seed=5), dict(seed=[1, 2, 3, 4, 1], temperature=0.7, top_p=0.9):
        there = SpreadPlayer(run.student, some(crowd, 2), 1).sample(prompts, 2, 9, **settings)
        here = run.student.sample(prompts, 2, 9, **settings)
        assert there.texts == here.texts and there.n_tokens == here.n_tokens
        same = [dataclasses.asdict(s).keys() for row in there for s in row]
        assert same[0] == {"text", "token_ids", "logprobs", "finish_reason"}
    assert SpreadPlayer(run.student, some(crowd, 1)).generate("a", max_new_tokens=3) == run.student.generate(
        "a", max_new_tokens=3, seed=0
    )


# bad input


def test_bad_settings_are_errors_before_anything_is_loaded(base):
    for bad, words in [
        (dict(n=0), "n is 0"),
        (dict(n=1.5), "n is 1.5"),
        (dict(threads=0), "threads"),
        (dict(retries=-1), "retries"),
        (dict(gpus=-1), "gpus"),
        (dict(base="model"), "expected a Base"),
    ]:
        with pytest.raises(ValueError, match=words):
            Workers(**dict(n=1, base=base) | bad)


def test_what_cannot_be_sent_is_named(crowd, base):
    workers, lock = some(crowd, 1), threading.Lock()
    with pytest.raises(ValueError, match="the run's reward .*cannot be sent.*lock"):
        Spread(Groups(2), workers).collect(stage(base, lambda prompts, completions: [lock] * 2), PROBLEMS)
    with pytest.raises(ValueError, match="the collector Deadly cannot be sent"):
        Spread(Deadly(lock, "", ()), workers)
    with pytest.raises(ValueError, match="size is 0"):
        Spread(Groups(2), workers, 0)
    with pytest.raises(ValueError, match="2 seeds for 1 prompts"):
        SpreadPlayer(stage(base).student, workers).sample(["a"], seed=[1, 2])
    with pytest.raises(RuntimeError, match="closed"):
        Spread(Groups(2), some(crowd, 0)).collect(stage(base), PROBLEMS)


def test_another_base_is_refused(crowd, base, tiny_folder):
    other = Base.load(tiny_folder, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="on another base than the workers"):
        Spread(Groups(2), some(crowd, 1)).collect(stage(other), PROBLEMS)
    with pytest.raises(ValueError, match="take fewer"):
        Workers(9, base)  # as many places are not left
    other.model.model.embed_tokens.weight.data.add_(1)
    with pytest.raises(ValueError, match="it has other weights"):
        Workers(1, other)


def test_too_little_memory_is_said(base, monkeypatch):
    from selfplay_nb.scale import workers

    memory = type("Memory", (), dict(available=1.2e9, total=2e9))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(workers, "start_ray", lambda cpus: 1 / 0)
    with pytest.warns(UserWarning, match="3 workers .*need about 1.5 GB, and 1.2 GB are free: take 2"):
        with pytest.raises(ZeroDivisionError):
            Workers(3, base)


def test_without_ray(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"selfplay_nb\[scale\]"):
        Workers(1, base)


@pytest.mark.skipif("RAY_ADDRESS" in os.environ, reason="this Ray was not started here")
def test_nothing_is_sent_home_and_nobody_else_is_listened_to(crowd):
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    raylets = [p for p in psutil.Process().children(recursive=True) if "raylet" in p.name()]
    assert raylets
    for process in raylets:
        listening = [c.laddr.ip for c in process.net_connections("inet") if c.status == "LISTEN"]
        assert listening and {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
    assert "Workers(3" in repr(crowd) and "threads: 1" in repr(crowd)


def test_the_page_shows_a_configuration_that_accelerate_reads(tmp_path, monkeypatch):
    "FSDP2 needs GPUs; what it would be told there is known without them."
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env

    page = json.loads((Path(__file__).parents[1] / "nbs" / "scale" / "workers.ipynb").read_text())
    text = "\n".join("".join(c["source"]) for c in page["cells"] if c["cell_type"] == "markdown")
    [block] = re.findall(r"```yaml\n(compute_environment.*?)```", text, re.S)
    (tmp_path / "fsdp.yaml").write_text(block)
    given = launch_command_parser().parse_args(["--config_file", str(tmp_path / "fsdp.yaml"), "update.py"])
    given, *_ = _validate_launch_command(given)
    assert (given.num_processes, given.mixed_precision, given.use_fsdp) == (4, "bf16", True)
    for name, value in prepare_multi_gpu_env(given).items():
        if "FSDP" in name:
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward and plugin.activation_checkpointing
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"
