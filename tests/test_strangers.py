"""Whatever a user brings can play: only names of the page "Bring your own".

Each run is killed in its second round, and ends as one that was not.
"""

import http.server
import json
import os
import random
import signal
import subprocess
import sys
import threading
import urllib.request
import warnings
from types import SimpleNamespace

import pytest
import torch

from selfplay_nb import as_game, as_judge, as_player, as_task
from selfplay_nb.cli import main
from selfplay_nb.core.pairs import Ledger
from selfplay_nb.core.protocols import Game, Judge, Player, Task
from selfplay_nb.games.play import RandomPlayer
from selfplay_nb.loop.game_rounds import GameMoves, GameTask
from selfplay_nb.loop.pipeline import RLHFOrchestrator
from selfplay_nb.loop.rounds import Compete
from selfplay_nb.loop.run_evaluation import arena
from selfplay_nb.loop.trainer import SelfPlayConfig, SelfPlayTrainer
from selfplay_nb.methods.competitive import CompetitiveSelfPlay
from selfplay_nb.methods.game_training import Sticks
from selfplay_nb.models.policy import Base, Policy
from selfplay_nb.models.update import dpo
from selfplay_nb.scoring.evaluation import versus

THINGS = (
    "river bridge coffee window garden winter piano train bread candle forest island letter market".split()
)
PROMPTS = [f"Describe a {thing}." for thing in THINGS]
CHAT = [[dict(role="system", content="You are brief."), dict(role="user", content=p)] for p in PROMPTS]
SMALL = dict(
    n_rounds=2,
    prompts_per_round=6,
    n_samples=6,
    max_new_tokens=24,
    eval_every=2,
    update_reference_every=1,
    gate=False,
)


def variety(prompt, answer):
    return len(set(answer)) / 30


def shorter(prompt, a, b):
    return float(len(a) < len(b))


def wordy(prompts, completions, thing, **columns):
    return [len(set(c + t)) for c, t in zip(completions, thing)]


class Opposites:
    "A task of one's own, as on the page."

    name = "opposites"

    def problems(self, split, n, seed=0):
        rows = [dict(prompt=f"Not {w}?", word=w) for w in (THINGS[:10] if split == "train" else THINGS[10:])]
        return random.Random(seed).sample(rows, min(n, len(rows)))

    def reward(self, prompts, completions, word, **columns):
        return [sum(x in w for x in c) / (1 + len(c)) for c, w in zip(completions, word)]

    def verifier(self, prompts, completions, word, **columns):
        return [float(w in c) for c, w in zip(completions, word)]


class Short:
    "A game whose prompt is short: the higher number wins."

    name, seats = "higher", 2

    def start(self, seed):
        return Said([])


class Said:
    legal, prompt = ["1", "2", "3"], "1, 2 or 3?"

    def __init__(self, said):
        self.said = said

    @property
    def seat(self):
        return len(self.said) if len(self.said) < 2 else None

    def move(self, text):
        if text not in self.legal:
            raise ValueError("1, 2 or 3")
        self.said.append(int(text))

    @property
    def outcome(self):
        a, b = self.said
        return [0.5 + 0.5 * ((a > b) - (a < b)), 0.5 + 0.5 * ((b > a) - (b < a))]

    def copy(self):
        return Said(list(self.said))

    def __str__(self):
        return str(self.said)


class TwicePlayed:
    def collect(self, run, problems):
        first = Compete(n_samples=2).collect(run, problems)
        return first + Compete(n_samples=4).collect(run, problems)


def half(turns):
    "What is expected of a move; the tiny model's are all illegal, so each is worse than that."
    return [0.5] * len(turns)


class Careful:
    takes = "pairs"

    def learn(self, run, experience):
        return dpo(
            run.student, experience.pairs, run.reference, **run.update_settings | dict(learning_rate=5e-5)
        )


class Always:
    def decide(self, run):
        return dict(verdict="accept", asked=run.round)


