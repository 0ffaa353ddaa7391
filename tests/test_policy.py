"The machinery of bases, policies and updates, on a random model of some sixty thousand parameters."

import gc
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import selfplay_nb.models.sampling as sampling_module
import selfplay_nb.models.update as update_module
from selfplay_nb.core.players import Scripted, answers_of
from selfplay_nb.models.base import tiny_model_folder
from selfplay_nb.models.policy import Base, Policy, write_model
from selfplay_nb.models.sampling import lay_out, pack
from selfplay_nb.models.update import dpo, reinforce, sft

PAIRS = [dict(prompt=f"{i}", chosen="yes", rejected="no") for i in range(8)]


@pytest.fixture
def policy(tiny):
    return Policy(tiny, "student")


def test_shapes(policy):
    assert isinstance(policy.generate("a", max_new_tokens=3), str)
    assert [type(x) for x in policy.generate(["a", "b"], max_new_tokens=3)] == [str, str]
    assert [len(row) for row in policy.generate(["a", "b"], n_samples=3, max_new_tokens=3)] == [3, 3]
    assert len(policy.generate("a", n_samples=3, max_new_tokens=3)) == 3
    assert isinstance(policy.generate([{"role": "user", "content": "a"}], max_new_tokens=3), str)


def test_order_and_budget_do_not_change_the_answers(policy):
    prompts = ["a", "a much longer prompt", "bb", "a"]
    wide = policy.sample(prompts, n_samples=5, max_new_tokens=6, seed=3).texts
    policy.base.max_batch_tokens = 64
    assert policy.sample(prompts, n_samples=5, max_new_tokens=6, seed=3).texts == wide
    assert policy.sample(prompts[::-1], n_samples=5, max_new_tokens=6, seed=3).texts[1:3] == [
        wide[2],
        wide[1],
    ]


def test_a_list_of_seeds_gives_each_prompt_a_stream_of_its_own(policy):
    prompts, seeds = ["a", "bb", "a", "a"], [5, 6, 7, 5]
    s = policy.sample(prompts, n_samples=2, max_new_tokens=6, seed=seeds).texts
    assert s[:3] == [
        policy.sample(p, n_samples=2, max_new_tokens=6, seed=x).texts[0] for p, x in zip(prompts[:3], seeds)
    ]
    # the same prompt and seed goes on counting
    assert s[0] + s[3] == policy.sample("a", n_samples=4, max_new_tokens=6, seed=5).texts[0]
    assert policy.generate(prompts, max_new_tokens=6, seed=seeds) == [
        row[0] for row in policy.sample(prompts, max_new_tokens=6, seed=seeds).texts
    ]
    with pytest.raises(ValueError, match="3 seeds for 4 prompts"):
        policy.sample(prompts, seed=[1, 2, 3])


def test_a_finished_answer_ends_and_the_others_go_on(policy):
    s = policy.sample(["x"] * 40, n_samples=2, max_new_tokens=40, seed=0)
    done = [x for row in s for x in row if x.finish_reason == "stop"]
    assert done and any(x.truncated for row in s for x in row)
    assert all(
        x.token_ids[-1] == policy.base.tokenizer.eos_token_id
        and policy.base.tokenizer.eos_token_id not in x.token_ids[:-1]
        for x in done
    )
    assert all(len(x.token_ids) == 40 for row in s for x in row if x.truncated)
    assert all(len(x.logprobs) == len(x.token_ids) for row in s for x in row)


def test_sampling_follows_the_models_probabilities(policy):
    s = policy.sample("q", n_samples=4000, max_new_tokens=1, seed=0)[0]
    counts = torch.bincount(torch.tensor([x.token_ids[0] for x in s]), minlength=98) / len(s)
    with policy.base.running("student") as model:
        probs = model(torch.tensor([policy.base.encode("q")])).logits[0, -1].softmax(-1)
    assert (counts - probs).abs().max() < 0.02
    nucleus = {
        x.token_ids[0] for x in policy.sample("q", n_samples=4000, max_new_tokens=1, top_p=0.3, seed=0)[0]
    }
    p, order = probs.sort(descending=True)
    assert nucleus == set(order[(p.cumsum(-1) - p) < 0.3].tolist())


def test_greedy_is_what_transformers_generates(policy):
    ours = policy.sample("hello", temperature=0, max_new_tokens=10)[0][0].token_ids
    ids = torch.tensor([policy.base.encode("hello")])
    theirs = policy.base.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False
    )[0, ids.shape[1] :]
    assert ours == theirs.tolist()


def test_adapters_are_isolated(tiny, policy):
    snapshot = policy.snapshot("one")
    before = policy.generate("abc", temperature=0, max_new_tokens=8)
    dpo(policy, PAIRS, snapshot, learning_rate=0.05, num_train_epochs=5)
    assert snapshot.generate("abc", temperature=0, max_new_tokens=8) == before
    assert policy.generate("abc", temperature=0, max_new_tokens=8) != before
    assert Policy(tiny, "base").generate("abc", temperature=0, max_new_tokens=8) == before
    snapshot.delete()
    policy.delete()
    assert (
        tiny.adapters == []
        and Policy(tiny, "again").generate("abc", temperature=0, max_new_tokens=8) == before
    )


def test_seed_decides_the_initial_weights(tiny):
    a = Policy(tiny, "s0")
    b = Policy(tiny, "s1")
    c = Policy(tiny, "s2", seed=1)
    assert all(torch.equal(x, y) for x, y in zip(a.state().values(), b.state().values(), strict=True))
    assert any(not torch.equal(x, y) for x, y in zip(a.state().values(), c.state().values(), strict=True))


