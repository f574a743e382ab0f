"""Exercises of ``chapters/scenarios/complex.ipynb``."""

import math
import random
from collections.abc import Sequence
from statistics import fmean, pstdev, stdev  # noqa: F401  one in a mistake only

from dslib.scenarios.complex import majority, pass_at_k, vote  # noqa: F401  some in the mistakes only
from measured.exercises import exercise, named


def _of_checker(right: float, wrong: Sequence[float], passes=lambda wrong: max(wrong, default=0.0)) -> float:
    """Endless tries; by what the checker ``passes``, also the usual ways to get it wrong."""
    return right / (right + passes(wrong)) if right else 0.0


def _of_vote(right: float, wrong: Sequence[float]) -> float:
    """Endless votes: won, lost, or drawn by lot among those that are level."""
    return (right >= max(wrong, default=0.0)) / (1 + sum(one == right for one in wrong)) if right else 0.0


def _limits(problems: Sequence, checker=_of_checker, voted=_of_vote) -> list[float]:
    """The reference and, by its options, the usual ways to get it wrong."""
    return [fmean(limit(right, wrong) for right, wrong in problems) for limit in (checker, voted)]


def _pooled(problems: Sequence) -> float:
    right, passed = (fmean(column) for column in zip(*((p, max(w, default=0.0)) for p, w in problems), strict=True))
    return right / (right + passed)


@exercise(
    "complex/limits",
    cases=named(
        "problems",
        ([[0.3, [0.2, 0.2, 0.1]]],),
        ([[0.3, [0.4, 0.1]], [0.6, [0.1]], [0.05, [0.9]]],),
        ([[0.25, [0.25, 0.1]], [0.125, [0.125, 0.125, 0.0625]], [0.5, []]],),
        ([[0.0, []], [0.0, [0.5]], [0.4, [0.3, 0.2]]],),
        ([[0.1, [0.02] * 6], [0.2, [0.3, 0.3]]],),
    ),
    mistakes="""
        _limits(problems, checker=lambda p, wrong: _of_checker(p, wrong, sum))
            Your checker lets every wrong answer through. It accepts one of them, the commonest, and rejects the others.
        _limits(problems, checker=lambda p, wrong: 1.0 if p else 0.0)
            That is a checker without a fault. This one takes the right answer or the one mistake, whichever comes
            first.
        _limits(problems, checker=lambda p, wrong: 1 - max(wrong, default=0.0))
            You take the mistake's share away. It competes with the right answer alone: what is rejected is drawn again.
        _limits(problems, checker=lambda p, wrong: p)
            That is the first try. Those that are rejected are followed by others, without end.
        [_pooled(problems), _limits(problems)[1]]
            You put mean chances into the formula. It bends: take the limit of each problem, then the mean.
        _limits(problems, voted=lambda p, wrong: float(p > 0.5))
            The right answer needs no half of the votes, only more than any other single answer.
        _limits(problems, voted=lambda p, wrong: float(p > sum(wrong)))
            The wrong answers do not vote together: each is an answer of its own.
        _limits(problems, voted=lambda p, wrong: float(p > max(wrong, default=0.0)))
            Where the right answer is level with others, lots are drawn among all that are level.
        _limits(problems, voted=lambda p, wrong: float(p > 0 and p >= max(wrong, default=0.0)))
            You win every tie. Lots are drawn among all that are level.
        _limits(problems, voted=_of_checker)
            With endless votes chance plays no part any more: the most likely answer wins, always.
    """,
    hint="Checker: of the answers that are accepted at all, the share that is right. Vote: who is the most likely?",
)
def limits(problems: Sequence) -> list[float]:
    """[success of a checker that always accepts the commonest mistake, success of a vote], both with endless tries."""
    return _limits(problems)


