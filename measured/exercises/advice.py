"""Exercises of ``chapters/roadmap/advice.ipynb``. Days are texts such as ``"2025-09-17"``, which sort as days do."""

from collections.abc import Callable, Sequence

from dslib.roadmap.advice import base_rate
from measured.exercises import exercise, named


def _verdict(
    deadline, conditions, evidence, on,
    counts: Callable = lambda day, tier, on: day <= on and tier != "unverified",
    first: Callable = min, timely: Callable = str.__le__, enough: Callable = all, early=True, late=True,
) -> str:  # fmt: skip
    """The reference and, by its options, the usual ways to get it wrong."""
    days = [[day for day, shows, tier in evidence if shows == name and counts(day, tier, on)] for name in conditions]
    if enough(bool(seen) and timely(first(seen), deadline) for seen in days):
        return "met"
    if early and on <= deadline:
        return "open"
    if enough(bool(seen) for seen in days):
        return "met late" if late else "met"
    return "partly" if any(days) else "not met"


@exercise(
    "advice/grade",
    cases=named(
        "deadline conditions evidence on",
        ("2026-03-31", ["a", "b"], [("2026-03-31", "a", "primary"), ("2026-01-02", "b", "secondary")], "2026-11-28"),
        ("2026-03-31", ["a", "b"], [("2026-04-01", "a", "primary"), ("2026-01-02", "b", "primary")], "2026-11-28"),
        ("2026-03-31", ["a", "b"], [("2026-02-01", "b", "primary"), ("2026-02-02", "c", "primary")], "2026-11-28"),
        ("2026-03-31", ["a"], [("2026-02-01", "a", "unverified")], "2026-04-15"),
        ("2026-12-31", ["a"], [("2026-12-01", "a", "primary")], "2026-11-28"),
        ("2026-12-31", ["a", "b"], [("2026-11-01", "a", "primary")], "2026-11-28"),
        ("2026-12-31", ["a"], [("2026-11-28", "a", "secondary")], "2026-11-28"),
        ("2026-06-30", ["a"], [("2026-05-01", "a", "primary")], "2026-04-15"),
        ("2026-03-31", ["a"], [("2026-06-01", "a", "primary"), ("2026-03-01", "a", "secondary")], "2026-11-28"),
        ("2026-03-31", ["a"], [("2026-12-24", "a", "primary")], "2026-11-28"),
        ("2026-04-15", ["a"], [], "2026-04-15"),
        ("2026-03-31", ["a", "b"], [("2026-05-01", "a", "secondary"), ("2026-06-01", "b", "primary")], "2026-11-28"),
    ),
    mistakes="""
        _verdict(deadline, conditions, evidence, on, counts=lambda day, tier, on: day <= on)
            You count what nobody confirmed. Evidence of the tier unverified is shown and meets nothing.
        _verdict(deadline, conditions, evidence, on, counts=lambda day, tier, on: tier != "unverified")
            You look past the day of grading. What is seen later cannot be known `on` that day.
        _verdict(deadline, conditions, evidence, on, counts=lambda day, tier, on: day <= on and tier == "primary")
            You count primary sources only. The rule leaves out what is unverified, and nothing else.
        _verdict(deadline, conditions, evidence, on, first=max)
            You take the last day on which a condition was seen. It was met on the first.
        _verdict(deadline, conditions, evidence, on, timely=str.__lt__)
            The day of the deadline itself is in time.
        _verdict(deadline, conditions, evidence, on, enough=any)
            One condition is enough for you. All of them are needed.
        _verdict(deadline, conditions, evidence, on, early=False)
            While the deadline is ahead, what has not come may still come: the forecast is open.
        _verdict(deadline, conditions, evidence, on, late=False)
            What came after the deadline is met late. A forecast that may come at any time cannot fail.
    """,
    hint="First the first day of each condition, from evidence that counts and is known. Then four questions in order.",
)
def verdict(deadline: str, conditions: Sequence[str], evidence: Sequence[tuple[str, str, str]], on: str) -> str:
    """``met``, ``open``, ``met late``, ``partly`` or ``not met``, as the page defines them.

    Args:
        evidence: of each piece the day from which it could be seen, the condition that it shows, and its tier.
        on: the day of grading, included.
    """
    return _verdict(deadline, conditions, evidence, on)


def _square(p: float, y: int) -> float:
    return (p - y) ** 2


def _distance(p: float, y: int) -> float:
    return abs(p - y)


def _ratio(probabilities, outcomes, base, loss: Callable = _square) -> float:
    """What the forecaster pays, over what ``base`` would pay on the same outcomes."""
    paid = sum(loss(p, y) for p, y in zip(probabilities, outcomes, strict=True))
    return paid / sum(loss(base, y) for y in outcomes)


@exercise(
    "advice/skill",
    cases=named(
        "probabilities outcomes earlier",
        ([0.9, 0.7, 0.2, 0.4], [1, 0, 0, 1], [1, 1, 0, 1, 1]),
        ([0.6, 0.1], [0, 1], [0, 0, 0]),
        ([0.3, 0.8, 0.5], [0, 1, 1], [1, 0, 0, 0, 1, 0, 1]),
    ),
    mistakes="""
        1 - _ratio(probabilities, outcomes, base_rate(sum(outcomes), len(outcomes)))
            Your base rate is made of the outcomes that are to be foretold. Nobody knew them; use the earlier ones.
        1 - _ratio(probabilities, outcomes, sum(earlier) / len(earlier))
            You take the plain share. After three failures in three it says 0: never. Use (met + 1) / (total + 2).
        _ratio(probabilities, outcomes, base_rate(sum(earlier), len(earlier)))
            You return the ratio. Skill is one minus it: above 0 is better than the base rate.
        1 - _ratio(probabilities, outcomes, base_rate(sum(earlier), len(earlier)), _distance)
            You add up distances. The Brier score squares them; distances pay those who exaggerate.
        1 - _ratio(probabilities, outcomes, 0.5)
            You compare with a coin. Compare with who knows how often it came before.
        -_ratio(probabilities, outcomes, base_rate(sum(earlier), len(earlier)))
            The one is missing: skill is one minus the ratio, 0 for who does as well as the base rate.
    """,
    hint="Two Brier scores on the same outcomes: the forecaster's, and that of always saying the earlier base rate.",
)
def skill(probabilities: Sequence[float], outcomes: Sequence[int], earlier: Sequence[int]) -> float:
    """1 minus the forecaster's Brier score over that of the base rate of ``earlier``, (met + 1) / (total + 2)."""
    return 1 - _ratio(probabilities, outcomes, base_rate(sum(earlier), len(earlier)))
