"A player behind a server: whatever the server does, answers are right, or the error says what happened."

import copy
import gzip
import http.server
import json
import math
import multiprocessing
import pickle
import threading
import time
import warnings
from email.utils import formatdate

import pytest

from selfplay_nb.core.players import answers_of
from selfplay_nb.scale.endpoint import Endpoint, EndpointError, OutOfBudget, _seconds, read_reply
from selfplay_nb.scoring.judge import ModelJudge

KEY = "sk-very-secret"


class Server(http.server.ThreadingHTTPServer):
    "What it does with the n-th request (from 0) is `plan(n, asked)`: status, body, headers, seconds to wait."

    daemon_threads = True

    def __init__(self, plan):
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan, self.asked, self.headers_seen = plan, [], []
        self.now = self.most = 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        server, asked = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            n = len(server.asked)
            server.asked.append(asked)
            server.headers_seen.append(dict(self.headers))
            server.now += 1
            server.most = max(server.most, server.now)
        does = server.plan(n, asked)
        time.sleep(does.get("wait", 0))
        with server.lock:
            server.now -= 1  # before the answer, on which the next request may follow at once
        try:
            self.answer(does)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def answer(self, does):
        if does.get("hang_up"):
            self.close_connection = True
            self.connection.close()
            return
        body = does.get("body", b"")
        self.send_response(does.get("status", 200))
        for name, value in does.get("headers", {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(does.get("length", len(body))))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def good(asked, **more):
    text = asked["messages"][-1]["content"].upper() + f" {asked.get('seed', 0) % 1000}"
    choice = {"message": {"content": text}, "finish_reason": "stop"} | more
    usage = {"prompt_tokens": 5, "completion_tokens": 3}
    return dict(body=json.dumps({"choices": [choice], "usage": usage}).encode())


@pytest.fixture
def serve():
    servers = []

    def start(plan):
        servers.append(Server(plan))
        return servers[-1]

    yield start
    for s in servers:
        s.shutdown()
        s.server_close()


def once(does):
    "A fault at the first request, and good answers from then on."
    return lambda n, asked: does if n == 0 else good(asked)


FAULTS = {
    "busy": dict(status=429, body=b"slow down"),
    "busy, and says for how long": dict(status=429, headers={"Retry-After": "1"}),
    "out of order": dict(status=500, body=b"oops"),
    "unavailable": dict(status=503),
    "hangs up": dict(hang_up=True),
    "silent": dict(wait=1.5),
    "cut off": dict(body=b'{"choices": [', length=1000),
    "no JSON": dict(body=b"<html>hello</html>"),
    "no choice": dict(body=b'{"choices": []}'),
    "two choices": dict(body=json.dumps({"choices": [{"message": {"content": "a"}}] * 2}).encode()),
    "no text": dict(body=json.dumps({"choices": [{"message": {"content": None}}]}).encode()),
    "deep JSON": dict(body=b"[" * 100_000),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_may_pass_is_asked_again(serve, fault):
    server = serve(once(FAULTS[fault]))
    player = Endpoint(server.url, "m", timeout=1.0)
    began = time.perf_counter()
    assert player.generate("hello").startswith("HELLO ")
    assert len(server.asked) == 2
    assert player.used["retries"] == 1
    if "how long" in fault:
        assert time.perf_counter() - began >= 1


@pytest.mark.parametrize(
    "text, low, high",
    [
        ("Fri, 31 Dec 9999 23:59:59 GMT", 300, 300),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0, 0),
        ("tomorrow", 0, 0),
        ("-5", 0, 0),
        ("nan", 0, 0),
        ("inf", 300, 300),
        ("", 0, 0),
    ],
)
def test_when_a_server_wants_to_be_asked_again(text, low, high):
    assert low <= _seconds(text) <= high


def test_when_a_server_wants_to_be_asked_again_by_a_date():
    assert 90 < _seconds(formatdate(time.time() + 100, usegmt=True)) <= 100


@pytest.mark.parametrize("fault", ["busy", "out of order", "hangs up", "no JSON", "two choices"])
def test_what_does_not_pass_is_an_error_that_says_what_it_was(serve, fault):
    server = serve(lambda n, asked: FAULTS[fault])
    with pytest.raises(EndpointError, match="failed 2 times") as e:
        Endpoint(server.url, "m", retries=1).generate("hello")
    assert server.url in str(e.value)
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    "does, words",
    [
        (dict(status=401, body=b"bad key " + KEY.encode()), "status 401: bad key"),
        (dict(status=404, body=b"no such model"), "no such model"),
        (dict(status=302, headers={"Location": "http://127.0.0.1:1/"}), "redirect is not followed"),
        (dict(body=b"x" * 200_000), "more than 100000 bytes"),
    ],
)
def test_what_will_not_pass_is_asked_once(serve, does, words):
    server = serve(lambda n, asked: does)
    with pytest.raises(EndpointError, match=words) as e:
        Endpoint(server.url, "m", KEY, largest=100_000).generate("hello")
    assert len(server.asked) == 1
    assert KEY not in str(e.value)


