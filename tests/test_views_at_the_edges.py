"What goes wrong beside a view: a judge that fails, a folder that is gone, a killed run, odd texts."

import json
import math
import random
import threading
import time
from types import SimpleNamespace

import pytest

from selfplay_nb.core.players import Scripted
from selfplay_nb.games.debate import Debate, Motion
from selfplay_nb.games.play import LiveGame, Played
from selfplay_nb.loop import callbacks
from selfplay_nb.loop.callbacks import (
    Live,
    Progress,
    control,
    plot_metrics,
    round_line,
    summary,
    take_control,
)
from selfplay_nb.loop.trainer import SelfPlayConfig, SelfPlayTrainer
from selfplay_nb.scoring.evaluation import Evaluation, transcripts_html
from selfplay_nb.scoring.reward import Guarded
from selfplay_nb.stats.diversity import self_bleu, words
from selfplay_nb.stats.ratings import Games, bradley_terry
from selfplay_nb.tasks.creative import SpecReward
from selfplay_nb.tasks.task import as_task
from selfplay_nb.views.game_viewer import GameViewer, PlaySeat
from selfplay_nb.views.monitor import headline


class Flaky:
    "A judge that fails until it is switched on."

    on = False

    def compare(self, prompts, a, b):
        if not self.on:
            raise OSError("the judge's server is down")
        return [0.7] * len(a)


@pytest.mark.parametrize("seat", [0, 1])
def test_a_judge_that_fails_at_the_end_is_asked_again(seat, tmp_path):
    judge = Flaky()
    w = PlaySeat(Debate(judge, rounds=1), Scripted(lambda prompt, rng: "no, never"), seat=seat)
    w.choose("my statement")
    assert "The judge failed" in w.status.value and not w.again.disabled
    w.go_on()
    assert len(w.live.transcript.turns) == 2 and not w.live.over
    judge.on = True
    w.go_on()
    assert w.live.over and len(w.live.transcript.turns) == 2
    w.played.save(tmp_path / "g.jsonl")
    GameViewer(Played.load(tmp_path / "g.jsonl"))
    with pytest.raises(ValueError, match="nobody is to move"):
        w.live.take("more")


def test_what_a_debate_refuses():
    with pytest.raises(ValueError, match="'For'"):
        Motion("Water is wet.", "For")
    with pytest.raises(ValueError, match="list of motions"):
        Debate(Flaky(), "Zoos are good.")


def test_a_judge_of_debates_may_abstain():
    class Silent:
        def compare(self, prompts, a, b):
            return [None] * len(a)

    game = Debate(Silent(), [Motion("Water is wet.", "for")], rounds=1)
    live = LiveGame(game, 0, ["a", "b"])
    live.take("yes", end=False)
    live.take("no", end=False)
    with pytest.warns(UserWarning, match="not judged"):
        live.finish()
    assert live.transcript.outcome == [0.5, 0.5]


def test_a_control_file_that_is_held_does_not_end_a_pause(tmp_path):
    class Trainer:
        dir, stopped, history, round, last_pair = tmp_path, "", [], 0, None
        adjustable = staticmethod(dict)

    live, trainer = Live(), Trainer()
    live.on_train_begin(trainer, 3)
    control(tmp_path, pause=True)
    thread = threading.Thread(target=live._obey, args=[trainer])
    thread.start()
    time.sleep(0.3)
    with callbacks._control_lock(tmp_path):
        assert take_control(tmp_path) is None
        time.sleep(0.4)
    time.sleep(0.2)
    assert thread.is_alive()
    control(tmp_path, pause=False)
    thread.join(5)
    assert not thread.is_alive()


def test_a_wish_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="pasue"):
        control(tmp_path, pasue=True)
    control(tmp_path, stop=True)
    with pytest.raises(ValueError, match="no folder"):
        control(tmp_path / "tpyo", stop=True)
    assert not (tmp_path / "tpyo").exists()


def test_a_run_that_was_killed_while_it_paused_is_not_running():
    live = dict(paused=True, stage="sampling", stopping="", round=1, total=3)
    live |= dict(tokens_per_second=1, memory_mb=2, seconds_left=None)
    assert "not running" in headline(dict(live=live, alive=False))


