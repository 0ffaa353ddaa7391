"Creative tasks: checks on hand-written texts, a reward against sameness, and dialogues of personas."

import json
import random
import time

import pytest

from selfplay_nb.core.players import Scripted
from selfplay_nb.scoring.reward import as_reward, score
from selfplay_nb.tasks.creative import (
    CHECKS,
    FORMS,
    KINDS,
    CreativeTask,
    DiverseReward,
    Persona,
    SpecReward,
    check_dialogue,
    check_forbidden,
    check_form,
    check_length,
    check_must,
    check_persona,
    check_prose,
    check_sentences,
    check_speakers,
    check_tone,
    dialogue,
    dialogues,
    similarities,
)

STORY = (
    "The lantern went out before the boat was tied. Ida felt for the rope with a shaking hand, and the whole"
    " harbour seemed to hold its breath with her."
)
LETTER = "Dear Otto,\n\nI lost my key under the bridge.\n\nYours,\nMira"


# checks


@pytest.mark.parametrize(
    "check, text, asked, value",
    [
        (check_length, "one two three", [3, 5], 1),
        (check_length, "one two", [4, 6], 0.5),
        (check_length, "a b c d e f", [2, 4], 0),
        (check_length, "", [2, 4], 0),
        (check_length, "don't over-think it", [3, 3], 1),
        (check_sentences, "Yes. “No!” Why?", [3, 3], 1),
        (check_sentences, "3.5 boats", [1, 2], 0),
        (check_must, "A rope, a key.", ["rope", "key"], 1),
        (check_must, "Europe", ["rope"], 0),
        (check_must, "ROPE'S end", ["rope", "key"], 0.5),
        (check_forbidden, "every day", ["very"], 1),
        (check_forbidden, "Very!", ["very"], 0),
        (check_tone, "She laughed in the sunshine", "cheerful", 1),
        (check_tone, "She laughed alone", "cheerful", 0.5),
        (check_tone, "alone, cold, she laughed", "cheerful", 0),
        (check_tone, "laughed laughed laughed cold alone", "cheerful", 0),
        (check_tone, "a table", "cheerful", 0),
        (check_persona, "I am Mira.", "Mira", 1),
        (check_persona, "Mira left.", "Mira", 0.5),
        (check_persona, "In Miramar it is.", "Mira", 0),
        (check_speakers, "Ida: a\nTom: b\nIda: c\nTom: d", ["Ida", "Tom"], 1),
        (check_speakers, "Ida: a\nTom: b\nIda: c", ["Ida", "Tom"], 0.5),
        (check_speakers, "Ida: a\nTom: b\nIda: c\nTom: d\nEva: e", ["Ida", "Tom"], 0),
        (check_speakers, "They talked.", ["Ida", "Tom"], 0),
        (check_form, "- a\n- b\n- c", "list", 1),
        (check_form, "1. a\n\n2. b\n3. c\n", "list", 1),
        (check_form, "Here:\n- a\n- b\n- c", "list", 0),
        (check_form, "- a\n- b", "list", 0),
        (check_form, LETTER, "letter", 1),
        (check_form, LETTER.replace("Dear", "Hi"), "letter", 0),
        (check_form, LETTER.replace("Yours", "Bye"), "letter", 0),
        (check_form, "Keeper seeks lost key under bridge", "headline", 1),
        (check_form, "A key is lost, sadly.", "headline", 0),
        (check_form, "Lost key\nunder bridge", "headline", 0),
        (check_form, "a\nb\nc\nd", "verse", 1),
        (check_form, "a\nb\nc", "verse", 0),
        (check_form, "a\nb\nc\nd\ne", "verse", 0),
        (check_form, "Ida: a\nTom: b\nIda: c\nTom: d", "script", 1),
        (check_form, "Ida: a\nThey laughed.\nIda: c\nTom: d", "script", 0),
        (check_prose, STORY, True, 1),
        (check_prose, "lantern rope harbour ladder salt thunder bread violin snow.", True, 0),
        (check_prose, "and so it was and so it was and so it was and so it was.", True, 0),
        (check_prose, STORY.replace(".", ""), True, 0),
        (check_prose, "Yes.", True, 0),
    ],
)
def test_each_check_on_texts_written_by_hand(check, text, asked, value):
    assert check(text, asked) == pytest.approx(value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n" * 30000,
        "a" * 200_000,
        "- " * 50_000,
        "!" * 50_000 + "x",
        "Mira " + "* " * 30_000,
        "Dear x\n" + "\n" * 60_000,
        "Aa: b\n" * 20_000 + "x",
        "“" * 20_000,
        "٣ ٤ 𝟚 \ud800",
        "I'" * 40_000,
    ],
)
def test_hostile_texts_neither_crash_nor_hang(text):
    asked = dict(
        length=[30, 60],
        sentences=[2, 3],
        must=["(rope"],
        forbidden=["a+b"],
        tone="calm",
        persona="Mi[ra",
        speakers=["Ida"],
        prose=True,
    )
    start = time.process_time()
    assert all(check_form(text, form) in (0, 1) for form in FORMS)
    values = SpecReward().parts([""], [text], spec=[json.dumps(asked | dict(form="list"))])
    assert (
        all(0 <= v[0] <= 1 for v in values.values())
        and set(values) == set(CHECKS)
        and time.process_time() - start < 3
    )


