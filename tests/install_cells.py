"""The first code cell of each page: what Colab installs for it, and the data that it reads when it is opened
alone. `python tests/install_cells.py` writes it into every page; run it after a page or its data changed.
"""

import hashlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
REPOSITORY = "git+https://github.com/selfplay-nb/selfplay_nb"
EXTRAS = {  # page: the extra that its cells use
    "core/protocols": "games",
    "games/play": "games",
    "loop/game_rounds": "games",
    "views/game_viewer": "games",
    "views/steps": "games",
    "tasks/reasoning": "reasoning",
    "tasks/code": "code",
    "stats/retention": "eval",
    "scale/endpoint": "scale",
    "scale/server": "scale",
    "scale/workers": "scale",
}
SIZES = {  # of the downloads beyond what the library itself needs, as in studies/doctor
    "games": "OpenSpiel and TextArena, 29 MB",
    "reasoning": "reasoning-gym and math-verify, 10 MB",
    "code": "HumanEval's problems, below 1 MB",
    "eval": "lm-eval, 26 MB",
    "scale": "httpx and Ray, 79 MB",
}
DATA = {  # page: files of the repository that its cells read
    "course/01_earlier_self": ["course/01_rounds.jsonl"],
    "course/07_what_to_train_on": ["course/07_filtering.jsonl"],
    "course/10_clinic": ["course/10_clinic.jsonl"],
    "methods/adversarial": ["methods/filtering.jsonl"],
    "methods/constitutional": ["methods/planted.toml", "methods/stuffed.jsonl", "methods/attempts.toml"],
    "methods/game_training": ["methods/games.jsonl"],
    "methods/refinement": ["methods/refinement.json"],
    "methods/skill": ["methods/skill.jsonl"],
    "scale/server": ["scale/server.jsonl"],
    "scale/workers": ["scale/workers.jsonl"],
    "studies/costs": ["studies/costs.jsonl"],
    "studies/doctor": ["studies/doctor.jsonl"],
    "studies/failures": ["studies/failures.jsonl"],
    "studies/gain": [
        "studies/gain.jsonl",
        "studies/gain_did.jsonl",
        "studies/gain_pipeline.jsonl",
        "studies/gain_quarter.jsonl",
        "studies/gain_words.jsonl",
    ],
    "studies/games": ["studies/games.jsonl", "studies/games_imitation.jsonl"],
    "studies/league": ["studies/league.jsonl"],
    "studies/learning": [
        "studies/learning.jsonl",
        "studies/learning_ceiling.jsonl",
        "studies/learning_methods.jsonl",
        "studies/learning_ungated.jsonl",
    ],
}


def pages() -> dict[str, Path]:
    "All pages by name."
    nbs = ROOT / "nbs"
    found = [p.relative_to(nbs).with_suffix("").as_posix() for p in sorted(nbs.rglob("*.ipynb"))]
    return {"index": ROOT / "index.ipynb"} | {k: nbs / f"{k}.ipynb" for k in found if "_checkpoints" not in k}


def install_cell(page: str) -> str:
    "The source of a page's install cell."
    extra = EXTRAS.get(page)
    wanted = f'"selfplay_nb[{extra}] @ {REPOSITORY}"' if extra else REPOSITORY
    lines = [
        "#| notest",
        "import sys",
        "",
        'if "google.colab" in sys.modules:  # Colab keeps its own torch, numpy, transformers and ipywidgets',
    ]
    if extra:
        lines.append(f"    # with the extra {extra}: {SIZES[extra]}")
    lines.append(f"    %pip install -q --upgrade-strategy only-if-needed {wanted}")
    files = [f for f in DATA.get(page, []) if (ROOT / "nbs" / f).exists()]
    if files:
        lines += ["", "from selfplay_nb.studies.doctor import fetch_data", ""]
    for f in files:
        sha256 = hashlib.sha256((ROOT / "nbs" / f).read_bytes()).hexdigest()
        call = f'fetch_data("{f}", "{sha256}")'
        broken = ["fetch_data(", f'    "{f}",', f'    "{sha256}",', ")"]
        lines += [call] if len(call) <= 110 else broken
    return "\n".join(lines)


def place(notebook: dict) -> int | None:
    "Which cell installs; None where there is none."
    codes = [i for i, c in enumerate(notebook["cells"]) if c["cell_type"] == "code"][:3]
    sources = {i: "".join(notebook["cells"][i]["source"]) for i in codes}
    return next((i for i, source in sources.items() if '"google.colab" in sys.modules' in source), None)


def main():
    for name, path in pages().items():
        notebook = json.loads(path.read_text(encoding="utf-8"))
        i = place(notebook)
        if i is None:
            print(f"{name} has no install cell", file=sys.stderr)
            continue
        source = install_cell(name).splitlines(True)
        if notebook["cells"][i]["source"] != source:
            notebook["cells"][i]["source"] = source
            text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True)
            path.write_text(text + "\n", encoding="utf-8")
            print(name)


if __name__ == "__main__":
    main()
