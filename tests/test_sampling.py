"The fast decoder says what the plain one says, with every way of sampling, guides and mixed adapters."

import math

import numpy as np
import pytest
import torch
from test_policy import some_policies

from selfplay_nb.methods.skill import Guidance
from selfplay_nb.models.base import Base
from selfplay_nb.models.sampling import (
    Owners,
    Request,
    Sampling,
    batches,
    choose,
    decode,
    decode_plainly,
    nucleus,
)

PROMPTS = ["a", "a much longer question", "a much longer answer", "bb", "a"]
SETTINGS = [
    Sampling(9),
    Sampling(40, temperature=1.3),
    Sampling(9, temperature=1.3, top_p=0.5),
    Sampling(9, temperature=0.7, top_p=0.9),
    Sampling(7, temperature=0),
    Sampling(1),
]


def plainly(base, batch, settings, guide=None):
    "Each answer of a batch by the plain decoder."
    said = []
    for request, k in batch:
        with base.running(request.adapter) as model:
            hook = dict(hook=guide) if guide else {}
            said.append(decode_plainly(model, request, k, settings, base.eos_ids, **hook))
    return said


def agree(fast, plain):
    assert [ids for ids, _ in fast] == [ids for ids, _ in plain]
    for (_, mine), (_, expected) in zip(fast, plain):
        assert mine == pytest.approx(expected, abs=1e-4)


def quickly(base, batch, settings, **more):
    with base.running(batch[0][0].adapter) as model:
        return decode(model, batch, settings, base.eos_ids, base.tokenizer.pad_token_id, **more)


@pytest.mark.parametrize("settings", SETTINGS, ids=repr)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])  # the second shares no beginnings
def test_the_fast_decoder_says_what_the_plain_one_says(tiny_folder, attention, settings):
    base = Base.load(tiny_folder, dtype="float32", device="cpu", attn_implementation=attention)
    policy = some_policies(base)[0]
    requests, _ = base.requests(policy.name, PROMPTS, 3, 40, seed=[4, 5, 6, 7, 4])
    batch = [(request, k) for request in requests for k in range(3)]
    fast = quickly(base, batch, settings)
    agree(fast, plainly(base, batch, settings))
    lengths = {len(ids) for ids, _ in fast}
    if settings.max_new_tokens == 40:
        assert len(lengths) >= 3  # some have ended early, at different steps
    agree(quickly(base, batch[4:5], settings), fast[4:5])  # alone, the same


@pytest.mark.parametrize("settings", SETTINGS, ids=repr)
def test_under_guidance_too(tiny, settings):
    policy, guide = some_policies(tiny)[0], Guidance(scale=2.5)
    requests, _ = tiny.requests(policy.name, PROMPTS, 2, 40, seed=3, guide=guide)
    assert [len(request.prompts) for request in requests] == [2] * 5
    batch = [(request, k) for request in requests for k in range(2)]
    fast = quickly(tiny, batch, settings, hook=guide)
    agree(fast, plainly(tiny, batch, settings, guide))
    with_samples = policy.sample(PROMPTS, 2, settings.max_new_tokens, settings.temperature, settings.top_p, 3)
    assert fast[0][1] != pytest.approx(with_samples[0][0].logprobs, abs=1e-3)  # it does something


@pytest.mark.parametrize("settings", SETTINGS[:4], ids=repr)
def test_a_batch_of_several_policies_too(tiny, settings):
    policies = some_policies(tiny)
    batch = []
    for i, policy in enumerate(policies):
        requests, _ = tiny.requests(policy.name, PROMPTS[i:], 2, 40, seed=i)
        batch += [(request, k) for request in requests for k in range(2)]
    batch = batch[::2] + batch[1::2]  # in any order
    with tiny.together(owners := Owners([policy.name for policy in policies])) as model:
        fast = decode(model, batch, settings, tiny.eos_ids, tiny.tokenizer.pad_token_id, owners=owners)
    agree(fast, plainly(tiny, batch, settings))
    assert not any("forward" in vars(m) for m in tiny.model.modules())


class Forbid:
    "A guide that never lets a token be chosen."

    def __init__(self, token):
        self.token = token

    def contexts(self, prompt):
        return [prompt]

    def __call__(self, logits):
        logits = logits[0].clone()
        logits[:, self.token] = -math.inf
        return logits


def test_a_guide_of_ones_own(tiny):
    policy = some_policies(tiny)[0]
    settings = dict(n_samples=50, max_new_tokens=12, seed=0)
    free = policy.sample("q", **settings)
    token = free[0][0].token_ids[0]
    held = policy.sample("q", guide=Forbid(token), **settings)
    assert any(token in s.token_ids for s in free[0]) and not any(token in s.token_ids for s in held[0])
    with policy.base.running(policy.name) as model:
        logits = model(torch.tensor([policy.base.encode("q")])).logits[0, -1]
    logits[token] = -math.inf
    first = held[0][0]
    assert first.logprobs[0] == pytest.approx(logits.log_softmax(-1)[first.token_ids[0]].item(), abs=1e-4)
    texts = policy.generate(["q", "r"], max_new_tokens=12, seed=0, guide=Forbid(token))
    assert texts == [policy.generate(p, max_new_tokens=12, seed=0, guide=Forbid(token)) for p in ("q", "r")]


def test_a_nucleus_is_the_smallest_set_with_that_much():
    probs = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.97, 0.01, 0.01, 0.01]])
    kept = (nucleus(probs, 0.7) > 0).tolist()
    assert kept == [[False, True, False, True], [True, False, False, False]]
    assert torch.equal(nucleus(probs, 0.3) > 0, probs == probs.amax(-1, keepdim=True))


def test_logits_that_are_not_finite_are_an_error():
    with pytest.raises(FloatingPointError, match="diverged"):
        choose(torch.tensor([[0.0, math.nan]]), torch.tensor([0.5]))


def test_a_stream_depends_on_seed_prompt_and_number_alone():
    one = Request(((1, 2, 3), (9,)), "student", seed=5, first=2)
    assert np.array_equal(one.uniforms(1, 4), Request(((1, 2, 3),), "other", seed=5).uniforms(3, 9)[:4])
    keys = [(((1, 2),), 5, 0), (((1, 2, 3),), 6, 0), (((1, 2, 3),), 5, 1)]
    others = [Request(prompts, seed=seed, first=first) for prompts, seed, first in keys]
    assert len({tuple(request.uniforms(0, 3)) for request in [one, *others]}) == 4


def test_batches_hold_everything_once_and_keep_the_budget():
    lengths = np.random.default_rng(0).integers(1, 60, 100).tolist()
    found = list(batches(lengths, 10, 300))
    assert sorted(i for batch in found for i in batch) == list(range(100))
    assert all(len(b) * (max(lengths[i] for i in b) + 10) <= 300 for b in found)
    assert list(batches([5000], 10, 300)) == [[0]]


@pytest.mark.parametrize(
    "bad, says",
    [
        (dict(max_new_tokens=0), "max_new_tokens is 0"),
        (dict(temperature=-1), "temperature is -1"),
        (dict(temperature=math.inf), "temperature is inf"),
        (dict(top_p=1.5), "top_p is 1.5"),
        (dict(top_p=True), "top_p is True"),
    ],
)
def test_bad_settings_are_named(bad, says):
    with pytest.raises(ValueError, match=says):
        Sampling(**bad)
