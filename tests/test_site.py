"The site's source: every page is in it, its links lead somewhere, and the reference has every public name."

import book
import nbformat
import pytest
import yaml

import selfplay_nb


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("site") / "source"
    patch.setattr(book, "SOURCE", folder)
    book.prepare()
    yield folder
    patch.undo()


def test_every_page_of_the_contents_is_there(prepared):
    toc = yaml.safe_load((prepared / "_toc.yml").read_text())
    files = [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]
    assert len(files) == len(set(files)) > 70
    for name in [toc["root"], *files]:
        assert (prepared / f"{name}.ipynb").exists() or (prepared / f"{name}.md").exists(), name


def test_links_lead_somewhere(prepared):
    assert book.broken(prepared) == []


def test_a_planted_link_is_found(prepared):
    page = prepared / "nbs" / "planted.md"
    page.write_text("See [this](no_such_page.ipynb) and [that](https://example.org).")
    assert book.broken(prepared) == ["nbs/planted.md: no_such_page.ipynb"]
    page.unlink()


def test_cells_for_machines_are_left_out(prepared):
    for file in prepared.rglob("*.ipynb"):
        for cell in nbformat.read(file, 4).cells:
            assert "google.colab" not in cell.source or cell.cell_type == "markdown", file
            assert not cell.source.startswith("#|"), file


def test_the_reference_has_every_public_name(prepared):
    text = "\n".join(f.read_text() for f in (prepared / "api").glob("*.md"))
    missing = [name for name in selfplay_nb.__all__ if f"### {name}\n" not in text]
    assert not missing
    assert "| n_samples | int | 8 | answers a side and prompt |" in text


def test_anchors_of_jupyter_become_those_of_the_site(prepared):
    file = prepared / "nbs" / "tasks" / "sandbox.ipynb"
    cells = nbformat.read(file, 4).cells
    assert any("(#what-holds-and-what-does-not)" in c.source for c in cells)
