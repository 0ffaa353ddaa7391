"""No reader of foreign text takes long: a text twice as long takes about twice as long, or only so much of it
is looked at.

`READERS` has every reader; a public function with a parameter that is named like a text is there or, with
a reason, in `NO_READERS`.
"""

import ast
import functools
import gc
import importlib.util
import json
import threading
import time
from pathlib import Path

import pytest

from selfplay_nb.core import answers, checks, pairs, players, templates
from selfplay_nb.games import debate
from selfplay_nb.games import play as games
from selfplay_nb.methods import constitutional, game_training, refinement, skill
from selfplay_nb.scale import endpoint
from selfplay_nb.scoring import judge, reward
from selfplay_nb.stats import diversity
from selfplay_nb.tasks import code as code_tasks
from selfplay_nb.tasks import creative, reasoning
from selfplay_nb.views import widgets

ROOT = Path(__file__).parents[1]

# hostile texts: what is repeated, and with what the text begins

PARTS = [
    "a",
    "9",
    "9,",
    "1/",
    "(",
    "[",
    "{",
    "\\",
    "\\boxed{",
    "\\frac{1}",
    "½ ",
    "Answer: ",
    "answer" + " " * 40,
    "#### ",
    "not 1 ",
    "\n",
    " ",
    "\t",
    "```\n",
    "```",
    "def f(a, b):\n",
    "    x = (\n",
    "\"",
    "'a ",
    "**",
    "O-",
    "x(0,0) ",
    "PROPOSE: 1 book\n",
    "1 book, ",
    "0123456789abcdef\n",
    "0123456789abcde",
    "Ann: b\n",
    "- a\n",
    "a. ",
    "e\u0301\u0301",
    "<|im_",
    "</",
    "the of ",
    "may ",
    "no need ",
    "look ",
    "https://",
    "Lee and Ito, ",
    "{\"a\":",
]
STARTS = {
    "": PARTS,
    "```\t": [" ", "\t", "\n"],
    "def f(a, b):\n    return (\n": ["1,\n", "\n", "return (\n"],
    "def f(a, b):\n    \"\"\"": ["x\n", " "],
    "PROPOSE: ": [" ", "1 book, ", "9"],
    "no issues ": ["!", " "],
    "Dear a\n": ["\n", "b\n"],
    "0123456789abcdef\n": ["x\n", "\n"],
}
SHAPES = [(start, part) for start, parts in STARTS.items() for part in parts]
SHAPES += ["different words", "words in turn"]


