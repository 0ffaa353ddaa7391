"The how-to pages for contributors: their code runs, and their links lead somewhere."

import re
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).parents[1] / "nbs" / "contributing").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_code_runs_and_links_lead_somewhere(page):
    text = page.read_text()
    names = {}
    for code in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(compile(code, page.name, "exec"), names)
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    links = [link for link in re.findall(r"\]\(([^)#]+)", prose) if not link.startswith("http")]
    assert all((page.parent / link).exists() for link in links), links


def test_there_is_code_to_run():
    assert sum("```python" in page.read_text() for page in PAGES) >= 2