def _asked(seed: int, count: int, n: int, sharp: float) -> list[list]:
    """[answers, greedy answer, truth] of some problems; the favourite, right in two of three, has weight ``sharp``."""
    dice, found = random.Random(seed), []
    for number in range(count):
        truth = dice.randint(10, 30)
        favourite = truth if number % 3 else truth + 1
        others = [truth, truth + 1, truth - 1, truth + 2, None]
        drawn = [favourite if dice.random() < sharp else dice.choice(others) for _ in range(n)]
        found.append([drawn, favourite if dice.random() < 0.8 else truth - 1, truth])
    return found


def _gaps(problems: Sequence, k: int, score=vote) -> list[float]:
    return [score(answers, truth, k) - (greedy == truth) for answers, greedy, truth in problems]


def _passed(answers: Sequence, truth: int, k: int) -> float:
    return pass_at_k(len(answers), answers.count(truth), k)


def _needed(problems: Sequence, k: int, lead: float, spread=lambda p, k: stdev(_gaps(p, k)), z: float = 2.8) -> int:
    """The reference and, by its options, the usual ways to get it wrong."""
    return math.ceil((z * spread(problems, k) / lead) ** 2)


def _unpaired(problems: Sequence, k: int) -> float:
    columns = [vote(a, t, k) for a, _, t in problems], [float(g == t) for _, g, t in problems]
    return math.hypot(*map(stdev, columns))


@exercise(
    "complex/needed",
    cases=named(
        "problems k lead",
        (_asked(0, 12, 8, 0.3), 8, 0.05),
        (_asked(1, 10, 6, 0.5), 3, 0.02),
        (_asked(2, 16, 9, 0.4), 5, 0.1),
        (_asked(3, 8, 5, 0.2), 4, 0.03),
    ),
    mistakes="""
        _needed(problems, k, lead, spread=_unpaired)
            You treat vote and greedy as if they had problems of their own. Both are asked the same ones, so it is the
            difference on each problem that scatters.
        _needed(problems, k, lead, spread=lambda p, k: stdev(vote(a, t, k) for a, _, t in p))
            That is the scatter of the vote alone. The interval is of the difference to the greedy answer.
        _needed(problems, k, lead, spread=lambda p, k: pstdev(_gaps(p, k)))
            You divide by the number of problems. A standard deviation from a sample has n - 1 there.
        _needed(problems, k, lead, spread=lambda p, k: stdev(_gaps(p, k, _passed)))
            That is pass@k: it assumes a checker. A vote takes what is named most often.
        _needed(problems, k, lead, spread=lambda p, k: stdev(_gaps(p, k, lambda a, t, k: majority(a[:k]) == t)))
            You look at the first k answers only. Take the mean over all subsets of k, as `library.vote` does.
        _needed(problems, k, lead, spread=lambda p, k: stdev(_gaps(p, k, lambda a, t, _: vote(a, t, len(a)))))
            You let all answers vote, whatever k is.
        _needed(problems, k, lead, z=1.96)
            That makes the interval reach as far as the lead. The estimate scatters too, so half of the intervals would
            then hold 0. Power asks for 0.84 standard errors more.
        _needed(problems, k, lead, z=1.96 - 0.84)
            The two quantiles add up: 1.96 for the interval, and 0.84 more so that four of five estimates lie above it.
        math.ceil((1.96**2 + 0.84**2) * stdev(_gaps(problems, k)) ** 2 / lead**2)
            Add the quantiles first, then square.
        math.ceil(2.8 * stdev(_gaps(problems, k)) / lead)
            A standard error falls with the square root of the number of problems, so the ratio has to be squared.
        _needed(problems, k, lead) - 1
            One too few: round up, so that the power is no less than asked.
    """,
    hint="One difference a problem, vote minus greedy; s their standard deviation; lead = (1.96 + 0.84) s / sqrt(n).",
)
def needed(problems: Sequence, k: int, lead: float) -> int:
    """How many problems find a true ``lead`` of vote of k over greedy at the 5 % level with a power of 80 %."""
    return _needed(problems, k, lead)
