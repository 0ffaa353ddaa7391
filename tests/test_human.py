"""Human ratings and their widget: nothing is lost, nothing is shown that should be hidden, nothing is filed
under the wrong item.
"""

import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from tags import Tags

from selfplay_nb.scoring.human import VERDICTS, HumanRatings, _sides
from selfplay_nb.stats.rates import Rate, agreement, win_rate
from selfplay_nb.views.widgets import RatingWidget, preformatted

ITEMS = [
    dict(
        prompt=f"prompt {i}", a=f"alpha {i}", b=f"beta {i}", a_from="SECRET-policy", b_from="SECRET-snapshot"
    )
    for i in range(6)
]
HOSTILE = "</pre></td><script>alert(1)</script>\n<img src=x onerror='alert(\"2\")'> &lt; $1 & $2\n"
BUTTONS = {"left": "1", "tie": "2", "right": "3", "skip": "4", "undo": "z"}


@pytest.fixture
def ratings(tmp_path):
    return HumanRatings(tmp_path / "r.jsonl", ITEMS)


def finish(ratings, verdicts):
    for v in verdicts:
        ratings.rate(v)
    return ratings


# the sides


def test_sides_are_balanced_random_and_never_change():
    for n in range(1, 30):
        for seed in range(5):
            assert abs(_sides(n, seed, "r").count("a") - n / 2) <= 0.5
    assert _sides(12, 0, "anna") == "ababaaabbbba"  # files written with one version are read with the next
    assert _sides(40, 0, "anna") != _sides(40, 0, "ben") != _sides(40, 1, "ben")
    for n, i in (1, 0), (6, 0), (6, 5):
        assert 160 < sum(_sides(n, seed, "r")[i] == "a" for seed in range(400)) < 240


def test_a_rater_who_always_takes_the_left_moves_nothing_and_is_seen(ratings):
    finish(ratings, ["left"] * 6)
    assert ratings.win_rate.value == 0.5 and ratings.left_share == Rate(6, 6)
    assert "leans to the left" in repr(ratings)


# the file


def test_every_click_is_on_disk_and_the_file_only_grows(tmp_path):
    rng = random.Random(0)
    path = tmp_path / "r.jsonl"
    model = []
    before = b""
    ratings = HumanRatings(path, ITEMS, seed=3)
    for _ in range(60):
        if model and (len(model) == 6 or rng.random() < 0.4):
            ratings.undo()
            model.pop()
        else:
            model.append(rng.choice(VERDICTS))
            ratings.rate(model[-1])
        again = HumanRatings(path, ITEMS, seed=3)
        assert (
            again.given() == ratings.given() == model
            and again.current == ratings.current
            and again.sides == ratings.sides
        )
        assert path.read_bytes().startswith(before)
        before = path.read_bytes()
    assert len(before.splitlines()) == 61


def test_a_torn_line_costs_that_line_only(tmp_path, ratings):
    finish(ratings, ["left", "tie"])
    ratings.undo()
    ratings.rate("right")
    whole = ratings.log.path.read_bytes()
    states = [[], [], ["left"], ["left", "tie"], ["left"], ["left", "right"]]
    for cut in range(len(whole) + 1):
        (tmp_path / "cut.jsonl").write_bytes(whole[:cut])
        again = HumanRatings(tmp_path / "cut.jsonl", ITEMS)
        expected = states[whole[: cut + 1].count(b"\n")]  # a line that lacks its end alone is whole
        assert again.given() == expected
        again.rate("skip")
        assert HumanRatings(tmp_path / "cut.jsonl", ITEMS).given() == [*expected, "skip"]


def edited(line, **changes):
    return lambda rows: rows[:line] + [rows[line] | changes] + rows[line + 1 :]


@pytest.mark.parametrize(
    "edit, line",
    [
        (edited(0, what="else"), 1),
        (edited(1, verdict="a"), 2),
        (edited(2, item=0), 3),
        (edited(2, item=7), 3),
        (edited(1, left="b"), 2),
        (lambda rows: rows + [dict(undo=0)], 7),
        (lambda rows: rows[:1] + [dict(undo=-1)] + rows[1:], 2),
        (lambda rows: rows[:2] + ["text"] + rows[2:], 3),
        (lambda rows: rows[:1] + rows[2:], 2),
        (lambda rows: rows[:3] + rows[4:], 4),
        (lambda rows: rows[:4] + rows[5:], 5),
        (lambda rows: rows[1:], 1),
    ],
)
def test_damage_is_named_by_line(tmp_path, edit, line):
    seed = next(s for s in range(9) if _sides(6, s, "rater")[0] == "a")
    ratings = finish(HumanRatings(tmp_path / "r.jsonl", ITEMS, seed=seed), ["left", "tie"])
    ratings.undo()
    finish(ratings, ["right", "skip"])
    rows = edit([json.loads(x) for x in ratings.log.path.read_text().splitlines()])
    ratings.log.path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(ValueError, match=f"line {line} is damaged"):
        HumanRatings(ratings.log.path, ITEMS, seed=seed)


