"Updates against plain PyTorch: one sequence at a time, a forward pass of its own, and nothing of the library."
import pytest
import torch

from selfplay_nb.policy import Base, Policy
from selfplay_nb.reward_model import RewardModel
from selfplay_nb.update import dpo, reinforce, sft


def test_sft_trains_on_completions_alone(tiny_folder):
    policy = Policy(Base.load(tiny_folder, dtype=torch.float32, device="cpu", chat=False))
    with policy.base.running("student") as model: logits = model(torch.tensor([[68, 69, 91, 92, 93, 2]])).logits[0].log_softmax(-1)
    alone = [-logits[at, token].item() for at, token in zip(range(1, 5), [91, 92, 93, 2])]  # x, y, z and the end
    assert sft(policy, [dict(prompt="ab", completion="xyz")]).losses == pytest.approx([sum(alone)/4], abs=1e-5)


# steps in unequal parts

UNEQUAL = [dict(prompt=f"{i}", chosen="yes"*(1 + i % 4), rejected="no"*(1 + i % 3), completion="so"*(1 + i % 5), advantage=(-1)**i*(1. + i)) for i in range(10)]
PLAIN = dict(optim="sgd", learning_rate=1., max_grad_norm=0., weight_decay=0.)

def update_with(kind, folder, **settings):
    "The losses and the weights that an update ends at."
    base = Base.load(folder, dtype=torch.float32, device="cpu", max_train_tokens=10**6)
    if kind == "reward":
        model = RewardModel(base)
        with torch.no_grad(): model.head.copy_(torch.linspace(-1, 1, 64)[None])
        result = model.train(UNEQUAL, **PLAIN | settings)
        return result.losses, model.policy.state() | {"head": model.head.detach().clone()}
    policy = Policy(base)
    if kind == "dpo": result = dpo(policy, UNEQUAL, policy.snapshot("before"), **PLAIN | settings)
    else: result = dict(sft=sft, reinforce=reinforce)[kind](policy, UNEQUAL, **PLAIN | settings)
    return result.losses, policy.state()


@pytest.mark.parametrize("kind", ["sft", "dpo", "reinforce", "reward"])
@pytest.mark.parametrize("size, parts, steps", [(8, 2, 1), (4, 3, 1), (3, 4, 1), (1, 10, 1), (4, 2, 2), (3, 3, 2)])
def test_a_steps_rows_weigh_the_same_however_it_is_parted(tiny_folder, kind, size, parts, steps):
    whole, a = update_with(kind, tiny_folder, per_device_train_batch_size=size*parts)
    parted, b = update_with(kind, tiny_folder, per_device_train_batch_size=size, gradient_accumulation_steps=parts)
    assert len(parted) == len(whole) == steps and parted == pytest.approx(whole, abs=1e-5)
    for k in a: torch.testing.assert_close(b[k], a[k], rtol=0, atol=1e-5, msg=k)
