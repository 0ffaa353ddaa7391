"""Files of others: every public function that writes, replaces or deletes is tried on a project with a Git
repository, a thesis, a model and links.

Whatever it answers, each byte, link and right of what was there is the same afterwards; as root, and as a
user who may not write everywhere.
"""

import importlib
import inspect
import json
import os
import pkgutil
import re
import signal
import tempfile
import traceback
import types
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import selfplay_nb
from selfplay_nb import cli
from selfplay_nb.core import checkpoint, pairs
from selfplay_nb.core.players import Scripted
from selfplay_nb.games.debate import Negotiation
from selfplay_nb.games.play import Played, Transcript, play
from selfplay_nb.loop import callbacks
from selfplay_nb.loop.pipeline import RLHFOrchestrator
from selfplay_nb.loop.trainer import KIND, MADE, SelfPlayConfig, SelfPlayTrainer
from selfplay_nb.methods.adversarial import AdversarialFilter
from selfplay_nb.methods.constitutional import Constitution, ConstitutionalRewardWrapper, Principle
from selfplay_nb.methods.league import LeagueTraining
from selfplay_nb.methods.refinement import IterativeRefiner, Trace, Traces, Version
from selfplay_nb.models import base as model
from selfplay_nb.models import update
from selfplay_nb.models.policy import Base, Policy, write_model
from selfplay_nb.models.reward_model import RewardModel
from selfplay_nb.scoring.human import HumanRatings
from selfplay_nb.studies import doctor, gpu
from selfplay_nb.views.constitution_card import ConstitutionCard
from selfplay_nb.views.refinement_stepper import RefinementStepper

TELLING = re.compile(
    "save|write|writing|delete|discard|prune|forget|export|append|rewind|fresh|anew|locked|convert|fetch|"
    "folder|control|clear|remove|"
    "record|store|dump"
)


def project(home: Path) -> Path:
    "A person's folder, with links that lead out of it."
    outside, place = home / "outside", home / "project"
    files = {
        "thesis.docx": b"PK\x03\x04 years of work",
        ".DS_Store": b"\0\0\0\1Bud1",
        ".git/HEAD": b"ref: refs/heads/main\n",
        ".git/objects/ab/cd": b"\x78\x01",
        ".lock": b"mine",
        "config.json.new": b"mine too",
        "data.jsonl": b'{"question": "a", "answer": "b"}\n',
        "notes.toml": b'title = "notes"\n',
        "control.json": b'{"volume": 11}',
        "metrics.jsonl": b"1\n",
        "pairs.jsonl": b'{"left": 1, "right": 2}\n',
        "games.jsonl": b"[1, 2]\n",
        "state.json": b'{"who": "me"}',
        "report.html": b"<p>mine</p>",
        "curve.png": b"\x89PNG mine",
        "refinement.json": b"[]",
        "model/config.json": b'{"model_type": "llama", "hidden_size": 64}',
        "model/model.safetensors": b"\x08\0\0\0\0\0\0\0{}      ",
        "model/tokenizer.json": b"{}",
        "adapter/adapter_config.json": b"{}",
        "adapter/adapter_model.safetensors": b"of another program",
        "checkpoints/round_1/thesis.docx": b"1",
        "checkpoints/round_2/config.json": b"{}",
        "checkpoints/round_3/manifest.json": b"{}",
        "checkpoints/.round_9.new/x": b"mine",
        "members/m0/thesis.docx": b"2",
        "closed/kept.json": b'{"a": 1}',
        "closed/round_1/kept.json": b"{}",
    }
    for name, data in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    outside.mkdir()
    (outside / "letter.txt").write_text("dear")
    (outside / "round_1").mkdir()
    (outside / "round_1" / "letter.txt").write_text("dear too")
    for at, to in {
        "link_to_file": outside / "letter.txt",
        "link_to_folder": outside,
        "checkpoints/round_4": outside / "round_1",
        "nowhere": home / "no such file",
        "checkpoints/.round_5.old": outside / "round_1",
        "model/.lock": outside / "letter.txt",
        "notes.toml.new": outside / "letter.txt",
    }.items():
        (place / at).symlink_to(to)
    for f in (place / "closed" / "round_1", place / "closed"):
        f.chmod(0o555)
    (place / "closed" / "kept.json").chmod(0o444)
    return place