def test_more_ratings_than_items_or_no_json_is_damage(ratings):
    finish(ratings, ["tie"] * 6)
    text = ratings.log.path.read_text()
    ratings.log.path.write_text(text + json.dumps(dict(item=6, left="a", verdict="tie")) + "\n")
    with pytest.raises(ValueError, match="line 8 is damaged"):
        ratings.given()
    ratings.log.path.write_text(text.replace('"item": 2', '"item": '))
    with pytest.raises(ValueError, match="line 4 is damaged"):
        ratings.given()
    ratings.log.path.write_bytes(text.encode().replace(b'"tie"', b'"\xff"', 1))
    with pytest.raises(ValueError, match="line 2 is damaged"):
        ratings.given()


@pytest.mark.parametrize("content", [b'{"a": 1}', b"notes, no newline", b"\xff\x00", b'{"item": 0}\nhalf'])
def test_a_file_of_another_kind_is_left_alone(tmp_path, content):
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(ValueError, match="no file of ratings"):
        HumanRatings(tmp_path / "other", ITEMS)
    assert (tmp_path / "other").read_bytes() == content


def test_a_file_for_something_else_is_refused(tmp_path, ratings):
    path = ratings.log.path
    ratings.rate("left")
    before = path.read_bytes()
    for items, more, says in [
        (ITEMS[::-1], {}, "items"),
        (ITEMS[:5], {}, "n 6 instead of 5"),
        (ITEMS, {"seed": 1}, "seed 0 instead of 1"),
        (ITEMS, {"rater": "ben"}, "rater"),
        ([x | {"a": x["b"], "b": x["a"]} for x in ITEMS], {}, "items"),
    ]:
        with pytest.raises(ValueError, match=f"was made for.*{says}"):
            HumanRatings(path, items, **more)
    assert path.read_bytes() == before
    # what is not shown may be added
    assert HumanRatings(path, [x | {"a_from": "known later"} for x in ITEMS]).given() == ["left"]


@pytest.mark.parametrize(
    "items, says",
    [
        ([], "no items"),
        ([ITEMS[0], {"prompt": "p", "a": "x"}], "item 1 is"),
        (["text"], "item 0 is"),
        ([ITEMS[0] | {"b": None}], "item 0 is"),
    ],
)
def test_bad_items_are_named_before_a_file_is_made(tmp_path, items, says):
    with pytest.raises(ValueError, match=says):
        HumanRatings(tmp_path / "r.jsonl", items)
    assert not (tmp_path / "r.jsonl").exists()


def test_bad_calls_change_nothing(ratings):
    with pytest.raises(ValueError, match="nothing to undo"):
        ratings.undo()
    with pytest.raises(ValueError, match="'a': expected one of"):
        ratings.rate("a")
    ratings.rate("tie", item=0)
    with pytest.raises(ValueError, match=r"on items\[0\], but items\[1\]"):
        ratings.rate("tie", item=0)
    finish(ratings, ["tie"] * 5)
    with pytest.raises(ValueError, match="all 6 items are rated"):
        ratings.rate("tie")
    assert (
        ratings.done
        and ratings.current is None
        and ratings.progress == (6, 6)
        and len(ratings.log.rows()) == 7
    )


# what it says


def test_verdicts_belong_to_the_texts_that_were_shown(tmp_path):
    rng, expected = random.Random(1), []
    ratings = HumanRatings(tmp_path / "r.jsonl", ITEMS, seed=2)
    for i in range(5):
        v, c = rng.choice(VERDICTS[:2]), ratings.current
        assert {c["left"], c["right"]} == {f"alpha {i}", f"beta {i}"} and c["prompt"] == f"prompt {i}"
        ratings.rate(v)
        expected.append(float(c[v].startswith("alpha")))
    assert ratings.verdicts == [*expected, None]
    ratings.undo()
    ratings.rate("skip")
    ratings.rate("tie")
    assert ratings.verdicts == [*expected[:4], None, 0.5] and ratings.win_rate == Rate(
        sum(expected[:4]) + 0.5, 5, ratings.win_rate.n_effective
    )
    assert ratings.left_share == Rate(ratings.given().count("left"), 4)
    assert [r["a_from"] for r in ratings.report().rows] == ["SECRET-policy"] * 6 and [
        r["verdict"] for r in ratings.report().rows
    ] == ratings.verdicts


