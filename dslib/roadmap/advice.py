"""Advice and forecasts that can be graded: a rule before the evidence, a day, a score.

A forecast names *conditions*; evidence is dated and meets one of them or none. Then the days decide (:func:`grade`):

    all conditions met by the deadline   met            some of them                        partly
    all of them, but later               met late       none, and the deadline is over      not met
    the deadline is still ahead          open           nothing that one could look up      cannot be graded

Whoever says a probability p for what comes (y = 1) or does not (y = 0) pays (p - y)^2; the mean is the Brier score
(:func:`brier`). It is lowest, on average, for those who say what they believe. A score means something beside what a
*base rate* would have paid (:func:`skill`), and only over many forecasts (:func:`forecasts_needed`).

Data: ``data/forecasts.yml``; what was published when is in :mod:`~dslib.roadmap.timeline`. Plain Python and PyYAML.
Chapter: ``chapters/roadmap/advice.ipynb``. Sources: Brier (1950); Gneiting and Raftery (2007).
"""

from __future__ import annotations

import calendar
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from dslib import check
from dslib.data.files import read_yaml
from dslib.data.published_figures import TIERS

GRADES = ("met", "met late", "partly", "not met", "open", "cannot be graded")
KINDS, MAKERS = ("forecast", "advice", "statement"), ("article", "course")
LINES = ("main", "side")  # DeepSeek's numbered V models; all others
COUNTED = ("primary", "secondary", "derived")  # tiers that can meet a condition; what is unverified is only shown
UNDATED = 12  # months that count for every forecast whose author gave no day


def brier(probabilities: Iterable[float], outcomes: Iterable[int]) -> float:
    """Mean of (p - y)^2: 0 for who knew, 0.25 for who always says one half. ValueError for what is no probability."""
    pairs = _pairs(probabilities, outcomes)
    return sum((p - y) ** 2 for p, y in pairs) / len(pairs)


def base_rate(met: int, total: int, chances: int = 1) -> float:
    """How likely one of the next ``chances`` cases is, if ``met`` of ``total`` like them came before.

    Laplace's rule of succession: (met + 1) / (total + 2) for the next one, never 0 or 1, and so on for those after it.
    """
    check.whole(0, met=met)
    check.whole(met, total=total)
    check.whole(1, chances=chances)
    none = math.prod((total - met + 1 + n) / (total + 2 + n) for n in range(chances))
    return 1 - none


def skill(probabilities: Iterable[float], outcomes: Iterable[int], base: float) -> float:
    """1 - Brier / Brier of always saying ``base``: above 0 is better than the base rate, 1 is perfect."""
    check.above(0, base=base)
    check.below(0, 1, base=base)
    pairs = _pairs(probabilities, outcomes)
    told, came = zip(*pairs, strict=True)
    return 1 - brier(told, came) / brier([base] * len(came), came)


def calibration(probabilities: Iterable[float], outcomes: Iterable[int], bins: int = 5) -> list[dict[str, Any]]:
    """Of the forecasts in each of ``bins`` equal parts of [0, 1]: how many, the mean said, the share that came."""
    check.whole(1, bins=bins)
    groups: dict[int, list[tuple[float, int]]] = {}
    for p, y in _pairs(probabilities, outcomes):
        groups.setdefault(min(int(p * bins), bins - 1), []).append((p, y))
    return [
        {"forecasts": len(g), "said": sum(p for p, _ in g) / len(g), "came": sum(y for _, y in g) / len(g)}
        for _, g in sorted(groups.items())
    ]


def forecasts_needed(chance: float, told: float, sure: float = 1.96) -> int:
    """Fewest forecasts until ``told`` pays ``sure`` standard errors more than ``chance``, where ``chance`` is true.

    One forecast costs (told - chance)^2 more on average, with a standard deviation of
    2 |told - chance| sqrt(chance (1 - chance)); so n = (2 sure / |told - chance|)^2 chance (1 - chance), rounded up.
    """
    check.between(0, 1, chance=chance, told=told)
    check.above(0, sure=sure)
    if told == chance:
        raise ValueError(f"told: got {told!r}, expected another number than chance: no count would tell them apart")
    return max(1, math.ceil((2 * sure / abs(told - chance)) ** 2 * chance * (1 - chance) - 1e-9))


