"""Why a service cannot be busy all the time: the waiting that random arrivals cause, in theory and simulated.

The model is M/M/c: requests arrive at random and independently (Poisson), each holds one of ``servers`` places for a
random time (exponential), and who finds all of them taken waits in line. Erlang's second formula gives the share that
waits and the mean wait (Harchol-Balter 2013, chapter 14). A language-model server is not quite that: its places share
one GPU, so each is slower when many are taken, and real requests come in bursts. It shows what chance alone does.

Plain Python; randomness through a seed. Chapter: ``chapters/performance/cost.ipynb``.
"""

import heapq
import random

from dslib import check


def erlang_c(servers: int, utilisation: float) -> float:
    """Share of the arrivals that have to wait when ``servers`` places are taken ``utilisation`` of the time.

    Raises ``ValueError`` below one server, and for a utilisation that is not above 0 and below 1, where the queue grows
    without end.
    """
    servers, utilisation = _checked(servers, utilisation)
    # Erlang B by its recurrence, which has no factorials to overflow; C follows from B.
    blocked, load = 1.0, servers * utilisation
    for taken in range(1, servers + 1):
        blocked = load * blocked / (taken + load * blocked)
    return blocked / (1 - utilisation * (1 - blocked))


def mean_wait(servers: int, utilisation: float) -> float:
    """Mean time in line, as a multiple of the mean time a request then takes; arguments as in :func:`erlang_c`."""
    return erlang_c(servers, utilisation) / (int(servers) * (1 - float(utilisation)))


def simulate(servers: int, utilisation: float, arrivals: int = 20_000, seed: int = 0) -> tuple[float, float]:
    """Play the queue: ``arrivals`` random requests (10 or more), after a first tenth that is not counted.

    Returns the share that waited, and the mean wait as a multiple of the mean service time.
    """
    servers, utilisation = _checked(servers, utilisation)
    check.whole(10, arrivals=arrivals)
    rate, dice = servers * utilisation, random.Random(seed)
    free = [0.0] * servers  # when each place is next free, the soonest first
    now, waits = 0.0, []
    for _ in range(arrivals + arrivals // 9):
        now += dice.expovariate(rate)
        start = max(now, free[0])
        heapq.heapreplace(free, start + dice.expovariate(1.0))
        waits.append(start - now)
    counted = waits[arrivals // 9 :]
    return sum(wait > 0 for wait in counted) / len(counted), sum(counted) / len(counted)


def _checked(servers: int, utilisation: float) -> tuple[int, float]:
    """As plain numbers, whatever kind of scalar they were."""
    check.whole(1, servers=servers)
    check.above(0, utilisation=utilisation)
    check.below(0, 1, utilisation=utilisation)
    return int(servers), float(utilisation)
