"""No reader of foreign text takes long: a text twice as long takes about twice as long, or only so much of it is looked at.

`READERS` has every reader; a public function with a parameter that is named like a text is there or, with a reason, in `NO_READERS`."""
import ast
import functools
import gc
import itertools
import json
import threading
import time
from pathlib import Path

import pytest

from selfplay_nb import answers, code_tasks, constitutional, creative, debate, diversity, games, judge, pairs, players, reasoning, refinement, reward
from selfplay_nb import skill, templates, widgets
from selfplay_nb.games import OpenSpielGame

ROOT = Path(__file__).parents[1]

# hostile texts: what is repeated, and with what the text begins

PARTS = ["a", "9", "9,", "1/", "(", "[", "{", "\\", "\\boxed{", "\\frac{1}", "½ ", "Answer: ", "answer" + " "*40, "#### ", "not 1 ", "\n", " ", "\t",
         "```\n", "```", "def f(a, b):\n", "    x = (\n", "\"", "'a ", "**", "O-", "x(0,0) ", "PROPOSE: 1 book\n", "1 book, ",
         "0123456789abcdef\n", "0123456789abcde", "Ann: b\n", "- a\n", "a. ", "e\u0301\u0301", "<|im_", "</", "the of ", "may ", "no need ", "look ",
         "https://", "Lee and Ito, ", "{\"a\":"]
STARTS = {"": PARTS, "```\t": [" ", "\t", "\n"], "def f(a, b):\n    return (\n": ["1,\n", "\n", "return (\n"], "def f(a, b):\n    \"\"\"": ["x\n", " "],
          "PROPOSE: ": [" ", "1 book, ", "9"], "no issues ": ["!", " "], "Dear a\n": ["\n", "b\n"], "0123456789abcdef\n": ["x\n", "\n"]}
SHAPES = [(start, part) for start, parts in STARTS.items() for part in parts] + ["different words", "words in turn"]

