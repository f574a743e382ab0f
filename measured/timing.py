"""Timing that can be believed. No other module of the project reads a clock.

Three habits, each of which changes the answer when it is missing:

* *warm up*: the first call pays for memory, for loading kernels and for filling caches;
* *synchronise*: a GPU call returns before the GPU has worked, so the clock must wait for the device;
* *repeat, and say how far the repeats lie apart*: one run is an anecdote.

Results are the median and the quartiles, in seconds. The mean is not used: one interruption would move it.

Chapter: ``chapters/start/your_machine.ipynb``.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dslib.check import above, at_least, whole
from measured.machine import synchronize

if TYPE_CHECKING:
    import torch

# A run shorter than this is repeated inside one reading, so that the clock's own cost stays below about 0.1 %.
SHORTEST_READING = 200e-6
UNITS = ((1.0, "s"), (1e3, "ms"), (1e6, "µs"), (1e9, "ns"))


@dataclass(frozen=True)
class Timing:
    """How long one call takes, in seconds: ``median`` with the quartiles ``low`` and ``high`` of ``n`` readings.

    ``settled`` says whether the quartiles came closer together than the spread asked for. Where they did not, the
    number is still the best there is, and the text says so. A reading that is no time is a ValueError.
    """

    seconds: tuple[float, ...]
    calls: int = 1
    target_spread: float = 0.05
    median: float = field(init=False)
    low: float = field(init=False)
    high: float = field(init=False)

    def __post_init__(self) -> None:
        if not self.seconds:
            raise ValueError("seconds: got no readings, wanted at least one")
        for reading in self.seconds:
            at_least(0, seconds=reading)
        for name, value in zip(("low", "median", "high"), quartiles(self.seconds), strict=True):
            object.__setattr__(self, name, value)

    @property
    def n(self) -> int:
        return len(self.seconds)

    @property
    def best(self) -> float:
        """The shortest reading: what the machine can do, where the median says what to expect."""
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """Distance between the quartiles, as a fraction of the median."""
        return (self.high - self.low) / self.median if self.median else 0.0

    @property
    def settled(self) -> bool:
        return self.n > 1 and self.spread <= self.target_spread

    def per_second(self, amount: float) -> float:
        """The rate when one call handles ``amount`` of something (bytes, FLOPs, tokens)."""
        above(0, median=self.median)
        return amount / self.median

    def __str__(self) -> str:
        scale, unit = next((unit for unit in UNITS if self.median * unit[0] >= 1), UNITS[-1])
        low, median, high = (_three(value * scale) for value in (self.low, self.median, self.high))
        note = "" if self.settled else ", not settled"
        return f"{median} {unit} ({low} to {high}, n={self.n}{note})"

    __repr__ = __str__


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one thing is as another: median and quartiles of ``n`` paired rounds."""

    median: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{_three(self.median)} times ({_three(self.low)} to {_three(self.high)}, n={self.n})"

    __repr__ = __str__


def measure(
    fn: Callable[[], Any],
    *,
    device: str | torch.device | None = None,
    min_runs: int = 5,
    max_runs: int = 50,
    max_seconds: float = 2.0,
    warmup: int = 2,
    target_spread: float = 0.05,
) -> Timing:
    """Time ``fn()`` until the quartiles of the readings lie within ``target_spread`` of each other.

    It takes ``min_runs`` readings at least and ``max_runs`` at most, and between the two it stops once they took
    ``max_seconds`` together. ``warmup`` calls come before the clock starts. ``device`` is the one to wait for; None
    waits for every accelerator in use.

    Raises:
        ValueError: ``fn`` is not callable, or a number is out of range.
    """
    _check_callable("fn", fn)
    whole(1, min_runs=min_runs)
    whole(min_runs, max_runs=max_runs)
    whole(0, warmup=warmup)
    above(0, max_seconds=max_seconds)
    above(0, target_spread=target_spread)
    with _quiet():
        calls = _warm(fn, device, warmup)
        readings: list[float] = []
        spent = 0.0
        while len(readings) < max_runs:
            readings.append(_reading(fn, device, calls))
            spent += readings[-1] * calls
            timing = Timing(tuple(readings), calls, target_spread)
            if timing.n >= min_runs and (spent >= max_seconds or timing.settled):
                break
    return timing


