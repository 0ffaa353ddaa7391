"""The refinement stepper by program: what is clicked happens to the record, what is shown is the record's,
errors and work are seen.
"""

import json
import re
from html.parser import HTMLParser

import ipywidgets as widgets
import pytest

from selfplay_nb.core.players import Scripted
from selfplay_nb.methods.refinement import IterativeRefiner, Trace, Traces, fenced_texts
from selfplay_nb.views.refinement_stepper import RefinementStepper, score_curve

HOSTILE = "</pre></td><script>alert(1)</script><img src=x onerror='alert(2)'> \" ' &amp;"


def answer(p, rng):
    return " ".join(fenced_texts(p)[:2]) or "first"  # response and critique


def length(prompts, completions, **columns):
    return [float(len(c)) for c in completions]


def refiner(policy=answer, critic=lambda p, rng: "More!", reward=length, **kw):
    return IterativeRefiner(Scripted(policy, "policy"), Scripted(critic, "critic"), reward, **kw)


@pytest.fixture
def view(tmp_path):
    return RefinementStepper(refiner(), "Talk.", path=tmp_path / "t.json")


def said(view):
    return re.sub("<[^>]*>", "", view.status.value)


def on(view):
    return {c.description for c in view._inputs if not c.disabled}


class Texts(HTMLParser):
    "What a browser shows, and which elements there are."

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert not any(k.startswith("on") for k, _ in attrs)

    def handle_data(self, data):
        self.text += data


# clicks and the record


def test_clicks_do_what_the_loop_does(view):
    loop = refiner().refine_batch(["Talk."], 2)[0]
    view.generate.click()
    for _ in range(2):
        view.critique.click()
        view.refine.click()
    assert view.trace.versions[-1].stop is None
    view.trace.versions[-1].stop = "limit"
    assert view.trace == loop
    view.iterations.value = 2
    view.generate.click()
    view.run.click()
    assert view.trace == loop and len(view.traces) == 2 and "stopped: the limit of iterations" in said(view)
    view.run.click()
    assert len(view.trace.versions) == 5  # two more


def test_run_alone_generates(view):
    view.run.click()
    assert (
        view.trace == refiner().refine_batch(["Talk."], 3)[0]
        and view.shown == 3
        and said(view).startswith("Generated. Ran.")
    )


def test_what_is_on_show_is_the_versions(view):
    view.run.click()
    before = view.trace.to_dict()
    for i in (3, 0, 2, 1, 0, 3):
        (view.play if i % 2 else view.slider).value = i  # either moves the other
        v = view.trace.versions[i]
        assert (
            view.slider.value == view.play.value == view.shown == i and view.trace.about(i) in view.text.value
        )
        shown = Texts(view.text.value).text
        assert all(word in shown for word in v.text.split()) and ("<ins>" in view.text.value) == (i > 0)
        assert ("no critique led to it" in view.reason.value) == (i == 0) and view.remark.value == (
            "More!" if i < 3 else ""
        )
        assert view.remark.description == f"Critique of v{i}" and re.findall(
            r"v\d [\d.]+ \(shown\)", view.curve.value
        ) == [f"v{i} {v.score:.2f} (shown)"]
    assert view.trace.to_dict() == before


def test_a_critique_by_hand_begins_a_branch_and_run_goes_on_from_it(view):
    view.iterations.value = 2
    view.run.click()
    old = view.trace.to_dict()["versions"][:2]
    view.slider.value = 1
    view.remark.value = "Shorter"
    view.refine.click()
    assert (
        view.trace.branches == [[0, 1, 2], [0, 1, 3]]
        and view.shown == 3
        and view.trace.step_to(3).by == "person"
    )
    assert (
        "Shorter" in view.reason.value
        and "by person" in view.reason.value
        and view.trace.to_dict()["versions"][:2] == old
    )
    view.run.click()
    assert (
        view.trace.branches == [[0, 1, 2], [0, 1, 3, 4, 5]] and view.shown == 5 and view.trace.stop == "limit"
    )
    view.branch.value = 0
    assert (
        view.shown == 2 and view.slider.max == 2 and view.trace.versions[2].text.split()[0] in view.text.value
    )
    view.run.click()  # goes on with the branch on show, not with the last one
    assert (
        view.trace.branches == [[0, 1, 3, 4, 5], [0, 1, 2, 6, 7]]
        and view.shown == 7
        and view.branch.value == 1
    )
    view.slider.value = 1
    assert view.remark.value == "More!"  # the critique that led on along this branch
    view.branch.value = 0
    view.slider.value = 1
    assert view.remark.value == "Shorter"