PLACES = [
    "",
    "thesis.docx",
    ".git",
    ".git/HEAD",
    "data.jsonl",
    "notes.toml",
    "control.json",
    "refinement.json",
    "model",
    "model/config.json",
    "model/model.safetensors",
    "adapter",
    "checkpoints",
    *(f"checkpoints/round_{i}" for i in (1, 2, 3, 4)),
    "members",
    "closed",
    "closed/kept.json",
    "closed/round_1",
    "closed/new",
    "link_to_file",
    "link_to_folder",
    "link_to_folder/round_1",
    "nowhere",
    "thesis.docx/below",
]


def photograph(home: Path) -> dict:
    "Kind, rights and content of everything under a folder."
    seen = {}
    for f in sorted(home.rglob("*")):
        kind = "link" if f.is_symlink() else "folder" if f.is_dir() else "file"
        content = os.readlink(f) if kind == "link" else f.read_bytes() if kind == "file" else ""
        seen[str(f.relative_to(home))] = (
            kind,
            f.lstat().st_mode,
            f.lstat().st_ino if kind != "link" else 0,
            content,
        )
    return seen


# the table: public name to something that calls it at a place


def writing(made, at):
    with checkpoint.writing(at) as tmp:
        (tmp / "a.json").write_text("{}")


def locked(made, at):
    with checkpoint.locked(at):
        pass


class Unused:
    "In place of a base: no run gets so far, but in an empty folder."

    def __getattr__(self, name):
        raise ValueError("this base is not to be used: nothing is to be trained here")


def run(at):
    return SelfPlayTrainer(SelfPlayConfig(str(at), n_rounds=1, eval_size=4), base=Unused(), callbacks=[])


def orchestrator(made, at):
    return RLHFOrchestrator(at, made.base, eval_size=4, validation_size=0, progress=False)


def league(made, at, policy=None):
    league = LeagueTraining(2, made.base, at)
    if policy:
        for i in range(4):
            league.add(policy, f"m{i}")
            league.record([dict(a=f"m{i}", b="base", score=1.0)])
    league.save()


def card(made, at):
    view = ConstitutionCard(ConstitutionalRewardWrapper(None, made.constitution), "q", "a", "b", path=at)
    view.save_button.click()


def stepper(made, at):
    view = RefinementStepper(IterativeRefiner(made.player), trace=made.trace, path=at)
    view.save.click()


def rated(made, at):
    HumanRatings(at, [dict(prompt="p", a="a", b="b")]).rate("left")


def ledger(made, at, call):
    call(pairs.Ledger(at))


def export(made, at):
    with tempfile.TemporaryDirectory() as top:
        run = Path(top) / "run"
        checkpoint.write_record(run / checkpoint.RECORD, {"kind": KIND})
        with checkpoint.writing(run / "checkpoints" / "round_000") as tmp:
            made.policy.save(tmp / "student")
            (tmp / "state.json").write_text('{"marks": {}}')
        cli.export(run, at)


