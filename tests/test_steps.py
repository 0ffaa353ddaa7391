"Records as figures that need no kernel: every frame is there, and nothing in them is markup of the models."

import re

import pytest

from selfplay_nb.core.players import Scripted
from selfplay_nb.games.play import MinimaxBot, OpenSpielGame, play
from selfplay_nb.methods.league import LeagueTraining
from selfplay_nb.methods.refinement import Step, Trace, Version
from selfplay_nb.scoring.reward import exact_number
from selfplay_nb.views.steps import Steps, game_frames, league_frames, run_frames, trace_frames

NASTY = "<script>alert(1)</script></table><b>"


def test_a_figure_has_every_frame_and_one_script():
    html = Steps([("a", "<i>one</i>"), ("b", "<i>two</i>")], "Two")._repr_html_()
    assert html.count("class='frame'") == 2
    assert html.count("<script>") == 1
    key = re.search(r"<div id='(steps-\w+)'", html)[1]
    assert f'getElementById("{key}")' in html


def test_figures_of_other_frames_have_other_names():
    keys = {re.search(r"steps-\w+", Steps([("a", text)])._repr_html_())[0] for text in ("one", "two")}
    assert len(keys) == 2


def test_no_frames_are_an_error():
    with pytest.raises(ValueError, match="no frames"):
        Steps([])


def test_what_models_wrote_is_text():
    step = Step(0, NASTY, by=NASTY, target=1)
    trace = Trace(NASTY, [Version(NASTY), Version(NASTY + " more", parent=0)], [step])
    html = Steps(trace_frames(trace), NASTY)._repr_html_()
    assert html.count("<script>") == 1
    assert "<script>alert" not in html
    assert len(trace_frames(trace)) == 2


def test_a_game_has_a_frame_for_each_turn_and_its_end():
    game = OpenSpielGame("tic_tac_toe")
    wrong = Scripted(lambda prompt, rng: NASTY, "wrong")
    transcript = play(game, [wrong, MinimaxBot(game)], n=1, seed=0, illegal="random")[0]
    frames = game_frames(transcript, game)
    assert len(frames) == len(transcript.turns) + 1
    assert "<script>alert" not in Steps(frames)._repr_html_()
    assert frames[-1][0] == transcript.result


def test_a_league_grows_by_a_member_a_frame():
    league = LeagueTraining()
    for name in "one", "two", "three":
        league.add(Scripted(lambda prompt, rng: str(rng.randint(0, 3)), name), name)
    league.play(None, [dict(prompt=f"{i} =", answer=1) for i in range(6)], exact_number)
    frames = league_frames(league)
    assert [caption for caption, _ in frames] == ["with two", "with three"]
    assert "three" not in frames[0][1]


def test_a_torn_last_line_is_left_out(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text('{"round": 0, "seconds": 0.0}\n{"round": 1, "sec')
    assert [caption for caption, _ in run_frames(tmp_path)] == ["round 0"]


def test_a_folder_without_metrics_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no metrics.jsonl"):
        run_frames(tmp_path)
