"""Ranges of arguments: what passes, and what the error says."""

import math
import re

import numpy as np
import pytest
import torch

from dslib import check


@pytest.mark.parametrize(
    "call",
    [
        lambda: check.at_least(0, x=0, y=1e9, z=torch.tensor(2.5)),
        lambda: check.above(0, x=1e-9, y=np.float32(1)),
        lambda: check.whole(1, x=1, y=7, z=np.int64(1), t=torch.tensor(3)),
        lambda: check.below(0, 1, x=0),
        lambda: check.between(0, 1, x=0, y=1.0),
        lambda: check.one_of(("a", "b"), x="a"),
        lambda: check.one_of({"a": 1}, x="a"),
    ],
)
def test_what_passes(call):
    call()


def test_texts_may_come_from_anywhere():
    assert check.texts("x", (letter for letter in "ab")) == check.texts("x", np.array(["a", "b"])) == ["a", "b"]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: check.at_least(1, x=2, y=0), "y: got 0, expected at least 1"),
        *((lambda bad=bad: check.at_least(1, x=bad), f"x: got {bad!r}, expected at least 1")
          for bad in (math.nan, math.inf, True, None, "2", torch.tensor([1, 2]), np.array([1, 2]))),
        (lambda: check.above(0, x=0), "x: got 0, expected a number above 0"),
        *((lambda bad=bad: check.whole(1, x=bad), f"x: got {bad!r}, expected a whole number of at least 1")
          for bad in (1.5, None, True, "2", math.nan, torch.tensor(1.5), torch.tensor([1, 2]), np.float64(1))),
        (lambda: check.whole(1, x=0), "x: got 0, expected at least 1"),
        (lambda: check.between(0, 1, x=2), "x: got 2, expected 0 to 1"),
        (lambda: check.between(0, 1, x=math.nan), "x: got nan, expected 0 to 1"),
        (lambda: check.below(0, 1, x=1), "x: got 1, expected at least 0 and below 1"),
        (lambda: check.one_of(("a", "b"), x="c"), "x: got 'c', expected one of 'a', 'b'"),
        (lambda: check.one_of({"a": 1}, x=["a"]), "x: got ['a'], expected one of 'a'"),
        (lambda: check.texts("x", "ab"), "x: got 'ab', expected a list of at least one text"),
        (lambda: check.texts("x", []), "x: got [], expected a list of at least one text"),
        (lambda: check.texts("x", ["a", " \n"]), "x: number 1 is empty or no text, got ' \\n', expected some words"),
        (lambda: check.texts("x", ["a", None]), "x: number 1 is empty or no text, got None, expected some words"),
    ],
)  # fmt: skip
def test_what_is_refused(call, text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        call()


def test_an_unknown_name_brings_the_nearest():
    error = check.unknown("gpu", "a100", ["H100_SXM", "A100_80GB", "T4"], "a GPU of the table")
    assert str(error) == "gpu: got 'a100', expected a GPU of the table, such as A100_80GB, H100_SXM"
