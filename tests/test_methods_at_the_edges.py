"What users bring to the mechanisms: judges that miscount, rewards that abstain, leagues to be looked at."

import math
from types import SimpleNamespace

import numpy as np
import pytest

from selfplay_nb.core.players import Scripted
from selfplay_nb.games.play import play
from selfplay_nb.loop.game_rounds import GameTask
from selfplay_nb.loop.trainer import SelfPlayConfig, SelfPlayTrainer
from selfplay_nb.methods.adversarial import AdversarialFilter
from selfplay_nb.methods.competitive import CompetitiveSelfPlay
from selfplay_nb.methods.constitutional import ConstitutionalReviser, ConstitutionalRewardWrapper
from selfplay_nb.methods.game_training import Sticks, advantages
from selfplay_nb.methods.league import LeagueTraining
from selfplay_nb.methods.skill import SkillConditioning, at_level, check_levels, skill_rows, without_level
from selfplay_nb.models.policy import Policy
from selfplay_nb.models.update import DPO, SCHEDULES, PairSettings, sft, win_probability
from selfplay_nb.scoring.evaluation import versus
from selfplay_nb.scoring.judge import Panel
from selfplay_nb.scoring.reward import Guarded, exact_number


def says(text, name=None):
    return Scripted(lambda prompt, rng: text, name or text)


def varied(name):
    return Scripted(lambda prompt, rng: f"{rng.randrange(1000)} words", name)


def judge(verdicts):
    return SimpleNamespace(compare=lambda prompts, a, b, **columns: verdicts(len(prompts)), name="J")


@pytest.mark.parametrize("p", [0.9, 1.0, 0.2])
def test_a_pair_has_the_judges_probability(p):
    pairs = CompetitiveSelfPlay(says("a"), says("b"), judge(lambda n: [p] * n), n_samples=1).train_step(["q"])
    assert win_probability(pairs[0]) == pytest.approx(max(p, 1 - p))
    by_reward = CompetitiveSelfPlay(says("aa"), says("b"), lambda p, r: float(len(r)), n_samples=1)
    assert win_probability(by_reward.train_step(["q"])[0]) == pytest.approx(1 / (1 + math.exp(-1)))


@pytest.mark.parametrize(
    "verdicts",
    [lambda n: [1.0] * (n - 1), lambda n: [1.0] * (n + 1), lambda n: [7] * n],
    ids=["too few", "too many", "out of range"],
)
def test_verdicts_of_another_number_or_range_are_refused(verdicts):
    step = CompetitiveSelfPlay(varied("a"), varied("b"), judge(verdicts), n_samples=2)
    with pytest.raises(ValueError, match="'J' gave"):
        step.train_step(["p", "q"])
    with pytest.raises(ValueError, match="'J' gave"):
        versus(varied("a"), varied("b"), [dict(prompt="p"), dict(prompt="q")], judge(verdicts))
    league = LeagueTraining(3, anchors=dict(a=varied("a"), b=varied("b")))
    with pytest.raises(ValueError, match="'J' gave"):
        league.play(None, [dict(prompt="p"), dict(prompt="q")], judge(verdicts))


def test_a_rounding_error_is_no_fault():
    step = CompetitiveSelfPlay(varied("a"), varied("b"), judge(lambda n: [1.0000001] * n), n_samples=1)
    assert step.train_step(["p"]).scores == [[1.0]]
    asked = Guarded(judge(lambda n: [1.0000001, -1e-9, 1.1][:n]))
    assert asked.compare(["p"] * 3, ["a"] * 3, ["b"] * 3)[:2] == pytest.approx([1, 0])
    assert dict(asked.failures) == {"no probability": 1}


def test_a_panel_checks_its_members():
    panel = Panel(dict(one=judge(lambda n: [0.5] * n), two=judge(lambda n: [3] * n)))
    with pytest.raises(ValueError, match="'two' gave 3"):
        panel.compare(["p"], ["a"], ["b"])


def test_a_guarded_judge_counts_what_is_no_probability():
    guarded = Guarded(judge(lambda n: [1, 0.5, -1, 0][:n]))
    found = guarded.compare(["p"] * 4, ["a"] * 4, ["b"] * 4)
    assert found[:2] == [1, 0.5] and math.isnan(found[2]) and found[3] == 0
    assert guarded.failures["no probability"] == 1


