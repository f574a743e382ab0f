"""Models in places, and the figures of each such option: bytes, seconds, dollars.

Chapter: ``chapters/scenarios/choose.ipynb``; before it :mod:`~dslib.scenarios.facts`, after it
:mod:`dslib.scenarios.choose`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache

from dslib import roofline
from dslib.performance import prices
from dslib.scenarios.facts import BASES, UNKNOWN, Model, Span, at_least, document, model, models
from dslib.scenarios.needs import Calibration, Needs

CARDS = ("T4", "L4", "A10", "A100_40GB", "A100_80GB", "H100_SXM", "H200")  # where a need names none: one or eight of
MONTH = 30  # days


@dataclass(frozen=True)
class Place:
    """Cards, or a machine of which only the memory is known. ``memory`` is of all cards, ``roof`` of one."""

    name: str
    memory: float
    count: int = 1
    roof: roofline.Roof | None = None


@dataclass(frozen=True)
class Option:
    """A model by an API, on cards of one's own in a number format, or (``said``) as the article describes it."""

    model: Model
    where: str  # "api", "own", "said"
    fmt: str = ""
    place: Place | None = None
    price: prices.TokenPrice | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """Model, format and place in a few words."""
        if self.where != "own":
            return f"{self.model.name}, {'API' if self.where == 'api' else 'as described'}"
        cards = f"{self.place.count} x {self.place.name}" if self.place.roof else self.place.name
        return f"{self.model.name}, {self.fmt}, {cards}"

    def memory(self, needs: Needs) -> Span:
        """Bytes that the place must have: weights and the caches of all texts, over the share that may be used."""
        if self.where != "own":
            return self.model.span("memory") if self.where == "said" else UNKNOWN
        weights, cache = self.model.stored(self.fmt), self.model.cache(needs.length)
        ends = [(w + needs.users * c) / (1 - needs.reserve) for w, c in zip(_ends(weights), _ends(cache), strict=True)]
        return _joined(
            ends, f"({weights.formula} + {needs.users} x {cache.formula}) / {1 - needs.reserve:g}", weights, cache
        )

    def token_time(self, needs: Needs, calibration: Calibration | None = None) -> Span:
        """Seconds of a step that gives each text a token: calibrated where that may be trusted, else a floor."""
        if self.where == "said":
            return self.model.span("token_time")
        if self.place is None or self.place.roof is None:
            return at_least(0.0, "no speed published")
        weights, cache, note = self.model.stored(self.fmt, "active"), self.model.cache(needs.length), ""
        moved = [w + needs.users * c for w, c in zip(_ends(weights), _ends(cache), strict=True)]
        if calibration and self.fmt in calibration.rates and needs.users == self.place.count == 1 and weights.known:
            rate, off = calibration.rates[self.fmt], calibration.worst(self.fmt)
            if calibration.trusted(self.fmt):
                ends = [moved[0] / rate / (1 + off), moved[1] / rate * (1 + off)]
                text = f"{weights.formula} read at {rate / 1e9:.3g} GB/s, {off:.0%} either way"
                return Span(*ends, text, weights.source, calibration.basis)
            held = f"off by {off:.0%}" if off < math.inf else "held against no other model"
            note = f"; the calibration is {held}: not to be trusted here"
        roof = self.place.roof
        rate = (roof.read_bandwidth or roof.bandwidth) * self.place.count
        return at_least(
            moved[0] / rate, f"{weights.formula} read at {rate / 1e9:,.4g} GB/s{note}", weights.source, "roofline"
        )

    def score(self, name: str) -> Span:
        """A benchmark's score in %. It was measured on the released weights; what four bits lose of it is not known."""
        span = self.model.span(name)
        if self.fmt != "int4" or span == UNKNOWN:
            return span
        return replace(span, low=-math.inf, formula=f"{span.formula}, less what four bits lose")

    def first_token(self, needs: Needs) -> Span:
        """Least seconds to read one prompt: two operations a weight and token, or all of them read once."""
        if self.where != "own" or self.place.roof is None or not self.place.roof.flops:
            return at_least(0.0, "no speed published")
        roof, active = self.place.roof, self.model.span("active")
        wanted = "float8" if self.fmt in ("float8", "released") else "float16"
        rate = roof.flops.get(wanted, roof.flops["float16"]) * self.place.count
        work, moved = 2 * max(active.low, 0.0) * needs.prompt, self.model.stored(self.fmt, "active").low
        text = f"2 x {max(active.low, 0.0) / 1e9:.3g}B x {needs.prompt:g} tokens at {rate / 1e12:,.4g} TFLOP/s"
        return at_least(max(work / rate, moved / roof.bandwidth / self.place.count), text, active.source, "roofline")

    def dollars(self, needs: Needs) -> Span:
        """Dollars a month: tokens at the API's prices, or the rent of the cards, whatever they do."""
        if self.where == "own":
            known = rents(self.place.name)
            usd = [row.usd for row in known] if needs.rent is None else [needs.rent]
            if not usd:
                return at_least(0.0, "no rent known")
            ends = [rent * self.place.count * 24 * MONTH for rent in (usd[0], usd[-1])]
            text = f"{self.place.count} x ${usd[0]:g} to ${usd[-1]:g} an hour x {24 * MONTH} h"
            text += ", some undated" if any(row.date is None for row in known) and needs.rent is None else ""
            return Span(*ends, text, tuple(dict.fromkeys(row.source for row in known)))
        if not needs.requests:
            return at_least(0.0, "requests a day not given")
        month = needs.requests * MONTH
        if self.where == "said":
            one = self.model.span("request_price")
            return replace(one, low=one.low * month, high=one.high * month)
        usd = month * self.price.per_request(needs.prompt, needs.answer)
        return Span(
            usd, usd * self.price.peak, f"{month:,.0f} requests at prices of {self.price.date}", (self.price.source,)
        )


