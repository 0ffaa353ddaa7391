"What an update takes, and what it says of anything else; mixtures of experts."

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedTokenizerFast, Qwen2MoeConfig

from selfplay_nb.models import update as update_module
from selfplay_nb.models.policy import Base, Policy
from selfplay_nb.models.reward_model import RewardModel
from selfplay_nb.models.update import dpo, reinforce, sft

ROW = dict(prompt="1 + 2 =", chosen="3", rejected="five", completion="3", advantage=1.0)
UPDATES = {
    "dpo": lambda p, rows: dpo(p, rows, Policy(p.base, "base")),
    "sft": sft,
    "reinforce": reinforce,
    "reward model": lambda p, rows: RewardModel(p.base).train(rows),
    "scores": lambda p, rows: RewardModel(p.base).scores(rows),
}
ON_PAIRS = "dpo", "reward model", "scores"


@pytest.fixture
def policy(tiny):
    return Policy(tiny, "student")


def without(*keys, **more):
    return {k: v for k, v in ROW.items() if k not in keys} | more


@pytest.mark.parametrize(
    "update, row, said",
    [
        *[
            (u, without("prompt", question="1 + 2 ="), "lacks .'prompt'.*'question'.*expected 'prompt'")
            for u in UPDATES
        ],
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
        *[
            (
                u,
                without(chosen=[dict(role="user", content="1 + 2 ="), dict(role="assistant", content="3")]),
                "column 'chosen'.*one message",
            )
            for u in ON_PAIRS
        ],
        *[(u, without(completion=None), "column 'completion' is None") for u in ("sft", "reinforce")],
        *[
            (u, without(completion=[dict(role="assistant", content=None)]), "column 'completion'")
            for u in ("sft", "reinforce")
        ],
        *[(u, without("completion"), "lacks .'completion'") for u in ("sft", "reinforce")],
        *[(u, without(completion_ids=3), "column 'completion_ids' is 3") for u in ("sft", "reinforce")],
        ("reinforce", without("advantage"), "lacks .'advantage'"),
        ("reinforce", without(advantage=None), "column 'advantage' is None: expected a number"),
        ("reinforce", without(weight="1"), "column 'weight' is '1'"),
    ],
)
def test_an_odd_row_is_named_with_its_column(policy, update, row, said):
    before = policy.state()
    with pytest.raises(ValueError, match=f"(row|pair) 1.*{said}"):
        UPDATES[update](policy, [ROW, row])
    assert all(torch.equal(before[k], v) for k, v in policy.state().items())


@pytest.mark.parametrize("update", ["dpo", "sft", "reinforce", "reward model"])
def test_a_plain_prompt_without_a_token_is_refused(tiny_folder, update):
    policy = Policy(Base.load(tiny_folder, dtype=torch.float32, device="cpu", chat=False))
    with pytest.raises(ValueError, match="(row|pair) 1, column 'prompt' is '': expected at least one token"):
        UPDATES[update](policy, [ROW, ROW | dict(prompt="")])


def test_conversations_and_extra_columns_are_taken(policy):
    says = lambda role, text: [dict(role=role, content=text)]
    said = ROW | dict(
        prompt=says("user", "1 + 2 ="),
        chosen=says("assistant", "3"),
        completion=says("assistant", "3"),
        rejected=says("assistant", "five"),
        chosen_ids=None,
        completion_ids=None,
        question=None,
        extra=object(),
    )
    for kind in "dpo", "sft", "reinforce":
        start = policy.state()
        losses = [
            UPDATES[kind](policy, rows).losses for rows in ([ROW], [said]) if not policy.load_state(start)
        ]
        policy.load_state(start)
        assert losses[0] == losses[1]


def test_any_iterable_of_rows_will_do(policy):
    from datasets import Dataset

    rows = [without("advantage", prompt=f"{i}") for i in range(3)]
    start, losses = policy.state(), []
    for data in rows, iter(rows), Dataset.from_list(rows):
        losses.append(sft(policy, data).losses)
        policy.load_state(start)
    assert losses[0] == losses[1] == losses[2]


def test_what_the_reference_said_is_a_number(policy):
    known = dict(chosen_logps=-1.0, rejected_logps=-2.0)
    for bad in None, math.nan, "low":
        with pytest.raises(ValueError, match="'rejected_logps' is .*a finite number"):
            dpo(
                policy,
                [ROW | known | dict(rejected_logps=bad)],
                Policy(policy.base, "base"),
                sampled_by_reference=True,
            )