def test_an_edited_critique_counts_for_run_too(view):
    view.generate.click()
    view.critique.click()
    view.remark.value = "Otherwise"
    view.iterations.value = 2
    view.run.click()
    assert [(s.source, s.by, s.critique) for s in view.trace.steps] == [
        (0, "critic", "More!"),
        (0, "person", "Otherwise"),
        (1, "critic", "More!"),
    ]


def test_a_critique_that_waits_is_carried_out_once(view):
    view.generate.click()
    view.critique.click()
    assert view.trace.pending and view.remark.value == "More!"
    view.refine.click()
    assert (
        len(view.trace.steps) == 1 and view.trace.steps[0].by == "critic" and view.trace.steps[0].target == 1
    )
    view.slider.value = 0
    view.refine.click()  # the same critique again
    assert len(view.trace.versions) == 2 and "nothing new came of it, it is v1 again" in said(view)


def test_a_satisfied_critic_can_be_overruled():
    view = RefinementStepper(refiner(critic=lambda p, rng: "NO ISSUES"), "Talk.")
    view.run.click()
    assert (
        view.trace.stop == "satisfied"
        and view.remark.value == "NO ISSUES"
        and "the critique finds nothing" in said(view)
    )
    view.run.click()
    assert len(view.trace.versions) == 1
    view.remark.value = "There are!"
    view.refine.click()
    assert len(view.trace.versions) == 2 and not view.trace.stop


def test_another_prompt_is_another_trace_and_not_scored_with_columns_that_are_not_its_own():
    def reward(prompts, completions, answer, **columns):
        return [float(a) for a in answer]

    view = RefinementStepper(refiner(reward=reward), "Talk.", answer=3.0)
    view.generate.click()
    assert view.trace.versions[0].score == 3
    view.prompt.value = "Sing."
    view.run.click()
    assert (
        view.trace.prompt == "Sing."
        and [v.score for v in view.trace.versions] == [None] * 4
        and "answer does not apply" in said(view)
    )
    assert "no reward" in view.curve.value and [t.prompt for t in view.traces] == ["Talk.", "Sing."]


def test_messages_stay_messages():
    prompt = [dict(role="system", content="Be short."), dict(role="user", content="Talk.")]
    view = RefinementStepper(refiner(), prompt)
    view.generate.click()
    assert view.prompt.value == "system: Be short.\nuser: Talk." and view.trace.prompt == prompt


# work and errors


def test_all_inputs_are_off_while_it_works_and_it_says_how_far_it_is():
    seen = []

    class Slow:
        def sample(self, prompts, progress=None, **kw):
            import time

            for _ in range(3):
                time.sleep(0.12)
                progress(0, 5)
                seen.append((sorted(on(view)), said(view)))
            return type("R", (list,), dict(seconds=1.0, n_tokens=1))(
                [[type("S", (), dict(text="x", truncated=False))]] * len(prompts)
            )

        def generate(self, prompts, **kw):
            raise AssertionError

    view = RefinementStepper(IterativeRefiner(Slow()), "Talk.")
    assert on(view) == {"Prompt", "Generate", "Run", "Iterations", "File", "Load"}
    view.generate.click()
    assert (
        all(inputs == [] for inputs, _ in seen)
        and seen[0][1] == "Working: generating …"
        and "15 tokens" in seen[-1][1]
    )
    assert on(view) == {
        "Prompt",
        "Generate",
        "Critique",
        "Run",
        "Iterations",
        "Critique of v0",
        "File",
        "Save",
        "Load",
    } and "Generated." in said(view)
    view.run.click()
    assert all(inputs == [] for inputs, _ in seen)  # between its iterations too


@pytest.mark.parametrize("part", ["policy", "critic", "reward"])
def test_errors_are_shown_with_the_place_and_nothing_is_lost(part):
    def fails(*args, **kw):
        raise ConnectionError(f"no {part} {HOSTILE}")

    view = RefinementStepper(refiner(), "Talk.")
    view.run.click()
    before = view.trace.to_dict()
    broken = RefinementStepper(refiner(**{part: fails}), "Talk.", trace=view.trace)
    for button in (
        [broken.generate]
        if part == "policy"
        else [broken.critique] if part == "critic" else [broken.generate]
    ):
        button.click()
        assert (
            "ConnectionError: no " + part in said(broken)
            and "fails" in broken.status.value
            and "script" not in Texts(broken.status.value).tags
        )
        assert (
            view.trace.to_dict() == before
            and {"Generate", "Critique", "Run"} <= on(broken)
            and not broken.busy
        )