def test_nobody_listens():
    with pytest.raises(EndpointError, match="ConnectError"):
        Endpoint("http://127.0.0.1:9/v1", "m", retries=0).generate("hello")


def test_answers_stand_in_the_order_of_the_prompts(serve):
    server = serve(lambda n, asked: good(asked) | dict(wait=0.2 if n % 3 == 0 else 0))
    player = Endpoint(server.url, "m", concurrency=4)
    prompts = [f"word{i}" for i in range(12)]
    rows = player.sample(prompts, 2)
    assert [row[0].text.split()[0] for row in rows] == [p.upper() for p in prompts]
    assert all(row[0].text != row[1].text for row in rows)  # another seed for each answer
    assert server.most <= 4
    assert server.most >= 2
    assert rows.n_tokens == 72


def test_a_seed_belongs_to_the_prompt(serve):
    server = serve(lambda n, asked: good(asked))
    player = Endpoint(server.url, "m")
    alone = player.generate("b", seed=7)
    assert player.generate(["a", "b", "b"], seed=7)[1] == alone
    assert player.generate(["a", "b", "b"], seed=7)[2] != alone
    assert player.generate(["a", "b"], seed=[1, 7])[1] == alone
    assert player.generate("b", seed=8) != alone
    with pytest.raises(ValueError, match="3 seeds for 2 prompts"):
        player.generate(["a", "b"], seed=[1, 2, 3])


def test_messages_go_as_they_are(serve):
    server = serve(lambda n, asked: good(asked))
    chat = [dict(role="system", content="Be brief."), dict(role="user", content="hello")]
    Endpoint(server.url, "m").generate(chat, max_new_tokens=5, temperature=0.5)
    assert server.asked[0]["messages"] == chat
    assert server.asked[0]["max_tokens"] == 5
    assert server.asked[0]["temperature"] == 0.5


def test_answers_cut_off_are_known(serve):
    server = serve(lambda n, asked: good(asked, finish_reason="length"))
    rows, _, tokens = answers_of(Endpoint(server.url, "m"), ["hello"])
    assert rows[0][0].truncated
    assert tokens == 3


def test_what_a_server_does_not_know_is_said_once_and_left_out(serve):
    refuses = dict(status=400, body=b'{"error": "unknown field: seed"}')
    server = serve(lambda n, asked: refuses if "seed" in asked else good(asked))
    player = Endpoint(server.url, "m", concurrency=1)
    with pytest.warns(UserWarning, match="does not take 'seed'") as said:
        player.generate(["a", "b", "c"])
    assert len(said) == 1
    assert sum("seed" in asked for asked in server.asked) == 1


def test_a_server_that_wants_max_completion_tokens_gets_it(serve):
    told = b'{"error": "Unsupported parameter: max_tokens. Use max_completion_tokens instead."}'
    refuses = dict(status=400, body=told)
    server = serve(lambda n, asked: refuses if "max_tokens" in asked else good(asked))
    with pytest.warns(UserWarning, match="asked with 'max_completion_tokens'"):
        Endpoint(server.url, "m", concurrency=1).generate(["a", "b"], max_new_tokens=7)
    assert [asked.get("max_completion_tokens") for asked in server.asked] == [None, 7, 7]


