"The first result in minutes: the order of what it prints, its estimate, resuming; and the check of a GPU."

import json
import re

import pytest

from selfplay_nb import cli
from selfplay_nb.loop.trainer import SelfPlayConfig

SMALL = dict(n_rounds=1, prompts_per_round=4, n_samples=4, max_new_tokens=8, eval_size=8)


def test_demo(tiny, tmp_path, capsys):
    "On a model of no size: the estimate stands first, then a run with the rule, then its control, then both."
    told = cli.demo(tmp_path / "demo", base=tiny, **SMALL)
    said = capsys.readouterr().out
    order = [said.index(x) for x in ("On this machine", "With the rule", "The control", "Right answers")]
    assert order == sorted(order)
    assert "probe" not in tiny.adapters
    folders = {name: tmp_path / "demo" / name for name in ("rule", "control")}
    config = {name: json.loads((folder / "config.json").read_text()) for name, folder in folders.items()}
    assert (config["rule"]["judge"], config["control"]["judge"]) == ("rule", "random")
    differ = {k for k, v in config["rule"].items() if v != config["control"][k]}
    assert differ <= {"run_dir", "judge", "pairs_per_prompt", "identity"}
    assert (tmp_path / "demo" / "curve.png").stat().st_size > 5000
    rows = re.findall(r"(\d+\.\d) % \[\s*(\d+\.\d), +(\d+\.\d)\] \(n=8\)", told)
    assert len(rows) == 3 and "rule against random rewards" in told and re.search(r"\(p = \d", told)
    assert len(re.findall(r"(?m)^  \d+ \+ \d+ =  '.*' \| '.*' \| '.*'$", told)) == 3
    assert len(re.findall(r"\d+ cut off", told)) == 3
    before = (tmp_path / "demo" / "rule" / "metrics.jsonl").read_bytes()
    assert cli.demo(tmp_path / "demo", base=tiny, **SMALL) == told, "finished runs are not played again"
    assert (tmp_path / "demo" / "rule" / "metrics.jsonl").read_bytes() == before


def test_the_experiment_behind_the_learning_curve(tiny_folder, tmp_path):
    "With the rule and with random rewards, each seed; what is finished is not played again."
    out = tmp_path / "rows.jsonl"
    settings = dict(SMALL, model_name=str(tiny_folder), seeds=[0, 1], folder=tmp_path, out=out)
    cli.learning(**settings)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["judge"], r["seed"], r["round"]) for r in rows] == [
        (judge, seed, n) for judge in ("rule", "random") for seed in (0, 1) for n in (0, 1)
    ]
    assert all({"gained", "lost"} <= set(r) for r in rows if r["round"] == 1)
    for judge in "rule", "random":
        assert json.loads((tmp_path / f"{judge}_0" / "config.json").read_text())["judge"] == judge
    before = out.read_bytes()
    cli.learning(**settings)
    assert out.read_bytes() == before


def test_the_estimate_counts_what_a_run_does():
    speed = dict(sampled=1.0, greedy=10.0, pair=100.0)
    config = SelfPlayConfig(
        n_rounds=3, prompts_per_round=5, n_samples=2, pairs_per_prompt=4, eval_every=2, eval_size=7
    )
    sampled, greedy, pairs = 3 * 2 * 5 * 2, 3 * 7 + 2 * 100, 3 * 5 * 4  # evaluations: 0, 2 and the last, 3
    assert cli.expected_seconds(config, speed) == sampled + 10 * greedy + 100 * pairs


def test_the_probe_measures_and_leaves_nothing(tiny):
    speed = cli.probe(tiny, SelfPlayConfig(**SMALL))
    assert all(v > 0 for v in speed.values()) and tiny.adapters == []
    twice = cli.probe(tiny, SelfPlayConfig(**SMALL | dict(max_new_tokens=64)))
    assert twice["greedy"] > speed["greedy"], "more tokens take longer"


def test_gpu_check_on_a_model_of_no_size(tmp_path):
    from selfplay_nb.studies import gpu

    shape = gpu.Shape(layers=2, hidden=64, intermediate=64, heads=2, kv_heads=1, head_dim=32, vocab=300)
    lines, out = [], tmp_path / "gpu.json"
    small = dict(device="cpu", context=48, batch=4)
    table = gpu.gpu_check({"tiny": shape}, out, ["float32"], show=lines.append, **small)
    assert not table.failed, table
    assert [r.step for r in table.rows] == list(gpu.steps_of(None)) and len(lines) == len(table.rows)
    by_step = {r.step: r for r in table.rows}
    assert int(by_step["round"].note.split()[0]) > 0, "a round with pairs"
    assert all(r.seconds > 0 and r.predicted > 0 for r in table.rows)
    assert gpu.load(out) == table and out.with_suffix(".md").read_text() == gpu.markdown(table)
    assert gpu.markdown(table).count("\n| tiny | float32 |") == len(table.rows)
    out.write_text("mine")
    with pytest.raises(ValueError, match="left as it is"):
        gpu.save(table, out)


def test_gpu_check_shows_what_is_wrong(tmp_path, monkeypatch):
    "A wrong log-probability, an update that does nothing, and the time that is up."
    import time

    import torch

    from selfplay_nb.models.base import tiny_model_folder
    from selfplay_nb.models.policy import Policy
    from selfplay_nb.studies import gpu

    folder = str(tiny_model_folder(tmp_path / "model"))
    s = gpu.Settings(rank=2, batch=4, context=32, device="cpu", bytes=4)
    bench = gpu.Bench(folder, "tiny", s, torch.float32, random=True)
    right = Policy.logprobs
    wrong = lambda self, *a, **k: [lp + 0.01 for lp in right(self, *a, **k)]
    monkeypatch.setattr(Policy, "logprobs", wrong)
    monkeypatch.setattr(gpu, "updates", lambda bench: {"sft": lambda: None})
    shape = gpu.shape_of(folder)
    rows = {r.step: r for r in gpu.check_model(bench, shape, time.monotonic() + 600, show=lambda line: None)}
    assert not rows["log-probabilities"].ok and "from a plain forward" in rows["log-probabilities"].note
    assert not rows["sft"].ok and "has not changed" in rows["sft"].note
    assert not rows["dpo"].ok and rows["generate"].ok
    late = gpu.check_model(bench, shape, time.monotonic() - 1, show=lambda line: None)
    assert all(r.seconds is None and "the time was up" in r.note for r in late)
