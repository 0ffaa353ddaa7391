"The project itself: library, README and notebooks in step, floors respected, every notebook runs."

import ast
import atexit
import configparser
import gc
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = [*sorted((ROOT / "nbs").glob("*.ipynb")), ROOT / "index.ipynb"]
NBDEV = [Path(sys.executable).parent / f"nbdev_{c}" for c in ("export", "clean")]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of the project, exported, cleaned and with its README made again."
    copy = tmp_path_factory.mktemp("project") / "selfplay_nb"
    ignore = shutil.ignore_patterns(
        ".git", ".venv", "runs", "__pycache__", ".*_cache", "*.egg-info", ".ipynb_checkpoints"
    )
    shutil.copytree(ROOT, copy, ignore=ignore)
    env = {**os.environ, "PYTHONPATH": str(copy)}
    for command in (
        [NBDEV[0]],
        [NBDEV[1]],
        [NBDEV[1], "--fname", "index.ipynb"],
        [sys.executable, "tests/readme.py"],
    ):
        subprocess.run(list(map(str, command)), cwd=copy, env=env, check=True)
    return copy


def test_library_is_what_the_notebooks_export(copy):
    mine, made = ({f.name: f.read_text() for f in (d / "selfplay_nb").glob("*.py")} for d in (ROOT, copy))
    assert mine == made, "run: make readme"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_clean(copy, notebook):
    assert json.loads(notebook.read_text()) == json.loads((copy / notebook.relative_to(ROOT)).read_text()), (
        "run: make readme"
    )
    text = notebook.read_text()
    assert str(ROOT) not in text and "/root/" not in text and "/tmp/" not in text


def test_readme_is_made_from_the_index(copy):
    assert (ROOT / "README.md").read_text() == (copy / "README.md").read_text(), "run: make readme"


def test_versions_agree():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    import selfplay_nb

    assert settings["DEFAULT"]["version"] == selfplay_nb.__version__


# A module imports only from the floors below its own.
FLOORS = [
    {"checks"},
    {"answers", "model", "players", "rates", "templates", "sandbox", "checkpoint"},
    {"policy", "reward", "pairs", "ratings"},
    {"update", "judge", "games"},
    {"tasks"},
    {
        "competitive",
        "evaluation",
        "diversity",
        "retention",
        "human",
        "reward_model",
        "refinement",
        "constitutional",
        "skill",
        "adversarial",
        "code_tasks",
        "reasoning",
        "creative",
        "game_training",
    },
    {"league", "debate", "widgets", "scoreboard", "vitals", "callbacks", "rounds"},
    {"trainer", "pipeline", "protocols", "costs", "monitor", "stepper", "card", "board"},
    {"__main__", "viewer"},
]


def imports(module):
    for node in ast.walk(ast.parse((ROOT / "selfplay_nb" / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            yield node.module


def test_floors():
    modules = {f.stem for f in (ROOT / "selfplay_nb").glob("*.py")} - {"__init__", "_modidx"}
    assert modules == set().union(*FLOORS)
    assert set(imports("trainer")) >= {"policy", "update"}
    for i, floor in enumerate(FLOORS):
        for module in floor:
            assert set(imports(module)) <= set().union(*FLOORS[:i]), module


TORCHLESS = [
    "answers",
    "checks",
    "players",
    "templates",
    "reward",
    "pairs",
    "rates",
    "ratings",
    "tasks",
    "judge",
    "competitive",
    "evaluation",
    "diversity",
    "retention",
    "human",
    "widgets",
    "scoreboard",
    "refinement",
    "constitutional",
    "stepper",
    "card",
    "skill",
    "adversarial",
    "league",
    "board",
    "sandbox",
    "code_tasks",
    "reasoning",
    "creative",
    "games",
    "debate",
    "game_training",
    "viewer",
    "checkpoint",
    "callbacks",
    "monitor",
]


@pytest.mark.parametrize("module", TORCHLESS)
def test_mechanisms_need_no_torch(module):
    code = (
        f"import sys, selfplay_nb.{module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def run_notebook(notebook, log):
    with open(log, "a") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    from nbdev.test import test_nb as run

    os.chdir(notebook.parent)
    gc.freeze()
    try:
        right = run(notebook, skip_flags=["notest", "gpu", "slow"])[0]
    finally:
        atexit._run_exitfuncs()  # multiprocessing does not
    sys.exit(not right)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(notebook, tmp_path):
    """In a process of its own, forked from one that has imported the libraries, which takes longer than many
    a page.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["nbdev.test", "matplotlib.pyplot", "selfplay_nb.pipeline", "selfplay_nb.costs"]
    )
    (log := tmp_path / "log").touch()
    process = context.Process(target=run_notebook, args=(notebook, log))
    process.start()
    process.join()
    assert process.exitcode == 0, log.read_text()[-8000:]
