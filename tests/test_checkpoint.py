"Checkpoints are whole or not there; damage is found; a killed run ends as one that was not."

import ast
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import selfplay_nb
from selfplay_nb.core import checkpoint
from selfplay_nb.core.checkpoint import (
    content,
    differences,
    forget_run,
    locked,
    newest_whole,
    numbered,
    prune,
    random_states,
    read_record,
    run_record,
    set_random_states,
    signals_interrupt,
    verify,
    weights_sum,
    write_record,
    writing,
)
from selfplay_nb.loop.trainer import SelfPlayConfig, SelfPlayTrainer
from selfplay_nb.methods.constitutional import ConstitutionalRewardWrapper, Principle
from selfplay_nb.models.policy import Base
from selfplay_nb.scoring.reward import WeightedReward, as_reward, exact_number, near_number
from selfplay_nb.tasks.task import ArithmeticTask, as_task

HERE = Path(__file__).parent


def put(parent, n, size=1000):
    with writing(parent / f"round_{n}") as tmp:
        (tmp / "sub").mkdir()
        (tmp / "sub" / "weights").write_bytes(bytes([n]) * size)
        (tmp / "state.json").write_text(json.dumps({"n": n}))


def test_whole_or_not_at_all(tmp_path):
    put(tmp_path, 1)
    for at in "before", "after":
        with pytest.raises(KeyError), writing(tmp_path / "round_1") as tmp:
            if at == "after":
                (tmp / "state.json").write_text("{}")
            raise KeyError
        assert verify(tmp_path / "round_1").keys() == {"state.json", "sub/weights"} and [
            f.name for f in tmp_path.iterdir()
        ] == ["round_1"]
    put(tmp_path, 1, 5)
    assert (tmp_path / "round_1" / "sub" / "weights").read_bytes() == b"\x01" * 5


@pytest.mark.parametrize("call", ["rename", "_seal", "_flush"])
def test_an_error_anywhere_leaves_what_was_there(tmp_path, monkeypatch, call):
    put(tmp_path, 1)

    def fail(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path if call == "rename" else checkpoint, call, fail)
    with pytest.raises(OSError, match="round_1 was not written"):
        put(tmp_path, 1, 7)
    monkeypatch.undo()
    assert verify(tmp_path / "round_1") and (tmp_path / "round_1" / "sub" / "weights").stat().st_size == 1000


@pytest.mark.parametrize("how", ["flip", "cut", "grow", "gone"])
def test_damage_of_every_file_is_found_and_the_one_before_is_taken(tmp_path, how):
    for n in 1, 2:
        put(tmp_path / "whole", n)
    names = [
        f.relative_to(tmp_path / "whole" / "round_2")
        for f in (tmp_path / "whole" / "round_2").rglob("*")
        if f.is_file()
    ]
    assert len(names) == 3
    for i, name in enumerate(names):
        parent = tmp_path / str(i)
        shutil.copytree(tmp_path / "whole", parent)
        file = parent / "round_2" / name
        data = file.read_bytes()
        k = data.index(b"1") if name.name == "manifest.json" else len(data) // 2
        if how == "gone":
            file.unlink()
        else:
            file.write_bytes(
                {
                    "flip": data[:k] + bytes([data[k] ^ 1]) + data[k + 1 :],
                    "cut": data[:-1],
                    "grow": data + b"}",
                }[how]
            )
        with pytest.warns(UserWarning, match="round_2.*(damaged|missing).*before"):
            assert newest_whole(parent).name == "round_1"
        shutil.rmtree(parent / "round_1")
        with pytest.warns(UserWarning), pytest.raises(ValueError, match="none of the 1 checkpoints"):
            newest_whole(parent)


def test_a_file_outside_counts_up_to_its_length(tmp_path):
    ledger = tmp_path / "pairs.jsonl"
    ledger.write_text("one\n")
    with writing(tmp_path / "run" / "round_1", beside=[ledger]) as tmp:
        (tmp / "a").write_text("a")
    ledger.write_text("one\ntwo\n")
    verify(tmp_path / "run" / "round_1")
    for text in "onE\ntwo\n", "one":
        ledger.write_text(text)
        with pytest.raises(ValueError, match="pairs.jsonl"):
            verify(tmp_path / "run" / "round_1")