def test_ten_rounds_leave_no_memory_behind(policy):
    reference = policy.snapshot("reference")

    def held():
        gc.collect()
        return sum(
            o.numel() * o.element_size()
            for o in gc.get_objects()
            if type(o) in (torch.Tensor, torch.nn.Parameter)
        )

    sizes, optimizer = [], None
    for _ in range(10):
        policy.generate(["a", "b"], max_new_tokens=4)
        optimizer = dpo(policy, PAIRS, reference, optimizer=optimizer).optimizer
        reference.delete()
        reference = policy.snapshot("reference")
        sizes.append(held())
    assert sizes[-1] <= sizes[1]


def test_updates_are_repeatable_and_spare_the_callers_random_state(policy):
    start = policy.state()
    reference = policy.snapshot("reference")
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    dpo(policy, PAIRS, reference)
    first = policy.state()
    assert torch.rand(1) == expected
    policy.load_state(start)
    dpo(policy, PAIRS, reference)
    assert all(torch.equal(a, b) for a, b in zip(first.values(), policy.state().values(), strict=True))


def test_moments_travel(policy):
    reference = policy.snapshot("reference")
    one = dpo(policy, PAIRS, reference)
    steps = {v.item() for k, v in one.optimizer.items() if k.endswith("step")}
    two = dpo(policy, PAIRS, reference, optimizer=one.optimizer)
    assert {v.item() for k, v in two.optimizer.items() if k.endswith("step")} == {2 * s for s in steps}


def test_a_diverged_update_leaves_the_policy_as_it_was(policy):
    before, reference = policy.state(), policy.snapshot("reference")
    with pytest.raises(FloatingPointError, match="policy is unchanged"):
        dpo(policy, PAIRS * 4, reference, learning_rate=1e30, num_train_epochs=3)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), policy.state().values(), strict=True))
    assert (
        policy.base.adapters == ["student", "reference"]
        and policy.generate("a", max_new_tokens=2) is not None
    )


def test_bad_rows_never_reach_the_optimizer(policy):
    bad = [
        PAIRS[0] | {"rejected": "yes"},
        PAIRS[0] | {"chosen": ""},
        PAIRS[0] | {"rejected": "n" * 300},
        PAIRS[0] | {"margin": float("nan")},
    ]
    result = dpo(policy, PAIRS + bad, policy.snapshot("ref0"))
    assert result.n_rows == len(PAIRS) and result.dropped == {
        "identical": 1,
        "empty": 1,
        "over-long": 1,
        "non-finite": 1,
    }
    result = sft(policy, [dict(prompt="a", completion=c) for c in ("yes", " ", "y" * 300)])
    assert result.n_rows == 1 and result.dropped == {"empty": 1, "over-long": 1}


def test_the_end_token_is_the_chat_templates(tiny):
    assert tiny.end_id == tiny.tokenizer.eos_token_id
    tiny.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}~{% endfor %}"
    tiny.model.generation_config.eos_token_id = [2, tiny.tokenizer.convert_tokens_to_ids("~")]
    assert tiny.tokenizer.decode(tiny.completion_ids("a")) == "a~"
    tiny.tokenizer.chat_template = None


def test_cut_rejected_answers_are_trained_without_an_end_token(policy):
    eos = policy.base.tokenizer.eos_token_id
    _, [row], _ = update_module.tokenize_pairs(policy.base, [PAIRS[0] | {"rejected_truncated": True}])
    assert row["chosen_ids"][-1] == eos and eos not in row["rejected_ids"]


# plain matrices for a while


def filled(policy):
    torch.manual_seed(0)
    policy.load_state({k: torch.randn_like(v) / 3 for k, v in policy.state().items()})
    return policy


@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("name", ["student", "other", "base"])
def test_plain_matrices_say_the_same_and_go(policy, name, once):
    base = filled(policy).base
    Policy(base, "other", r=4, seed=3)
    ids = torch.tensor([[5, 9, 7, 4]])
    packed = {n: p.clone() for n, p in base.model.named_parameters()}
    with base.running(name) as model:
        four_bit = model(ids).logits
    with base.unpacked(name, once) as model:
        plain = model(ids).logits
    with base.running(name) as model:
        again = model(ids).logits
    assert torch.allclose(plain, four_bit, atol=1e-5) and torch.equal(four_bit, again)
    if name == "student":
        with base.running("base") as model:
            assert not torch.allclose(model(ids).logits, four_bit, atol=1e-2)
    with pytest.raises(RuntimeError), base.unpacked(name, once):
        raise RuntimeError
    assert not any("forward" in vars(m) for m in base.model.modules())
    assert all(torch.equal(p, packed[n]) for n, p in base.model.named_parameters())


def test_sampling_does_not_depend_on_them(policy):
    base, texts = filled(policy).base, []
    for base.unpack_rows in (32, 0):
        texts.append(policy.sample(["a", "bb"], 8, 12, seed=1))
    assert texts[0].texts == texts[1].texts
    assert np.allclose(
        [x for r in texts[0] for s in r for x in s.logprobs],
        [x for r in texts[1] for s in r for x in s.logprobs],
        atol=1e-4,
    )


@pytest.mark.parametrize("limit, size, parts", [(10_000, 16, 1), (200, 8, 2), (1, 1, 16)])
def test_long_rows_go_through_in_parts(policy, monkeypatch, limit, size, parts):
    policy.base.max_train_tokens, seen = limit, []
    original = update_module.token_logprobs
    monkeypatch.setattr(
        update_module,
        "token_logprobs",
        lambda base, prompts, answers: seen.append(len(prompts)) or original(base, prompts, answers),
    )
    freed = []
    monkeypatch.setattr(update_module, "free_memory", lambda: freed.append(1))
    rows = [dict(prompt=f"{i} + 1 =", completion=f"{i + 1}") for i in range(16)]
    result = sft(policy, rows)
    assert seen == [size] * parts and len(result.losses) == 1
    assert len(freed) == 2 + parts  # before the first one, after each, and at the end


