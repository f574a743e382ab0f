"""Models in places, and their figures: bytes, seconds, dollars. Chapter: ``chapters/scenarios/choose.ipynb``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from dslib import roofline
from dslib.performance import prices
from dslib.scenarios.facts import Model, Span, at_least, document, model, models
from dslib.scenarios.needs import Needs

CARDS = ("T4", "L4", "A10", "A100_40GB", "A100_80GB", "H100_SXM", "H200")  # where a need names none: one or eight of
HOURS, DAYS = 720, 30  # of a month


@dataclass(frozen=True)
class Option:
    """A model by an API, on your own cards in a number format, or (``said``) as the article describes it."""

    model: Model | None  # None: only a place
    where: str  # "api", "own", "said"
    fmt: str = ""
    card: str = ""
    count: int = 1
    room: float = math.inf  # bytes of memory of all cards
    roof: roofline.Roof | None = None  # of one card; None where only the memory is known
    price: prices.TokenPrice | None = field(default=None, repr=False)
    calibration: Any = field(default=None, repr=False)  # of one card, such as measured.experiments.choose.Calibration

    @property
    def name(self) -> str:
        """Model, format and place in a few words."""
        if self.where != "own":
            return f"{self.model.name}, {'API' if self.where == 'api' else 'as described'}"
        cards = f"{self.count} x {self.card}" if self.roof else self.card
        return f"{self.model.name}, {self.fmt}, {cards}"

    def figure(self, name: str, needs: Needs) -> Span:
        """What a constraint or a wish of this name is about: one of the methods below, a context, or a score."""
        if name in ("memory", "token_time", "first_token", "dollars"):
            return getattr(self, name)(needs)
        span = self.model.span(name)  # a score was measured on the released weights; what four bits lose is not known
        loses = self.fmt == "int4" and name != "context" and span.known
        return replace(span, low=-math.inf, formula=f"{span.formula}, less what four bits lose") if loses else span

    def held(self, needs: Needs, part: str = "parameters") -> Span:
        """Bytes of the weights, or of the ``"active"`` ones, and of the caches of all texts."""
        cache = self.model.cache(needs.length)
        return self.model.stored(self.fmt, part) + cache.times(needs.users, f"{needs.users} x {cache.formula}")

    def memory(self, needs: Needs) -> Span:
        """Bytes that the place must have: weights and caches over the share of it that may be used."""
        if self.where != "own":
            return self.model.span("memory" if self.where == "said" else "memory of the provider")
        held, share = self.held(needs), 1 - needs.reserve
        return held.times(1 / share, f"({held.formula}) / {share:g}")

    def token_time(self, needs: Needs) -> Span:
        """Seconds of a step that gives each text a token: a floor, or what a calibration of one card says instead."""
        if self.where == "said":
            return self.model.span("token_time")
        if self.roof is None:
            return at_least(0.0, "no speed published")
        read = self.held(needs, "active")
        rate = (self.roof.read_bandwidth or self.roof.bandwidth) * self.count
        text = f"{read.formula} read at {rate / 1e9:,.4g} GB/s"
        floor = at_least(read.low / rate, text, read.source, "roofline")
        one = self.calibration if self.count == 1 else None
        return one.step(self.fmt, read, floor) if one else floor

    def first_token(self, needs: Needs) -> Span:
        """Least seconds to read one prompt: two operations a weight and token, or all of them read once."""
        if self.roof is None or not self.roof.flops:
            return at_least(0.0, "no speed published")
        active, flops = self.model.span("active"), self.roof.flops
        wanted = "float8" if self.fmt in ("float8", "released") else "float16"
        rate = flops.get(wanted, flops["float16"]) * self.count
        work, moved = 2 * active.low * needs.prompt, self.model.stored(self.fmt, "active").low
        text = f"2 x {active.low / 1e9:.3g}B x {needs.prompt:g} tokens at {rate / 1e12:,.4g} TFLOP/s"
        floor = max(work / rate, moved / self.roof.bandwidth / self.count)
        return at_least(floor, text, active.source, "roofline")

    def dollars(self, needs: Needs) -> Span:
        """Dollars a month: tokens at the API's prices, or the rent of the cards, whatever they do."""
        if self.where == "own":
            an_hour = rent(self.card, needs.rent)
            return an_hour.times(self.count * HOURS, f"{self.count} x {an_hour.formula} x {HOURS} h")
        month = needs.requests * DAYS
        if not month:
            return at_least(0.0, "requests a day not given")
        if self.where == "said":
            return self.model.span("request_price").times(month, f"{month:,.0f} requests at the article's price")
        usd = month * self.price.per_request(needs.prompt, needs.answer)
        text = f"{month:,.0f} requests at prices of {self.price.date}"
        return Span(usd, usd * self.price.peak, text, (self.price.source,))


@cache
def rent(gpu: str, given: float | None = None) -> Span:
    """Dollars an hour of a card: what is given, else the known prices; none that an author only calculates with."""
    if given is not None:
        return Span(given, given, f"${given:g} an hour, given")
    known = [row for row in prices.gpu_prices() if row.gpu == gpu and row.kind != "assumed"]
    if not known:
        return at_least(0.0, "a rent not known")
    low, high = known[0].usd, known[-1].usd
    text = f"${low:g} to ${high:g} an hour" + (", some undated" if any(row.date is None for row in known) else "")
    return Span(low, high, text, tuple(dict.fromkeys(row.source for row in known)))


def options(needs: Needs, calibration: Any = None) -> Iterator[Option]:
    """Every model in every place that the need leaves open, at the prices of its day."""
    apis = {price.serves: price for price in offered(needs.day or document()["as_of"])} if needs.where != "own" else {}
    found = places(needs, calibration) if needs.where != "api" else []
    for one in models().values() if needs.model is None else [model(needs.model)]:
        if one.imaginary:
            yield Option(one, "said")
            continue
        if one.name in apis:
            yield Option(one, "api", price=apis[one.name])
        yield from (replace(place, model=one, fmt=fmt) for place in found for fmt in one.formats)


def offered(day: str) -> list[prices.TokenPrice]:
    """The price of each name of DeepSeek's API that served a model on a day."""
    found = []
    for name, row in document()["apis"].items():
        known = [price for price in prices.api_prices(name) if price.date <= day < str(row.get("until", "9"))]
        found += known[-1:]
    return found


def places(needs: Needs, calibration: Any = None) -> list[Option]:
    """Options without a model: the need's card, machine or memory, else one and eight of each of :data:`CARDS`."""
    own = Option(None, "own", calibration=calibration)
    if needs.memory is not None:
        speed = calibration and roofline.Roof(needs.gpu, calibration.bandwidth, {}, needs.memory, calibration.basis)
        return [replace(own, card=needs.gpu or "the memory given", room=needs.memory, roof=speed)]
    named = [(needs.gpu, needs.gpus)] if needs.gpu else [(gpu, count) for gpu in CARDS for count in (1, 8)]
    roofs = [(gpu, count, roofline.published_roof(gpu)) for gpu, count in named]
    return [replace(own, card=gpu, count=n, room=n * roof.memory_bytes, roof=roof) for gpu, n, roof in roofs]