def test_order_and_retention(tmp_path):
    for n in 2, 10, 9:
        put(tmp_path, n)
    (tmp_path / "notes").mkdir()
    (tmp_path / "round_x").mkdir()
    (tmp_path / ".round_11.new").mkdir()
    assert [f.name for f in numbered(tmp_path)] == ["round_2", "round_9", "round_10"] and newest_whole(
        tmp_path
    ).name == "round_10"
    prune(tmp_path, keep=1, spare=["round_2"])
    assert sorted(f.name for f in tmp_path.iterdir()) == ["notes", "round_10", "round_2", "round_x"]
    assert newest_whole(tmp_path / "notes") is None and newest_whole(tmp_path / "nowhere") is None


def test_random_states_go_on_where_they_were():
    import random

    import numpy as np
    import torch

    def draw():
        return (
            random.gauss(0, 1),
            random.random(),
            np.random.randn(),
            np.random.rand(),
            torch.rand(3).tolist(),
        )

    draw()
    states = json.loads(json.dumps(random_states()))
    first = draw()
    assert draw() != first
    set_random_states(states)
    assert draw() == first


def test_lock(tmp_path):
    code = f"from selfplay_nb.core.checkpoint import locked\nwith locked({str(tmp_path)!r}): print('in')"
    with locked(tmp_path):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert other.returncode and "another process" in other.stderr
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "in\n"


SMALL_DISK = """
import sys; from pathlib import Path; from selfplay_nb.core.checkpoint import newest_whole, writing
disk = Path(sys.argv[1])
with writing(disk/"round_1") as tmp: (tmp/"weights").write_bytes(b"1"*400_000)
try:
    with writing(disk/"round_2") as tmp: (tmp/"weights").write_bytes(b"2"*800_000)
except OSError as e: print(e)
print(newest_whole(disk).name, sorted(f.name for f in disk.iterdir()))
with writing(disk/"round_2") as tmp: (tmp/"weights").write_bytes(b"2"*400_000)
print(newest_whole(disk).name)
"""


def test_a_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    namespace = [] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    mount = [
        *namespace,
        "sh",
        "-c",
        (
            f'mount -t tmpfs -o size=1m small "{disk}" && "$0" -c "$1" "{disk}"; status=$?; umount "{disk}";'
            ' exit $status'
        ),
    ]
    ran = subprocess.run([*mount, sys.executable, SMALL_DISK], capture_output=True, text=True)
    if "mount:" in ran.stderr or "unshare:" in ran.stderr:
        pytest.skip("no right to mount a small disk here")
    assert ran.returncode == 0, ran.stderr
    assert (
        "round_2 was not written (No space left on device)" in ran.stdout
        and "round_1 ['round_1']\nround_2" in ran.stdout
    )


def test_a_folder_that_may_not_be_written(tmp_path):
    put(tmp_path, 1)
    blocked = tmp_path / "file"
    blocked.write_text("a file where a folder should be")
    with pytest.raises(OSError, match="was not written"):
        put(blocked, 2)
    if os.geteuid() == 0:
        return  # root may write everywhere
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(OSError, match="was not written .*Permission"):
            put(tmp_path, 2)
        assert newest_whole(tmp_path).name == "round_1"
    finally:
        tmp_path.chmod(0o755)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("points", ["4", pytest.param("60", marks=pytest.mark.long)])