# a common beginning is computed once

ANSWERS = ("yes", "no"), ("yes", "never"), ("indeed so", "no")
SHARED = [
    dict(prompt=p, chosen=c, rejected=r) for p in ("short", "a somewhat longer prompt") for c, r in ANSWERS
]


def some_policies(tiny):
    "Four on one base: two of different ranks, one on a few layers only, and the bare base."
    made = (
        Policy(tiny, "student", r=4),
        Policy(tiny, "other", r=7),
        Policy(tiny, "narrow", r=2, target_modules=["v_proj", "down_proj"]),
    )
    for i, p in enumerate(made):
        g = torch.Generator().manual_seed(i)
        p.load_state({k: 0.3 * torch.randn(w.shape, generator=g) for k, w in p.state().items()})
    return [*made, Policy(tiny, "base")]


@pytest.mark.parametrize("few", [True, False])
def test_several_policies_in_a_batch_say_what_each_says_alone(tiny, few):
    policies = some_policies(tiny)
    tiny.unpack_rows = 64 if few else 8
    asked = [
        (p, [f"{'long ' * i}question {j}" for j in range(3)], i if i else [5, 6, 7])
        for i, p in enumerate(policies)
    ]
    assert tiny._can_mix([p.name for p in policies], 36, 9) == few
    alone = [p.sample(prompts, 3, 9, seed=seed) for p, prompts, seed in asked]
    seen = []
    together = Policy.sample_together(asked, 3, 9, progress=lambda done, tokens: seen.append((done, tokens)))
    assert [s.texts for s in together] == [s.texts for s in alone] and [s.seed for s in together] == [
        [5, 6, 7],
        1,
        2,
        3,
    ]
    for s, t in zip(together, alone):
        assert np.allclose(
            [lp for r in s for a in r for lp in a.logprobs],
            [lp for r in t for a in r for lp in a.logprobs],
            atol=1e-4,
        )
    assert (
        len({str(s.texts) for s in alone}) == 4
        and sum(d for d, _ in seen) == 36
        and sum(n for _, n in seen) == sum(s.n_tokens for s in alone)
    )
    assert not any("forward" in vars(m) for m in tiny._products("student"))


