"""What users have is read as they mean it, what is held out is found in every spelling, and nothing that is
only read is changed.
"""

import json
import multiprocessing
import os
import subprocess
import sys

import pytest

from selfplay_nb.core import pairs
from selfplay_nb.core.pairs import Ledger, load_rows, question, question_key, same_questions, write_whole
from selfplay_nb.loop.pipeline import combine
from selfplay_nb.tasks.task import ArithmeticTask


def U(text):
    return dict(role="user", content=text)


def A(text):
    return dict(role="assistant", content=text)


# held out

HELD = [dict(role="system", content="You add numbers."), U("60 + 70 =")]
SAME = [
    "60 + 70 =",
    " 60 +  70 =\n",
    "60+70=",
    "６０ + 70 =",
    "60\u00a0+\u00a070\u200b =",
    [U("60 + 70 =")],
    dict(prompt="60 + 70 =", answer=130),
    [dict(role="system", content="Be brief."), U("60 + 70 =")],
    [U("1 + 1 ="), A("2"), U("60 + 70 =")],
    [U("60 + 70 ="), A("130"), U("1 + 1 =")],
    [dict(role="user", content=[dict(type="text", text="60 + 70 =")])],
]
OTHER = [
    "60 + 71 =",
    "160 + 70 =",
    "6 0 + 70 =",
    "60 - 70 =",
    [U("You add numbers."), A("60 + 70 =")],
    "You add numbers.",
]


@pytest.mark.parametrize("held", [HELD, "60 + 70 =", [U("60 + 70 =")], dict(prompt=HELD, answer=130)])
def test_a_held_out_question_is_found_in_every_spelling(held):
    asks = same_questions([held])
    assert all(asks(p) for p in SAME) and not any(asks(p) for p in OTHER)


@pytest.mark.parametrize(
    "a, b",
    [
        ("Wie groß?", "WIE GROSS?"),
        ("é = 1", "e\u0301 = 1"),
        ("5 − 3", "5 - 3"),
        ("“a”", '"a"'),
        ("x\u00ady", "xy"),
        ("ﬁve", "five"),
    ],
)
def test_spellings_of_unicode(a, b):
    assert (
        same_questions([a])(b)
        and same_questions([b])(a)
        and question(a) == question(b)
        and question_key(a) == question_key([U(b)])
    )


def test_what_many_prompts_share_tells_nothing():
    held = [[U(f"{i}?"), A("x"), U("Go on.")] for i in range(30)] + ["Go on!"]
    asks = same_questions(held)
    assert (
        asks(held[3])
        and not asks("Go on.")
        and not asks([U("other"), A("x"), U("Go on.")])
        and asks("Go on!")
    )
    # one question, two systems
    few = [[dict(role="system", content=s), U(f"{i} + 1 =")] for i in range(20) for s in ("Add.", "Think.")]
    assert same_questions(few)("7 + 1 =")


def test_a_function_is_taken_as_it_is_and_nothing_excludes_nothing():
    assert same_questions(len) is len and not same_questions([])("x")


def test_rows_are_excluded_as_prompts_are():
    evaluation = ArithmeticTask(2).problems("held-out", 50)
    asked = [p["prompt"][-1]["content"].replace(" ", "") for p in evaluation[:5]]
    rows = [dict(prompt=p, chosen="1", rejected="2") for p in [*asked, "1 + 1 ="]]
    assert [r["prompt"] for r in combine(rows, [], exclude=evaluation)] == ["1 + 1 ="]


# data


