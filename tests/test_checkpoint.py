"Checkpoints are whole or not there; damage is found; a killed run ends as one that was not."
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from selfplay_nb import checkpoint
from selfplay_nb.checkpoint import locked, newest_whole, numbered, prune, random_states, set_random_states, verify, writing

HERE = Path(__file__).parent


def put(parent, n, size=1000):
    with writing(parent/f"round_{n}") as tmp:
        (tmp/"sub").mkdir(); (tmp/"sub"/"weights").write_bytes(bytes([n])*size); (tmp/"state.json").write_text(json.dumps({"n": n}))


def test_whole_or_not_at_all(tmp_path):
    put(tmp_path, 1)
    for at in "before", "after":
        with pytest.raises(KeyError), writing(tmp_path/"round_1") as tmp:
            if at == "after": (tmp/"state.json").write_text("{}")
            raise KeyError
        assert verify(tmp_path/"round_1").keys() == {"state.json", "sub/weights"} and [f.name for f in tmp_path.iterdir()] == ["round_1"]
    put(tmp_path, 1, 5)
    assert (tmp_path/"round_1"/"sub"/"weights").read_bytes() == b"\x01"*5


@pytest.mark.parametrize("call", ["rename", "_seal", "_flush"])
def test_an_error_anywhere_leaves_what_was_there(tmp_path, monkeypatch, call):
    put(tmp_path, 1)
    def fail(*args): raise OSError(5, "Input/output error")
    monkeypatch.setattr(Path if call == "rename" else checkpoint, call, fail)
    with pytest.raises(OSError, match="round_1 was not written"):
        put(tmp_path, 1, 7)
    monkeypatch.undo()
    assert verify(tmp_path/"round_1") and (tmp_path/"round_1"/"sub"/"weights").stat().st_size == 1000


@pytest.mark.parametrize("how", ["flip", "cut", "grow", "gone"])
def test_damage_of_every_file_is_found_and_the_one_before_is_taken(tmp_path, how):
    for n in 1, 2: put(tmp_path/"whole", n)
    names = [f.relative_to(tmp_path/"whole"/"round_2") for f in (tmp_path/"whole"/"round_2").rglob("*") if f.is_file()]
    assert len(names) == 3
    for i, name in enumerate(names):
        parent = tmp_path/str(i); shutil.copytree(tmp_path/"whole", parent)
        file = parent/"round_2"/name; data = file.read_bytes(); k = data.index(b"1") if name.name == "manifest.json" else len(data)//2
        if how == "gone": file.unlink()
        else: file.write_bytes({"flip": data[:k] + bytes([data[k] ^ 1]) + data[k+1:], "cut": data[:-1], "grow": data + b"}"}[how])
        with pytest.warns(UserWarning, match="round_2.*(damaged|missing).*before"):
            assert newest_whole(parent).name == "round_1"
        shutil.rmtree(parent/"round_1")
        with pytest.warns(UserWarning), pytest.raises(ValueError, match="none of the 1 checkpoints"):
            newest_whole(parent)


def test_a_file_outside_counts_up_to_its_length(tmp_path):
    ledger = tmp_path/"pairs.jsonl"; ledger.write_text("one\n")
    with writing(tmp_path/"run"/"round_1", beside=[ledger]) as tmp: (tmp/"a").write_text("a")
    ledger.write_text("one\ntwo\n"); verify(tmp_path/"run"/"round_1")
    for text in "onE\ntwo\n", "one":
        ledger.write_text(text)
        with pytest.raises(ValueError, match="pairs.jsonl"):
            verify(tmp_path/"run"/"round_1")


def test_order_and_retention(tmp_path):
    for n in 2, 10, 9: put(tmp_path, n)
    (tmp_path/"notes").mkdir(); (tmp_path/"round_x").mkdir(); (tmp_path/".round_11.new").mkdir()
    assert [f.name for f in numbered(tmp_path)] == ["round_2", "round_9", "round_10"] and newest_whole(tmp_path).name == "round_10"
    prune(tmp_path, keep=1, spare=["round_2"])
    assert sorted(f.name for f in tmp_path.iterdir()) == ["notes", "round_10", "round_2", "round_x"]
    assert newest_whole(tmp_path/"notes") is None and newest_whole(tmp_path/"nowhere") is None


def test_random_states_go_on_where_they_were():
    import random

    import numpy as np
    import torch
    def draw(): return random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), torch.rand(3).tolist()
    draw(); states = json.loads(json.dumps(random_states())); first = draw()
    assert draw() != first
    set_random_states(states)
    assert draw() == first


def test_lock(tmp_path):
    code = f"from selfplay_nb.checkpoint import locked\nwith locked({str(tmp_path)!r}): print('in')"
    with locked(tmp_path):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert other.returncode and "another process" in other.stderr
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "in\n"


SMALL_DISK = """
import sys; from pathlib import Path; from selfplay_nb.checkpoint import newest_whole, writing
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
    disk = tmp_path/"disk"; disk.mkdir()
    namespace = [] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    mount = [*namespace, "sh", "-c", f'mount -t tmpfs -o size=1m small "{disk}" && "$0" -c "$1" "{disk}"; status=$?; umount "{disk}"; exit $status']
    ran = subprocess.run([*mount, sys.executable, SMALL_DISK], capture_output=True, text=True)
    if "mount:" in ran.stderr or "unshare:" in ran.stderr: pytest.skip("no right to mount a small disk here")
    assert ran.returncode == 0, ran.stderr
    assert "round_2 was not written (No space left on device)" in ran.stdout and "round_1 ['round_1']\nround_2" in ran.stdout


def test_a_folder_that_may_not_be_written(tmp_path):
    put(tmp_path, 1); blocked = tmp_path/"file"; blocked.write_text("a file where a folder should be")
    with pytest.raises(OSError, match="was not written"):
        put(blocked, 2)
    if os.geteuid() == 0: return  # root may write everywhere
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(OSError, match="was not written .*Permission"):
            put(tmp_path, 2)
        assert newest_whole(tmp_path).name == "round_1"
    finally: tmp_path.chmod(0o755)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_run_ends_bit_for_bit_as_one_that_was_not(tmp_path, tiny_folder):
    points = os.environ.get("KILL_POINTS", "10")  # 60 and more take some minutes
    ran = subprocess.run([sys.executable, HERE/"killed.py", tiny_folder, tmp_path, points], capture_output=True, text=True,
                         env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)})
    assert f"{points} of {points} equal" in ran.stdout, ran.stdout + ran.stderr[-2000:]


def test_no_warning_for_a_healthy_run(tmp_path):
    for n in range(3): put(tmp_path, n)
    with warnings.catch_warnings(): warnings.simplefilter("error"); assert newest_whole(tmp_path).name == "round_2"
