"The reward model: an adapter and a head that share the base, and leave it alone."

import math

import numpy as np
import pytest
import torch

from selfplay_nb.models.policy import Policy
from selfplay_nb.models.reward_model import RewardModel, Scores

PAIRS = [dict(prompt=f"{i}", chosen="yes " * (1 + i % 3), rejected="no") for i in range(12)]


def weights(base, but):
    return {n: p.detach().clone() for n, p in base.model.named_parameters() if f".{but}." not in n}


def test_it_learns_and_nothing_else_moves(tiny):
    student = Policy(tiny, "student")
    judge = RewardModel(tiny)
    before, config = weights(tiny, "reward"), tiny.model.config.to_dict()
    assert judge.scores(PAIRS).margins.tolist() == [0] * 12 and judge.scores(PAIRS).accuracy.value == 0.5
    result = judge.train(PAIRS, num_train_epochs=20, learning_rate=5e-3)
    assert result.losses[0] == pytest.approx(math.log(2), abs=1e-6) and result.losses[-1] < 0.3
    assert judge.scores(PAIRS).accuracy.value == 1
    after = weights(tiny, "reward")
    assert all(torch.equal(before[n], after[n]) for n in before) and tiny.model.config.to_dict() == config
    assert not any(p.requires_grad for p in tiny.model.parameters()) and not tiny.model.training
    assert student.generate("a", max_new_tokens=3, seed=0) is not None


def test_batch_and_company_do_not_change_a_reward(tiny):
    judge = RewardModel(tiny)
    judge.train(PAIRS, num_train_epochs=3, learning_rate=5e-3)
    prompts, answers = ["a", "a longer prompt", "b"], ["x", "some words", "y"]
    together = judge(prompts, answers)
    alone = [judge([p], [a])[0] for p, a in zip(prompts, answers)]
    assert together == pytest.approx(alone, abs=1e-5) and len(set(together)) == 3
    assert judge(["a"], ["x"], truncated=[True]) != judge(["a"], ["x"])  # the end token counts


def test_its_margins_are_those_that_training_told(tiny):
    judge = RewardModel(tiny)
    result = judge.train(PAIRS, per_device_train_batch_size=12, learning_rate=0.0)
    logged = [h for h in result.history if "accuracy" in h]
    assert logged and logged[-1]["margin"] == pytest.approx(judge.scores(PAIRS).margins.mean(), abs=1e-5)


def test_a_diverged_training_changes_nothing(tiny):
    judge = RewardModel(tiny)
    judge.train(PAIRS, learning_rate=5e-3)
    was = judge(["a"], ["x"])
    with pytest.raises(FloatingPointError, match="diverged"):
        judge.train(PAIRS * 4, learning_rate=1e30, num_train_epochs=3)
    assert judge(["a"], ["x"]) == was


def test_bad_pairs_never_reach_it(tiny):
    judge = RewardModel(tiny)
    bad = [
        dict(prompt="a", chosen="", rejected="x"),
        dict(prompt="a", chosen="x", rejected="x"),
        dict(prompt="a", chosen="x", rejected="y" * 300),
    ]
    assert dict(judge.train(PAIRS + bad).dropped) == {"empty": 1, "identical": 1, "over-long": 1}
    with pytest.raises(ValueError, match="nothing to train on"):
        judge.train(bad)
    with pytest.raises(ValueError, match="2 prompts but 1"):
        judge(["a", "b"], ["x"])
    with pytest.raises(ValueError, match="context is 256"):
        judge(["a"], ["x" * 300])


def test_save_and_load(tiny, tmp_path):
    judge = RewardModel(tiny)
    judge.train(PAIRS, learning_rate=5e-3)
    folder = judge.save(tmp_path / "judge")
    again = RewardModel.load(tiny, folder, "again")
    assert again(["a"], ["x"]) == judge(["a"], ["x"])
    judge.train(PAIRS, learning_rate=5e-3)
    assert judge.save(folder) == folder and RewardModel.load(tiny, folder, "newer")(["a"], ["x"]) == judge(
        ["a"], ["x"]
    ) != again(["a"], ["x"])
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="left as it is"):
        judge.save(folder)
    with pytest.raises(ValueError, match="no head.safetensors"):
        RewardModel.load(tiny, tmp_path, "other")


def test_scores():
    s = Scores(
        np.array([2.0, 1.0, 0.0, 3.0]),
        np.array([0.0, 2.0, 0.0, 0.0]),
        np.array([[1, 2]] * 4),
        ["p", "p", "q", "q"],
    )
    assert s.accuracy.value == 0.625 and s.accuracy.n == 4 and s.accuracy.n_effective == 2
    said = s.calibration(2)
    assert said[0][0] < said[1][0] and said[1][1].value == 1 and said[0][1].value == 0.25


def test_memory_of_the_real_one_is_small(real):
    judge = RewardModel(real)
    try:
        assert judge.n_bytes < 0.1 * real.model.get_memory_footprint()
    finally:
        judge.delete()


@pytest.mark.parametrize(
    "prompt, completion, said",
    [
        (None, "x", "row 1, column 'prompt' is None"),
        ("a", None, "row 1, column 'completion' is None"),
        ("a", 5, "row 1, column 'completion' is 5"),
        ([], "x", "row 1, column 'prompt'"),
    ],
)
def test_what_is_no_prompt_or_answer_is_named(tiny, prompt, completion, said):
    judge = RewardModel(tiny)
    with pytest.raises(ValueError, match=said):
        judge(["a", prompt], ["x", completion])
    assert judge([[dict(role="user", content="a")]], [[dict(role="assistant", content="x")]]) == judge(
        ["a"], ["x"]
    )
