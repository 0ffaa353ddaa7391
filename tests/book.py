"""The site, from the stored outputs of the notebooks (`make site`), without running any of them.

Into build/site/: the front page, the course, the chapters by wing, the glossary, and a reference of the
public names, made from their signatures and docstrings.
"""

import ast
import inspect
import json
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import nbformat
import yaml

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "build" / "site-source"
OUT = ROOT / "build" / "site"
DIRECTIVE = re.compile(r"^#\|.*\n?", re.M)
LEFT_OUT = re.compile(r"^#\|\s*hide\b|google\.colab", re.M)
FORGE = "https://github.com/selfplay-nb/selfplay_nb/blob/main"
BADGE = re.compile(r"^\[!\[Open in Colab\].*\n\n?", re.M)
MORE = ["nbs/glossary", "nbs/course/instructors"]
MORE += [f"nbs/contributing/{name}" for name in ("add_a_chapter", "add_a_task", "add_a_method", "decisions")]

CONF = '''project = "selfplay_nb"
author = "The selfplay_nb developers"
copyright = "2026, the selfplay_nb developers. Text: CC BY 4.0; code: Apache-2.0"
extensions = ["myst_nb", "sphinx_external_toc"]
external_toc_path = "_toc.yml"
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
html_theme = "sphinx_book_theme"
html_title = "selfplay_nb"
html_theme_options = {
    "repository_url": "https://github.com/selfplay-nb/selfplay_nb",
    "repository_branch": "main",
    "use_repository_button": True,
    "launch_buttons": {"colab_url": "https://colab.research.google.com"},
    "show_navbar_depth": 1,
    "navbar_persistent": [],
}
suppress_warnings = ["mystnb", "myst.header", "misc.highlighting_failure"]
'''


def chapters() -> list[dict]:
    "The parts of the table of contents, with files relative to the root."
    parts = yaml.safe_load((ROOT / "nbs" / "_toc.yml").read_text())["parts"]
    return [dict(p, chapters=[{"file": f"nbs/{c['file']}"} for c in p["chapters"]]) for p in parts]


def shown(cell) -> bool:
    "Is a cell for readers?"
    return not (cell.cell_type == "code" and LEFT_OUT.search(cell.source))


def page(notebook):
    "A notebook as the site shows it: without cells for machines, directives and the badge."
    notebook.cells = [c for c in notebook.cells if shown(c)]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = DIRECTIVE.sub("", cell.source)
            if only_imports(cell.source):
                cell.metadata["tags"] = [*cell.metadata.get("tags", []), "hide-input"]
            cell.outputs = [o for o in cell.outputs if not is_widget(o)]
        else:
            cell.source = BADGE.sub("", cell.source)
    notebook.metadata.pop("widgets", None)
    return notebook


def only_imports(source: str) -> bool:
    "Does a cell import and do nothing else? It is folded."
    try:
        statements = ast.parse(source).body
    except SyntaxError:  # a line for IPython
        return False
    return bool(statements) and all(isinstance(s, (ast.Import, ast.ImportFrom)) for s in statements)


def is_widget(output) -> bool:
    "Does an output need a kernel? Its picture stands below it."
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def elsewhere(text: str, file: Path) -> str:
    "Links to files that are no pages lead to the forge."

    def moved(match):
        if "://" in match[2] or match[2].startswith("mailto:"):
            return match[0]
        target, mark, heading = match[2].partition("#")
        heading = mark + re.sub(r"[^\w-]", "", heading.lower())  # Jupyter's anchors are not Sphinx's
        path = (file.parent / target).resolve()
        if not target or path.suffix in (".ipynb", ".md", ".png", ".svg") and path.exists():
            return f"{match[1]}({target}{heading})"
        return f"{match[1]}({FORGE}/{path.relative_to(SOURCE)}{heading})"

    return re.sub(r"(\]|\!\[[^\]]*\])\(([^)\s]+)\)", moved, text)


def write_pages():
    "All pages, and the pictures that they show."
    files = ["index", *(c["file"] for p in chapters() for c in p["chapters"])]
    for name in files:
        notebook = page(nbformat.read(ROOT / f"{name}.ipynb", 4))
        target = SOURCE / f"{name}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, target)
    for name in MORE:
        target = SOURCE / f"{name}.md"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / f"{name}.md", target)
    shutil.copytree(ROOT / "nbs" / "images", SOURCE / "nbs" / "images")