def test_log_probabilities(serve):
    server = serve(lambda n, asked: good(asked, logprobs={"content": [{"logprob": -0.5}, {"logprob": -1}]}))
    [[reply]] = Endpoint(server.url, "m", logprobs=True).sample(["a"])
    assert reply.logprobs == [-0.5, -1.0]
    bare = Endpoint(serve(lambda n, asked: good(asked)).url, "m", logprobs=True)
    with pytest.warns(UserWarning, match="does not take 'logprobs'"):
        assert bare.sample(["a"])[0][0].logprobs is None


def test_a_cache_asks_for_nothing_twice(serve, tmp_path):
    server = serve(lambda n, asked: good(asked) if n < 3 else dict(status=400, body=b"no more"))
    told = dict(cache=tmp_path / "kept.jsonl", concurrency=1)
    prompts = ["a", "b", "c", "d"]
    with pytest.raises(EndpointError, match="no more"):
        Endpoint(server.url, "m", **told).generate(prompts)
    server.plan = lambda n, asked: good(asked)
    later = Endpoint(server.url, "m", **told)
    assert [t.split()[0] for t in later.generate(prompts)] == ["A", "B", "C", "D"]
    assert later.used["cached"] == 3
    assert later.used["requests"] == 1
    other = Endpoint(server.url, "another model", **told)
    other.generate("a")
    assert other.used["cached"] == 0


def test_a_budget_is_kept(serve):
    server = serve(lambda n, asked: good(asked))
    player = Endpoint(server.url, "m", concurrency=1, budget_tokens=24)
    with pytest.raises(OutOfBudget, match="used 24 tokens of 24"):
        player.generate(["a"], n_samples=10)
    assert len(server.asked) == 3
    rich = Endpoint(server.url, "m", concurrency=1, budget=2e-6, prices=(0.1, 0.2))
    with pytest.raises(OutOfBudget, match="spent 2.2e-06 of 2e-06"):
        rich.generate(["a"], n_samples=10)


def test_the_key_is_in_the_header_and_nowhere_else(serve, tmp_path, monkeypatch):
    server = serve(lambda n, asked: good(asked))
    player = Endpoint(server.url, "m", KEY, cache=tmp_path / "kept.jsonl")
    player.generate("a")
    assert server.headers_seen[0]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in repr(player) + str(vars(pickle.loads(pickle.dumps(player))))
    assert KEY.encode() not in pickle.dumps(player)
    assert all(KEY not in f.read_text() for f in tmp_path.rglob("*") if f.is_file())
    monkeypatch.setenv("A_KEY", "from-the-environment")
    Endpoint(server.url, "m", key_from="A_KEY").generate("b")
    assert server.headers_seen[1]["Authorization"] == "Bearer from-the-environment"


def test_an_error_stops_what_has_not_begun(serve):
    server = serve(lambda n, asked: dict(status=404, body=b"no such model") if n == 0 else good(asked))
    with pytest.raises(EndpointError, match="no such model"):
        Endpoint(server.url, "m", concurrency=1).generate([f"p{i}" for i in range(50)])
    assert len(server.asked) < 10


def test_bad_settings_are_errors():
    for bad, words in [
        (dict(url="localhost"), "url is 'localhost'"),
        (dict(concurrency=0), "concurrency"),
        (dict(timeout=0), "timeout"),
        (dict(retries=-1), "retries"),
        (dict(budget=1.0), "needs prices"),
        (dict(budget_tokens=-5), "budget_tokens"),
        (dict(prices=(1.0,)), "expected two"),
        (dict(prices=(1.0, -1.0)), "prices"),
        (dict(url="http://"), "url is 'http://'"),
        (dict(url="http://user:word@x/v1"), "has a user"),
        (dict(url="http://x/v1?a=b"), "a query"),
        (dict(api_key="schlüssel"), "cannot hold"),
        (dict(api_key="a\nb"), "cannot hold"),
    ]:
        with pytest.raises(ValueError, match=words):
            Endpoint(**dict(url="http://x/v1", model="m") | bad)


