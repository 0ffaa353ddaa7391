"Make README.md from index.ipynb: its text and saved outputs, images under nbs/images/."

import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]


def main():
    notebook = nbformat.read(ROOT / "index.ipynb", 4)
    notebook.cells = [c for c in notebook.cells if "#| hide" not in c.source]
    for c in notebook.cells:
        c.source = re.sub(r"^#\|.*\n", "", c.source, flags=re.M)
    notebook.metadata["language_info"] = {"name": "python"}
    text, resources = MarkdownExporter().from_notebook_node(notebook)
    for name, data in resources["outputs"].items():
        (ROOT / "nbs" / "images").mkdir(exist_ok=True)
        (ROOT / "nbs" / "images" / name).write_bytes(data)
        text = text.replace(f"({name})", f"(nbs/images/{name})")
    note = "<!-- Made from index.ipynb by `make readme`: edit that. -->\n\n"
    (ROOT / "README.md").write_text(note + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
