"""What a model or a person wrote is text, wherever it is shown: no code for a terminal, no markup, no turned
direction, no page of a gigabyte.
"""

import ast
import importlib
import json
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pytest

import selfplay_nb
from selfplay_nb.core.checks import LONGEST, escape, printed
from selfplay_nb.core.pairs import Ledger
from selfplay_nb.core.players import Scripted
from selfplay_nb.games.play import Played, Transcript, Turn
from selfplay_nb.loop import callbacks
from selfplay_nb.loop.trainer import SelfPlayConfig
from selfplay_nb.methods.adversarial import AdversarialFilter, Findings, Screened
from selfplay_nb.methods.competitive import CompetitiveSelfPlay
from selfplay_nb.methods.constitutional import (
    Constitution,
    ConstitutionalReviser,
    ConstitutionalRewardWrapper,
    Principle,
)
from selfplay_nb.methods.league import LeagueTraining
from selfplay_nb.methods.refinement import IterativeRefiner, Step, Trace, Traces, Version
from selfplay_nb.methods.skill import SkillConditioning, check_levels
from selfplay_nb.scoring.evaluation import Evaluation, compare, evaluate, transcripts_html, versus
from selfplay_nb.scoring.human import HumanRatings
from selfplay_nb.scoring.judge import RewardJudge
from selfplay_nb.scoring.reward import Guarded, WeightedReward
from selfplay_nb.stats import ratings
from selfplay_nb.tasks.code import Verdict
from selfplay_nb.tasks.creative import Conversation, Persona, Said
from selfplay_nb.tasks.reasoning import Families
from selfplay_nb.tasks.sandbox import Result
from selfplay_nb.views.constitution_card import ConstitutionCard
from selfplay_nb.views.game_viewer import GameViewer, PlaySeat
from selfplay_nb.views.league_board import Board, BoardWidget
from selfplay_nb.views.monitor import Monitor, headline
from selfplay_nb.views.refinement_stepper import RefinementStepper
from selfplay_nb.views.scoreboard import Scoreboard
from selfplay_nb.views.widgets import RatingWidget, preformatted

LIBRARY = Path(selfplay_nb.__file__).parent
HOSTILE = {
    "a terminal's title and screen": "\x1b]0;owned\x07\x1b[2J\x1b[8m",
    "codes of eight bits": "\x9b2J\x9d0;x\x9c",
    "a line gone back": "harmless\r\x08\x08evil",
    "NUL and DEL": "a\x00b\x7f",
    "turned round": "\u202etxt.exe\u2066\u2069",
    "line separators": "a\u2028b\x85c",
    "invisible": "\ufeff\U000e0041\U000e0042",
    "half a character": "a\ud800b",
    "a script": "<script>alert(1)</script>",
    "the end of a frame": "</pre></td></table><iframe srcdoc='x'>",
    "an attribute": "\"' onmouseover='alert(1)\"><img src=x onerror=alert(1)>",
    "a comment": "<!-- -->]]><![CDATA[",
    "entities": "&lt;b&gt;&#60;i&#62;",
    "both": "<b\x1b[31m>\u202e</b>",
    "braces": "{0}{self.__class__}%s%n$\\href{javascript:alert(1)}{x}$",
}
FORBIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\U000e0000-\U000e007f\ud800-\udfff]"
)


class Skeleton(HTMLParser):
    "The tags and attributes of a page, and whatever else is no text."

    def __init__(self, page):
        super().__init__()
        self.parts = set()
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.parts.add((tag, *(k for k, _ in attributes)))

    def handle_endtag(self, tag):
        self.parts.add(f"/{tag}")

    def handle_comment(self, data):
        self.parts.add("comment")

    def handle_decl(self, data):
        self.parts.add("declaration")

    def unknown_decl(self, data):
        self.parts.add("declaration")

    def handle_pi(self, data):
        self.parts.add("instruction")


def pages(widget):
    "All HTML in a widget."
    if type(widget).__name__ == "HTML":
        yield widget.value
    for child in getattr(widget, "children", ()):
        yield from pages(child)


def player(text, name="player"):
    return Scripted(lambda prompt, rng: text, name)


def length(prompts, completions, **columns):
    return [float(len(c)) for c in completions]


