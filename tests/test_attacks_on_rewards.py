"What wrong, empty and senseless answers earn from the rules that pay: a table of attacks for each family of them."
import importlib.util

import pytest

from selfplay_nb.reasoning import KnightsAndKnaves, MathTask, ReasoningTask, Syllogisms, fully_right, graded, math_equal
from selfplay_nb.tasks import ArithmeticTask

needs_gym = pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason='pip install "selfplay_nb[reasoning]"')
needs_math = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason='pip install "selfplay_nb[reasoning]"')

# arithmetic, right answer 68

NOT_68 = ["The answer is not 68", "It isn't 68.", "68? No: I do not know", "68 is wrong", "≠ 68", "±68", "neither 67 nor 68", "67 or 68", "Answer: not 68",
    "Not the answer: 68",
          r"\boxed{68} is wrong", "6,,,8", "6,8", "0,0,0,68", "1e68", "68e5", "0x68", "68%", "68 %", "68 percent", "68\\%", "68/1", "136/2", "136 / 2",
          "23+45", "23 + 45", "-68",
          "--68", "68k", "x=68y", "v68", "68²", "²68", "68^2", "68:30", "3.14.68", "1.68", "68.0.0", "68,000", "68.00001", "67.99999999", "6 8", "68 69",
          "sixty-eight",
          "9"*100_000, "0"*100_000 + "68", "", " ", ".", "Answer:", "\\boxed{}", "0 1 2 3 4 5 6 7 8 9"]
IS_68 = ["68", "68.", "68.0", "068", "$68", "68!", "**68**", r"\boxed{68}", "#### 68", "x = 68", "It is 68", "23 + 45 = 68", "６８", "67, no, it is 68",
    "It is not 67 but 68."]

@pytest.mark.parametrize("said", NOT_68)
def test_arithmetic_pays_nothing_for(said):
    task = ArithmeticTask(2); prompt = task.problems("train", 1)[0]["prompt"]
    assert task.verifier([prompt], [said], answer=[68]) == [0] and task.reward([prompt], [said], answer=[68])[0] <= .4

@pytest.mark.parametrize("said", IS_68)
def test_arithmetic_pays_for(said): assert ArithmeticTask(2).reward([""], [said], answer=[68]) == [1.4]


# formulas

ATTACKS_ON_5 = ["6 = 5", "1 + 1 = 5", "5\\%", "500\\%", "5%", "5_{6}", "5_6", "4.9999999999", "5.0000001", "x=5, x=6", "5, 6, 7", "5 or 6", "\\{4, 5, 6\\}",
                "[4, 6]", "5 \\pm 1",
                "x > 4", "nan", "\\infty", "\\emptyset", "five", "", "not 5"]
PAID_FOR_5 = ["5", "5.", "$5$", r"\(5\)", r"\[5\]", "x = 5", "5.0", r"\frac{10}{2}", "+5"]

@needs_math
def test_formulas_pay_for_5():
    said = [f"Answer: {a}" for a in ATTACKS_ON_5 + PAID_FOR_5]; n = len(said)
    paid = math_equal([""]*n, said, answer=["5"]*n)
    assert paid == [0]*len(ATTACKS_ON_5) + [1]*len(PAID_FOR_5)

@needs_math
@pytest.mark.parametrize("gold, right, wrong", [
    ("7/4", ["7/4", "7/4.", r"\(\frac{7}{4}\)", "7 / 4", "$7/4$", r"\frac{7}{4}.", r"\dfrac{7}{4}", "1.75", "14/8"], ["4/7", "-7/4", "7/4 = 2", "2 = 7/4"]),
    ("-7/4", ["−7/4", "-7/4", r"-\frac{7}{4}"], ["7/4"]), ("50\\%", ["50\\%", "50%", "0.5"], ["50", "5000"]), ("x^2 - 1", ["x^2-1.", r"\(x^2 - 1\)",
    "(x-1)(x+1)"], ["x^2", "y^2-1"])])
def test_right_formulas_are_paid_however_they_are_set(gold, right, wrong):
    said = [f"So.\nAnswer: {a}" for a in right + wrong]; n = len(said)
    assert math_equal([""]*n, said, answer=[gold]*n) == [1]*len(right) + [0]*len(wrong)

@needs_math
def test_fractions_with_a_form_are_paid_however_they_are_set():
    form = MathTask(1).problems("train", 1)[0]["form"]
    right, wrong = ["7/4", "7/4.", r"\(\frac{7}{4}\)", "7 / 4", "$7/4$"], ["1.75", "1 + 3/4", "3/2 + 1/4", "7/4/1", "x = 7/4"]
    said = [f"Answer: {a}" for a in right + wrong]; n = len(said)
    assert math_equal([""]*n, said, answer=["7/4"]*n, form=[form]*n) == [1]*len(right) + [0]*len(wrong)