def test_policies_that_cannot_be_mixed_answer_in_turn_or_say_why(tiny):
    a, b = Policy(tiny, "one"), Policy(tiny, "two")
    from peft import LoraConfig

    tiny.add_adapter("dora", LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM"))
    odd = Policy.resident(tiny, "dora")
    assert (
        tiny._can_mix(["one", "two"], 2, 9)
        and not tiny._can_mix(["one", "dora"], 2, 9)
        and not tiny._can_mix(["one", "two"], 2, 3)
    )
    in_turn = [p.sample(["x"], 1, 9, seed=i).texts for i, p in enumerate((a, odd))]
    assert [s.texts for s in Policy.sample_together([(a, ["x"], 0), (odd, ["x"], 1)], 1, 9)] == in_turn
    stranger = Policy(Base.load(tiny.name), "stranger")
    with pytest.raises(ValueError, match="different bases"):
        Policy.sample_together([(a, ["x"], 0), (stranger, ["x"], 0)])
    b.delete()
    with pytest.raises(ValueError, match="unknown adapter 'two'"):
        Policy.sample_together([(a, ["x"], 0), (b, ["x"], 0)])


def test_the_lean_layers_have_the_gradients_of_pefts(policy):
    base = policy.base
    g = torch.Generator().manual_seed(0)
    policy.load_state({k: 0.1 * torch.randn(w.shape, generator=g) for k, w in policy.state().items()})
    ids = torch.randint(3, 98, (3, 20), generator=g)

    def found():
        base.peft.set_adapter("student")
        weights = {n: p for n, p in base.peft.named_parameters() if p.requires_grad}
        loss = base.model(input_ids=ids, labels=ids).loss
        grads = torch.autograd.grad(loss, list(weights.values()))
        base.peft.requires_grad_(False)
        return loss.item(), dict(zip(weights, grads))

    (loss, plain), forwards = found(), sum("forward" in vars(m) for m in base.model.modules())
    with update_module._inputs_only(base, "student"):
        # seven products in each of two layers
        assert sum("forward" in vars(m) for m in base.model.modules()) == forwards + 14
        lean_loss, lean = found()
    assert (
        sum("forward" in vars(m) for m in base.model.modules()) == forwards and len(plain) == len(lean) == 28
    )
    assert lean_loss == pytest.approx(loss, abs=1e-6) and min(w.abs().max() for w in plain.values()) > 0
    for n, w in plain.items():
        torch.testing.assert_close(lean[n], w, rtol=1e-4, atol=1e-6 * w.abs().max().item(), msg=n)


def test_layout_holds_every_list_and_a_common_beginning_once():
    rng = np.random.default_rng(0)
    lists = [[1] * 10 + rng.integers(2, 4, rng.integers(1, 30)).tolist() for _ in range(200)] + [
        [5],
        [5],
        [5, 5],
    ]
    for share in True, False:
        rows, places = lay_out(lists, share, limit=64)
        batch = pack(rows, 0, "cpu", share)
        for tokens, (row, columns) in zip(lists, places):
            assert [rows[row].tokens[c] for c in columns] == tokens and [
                rows[row].before[c] for c in columns
            ] == [-1, *columns[:-1]]
            assert batch["position_ids"][row, columns].tolist() == list(range(len(tokens)))
            if share:
                assert batch["attention_mask"][row, 0, columns[-1]].nonzero()[:, 0].tolist() == columns
        if not share:
            assert len(rows) == len(lists)
            continue
        assert len(rows) < len(lists) / 4 and all(len(r.tokens) <= 64 + 40 for r in rows)
        for r in rows:
            assert len(set(zip(r.tokens, r.before))) == len(r.tokens)  # nothing stands twice


def test_a_beginning_longer_than_a_row_is_shared_all_the_same():
    rows, places = lay_out([[1] * 1000 + [k] for k in range(2, 40)] + [[2] * 1000], limit=64)
    assert len(rows) == 2 and len(rows[0].tokens) == 1000 + 38


def test_sharing_changes_no_sample(policy, monkeypatch):
    prompts = ["short", "shorter", "a somewhat longer prompt", "short"]
    shared = policy.sample(prompts, n_samples=3, max_new_tokens=6, seed=0)
    monkeypatch.setattr(sampling_module, "can_share", lambda config: False)
    plain = policy.sample(prompts, n_samples=3, max_new_tokens=6, seed=0)
    for a, b in zip(sum(shared, []), sum(plain, [])):
        assert a.token_ids == b.token_ids and a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def test_sharing_changes_no_logprob(policy, monkeypatch):
    prompts = [p["prompt"] for p in SHARED] * 2
    answers = [p["chosen"] for p in SHARED] + [p["rejected"] for p in SHARED]
    shared = policy.logprobs(prompts, answers)
    monkeypatch.setattr(sampling_module, "can_share", lambda config: False)
    assert torch.allclose(shared, policy.logprobs(prompts, answers), atol=1e-5)
    alone = torch.stack([policy.logprobs([p], [a])[0] for p, a in zip(prompts, answers)])
    assert torch.allclose(shared, alone, atol=1e-5)


@pytest.mark.parametrize("update", ["dpo", "sft"])
def test_sharing_changes_no_update(policy, monkeypatch, update):
    reference, start = policy.snapshot("ref0"), policy.state()
    settings = dict(per_device_train_batch_size=3, num_train_epochs=2, learning_rate=1e-3)

    def run():
        policy.load_state(start)
        if update == "dpo":
            return dpo(policy, SHARED, reference, **settings), policy.state()
        return (
            sft(policy, [dict(prompt=p["prompt"], completion=p["chosen"]) for p in SHARED], **settings),
            policy.state(),
        )

    shared, weights = run()
    monkeypatch.setattr(update_module, "can_share", lambda config: False)
    plain, plain_weights = run()
    assert shared.losses == pytest.approx(plain.losses, abs=1e-5) and len(set(shared.losses)) > 2
    norms = [[h["grad_norm"] for h in r.history if "grad_norm" in h] for r in (shared, plain)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert all(torch.allclose(weights[k], plain_weights[k], atol=1e-5) for k in weights)


def test_logprobs_from_sampling_stand_for_a_forward_pass(policy):
    reference, start = policy.snapshot("ref0"), policy.state()
    known = lambda k: reference.logprobs([p["prompt"] for p in SHARED], [p[k] for p in SHARED]).tolist()
    pairs = [
        p | dict(chosen_logps=c, rejected_logps=r)
        for p, c, r in zip(SHARED, known("chosen"), known("rejected"))
    ]
    computed = dpo(policy, pairs, reference).losses
    policy.load_state(start)
    assert dpo(policy, pairs, reference, sampled_by_reference=True).losses == pytest.approx(
        computed, abs=1e-6
    )
    policy.load_state(start)
    shifted = [p | dict(chosen_logps=p["chosen_logps"] + 5) for p in pairs]
    # they are what is used
    assert dpo(policy, shifted, reference, sampled_by_reference=True).losses[0] > computed[0] + 0.1
    with pytest.raises(ValueError, match="no 'chosen_logps'"):
        dpo(policy, SHARED, reference, sampled_by_reference=True)


def test_sampled_tokens_are_trained_as_they_were(policy):
    ids = policy.base.tokenizer("y")["input_ids"] * 3
    _, [row], _ = update_module.tokenize_pairs(
        policy.base, [dict(prompt="a", chosen="yyy", rejected="n", chosen_ids=ids)]
    )
    assert row["chosen_ids"] == ids and row["rejected_ids"][-1] == policy.base.end_id


def test_pairs_of_a_prompt_meet_in_a_batch():
    rows = [dict(prompt_ids=[k], row=i) for i, k in enumerate([1, 2, 1, 3, 2, 1])]
    epochs = [
        [r["row"] for r in order] for order, _ in zip(update_module._by_prompt(rows, seed=0), range(20))
    ]
    for order in epochs:
        assert sorted(order) == list(range(6))
        for group in (0, 2, 5), (1, 4):
            assert max(map(order.index, group)) - min(map(order.index, group)) == len(group) - 1
    assert len({tuple(e) for e in epochs}) > 1


@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda p: p.generate([]), ValueError, "no prompts"),
        (lambda p: p.generate(7), TypeError, "int"),
        (lambda p: p.generate(["a", 7]), TypeError, "prompt 1 is 7"),
        (lambda p: p.generate({"prompt": "a"}), TypeError, "a row with the keys .'prompt'.*under 'prompt'"),
        (lambda p: p.generate([{"prompt": "a", "answer": 3}]), TypeError, "prompt 0 is a row with the keys"),
        (lambda p: p.generate({"role": "user", "content": "a"}), TypeError, "a message by itself"),
        (
            lambda p: p.generate(({"role": "user", "content": "a"},)),
            TypeError,
            "prompt 0 is a message by itself",
        ),
        (lambda p: p.generate(b"a"), TypeError, "bytes"),
        (lambda p: p.generate(None), TypeError, "NoneType"),
        (lambda p: p.generate({"a", "b"}), TypeError, "set"),
        (lambda p: p.generate("a", n_samples=True), ValueError, "n_samples is True"),
        (lambda p: p.generate("a", max_new_tokens=2.0), ValueError, "max_new_tokens is 2.0"),
        (lambda p: p.generate("a", temperature="hot"), ValueError, "temperature is 'hot'"),
        (lambda p: p.generate("a", temperature=float("nan")), ValueError, "temperature is nan"),
        (lambda p: p.generate("a", top_p=None), ValueError, "top_p is None"),
        (lambda p: p.generate("a", seed=-1), ValueError, "a seed is -1"),
        (lambda p: p.generate("a", seed=[0.5]), ValueError, "a seed is 0.5"),
        (lambda p: p.logprobs("a", [1, 10**6]), ValueError, "token ids, whole numbers below"),
        (lambda p: p.logprobs(["a", "b"], ["c", "d"], finished=[True]), ValueError, "2 prompts but 1 values"),
        (lambda p: Policy("base"), TypeError, "expected a Base"),
        (lambda p: Policy(p.base, "other", r=0), ValueError, "rank r is 0"),
        (lambda p: Policy(p.base, 3), ValueError, "adapter name 3"),
        (lambda p: Policy(p.base, "lora_A"), ValueError, "begins with 'lora_'"),
        (lambda p: Policy(p.base, "base_layer"), ValueError, "part of the model"),
        (lambda p: p.snapshot("../up"), ValueError, "letters, digits"),
        (lambda p: p.generate("a", n_samples=0), ValueError, "n_samples is 0"),
        (lambda p: p.generate("a", max_new_tokens=0), ValueError, "max_new_tokens is 0"),
        (lambda p: p.generate("a", temperature=-1), ValueError, "temperature is -1"),
        (lambda p: p.generate("a", top_p=0), ValueError, "top_p is 0"),
        (lambda p: p.generate(["a", "b" * 400]), ValueError, "prompt 1 has .* the context .* 256"),
        (lambda p: p.logprobs(["a", "b"], ["c"]), ValueError, "2 prompts but 1 completions"),
        (lambda p: p.snapshot("student"), ValueError, "'student' is taken"),
        (lambda p: p.snapshot("base"), ValueError, "'base' is taken"),
        (lambda p: p.snapshot("ref"), ValueError, "'ref' is taken.*TRL"),
        (lambda p: Policy(p.base, "default"), ValueError, "'default' is taken.*TRL"),
        (lambda p: p.snapshot("a.b"), ValueError, "letters, digits"),
        (lambda p: p.snapshot("mlp"), ValueError, "part of the model"),
        (
            lambda p: Policy.resident(p.base, "nobody"),
            ValueError,
            "unknown adapter 'nobody'; resident.*student",
        ),
        (lambda p: Policy.load(p.base, "/nowhere"), ValueError, "no adapter_config.json"),
        (lambda p: dpo(p, [], p.snapshot("ref0")), ValueError, "nothing to train on"),
        (lambda p: dpo(p.snapshot("ref0"), PAIRS, p), ValueError, "frozen"),
        (lambda p: dpo(Policy(p.base, "base"), PAIRS, p), ValueError, "frozen"),
        (
            lambda p: dpo(p, [PAIRS[0] | {"chosen": " "}], p.snapshot("ref0")),
            ValueError,
            "nothing to train on.*'empty': 1",
        ),
        (lambda p: dpo(p, [dict(prompt="a", chosen="b")], p.snapshot("ref0")), ValueError, "pair 0 lacks"),
        (lambda p: sft(p, []), ValueError, "nothing to train on"),
        (lambda p: sft(p, [dict(prompt="a")]), ValueError, "row 0 has .*expected 'prompt' and 'completion'"),
    ],
)
def test_bad_input_is_named(policy, call, error, says):
    with pytest.raises(error, match=says):
        call(policy)
    assert isinstance(policy.generate("still alive", max_new_tokens=2), str)


