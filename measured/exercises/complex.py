"""Exercises of ``chapters/scenarios/complex.ipynb``."""

import math  # noqa: F401  in the texts of mistakes
import random
from collections.abc import Mapping, Sequence
from statistics import fmean

from dslib.scenarios.complex import majority, pass_at_k, vote  # noqa: F401  the first in a mistake
from measured.exercises import exercise, named


def _rows(seed: int, *shape: tuple[int, int]) -> list[list[bool]]:
    """Truth values of some problems: (answers, right ones) each, in some order."""
    dice, rows = random.Random(seed), []
    for n, right in shape:
        rows.append([True] * right + [False] * (n - right))
        dice.shuffle(rows[-1])
    return rows


@exercise(
    "complex/pass-at-k",
    cases=named(
        "right k",
        (_rows(0, (8, 2), (8, 0), (8, 5)), 3),
        (_rows(1, (6, 1), (10, 4), (7, 7), (12, 3)), 2),
        (_rows(2, (5, 1), (9, 1)), 5),
        (_rows(3, (4, 1), (4, 3), (16, 2)), 1),
        (_rows(4, (200, 3), (40, 38)), 20),
    ),
    mistakes="""
        fmean(1 - (1 - sum(row) / len(row)) ** k for row in right)
            That puts an estimate of p into 1 - (1 - p)^k. The power bends, so the mean of such estimates is too low: a
            problem of which no answer is right by chance counts as hopeless. Count the hands of k among the n instead.
        fmean(any(row[:k]) for row in right)
            That looks at one hand of k, the first. It has no bias, but throws the other answers away. Take the mean
            over all hands.
        fmean(1 - (1 - sum(map(sum, right)) / sum(map(len, right))) ** k for row in right)
            The answers of all problems are in one pot. Hard and easy problems then mix within a hand.
        pass_at_k(sum(map(len, right)), sum(map(sum, right)), k)
            The answers of all problems are in one pot. A hand belongs to one problem; the mean over problems comes
            last.
        fmean(math.comb(sum(row), k) / math.comb(len(row), k) for row in right)
            That is the chance that *all* k are right. One is enough.
        fmean(sum(row) / len(row) for row in right)
            That is pass@1, whatever k is.
        fmean(math.comb(len(row) - sum(row), k) / math.comb(len(row), k) for row in right)
            That is the chance that none of the k is right.
    """,
    hint="For each problem: 1 less the share of hands of k that hold no right answer; then the mean over problems.",
)
def unbiased(right: Sequence[Sequence[bool]], k: int) -> float:
    """Mean pass@k over problems, of which each has at least k answers."""
    return fmean(pass_at_k(len(row), sum(row), k) for row in right)


def _problems(seed: int, count: int, n: int, sharp: float, hard: float) -> list[list]:
    """[answers, truth] of some problems: a share ``hard`` has a wrong favourite; the favourite has weight ``sharp``."""
    dice, found = random.Random(seed), []
    for number in range(count):
        truth = dice.randint(10, 30)
        favourite = truth + 1 if number < hard * count else truth
        others = [truth, *(truth + step for step in (1, -1, 2, 10)), None]
        drawn = [favourite if dice.random() < sharp else dice.choice(others) for _ in range(n)]
        found.append([drawn, truth])
    dice.shuffle(found)
    return found


def _voted(problems: Sequence, k: int) -> float:
    return fmean(vote(answers, truth, k) for answers, truth in problems)


def _passed(problems: Sequence, k: int) -> float:
    return fmean(pass_at_k(len(a), a.count(truth), k) for a, truth in problems)


def _most(way: Mapping, budget: float) -> int:
    """How many answers of a way the budget pays, of those that were drawn."""
    return min(len(way["problems"][0][0]), int(budget // way["tokens"]))


def _plan(ways: Sequence[Mapping], budget: float, score=_voted, most=_most, least=lambda top: 1) -> list[int]:
    """The reference and, by its options, the usual ways to get it wrong."""
    found = [
        (round(score(way["problems"], k), 9), -k * way["tokens"], -number, k)
        for number, way in enumerate(ways)
        for k in range(least(most(way, budget)), most(way, budget) + 1)
    ]
    _, _, number, k = max(found)
    return [-number, k]


_CASES = (
    ((5, _problems(0, 12, 9, 0.35, 0.2)), (17, _problems(1, 12, 9, 0.6, 0.2)), 36),
    ((4, _problems(2, 10, 8, 0.3, 0.1)), (30, _problems(3, 10, 8, 0.8, 0.3)), 32),
    ((6, _problems(4, 10, 7, 0.5, 1.0)), (12, _problems(5, 10, 7, 0.5, 0.9)), 44),
    ((5, _problems(6, 14, 8, 0.3, 0.0)), (21, _problems(7, 14, 8, 0.45, 0.1)), 62),
    ((8, _problems(8, 12, 6, 0.2, 0.0)), (10, _problems(9, 12, 6, 0.15, 0.0)), 30),
)


@exercise(
    "complex/budget",
    cases=[
        {"ways": [{"tokens": cost, "problems": solved} for cost, solved in (first, second)], "budget": budget}
        for first, second, budget in _CASES
    ],
    mistakes="""
        _plan(ways, budget, score=_passed)
            That is pass@k: it assumes a checker that picks the right answer. A vote has none, and picks what is named
            most often.
        _plan(ways, budget, least=lambda top: top)
            You always spend the whole budget. Where a wrong answer is the favourite, more votes make it worse.
        _plan(ways, budget, score=lambda problems, k: _passed(problems, 1))
            You choose the way by its single answers. A way that is worse alone may be better in a vote, because it can
            be asked more often.
        _plan(ways, budget, most=lambda way, budget: len(way["problems"][0][0]))
            That forgets the budget: a way may be asked only as often as its tokens allow.
        _plan(ways, budget, score=lambda problems, k: fmean(majority(a[:k]) == truth for a, truth in problems))
            You look at one hand, the first k. With few problems its luck decides. Take the mean over all hands of k.
        _plan(ways, budget, score=lambda problems, k: fmean(majority(a) == truth for a, truth in problems))
            You let all answers vote, whatever k is. A hand of k has fewer voters.
    """,
    hint="For each way and each k that the budget pays: the mean over problems of `vote`. Take the best.",
)
def budget_plan(ways: Sequence[Mapping], budget: float) -> list[int]:
    """[which way, how many answers] for the best vote within ``budget`` tokens a problem; the cheaper of equal ones."""
    return _plan(ways, budget)
