"Policies behind servers: the right adapter answers, through evictions, restarts and faults; and in runs."

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from serving import Serving

from selfplay_nb import as_task
from selfplay_nb.core.checkpoint import content
from selfplay_nb.loop.rounds import Compete, Groups
from selfplay_nb.loop.trainer import SelfPlayConfig, SelfPlayTrainer
from selfplay_nb.methods.league import LeagueTraining
from selfplay_nb.models.base import tiny_model_folder
from selfplay_nb.models.policy import Base, Policy
from selfplay_nb.scale import server as module
from selfplay_nb.scale.endpoint import EndpointError
from selfplay_nb.scale.server import Served, Server

WORDS = "river bridge coffee window garden piano train bread".split()
PROMPTS = [f"Describe a {word}." for word in WORDS]
GREEDY = dict(max_new_tokens=8, temperature=0)


@pytest.fixture(scope="module")
def theirs(tiny_folder):
    "The base of the servers: the same model, loaded a second time."
    return Base.load(tiny_folder, dtype=torch.float32, device="cpu")


@pytest.fixture
def serve(theirs):
    servers = []

    def start(**settings):
        servers.append(Serving(settings.pop("base", theirs), **settings))
        return servers[-1]

    yield start
    for s in servers:
        s.stop()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "_pause", lambda attempt, after: 0.02 * (attempt + 1))


def policies(base, n: int) -> list[Policy]:
    "That answer each in another way."
    made = []
    for i in range(n):
        policy = Policy(base, f"p{i}", r=4, seed=i)
        g = torch.Generator().manual_seed(i)
        policy.load_state({k: v + 0.3 * torch.randn(v.shape, generator=g) for k, v in policy.state().items()})
        made.append(policy)
    return made


def tokens(samples) -> list[list[list[int]]]:
    return [[s.token_ids for s in row] for row in samples]


def test_a_served_policy_answers_as_the_policy(serve, tiny, tmp_path):
    there = serve()
    server = Server(there.url, tmp_path / "served", tiny)
    [policy] = policies(tiny, 1)
    player = server.publish(policy)
    ours, said = policy.sample(PROMPTS, **GREEDY), player.sample(PROMPTS, **GREEDY)
    assert tokens(said) == tokens(ours)
    assert said.texts == ours.texts
    assert [s.truncated for row in said for s in row] == [s.truncated for row in ours for s in row]
    for row, own in zip(said, ours):
        assert row[0].logprobs == pytest.approx(own[0].logprobs, abs=1e-4)
    assert player.generate(PROMPTS[0], **GREEDY) == policy.generate(PROMPTS[0], **GREEDY)
    assert player.name == policy.name
    base = server.publish(Policy(tiny, "base"))
    assert tokens(base.sample(PROMPTS, **GREEDY)) == tokens(Policy(tiny, "base").sample(PROMPTS, **GREEDY))


def test_an_answer_has_a_seed_of_its_own(serve, tiny, tmp_path):
    there = serve()
    server = Server(there.url, tmp_path / "served", tiny)
    player = server.publish(policies(tiny, 1)[0])
    told = []
    sampled = dict(n_samples=3, max_new_tokens=6, progress=lambda n, tokens: told.append((n, tokens)))
    alone = tokens(player.sample([PROMPTS[1]], seed=5, **sampled))
    both = tokens(player.sample(PROMPTS[:2], seed=5, **sampled))
    assert both[1] == alone[0]  # whoever else is asked
    assert tokens(player.sample(PROMPTS[:2], seed=[4, 5], **sampled))[1] == alone[0]
    twice = tokens(player.sample([PROMPTS[1]] * 2, seed=5, **sampled))
    assert twice[0] == alone[0]
    assert twice[1] != alone[0]  # a prompt that is given twice goes on counting
    assert len({tuple(ids) for ids in alone[0]}) == 3
    assert len(told) == sum(map(len, [alone[0], *both, *both, *twice]))
    asked = there.asked[-1]
    assert asked["top_k"] == -1 and asked["repetition_penalty"] == 1.0  # not the server's own defaults
    assert asked["stop_token_ids"] == sorted(tiny.eos_ids)