def test_a_frozen_policy_is_refused_before_anything_is_computed(policy, monkeypatch):
    fixed = policy.snapshot("fixed")
    monkeypatch.setattr(type(policy.base), "answer_logprobs", lambda *args: pytest.fail("computed"))
    for update in (
        lambda: dpo(fixed, [ROW], policy),
        lambda: reinforce(fixed, [ROW], reference=policy, kl=1.0),
        lambda: sft(fixed, [ROW]),
    ):
        with pytest.raises(ValueError, match="frozen"):
            update()


@pytest.mark.parametrize(
    "kl, reference, said",
    [
        (-1.0, True, "kl is -1.0: expected a number"),
        (math.nan, True, "kl is nan"),
        ("1", True, "kl is '1'"),
        (0.1, False, "kl is 0.1 without a reference"),
    ],
)
def test_a_divergence_needs_a_reference(policy, kl, reference, said):
    with pytest.raises(ValueError, match=said):
        reinforce(policy, [ROW], reference=policy if reference else None, kl=kl)


def test_an_answer_that_was_cut_off_is_not_taught_to_end(policy):
    end, start = policy.base.end_id, policy.state()

    def rows(**more):
        return [dict(prompt="q", completion="yes", advantage=1.0, **more)]

    ids = policy.base.completion_ids("yes")
    assert ids[-1] == end
    for update in sft, reinforce:
        losses = []
        for more in dict(), dict(truncated=True), dict(completion_ids=ids[:-1]), dict(completion_ids=ids):
            losses.append(update(policy, rows(**more)).losses[0])
            policy.load_state(start)
        assert losses[1] == losses[2] != losses[0] == losses[3]


# mixtures of experts

SMALL = dict(
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
EXPERTS = dict(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32
)
MIXTURES = {
    "qwen2": lambda n: Qwen2MoeConfig(vocab_size=n, **EXPERTS, **SMALL),
    "mixtral": lambda n: MixtralConfig(vocab_size=n, num_local_experts=4, num_experts_per_tok=2, **SMALL),
}


@pytest.fixture(params=MIXTURES)
def mixture(request, tiny_folder, tmp_path):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MIXTURES[request.param](len(tokenizer))).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return Base.load(tmp_path, dtype=torch.float32, device="cpu")


ROWS = [
    ROW | dict(prompt=f"{i} + 2 =", chosen="3" * (i + 1), completion="3" * (i + 1), advantage=i - 0.5)
    for i in range(3)
]


def test_mixtures_of_experts_learn_the_loss_that_is_named(mixture):
    policy = Policy(mixture)
    before = dict(vars(mixture.model.config))
    start = policy.state()
    said = {
        k: policy.logprobs([r["prompt"] for r in ROWS], [r[k] for r in ROWS], per_token=True)
        for k in ("chosen", "rejected")
    }
    assert sft(policy, ROWS).losses == pytest.approx([-torch.cat(said["chosen"]).mean().item()], abs=1e-5)
    policy.load_state(start)
    assert dpo(policy, ROWS, Policy(mixture, "base")).losses == pytest.approx(
        [math.log(2) - 0.2 * torch.cat(said["chosen"]).mean().item()], abs=1e-5
    )
    policy.load_state(start)
    gain = sum(r["advantage"] * lp.sum().item() for r, lp in zip(ROWS, said["chosen"])) / 3
    assert reinforce(policy, ROWS).losses == pytest.approx([-gain], abs=1e-5)
    assert RewardModel(mixture).train(ROWS).losses == pytest.approx([math.log(2)], abs=1e-6)
    assert vars(mixture.model.config) == before and mixture.adapters == ["student", "reward"]


def test_the_balance_of_experts_can_be_asked_of_trl(mixture):
    for update, rows in (sft, ROWS), (lambda *a, **k: dpo(*a, Policy(mixture, "base"), **k), ROWS):
        losses = []
        for settings in {}, dict(router_aux_loss_coef=0.1, backend="trl"):
            policy = Policy(mixture)
            losses.append(update(policy, rows, **settings).losses[0])
            policy.delete()
        assert losses[1] > losses[0] + 0.1  # at least .1 times what a perfect balance has, which is 1 or more


# settings