@pytest.mark.parametrize("top_p", [0.3, 1.0])
def test_a_number_that_rounds_to_1_draws_no_excluded_token(policy, monkeypatch, top_p):
    "The largest float64 below 1 is 1 in float32, which is where the tokenizer's last token would be."
    allowed = {
        x.token_ids[0] for x in policy.sample("q", n_samples=2000, max_new_tokens=1, top_p=top_p, seed=0)[0]
    }
    monkeypatch.setattr(sampling_module, "uniforms", lambda seed, ids, k, n: np.full(n, np.nextafter(1, 0)))
    said = policy.sample("q", n_samples=3, max_new_tokens=1, top_p=top_p, seed=0)[0]
    with policy.base.running("student") as model:
        order = model(torch.tensor([policy.base.encode("q")])).logits[0, -1].softmax(-1)
    last = max(i for i in range(len(order)) if order[i] > 0) if top_p == 1 else max(allowed)
    assert {x.token_ids[0] for x in said} == {last} and all(np.isfinite(x.logprobs).all() for x in said)


# adapters of others


def parts(base):
    return {n: p.detach().clone() for n, p in base.model.named_parameters() if "lora_" not in n}


@pytest.mark.parametrize(
    "change, says",
    [
        ({"init_lora_weights": "olora"}, "'olora', which changes the base"),
        ({"init_lora_weights": "pissa"}, "'pissa', which changes the base"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "has layer_replication"),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save"),
        ({"trainable_token_indices": [5, 6]}, "has trainable_token_indices"),
        ({"bias": "all"}, "has bias"),
        ({"r": 100_000}, "rank 100000, its matrices have .4"),
        ({"r": 0}, "rank r is 0"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}, "PROMPT_TUNING: expected LORA"),
        ({"peft_type": "X"}, "damaged"),
        ({"target_modules": ["nothing"]}, "nothing"),
        ({"target_modules": ["q_proj"]}, "do not fit"),
    ],
)
@pytest.mark.parametrize("others", [True, False])
def test_an_adapter_that_cannot_be_had_is_refused_and_leaves_nothing(
    tiny, tiny_folder, tmp_path, change, says, others
):
    made = Policy(Base.load(tiny_folder, dtype=torch.float32, device="cpu"), "made", r=4).save(
        tmp_path / "made"
    )
    if others:
        Policy(tiny, "student")
    before = parts(tiny)
    adapters = tiny.adapters
    anchor = Policy(tiny, "base").logprobs("a", "b")
    config = json.loads((made / "adapter_config.json").read_text())
    (made / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=says):
        Policy.load(tiny, made, "loaded")
    after = {n.replace(".base_layer.", "."): p for n, p in parts(tiny).items()}
    assert tiny.adapters == adapters and all(
        torch.equal(p, after[n.replace(".base_layer.", ".")]) for n, p in before.items()
    )
    assert torch.equal(Policy(tiny, "base").logprobs("a", "b"), anchor)
    assert not any(".loaded." in n for n, _ in tiny.model.named_parameters())
    (made / "adapter_config.json").write_text(json.dumps(config))
    assert Policy.load(tiny, made, "loaded").generate("a", max_new_tokens=2) is not None  # the name is free


