"""Random models of a few thousand parameters, of the families that people use: they load, sample, score and
learn, or are refused before their weights are read.
"""

import json

import pytest
import torch
import transformers as T
from bitsandbytes.nn import Linear4bit

from selfplay_nb.models.base import load_model
from selfplay_nb.models.policy import Base, Policy
from selfplay_nb.models.update import dpo

VOCABULARY = 99  # of the tiny model's tokenizer
ALL = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
)
WIDE = ALL | dict(head_dim=32)
WINDOW = dict(sliding_window=16)
BOTH = WINDOW | dict(layer_types=["sliding_attention", "full_attention"])
EXPERTS = dict(moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
LINEAR = dict(
    layer_types=["linear_attention", "full_attention"],
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=2,
)
SEES = dict(
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
)
MAMBA = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    num_hidden_layers=2,
    state_size=16,
    num_heads=4,
    head_dim=32,
    n_groups=1,
)

WORKING = {
    "Llama": lambda: T.LlamaConfig(**ALL),
    "Qwen2": lambda: T.Qwen2Config(**ALL),
    "Qwen3": lambda: T.Qwen3Config(**WIDE),
    "Gemma 2": lambda: T.Gemma2Config(**WIDE, **BOTH),
    "Gemma 3, text": lambda: T.Gemma3TextConfig(**WIDE, **BOTH),
    "Gemma 3, with images": lambda: T.Gemma3Config(
        text_config=WIDE | BOTH, vision_config=SEES, image_token_index=5, mm_tokens_per_image=4
    ),
    "Mistral, with a window": lambda: T.MistralConfig(**ALL, **WINDOW),
    "Phi-3": lambda: T.Phi3Config(**ALL),
    "SmolLM3": lambda: T.SmolLM3Config(**ALL),
    "Qwen2-MoE": lambda: T.Qwen2MoeConfig(**ALL, **EXPERTS, shared_expert_intermediate_size=32),
    "Qwen3-MoE": lambda: T.Qwen3MoeConfig(**WIDE, **EXPERTS),
    "Qwen3.5": lambda: T.Qwen3_5TextConfig(**WIDE, **LINEAR),
    "LFM2": lambda: T.Lfm2Config(**ALL, layer_types=["conv", "full_attention"]),
    "GPT-OSS": lambda: T.GptOssConfig(**WIDE, **BOTH, num_local_experts=4, num_experts_per_tok=2),
}
REFUSED = {
    "Mamba 2": (lambda: T.Mamba2Config(**MAMBA), "'mamba2' take no past_key_values and no position_ids"),
    "BLOOM": (
        lambda: T.BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=2),
        "'bloom' take no position_ids",
    ),
    "T5": (
        lambda: T.T5Config(vocab_size=VOCABULARY, d_model=64, num_layers=2),
        "'t5' are no causal language models",
    ),
}
PROMPTS = ["1 + 2 =", "a prompt that is longer than any window of sixteen tokens", "1 + 2 = or so"]
PAIRS = [
    dict(prompt="1 + 2 =", chosen="3", rejected="5"),
    dict(prompt=PROMPTS[1], chosen="yes", rejected="by no means"),
]


def write(config, folder, tiny_folder):
    """A random model and the tiny model's tokenizer; its weights are large enough for its answers to depend
    on what it reads.
    """
    torch.manual_seed(0)
    model = T.AutoModelForCausalLM.from_config(config)
    for w in model.parameters():
        if w.ndim > 1:
            w.data *= 4
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 2
    model.save_pretrained(folder)
    T.AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder)
    return folder


def plain(base, policy, prompt, token_ids):
    "Log-probabilities of an answer by the model's own forward pass: one text, no padding, no cache."
    start = len(base.encode(prompt))
    with base.running(policy.name) as model:
        logits = model(input_ids=torch.tensor([base.encode(prompt) + token_ids])).logits[0, start - 1 : -1]
    return logits.float().log_softmax(-1).gather(-1, torch.tensor(token_ids)[:, None])[:, 0]


@pytest.mark.parametrize("family", WORKING)
def test_a_family_that_works(family, tmp_path, tiny_folder):
    base = Base.load(
        write(WORKING[family](), tmp_path / "model", tiny_folder),
        dtype=torch.float32,
        device="cpu",
        unpack_rows=64,
    )
    assert any(isinstance(m, Linear4bit) for m in base.model.modules()) and base.context_length == 256
    policy = Policy(base, "student", r=4)
    other = Policy(base, "other", r=4, seed=5)
    g = torch.Generator().manual_seed(0)
    policy.load_state({k: 0.1 * torch.randn(w.shape, generator=g) for k, w in policy.state().items()})
    assert not any("vision" in k for k in policy.state())
    said = policy.sample(PROMPTS, 2, 8, seed=1)
    # what was recorded, what scoring says, and a plain forward pass
    for prompt, row in zip(PROMPTS, said):
        scored = policy.logprobs([prompt] * 2, [a.token_ids for a in row], per_token=True)
        for answer, lp in zip(row, scored):
            own = plain(base, policy, prompt, answer.token_ids)
            assert torch.allclose(lp, own, atol=1e-4) and torch.allclose(
                torch.tensor(answer.logprobs), own, atol=1e-4
            )
    # the same alone, in another order, and beside another policy
    assert (
        policy.sample(PROMPTS[1], 2, 8, seed=1).texts == said.texts[1:2]
        and policy.sample(PROMPTS[::-1], 2, 8, seed=1).texts == said.texts[::-1]
    )
    together = Policy.sample_together([(policy, PROMPTS, 1), (other, PROMPTS[:1], 2)], 2, 8)
    assert [s.texts for s in together] == [said.texts, other.sample(PROMPTS[:1], 2, 8, seed=2).texts]
    # a round of training, and the bare model is what it was
    bare, before = Policy(base, "base"), policy.state()
    anchor = bare.logprobs(PROMPTS[:1], ["yes"])
    result = dpo(policy, PAIRS, other)
    assert result.n_rows == 2 and any(not torch.equal(before[k], w) for k, w in policy.state().items())
    assert torch.equal(bare.logprobs(PROMPTS[:1], ["yes"]), anchor)


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_is_refused_with_the_reason_and_a_list(family, tmp_path, tiny_folder):
    config, reason = REFUSED[family]
    config().save_pretrained(tmp_path)  # no weights: it is refused before they are read
    T.AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{reason}.*Llama.*Qwen3.*Gemma 3"):
        load_model(tmp_path, device="cpu")


def test_weights_that_are_packed_in_another_way_are_refused(tmp_path, tiny_folder):
    config = json.loads((tiny_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(ValueError, match=r"packed already \(gptq\)"):
        load_model(tmp_path, device="cpu")


def test_a_config_of_no_known_type_is_an_error_in_words(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_type"}))
    with pytest.raises(ValueError, match="no_such_type"):
        load_model(tmp_path, device="cpu")