@needs_math
def test_the_question_copied_in_any_brackets_is_no_expansion():
    import re
    for row in MathTask(2).problems("train", 6):
        a, b = re.search(r"Expand \((.*?)\)\((.*?)\)\.", row["prompt"][0]["content"]).groups()
        said = [f"Answer: {{{a}}}{{{b}}}", f"Answer: {{{a}}}*{{{b}}}", f"Answer: ({a})({b})", f"Answer: {{{a}}} {{{b}}}", f"Answer: {{{row['answer']}}}"]
        columns = dict(answer=[row["answer"]]*5, form=[row["form"]]*5)
        assert math_equal([""]*5, said, **columns) == [0]*5
        good = [row["answer"], row["answer"].replace(" ", ""), row["answer"] + ".", f"\\({row['answer']}\\)", row["answer"].replace("x^2", "x^{2}")]
        assert math_equal([""]*5, [f"Answer: {g}" for g in good], **columns) == [1]*5


# logic

@pytest.mark.parametrize("said, paid", [
    ("Answer: Ann, Ben", 1), ("Answer: Ann and Ben.", 1), (r"\boxed{Ann, Ben}", 1), ("Answer: Ann, Ben\nThat is what they say.", 1),
    ("Answer: Ann\nAnswer: Ann, Ben", 1),
    ("Answer: Ann, Ben\nCleo", 0), ("Answer: Ann, Ben\nor none", 0), (r"Answer: \boxed{Ann, Ben} but Cleo", 0), ("Answer: Ann, Ben, Cleo", 0),
    ("Answer: Ann, Ben or Cleo", 0),
    ("Answer: not Ann, Ben", 0), ("Not the answer: Ann, Ben", 0), ("Answer: Ann", 0), ("Answer: none", 0), ("Ann, Ben, Cleo, none", 0), ("", 0)])
def test_knights_pay_for(said, paid):
    task = KnightsAndKnaves(3)
    assert task.verifier([""], [said], answer=["Ann, Ben"]) == [paid] and (task.reward([""], [said], answer=["Ann, Ben"])[0] > 1) == paid

@pytest.mark.parametrize("said, paid", [
    ("Answer: yes", 1), ("yes.", 1), ("no. Answer: yes", 1), ("Answer: yes\nIt follows.", 1), ("Answer: yes\nno", 0), ("Answer: yes\n\nOr no?", 0),
    ("Answer: yes no", 0),
    ("Answer: yes/no", 0), ("Answer: no\nyes", 0), (r"Answer: \boxed{yes} or no", 0), ("Answer: yes, it does", 0), ("Not the answer: yes", 0), ("", 0)])
def test_syllogisms_pay_for(said, paid): assert Syllogisms(2).verifier([""], [said], answer=["yes"]) == [paid]


# families of reasoning-gym

JUNK = ["nan", "NaN", "nan+nanj", "nan + nani", "inf", "-inf", "infinity", "1e999", "0", "-1", "None", "True", "[]", "{}", "?", "."]

@needs_gym
@pytest.mark.parametrize("family", ["complex_arithmetic", "coin_flip", "gcd", "chain_sum", "number_sorting", "advanced_geometry", "simple_geometry"])
def test_families_pay_nothing_in_full_for_what_is_no_answer(family):
    rows = ReasoningTask(family).problems("train", 6, seed=5)
    for row in rows:
        said = [f"Answer: {j}" for j in JUNK if j != row["answer"]]; n = len(said)
        assert fully_right([""]*n, said, entry=[row["entry"]]*n) == [0]*n
        said = [f"Answer: {j}" for j in JUNK if "nan" in j.lower()]
        assert graded([""]*len(said), said, entry=[row["entry"]]*len(said)) == [0]*len(said)

@needs_gym
@pytest.mark.parametrize("family", ["gcd", "chain_sum", "complex_arithmetic", "letter_counting", "simple_equations", "leg_counting", "products", "lcm",
    "basic_arithmetic"])
def test_a_full_stop_costs_no_answer(family):
    rows = ReasoningTask(family).problems("train", 3, seed=5)
    for end in "", ".", " .", "$":
        said = [f"Answer: {'$'*(end == '$')}{r['answer']}{end}" for r in rows]
        assert fully_right([""]*3, said, entry=[r["entry"] for r in rows]) == [1]*3, end
