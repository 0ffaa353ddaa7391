"Perplexity, probes and their verdict; the adapter for lm-eval where it is installed."

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from selfplay_nb.models.policy import Policy
from selfplay_nb.scoring.evaluation import compare
from selfplay_nb.stats.retention import (
    ITEMS,
    PASSAGES,
    Capability,
    Perplexity,
    Probe,
    lm_eval_model,
    lm_eval_task,
    paired_change,
    perplexity,
    perplexity_ratio,
    probe,
    retention,
)

TEXTS = ["The sea is calm at dawn.", "Bees dance on the comb.", "A short one.", "Salt was once worth a city."]
SHORT = [
    dict(prompt="The sky is", options=["blue", "a stone", "no"]),
    dict(prompt="Two plus two is", options=["four", "nine"]),
    dict(prompt="Bees make", options=["honey", "a lot of iron"]),
]


def noisy(base, name, noise=0.5):
    policy, g = Policy(base, name), torch.Generator().manual_seed(0)
    policy.load_state({k: v + noise * torch.randn(v.shape, generator=g) for k, v in policy.state().items()})
    return policy


def by_hand(base, adapter, context, text):
    tok = base.tokenizer
    before = [tok.bos_token_id] if not context else tok(context)["input_ids"]
    ids = tok(text)["input_ids"]
    with base.running(adapter) as model:
        lp = model(input_ids=torch.tensor([before + ids])).logits[0].float().log_softmax(-1)
    return float(lp[len(before) - 1 : -1].gather(-1, torch.tensor(ids)[:, None]).sum())


# data


def test_the_data_is_well_formed():
    assert len(set(PASSAGES)) == len(PASSAGES) >= 20 and all(
        30 < len(p.split()) < 80 and "\n" not in p for p in PASSAGES
    )
    assert len({x["prompt"] for x in ITEMS}) == len(ITEMS) == 60
    assert all(
        len(set(x["options"])) == len(x["options"]) >= 2 and all(o == o.strip() for o in x["options"])
        for x in ITEMS
    )


# perplexity


def test_perplexity_is_that_of_the_plain_text(tiny):
    student = noisy(tiny, "student")
    for policy in Policy(tiny, "base"), student:
        p = perplexity(policy, TEXTS)
        assert [-x for x in p.nats] == pytest.approx(
            [by_hand(tiny, policy.name, "", t) for t in TEXTS], rel=1e-4
        )
        assert p.tokens == [len(t) for t in TEXTS] and p.value == pytest.approx(
            math.exp(sum(p.nats) / sum(p.tokens))
        )
    assert tiny.chat and perplexity(student, TEXTS).value != pytest.approx(
        perplexity(Policy(tiny, "base"), TEXTS).value, rel=0.01
    )


@pytest.mark.parametrize(
    "passages, says",
    [
        ([], "non-empty list"),
        ("text", "non-empty list"),
        (["a", ""], "passage 1 has no tokens"),
        (["x" * 300], "context"),
    ],
)
def test_bad_passages_are_named(tiny, passages, says):
    with pytest.raises(ValueError, match=says):
        perplexity(Policy(tiny, "base"), passages)


def test_ratio_is_paired_over_passages():
    rng = np.random.default_rng(0)
    tokens = rng.integers(30, 80, 24).tolist()
    nats = [n * x for n, x in zip(tokens, rng.uniform(2, 5, 24))]
    same = perplexity_ratio(
        Perplexity(nats, tokens), Perplexity([x + 0.1 * n for x, n in zip(nats, tokens)], tokens)
    )
    assert (same.value, same.low, same.high) == pytest.approx([math.exp(0.1)] * 3)
    true, inside = 0.05, 0
    for _ in range(200):
        after = [x + n * d for x, n, d in zip(nats, tokens, rng.normal(true, 0.1, 24))]
        e = perplexity_ratio(Perplexity(nats, tokens), Perplexity(after, tokens))
        inside += e.low <= math.exp(true) <= e.high
    assert 0.88 < inside / 200 < 0.99
    with pytest.raises(ValueError, match="different numbers of tokens"):
        perplexity_ratio(Perplexity([1.0], [2]), Perplexity([1.0], [3]))


# probes


def test_probe_scores_options_per_character(tiny):
    policy = noisy(tiny, "student")
    rows = probe(policy, SHORT).rows
    for x, row in zip(SHORT, rows):
        scores = [by_hand(tiny, "student", x["prompt"], " " + o) / len(o) for o in x["options"]]
        assert row["answer"] == x["options"][int(np.argmax(scores))] and row["right"] == (
            np.argmax(scores) == 0
        )
    assert compare(Probe(rows), Probe([r | {"right": 0} for r in rows])).lost == sum(r["right"] for r in rows)


def test_a_tie_is_wrong_and_bad_items_are_named(tiny):
    policy = Policy(tiny, "base")
    assert probe(policy, [dict(prompt="x", options=["a", "a"])]).rows[0]["right"] == 0
    for bad, says in [
        ([], "no items"),
        ([SHORT[0], dict(prompt="x", options=["a"])], "item 1"),
        ([dict(prompt="x", options="ab")], "item 0"),
        ([dict(prompt="x")], "item 0"),
        ([dict(prompt="x", options=["a", ""])], "item 0"),
    ]:
        with pytest.raises(ValueError, match=says):
            probe(policy, bad)


# verdicts