def test_a_run_that_fails_half_way_keeps_what_it_has():
    calls = []

    def critic(p, rng):
        calls.append(p)
        if len(calls) == 2:
            raise TimeoutError("too slow")
        return "More!"

    view = RefinementStepper(refiner(critic=critic), "Talk.")
    view.run.click()
    assert "TimeoutError: too slow" in said(view) and len(view.trace.versions) == 2 and view.shown == 1
    view.run.click()
    assert len(view.trace.versions) == 5 and view.trace.stop == "limit"


def test_an_interrupt_is_taken_as_one():
    def critic(p, rng):
        raise KeyboardInterrupt

    view = RefinementStepper(refiner(critic=critic), "Talk.")
    view.run.click()
    assert "Interrupted while running" in said(view) and len(view.trace.versions) == 1 and "Run" in on(view)


def test_buttons_without_a_trace_say_what_is_missing(view):
    for b in view.critique, view.refine:
        b.click()
        assert "ValueError: nothing is generated yet" in said(view)
    view.save.click()
    assert "Error while saving" in said(view)


def test_an_empty_answer_can_not_be_criticised():
    view = RefinementStepper(refiner(policy=lambda p, rng: ""), "Talk.")
    view.run.click()
    assert (
        "an empty answer" in said(view)
        and not {"Critique", "Refine", "Critique of v0"} & on(view)
        and "(empty)" in view.text.value
    )


# files


def test_saved_and_loaded_again(view, tmp_path):
    view.run.click()
    view.slider.value = 0
    view.remark.value = "Shorter"
    view.refine.click()
    view.save.click()
    assert Trace.load(tmp_path / "t.json") == view.trace and "t.pairs.jsonl (5 rows)" in said(view)
    assert [json.loads(x) for x in (tmp_path / "t.pairs.jsonl").read_text().splitlines()] == Traces(
        [view.trace]
    ).pairs()[0]
    again = RefinementStepper(refiner(), path=tmp_path / "t")
    again.load.click()  # the ending may be left out
    assert (
        again.trace == view.trace
        and again.prompt.value == "Talk."
        and again.shown == view.shown
        and "Loaded t.json." in said(again)
    )
    again.run.click()
    assert len(again.trace.versions) == len(view.trace.versions) + 3


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "FileNotFoundError"),
        ("{", "Expecting"),
        ("[]", "not a refinement trace"),
        ('{"record": "refinement trace", "prompt": "x", "versions": [], "steps": []}', "without an answer"),
    ],
)
def test_a_file_that_is_none_is_refused_and_the_trace_stays(view, tmp_path, content, says):
    view.run.click()
    before = view.trace
    if content is not None:
        (tmp_path / "t.json").write_text(content)
    view.load.click()
    assert re.search(says, said(view)) and view.trace is before and view.shown == 3
    view.file.value = " "
    view.save.click()
    assert "no file is named" in said(view)


def clicked(tmp_path, **kw):
    view = RefinementStepper(refiner(), "Talk.", **kw)
    view.run.click()
    return view


def test_saving_goes_to_the_runs_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    measured = {
        name: "measured for hours"
        for name in ("refinement.json", "refinement.sft.jsonl", "refinement.pairs.jsonl")
    }
    for name, text in measured.items():
        (tmp_path / name).write_text(text)
    view = clicked(tmp_path)
    view.save.click()
    assert (
        all((tmp_path / name).read_text() == text for name, text in measured.items())
        and Trace.load(tmp_path / "runs" / "refinement.json") == view.trace
    )


@pytest.mark.parametrize("name", ["t.json", "t.sft.jsonl", "t.pairs.jsonl", "t.critiques.jsonl"])
def test_a_file_that_was_not_made_here_is_never_written_over(tmp_path, name):
    (tmp_path / name).write_text("mine")
    view = clicked(tmp_path, path=tmp_path / "t.json")
    view.save.click()
    assert (
        f"{name} is there already and was not made here" in said(view)
        and (tmp_path / name).read_text() == "mine"
    )
    assert [f.name for f in tmp_path.iterdir()] == [name]
    view.file.value = str(tmp_path / "other")
    view.save.click()
    assert "Saved other.json" in said(view) and (tmp_path / name).read_text() == "mine"