def settle_links():
    "Once all pages are there: links that lead to none of them lead to the forge."
    for file in SOURCE.rglob("*.ipynb"):
        notebook = nbformat.read(file, 4)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = elsewhere(cell.source, file)
        nbformat.write(notebook, file)
    for file in SOURCE.rglob("*.md"):
        file.write_text(elsewhere(file.read_text(), file))


def arguments(obj) -> str:
    "What an object takes, as a table made of the comments beside its arguments."
    from nbdev.showdoc import DocmentTbl

    try:
        table = DocmentTbl(obj)._repr_markdown_() or ""
    except (TypeError, ValueError, AttributeError, NameError):  # no signature, or unknown types
        return ""
    return re.sub(r"\n(?!\|)", " ", table)  # a comment of several lines is one cell


def described(name: str, obj, level: str) -> str:
    "What the reference says of a name."
    doc = inspect.cleandoc(obj.__doc__ or "")
    return f"{level} {name}\n\n{escaped(doc)}\n\n{escaped(arguments(obj))}\n"


def escaped(text: str) -> str:
    "Text in which Markdown finds no HTML and no formula."
    return text.replace("<", "&lt;").replace("$", "\\$")


def methods(kind) -> dict:
    "The public methods that a class has of its own."
    own = {k: v for k, v in vars(kind).items() if not k.startswith("_") and callable(v)}
    return {k: v for k, v in own.items() if v.__doc__}


def write_reference() -> list[str]:
    "A page for each wing; returns their names."
    import selfplay_nb

    wings = {}
    for module, names in selfplay_nb._WHERE.items():
        wings.setdefault(module.split(".")[0], []).append((module, names.split()))
    (SOURCE / "api").mkdir()
    said = ["# Reference\n\nThe names of `selfplay_nb`, by wing. Each is taught in a chapter.\n"]
    for wing, modules in wings.items():
        text = [f"# {wing}\n"]
        for module, names in modules:
            taught = f"../nbs/{module.replace('.', '/')}.ipynb"
            text.append(f"## selfplay_nb.{module}\n\nTaught in [its chapter]({taught}).\n")
            for name in names:
                obj = getattr(import_module(f"selfplay_nb.{module}"), name)
                text.append(described(name, obj, "###"))
                for method, fn in methods(obj).items() if isinstance(obj, type) else ():
                    text.append(described(f"{name}.{method}", fn, "####"))
        (SOURCE / "api" / f"{wing}.md").write_text("\n".join(text))
        said.append(f"- [{wing}]({wing}.md): " + ", ".join(f"`{n}`" for _, names in modules for n in names))
    (SOURCE / "api" / "index.md").write_text("\n".join(said) + "\n")
    return ["api/index", *(f"api/{wing}" for wing in wings)]


def write_toc(reference: list[str]):
    parts = chapters()
    parts.append({"caption": "Reference", "chapters": [{"file": f} for f in ["nbs/glossary", *reference]]})
    rest = [f for f in MORE if f != "nbs/glossary"]
    parts.append({"caption": "Teaching and contributing", "chapters": [{"file": f} for f in rest]})
    toc = {"format": "jb-book", "root": "index", "parts": parts}
    (SOURCE / "_toc.yml").write_text(yaml.safe_dump(toc, sort_keys=False))


def prepare():
    "Everything that the site is built from."
    shutil.rmtree(SOURCE, ignore_errors=True)
    SOURCE.mkdir(parents=True)
    write_pages()
    write_toc(write_reference())
    settle_links()
    (SOURCE / "conf.py").write_text(CONF)


def broken(folder: Path = SOURCE) -> list[str]:
    "Links of the prepared pages that lead to nothing."
    found = []
    for file in [*folder.rglob("*.ipynb"), *folder.rglob("*.md")]:
        text = file.read_text()
        if file.suffix == ".ipynb":
            cells = json.loads(text)["cells"]
            text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path = target.partition("#")[0]
            outside = "://" in path or path.startswith("mailto:")
            if path and not outside and not (file.parent / path).exists():
                found.append(f"{file.relative_to(folder)}: {target}")
    return found


def main() -> int:
    prepare()
    if dead := broken():
        print("links that lead nowhere:", *dead, sep="\n  ")
        return 1
    shutil.rmtree(OUT, ignore_errors=True)
    told = ["-b", "html", "-q", "-W", "--keep-going", "-d", ROOT / "build" / "doctrees"]
    done = subprocess.run([sys.executable, "-m", "sphinx", *told, SOURCE, OUT])
    print(f"{len(list(OUT.rglob('*.html')))} pages: open {OUT.relative_to(ROOT)}/index.html")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
