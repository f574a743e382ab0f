"""What a request costs: from tokens, arrivals, speed, idle time, rent and spares to dollars, without torch.

The chain has four links. A request takes some seconds of a replica (:mod:`~dslib.performance.servers`). Requests at the
busiest time need that many replicas, of which each may be busy only a part of the time. Replicas come whole and with
spares. And every replica is paid by the hour, busy or not (:mod:`~dslib.performance.prices`).

From the command line: ``python -m dslib.performance.cost --help``. Book: ``chapters/performance/cost.ipynb``, with
these two and :mod:`dslib.scenarios.queueing`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from dataclasses import dataclass

from dslib import check
from dslib.performance import prices, servers
from dslib.performance.prices import DoesNotFit, TokenPrice
from dslib.performance.servers import Replica, Traffic
from dslib.roofline import NUMBER_BYTES

DAYS = 365
SECONDS = 86_400


@dataclass(frozen=True)
class Cost:
    """What a fleet costs, in dollars without tax."""

    replicas: tuple[float, ...]  # for prompts and answers together, or for each where they are apart
    gpus: float  # of all replicas
    busy: float  # share of the time that a replica works, on average over day and fleet
    per_day: float  # rent of all replicas, and the fixed costs
    per_request: float
    per_million: float  # tokens, of prompts and answers alike
    per_million_in: float | None  # tokens of prompts, with their share of the rent; None where there are none
    per_million_out: float | None

    @property
    def per_year(self) -> float:
        """365 days."""
        return self.per_day * DAYS


def cost(
    traffic: Traffic, replica: Replica, usd_per_gpu_hour: float, *, utilisation: float = 0.7, redundancy: int = 0,
    fixed_per_year: float = 0.0, whole: bool = True,
) -> Cost:  # fmt: skip
    """What it costs to serve ``traffic`` with copies of ``replica``.

    Args:
        usd_per_gpu_hour: rent.
        utilisation: how busy a replica may be at the busiest time, above 0 and at most 1. The rest of its time is
            paid for and keeps the queue short (:func:`dslib.scenarios.queueing.mean_wait`).
        redundancy: spare replicas for failures and updates, for each of the two kinds where they are apart.
        fixed_per_year: dollars that do not depend on the number of GPUs: people, storage, network.
        whole: replicas come whole, and no fewer than the replica's ``at_least``. False: fractions, as if the fleet
            could be shared with others; the limit for a very large service.

    Raises ValueError naming what is out of range.
    """
    check.above(0, usd_per_gpu_hour=usd_per_gpu_hour, utilisation=utilisation)
    check.between(0, 1, utilisation=utilisation)
    check.whole(0, redundancy=redundancy)
    check.at_least(0, fixed_per_year=fixed_per_year)
    seconds = replica.seconds(traffic.computed, traffic.tokens_out)
    load = [traffic.requests_per_day / SECONDS * second for second in seconds]  # replicas kept busy, on average
    check.above(0, **{"replicas kept busy": sum(load) * traffic.peak / utilisation})
    pools = load if replica.apart else [sum(load)]
    needed = [part * traffic.peak / utilisation for part in pools]
    if whole:  # a load of 3 may come out a hair above 3; the first replica is needed for any load at all
        needed = [max(math.ceil(part * (1 - 1e-12)), 1 if part else 0) for part in needed]
        needed[-1] += max(0, replica.at_least - sum(needed))
    fleet = [part + (redundancy if part else 0) for part in needed]
    rent = sum(fleet) * replica.gpus * usd_per_gpu_hour * 24
    day = rent + fixed_per_year / DAYS
    # The day's bill, shared by the replicas' time; what idles is shared in the same proportion.
    share = fleet[0] / sum(fleet) if replica.apart else load[0] / sum(load)
    tokens = [traffic.requests_per_day * n / 1e6 for n in (traffic.tokens_in, traffic.tokens_out)]
    per_million = [day * part / n if n else None for part, n in zip((share, 1 - share), tokens, strict=True)]
    return Cost(
        tuple(fleet), sum(fleet) * replica.gpus, sum(load) / sum(fleet), day, day / traffic.requests_per_day,
        day / sum(tokens), *per_million,
    )  # fmt: skip


def break_even(
    traffic: Traffic, replica: Replica, usd_per_gpu_hour: float, api: TokenPrice | float, **options: float
) -> float | None:
    """The fewest requests a day at which self-hosting costs no more than an API, or None if it never does.

    Whole replicas make the bill a staircase, so a little above this volume, where one more replica is due, the API may
    be cheaper again for a while.

    ``api`` is prices of tokens, or dollars a request; ``options`` are those of :func:`cost` but ``whole``. Raises
    ValueError as :func:`cost`, and for an API price that is not above 0.
    """
    if isinstance(api, TokenPrice):
        api = api.per_request(traffic.tokens_in, traffic.tokens_out, traffic.cached)
    check.above(0, api=api)

    def at(volume: float, **changed: float) -> float:  # dollars a day
        one = dataclasses.replace(traffic, requests_per_day=volume)
        return cost(one, replica, usd_per_gpu_hour, **(options | changed)).per_day

    full = at(1.0, whole=False, redundancy=0, fixed_per_year=0.0)  # of a request, in a fleet without idle replicas
    if full >= api:
        return None  # even without fixed costs it is dearer
    # The staircase lies above the straight line of fractions, so no volume below theirs can pay.
    constant = at(1e-9, whole=False) - 1e-9 * full
    lowest = (1 - 1e-9) * constant / (api - full * (1 - 1e-12))
    # The bill never falls with the volume, so "the volume that pays this bill" climbs to the least solution.
    volume, paid = 0.0, max(at(1e-9) / api, lowest)
    while paid > volume * (1 + 1e-12):
        volume, paid = paid, at(paid) / api
    return volume


# ---------------------------------------------------------------- command line

# Name, default (or the type of a value that may be left out), meaning.
OPTIONS = (
    ("per-day", 100_000.0, "requests a day"),
    ("tokens-in", 1000.0, "tokens of a prompt"),
    ("tokens-out", 500.0, "tokens of an answer"),
    ("cached", 0.0, "share of the prompt found in a prefix cache, 0 to 1"),
    ("peak", 1.0, "arrivals at the busiest time over the mean, 1 or more"),
    ("server", "h200", f"deployment with published speeds: {', '.join(servers.published_replicas())}"),
    ("gpu", str, "your own machine instead: its GPU, e.g. H100_SXM; needs the next three"),
    ("gpus", int, "GPUs of a replica"),
    ("prefill", float, "prompt tokens/s of a replica that does nothing else"),
    ("decode", float, "answer tokens/s of a replica that does nothing else"),
    ("usd-per-hour", float, "rent of a GPU; without it, the median of its known prices"),
    ("provider", str, "whose known price to take"),
    ("utilisation", 0.7, "how busy a replica may be at the busiest time, above 0 to 1"),
    ("redundancy", 0, "spare replicas"),
    ("fixed", 0.0, "dollars a year for people, storage, network"),
    ("api", "deepseek-chat", "API to compare with"),
    ("parameters", float, "check that so many fit into the replica, e.g. 671e9"),
    ("weights", "float8", f"format they are stored in: {', '.join(NUMBER_BYTES)}"),
    ("reserve", 0.1, "share of the memory kept for caches and runtime"),
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 1 the plan cannot work, 2 bad arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m dslib.performance.cost",
        description="What serving a language model costs, and from which volume on an API is dearer.",
        epilog="Exit status: 0 done, 1 the model does not fit, 2 bad arguments. Prices and speeds are cited by key.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    text = "cost of a request, a million tokens, a day and a year; break-even with an API"
    one = commands.add_parser("estimate", help=text, description=text)
    for name, default, meaning in OPTIONS:
        kind = default if isinstance(default, type) else type(default)
        known = None if kind is default else default
        shown = meaning if known is None else f"{meaning} (default: {known})"
        one.add_argument(f"--{name}", type=kind, default=known, metavar=kind.__name__.upper(), help=shown)
    one.add_argument("--json", action="store_true", help="print a JSON object instead")
    one.set_defaults(run=_estimate)
    two = commands.add_parser("prices", help="known prices, with source and date")
    two.add_argument("gpu", nargs="?", help="only this GPU")
    two.set_defaults(run=_prices)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except DoesNotFit as error:
        print(f"does not fit: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _estimate(options: argparse.Namespace) -> None:
    replica = _replica(options)
    traffic = Traffic(options.per_day, options.tokens_in, options.tokens_out, options.cached, options.peak)
    price = None if options.usd_per_hour is not None else prices.gpu_price(replica.gpu, options.provider)
    rent = price.usd if price else options.usd_per_hour
    if options.parameters is not None:
        check.above(0, parameters=options.parameters)
        check.one_of(NUMBER_BYTES, weights=options.weights)
        size = options.parameters * NUMBER_BYTES[options.weights]
        prices.check_fits(size, replica.gpu, replica.gpus, reserve=options.reserve)
    extra = {"utilisation": options.utilisation, "redundancy": options.redundancy, "fixed_per_year": options.fixed}
    bill = cost(traffic, replica, rent, **extra)
    api = prices.api_price(options.api)
    api_usd = api.per_request(traffic.tokens_in, traffic.tokens_out, traffic.cached)
    volume = break_even(traffic, replica, rent, api, **extra)
    # The rent is a factor of the whole bill, so this is the rent at which a fleet without idle replicas costs as much.
    matching = rent * api_usd / cost(traffic, replica, rent, utilisation=options.utilisation, whole=False).per_request
    if options.json:
        found = dataclasses.asdict(bill) | {"per_year": bill.per_year, "api_per_request": api_usd, "break_even": volume}
        print(json.dumps(found | {"usd_per_gpu_hour": rent, "matching_rent": matching}, indent=2))
        return
    speeds = f"{replica.prefill:,.0f} prompt or {replica.decode:,.0f} answer tokens/s"
    fleet = " + ".join(f"{part:g}" for part in bill.replicas) + (" (prompts + answers)" if replica.apart else "")
    per_million = {"prompts": bill.per_million_in, "answers": bill.per_million_out}
    never = f"never at this rent; below ${matching:.2f} an hour it would"
    rows = {
        "load": f"{options.per_day:,.0f} requests a day of {options.tokens_in:g} + {options.tokens_out:g} tokens",
        "replica": f"{replica.gpus} x {replica.gpu}: {speeds} [{', '.join(replica.source) or 'as given'}]",
        "rent": str(price) if price else f"${rent:g} a GPU hour, as given",
        "fleet": f"{fleet} replicas, {bill.gpus:g} GPUs, busy {bill.busy:.0%} of the time",
        "a request": f"${bill.per_request:.6f}",
        **{f"1M {name}": f"${usd:.3f}" for name, usd in per_million.items() if usd is not None},
        "a day": f"${bill.per_day:,.2f}",
        "a year": f"${bill.per_year:,.0f}",
        "API": f"${api_usd:.6f} a request, {api}",
        "break-even": f"{volume:,.0f} requests a day" if volume else never,
    }
    for label, text in rows.items():
        print(f"{label:11} {text}")


def _replica(options: argparse.Namespace) -> Replica:
    replica = servers.published_replica(options.server)
    given = {name: getattr(options, name) for name in ("gpu", "gpus", "prefill", "decode")}
    changed = {name: value for name, value in given.items() if value is not None}
    if not changed:
        return replica
    if changed.keys() & {"gpu", "gpus"} and not {"prefill", "decode"} <= changed.keys():
        known = f"{options.server} is {replica.gpus} x {replica.gpu}"
        raise ValueError(f"prefill, decode: got none for another machine, expected both: {known}")
    return dataclasses.replace(replica, **changed, source=())


def _prices(options: argparse.Namespace) -> None:
    for row in prices.gpu_prices(options.gpu):
        print(f"{row}  {row.kind}, {row.tier}")
    for row in [] if options.gpu else prices.api_prices():
        print(f"{row}  {row.tier}")


if __name__ == "__main__":
    sys.exit(main())