ROWS = [dict(prompt=p, thing=t) for p, t in zip(PROMPTS, THINGS)]
DEMONSTRATIONS = [dict(prompt=p, completion="A thing.") for p in PROMPTS]
BROUGHT = {
    "prompts and a reward": lambda: dict(task=as_task(PROMPTS, reward=variety)),
    "rows and a reward that reads a column": lambda: dict(task=as_task(ROWS, reward=wordy)),
    "a judge only": lambda: dict(task=as_task(PROMPTS, judge=shorter)),
    "chat prompts with a system message": lambda: dict(task=as_task(CHAT, reward=variety)),
    "a task of one's own": lambda: dict(task=Opposites()),
    "groups": lambda: dict(task=as_task(PROMPTS, reward=variety), method="grpo", kl=0.1),
    "groups and a judge": lambda: dict(task=as_task(PROMPTS, judge=shorter), method="reinforce"),
    "squared losses": lambda: dict(task=as_task(PROMPTS, reward=variety), method="sppo"),
    "the best answers": lambda: dict(task=as_task(PROMPTS, reward=variety), method="sft"),
    "demonstrations": lambda: dict(task=as_task(DEMONSTRATIONS, reward=variety), method="spin"),
    "a game": lambda: dict(
        task=GameTask(Short(), illegal="random"),
        collectors=[GameMoves(half)],
        method="reinforce",
        eval_size=8,
    ),
    "a game and a league": lambda: dict(
        task=GameTask(Short(), illegal="random"),
        collectors=[GameMoves(half)],
        opponents="league",
        method="reinforce",
        eval_size=8,
    ),
    "a league whose exploiters learn": lambda: dict(
        task=as_task(PROMPTS, reward=variety),
        opponents="league",
        learners="main, main_exploiter, league_exploiter",
    ),
    "a game and exploiters": lambda: dict(
        task=GameTask(Short(), illegal="random"),
        collectors=[GameMoves(half)],
        opponents="league",
        learners="main, main_exploiter",
        method="reinforce",
        eval_size=8,
    ),
    "parts of one's own": lambda: dict(
        task=as_task(PROMPTS, reward=variety), collectors=[TwicePlayed()], method=Careful(), gate=Always()
    ),
}


class Killed:
    "Kills its process before the second update."

    def on_stage(self, trainer, stage):
        if trainer.round == 1 and stage == "training":
            os.kill(os.getpid(), signal.SIGKILL)


def brought(name, folder, run_dir, callbacks=()):
    given = BROUGHT[name]()
    parts = {k: given.pop(k) for k in ("task", "collectors", "gate") if k in given}
    if not isinstance(given.get("method", ""), str):
        parts["method"] = given.pop("method")
    base = Base.load(folder, dtype=torch.float32, device="cpu")
    return SelfPlayTrainer(
        SelfPlayConfig(str(run_dir), **SMALL | given), base=base, callbacks=list(callbacks), **parts
    )


def outcome(trainer):
    kept = [
        Ledger(trainer.dir / "pairs.jsonl").rows(),
        Ledger(trainer.dir / "samples.jsonl", ("prompt", "completion", "advantage")).rows(),
    ]
    return (
        [{k: v.tolist() for k, v in learner.policy.state().items()} for learner in trainer.learners],
        kept,
        list(map(timeless, trainer.history)),
    )


def timeless(metrics):
    "Metrics without what a clock says."
    if not isinstance(metrics, dict):
        return metrics
    return {k: timeless(v) for k, v in metrics.items() if "second" not in k}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BROUGHT)
def test_it_plays_and_goes_on_after_a_kill(name, tmp_path, tiny_folder):
    whole = brought(name, tiny_folder, tmp_path / "whole")
    history = whole.train()
    assert len(history) == 3 and any(m.get("loss") is not None for m in history[1:]), history
    child = os.fork()
    if not child:
        try:
            brought(name, tiny_folder, tmp_path / "killed", [Killed()]).train()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    resumed = brought(name, tiny_folder, tmp_path / "killed")
    assert len(resumed.train()) == 3 and outcome(resumed) == outcome(whole)


