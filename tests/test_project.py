"The project itself: library, README and notebooks in step, floors respected, every notebook runs."

import ast
import atexit
import configparser
import gc
import graphlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
CONTENTS = yaml.safe_load((ROOT / "nbs" / "_toc.yml").read_text())
CHAPTERS = [chapter["file"] for part in CONTENTS["parts"] for chapter in part["chapters"]]
NOTEBOOKS = [*sorted((ROOT / "nbs").rglob("*.ipynb")), ROOT / "index.ipynb"]
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
    mine, made = (
        {f.relative_to(d).as_posix(): f.read_text() for f in (d / "selfplay_nb").rglob("*.py")}
        for d in (ROOT, copy)
    )
    assert mine == made, "run: make readme"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.relative_to(ROOT).with_suffix("").as_posix())
def test_notebook_is_clean(copy, notebook):
    assert json.loads(notebook.read_text()) == json.loads(
        (copy / notebook.relative_to(ROOT)).read_text()
    ), "run: make readme"
    text = notebook.read_text()
    assert str(ROOT) not in text and "/root/" not in text and "/tmp/" not in text


def test_readme_is_made_from_the_index(copy):
    assert (ROOT / "README.md").read_text() == (copy / "README.md").read_text(), "run: make readme"


def test_types():
    done = subprocess.run([Path(sys.executable).parent / "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


HEAVY = {"torch", "transformers", "peft", "trl", "bitsandbytes", "pandas", "datasets", "matplotlib", "scipy"}
LOOKED_UP = f"""
import pydoc, sys
from selfplay_nb import IterativeRefiner, LeagueTraining, Policy, SelfPlayTrainer
text = "".join(map(pydoc.render_doc, (IterativeRefiner, LeagueTraining, Policy, SelfPlayTrainer)))
assert all(pydoc.plain(text).count(name) for name in ("refine", "sample_opponent", "logprobs", "train"))
print(*({HEAVY} & set(sys.modules)))
"""


def test_help_on_the_main_names_loads_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", LOOKED_UP], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_versions_agree():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    import selfplay_nb

    assert settings["DEFAULT"]["version"] == selfplay_nb.__version__


# A module imports only from its own wing and from those in the lines above.
WINGS = [
    {"core"},
    {"stats"},
    {"models"},
    {"scoring"},
    {"tasks", "games"},
    {"methods"},
    {"loop"},
    {"scale"},
    {"views", "studies"},
    {"cli"},
    {"__main__"},
]
LIBRARY = ROOT / "selfplay_nb"
MODULES = sorted(
    ".".join(f.relative_to(LIBRARY).with_suffix("").parts)
    for f in LIBRARY.rglob("*.py")
    if f.stem not in ("__init__", "_modidx")
)
TORCHLESS_WINGS = {"core", "stats", "scoring", "tasks", "games", "methods", "views"}
TORCHLESS = [m for m in MODULES if m.split(".")[0] in TORCHLESS_WINGS] + ["loop.callbacks"]


def imports(source: str, module: str):
    "Modules of the library that a source imports: at the top or in a function, by relative or full names."
    package = ["selfplay_nb", *module.split(".")[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            whole = ".".join([*base, *filter(None, [node.module])])
            names = [f"{whole}.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            names = [a.value for a in node.args if isinstance(a, ast.Constant)]
        else:
            continue
        for name in names:
            found = [m for m in MODULES if f"{name}.".startswith(f"selfplay_nb.{m}.")]
            yield from found


def wing(module: str) -> str:
    return module.split(".")[0]


def forbidden(source: str, module: str) -> list[str]:
    "What a module imports from a wing that does not lie below its own."
    level = next(i for i, names in enumerate(WINGS) if wing(module) in names)
    below = set().union(*WINGS[:level], {wing(module)})
    never = {"models"} if wing(module) in ("scoring", "tasks", "games", "methods") else set()
    return [m for m in imports(source, module) if wing(m) not in below - never]


@pytest.mark.parametrize("module", MODULES)
def test_wings(module):
    source = (LIBRARY / f"{module.replace('.', '/')}.py").read_text()
    assert not forbidden(source, module)


def test_no_circles():
    found = {m: set(imports((LIBRARY / f"{m.replace('.', '/')}.py").read_text(), m)) for m in MODULES}
    assert found["loop.trainer"] >= {"models.policy", "models.update"}
    list(graphlib.TopologicalSorter(found).static_order())


@pytest.mark.parametrize(
    "line",
    [
        "from ..loop.trainer import SelfPlayTrainer",
        "from selfplay_nb.models.policy import Policy",
        "from selfplay_nb.models import policy",
        "import selfplay_nb.views.widgets as w",
        "def f():\n    from ..loop import rounds",
        "importlib.import_module('selfplay_nb.loop.trainer')",
    ],
)
def test_wings_see_a_planted_import(line):
    assert forbidden(line, "methods.league")
    assert not forbidden("from ..core.pairs import Ledger", "methods.league")


def test_pages_and_modules_have_the_same_path():
    "The table of contents has every page once; a page that exports has its module's path."
    pages = [p.relative_to(ROOT / "nbs").with_suffix("").as_posix() for p in NOTEBOOKS if p.stem != "index"]
    assert sorted(pages) == sorted(CHAPTERS)
    for page in pages:
        text = (ROOT / "nbs" / f"{page}.ipynb").read_text()
        exported = re.search(r"#\| default_exp ([\w.]+)", text)
        assert not exported or exported[1].replace(".", "/") == page
    index = (ROOT / "index.ipynb").read_text()
    assert re.findall(r"\| \[[^\]]+\]\(nbs/([\w/]+)\.ipynb\)", index) == CHAPTERS


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
    import nbdev.test

    from tests.smaller import Smaller

    nbdev.test.NBProcessor = Smaller
    os.chdir(notebook.parent)
    gc.freeze()
    try:
        right = nbdev.test.test_nb(notebook, skip_flags=["notest", "gpu", "slow"])[0]
    finally:
        atexit._run_exitfuncs()  # multiprocessing does not
    sys.exit(not right)


PAGES = [p for p in NOTEBOOKS if p.parent.name != "course"]  # test_course.py runs the course


@pytest.mark.parametrize("notebook", PAGES, ids=lambda p: p.relative_to(ROOT).with_suffix("").as_posix())
def test_notebook_runs(notebook, tmp_path):
    """In a process of its own, forked from one that has imported the libraries, which takes longer than many
    a page.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.warm"])
    (log := tmp_path / "log").touch()
    process = context.Process(target=run_notebook, args=(notebook, log))
    process.start()
    process.join()
    assert process.exitcode == 0, log.read_text()[-8000:]