@functools.lru_cache(8)
def text_of_shape(shape, n) -> str:
    if shape == "different words": return " ".join(f"w{i}" for i in range(n//7 + 1))[:n]
    if shape == "words in turn": return " ".join("ab cd ef cd"[3*(i % 4):3*(i % 4) + 2] for i in range(n//3 + 1))[:n]
    start, part = shape
    return (start + part*(n//len(part) + 1))[:n - 2] + " x"


# the readers

def lenient(read):
    "Refusals are answers too, if they are no longer than a line or two."
    @functools.wraps(read)
    def run(*args):
        try: return read(*args)
        except ValueError as e: assert len(str(e)) < 1000
    return run

MOVES = [f"x({i},{j})" for i in range(3) for j in range(3)] + ["O-O", "O-O-O", "take 1", "take 10"]
POOL, MARK = dict(book=3, hat=1), "0123456789abcdef"
CODE = 'import os\n\ndef f(a, b):\n    """Add."""\n'
SPEC = dict(length=[5, 9], sentences=[1, 2], must=["key"], forbidden=["very"], tone="calm", persona="Mira", speakers=["Mira", "Otto"], prose=True)
ASKED = "How long does it take to learn the piano?"
TALK = creative.Persona("Ida", "a pilot"), creative.Persona("Tom", "a baker")

def at_pieces(f):
    "A reader of several texts, given the thirds of one."
    return lambda t: f([t[:len(t)//3], t[len(t)//3:2*len(t)//3], t[2*len(t)//3:]])

def conversation_of(t): return creative.Conversation(TALK, "a key", [creative.Said(i % 2, [], t[i::3]) for i in range(3)])
def debated(): return debate.Debate(judge.RuleJudge(lambda p, a, b: .5)).start(0)
def dialogue_checked(t): return creative.check_dialogue(conversation_of(t[:len(t)//3]))

@lenient
def as_spec(t): return creative.SpecReward()([""], ["A key."], [t])

@lenient
def jsonl(t):
    JSONL.write_text(t.replace("\r", "") + "\n", encoding="utf-8")
    return pairs.load_rows(JSONL, "prompts")

READERS = {
    "answers.answer_in": answers.answer_in, "answers.read_number": answers.read_number,
    "answers.last_number": answers.last_number, "answers.gold_numbers": lenient(lambda t: answers.gold_numbers([t])),
    "answers.denied": lambda t: answers.denied(t, len(t)//2, len(t)//2 + 1),
    "reward.near_number": lambda t: reward.near_number(20)([""], [t], answer=[5]),
    "reward.finished": lambda t: reward.finished([""], [t]),
    "templates.escape_special": lambda t: templates.escape_special(t, ("<|im_end|>", "<s>")), "templates.clip": lambda t: templates.clip(t, 2000),
    "templates.fence_mark": templates.fence_mark,
    "templates.fill": lambda t: templates.fill(judge.TEMPLATE, ("<|im_end|>",), None, {"rubric": "r"}, prompt=t, a=t, b=t),
    "judge.without_mark": lambda t: judge.without_mark(t, MARK),
    "code_tasks.extract_code": lambda t: code_tasks.extract_code(t, CODE, "f"),
    "reasoning.knights": lambda t: reasoning.KnightsAndKnaves(3).verifier([""], [t], answer=["Ann"]),
    "reasoning.syllogisms": lambda t: reasoning.Syllogisms(2).verifier([""], [t], answer=["yes"]),
    "reasoning.formulas": lambda t: reasoning._fits(reasoning._bare(answers.answer_in(t)), "x^2", reasoning._POLYNOMIAL),
    **{f"creative.check_{name}": functools.partial(lambda check, asked, t: check(t[:creative.LONGEST], asked), creative.CHECKS[name], asked)
       for name, asked in SPEC.items()},
    "creative.check_form": lambda t: [creative.check_form(t[:creative.LONGEST], form) for form in creative.FORMS],
    "creative.SpecReward": lambda t: creative.SpecReward()([""], [t], [json.dumps(SPEC | dict(form="script"))]), "creative.spec": as_spec,
    "creative.similarities": at_pieces(creative.similarities), "creative.check_dialogue": dialogue_checked,
    "creative.Conversation.view": lambda t: conversation_of(t).view(1),
    "constitutional.RULES": lambda t: [rule(t, ASKED) for rule in constitutional.RULES.values()],
    "constitutional.Lexicon.found": constitutional.Lexicon("may|no proof", "no proof[^.]*").found, "constitutional.substance": lambda t: constitutional.substance(t, t[::-1]),
    "games.find_move": lenient(lambda t: games.find_move(t, MOVES)), "games.prompt after an illegal answer": lambda t: retry(t),
    "debate.parse_take": lenient(lambda t: debate.parse_take(t, POOL)), "debate.parse_message": lenient(lambda t: debate.parse_message(t, POOL, MARK)),
    "debate.conversation": lambda t: debate.conversation("head", [("I", t), ("you", t)], "ask"),
    "debate.DebateState.move": lenient(lambda t: debated().move(t)),
    "diversity.words": diversity.words, "diversity.distinct": at_pieces(diversity.distinct),
    "diversity.compression_ratio": at_pieces(diversity.compression_ratio), "diversity.self_bleu": at_pieces(diversity.self_bleu),
    "refinement.fenced_texts": refinement.fenced_texts, "refinement.finds_nothing": refinement.finds_nothing,
    "refinement.word_diff": lambda t: refinement.word_diff(t, t[::-1]), "refinement.word_diff, one word more": lambda t: refinement.word_diff(t, t[:len(t)//2] + " b " + t[len(t)//2:]),
    "refinement.diff_text": lambda t: refinement.diff_text(t, t + "b"), "refinement.diff_html": lambda t: refinement.diff_html(t[1:], t),
    "pairs.loops": pairs.loops, "pairs.question_key": pairs.question_key, "pairs.form": pairs.form,
    "pairs.same_questions": lambda t: pairs.same_questions([t, t + "?"])(t[::-1]), "pairs.load_rows": jsonl,
    "pairs.validate_pairs": lambda t: pairs.validate_pairs([dict(prompt="q", chosen=t, rejected=t[::-1])]),
    "players.prompt_text": players.prompt_text, "players.text_of": players.text_of, "players.as_prompts": lenient(lambda t: players.as_prompts([t])),
    "skill.at_level": lenient(lambda t: skill.at_level(t, "<expert>")), "skill.without_level": skill.without_level,
    "widgets.preformatted": widgets.preformatted,
}
JSONL, TICTACTOE = None, None

def retry(t):
    live = games.LiveGame(TICTACTOE, 0, ["a", "b"])
    live.take(t)
    return live.prompt

FLOOR = .002  # seconds: what takes less says nothing about growth
SIZES = 1000, 6000, 36_000, 200_000, 500_000  # a million characters are twice the last

def seconds(read, shape, n):
    text = text_of_shape(shape, n)
    gc.disable()
    try:
        begun = time.process_time()
        read(text)
        return time.process_time() - begun
    finally: gc.enable()

def grows(read, shape) -> str | None:
    "What is wrong with a reader's time on a shape, if anything."
    for n in SIZES:
        once = seconds(read, shape, n)
        if once > FLOOR: break
    twice = seconds(read, shape, 2*n)
    for _ in range(6):
        if twice < max(2.5*once, 5*FLOOR): break
        once, twice = min(once, seconds(read, shape, n)), min(twice, seconds(read, shape, 2*n))
    if twice > 3: return f"{shape!r}: {twice:.1f} s for {2*n} characters"
    if twice >= max(2.5*once, 5*FLOOR): return f"{shape!r}: {once:.4f} s for {n} characters, {twice:.4f} s for twice as many"

@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    "Imports and caches come first, so that they count for nobody."
    global JSONL, TICTACTOE
    JSONL = tmp_path_factory.mktemp("rows")/"rows.jsonl"
    TICTACTOE = Grid()

class Grid:
    "Nine moves, and nothing else."
    name, seats = "grid", 1
    def start(self, seed): return self
    seat, legal, prompt, outcome = 0, MOVES, "Move.", None
    def move(self, text): pass

@pytest.mark.parametrize("name", READERS)
def test_time_grows_no_faster_than_the_text(prepared, name):
    read = READERS[name]
    read("It is 7.")
    assert list(filter(None, (grows(read, shape) for shape in SHAPES))) == []

def test_a_reader_that_grows_faster_would_be_found():
    def quadratic(t): return sum(t.count(t[i:i+3]) for i in range(0, len(t), 40))
    assert grows(quadratic, ("", "a")) and not grows(lambda t: [c for c in t], ("", "a"))