def test_what_was_made_or_loaded_here_may_be_saved_again(tmp_path):
    view = clicked(tmp_path, path=tmp_path / "t.json")
    view.save.click()
    view.remark.value = "Again!"
    view.refine.click()
    view.save.click()
    assert "Saved t.json" in said(view) and Trace.load(tmp_path / "t.json") == view.trace
    stranger = clicked(tmp_path, path=tmp_path / "t.json")
    stranger.save.click()
    assert "was not made here" in said(stranger) and Trace.load(tmp_path / "t.json") == view.trace
    stranger.load.click()
    stranger.remark.value = "And again!"
    stranger.refine.click()
    stranger.save.click()
    assert (
        "Saved t.json" in said(stranger) and Trace.load(tmp_path / "t.json") == stranger.trace != view.trace
    )
    view.save.click()
    assert "was changed since" in said(view) and Trace.load(tmp_path / "t.json") == stranger.trace


def test_rows_beside_a_loaded_trace_that_are_not_its_own_stay(tmp_path):
    view = clicked(tmp_path, path=tmp_path / "t.json")
    view.trace.save(tmp_path / "t.json")
    (tmp_path / "t.pairs.jsonl").write_text("mine")
    view.load.click()
    view.save.click()
    assert (
        "t.pairs.jsonl is there already" in said(view) and (tmp_path / "t.pairs.jsonl").read_text() == "mine"
    )


def test_an_empty_prompt_is_an_error_that_is_shown(tmp_path):
    view = RefinementStepper(refiner(), "")
    view.generate.click()
    assert "is empty" in said(view) and view.trace is None


# what is shown


def everything(view):
    return (
        "".join(w.value for w in (view.status, view.text, view.reason, view.curve))
        + view._still()["text/html"]
    )


def test_no_text_becomes_markup(tmp_path):
    view = RefinementStepper(
        IterativeRefiner(
            Scripted(lambda p, rng: HOSTILE + p[-3:], HOSTILE),
            Scripted(lambda p, rng: HOSTILE, HOSTILE),
            length,
        ),
        HOSTILE,
    )
    view.run.click()
    view.remark.value = HOSTILE + "!"
    view.refine.click()
    for i in range(len(view._line)):
        view.slider.value = i
        page = Texts(everything(view))
        assert not {"script", "img"} & set(page.tags) and page.text.count("<script>alert(1)</script>") >= 3
    view.file.value = str(tmp_path / "<script>x")
    view.load.click()
    assert "script" not in Texts(everything(view)).tags


def test_core_controls_only_each_with_a_name():
    def kinds(w):
        return {type(w)}.union(*(kinds(c) for c in getattr(w, "children", ())))

    view = RefinementStepper(refiner(), "Talk.")
    assert kinds(view) == {
        RefinementStepper,
        widgets.HBox,
        widgets.VBox,
        widgets.HTML,
        widgets.Button,
        widgets.Textarea,
        widgets.Text,
        widgets.BoundedIntText,
        widgets.Dropdown,
        widgets.Play,
        widgets.IntSlider,
    }
    assert all(c.description for c in view._inputs if c is not view.play)
    # nothing that the front end would not know
    for c in view._inputs:
        assert set(c.keys) == set(c.get_state())


def test_the_output_has_a_form_without_a_kernel_and_it_is_renewed(view, monkeypatch):
    shown = []

    class Handle:
        def update(self, data, raw):
            assert raw
            shown.append(data)

    def display(data, raw, display_id=False):
        assert raw
        shown.append(data)
        return Handle() if display_id else None

    monkeypatch.setattr("IPython.display.display", display)
    view._ipython_display_()
    # apart, so that the live view is not drawn anew with each change, which would take the focus from its
    # buttons
    live, still = shown
    assert (
        "Nothing generated yet" in still["text/html"]
        and live["application/vnd.jupyter.widget-view+json"]["model_id"] == view.model_id
    )
    view.run.click()
    assert shown[2:] == [{"text/html": view.trace._repr_html_(), "text/plain": repr(view.trace)}] and repr(
        view
    ) == repr(view.trace)
    n = len(shown)
    view.slider.value = 1
    assert len(shown) == n  # looking changes nothing
    json.dumps(shown)


def test_the_curve_in_words_and_marks():
    curve = score_curve(["v0", "v1<"], [1.0, 2.0], 1)
    assert (
        "aria-label='Score: v0 1.00, v1&lt; 2.00 (shown)'" in curve
        and curve.count("r='3'") == 2
        and curve.count("r='7'") == 1
    )
    points = [tuple(map(float, p.split(","))) for p in re.search("points='([^']*)'", curve)[1].split()]
    assert points[0][0] < points[1][0] and points[0][1] > points[1][1]  # up is better
    assert (
        "No scores" in score_curve(["v0"], [None])
        and score_curve(["v0", "v1"], [3.0, None]).count("r='3'") == 1
    )
    assert "nan" not in score_curve(["a", "b"], [1.0, 1.0])
