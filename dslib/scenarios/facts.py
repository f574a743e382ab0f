"""What is known of each model, from ``data/options.yml`` and ``published.yml``: a figure is two ends with a source.

Of an exact figure the ends are equal, a roofline floor has no upper one, and what nobody states has neither. Then come
``needs.py``, ``options.py`` (models in places) and ``choose.py``. Chapter: ``chapters/scenarios/choose.ipynb``.
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
from dslib.data.published_figures import Figure, figure

BASES = ("measured", "recorded", "published", "roofline", "article", "unknown")  # of a figure, the surest first
CACHE_NUMBER_BYTES = 2  # keys and values in 16 bits, whatever the weights are stored in


@dataclass(frozen=True)
class Span:
    """A figure between ``low`` and ``high``: how it was computed, from which sources, on what basis (:data:`BASES`)."""

    low: float
    high: float
    formula: str = ""
    source: tuple[str, ...] = ()
    basis: str = "published"

    def __post_init__(self) -> None:
        if not self.low <= self.high:  # NaN, too
            raise ValueError(f"low, high: got {self.low!r} and {self.high!r}, expected low at most high")

    @property
    def known(self) -> bool:
        """Whether both ends are finite."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def __add__(self, other: Span) -> Span:
        source = tuple(dict.fromkeys(self.source + other.source))
        basis = max(self.basis, other.basis, key=BASES.index)  # the less sure one
        return Span(self.low + other.low, self.high + other.high, f"{self.formula} + {other.formula}", source, basis)

    def times(self, factor: float, formula: str) -> Span:
        """The figure ``factor`` times as large (above 0)."""
        return replace(self, low=self.low * factor, high=self.high * factor, formula=formula)


def at_least(low: float, formula: str, source: tuple[str, ...] = (), basis: str = "unknown") -> Span:
    """A figure of which only the lower end is known."""
    return Span(low, math.inf, formula, source, basis)


def cache_bytes(shape: Mapping[str, Any], tokens: float) -> float:
    """Bytes that one text keeps after ``tokens`` tokens, by the shape of its cache.

    ``{"kind": "heads", layers, kv_heads, head_dim[, window]}``: keys and values of each head, of the last ``window`` or
    all. ``{"kind": "latent", layers, rank, rope}``: as in MLA. ``{"kind": "bytes", per_token[, fixed]}``: as counted.
    """
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
        """A fact; a pair is its two ends, a date its day numbers, a licence its level. What is missing has no ends."""
        fact, words = self.facts.get(name), name.replace("_", " ")
        if fact is None or fact.value is None:
            return Span(-math.inf, math.inf, f"{words} not stated", basis="unknown")
        value, text = fact.value, fact.note or f"{words} as stated"
        if isinstance(value, str):
            value, text = document()["licences"][value] if name == "licence" else days(value), value
        low, high = value if isinstance(value, tuple) else (value, value)
        basis = "article" if fact.tier == "article" else "published"
        return Span(float(low), float(high), text, fact.source, basis)

    @property
    def imaginary(self) -> bool:
        """Only the article describes it: there is nothing to download or to call."""
        return self.facts["modality"].tier == "article"

    def stored(self, fmt: str, part: str = "parameters") -> Span:
        """Bytes of all weights in a format, or of the ``"active"`` ones, which one token reads."""
        check.one_of(document()["formats"], format=fmt)
        count, (low, high) = self.span(part), document()["formats"][fmt]["value"]
        if fmt == "released" and part == "parameters":  # several formats at once, counted in the file
            return self.span("weights")
        if count.basis == "unknown":
            return at_least(0.0, count.formula)
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
    """Every model of ``data/options.yml`` by id."""
    found = {}
    for key, row in document()["models"].items():
        facts = {name: _fact(row, fact) for name, fact in row["facts"].items()}
        found[key] = Model(key, row["name"], facts, tuple(row.get("formats", ())))
    return found


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


def _fact(row: Mapping[str, Any], fact: Mapping[str, Any]) -> Figure:
    """A fact of the file, or the figure of ``published.yml`` that it names."""
    if "figure" in fact:
        one = figure(row["published"], fact["figure"])
        return replace(one, value=one.value[row["variant"]]) if isinstance(one.value, tuple) else one
    value = tuple(fact["value"]) if isinstance(fact["value"], list) else fact["value"]
    return Figure(value, "", tuple(fact["source"]), fact["tier"], note=fact.get("note", ""))
