"The glossary and the pictures of the widgets: every term leads to a page, every picture is there and small."

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import pictures  # noqa: E402

GLOSSARY = (ROOT / "nbs" / "glossary.md").read_text(encoding="utf-8")
ENTRY = re.compile(r"^- \*\*(.+?)\*\*: (.+)$", re.M)
LINK = re.compile(r"\[[^\]]+\]\(([^)]+)\)")
ENTRIES = ENTRY.findall(GLOSSARY)
ASKED = """policy, base, adapter, reference, snapshot, opponent, league, exploiter, PFSP, payoff,
Nash mixture, Elo, Bradley-Terry, preference pair, margin, reward, verifier, judge, held-out evaluation,
random-reward control, gate, sequential test, win rate, KL, entropy, collapse, refinement, critique,
constitution, skill level, difficulty filter, attack answer, SFT, DPO, IPO, SPPO, SPIN, REINFORCE, GRPO,
advantage, baseline, run folder, ledger, identity, checkpoint"""


@pytest.mark.parametrize("term, text", ENTRIES, ids=[term for term, _ in ENTRIES])
def test_a_term_leads_to_the_page_that_teaches_it(term, text):
    links = LINK.findall(text)
    assert links and all((ROOT / "nbs" / link).is_file() for link in links), links


def test_the_terms_are_there_once_and_in_order():
    terms = [term.lower() for term, _ in ENTRIES]
    assert len(set(terms)) == len(terms) == len(re.findall(r"^- ", GLOSSARY, re.M))
    assert not {t.lower() for t in re.split(r",\s+", ASKED)} - set(terms)
    for part in GLOSSARY.split("\n## ")[1:]:
        mine = [term.lower() for term, _ in ENTRY.findall(part)]
        assert mine == sorted(mine), part.split("\n")[0]


PICTURES = pictures.pictures()


@pytest.mark.parametrize("name", PICTURES)
def test_a_widget_has_a_picture_with_words(name):
    file = ROOT / "nbs" / "images" / f"widget-{name}.png"
    assert file.read_bytes()[:4] == b"\x89PNG" and file.stat().st_size < pictures.LARGEST
    assert len(PICTURES[name]["alt"].split()) > 8


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_can_be_taken_again(name):
    cells = pictures.notebook(PICTURES[name], name)["cells"]
    for cell in cells:
        compile(cell["source"], name, "exec")
    assert not {"notest", "google.colab"} & set(re.findall(r"notest|google\.colab", cells[0]["source"]))


def test_every_widget_has_a_picture():
    assert {"stepper", "card", "viewer", "board", "monitor", "rating"} <= set(PICTURES)
    files = {f.name for f in pictures.IMAGES.glob("widget-*.png")}
    assert files == {f"widget-{name}.png" for name in PICTURES}