def test_twelve_adapters_on_a_server_that_holds_four(serve, tiny, theirs, tmp_path):
    there = serve(holds=4)
    server = Server(there.url, tmp_path / "served", tiny, concurrency=8, retries=40)
    members = policies(tiny, 12)
    players = [server.publish(p) for p in members]
    some = PROMPTS[:4]
    expected = [tokens(p.sample(some, **GREEDY)) for p in members]
    assert len(set(map(repr, expected))) == 12
    restarted = threading.Event()

    def again(n, path, asked):  # a server that starts anew knows no adapter
        if n == 80:
            threading.Thread(target=restart).start()

    def restart():
        there.stop()
        serve(holds=4, port=there.server_port)
        restarted.set()

    there.plan = again
    orders = [[i, (i + 5) % 12] for i in range(12)]
    with ThreadPoolExecutor(6) as pool:
        found = pool.map(lambda order: [tokens(players[i].sample(some, **GREEDY)) for i in order], orders)
        for order, said in zip(orders, found):
            assert said == [expected[i] for i in order]
    assert restarted.is_set()
    assert there.evicted
    assert there.disturbed == 0
    assert there.most > 1


def test_a_league_plays_through_a_server(serve, tiny, tmp_path):
    there = serve(holds=2)
    server = Server(there.url, tmp_path / "served", tiny)
    members = policies(tiny, 4)
    league = LeagueTraining(4, tiny, tmp_path / "league", resident=2)
    for i, policy in enumerate(members):
        league.add(policy, f"m{i}")
    served = module._served_league(league, server)
    for i, policy in enumerate(members):
        assert tokens(served[f"m{i}"].sample(PROMPTS[:2], **GREEDY)) == tokens(
            policy.sample(PROMPTS[:2], **GREEDY)
        )
    served.record([dict(a="main", b="m1", score=1.0)])
    assert league.rows == served.rows and len(league.rows) == 1
    assert league.elo["main"] == served.elo["main"]
    assert league["m0"].player is not served["m0"].player


def test_a_new_version_has_a_new_name(serve, tiny, tmp_path):
    there = serve()
    server = Server(there.url, tmp_path / "served", tiny)
    [policy] = policies(tiny, 1)
    old = server.publish(policy)
    old.sample(PROMPTS, **GREEDY)
    assert server.publish(policy).adapter == old.adapter  # nothing has changed
    policy.load_state({k: v + 0.1 for k, v in policy.state().items()})
    new = server.publish(policy)
    assert new.adapter != old.adapter
    assert tokens(new.sample(PROMPTS, **GREEDY)) == tokens(policy.sample(PROMPTS, **GREEDY))
    with pytest.raises(ValueError, match="trained since it was published"):
        old.sample(PROMPTS, **GREEDY)
    other = Server(there.url, tmp_path / "another", tiny)
    assert other.publish(policy).adapter != new.adapter  # two runs on a server do not unload one another's


def test_what_is_not_needed_is_unloaded_between_rounds(serve, tiny, tmp_path):
    there = serve(holds=8)
    server = Server(there.url, tmp_path / "served", tiny, keep=2)
    (tmp_path / "served" / "notes").mkdir()
    members = policies(tiny, 4)
    there.unloads.clear()
    players = [server.publish(p) for p in members]
    for player in players:
        player.sample(PROMPTS[:1], **GREEDY)
    assert not there.unloads
    server.tidy()
    assert there.unloads == [p.adapter for p in players[:2]] or set(there.unloads) == {
        p.adapter for p in players[:2]
    }
    assert {f.name for f in (tmp_path / "served").iterdir()} == {"notes", *(p.adapter for p in players[2:])}
    first = server.publish(members[0])  # wanted again
    assert tokens(first.sample(PROMPTS, **GREEDY)) == tokens(members[0].sample(PROMPTS, **GREEDY))
    server.close()
    assert not there.adapters
    assert [f.name for f in (tmp_path / "served").iterdir()] == ["notes"]


def test_adapters_of_a_killed_run_are_unloaded(serve, tiny, tmp_path):
    there = serve()
    old = Server(there.url, tmp_path / "served", tiny).publish(policies(tiny, 1)[0])
    old.sample(PROMPTS[:1], **GREEDY)
    Server(there.url, tmp_path / "served", tiny)
    assert not there.adapters
    assert not list((tmp_path / "served").iterdir())


