"The pipeline: data in, stages on disk, nothing repeated, nothing lost, nothing left behind."

import json
import math
from functools import partial

import pytest
import torch

from selfplay_nb.core.pairs import load_rows
from selfplay_nb.loop import pipeline, rounds
from selfplay_nb.loop.pipeline import METHODS, RLHFOrchestrator, combine
from selfplay_nb.loop.rounds import group_advantages
from selfplay_nb.models import update
from selfplay_nb.models.base import tiny_model_folder
from selfplay_nb.models.policy import Base, Policy
from selfplay_nb.models.update import dpo, win_probability
from selfplay_nb.tasks.task import ArithmeticTask

sppo = partial(dpo, loss_type="sppo", loss_weights=None, beta=0.1)


class Letters:
    "Prompts `q0`, `q1`, … ; the more letters a an answer has, the better."

    name = "letters"

    def problems(self, split, n, seed=0):
        first = 1000 if split == "held-out" else 37 * (seed % 20)
        return [dict(prompt=f"q{first + i}", answer="a") for i in range(n)]

    def reward(self, prompts, completions, answer, **columns):
        return [c.count(a) / 8 + len(set(c)) / 100 for c, a in zip(completions, answer)]

    def verifier(self, prompts, completions, answer, **columns):
        return [float(a in c) for c, a in zip(completions, answer)]


SFT_DATA = [dict(prompt=f"q{i}", completion="aaaa") for i in range(20)]
PREF = [dict(prompt=f"q{i}", chosen="aaa", rejected="xyz"[: 1 + i % 3]) for i in range(16)]
FAST = dict(learning_rate=1e-3)


@pytest.fixture
def make(tiny, tmp_path):
    # random weights seldom end an answer: a third of the tokens ends it here
    tiny.model.generation_config.eos_token_id = [*range(2, 35)]
    small = dict(eval_size=12, validation_size=4, r=4, progress=False)

    def make(name="run", base=tiny, **settings):
        return RLHFOrchestrator(tmp_path / name, base, Letters(), **small | settings)

    return make


def all_stages(o, rounds=1):
    o.run_sft(SFT_DATA)
    o.run_reward_model_training(PREF, num_train_epochs=2)
    for _ in range(rounds):
        made = o.run_self_play(
            n_games=32, refinement_iterations=0, n_samples=2, batch=4, judge="reward_model"
        )
        o.run_policy_optimization("dpo", o.combine(PREF, made, ratio=1), **FAST)
    return made


def count_calls(monkeypatch, *places):
    calls = []
    for module, name in places:
        f = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _f=f, _n=name, **k: calls.append(_n) or _f(*a, **k))
    return calls


# --- data