def test_items_of_one_prompt_are_not_independent(tmp_path):
    items = [dict(prompt=f"p{i // 8}", a=f"a{i}", b=f"b{i}") for i in range(64)]
    ratings = HumanRatings(tmp_path / "r.jsonl", items)
    for i in range(64):
        ratings.rate("left" if (ratings.sides[i] == "a") == (i < 32) else "right")
    assert (
        ratings.verdicts == [1.0] * 32 + [0.0] * 32
        and ratings.win_rate.interval == win_rate([[1.0] * 8] * 4 + [[0.0] * 8] * 4).interval
    )


def test_agreement_with_judges_and_raters(tmp_path):
    anna = finish(
        HumanRatings(tmp_path / "a.jsonl", ITEMS, rater="anna"), ["left", "right", "tie", "skip", "left"]
    )
    ben = finish(
        HumanRatings(tmp_path / "b.jsonl", ITEMS, rater="ben"),
        ["left", "left", "tie", "left", "skip", "right"],
    )
    judge = [0.9, 0.2, 0.5, 0.8, None, 0.1]
    calls = [1.0, 0.0, 0.5, 1.0, None, 0.0]
    assert (
        anna.agreement_with(judge)
        == anna.agreement_with([0.51, 0.49, 0.5, 1.0, float("nan"), 0.0])
        == agreement(anna.verdicts, calls)
    )
    assert anna.agreement_with(judge).n == 3 and anna.agreement_with(ben) == agreement(
        anna.verdicts, ben.verdicts
    )
    report = anna.report({"judge": judge, "ben": ben})
    assert report.judges == {
        "judge": judge,
        "ben": ben.verdicts,
    } and "5 of 6 rated by anna (ties 1, skipped 1)" in repr(report)
    assert f"judge: {agreement(anna.verdicts, calls)}" in repr(report)
    with pytest.raises(ValueError, match="5 probabilities for 6 items"):
        anna.agreement_with(judge[:5])
    with pytest.raises(ValueError, match="other items"):
        anna.agreement_with(HumanRatings(tmp_path / "c.jsonl", ITEMS[::-1]))


# the widget


def states(widget):
    "Everything that a front end is sent."
    yield {k: v for k, v in widget.get_state().items() if k not in ("layout", "style", "children")}
    for child in getattr(widget, "children", ()):
        yield from states(child)


def test_nothing_shown_tells_who_is_who(ratings):
    view = RatingWidget(ratings, judges={"judge": [1.0] * 6})
    while not ratings.done:
        shown = (
            str(list(states(view)))
            + repr(ratings)
            + repr(view)
            + ratings._repr_html_()
            + str(ratings.current)
        )
        assert (
            "SECRET" not in shown
            and "judge" not in shown
            and "a beats b" not in shown
            and "%" not in view.status.value
        )
        assert f"alpha {view.item}" in shown and f"beta {view.item}" in shown
        assert "alpha" in (view.left if ratings.sides[view.item] == "a" else view.right).value
        view.press("1")
    assert "a beats b" in view.prompt.value and "a beats b" in repr(ratings)


@pytest.mark.parametrize("by", ["button", "key"])
def test_clicks_and_keys_reach_the_file_one_by_one(ratings, by):
    view = RatingWidget(ratings)

    def do(what):
        if by == "button":
            view.buttons[BUTTONS[what]].click()
        else:
            view.key_box.value = BUTTONS[what]
        assert view.key_box.value == ""

    for i, what in enumerate(["left", "tie", "right", "skip"]):
        do(what)
        assert (
            ratings.given()[-1] == what
            and view.item == i + 1 == ratings.current["item"]
            and f"{i + 1} of 6 rated. Saved" in view.status.value
        )
        assert (
            preformatted(ratings.current["left"], "Left") == view.left.value
            and preformatted(ratings.current["right"], "Right") == view.right.value
        )
    do("undo")
    assert ratings.given() == ["left", "tie", "right"] and view.item == 3
    for _ in range(3):
        do("undo")
    do("undo")
    assert "nothing to undo" in view.status.value and len(ratings.log.rows()) == 9


def test_keys_that_are_no_verdict(ratings):
    view = RatingWidget(ratings)
    for typed, says in ("12", "typed ahead"), ("<b>", "typed ahead"), ("x", "none of the keys"), (" ", ""):
        view.key_box.value = typed
        assert (
            says in view.status.value
            and "<b>" not in view.status.value
            and view.key_box.value == ""
            and ratings.given() == []
        )
    view.key_box.value = "1"
    view.key_box.value = "1"
    view.key_box.value = "Z"
    assert ratings.given() == ["left"]