@pytest.mark.parametrize("usage", [None, [], {"completion_tokens": "many"}, {"completion_tokens": -3}])
def test_usage_that_is_none_counts_as_nothing(usage):
    assert read_reply({"choices": [{"message": {"content": "a"}}], "usage": usage}).tokens == 0


def test_progress_is_told(serve):
    server = serve(lambda n, asked: good(asked))
    told = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Endpoint(server.url, "m").sample(["a", "b"], 2, progress=lambda n, tokens: told.append((n, tokens)))
    assert told == [(1, 3)] * 4


# found by attacking it


def test_a_forked_process_gets_its_own_answers(serve):
    server = serve(lambda n, asked: good(asked))
    player = Endpoint(server.url, "m")
    player.generate([f"p{i}" for i in range(8)])
    results = multiprocessing.get_context("fork").Queue()

    def ask(name):
        texts = player.generate([f"{name}q{i}" for i in range(5)])
        results.put((name, [t.split()[0] for t in texts]))

    processes = [multiprocessing.get_context("fork").Process(target=ask, args=(f"c{k}",)) for k in range(4)]
    for p in processes:
        p.start()
    for _ in processes:
        name, texts = results.get(timeout=60)
        assert texts == [f"{name}q{i}".upper() for i in range(5)]


@pytest.mark.parametrize("lead", [0, 285, 295])
def test_a_key_is_hidden_wherever_it_stands_in_an_error(serve, lead):
    for written in KEY, json.dumps("x/" + KEY).replace("/", "\\/"):
        server = serve(lambda n, asked, said=written: dict(status=403, body=b"x" * lead + said.encode()))
        key = KEY if written == KEY else "x/" + KEY
        with pytest.raises(EndpointError) as e:
            Endpoint(server.url, "m", key).generate("hello")
        assert "secret" not in str(e.value)


def test_white_space_around_a_key_is_left_out(serve):
    server = serve(lambda n, asked: good(asked))
    Endpoint(server.url, "m", KEY + "\n").generate("hello")
    assert server.headers_seen[0]["Authorization"] == f"Bearer {KEY}"


def test_a_copy_does_not_send_somebody_elses_key(serve, monkeypatch):
    server = serve(lambda n, asked: good(asked))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-another-company")
    with pytest.raises(EndpointError, match="keys are not copied"):
        copy.deepcopy(Endpoint(server.url, "m", KEY)).generate("hello")
    Endpoint(server.url, "m", "").generate("hello")
    assert all("Authorization" not in h for h in server.headers_seen)


@pytest.mark.parametrize(
    "status, said",
    [(400, "your prompt 'how to seed a lawn' is rude"), (404, "no seed-oss"), (400, "unknown seed-oss")],
)
def test_a_word_in_an_error_does_not_switch_seeds_off(serve, status, said):
    server = serve(once(dict(status=status, body=said.encode())))
    player = Endpoint(server.url, "m", concurrency=1)
    with pytest.raises(EndpointError):
        player.generate("hello")
    player.generate("hello")
    assert all("seed" in asked for asked in server.asked)


def test_an_empty_answer_does_not_end_log_probabilities(serve):
    given = [[{"logprob": -1.0}], [], [{"logprob": float("nan")}], [None], [{"logprob": -2.0}]]
    server = serve(lambda n, asked: good(asked, logprobs={"content": given[n]}))
    player = Endpoint(server.url, "m", logprobs=True, concurrency=1)
    with pytest.warns(UserWarning, match="does not take 'logprobs'"):
        rows = player.sample([f"p{i}" for i in range(5)])
    assert [row[0].logprobs for row in rows] == [[-1.0], [], None, None, [-2.0]]


