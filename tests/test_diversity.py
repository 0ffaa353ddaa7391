"Diversity of answers, and the alarm for collapse."

import math
import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from selfplay_nb.stats.diversity import (
    MEASURES,
    adjusted_distinct,
    collapse_alarm,
    compression_ratio,
    distinct,
    diversity,
    embed,
    entropy,
    plot_strip,
    self_bleu,
    vendi,
)

WORDS = (
    "sea wind river cloud stone light rain hill bird road boat wave sand tree snow fire night bread salt door"
).split()


def table(m=12, k=4, seed=0, n=12):
    rng = random.Random(seed)
    return [[" ".join(rng.choices(WORDS, k=n)) for _ in range(k)] for _ in range(m)]


def samples(logprobs):
    return [[SimpleNamespace(text="x", logprobs=lp) for lp in row] for row in logprobs]


# measures


def test_distinct_counts_ngrams_within_texts_only():
    assert distinct(["a b a b", "B a"], 2) == 2 / 4 and distinct(["a b", "c"], 1) == 1
    assert math.isnan(distinct(["one", ""], 2)) and distinct(["the the the the"], 1) == 1 / 4
    assert distinct(["a.b"], 1) == distinct(["a . b"], 1)


@pytest.mark.parametrize("vocabulary, length", [(50, 20), (50, 400), (1000, 300)])
def test_adjusted_distinct_of_random_draws_is_one_whatever_the_length(vocabulary, length):
    rng = np.random.default_rng(0)
    values = [
        adjusted_distinct([" ".join(map(str, rng.integers(vocabulary, size=length)))], vocabulary)
        for _ in range(200)
    ]
    assert np.mean(values) == pytest.approx(1, abs=0.01)


def test_self_bleu_against_sacrebleu_on_each_answer():
    from sacrebleu import sentence_bleu

    texts = [t for row in table(3, 3) for t in row] + ["sea", "sea", "one two three"]
    one = [
        sentence_bleu(t, texts[:i] + texts[i + 1 :], use_effective_order=True).score / 100
        for i, t in enumerate(texts)
    ]
    assert self_bleu(texts) == pytest.approx(np.mean(one))
    assert self_bleu(texts) == pytest.approx(self_bleu(texts[::-1]))


def test_self_bleu_ends_and_its_bounded_cost():
    assert self_bleu(["a b c"] * 3) == self_bleu(["x"] * 2) == self_bleu(["", " "]) == 1
    assert self_bleu(["a b c d", "e f g h"]) == 0 and math.isnan(self_bleu(["a"]))
    texts = [t for row in table(40, 4) for t in row]
    assert self_bleu(texts, limit=40) == self_bleu(texts, limit=40) != self_bleu(texts, limit=40, seed=1)
    assert self_bleu(texts, limit=40) == pytest.approx(self_bleu(texts, limit=160), abs=0.05)


def test_compression_finds_repetition():
    texts = [t for row in table() for t in row]
    assert compression_ratio(texts[:1] * 48) > 4 * compression_ratio(texts) > 4


@pytest.mark.parametrize("groups", [(1, 1, 1, 1), (4,), (3, 1), (5, 2, 1)])
def test_vendi_of_orthogonal_groups_is_the_exponential_of_their_entropy(groups):
    p = np.array(groups) / sum(groups)
    x = np.repeat(np.eye(8)[: len(groups)], groups, axis=0)
    scale = np.arange(1, len(x) + 1)[:, None]  # length is not direction
    assert vendi(x * scale) == pytest.approx(np.exp(-(p * np.log(p)).sum()))


@pytest.mark.parametrize("bad", [np.zeros((2, 3)), np.array([[1.0, np.nan], [1, 0]])])
def test_vendi_refuses_what_has_no_direction(bad):
    with pytest.raises(ValueError, match="zero or not finite"):
        vendi(bad)


# entropy


def test_entropy_of_a_known_source_and_the_coverage_of_its_interval():
    rng, p = np.random.default_rng(0), np.array([0.5, 0.25, 0.125, 0.125])
    true, inside = -(p * np.log(p)).sum(), 0
    for _ in range(200):
        e = entropy(
            samples([[np.log(p[rng.choice(4, size=5, p=p)]).tolist() for _ in range(3)] for _ in range(20)])
        )
        inside += e.low <= true <= e.high
    assert 0.88 < inside / 200 <= 1 and e.n_tokens == 300 and e.value == pytest.approx(true, abs=0.15)


def test_entropy_interval_knows_that_answers_to_a_prompt_hang_together():
    rng = np.random.default_rng(0)
    levels = rng.exponential(1, 16)
    width = lambda rows: (e := entropy(rows)).high - e.low
    clustered = [[[-x]] * 8 for x in levels]
    mixed = rng.permutation(np.repeat(-levels, 8)).reshape(16, 8, 1).tolist()
    assert width(samples(clustered)) > 2 * width(samples(mixed))


def test_entropy_of_the_model_itself(tiny):
    import torch

    from selfplay_nb.models.policy import Policy

    policy = Policy(tiny, "base")
    with tiny.running("base") as model:
        logits = model(input_ids=torch.tensor([tiny.encode("Hello")])).logits[0, -1]
    exact = torch.distributions.Categorical(logits=logits.float()).entropy().item()
    drawn = policy.sample(["Hello"], n_samples=600, max_new_tokens=1, seed=0)
    assert entropy(drawn).value == pytest.approx(exact, abs=0.05)
    with pytest.raises(ValueError, match="no tokens"):
        entropy(samples([[[]]]))