def all_right(prompts, completions, **columns):
    return [1.0 for _ in completions]


def transcript(x):
    turns = [
        Turn(0, x, x, None, False, x),
        Turn(1, [{"role": "user", "content": x}], x, x, True, "", value=0.5),
    ]
    return Transcript(x, 1, [x, f"{x} 2"], 3, 0, [0, 1], turns, [1.0, 0.0], None, x)


def trace(x):
    versions = [Version(x, score=0.1), Version(x + " y", 0, 0.2), Version(x + " z", 0, 0.3, True, "limit")]
    return Trace(x, versions, [Step(0, x, x, 1), Step(0, x, x, 2), Step(2, x, x, None)], x, x, x)


def wrapper(x):
    return ConstitutionalRewardWrapper(
        None, Constitution([Principle("p " + x, pattern="(?s).*"), Principle("q " + x, rule="helpful")])
    )


def human(x, folder, rated):
    ratings = HumanRatings(folder / "human.jsonl", [dict(prompt=x, a=x, b=x + " b")] * 2, rater=x)
    if rated:
        ratings.rate("left")
        ratings.rate("tie")
    return ratings


def rating_widget(x, folder):
    widget = RatingWidget(human(x, folder, False), {x: [0.2, 0.7]})
    widget.press("q" + x)
    seen = [*pages(widget)]
    widget.press("1")
    widget.press("1")
    return [widget, *seen]


def league(x, folder):
    league = LeagueTraining(
        folder=folder / "league",
        anchors={"a": player("1", x), "b": player("2", x)},
        matchmaking={x: {"uniform": 1.0}},
    )
    league.record([dict(a="a", b="b", score=1.0, prompt=x, answer_a=x, answer_b=x)] * 3)
    return league


def run(x, folder):
    "A run's folder, as far as a report and a monitor look."
    (folder / "evaluations").mkdir()
    answers = [
        dict(prompt=x, answer=x, right=1.0, truncated=False),
        dict(prompt=[{"role": "user", "content": x}], answer=x, right=0.0, truncated=True),
    ]
    for r in 0, 1:
        (folder / "evaluations" / f"round_{r:03d}.json").write_text(json.dumps(answers))
    accuracy = dict(value=0.5, low=0.1, high=0.9, n=2)
    history = [
        dict(round=r, seconds=1.0, accuracy=accuracy, alarms=[x], unjudged=dict(share=0.5, first=x))
        for r in (0, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in history))
    (folder / "config.json").write_text("{}")
    live = dict(
        pid=1,
        time=0,
        round=1,
        total=3,
        stage="training",
        paused=False,
        tokens_per_second=1.0,
        memory_mb=1.0,
        seconds_left=3.0,
        settings={x: 0.1},
        last_pair=dict(prompt=x, chosen=x, rejected=x),
        stopping=x,
        refused=x,
    )
    (folder / "live.json").write_text(json.dumps(live))
    return history


def report(x, folder):
    task = type("Task", (), dict(name=x))()
    trainer = type(
        "Run",
        (),
        dict(dir=folder, history=run(x, folder), config=SelfPlayConfig(run_dir=x, model_name=x), task=task),
    )()
    callbacks.Report().on_train_end(trainer)
    return [(folder / "report.html").read_text(), callbacks.summary(folder)]


def monitor(x, folder):
    # without a curve, which takes its time
    rows = [{k: v for k, v in m.items() if k != "accuracy"} for m in run(x, folder)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in rows))
    view = Monitor(folder)
    return [view, view._still()["text/html"], headline(view.state)]


class Position:
    "Of a game whose every text is `x`."

    def __init__(self, x):
        self.x = x
        self.seat = 0
        self.legal = [x, "zz"]
        self.prompt = x
        self.outcome = None

    def copy(self):
        new = Position(self.x)
        vars(new).update(vars(self))
        return new

    def move(self, text):
        if text not in self.legal:
            raise ValueError(f"{text} is wrong")
        self.seat, self.outcome = (1, None) if self.seat == 0 else (None, [1.0, 0.0])

    def __str__(self):
        return self.x


