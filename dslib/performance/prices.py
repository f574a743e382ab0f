"""What an hour of a GPU and a million tokens of an API cost, and how many GPUs a model needs: from ``data/``, dated.

Prices move by the month, so :class:`Price` never stands without the day it was read and where. Plain Python and PyYAML
only: this module, :mod:`~dslib.performance.cost` and :mod:`~dslib.performance.servers` work where torch is absent.

Chapter: ``chapters/performance/cost.ipynb``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, NoReturn

import yaml

from dslib.data.files import data_path
from dslib.roofline import published_names, published_roof


class DoesNotFit(ValueError):
    """The model needs more memory than the GPUs have."""


def number(name: str, value: Any, low: float = 0.0, high: float = math.inf, above: bool = True) -> float:
    """``value`` as a float if it is finite and above ``low`` (``above=False``: at least ``low``) and at most ``high``.

    Raises:
        ValueError: naming the argument, the value got and the range wanted; also for NaN, infinities, text and bools.
    """
    end = f" and at most {high:g}" if math.isfinite(high) else ""
    wanted = f"wanted a finite number {'above' if above else 'of at least'} {low:g}{end}"
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name}: got {value!r}, {wanted}")
    if value < low or (above and value == low) or value > high:
        raise ValueError(f"{name}: got {value!r}, {wanted}")
    return float(value)


def count(name: str, value: Any, low: int = 1) -> int:
    """``value`` if it is a whole number of at least ``low``. Raises ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name}: got {value!r}, wanted a whole number of at least {low}")
    return value


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
    note: str = ""

    def __post_init__(self) -> None:
        for name in ("cached", "input", "output"):
            number(name, getattr(self, name))

    def per_request(self, tokens_in: float, tokens_out: float, cached: float = 0.0) -> float:
        """US dollars for one request of which the share ``cached`` of the prompt is found in the cache."""
        number("tokens_in", tokens_in, above=False)
        number("tokens_out", tokens_out, above=False)
        number("cached", cached, high=1, above=False)
        prompt = tokens_in * (cached * self.cached + (1 - cached) * self.input)
        return (prompt + tokens_out * self.output) / 1e6

    def __str__(self) -> str:
        return (
            f"{self.model} ({self.serves}) ${self.input:g} in, ${self.cached:g} cached, ${self.output:g} out a million "
            f"tokens, {self.date} [{self.source}]"
        )


def gpu_prices(gpu: str | None = None) -> list[Price]:
    """Every known price of a GPU (all GPUs if None), cheapest first.

    Raises:
        ValueError: no price for this GPU; names the nearest GPUs that have one.
    """
    rows = [Price(**row) for row in _document()["gpu_hours"]]
    if gpu is not None:
        key = _key(gpu)
        found = [row for row in rows if row.gpu == key]
        if not found:
            _unknown("gpu", gpu, key, {row.gpu for row in rows}, "a GPU that prices.yml has a price for")
        rows = found
    return sorted(rows, key=lambda row: row.usd)


