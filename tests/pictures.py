"""Pictures of the widgets for the saved pages: `make pictures`, or `python tests/pictures.py stepper card`.

A Markdown image `../images/widget-NAME.png` in a page asks for a picture of the widget that the code cell
above it shows. The cells up to there are run in JupyterLab, in a headless Chromium that is steered by the
DevTools protocol, so that the picture is what a reader sees. Nothing is written but the pictures.

Needs the extra dev and Chromium (Debian and Ubuntu: `apt-get install chromium`; the variable CHROMIUM names
another one).
"""

import base64
import io
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "nbs" / "images"
IMAGE = re.compile(r"!\[([^\]]*)\]\(\.\./images/widget-(\w+)\.png\)")
LEFT_OUT = re.compile(r"^#\|\s*(notest|gpu|slow|hide|eval:\s*false)|google\.colab", re.M)
LARGEST = 150_000  # bytes of a picture
WIDTH, HEIGHT = 1100, 3000  # of the browser's window, so that no widget has to be scrolled

# What is done to a widget before its picture is taken, as code for the page's kernel.
DONE_BEFORE = {
    "card": "card.file.value = 'runs/constitution.toml'",  # where it is by default
    "stepper": "view.file.value = 'runs/refinement.json'",
    "viewer": "viewer.step.value = 7",
    "monitor": """
while run.is_alive() and monitor.state["live"]["round"] < 2:
    time.sleep(0.1)
monitor.pause.click()
while run.is_alive() and not monitor.state["live"]["paused"]:
    time.sleep(0.1)
""",
}


def pictures() -> dict:
    "Name of each picture that a page asks for: the page, alt text, code before the widget's cell, that cell."
    found = {}
    for page in sorted((ROOT / "nbs").rglob("*.ipynb")):
        code = []
        for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "code":
                code.append(source)
                continue
            for alt, name in IMAGE.findall(source):
                before = [c for c in code[:-1] if not LEFT_OUT.search(c)]
                found[name] = dict(page=page, alt=alt, before="\n".join(before), cell=code[-1])
    return found


def notebook(picture: dict, name: str) -> dict:
    "A notebook of two or three cells: all before the widget, the widget, and what is done to it."
    sources = [picture["before"], picture["cell"], *filter(None, [DONE_BEFORE.get(name)])]
    cells = [
        dict(cell_type="code", id=f"cell{i}", metadata={}, source=s, execution_count=None, outputs=[])
        for i, s in enumerate(sources)
    ]
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    return dict(cells=cells, metadata=kernel, nbformat=4, nbformat_minor=5)


def wait_for(what: str, ready, seconds: float = 60):
    "The first true value of `ready()`; raises `TimeoutError`."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := ready():
            return value
        time.sleep(0.2)
    raise TimeoutError(f"{what} after {seconds:.0f} s")


def get(url: str):
    "What a local server answers, or None as long as it does not."
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.read()
    except OSError:
        return None


@contextmanager
def running(command: list, log: Path, **env):
    "A program that is ended with the block."
    with open(log, "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | env)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def jupyter(folder: Path):
    "JupyterLab without a browser on a free port, with settings of its own; yields address and token."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    token = secrets.token_hex()
    own = {
        f"JUPYTER{name}": str(folder / "jupyter")
        for name in ("_CONFIG_DIR", "_RUNTIME_DIR", "LAB_SETTINGS_DIR", "LAB_WORKSPACES_DIR")
    }
    options = [
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        f"--port={port}",
        f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={folder / 'pages'}",
        "--LabApp.expose_app_in_browser=True",
        "--LabApp.news_url=None",
    ]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "jupyterlab", *options]
    with running(command, folder / "jupyter.log", PYTHONPATH=path, **own):
        url = f"http://127.0.0.1:{port}"
        wait_for("no JupyterLab", lambda: get(f"{url}/api/status?token={token}"))
        yield url, token


class Browser:
    "A tab of Chromium."

    def __init__(self, address: str):
        from websocket import create_connection  # comes with JupyterLab

        self.socket = create_connection(address, timeout=600, suppress_origin=True)
        self.count = 0

    def send(self, method: str, **params) -> dict:
        "A command of the DevTools protocol, and its result."
        self.count += 1
        self.socket.send(json.dumps(dict(id=self.count, method=method, params=params)))
        while (answer := json.loads(self.socket.recv())).get("id") != self.count:
            pass  # events
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def value(self, script: str):
        "What JavaScript in the page comes to."
        found = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"].get("exception", {}).get("description"))
        return found["result"].get("value")


