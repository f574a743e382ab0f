"""Erlang's formula against the textbook, against a sum with factorials, and against the simulated queue."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dslib.scenarios.queueing import erlang_c, mean_wait, simulate

FEW = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def by_sum(servers, utilisation):
    load = servers * utilisation
    top = load**servers / math.factorial(servers) / (1 - utilisation)
    return top / (sum(load**k / math.factorial(k) for k in range(servers)) + top)


@pytest.mark.parametrize("servers", [1, 2, 3, 10, 50])
@pytest.mark.parametrize("utilisation", [0.01, 0.5, 0.65, 0.9, 0.99])
def test_the_recurrence_is_the_formula(servers, utilisation):
    assert erlang_c(servers, utilisation) == pytest.approx(by_sum(servers, utilisation), rel=1e-9)


def test_known_values():
    assert erlang_c(1, 0.65) == pytest.approx(0.65)
    assert mean_wait(1, 0.65) == pytest.approx(0.65 / 0.35)
    assert erlang_c(2, 0.5) == pytest.approx(1 / 3)
    assert erlang_c(10, 0.6) == pytest.approx(0.1013, abs=5e-4)
    assert 0 < erlang_c(5000, 0.95) < 1e-3, "no overflow"


@FEW
@given(st.integers(1, 60), st.floats(0.2, 0.98), st.floats(0.001, 0.01))
def test_busier_waits_longer_and_larger_waits_less(servers, utilisation, more):
    assert 0 < erlang_c(servers, utilisation) < 1
    assert mean_wait(servers, utilisation + more) > mean_wait(servers, utilisation)
    assert mean_wait(servers + 1, utilisation) < mean_wait(servers, utilisation)


@pytest.mark.parametrize(("servers", "utilisation"), [(1, 0.5), (1, 0.65), (4, 0.7), (16, 0.85)])
def test_the_simulation_agrees_with_the_formula(servers, utilisation):
    """Over five seeds: the formula lies within three standard errors of the mean."""
    runs = [simulate(servers, utilisation, seed=seed) for seed in range(5)]
    for got, want in zip(
        zip(*runs, strict=True), (erlang_c(servers, utilisation), mean_wait(servers, utilisation)), strict=True
    ):
        mean = sum(got) / 5
        error = math.sqrt(sum((x - mean) ** 2 for x in got) / 4 / 5)
        assert abs(mean - want) < 3 * error + 0.005, (mean, want, error)


def test_every_kind_of_number_gives_plain_ones():
    for servers, utilisation in ((np.int64(3), np.float64(0.5)), (torch.tensor(3), torch.tensor(0.5))):
        assert type(erlang_c(servers, utilisation)) is type(mean_wait(servers, utilisation)) is float
        assert simulate(servers, utilisation, 100) == simulate(3, 0.5, 100)


def test_the_seed_decides():
    assert simulate(2, 0.5, 100, seed=3) == simulate(2, 0.5, 100, seed=3) != simulate(2, 0.5, 100, seed=4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: erlang_c(0, 0.5), "servers: got 0"),
        (lambda: mean_wait(1.5, 0.5), "servers: got 1.5"),
        (lambda: simulate(0, 0.5), "servers: got 0"),
        (lambda: erlang_c(1, 1), "utilisation: got 1, expected at least 0 and below 1"),
        (lambda: mean_wait(1, 0), "utilisation: got 0, expected a number above 0"),
        (lambda: erlang_c(1, math.nan), "utilisation: got nan"),
        (lambda: simulate(1, -0.1), "utilisation: got -0.1"),
        (lambda: simulate(1, 0.5, 9), "arrivals: got 9"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