# the reward


def test_the_reward_is_the_share_of_weight_passed_and_keeps_parts():
    specs = [
        json.dumps(dict(must=["rope"], forbidden=["very"])),
        json.dumps(dict(must=["rope"])),
        json.dumps({}),
    ]
    r = SpecReward(dict(must=3.0, forbidden=1.0))
    assert r([""] * 3, ["a very long rope", "no", "x"], spec=specs) == [0.75, 0, 0]
    assert r.last == dict(must=[1, 0, None], forbidden=[0, None, None])
    assert r([""] * 3, ["rope"] * 3, spec=specs[1:2] * 3, truncated=[False, True, False]) == [1, 0.5, 1]
    assert r([""], [" "], spec=[json.dumps(dict(forbidden=["a"]))]) == [0]
    message = [{"role": "assistant", "content": "rope"}]
    assert score(r, [""], [message], spec=specs[1:2]) == [1]
    with pytest.raises(ValueError, match="weights are"):
        SpecReward(dict(beauty=1.0))


def test_a_list_of_the_words_is_not_a_story():
    spec = json.dumps(dict(length=[20, 60], must=["lantern", "rope", "harbour"], prose=True))
    cheat = "lantern rope harbour " * 8
    assert SpecReward(dict(must=1.0))([""], [cheat], spec=[spec]) == [1]
    good, bad = SpecReward()([""] * 2, [STORY, cheat], spec=[spec] * 2)
    assert good == 1 and bad <= 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_problems_are_seeded_and_splits_share_no_core(kind):
    task = CreativeTask(kind)
    train = task.problems("train", 200, 1)
    evaluation = task.problems("held-out", 200)
    assert (
        train == task.problems("train", 200, 1) != task.problems("train", 200, 2)
        and json.loads(json.dumps(train)) == train
    )
    text = lambda rows: {r["prompt"][0]["content"] for r in rows}
    assert len(text(train)) == len(text(evaluation)) == 200 and not text(train) & text(evaluation)
    from selfplay_nb.tasks.creative import WHAT, WHERE, WHO

    def core(t):  # who comes first, what, where
        who = min((t.find(f"{n}, {a}"), n) for n, a in WHO if f"{n}, {a}" in t)[1]
        return who, *next((what, where) for what in WHAT for where in WHERE if f" a {what} {where}" in t)

    assert not {core(t) for t in text(train)} & {core(t) for t in text(evaluation)}
    for r in train[:50]:
        spec, t = json.loads(r["spec"]), r["prompt"][0]["content"]
        assert (
            set(spec) <= set(CHECKS)
            and r["kind"] == kind
            and all(f"“{w}”" in t for w in [*spec.get("must", []), *spec.get("forbidden", [])])
        )
        assert not set(spec.get("must", [])) & set(spec.get("forbidden", []))
    with pytest.raises(ValueError, match="'test'"):
        task.problems("test", 1)
    with pytest.raises(ValueError, match="n is 0"):
        task.problems("train", 0)


