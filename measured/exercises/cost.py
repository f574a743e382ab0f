"""Exercises of ``chapters/performance/cost.ipynb``. Dollars, tokens a second, requests a day."""

from __future__ import annotations

import math

from measured.exercises import exercise, named


def _tokens(prompts: float, cached: float, output: float) -> dict[str, float]:
    return {"input": prompts, "cached": cached, "output": output}


@exercise(
    "cost/per-million",
    cases=[
        {"usd_per_gpu_hour": 2.0, "gpus": 8, "tokens_per_second": 14_800, "utilisation": 1.0},
        {"usd_per_gpu_hour": 1.79, "gpus": 1, "tokens_per_second": 1500, "utilisation": 0.65},
        {"usd_per_gpu_hour": 3.5, "gpus": 8, "tokens_per_second": 4000, "utilisation": 0.2},
    ],
    mistakes="""
        per_million(usd_per_gpu_hour, gpus, tokens_per_second, 1.0) * utilisation
            Idle time makes your tokens cheaper. It is the article's slip: the rent runs on while nothing comes out, so
            the tokens of an hour are fewer and each is dearer.
        per_million(usd_per_gpu_hour, gpus, tokens_per_second, 1.0)
            This is the price at full load. A machine that is busy a part of the time gives fewer tokens for the same
            rent.
        per_million(usd_per_gpu_hour, 1, tokens_per_second, utilisation)
            One GPU is paid, but the speed is that of the whole machine: all its GPUs cost rent.
        60 * per_million(usd_per_gpu_hour, gpus, tokens_per_second, utilisation)
            Sixty times too much: an hour has 3,600 seconds, not 60.
        per_million(usd_per_gpu_hour, gpus, tokens_per_second, utilisation) / 1e6
            That is the price of a single token. A million of them are asked for.
    """,
    hint="Dollars an hour over tokens an hour, times a million. The tokens are those that really come out.",
)
def per_million(usd_per_gpu_hour: float, gpus: int, tokens_per_second: float, utilisation: float) -> float:
    """Dollars for a million tokens of a machine that gives ``tokens_per_second`` while it is busy."""
    return usd_per_gpu_hour * gpus / (tokens_per_second * utilisation * 3600) * 1e6


@exercise(
    "cost/replicas",
    cases=[
        {"requests_per_day": 100_000, "peak": 1.0, "seconds": 0.17, "utilisation": 0.7, "redundancy": 0},
        {"requests_per_day": 1_000_000, "peak": 2.5, "seconds": 0.17, "utilisation": 0.6, "redundancy": 1},
        {"requests_per_day": 9 * 86_400, "peak": 2.0, "seconds": 0.25, "utilisation": 0.5, "redundancy": 2},
        {"requests_per_day": 120_000, "peak": 1.0, "seconds": 3.0, "utilisation": 0.7, "redundancy": 0},
    ],
    mistakes="""
        math.floor(requests_per_day / 86_400 * peak * seconds / utilisation) + redundancy
            Rounded down: what is left over has to be served too. The smallest load needs one replica.
        math.floor(requests_per_day / 86_400 * peak * seconds / utilisation) + 1 + redundancy
            Rounded down and one more: a load that just fills its replicas gets one too many. math.ceil rounds up.
        requests_per_day / 86_400 * peak * seconds / utilisation + redundancy
            A fraction of a replica cannot be rented. Round up, before the spares are added or after.
        replicas(requests_per_day, 1.0, seconds, utilisation, redundancy)
            Sized for the mean: at the busiest time the queue would grow without end.
        math.ceil(requests_per_day / 86_400 * peak * seconds * utilisation) + redundancy
            Multiplied by the utilisation: a replica that may be busy only a part of the time serves fewer requests, so
            more replicas are needed.
        replicas(requests_per_day, peak, seconds, utilisation, 0)
            The spares are missing: with none, the first failure or update takes capacity from the users.
    """,
    hint="Busy replicas at the peak, divided by how busy each may be, rounded up, plus the spares.",
)
def replicas(requests_per_day: float, peak: float, seconds: float, utilisation: float, redundancy: int) -> int:
    """Whole replicas for a load whose busiest time is ``peak`` times the mean; a request takes ``seconds`` of one."""
    return math.ceil(requests_per_day / 86_400 * peak * seconds / utilisation) + redundancy


