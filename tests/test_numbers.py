"""Numbers in answers and in data sets are read by one parser, and what cannot be read is found before
anything is sampled.
"""

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from selfplay_nb.core.answers import answer_and_rest, answer_in, gold_numbers, last_number, read_number
from selfplay_nb.scoring.reward import (
    Guarded,
    WeightedReward,
    check_columns,
    exact_number,
    finished,
    near_number,
)

NUMBERS = {
    "18": "18",
    "1,218": "1218",
    "1,234,567.89": "1234567.89",
    "1_000": "1000",
    "1 234": "1234",
    "1\u202f234": "1234",
    "1\u00a0234": "1234",
    "1.234,50": "1234.5",
    "$18": "18",
    "-$5": "-5",
    "$-5": "-5",
    "$12.50": "12.5",
    "€3": "3",
    r"\$18": "18",
    "12.": "12",
    ".5": "0.5",
    "-.5": "-0.5",
    "+5": "5",
    "5.0": "5",
    "007": "7",
    "−5": "-5",
    "–5": "-5",
    "﹣5": "-5",
    "－5": "-5",
    "- 5": "-5",
    "2e3": "2000",
    "1e-3": "0.001",
    "1.5E2": "150",
    "8 * 10^3": "8000",
    "8 × 10^3": "8000",
    r"2.5 \times 10^{-2}": "0.025",
    "-3/4": "-3/4",
    "7 / 4": "7/4",
    "3 1/2": "7/2",
    "-3 1/2": "-7/2",
    "½": "1/2",
    "3½": "7/2",
    r"\frac{7}{4}": "7/4",
    r"-\dfrac{7}{4}": "-7/4",
    r"\frac{-7}{4}": "-7/4",
    r"2\frac12": "5/2",
    "50%": "1/2",
    r"50\%": "1/2",
    "12.5 %": "1/8",
    r"\boxed{7}": "7",
    r"\boxed{8,000}": "8000",
    r"\boxed{$9{,}500}": "9500",
    "$9{,}500.": "9500",
    r"9\,500": "9500",
    "**68**": "68",
    "_68_": "68",
    "$68$": "68",
    r"\(68\)": "68",
    "(68)": "68",
    "٣٤": "34",
    "６８": "68",
    "68\u200b": "68",
    "-(5)": "-5",
    "-{5}": "-5",
    r"-\text{5}": "-5",
    r"-\(5\)": "-5",
    "-**5**": "-5",
    "−(3/4)": "-3/4",
    "minus 5": "-5",
    "negative 3/4": "-3/4",
    r"90^\circ": "90",
    r"90^{\circ}": "90",
}


@pytest.mark.parametrize("text", NUMBERS)
def test_a_number_is_read_alike_alone_in_an_answer_and_in_a_data_set(text):
    value = Fraction(NUMBERS[text])
    assert read_number(text) == last_number(text) == gold_numbers([text])[0] == value
    assert exact_number(["q"], [text], answer=[text]) == [1] and near_number()(
        ["q"], [text], answer=[text]
    ) == [1]


@pytest.mark.parametrize(
    "text, number",
    [
        ("59 + 63 = 122.", 122),
        ("The answer is $9{,}500.", 9500),
        ("The total is 72 clips, altogether.", 72),
        ("x = -5", -5),
        ("x = - 5", -5),
        ("10 - 5 = 5", 5),
        ("59-63", 63),
        ("The answer is 12, not 13.", 12),
        ("It is not 67 but 68.", 68),
        ("I am not sure, but 68", 68),
        ("Is it 67? No, 68.", 68),
        ("H2O costs 5", 5),
        ("It has 5 m2", 5),
        ("共有68个", 68),
        ("<answer>68</answer>", 68),
        ("It costs $12/hour", 12),
        ("68 km/h", 68),
        ("3 = -4", -4),
        (r"so x = -\frac{7}{4}.", "-7/4"),
        (r"Hence \boxed{7}, as step 2 shows.", 7),
        (r"\boxed{67} \boxed{68}", 68),
        ("So 3 × 6 = 18.\n#### 18", 18),
        ("#### 18\n\nQuestion 2", 18),
        ("Answer: 68\nI took 3 steps.", 68),
        ("**Answer:**\n\n68", 68),
        ("Answer: 59 + 63 = 122", 122),
        ("It is 1,234.50!", "1234.5"),
        ("We do not carry so 60 + 8 = 68.", 68),
        ("If I'm not mistaken it is 68.", 68),
        ("68 instead of 70", 68),
        ("It is 68 rather than 70.", 68),
        ("10 minus 5 is 5", 5),
        ("It is minus 5", -5),
        ("I get -(5)", -5),
        (r"\boxed{12\text{ cm}^{2}}", 12),
        (r"\boxed{2^{5}}", None),
        (r"\boxed{2^{-5}}", None),
        (r"\boxed{10^{3}}", None),
        (r"\boxed{\sqrt{16}}", None),
        (r"\boxed{\sqrt[3]{8}}", None),
        (r"\boxed{5!}", None),
        ("The total is 12 000.", None),
        ("Answer: 12 000 people", None),
        ("Answer 12 500", None),
        ("Total 12 000", None),
        ("12 000", 12000),
        ("In Class 3 120 students passed.", 120),
        ("Team 1 scored 90 and team 2 100.", 100),
        ("On May 5 120 people came.", 120),
        ("The margin of error is plus or minus 3 percent.", "3/100"),
        ("The 2 roots are plus/minus 3", 3),
        ("It is the non-negative 5", 5),
        ("12 apples minus 5", 5),
        ("24 hours minus 5", 5),
        ("x minus 3", 3),
        ("x equals negative 3", -3),
        ("x = minus 3", -3),
        ("(minus 3)", -3),
        ("no idea", None),
        ("", None),
    ],
)
def test_which_number_an_answer_gives(text, number):
    assert last_number(text) == (None if number is None else Fraction(number))