def test_a_killed_run_ends_bit_for_bit_as_one_that_was_not(tmp_path, tiny_folder, points):
    ran = subprocess.run(
        [sys.executable, HERE / "killed.py", tiny_folder, tmp_path, points],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert f"{points} of {points} equal" in ran.stdout, ran.stdout + ran.stderr[-2000:]


def test_no_warning_for_a_healthy_run(tmp_path):
    for n in range(3):
        put(tmp_path, n)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert newest_whole(tmp_path).name == "round_2"


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        "[" * 100_000,
        '{"a": {"bytes": "x", "sha256": 3}}',
        '{"a": {"bytes": -5, "sha256": ""}}',
        '{"a\\u0000": {"bytes": 1, "sha256": ""}}',
        '{"/etc/passwd": {"bytes": 1, "sha256": ""}}',
        '{"sub": {"bytes": 0, "sha256": ""}}',
    ],
)
def test_a_manifest_that_says_nothing_true(tmp_path, text):
    for n in 1, 2:
        put(tmp_path, n)
    (tmp_path / "round_2" / "manifest.json").write_text(text)
    with pytest.warns(UserWarning, match="round_2"):
        assert newest_whole(tmp_path).name == "round_1"


def test_only_plain_numbers_count(tmp_path):
    for name in "round_1", "round_²", "round_١", "round_1e5", "round_", "_3":
        (tmp_path / name).mkdir()
    assert [f.name for f in numbered(tmp_path)] == ["round_1"]


# what a run is


def words(some, weight=1.0):
    def reward(prompts, completions, **columns):
        return [weight * sum(w in c for w in some) for c in completions]

    return reward


HELPER = 3


def helped(prompts, completions, **columns):
    return [_helper(c) * HELPER for c in completions]


def _helper(c):
    return len(c)


class Judge:
    def __init__(self, model, strict=False):
        self.model, self._strict, self.calls = model, strict, 0

    def compare(self, prompts, a, b, **columns):
        self.calls += 1
        return [0.5] * len(a)


def same(a, b):
    return content(a) == content(b)


def test_equal_content_is_equal():
    assert (
        same(words(["a", "b"]), words(["a", "b"]))
        and same(Judge("m"), Judge("m"))
        and same(as_reward(len), as_reward(len))
    )
    judge = Judge("m")
    before = content(judge)
    judge.compare([], [], [])
    judge.cache = {1: 2}
    assert content(judge) == before and json.loads(json.dumps(before)) == before
    assert same(ArithmeticTask(2).reward, ArithmeticTask(2).reward) and same({1, 2, 3}, {3, 2, 1})


@pytest.mark.parametrize(
    "a, b",
    [
        (words(["a"]), words(["b"])),
        (words(["a"]), words(["a"], 2.0)),
        (Judge("m"), Judge("n")),
        (Judge("m"), Judge("m", True)),
        (near_number(20), near_number(30)),
        (as_reward(lambda p, r: len(r)), as_reward(lambda p, r: len(p))),
        (lambda x: x + 1, lambda x: x + 2),
        (lambda x: x in {1, 2}, lambda x: x in {1, 3}),
        (ArithmeticTask(2), ArithmeticTask(3)),
        (ArithmeticTask(2), ArithmeticTask(2, system="Add.")),
        (Judge("m").compare, Judge("n").compare),
        (b"1", b"2"),
        (
            WeightedReward(dict(a=exact_number), dict(a=1.0)),
            WeightedReward(dict(a=exact_number), dict(a=2.0)),
        ),
        (lambda x=1: x, lambda x=2: x),
    ],
)
def test_other_content_is_other(a, b):
    assert not same(a, b) and differences(dict(it=content(a)), dict(it=content(b)))


def test_what_a_function_calls_is_part_of_it(monkeypatch):
    before = content(helped)
    with monkeypatch.context() as m:
        m.setitem(globals(), "HELPER", 4)
        assert content(helped) != before
    with monkeypatch.context() as m:
        m.setitem(globals(), "_helper", lambda c: len(c) + 1)
        assert content(helped) != before
    assert content(helped) == before


def test_content_is_the_same_in_another_process(tmp_path):
    (tmp_path / "mine.py").write_text(
        "class Task:\n    words = 'a', 'b'\n    def reward(self, x): return x in {'a', 'b', 'c'} and"
        " self.verifier(x)\n    @property\n    def verifier(self): return lambda x: [c for c in x]\n"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import mine; from selfplay_nb.core.checkpoint"
        " import content; print(content(mine.Task()))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in "123"
    }
    assert len(said) == 1 and "code" in said.pop()


