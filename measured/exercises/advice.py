"""Exercises of ``chapters/roadmap/advice.ipynb``. Days are texts such as ``"2025-09-17"``, which sort as days do."""

from collections.abc import Callable, Sequence

from dslib.roadmap.advice import base_rate
from measured.exercises import exercise, named


def _verdict(
    deadline, conditions, evidence, on,
    counts: Callable = lambda day, tier, on: day <= on and tier != "unverified",
    first: Callable = min, timely: Callable = str.__le__, enough: Callable = all, early=True, late=True, foreign=False,
) -> str:  # fmt: skip
    """The reference and, by its options, the usual ways to get it wrong."""
    days = [[day for day, shows, tier in evidence if shows == name and counts(day, tier, on)] for name in conditions]
    if enough(bool(seen) and timely(first(seen), deadline) for seen in days):
        return "met"
    if early and on <= deadline:
        return "open"
    if enough(bool(seen) for seen in days):
        return "met late" if late else "met"
    return "partly" if any(days) or (foreign and any(day <= on for day, *_ in evidence)) else "not met"


@exercise(
    "advice/grade",
    cases=named(
        "deadline conditions evidence on",
        ("2026-03-31", ["a", "b"], [("2026-03-31", "a", "primary"), ("2026-01-02", "b", "secondary")], "2026-11-28"),
        ("2026-03-31", ["a", "b"], [("2026-04-01", "a", "primary"), ("2026-01-02", "b", "primary")], "2026-11-28"),
        ("2026-03-31", ["a", "b"], [("2026-02-01", "b", "primary"), ("2026-02-02", "c", "primary")], "2026-11-28"),
        ("2026-03-31", ["a"], [("2026-02-01", "a", "unverified")], "2026-04-15"),
        ("2026-03-31", ["a"], [("2026-02-01", "b", "primary")], "2026-06-01"),
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
        _verdict(deadline, conditions, evidence, on, foreign=True)
            You take evidence for something else as part of it. Only what shows one of the conditions counts.
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


def _by_rule(rule, seen, on, opens=True, once=False, ahead=False, foreign=False, timely=str.__le__) -> str:
    """The grade by one of two rules; the options are mistakes."""
    if once:  # the first day only, whether the rule was open by then or not
        seen = [(min(day for day, other in seen if other == what), what) for _, what in seen]
    kept = [(day, what, "primary") for day, what in seen if not opens or rule["opens"] <= day]
    if ahead:
        kept = [(min(day, on), what, tier) if day <= rule["by"] else (day, what, tier) for day, what, tier in kept]
    return _verdict(rule["by"], rule["needs"], kept, on, foreign=foreign, timely=timely)


def _apart(one, other, seen, days, same=False, coarse=False, **how) -> list[int]:
    """The positions of the days on which the grades by two rules differ."""
    pairs = [(_by_rule(one, seen, on, **how), _by_rule(other, seen, on, **how)) for on in days]
    if coarse:
        pairs = [(a == "met", b == "met") for a, b in pairs]
    return [n for n, (a, b) in enumerate(pairs) if (a == b) == same]


def _rule(needs: str, by: str, opens: str = "2020-01-01") -> dict:
    return {"needs": list(needs), "opens": opens, "by": by}


@exercise(
    "advice/rules",
    cases=named(
        "one other seen days",
        (
            _rule("a", "2026-09-17"), _rule("a", "2026-09-17", "2025-09-18"),
            [("2026-04-24", "a"), ("2025-08-22", "a")], ["2025-12-01", "2026-04-23", "2026-04-24", "2026-10-01"],
        ),
        (
            _rule("a", "2026-03-31"), _rule("ab", "2026-03-31"),
            [("2026-02-01", "b")], ["2026-03-31", "2026-04-15"],
        ),
        (
            _rule("a", "2026-03-31"), _rule("a", "2026-12-31"),
            [("2026-05-01", "a")], ["2026-02-01", "2026-04-15", "2026-06-01", "2027-01-01"],
        ),
        (
            _rule("a", "2026-03-31", "2026-03-01"), _rule("a", "2026-03-31", "2025-01-01"),
            [("2026-03-31", "a"), ("2025-09-01", "a")], ["2026-03-30", "2026-03-31", "2026-06-01"],
        ),
        (
            _rule("a", "2026-03-31"), _rule("b", "2026-03-31"),
            [("2026-02-01", "a")], ["2026-01-31", "2026-03-31", "2026-06-01"],
        ),
    ),
    mistakes="""
        _apart(one, other, seen, days, opens=False)
            You leave out the opening day. What was seen before a rule opens does not count under that rule.
        _apart(one, other, seen, days, once=True)
            You keep the first day of each condition and then ask whether the rule was open. It may be seen again later.
        _apart(one, other, seen, days, foreign=True)
            You count evidence for what a rule does not need. It is worth nothing under that rule.
        _apart(one, other, seen, days, ahead=True)
            You look past the day of grading. What is seen later cannot be known on it.
        _apart(one, dict(other, by=one["by"]), seen, days)
            You grade both by the deadline of the first. Each rule has its own.
        _apart(one, dict(other, needs=one["needs"]), seen, days)
            You grade both by the conditions of the first. Each rule has its own.
        _apart(one, other, seen, days, coarse=True)
            You ask only whether it is met. Open, partly and not met are different answers too.
        _apart(one, other, seen, days, same=True)
            You return the days on which they agree.
        _apart(one, other, seen, days, timely=str.__lt__)
            The day of the deadline itself is in time.
    """,
    hint="Under each rule leave out what does not count, then take first days, then grade. Compare the two words.",
)  # fmt: skip
def disagree(one: dict, other: dict, seen: Sequence[tuple[str, str]], days: Sequence[str]) -> list[int]:
    """Positions in ``days`` at which the rules ``one`` and ``other`` (needs, opens, by) give different grades."""
    return _apart(one, other, seen, days)