# the record


def test_turning_the_table_swaps_within_and_across():
    rows = table(5, 3)
    x = np.random.default_rng(0).normal(size=(5, 3, 4))
    a = diversity(rows, x.reshape(15, 4))
    b = diversity(list(zip(*rows)), x.swapaxes(0, 1).reshape(15, 4))
    assert a.within == pytest.approx(b.across) and a.across == pytest.approx(b.within)
    assert set(a.within) == {*MEASURES, "Vendi"} and (a.n_prompts, a.n_samples, b.n_prompts) == (5, 3, 3)
    assert a.entropy is None and a.words == 12


def test_single_answers_and_a_flat_list():
    flat = diversity([r[0] for r in table()])
    assert flat == diversity([r[:1] for r in table()]) or all(map(math.isnan, flat.within.values()))
    assert flat.n_samples == 1 and not math.isnan(flat.across["self-BLEU"])
    assert all(map(math.isnan, diversity([["a b", "c d"]]).across.values()))


@pytest.mark.parametrize(
    "rows, embeddings, says",
    [
        ([], None, "0 prompts"),
        ([[]], None, "1 prompts with .0."),
        ([["a", "b"], ["c"]], None, r"\[1, 2\] answers"),
        ([["a", "b"]], np.ones((3, 2)), r"\(3, 2\): expected \(2, d\)"),
    ],
)
def test_bad_tables_are_named(rows, embeddings, says):
    with pytest.raises(ValueError, match=says):
        diversity(rows, embeddings)


def test_a_record_prints_n_and_the_commonest_answer():
    rows = table()
    rows[0] = rows[1] = ["same old"] * 4
    text = repr(diversity(rows))
    assert "12 prompts, 4 answers each" in text and "commonest, 17 %: 'same old'" in text


# the alarm


def test_verdicts():
    start = diversity(table())
    verdict = lambda rows: collapse_alarm(diversity(rows), start).verdict
    assert verdict(table(seed=1)) == "healthy"
    assert verdict([[row[0]] * 4 for row in table()]) == "converged"
    assert (
        verdict([["I do not know."] * 4] * 12)
        == verdict([[""] * 4] * 12)
        == verdict([["the " * (3 * i + j + 2) for j in range(4)] for i in range(12)])
        == "collapsed"
    )
    assert verdict([[str(100 + i)] * 4 for i in range(12)]) == "converged"  # one-word answers, each its own


@pytest.mark.parametrize("same", [0, 3, 6, 9])
def test_what_is_left_is_the_share_of_prompts_with_answers_of_their_own(same):
    rows = table()
    alarm = collapse_alarm(diversity([["yes no yes"] * 4] * same + rows[same:]), diversity(rows))
    assert alarm.across == pytest.approx(1 - same / 12, abs=0.09)
    assert alarm.tripped == (same > 6) or same == 6


def test_the_alarm_shows_its_evidence():
    alarm = collapse_alarm(diversity([["I do not know."] * 4] * 12), diversity(table()))
    assert alarm.tripped and "100 % of the answers are 'I do not know.'" in repr(alarm)


@pytest.mark.parametrize(
    "now, reference, threshold, says",
    [
        (table(6), table(), 0.5, r"\(6, 4\) prompts and samples now, \(12, 4\)"),
        (table(), table(), 1, "threshold is 1"),
        (table(), [["yes"] * 4] * 12, 0.5, "is 0.00: expected at least 0.1"),
        ([["a b"]], [["a b"]], 0.5, "is nan"),
    ],
)
def test_alarm_errors(now, reference, threshold, says):
    with pytest.raises(ValueError, match=says):
        collapse_alarm(diversity(now), diversity(reference), threshold)


# the model


def test_an_embedding_does_not_depend_on_its_batch(tiny):
    texts = ["a", "something longer than that", "", "x" * 300]
    alone, together = embed(tiny, texts, batch_size=1), embed(tiny, texts)
    assert alone.shape == (4, 64) and np.isfinite(alone).all()
    np.testing.assert_allclose(alone, together, atol=1e-5)


def test_healthy_sampling_of_the_real_model_does_not_trip(real):
    from selfplay_nb.models.policy import Policy

    prompts = [
        "Describe the sea.",
        "Name a black cat.",
        "What is a good breakfast?",
        "Tell me a fact about the moon.",
        "Why is the sky blue?",
        "Suggest a title for a book about bees.",
        "How can I sleep better?",
        "What is a computer?",
    ]
    at = {
        t: diversity(
            Policy(real, "base").sample(prompts, n_samples=3, max_new_tokens=12, temperature=t, seed=0)
        )
        for t in (0.7, 1.0, 1.2)
    }
    assert [collapse_alarm(at[t], at[1.0]).verdict for t in (0.7, 1.2)] == ["healthy"] * 2
    assert collapse_alarm(diversity([["I do not know."] * 3] * 8), at[1.0]).tripped


def test_the_strip_draws_every_round():
    import matplotlib

    matplotlib.use("Agg")
    axes = plot_strip([diversity(table(seed=s)) for s in range(3)])
    assert len(axes) == 3 and all(len(line.get_xdata()) == 3 for line in axes[0].lines[:2])
    matplotlib.pyplot.close("all")


def test_no_torch_at_import():
    code = (
        "import sys, selfplay_nb.stats.diversity; print('torch' in sys.modules or 'sacrebleu' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
    )
