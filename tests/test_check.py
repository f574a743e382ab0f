"""Ranges of arguments: what passes, and what the error says."""

import math

import pytest

from dslib import check


@pytest.mark.parametrize(
    "call",
    [
        lambda: check.at_least(0, x=0, y=1e9),
        lambda: check.above(0, x=1e-9),
        lambda: check.whole(1, x=1, y=7),
        lambda: check.below(0, 1, x=0),
        lambda: check.between(0, 1, x=0, y=1.0),
        lambda: check.one_of(("a", "b"), x="a"),
    ],
)
def test_what_passes(call):
    call()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: check.at_least(1, x=2, y=0), "y: got 0, expected at least 1"),
        (lambda: check.at_least(1, x=math.nan), "x: got nan, expected at least 1"),
        (lambda: check.at_least(1, x=math.inf), "x: got inf, expected at least 1"),
        (lambda: check.at_least(1, x=True), "x: got True, expected at least 1"),
        (lambda: check.at_least(1, x=None), "x: got None, expected at least 1"),
        (lambda: check.above(0, x=0), "x: got 0, expected a number above 0"),
        (lambda: check.whole(1, x=1.5), "x: got 1.5, expected a whole number of at least 1"),
        (lambda: check.whole(1, x=0), "x: got 0, expected at least 1"),
        (lambda: check.whole(1, x=None), "x: got None, expected a whole number of at least 1"),
        (lambda: check.between(0, 1, x=2), "x: got 2, expected 0 to 1"),
        (lambda: check.between(0, 1, x=math.nan), "x: got nan, expected 0 to 1"),
        (lambda: check.below(0, 1, x=1), "x: got 1, expected at least 0 and below 1"),
        (lambda: check.one_of(("a", "b"), x="c"), "x: got 'c', expected one of 'a', 'b'"),
    ],
)
def test_what_is_refused(call, text):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == text


def test_an_unknown_name_brings_the_nearest():
    error = check.unknown("gpu", "a100", ["H100_SXM", "A100_80GB", "T4"], "a GPU of the table")
    assert str(error) == "gpu: got 'a100', expected a GPU of the table, such as A100_80GB, H100_SXM"
