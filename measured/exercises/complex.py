"""Exercises of ``chapters/scenarios/complex.ipynb``."""

import random
from collections.abc import Mapping, Sequence
from statistics import fmean

from dslib.scenarios.complex import majority, pass_at_k, vote  # noqa: F401  the first in a mistake
from measured.exercises import exercise, named


def _tries(p: Sequence[float], f: float, least: float, lift=lambda one, a, k: one * (1 - a) ** (k - 1)) -> int:
    """The reference and, by what a k-th try is said to lift, the usual ways to get it wrong."""
    k = 0
    while fmean(lift(one, one + (1 - one) * f, k + 1) for one in p) >= least:
        k += 1
    return k


@exercise(
    "complex/tries",
    cases=named(
        "p f least",
        ([0.1, 0.4, 0.02], 0.05, 0.01),
        ([0.25, 0.25], 0.2, 0.02),
        ([0.9, 0.01, 0.02, 0.05], 0.1, 0.005),
        ([0.03, 0.5], 0.0, 0.004),
        ([0.3, 0.1], 0.3, 0.5),
        ([0.6, 0.2, 0.05], 0.5, 0.03),
    ),
    mistakes="""
        _tries(p, 0.0, least)
            That is a checker which lets no wrong answer through. With f above 0 a wrong answer may end the search, so
            fewer tries are worth their tokens.
        _tries([fmean(p)], f, least)
            You put the mean chance into the formula. It bends: take the lift of each problem, then the mean.
        _tries(p, f, least, lift=lambda one, a, k: a * (1 - a) ** (k - 1))
            You count what is accepted, right or wrong. A try helps only where the accepted answer is right.
        _tries(p, f, least, lift=lambda one, a, k: one * (1 - one) ** (k - 1) * one / a)
            You let the search go on until an answer is right, and discount what it finds. It ends with the first answer
            that is accepted, which comes sooner: with probability a a try.
        _tries(p, f, least) + 1
            One too many: the first try that lifts the success by less than `least` is no longer allowed.
        max(0, _tries(p, f, least) - 1)
            One too few: the last try that still lifts the success by `least` is allowed.
    """,
    hint="The k-th try wins where the k - 1 before it were rejected and it is right: p (1 - a)^(k - 1).",
)
def tries(p: Sequence[float], f: float, least: float) -> int:
    """How many tries lift the mean success by ``least`` or more each, with a checker that accepts a share f wrongly."""
    return _tries(p, f, least)


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


def _halves(problems: Sequence) -> tuple[Sequence, Sequence]:
    """The problems by which a plan is chosen, and those on which it is reported."""
    return problems[: len(problems) // 2], problems[len(problems) // 2 :]


def _plan(
    ways: Sequence[Mapping], budget: float, score=_voted, told=None, most=_most, least=lambda top: 1,
    chosen_by=lambda problems: _halves(problems)[0], reported_on=lambda problems: _halves(problems)[1],
) -> list[float]:  # fmt: skip
    """The reference and, by its options, the usual ways to get it wrong."""
    found = [
        (round(score(chosen_by(way["problems"]), k), 9), -k * way["tokens"], -number, k)
        for number, way in enumerate(ways)
        for k in range(least(most(way, budget)), most(way, budget) + 1)
    ]
    _, _, number, k = max(found)
    return [-number, k, (told or score)(reported_on(ways[-number]["problems"]), k)]


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
        _plan(ways, budget, score=lambda problems, k: _passed(problems, 1), told=_voted)
            You choose the way by its single answers. A way that is worse alone may be better in a vote, because it can
            be asked more often.
        _plan(ways, budget, most=lambda way, budget: len(way["problems"][0][0]))
            That forgets the budget: a way may be asked only as often as its tokens allow.
        _plan(ways, budget, score=lambda problems, k: fmean(majority(a[:k]) == truth for a, truth in problems))
            You look at the first k answers only. With few problems their luck decides. Take the mean over all subsets.
        _plan(ways, budget, score=lambda problems, k: fmean(majority(a) == truth for a, truth in problems))
            You let all answers vote, whatever k is. Of a subset of k there are fewer voters.
        _plan(ways, budget, chosen_by=lambda problems: problems)
            You choose by all problems. Those on which the plan is reported must not have chosen it.
        _plan(ways, budget, reported_on=lambda problems: _halves(problems)[0])
            You report on the problems that chose the plan. What is the best of many looks better there than it is.
        _plan(ways, budget, reported_on=lambda problems: problems)
            You report on all problems, and half of them chose the plan. Use those alone that did not.
    """,
    hint="For each way and each k that the budget pays: the mean of `vote` over the first half. Take the best of them.",
)
def budget_plan(ways: Sequence[Mapping], budget: float) -> list[float]:
    """[which way, how many answers, its mean vote on the second half] for the best vote on the first half of the
    problems within ``budget`` tokens a problem; the cheaper of equal ones."""
    return _plan(ways, budget)