@pytest.mark.parametrize(
    "settings, said",
    [
        (
            dict(learnin_rate=1e-4),
            "unknown setting 'learnin_rate'.*near it: .'learning_rate'.*num_train_epochs",
        ),
        (dict(learning_rate=-1), "learning_rate is -1: expected a finite number of at least 0"),
        (dict(learning_rate="fast"), "learning_rate is 'fast'"),
        (dict(per_device_train_batch_size=0), "per_device_train_batch_size is 0: expected a whole number"),
        (dict(max_steps=1.5), "max_steps is 1.5"),
        (dict(num_train_epochs=0), "num_train_epochs is 0: expected a finite number above 0"),
        (dict(seed=-1), "seed is -1"),
        (dict(optim="lion"), "optim is 'lion': expected one of 'adamw_torch'"),
        (dict(adam_beta1=1.5), "adam_beta1 is 1.5"),
        (dict(lr_scheduler_type="steep"), "lr_scheduler_type is 'steep': expected one of 'linear'"),
        (dict(progress=3), "progress is 3: expected a function"),
        (dict(backend="jax"), "backend is 'jax': expected one of 'own', 'trl'"),
    ],
)
@pytest.mark.parametrize("update", ["dpo", "sft"])
def test_a_bad_setting_is_named_before_anything_is_computed(policy, update, settings, said, monkeypatch):
    monkeypatch.setattr(update_module, "token_logprobs", lambda *args: pytest.fail("computed"))
    if "progress" not in settings:
        monkeypatch.setattr(type(policy.base), "answer_logprobs", lambda *args: pytest.fail("computed"))
    call = dict(
        dpo=lambda **more: dpo(policy, [ROW], Policy(policy.base, "base"), **more),
        sft=lambda **more: sft(policy, [ROW], **more),
    )[update]
    with pytest.raises(ValueError, match=said):
        call(**settings)
    assert policy.base.adapters == ["student"]


@pytest.mark.parametrize(
    "settings, said",
    [
        (
            dict(loss_type="simpo"),
            "loss_type is 'simpo': expected one or more of .'sigmoid'.*backend=\"trl\"",
        ),
        (dict(beta=0), "beta is 0: expected a finite number above 0"),
        (
            dict(loss_type=["sigmoid"], loss_weights=[1.0, 2.0]),
            "loss_type is .'sigmoid'. with loss_weights .*as many weights",
        ),
        (dict(loss_type=[], loss_weights=[]), "expected one or more"),
        (
            dict(loss_type="exo_pair", loss_weights=None),
            "label_smoothing is 0.0: expected a finite number above 0",
        ),
        (dict(loss_type="robust", loss_weights=None, label_smoothing=0.5), "label_smoothing is 0.5"),
        (dict(label_smoothing=0.1), "label_smoothing is 0.1, and .*'sigmoid'.* does not use it"),
        (dict(ld_alpha=0.5), "unknown setting 'ld_alpha'.*trl"),
        (
            dict(beta=0.1, backend="trl", betta=1),
            "unknown settings .'betta'.: expected fields of TRL's DPOConfig",
        ),
    ],
)
def test_a_bad_loss_on_pairs_is_named(policy, settings, said):
    with pytest.raises(ValueError, match=said):
        dpo(policy, [ROW], Policy(policy.base, "base"), **settings)


@pytest.mark.parametrize("loss", ["aot", "aot_unpaired"])
def test_a_loss_that_sorts_a_step_needs_it_whole(tiny_folder, loss):
    rows = [dict(prompt="a b c", chosen=f"{k} yes", rejected=f"{k} no") for k in range(4)]
    settings = dict(loss_type=loss, loss_weights=None, per_device_train_batch_size=4)
    for room, fits in (10_000, True), (40, False):
        base = Base.load(tiny_folder, dtype=torch.float32, device="cpu", max_train_tokens=room)
        policy = Policy(base, "student")
        before = policy.state()
        if fits:
            dpo(policy, rows, Policy(base, "base"), **settings)
        else:
            with pytest.raises(ValueError, match=f"{loss} compares all 4 pairs of a step, of which"):
                dpo(policy, rows, Policy(base, "base"), **settings)
        assert fits != all(torch.equal(w, before[k]) for k, w in policy.state().items())