@pytest.mark.parametrize(
    "text",
    [
        "(3,4)",
        "3,4",
        "1,23",
        "1,2,3",
        "1,,234",
        "1.5.2",
        "7³",
        "²7",
        "0x1f",
        "5k",
        "2^5",
        "3:45",
        "1/0",
        "1/2/3",
        "8/4",
        "1e9999",
        "9" * 400,
        "0" * 20_000 + "7",
        "1" + ",000" * 200,
        "x2",
        "½²",
    ],
)
def test_a_word_with_digits_is_a_number_as_a_whole_or_not_at_all(text):
    assert read_number(text) is None and last_number(f"It is {text}") is None
    with pytest.raises(ValueError, match="row 0"):
        gold_numbers([text])


@pytest.mark.parametrize("text", ["3 apples", "5 6", "about 5", "5 or 6", "-", "five", "none"])
def test_a_text_with_more_than_a_number_in_it_is_none(text):
    assert read_number(text) is None


def test_a_column_of_right_answers_may_have_any_form():
    text = "Natalia sold 48/2 = 24 clips in May.\n#### 1,218"
    numbers = [
        18,
        18.0,
        Decimal("18"),
        Fraction(18),
        np.int64(18),
        np.float32(18),
        "18",
        "18 ",
        "$18",
        "#### 18",
        "It is\n#### 18",
        r"So it is \boxed{18}.",
    ]
    assert gold_numbers(numbers) == [18] * len(numbers) and gold_numbers([text]) == [1218]
    assert gold_numbers([0.1, 1e20, -2.5]) == [Fraction("0.1"), 10**20, Fraction("-2.5")]


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        "",
        "abc",
        "18 apples",
        "####",
        True,
        float("nan"),
        float("inf"),
        Decimal("NaN"),
        [18],
        {"answer": 18},
    ],
)
def test_a_right_answer_that_is_no_number_is_found_whatever_was_said(wrong):
    for reward in exact_number, near_number(), WeightedReward(dict(right=exact_number), dict(right=1.0)):
        for said in "I do not know", "It is 18":
            with pytest.raises(ValueError, match="'answer', row 1 is .*expected a finite number"):
                reward(["q", "q"], [said, said], answer=[18, wrong])
        for asked in reward, Guarded(reward):
            with pytest.raises(ValueError, match="row 1"):
                check_columns(asked, answer=[18, wrong])


def test_rewards_that_look_at_no_column_take_what_comes():
    check_columns(finished, answer=[None])
    check_columns(WeightedReward(dict(f=finished), dict(f=1.0)), answer=[None])
    check_columns(exact_number, answer=["18"])
    with pytest.raises(ValueError, match="row 0"):
        check_columns(
            WeightedReward(dict(f=finished, near=near_number(5)), dict(f=1.0, near=1.0)), answer=["x"]
        )


def test_many_wrong_rows_are_counted():
    with pytest.raises(ValueError, match="row 2 is None .and so are 3 more of 6 rows"):
        gold_numbers([1, 2, None, None, "x", ""])


def test_near_is_graded_between_numbers_of_any_form():
    assert near_number(10)(None, ["-3/4", "1e3", "x", "$120"], answer=["-0.75", "1,000", 3, 122]) == [
        1,
        1,
        0,
        0.8,
    ]
    for width in 0, -1, float("nan"), float("inf"):
        with pytest.raises(ValueError, match="positive number"):
            near_number(width)


@pytest.mark.parametrize(
    "text, answer, rest",
    [
        ("Answer: Ann\nBen", "Ann", "Ben"),
        (r"\boxed{Ann} but Ben", "Ann", " but Ben"),
        ("so\nAnn", "Ann", ""),
        ("Not the answer: 68", "", ""),
        ("That isn't the final answer: 68", "", ""),
    ],
)
def test_what_is_said_after_the_answer_is_told_apart(text, answer, rest):
    assert answer_and_rest(text) == (answer, rest) and answer_in(text) == answer


@pytest.mark.parametrize("text", ["5-", "--5", "-(-5)", "5 -"])
def test_signs_that_are_none_are_no_number(text):
    assert read_number(text) is None


@pytest.mark.parametrize(
    "mark", ["Answer: ", "Answer:\n", "**Answer:** ", "**Answer:**\n", "**Final Answer:** ", ""]
)
def test_a_board_keeps_its_first_squares(mark):
    board = "_ _ _ Q\n_ Q _ _"
    assert answer_in(mark + board, 2) == board


def test_underscores_belong_to_an_answer():
    said = "__init__", "_", "**x**", "_x"
    assert [answer_in(f"Answer: {x}") for x in said] == ["__init__", "_", "x", "_x"]
    assert answer_in("__Answer:__ x") == answer_in("*Answer: x*") == "x"