@contextmanager
def chromium(folder: Path):
    "A headless Chromium; yields its tab."
    program = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not program:
        sys.exit("Chromium is missing: apt-get install chromium, or name another in the variable CHROMIUM.")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--remote-debugging-port=0",
        f"--user-data-dir={folder / 'chromium'}",
        f"--window-size={WIDTH},{HEIGHT}",
    ]
    with running([program, *options, "about:blank"], folder / "chromium.log"):
        told = folder / "chromium" / "DevToolsActivePort"
        port = wait_for("no Chromium", lambda: told.exists() and told.read_text().split())[0]
        tabs = json.loads(get(f"http://127.0.0.1:{port}/json"))
        yield Browser(next(t["webSocketDebuggerUrl"] for t in tabs if t["type"] == "page"))


RUN = """(async () => {
  await jupyterapp.restored;
  const open = () => [...jupyterapp.shell.widgets('main')].find(w => w.sessionContext && w.content.widgets);
  while (!open()) await new Promise(done => setTimeout(done, 200));
  const panel = open();
  await panel.context.ready;
  await panel.sessionContext.ready;
  jupyterapp.shell.activateById(panel.id);
  await jupyterapp.commands.execute('notebook:run-all-cells');
  window.widgetCell = panel.content.widgets[1].node;
  const outputs = panel.content.widgets.flatMap(c => c.model.outputs.toJSON());
  return outputs.filter(o => o.output_type == 'error').map(o => `${o.ename}: ${o.evalue}`);
})()"""
PLACE = """(() => {
  const w = window.widgetCell.querySelector('.jp-OutputArea-output .jupyter-widgets');
  if (!w) return null;
  const r = w.getBoundingClientRect();
  return r.height > 20 ? {x: r.x, y: r.y, width: r.width, height: w.scrollHeight} : null;
})()"""


def small(png: bytes) -> bytes:
    "The picture with as many colours as its size allows."
    from PIL import Image

    image = Image.open(io.BytesIO(png)).convert("RGB")
    for colours in 128, 64, 32, 16:
        out = io.BytesIO()
        image.quantize(colours, dither=Image.Dither.NONE).save(out, format="png", optimize=True)
        if len(out.getvalue()) < LARGEST:
            return out.getvalue()
    raise ValueError(f"{len(out.getvalue())} bytes with 16 colours: expected less than {LARGEST}.")


def take(tab: Browser, url: str) -> bytes:
    "Open a notebook, run it, and picture the widget of its second cell."
    tab.send("Page.navigate", url=url)
    wait_for(
        "no notebook",
        lambda: tab.value("!!(window.jupyterapp && document.querySelector('.jp-Notebook .jp-CodeCell'))"),
    )
    if errors := tab.value(RUN):
        raise RuntimeError("; ".join(errors))
    wait_for("no widget", lambda: tab.value(PLACE))
    time.sleep(2)  # until it is drawn whole
    clip = tab.value(PLACE)
    shot = tab.send("Page.captureScreenshot", format="png", clip=clip | dict(scale=1))
    return small(base64.b64decode(shot["data"]))


def main(names: list[str]):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended, too
    asked = pictures()
    if unknown := sorted(set(names) - set(asked)):
        sys.exit(f"No page shows {', '.join(unknown)}: expected some of {', '.join(sorted(asked))}.")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as tmp:
        folder = Path(tmp)
        (folder / "pages").mkdir()
        with jupyter(folder) as (url, token), chromium(folder) as tab:
            for name in names or sorted(asked):
                file = folder / "pages" / f"{name}.ipynb"
                file.write_text(json.dumps(notebook(asked[name], name)), encoding="utf-8")
                png = take(tab, f"{url}/doc/tree/{name}.ipynb?token={token}&reset")
                IMAGES.mkdir(exist_ok=True)
                (IMAGES / f"widget-{name}.png").write_bytes(png)
                print(f"widget-{name}.png  {len(png) / 1e3:.0f} kB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
