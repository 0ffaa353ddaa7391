"Alarms and files of vital signs, where numbers are missing or not finite."

import json
import math
import warnings
from dataclasses import replace

import pytest

from selfplay_nb.loop.vitals import Vitals, alarms
from selfplay_nb.stats.diversity import Entropy, diversity
from selfplay_nb.stats.retention import Estimate, Perplexity

SPOKEN = [
    [f"the answer number {i} is about {word}" for word in ("bees", "rivers", "bread")] for i in range(6)
]
SAME = [["I do not know that."] * 3] * 6


def vitals(answers=SPOKEN, kl=0.2, nats=(100.0, 120.0, 90.0)):
    said = replace(diversity(answers), entropy=Entropy(1.2, 1.0, 1.5, 90))
    return Vitals(Estimate(kl, kl - 0.1, kl + 0.1), said, Perplexity(list(nats), [50] * len(nats)))


def strict(x):
    return json.loads(json.dumps(x, allow_nan=False))


# alarms


def test_all_is_well():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert alarms(vitals(), vitals()) == []


def test_collapse_rings_and_cannot_be_switched_off_by_other_prompts():
    assert "collapsed" in alarms(vitals(SAME), vitals())[0]
    with pytest.raises(ValueError, match="prompts and samples"):
        alarms(vitals(SAME[:3]), vitals())
    with pytest.raises(ValueError, match="threshold is 2"):
        alarms(vitals(SAME), vitals(), diversity_left=2)


def test_where_there_was_nothing_to_lose_it_is_said():
    with pytest.warns(UserWarning, match="collapse cannot be seen: different prompts"):
        assert alarms(vitals(SAME), vitals(SAME)) == []
    with pytest.warns(UserWarning, match="collapse cannot be seen: there is one prompt only"):
        assert alarms(vitals(SAME[:1]), vitals(SAME[:1])) == []


@pytest.mark.parametrize(
    "now, says",
    [
        (vitals(nats=(math.nan, 120.0, 90.0)), "forgetting"),
        (vitals(nats=(math.inf, 120.0, 90.0)), "forgetting"),
        (vitals(nats=(1e9, 1e9, 1e9)), "forgetting"),
        (vitals(kl=math.nan), "broken"),
        (vitals(nats=(200.0, 210.0, 190.0)), "forgetting"),
    ],
)
def test_numbers_that_are_not_finite_ring(now, says):
    assert any(a.startswith(says) for a in alarms(now, vitals())) and alarms(vitals(), vitals()) == []


# files


@pytest.mark.parametrize(
    "v",
    [
        vitals(),
        vitals([[r[0]] for r in SPOKEN]),
        vitals(SPOKEN[:1]),
        vitals(kl=math.nan),
        vitals(nats=(math.inf, 1.0)),
    ],
)
def test_files_have_null_for_nan_and_are_read_back(v):
    again = Vitals.from_dict(strict(v.to_dict()))
    assert repr(again).replace("inf", "nan") == repr(v).replace("inf", "nan") and strict(
        again.to_dict()
    ) == strict(v.to_dict())
    assert again.diversity.commonest == v.diversity.commonest
    for name, x in v.diversity.within.items():
        assert again.diversity.within[name] == x or math.isnan(x) and math.isnan(again.diversity.within[name])