@pytest.mark.filterwarnings("ignore")
def test_the_same_from_the_command_line(tmp_path, tiny_folder, monkeypatch, capsys):
    # it is for good, and these are in this process
    monkeypatch.setattr("selfplay_nb.cli._keep_freed_memory", lambda: None)
    (tmp_path / "mine.py").write_text(
        "def variety(prompt, answer): return len(set(answer))/30\n"
        "def shorter(prompt, a, b): return float(len(a) < len(b))\n"
    )
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(dict(prompt=p)) + "\n" for p in PROMPTS))
    (tmp_path / "run.yaml").write_text("\n".join(f"{k}: {v}" for k, v in SMALL.items()))
    monkeypatch.chdir(tmp_path)
    common = ["train", "--model", str(tiny_folder), "--config", "run.yaml", "--prompts", "mine.jsonl"]
    main([*common, "--reward", "mine.py:variety", "--run-dir", "run"])
    there = SelfPlayTrainer(
        SelfPlayConfig("run", str(tiny_folder), **SMALL),
        task=as_task("mine.jsonl", reward=variety, name="mine"),
        callbacks=[],
    )
    assert [m["round"] for m in there.train()] == [0, 1, 2]  # the same run, and it is finished
    main([*common, "--judge", "mine.py:shorter", "--run-dir", "judged", "--n-rounds", "1"])
    main(["export", "run", "exported"])
    assert (
        "adapter_config.json" in os.listdir("exported")
        and "better than before training" in capsys.readouterr().out
    )
    for wrong, said in [
        (["--reward", "mine.py:nothing"], "no 'nothing'; it has variety, shorter"),
        (["--reward", "none.py:x"], "no file 'none.py'"),
        ([], "--prompts without --reward or --judge"),
        (["--task", "mine.py:variety"], "give it alone"),
        (["--reward", "mine.py:variety", "--run-dir", "run", "--held-out", ".5"], "another configuration"),
    ]:
        with pytest.raises(SystemExit, match=said):
            main([*common, *wrong])
    with pytest.raises(SystemExit, match="is there already"):
        main(["export", "run", "exported"])
    main(["export", "run", "merged", "--merge"])
    merged = Policy(Base.load("merged", load_in_4bit=False, dtype="float32", device="cpu"), "base")
    alone = Policy.load(Base.load(str(tiny_folder), device="cpu", dtype="float32"), "exported")
    asked = ["a", "b"], ["yes", "no"]
    # in bfloat16, as it is written
    assert torch.allclose(merged.logprobs(*asked), alone.logprobs(*asked), atol=0.3)


class _Server(http.server.BaseHTTPRequestHandler):
    "Answers as an OpenAI-compatible server does: the last message, in capitals."

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = asked["messages"][-1]["content"].upper()
        body = json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def test_a_model_behind_a_server_is_a_function(tiny):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def remote(prompt):
        asked = json.dumps(dict(model="any", messages=[dict(role="user", content=prompt)])).encode()
        with urllib.request.urlopen(
            f"http://127.0.0.1:{server.server_port}/v1/chat/completions", asked
        ) as reply:
            return json.load(reply)["choices"][0]["message"]["content"]

    try:
        match = versus(
            remote,
            str.lower,
            [dict(prompt=p) for p in PROMPTS],
            lambda prompt, answer: sum(map(str.isupper, answer)),
        )
        assert match.win_rate.value == 1 and match.rows[0]["a"] == "remote"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pairs = CompetitiveSelfPlay(remote, lambda p: "no", variety, 1).train_step(PROMPTS[:2])
        assert [p["chosen"] for p in pairs] == [p.upper() for p in PROMPTS[:2]]
    finally:
        server.shutdown()