@pytest.mark.parametrize(
    "rule", [lambda p, r: float(len(r)), lambda prompt, a, b: float(len(a) > len(b))], ids=["reward", "rule"]
)
def test_a_league_takes_plain_functions(rule):
    league = LeagueTraining(3, anchors=dict(long=says("long"), s=says("s")))
    rows = league.play([("long", "s")], [dict(prompt="p"), dict(prompt="q")], rule)
    assert [r["score"] for r in rows] == [1.0, 1.0]


def test_a_league_that_is_looked_at_is_not_changed(tmp_path):
    anchors, rule = dict(long=says("long"), s=says("s")), lambda p, r: float(len(r))
    problems = [dict(prompt=f"p{k}") for k in range(5)]
    folder = tmp_path / "league"
    league = LeagueTraining(3, folder=folder, anchors=anchors)
    league.save()
    league.play(None, problems, rule)
    written = (folder / "games.jsonl").read_bytes()
    second = LeagueTraining(3, folder=folder, anchors=anchors)
    assert len(second.rows) == 0 and (folder / "games.jsonl").read_bytes() == written
    league.play([("s", "long")], problems, rule)  # the first one goes on
    league.save()
    assert len(LeagueTraining(3, folder=folder, anchors=anchors).rows) == 10
    league.play([("s", "long")], problems, rule)  # not saved: a crash, and another league in its place
    third = LeagueTraining(3, folder=folder, anchors=anchors)
    assert len(third.rows) == 10 and len(third.ledger.rows()) == 15
    third.play([("s", "long")], problems[:2], rule)
    third.save()
    assert [f.name for f in folder.glob("games*")] == ["games.jsonl"]
    fourth = LeagueTraining(3, folder=folder, anchors=anchors)
    assert fourth.rows == third.rows == third.ledger.rows() and len(third.rows) == 12


def test_a_league_whose_games_were_cut_off_is_refused(tmp_path):
    anchors = dict(long=says("long"), s=says("s"))
    league = LeagueTraining(3, folder=tmp_path / "league", anchors=anchors)
    league.play(None, [dict(prompt="p")], lambda p, r: float(len(r)))
    league.save()
    league.ledger.rewind(0)
    with pytest.raises(ValueError, match="lost games"):
        LeagueTraining(3, folder=tmp_path / "league", anchors=anchors)


def test_an_illegal_answer_is_not_paid_since_the_opponent_forfeits_later():
    said = iter(["banana", "1"] * 50)
    mine = Scripted(lambda prompt, rng: next(said), "A")
    played = play(Sticks(9, 9), [mine, says("nonsense", "B")], 4, swap=False, illegal="retry")
    rows = advantages(played, "A", baseline=lambda turns: [0.5] * len(turns))
    assert {(r["completion"], r["advantage"]) for r in rows} == {("banana", -0.5), ("1", 0.5)}
    lost = advantages(played, "B", baseline=lambda turns: [0.5] * len(turns))
    assert {r["advantage"] for r in lost} == {-0.5}


def test_a_screening_says_what_it_cannot_store_before_it_asks(tmp_path):
    asked = []
    player = Scripted(lambda prompt, rng: asked.append(prompt) or "1", "p")
    rows = [dict(prompt=f"q{k}", answer=np.int64(k)) for k in range(4)]
    screen = AdversarialFilter(player, lambda prompt, response, answer: 1.0, 4, ledger=tmp_path / "l.jsonl")
    with pytest.raises(ValueError, match="cannot be written"):
        screen.find_adversarial_examples(rows, progress=False)
    assert not asked


@pytest.mark.parametrize("levels", [("<low>", "<high>"), ("<a>", "<b>", "<c>", "<d>")])
def test_any_number_of_levels(levels):
    skill = SkillConditioning(varied("p"), lambda p, r: float(r.split()[0]), levels=levels, n_samples=12)
    rows = skill.collect(["p", "q"], seed=1)
    assert {r["level"] for r in rows} == set(levels)