@exercise(
    "cost/break-even",
    cases=[
        {"usd_per_day": 700.0, "capacity": 350_000.0, "usd_per_request": 0.004},
        {"usd_per_day": 700.0, "capacity": 90_000.0, "usd_per_request": 0.004},
        {"usd_per_day": 512.0, "capacity": 1024.0, "usd_per_request": 0.5},
    ],
    mistakes="""
        usd_per_day / usd_per_request
            At that volume one machine does not suffice any more, and the second costs as much again. If a full machine
            is dearer than the API, so are a hundred: return None.
        usd_per_day / usd_per_request if usd_per_day / usd_per_request <= capacity else capacity
            A full machine is not a break-even: compare what its requests would have cost at the API. If that is less
            than the rent, return None.
        capacity if usd_per_day / usd_per_request <= capacity else None
            The machine pays off before it is full: as soon as the API would have charged its rent.
        usd_per_day / usd_per_request if usd_per_day / usd_per_request < capacity else None
            A machine that is just full can serve that much, and costs no more than the API.
    """,
    hint="The volume at which the API charges the rent of one machine, if the machine can serve that much.",
)
def break_even(usd_per_day: float, capacity: float, usd_per_request: float) -> float | None:
    """Fewest requests a day at which machines of ``usd_per_day`` and ``capacity`` requests a day cost no more than an
    API of ``usd_per_request``; None if they always cost more."""
    volume = usd_per_day / usd_per_request
    return volume if volume <= capacity else None


@exercise(
    "cost/profit-ratio",
    cases=named(
        "usd_per_day tokens prices billed",
        (87_072.0, _tokens(608_000.0, 342_000.0, 168_000.0), _tokens(0.55, 0.14, 2.19), 1.0),
        (900.0, _tokens(5_000.0, 1_000.0, 400.0), _tokens(0.25, 0.02, 1.0), 0.5),
    ),
    mistakes="""
        1 - 1 / (1 + profit_ratio(usd_per_day, tokens, prices, billed))
            That is profit over revenue, a margin. Wanted is profit over cost, which can exceed 100 %.
        profit_ratio(usd_per_day, tokens, prices, billed) + 1
            That is revenue over cost. The cost has to be taken off the revenue first.
        profit_ratio(usd_per_day, tokens | {"input": tokens["input"] + tokens["cached"]}, prices, billed)
            The cached tokens are part of the prompts: those billed at the full price are the rest.
        profit_ratio(usd_per_day, tokens | {"cached": 0.0}, prices, billed)
            Every prompt token is billed at the full price. Those found in the cache are cheaper.
        profit_ratio(usd_per_day, tokens, prices, 1.0)
            All tokens are billed. Only the share `billed` earns anything; the machines cost the same.
    """,
    hint="Revenue is the sum over cached prompts, other prompts and answers, times the share that is billed.",
)
def profit_ratio(usd_per_day: float, tokens: dict[str, float], prices: dict[str, float], billed: float) -> float:
    """Profit over cost of a service that bills the share ``billed`` of its tokens (millions of them, prices a million).

    ``tokens`` has ``input`` (all prompts), ``cached`` (the part of them found in the cache) and ``output``.
    """
    fresh = tokens["input"] - tokens["cached"]
    revenue = fresh * prices["input"] + tokens["cached"] * prices["cached"] + tokens["output"] * prices["output"]
    return (revenue * billed - usd_per_day) / usd_per_day