@pytest.mark.filterwarnings("ignore")
def test_demonstrations_and_pairs_through_every_stage(tmp_path, tiny):
    (tmp_path / "demonstrations.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in DEMONSTRATIONS[:8])
    )
    pairs = [dict(prompt=r["prompt"], chosen="A thing.", rejected="No.") for r in DEMONSTRATIONS[:8]]
    task = as_task(ROWS[8:], reward=wordy, verifier=lambda prompt, answer: float("e" in answer))
    run = RLHFOrchestrator(
        tmp_path / "run", tiny, task, eval_size=2, validation_size=0, max_new_tokens=12, progress=False
    )
    run.run_sft(tmp_path / "demonstrations.jsonl")
    for method in "dpo", "ipo", "sppo":
        run.run_policy_optimization(method, pairs)
    run.run_policy_optimization("spin", tmp_path / "demonstrations.jsonl")
    run.run_policy_optimization("grpo", n_prompts=4, group=4, prompts_per_step=4)
    assert [s.name for s in run.stages] == ["start", "sft", "dpo", "ipo", "sppo", "spin", "grpo"]


def test_what_is_brought_is_one_of_the_five():
    assert isinstance(as_player(lambda prompt: "x"), Player) and isinstance(as_judge(shorter), Judge)
    assert isinstance(as_task(PROMPTS, reward=variety), Task) and isinstance(Opposites(), Task)
    assert all(isinstance(as_game(g), Game) for g in ("sticks", Sticks(3, 5), Short()))
    task = lambda *prompts, **given: as_task(list(prompts), **given)
    for wrong in (
        lambda: as_player(Said),
        lambda: as_player(3),
        lambda: as_judge("x"),
        lambda: as_judge(Said),
        lambda: as_game(Short),
        lambda: as_game(object()),
        lambda: as_game("no such game"),
        lambda: task("a", reward=variety),
        lambda: task(reward=variety),
        lambda: as_task(3, reward=variety),
        lambda: task("a", "b", reward="x"),
        lambda: task("a", "b", judge=3),
        lambda: task("a", "b", reward=variety, held_out=1.0),
        lambda: task("a", "b", "", reward=variety),
        lambda: task("a", "b"),
        lambda: task(dict(prompt="a", x=1), dict(prompt="b"), reward=variety),
        lambda: task("a", "b", reward=variety, held_out=["c", 3]),
        lambda: GameTask(Said),
    ):
        with pytest.raises(ValueError):
            wrong()


def test_the_split_is_by_what_is_asked():
    many = [f"What is {i} + {i}?" for i in range(200)]
    a, b = as_task(many, reward=variety), as_task(many[::-1], reward=variety)
    ask = lambda t, split: {p["prompt"] for p in t.problems(split, 999)}
    assert (
        ask(a, "held-out") == ask(b, "held-out")
        and len(ask(a, "held-out")) == 40
        and not ask(a, "held-out") & ask(a, "train")
    )
    kept = sorted(ask(a, "held-out"))[:3]
    with pytest.warns(UserWarning, match="3 training prompts were left out"):
        c = as_task(many, reward=variety, held_out=[k.upper() + " " for k in kept])
    assert len(ask(c, "train")) == 197 and not ask(c, "train") & set(kept)
    assert a.problems("train", 5, 1) == a.problems("train", 5, 1) != a.problems("train", 5, 2)