def test_paired_change_is_symmetric_and_never_certain():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2, 40).tolist(), rng.integers(0, 2, 40).tolist()
    there, back = paired_change(a, b), paired_change(b, a)
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low))
    for n in 1, 5, 60:
        assert paired_change([1] * n, [1] * n).low < 0 < paired_change([1] * n, [1] * n).high
    assert paired_change([1] * 3, [0] * 3).low >= -1 and paired_change([0] * 3, [1] * 3).high <= 1


@pytest.mark.parametrize("lost, gained", [(0.02, 0.02), (0.1, 0.05), (0.3, 0.1)])
def test_paired_change_covers(lost, gained, n=60):
    rng = np.random.default_rng(1)
    counts = rng.multinomial(n, [lost, gained, 1 - lost - gained], 1000)
    ends = {
        k: paired_change([1] * k[0] + [0] * k[1] + [1] * k[2], [0] * k[0] + [1] * k[1] + [1] * k[2])
        for k in {tuple(c) for c in counts.tolist()}
    }
    inside = [ends[tuple(c)].low <= gained - lost <= ends[tuple(c)].high for c in counts.tolist()]
    assert 0.93 < np.mean(inside) <= 1


def ability(shift=0.0, lost=0, n=60):
    tokens = [50] * 24
    rows = [dict(prompt=str(i), answer="", right=int(i >= lost), truncated=False) for i in range(n)]
    return Capability(Perplexity([3.0 * t + t * shift for t in tokens], tokens), Probe(rows))


@pytest.mark.parametrize(
    "after, verdict, parts",
    [
        (ability(), "kept", ["kept", "kept"]),
        (ability(-0.5), "kept", ["kept", "kept"]),
        (ability(0.09), "kept", ["kept", "kept"]),
        (ability(0.11), "lost", ["lost", "kept"]),
        (ability(0, 18), "lost", ["kept", "lost"]),
        (ability(0, 5), "cannot be separated", ["kept", "cannot be separated"]),
        (ability(0.2, 5), "lost", ["lost", "cannot be separated"]),
    ],
)
def test_verdicts(after, verdict, parts):
    r = retention(ability(), after)
    assert r.verdict == verdict and list(r.verdicts.values()) == parts and repr(r).startswith(verdict)


def test_what_cannot_be_compared_is_named():
    assert retention(ability(), ability(0.11), tolerance=0.2).verdict == "kept"
    with pytest.raises(ValueError, match="different items"):
        retention(ability(), ability(n=59))
    with pytest.raises(ValueError, match="tolerance is 0"):
        retention(ability(), ability(), tolerance=0)


def test_the_real_model_keeps_what_a_copy_keeps_and_loses_what_noise_destroys(real):
    before = Policy(real, "base")
    few = dict(passages=PASSAGES[:6], items=ITEMS[:24])
    copy = retention(before, Policy(real, "copy"), **few)
    assert (
        copy.verdict == "kept"
        and copy.ratio.value == pytest.approx(1, abs=1e-3)
        and copy.before.probe.rows == copy.after.probe.rows
    )
    assert copy.before.probe.accuracy.value > 0.6
    assert retention(copy.before, noisy(real, "noisy", 0.5), **few).verdict == "lost"


# lm-eval


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for call in (lambda: lm_eval_model(None), lm_eval_task):
        with pytest.raises(ImportError, match=r"pip install 'selfplay_nb\[eval\]'"):
            call()


def ask(*args):
    return SimpleNamespace(args=args)


def test_lm_eval_asks_and_gets_what_the_policy_says(tiny):
    pytest.importorskip("lm_eval")
    policy = noisy(tiny, "student")
    lm = lm_eval_model(policy)
    pairs = [("The sky is", " blue"), ("", "Bees"), ("x" * 400, "yes"), ("A", "b" * 20)]
    got = lm.loglikelihood([ask(*p) for p in pairs], disable_tqdm=True)
    want = [by_hand(tiny, "student", c[-(256 - len(t)) :], t) for c, t in pairs]
    assert [g[0] for g in got] == pytest.approx(want, rel=1e-4) and not any(g[1] for g in got[2:])
    assert lm.loglikelihood_rolling([ask(t) for t in TEXTS]) == pytest.approx(
        [-x for x in perplexity(policy, TEXTS).nats], rel=1e-4
    )
    text = "a river runs " * 60  # three windows and more
    (whole,) = lm.loglikelihood_rolling([ask(text)])
    head = by_hand(tiny, "student", "", text[:255])
    assert whole < head + by_hand(tiny, "student", text[254], text[255:300]) < 0 and lm.loglikelihood_rolling(
        [ask("")]
    ) == [0]


def test_lm_eval_generation_is_greedy_and_stops(tiny):
    pytest.importorskip("lm_eval")
    policy = noisy(tiny, "student")
    lm = lm_eval_model(policy)
    (free,) = lm.generate_until([ask("Hello", {"max_gen_toks": 12})])
    assert 0 < len(free) <= 12 and lm.loglikelihood([ask("Hello", free)], disable_tqdm=True)[0][1]
    stop = free[len(free) // 2]
    cut = lm.generate_until(
        [ask("Hello", {"max_gen_toks": 12, "until": [stop, "@@"]}), ask("Hello", {"max_gen_toks": 12})]
    )
    assert cut == [free[: free.index(stop)], free]


def test_lm_eval_gives_the_accuracy_of_the_probe(tiny):
    lm_eval = pytest.importorskip("lm_eval")
    policy = noisy(tiny, "student")
    result = lm_eval.simple_evaluate(
        model=lm_eval_model(policy), tasks=[lm_eval_task(ITEMS)], bootstrap_iters=0
    )
    assert result["results"]["selfplay_probe"]["acc_norm,none"] == pytest.approx(
        probe(policy, ITEMS).accuracy.value
    )