def test_ultrafeedbacks_form():
    import datasets

    talk = [U("a?"), A("b")]
    row = dict(
        prompt="a?",
        prompt_id="1",
        chosen=talk,
        rejected=[U("a?"), A("c")],
        messages=talk,
        score_chosen=9.0,
        score_rejected=8.0,
    )
    for data in [row], datasets.Dataset.from_list([row]):
        [pair] = load_rows(data, "preference")
        assert (
            pair["prompt"] == [U("a?")]
            and pair["chosen"] == "b"
            and pair["rejected"] == "c"
            and pair["score_chosen"] == 9.0
        )
        [demo] = load_rows(data, "sft")
        assert demo["prompt"] == [U("a?")] and demo["completion"] == "b" and "chosen" not in demo
    [turns] = load_rows([dict(prompt="a?", messages=[U("a?"), A("b"), U("c?"), A("d")])], "sft")
    assert turns["prompt"] == [U("a?"), A("b"), U("c?")] and turns["completion"] == "d"
    with pytest.raises(ValueError, match="row 0, column 'prompt' is 'z.'.*begins with"):
        load_rows([row | dict(prompt="z?")], "preference")


CALL = [dict(id="1", type="function", function=dict(name="weather", arguments="{}"))]


def test_calls_of_tools_are_kept_or_refused():
    turns = [
        U("Oslo?"),
        dict(role="assistant", content=None, tool_calls=CALL),
        dict(role="tool", content="-3", name="weather"),
    ]
    [row] = load_rows([dict(messages=[*turns, A("Cold.")])], "sft")
    assert row["prompt"] == [turns[0], turns[1] | dict(content=""), turns[2]] and row["completion"] == "Cold."
    [pair] = load_rows([dict(chosen=[*turns, A("Cold.")], rejected=[*turns, A("Hot.")])], "preference")
    assert pair["prompt"] == row["prompt"]
    calls = [
        ("sft", dict(messages=turns[:2])),
        ("sft", dict(prompt="x", completion=[turns[1]])),
        ("preference", dict(prompt="x", chosen=[turns[1]], rejected="y")),
    ]
    for kind, bad in calls:
        with pytest.raises(
            ValueError, match="row 0, column '(completion|chosen)' has an answer with 'tool_calls'"
        ):
            load_rows([bad], kind)
    with pytest.raises(ValueError, match="row 0, column 'tools' is"):
        load_rows([dict(prompt="x", completion="y", tools=[dict(name="weather")])], "sft")
    assert load_rows([dict(prompt="x", completion="y", tools=[])], "sft")


def test_content_in_parts():
    [row] = load_rows(
        [
            dict(
                prompt=[dict(role="user", content=[dict(type="text", text="a"), dict(type="text", text="b")])]
            )
        ],
        "prompts",
    )
    assert row == dict(prompt=[U("ab")])
    with pytest.raises(ValueError, match="row 0, column 'prompt' has a message with the content"):
        load_rows([dict(prompt=[dict(role="user", content=[dict(type="image")])])], "prompts")
    with pytest.raises(ValueError, match="content None"):
        load_rows([dict(prompt=[dict(role="user")])], "prompts")


@pytest.mark.parametrize(
    "kind, row, column",
    [
        ("preference", dict(prompt="a?", chosen=None, rejected="c"), "chosen"),
        ("preference", dict(prompt=None, chosen="b", rejected="c"), "prompt"),
        ("sft", dict(prompt="a", completion=None), "completion"),
    ],
)
def test_a_null_is_called_a_null(kind, row, column):
    with pytest.raises(ValueError, match=f"row 0, column '{column}' is None"):
        load_rows([row], kind)


