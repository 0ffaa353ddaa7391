"The constitution card, without a browser, on ipywidgets 7.7.1 and 8."

import subprocess
import sys

import ipywidgets as widgets
import pytest
from IPython.core.interactiveshell import InteractiveShell
from tags import Tags

from selfplay_nb.methods.constitutional import (
    CONSTITUTION,
    Constitution,
    ConstitutionalRewardWrapper,
    Principle,
)
from selfplay_nb.views.constitution_card import ConstitutionCard
from selfplay_nb.views.widgets import preformatted

HOSTILE = "</pre></td></table><script>alert(1)</script><img src=x onerror='alert(2)'> &lt;"
PROMPT = "q?"
A = "Certainly, because trams in Vienna are always late."
B = "The trams in Vienna may be late, but I cannot see that from here."


def states(widget):
    "Everything that a front end is sent."
    yield {k: v for k, v in widget.get_state().items() if k not in ("layout", "style", "children")}
    for child in getattr(widget, "children", ()):
        yield from states(child)


class Counting:
    "A model that likes hedges, and counts how often it is asked."

    calls = 0

    def logprobs(self, prompts, completions, finished=True):
        self.calls += 1
        return [("may" in p) * (0.5 if c == "Yes" else -0.5) for p, c in zip(prompts, completions)]


@pytest.fixture
def wrapper():
    return ConstitutionalRewardWrapper(
        lambda p, r: 0.5 * ("Certainly" in r), [*CONSTITUTION, "Be brief"], model=Counting()
    )


@pytest.fixture
def card(wrapper, tmp_path):
    return ConstitutionCard(wrapper, PROMPT, A, B, tmp_path / "c.toml")


def move(card):
    card.sliders["Admit uncertainty"].value = 0.7


def test_the_verdict_follows_the_weights_and_nobody_is_asked_again(card, wrapper):
    assert wrapper.model.calls == 1
    seen = set()
    for w in (0, 0.3, 0.6, 1.0, 0):
        card.sliders["Admit uncertainty"].value = w
        fresh = ConstitutionalRewardWrapper(
            lambda p, r: 0.5 * ("Certainly" in r), wrapper.constitution, model=Counting()
        ).attribution([PROMPT] * 2, [A, B])
        assert (
            wrapper.principle_weights["Admit uncertainty"] == w
            and card.record.totals == fresh.totals
            and fresh.verdict in card.status.value
        )
        assert (
            f"{w:.2f}" in card.status.value
            and card.table.value == fresh._repr_html_() == card.record._repr_html_()
        )
        seen.add(fresh.verdict.split()[1])
    assert seen == {"A", "B"} and wrapper.model.calls == 1


def test_every_principle_has_a_slider_of_its_own(card, wrapper):
    for k, (p, slider) in enumerate(card.sliders.items(), 1):
        before = dict(wrapper.principle_weights)
        slider.value = 0.85
        assert wrapper.principle_weights == before | {p: 0.85} and slider.description == f"Weight {k}"
        row = next(c for c in card.children if slider in getattr(c, "children", ()))
        assert (
            Tags(row.children[1].value).text == f"{k}. {p}" and f"{k}{p}0.85" in Tags(card.table.value).text
        )


def test_weights_come_back_and_large_ones_fit(wrapper, tmp_path):
    wrapper.principle_weights["Be brief"] = 3.0
    card = ConstitutionCard(wrapper, PROMPT, A, B)
    first = dict(wrapper.principle_weights)
    assert card.sliders["Be brief"].value == 3 and card.sliders["Be brief"].max == 6
    for s in card.sliders.values():
        s.value = 0.45
    card.reset_button.click()
    assert (
        wrapper.principle_weights == first == {p: s.value for p, s in card.sliders.items()}
        and "at first" in card.status.value
    )
    wrapper.principle_weights["Be brief"] = 9.0
    card.show()
    assert card.sliders["Be brief"].value == 9 and wrapper.principle_weights == first | {"Be brief": 9.0}


def test_saving(card, wrapper, tmp_path):
    card.sliders["Be brief"].value = 0.65
    assert not (tmp_path / "c.toml").exists()
    card.save_button.click()
    saved = Constitution.load(tmp_path / "c.toml")
    assert {p: p.weight for p in saved} == wrapper.principle_weights and [p.check for p in saved] == [
        p.check for p in wrapper.constitution
    ]
    assert f"Saved 6 principles to {tmp_path}/c.toml" in card.status.value


