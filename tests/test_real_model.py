"""What must hold on the real small model: gradients, isolation, log-probabilities, replay, and loading
elsewhere.
"""

import math

import pytest
import torch
from peft import PeftModel

from selfplay_nb.models.base import load_model
from selfplay_nb.models.policy import Base, Policy
from selfplay_nb.models.update import dpo, sft

PROMPTS = [
    "Name a fruit.",
    "What is 12 + 30?",
    "Write one short sentence about the sea and the wind that blows over it.",
]
ANSWERS = ["An apple.", "12 + 30 = 42", "The wind moves over the sea."]
PAIRS = [dict(prompt=f"{a} + 1 =", chosen=str(a + 1), rejected=f"{a} is a number") for a in range(4)]
PLAIN = dict(loss_type=["sigmoid"], loss_weights=None, per_device_train_batch_size=4)


def gradients(base, policy):
    "Gradients of the adapter's weights for a likelihood loss, through the frozen 4-bit base."
    base.peft.set_adapter(policy.name)
    base.model.train()
    ids = torch.tensor([base.encode(PROMPTS[1]) + base.completion_ids(ANSWERS[1])])
    base.model(input_ids=ids, labels=ids).loss.backward()
    out = {n: p.grad.clone() for n, p in base.model.named_parameters() if p.grad is not None}
    for p in base.model.parameters():
        p.grad = None
    base.peft.requires_grad_(False)
    base.model.eval()
    return out


@pytest.fixture(scope="module")
def fresh():
    "A base that has never generated."
    return Base.load(dtype=torch.float32, device="cpu")


@pytest.fixture
def twin(fresh, student):
    "The student, on the fresh base."
    policy = Policy(fresh, "student", seed=1)
    policy.load_state(student.state())
    yield policy
    for name in list(fresh.adapters):
        Policy.resident(fresh, name).delete()


def test_generate_then_train_gives_the_gradients_of_a_fresh_model(real, student, fresh, twin):
    student.generate(PROMPTS, max_new_tokens=2)
    used = gradients(real, student)
    untouched = gradients(fresh, twin)
    assert used.keys() == untouched.keys() and len(used) == 2 * 7 * 30
    assert all(g.abs().max() > 0 for n, g in used.items() if "lora_B" in n)
    assert all(torch.equal(used[n], untouched[n]) for n in used)


def test_update_after_generation_equals_update_of_a_fresh_model(student, twin):
    start = student.snapshot("start")
    student.generate(PROMPTS, max_new_tokens=2)
    dpo(student, PAIRS, start, **PLAIN)
    dpo(twin, PAIRS, twin.snapshot("start"), **PLAIN)
    assert all(
        torch.equal(a, b) for a, b in zip(student.state().values(), twin.state().values(), strict=True)
    )


def test_training_moves_the_student_and_nothing_else(real, student):
    snapshot = student.snapshot("snapshot")
    other = Policy(real, "other", seed=3)

    def rest():
        return {
            n: p.detach().clone()
            for n, p in [*real.model.named_parameters(), *real.model.named_buffers()]
            if ".student." not in n
        }

    before, mine, adapters = rest(), student.state(), real.adapters
    attributes = {m: set(vars(m)) for m in real.model.modules()}
    config = real.model.config.to_dict()
    dpo(student, PAIRS, snapshot)
    sft(student, [dict(prompt=p["prompt"], completion=p["chosen"]) for p in PAIRS])
    after = rest()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert any(not torch.equal(a, b) for a, b in zip(mine.values(), student.state().values(), strict=True))
    assert real.adapters == adapters and other.name in adapters
    assert {p.dtype for n, p in real.model.named_parameters() if ".student." in n} == {torch.float32}
    assert not any(p.requires_grad for p in real.model.parameters()) and not real.model.training
    assert (
        attributes == {m: set(vars(m)) for m in real.model.modules()}
        and config == real.model.config.to_dict()
    )


def test_first_loss_against_oneself_is_log_2(student):
    first = dpo(student, PAIRS, student.snapshot("start"), **PLAIN).losses[0]
    assert first == pytest.approx(math.log(2), abs=1e-5)


def plain_logprobs(model, prompt, answer):
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logits.gather(-1, torch.tensor(answer)[:, None])[:, 0]


def test_logprobs_are_those_of_a_plain_forward_pass_whatever_the_batch(real, student):
    "Token by token, to 1e-4."
    ours = student.logprobs(PROMPTS, ANSWERS, per_token=True)
    with real.running("student") as model:
        plain = [
            plain_logprobs(model, real.encode(p), real.completion_ids(a))
            for p, a in zip(PROMPTS, ANSWERS, strict=True)
        ]
    alone = [student.logprobs(p, a, per_token=True)[0] for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    for mine, theirs, single in zip(ours, plain, alone, strict=True):
        assert mine.shape == theirs.shape
        assert (mine - theirs).abs().max() < 1e-4 and (mine - single).abs().max() < 1e-4
    assert student.logprobs(PROMPTS, ANSWERS).tolist() == pytest.approx(
        [t.sum().item() for t in ours], abs=1e-4
    )


def test_logprobs_agree_with_trl(student):
    start = student.snapshot("start")
    log = dpo(student, PAIRS, start, **PLAIN).history[0]
    for which in "chosen", "rejected":
        ours = start.logprobs([p["prompt"] for p in PAIRS], [p[which] for p in PAIRS]).mean().item()
        assert log[f"logps/{which}"] == pytest.approx(ours, abs=1e-4)


def test_same_seed_same_samples_alone_and_in_company(student):
    settings = dict(n_samples=2, max_new_tokens=6, temperature=0.8, seed=7)
    first = student.sample(PROMPTS, **settings)
    again = student.sample(PROMPTS, **settings)
    assert [[x.token_ids for x in row] for row in first] == [[x.token_ids for x in row] for row in again]
    alone = [student.sample(p, **settings)[0] for p in PROMPTS]
    assert first.texts == [[x.text for x in row] for row in alone]
    assert student.sample(PROMPTS, **settings | {"seed": 8}).texts != first.texts
    repeated = student.sample([PROMPTS[0]] * 2, **settings | {"n_samples": 1})
    assert [row[0].text for row in repeated] == first.texts[0]


def test_recorded_logprobs_are_those_of_scoring(student):
    s = student.sample(PROMPTS, n_samples=2, max_new_tokens=4, seed=0)
    scored = student.logprobs([p for p in PROMPTS for _ in range(2)], [x.token_ids for row in s for x in row])
    assert scored.tolist() == pytest.approx([sum(x.logprobs) for row in s for x in row], abs=1e-3)


def test_saved_adapter_loads_with_plain_peft_and_answers_the_same(student, tmp_path):
    dpo(student, PAIRS, student.snapshot("start"), learning_rate=1e-3)
    ours = student.generate(PROMPTS, temperature=0, max_new_tokens=6)
    student.save(tmp_path / "adapter")
    model, tokenizer = load_model(dtype=torch.float32, device="cpu")
    plain = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    for prompt, answer in zip(PROMPTS, ours, strict=True):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        out = plain.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids.input_ids.shape[1] :]
        assert tokenizer.decode(out, skip_special_tokens=True) == answer