def test_an_answer_that_was_all_thought_is_empty_and_cut_off(serve):
    server = serve(lambda n, asked: good(asked, message={"content": None}, finish_reason="length"))
    [[reply]] = Endpoint(server.url, "m").sample(["hello"])
    assert (reply.text, reply.truncated, reply.tokens) == ("", True, 3)


def test_what_a_failed_attempt_used_is_counted(serve):
    server = serve(lambda n, asked: good(asked, message={"content": 5}))
    player = Endpoint(server.url, "m", budget_tokens=10, retries=6)
    with pytest.raises(OutOfBudget):
        player.generate("hello")
    assert len(server.asked) == 2


class Drip(http.server.BaseHTTPRequestHandler):
    "A byte a while, without end."

    def do_POST(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        try:
            while True:
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.1)
        except OSError:
            pass

    def log_message(self, *args):
        pass


def test_a_reply_without_end_is_given_up():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Drip)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    began = time.perf_counter()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    with pytest.raises(EndpointError, match="did not end"):
        Endpoint(url, "m", timeout=5, longest=1.0, retries=0).generate("hello")
    assert time.perf_counter() - began < 4
    server.shutdown()
    server.server_close()


def test_a_compressed_reply_is_not_unpacked(serve):
    bomb = gzip.compress(b" " * 10_000_000)
    server = serve(lambda n, asked: dict(body=bomb, headers={"Content-Encoding": "gzip"}))
    with pytest.raises(EndpointError, match="compressed"):
        Endpoint(server.url, "m", retries=0).generate("hello")


def test_without_a_cache_nothing_is_kept(serve):
    server = serve(lambda n, asked: good(asked))
    player = Endpoint(server.url, "m")
    player.generate("a")
    player.generate("a")
    assert len(server.asked) == 2


def test_a_text_and_its_message_are_one_prompt(serve):
    server = serve(lambda n, asked: good(asked))
    Endpoint(server.url, "m").generate(["a", [dict(role="user", content="a")]])
    assert len({asked["seed"] for asked in server.asked}) == 2


def test_bad_sampling_is_an_error_before_anything_is_asked(serve):
    server = serve(lambda n, asked: good(asked))
    for bad in dict(temperature=float("nan")), dict(top_p=1.5), dict(max_new_tokens=0):
        with pytest.raises(ValueError):
            Endpoint(server.url, "m").generate("hello", **bad)
    assert not server.asked
    Endpoint(server.url, "m").generate("half a character: \ud83d")
    assert len(server.asked) == 1


def test_a_damaged_cache_is_named(tmp_path):
    file = tmp_path / "kept.jsonl"
    file.write_text(json.dumps(dict(key="a", reply=dict(text="b", colour="red"))) + "\n")
    with pytest.raises(ValueError, match="kept.jsonl holds a row that is no reply"):
        Endpoint("http://x/v1", "m", cache=file)


def lists(asked, *listed):
    "A reply with the likeliest first tokens."
    top = [dict(token=token, logprob=lp) for token, lp in listed]
    return good(asked, logprobs=dict(content=[dict(token="A", logprob=-1.0, top_logprobs=top)]))


def test_labels_have_the_probabilities_of_all_their_spellings(serve):
    listed = ("A", -1.0), (" A", -2.0), ("B", -3.0), ("Both", -0.5), ("\n", -9.0)
    player = Endpoint(serve(lambda n, asked: lists(asked, *listed)).url, "m")
    [row] = player.label_logprobs("Which?", ["A", "B", "C"])
    assert row == pytest.approx([math.log(math.exp(-1) + math.exp(-2)), -3.0, -9.0])
    asked = player.label_logprobs(["Which?", "Who?"], ["X", "Y"])
    assert all(math.isnan(x) for row in asked for x in row) and len(asked) == 2