def test_reward_and_verifier_of_the_task():
    row = next(
        r for r in CreativeTask("content").problems("train", 50) if json.loads(r["spec"])["form"] == "list"
    )
    spec, task = json.loads(row["spec"]), CreativeTask("content")
    must = spec["must"][0]
    good = f"- look for the {must}\n- ask the porter\n- pay for it"
    columns = dict(spec=[row["spec"]] * 2, kind=["content"] * 2)
    assert task.verifier([row["prompt"]] * 2, [good, "no"], **columns) == [1, pytest.approx(1 / 3)]
    assert task.verifier([row["prompt"]] * 2, [good, ""], **columns, truncated=[True, False]) == [0, 0]
    assert task.reward([row["prompt"]] * 2, [good, good], **columns) == [0.5, 0.5]
    with pytest.raises(ValueError, match="'poem'"):
        CreativeTask("poem")


# being different

EQUAL = as_reward(lambda p, r: 1.0)
FOUR = [
    f"{a} went to the {b} and {c} a {d} there"
    for a, b, c, d in [
        ("Ida", "pier", "lost", "coat"),
        ("Otto", "tower", "sold", "clock"),
        ("Pia", "field", "dug", "hole"),
        ("Ruth", "stage", "hung", "string"),
    ]
]


def test_copies_earn_less_than_different_answers_of_equal_quality():
    r = DiverseReward(EQUAL, 0.5)
    same, different = r(["p"] * 4, FOUR[:1] * 4), r(["p"] * 4, FOUR)
    assert same == [0.5] * 4 and min(different) > 0.7
    two = r(["p"] * 4, [FOUR[0], FOUR[0], *FOUR[2:]])
    assert max(two[:2]) < min(two[2:]) and two[0] == two[1]
    assert r.last["base"] == [1] * 4 and [1 - 0.5 * s for s in r.last["similarity"]] == two


def test_weight_is_respected_and_the_order_of_the_batch_is_not():
    batch = [*FOUR, FOUR[1], ""]
    plain, half, full = (DiverseReward(EQUAL, w)(["p"] * 6, batch) for w in (0, 0.5, 1))
    assert plain == [1] * 6 and all(1 - f == pytest.approx(2 * (1 - h)) for h, f in zip(half, full))
    order = list(range(6))
    random.Random(0).shuffle(order)
    assert DiverseReward(EQUAL, 0.5)(["p"] * 6, [batch[i] for i in order]) == [half[i] for i in order]
    with pytest.raises(ValueError, match="weight is -1"):
        DiverseReward(EQUAL, -1)


def test_groups_are_prompts_or_a_column():
    messages = [[{"role": "user", "content": x}] for x in "ab"]
    assert DiverseReward(EQUAL)(messages, FOUR[:1] * 2) == [1, 1] and DiverseReward(EQUAL)(
        messages[:1] * 2, FOUR[:1] * 2
    ) == [0.5, 0.5]
    by_kind = DiverseReward(EQUAL, by="kind")
    assert by_kind(messages, FOUR[:1] * 2, kind=["s", "s"]) == [0.5, 0.5] and by_kind(
        messages, FOUR[:1] * 2, kind=["s", "t"]
    ) == [1, 1]
    with pytest.raises(ValueError, match="no column 'kind'"):
        DiverseReward(EQUAL, by="kind")(["a"], ["b"])


def test_similarities_against_counting_by_hand():
    assert similarities(["a b c d", "a b c e"]) == [0.5, 0.5] and similarities(["a b c d", "x y z"]) == [0, 0]
    assert similarities(["a"]) == [0] and similarities([]) == []
    assert similarities(["a b c", "A, b: c!", "x y z"]) == [0.5, 0.5, 0] and similarities(["", ""]) == [1, 1]


# dialogue

MIRA = Persona("Mira", "a keeper")
TOMAS = Persona("Tomas", "a baker")
EMIL = Persona("Emil", "a dispatcher")


class Seeded:
    "Takes a seed for each prompt, as a `Policy` does, and counts its calls."

    takes_seeds = True

    def __init__(self):
        self.calls = []

    def generate(self, prompts, n_samples=1, seed=None, **sampling):
        self.calls.append(len(prompts))
        return [f"{p[-1]['content'][:5]} {random.Random(f'{s} {p}').random()}" for p, s in zip(prompts, seed)]


