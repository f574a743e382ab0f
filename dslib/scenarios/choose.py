"""Choosing a model and a place to run it: constraints cut, wishes rank, and each option says why it is in or out.

A figure is a :class:`Span`, the two ends it lies between. ``chapters/scenarios/choose.ipynb`` builds all this in lines.
What a place carries (``load.ipynb``) and how good is good enough (``accuracy.ipynb``) it does not know.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from dslib import check
from dslib.scenarios.facts import Span, days, document
from dslib.scenarios.needs import LICENCES, Needs
from dslib.scenarios.options import Option, options


def verdict(low: float, high: float, limit: float) -> str:
    """In if the upper end keeps the limit, out if the lower end breaks it; else it cannot be said."""
    return "in" if high <= limit else "out" if low > limit else "cannot be said"


def points(wished: Mapping[str, Span], weights: Mapping[str, float]) -> Span:
    """The sum of weight x log2(figure), at both ends: half as much earns the weight, and no unit matters."""
    low = sum(weight * math.log2(wished[name].low) for name, weight in weights.items())
    high = sum(weight * math.log2(wished[name].high) for name, weight in weights.items())
    return Span(low, high, "sum of weight x log2(figure)")


def beats(a: Judged, b: Judged) -> bool:
    """Whether ``a`` is for sure no worse than ``b`` in every wish, and for sure better in one."""
    pairs = [(a.wished[name], b.wished[name]) for name in a.wished]
    return all(x.high <= y.low for x, y in pairs) and any(x.high < y.low for x, y in pairs)


def front(rows: Sequence[Judged]) -> list[Judged]:
    """Those that no other beats for sure; so an option of which a wished figure is not known stays."""
    return [row for row in rows if not any(beats(other, row) for other in rows)]


def nearest(rows: Sequence[Judged]) -> Judged | None:
    """Of options that are out, the one that the fewest changes of limits let in for sure, and of these the smallest.

    What no limit lets in comes last. An unknown figure counts as a broken one, so knowing less brings none nearer.
    """

    def far(row: Judged) -> tuple[float, ...]:
        misses = sorted((test.miss() for test in row.tests if test.verdict != "in"), reverse=True)
        never = sum(math.isinf(test.miss()) for test in row.blockers)
        return never, len(misses), *misses, max(test.miss(sure=False) for test in row.blockers)

    return min(rows, key=far, default=None)


def changes(answer: Answer, factor: float = 2.0) -> dict[str, str]:
    """What would be best instead if one number of the need were ``factor`` times as large, or as small."""
    found = {}
    for name in NUMBERS:
        value = getattr(answer.needs, name)
        for word, by in ((f"x {factor:g}", factor), (f"/ {factor:g}", 1 / factor)) if value else ():
            new = max(1, round(value * by)) if name == "users" else value * by
            with suppress(ValueError):  # of a context that is too short then
                other = replace(answer.needs, **{name: new})
                found[f"{name} {word}"] = choose(other, answer.weights, answer.calibration).first
    return {name: first for name, first in found.items() if first != answer.first}


STATES = ("in", "cannot be said", "out")
MORE = ("context", "mmlu", "mmlu_chat", "mmlu_pro", "mmlu_three")  # is better. MMLU after tuning; of three areas
WISHES = ("dollars", "token_time", "memory", *MORE)
NUMBERS = ("requests", "users", "prompt", "answer", "memory", "token_time", "first_token", "budget", "context")


@dataclass(frozen=True)
class Constraint:
    """One constraint on one option: a figure against its limit."""

    name: str
    span: Span
    limit: float
    at_least: bool = False  # more is better: a context, a score

    @property
    def verdict(self) -> str:
        """One of :data:`STATES`."""
        low, high, limit = self.span.low, self.span.high, self.limit
        return verdict(-high, -low, -limit) if self.at_least else verdict(low, high, limit)

    @property
    def would_pass(self) -> float:
        """The limit at which it is in for sure; infinite, either way, where no limit makes it so."""
        return self.span.low if self.at_least else self.span.high

    def miss(self, sure: bool = True) -> float:
        """How many doublings of the limit let it in for sure, or at best; infinite for what is no matter of degree."""
        end = self.would_pass if sure else self.span.high if self.at_least else self.span.low
        low, high = sorted((end, self.limit))
        return math.log2(high / low) if low > 0 and high < math.inf else math.inf


@dataclass(frozen=True)
class Judged:
    """An option, its tests, what it is in every wish, and its points: None where a wished figure has no two ends."""

    option: Option
    tests: list[Constraint]
    wished: Mapping[str, Span] = field(repr=False)
    points: Span | None = None

    @property
    def status(self) -> str:
        """The worst verdict of its tests."""
        return max((test.verdict for test in self.tests), key=STATES.index)

    @property
    def blockers(self) -> list[Constraint]:
        """The tests that it fails."""
        return [test for test in self.tests if test.verdict == "out"]

    @property
    def missing(self) -> list[str]:
        """The wishes whose figure has no two ends, so that it cannot be ranked."""
        return [name for name, span in self.wished.items() if not (span.known and span.low > 0)]


@dataclass(frozen=True)
class Answer:
    """All options, judged: those that are in, those of which it cannot be said, those that are out; each best first."""

    needs: Needs
    weights: Mapping[str, float]
    rows: tuple[Judged, ...]
    calibration: Any = None

    def having(self, status: str) -> list[Judged]:
        """The rows with this status."""
        return [row for row in self.rows if row.status == status]

    @property
    def best(self) -> Judged | None:
        """The first that is in, if it is ranked or alone; else None."""
        found = self.having("in")
        return found[0] if found and (len(found) == 1 or (self.weights and found[0].points)) else None

    @property
    def first(self) -> str:
        """The name of the best, or why none is named."""
        nobody = "nothing that can be ranked" if self.having("in") else "nothing for sure"
        return self.best.option.name if self.best else nobody


def choose(needs: Needs, weights: Mapping[str, float] | None = None, calibration: Any = None) -> Answer:
    """Judge and rank every option.

    Args:
        weights: wish (one of :data:`WISHES`) -> weight; they sum to 1. None: no order among those that are in.
        calibration: how fast ``needs.gpu`` decodes, such as a ``measured.experiments.choose.Calibration``.

    Raises ValueError for no constraint and no wish, unfit wishes or weights, and a calibration of another machine.
    """
    weights = dict(weights or {})
    for name, weight in weights.items():
        check.one_of(WISHES, weights=name)
        check.at_least(0, **{f"weights, {name}": weight})
    if weights and abs(sum(weights.values()) - 1) > 1e-9:
        raise ValueError(f"weights: got {weights}, which sum to {sum(weights.values()):g}, expected a sum of 1")
    if not weights and needs == Needs():
        raise ValueError("needs: got no constraint and no wish, expected at least one, such as a memory or a modality")
    if calibration and calibration.machine != needs.gpu:
        raise ValueError(f"calibration: got one of {calibration.machine!r}, expected one of gpu {needs.gpu!r}")
    rows = []
    for option in options(needs, calibration):
        row = Judged(option, examine(option, needs), {name: wish(name, option, needs) for name in weights})
        rows.append(row if row.missing else replace(row, points=points(row.wished, weights)))

    def order(row: Judged) -> tuple:
        middle = row.points.low + row.points.high if row.points else math.inf
        return STATES.index(row.status), middle, row.option.name

    return Answer(needs, weights, tuple(sorted(rows, key=order)), calibration)


def examine(option: Option, needs: Needs) -> list[Constraint]:
    """Every constraint of the need on one option, but those that do not touch it: an API has no card and no licence."""
    one, own = option.model, option.where == "own"
    tests = [Constraint("released", one.span("released"), days(needs.day or document()["as_of"])[1])]
    if needs.exists:
        tests.append(_yes_or_no("to be had", not one.imaginary, "no weights and no API under this name"))
    if needs.modality:
        has = one.facts["modality"]
        lacks = [kind for kind in needs.modality if kind not in has.value]
        tests.append(_yes_or_no("modality", not lacks, f"takes no {' or '.join(lacks)}", has.source))
    if needs.stay:
        tests.append(_yes_or_no("data stays", option.where != "api", "prompts go to the provider"))
    if needs.licence and option.where != "api":
        tests.append(Constraint("licence", one.span("licence"), LICENCES[needs.licence]))
    if needs.engine and own:
        fact = one.facts.get("engines")  # a list of those known to run it: absence proves nothing
        known = fact is not None and needs.engine.lower() in map(str.lower, fact.value)
        span = Span(0.0, 0.0, "yes", fact.source) if known else one.span("a run in this engine")
        tests.append(Constraint("engine", span, 0.0))
    if own or (option.where == "said" and needs.memory):
        tests.append(Constraint("memory", option.memory(needs), option.room if own else needs.memory))
    limits = {"context": needs.context, "token_time": needs.token_time, "first_token": needs.first_token}
    for name, limit in (limits | {"dollars": needs.budget} | needs.score).items():
        if limit is not None:
            tests.append(Constraint(name, option.figure(name, needs), limit, at_least=name in MORE))
    return tests


def wish(name: str, option: Option, needs: Needs) -> Span:
    """The figure that a wish is about, turned so that less is better: 1 / context, and what a score leaves to 100."""
    span = option.figure(name, needs)
    if name not in MORE or not span.known:
        return span
    low, high = (1 / span.high, 1 / span.low) if name == "context" else (100 - span.high, 100 - span.low)
    return replace(span, low=low, high=high)


def _yes_or_no(name: str, good: bool, text: str, source: Sequence[str] = ()) -> Constraint:
    return Constraint(name, Span(*[float(not good)] * 2, "yes" if good else text, tuple(source)), 0.0)