def test_the_rate_follows_its_schedule(policy):
    rows = [dict(prompt=f"{i}", completion="yes") for i in range(10)]

    def rates(**settings):
        result = sft(policy, rows, learning_rate=0.1, per_device_train_batch_size=1, **settings)
        return [h["learning_rate"] for h in result.history if "loss" in h]

    assert (
        rates() == [0.1] * 10
        and len(rates(num_train_epochs=1.5)) == 15
        and len(rates(max_steps=3)) == 3
        and len(rates(max_steps=12)) == 12
    )
    assert rates(lr_scheduler_type="linear") == pytest.approx([0.1 - 0.01 * i for i in range(10)])
    for warm in dict(warmup_steps=4), dict(warmup_steps=0.4), dict(warmup_ratio=0.4):
        assert rates(lr_scheduler_type="constant_with_warmup", **warm) == pytest.approx(
            [0, 0.025, 0.05, 0.075] + [0.1] * 6
        )


def test_layers_that_are_computed_again_learn_the_same(policy):
    rows = [dict(prompt=f"{i} and {i}", completion="yes " * (i + 1)) for i in range(6)]
    start = policy.state()
    ended = []
    kept = []
    for again in False, True:
        policy.load_state(start)
        sizes = {}

        def keep(t):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            sft(policy, rows, num_train_epochs=2, gradient_checkpointing=again)
        ended.append(policy.state())
        kept.append(sum(sizes.values()))
    assert all(torch.equal(a, b) for a, b in zip(*map(dict.values, ended))) and kept[1] < kept[0]
    assert not any(
        m.training or getattr(m, "gradient_checkpointing", False) for m in policy.base.model.modules()
    )


# TRL's own trainers, as they are

PLAIN = dict(
    learning_rate=1.0, optim="sgd", max_grad_norm=0.0, weight_decay=0.0, per_device_train_batch_size=64
)


def filled(policy, seed):
    g = torch.Generator().manual_seed(seed)
    policy.load_state({k: 0.1 * torch.randn(v.shape, generator=g) for k, v in policy.state().items()})
    return policy


@pytest.mark.parametrize("against", ["snapshot", "of another rank", "base"])
@pytest.mark.parametrize(
    "terms",
    [
        dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2]),
        dict(loss_type=["ipo"], loss_weights=None),
        dict(loss_type=["robust"], loss_weights=None, label_smoothing=0.1),
    ],
    ids=str,
)
def test_a_step_on_pairs_is_trls(policy, terms, against):
    base = policy.base
    filled(policy, 1)
    reference = (
        Policy(base, "base")
        if against == "base"
        else filled(Policy(base, "other", r=16 if against == "snapshot" else 5), 2)
    )
    rows = [
        dict(prompt=f"{i} + 2 =", chosen="3" * (i + 1), rejected="no " * (6 - i), rejected_truncated=i == 2)
        for i in range(6)
    ]
    start, ended, results = policy.state(), [], []
    adapters = base.adapters
    attributes = {m: set(vars(m)) for m in base.model.modules()}
    config = base.model.config.to_dict()
    for backend in "own", "trl":
        policy.load_state(start)
        torch.manual_seed(5)
        results.append(dpo(policy, rows, reference, backend=backend, **PLAIN | terms))
        assert torch.rand(1).item() == pytest.approx(
            torch.rand(1, generator=torch.Generator().manual_seed(5)).item()
        )
        ended.append(policy.state())
    own, trl = results
    assert (
        own.losses == pytest.approx(trl.losses, abs=1e-5)
        and len(own.losses) == 1
        and own.n_rows == trl.n_rows == 6
    )
    for k in ended[0]:
        torch.testing.assert_close(ended[0][k], ended[1][k], rtol=0, atol=1e-5)
    assert any(not torch.equal(start[k], w) for k, w in ended[1].items())
    for k in "rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected":
        assert own.history[0][k] == pytest.approx(trl.history[0][k], abs=1e-4)
    assert adapters == base.adapters and config == base.model.config.to_dict() and not base.model.training
    assert attributes == {m: set(vars(m)) for m in base.model.modules()}


def test_a_step_of_imitation_is_trls(policy):
    rows = [dict(prompt=f"{i} + 2 =", completion="3" * (i + 1), truncated=i == 2) for i in range(6)]
    start = filled(policy, 1).state()
    ended = []
    losses = []
    told = []
    for backend in "own", "trl":
        policy.load_state(start)
        losses.append(
            sft(policy, rows, backend=backend, progress=lambda *now: told.append(now), **PLAIN).losses
        )
        ended.append(policy.state())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and told == [(1, 1), (1, 1)]
    for k in ended[0]:
        torch.testing.assert_close(ended[0][k], ended[1][k], rtol=0, atol=1e-5)