def test_saving_never_replaces_what_was_not_saved_here(card, wrapper, tmp_path, monkeypatch):
    (tmp_path / "c.toml").write_text("# written by hand")
    card.save_button.click()
    assert (
        "is there already and was not made here" in card.status.value
        and (tmp_path / "c.toml").read_text() == "# written by hand"
    )
    monkeypatch.chdir(tmp_path)
    other = ConstitutionCard(wrapper, PROMPT, A, B)
    (tmp_path / "constitution.toml").write_text("# mine")
    other.save_button.click()
    move(other)
    other.save_button.click()
    saved = Constitution.load(tmp_path / "runs" / "constitution.toml")
    assert {p: p.weight for p in saved} == wrapper.principle_weights and (
        tmp_path / "constitution.toml"
    ).read_text() == "# mine"
    (tmp_path / "runs" / "constitution.toml").write_text("# changed by hand")
    other.save_button.click()
    assert (
        "was changed since" in other.status.value
        and (tmp_path / "runs" / "constitution.toml").read_text() == "# changed by hand"
    )


@pytest.mark.parametrize(
    "spoil, says",
    [
        (
            lambda card, wrapper: setattr(card.file, "value", "  ") or card.save_button.click(),
            "ValueError: no file name",
        ),
        (
            lambda card, wrapper: (
                setattr(card.file, "value", __file__ + "/<b>.toml") or card.save_button.click()
            ),
            "Error: [Errno",
        ),
        (
            lambda card, wrapper: wrapper.principle_weights.update({"Be brief": float("nan")}) or move(card),
            "'Be brief': nan is no weight",
        ),
        (lambda card, wrapper: wrapper.principle_weights.clear() or move(card), "expected one for each"),
        (
            lambda card, wrapper: setattr(wrapper, "principle_weights", None) or card.reset_button.click(),
            "AttributeError",
        ),
    ],
)
def test_errors_in_callbacks_are_shown(card, wrapper, spoil, says):
    spoil(card, wrapper)
    page = Tags(card.status.value)
    assert "Error, nothing was done" in page.text and says in page.text and page.tags == {"p", "b"}


def test_errors_before_the_card():
    with pytest.raises(ValueError, match="finite"):
        ConstitutionCard(ConstitutionalRewardWrapper(lambda p, r: float("nan")), PROMPT, A, B)


def test_columns_reach_the_base_reward():
    def base(prompts, completions, answer):
        return [float(c == a) for c, a in zip(completions, answer)]

    assert ConstitutionCard(ConstitutionalRewardWrapper(base), "2 + 2", "4", "5", answer="4").record.base == [
        1,
        0,
    ]


def test_hostile_text_is_text(tmp_path):
    wrapper = ConstitutionalRewardWrapper(None, [Principle(HOSTILE, pattern="(?s).*")])
    card = ConstitutionCard(wrapper, HOSTILE, HOSTILE, [{"role": "assistant", "content": HOSTILE}])
    card.sliders[HOSTILE].value = 0.9
    pages = [s["value"] for s in states(card) if s["_model_name"] == "HTMLModel"] + [card.static().data]
    assert len(pages) == 5
    for html in pages:
        page = Tags(html)
        assert page.tags <= {"pre", "b", "p", "table", "tr", "th", "td"} and page.attributes <= {"style"}
        assert HOSTILE in page.text
    assert (
        not any("<" in str(s.get("description")) for s in states(card))
        and preformatted(HOSTILE, "Answer B") in card.texts.value
    )


def test_what_a_saved_notebook_keeps(card, monkeypatch):
    published = []
    shell = InteractiveShell.instance()
    monkeypatch.setattr(
        shell.display_pub, "publish", lambda data=None, metadata=None, **k: published.append(data)
    )
    card.sliders["Admit uncertainty"].value = 0.9
    shell.display_formatter.format(card)
    (data,) = published
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == card.model_id
    assert (
        data["text/html"] == card.static().data
        and card.record._repr_html_() in data["text/html"]
        and A in data["text/html"]
        and B in data["text/html"]
    )
    assert data["text/plain"] == repr(card.record) and card.record.verdict in data["text/plain"]


def test_only_controls_that_both_versions_have(card):
    def kinds(w):
        return {type(w)} | set().union(*(kinds(c) for c in getattr(w, "children", ())))

    assert kinds(card) == {
        ConstitutionCard,
        widgets.HBox,
        widgets.HTML,
        widgets.Button,
        widgets.Text,
        widgets.FloatSlider,
    }


def test_light_imports():
    code = (
        "import sys, selfplay_nb.views.constitution_card;"
        " sys.exit(bool({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
