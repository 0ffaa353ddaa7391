"A page that is opened alone: what its first cell installs, and where its data comes from."

import hashlib
import re
import subprocess
import sys
import threading
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import install_cells as cells
import pytest

from selfplay_nb.studies import doctor

NBS = cells.ROOT / "nbs"
PAGES = cells.pages()


@pytest.mark.parametrize("page", PAGES)
def test_the_first_cell_is_up_to_date(page):
    import json

    notebook = json.loads(PAGES[page].read_text())
    i = cells.place(notebook)
    if i is not None:
        source = "".join(notebook["cells"][i]["source"])
        assert source == cells.install_cell(page), "run: python tests/install_cells.py"


def test_every_data_file_is_fetched_by_a_page_that_reads_it():
    kinds = ".jsonl", ".toml", ".json"
    there = {f.relative_to(NBS).as_posix() for f in NBS.rglob("*") if f.suffix in kinds}
    there = {f for f in there if "ipynb_checkpoints" not in f and not f.startswith(("images", "runs"))}
    named = {f for files in cells.DATA.values() for f in files}
    assert there - {"studies/gpu.json"} <= named
    for page, files in cells.DATA.items():
        text = PAGES[page].read_text()
        assert all(f"\\\"{Path(f).name}\\\"" in text for f in files), page


@pytest.mark.parametrize("page", cells.EXTRAS)
def test_sizes_are_those_that_the_doctor_tells(page):
    extra = cells.EXTRAS[page]
    told = re.search(r"(\d+) MB", cells.SIZES[extra])[1]
    assert int(told) == doctor.EXTRAS[extra].megabytes


@pytest.fixture
def server():
    "The repository's `nbs` folder behind an address."
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *a: None})
    http = HTTPServer(("127.0.0.1", 0), partial(quiet, directory=str(NBS)))
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()


@pytest.mark.parametrize("page", cells.DATA)
def test_data_arrives_in_an_empty_folder(page, server, tmp_path, monkeypatch, capsys):
    "The calls of the page's own cell, with another address."
    monkeypatch.chdir(tmp_path)
    calls = re.findall(r'fetch_data\(\s*"(.+?)",\s*"(.+?)"', cells.install_cell(page))
    assert len(calls) == len(cells.DATA[page])
    for place, sha256 in calls:
        doctor.fetch_data(place, sha256, source=server)
        assert (tmp_path / Path(place).name).read_bytes() == (NBS / place).read_bytes()
    assert capsys.readouterr().out.count("SHA-256 is as expected") == len(calls)


def test_other_data_is_refused_and_missing_data_is_explained(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="another file .* open the page anew"):
        doctor.fetch_data("studies/costs.jsonl", "0" * 64, source=server)
    with pytest.raises(RuntimeError, match="Copy nbs/studies/none.jsonl of the repository beside this page"):
        doctor.fetch_data("studies/none.jsonl", "0" * 64, source=server)
    assert not list(tmp_path.iterdir())
    mine = tmp_path / "costs.jsonl"
    mine.write_text("mine")
    assert doctor.fetch_data("studies/costs.jsonl", "0" * 64, source=server).read_text() == "mine"
    assert hashlib.sha256(mine.read_bytes()).hexdigest()[:4] != "0000"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_help_answers_at_once(arguments):
    "In processor time, which other work on this machine does not change."
    code = (
        "import os, sys; from selfplay_nb.cli import main\n"
        f"try: main({arguments})\n"
        "except SystemExit: pass\n"
        "print(sum(os.times()[:2]), file=sys.stderr)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "usage: selfplay" in found.stdout and float(found.stderr) < 1.5


def test_options_are_the_fields_of_the_configuration():
    "They are read from the source; here is what importing says."
    import dataclasses

    from fastcore.docments import docments

    from selfplay_nb.cli import config_options
    from selfplay_nb.loop.trainer import SelfPlayConfig

    meanings = docments(SelfPlayConfig)
    fields = {
        f.name: (f.type, f.default, meanings[f.name].replace("\n", " "))
        for f in dataclasses.fields(SelfPlayConfig)
    }
    assert {o.name: (o.type, o.default, o.meaning) for o in config_options().values()} == fields
