"""Exercises of ``chapters/scenarios/load.ipynb``."""

import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from measured.exercises import exercise, named


def _gaps(times: Sequence[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(times)]


def _good(times, ttft, tpot, pace: Callable = np.mean, alone=True) -> bool:
    return bool(times) and times[0] <= ttft and (pace(_gaps(times)) <= tpot if len(times) > 1 else alone)


def _knee(runs, ttft, tpot, share, good: Callable = _good, counted: Callable = lambda one: True, gaps=False):
    """The reference and, by its options, the usual ways to get it wrong."""
    best = None
    for rate in sorted(runs):
        held = [good(one, ttft, tpot) for one in runs[rate] if counted(one)]
        if sum(held) < share * len(held):
            if gaps:
                continue
            break
        best = rate
    return best


@exercise(
    "load/knee",
    cases=named(
        "runs ttft tpot share",
        (
            {
                1: [
                    [0.1, 0.15],
                    [0.2, 0.23, 0.28, 0.3, 0.35],
                    [0.6, 0.63, 0.73, 0.76],
                    [0.1, 0.3, 0.32, 0.37],
                    [0.2, 0.23, 0.33, 0.35],
                ],
                3: [[0.3, 0.33], [0.3, 0.35, 0.55, 0.75], [], [0.6, 0.8, 1.0, 1.2], []],
                4: [[0.3, 0.32], [0.6, 0.65, 0.68, 0.88], [0.6, 0.7, 0.9, 1.0], [0.2, 0.22, 0.42, 0.62]],
                6: [[], [0.1, 0.15], [0.6], [0.3, 0.33, 0.53, 0.56, 0.76], [0.3, 0.5, 0.7, 0.9]],
            },
            0.21,
            0.0613,
            0.55,
        ),
        (
            {
                1: [[0.1], [0.3], [0.3], [0.6]],
                2: [[0.2], [0.1, 0.15], [0.2, 0.22, 0.32, 0.35]],
                3: [[0.2, 0.22], [0.6, 0.63, 0.73, 0.75, 0.8], [0.1, 0.3], []],
                6: [
                    [0.2, 0.3, 0.4, 0.5],
                    [0.2, 0.4, 0.42, 0.62, 0.65],
                    [0.6],
                    [0.6, 0.65, 0.85, 0.9, 0.95],
                    [0.6, 0.65, 0.7, 0.75],
                ],
            },
            0.31,
            0.0413,
            0.7,
        ),
        (
            {
                2: [[0.1], [0.1], [0.2, 0.23]],
                3: [[0.3, 0.33], [0.6, 0.7, 0.9, 0.93], [0.2, 0.25], [0.2], [0.6, 0.8, 1.0, 1.2]],
                4: [[0.3, 0.32, 0.37, 0.39, 0.59], [0.2], [0.1], [0.1, 0.15, 0.2, 0.25], [0.2, 0.25, 0.28, 0.38, 0.43]],
                8: [[], [0.2], [0.2, 0.4, 0.6, 0.8, 0.82], [0.2]],
            },
            0.21,
            0.0613,
            0.55,
        ),
        (
            {
                1: [[0.3, 0.32], [0.1], [0.3]],
                2: [[0.2, 0.23], [0.3, 0.33, 0.38, 0.41], []],
                4: [[0.3, 0.32], [0.3, 0.4], [0.6, 0.63, 0.65, 0.67, 0.72], [0.2, 0.3], [0.3, 0.35]],
                6: [[0.1, 0.15, 0.2, 0.25, 0.45], [0.6, 0.8, 0.9, 0.95, 0.98], [0.2, 0.23], []],
            },
            0.31,
            0.0613,
            0.7,
        ),
        (
            {
                1: [[0.1, 0.13, 0.16, 0.19, 0.22], [0.6, 0.65], [0.1, 0.13, 0.15, 0.18, 0.21]],
                2: [[0.6], [0.3, 0.4, 0.5, 0.52, 0.72], [0.3, 0.35, 0.37, 0.39, 0.59], [0.2, 0.25]],
                4: [[0.6, 0.7, 0.75, 0.77], [0.6, 0.7], [0.6, 0.62]],
                8: [[0.1, 0.2], [0.3, 0.4, 0.45, 0.65, 0.67], [0.1]],
            },
            0.31,
            0.0613,
            0.55,
        ),
        (
            {
                2: [[0.1], [0.2, 0.25, 0.3, 0.4], [0.2], [0.3]],
                3: [[0.2, 0.4, 0.6, 0.63], [0.3, 0.4, 0.42, 0.44], [0.3]],
                6: [[0.3, 0.5, 0.55, 0.58], [], [0.3], [0.2, 0.22]],
                8: [[0.1, 0.12, 0.32, 0.35], [0.2, 0.3], [0.6, 0.63, 0.83, 0.93]],
            },
            0.31,
            0.0613,
            0.55,
        ),
        ({2: [[], [0.9, 0.92], [0.2]], 4: [[0.1], [0.2]]}, 0.31, 0.0613, 0.7),
    ),
    mistakes="""
        _knee(runs, ttft, tpot, share, gaps=True)
            A higher rate may do well by luck although a lower one failed. The knee is where it first goes wrong.
        _knee(runs, ttft, tpot, share, counted=bool)
            You leave out requests without any token. A server that refuses half of its load would look perfect.
        _knee(runs, ttft, tpot, share, good=lambda one, ttft, tpot: _good(one, ttft, tpot, pace=max))
            The largest gap is held against the limit. Time per output token is the mean gap of a request.
        _knee(runs, ttft, tpot, share, good=lambda one, ttft, tpot: _good(one, ttft, tpot, alone=False))
            An answer of one token has no gap, so it cannot be too slow between tokens.
        _knee(runs, ttft, tpot, share, good=lambda one, ttft, tpot: bool(one) and one[0] <= ttft)
            Only the first token is looked at.
        _knee(runs, ttft, tpot, share, good=lambda one, ttft, tpot: bool(one) and one[-1] / len(one) <= tpot)
            You divide the time to the last token by the number of tokens. That has the wait for the first one in it.
        _knee(runs, ttft, tpot, 1.0)
            Not all requests need to keep the limits, only the share that is asked for.
    """,
    hint="For each rate, from the lowest on: which requests keep both limits? Stop at the first rate with too few.",
)
def knee(runs: Mapping[float, Sequence[Sequence[float]]], ttft: float, tpot: float, share: float) -> float | None:
    """The highest rate up to which at least ``share`` of the requests keep both limits; None if none does.

    Args:
        runs: by rate, of each request the seconds from its arrival to each of its tokens; empty if it failed.
        ttft: most seconds to the first token. tpot: most seconds of a request's mean gap between tokens.
    """
    return _knee(runs, ttft, tpot, share)


def _honest(
    due, sent, tokens, warm,
    start: Callable = lambda due, sent: due, since: Callable = lambda due, sent: due,
    gaps: Callable = _gaps, end=0, keep: Callable = lambda at, warm: at >= warm,
) -> list[float]:  # fmt: skip
    """The reference and, by its options, the usual ways to get it wrong."""
    rows = [
        (times[end] - start(d, s), gaps(times))
        for d, s, times in zip(due, sent, tokens, strict=True)
        if keep(since(d, s), warm)
    ]
    return [
        float(np.quantile(values, 0.99)) for values in ([one for one, _ in rows], [g for _, gs in rows for g in gs])
    ]


@exercise(
    "load/honest",
    cases=named(
        "due sent tokens warm",
        (
            [0.0, 0.5, 1.0, 1.5, 2.0, 2.5],
            [0.0, 0.8, 1.0, 1.5, 2.3, 3.2],
            [[0.4, 0.44, 0.47], [1.0, 1.04, 1.07], [1.2], [1.6, 2.1, 2.14], [2.5], [3.6, 3.65, 3.68]],
            0.95,
        ),
        (
            [0.0, 0.5, 1.0, 1.5, 2.0],
            [0.7, 0.8, 1.3, 2.2, 2.7],
            [[0.8, 0.83, 0.87, 0.91], [1.0, 1.03, 1.07], [1.7], [2.6], [2.9, 2.95, 3.45]],
            0.45,
        ),
    ),
    mistakes="""
        _honest(due, sent, tokens, warm, start=lambda due, sent: sent)
            You count from when the request was sent. While the server stands still the client waits, sends late, and
            those waits vanish: count from when it was due.
        _honest(due, sent, tokens, warm, since=lambda due, sent: sent)
            A request that was due in the warm-up and sent later still belongs to the warm-up.
        _honest(due, sent, tokens, 0)
            The warm-up is counted.
        _honest(due, sent, tokens, warm, gaps=lambda times: [np.mean(_gaps(times))] if len(times) > 1 else [])
            You take each request's mean gap, its time per output token. A stall disappears in a mean: take all gaps.
        _honest(due, sent, tokens, warm, gaps=lambda times: [max(_gaps(times))] if len(times) > 1 else [])
            You take each request's largest gap. Asked is the percentile of all gaps together.
        _honest(due, sent, tokens, warm, end=-1)
            That is the time to the last token.
        _honest(due, sent, tokens, warm, keep=lambda at, warm: at < warm)
            You kept the warm-up and left out the rest.
    """,
    hint="Keep the requests that were due at `warm` or later. First list: first token less due. Second: every gap.",
)
def honest(due: Sequence[float], sent: Sequence[float], tokens: Sequence[Sequence[float]], warm: float) -> list[float]:
    """99th percentiles of the time to the first token and of the gaps between tokens, in seconds.

    Args:
        due, sent: of each request, the second at which it was to be sent, and at which it was.
        tokens: the seconds at which its tokens came, at least one. warm: requests due before do not count.
    """
    return _honest(due, sent, tokens, warm)


def _shared(arrivals, service, count) -> list[float]:
    """Waits in one queue before ``count`` cards, first come, first served."""
    free, found = [0.0] * count, []
    for at, takes in zip(arrivals, service, strict=True):
        start = max(at, free[0])
        heapq.heapreplace(free, start + takes)
        found.append(start - at)
    return found


def _split(arrivals, service, count) -> list[float]:
    """Waits where requests are dealt out in turn and each card has a queue of its own."""
    found = [0.0] * len(arrivals)
    for card in range(count):
        found[card::count] = _shared(arrivals[card::count], service[card::count], 1)
    return found


def _cards(arrivals, service, limit, share, waits: Callable = _shared, plus: Callable = lambda takes: 0.0, mean=False):
    for count in itertools.count(1):
        found = [wait + plus(takes) for wait, takes in zip(waits(arrivals, service, count), service, strict=True)]
        if np.mean(found) <= limit if mean else sum(wait <= limit for wait in found) >= share * len(found):
            return count
        if count > len(arrivals):
            return count


@exercise(
    "load/cards",
    cases=named(
        "arrivals service limit share",
        ([0.5, 0.6, 0.6, 0.7, 2.2, 2.3, 3.8, 3.9, 4.0], [0.4, 1.0, 1.0, 1.3, 1.0, 0.4, 0.7, 0.4, 0.4], 0.53, 0.87),
        ([0.1, 0.2, 0.3, 0.4, 0.4, 0.9], [0.7, 0.4, 1.0, 0.4, 1.3, 0.4], 0.53, 0.55),
        ([0.1, 1.6, 2.1, 2.1, 2.1, 2.6], [1.3, 0.4, 1.0, 0.4, 1.3, 0.4], 0.33, 0.87),
    ),
    mistakes="""
        int(-(-sum(service) // (arrivals[-1] - arrivals[0])))
            Enough for the mean: the work fits into the time. Requests do not come evenly, and wait.
        _cards(arrivals, service, limit, share, waits=_split)
            You deal the requests out in turn, and each card has its own queue. Here there is one queue, and whoever is
            first in it takes the card that is free first.
        _cards(arrivals, service, limit, share, plus=lambda takes: takes)
            The limit is on the wait, and not on wait and service together.
        _cards(arrivals, service, limit, share, mean=True)
            The mean wait keeps the limit. Asked is the share of requests that keep it.
        _cards(arrivals, service, limit, 1.0)
            Some requests may wait longer than the limit.
        _cards(arrivals, service, 0.0, share)
            Nobody has to be served at once; a wait up to the limit is fine.
        _cards(arrivals, service, limit, share) + 1
            One too many.
    """,
    hint="Try 1, 2, 3 ... cards. For each, keep the moments at which the cards are free; a request takes the earliest.",
)
def cards(arrivals: Sequence[float], service: Sequence[float], limit: float, share: float) -> int:
    """The fewest equal cards with which at least ``share`` of the requests wait at most ``limit`` seconds.

    Args:
        arrivals: seconds, in order. service: how long each request holds a card, which does one at a time.
    """
    return _cards(arrivals, service, limit, share)
