"""Many adapters in one batch: the timed steps are the ones that the page speaks of."""

import pytest

from measured.experiments import adapters_many as lab

SHORT = {"batch": 2, "rank": 2, "length": 4, "rounds": 2}


@pytest.mark.parametrize("targets", lab.TARGETS)
def test_three_ways_are_timed_and_compared(targets):
    made = lab.step_times(targets=targets, **SHORT)
    assert set(made["ways"]) == {"merged", "own", "apart"} and made["batch"] == 2
    median, low, high = made["share"]
    assert 0 < low <= median <= high


@pytest.mark.parametrize("call, words", [
    (lambda: lab.step_times(targets="heads"), "targets"),
    (lambda: lab.step_times(batch=0), "batch"),
    (lambda: lab.step_times(size="huge"), "huge"),
])  # fmt: skip
def test_bad_calls_are_refused_by_name(call, words):
    with pytest.raises(ValueError, match=words):
        call()