def seat(x, folder):
    game = type("Game", (), dict(name=x, seats=2, perfect=False, start=lambda self, seed: Position(x)))()
    view = PlaySeat(game, type("Opponent", (), dict(name=x, act=lambda self, state, rng: state.legal[0]))())
    view.choose("nope" + x)
    before = [*pages(view)]
    view.choose(x)
    return [view, view._still()["text/html"], *before]


def failing_opponent(x, folder):
    def act(self, state, rng):
        raise RuntimeError(x)

    game = type("Game", (), dict(name=x, seats=2, perfect=False, start=lambda self, seed: Position(x)))()
    view = PlaySeat(game, type("Opponent", (), dict(name=x, act=act))(), seat=1)
    return [view]


def stepper(x, folder):
    view = RefinementStepper(IterativeRefiner(player(x)), trace=trace(x))
    first = [*pages(view)]
    view.slider.value = 1
    view.branch.value = 1
    view.show(x)
    return [view, view._still()["text/html"], *first]


def guarded(x, folder):
    def reward(prompts, completions, **columns):
        raise ValueError(x)

    reward = Guarded(reward)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reward(["a"] * 3, ["b"] * 3)
    return [reward, reward.first]


def ledger(x, folder):
    ledger = Ledger(folder / "pairs.jsonl")
    ledger.append([dict(prompt=x, chosen=x, rejected="r", source=x)])
    return [ledger, Ledger(folder / "pairs.jsonl")]


def viewer(x, folder):
    view = GameViewer([transcript(x)])
    first = [*pages(view)]
    view.step.value = 1
    return [view, view._still()["text/html"], *first]


def card(x, folder):
    view = ConstitutionCard(wrapper(x), x, x, x + "b", path=folder / "c.toml")
    view.file.value = "/proc/" + x
    view.save_button.click()
    return [view, view.static().data]


def screened(x, folder):
    s = Screened(dict(prompt=x), [x, x + "b"], [1.0, 0.0], [False] * 2)
    return [
        s,
        Findings([s], [s], dict(n_samples=2, round=0, policy=x, judge=x)),
        AdversarialFilter(player(x, x), length, n_samples=2),
    ]


def boards(x, folder):
    made = league(x, folder)
    return [made, Board(made), BoardWidget(made), made.matchmaking(role=x), made["a"], made.nash()]


def scores(x, folder):
    games = ratings.Games(
        [
            dict(a="a" + x, b="b" + x, score=1.0, prompt=x),
            dict(a="b" + x, b="a" + x, score=1.0, prompt=x + "1"),
        ]
    )
    return [
        games,
        ratings.bradley_terry(games),
        ratings.nash_averaging(games),
        ratings.cycles(games),
        Scoreboard(games, **{x: x, "other": Evaluation([])}),
    ]


def evaluations(x, folder):
    right, wrong = (Evaluation([dict(prompt=x, answer=x, right=v, truncated=False)]) for v in (1, 0))
    return [
        right,
        right.show(),
        compare(wrong, right),
        transcripts_html(wrong, right),
        evaluate(player(x), [dict(prompt=x)], all_right),
    ]


def duels(x, folder):
    one, two = player(x, x), player(x + "!", x + "2")
    duel = CompetitiveSelfPlay(one, two, length, n_samples=2)
    return [duel.train_step([x]), versus(one, two, [dict(prompt=x)], RewardJudge(length)), one]


def principles(x, folder):
    made = wrapper(x)
    detection = made.evaluate({"p " + x: [dict(prompt=x, clean=x, violated=x + "b")] * 2})
    reviser = ConstitutionalReviser(player(x, x), made.constitution)
    return [made, made.constitution, *made.constitution, made.attribution([x], [x]), detection, reviser]


def named(name, of=length):
    def reward(prompts, completions, **columns):
        return of(prompts, completions)

    reward.__name__ = name
    return reward


