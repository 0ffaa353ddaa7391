"""The course, from its solution notebooks in nbs/course/ (`make course`).

Into runs/course/: `students/` (stubs in place of solutions, no outputs), `solutions/`, `slides/` (reveal.js),
`students.zip` with what students get, and `instructors.zip` with the rest.
"""

import copy
import re
import shutil
import sys
import zipfile
from pathlib import Path

import nbformat
from nbconvert import SlidesExporter

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "nbs" / "course"
SITE = "https://github.com/selfplay-nb/selfplay_nb/blob/main/nbs/"
LINE = 88  # characters of a line of code, which fit on a slide
BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"  # nbgrader's marks


def sessions() -> list[Path]:
    "The solution notebooks, in the order of their numbers."
    return sorted(SOURCE.glob("[0-9][0-9]_*.ipynb"))


def marks(cell) -> dict:
    "nbgrader's metadata of a cell."
    return cell.metadata.get("nbgrader", {})


def exercises(notebook) -> dict:
    "Number of an exercise: its solution cell and its check cell."
    found = {}
    for cell in notebook.cells:
        if match := re.fullmatch(r"s\d\d-e(\d)(-check)?", marks(cell).get("grade_id", "")):
            found.setdefault(int(match[1]), {})["check" if match[2] else "solution"] = cell
    return {k: (v["solution"], v["check"]) for k, v in sorted(found.items())}


def stub(source: str, number: int) -> str:
    "A solution cell with a sentence that raises in place of each marked part."
    lines, inside, name = [], False, "it"
    for line in source.splitlines():
        if function := re.match(r"\s*(?:def|class) (\w+)", line):
            name = name if inside else function[1]
        if line.strip().startswith(BEGIN):
            inside = True
            indent = line[: len(line) - len(line.lstrip())]
            said = f"Exercise {number}: write {name}, then run the check below."
            lines += [f"{indent}# YOUR CODE HERE", f'{indent}raise NotImplementedError("{said}")']
        elif line.strip().startswith(END):
            inside = False
        elif not inside:
            lines.append(line)
    if inside:
        raise ValueError(f"exercise {number} has {BEGIN} without {END}.")
    return "\n".join(lines)


def without_badge(notebook):
    "Take the badge out of a notebook, since it opens the solutions."
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\[!\[Open in Colab\].*\n*", "", cell.source)
    return notebook


def alone(notebook):
    "The notebook as it can be read outside of the repository: links to pages lead to the site."
    made = copy.deepcopy(notebook)
    for cell in made.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\]\(\.\./([\w/.]+)", rf"]({SITE}\1", cell.source)
            cell.source = re.sub(r"\]\((\w+\.(?:ipynb|md|jsonl?))\)", rf"]({SITE}course/\1)", cell.source)
    return made


def student(notebook):
    "The student notebook: stubs, no outputs, no badge (it would open the solutions)."
    made = without_badge(alone(notebook))
    for number, (solution, _) in exercises(made).items():
        solution.source = stub(solution.source, number)
    for cell in made.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return made


def has_picture(cell) -> bool:
    return any("image/png" in o.get("data", {}) for o in cell.get("outputs", []))


def width(cell) -> int:
    "Characters of the longest line that a cell printed."
    said = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in cell.get("outputs", [])]
    return max((len(line) for text in said for line in text.splitlines()), default=0)


def staged(notebook):
    """The notebook as slides show it: no badge, no imports below the title, one picture a slide without the
    code that draws it, and a tag on cells whose output is wide.
    """
    shown = without_badge(alone(notebook))
    sections, picture = 0, False
    for cell in shown.cells:
        place = cell.metadata.setdefault("slideshow", {})
        sections += place.get("slide_type") == "slide"
        if cell.cell_type != "code" or place.get("slide_type") == "skip":
            picture = False
        elif cell.source.startswith(("#| hide", "#| notest")) or sections < 2:
            place["slide_type"] = "skip"
        else:
            if picture or has_picture(cell):
                place.setdefault("slide_type", "subslide")
            picture = has_picture(cell)
            if picture:
                cell.metadata["transient"] = {"remove_source": True}
            if width(cell) > LINE:
                cell.metadata["tags"] = [*cell.metadata.get("tags", []), "wide"]
    return shown


STYLE = """<style>
.reveal div.highlight pre { font-size: 80%; }
.reveal div.jp-OutputArea-output > pre {
  font-size: calc(var(--jp-code-font-size) * 0.8); width: auto; word-break: normal;
}
.reveal .celltag_wide div.jp-OutputArea-output > pre { font-size: calc(var(--jp-code-font-size) * 0.55); }
.reveal .jp-OutputArea-output img { max-height: 75vh; }
.reveal .MJX_Assistive_MathML { display: none; }
</style>
"""


def slides(notebook) -> str:
    "Slides as HTML, by the cells' `slideshow` tags; a browser fetches reveal.js itself from its CDN."
    exporter = SlidesExporter(exclude_input_prompt=True, exclude_output_prompt=True)
    exporter.reveal_scroll = True
    page = exporter.from_notebook_node(staged(notebook))[0]
    return page.replace("</head>", f"{STYLE}</head>", 1)


def data(notebook) -> list[Path]:
    "Stored results that a notebook reads: files beside it that its code names."
    code = "\n".join(c.source for c in notebook.cells if c.cell_type == "code")
    return [f for f in sorted(SOURCE.glob("*.jsonl")) if f.name in code]


def make(out: Path) -> list[Path]:
    "Write all products to `out`, over those of an earlier call, and nothing else; returns the files."
    made = []
    for name in "students", "solutions", "slides":
        (out / name).mkdir(parents=True, exist_ok=True)
    for file in sessions():
        notebook = nbformat.read(file, 4)
        for name, product in ("students", student(notebook)), ("solutions", alone(notebook)):
            nbformat.write(product, out / name / file.name)
            made.append(out / name / file.name)
            made += [Path(shutil.copy(stored, out / name)) for stored in data(notebook)]
        made.append(out / "slides" / f"{file.stem}.html")
        made[-1].write_text(slides(notebook), encoding="utf-8")
    packed = {"students": ["students"], "instructors": ["slides", "solutions"]}
    for name, folders in packed.items():
        with zipfile.ZipFile(out / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as z:
            for f in made:
                if f.parent.name in folders:
                    z.write(f, f"course/{f.parent.name}/{f.name}")
    return [*made, *(out / f"{name}.zip" for name in packed)]


if __name__ == "__main__":
    for f in make(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "runs" / "course")):
        print(f"{f.stat().st_size / 1000:8.0f} kB  {f}")
