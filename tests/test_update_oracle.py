"Updates against plain PyTorch: one sequence at a time, a forward pass of its own, and nothing of the library."
import pytest
import torch

from selfplay_nb.policy import Base, Policy
from selfplay_nb.update import sft


def test_sft_trains_on_completions_alone(tiny_folder):
    policy = Policy(Base.load(tiny_folder, dtype=torch.float32, device="cpu", chat=False))
    with policy.base.running("student") as model: logits = model(torch.tensor([[68, 69, 91, 92, 93, 2]])).logits[0].log_softmax(-1)
    alone = [-logits[at, token].item() for at, token in zip(range(1, 5), [91, 92, 93, 2])]  # x, y, z and the end
    assert sft(policy, [dict(prompt="ab", completion="xyz")]).losses == pytest.approx([sum(alone)/4], abs=1e-5)