@pytest.mark.filterwarnings("ignore")
def test_the_pipeline_from_a_file(tmp_path, tiny_folder, monkeypatch, capsys):
    monkeypatch.setattr("selfplay_nb.cli._keep_freed_memory", lambda: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "def variety(prompt, answer): return len(set(answer))/30\n"
        "def right(prompt, answer): return float('e' in answer)\n"
    )
    pairs = [d | dict(chosen="A.", rejected="No.") for d in DEMONSTRATIONS]
    for name, rows in ("demonstrations", DEMONSTRATIONS[:8]), ("questions", ROWS[8:]), ("pairs", pairs):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({k: v for k, v in row.items() if k != "thing"}) + "\n" for row in rows)
        )
    given = dict(
        run_dir="run",
        model=str(tiny_folder),
        prompts="questions.jsonl",
        reward="mine.py:variety",
        verifier="mine.py:right",
        eval_size=2,
        validation_size=0,
        max_new_tokens=24,
        stages=[
            {"sft": dict(data="demonstrations.jsonl")},
            {"self_play": dict(n_games=64)},
            {"dpo": dict(data="pairs.jsonl", with_self_play=True)},
        ],
    )
    (tmp_path / "stages.yaml").write_text(json.dumps(given))  # JSON is YAML
    main(["pipeline", "stages.yaml"])
    assert "03_dpo" in capsys.readouterr().out
    main(["pipeline", "stages.yaml"])
    assert "finished before" in "".join(capsys.readouterr())
    for change, said in [
        (dict(stages=[]), "lists no stages"),
        (dict(stages=["sfd"]), "has the stage 'sfd'"),
        (dict(speed=3), "speed"),
        (dict(reward="mine.py:x"), "no 'x'"),
        (dict(stages=[{"dpo": dict(with_self_play=True)}]), "no self_play stands before it"),
    ]:
        (tmp_path / "wrong.yaml").write_text(json.dumps(given | dict(run_dir="other") | change))
        with pytest.raises(SystemExit, match=said):
            main(["pipeline", "wrong.yaml"])


def test_the_names_that_users_come_for_are_in_the_package():
    import selfplay_nb

    assert all(
        getattr(selfplay_nb, name) is not None for name in selfplay_nb.__all__
    ) and "SelfPlayTrainer" in dir(selfplay_nb)
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        print(selfplay_nb.Trainer)
    code = "import sys, selfplay_nb as s; s.CompetitiveSelfPlay, s.as_task; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


class Seedless(Short):
    name = "seedless"

    def start(self):
        return Said([])


class Misspelled(Opposites):
    def reward(self, prompts, completions, wrod, **columns):
        return [1.0] * len(prompts)


def ended(seat=None, legal=("1",), refuses=False, outcome=None):
    "A game with one position: what it is after the only move that it has."

    class Position:
        prompt = "?"

        def __init__(self):
            self.seat, self.legal, self.outcome = 0, list(legal), outcome

        def move(self, text):
            if refuses:
                raise ValueError("never")
            self.seat = seat

        def copy(self):
            return Position()

    class Game:
        name, seats = "one move", 2

        def start(self, seed):
            return Position()

    return Game()


class Bare(Short):
    name = "bare"

    def start(self, seed):
        return object()


