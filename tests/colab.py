"""Colab, emulated (`make colab`): `colab.py resolve`, under Python 3.13, and `colab.py run`, under 3.11.

`resolve` sets up what a Colab runtime has (of torch a stand-in that is only metadata), lets pip do what the
install cell asks for, and says which versions changed. `run` sets up the same versions with a torch for CPUs
and runs pages in a kernel that believes to be in Colab, install cell included, with an empty cache:
`colab.py run` seven of them, `colab.py run all` each (two hours), `colab.py run nbs/games/play` this one.
Pages with other extras than the ones before get an environment of their own.

Two Pythons, since a torch for CPUs is not to be had for each; make's PYTHON313 and PYTHON311 name them.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".venv" / "colab"
THERE = """ipywidgets==7.7.1 ipython==7.34.0 ipykernel==6.17.1 transformers==5.15.0 peft==0.20.0
accelerate==1.14.0 datasets==4.0.0 fastcore==2.2.0 numpy>=2 scipy matplotlib pandas pyarrow psutil filelock
tqdm httpx safetensors huggingface_hub nbclient nbformat setuptools wheel""".split()
TORCH = "2.11.0"
MAY_CHANGE = {"datasets", "pyarrow"}  # as the install cells say
PAGES = """index nbs/methods/competitive nbs/methods/refinement nbs/views/refinement_stepper
nbs/methods/league nbs/games/play nbs/loop/pipeline""".split()
STARTUP = "import google.colab\n"


def run(*command, **more):
    return subprocess.run([str(c) for c in command], check=True, text=True, **more)


def fresh(name: str) -> Path:
    "The Python of a new environment."
    folder = FOLDER / name
    run(sys.executable, "-m", "venv", "--clear", folder)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-U", "pip")
    return python


def pip(python: Path, *arguments, **more):
    return run(python, "-m", "pip", *arguments, "--disable-pip-version-check", **more)


def stand_in(folder: Path) -> Path:
    "A wheel that says it is torch and holds nothing."
    file = folder / f"torch-{TORCH}-py3-none-any.whl"
    about = f"torch-{TORCH}.dist-info"
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr("torch/__init__.py", f'__version__ = "{TORCH}"\n')
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {TORCH}\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    return file


def versions(python: Path) -> dict:
    told = pip(python, "list", "--format", "json", capture_output=True).stdout
    return {p["name"].lower().replace("_", "-"): p["version"] for p in json.loads(told)}


def resolve() -> int:
    "What the install cell changes in a Colab runtime."
    python = fresh("resolve")
    with tempfile.TemporaryDirectory() as d:
        pip(python, "install", "-q", stand_in(Path(d)), *THERE)
    before = versions(python)
    pip(python, "install", "-q", "--upgrade-strategy", "only-if-needed", ROOT)
    after = versions(python)
    changed = {k: (v, after.get(k)) for k, v in before.items() if after.get(k) != v}
    new = sorted(set(after) - set(before) - {"selfplay-nb"})
    print(f"there before: {len(before)} packages; new: {', '.join(new)}")
    for name, (old, now) in changed.items():
        print(f"{'changed' if name in MAY_CHANGE else 'MUST NOT CHANGE'}: {name} {old} to {now}")
    pip(python, "check")
    return int(not set(changed) <= MAY_CHANGE)


ASK = """
import re, sys
from datetime import datetime
import nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], 4)
for cell in notebook.cells:  # what a GPU alone can do, and what is marked as long
    if cell.cell_type == "code" and ("#| gpu" in cell.source or "#| slow" in cell.source):
        cell.source = ""
    # stored results are fetched from this tree, and not from the forge
    here = rf'fetch_data(\\1, source="{sys.argv[2]}")'
    cell.source = re.sub(r"(?<!def )fetch_data\\(([^)]*?),?\\s*\\)", here, cell.source)
NotebookClient(notebook, timeout=3600, kernel_name="python3").execute()


def seconds(cell):
    at = cell.metadata.get("execution", {})
    began, ended = at.get("iopub.status.busy"), at.get("iopub.status.idle")
    return (datetime.fromisoformat(ended) - datetime.fromisoformat(began)).total_seconds() if ended else 0.0


for cell in sorted((c for c in notebook.cells if "%pip" not in c.source), key=seconds)[:-4:-1]:
    first = next((line for line in cell.source.splitlines() if line[:1] not in ("", "#")), "")
    print(f"{seconds(cell):42.0f} s  {first[:60]}")
"""


def extras_of(page: str) -> str:
    "Those that its install cell asks for, such as `games`."
    found = re.search(r"selfplay_nb\[(.+?)\] @", (ROOT / f"{page}.ipynb").read_text())
    return found[1] if found else ""


def every_page() -> list[str]:
    "In reading order."
    chapters = re.findall(r"- file: (\S+)", (ROOT / "nbs" / "_toc.yml").read_text())
    return ["index", *(f"nbs/{chapter}" for chapter in chapters)]


def pages(*asked) -> int:
    "Run pages, each alone in an empty folder, in a kernel that believes to be in Colab."
    names = every_page() if asked == ("all",) else list(asked) or PAGES
    torch = next(x for x in (ROOT / "constraints.txt").read_text().split() if x.startswith("torch=="))
    failed = []
    with tempfile.TemporaryDirectory() as d:
        home = Path(d)
        startup = home / "ipython" / "profile_default" / "startup"
        startup.mkdir(parents=True)
        (startup / "colab.py").write_text(STARTUP)
        # `google` is a namespace: what packages have in it (protobuf) stays
        (home / "site" / "google" / "colab").mkdir(parents=True)
        (home / "site" / "google" / "colab" / "__init__.py").touch()
        # the cells install from the forge: git is told that it is here
        forge = "https://github.com/selfplay-nb/selfplay_nb"
        (home / "gitconfig").write_text(f'[url "{ROOT}"]\n insteadOf = {forge}\n')
        env = os.environ | {
            "IPYTHONDIR": str(home / "ipython"),
            "GIT_CONFIG_GLOBAL": str(home / "gitconfig"),
            "SELFPLAY_NB_CACHE": str(home / "cache"),
            "PYTHONPATH": str(home / "site"),
        }
        handler = partial(Quiet, directory=ROOT / "nbs")
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        at = f"http://127.0.0.1:{server.server_port}"
        for extras in dict.fromkeys(map(extras_of, names)):
            python = fresh(f"run_{extras}")
            pip(python, "install", "-q", torch, *THERE)
            failed += [p for p in names if extras_of(p) == extras and not passes(p, python, home, env, at)]
    print(f"{len(names) - len(failed)} of {len(names)} pages passed", *failed, flush=True)
    return len(failed)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def passes(page: str, python: Path, home: Path, env: dict, at: str) -> bool:
    "Run a page in an empty folder; its line of the table, and its three longest cells."
    empty = home / page.replace("/", "_")
    empty.mkdir()
    (empty / "page.ipynb").write_bytes((ROOT / f"{page}.ipynb").read_bytes())
    began = time.perf_counter()
    command = [str(python), "-c", ASK, "page.ipynb", at]
    done = subprocess.run(command, cwd=empty, env=env, capture_output=True, text=True)
    minutes = (time.perf_counter() - began) / 60
    outcome = "FAILED" if done.returncode else "passed"
    print(f"{page:34} {minutes:5.1f} minutes  {outcome}", flush=True)
    print(done.stderr[-3000:] if done.returncode else done.stdout.rstrip(), flush=True)
    return not done.returncode


if __name__ == "__main__":
    sys.exit({"resolve": resolve, "run": pages}[sys.argv[1]](*sys.argv[2:]))
