"""The lowest versions that pyproject.toml allows: `python floor.py` prints them as pip's constraints, `python
floor.py try` uses the library with them.

torch is the exception: its lowest version brings gigabytes for GPUs, so the one of constraints.txt stands.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def floor() -> list[str]:
    "`name==version` for each dependency with a lower bound."
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    found = dict(re.match(r"([A-Za-z0-9_-]+)>=([0-9.]+)", d).groups() for d in asked if ">=" in d)
    found["torch"] = re.search(r"^torch==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
    return [f"{name}=={version}" for name, version in found.items()]


def use():
    "Fetch, convert, load, ask, train and save, with nothing in the cache."
    import os
    import tempfile

    with tempfile.TemporaryDirectory() as d:
        os.environ["SELFPLAY_NB_CACHE"] = d
        import torch

        from selfplay_nb.models.policy import Base, Policy
        from selfplay_nb.models.update import dpo, sft

        base = Base.load(dtype=torch.float32, device="cpu")
        student = Policy(base, "student")
        said = student.generate("What is the capital of France?", temperature=0, max_new_tokens=8)
        assert "Paris" in said, said
        before = student.state()
        print(dpo(student, [dict(prompt="1 + 2 =", chosen="3", rejected="5")], Policy(base, "base")))
        print(sft(student, [dict(prompt="1 + 2 =", completion="3")]))
        assert any(not torch.equal(before[k], w) for k, w in student.state().items())
        Policy.load(base, student.save(Path(d) / "saved"), "again")
        print(base)


if sys.argv[1:] == ["try"]:
    use()
else:
    print("\n".join(floor()))
