"""Updates against plain PyTorch: a forward pass of its own, one sequence at a time, in float64, and nothing
of the library.

What an update says of itself (its losses), where it ends (one step of SGD at rate 1 is the gradient) and
which tokens carry the loss are held against this. What is asked of the library is only which rows it took
into which step, since their order is its own.
"""

import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from selfplay_nb.loop.pipeline import RLHFOrchestrator
from selfplay_nb.models import update
from selfplay_nb.models.policy import Base, Policy
from selfplay_nb.models.reward_model import RewardModel
from selfplay_nb.models.update import SMOOTHED, dpo, reinforce, sft

sppo = partial(dpo, loss_type="sppo", loss_weights=None, beta=0.1)

# of the tiny model; adapters are scaled by alpha/r
LAYERS = 2
HEADS = 2
KV_HEADS = 1
SIZE = 32
SCALE = 2.0
END, START = 2, 1
SGD = dict(optim="sgd", learning_rate=1.0, max_grad_norm=0.0, weight_decay=0.0)


# the model, by hand


class Plain:
    "A Llama and an adapter in a few lines: weights are read once, and answers come one sequence at a time."

    def __init__(self, model):
        self.w = {}
        for name, module in model.named_modules():
            layer = getattr(module, "base_layer", module)
            if not isinstance(getattr(layer, "weight", None), torch.Tensor):
                continue
            name, weight = name.removesuffix(".base_layer"), layer.weight
            if hasattr(weight, "quant_state"):
                weight = dequantize_4bit(weight.data, weight.quant_state)
            self.w[name] = weight.detach().double()

    def product(self, x, name, adapter):
        y = x @ self.w[name].T
        a, b = (f"base_model.model.{name}.lora_{k}.weight" for k in "AB")
        return y + SCALE * (x @ adapter[a].T) @ adapter[b].T if a in adapter else y

    def norm(self, x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.w[name]

    def states(self, ids, adapter):
        "The last hidden states (tokens, width), after the norm."
        n, x = len(ids), self.w["model.embed_tokens"][ids]
        angles = torch.arange(n)[:, None] * 10000.0 ** (-torch.arange(0, SIZE, 2, dtype=torch.float64) / SIZE)
        cos = torch.cat([angles.cos()] * 2, -1)[:, None]
        sin = torch.cat([angles.sin()] * 2, -1)[:, None]

        def turned(x):
            return x * cos + torch.cat([-x[..., SIZE // 2 :], x[..., : SIZE // 2]], -1) * sin

        for i in range(LAYERS):
            at = f"model.layers.{i}."
            h = self.norm(x, f"model.layers.{i}.input_layernorm")
            q, k, v = (self.product(h, f"{at}self_attn.{p}_proj", adapter).view(n, -1, SIZE) for p in "qkv")
            q = turned(q)
            k = turned(k).repeat_interleave(HEADS // KV_HEADS, 1)
            v = v.repeat_interleave(HEADS // KV_HEADS, 1)
            scores = torch.einsum("qhd,khd->hqk", q, k) / SIZE**0.5
            scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf).softmax(-1)
            x = x + self.product(
                torch.einsum("hqk,khd->qhd", scores, v).reshape(n, -1), f"{at}self_attn.o_proj", adapter
            )
            h = self.norm(x, f"{at}post_attention_layernorm")
            up, gate = (self.product(h, f"{at}mlp.{p}_proj", adapter) for p in ("up", "gate"))
            x = x + self.product(F.silu(gate) * up, f"{at}mlp.down_proj", adapter)
        return self.norm(x, "model.norm")

    def logprobs(self, prompt, answer, adapter):
        "Of each token of the answer."
        logits = self.states(prompt + answer, adapter) @ self.w["lm_head"].T
        return logits.log_softmax(-1)[range(len(prompt) - 1, len(prompt + answer) - 1), answer]


# the tokens, by hand: <unk>, <s>, </s>, and a character each from the blank on


def characters(text):
    return [3 + ord(c) - 32 for c in text]


def asked(prompt, chat):
    if not chat:
        return characters(prompt)
    messages = [dict(role="user", content=prompt)] if isinstance(prompt, str) else prompt
    turns = [[START, *characters(f"{m['role']}: {m['content']}"), END] for m in messages]
    return [*sum(turns, []), START, *characters("assistant: ")]


def answered(text, cut=False):
    return characters(text) + [END] * (not cut)


# what was taken into which step


class Seen:
    """The sequences of each step, part by part; `plant` may change the rows of a part on their way to the
    loss.
    """

    def __init__(self, monkeypatch, plant=list):
        self.steps, self.now, add_up = [], [], update._add_up

        def watched(base, weights, loss, *rest):
            def seen(part, step):
                self.now.append([*self.sequences(part)])
                return loss(plant(part), step)

            return add_up(base, weights, seen, *rest)

        monkeypatch.setattr(update, "_add_up", watched)

    def sequences(self, part):
        "Of pairs all chosen ones come first."
        for column in ANSWERS:
            yield from (r["prompt_ids"] + r[column] for r in part if column in r)

    def progress(self, step, steps):
        self.steps.append(self.now)
        self.now = []


ANSWERS = "chosen_ids", "rejected_ids", "completion_ids"


# a loss for each update, as it stands in its paper: of rows, adapter, and what the reference said


def row_loss_sft(plain, rows, adapter, chat, **_):
    said = [
        plain.logprobs(asked(r["prompt"], chat), answered(r["completion"], r.get("truncated")), adapter)
        for r in rows
    ]
    return -torch.cat(said).mean()


def row_loss_reinforce(plain, rows, adapter, chat, reference=None, kl=0.0, **_):
    total = 0.0
    for r in rows:
        prompt = asked(r["prompt"], chat)
        answer = answered(r["completion"], r.get("truncated"))
        said = plain.logprobs(prompt, answer, adapter)
        row = -r["advantage"] * said.sum()
        if kl:
            ratio = (plain.logprobs(prompt, answer, reference) - said).exp()
            row = row + kl * (ratio - ratio.log() - 1).sum()
        total = total + r.get("weight", 1.0) * row
    return total / len(rows)


BETA, SMOOTH, TAU = 0.3, 0.1, 0.05


def logistic(x):
    return -F.logsigmoid(x)


PAIRWISE = {  # of the log-ratios of chosen and rejected (n,), and of their lengths
    "sigmoid": lambda c, r, n, m: logistic(BETA * (c - r)),
    "hinge": lambda c, r, n, m: (1 - BETA * (c - r)).clamp(min=0),
    "ipo": lambda c, r, n, m: (c / n - r / m - 1 / (2 * BETA)) ** 2,
    "exo_pair": lambda c, r, n, m: sum(
        p * (p.log() - math.log(q))
        for p, q in (((BETA * (c - r)).sigmoid(), 1 - SMOOTH), ((BETA * (r - c)).sigmoid(), SMOOTH))
    ),
    "nca_pair": lambda c, r, n, m: logistic(BETA * c) + 0.5 * logistic(-BETA * c) + 0.5 * logistic(-BETA * r),
    "robust": lambda c, r, n, m: (
        ((1 - SMOOTH) * logistic(BETA * (c - r)) - SMOOTH * logistic(BETA * (r - c))) / (1 - 2 * SMOOTH)
    ),
    "bco_pair": lambda c, r, n, m: logistic(BETA * c) + logistic(-BETA * r),
    "sppo_hard": lambda c, r, n, m: (c - 0.5 / BETA) ** 2 + (r + 0.5 / BETA) ** 2,
    "aot_unpaired": lambda c, r, n, m: smoothed(c.sort()[0] - r.sort()[0]),
    "apo_zero": lambda c, r, n, m: 1 - (BETA * c).sigmoid() + (BETA * r).sigmoid(),
    "apo_down": lambda c, r, n, m: (BETA * c).sigmoid() + 1 - (BETA * (c - r)).sigmoid(),
    "discopop": lambda c, r, n, m: mixed(BETA * (c - r)),
    "sigmoid_norm": lambda c, r, n, m: logistic(BETA * (c / n - r / m)),
}


def smoothed(x):
    return (1 - SMOOTH) * logistic(BETA * x) + SMOOTH * logistic(-BETA * x)


def mixed(x):
    share = (x / TAU).sigmoid()
    return (1 - share) * logistic(x) + share * (-x).exp()


def row_loss_dpo(plain, rows, adapter, chat, reference, terms, beta=BETA, **_):
    said, was = {}, {}
    for k in "chosen", "rejected":
        ids = [(asked(r["prompt"], chat), answered(r[k], r.get(f"{k}_truncated"))) for r in rows]
        said[k] = [plain.logprobs(p, a, adapter) for p, a in ids]
        was[k] = [plain.logprobs(p, a, reference).sum() for p, a in ids]
    c, r = (torch.stack([x.sum() - y for x, y in zip(said[k], was[k])]) for k in said)
    n, m = (torch.tensor([len(x) for x in said[k]]) for k in said)
    loss = 0.0
    for term, weight in terms.items():
        if term == "sft":
            value = -torch.cat(said["chosen"]).mean()
        elif term == "aot":
            value = aot(said, was)
        elif term == "sppo":
            value = torch.stack(
                [
                    (a - (p - 0.5) / beta) ** 2 + (b + (p - 0.5) / beta) ** 2
                    for a, b, p in zip(c, r, map(wins, rows))
                ]
            ).mean()
        else:
            value = PAIRWISE[term](c, r, n, m).mean()
        loss = loss + weight * value
    return loss


def aot(said, was):
    now = torch.stack([c.sum() - r.sum() for c, r in zip(*said.values())]).sort()[0]
    return smoothed(now - torch.stack([c - r for c, r in zip(*was.values())]).sort()[0]).mean()


def wins(row):
    return (
        row["probability"]
        if "probability" in row
        else 1 / (1 + math.exp(-row["margin"])) if "margin" in row else 1.0
    )


def row_loss_reward(plain, rows, adapter, chat, **_):
    head = adapter["head"][0]

    def worth(r, k):
        return (
            plain.states(asked(r["prompt"], chat) + answered(r[k], r.get(f"{k}_truncated")), adapter)[-1]
            @ head
        )

    return torch.stack([logistic(worth(r, "chosen") - worth(r, "rejected")) for r in rows]).mean()


# both, on the same rows


def replay(loss, plain, start, steps, lr, **more):
    "The losses of plain SGD over `steps` (lists of rows), and the weights at the end."
    weights = {k: v.double().requires_grad_(True) for k, v in start.items()}
    losses = []
    for rows in steps:
        value = loss(plain, rows, weights, **more)
        grads = torch.autograd.grad(value, list(weights.values()))
        losses.append(value.item())
        weights = {k: (w - lr * g).detach().requires_grad_(True) for (k, w), g in zip(weights.items(), grads)}
    return losses, weights


def compare(result, losses, ended, weights):
    # a loss above 1 is made of sums of hundreds of nats, in float32
    assert result == pytest.approx(losses, abs=1e-5, rel=1e-5)
    assert ended.keys() == weights.keys()
    for k, w in weights.items():
        torch.testing.assert_close(
            ended[k].double(), w.detach(), rtol=0, atol=1e-5, msg=lambda m, k=k: f"{k}: {m}"
        )


def filled(policy, seed, size=0.1):
    g = torch.Generator().manual_seed(seed)
    policy.load_state({k: size * torch.randn(v.shape, generator=g) for k, v in policy.state().items()})
    return policy


def sequences_of(kind, r, chat):
    prompt = asked(r["prompt"], chat)
    if kind in ("sft", "reinforce"):
        return [prompt + answered(r["completion"], r.get("truncated"))]
    return [prompt + answered(r[k], r.get(f"{k}_truncated")) for k in ("chosen", "rejected")]


def rows_in_steps(kind, steps, rows, chat):
    """Which of `rows` are in each step, found by their tokens; in each epoch all of them, and each as often
    as it was given.
    """
    known = {tuple(map(tuple, sequences_of(kind, r, chat))): r for r in rows}
    taken = []
    for step in steps:
        taken.append([])
        for part in step:
            # of pairs all chosen ones come first
            n = len(part) if kind in ("sft", "reinforce") else len(part) // 2
            taken[-1] += [tuple(map(tuple, part[i::n])) for i in range(n)]
    flat = sum(taken, [])
    given = sorted(tuple(map(tuple, sequences_of(kind, r, chat))) for r in rows)
    for i in range(0, len(flat), len(rows)):
        assert sorted(flat[i : i + len(rows)]) == given
    return [[known[tokens] for tokens in step] for step in taken]


UPDATES = {
    "sft": row_loss_sft,
    "dpo": row_loss_dpo,
    "sppo": row_loss_dpo,
    "reinforce": row_loss_reinforce,
    "reward": row_loss_reward,
}
PAIR_TERMS = {"sigmoid": 1.0, "sft": 0.2}


def held_against_plain(
    kind,
    folder,
    rows,
    monkeypatch,
    chat=True,
    plant=list,
    terms=PAIR_TERMS,
    kl=0.0,
    lr=1.0,
    max_train_tokens=10**6,
    layers="all-linear",
    **settings,
):
    "Update with the library and by hand, and compare; the rows that were in each step."
    base = Base.load(folder, dtype=torch.float32, device="cpu", chat=chat, max_train_tokens=max_train_tokens)
    seen = Seen(monkeypatch, plant)
    settings = SGD | dict(learning_rate=lr, progress=seen.progress, per_device_train_batch_size=64) | settings
    model = RewardModel(base, r=4) if kind == "reward" else None
    policy = filled(model.policy if model else Policy(base, r=4, target_modules=layers), 1)
    reference = filled(Policy(base, "other", r=4), 2)
    if model:
        with torch.no_grad():
            model.head.copy_(torch.linspace(-0.5, 0.5, 64)[None])

    def state():
        return policy.state() | ({"head": model.head.detach().clone()} if model else {})

    start = state()
    more = dict(chat=chat, reference={k: v.double() for k, v in reference.state().items()})
    if kind == "sft":
        result = sft(policy, rows, **settings)
    elif kind == "reward":
        result = model.train(rows, **settings)
    elif kind == "reinforce":
        more["kl"] = kl
        result = reinforce(policy, rows, reference=reference, kl=kl, **settings)
    elif kind == "sppo":
        more["terms"] = {"sppo": 1.0}
        result = sppo(policy, rows, reference, beta=BETA, **settings)
    else:
        more["terms"] = terms
        result = dpo(
            policy,
            rows,
            reference,
            beta=BETA,
            loss_type=[*terms],
            loss_weights=[*terms.values()],
            label_smoothing=SMOOTH if SMOOTHED & terms.keys() else 0.0,
            **settings,
        )
    taken = rows_in_steps(kind, seen.steps, rows, chat)
    losses, weights = replay(UPDATES[kind], Plain(base.model), start, taken, lr, **more)
    compare(result.losses, losses, state(), weights)
    return taken


# the rows: prompts that begin alike, all lengths, single tokens, answers that were cut off, repeated ones

STORY = "The quick brown fox jumps over the lazy dog, and 1 + 2 is 3; then it went home to sleep for 7 days."
TURNS = [
    dict(role="user", content="ab"),
    dict(role="assistant", content="no"),
    dict(role="user", content="abc"),
]


def rows_for(chat):
    said = [
        ("ab", "x", True),
        ("abc", "no", False),
        ("abc", "nothing", False),
        ("abc", "nothing", True),
        ("abcd", STORY[:70], False),
        (STORY, "yes", False),
        ("a", "y", True),
        ("q?", "z", False),
        (STORY[:50], STORY[50:90], True),
        ("abc", "no", False),
    ]
    if chat:
        said += [
            (TURNS[:1], "no", False),
            (TURNS, "perhaps", False),
            ([dict(role="system", content="Be brief."), *TURNS], "w", True),
        ]
    rejected = [
        "nope",
        "n",
        "not so",
        "other",
        "ab",
        STORY[3:60],
        "u",
        "zz",
        STORY[50:95],
        "n",
        "not",
        "v",
        "perhaps not",
    ]
    more = [{}, dict(margin=0.5), dict(probability=0.3), dict(probability=1.0), dict(margin=-1.0)]
    return [
        dict(
            prompt=p,
            completion=c,
            truncated=cut,
            advantage=(-1) ** i * (1 + i % 4) / 10,
            weight=(1 + i % 3) / 2,
            chosen=c,
            rejected=r,
            rejected_truncated=i % 3 == 1,
            **more[i % 5],
        )
        for i, ((p, c, cut), r) in enumerate(zip(said, rejected))
    ]


def given(kind, chat):
    rows = rows_for(chat)
    rows[9] |= {k: v for k, v in rows[1].items()}  # the same once more
    return rows


KINDS = "sft", "dpo", "sppo", "reinforce", "reward"
RATES = dict.fromkeys(KINDS, 1.0) | {"sppo": 0.03}  # whose gradient is some thirty times as large


@pytest.fixture(scope="session")
def mistral_folder(tiny_folder, tmp_path_factory):
    "As the tiny Llama, but with a window (wider than all texts), for which beginnings cannot be shared."
    folder = tmp_path_factory.mktemp("mistral")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_folder)
    torch.manual_seed(0)
    size = dict(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        max_position_embeddings=256,
        sliding_window=255,
    )
    heads = dict(num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS)
    MistralForCausalLM(
        MistralConfig(**size, **heads, bos_token_id=START, eos_token_id=END, pad_token_id=END)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_all_rows_at_once(kind, chat, tiny_folder, monkeypatch):
    [step] = held_against_plain(kind, tiny_folder, given(kind, chat), monkeypatch, chat, lr=RATES[kind])
    assert len(step) == (13 if chat else 10)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_without_shared_beginnings(kind, mistral_folder, monkeypatch):
    held_against_plain(kind, mistral_folder, given(kind, True), monkeypatch, lr=RATES[kind])


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_the_gradient_through_layers_without_an_adapter(kind, tiny_folder, monkeypatch):
    held_against_plain(kind, tiny_folder, given(kind, True), monkeypatch, layers=["v_proj", "down_proj"])


@pytest.mark.parametrize("kl", [0.01, 1.0])
def test_the_gradient_with_a_divergence(kl, tiny_folder, monkeypatch):
    rows = given("reinforce", True)
    rows[2] |= dict(advantage=0.0)  # held to the reference all the same
    held_against_plain("reinforce", tiny_folder, rows, monkeypatch, kl=kl, lr=0.1)


@pytest.mark.parametrize(
    "settings",
    [
        dict(per_device_train_batch_size=4),
        dict(per_device_train_batch_size=5, gradient_accumulation_steps=2),
        dict(per_device_train_batch_size=8, max_train_tokens=200),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_several_epochs_of_steps_that_do_not_divide(kind, settings, tiny_folder, monkeypatch):
    steps = held_against_plain(
        kind,
        tiny_folder,
        given(kind, True),
        monkeypatch,
        lr=0.03 * RATES[kind],
        num_train_epochs=2,
        **settings,
    )
    assert [len(s) for s in steps] == 2 * {4: [4, 4, 4, 1], 5: [10, 3], 8: [8, 5]}[
        settings["per_device_train_batch_size"]
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_single_rows(kind, tiny_folder, monkeypatch):
    settings = dict(per_device_train_batch_size=1, gradient_accumulation_steps=20)
    [step] = held_against_plain(kind, tiny_folder, given(kind, True), monkeypatch, lr=RATES[kind], **settings)
    assert len(step) == 13


@pytest.mark.parametrize("term", [*PAIRWISE, "aot", "sft"])
def test_every_loss_on_pairs(term, tiny_folder, monkeypatch):
    if term == "discopop":
        monkeypatch.setitem(SGD, "discopop_tau", TAU)
    held_against_plain("dpo", tiny_folder, given("dpo", True), monkeypatch, terms={term: 1.0}, lr=0.1)


def test_losses_that_are_mixed_keep_their_weights_in_any_parts(tiny_folder, monkeypatch):
    terms = {"ipo": 0.7, "sft": 0.4, "apo_zero": 0.1}
    held_against_plain(
        "dpo",
        tiny_folder,
        given("dpo", True),
        monkeypatch,
        terms=terms,
        lr=0.1,
        per_device_train_batch_size=5,
        gradient_accumulation_steps=3,
    )


# which tokens carry it


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_only_answers_carry_the_loss(kind, chat, tiny_folder):
    base = Base.load(tiny_folder, dtype=torch.float32, device="cpu", chat=chat)
    for row in rows_for(chat)[:4]:
        policy = filled(RewardModel(base).policy if kind == "reward" else Policy(base), 1)
        carried = []

        def keep(grad, carried=carried):
            carried.append(grad[0].abs().sum(-1).nonzero()[:, 0].tolist())

        hook = base.model.model.norm.register_forward_hook(
            lambda module, args, out: out.register_hook(keep) and None if out.requires_grad else None
        )
        if kind == "reward":
            policy.delete()
            model = RewardModel(base)
            policy = model.policy
            with torch.no_grad():
                model.head.copy_(torch.ones(1, 64))
            model.train([row])
        elif kind in ("dpo", "sppo"):
            dict(dpo=dpo, sppo=sppo)[kind](policy, [row], Policy(base, "base"))
        else:
            dict(sft=sft, reinforce=reinforce)[kind](policy, [row])
        hook.remove()
        policy.delete()
        prompt = asked(row["prompt"], chat)
        sequences = sequences_of(kind, row, chat)
        after = (
            {tuple(s) for s in sequences}
            if kind == "reward"
            else {tuple(s[:k]) for s in sequences for k in range(len(prompt), len(s))}
        )
        # one place for each beginning that is gone on from
        assert len(carried) == 1 and len(carried[0]) == len(after)
        if len(sequences) == 1:
            assert carried[0] == [*range(len(prompt) - 1, len(sequences[0]) - 1)]


# planted faults are found


def with_answers(row, change):
    "`change(prompt, answer)` gives another prompt and answer, for each answer of a row."
    changed = {k: change(row["prompt_ids"], row[k]) for k in ANSWERS if k in row}
    return row | {k: answer for k, (_, answer) in changed.items()} | {"prompt_ids": [*changed.values()][0][0]}


def moved_into_answer(part):
    "The prompt's last token is trained on too."
    return [with_answers(r, lambda prompt, answer: (prompt[:-1], prompt[-1:] + answer)) for r in part]


def without_end(part):
    "The last token, which mostly is the end token, is not."
    return [
        with_answers(r, lambda prompt, answer: (prompt, answer[:-1] if len(answer) > 1 else answer))
        for r in part
    ]


def one_row_twice(part):
    return part + part[:1]


def one_place_late(part):
    "Answers begin one place too far behind."
    late = []
    for r in part:
        first = next(r[k] for k in ANSWERS if k in r)[:1]
        late.append(
            with_answers(r, lambda prompt, answer, first=first: (prompt + first, answer[1:] or [END]))
        )
    return late


def sides_swapped(part):
    return [r | dict(chosen_ids=r["rejected_ids"], rejected_ids=r["chosen_ids"]) for r in part]


def another_prompt(part):
    "The prompt's first token is another one."
    return [r | dict(prompt_ids=[5, *r["prompt_ids"][1:]]) for r in part]


FAULTS = [
    *[
        (k, f)
        for f in (moved_into_answer, without_end, one_row_twice, one_place_late)
        for k in ("sft", "dpo", "sppo", "reinforce")
    ],
    ("reward", without_end),
    ("reward", one_row_twice),
    *[(k, sides_swapped) for k in ("dpo", "sppo", "reward")],
    *[(k, another_prompt) for k in KINDS],
]


@pytest.mark.parametrize("kind, fault", FAULTS, ids=lambda x: getattr(x, "__name__", x))
def test_a_planted_fault_is_found(kind, fault, tiny_folder, monkeypatch):
    with pytest.raises(AssertionError):
        held_against_plain(
            kind, tiny_folder, rows_for(True)[:4], monkeypatch, plant=fault, lr=0.1 * RATES[kind]
        )


@pytest.mark.parametrize("kind", KINDS)
def test_where_none_is_planted_none_is_found(kind, tiny_folder, monkeypatch):
    held_against_plain(kind, tiny_folder, rows_for(True)[:4], monkeypatch, plant=list, lr=0.1 * RATES[kind])


@pytest.mark.parametrize("kind", ["sft", "dpo", "reinforce", "reward"])
def test_a_row_that_is_left_out_is_found(kind, tiny_folder, monkeypatch):
    "Not by its numbers alone: what comes to the trainer is counted."
    rows = given(kind, True)
    came = [sequences_of(kind, r, True) for r in rows]

    def step(of):
        return [[x[i] for i in range(len(of[0])) for x in of]]

    assert rows_in_steps(kind, [step(came)], rows, True) == [rows]
    for wrong in came[:-1], came + came[:1], came[1:] + came[2:3]:
        with pytest.raises(AssertionError):
            rows_in_steps(kind, [step(wrong)], rows, True)


# methods that sample their own data


class Letters:
    "Prompts `q0`, `q1`, … ; the more different letters an answer has, the better."

    name = "letters"

    def problems(self, split, n, seed=0):
        return [dict(prompt=f"q{1000 * (split == 'held-out') + i}") for i in range(n)]

    def reward(self, prompts, completions, **columns):
        return [len(set(c)) / 8 for c in completions]

    verifier = reward


@pytest.fixture
def run(tiny, tmp_path):
    "An orchestrator whose policy is already something else than its base."
    # random weights seldom end an answer: a third of the tokens ends it here
    tiny.model.generation_config.eos_token_id = [*range(2, 35)]
    o = RLHFOrchestrator(
        tmp_path / "run",
        tiny,
        Letters(),
        eval_size=1,
        validation_size=0,
        r=4,
        progress=False,
        max_new_tokens=12,
    )
    o.run_sft(
        [dict(prompt=f"q{i}", completion="abcdefg"[i:]) for i in range(6)],
        learning_rate=0.03,
        num_train_epochs=5,
    )
    return o


def test_spin_against_plain(run):
    start = run.policy.state()
    rows = [dict(prompt=f"q{i}", completion=STORY[i : 2 * i + 1]) for i in range(3, 10)]
    run.run_policy_optimization("spin", rows, **SGD)
    own = [
        r
        for r in map(json.loads, (run.dir / "pairs.jsonl").read_text().splitlines())
        if r["source"] == "spin"
    ]
    asked_for = [(r["prompt"], r["chosen"]) for r in own]
    assert asked_for == [x for r in rows if (x := (r["prompt"], r["completion"])) in asked_for]
    assert all(r["rejected"].strip() for r in own)  # what is no answer is no rival, and is counted
    assert len(own) == run.stages[-1].rows == len(rows) - sum(run.stages[-1].dropped.values()) > 2
    weights = {k: v.double() for k, v in start.items()}
    plain = Plain(run.policy.base.model)
    grads = {k: v.requires_grad_(True) for k, v in weights.items()}
    gaps = []
    for r in own:
        prompt = asked(r["prompt"], True)
        win, lose = (
            plain.logprobs(prompt, ids, grads).sum() for ids in (answered(r["chosen"]), r["rejected_ids"])
        )
        gaps.append((win - win.detach()) - (lose - lose.detach()))
    loss = logistic(0.1 * torch.stack(gaps)).mean()
    ended = {
        k: (w - g).detach()
        for (k, w), g in zip(grads.items(), torch.autograd.grad(loss, list(grads.values())))
    }
    compare(run.stages[-1].metrics["losses"], [math.log(2)], run.policy.state(), ended)


@pytest.mark.parametrize("kl", [0.0, 0.5])
@pytest.mark.parametrize("size", [64, 5])
def test_grpo_against_plain(run, kl, size):
    start = run.policy.state()
    group = 4
    k = 3
    lr = 0.3
    stage = run.run_policy_optimization(
        "grpo",
        n_prompts=8,
        group=group,
        prompts_per_step=k,
        kl=kl,
        **SGD | dict(learning_rate=lr),
        per_device_train_batch_size=size,
    )
    samples = [r for r in map(json.loads, (run.dir / "samples.jsonl").read_text().splitlines())]
    assert len(samples) == 8 * group and len({len(s["completion_ids"]) for s in samples}) > 2
    for i in range(0, len(samples), group):
        worth = torch.tensor([s["reward"] for s in samples[i : i + group]], dtype=torch.float64)
        for s, a in zip(samples[i : i + group], (worth - worth.mean()) / (worth.std(correction=0) + 1e-6)):
            s["advantage"] = a.item()
    plain = Plain(run.policy.base.model)
    reference = {k: v.double() for k, v in start.items()}

    def loss(plain, rows, weights):
        total = 0.0
        for r in rows:
            prompt, ids = asked(r["prompt"], True), r["completion_ids"]
            said = plain.logprobs(prompt, ids, weights)
            was = plain.logprobs(prompt, ids, reference)
            ratio = (said - said.detach()).exp()  # of new and old, whose clipping cannot act
            total = total - (r["advantage"] * ratio - kl * ((was - said).exp() - (was - said) - 1)).mean()
        return total / len(rows)

    steps = [samples[i : i + k * group] for i in range(0, len(samples), k * group)]
    _, weights = replay(loss, plain, start, steps, lr)
    assert stage.metrics["steps"] == len(steps) == 3
    for k, w in weights.items():
        torch.testing.assert_close(run.policy.state()[k].double(), w.detach(), rtol=0, atol=1e-5)
