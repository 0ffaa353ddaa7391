"""Whatever PEFT knows to put into an adapter: the frozen base has the same bytes after loading or refusing,
training, an error in the middle, deleting.
"""

import dataclasses
import hashlib
import json
import typing
import warnings

import peft
import pytest
import torch
from peft import LoraConfig

import selfplay_nb.models.sampling as sampling_module
from selfplay_nb.models.policy import Base, Policy
from selfplay_nb.models.update import dpo, sft

ROWS = [dict(prompt="a", completion="yes"), dict(prompt="b", completion="no")]
PAIRS = [dict(prompt="a", chosen="yes", rejected="no"), dict(prompt="b", chosen="no", rejected="yes")]


def tensors(model):
    """Every parameter and buffer of a model by its plain name, packed weights with all that unpacks them;
    adapters are left out.
    """
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        if "lora_" in name:
            continue
        name = name.replace("base_model.model.", "").replace(".base_layer.", ".")
        yield name, weight
        state = getattr(weight, "quant_state", None)
        if state is not None:
            yield from ((f"{name} {k}", v) for k, v in state.as_dict(packed=True).items())


def fingerprint(base):
    "A SHA-256 for each tensor of the base."

    def digest(t):
        return hashlib.sha256(
            t.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()
        ).hexdigest()

    return {name: digest(t) for name, t in tensors(base.model)}


def starts():
    "All initialisations that the installed PEFT names."
    annotation = typing.get_type_hints(LoraConfig)["init_lora_weights"]
    named = [x for part in typing.get_args(annotation) for x in typing.get_args(part)]
    named = [x.replace("[number of iters]", "4") for x in named]
    return [
        True,
        False,
        *sorted(
            {
                *named,
                "gaussian",
                "orthogonal",
                "pissa",
                "pissa_niter_4",
                "olora",
                "eva",
                "corda",
                "loftq",
                "lora_ga",
                "mica",
            }
        ),
    ]


# a value for each field of LoraConfig that is not its default
OPTIONS = {
    "task_type": ["CAUSAL_LM"],
    "peft_type": ["LORA", "IA3", "PROMPT_TUNING"],
    "auto_mapping": [{"base_model_class": "system", "parent_library": "os"}],
    "peft_version": ["99.0"],
    "base_model_name_or_path": ["elsewhere"],
    "revision": ["main"],
    "inference_mode": [True],
    "r": [4, 1],
    "target_modules": [["q_proj"], "all-linear", ["lm_head"], ["embed_tokens"], ["nothing"]],
    "exclude_modules": [["v_proj"]],
    "lora_alpha": [32, -1e30],
    "lora_dropout": [0.5],
    "fan_in_fan_out": [True],
    "bias": ["all", "lora_only"],
    "use_rslora": [True],
    "modules_to_save": [["lm_head"], ["norm"]],
    "layers_to_transform": [[1]],
    "layers_pattern": ["layers"],
    "rank_pattern": [{"q_proj": 2}],
    "alpha_pattern": [{"q_proj": 64}],
    "megatron_config": [{"a": 1}],
    "megatron_core": ["os"],
    "trainable_token_indices": [[5, 6], {"embed_tokens": [5]}],
    "loftq_config": [{"loftq_bits": 4}],
    "eva_config": [{"rho": 2.0}],
    "corda_config": [{"corda_method": "ipm"}],
    "lora_ga_config": [{"direction": "ArB2r"}],
    "use_dora": [True],
    "velora_config": [{"num_groups": 8}],
    "alora_invocation_tokens": [[5, 6]],
    "use_qalora": [True],
    "qalora_group_size": [8],
    "monteclora_config": [{"num_samples": 2}],
    "layer_replication": [[[0, 2], [0, 2]]],
    "runtime_config": [{"ephemeral_gpu_offload": True}],
    "lora_bias": [True],
    "target_parameters": [["q_proj.weight"], ["experts.gate_up_proj"]],
    "use_bdlora": [{"nblocks": 2}],
    "arrow_config": [{"top_k": 1}],
    "kasa_config": [{"beta": 1.0}],
    "ensure_weight_tying": [True],
}
CASES = [("init_lora_weights", v) for v in starts()] + [
    (name, v) for name, values in OPTIONS.items() for v in values
]
MORE = {
    "loftq_config": dict(init_lora_weights="loftq"),
    "eva_config": dict(init_lora_weights="eva"),
    "corda_config": dict(init_lora_weights="corda"),
    "lora_ga_config": dict(init_lora_weights="lora_ga"),
    "layers_pattern": dict(layers_to_transform=[1], target_modules=["q_proj"]),
    "layers_to_transform": dict(target_modules=["q_proj"]),
}