def test_an_adapter_with_numbers_that_are_not_finite_is_refused(policy, tmp_path):
    from safetensors.torch import load_file, save_file

    file = policy.save(tmp_path / "saved") / "adapter_model.safetensors"
    state = load_file(file)
    next(iter(state.values()))[0, 0] = float("nan")
    save_file(state, file)
    with pytest.raises(ValueError, match="not finite"):
        Policy.load(policy.base, tmp_path / "saved", "loaded")
    assert policy.base.adapters == ["student"]


@pytest.mark.parametrize(
    "settings",
    [
        dict(use_rslora=True),
        dict(use_dora=True),
        dict(lora_bias=True),
        dict(rank_pattern={"q_proj": 2}),
        dict(init_lora_weights="gaussian"),
        dict(target_modules=["q_proj"], layers_to_transform=[1]),
    ],
)
def test_adapters_of_peft_that_are_lora_alone_are_read_as_peft_reads_them(
    tiny, tiny_folder, tmp_path, settings
):
    from peft import LoraConfig, PeftModel, get_peft_model

    plain = Base.load(tiny_folder, dtype=torch.float32, device="cpu").model
    made = get_peft_model(
        plain,
        LoraConfig(**dict(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM") | settings),
    )
    g = torch.Generator().manual_seed(0)
    for n, w in made.named_parameters():
        if "lora_" in n:
            w.data += 0.2 * torch.randn(w.shape, generator=g)
    made.save_pretrained(tmp_path / "made")
    ours = Policy.load(tiny, tmp_path / "made", "loaded").logprobs("a question", "an answer", per_token=True)[
        0
    ]
    theirs = PeftModel.from_pretrained(
        Base.load(tiny_folder, dtype=torch.float32, device="cpu").model, tmp_path / "made"
    ).eval()
    prompt = tiny.encode("a question")
    answer = tiny.completion_ids("an answer")
    with torch.no_grad():
        logits = theirs(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    assert torch.allclose(ours, logits[range(len(answer)), answer], atol=1e-4)


@pytest.mark.parametrize("name", ["A", "x", "student-1", "loraX", "q", "w_0", "0_1"])
def test_odd_names_keep_their_weights(tiny, tmp_path, name):
    plain, odd = Policy(tiny, "plain", r=4), Policy(tiny, name, r=4)
    filled(odd)
    assert odd.state().keys() == plain.state().keys() and odd.n_parameters() == plain.n_parameters()
    odd.save(tmp_path / "odd")
    again = Policy.load(tiny, tmp_path / "odd", "again")
    assert all(torch.equal(a, b) for a, b in zip(odd.state().values(), again.state().values(), strict=True))


# whoever is asked


def test_a_seed_for_each_prompt_whoever_is_asked(policy):
    class Plain:
        "A player that takes one seed for all."

        def generate(self, prompts, n_samples=1, seed=0, **sampling):
            rng = np.random.default_rng(seed)
            rows = [[str(rng.integers(10**9)) for _ in range(n_samples)] for _ in prompts]
            return [r[0] for r in rows] if n_samples == 1 else rows

    prompts, seeds = ["a", "b", "c"], [4, 5, 6]
    for player in Plain(), Scripted(lambda p, rng: str(rng.random())), policy:
        rows, *_ = answers_of(player, prompts, 2, seed=seeds)
        for p, s, row in zip(prompts, seeds, rows):
            assert [a.text for a in answers_of(player, [p], 2, seed=[s])[0][0]] == [a.text for a in row]
        back, *_ = answers_of(player, prompts[::-1], 2, seed=seeds[::-1])
        assert [[a.text for a in r] for r in back[::-1]] == [[a.text for a in r] for r in rows]
        with pytest.raises(ValueError, match="2 seeds for 3 prompts"):
            answers_of(player, prompts, 2, seed=[1, 2])


@pytest.mark.parametrize("said", ["one text for all", None, [1, 2], [["a"], ["b"]], ["a"]])
def test_a_player_that_answers_in_another_shape(said):
    class Odd:
        def generate(self, prompts, **sampling):
            return said

    with pytest.raises(ValueError, match="the player .Odd. gave .* expected a text for each of 2 prompts"):
        answers_of(Odd(), ["a", "b"])


def test_a_deleted_policy_says_so(policy):
    other = policy.snapshot("other")
    other.delete()
    with pytest.raises(ValueError, match="unknown adapter 'other'"):
        other.generate("a")


def test_the_bare_base_answers_after_its_last_adapter_was_deleted(policy):
    "PEFT goes on naming the deleted one as active, also when another is added."
    base = policy.base
    before = Policy(base, "base").logprobs(["a"], ["b"])
    policy.delete()
    assert torch.equal(Policy(base, "base").logprobs(["a"], ["b"]), before)
    Policy(base, "another")
    assert torch.equal(Policy(base, "base").logprobs(["a"], ["b"]), before)


def noisy(base, name, **settings):
    policy, g = Policy(base, name, r=4, **settings), torch.Generator().manual_seed(0)
    policy.load_state({k: w + 0.2 * torch.randn(w.shape, generator=g) for k, w in policy.state().items()})
    return policy


def test_the_base_and_a_policy_as_plain_models(policy, tmp_path):
    "Out of the four bits, and with the adapter's product; read by Transformers alone."
    base, other = policy.base, noisy(policy.base, "other")
    prompts, answers = ["1 + 1 =", "a b c"], ["two", "d"]
    known = {"base": Policy(base, "base"), "other": other}
    here = {name: p.logprobs(prompts, answers) for name, p in known.items()}
    assert (here["base"] - here["other"]).abs().min() > 0.1
    for name, p in known.items():
        folder = write_model(base, tmp_path / name, "float32", p)
        whole = Base.load(folder, load_in_4bit=False, dtype="float32", device="cpu")
        assert torch.allclose(Policy(whole, "base").logprobs(prompts, answers), here[name], atol=1e-3)
        assert whole.encode("1 + 1 =") == base.encode("1 + 1 =") and whole.eos_ids == base.eos_ids
        assert not list(tmp_path.glob("tmp*"))
    assert base.adapters == ["student", "other"], "they stay where they are"
    ids = torch.tensor([base.encode("1 + 1 =") + base.completion_ids("two")])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "other", dtype=torch.float32)
    with torch.no_grad(), base.running("other") as ours:
        assert torch.allclose(model(ids).logits, ours(ids).logits, atol=1e-3)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_a_model_is_written_to_new_folders_alone(policy, tiny_folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("y")
    with pytest.raises(ValueError, match="not empty and is left as it is"):
        write_model(policy.base, tmp_path / "mine")
    stranger = Base.load(tiny_folder, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="is on another base"):
        write_model(stranger, tmp_path / "new", policy=policy)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "settings, layer",
    [
        (dict(target_modules=["lm_head", "q_proj"]), "lm_head.weight"),
        (dict(target_modules=["q_proj"], use_dora=True), "lora_magnitude_vector"),
    ],
)
def test_no_model_is_written_without_a_part_of_its_adapter(tiny_folder, tmp_path, settings, layer):
    from peft import LoraConfig

    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.lm_head.weight = model.get_input_embeddings().weight  # as in small models, the wheel's among them
    base = Base(model, AutoTokenizer.from_pretrained(tiny_folder))
    base.add_adapter("other", LoraConfig(r=4, task_type="CAUSAL_LM", **settings))
    with pytest.raises(ValueError, match=f"more than products beside linear layers: .*{layer}"):
        write_model(base, tmp_path / "new", policy=Policy.resident(base, "other"))
    assert not (tmp_path / "new").exists()


def test_an_adapter_on_embeddings_is_refused_and_leaves_nothing(policy):
    "They have no place in the state, the update or the mixed sampling."
    base, before = policy.base, policy.logprobs(["a"], ["b"])
    for layers in ["embed_tokens"], ["embed_tokens", "q_proj"]:
        with pytest.raises(ValueError, match="on embeddings, which no update here trains"):
            Policy(base, "other", target_modules=layers)
    assert base.adapters == ["student"] and not [n for n, _ in base.model.named_parameters() if "other" in n]
    assert torch.equal(policy.logprobs(["a"], ["b"]), before)


FIRST = """
import os, sys
import torch
from selfplay_nb import Base, Policy

torch.set_num_threads(1)
policy = Policy(Base.load(sys.argv[1], dtype=torch.float32, device="cpu"), "student")
calls = dict(
    sample=lambda: policy.sample("a", max_new_tokens=2),
    generate=lambda: policy.generate("a", max_new_tokens=2),
    logprobs=lambda: policy.logprobs(["a"], ["b"]),
    snapshot=lambda: policy.snapshot("other"),
    save=lambda: policy.save(sys.argv[2]),
    weights_sum=lambda: policy.weights_sum(),
    repr=lambda: repr(policy),
    by_name=lambda: policy.base.policy("student"),
    delete=lambda: policy.delete(),
)
for name, call in calls.items():
    if not (child := os.fork()):
        try:
            call()
            os._exit(0)
        except BaseException as e:
            print(name, repr(e), flush=True)
            os._exit(1)
    assert not os.waitpid(child, 0)[1], name
"""


def test_each_method_may_be_the_first_that_is_called(tiny_folder, tmp_path):
    "What it needs is imported when it is needed: nothing else has been used in this process before."
    command = [sys.executable, "-c", FIRST, str(tiny_folder), str(tmp_path / "saved")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_a_tokenizer_without_chat_template(tmp_path):
    base = Base.load(tiny_model_folder(tmp_path, chat_template=False), device="cpu")
    policy = Policy(base, "student")
    assert isinstance(policy.generate("plain text", max_new_tokens=2), str)
    with pytest.raises(ValueError, match="no chat template"):
        policy.generate([{"role": "user", "content": "a"}])


def test_save_and_load(policy, tmp_path):
    dpo(policy, PAIRS, policy.snapshot("ref0"))
    policy.save(tmp_path / "saved")
    policy.save(tmp_path / "saved")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["saved"]
    assert sorted(f.name for f in (tmp_path / "saved").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    loaded = Policy.load(policy.base, tmp_path / "saved", "loaded")
    assert all(
        torch.equal(a, b) for a, b in zip(policy.state().values(), loaded.state().values(), strict=True)
    )


def test_a_damaged_adapter_is_an_error_and_leaves_nothing(policy, tmp_path):
    file = policy.save(tmp_path / "saved") / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="damaged"):
        Policy.load(policy.base, tmp_path / "saved", "loaded")
    other = Policy(policy.base, "small", r=4).save(tmp_path / "small")
    with pytest.raises(ValueError, match="do not fit"):
        policy.load_state(Policy.load(policy.base, other, "other").state())
    assert policy.base.adapters == ["student", "small", "other"]


def test_the_policy_gradient_is_that_of_advantage_times_logprob(policy):
    rows = [
        dict(
            prompt=f"same beginning, {i // 3}",
            completion="abc"[: i % 3 + 1],
            advantage=(-1) ** i * (i + 1) / 4,
        )
        for i in range(6)
    ]
    for r in rows:
        r["completion_ids"] = policy.base.completion_ids(r["completion"])
    other, before = policy.snapshot("other"), policy.state()
    was = policy.logprobs([r["prompt"] for r in rows], [r["completion"] for r in rows])
    theirs = other.state()
    weight = torch.tensor([r["advantage"] for r in rows])
    result = reinforce(policy, rows, learning_rate=1e-2, optim="sgd", max_grad_norm=0)
    assert result.losses == pytest.approx([-(weight * was).mean().item()], abs=1e-4)
    mine = policy.state()
    policy.load_state(before)
    # the same by autograd, one row at a time
    with policy.base.running(policy.name) as model, torch.enable_grad():
        names = [n for n, _ in model.named_parameters() if ".student." in n]
        params = [p.requires_grad_(True) for n, p in model.named_parameters() if n in names]
        loss = 0.0
        for r in rows:
            prompt, ids = policy.base.encode(r["prompt"]), r["completion_ids"]
            lp = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            loss = loss - r["advantage"] * lp[range(len(ids)), ids].sum() / len(rows)
        loss.backward()
        with torch.no_grad():
            for p in params:
                p -= 1e-2 * p.grad
                p.grad = None
                p.requires_grad_(False)
    plain = policy.state()
    assert all(torch.allclose(mine[k], plain[k], atol=1e-6) for k in mine) and any(
        not torch.equal(mine[k], before[k]) for k in mine
    )
    assert all(torch.equal(v, theirs[k]) for k, v in other.state().items())


def test_a_policy_gradient_moves_the_right_way_and_counts_what_it_drops(policy):
    rows = [
        dict(prompt="q", completion="yes", advantage=1.0),
        dict(prompt="q", completion="no", advantage=-1.0),
    ]

    def margin():
        return (policy.logprobs("q", "yes") - policy.logprobs("q", "no")).item()

    before = margin()
    bad = [dict(prompt="q", completion="x", advantage=a) for a in (0.0, float("nan"), float("inf"))]
    bad.append(dict(prompt="q", completion="x" * policy.base.context_length, advantage=1.0))
    result = reinforce(policy, rows * 4 + bad, learning_rate=1e-2, num_train_epochs=3)
    assert (
        margin() > before + 0.1
        and result.n_rows == 8
        and dict(result.dropped) == {"no advantage": 1, "non-finite": 2, "over-long": 1}
    )
    with pytest.raises(ValueError, match="no advantage"):
        reinforce(policy, bad)
    with pytest.raises(ValueError, match="row 0 has .*'advantage'"):
        reinforce(policy, PAIRS)
    with pytest.raises(ValueError, match="frozen"):
        reinforce(policy.snapshot("fixed"), rows)


def test_saving_leaves_what_it_did_not_make(policy, tmp_path):
    thesis = tmp_path / "project"
    thesis.mkdir()
    (thesis / "thesis.tex").write_text("years of work")
    file = tmp_path / "file"
    file.write_text("mine")
    link = tmp_path / "link"
    link.symlink_to(thesis)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in "adapter_config.json", "adapter_model.safetensors":
        (foreign / name).write_text("of another program")
    beside = policy.save(tmp_path / "beside")
    (beside / "notes.txt").write_text("mine")

    def contents():
        return {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    before = contents()
    for folder in thesis, file, link, foreign, beside:
        with pytest.raises(ValueError, match="left as it is"):
            policy.save(folder)
    assert contents() == before and link.is_symlink()
    (tmp_path / "empty").mkdir()
    for folder in tmp_path / "empty", tmp_path / "new":
        assert policy.save(folder) == policy.save(folder) == folder