def gpu_price(gpu: str, provider: str | None = None) -> Price:
    """The median of the known prices of a GPU (the lower one of two), or the newest one of a provider.

    Raises:
        ValueError: no price for this GPU, or none of this provider; names the nearest ones.
    """
    rows = gpu_prices(gpu)
    if provider is None:
        return rows[(len(rows) - 1) // 2]
    known = {row.provider.lower(): row.provider for row in rows}
    if str(provider).lower() not in known:
        _unknown("provider", provider, str(provider), set(known.values()), f"one with a price for {rows[0].gpu}")
    return max((row for row in rows if row.provider.lower() == provider.lower()), key=lambda row: row.date or "")


def api_prices(model: str | None = None) -> list[TokenPrice]:
    """Every known API price, oldest first; ``model`` is the name of the API (``deepseek-chat``) or what it serves.

    Raises:
        ValueError: unknown model; names the nearest ones.
    """
    rows = sorted((TokenPrice(**row) for row in _document()["api_tokens"]), key=lambda row: row.date)
    if model is None:
        return rows
    found = [row for row in rows if str(model).lower() in (row.model.lower(), row.serves.lower())]
    if not found:
        names = {name for row in rows for name in (row.model, row.serves)}
        _unknown("model", model, str(model), names, "one that prices.yml has a price for")
    return found


def api_price(model: str, date: str | None = None) -> TokenPrice:
    """The newest price of an API, or the newest one not later than ``date`` (``"2025-09-17"``).

    Raises:
        ValueError: unknown model, or no price as old as that.
    """
    known = api_prices(model)
    rows = known if date is None else [row for row in known if row.date <= str(date)]
    if not rows:
        raise ValueError(f"date: got {date!r}, wanted {known[0].date} or later: {model} has no older price")
    return rows[-1]


def workloads() -> dict[str, dict[str, Any]]:
    """What a request is on average in published traces, by name: ``tokens_in``, ``tokens_out``, source."""
    return {row["name"]: row for row in _document()["workloads"]}


def gpu_id(gpu: str) -> str:
    """The id of a GPU of ``data/hardware.yml`` or ``data/prices.yml``. Raises ValueError with the nearest ids."""
    key, known = _key(gpu), {*published_names(), *(row.gpu for row in gpu_prices())}
    return key if key in known else _unknown("gpu", gpu, key, known, "a GPU that hardware.yml or prices.yml has")


def memory(gpu: str) -> float:
    """Bytes of memory of a GPU in ``data/hardware.yml``. Raises ValueError with the nearest names."""
    return published_roof(gpu).memory_bytes


def least_gpus(weight_bytes: float, gpu: str, cache_bytes: float = 0.0, reserve: float = 0.0, multiple: int = 1) -> int:
    """The fewest GPUs that hold the weights and the caches. It says nothing about speed.

    Args:
        weight_bytes, cache_bytes: of the whole model, and of the keys and values of all sequences that run at once.
        reserve: share of each GPU's memory that is kept for the runtime, activations and fragmentation, below 1.
        multiple: round up to a multiple, for instance 8 where only nodes of eight can be had.

    Raises:
        ValueError: unknown GPU, negative or infinite sizes, a reserve that leaves nothing.
    """
    needed = number("weight_bytes", weight_bytes) + number("cache_bytes", cache_bytes, above=False)
    if not number("reserve", reserve, above=False) < 1:
        raise ValueError(f"reserve: got {reserve!r}, wanted a share of at least 0 and below 1")
    count("multiple", multiple)
    usable = memory(gpu) * (1 - reserve)
    # The ratio of two decimal sizes, such as 160e9 / 80e9 less a reserve, may come out a hair above a whole number.
    gpus = math.ceil(needed / usable - 1e-9)
    return -(-gpus // multiple) * multiple


def check_fits(weight_bytes: float, gpu: str, gpus: int, cache_bytes: float = 0.0, reserve: float = 0.0) -> None:
    """Raise :class:`DoesNotFit` unless ``gpus`` GPUs hold the model; arguments as in :func:`least_gpus`."""
    count("gpus", gpus)
    least = least_gpus(weight_bytes, gpu, cache_bytes, reserve)
    if least > gpus:
        need, have = (weight_bytes + cache_bytes) / 1e9, gpus * memory(gpu) * (1 - reserve) / 1e9
        raise DoesNotFit(
            f"gpus: got {gpus} x {gpu} with {have:,.0f} GB to use, wanted at least {least} for {need:,.1f} GB"
        )


def _key(gpu: str) -> str:
    return str(gpu).upper().replace(" ", "_").replace("-", "_")


def _unknown(what: str, got: Any, key: str, known: Iterable[str], wanted: str) -> NoReturn:
    by_lower = {name.lower(): name for name in sorted(known)}
    near = [by_lower[name] for name in get_close_matches(key.lower(), by_lower, n=3, cutoff=0.4)] or list(
        by_lower.values()
    )
    raise ValueError(f"{what}: got {got!r}, wanted {wanted}, such as {', '.join(near)}")


@cache
def _document() -> dict[str, list[dict[str, Any]]]:
    path = data_path("prices.yml")
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ValueError(f"{path.name} line {line}: not valid YAML: {error.problem}") from error
    missing = [name for name in ("gpu_hours", "api_tokens", "workloads") if name not in (document or {})]
    if missing:
        raise ValueError(f"{path.name}: wanted a list {missing[0]!r}, which is missing")
    return document