PAIR = dict(prompt="p", chosen="a", rejected="b")
WRITERS = {
    "checkpoint.writing": writing,
    "checkpoint.locked": locked,
    "checkpoint.discard": lambda made, at: checkpoint.discard(at),
    "checkpoint.discard, damaged": lambda made, at: checkpoint.discard(at, whole=False),
    "checkpoint.prune": lambda made, at: checkpoint.prune(at, keep=1),
    "checkpoint.write_record": lambda made, at: checkpoint.write_record(at, {}),
    "checkpoint.write_record, of a folder": lambda made, at: checkpoint.write_record(
        at / "config.json", {"kind": "run"}
    ),
    "checkpoint.forget_run": lambda made, at: checkpoint.forget_run(at, "run", MADE),
    "checkpoint.run_record": lambda made, at: checkpoint.run_record(at, "run"),
    "checkpoint.read_record": lambda made, at: checkpoint.read_record(at),
    "pairs.Ledger.append": lambda made, at: ledger(made, at, lambda it: it.append([PAIR])),
    "pairs.Ledger.rewind": lambda made, at: ledger(made, at, lambda it: it.rewind(0)),
    "pairs.write_whole": lambda made, at: pairs.write_whole(
        at, "text", lambda file: json.loads(file.read_text())["mine"]
    ),
    "policy.Policy.save": lambda made, at: made.policy.save(at),
    "reward_model.RewardModel.save": lambda made, at: made.reward.save(at),
    "update.save_optimizer": lambda made, at: update.save_optimizer({"w.step": torch.zeros(1)}, at),
    "league.LeagueTraining.save": league,
    "league.LeagueTraining.record": lambda made, at: league(made, at, made.policy),
    "human.HumanRatings.rate": rated,
    "play.Played.save": lambda made, at: made.played.save(at),
    "play.play": lambda made, at: play(Negotiation(), [made.player] * 2, 1, illegal="random", path=at),
    "refinement.Trace.save": lambda made, at: made.trace.save(at),
    "refinement.Traces.save": lambda made, at: Traces([made.trace]).save(at),
    "refinement.Traces.save_data": (
        lambda made, at: Traces([made.trace]).save_data(at, IterativeRefiner(made.player))
    ),
    "constitutional.Constitution.save": lambda made, at: made.constitution.save(at),
    "card": card,
    "stepper": stepper,
    "adversarial.AdversarialFilter": (
        lambda made, at: AdversarialFilter(
            made.player, lambda p, c, **k: [1.0] * len(c), n_samples=2, ledger=at
        ).screen(["a"])
    ),
    "trainer.SelfPlayTrainer.start_anew": lambda made, at: run(at).start_anew(),
    "trainer.SelfPlayTrainer.train": lambda made, at: run(at).train(),
    "pipeline.RLHFOrchestrator.forget": lambda made, at: orchestrator(made, at).forget(0),
    "pipeline.RLHFOrchestrator.run_sft, fresh": (
        lambda made, at: orchestrator(made, at).run_sft([dict(prompt="a", completion="b")], fresh=True)
    ),
    "cli.export": export,
    "gpu.save": lambda made, at: gpu.save(gpu.Table("a card", "now", {}), at),
    "doctor.random_model_folder": lambda made, at: doctor.random_model_folder(
        doctor.Shape(1, 32, 32, 2, 2, 16, 400), at
    ),
    "callbacks.control": lambda made, at: callbacks.control(at, stop=True),
    "callbacks.take_control": lambda made, at: callbacks.take_control(at),
    "base.tiny_model_folder": lambda made, at: model.tiny_model_folder(at),
    "base.convert_gguf": lambda made, at: model.convert_gguf(Path("none.gguf"), at),
    "policy.write_model": lambda made, at: write_model(made.base, at),
}
NO_FILES = {  # names that sound like it
    "doctor.fetch_data": "only where no file of that name is, see test_first_cells.py",
    "policy.Policy.delete": "takes an adapter out of memory",
    "reward_model.RewardModel.delete": "likewise",
    "callbacks.read_control": "reads",
    "pipeline.RLHFOrchestrator.folder": "says where",
    "templates.control_tokens": "looks at a tokenizer",
    "trainer.SelfPlayTrainer.save": "in a run that is its own",
    "trainer.SelfPlayTrainer.begin_anew": "likewise",
    "base.fetch_wheel": "in a temporary folder",
    "base.wheel_model_folder": "see test_model.py",
}


@pytest.fixture(scope="module")
def made(tiny_folder):
    "What there is to save."
    base = Base.load(tiny_folder, dtype=torch.float32, device="cpu")
    transcript = Transcript("g", 0, ["a", "b"], 0, 0, [0, 1], [], [1.0, 0.0], None, "")
    constitution = Constitution([Principle("be short", pattern=".*")])
    return types.SimpleNamespace(
        base=base,
        policy=Policy(base, "mine", r=2),
        reward=RewardModel(base, "graded", r=2),
        player=Scripted(lambda p, rng: "1"),
        trace=Trace("q", [Version("a")]),
        constitution=constitution,
        played=Played([transcript]),
    )


