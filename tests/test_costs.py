"""The measurements behind the chapter on costs: a process of its own for each, resumable, and the same
numbers as TRL's.
"""

import json
import time

import numpy as np
import pytest
import torch

from selfplay_nb.studies import costs as module
from selfplay_nb.studies.costs import costs, measure, our_dpo, ratios, read, trl_dpo

pytestmark = pytest.mark.skipif(
    not module.Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux' /proc"
)


def holds(megabytes, seconds=0.0):
    kept = np.ones(20 * 125_000)
    yield
    passing = np.ones(megabytes * 125_000)
    time.sleep(seconds)
    yield dict(total=float(passing.sum() + kept.sum()))


def breaks():
    yield
    raise ValueError("no such thing")


def test_time_and_memory_are_those_between_the_yields():
    found = measure(holds, megabytes=80, seconds=0.2)
    assert 0.2 < found["seconds"] < 5 and found["total"] == 125_000 * 100
    assert 15 < found["loaded"] < 60 and 75 < found["peak"] - found["loaded"] < 120
    assert measure(holds, megabytes=1)["peak"] < 60  # what one process had is not the next one's


def test_an_arm_that_breaks_says_why():
    with pytest.raises(ValueError, match="no such thing"):
        measure(breaks)


def test_measurements_go_on_where_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr(
        module,
        "GROUPS",
        {"sizes": {"small": (holds, dict(megabytes=1)), "large": (holds, dict(megabytes=60))}},
    )
    with pytest.raises(ValueError, match="unknown groups"):
        costs(tmp_path / "c.jsonl", groups=["colours"])
    costs(tmp_path / "sub" / "c.jsonl", repeats=1, groups=["sizes"])
    first = read(tmp_path / "sub" / "c.jsonl")
    costs(tmp_path / "sub" / "c.jsonl", repeats=3, groups=["sizes"])
    rows = read(tmp_path / "sub" / "c.jsonl")
    assert [r["arm"] for r in rows] == ["small", "large", "large", "small", "small", "large"] and rows[
        :2
    ] == first
    more = ratios(rows, "sizes", "large", "small", lambda r: r["peak"])
    assert len(more) == 3 and all(x > 1.5 for x in more) and ratios(rows, "sizes", "medium") == []


@pytest.mark.long
def test_a_step_of_ours_is_a_step_of_trl():
    said = (
        ("12+30=", "42", "It is 41, I think."),
        ("12+30=", "42", "40"),
        ("7+11=", "18", "19"),
        ("Name a colour.", "Red.", "Seven of them."),
    )
    pairs = [dict(prompt=[dict(role="user", content=q)], chosen=a, rejected=b) for q, a, b in said]
    ours, plain = (
        measure(f, pairs=pairs, size=4, epochs=1, **more)
        for f, more in ((our_dpo, dict(dtype=torch.float32)), (trl_dpo, dict(float32=True)))
    )
    assert ours["loss"] == pytest.approx(plain["loss"], abs=1e-4) and ours["loss"] != pytest.approx(
        0.693147, abs=1e-3
    )
    assert (
        ours["gradient"] == pytest.approx(plain["gradient"], rel=1e-3)
        and ours["steps"] == plain["steps"] == 1
    )
    assert json.dumps(ours)