def test_a_label_beyond_the_levels_is_said():
    with pytest.raises(ValueError, match=r"labels are \[3\]"):
        skill_rows(["p"], [["a", "b"]], [[0, 3]])


def test_levels_stand_before_content_in_parts():
    prompt = [dict(role="user", content=[dict(type="text", text="hi")])]
    there = at_level(prompt, "<expert>")
    assert there[-1]["content"] == "<expert>hi" and without_level(there)[-1]["content"] == "hi"


def test_levels_that_nobody_judged():
    found = check_levels(varied("p"), [dict(prompt="p"), dict(prompt="q")], lambda p, r: None)
    assert "no prompt has a score" in repr(found) and "no prompt" in found._repr_html_()


def test_rows_of_levels_have_the_tokens_that_were_sampled():
    said = [SimpleNamespace(text=f"a{k}", truncated=False, token_ids=[k, 9]) for k in range(3)]
    rows = skill_rows(["p"], [said], [[0, 1, 2]])
    assert all(r["completion_ids"] == [int(r["completion"][1]), 9] for r in rows)
    assert "completion_ids" not in skill_rows(["p"], [["a", "b", "c"]], [[0, 1, 2]])[0]


def test_revisions_keep_columns_and_abstentions_cost_one_row():
    replies = iter(["first", "critique", "5"] * 9)
    reviser = ConstitutionalReviser(Scripted(lambda prompt, rng: next(replies), "p"))
    rows = [dict(prompt="2+3?", answer=5)]
    revised = reviser.revise(rows)
    assert revised[0]["columns"] == {"answer": 5}
    kept, dropped = revised.sft_rows(ConstitutionalRewardWrapper(exact_number))
    assert len(kept) + sum(dropped.values()) == 1
    kept, dropped = revised.sft_rows(ConstitutionalRewardWrapper(lambda p, r, **columns: None))
    assert not kept and dropped["unjudged"] + dropped["unchanged"] + dropped["empty"] == 1
    silent = ConstitutionalRewardWrapper(lambda p, r: None)
    assert "Not judged" in silent.attribution(["a"] * 2, ["b", "c"]).verdict
    assert ConstitutionalRewardWrapper(exact_number)(["2+2?"], ["4"], answer=np.array([4]))[0] >= 1


@pytest.mark.parametrize("kind", SCHEDULES)
def test_each_schedule_runs(tiny, kind):
    policy = Policy(tiny, "student", seed=0)
    rows = [dict(prompt="a", completion="b"), dict(prompt="c", completion="d")]
    warm = {} if kind == "constant" else dict(warmup_steps=1)
    more = warm | dict(num_train_epochs=2, per_device_train_batch_size=1)
    done = sft(policy, rows, lr_scheduler_type=kind, **more)
    assert len(done.losses) == 4


def test_a_schedule_that_needs_more_is_refused():
    for kind in "reduce_lr_on_plateau", "cosine_with_min_lr", "warmup_stable_decay":
        with pytest.raises(ValueError, match="lr_scheduler_type"):
            PairSettings(**{k: v for k, v in DPO.items()} | dict(lr_scheduler_type=kind))


def test_the_start_of_a_problem_is_the_one_that_is_played():
    task = GameTask(Sticks(5, 60))
    problems = task.problems("train", 6)
    opening = {p["start"]: str(Sticks(5, 60).start(p["start"])) for p in problems}
    for some in problems, problems[2:3], problems[:4]:
        for game in task.play([says("1", "a"), says("1", "b")], some):
            assert game.seed in opening and game.seed == some[game.start]["start"]
            assert str(Sticks(5, 60).start(game.seed)) == opening[game.seed]
    with pytest.raises(ValueError, match="2 starts for n=3"):
        play(Sticks(), [says("1", "a"), says("1", "b")], 3, starts=[1, 2])


def test_a_screen_of_one_answer_is_refused_before_the_run(tmp_path, tiny):
    config = SelfPlayConfig(str(tmp_path / "run"), collect="screen", n_samples=1)
    with pytest.raises(ValueError, match="n_samples is 1"):
        SelfPlayTrainer(config, tiny)