def options(needs: Needs, calibration: Calibration | None = None) -> Iterator[Option]:
    """Every model in every place that the need leaves open, at the prices of its day."""
    apis = {price.serves: price for price in offered(needs.day or document()["as_of"])} if needs.where != "own" else {}
    found = places(needs, calibration) if needs.where != "api" else []
    for one in models().values() if needs.model is None else [model(needs.model)]:
        if one.imaginary:
            yield Option(one, "said")
            continue
        if one.name in apis:
            yield Option(one, "api", price=apis[one.name])
        yield from (Option(one, "own", fmt, place) for place in found for fmt in one.formats)


def offered(day: str) -> list[prices.TokenPrice]:
    """The price of each name of DeepSeek's API that served a model on a day."""
    found = []
    for name, row in document()["apis"].items():
        known = [price for price in prices.api_prices(name) if price.date <= day < str(row.get("until", "9"))]
        found += known[-1:]
    return found


@cache
def rents(gpu: str) -> tuple[prices.Price, ...]:
    """Known prices of a card and hour, the cheapest first; none that an author only calculates with."""
    return tuple(row for row in prices.gpu_prices() if row.gpu == gpu and row.kind != "assumed")


def places(needs: Needs, calibration: Calibration | None = None) -> list[Place]:
    """The need's card, machine or memory; where it names none, one and eight of each of :data:`CARDS`."""
    if needs.memory is not None:
        speed = calibration and roofline.Roof(needs.gpu, calibration.bandwidth, {}, needs.memory, calibration.basis)
        return [Place(needs.gpu or "the memory given", needs.memory, 1, speed)]
    named = [(needs.gpu, needs.gpus)] if needs.gpu else [(gpu, count) for gpu in CARDS for count in (1, 8)]
    roofs = [(gpu, count, roofline.published_roof(gpu)) for gpu, count in named]
    return [Place(gpu, roof.memory_bytes * count, count, roof) for gpu, count, roof in roofs]


def _ends(span: Span) -> tuple[float, float]:
    return max(span.low, 0.0), span.high


def _joined(ends, formula: str, *parts: Span) -> Span:
    """A sum with the sources of its parts, on the least sure of their bases."""
    source = tuple(dict.fromkeys(key for part in parts for key in part.source))
    return Span(*ends, formula, source, max((part.basis for part in parts), key=BASES.index))
