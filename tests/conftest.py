import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # else each name that is asked for is tried for half a minute

import pytest

from selfplay_nb.models.base import tiny_model_folder
from selfplay_nb.models.policy import Base, Policy


def pytest_collection_finish():
    "Updates collect garbage again and again: let them not look through all that was imported each time."
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tiny(tiny_folder):
    "A random character-level model in NF4, float32 compute."
    import torch

    return Base.load(tiny_folder, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="session")
def loaded():
    "The real small model in NF4, float32 compute, so that tolerances mean the same on every machine."
    import torch

    return Base.load(dtype=torch.float32, device="cpu")


@pytest.fixture
def real(loaded):
    "The real small model; adapters are removed after the test."
    yield loaded
    for name in list(loaded.adapters):
        Policy.resident(loaded, name).delete()


@pytest.fixture
def student(real):
    "A student on the real model with non-zero weights."
    import torch

    policy = Policy(real, "student", seed=0)
    g = torch.Generator().manual_seed(1)
    policy.load_state({k: v + 0.02 * torch.randn(v.shape, generator=g) for k, v in policy.state().items()})
    return policy
