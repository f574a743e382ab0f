"""What is known of each model, each figure as two ends with a source.

:class:`Span` is what is known of a figure: it lies between two ends. Of an exact figure they are equal, of a price that
differs by provider they are not, a roofline floor has no upper one, and what nobody states has neither. Then one
comparison serves them all: a limit holds if the upper end keeps it, fails if the lower one breaks it, and otherwise it
cannot be said.

Facts stand in ``data/options.yml`` and, where they were there already, in ``published.yml``. Plain Python and PyYAML.
Chapter: ``chapters/scenarios/choose.ipynb``, with :mod:`~dslib.scenarios.needs` (what is asked),
:mod:`~dslib.scenarios.options` (models in places) and :mod:`dslib.scenarios.choose`, in this order.
"""

from __future__ import annotations

import calendar
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cache
from typing import Any

from dslib import check
from dslib.data.files import read_yaml
from dslib.data.published_figures import TIERS, Figure, figure

BASES = ("measured", "recorded", "published", "roofline", "article", "unknown")  # of a figure, the surest first
CACHE_NUMBER_BYTES = 2  # keys and values in 16 bits, whatever the weights are stored in


@dataclass(frozen=True)
class Span:
    """A figure between ``low`` and ``high``: how it was computed, from which sources, on what basis."""

    low: float
    high: float
    formula: str = ""
    source: tuple[str, ...] = ()
    basis: str = "published"

    def __post_init__(self) -> None:
        if not self.low <= self.high:  # NaN, too
            raise ValueError(f"low, high: got {self.low!r} and {self.high!r}, expected low at most high")
        check.one_of(BASES, basis=self.basis)

    @property
    def known(self) -> bool:
        """Whether both ends are finite."""
        return math.isfinite(self.low) and math.isfinite(self.high)


UNKNOWN = Span(-math.inf, math.inf, "nothing stated", basis="unknown")


def at_least(low: float, formula: str, source: tuple[str, ...] = (), basis: str = "unknown") -> Span:
    """A figure of which only the lower end is known."""
    return Span(low, math.inf, formula, source, basis)


def cache_bytes(shape: Mapping[str, Any], tokens: float) -> float:
    """Bytes that one text keeps after ``tokens`` tokens, by the shape of its cache.

    ``{"kind": "heads", layers, kv_heads, head_dim[, window]}``: keys and values of each head, of the last ``window``
    tokens where there is one. ``{"kind": "latent", layers, rank, rope}``: one latent and one shared rotary key a layer
    (MLA). ``{"kind": "bytes", per_token[, fixed]}``: counted elsewhere.
    """
    check.at_least(0, tokens=tokens)
    check.one_of(("heads", "latent", "bytes"), kind=shape.get("kind"))
    if shape["kind"] == "bytes":
        return float(shape["per_token"] * tokens + shape.get("fixed", 0))
    if shape["kind"] == "latent":
        return float(shape["layers"] * (shape["rank"] + shape["rope"]) * tokens * CACHE_NUMBER_BYTES)
    kept = min(tokens, shape.get("window") or math.inf)
    return float(2 * shape["layers"] * shape["kv_heads"] * shape["head_dim"] * kept * CACHE_NUMBER_BYTES)


@dataclass(frozen=True)
class Model:
    """A design or a published model: a figure for each fact, and the formats its weights may be stored in."""

    id: str
    name: str
    facts: Mapping[str, Figure] = field(repr=False)
    formats: tuple[str, ...] = ()

    def span(self, name: str) -> Span:
        """A fact as a span: a pair of numbers is one itself, and what is missing is :data:`UNKNOWN`."""
        fact = self.facts.get(name)
        if fact is None or fact.value is None:
            return UNKNOWN
        low, high = fact.value if isinstance(fact.value, tuple) else (fact.value, fact.value)
        basis = "article" if fact.tier == "article" else "published"
        return Span(float(low), float(high), fact.note or f"{name.replace('_', ' ')} as stated", fact.source, basis)

    @property
    def imaginary(self) -> bool:
        """Only the article describes it: there is nothing to download or to call."""
        return self.facts["modality"].tier == "article"

    def released(self) -> Span:
        """The day it came out, as a day number; of a month its first and last day."""
        fact = self.facts["released"]
        return Span(*days(fact.value), f"released {fact.value}", fact.source)

    def stored(self, fmt: str, part: str = "parameters") -> Span:
        """Bytes of all weights in a format, or of the ``"active"`` ones, which one token reads."""
        if fmt == "released":  # as DeepSeek stores them: of what a token reads, at least FP4 and its scales
            active = self.span("active")
            floor = at_least(0.53125 * active.low, "active parameters in FP4", active.source, active.basis)
            return self.span("weights") if part == "parameters" else floor
        check.one_of(document()["formats"], format=fmt)
        count, (low, high) = self.span(part), document()["formats"][fmt]["value"]
        if count == UNKNOWN:
            return at_least(0.0, f"{part} not stated")
        text = f"{count.low / 1e9:,.4g}B {part} in {fmt}"
        return replace(count, low=count.low * low, high=count.high * high, formula=text)

    def cache(self, tokens: float) -> Span:
        """Bytes of keys and values after ``tokens`` tokens of one text."""
        fact = self.facts.get("cache")
        if fact is None:
            return at_least(0.0, "a cache of a shape not stated")
        return Span(*[cache_bytes(fact.value, tokens)] * 2, f"a cache of {tokens:,.0f} tokens", fact.source)


def model(name: str) -> Model:
    """The model of this id or name. Raises ValueError with the nearest for another."""
    found = {key: one for one in models().values() for key in (one.id, one.name)}
    if name not in found:
        raise check.unknown("model", name, found, "one of data/options.yml")
    return found[name]


@cache
def models() -> dict[str, Model]:
    """Every model of ``data/options.yml`` by id. Raises ValueError, with model and fact, for a faulty row."""
    rows = document()["models"]
    return {key: Model(key, row["name"], _facts(key, row), tuple(row.get("formats", ()))) for key, row in rows.items()}


@cache
def document() -> dict[str, Any]:
    """The contents of ``data/options.yml``."""
    return read_yaml("options.yml")


def days(text: str) -> tuple[int, int]:
    """First and last day that ``"2025-09-17"`` or ``"2025-09"`` can mean, as day numbers. ValueError for other text."""
    try:
        year, month, *day = map(int, text.split("-"))
        ends = (day[0], day[0]) if day else (1, calendar.monthrange(year, month)[1])
        return date(year, month, ends[0]).toordinal(), date(year, month, ends[1]).toordinal()
    except (AttributeError, ValueError) as error:
        raise ValueError(f"date: got {text!r}, expected a day or a month, such as '2025-09-17'") from error


def _facts(key: str, row: Mapping[str, Any]) -> dict[str, Figure]:
    facts = {}
    for name, fact in row["facts"].items():
        if "figure" in fact:
            one = figure(row["published"], fact["figure"])
            facts[name] = replace(one, value=one.value[row["variant"]]) if isinstance(one.value, tuple) else one
            continue
        if not {"value", "source", "tier"} <= set(fact):
            raise ValueError(
                f"options.yml, {key}, fact {name!r}: got {fact!r}, expected a figure, or value, source, tier"
            )
        check.one_of((*TIERS, "article"), **{f"options.yml, {key}, fact {name!r}, tier": fact["tier"]})
        value = tuple(fact["value"]) if isinstance(fact["value"], list) else fact["value"]
        facts[name] = Figure(
            value, "", tuple(fact["source"]), fact["tier"], str(fact.get("at", "")), fact.get("note", "")
        )
    return facts