def test_all_that_peft_knows_is_tried():
    unknown = {f.name for f in dataclasses.fields(LoraConfig)} - {"init_lora_weights", *OPTIONS}
    assert not unknown, (
        "PEFT has new settings of adapters: give each a value here, and see that none changes the base:"
        f" {sorted(unknown)}"
    )


@pytest.fixture(scope="module")
def saved(tiny_folder, tmp_path_factory):
    "A plain adapter, and one that is for the query matrices of the second layer alone."
    base = Base.load(tiny_folder, dtype=torch.float32, device="cpu")
    return Policy(base, "made", r=8).save(tmp_path_factory.mktemp("made") / "made")


class Stop(Exception):
    pass


def configuration(values):
    "A LoraConfig of settings as JSON has them, its parts objects where PEFT has a class for them."
    parts = dict(runtime_config=peft.LoraRuntimeConfig)
    parts |= {
        f"{k}_config": getattr(peft, n, None)
        for k, n in dict(
            eva="EvaConfig",
            corda="CordaConfig",
            lora_ga="LoraGAConfig",
            arrow="ArrowConfig",
            velora="VeloraConfig",
            monteclora="MontecloraConfig",
            kasa="KasaConfig",
        ).items()
    }
    made = {
        k: parts[k](**v) if parts.get(k) and isinstance(v, dict) else v
        for k, v in values.items()
        if k != "peft_type"
    }
    return LoraConfig(**made)


@pytest.fixture(scope="module")
def loaded(tiny_folder):
    "One base for all cases, and its fingerprint from before the first."
    base = Base.load(tiny_folder, dtype=torch.float32, device="cpu")
    before = fingerprint(base)
    assert len([n for n in before if "absmax" in n]) >= 14  # the packed matrices are in it
    return base, before


@pytest.mark.parametrize(
    "name, value, beside",
    [(*c, False) for c in CASES] + [(*c, True) for c in CASES if c[0] == "init_lora_weights"],
    ids=lambda x: str(x)[:40],
)
def test_the_base_keeps_its_bytes(loaded, saved, tmp_path, monkeypatch, name, value, beside):
    (tiny, before), other = loaded, None
    for left in tiny.adapters:
        Policy.resident(tiny, left).delete()
    if beside:
        other = Policy(tiny, "other", r=2)
        kept = other.state()
    config = json.loads((saved / "adapter_config.json").read_text()) | MORE.get(name, {}) | {name: value}
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes((saved / "adapter_model.safetensors").read_bytes())
    (folder / "adapter_config.json").write_text(json.dumps(config))

    def same(when):
        now = fingerprint(tiny)
        assert now == before, (
            when,
            sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))[:5],
        )
        assert not torch.is_grad_enabled() or not any(
            p.requires_grad for n, p in tiny.model.named_parameters() if "lora_" not in n
        ), when

    trained = []

    def tried(call):
        "Whether it went through; what is refused, is refused in a sentence."
        try:
            call()
            return True
        except ValueError as e:
            assert len(str(e).split()) > 4
            return False

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for way in "a file", "a configuration":
            if way == "a file":
                taken = tried(lambda: Policy.load(tiny, folder, "evil"))
            else:
                try:
                    made = configuration(config)
                except Exception:
                    continue  # PEFT itself makes none of it
                taken = tried(lambda: tiny.add_adapter("evil", made))
            same(way)
            if not taken:
                assert "evil" not in tiny.adapters
                continue
            evil = Policy.resident(tiny, "evil", frozen=False)
            evil.generate("a", max_new_tokens=2, seed=0)
            same("after sampling")
            try:
                sft(evil, ROWS, learning_rate=1e-2)
                trained.append(name)
            # no update trains the head
            except (ValueError, RuntimeError):
                assert name == "target_modules" and value == ["lm_head"]
            same("after training")
            with monkeypatch.context() as m:
                m.setattr(sampling_module, "decode", lambda *a, **k: (_ for _ in ()).throw(Stop()))
                with pytest.raises(Stop):
                    evil.sample("a", max_new_tokens=2)
            same("after an error while sampling")
            try:
                dpo(evil, PAIRS * 4, Policy(tiny, "base"), learning_rate=1e30, num_train_epochs=2)
            except (ValueError, FloatingPointError, RuntimeError):
                pass
            same("after an update that diverged")
            evil.delete()
            same("after deleting")
        Policy(tiny, "evil").delete()  # the name is free
    same("at the end")
    # nothing of PEFT is left in the model
    if not beside:
        assert not any(".base_layer." in n for n, _ in tiny.model.named_parameters())
    if (
        name in ("r", "use_dora", "rank_pattern")
        or name == "init_lora_weights"
        and value in (True, "gaussian", "eva")
    ):
        assert trained
    if beside:
        assert all(torch.equal(v, kept[k]) for k, v in other.state().items())