@pytest.mark.parametrize("player", [Seeded, lambda: Scripted(lambda p, rng: f"{len(p)} {rng.random()}")])
def test_dialogues_in_a_batch_are_those_played_one_at_a_time(player):
    scenes = [(MIRA, TOMAS, "the bell"), (MIRA, EMIL, "the bell"), (TOMAS, EMIL, "bread")] + (
        [(MIRA, TOMAS, "the bell")] if player is Seeded else []
    )
    together = dialogues(scenes, player(), turns=5, seed=3)
    assert together == [
        dialogues([s], player(), turns=5, seed=3, numbers=[i])[0] for i, s in enumerate(scenes)
    ]
    assert (
        together
        == dialogues(scenes, player(), turns=5, seed=3)
        != dialogues(scenes, player(), turns=5, seed=4)
    )
    if player is Seeded:
        assert str(together[0]) != str(together[3])
        both = Seeded(), Seeded()
        dialogues(scenes, both, turns=5)
        assert both[0].calls == [4] * 3 and both[1].calls == [4] * 2


def test_each_player_sees_its_own_side():
    talk = dialogue(
        (MIRA, TOMAS), "the bell", 4, (Scripted(lambda p, rng: "ships"), Scripted(lambda p, rng: "bread"))
    )
    assert [(t.seat, t.text) for t in talk.turns] == [(0, "ships"), (1, "bread")] * 2 and str(
        talk
    ).splitlines()[1] == "Tomas: bread"
    for k, row in enumerate(talk.rows):
        own, other = ("ships", "bread") if k % 2 == 0 else ("bread", "ships")
        system, *rest = row["prompt"]
        assert system["role"] == "system" and system["content"].startswith(
            f"You are {('Mira', 'Tomas')[k % 2]}, "
        )
        assert [m["role"] for m in rest] == [("user", "assistant")[i % 2] for i in range(len(rest))] and rest[
            -1
        ]["role"] == "user"
        assert all(m["content"] == own for m in rest if m["role"] == "assistant") and rest[-1]["content"] == (
            other if k else rest[-1]["content"]
        )
        assert row["completion"] == [{"role": "assistant", "content": own}]


def test_an_empty_turn_is_no_training_row_and_talk_goes_on():
    talk = dialogue(
        (MIRA, TOMAS), "the bell", 3, (Scripted(lambda p, rng: " "), Scripted(lambda p, rng: "bread"))
    )
    assert (
        len(talk.turns) == 3
        and len(talk.rows) == 1
        and check_dialogue(talk)["persona"] == pytest.approx(1 / 3)
    )


def test_checks_on_dialogues():
    def says(*lines):
        mine, theirs = iter(lines[::2]), iter(lines[1::2])
        return check_dialogue(
            dialogue(
                (MIRA, TOMAS),
                "the bell",
                len(lines),
                (Scripted(lambda p, rng: next(mine)), Scripted(lambda p, rng: next(theirs))),
            )
        )

    assert says(
        "I heard the bell.", "It woke my oven.", "The bell rang at two.", "Bread does not mind."
    ) == dict(persona=1, new=1, topic=1)
    assert (
        says("Tomas: no.", "I am Mira.", "As an AI language model, I cannot.", "**Mira:** yes")["persona"]
        == 0
    )
    assert says("I am Mira, and Tomas knows it: always.", "Mira, I know.")["persona"] == 1
    assert says("The bell is loud today.", "No.", "The bell is loud today!", "Yes.")["new"] == 0.75
    assert says("Soup.", "Bells?", "The bell!", "Oh.")["topic"] == 0.5


@pytest.mark.parametrize(
    "bad, says",
    [
        (dict(turns=0), "turns is 0"),
        (dict(players=[1, 2, 3]), "3 players"),
        (dict(scenes=[]), "0 scenes"),
        (dict(numbers=[1, 2]), "2 numbers"),
    ],
)
def test_bad_arguments_of_dialogues_are_named(bad, says):
    with pytest.raises(ValueError, match=says):
        dialogues(**dict(scenes=[(MIRA, TOMAS, "x")], players=Scripted(lambda p, rng: "a")) | bad)