@dataclass(frozen=True)
class Evidence:
    """What could be seen from ``date`` on; it meets the condition ``shows``, or none (None)."""

    date: date
    shows: str | None
    line: str
    what: str
    source: tuple[str, ...]
    tier: str


@dataclass(frozen=True)
class Forecast:
    """One row of ``data/forecasts.yml``; the file's head explains the fields."""

    id: str
    kind: str
    by: str
    made: date
    said: str
    rule: str
    deadline: date | None = None
    conditions: Mapping[str, str] = field(default_factory=dict)
    evidence: tuple[Evidence, ...] = ()
    claim: str | None = None
    looked: str = ""
    why: str = ""
    probability: float | None = None
    base: Mapping[str, Any] | None = None
    opens: date | None = None  # what was seen before that day does not count
    clarified: Mapping[str, str] | None = None  # ``day``, before it opens, and ``how`` the rule is meant


@dataclass(frozen=True)
class Grade:
    """``word`` of :data:`GRADES`; ``met``: the first day of each condition; ``already``: all met when it was made."""

    word: str
    deadline: date | None
    met: Mapping[str, date]
    already: bool = False


def grade(
    forecast: Forecast, on: str | date, *, months: int = UNDATED, deadline: str | date | None = None,
    opens: str | date | None = None, lines: Sequence[str] = ("main",), tiers: Sequence[str] = COUNTED,
) -> Grade:  # fmt: skip
    """Grade a forecast with what could be known ``on`` a day.

    Args:
        months: the deadline of a forecast that names none. deadline, opens: other days, for this grading.
        lines, tiers: which evidence may meet a condition.

    Raises ValueError for a day that is none, or a day of grading before the forecast was made.
    """
    day = as_day("on", on)
    check.whole(1, months=months)
    if day < forecast.made:
        raise ValueError(f"on: got {day}, expected {forecast.made}, the day {forecast.id!r} was made, or later")
    if not forecast.conditions:
        return Grade("cannot be graded", None, {})
    last = as_day("deadline", deadline) if deadline else forecast.deadline or add_months(forecast.made, months)
    first_day = as_day("opens", opens) if opens else forecast.opens or date.min
    met: dict[str, date] = {}
    for one in sorted(forecast.evidence, key=lambda e: e.date):
        counts = one.shows in forecast.conditions and one.line in lines and one.tier in tiers
        if counts and first_day <= one.date <= day:
            met.setdefault(one.shows, one.date)
    timely = [name for name, first in met.items() if first <= last]
    if len(timely) == len(forecast.conditions):
        word = "met"
    elif day <= last:
        word = "open"
    elif len(met) == len(forecast.conditions):
        word = "met late"
    else:
        word = "partly" if met else "not met"
    already = len(met) == len(forecast.conditions) and max(met.values()) <= forecast.made
    return Grade(word, last, met, already)


def load(document: Mapping[str, Any] | None = None) -> dict[str, Forecast]:
    """Every row, by id. ValueError with row and field for a faulty one, such as a prediction without a day."""
    document = read_yaml("forecasts.yml") if document is None else document
    if not isinstance(document, Mapping) or not isinstance(document.get("forecasts"), list):
        got = type(document).__name__
        raise ValueError(f"forecasts.yml: got {got}, expected 'looked_until' and a list 'forecasts'")
    until = as_day("forecasts.yml, looked_until", document.get("looked_until"))
    rows = [_forecast(row, until) for row in document["forecasts"]]
    found = {row.id: row for row in rows}
    if len(found) < len(rows):
        twice = next(row.id for row in rows if sum(r.id == row.id for r in rows) > 1)
        raise ValueError(f"forecasts.yml: got {twice!r} twice, expected one row for each id")
    return found


def looked_until() -> date:
    """The day up to which evidence was looked for."""
    return as_day("looked_until", read_yaml("forecasts.yml")["looked_until"])


