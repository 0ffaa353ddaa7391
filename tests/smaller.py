"""Chapters with fewer samples: the checks run every cell of every page, and most of their time would go into
answers of the model. The stored outputs are those of the pages as they stand.
"""

from pathlib import Path

from nbdev.process import NBProcessor

NBS = Path(__file__).parents[1] / "nbs"
# page: what stands there -> what is run
SMALLER = """
core/protocols: eval_every=1, -> eval_size=8,
core/protocols: max_new_tokens=12 -> max_new_tokens=6
core/protocols: warm_up=64 -> warm_up=16
core/protocols: prompts_per_round=8, eval_size=8 -> prompts_per_round=4, eval_size=4
games/debate: model], 4, swap=False, max_new_tokens=32 -> model], 1, swap=False, max_new_tokens=24
games/debate: model], 2, swap=False, max_new_tokens=32 -> model], 1, swap=False, max_new_tokens=24
loop/collectors: trainer.draw(0)[:8] -> trainer.draw(0)[:4]
loop/collectors: max_new_tokens=12 -> max_new_tokens=8
loop/collectors: n_proposals=12 -> n_proposals=6
loop/game_rounds: prompts_per_round=12 -> prompts_per_round=4
loop/pipeline: n_games=64 -> n_games=32
loop/pipeline: test = task.problems("held-out", 40) -> test = task.problems("held-out", 12)
loop/rounds: prompts_per_round=4, n_samples=4 -> prompts_per_round=2, n_samples=4
loop/rounds: max_new_tokens=12 -> max_new_tokens=8
loop/trainer: prompts_per_round=8 -> prompts_per_round=4
loop/trainer: eval_size=24 -> eval_size=8
loop/trainer: gate_prompts=32 -> gate_prompts=8
loop/vitals: problems("train", 12) -> problems("train", 6)
loop/vitals: num_train_epochs=8 -> num_train_epochs=4
methods/adversarial: task.problems("train", 24) -> task.problems("train", 8)
methods/competitive: problems = task.problems("train", 8) -> problems = task.problems("train", 4)
methods/competitive: n_samples=8, max_new_tokens=16 -> n_samples=6, max_new_tokens=12
methods/constitutional: max_new_tokens=40 -> max_new_tokens=16
methods/refinement: max_new_tokens=48 -> max_new_tokens=16
methods/refinement: few = problems("train", 3) -> few = problems("train", 2)
methods/skill: task.problems("held-out", 40) -> task.problems("held-out", 6)
models/reward_model: task.problems("train", 192) -> task.problems("train", 64)
models/reward_model: task.problems("held-out", 80) -> task.problems("held-out", 24)
models/update: steps=5 -> steps=2
models/update: for a in range(16)] -> for a in range(8)]
scoring/judge: task.problems("held-out", 8) -> task.problems("held-out", 4)
scoring/judge: task.problems("held-out", 16, seed=1) -> task.problems("held-out", 8, seed=1)
stats/diversity: max_new_tokens=12 -> max_new_tokens=6
stats/diversity: for _ in range(3): -> for _ in range(1):
studies/costs: rows=8, new=16 -> rows=2, new=4
studies/costs: for k in range(2) for arm -> for k in range(1) for arm
studies/failures: prompts_per_round=12, n_samples=8 -> prompts_per_round=6, n_samples=8
studies/failures: eval_size=24 -> eval_size=8
tasks/task: else 50 -> else 8
views/monitor: prompts_per_round=8, n_samples=4 -> prompts_per_round=4, n_samples=4
views/monitor: eval_size=24 -> eval_size=8
views/steps: prompts_per_round=8, eval_size=20 -> prompts_per_round=4, eval_size=8
index: problems = task.problems("train", 4) -> problems = task.problems("train", 2)
"""


def smaller(page: str) -> dict:
    "What is replaced in a page, and by what."
    lines = [line.partition(": ")[2] for line in SMALLER.splitlines() if line.startswith(f"{page}: ")]
    return dict(line.split(" -> ") for line in lines)


class Smaller(NBProcessor):
    "A page as `nbdev_test` reads it, with fewer samples."

    def __init__(self, path, *args, **settings):
        super().__init__(path, *args, **settings)
        inside = Path(path).is_relative_to(NBS)
        page = Path(path).relative_to(NBS).with_suffix("").as_posix() if inside else "index"
        for old, new in smaller(page).items():
            cells = [c for c in self.nb.cells if c.cell_type == "code" and old in c.source]
            assert cells, f"{page} has no cell with {old!r} any more: change tests/smaller.py"
            for cell in cells:
                cell.source = cell.source.replace(old, new)
