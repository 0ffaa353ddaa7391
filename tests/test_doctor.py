"The doctor and the planner: what they say, with and without torch; sums against measured peaks."

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from selfplay_nb.studies import doctor as d

ROOT = Path(__file__).parents[1]


def bare(code: str, *before: str) -> subprocess.CompletedProcess:
    "Run code in a new process with this library, after the lines `before`."
    lines = ["import sys", f"sys.path.insert(0, {str(ROOT)!r})", *before, code]
    return subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)


def test_the_tested_versions_are_those_of_the_constraints():
    pinned = dict(re.findall(r"^([\w-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.M))
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [re.match(r"([\w-]+)(?:>=([\d.]+))?", x) for x in asked["dependencies"]]
    assert {name: (m[2] or "", pinned[name]) for m in needed if (name := m[1])} == d.TESTED
    extras = {name: tuple(what) for name, what in asked["optional-dependencies"].items() if name != "dev"}
    assert {name: what.packages for name, what in d.EXTRAS.items()} == extras


def test_here_everything_needed_is_found():
    report = d.doctor()
    assert not report.wrong and report.verdict == "Ready."
    by_name = {f.name: f for f in report}
    assert float(by_name["NF4 product"].value.split()[0]) < 2
    assert by_name["Python"].value == sys.version.split()[0]
    assert "<table>" in report._repr_html_() and "  + torch " in repr(report)


@pytest.mark.parametrize("blocked", ["torch", "bitsandbytes"])
def test_it_works_where_a_package_cannot_be_imported(blocked, tmp_path):
    "A package that is there, and whose import fails as that of a library for another system does."
    (tmp_path / f"{blocked}.py").write_text("raise OSError('libcudart.so.12: cannot open the file')")
    found = bare(
        "from selfplay_nb.studies.doctor import doctor; r = doctor(); print(r); print(r._repr_html_())",
        f"sys.path.insert(0, {str(tmp_path)!r})",
    )
    assert found.returncode == 0, found.stderr
    line = next(x for x in found.stdout.splitlines() if re.match(rf"  X {blocked} ", x))
    assert "cannot be imported" in line and "libcudart.so.12" in line
    assert "Not ready:" in found.stdout and "NF4 product" in found.stdout.split("Not ready:")[1]


def test_without_site_packages_it_lists_all_that_is_missing():
    code = "from selfplay_nb.cli import main; main(['doctor'])"
    lines = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"
    found = subprocess.run([sys.executable, "-S", "-c", lines], capture_output=True, text=True)
    assert found.returncode == 1 and not found.stderr
    for name, (_, tested) in d.TESTED.items():
        assert re.search(rf"X {name} +missing  \(pip install {name}=={re.escape(tested)}\)", found.stdout)


def test_neither_doctor_nor_help_imports_torch():
    for code in (
        "import selfplay_nb.studies.doctor, selfplay_nb.studies.gpu",
        "from selfplay_nb.cli import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass",
        "from selfplay_nb.cli import main; main(['doctor', '--model', '7B', '--card', '8'])",
    ):
        found = bare(f"{code}\nassert not {{'torch', 'transformers'}} & set(sys.modules)")
        assert found.returncode == 0, found.stderr


def test_a_wrong_product_is_found(monkeypatch):
    "A product with a matrix that was packed in another way, and a gradient that is not there."
    monkeypatch.setattr(d, "NF4", tuple(x * 1.1 for x in d.NF4))
    product, gradient = d.four_bits()
    assert product.state == gradient.state == "wrong" and "wrong numbers" in product.advice


def test_the_reference_of_the_4_bits_is_that_of_bitsandbytes():
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weights = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    packed, state = quantize_4bit(weights, quant_type="nf4", compress_statistics=False)
    assert torch.allclose(dequantize_4bit(packed, state), d.rounded(weights), atol=1e-5)


def test_old_and_untested_versions(monkeypatch):
    versions = {"peft": "0.19.1", "trl": "1.17.0", "tqdm": None}
    monkeypatch.setattr(d, "installed", lambda name: versions[name])
    monkeypatch.setattr(d.importlib.util, "find_spec", lambda name: None)
    old, other, none = (d.package(name) for name in versions)
    assert (old.state, old.advice) == ("wrong", "0.20 or newer is needed")
    assert (other.state, other.advice) == ("ok", "tested with 1.16.0")
    assert (none.state, none.value) == ("wrong", "missing")


def model_of(shape, tmp_path, kind):
    "The model that Transformers makes of a configuration of this shape, without memory."
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[kind](
        num_hidden_layers=shape["layers"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv"],
        vocab_size=shape["vocab"],
        pad_token_id=0,
    )
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3"])
def test_the_shape_of_a_folder_has_the_weights_of_the_model(kind, tmp_path):
    import torch

    sizes = dict(layers=3, hidden=128, intermediate=320, heads=4, kv=2, vocab=999)
    model = model_of(sizes, tmp_path, kind)
    shape = d.shape_of(tmp_path)
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    assert shape.packed == sum(m.weight.numel() for m in linear)
    tied = head.weight is model.get_input_embeddings().weight
    assert shape.tied == tied
    assert shape.embeddings == model.get_input_embeddings().weight.numel() * (1 if tied else 2)
    ins_outs = sum(m.in_features + m.out_features for m in linear)
    assert d.adapter_bytes(shape, d.Settings(rank=8)) == 4 * 8 * ins_outs


def test_what_the_planner_does_not_know_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral", "hidden_size": 8}))
    with pytest.raises(ValueError, match="'mixtral'.*expected one of llama"):
        d.plan(tmp_path)
    with pytest.raises(ValueError, match="no config.json"):
        d.plan(ROOT / "tests")
    with pytest.raises(ValueError, match="rank is 0"):
        d.plan("135M", rank=0)
    with pytest.raises(ValueError, match="fewer new tokens"):
        d.plan("135M", context=16, new=16)


def test_more_of_everything_takes_more():
    least = d.plan("0.5B", league=0, batch=4, context=64)
    for more in (dict(rank=64), dict(league=4), dict(batch=16), dict(context=128)):
        settings = dict(league=0, batch=4, context=64) | more
        assert d.plan("0.5B", **settings).peak >= least.peak
        assert sum(p.bytes for p in d.plan("0.5B", **settings).parts) > sum(p.bytes for p in least.parts)
    assert d.plan("0.5B", league=4).peak == d.plan("0.5B", league=80).peak, "four members are in memory"


def test_a_verdict_names_what_to_lower():
    assert d.plan("0.5B", 16).fits and "Fits:" in repr(d.plan("0.5B", 16))
    assert "take a smaller model" in repr(d.plan("7B", 4))
    text = repr(d.plan("3B", 4))
    assert "Does not fit" in text and "activations: lower train_tokens or context" in text
    assert d.plan("3B", train_tokens=256).peak < d.plan("3B").peak


def test_the_command_line_plans(capsys):
    from selfplay_nb.cli import main

    main(["doctor", "--model", "1.5B", "--card", "8", "--rank", "32"])
    said = capsys.readouterr().out
    assert "Fits" in said and "6 of rank 32" in said and "weights in NF4" in said
    with pytest.raises(SystemExit, match="'nobody/nothing' is neither a folder"):
        main(["doctor", "--model", "nobody/nothing", "--card", "8"])


def off(row: dict) -> dict:
    "How far the planner is from a measured row, by phase."
    expected = d.sums(d.plan(d.Shape(**row["shape"]), device="cpu", bytes=4, **row["settings"]))
    return {phase: expected[phase] / got - 1 for phase, got in row["measured"].items()}


def test_the_stored_measurements():
    rows = d.checked_rows(ROOT / "nbs" / "studies" / "doctor.jsonl")
    known = sorted((name, repr(settings), repr(vars(shape))) for name, shape, settings in d.CHECKED)
    assert sorted((r["name"], repr(r["settings"]), repr(r["shape"])) for r in rows) == known
    assert all(set(r["measured"]) == {"loaded", "update", "sampling"} for r in rows)
    assert max(abs(x) for r in rows for x in off(r).values()) < 0.1, [off(r) for r in rows]


def test_a_file_of_another_kind_is_left_as_it_is(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"mine": 1}\n')
    with pytest.raises(ValueError, match="something else than rows of this check"):
        d.check_planner(tmp_path / "mine.jsonl", [])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize(
    "settings",
    [
        dict(rank=8, league=0, batch=8, context=256),
        pytest.param(dict(rank=64, league=4, batch=8, context=128), marks=pytest.mark.long),
    ],
)
def test_measured_peaks(settings):
    shape = d.Shape(6, 512, 1536, 8, 4, 64, 32000)
    s = d.Settings(device="cpu", bytes=4, **settings)
    found = d.measured(shape, s)
    apart = off(dict(shape=vars(shape), settings=settings, measured=found))
    assert max(map(abs, apart.values())) < 0.1, (found, apart)
