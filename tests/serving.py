"A small real HTTP server with the endpoints of vLLM that the library asks, for tests and for its page."

import http.server
import json
import threading
import time
from collections import OrderedDict

from selfplay_nb.models.policy import Base, Policy
from selfplay_nb.models.sampling import Request, Sampling


class Serving(http.server.ThreadingHTTPServer):
    "A base, and adapters that are loaded and unloaded while it runs, as many as it `holds`."

    model = threading.Lock()  # servers of the tests share a base, which is for one thread at a time
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, base: Base, holds: int = 4, max_rank: int = 16, lora=True, port: int = 0, **odd):
        super().__init__(("127.0.0.1", port), Handler)
        self.base, self.holds, self.max_rank, self.lora = base, holds, max_rank, lora
        self.plan = odd.pop("plan", lambda n, path, asked: None)  # a reply in place of the right one
        self.odd = odd  # `seeds=False`, `token_ids=False`: what some servers do not do
        self.adapters = OrderedDict()  # name to policy, the last one asked for at the end
        self.lock = threading.Lock()
        self.now, self.most, self.n = 0, 0, 0
        self.loads, self.unloads, self.asked, self.evicted, self.unknown = [], [], [], [], []
        self.stopped = False
        self.disturbed = 0  # loads and unloads while answers were under way
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def stop(self):
        self.stopped = True
        self.shutdown()
        self.server_close()
        with self.model:
            while self.adapters:
                self.adapters.popitem()[1].delete()

    def reply(self, path: str, asked: dict) -> tuple[int, object]:
        "Status, and a text or data."
        what = path.rsplit("/", 1)[-1]
        if path in ("/v1/models", "/v1/completions"):
            return getattr(self, what)(asked)
        above = "" if self.odd.get("sglang") else "/v1"
        if self.lora and path in (f"{above}/load_lora_adapter", f"{above}/unload_lora_adapter"):
            self.disturbed += self.now > 0
            return getattr(self, what)(asked)
        return 404, {"detail": "Not Found"}

    def models(self, asked):
        cards = [dict(id="the-base", parent=None)]
        return 200, dict(data=cards + [dict(id=name, parent="the-base") for name in self.adapters])

    def load_lora_adapter(self, asked):
        name, path = asked["lora_name"], asked["lora_path"]
        if name in self.adapters:
            return 400, _error(f"The lora adapter '{name}' has already been loaded.")
        with self.model:
            if self.stopped:  # while this request waited
                return 503, "stopped"
            try:
                policy = Policy.load(self.base, path, f"{name}-at-{self.server_port}", frozen=True)
            except ValueError as e:
                return 404, _error(f"Loading lora {name} failed: No adapter found for {path}: {e}")
            rank = self.base.peft.peft_config[policy.name].r
            if rank > self.max_rank:
                policy.delete()
                return 500, _error(f"LoRA rank {rank} is greater than max_lora_rank {self.max_rank}.")
            self.adapters[name] = policy
            self.loads.append(name)
            while len(self.adapters) > self.holds:
                old, evicted = self.adapters.popitem(last=False)
                evicted.delete()
                self.evicted.append(old)
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def unload_lora_adapter(self, asked):
        name = asked["lora_name"]
        if name not in self.adapters:
            return 404, _error(f"The lora adapter '{name}' cannot be found.")
        with self.model:
            self.adapters.pop(name).delete()
        self.unloads.append(name)
        return 200, f"Success: LoRA adapter '{name}' removed successfully."

    def completions(self, asked):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            time.sleep(self.odd.get("slow", 0))
            with self.model:
                return self.completion(asked)
        finally:
            with self.lock:
                self.now -= 1

    def completion(self, asked):
        name = asked["model"]
        if self.odd.get("sglang"):
            name = name.removeprefix("the-base:")
        if name != "the-base" and name not in self.adapters:
            self.unknown.append(name)
            return 404, _error(f"The model `{asked['model']}` does not exist.")
        adapter = "base" if name == "the-base" else self.adapters[name].name
        if name in self.adapters:
            self.adapters.move_to_end(name)
        ids = asked["prompt"]
        if asked.get("echo"):
            [(logprobs, _)] = self.base.answer_logprobs("base", [ids[:1]], [ids[1:]])
            return 200, dict(choices=[dict(logprobs=dict(token_logprobs=[None, *logprobs.tolist(), -1.0]))])
        self.asked.append(dict(asked, adapter=name))
        settings = Sampling(asked["max_tokens"], asked["temperature"], asked["top_p"])
        seed = asked["seed"] if self.odd.get("seeds", True) else len(self.asked)
        [said] = self.base.answers([Request((tuple(ids),), adapter, seed)], settings)
        choice = dict(index=0, text=said.text, finish_reason=said.finish_reason)
        if self.odd.get("token_ids", True):
            choice["token_ids"] = said.token_ids
        return 200, dict(choices=[choice])


def _error(message: str) -> dict:
    return dict(error=dict(message=message))


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def do_GET(self):
        self.answer({})

    def answer(self, asked: dict):
        server = self.server
        with server.lock:
            server.n += 1
            n = server.n
        status, said = server.plan(n, self.path, asked) or server.reply(self.path, asked)
        if status is None or server.stopped:  # the connection breaks
            self.close_connection = True
            self.connection.close()
            return
        body = (said if isinstance(said, str) else json.dumps(said)).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except OSError:
            pass  # who asked has gone

    def log_message(self, *args):
        pass