def test_labels_are_asked_for_as_they_have_to_be_and_kept(serve, tmp_path):
    server = serve(lambda n, asked: lists(asked, ("A", -0.1), ("B", -2.5)))
    player = Endpoint(server.url, "m", cache=tmp_path / "c.jsonl")
    first = player.label_logprobs(["Which?"], ["A", "B"])
    wanted = dict(max_tokens=1, temperature=1.0, logprobs=True, top_logprobs=20)
    assert wanted.items() <= server.asked[0].items()
    again = Endpoint(server.url, "m", cache=tmp_path / "c.jsonl")
    assert again.label_logprobs(["Which?"], ["A", "B"]) == first == [pytest.approx([-0.1, -2.5])]
    assert len(server.asked) == 1
    player.generate("Which?", max_new_tokens=1)
    assert len(server.asked) == 2, "an answer is something else than a verdict"


@pytest.mark.parametrize(
    "does",
    [
        good,
        lambda asked: good(asked, logprobs=None),
        lambda asked: good(asked, logprobs={"content": []}),
        lambda asked: good(asked, logprobs={"content": [{"top_logprobs": []}]}),
        lambda asked: lists(asked, ("A", None)),
        lambda asked: lists(asked, ("A", float("nan"))),
    ],
)
def test_a_server_without_log_probabilities_is_no_judge(serve, does):
    player = Endpoint(serve(lambda n, asked: does(asked)).url, "m", retries=0)
    with pytest.raises(EndpointError, match="m at http.* does not list the likeliest first tokens"):
        player.label_logprobs("Which?", ["A", "B"])


def test_a_server_that_refuses_log_probabilities_says_so(serve):
    refused = dict(status=400, body=b"logprobs is not supported")
    player = Endpoint(serve(lambda n, asked: refused if "logprobs" in asked else good(asked)).url, "m")
    with pytest.raises(EndpointError, match="logprobs is not supported"):
        player.label_logprobs("Which?", ["A", "B"])
    assert player.generate("a").startswith("A ")


def test_a_judge_behind_a_server(serve):
    "It prefers the answer that says yes, and a little what stands first."

    def plan(n, asked):
        text = asked["messages"][-1]["content"]
        lead = 0.5 + 2 * (1 if text.index("yes") < text.index("no,") else -1)
        return lists(asked, ("A", -3 + lead), (" B", -3.0))

    judge = ModelJudge(Endpoint(serve(plan).url, "m"))
    verdicts = judge.compare(["Which?"] * 2, ["yes, it is", "no, it is"], ["no, it is", "yes, it is"])
    right = (1 / (1 + math.exp(-2.5)) + 1 / (1 + math.exp(-1.5))) / 2
    assert list(verdicts) == pytest.approx([right, 1 - right])
    unsure = ModelJudge(Endpoint(serve(lambda n, asked: lists(asked, ("Well", -0.1))).url, "m"))
    [p] = unsure.compare(["Which?"], ["yes"], ["no"])
    assert math.isnan(p)


@pytest.mark.parametrize(
    "message, why, text, cut",
    [
        ({"content": None}, "content_filter", "", True),
        ({"content": None, "refusal": "I cannot help."}, "stop", "I cannot help.", False),
        ({"content": None, "reasoning_content": "hm"}, "length", "", True),
        ({"content": [{"type": "text", "text": "hi"}]}, "stop", "hi", False),
    ],
)
def test_an_answer_without_text_is_not_bought_again(serve, message, why, text, cut):
    server = serve(lambda n, asked: good(asked, message=message, finish_reason=why))
    player = Endpoint(server.url, "m")
    [[reply]] = player.sample(["a"])
    assert (reply.text, reply.truncated) == (text, cut) and player.used["requests"] == 1


def test_answers_on_their_way_are_kept_when_another_fails(serve, tmp_path):
    "Seven answers take half a second; the eighth is refused at once."

    def answer(n, asked):
        if asked["messages"][-1]["content"] == "bad":
            return dict(status=400, body=b'{"error": {"message": "no"}}')
        time.sleep(0.5)
        return good(asked)

    server = serve(answer)
    player = Endpoint(server.url, "m", concurrency=8, cache=tmp_path / "cache.jsonl")
    with pytest.raises(EndpointError):
        player.sample([*map(str, range(7)), "bad"])
    assert len((tmp_path / "cache.jsonl").read_text().splitlines()) == 7