def test_two_servers(serve, tiny, tmp_path):
    one, two = serve(), serve()
    server = Server([one.url, two.url], tmp_path / "served", tiny)
    [policy] = policies(tiny, 1)
    player = server.publish(policy)
    assert tokens(player.sample(PROMPTS, **GREEDY)) == tokens(policy.sample(PROMPTS, **GREEDY))
    assert player.adapter in one.adapters and player.adapter in two.adapters
    assert len(one.asked) == len(two.asked)
    two.plan = lambda n, path, asked: (None, None)  # it is gone
    assert tokens(player.sample(PROMPTS, **GREEDY)) == tokens(policy.sample(PROMPTS, **GREEDY))


FAULTS = {
    "out of order": (500, "oops"),
    "hangs up": (None, None),
    "no JSON": (200, "<html>"),
    "no choice": (200, {"choices": []}),
    "aborted": (200, {"choices": [{"finish_reason": "abort", "token_ids": [5]}]}),
    "no tokens of this model": (200, {"choices": [{"finish_reason": "stop", "token_ids": [10**6]}]}),
    "nothing": (200, {"choices": [{"finish_reason": "length", "token_ids": []}]}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_may_pass_is_asked_again(serve, tiny, tmp_path, fault):
    there = serve()
    server = Server(there.url, tmp_path / "served", tiny, retries=3)
    [policy] = policies(tiny, 1)
    player = server.publish(policy)
    there.plan = lambda n, path, asked: FAULTS[fault] if n % 3 == 0 and "completions" in path else None
    assert tokens(player.sample(PROMPTS, **GREEDY)) == tokens(policy.sample(PROMPTS, **GREEDY))
    there.plan = lambda n, path, asked: FAULTS[fault]
    with pytest.raises(EndpointError, match="failed 4 times"):
        player.sample(PROMPTS[:1], **GREEDY)


def test_a_broken_folder_is_named(serve, tiny, tmp_path):
    there = serve()
    server = Server(there.url, tmp_path / "served", tiny)
    player = server.publish(policies(tiny, 1)[0])
    (tmp_path / "served" / player.adapter / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(EndpointError, match=f"does not load the adapter in .*{player.adapter}.*No adapter"):
        player.sample(PROMPTS, **GREEDY)


def test_servers_that_cannot_be_used_are_errors_at_once(serve, tiny, tmp_path, tmp_path_factory):
    with pytest.raises(EndpointError, match="127.0.0.1:9/v1 does not answer: ConnectError"):
        Server("http://127.0.0.1:9/v1", tmp_path, tiny)
    with pytest.raises(EndpointError, match="--enable-lora"):
        Server(serve(lora=False).url, tmp_path, tiny)
    with pytest.raises(EndpointError, match="rank 8 is greater than max_lora_rank 4.*--max-lora-rank"):
        Server(serve(max_rank=4).url, tmp_path, tiny, r=8)
    with pytest.raises(EndpointError, match=r"serves \['the-base'\]: give one of them"):
        Server(serve().url, tmp_path, tiny, model="another")
    folder = tiny_model_folder(tmp_path_factory.mktemp("other"), seed=1)
    other = Base.load(folder, dtype=torch.float32)
    with torch.no_grad():
        other.model.lm_head.weight *= 60  # a model that knows what it wants
    with pytest.raises(EndpointError, match="another model than .* nats a token apart"):
        Server(serve(base=other).url, tmp_path, tiny)
    for bad in dict(urls=[]), dict(r=0), dict(keep=0), dict(concurrency=0), dict(urls="localhost"):
        with pytest.raises(ValueError):
            Server(**dict(urls="http://127.0.0.1:9/v1", folder=tmp_path, base=tiny) | bad)
    assert tiny.adapters == []  # nothing of what was tried is left
    assert not list(tmp_path.iterdir())


def test_what_a_server_cannot_do_is_said_once(serve, tiny, theirs, tmp_path):
    with pytest.warns(UserWarning, match="does not repeat an answer by its seed"):
        Server(serve(seeds=False).url, tmp_path / "a", tiny)
    with pytest.warns(UserWarning, match="gives no token ids") as said:
        server = Server([serve(token_ids=False).url, serve(token_ids=False).url], tmp_path / "b", tiny)
    assert len(said) == 1
    [policy] = policies(tiny, 1)
    texts = server.publish(policy).sample(PROMPTS, **GREEDY).texts
    assert texts == policy.sample(PROMPTS, **GREEDY).texts


def test_sglang_has_other_paths_and_names(serve, tiny, tmp_path):
    there = serve(sglang=True, holds=1)
    server = Server(there.url, tmp_path / "served", tiny, sglang=True)
    for policy in policies(tiny, 2) * 2:
        said = server.publish(policy).sample(PROMPTS[:2], **GREEDY)
        assert tokens(said) == tokens(policy.sample(PROMPTS[:2], **GREEDY))
    assert len(there.loads) >= 4


def test_bad_arguments(serve, tiny, tmp_path):
    server = Server(serve().url, tmp_path / "served", tiny)
    player = server.publish(policies(tiny, 1)[0])
    with pytest.raises(ValueError, match="max_new_tokens"):
        player.sample(PROMPTS, max_new_tokens=0)
    with pytest.raises(ValueError, match="guide needs the logits"):
        player.sample(PROMPTS, guide=object())
    with pytest.raises(ValueError, match="3 seeds for 8 prompts"):
        player.sample(PROMPTS, seed=[1, 2, 3])
    with pytest.raises(ValueError, match="the context of"):
        player.sample("x" * 300)
    stranger = Base.load(tiny.name, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="not on the servers' base"):
        server.publish(Policy(stranger, "p"))


# runs

SMALL = dict(n_rounds=2, prompts_per_round=4, n_samples=4, max_new_tokens=12)
SMALL |= dict(eval_every=2, eval_size=2, gate=False)


def variety(prompt, answer):
    return sum(map(ord, answer)) % 7


def trainer(folder, tiny_folder, url, collector=None, **settings):
    base = Base.load(tiny_folder, dtype=torch.float32, device="cpu")
    server = Server(url, folder / "served", base, r=4)
    config = SelfPlayConfig(str(folder / "run"), r=4, **SMALL | settings)
    task = as_task(PROMPTS, reward=variety)
    collectors = [Served(collector or Compete(4), server)]
    return SelfPlayTrainer(config, base, task, callbacks=[], collectors=collectors)


@pytest.mark.filterwarnings("ignore")
def test_a_run_on_a_server_learns_and_goes_on(serve, tiny_folder, tmp_path):
    there = serve()
    straight = trainer(tmp_path / "a", tiny_folder, there.url)
    history = straight.train()
    assert any(m.get("loss") is not None for m in history)
    assert any(v.abs().sum() > 0 for k, v in straight.student.state().items() if "lora_B" in k)
    assert len(set(there.loads)) == 2  # the student at first, which is also the reference; and later
    for pair in map(json.loads, (tmp_path / "a/run/pairs.jsonl").read_text().splitlines()):
        if pair["round"] == 1:  # both sides were what the reference is still
            [own] = straight.reference.logprobs([pair["prompt"]], [pair["chosen_ids"]]).tolist()
            assert pair["chosen_logps"] == pytest.approx(own, abs=1e-3)
    trainer(tmp_path / "b", tiny_folder, there.url).train(n_iterations=1)
    there.stop()
    later = serve()  # another server, at another address
    again = trainer(tmp_path / "b", tiny_folder, later.url)
    again.train()
    assert again.round == 2
    for k, v in straight.student.state().items():
        assert torch.allclose(v, again.student.state()[k], atol=1e-5), k


@pytest.mark.filterwarnings("ignore")
def test_a_league_run_on_a_server_that_holds_two(serve, tiny_folder, tmp_path):
    there = serve(holds=2)
    settings = dict(opponents="uniform", update_reference_every=1, prompts_per_round=6)
    run = trainer(tmp_path, tiny_folder, there.url, **settings)
    history = run.train()
    met = {name for m in history for name in m.get("opponents", {})}
    assert len(met) > 1, history
    asked = {a["adapter"] for a in there.asked}
    assert len(asked) >= 3
    assert there.disturbed == 0


@pytest.mark.filterwarnings("ignore")
def test_answers_in_groups(serve, tiny_folder, tmp_path):
    there = serve()
    run = trainer(tmp_path, tiny_folder, there.url, Groups(4), method="grpo", n_rounds=1)
    [_, metrics] = run.train()
    assert metrics["answers"] == 16


def test_where_a_run_is_sampled_is_no_part_of_what_it_is(serve, tiny, tmp_path):
    one, two = (Server(serve().url, tmp_path / name, tiny) for name in "ab")
    assert content(Served(Compete(4), one)) == content(Served(Compete(4), two))
    assert content(Served(Compete(4), one)) != content(Served(Compete(5), one))