def test_moments_travel_between_the_two(policy):
    rows = [dict(prompt=f"{i} + 2 =", completion="3" * (i + 1)) for i in range(6)]
    start, ended = policy.state(), []
    for first, second in ("own", "own"), ("trl", "own"), ("own", "trl"):
        policy.load_state(start)
        moments = sft(policy, rows, backend=first).optimizer
        sft(policy, rows, moments, backend=second)
        ended.append(policy.state())
    for other in ended[1:]:
        for k, w in ended[0].items():
            torch.testing.assert_close(other[k], w, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_learns_in_float32(kind, tiny_folder):
    base = Base.load(tiny_folder, dtype=kind, device="cpu")
    rows = [dict(prompt=f"{i}", completion="yes") for i in range(4)]
    start = Policy(base, "start")
    results = []
    for backend in "own", "trl":
        policy = start.snapshot(backend, frozen=False)
        results.append(sft(policy, rows, num_train_epochs=3, backend=backend).losses)
        assert {w.dtype for w in policy.state().values()} == {torch.float32}
    assert results[0] == pytest.approx(results[1], abs=0.02) and results[0][2] < results[0][0] - 0.05


def test_a_trainer_of_trl_that_fails_leaves_the_policy_as_it_was(policy):
    before, reference = policy.state(), Policy(policy.base, "base")
    with pytest.raises(FloatingPointError, match="policy is unchanged"):
        dpo(policy, [ROW] * 4, reference, backend="trl", learning_rate=1e30, num_train_epochs=3)
    assert all(torch.equal(before[k], w) for k, w in policy.state().items()) and policy.base.adapters == [
        "student"
    ]


# several processes

ROWS_OF_TWO = [dict(prompt=f"{i} + 2 =", completion="3" * (i % 3 + 1)) for i in range(13)]


def in_two(rank, folder, out, port):
    "One of two processes that make the same update together."
    import os

    os.environ |= dict(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    policy = Policy(Base.load(folder, dtype=torch.float32, device="cpu", max_train_tokens=40), "student")
    result = sft(policy, ROWS_OF_TWO, per_device_train_batch_size=4)
    torch.save((policy.state(), result.losses), out / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_make_the_steps_of_one(policy, tiny_folder, tmp_path):
    "Other processes are begun anew, so that this one never becomes one of several."
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["selfplay_nb.models.update"])
    torch.multiprocessing.start_processes(
        in_two, (tiny_folder, tmp_path, port), nprocs=2, start_method="forkserver"
    )
    result = sft(policy, ROWS_OF_TWO, per_device_train_batch_size=8)
    for rank in range(2):
        state, losses = torch.load(tmp_path / f"{rank}.pt")
        assert losses == pytest.approx(result.losses, abs=1e-5) and len(losses) == 2
        for k, w in policy.state().items():
            torch.testing.assert_close(state[k], w, rtol=0, atol=1e-5)


def test_processes_that_do_not_know_of_one_another_are_refused(policy, monkeypatch):
    "As under torchrun on a CPU, if a script has made a plain `PartialState()` first."
    sft(policy, ROWS_OF_TWO[:2])
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = policy.state()
    for backend in ("own", "trl"):
        with pytest.raises(RuntimeError, match=r"2 processes were started.*PartialState\(cpu=True\)"):
            sft(policy, ROWS_OF_TWO[:2], backend=backend)
    assert all(torch.equal(w, before[k]) for k, w in policy.state().items())


@pytest.mark.parametrize("loss", ["sppo", "sigmoid"])
def test_a_single_step_in_half_precision_learns(tiny_folder, loss):
    "A scale of the gradients that is too large at first is halved until the step can be taken."
    base = Base.load(tiny_folder, dtype=torch.float16, device="cpu")
    policy = Policy(base, "student")
    before = policy.state()
    pairs = [dict(prompt=f"q{i}", chosen="aaaa", rejected="zz") for i in range(4)]
    result = dpo(policy, pairs, Policy(base, "base"), loss_type=loss, loss_weights=None, beta=0.01)
    assert len(result.losses) == 1 and math.isfinite(result.history[0]["grad_norm"])
    assert any(not torch.equal(before[k], v) for k, v in policy.state().items())