def test_an_evaluation_of_nothing_is_shown_as_such():
    nothing = dict(value=None, n=0, low=None, high=None)
    m = dict(round=0, seconds=0.0, accuracy=nothing)
    assert "nothing was judged" in round_line(m)
    assert len(plot_metrics([m, m | dict(round=1)]).lines[0].get_xdata()) == 0
    arena = SimpleNamespace(units=lambda config: 1, unit="x")
    bar, trainer = Progress(), SimpleNamespace(round=0, arena=arena, config=None)
    bar.on_train_begin(trainer, 2)
    trainer.round = 1
    bar.on_round_end(trainer, m | dict(round=1))
    bar.bar.close()


def test_prompts_of_parts_are_shown():
    prompt = [dict(role="user", content=[dict(type="text", text="hi")])]
    evaluation = Evaluation([dict(prompt=prompt, answer="x", right=1.0, truncated=False)])
    assert "hi" in transcripts_html(evaluation, evaluation)


def test_collapse_is_seen_in_chinese_too():
    same = ["谢谢你的提问祝你愉快" + x for x in "一二三四"]
    other = ["今天天气很好我们去公园", "鱼在水里游得非常快", "他昨天买了三本新书", "火车八点从北京出发"]
    assert words("Ab 天气, ok") == ["ab", "天", "气", ",", "ok"]
    assert self_bleu(same) > 0.5 > self_bleu(other)


@pytest.mark.parametrize("k, n", [(3, 3), (4, 2), (5, 1)])
def test_ratings_without_a_prior(k, n):
    rated = 0
    for seed in range(12):
        rng, games = random.Random(seed), Games()
        for a in range(k):
            for b in range(a):
                for _ in range(n):
                    games.add(str(a), str(b), float(rng.random() < 0.5))
        try:
            found = bradley_terry(games, prior=0, resamples=60)
        except ValueError:
            continue  # somebody won or lost everything
        rated += 1
        assert all(map(math.isfinite, found.ratings)) and all(map(math.isfinite, found.samples.ravel()))
    assert rated


@pytest.mark.parametrize(
    "spec, says",
    [
        ('{"length": 50}', "length is 50"),
        ('{"length": [50, 10]}', "length is"),
        ('{"must": []}', "must is"),
        ('{"must": "key"}', "must is 'key'"),
        ('{"forbidden": "very"}', "forbidden is 'very'"),
        ('{"tone": "happy"}', "tone is 'happy'"),
        ('{"form": "sonnet"}', "form is"),
        ('{"speakers": []}', "speakers is"),
        ('{"persona": 3}', "persona is 3"),
    ],
)
def test_a_spec_with_a_value_of_another_kind_is_refused(spec, says):
    with pytest.raises(ValueError, match=says):
        SpecReward()(["p"], ["some words"], spec=[spec])


def test_specs_at_the_edges():
    reward = SpecReward()
    assert reward(["p"], ["word " * 60], spec=['{"length": [0, 50]}']) == [0.0]
    for names in ["Mary Ann", "Bo"], ["Anna-Lena", "Bo"], ["Élodie", "Bo"]:
        a, b = names
        said = "Good morning, my friend.", "Hello to you.", "How is the weather today?", "It is fine."
        told = "\n".join(f"{name}: {text}" for name, text in zip([a, b, a, b], said))
        spec = json.dumps(dict(speakers=names, form="script"))
        assert reward(["p"], [told], spec=[spec]) == [1.0]


def test_a_run_whose_verifier_abstains_ends_and_says_so(tiny, tmp_path, monkeypatch):
    "The random model's answers are all cut off, and count as wrong: here they count as what they are."
    given = lambda value, cut: None if value != value else value
    monkeypatch.setattr("selfplay_nb.scoring.evaluation._given", given)
    down = []

    def exam(prompts, completions, **columns):
        if down:
            raise OSError("the server is down")
        return [1.0] * len(prompts)

    prompts = [f"Say {k}." for k in range(40)]
    task = as_task(prompts, reward=lambda p, a: float(len(a) % 7), verifier=Guarded(exam))
    few = dict(n_rounds=1, prompts_per_round=2, n_samples=2, eval_size=4, max_new_tokens=8)
    trainer = SelfPlayTrainer(SelfPlayConfig(str(tmp_path / "run"), **few), tiny, task=task)
    down.append(True)
    trainer.train()
    assert [m["accuracy"]["n"] for m in trainer.history] == [0, 0]
    assert "No evaluation judged anything." in summary(tmp_path / "run") and "gate" in trainer.card()
