"""What an hour of a GPU and a million tokens of an API cost, and how many GPUs a model needs: from ``data/``, dated.

Prices move by the month, so :class:`Price` never stands without the day it was read and where. Plain Python and PyYAML
only: this module, :mod:`~dslib.performance.cost` and :mod:`~dslib.performance.servers` work where torch is absent.

Chapter: ``chapters/performance/cost.ipynb``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from dslib import check
from dslib.data.files import read_yaml
from dslib.roofline import gpu_key, published_names, published_roof


class DoesNotFit(ValueError):
    """The model needs more memory than the GPUs have."""


@dataclass(frozen=True)
class Price:
    """US dollars for one GPU and hour, without tax. ``kind`` and ``tier`` as explained in ``data/prices.yml``."""

    gpu: str
    usd: float
    provider: str
    kind: str
    date: str | None
    source: str
    tier: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.gpu} ${self.usd:.2f} an hour, {self.provider}, {self.date or 'undated'} [{self.source}]"


@dataclass(frozen=True)
class TokenPrice:
    """US dollars for a million tokens of an API: prompt found in the provider's cache, other prompt, answer."""

    model: str
    serves: str
    date: str
    cached: float
    input: float
    output: float
    source: str
    tier: str
    peak: float = 1.0  # the dearest hour over the prices given here
    note: str = ""

    def __post_init__(self) -> None:
        check.above(0, cached=self.cached, input=self.input, output=self.output)
        check.at_least(1, peak=self.peak)
        if not re.fullmatch(r"20\d\d(-\d\d){1,2}|20\d\d", str(self.date)):
            raise ValueError(f"date: got {self.date!r}, expected the day or month of the price, such as '2025-02'")

    def per_request(self, tokens_in: float, tokens_out: float, cached: float = 0.0) -> float:
        """US dollars for one request of which the share ``cached`` of the prompt is found in the cache."""
        check.at_least(0, tokens_in=tokens_in, tokens_out=tokens_out)
        check.between(0, 1, cached=cached)
        prompt = tokens_in * (cached * self.cached + (1 - cached) * self.input)
        return (prompt + tokens_out * self.output) / 1e6

    def __str__(self) -> str:
        return (
            f"{self.model} ({self.serves}) ${self.input:g} in, ${self.cached:g} cached, ${self.output:g} out a million "
            f"tokens, {self.date} [{self.source}]"
        )


def gpu_prices(gpu: str | None = None) -> list[Price]:
    """Every known price of a GPU (all GPUs if None), cheapest first. A ValueError names the nearest that have one."""
    rows = sorted((Price(**row) for row in _rows("gpu_hours")), key=lambda row: row.usd)
    found = [row for row in rows if gpu is None or row.gpu == gpu_key(gpu)]
    if not found:
        raise check.unknown("gpu", gpu, {row.gpu for row in rows}, "a GPU that prices.yml has a price for")
    return found


def gpu_price(gpu: str, provider: str | None = None) -> Price:
    """The median of the known prices of a GPU (the lower one of two), or the newest one of a provider.

    Raises ValueError for a GPU or a provider without a price; it names the nearest ones.
    """
    rows = gpu_prices(gpu)
    if provider is None:
        return rows[(len(rows) - 1) // 2]
    found = [row for row in rows if row.provider.lower() == str(provider).lower()]
    if not found:
        known = {row.provider for row in rows}
        raise check.unknown("provider", provider, known, f"one with a price for {rows[0].gpu}")
    return max(found, key=lambda row: row.date or "")


def api_prices(model: str | None = None) -> list[TokenPrice]:
    """Every known API price, oldest first; ``model`` is the name of the API (``deepseek-chat``) or what it serves.

    Raises ValueError for an unknown model; it names the nearest ones.
    """
    rows = sorted((TokenPrice(**row) for row in _rows("api_tokens")), key=lambda row: row.date)
    found = [row for row in rows if model is None or str(model).lower() in (row.model.lower(), row.serves.lower())]
    if not found:
        names = {name for row in rows for name in (row.model, row.serves)}
        raise check.unknown("model", model, names, "one that prices.yml has a price for")
    return found


def api_price(model: str, date: str | None = None) -> TokenPrice:
    """The newest price of an API, or the newest one not later than ``date`` (``"2025-09-17"``).

    Raises ValueError for an unknown model, or no price as old as that.
    """
    known = api_prices(model)
    rows = known if date is None else [row for row in known if row.date <= str(date)]
    if not rows:
        raise ValueError(f"date: got {date!r}, expected {known[0].date} or later: {model} has no older price")
    return rows[-1]


def workloads() -> dict[str, dict[str, Any]]:
    """What a request is on average in published traces, by name: ``tokens_in``, ``tokens_out``, source."""
    return {row["name"]: row for row in _rows("workloads")}


def gpu_id(gpu: str) -> str:
    """The id of a GPU of ``data/hardware.yml`` or ``data/prices.yml``. Raises ValueError with the nearest ids."""
    known = {*published_names(), *(row.gpu for row in gpu_prices())}
    if gpu_key(gpu) not in known:
        raise check.unknown("gpu", gpu, known, "a GPU that hardware.yml or prices.yml has")
    return gpu_key(gpu)


def memory(gpu: str) -> float:
    """Bytes of memory of a GPU in ``data/hardware.yml``. Raises ValueError with the nearest names."""
    return published_roof(gpu).memory_bytes


def least_gpus(weight_bytes: float, gpu: str, cache_bytes: float = 0.0, reserve: float = 0.0, multiple: int = 1) -> int:
    """The fewest GPUs that hold the weights and the caches. It says nothing about speed.

    ``weight_bytes`` are those of the whole model, ``cache_bytes`` of the keys and values of all sequences that run at
    once, ``reserve`` is the share of each GPU's memory kept for the runtime, activations and fragmentation. The answer
    is a multiple of ``multiple``, for instance of 8 where only nodes of eight can be had. Raises ValueError for an
    unknown GPU, negative or infinite sizes, a reserve that leaves nothing.
    """
    check.above(0, weight_bytes=weight_bytes)
    check.at_least(0, cache_bytes=cache_bytes)
    check.below(0, 1, reserve=reserve)
    check.whole(1, multiple=multiple)
    usable = memory(gpu) * (1 - reserve)
    # The ratio of two decimal sizes, such as 160e9 / 80e9 less a reserve, may come out a hair above a whole number.
    gpus = math.ceil((weight_bytes + cache_bytes) / usable - 1e-9)
    return -(-gpus // multiple) * multiple


def check_fits(weight_bytes: float, gpu: str, gpus: int, cache_bytes: float = 0.0, reserve: float = 0.0) -> None:
    """Raise :class:`DoesNotFit` unless ``gpus`` GPUs hold the model; arguments as in :func:`least_gpus`."""
    check.whole(1, gpus=gpus)
    least = least_gpus(weight_bytes, gpu, cache_bytes, reserve)
    if least > gpus:
        need, have = (weight_bytes + cache_bytes) / 1e9, gpus * memory(gpu) * (1 - reserve) / 1e9
        raise DoesNotFit(
            f"gpus: got {gpus} x {gpu} with {have:,.0f} GB to use, expected at least {least} for {need:,.1f} GB"
        )


def _rows(name: str) -> list[dict[str, Any]]:
    document = read_yaml("prices.yml")
    if not isinstance(document, dict) or not isinstance(document.get(name), list):
        raise ValueError(f"prices.yml: expected a list {name!r}, which is missing")
    return document[name]