def as_day(name: str, value: Any) -> date:
    """A day from ``"2025-09-17"`` or a date; a ValueError that names the argument for anything else."""
    try:
        return date(value.year, value.month, value.day) if isinstance(value, date) else date.fromisoformat(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: got {value!r}, expected a day such as 2025-09-17") from None


def add_months(day: date, months: int) -> date:
    """The same day some months later, or the last one of a shorter month."""
    year, month = divmod(day.year * 12 + day.month - 1 + months, 12)
    return date(year, month + 1, min(day.day, calendar.monthrange(year, month + 1)[1]))


def _pairs(probabilities: Iterable[float], outcomes: Iterable[int]) -> list[tuple[float, int]]:
    told, came = list(probabilities), list(outcomes)
    if not told or len(told) != len(came):
        raise ValueError(f"outcomes: got {len(came)} for {len(told)} probabilities, expected one for each, and some")
    check.between(0, 1, **{f"probabilities[{n}]": p for n, p in enumerate(told)})
    for n, y in enumerate(came):
        check.one_of((0, 1), **{f"outcomes[{n}]": y})
    return list(zip(map(float, told), map(int, came), strict=True))


def _forecast(row: Any, until: date) -> Forecast:
    where = f"forecasts.yml, row {row['id'] if isinstance(row, Mapping) and 'id' in row else row}"
    needed = ("id", "kind", "by", "made", "said", "rule")
    missing = [name for name in needed if name not in row] if isinstance(row, Mapping) else list(needed)
    if missing:
        raise ValueError(f"{where}, {missing[0]}: got nothing, expected {', '.join(needed)} in each row")
    if unknown := sorted(row.keys() - Forecast.__dataclass_fields__.keys()):
        fields = Forecast.__dataclass_fields__
        raise check.unknown(f"{where}, field", unknown[0], fields, "one that the file's head explains")
    check.one_of(KINDS, **{f"{where}, kind": row["kind"]})
    check.one_of(MAKERS, **{f"{where}, by": row["by"]})
    made, end = as_day(f"{where}, made", row["made"]), row.get("deadline")
    end = None if end is None else as_day(f"{where}, deadline", end)
    conditions, opens = dict(row.get("conditions") or {}), row.get("opens")
    opens = None if opens is None else as_day(f"{where}, opens", opens)
    if end and end < (opens or made):
        raise ValueError(f"{where}, deadline: got {end}, expected {opens or made}, when it was made or opens, or later")
    if clear := row.get("clarified"):
        day = as_day(f"{where}, clarified", clear.get("day"))
        if not clear.get("how") or day < made or (opens and day >= opens):
            raise ValueError(f"{where}, clarified: got {clear!r}, expected how, and a day before it opens")
    if not conditions and not row.get("why"):
        raise ValueError(f"{where}, why: got nothing, expected why nobody can grade it, as it has no conditions")
    evidence = []
    for number, given in enumerate(row.get("evidence") or [], 1):
        at = f"{where}, evidence {number}"
        missing = [name for name in Evidence.__dataclass_fields__ if name not in given]
        if missing or not given["source"]:
            raise ValueError(f"{at}, {(missing or ['source'])[0]}: got nothing, expected what the file's head explains")
        day = as_day(f"{at}, date", given["date"])
        if day > until:
            raise ValueError(f"{at}, date: got {day}, expected {until} or earlier, the day up to which was looked")
        check.one_of((None, *conditions), **{f"{at}, shows": given["shows"]})
        check.one_of(LINES, **{f"{at}, line": given["line"]})
        check.one_of(TIERS, **{f"{at}, tier": given["tier"]})
        evidence.append(Evidence(**given | {"date": day, "source": tuple(given["source"])}))
    if row["by"] == "course":
        check.above(0, **{f"{where}, probability": row.get("probability")})
        check.below(0, 1, **{f"{where}, probability": row["probability"]})
        if not (end and conditions and opens and row.get("base")):
            raise ValueError(f"{where}: expected opens, a deadline, conditions and a base beside the probability")
    days = {"made": made, "opens": opens, "deadline": end}
    return Forecast(**row | days | {"conditions": conditions, "evidence": tuple(evidence)})
