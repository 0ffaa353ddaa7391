"""What the processes that run pages share: everything imported, also what is imported when a first model is
loaded and asked. They are forked from one that has this module.
"""

import contextlib
import io
import tempfile
from pathlib import Path

import matplotlib.pyplot  # noqa: F401
import nbdev.test  # noqa: F401
import tqdm

import selfplay_nb.loop.pipeline  # noqa: F401
import selfplay_nb.studies.costs  # noqa: F401
from selfplay_nb.models.base import Base, tiny_model_folder
from selfplay_nb.models.policy import Policy

tqdm.tqdm.monitor_interval = 0  # no thread: a process with threads should not be forked

with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
    base = Base.load(tiny_model_folder(Path(folder) / "tiny"), device="cpu")
    Policy(base, "student").sample(["1 + 1 ="], max_new_tokens=2, seed=0)
del base
