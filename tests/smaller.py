"""Chapters with fewer samples: the checks run every cell of every page, and most of their time would go into
answers of the model. The stored outputs are those of the pages as they stand.
"""

from pathlib import Path

from nbdev.process import NBProcessor

NBS = Path(__file__).parents[1] / "nbs"
# page: what stands there -> what is run. "course" is all sessions, and "student" their notebooks for
# students, whose exercises are empty: they only have to run.
SMALLER = """
course: PROMPTS = 16 -> PROMPTS = 2
course: HELD_OUT = 100 -> HELD_OUT = 3
course: TOKENS = 24 -> TOKENS = 12
course: steps=12 -> steps=2
course: "train", 12, seed=3 -> "train", 3, seed=3
student: PROMPTS = 16 -> PROMPTS = 2
student: HELD_OUT = 100 -> HELD_OUT = 2
student: TOKENS = 24 -> TOKENS = 10
student: steps=12 -> steps=1
student: "train", 12, seed=3 -> "train", 2, seed=3
core/protocols: eval_every=1, -> eval_size=2,
core/protocols: prompts_per_round=4 -> prompts_per_round=2
core/protocols: max_new_tokens=12 -> max_new_tokens=5
core/protocols: warm_up=64 -> warm_up=8
core/protocols: prompts_per_round=8, eval_size=8 -> prompts_per_round=2, eval_size=1
games/debate: model], 4, swap=False, max_new_tokens=32 -> model], 1, swap=False, max_new_tokens=12
games/debate: model], 2, swap=False, max_new_tokens=32 -> model], 1, swap=False, max_new_tokens=12
loop/collectors: trainer.draw(0)[:8] -> trainer.draw(0)[:4]
loop/collectors: max_new_tokens=12 -> max_new_tokens=8
loop/collectors: n_proposals=12 -> n_proposals=6
loop/game_rounds: prompts_per_round=12 -> prompts_per_round=4
loop/pipeline: n_games=64 -> n_games=32
loop/pipeline: combine(pref_data, synthetic, ratio=1) -> combine(pref_data[:12], synthetic, ratio=1)
loop/pipeline: combine(pref_data, same, ratio=1) -> combine(pref_data[:12], same, ratio=1)
loop/pipeline: problems("train", 32, seed=1) -> problems("train", 16, seed=1)
loop/pipeline: task, rng = ArithmeticTask(2) -> task, rng = ArithmeticTask(2, shots=0)
loop/pipeline: eval_size=40, validation_size=40 -> eval_size=16, validation_size=8
loop/pipeline: n_prompts=16 -> n_prompts=8
loop/pipeline: test = task.problems("held-out", 40) -> test = task.problems("held-out", 12)
loop/rounds: prompts_per_round=4, n_samples=4 -> prompts_per_round=2, n_samples=4
loop/rounds: max_new_tokens=12 -> max_new_tokens=8
loop/trainer: task.problems("train", 8, seed=step) -> task.problems("train", 4, seed=step)
loop/trainer: n_samples=4, max_new_tokens=12 -> n_samples=4, max_new_tokens=8
loop/trainer: for step in range(2): -> for step in range(1):
loop/trainer: shots=2 -> shots=1
loop/trainer: max_new_tokens=8, -> max_new_tokens=6,
loop/trainer: prompts_per_round=8 -> prompts_per_round=3
loop/trainer: eval_size=24 -> eval_size=4
loop/trainer: gate_prompts=32 -> gate_prompts=4
loop/vitals: problems("train", 12) -> problems("train", 4)
loop/vitals: prompts, max_new_tokens=8 -> prompts, max_new_tokens=5
loop/vitals: num_train_epochs=8 -> num_train_epochs=4
methods/adversarial: task.problems("train", 24) -> task.problems("train", 6)
methods/adversarial: max_new_tokens=16, threshold=0.1 -> max_new_tokens=10, threshold=0.1
methods/competitive: problems = task.problems("train", 8) -> problems = task.problems("train", 4)
methods/competitive: n_samples=8, max_new_tokens=16 -> n_samples=6, max_new_tokens=12
methods/constitutional: max_new_tokens=40 -> max_new_tokens=10
methods/constitutional: n_pairs=2 -> n_pairs=1
methods/constitutional: [ask(topic) for topic in topics] -> [ask(topic) for topic in topics[:2]]
methods/league: task.problems("held-out", 4, seed=7) -> task.problems("held-out", 2, seed=7)
methods/refinement: max_new_tokens=48 -> max_new_tokens=8
methods/refinement: max_new_tokens=32 -> max_new_tokens=8
methods/refinement: few = problems("train", 3) -> few = problems("train", 2)
methods/refinement: refine_batch(few, 2) -> refine_batch(few, 1)
methods/skill: task.problems("held-out", 40) -> task.problems("held-out", 6)
models/reward_model: task.problems("train", 192) -> task.problems("train", 32)
models/reward_model: task.problems("held-out", 80) -> task.problems("held-out", 16)
models/reward_model: train[:32] -> train[:12]
models/reward_model: task, rng = ArithmeticTask(2) -> task, rng = ArithmeticTask(2, shots=0)
models/policy: "Name a fruit."], max_new_tokens=12 -> "Name a fruit."], max_new_tokens=5
models/policy: n_samples=4, max_new_tokens=12) -> n_samples=4, max_new_tokens=5)
models/policy: (prompts, 4, 12, seed=seed) -> (prompts, 4, 5, seed=seed)
models/sampling: Sampling(12) -> Sampling(6)
models/sampling: max_new_tokens=12 -> max_new_tokens=6
models/update: rows = [row(a) for a in range(8)] -> rows = [row(a) for a in range(4)]
models/update: dpo(wild, pairs[:4], start -> dpo(wild, pairs[:2], start
models/update: num_train_epochs=10, loss_type -> num_train_epochs=4, loss_type
models/update: n_samples=16, max_new_tokens=6 -> n_samples=8, max_new_tokens=4
models/update: steps=5 -> steps=2
models/update: for a in range(16)] -> for a in range(4)]
scoring/judge: task.problems("held-out", 8) -> task.problems("held-out", 2)
scoring/judge: task.problems("held-out", 16, seed=1) -> task.problems("held-out", 8, seed=1)
scoring/judge: "null answer", "thought process", "injected verdict", "very long" -> "null answer", "very long"
scoring/judge: questions[:6], right[:6] -> questions[:2], right[:2]
scoring/evaluation: task.problems("held-out", 50) -> task.problems("held-out", 16)
stats/diversity: max_new_tokens=12 -> max_new_tokens=4
stats/diversity: for _ in range(3): -> for _ in range(1):
stats/diversity: problems("train", 8) -> problems("train", 4)
stats/retention: = PASSAGES, -> = PASSAGES[:4],
stats/retention: = ITEMS, -> = ITEMS[:12],
stats/retention: problems("train", 8) -> problems("train", 3)
stats/retention: shuffled[:8] -> shuffled[:3]
studies/costs: prompts(32), 1, 8, -> prompts(4), 1, 2,
studies/costs: prompts(32), 1, 16, -> prompts(4), 1, 4,
studies/costs: rows=8, new=16 -> rows=2, new=4
studies/costs: for k in range(2) for arm -> for k in range(1) for arm
studies/failures: n_rounds=3, -> n_rounds=2,
studies/failures: prompts_per_round=12, n_samples=8 -> prompts_per_round=3, n_samples=4
studies/failures: eval_size=24 -> eval_size=4
studies/failures: task=Plausible(2) -> task=Plausible(2, shots=0)
tasks/creative: max_new_tokens=80 -> max_new_tokens=16
tasks/task: else 50 -> else 8
views/monitor: prompts_per_round=8, n_samples=4 -> prompts_per_round=2, n_samples=4
views/monitor: eval_size=24 -> eval_size=4
views/monitor: max_new_tokens=8, shots=2 -> max_new_tokens=5, shots=1
views/steps: prompts_per_round=8, eval_size=20 -> prompts_per_round=3, n_samples=4, eval_size=6
index: problems = task.problems("train", 4) -> problems = task.problems("train", 2)
"""


def smaller(page: str) -> dict:
    "What is replaced in a page, and by what."
    lines = [line.partition(": ")[2] for line in SMALLER.splitlines() if line.startswith(f"{page}: ")]
    return dict(line.split(" -> ") for line in lines)


def shortened(source: str, page: str) -> str:
    "A cell with fewer samples."
    for old, new in smaller(page).items():
        source = source.replace(old, new)
    return source


class Smaller(NBProcessor):
    "A page as `nbdev_test` reads it, with fewer samples."

    def __init__(self, path, *args, **settings):
        super().__init__(path, *args, **settings)
        inside = Path(path).is_relative_to(NBS)
        page = Path(path).relative_to(NBS).with_suffix("").as_posix() if inside else "index"
        cells = [c for c in self.nb.cells if c.cell_type == "code"]
        gone = [old for old in smaller(page) if not any(old in c.source for c in cells)]
        assert not gone, f"{page} has no cell with {gone} any more: change tests/smaller.py"
        for cell in cells:
            cell.source = shortened(cell.source, page)