def tried(made, call, home: Path, place: Path, places=PLACES):
    "Call it at every place of the project; returns what it has changed, and errors that say nothing."
    wrong = []
    before = photograph(home)
    for at in places:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                call(made, place / at)
            except (ValueError, OSError, RuntimeError, SafetensorError) as e:
                if len(str(e).split()) < 4:
                    wrong.append((at, f"says only {e!r}"))
            except Exception as e:
                wrong.append((at, f"{type(e).__name__}: {e}", traceback.format_exc()[-600:]))
        now = photograph(home)
        changed = sorted(
            n
            for n in before
            if now.get(n) != before[n] and not (n in now and before[n][0] == now[n][0] == "folder")
        )
        if changed:
            wrong.append((at, f"changed {changed[:5]}"))
        before = now if changed else before
        for new in sorted(now.keys() - before.keys(), reverse=True):  # what it made is its own
            if now[new][0] == "folder":
                (home / new).rmdir()
            else:
                (home / new).unlink()
    return wrong


@pytest.mark.parametrize("name", WRITERS)
def test_what_others_made_stays(made, tmp_path, name):
    place = project(tmp_path / "home")
    assert not tried(made, WRITERS[name], tmp_path / "home", place)
    for f in place.rglob("*"):
        if f.is_dir() and not f.is_symlink():
            f.chmod(0o755)


@pytest.mark.skipif(
    not hasattr(os, "fork") or os.geteuid() != 0, reason="needs root, to become somebody else"
)
def test_what_others_made_stays_for_a_user_who_may_not_write_everywhere(made):
    "All of the table in a process of the user nobody, to whom half of the project does not belong."
    with tempfile.TemporaryDirectory() as top:
        home = Path(top) / "home"
        place = project(home)
        Path(top).chmod(0o755)
        mine = [f for f in [home, *home.rglob("*")] if "closed" not in f.parts and ".git" not in f.parts]
        for f in mine:
            os.chown(f, 65534, 65534, follow_symlinks=False)
        before, answer = photograph(home), Path(top) / "answer"
        answer.touch()
        answer.chmod(0o666)
        child = os.fork()
        if not child:
            try:
                signal.alarm(300)
                torch.set_num_threads(1)
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
                os.environ["HOME"] = str(home)
                tempfile.tempdir = None
                os.chdir("/")
                places = [
                    p
                    for p in PLACES
                    if not p.startswith(("model/", "adapter", "data", "notes", "control", "refinement"))
                ]
                found = {name: tried(made, call, home, place, places) for name, call in WRITERS.items()}
                answer.write_text(
                    json.dumps({"wrong": {k: v for k, v in found.items() if v}, "who": os.getuid()})
                )
            except BaseException:
                answer.write_text(json.dumps({"wrong": traceback.format_exc()[-1500:], "who": os.getuid()}))
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        told = json.loads(answer.read_text() or "{}")
        assert told == {"wrong": {}, "who": 65534}
        assert all(photograph(home).get(n, (0, 0, 0))[3:] == v[3:] for n, v in before.items())


def public():
    "Every public function and method of the library, as `module.name` or `module.Class.name`."
    for info in pkgutil.walk_packages(selfplay_nb.__path__, "selfplay_nb."):
        last = info.name.rsplit(".", 1)[1]
        if info.ispkg or last.startswith("_"):
            continue
        module = importlib.import_module(info.name)
        for name in getattr(module, "__all__", ()):
            x = getattr(module, name)
            if inspect.isfunction(x):
                yield f"{last}.{name}"
            if isinstance(x, type) and x.__module__ == module.__name__:
                yield from (
                    f"{last}.{name}.{k}"
                    for k, v in vars(x).items()
                    if inspect.isfunction(v) and not k.startswith("_")
                )


def test_nothing_new_that_writes_is_missing():
    known = {n.split(",")[0] for n in WRITERS} | set(NO_FILES)
    new = [n for n in public() if TELLING.search(n.rsplit(".", 1)[1].lower()) and n not in known]
    assert not new, (
        "does it write, replace or delete files? Then it belongs into WRITERS, else into NO_FILES with a"
        f" word: {new}"
    )
    assert {"checkpoint.prune", "policy.Policy.save"} <= set(public())  # they are found