def test_a_model_is_known_by_its_weights(tiny_folder, tmp_path):
    import torch

    from selfplay_nb.models.base import tiny_model_folder
    from selfplay_nb.models.policy import Base, Policy

    def load(folder):
        return Base.load(folder, dtype=torch.float32, device="cpu")

    shutil.copytree(tiny_folder, tmp_path / "moved")
    base = load(tmp_path / "moved")
    plain = weights_sum(base.model)
    assert plain == weights_sum(load(tiny_folder).model)
    policy = Policy(base, "p")
    assert weights_sum(base.model) == plain
    policy.delete()
    assert weights_sum(load(tiny_model_folder(tmp_path / "other", seed=5)).model) != plain


def test_a_record_is_ours_whole_and_of_this_version(tmp_path):
    file = tmp_path / "config.json"
    write_record(file, {"a": 1, "kind": "run"})
    assert (
        read_record(file) == {"a": 1, "kind": "run"} == run_record(tmp_path, "run")
        and run_record(tmp_path / "nowhere", "run") is None
    )
    with pytest.raises(ValueError, match="holds 'run', not 'pipeline'"):
        run_record(tmp_path, "pipeline")
    ours = json.loads(file.read_text())
    for text, said in [
        ("{", "damaged"),
        ("[]", "lacks the mark"),
        ('{"model_type": "llama"}', "lacks the mark"),
        ("\xff", "damaged"),
        (json.dumps(ours | {"format": 99}), "format 99"),
    ]:
        file.write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=said):
            read_record(file)