def test_prompts_in_every_container(tmp_path):
    import datasets

    rows = [dict(prompt="a", answer=1), dict(prompt="b", answer=2)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for data in (
        rows,
        str(tmp_path / "p.jsonl"),
        dict(train=rows),
        datasets.Dataset.from_list(rows),
        datasets.DatasetDict(train=datasets.Dataset.from_list(rows)),
    ):
        assert load_rows(data, "prompts") == rows
    assert load_rows(["a", [U("b")]], "prompts") == [dict(prompt="a"), dict(prompt=[U("b")])] and load_rows(
        [U("b")], "prompts"
    ) == [dict(prompt=[U("b")])]
    pandas = pytest.importorskip("pandas")
    assert load_rows(pandas.DataFrame(rows), "prompts") == rows


# the ledger

PAIR = dict(prompt="p", chosen="a", rejected="b")


def test_reading_changes_nothing(tmp_path):
    for text in json.dumps(PAIR), json.dumps(PAIR) + "\n" + '{"prompt": "to', "", json.dumps(PAIR) + "\n":
        file = tmp_path / "a.jsonl"
        file.write_text(text)
        file.chmod(0o444)
        ledger = Ledger(file)
        assert (
            len(ledger) == len(ledger.rows()) == text.count("chosen")
            and repr(ledger)
            and file.read_text() == text
        )
        assert {f.name for f in tmp_path.iterdir()} == {"a.jsonl"}
        file.chmod(0o644)
    assert Ledger(tmp_path / "none" / "b.jsonl").rows() == [] and not (tmp_path / "none").exists()


def test_a_writer_keeps_what_parses_and_cuts_what_does_not(tmp_path):
    for text, kept in (json.dumps(PAIR), 1), (json.dumps(PAIR) + "\n" + '{"prompt": "to', 1), ('{"prompt', 0):
        file = tmp_path / "a.jsonl"
        file.write_text(text)
        Ledger(file).append([PAIR | dict(chosen="new")])
        assert [r["chosen"] for r in Ledger(file).rows()] == ["a"] * kept + [
            "new"
        ] and file.read_bytes().endswith(b"\n")


def _write(path, k):
    ledger = Ledger(path)
    for i in range(150):
        ledger.append([PAIR | dict(prompt=f"{k}-{i}-{j}", chosen="x" * 3000) for j in range(4)])


def _read(path, stop):
    while not stop.is_set():
        Ledger(path).rows()


def test_a_line_that_was_finished_while_it_was_read_is_no_damage(tmp_path, monkeypatch):
    "One call of `readlines` may find the beginning of a line, and then, as the file has grown, its rest."
    path = tmp_path / "a.jsonl"
    Ledger(path).append([PAIR, PAIR])
    first, second = path.read_bytes().splitlines(keepends=True)

    class Growing:
        def __init__(self, *a):
            self.reads = [[first, second[:20], second[20:]], []]

        def __enter__(self):
            return self

        def __exit__(self, *a):
            pass

        def readlines(self, hint):
            return self.reads.pop(0)

    ledger = Ledger(path)
    monkeypatch.setattr(pairs, "open", Growing, raising=False)
    assert ledger.rows() == [PAIR]


def test_readers_and_writers_at_once_lose_nothing(tmp_path):
    path, context = tmp_path / "a.jsonl", multiprocessing.get_context("fork")
    stop = context.Event()
    writers = [context.Process(target=_write, args=(path, k)) for k in range(2)]
    reader = context.Process(target=_read, args=(path, stop))
    for p in [reader, *writers]:
        p.start()
    for p in writers:
        p.join()
    stop.set()
    reader.join()
    rows = Ledger(path).rows()
    assert [p.exitcode for p in [reader, *writers]] == [0, 0, 0] and len(rows) == len(
        {r["prompt"] for r in rows}
    ) == 1200


def test_a_line_that_is_finished_while_it_is_read_is_no_damage(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(PAIR))
    reading = Ledger(path)._read()
    assert next(reading) == PAIR
    Ledger(path).append([PAIR | dict(chosen="new")])
    assert list(reading) == [] and [r["chosen"] for r in Ledger(path).rows()] == ["a", "new"]


def test_half_a_character_is_kept(tmp_path):
    ledger = Ledger(tmp_path / "a.jsonl")
    ledger.append([PAIR | dict(chosen="half \ud800"), PAIR | dict(chosen="– whole 四")])
    assert [r["chosen"] for r in Ledger(tmp_path / "a.jsonl").rows()] == ["half \ud800", "– whole 四"]
    write_whole(tmp_path / "r.html", "half \ud800 – 四")
    assert "– 四" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_damage_is_found_without_assertions(tmp_path):
    (tmp_path / "a.jsonl").write_text('[1]\n' + json.dumps(PAIR) + "\n")
    code = f"from selfplay_nb.core.pairs import Ledger; Ledger({os.fspath(tmp_path / 'a.jsonl')!r})"
    ran = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True)
    assert ran.returncode and "line 1 is damaged" in ran.stderr