def test_every_form_of_sft_data_reads_the_same(tmp_path):
    import datasets

    rows = [dict(prompt="p", completion="c"), dict(prompt="q", completion="d")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    forms = [
        rows,
        tuple(rows),
        datasets.Dataset.from_list(rows),
        tmp_path / "a.jsonl",
        str(tmp_path / "a.parquet"),
        dict(train=rows, test=[]),
        datasets.DatasetDict(train=datasets.Dataset.from_list(rows)),
    ]
    for f in forms:
        assert load_rows(f, "sft") == rows
    chat = [dict(messages=[dict(role="user", content="p"), dict(role="assistant", content="c")])]
    expected = [dict(prompt=[dict(role="user", content="p")], completion="c")]
    assert (
        load_rows(chat, "sft")
        == load_rows([dict(prompt=expected[0]["prompt"], completion=chat[0]["messages"][1:])], "sft")
        == expected
    )
    assert load_rows([dict(prompt="p", chosen="c", rejected="r")], "sft") == [
        dict(prompt="p", completion="c")
    ]


def test_preference_data_with_an_implicit_prompt_and_missing_values():
    import datasets

    u, a, b = (dict(role=r, content=c) for r, c in (("user", "p"), ("assistant", "c"), ("assistant", "r")))
    expected = [dict(prompt=[u], chosen="c", rejected="r")]
    assert load_rows([dict(chosen=[u, a], rejected=[u, b])], "preference") == expected
    mixed = datasets.Dataset.from_list(
        [dict(prompt="p", chosen="c", rejected="r", margin=1.0), dict(prompt="p", chosen="c", rejected="s")]
    )
    assert [sorted(r) for r in load_rows(mixed, "preference")] == [
        ["chosen", "margin", "prompt", "rejected"],
        ["chosen", "prompt", "rejected"],
    ]


@pytest.mark.parametrize(
    "kind, rows, said",
    [
        (
            "preference",
            [dict(prompt="p", chosen="c", rejected="r"), dict(prompt="p", chosen=3, rejected="r")],
            "row 1, column 'chosen' is 3: expected a text",
        ),
        (
            "preference",
            [dict(prompt="p", chosen="c")],
            "row 0 has no column 'rejected': it has ['chosen', 'prompt'], expected 'prompt', 'chosen'",
        ),
        (
            "preference",
            [dict(prompt="p", chosen="c", rejected="r", probability=1.5)],
            "row 0, column 'probability' is 1.5: expected a number from 0 to 1",
        ),
        ("preference", [dict(prompt="p", chosen="c", rejected="r", margin="big")], "row 0, column 'margin'"),
        ("sft", [dict(text="all of it")], "row 0 has no column 'prompt'"),
        (
            "sft",
            [dict(prompt="  ", completion="c")],
            "row 0, column 'prompt' is '  ': expected a text that is not empty",
        ),
        ("sft", [dict(messages=[dict(role="user", content="p")])], "row 0, column 'prompt' is []"),
        ("sft", ["only a text"], "row 0 is 'only a text'"),
        ("sft", 5, "got int as data"),
        ("sft", dict(test=[]), "splits with 'train'"),
        ("sft", "gone.jsonl", "there is no file 'gone.jsonl'"),
        ("sft", "/no/such/place", "there is no file"),
        ("other", [], "kind is 'other'"),
    ],
)
def test_errors_name_the_place_and_what_is_accepted(kind, rows, said):
    with pytest.raises(ValueError) as e:
        load_rows(rows, kind)
    assert said in str(e.value)


def test_a_damaged_file_and_a_hub_that_is_away(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "completion": "c"}\n{"prompt": \n')
    with pytest.raises(ValueError, match="a.jsonl, line 2 is no JSON"):
        load_rows(tmp_path / "a.jsonl", "sft")
    (tmp_path / "a.csv").write_text("prompt")
    with pytest.raises(ValueError, match="no .jsonl or .parquet file"):
        load_rows(tmp_path / "a.csv", "sft")
    import datasets

    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="could be had from the hub .ConnectionError: no route"):
        load_rows("someone/some-data", "sft")
    with pytest.raises(ValueError, match="there is no file"):
        load_rows("data/gone.parquet", "sft")
    assert asked == [("someone/some-data", "train")]


# --- mixing


def test_combine_drops_counts_and_keeps_provenance():
    pair = lambda p, c="c", r="r", **k: dict(prompt=p, chosen=c, rejected=r, **k)
    real = [pair("1"), pair("2"), pair("1", "c ", "r\n"), pair("9")]
    made = [
        pair("1", source="competitive"),
        pair("2", "r", "c", source="competitive"),
        pair("3", source="refinement"),
        pair("4"),
    ]
    mixed = combine(real, made, exclude=["9"])
    assert dict(mixed.dropped) == {"duplicate": 2, "held-out": 1, "contradiction": 1}
    assert sorted((r["prompt"], r["source"]) for r in mixed) == [
        ("1", "real"),
        ("2", "real"),
        ("3", "refinement"),
        ("4", "synthetic"),
    ]
    assert (
        "4 rows (2 real, 1 refinement, 1 synthetic); dropped: 1 contradiction, 2 duplicate, 1 held-out"
        in repr(mixed)
    )
    assert (
        len(combine(real, made)) == 5
        and combine([], made).counts["real"] == 0
        and len(combine(real, [])) == 3
    )


def test_ratio_and_seed():
    real = [dict(prompt=f"{i}", chosen="c", rejected="r") for i in range(20)]
    made = [dict(prompt=f"m{i}", chosen="c", rejected="r") for i in range(50)]
    for ratio, n in (0, 0), (0.5, 10), (1, 20), (9, 50), (None, 50):
        mixed = combine(real, made, ratio=ratio)
        assert (
            mixed.counts == {k: v for k, v in (("real", 20), ("synthetic", n)) if v}
            and mixed.dropped["beyond the ratio"] == 50 - n
        )
    assert (
        list(combine(real, made, 1, seed=3))
        == list(combine(real, made, 1, seed=3))
        != list(combine(real, made, 1, seed=4))
    )
    for bad in -1, math.nan, "half":
        with pytest.raises(ValueError, match="ratio is"):
            combine(real, made, ratio=bad)


def test_the_exam_is_found_behind_other_words():
    task = ArithmeticTask(2)
    problem = task.problems("held-out", 200)[7]
    question = problem["prompt"][-1]["content"]
    pair = lambda prompt: dict(prompt=prompt, chosen="1", rejected="2")
    evaluation = [p["prompt"] for p in task.problems("held-out", 200)]
    rows = [
        pair(question),
        pair(f" {question}\n"),
        pair([dict(role="system", content="Be brief."), dict(role="user", content=question)]),
        pair("98765 + 1 ="),
    ]
    assert [r["prompt"] for r in combine(rows, [], exclude=evaluation)] == ["98765 + 1 ="]
    # the last turn tells nothing here
    said = [[dict(role="user", content=x), dict(role="user", content="Go on.")] for x in "ab"]
    assert len(combine([pair("Go on."), pair(said[0])], [], exclude=said)) == 1


# --- losses


def test_soft_sppo_is_the_formula(tiny, monkeypatch):
    policy = Policy(tiny, "p", r=4, seed=1)
    g = torch.Generator().manual_seed(0)
    policy.load_state({k: v + 0.05 * torch.randn(v.shape, generator=g) for k, v in policy.state().items()})
    base, beta = Policy(tiny, "base"), 0.2
    pairs = [
        dict(prompt="a", chosen="bb", rejected="c", probability=0.7),
        dict(prompt="a", chosen="d", rejected="ef", margin=0.4),
        dict(prompt="b", chosen="x", rejected="y"),
    ]
    assert [win_probability(p) for p in pairs] == [0.7, pytest.approx(1 / (1 + math.exp(-0.4))), 1.0]
    said = lambda who, k: who.logprobs(["a", "a", "b"], [p[k] for p in pairs]).double()
    ratio = {k: said(policy, k) - said(base, k) for k in ("chosen", "rejected")}
    p = torch.tensor([win_probability(x) for x in pairs]).double()
    expected = (
        (ratio["chosen"] - (p - 0.5) / beta) ** 2 + (ratio["rejected"] - (0.5 - p) / beta) ** 2
    ).mean()
    result = sppo(policy, pairs, base, beta=beta, learning_rate=0.0)
    assert result.losses[0] == pytest.approx(float(expected), rel=1e-4)
    hard = sppo(policy, [x | dict(probability=1.0) for x in pairs], base, beta=beta, learning_rate=0.0)
    assert hard.losses[0] == pytest.approx(
        float(((ratio["chosen"] - 0.5 / beta) ** 2 + (ratio["rejected"] + 0.5 / beta) ** 2).mean()), rel=1e-4
    )
    even = [dict(prompt="a", chosen="bb", rejected="c", probability=0.5)]
    fresh = Policy(tiny, "even", r=4)
    before = fresh.state()
    # a tie: policy and reference agree, so nothing moves
    sppo(fresh, even, fresh.snapshot("was"), beta=beta, learning_rate=1e-2)
    assert all(torch.allclose(before[k], v, atol=1e-6) for k, v in fresh.state().items())
    with pytest.raises(ValueError, match="beta is 0: expected a finite number above 0"):
        sppo(policy, pairs, base, beta=0)


def test_soft_sppo_moves_certain_pairs_further(tiny):
    def gap(probability):
        policy = Policy(tiny, "p", r=4, seed=1)
        start = policy.snapshot("s")
        sppo(
            policy,
            [dict(prompt="a", chosen="bb", rejected="cc", probability=probability)],
            start,
            num_train_epochs=60,
            learning_rate=2e-2,
            beta=0.5,
        )
        out = [float(policy.logprobs("a", x) - start.logprobs("a", x)) for x in ("bb", "cc")]
        policy.delete()
        start.delete()
        return out

    for probability in 0.6, 1.0:
        chosen, rejected = gap(probability)
        assert chosen == pytest.approx((probability - 0.5) / 0.5, abs=0.1) and rejected == pytest.approx(
            (0.5 - probability) / 0.5, abs=0.1
        )


def test_group_advantages():
    [a, b] = group_advantages([[1.0, 0.0, 0.0, 0.0], [0.3] * 4])
    assert (
        b == [0.0] * 4
        and sum(a) == pytest.approx(0, abs=1e-9)
        and sum(x * x for x in a) / 4 == pytest.approx(1, abs=1e-4)
        and a[0] > 0 > a[1]
    )


@pytest.mark.parametrize("none", [None, math.nan, math.inf, -math.inf])
def test_a_reward_that_abstains_is_no_part_of_its_group(none):
    assert group_advantages([[1.0, none, 0.0]])[0] == [
        pytest.approx(1, abs=1e-5),
        0,
        pytest.approx(-1, abs=1e-5),
    ]
    assert group_advantages([[none, 2.0, 2.0], [none] * 3, [none, none, 5.0]]) == [[0.0] * 3] * 3
    row = [0.1, 0.7, 0.4, 0.4]
    for at in range(5):
        [got] = group_advantages([row[:at] + [none] + row[at:]])
        assert got.pop(at) == 0 and [got] == group_advantages([row])


def test_rounding_is_no_difference_between_rewards():
    assert group_advantages([[0.1 + 0.2, 0.3], [1.0000001, 1.0], [1000.0, 1000.0005]]) == [[0.0, 0.0]] * 3
    assert (
        group_advantages([[0.301, 0.3], [-1.0, -1.001], [1001.0, 1000.0], [1e-3, 0.0]])
        == [[pytest.approx(1, abs=0.01), pytest.approx(-1, abs=0.01)]] * 4
    )


# --- stages


def test_arguments_are_checked_as_a_whole_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline.Base, "load", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(ValueError) as e:
        RLHFOrchestrator(tmp_path / "r", seed=-1, r=0, temperature=math.nan, skip=["x"], task=1, model=3)
    for word in "seed=-1", "r=0", "temperature=nan", "skip=['x']", "task=1", "model=3":
        assert word in str(e.value)
    o = RLHFOrchestrator(tmp_path / "r", task=Letters(), eval_size=4, progress=False)
    for call, said in [
        (lambda: o.run_sft([]), "no rows to use"),
        (lambda: o.run_sft(SFT_DATA, learnin_rate=1), "near it: .'learning_rate'"),
        (lambda: o.run_sft([dict(prompt="q1000", completion="a")]), "dropped .'held-out': 1"),
        (lambda: o.run_reward_model_training(PREF[:1]), "at least two"),
        (lambda: o.run_self_play(n_games=0), "n_games is 0"),
        (lambda: o.run_self_play(judge="vibes"), "judge is 'vibes'"),
        (lambda: o.run_self_play(judge="reward_model"), "no reward model is trained"),
        (lambda: o.run_self_play(refinement_iterations=-1), "at least 0"),
        (lambda: o.run_self_play(opponent="nobody"), "opponent is"),
        (lambda: o.run_policy_optimization("ppo", PREF), "method is 'ppo'"),
        (lambda: o.run_policy_optimization("dpo"), "no data: dpo takes"),
        (lambda: o.run_policy_optimization("dpo", PREF, group=3), "unknown setting 'group'"),
        (lambda: o.run_policy_optimization("grpo", group=1), "group is 1"),
    ]:
        with pytest.raises(ValueError, match=said):
            call()
    assert not (tmp_path / "r").exists()


def test_all_stages_and_what_they_leave(make, tiny):
    before = {n: p.detach().clone() for n, p in tiny.model.named_parameters()}
    o = make()
    made = all_stages(o, rounds=2)
    assert [s.title for s in o.stages] == [
        "00_start",
        "01_sft",
        "02_reward_model",
        "03_self_play",
        "04_dpo",
        "05_self_play",
        "06_dpo",
    ]
    assert sorted(tiny.adapters) == ["policy", "reward"] and not any(
        p.requires_grad for p in tiny.model.parameters()
    )
    now = {n.replace(".base_layer", ""): p for n, p in tiny.model.named_parameters() if ".lora_" not in n}
    assert all(torch.equal(before[n], now[n]) for n in before)
    for s in o.stages:
        assert (o.folder(s) / "manifest.json").exists() and s.seconds > 0
        assert (s.after is not None) == (s.name in ("start", "sft", "dpo"))
        if s.after:
            assert s.after["n"] == 12 and 0 <= s.after["low"] <= s.after["value"] <= s.after["high"] <= 1
        if s.name in ("sft", "dpo"):
            assert {"adapter", "optimizer.safetensors", "evaluation.json"} <= {
                f.name for f in o.folder(s).iterdir()
            }
    ends = [s for s in o.stages if s.after]
    assert [s.before for s in ends[1:]] == [s.after for s in ends[:-1]]
    assert (
        {r["source"] for r in made} == {"competitive"}
        and {r["round"] for r in made} == {5}
        and {r["judge"] for r in made} == {"reward"}
    )
    assert o.ledger.rows(round=5) == list(made) and len(o.ledger) == sum(
        s.rows for s in o.stages if s.name == "self_play"
    )
    assert o.stages[2].metrics["accuracy"]["n"] == 4
    text, html = repr(o.stages), o.stages._repr_html_()
    assert (
        "04_dpo" in text
        and "of 4 held-out pairs" in text
        and html.count("<tr>") == 8
        and "04_dpo" in html
        and "7 stages finished" in repr(o)
    )
    o.close()
    assert tiny.adapters == [] and o.policy.name == "policy" and sorted(tiny.adapters) == ["policy", "reward"]


def test_the_same_calls_in_a_new_process_repeat_nothing(make, tiny, monkeypatch):
    o = make()
    made = all_stages(o)
    weights = o.policy.state()
    o.close()
    calls = count_calls(
        monkeypatch,
        (pipeline, "sft"),
        (update, "dpo"),
        (pipeline, "evaluate"),
        (rounds, "CompetitiveSelfPlay"),
    )
    monkeypatch.setattr(pipeline.RewardModel, "train", lambda *a, **k: calls.append("reward model"))
    monkeypatch.setattr(pipeline.Base, "load", lambda *a, **k: pytest.fail("loaded"))
    # only the model's name: a finished run does not even load it
    p = make(base=tiny.name)
    again = all_stages(p)
    assert calls == [] and list(again) == list(made) and repr(again) == repr(made)
    q = make()
    all_stages(q)
    assert all(torch.equal(weights[k], v) for k, v in q.policy.state().items())


def test_a_run_in_two_parts_is_the_run_in_one(make):
    one = make("one")
    all_stages(one, 2)
    whole = one.policy.state()
    rows = one.ledger.rows()
    one.close()
    part = make("two")
    all_stages(part, 1)
    part.close()
    rest = make("two")
    all_stages(rest, 2)
    assert (
        all(torch.equal(whole[k], v) for k, v in rest.policy.state().items()) and rest.ledger.rows() == rows
    )


def test_other_calls_are_refused_unless_fresh(make, monkeypatch):
    o = make()
    all_stages(o)
    p = make()
    with pytest.raises(ValueError, match="01_sft is another stage .data: "):
        p.run_sft(SFT_DATA[:-1])
    with pytest.raises(ValueError, match="num_train_epochs: 1 there, 2 now"):
        p.run_sft(SFT_DATA, num_train_epochs=2)
    with pytest.raises(ValueError, match="01_sft is another stage .self_play now"):
        p.run_self_play(16)
    with pytest.raises(ValueError, match="seed: 0 there, 1 now"):
        make(seed=1).run_sft(SFT_DATA)
    p.run_sft(SFT_DATA)
    assert len(p.stages) == 5 and len(p.ledger) > 0
    p.run_reward_model_training(PREF, num_train_epochs=1, fresh=True)
    assert [s.title for s in p.stages] == ["00_start", "01_sft", "02_reward_model"] and len(p.ledger) == 0
    make(seed=1).run_sft(SFT_DATA, fresh=True)
    assert [s.title for s in p.stages] == ["00_start", "01_sft"]


def test_a_damaged_stage_is_named(make):
    o = make()
    o.run_sft(SFT_DATA)
    file = o.folder(o.stages[1]) / "adapter" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    p = make()
    with pytest.raises(ValueError, match="adapter_model.safetensors"):
        p.run_sft(SFT_DATA)
    p = make()
    p._start(False)
    p.run_sft(SFT_DATA, fresh=True)
    assert p.stages[1].after


def test_skipping(make):
    o = make(skip=["sft", "reward_model"])
    assert o.run_sft(SFT_DATA) is None and o.run_reward_model_training(PREF) is None
    assert o.run_policy_optimization("dpo", PREF).title == "01_dpo"
    quiet = make("quiet", skip=pipeline.STAGES)
    assert (
        quiet.run_self_play() == []
        and quiet.run_policy_optimization("dpo", PREF) is None
        and quiet.stages == []
    )


def test_a_stage_that_fails_leaves_the_last_one(make, tiny, monkeypatch):
    o = make()
    o.run_sft(SFT_DATA)
    before = o.policy.state()

    def stop(*a, **k):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(pipeline, "evaluate", stop)  # after the update, before the stage is written
        with pytest.raises(KeyboardInterrupt):
            o.run_policy_optimization("dpo", PREF, **FAST)
    assert [s.title for s in o.stages] == ["00_start", "01_sft"] and not list((o.dir / "stages").glob("02*"))
    assert all(torch.equal(before[k], v) for k, v in o.policy.state().items()) and tiny.adapters == ["policy"]
    assert o.run_policy_optimization("dpo", PREF, **FAST).number == 2


def test_killed_self_play_goes_on_with_the_next_batch(make, tiny, monkeypatch):
    games = dict(n_games=64, n_samples=2, batch=4)  # 16 prompts in 4 batches
    whole = make("whole")
    expected = whole.run_self_play(**games)
    whole.close()
    o, played, original = make(), [], pipeline.collect

    def play(collectors, run, problems):
        if len(played) == 2:
            o.ledger.append([dict(prompt="torn", chosen="a", rejected="b")])
            raise KeyboardInterrupt
        played.append(problems)
        return original(collectors, run, problems)

    with monkeypatch.context() as m:
        m.setattr(pipeline, "collect", play)
        with pytest.raises(KeyboardInterrupt):
            o.run_self_play(**games)
    assert tiny.adapters == [] and json.loads((o.dir / "partial.json").read_text())["batches"] == 2
    played.clear()

    def count(collectors, run, problems):
        played.append(problems)
        return original(collectors, run, problems)

    monkeypatch.setattr(pipeline, "collect", count)
    p = make()
    rows = p.run_self_play(**games)
    assert len(played) == 2 and list(rows) == list(expected) and not (p.dir / "partial.json").exists()
    assert p.stages[1].metrics == whole.stages[1].metrics and p.stages[1].metrics["games"] == 64


def test_rows_of_a_killed_stage_do_not_stay(make):
    o = make()
    o.run_sft(SFT_DATA)
    o.ledger.append([dict(prompt="p", chosen="a", rejected="b", round=2)])
    made = make()
    made.run_sft(SFT_DATA)
    rows = made.run_self_play(64, n_samples=2)
    assert rows and all(r["prompt"] != "p" for r in made.ledger.rows())


def test_refinement_pairs_are_those_that_the_judge_prefers(make):
    short = dict(
        critique_template="{prompt} {response} bad?",
        refine_template="{prompt} {response} {critique}",
        critique_sampling=dict(max_new_tokens=4),
        top_p=1.0,
    )
    o = make()
    rows = o.run_self_play(64, refinement_iterations=2, n_samples=2, refiner=short, pairs_per_prompt=1)
    refined = [r for r in rows if r["source"] == "refinement"]
    assert refined and o.stages[1].metrics["sources"] == {
        "competitive": len(rows) - len(refined),
        "refinement": len(refined),
    }
    reward = Letters().reward
    for r in rows:
        better, worse = reward([r["prompt"]] * 2, [r["chosen"], r["rejected"]], ["a", "a"])
        assert better > worse and r["margin"] == pytest.approx(better - worse) and r["judge"] == "reward"


def test_own_prompts_and_the_previous_opponent(make, tiny):
    o = make()
    own = [dict(prompt=f"mine{i}", answer="a") for i in range(6)] + [dict(prompt="q1003", answer="a")]
    o.run_sft(SFT_DATA, **FAST)
    seen = []
    original = rounds.CompetitiveSelfPlay

    class Spy(original):
        def __init__(self, policy, other, *a, **k):
            both = zip(policy.state().values(), other.state().values())
            seen.append(all(torch.equal(x, y) for x, y in both))
            super().__init__(policy, other, *a, **k)

    rounds.CompetitiveSelfPlay = Spy
    try:
        rows = o.run_self_play(64, prompts=own, n_samples=2)
        _ = o.run_self_play(16, n_samples=2, opponent="previous")
    finally:
        rounds.CompetitiveSelfPlay = original
    assert {r["prompt"] for r in rows} <= {f"mine{i}" for i in range(6)} and rows.dropped["held-out"] == 1
    assert o.stages[2].metrics["games"] == 24 and seen == [True, False] and tiny.adapters == ["policy"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_leaves_nothing(make, tiny, method):
    o = make()
    o.run_sft(SFT_DATA[:4])
    before = o.policy.state()
    data = {"spin": SFT_DATA, "sft": PREF, "grpo": None}.get(method, PREF)
    own = dict(n_prompts=8, group=4, prompts_per_step=4) if method == "grpo" else {}
    stage = o.run_policy_optimization(method, data, **FAST, **own)
    assert (
        stage.name == method
        and stage.rows > 0
        and stage.metrics["steps"] >= 1
        and all(map(math.isfinite, stage.metrics["losses"]))
    )
    assert any(not torch.equal(before[k], v) for k, v in o.policy.state().items()) and tiny.adapters == [
        "policy"
    ]
    assert (o.folder(stage) / "optimizer.safetensors").exists()
    if method == "spin":
        rows = o.ledger.rows(round=2)
        assert len(rows) == 20 - sum(stage.dropped.values()) > 10
        assert all(r["source"] == "spin" and r["chosen"] == "aaaa" for r in rows)
        assert stage.metrics["losses"][0] == pytest.approx(math.log(2), abs=1e-3)
    if method == "grpo":
        samples = o._ledgers[1].rows()
        assert len(samples) == 32 and stage.metrics["steps"] == 2 and len(stage.metrics["reward"]) == 2
        assert stage.rows + stage.dropped.get("no advantage", 0) == 32


def test_grpo_takes_the_gradient_of_the_paper(make, monkeypatch):
    o = make()
    o.run_sft(SFT_DATA[:4])
    seen, original = [], update.reinforce
    monkeypatch.setattr(
        update,
        "reinforce",
        lambda policy, rows, *a, **k: seen.append(rows) or original(policy, rows, *a, **k),
    )
    o.run_policy_optimization("grpo", n_prompts=2, group=4, prompts_per_step=2)
    samples = o._ledgers[1].rows()
    # mean over all answers of A/|answer|
    expected = [s["advantage"] / len(s["completion_ids"]) / len(samples) for s in samples if s["advantage"]]
    assert [r["weight"] * r["advantage"] / len(seen[0]) for r in seen[0]] == pytest.approx(expected)
    for i in range(0, 8, 4):
        assert sum(s["advantage"] for s in samples[i : i + 4]) == pytest.approx(0, abs=1e-6)


def test_grpo_learns_what_is_rewarded(make):
    class Small(Letters):
        def reward(self, prompts, completions, **columns):
            return [sum(x.islower() for x in c) / max(1, len(c)) for c in completions]

    o = make()
    o.task = Small()
    stage = o.run_policy_optimization("grpo", n_prompts=96, group=8, prompts_per_step=8, learning_rate=1e-2)
    assert stage.metrics["reward"][-1] > stage.metrics["reward"][0] + 0.1


def test_grpo_with_kl_holds_back(make):
    def moved(kl):
        o = make(f"kl {kl}")
        o.run_sft(SFT_DATA[:4])
        old = o.policy.state()
        o.run_policy_optimization(
            "grpo",
            n_prompts=32,
            group=4,
            prompts_per_step=4,
            kl=kl,
            optim="sgd",
            learning_rate=0.3,
            max_grad_norm=0.0,
        )
        far = sum((v - old[k]).square().sum().item() for k, v in o.policy.state().items())
        o.close()
        return far

    free, held = moved(0.0), moved(2.0)
    assert 0 < held < 0.8 * free


def test_equal_rewards_teach_nothing_whatever_the_kl(make):
    class Same(Letters):
        def reward(self, prompts, completions, **columns):
            return [0.3] * len(prompts)

    for kl in 0.0, 1.0:
        o = make(f"kl {kl}")
        o.task = Same()
        with pytest.raises(ValueError, match="in no group did the rewards differ.*'no advantage': 16"):
            o.run_policy_optimization("grpo", n_prompts=4, group=4, kl=kl)
        o.close()


class Moody(Letters):
    "Abstains on answers of an odd length."

    def reward(self, prompts, completions, **columns):
        return [None if len(c) % 2 else len(set(c)) / 8 for c in completions]


def unchecked(reward, prompts, answers, **columns):
    flat = [(p, a.text) for p, row in zip(prompts, answers) for a in row]
    r = iter(reward([p for p, _ in flat], [a for _, a in flat], **columns))
    return [[next(r) for _ in row] for row in answers]


def test_answers_on_which_the_reward_abstains_are_left_out_and_counted(make, monkeypatch):
    monkeypatch.setattr(rounds, "score_samples", unchecked)  # lets them through, as `Guarded` does
    seen, original = [], update.reinforce
    monkeypatch.setattr(
        update,
        "reinforce",
        lambda policy, rows, *a, **k: seen.append(rows) or original(policy, rows, *a, **k),
    )
    o = make()
    o.task = Moody()
    stage = o.run_policy_optimization("grpo", n_prompts=8, group=4, prompts_per_step=8)
    samples = o._ledgers[1].rows()
    scored = [s for s in samples if s["reward"] is not None]
    assert (
        len(samples) == 32
        and all((s["reward"] is None) == bool(len(s["completion"]) % 2) for s in samples)
        and 0 < len(scored) < 32
    )
    assert stage.dropped["abstained"] == 32 - len(scored) and stage.metrics["reward"] == [
        pytest.approx(sum(s["reward"] for s in scored) / len(scored))
    ]
    expected = [s["advantage"] / len(s["completion_ids"]) / len(scored) for s in scored if s["advantage"]]
    assert [r["weight"] * r["advantage"] / len(seen[0]) for r in seen[0]] == pytest.approx(expected)


def test_grpo_takes_one_step_on_each_batch_of_samples(make):
    for k, settings in enumerate([{}, dict(per_device_train_batch_size=3)]):
        o = make(f"run {k}")
        stage = o.run_policy_optimization(
            "grpo", n_prompts=8, group=4, prompts_per_step=4, **FAST, **settings
        )
        assert stage.metrics["steps"] == 2
        o.close()
    for more in dict(num_train_epochs=2), dict(max_steps=3):
        with pytest.raises(ValueError, match="one step on each batch"):
            make("epochs").run_policy_optimization("grpo", **more)


def test_consecutive_stages_of_a_method_go_on_with_the_optimizer(make, monkeypatch):
    given, original = [], update.dpo
    monkeypatch.setattr(
        update,
        "dpo",
        lambda p, rows, ref, **k: given.append(k["optimizer"]) or original(p, rows, ref, **k),
    )
    o = make()
    o.run_policy_optimization("dpo", PREF)
    o.run_self_play(8, n_samples=2)
    o.run_policy_optimization("dpo", PREF)
    o.run_policy_optimization("ipo", PREF)
    assert [g is not None for g in given] == [False, True, False]


def test_two_orchestrators_take_turns_on_one_base(make, tiny):
    a, b = make("a"), make("b", seed=5)
    a.run_sft(SFT_DATA, **FAST)
    mine = a.policy.state()
    b.run_sft(SFT_DATA[:8])
    yours = b.policy.state()
    a.run_reward_model_training(PREF)
    assert all(torch.equal(mine[k], v) for k, v in a.policy.state().items()) and sorted(tiny.adapters) == [
        "policy",
        "reward",
    ]
    assert all(torch.equal(yours[k], v) for k, v in b.policy.state().items()) and tiny.adapters == ["policy"]


def test_selection_takes_the_best_on_problems_that_nobody_saw(make, tiny, monkeypatch):
    o = make(validation_size=10)
    made = all_stages(o, rounds=2)
    told = {}
    asked = {p["prompt"] for p in o.validation}
    assert len(asked) == 10 and not asked & {p["prompt"] for p in o.problems}
    with pytest.raises(ValueError, match="'held-out': 1"):
        o.run_sft([dict(prompt=o.validation[0]["prompt"], completion="a")])
    evaluation = pipeline.evaluate

    def scripted(policy, problems, *a, **k):  # the first update is the best, and the last one as good
        found = evaluation(policy, problems, *a, **k)
        told[len(told)] = problems
        for r, right in zip(found.rows, [0] * 10 if len(told) in (1, 2) else [1] * 8):
            r["right"] = right
        return found

    monkeypatch.setattr(pipeline, "evaluate", scripted)
    s = o.run_selection()
    first = o.stages[4]
    assert (
        list(told.values()) == [o.validation] * 4
        and s.metrics["chosen"] == first.title == "04_dpo"
        and s.title == "07_selection"
    )
    assert (
        s.after == first.after
        and s.before == o.stages[6].after
        and [v["n"] for v in s.metrics["validation"].values()] == [10] * 4
    )
    kept = Policy.load(tiny, o.folder(first) / "adapter", "kept").state()
    Policy.resident(tiny, "kept").delete()
    assert all(torch.equal(kept[k], v) for k, v in o.policy.state().items()) and "took 04_dpo" in repr(s)
    o.close()
    again = make(validation_size=10)
    all_stages(again, rounds=2)
    again.run_selection()
    assert len(told) == 4 and all(torch.equal(kept[k], v) for k, v in again.policy.state().items())
    again.run_policy_optimization("dpo", made, **FAST)  # and on from there
    assert again.stages[-1].before == first.after


def test_selection_can_be_skipped_and_wants_problems(make):
    assert make(skip=["selection"]).run_selection() is None
    with pytest.raises(ValueError, match="validation_size is 0"):
        make(validation_size=0).run_selection()


def test_another_process_is_kept_out(make, tmp_path):
    from filelock import FileLock

    o = make()
    o.dir.mkdir()
    with FileLock(o.dir / ".lock"), pytest.raises(RuntimeError, match="another process"):
        o.run_sft(SFT_DATA)
    assert o.run_sft(SFT_DATA).number == 1


def test_a_task_that_leaks_is_refused(make):
    class Leaks(Letters):
        def problems(self, split, n, seed=0):
            return super().problems("held-out", n, seed)

    with pytest.raises(ValueError, match="train split has problems of its held-out split"):
        RLHFOrchestrator(make().dir, "nowhere", Leaks(), eval_size=4).run_self_play(16)


def test_bars_are_told_of_each_step(make, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, total=None, desc="", **k):
            self.total, self.desc, self.n = total, desc, 0
            bars.append(self)

        def update(self, k):
            self.n += k

        def __enter__(self):
            return self

        def __exit__(self, *a):
            pass

        write = staticmethod(lambda text: None)

    monkeypatch.setattr(pipeline, "tqdm", Bar)
    o = make(progress=True)
    all_stages(o)
    assert {b.desc for b in bars} == {"evaluation", "01_sft", "02_reward_model", "03_self_play", "04_dpo"}
    for b in bars:
        assert b.n == b.total > 0, b.desc


# --- the same run, and other people's things


def test_adapters_of_others_are_left_alone(make, tiny):
    mine = Policy(tiny, "policy", r=4, seed=9)
    kept = mine.state()
    o = make()
    with pytest.raises(ValueError, match="the base has adapters .'policy'. that no pipeline made"):
        o.run_sft(SFT_DATA)
    assert tiny.adapters == ["policy"] and all(torch.equal(kept[k], v) for k, v in mine.state().items())
    mine.delete()
    assert o.run_sft(SFT_DATA[:4]).number == 1


def test_files_of_others_are_left_alone(make, tmp_path):
    for name, text in ("pairs.jsonl", '{"prompt": "mine"}'), ("config.json", '{"model_type": "llama"}'):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(text)
        with pytest.raises(ValueError, match="left alone"):
            make(name).run_sft(SFT_DATA)
        with pytest.raises(ValueError, match="left alone"):
            make(name).run_sft(SFT_DATA, fresh=True)
        assert (tmp_path / name / name).read_text() == text


class Kinder(Letters):
    def reward(self, prompts, completions, answer, **columns):
        return [1.0 + c.count(a) for c, a in zip(completions, answer)]


def test_another_base_reward_or_default_is_refused(make, tiny, tiny_folder, tmp_path, monkeypatch):
    o = make()
    o.run_sft(SFT_DATA[:4])
    o.close()
    kinder = RLHFOrchestrator(o.dir, tiny, Kinder(), eval_size=12, validation_size=4, r=4, progress=False)
    with pytest.raises(ValueError, match="run.reward.* there"):
        kinder.run_sft(SFT_DATA[:4])
    with monkeypatch.context() as m:
        m.setitem(pipeline.DEFAULTS["sft"], "learning_rate", 1e-5)
        with pytest.raises(ValueError, match="settings.learning_rate: 0.0004 there, 1e-05 now"):
            make().run_sft(SFT_DATA[:4])
    other = Base.load(tiny_model_folder(tmp_path / "other", seed=5), dtype=torch.float32, device="cpu")
    other.name = tiny.name
    with pytest.raises(ValueError, match="made on another base .weights"):
        p = make(base=other)
        p.run_sft(SFT_DATA[:4])
        p.policy.state()
    file = o.folder(o.stages[1]) / "stage.json"
    whole = file.read_text()
    for text, said in (
        (json.dumps(json.loads(whole) | {"format": 99, "new": 1}), "stage.json is in format 99"),
        ("{", "stage.json is damaged"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=said):
            make().run_sft(SFT_DATA[:4])


def test_rows_without_a_task_are_not_evaluated_on_sums(tmp_path):
    o = RLHFOrchestrator(tmp_path / "r", progress=False)
    with pytest.raises(ValueError, match="come without a task.*task="):
        o.run_sft([dict(prompt="Write a poem.", completion="Roses")])
    with pytest.raises(ValueError, match="come without a task"):
        o.run_self_play(16, prompts=["Write a poem.", "Say 4."])
    assert not (tmp_path / "r").exists()


def test_self_play_that_makes_no_pair_says_so(make):
    class Same(Letters):
        def reward(self, prompts, completions, **columns):
            return [0.5] * len(completions)

    o = RLHFOrchestrator(
        make().dir, make().model, Same(), eval_size=4, validation_size=0, r=4, progress=False
    )
    with pytest.warns(UserWarning, match="made no pair to learn from: the reward was 0.5 for every answer"):
        assert o.run_self_play(8, n_samples=2) == []