def test_a_view_that_is_out_of_date_rates_nothing(ratings):
    old, new = RatingWidget(ratings), RatingWidget(ratings)
    new.press("1")
    old.press("3")
    assert (
        ratings.given() == ["left"]
        and "look again" in old.status.value
        and old.item == 1
        and old.left.value == new.left.value
    )


def test_a_double_click_rates_one_item(ratings):
    view = RatingWidget(ratings)

    def click(key):
        "As the browser tells the kernel of it."
        view.buttons[key]._handle_custom_msg({"event": "click"}, [])

    view.drawn -= 1  # it has been there for a second
    click("1")
    click("1")
    assert ratings.given() == ["left"] and "double click" in view.status.value
    view.drawn -= 1
    click("2")
    assert ratings.given() == ["left", "tie"]
    view.buttons["3"].click()  # a program does not click twice by mistake
    assert ratings.given() == ["left", "tie", "right"]


def test_two_windows_on_one_file_damage_nothing(tmp_path):
    items = [dict(prompt=f"p{k}", a="x", b="y") for k in range(40)]

    def rate_all():
        window = HumanRatings(tmp_path / "r.jsonl", items)
        with pytest.raises(ValueError, match="all 40 items are rated"):
            while True:
                window.rate("left")

    HumanRatings(tmp_path / "r.jsonl", items)
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(rate_all) for _ in range(4)]:
            done.result()
    assert HumanRatings(tmp_path / "r.jsonl", items).given() == ["left"] * 40


def test_a_verdict_of_nan_is_none(ratings):
    shown = [ratings.report({"j": [none] + [1.0] * 5})._repr_html_() for none in (None, float("nan"))]
    assert shown[0] == shown[1]


def test_a_full_disk_is_told_and_the_item_stays(ratings, monkeypatch):
    view = RatingWidget(ratings)

    def full(rows):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ratings.log, "append", full)
    view.buttons["1"].click()
    assert (
        "Not saved" in view.status.value
        and "No space left" in view.status.value
        and view.item == 0
        and ratings.given() == []
    )


def test_the_end_shows_agreement_and_can_be_undone(ratings):
    judge = [1.0] * 6
    view = RatingWidget(ratings, judges={"rule": judge})
    for _ in range(6):
        view.key_box.value = "1"
    assert (
        f"rule: {agreement(ratings.verdicts, judge)}" in text_of_html(view.prompt.value)
        and view.sides.layout.display == "none"
    )
    view.key_box.value = "1"
    assert "all 6 items are rated" in view.status.value
    view.key_box.value = "z"
    assert (
        view.item == 5
        and view.sides.layout.display is None
        and "beta 5" in view.left.value + view.right.value
    )
    with pytest.raises(ValueError, match="3 probabilities for 6"):
        RatingWidget(ratings, judges={"short": [1.0] * 3})


def text_of_html(html):
    return Tags(html).text


def test_hostile_text_is_text(tmp_path):
    items = [dict(prompt=HOSTILE, a=HOSTILE, b=[{"role": "assistant", "content": HOSTILE}])] * 2
    ratings = HumanRatings(tmp_path / "r.jsonl", items, rater=HOSTILE)
    view = RatingWidget(ratings, judges={HOSTILE: [1.0, 0.0]})
    pages = [view.prompt.value, view.left.value, view.right.value, ratings._repr_html_()]
    ratings.rate("left")
    ratings.rate("tie")
    view.show(HOSTILE)
    for html in [*pages, view.prompt.value, view.status.value, ratings._repr_html_()]:
        page = Tags(html)
        assert (
            page.tags <= {"pre", "b", "p", "table", "tr", "th", "td"}
            and page.attributes <= {"style"}
            and HOSTILE.strip() in page.text
        )
    assert Tags(preformatted(HOSTILE)).text == HOSTILE and "(empty)" in preformatted(" \n")


def test_only_controls_that_both_versions_have(ratings):
    def kinds(w):
        return {w._view_name} | set().union(*(kinds(c) for c in getattr(w, "children", ())))

    expected = {"VBoxView", "HBoxView", "HTMLView", "ButtonView", "TextView"}
    assert kinds(RatingWidget(ratings)) == expected


@pytest.mark.parametrize(
    "module, banned",
    [
        ("scoring.human", ["torch", "transformers", "ipywidgets"]),
        ("views.widgets", ["torch", "transformers", "selfplay_nb.scoring.human"]),
    ],
)
def test_light_imports(module, banned):
    subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys, selfplay_nb.{module}; sys.exit(bool(set({banned}) & set(sys.modules)))",
        ],
        check=True,
    )