SHOWN = {
    "evaluations": evaluations,
    "report": report,
    "monitor": monitor,
    "board": boards,
    "scoreboard": scores,
    "seat": seat,
    "failing opponent": failing_opponent,
    "stepper": stepper,
    "guarded reward": guarded,
    "ledger": ledger,
    "viewer": viewer,
    "card": card,
    "screened": screened,
    "duel": duels,
    "principles": principles,
    "rating widget": rating_widget,
    "human ratings": lambda x, folder: [r := human(x, folder, True), r.report()],
    "open ratings": lambda x, folder: [human(x, folder, False)],
    "result": lambda x, folder: [r := Result("error", 1, x, x, 0.1, x, x), Verdict(1, 2, False, r)],
    "transcript": lambda x, folder: [transcript(x), Played([transcript(x)])],
    "trace": lambda x, folder: [trace(x), Traces([trace(x)]), IterativeRefiner(player(x, x))],
    "conversation": lambda x, folder: [Conversation((Persona(x, x), Persona(x, x)), x, [Said(0, [], x)])],
    "families": lambda x, folder: [
        Families([dict(family=x, category=x, levels=1, settings={x: 1}, question=x, answer=x)])
    ],
    "rewards": lambda x, folder: [WeightedReward({x: length}, {x: 1.0}), RewardJudge(named(x))],
    "levels": lambda x, folder: [
        check_levels(player(x, x), [dict(prompt=x)], all_right),
        SkillConditioning(player(x, x), length, n_samples=4),
    ],
    "text": lambda x, folder: [preformatted(x, x)],
}


def shown(things):
    "All that things show on a page and in a terminal: HTML, and plain text."
    html, plain = [], []
    for thing in things:
        if type(thing) is str:
            (html if thing.startswith(("<", "\n<")) else plain).append(thing)
        else:
            html += pages(thing)
            if hasattr(thing, "_repr_html_") and not hasattr(thing, "children"):
                html.append(thing._repr_html_())
            plain.append(repr(thing))
    return "<hr>".join(html), "\n".join(plain)


@pytest.fixture(scope="module")
def harmless(tmp_path_factory):
    found = {}

    def of(name):
        if name not in found:
            html, _ = shown(SHOWN[name]("harmless", tmp_path_factory.mktemp("harmless")))
            found[name] = Skeleton(html).parts
        return found[name]

    return of


@pytest.mark.parametrize("name", SHOWN)
def test_what_is_shown_is_text(tmp_path, harmless, name):
    # differences between words
    allowed = harmless(name) | {("ins",), "/ins", ("del",), "/del", ("b",), "/b"}
    for kind, x in HOSTILE.items():
        folder = tmp_path / kind
        folder.mkdir()
        html, plain = shown(SHOWN[name](x, folder))
        found = FORBIDDEN.search(html + plain)
        assert not found, (kind, (html + plain)[max(0, found.start() - 80) :][:160])
        assert Skeleton(html).parts <= allowed, (kind, Skeleton(html).parts - allowed)
        (html + plain).encode()


# word by word differences have a limit of their own
@pytest.mark.parametrize("name", [n for n in SHOWN if n not in ("trace", "stepper")])
def test_a_very_long_text_is_cut(tmp_path, name):
    html, plain = shown(SHOWN[name]("x" * 1_000_000, tmp_path))
    assert len(plain) < 12 * LONGEST and len(html) < 40 * LONGEST


def test_one_function_for_terminals_and_one_for_pages():
    "Every `__repr__` of the library is decorated, and nobody has an escape of their own."
    for file in LIBRARY.rglob("[a-z]*.py"):
        source = file.read_text()
        if file.stem != "checks":
            assert not re.search(r"^(from html |import html$)", source, re.MULTILINE), file
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.name == "__repr__":
                assert "printable" in [
                    ast.unparse(d) for d in node.decorator_list
                ], f"{file}, line {node.lineno}: `@printable` above it"


def test_classes_keep_their_names_and_documentation():
    kinds = [
        c
        for m in ("games.play", "stats.ratings", "models.policy", "loop.trainer")
        for c in vars(importlib.import_module(f"selfplay_nb.{m}")).values()
        if isinstance(c, type)
    ]
    assert all(c.__repr__.__name__ == "__repr__" for c in kinds if "__repr__" in vars(c))


@pytest.mark.parametrize(
    "text",
    ["plain\n\ttext", "é ñ 中文 日本語", "العربية‏ עברית", "👩‍💻 🏴", "می‌خواهم", "a\u00a0b", "x² ≤ −3"],
)
def test_other_scripts_are_text_too(text):
    assert printed(text) == text and escape(text) == text