def compare(
    functions: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 7,
    device: str | torch.device | None = None,
    warmup: int = 1,
    target_spread: float = 0.05,
) -> dict[str, Timing]:
    """Time several functions side by side: every round runs each of them once.

    What slows the machine for a while then slows all of them alike, and :func:`ratio` cancels it. The order turns round
    from one round to the next, so that none always runs in another's wake. Bad input raises as in :func:`measure`.
    """
    if not functions:
        raise ValueError("functions: got none, wanted at least one")
    for name, fn in functions.items():
        _check_callable(f"functions[{name!r}]", fn)
    whole(1, rounds=rounds)
    whole(0, warmup=warmup)
    above(0, target_spread=target_spread)
    with _quiet():
        calls = {name: _warm(fn, device, warmup) for name, fn in functions.items()}
        readings: dict[str, list[float]] = {name: [] for name in functions}
        for turn in range(rounds):
            for name in functions if turn % 2 == 0 else reversed(functions):
                readings[name].append(_reading(functions[name], device, calls[name]))
    return {name: Timing(tuple(readings[name]), calls[name], target_spread) for name in functions}


def ratio(a: Timing, b: Timing) -> Ratio:
    """How many times as fast ``b`` is as ``a``, round by round: the median of ``a.seconds[i] / b.seconds[i]``.

    Raises ``ValueError`` if their numbers of readings differ, or if ``b`` took no time that the clock could see.
    """
    if a.n != b.n:
        raise ValueError(f"b: got {b.n} readings, wanted {a.n} as in a; measure both in one compare()")
    above(0, b=min(b.seconds))
    low, median, high = quartiles([slow / fast for slow, fast in zip(a.seconds, b.seconds, strict=True)])
    return Ratio(median, low, high, a.n)


class Stopwatch(AbstractContextManager):
    """A clock for code that is not a function to repeat: a training run, a stream of tokens, a ``with`` block.

    ``lap()`` waits for the device and gives the seconds since the start; ``seconds`` is the last lap, which a block
    takes at its end. ``lap(wait=False)`` does not wait for the device: what a careless timing does.
    """

    def __init__(self, device: str | torch.device | None = None) -> None:
        self._device = device
        synchronize(device)
        self._start = time.perf_counter()
        self.seconds = 0.0

    def lap(self, wait: bool = True) -> float:
        if wait:
            synchronize(self._device)
        self.seconds = time.perf_counter() - self._start
        return self.seconds

    def __exit__(self, *_: object) -> None:
        self.lap()


stopwatch = Stopwatch


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile, by linear interpolation between the sorted values (NumPy's default)."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))


def _warm(fn: Callable[[], Any], device: Any, warmup: int) -> int:
    """Run the warm-up and return how many calls make one reading long enough for the clock."""
    for _ in range(warmup):
        fn()
    synchronize(device)
    # The length of a call is judged from a warm one; without a warm-up every call is its own reading.
    once = _reading(fn, device, 1) if warmup else SHORTEST_READING
    return max(1, min(1000, round(SHORTEST_READING / max(once, 1e-9))))


def _reading(fn: Callable[[], Any], device: Any, calls: int) -> float:
    """Seconds of one call, mean of ``calls`` in a row, with the device idle before and after."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        fn()
    synchronize(device)
    return (time.perf_counter() - start) / calls


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Python's garbage collector from running inside a reading."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _three(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _check_callable(name: str, value: Any) -> None:
    if not callable(value):
        raise ValueError(f"{name}: got {value!r}, wanted a function to call, e.g. lambda: model(x)")
