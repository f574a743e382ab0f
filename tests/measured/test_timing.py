"""Timing, checked with a clock of our own: no test asserts an absolute time."""

import gc
import math

import numpy as np
import pytest

from measured import timing


class FakeClock:
    """A clock that moves only when a function under test lets it."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def work(self, seconds):
        """A function whose calls take the given seconds in turn; the last one repeats."""
        left = list(seconds)

        def fn():
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return fn


@pytest.fixture
def clock(monkeypatch):
    return FakeClock(monkeypatch)


def test_warm_up_is_not_counted(clock):
    # Two slow warm-up calls, one call to judge the length, then the readings.
    result = timing.measure(clock.work([9.0, 9.0, 0.1]), warmup=2)
    assert result.median == pytest.approx(0.1)
    assert (result.n, result.calls) == (5, 1)


@pytest.mark.parametrize(
    ("seconds", "limits", "fewest", "most", "settled"),
    [
        ([0.01], {"min_runs": 5, "max_runs": 50}, 5, 5, True),
        ([0.1] * 3 + [0.1, 0.5] * 40, {"max_runs": 50, "max_seconds": 2.0}, 5, 49, False),  # the budget ends it
        ([10.0, 11.0, 10.0], {"min_runs": 3, "max_seconds": 0.5}, 3, 3, True),  # min_runs hold beyond the budget
    ],
)
def test_when_it_stops_and_what_it_then_says(clock, seconds, limits, fewest, most, settled):
    result = timing.measure(clock.work(seconds), **limits)
    assert fewest <= result.n <= most
    assert result.settled is settled is ("not settled" not in str(result))


@pytest.mark.parametrize(("seconds", "calls"), [(1e-6, 200), (0.0, 1000)])
def test_short_calls_are_read_together(clock, seconds, calls):
    result = timing.measure(clock.work([seconds]), max_runs=5)
    assert result.calls == calls
    assert result.median == pytest.approx(seconds)


def test_quartiles_are_those_of_numpy():
    values = [5.0, 1.0, 4.0, 2.0, 8.0, 3.0]
    assert timing.quartiles(values) == pytest.approx(tuple(np.percentile(values, [25, 50, 75])))
    assert timing.quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_text_carries_unit_spread_and_n():
    assert str(timing.Timing((0.0119, 0.0123, 0.0128), target_spread=0.2)) == "12.3 ms (12.1 to 12.6, n=3)"
    assert str(timing.Timing((250e-9,) * 2)) == "250 ns (250 to 250, n=2)"
    assert "not settled" in str(timing.Timing((1.0,)))


def test_rounds_alternate_their_order():
    seen = []
    fns = {"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}
    result = timing.compare(fns, rounds=2, warmup=0)
    assert "".join(seen) == "abba"
    assert {name: t.n for name, t in result.items()} == {"a": 2, "b": 2}


def test_ratio_is_paired_by_round(clock):
    # The machine is three times slower in the second round, for both: the ratio does not notice.
    slow, fast = timing.Timing((2.0, 6.0, 2.0)), timing.Timing((1.0, 3.0, 1.0))
    assert timing.ratio(slow, fast) == timing.Ratio(2.0, 2.0, 2.0, 3)
    assert str(timing.ratio(slow, fast)) == "2.00 times (2.00 to 2.00, n=3)"


def test_stopwatch_laps(clock):
    step = clock.work([0.5])
    with timing.stopwatch() as watch:
        step()
        assert watch.lap() == pytest.approx(0.5)
        step()
    assert watch.seconds == pytest.approx(1.0)


def test_the_device_is_waited_for_unless_a_lap_is_told_not_to(monkeypatch):
    events = []
    monkeypatch.setattr(timing, "synchronize", events.append)
    timing.measure(lambda: events.append("call"), device="cpu", warmup=0, min_runs=1, max_runs=1)
    assert events[-3:] == ["cpu", "call", "cpu"]
    events.clear()
    watch = timing.Stopwatch("cpu")
    watch.lap(wait=False)
    assert events == ["cpu"]
    watch.lap()
    assert events == ["cpu", "cpu"]


ONE = timing.Timing((1.0,) * 2)
NO_TIME = timing.Timing((0.0, 0.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: timing.measure(3), "fn: got 3, wanted a function"),
        (lambda: timing.measure(print, min_runs=0), "min_runs: got 0"),
        (lambda: timing.measure(print, min_runs=6, max_runs=5), "max_runs: got 5, expected at least 6"),
        (lambda: timing.measure(print, warmup=-1), "warmup: got -1"),
        (lambda: timing.measure(print, warmup=math.inf), "warmup: got inf"),
        (lambda: timing.measure(print, max_seconds=0), "max_seconds: got 0"),
        (lambda: timing.measure(print, max_seconds=math.nan), "max_seconds: got nan"),
        (lambda: timing.measure(print, max_seconds="2"), "max_seconds: got '2'"),
        (lambda: timing.measure(print, target_spread=-0.1), "target_spread: got -0.1"),
        (lambda: timing.measure(print, target_spread=math.inf), "target_spread: got inf"),
        (lambda: timing.compare({"x": None}), r"functions\['x'\]: got None"),
        (lambda: timing.compare({}), "functions: got none"),
        (lambda: timing.compare({"x": print}, rounds=0.5), "rounds: got 0.5"),
        (lambda: timing.Timing(()), "seconds: got no readings"),
        (lambda: timing.Timing((1.0, math.nan)), "seconds: got nan"),
        (lambda: timing.Timing((math.inf,)), "seconds: got inf"),
        (lambda: timing.Timing((1.0, -1e-9)), "seconds: got -1e-09"),
        (lambda: timing.Timing((None,)), "seconds: got None"),
        (lambda: timing.ratio(timing.Timing((1.0,) * 3), ONE), "b: got 2 readings, wanted 3"),
        (lambda: timing.ratio(ONE, NO_TIME), "b: got 0.0, expected a number above 0"),
        (lambda: NO_TIME.per_second(5), "median: got 0.0, expected a number above 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_garbage_collector_is_restored_after_an_error():
    with pytest.raises(ZeroDivisionError):
        timing.measure(lambda: 1 / 0)
    assert gc.isenabled()
