"What an update takes, and what it says of anything else; mixtures of experts."
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedTokenizerFast, Qwen2MoeConfig

from selfplay_nb.policy import Base, Policy
from selfplay_nb.reward_model import RewardModel
from selfplay_nb.update import dpo, reinforce, sft

ROW = dict(prompt="1 + 2 =", chosen="3", rejected="five", completion="3", advantage=1.)
UPDATES = {"dpo": lambda p, rows: dpo(p, rows, Policy(p.base, "base")), "sft": sft, "reinforce": reinforce,
           "reward model": lambda p, rows: RewardModel(p.base).train(rows), "scores": lambda p, rows: RewardModel(p.base).scores(rows)}
ON_PAIRS = "dpo", "reward model", "scores"

@pytest.fixture
def policy(tiny): return Policy(tiny, "student")

def without(*keys, **more): return {k: v for k, v in ROW.items() if k not in keys} | more


@pytest.mark.parametrize("update, row, said", [
    *[(u, without("prompt", question="1 + 2 ="), "lacks .'prompt'.*'question'.*expected 'prompt'") for u in UPDATES],
    *[(u, without(prompt=None), "column 'prompt' is None: expected a text, or a list") for u in UPDATES],
    *[(u, without(prompt=[]), "column 'prompt' is ..: expected a text, or a list") for u in UPDATES],
    *[(u, without(prompt=5), "column 'prompt' is 5") for u in UPDATES],
    *[(u, "a text", "is 'a text': expected a dict with 'prompt'") for u in UPDATES],
    *[(u, None, "is None: expected a dict with 'prompt'") for u in UPDATES],
    *[(u, without(chosen=None), "column 'chosen' is None: expected a text") for u in ON_PAIRS],
    *[(u, without(rejected=7), "column 'rejected' is 7") for u in ON_PAIRS],
    *[(u, without("rejected"), "lacks .'rejected'") for u in ON_PAIRS],
    *[(u, without(margin=None), "column 'margin' is None: expected a number") for u in ON_PAIRS],
    *[(u, without(margin="wide"), "column 'margin' is 'wide'") for u in ON_PAIRS],
    *[(u, without(chosen_ids="abc"), "column 'chosen_ids' is 'abc'") for u in ON_PAIRS],
    *[(u, without(rejected_ids=[1, None]), "column 'rejected_ids'") for u in ON_PAIRS],
    # UltraFeedback has the question in the answers too: joined to one text it would be trained on
    *[(u, without(chosen=[dict(role="user", content="1 + 2 ="), dict(role="assistant", content="3")]), "column 'chosen'.*one message") for u in ON_PAIRS],
    *[(u, without(completion=None), "column 'completion' is None") for u in ("sft", "reinforce")],
    *[(u, without(completion=[dict(role="assistant", content=None)]), "column 'completion'") for u in ("sft", "reinforce")],
    *[(u, without("completion"), "lacks .'completion'") for u in ("sft", "reinforce")],
    *[(u, without(completion_ids=3), "column 'completion_ids' is 3") for u in ("sft", "reinforce")],
    ("reinforce", without("advantage"), "lacks .'advantage'"), ("reinforce", without(advantage=None), "column 'advantage' is None: expected a number"),
    ("reinforce", without(weight="1"), "column 'weight' is '1'")])
def test_an_odd_row_is_named_with_its_column(policy, update, row, said):
    before = policy.state()
    with pytest.raises(ValueError, match=f"(row|pair) 1.*{said}"): UPDATES[update](policy, [ROW, row])
    assert all(torch.equal(before[k], v) for k, v in policy.state().items())


@pytest.mark.parametrize("update", ["dpo", "sft", "reinforce", "reward model"])
def test_a_plain_prompt_without_a_token_is_refused(tiny_folder, update):
    policy = Policy(Base.load(tiny_folder, dtype=torch.float32, device="cpu", chat=False))
    with pytest.raises(ValueError, match="(row|pair) 1, column 'prompt' is '': expected at least one token"):
        UPDATES[update](policy, [ROW, ROW | dict(prompt="")])


def test_conversations_and_extra_columns_are_taken(policy):
    says = lambda role, text: [dict(role=role, content=text)]
    said = ROW | dict(prompt=says("user", "1 + 2 ="), chosen=says("assistant", "3"), completion=says("assistant", "3"),
                      rejected=says("assistant", "five"), chosen_ids=None, completion_ids=None, question=None, extra=object())
    for kind in "dpo", "sft", "reinforce":
        start = policy.state()
        losses = [UPDATES[kind](policy, rows).losses for rows in ([ROW], [said]) if not policy.load_state(start)]
        policy.load_state(start)
        assert losses[0] == losses[1]