@functools.lru_cache(8)
def text_of_shape(shape, n) -> str:
    if shape == "different words":
        return " ".join(f"w{i}" for i in range(n // 7 + 1))[:n]
    if shape == "words in turn":
        return " ".join("ab cd ef cd"[3 * (i % 4) : 3 * (i % 4) + 2] for i in range(n // 3 + 1))[:n]
    start, part = shape
    return (start + part * (n // len(part) + 1))[: n - 2] + " x"


# the readers


def lenient(read):
    "Refusals are answers too, if they are no longer than a line or two."

    @functools.wraps(read)
    def run(*args):
        try:
            return read(*args)
        except ValueError as e:
            assert len(str(e)) < 1000

    return run


MOVES = [f"x({i},{j})" for i in range(3) for j in range(3)] + ["O-O", "O-O-O", "take 1", "take 10"]
POOL, MARK = dict(book=3, hat=1), "0123456789abcdef"
CODE = 'import os\n\ndef f(a, b):\n    """Add."""\n'
SPEC = dict(
    length=[5, 9],
    sentences=[1, 2],
    must=["key"],
    forbidden=["very"],
    tone="calm",
    persona="Mira",
    speakers=["Mira", "Otto"],
    prose=True,
)
ASKED = "How long does it take to learn the piano?"
TALK = creative.Persona("Ida", "a pilot"), creative.Persona("Tom", "a baker")


def at_pieces(f):
    "A reader of several texts, given the thirds of one."
    return lambda t: f([t[: len(t) // 3], t[len(t) // 3 : 2 * len(t) // 3], t[2 * len(t) // 3 :]])


def checked(name, asked, t):
    return creative.CHECKS[name](t, asked)


def filled(t):
    return templates.fill(judge.TEMPLATE, ("<|im_end|>",), None, {"rubric": "r"}, prompt=t, a=t, b=t)


def spec_reward(t):
    return creative.SpecReward()([""], [t], [json.dumps(SPEC | dict(form="script"))])


def a_word_more(t):
    return refinement.word_diff(t, t[: len(t) // 2] + " b " + t[len(t) // 2 :])


def formula(t):
    return reasoning._fits(reasoning._bare(answers.answer_in(t)), "x^2", reasoning._POLYNOMIAL)


def conversation_of(t):
    return creative.Conversation(TALK, "a key", [creative.Said(i % 2, [], t[i::3]) for i in range(3)])


def debated():
    return debate.Debate(judge.RuleJudge(lambda p, a, b: 0.5)).start(0)


def dialogue_checked(t):
    return creative.check_dialogue(conversation_of(t[: len(t) // 3]))


@lenient
def as_spec(t):
    return creative.SpecReward()([""], ["A key."], [t])


@lenient
def jsonl(t):
    JSONL.write_text(t.replace("\r", "") + "\n", encoding="utf-8")
    return pairs.load_rows(JSONL, "prompts")


READERS = {
    "answers.answer_in": answers.answer_in,
    "endpoint.read_reply": lambda t: endpoint.read_reply({"choices": [{"message": {"content": t}}]}),
    "answers.read_number": answers.read_number,
    "answers.one_spelling": answers.one_spelling,
    "answers.last_number": answers.last_number,
    "answers.gold_numbers": lenient(lambda t: answers.gold_numbers([t])),
    "answers.denied": lambda t: answers.denied(t, len(t) // 2, len(t) // 2 + 1),
    "reward.near_number": lambda t: reward.near_number(20)([""], [t], answer=[5]),
    "reward.finished": lambda t: reward.finished([""], [t]),
    "templates.escape_special": lambda t: templates.escape_special(t, ("<|im_end|>", "<s>")),
    "templates.clip": lambda t: templates.clip(t, 2000),
    "templates.fence_mark": templates.fence_mark,
    "templates.fill": filled,
    "judge.without_mark": lambda t: judge.without_mark(t, MARK),
    "code.extract_code": lambda t: code_tasks.extract_code(t, CODE, "f"),
    "reasoning.knights": lambda t: reasoning.KnightsAndKnaves(3).verifier([""], [t], answer=["Ann"]),
    "reasoning.syllogisms": lambda t: reasoning.Syllogisms(2).verifier([""], [t], answer=["yes"]),
    "reasoning.formulas": formula,
    **{f"creative.check_{name}": functools.partial(checked, name, asked) for name, asked in SPEC.items()},
    "creative.check_form": lambda t: [creative.check_form(t, form) for form in creative.FORMS],
    "creative.SpecReward": spec_reward,
    "creative.spec": as_spec,
    "creative.similarities": at_pieces(creative.similarities),
    "creative.check_dialogue": dialogue_checked,
    "creative.Conversation.view": lambda t: conversation_of(t).view(1),
    "constitutional.RULES": lambda t: [rule(t, ASKED) for rule in constitutional.RULES.values()],
    "constitutional.Lexicon.found": constitutional.Lexicon("may|no proof", "no proof[^.]*").found,
    "constitutional.substance": lambda t: constitutional.substance(t, t[::-1]),
    "play.find_move": lenient(lambda t: games.find_move(t, MOVES)),
    "play.prompt after an illegal answer": lambda t: retry(t),
    "debate.parse_take": lenient(lambda t: debate.parse_take(t, POOL)),
    "debate.parse_message": lenient(lambda t: debate.parse_message(t, POOL, MARK)),
    "debate.conversation": lambda t: debate.conversation("head", [("I", t), ("you", t)], "ask"),
    "debate.DebateState.move": lenient(lambda t: debated().move(t)),
    "diversity.words": diversity.words,
    "diversity.distinct": at_pieces(diversity.distinct),
    "diversity.compression_ratio": at_pieces(diversity.compression_ratio),
    "diversity.self_bleu": at_pieces(diversity.self_bleu),
    "refinement.fenced_texts": refinement.fenced_texts,
    "refinement.finds_nothing": refinement.finds_nothing,
    "refinement.word_diff": lambda t: refinement.word_diff(t, t[::-1]),
    "refinement.word_diff, one word more": a_word_more,
    "refinement.diff_text": lambda t: refinement.diff_text(t, t + "b"),
    "refinement.diff_html": lambda t: refinement.diff_html(t[1:], t),
    "checks.printed": checks.printed,
    "checks.escape": checks.escape,
    "game_training.SticksState.move": lenient(lambda t: game_training.SticksState(9).move(t)),
    "pairs.loops": pairs.loops,
    "pairs.question_key": pairs.question_key,
    "pairs.form": pairs.form,
    "pairs.same_questions": lambda t: pairs.same_questions([t, t + "?"])(t[::-1]),
    "pairs.load_rows": jsonl,
    "pairs.validate_pairs": lambda t: pairs.validate_pairs([dict(prompt="q", chosen=t, rejected=t[::-1])]),
    "players.prompt_text": players.prompt_text,
    "players.text_of": players.text_of,
    "players.as_prompts": lenient(lambda t: players.as_prompts([t])),
    "skill.at_level": lenient(lambda t: skill.at_level(t, "<expert>")),
    "skill.without_level": skill.without_level,
    "widgets.preformatted": widgets.preformatted,
}
JSONL, TICTACTOE = None, None


def retry(t):
    live = games.LiveGame(TICTACTOE, 0, ["a", "b"])
    live.take(t)
    return live.prompt


FLOOR = 0.002  # seconds: what takes less says nothing about growth
SIZES = 1000, 6000, 36_000, 200_000  # 400,000 characters are twice the last


def seconds(read, shape, n):
    text = text_of_shape(shape, n)
    gc.disable()
    try:
        begun = time.process_time()
        read(text)
        return time.process_time() - begun
    finally:
        gc.enable()


def too_fast(read, shape, n) -> str | None:
    """Whether twice the text takes more than 2.5 times as long: the best of seven, so that a busy machine is
    no finding.
    """
    once, twice = (seconds(read, shape, m) for m in (n, 2 * n))
    for _ in range(6):
        if twice < max(2.5 * once, 4 * FLOOR):
            return
        once = min(once, seconds(read, shape, n))
        twice = min(twice, seconds(read, shape, 2 * n))
    return f"{shape!r}: {once:.4f} s for {n} characters, {twice:.4f} s for twice as many"


def grows(read, shape) -> str | None:
    "What is wrong with a reader's time on a shape at three looks, of which a busy machine may slow one."
    for _ in range(3):
        wrong = grows_once(read, shape)
        if not wrong:
            return None
    return wrong


def grows_once(read, shape) -> str | None:
    "Growth that goes on, twice over, or seconds."
    for n in SIZES:
        once = seconds(read, shape, n)
        if once > FLOOR:
            once = min(once, seconds(read, shape, n))  # a size that is slow for once says nothing
        if once > FLOOR:
            break
    if once > 3:
        return f"{shape!r}: {once:.1f} s for {n} characters"
    return too_fast(read, shape, n) and too_fast(read, shape, 2 * n)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    "Imports and caches come first, so that they count for nobody."
    global JSONL, TICTACTOE
    JSONL = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    TICTACTOE = Grid()


class Grid:
    "Nine moves, and nothing else."

    name, seats = "grid", 1

    def start(self, seed):
        return self

    seat = 0
    legal = MOVES
    prompt = "Move."
    outcome = None

    def move(self, text):
        pass


# every fifth shape for each reader, other ones for the next; all for all of them in `make test-long`
FIFTHS = [
    pytest.param(name, k, marks=() if k == i % 5 else pytest.mark.long)
    for i, name in enumerate(READERS)
    for k in range(5)
]


@pytest.mark.parametrize("name, k", FIFTHS)
def test_time_grows_no_faster_than_the_text(prepared, name, k):
    read = READERS[name]
    read("It is 7.")
    assert list(filter(None, (grows(read, shape) for shape in SHAPES[k::5]))) == []


def test_a_reader_that_grows_faster_would_be_found():
    def quadratic(t):
        return sum(t.count(t[i : i + 3]) for i in range(0, len(t), 10))

    # a busy machine may hide it for once
    assert any(grows(quadratic, ("", "a")) for _ in range(5))
    assert not grows(lambda t: [c for c in t], ("", "a"))


# every public function that takes a text is a reader, or is known to be none

NAMED_LIKE_A_TEXT = {
    "text",
    "texts",
    "answer",
    "answers",
    "prompt",
    "prompts",
    "completion",
    "completions",
    "response",
    "critique",
    "message",
    "old",
    "new",
    "talk",
    "samples",
    "data",
    "pairs",
    "entry",
    "title",
    "code",
}

NO_READERS = {
    "called by a reader above, with the same text": (
        """
        answers.answer_and_rest reward.exact_number code.defined creative.SpecReward.parts
        creative.CreativeTask.verifier constitutional.Lexicon.why constitutional.Grounded.why
        constitutional.render play.LiveGame.take debate.NegotiationState.move judge.ModelJudge.render
        pairs.question diversity.adjusted_distinct diversity.diversity
        reasoning.KnightsAndKnaves.verifier constitutional.ConstitutionalRewardWrapper.score
        constitutional.ConstitutionalRewardWrapper.attribution
        constitutional.ConstitutionalRewardWrapper.evaluate_principle refinement.Trace.criticise
        reasoning.Syllogisms.verifier game_viewer.PlaySeat.choose refinement_stepper.RefinementStepper.show
        constitution_card.ConstitutionCard.show widgets.RatingWidget.show game_viewer.PlaySeat.show
        steps.run_frames
        reward.WeightedReward.parts players.content_of widgets.framed
        """
    ),
    "reads the game's own lines of a prompt, or plays a move that was read before": (
        "debate.read_view play.TextArenaState.move play.OpenSpielState.move"
    ),
    "a process of its own with a deadline (see below)": (
        "reasoning.math_equal reasoning.graded reasoning.fully_right"
    ),
    "runs programs in the sandbox, with limits of its own": (
        "code.check_code code.verdicts code.mutants"
    ),
    "hands texts to a model or a judge, which has its context as a limit": (
        """
        endpoint.Endpoint.generate endpoint.Endpoint.sample endpoint.Endpoint.label_logprobs
        server.probe server.ServedPolicy.sample
        workers.SpreadPlayer.sample workers.sample_unit
        competitive.CompetitiveSelfPlay.train_step constitutional.ConstitutionalReviser.revise
        constitutional.ai_feedback league.train_step base.encode base.completion_ids policy.logprobs
        policy.sample policy.generate base.spell base.whole_characters sampling.requests
        policy.answer_logprobs skill.Guidance.contexts reward_model.RewardModel.train
        reward_model.RewardModel.scores
        players.answers_of players.Scripted.generate refinement.refine refinement.refine_batch
        refinement.begin skill.collect skill.sample skill.generate skill.AtLevel.generate
        league.PolicySnapshot.generate trainer.train trainer.check_prompts vitals.kl_to_base
        vitals.vitals update.dpo update.tokenize_pairs judge.Judge.compare judge.check
        pipeline.run_self_play pipeline.run_policy_optimization diversity.embed update.token_logprobs
        rounds.group_rewards
        """
    ),
    "says what a user's own class has to offer": (
        "protocols.Judge.compare protocols.Position.move protocols.Player.generate sampling.Guide.contexts"
    ),
    "measures with prompts of its own": (
        """
        costs.our_round costs.our_dpo costs.trl_dpo costs.our_online costs.luck costs.brevity
        costs.literal_round costs.trl_online costs.our_sampling costs.peft_sampling costs.llama_cpp
        """
    ),
    "counts or copies rows, numbers or the library's own messages": (
        """
        constitutional.evaluate reward.rows_of reward.is_single skill.skill_rows diversity.entropy
        ratings.Games.add callbacks.Progress.on_progress callbacks.Live.on_progress pairs.write_whole
        trainer.warn rounds.answer_rows sampling.batches task.as_task trainer.progress collectors.named
        pipeline.StageRun.progress pipeline.StageRun.warn rounds.Run.progress rounds.Run.warn
        workers.UnitRun.progress workers.UnitRun.warn evaluation.game_row pipeline.check_stage
        """
    ),
}


def public_functions():
    "(module, qualified name, parameters) of what users can call with a text."
    for file in sorted((ROOT / "selfplay_nb").rglob("[a-z]*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            inside = (
                [(f"{node.name}.", m) for m in node.body]
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
                else []
            )
            for owner, f in [("", node), *inside]:
                if isinstance(f, ast.FunctionDef) and not f.name.startswith("_"):
                    yield f"{file.stem}.{owner}{f.name}", {a.arg for a in [*f.args.args, *f.args.kwonlyargs]}


def test_every_public_function_that_takes_a_text_is_tried_or_has_a_reason():
    reasons = [name for names in NO_READERS.values() for name in names.split()]
    every = dict(public_functions())
    missing = [
        name
        for name, parameters in every.items()
        if parameters & NAMED_LIKE_A_TEXT and name not in {*READERS, *reasons}
    ]
    assert missing == [], "a new reader of texts: give it to READERS, or say in NO_READERS why it needs none"
    assert [name for name in reasons if name not in every] == [] and len(set(reasons)) == len(
        reasons
    ), "what is gone needs no reason"


# others' libraries may hang: they run in a process that is stopped, and nothing of a call outlives it

needs_math = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason='pip install "selfplay_nb[reasoning]"'
)
HANGS = [
    r"\sum_{n=1}^{999999999} \frac{1}{n}",
    r"\prod_{n=1}^{99999} n",
    "(x+y+z+w)^{400}",
    r"\int_0^1 e^{e^{x}} dx",
]


@needs_math
def test_a_formula_that_takes_for_ever_is_given_up_and_leaves_no_thread():
    assert reasoning.math_equal([""], ["Answer: x+1"], answer=["1+x"]) == [1]
    reasoning._worker.stop()
    before = set(threading.enumerate())
    begun = time.monotonic()
    assert reasoning.math_equal([""] * 2, [f"Answer: {h}" for h in HANGS[:2]], answer=["x^2"] * 2) == [0, 0]
    assert time.monotonic() - begun < 120
    reasoning._worker.stop()
    assert set(threading.enumerate()) <= before
