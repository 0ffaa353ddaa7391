"""What the processes that run pages share: everything imported, and the model that nearly all of them load.
They are forked from one that has this module.
"""

import contextlib
import io
import tempfile
from pathlib import Path

import matplotlib.pyplot  # noqa: F401
import nbdev.test  # noqa: F401
import torch
import tqdm

import selfplay_nb.loop.pipeline  # noqa: F401
import selfplay_nb.models.base as base_module
import selfplay_nb.studies.costs  # noqa: F401
from selfplay_nb.models.base import DEFAULT_MODEL, Base, compute_dtype, load_model, tiny_model_folder
from selfplay_nb.models.policy import Policy
from selfplay_nb.stats.retention import ITEMS, PASSAGES

del PASSAGES[6:], ITEMS[16:]  # a quarter of them will do for vital signs
tqdm.tqdm.monitor_interval = 0  # no thread: a process with threads should not be forked

with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
    base = Base.load(tiny_model_folder(Path(folder) / "tiny"), device="cpu")
    Policy(base, "student").sample(["1 + 1 ="], max_new_tokens=2, seed=0)
del base

USUAL = str(compute_dtype("cpu")).removeprefix("torch.")
loaded = []


def first_loaded(source=DEFAULT_MODEL, dtype=None, device=None, load_in_4bit=True, attn_implementation=None):
    "The model that is loaded here, to whoever first asks for one like it; then it is loaded as ever."
    alike = source == DEFAULT_MODEL and load_in_4bit and not attn_implementation and device in (None, "cpu")
    if loaded and alike and str(dtype or USUAL).removeprefix("torch.") == USUAL:
        return loaded.pop()
    return load_model(source, dtype, device, load_in_4bit, attn_implementation)


if not torch.cuda.is_available():
    with contextlib.redirect_stderr(io.StringIO()):
        loaded.append(load_model())
    base_module.load_model = first_loaded