def test_any_iterable_of_rows_will_do(policy):
    from datasets import Dataset
    rows = [without("advantage", prompt=f"{i}") for i in range(3)]
    start, losses = policy.state(), []
    for data in rows, iter(rows), Dataset.from_list(rows):
        losses.append(sft(policy, data).losses); policy.load_state(start)
    assert losses[0] == losses[1] == losses[2]


def test_what_the_reference_said_is_a_number(policy):
    known = dict(chosen_logps=-1., rejected_logps=-2.)
    for bad in None, math.nan, "low":
        with pytest.raises(ValueError, match="'rejected_logps' is .*a finite number"):
            dpo(policy, [ROW | known | dict(rejected_logps=bad)], Policy(policy.base, "base"), sampled_by_reference=True)


def test_a_frozen_policy_is_refused_before_anything_is_computed(policy, monkeypatch):
    fixed = policy.snapshot("fixed")
    monkeypatch.setattr(type(policy.base), "_score", lambda *args: pytest.fail("computed"))
    for update in (lambda: dpo(fixed, [ROW], policy), lambda: reinforce(fixed, [ROW], reference=policy, kl=1.), lambda: sft(fixed, [ROW])):
        with pytest.raises(ValueError, match="frozen"): update()


@pytest.mark.parametrize("kl, reference, said", [(-1., True, "kl is -1.0: expected a number"), (math.nan, True, "kl is nan"), ("1", True, "kl is '1'"),
                                                 (.1, False, "kl is 0.1 without a reference")])
def test_a_divergence_needs_a_reference(policy, kl, reference, said):
    with pytest.raises(ValueError, match=said): reinforce(policy, [ROW], reference=policy if reference else None, kl=kl)


def test_an_answer_that_was_cut_off_is_not_taught_to_end(policy):
    end, start = policy.base.end_id, policy.state()
    def rows(**more): return [dict(prompt="q", completion="yes", advantage=1., **more)]
    ids = policy.base.completion_ids("yes")
    assert ids[-1] == end
    for update in sft, reinforce:
        losses = []
        for more in dict(), dict(truncated=True), dict(completion_ids=ids[:-1]), dict(completion_ids=ids):
            losses.append(update(policy, rows(**more)).losses[0]); policy.load_state(start)
        assert losses[1] == losses[2] != losses[0] == losses[3]


# mixtures of experts

SMALL = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
             bos_token_id=1, eos_token_id=2, pad_token_id=2)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32)
MIXTURES = {"qwen2": lambda n: Qwen2MoeConfig(vocab_size=n, **EXPERTS, **SMALL),
            "mixtral": lambda n: MixtralConfig(vocab_size=n, num_local_experts=4, num_experts_per_tok=2, **SMALL)}

@pytest.fixture(params=MIXTURES)
def mixture(request, tiny_folder, tmp_path):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MIXTURES[request.param](len(tokenizer))).save_pretrained(tmp_path); tokenizer.save_pretrained(tmp_path)
    return Base.load(tmp_path, dtype=torch.float32, device="cpu")


ROWS = [ROW | dict(prompt=f"{i} + 2 =", chosen="3"*(i + 1), completion="3"*(i + 1), advantage=i - .5) for i in range(3)]

def test_mixtures_of_experts_learn_the_loss_that_is_named(mixture):
    policy = Policy(mixture); before = dict(vars(mixture.model.config)); start = policy.state()
    said = {k: policy.logprobs([r["prompt"] for r in ROWS], [r[k] for r in ROWS], per_token=True) for k in ("chosen", "rejected")}
    assert sft(policy, ROWS).losses == pytest.approx([-torch.cat(said["chosen"]).mean().item()], abs=1e-5)
    policy.load_state(start)
    assert dpo(policy, ROWS, Policy(mixture, "base")).losses == pytest.approx([math.log(2) - .2*torch.cat(said["chosen"]).mean().item()], abs=1e-5)
    policy.load_state(start)
    gain = sum(r["advantage"]*lp.sum().item() for r, lp in zip(ROWS, said["chosen"]))/3
    assert reinforce(policy, ROWS).losses == pytest.approx([-gain], abs=1e-5)
    assert RewardModel(mixture).train(ROWS).losses == pytest.approx([math.log(2)], abs=1e-6)
    assert vars(mixture.model.config) == before and mixture.adapters == ["student", "reward"]


def test_the_balance_of_experts_can_be_asked_for(mixture):
    for update, rows in (sft, ROWS), (lambda *a, **k: dpo(*a, Policy(mixture, "base"), **k), ROWS):
        losses = []
        for settings in {}, dict(router_aux_loss_coef=.1):
            policy = Policy(mixture); losses.append(update(policy, rows, **settings).losses[0]); policy.delete()
        assert losses[1] > losses[0] + .1  # at least .1 times what a perfect balance has, which is 1 or more