def test_only_runs_are_forgotten_and_only_what_they_made(tmp_path):
    def run(name, *others):
        folder = tmp_path / name
        folder.mkdir()
        write_record(folder / "config.json", dict(kind="run"))
        (folder / "checkpoints").mkdir()
        (folder / ".git").mkdir()
        for o in others:
            (folder / o).write_text("mine")
        return folder

    forget_run(whole := run("whole", "pairs.jsonl"), "run", ["checkpoints", "pairs.jsonl"])
    assert [f.name for f in whole.iterdir()] == [".git"]
    with pytest.raises(ValueError, match="thesis.txt"):
        forget_run(other := run("other", "thesis.txt"), "run", ["checkpoints"])
    assert (other / "checkpoints").exists() and (other / "thesis.txt").exists()
    linked = run("linked")
    (linked / "checkpoints").rmdir()
    (linked / "checkpoints").symlink_to(other)
    forget_run(linked, "run", ["checkpoints"])
    assert (other / "checkpoints").exists() and not (linked / "checkpoints").is_symlink()
    (tmp_path / "system").mkdir()
    (tmp_path / "system" / ".DS_Store").write_text("x")
    (tmp_path / "system" / "lost+found").mkdir()
    assert run_record(tmp_path / "system", "run") is None


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(ValueError, match="link"), locked(tmp_path / "run"):
        pass
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signals_interrupt(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    if before is not signal.SIG_DFL:
        pytest.skip(f"{name} has another use here")
    with pytest.raises(SystemExit) as ended, signals_interrupt():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert ended.value.code == 128 + number
    assert signal.getsignal(number) is before


def test_other_training_prompts_are_another_run(tmp_path, tiny_folder):
    held = [f"Say {k}." for k in range(4)]
    config = SelfPlayConfig(
        str(tmp_path / "run"),
        n_rounds=1,
        prompts_per_round=2,
        n_samples=2,
        max_new_tokens=4,
        eval_size=4,
        gate=False,
    )

    def begin(words, **more):
        base = Base.load(tiny_folder, dtype=torch.float32, device="cpu")
        task = as_task([f"Describe a {w}." for w in words], lambda p, a: float(len(a)), held_out=held)
        changed = dataclasses.replace(config, **more)
        return SelfPlayTrainer(changed, base, task, callbacks=[]).train()

    begin(["coffee", "table", "river"])
    begin(["coffee", "table", "river"], n_rounds=2)  # the same goes on
    with pytest.raises(ValueError, match="holds a run with another configuration"):
        begin(["snow", "table", "river"], n_rounds=3)


def test_a_run_of_an_older_version_goes_on(tmp_path, tiny_folder):
    "Its record has no word for the training prompts, neither in the run nor in the task."

    class Stream:
        "A task whose training problems are others each time."

        reward = verifier = staticmethod(lambda prompts, completions, **columns: [1.0] * len(prompts))

        def problems(self, split, n, seed=0):
            k = 0 if split == "held-out" else next(counter)
            return [dict(prompt=f"{split} {k} {i}") for i in range(n)]

    counter = iter(range(1000))
    small = dict(prompts_per_round=2, n_samples=2, max_new_tokens=4, eval_size=4, gate=False)
    told = as_task(["One?", "Two?", "Three?"], lambda p, a: float(len(a)), held_out=["Four?"])
    for name, task in ("own", told), ("stream", Stream()):
        folder = tmp_path / name
        begin = lambda n: SelfPlayTrainer(
            SelfPlayConfig(str(folder), n_rounds=n, **small),
            Base.load(tiny_folder, dtype=torch.float32, device="cpu"),
            task,
            callbacks=[],
        ).train()
        begin(1)
        record = json.loads((folder / "config.json").read_text())
        record["identity"].pop("trained_on")
        if name == "own":
            assert record["identity"]["task"].pop("splits")
        (folder / "config.json").write_text(json.dumps(record))
        assert len(begin(2)) == 3


def test_another_constitution_is_another_reward():
    def made(base, text="Be kind", weight=0.2, pattern="kind"):
        return content(ConstitutionalRewardWrapper(base, [Principle(text, weight, pattern=pattern)]))

    first = made(len)
    assert first == made(len)
    assert first != made(min)
    assert first != made(len, text="Be honest")
    assert first != made(len, weight=0.7)
    assert first != made(len, pattern="good")


class Wanted:
    "Keeps its argument under another name."

    def __init__(self, words):
        self.wanted = words

    def __call__(self, prompts, completions, **columns):
        return [float(any(w in c for w in self.wanted)) for c in completions]


class Told(Wanted):
    made_of = ("wanted",)


def test_an_argument_that_is_kept_elsewhere_is_said():
    with pytest.warns(UserWarning, match="Wanted keeps its argument 'words' under no attribute"):
        content(Wanted(["a"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert content(Told(["a"])) != content(Told(["b"])) == content(Told(["b"]))


# what has its arguments in something else: its name, its weights, or what it serves
ELSEWHERE = {"OpenSpielGame", "RewardModel", "Fused", "Served"}
COUNTS = {"problems", "__call__", "compare", "_compare", "start", "collect", "learn", "decide", "learn_from"}


def test_the_library_keeps_what_its_classes_are_made_of():
    "A constructor's argument is kept under its name, or after an underscore, or the class has `made_of`."
    lost = []
    for file in Path(selfplay_nb.__file__).parent.rglob("*.py"):
        for c in ast.walk(ast.parse(file.read_text())):
            if not isinstance(c, ast.ClassDef) or c.name in ELSEWHERE:
                continue
            methods = {m.name: m for m in c.body if isinstance(m, ast.FunctionDef)}
            says = any(isinstance(a, ast.Assign) and ast.unparse(a.targets[0]) == "made_of" for a in c.body)
            if says or not COUNTS & methods.keys() or "__init__" not in methods:
                continue
            args = methods["__init__"].args
            names = [a.arg for a in (*args.args[1:], *args.kwonlyargs, args.vararg, args.kwarg) if a]
            inside = [n for n in ast.walk(methods["__init__"]) if isinstance(n, ast.Attribute)]
            kept = {n.attr for n in inside if isinstance(n.ctx, ast.Store)}
            lost += [(c.name, n) for n in names if n not in kept and f"_{n}" not in kept]
    assert not lost