@pytest.mark.parametrize(
    "wrong, said",
    [
        (
            lambda: as_task(ROWS, reward=lambda prompt, answer, keyword: 1.0),
            "takes keyword, which no column is named: there are .*'thing'",
        ),
        (lambda: as_task(PROMPTS, reward=lambda answer: 1.0), "takes 1 argument: expected at least 2"),
        (
            lambda: as_task(PROMPTS, reward=lambda prompt, answer: "good"),
            "returned 'good' .*: expected a finite number",
        ),
        (
            lambda: as_task(PROMPTS, reward=lambda prompt, answer: answer.lenght),
            "failed on a first trial.*AttributeError",
        ),
        (
            lambda: as_task(PROMPTS, reward=variety, verifier=lambda prompts, completions, **columns: 1.0),
            "expected a flat list of 1 numbers",
        ),
        (lambda: as_task(PROMPTS, judge=lambda a, b: 0.5), "takes 2 arguments: expected .prompt, a, b."),
        (lambda: as_task(PROMPTS, judge=lambda prompt, a, b: "a"), "expected a probability from 0 to 1"),
        (lambda: as_task(PROMPTS, judge=lambda prompt, a, b: 2.0), "expected a probability from 0 to 1"),
        (lambda: as_task(PROMPTS), "as in as_task.prompts, reward="),
        (
            lambda: as_task("gone.jsonl", reward=variety),
            "expected a .jsonl or .parquet file, a hub name, or a list of rows",
        ),
        (lambda: as_player(lambda: "x"), "takes no argument: expected a function of the prompt"),
        (lambda: as_game("stick"), "sticks.*TicTacToe-v0"),
        (lambda: as_game("nim(piles=3)"), "nim does not take"),
        (lambda: GameTask(Seedless()), "cannot be started by start.seed."),
        (lambda: GameTask(Bare()), "no legal, no prompt, no move"),
        (lambda: as_task(Opposites), "Opposites is a class: expected a task made from it, as Opposites.."),
        (lambda: as_task(Misspelled()), "'reward' failed on a first trial.*'wrod'"),
        (lambda: GameTask(Short(), illegal="loose"), "illegal is 'loose': expected one of 'retry', 'lose'"),
        (lambda: as_game(Short), "Short is a class: expected a game made from it, as Short.."),
        (lambda: as_game(ended(seat=0)), "is not over after 2000 moves: at its end `seat` is None"),
        (lambda: as_game(ended(legal=[])), r"its legal moves are \[\]: expected texts"),
        (lambda: as_game(ended(legal=[1])), r"its legal moves are \[1\]: expected texts"),
        (lambda: as_game(ended(refuses=True)), "refuses its own legal move '1': never"),
        (lambda: as_game(ended()), "ended with the outcome None: expected a number for each of 2 seats"),
        (lambda: as_game(ended(outcome=1)), "outcome 1: expected a number for each"),
        (lambda: as_game(ended(outcome=[1])), "outcome .1.: expected a number for each"),
        (lambda: as_game(ended(outcome=[1, float("nan")])), "outcome .1, nan.: expected a number for each"),
        (
            lambda: CompetitiveSelfPlay(str.upper, str.lower, shorter, 1).train_step(PROMPTS),
            "as_judge makes it one",
        ),
        (
            lambda: CompetitiveSelfPlay(lambda p: 3, str.lower, variety, 1).train_step(PROMPTS),
            "gave the answer 3: expected a text",
        ),
    ],
)
def test_what_a_newcomer_gets_wrong_is_told_before_a_model_is_loaded(wrong, said):
    with pytest.raises(ValueError, match=said):
        wrong()


def test_columns_go_to_the_arguments_of_their_name():
    rows = [dict(prompt="a", word="river", weight=2.0), dict(prompt="b", word="bridge", weight=3.0)]
    seen = []

    def reward(prompt, answer, word, *, weight, bonus=1.0):
        seen.append((prompt, word, weight, bonus))
        return weight * (word in answer)

    def judge(prompt, a, b, word):
        return 0.5 + 0.5 * ((word in a) - (word in b))

    pairs = CompetitiveSelfPlay(lambda p: "the river", lambda p: "no", reward, 1).train_step(rows)
    assert [(p["prompt"], p["margin"]) for p in pairs] == [("a", 2.0)] and set(seen) == {
        ("a", "river", 2.0, 1.0),
        ("b", "bridge", 3.0, 1.0),
    }
    assert as_judge(judge).compare(
        ["a", "b"], ["the river"] * 2, ["the bridge"] * 2, word=["river", "bridge"]
    ) == [1.0, 0.0]
    everything = []
    as_task(rows, reward=lambda prompt, answer, **columns: everything.append(columns) or 1.0)
    assert set(everything[0]) == {"word", "weight", "truncated"}


def test_coins_are_new_for_new_starts():
    "A gate looks several times in a round: with the same coins each time, its errors would add up."
    task = GameTask(Sticks())
    run = SimpleNamespace(
        student=RandomPlayer(),
        reference=RandomPlayer(),
        task=task,
        sampling={},
        config=SimpleNamespace(judge="random", seed=0),
    )
    looks = [task.problems("train", 100, seed) for seed in range(4)]
    scores = [[s for row in arena(task).duel(run, problems, 0) for s in row] for problems in looks]
    assert scores[0] == [s for row in arena(task).duel(run, looks[0], 0) for s in row]
    agree = [sum(a == b for a, b in zip(scores[0], other)) for other in scores[1:]]
    assert all(len(row) == 200 and set(row) == {0.0, 1.0} and 70 < sum(row) < 130 for row in scores) and all(
        70 < n < 130 for n in agree
    )
