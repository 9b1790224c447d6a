"""Scores: intervals, constants, letters read from answers, the rules of the benchmarks."""

from __future__ import annotations

import pytest

from vicostream_kernels.evaluation.scoring import (
    RULES,
    best_constant,
    lettered,
    option_letter,
    wilson,
)

OPTIONS = ["A. A red car.", "B. A dog", "C. Nothing", "D. Two dogs"]


@pytest.mark.parametrize(
    "right, total, low, high",
    # statsmodels.stats.proportion.proportion_confint(right, total, method="wilson")
    [(0, 10, 0.0, 0.277533), (10, 10, 0.722467, 1.0), (45, 50, 0.786398, 0.956524), (0, 0, 0, 1)],
)
def test_wilson(right, total, low, high):
    assert wilson(right, total) == pytest.approx((low, high), abs=1e-6)


def test_wilson_refuses_more_right_than_asked():
    with pytest.raises(ValueError, match="between 0 and total=3"):
        wilson(4, 3)


def test_the_best_constant_answer():
    assert best_constant(["red", "blue", "blue", "red", "green"]) == ("blue", 0.4)
    assert best_constant([]) == ("", 0.0)


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B", "B"),
        ("b", "B"),
        ("(C)", "C"),
        ("D. Two dogs", "D"),
        ("**A**", "A"),
        ("The answer is B.", "B"),
        ("The best option is: (C)", "C"),
        ("It must be D because two dogs run", "D"),
        ("A dog", "B"),
        ("A red car is there", "A"),
        ("I see nothing", "C"),
        ("Either B or C", None),
        ("E", None),
        ("", None),
        ("no idea", None),
    ],
)
def test_the_letter_of_an_answer(text, letter):
    assert option_letter(text, OPTIONS) == letter


def test_options_get_letters_once():
    assert lettered(["x", "y"]) == ["A. x", "B. y"]
    assert lettered(OPTIONS) == OPTIONS


@pytest.mark.parametrize(
    "rule, answer, truth, right",
    [
        ("first_letter", "B. a dog", "B", True),
        ("first_letter", "The answer is B", "B", False),
        ("contains", "The answer is B", "B", True),
        ("contains", "A", "B", False),
        ("digits", "3 times", "3", True),
        ("digits", "1 or 3", "3", False),
        ("digits", "many", "0", False),
        ("yes_or_no", "Yes, it is.", "Yes", True),
        ("yes_or_no", "N", "No", True),
        ("yes_or_no", "no", "No", False),
    ],
)
def test_the_rules_of_the_benchmarks(rule, answer, truth, right):
    assert RULES[rule](answer, truth) is right
