"""Choosing a model and a place to run it: constraints cut, wishes rank, and each option says why it is in or out.

Three rules are the whole method. Every figure is a :class:`~dslib.scenarios.facts.Span`, the two ends it lies between:

    verdict   the upper end keeps the limit: in.  The lower end breaks it: out.  Else it cannot be said.
    points    the sum over wishes of weight x log2(figure), less is better: a halving of a figure counts its weight, and
              no unit matters (a weighted product). A context enters as 1/tokens, a score by what it leaves to 100.
    front     what no other option beats for sure on every wish.

:func:`choose` applies them to every model of ``data/options.yml`` in every place. It does not know whether a place
carries the load (``chapters/scenarios/load.ipynb``), nor how good is good enough (``performance/accuracy.ipynb``).
Weights and caches are taken to spread evenly over cards. Plain Python; the command line is :mod:`dslib.choose`.

Chapter: ``chapters/scenarios/choose.ipynb``, after :mod:`dslib.scenarios.options`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from dslib import check
from dslib.scenarios.facts import UNKNOWN, Span, days, document
from dslib.scenarios.needs import LICENCES, Calibration, Needs
from dslib.scenarios.options import Option, options

SCORES = ("mmlu", "mmlu_chat", "mmlu_pro", "mmlu_three")  # base; after tuning; MMLU-Pro; the article's three areas
WISHES = ("dollars", "token_time", "memory", "context", *SCORES)
STATES = ("in", "cannot be said", "out")


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
        if self.at_least:
            low, high, limit = -high, -low, -limit
        return "in" if high <= limit else "out" if low > limit else "cannot be said"

    @property
    def would_pass(self) -> float:
        """The limit at which it is in for sure; infinite, either way, where no limit makes it so."""
        return self.span.low if self.at_least else self.span.high

    @property
    def miss(self) -> float:
        """By how many doublings the limit is missed at best; infinite for what is no matter of degree."""
        low, high = sorted((self.span.high if self.at_least else self.span.low, self.limit))
        return math.log2(high / low) if low > 0 and high < math.inf else math.inf


@dataclass(frozen=True)
class Judged:
    """An option, its tests, what it is in every wish, and its points: None where a wished figure is not known."""

    option: Option
    tests: tuple[Constraint, ...]
    wished: Mapping[str, Span] = field(repr=False)
    points: Span | None

    @property
    def status(self) -> str:
        """The worst verdict of its tests."""
        return max((test.verdict for test in self.tests), key=STATES.index)

    @property
    def missing(self) -> tuple[str, ...]:
        """The wishes whose figure has no two ends, so that it cannot be ranked."""
        return tuple(name for name, span in self.wished.items() if not _usable(span))

    def blockers(self, verdict: str = "out") -> tuple[Constraint, ...]:
        """The tests with this verdict."""
        return tuple(test for test in self.tests if test.verdict == verdict)


@dataclass(frozen=True)
class Answer:
    """All options, judged: those that are in, those of which it cannot be said, those that are out; each best first."""

    needs: Needs
    weights: Mapping[str, float]
    rows: tuple[Judged, ...]

    def having(self, status: str) -> tuple[Judged, ...]:
        """The rows with this status."""
        return tuple(row for row in self.rows if row.status == status)

    @property
    def best(self) -> Judged | None:
        """The first that is in; None if nothing is for sure."""
        return next(iter(self.having("in")), None)

    def front(self) -> tuple[Judged, ...]:
        """Of those that are in, the ones that no other beats for sure on every wish."""
        rows = self.having("in")
        return tuple(row for row in rows if not any(beats(other, row) for other in rows))

    def nearest(self) -> Judged | None:
        """Of those that are out, the one with the fewest broken constraints, and of these the smallest miss."""

        def distance(row: Judged) -> tuple[int, float]:
            return len(row.blockers()), max(test.miss for test in row.blockers())

        return min(self.having("out"), key=distance, default=None)


def choose(needs: Needs, weights: Mapping[str, float] | None = None, calibration: Calibration | None = None) -> Answer:
    """Judge and rank every option.

    Args:
        weights: wish (one of :data:`WISHES`) -> weight; they sum to 1. None: no order among those that are in.
        calibration: how fast ``needs.gpu`` reads; it has to be of that machine.

    Raises ValueError for a need without a constraint where nothing is wished either, an unknown wish, weights that are
    negative or do not sum to 1, and a calibration of another machine.
    """
    weights = dict(weights or {})
    for name, weight in weights.items():
        if name not in WISHES:
            raise check.unknown("weights", name, WISHES, "wishes that have a figure")
        check.at_least(0, **{f"weights, {name}": weight})
    if weights and abs(sum(weights.values()) - 1) > 1e-9:
        raise ValueError(f"weights: got {weights}, which sum to {sum(weights.values()):g}, expected a sum of 1")
    if not weights and not needs.constraints():
        raise ValueError("needs: got no constraint and no wish, expected at least one, such as a memory or a modality")
    if calibration and calibration.machine != needs.gpu:
        raise ValueError(f"calibration: got one of {calibration.machine!r}, expected one of gpu {needs.gpu!r}")
    rows = []
    for option in options(needs, calibration):
        wished = {name: wish(name, option, needs, calibration) for name in weights}
        rows.append(Judged(option, examine(option, needs, calibration), wished, points(wished, weights)))
    return Answer(needs, weights, tuple(sorted(rows, key=_order)))


def examine(option: Option, needs: Needs, calibration: Calibration | None = None) -> tuple[Constraint, ...]:
    """Every constraint of the need on one option, but those that do not touch it: an API has no card and no licence."""
    one, own = option.model, option.where == "own"
    tests = [Constraint("released", one.released(), days(needs.day or document()["as_of"])[1])]
    if needs.exists:
        tests.append(_yes_or_no("to be had", not one.imaginary, "no weights and no API under this name"))
    if needs.modality:
        has = one.facts["modality"]
        lacks = [kind for kind in needs.modality if kind not in has.value]
        tests.append(_yes_or_no("modality", not lacks, f"takes no {' or '.join(lacks)}", has.source))
    if needs.stay:
        tests.append(_yes_or_no("data stays", option.where != "api", "prompts go to the provider"))
    if needs.licence and option.where != "api":
        fact = one.facts.get("licence")
        level = Span(*[document()["licences"][fact.value]] * 2, fact.value, fact.source) if fact else UNKNOWN
        tests.append(Constraint("licence", level, LICENCES[needs.licence]))
    if needs.engine and own:
        fact = one.facts.get("engines")  # a list of those known to run it: absence proves nothing
        runs = fact is not None and needs.engine.lower() in map(str.lower, fact.value)
        tests.append(
            _yes_or_no("engine", True, needs.engine, fact.source) if runs else Constraint("engine", UNKNOWN, 0)
        )
    if own or (option.where == "said" and needs.memory):
        tests.append(Constraint("memory", option.memory(needs), option.place.memory if own else needs.memory))
    if needs.context is not None:
        tests.append(Constraint("context", one.span("context"), needs.context, at_least=True))
    if needs.token_time is not None:
        tests.append(Constraint("token time", option.token_time(needs, calibration), needs.token_time))
    if needs.first_token is not None:
        tests.append(Constraint("first token", option.first_token(needs), needs.first_token))
    if needs.budget is not None:
        tests.append(Constraint("budget", option.dollars(needs), needs.budget))
    return (
        *tests,
        *(Constraint(name, option.score(name), least, at_least=True) for name, least in needs.score.items()),
    )


def wish(name: str, option: Option, needs: Needs, calibration: Calibration | None = None) -> Span:
    """The figure that a wish is about, turned so that less is better."""
    if name == "token_time":
        return option.token_time(needs, calibration)
    if name in ("dollars", "memory"):
        return getattr(option, name)(needs)
    span = option.model.span(name) if name == "context" else option.score(name)
    if not _usable(span):
        return span
    low, high = (1 / span.high, 1 / span.low) if name == "context" else (100 - span.high, 100 - span.low)
    return replace(span, low=low, high=high)


def points(wished: Mapping[str, Span], weights: Mapping[str, float]) -> Span | None:
    """The sum of weight x log2(figure) at both ends; None where a figure has no two ends."""
    if not all(map(_usable, wished.values())):
        return None
    low, high = (
        sum(weights[name] * math.log2(getattr(span, end)) for name, span in wished.items()) for end in ("low", "high")
    )
    return Span(low, high, "sum of weight x log2(figure)")


def beats(a: Judged, b: Judged) -> bool:
    """Whether ``a`` is for sure no worse than ``b`` in every wish, and for sure better in one."""
    pairs = [(a.wished[name], b.wished[name]) for name in a.wished]
    return all(x.high <= y.low for x, y in pairs) and any(x.high < y.low for x, y in pairs)


def changes(answer: Answer, calibration: Calibration | None = None, factor: float = 2.0) -> dict[str, str]:
    """What would be best instead if one number of the need were ``factor`` times as large, or as small."""
    found, now = {}, answer.best and answer.best.option.name
    for name, value in answer.needs.numbers().items():
        for word, new in ((f"x {factor:g}", value * factor), (f"/ {factor:g}", value / factor)):
            if name == "users" and new != (new := max(1, round(new))):
                continue
            try:
                other = choose(replace(answer.needs, **{name: new}), answer.weights, calibration).best
            except ValueError:  # of a context that is too short then
                continue
            if (other and other.option.name) != now:
                found[f"{name} {word}"] = other.option.name if other else "nothing for sure"
    return found


def _order(row: Judged) -> tuple:
    middle = math.inf if row.points is None else row.points.low + row.points.high
    return STATES.index(row.status), middle, row.option.name


def _usable(span: Span) -> bool:
    return span.known and span.low > 0


def _yes_or_no(name: str, good: bool, text: str, source: Sequence[str] = ()) -> Constraint:
    return Constraint(name, Span(*[float(not good)] * 2, "yes" if good else text, tuple(source)), 0.0)
