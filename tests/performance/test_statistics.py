"""Losses, perplexities and intervals, against torch's own loss, exact distributions and numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

from dslib.architecture import decoder
from dslib.performance import perplexity
from dslib.performance.statistics import Mean, mcnemar, mean_interval, paired_difference, questions_needed, share


def ends(mean):
    return mean.low, mean.value, mean.high


# ---------------------------------------------------------------- perplexity


def test_losses_are_the_cross_entropy_of_the_next_token():
    model = decoder.build(decoder.preset("tiny"), seed=0).eval()
    tokens = torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(0))
    want = F.cross_entropy(model(tokens)[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    assert torch.allclose(perplexity.token_losses(model, tokens), want, atol=1e-5)


HALF = 4.302653 * 0.5773503 / math.sqrt(3)  # of the means 2, 2, 3: standard deviation 0.57735, t(2) = 4.302653


@pytest.mark.parametrize(
    ("losses", "wanted"),
    [
        ([[1.0, 3.0], [2.0, 2.0], [3.0, 3.0]], [7 / 3 - HALF, 7 / 3, 7 / 3 + HALF]),
        ([[2.0, 2.0]], [2, 2, 2]),
        ([[800.0, 800.0], [810.0, 820.0]], [math.inf] * 3),
        ([[600.0, 600.0], [610.0, 620.0]], [607.5 - 7.5 * 12.7062, 607.5, 607.5 + 7.5 * 12.7062]),
        ([[500.0], [700.0]], [600 - 100 * 12.7062, 600, math.inf]),
        ([[-800.0], [-900.0]], [-math.inf, -math.inf, -850 + 50 * 12.7062]),
    ],
)
def test_perplexity_by_hand_also_where_it_is_too_large_for_a_float(losses, wanted):
    result, n = perplexity.perplexity(torch.tensor(losses)), len(losses)
    logs = [math.log(x) if x else -math.inf for x in ends(result)]
    assert logs == pytest.approx(wanted, rel=1e-5) and result.n == n
    twice = perplexity.perplexity_ratio(torch.tensor(losses).double() + math.log(2), torch.full((n, len(losses[0])), 0))
    assert twice.value == pytest.approx(2 * result.value)


def test_a_constant_gap_is_a_certain_ratio_however_hard_the_slices_are():
    base = torch.tensor([[1.0, 2.0], [5.0, 6.0], [0.1, 0.2]])
    assert ends(perplexity.perplexity_ratio(base + math.log(3), base)) == pytest.approx((3, 3, 3), rel=1e-5)


# ---------------------------------------------------------------- means


@pytest.mark.parametrize(
    ("n", "t"),
    [(2, 12.7062), (3, 4.30265), (31, 2.04227), (32, 2.03951), (33, 2.03693), (101, 1.98397), (1001, 1.96234)],
)
def test_the_interval_of_a_mean_is_students_for_any_number_of_values(n, t):
    """The quantiles are those of printed tables."""
    values = [float(i) for i in range(n)]
    deviation = math.sqrt(sum((x - (n - 1) / 2) ** 2 for x in values) / (n - 1))
    mean = mean_interval(values)
    assert (mean.value, mean.n) == ((n - 1) / 2, n)
    assert mean.high - mean.value == pytest.approx(t * deviation / math.sqrt(n), rel=2e-5)
    assert mean.value - mean.low == pytest.approx(mean.high - mean.value)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([0.5], Mean(0.5, 0.5, 0.5, 1)),
        ([0.7] * 7, Mean(0.7, 0.7, 0.7, 7)),
        ([0, 0.0, False], Mean(0, 0, 0, 3)),
        ([1e308, 1e308], Mean(1e308, 1e308, 1e308, 2)),
        ([1e308, -1e308], Mean(0, -math.inf, math.inf, 2)),
        ([1e9 + 1, 1e9 + 2, 1e9 + 3], Mean(1e9 + 2, 1e9 + 2 - 4.302653 / 3**0.5, 1e9 + 2 + 4.302653 / 3**0.5, 3)),
    ],
)
def test_means_at_the_ends(values, wanted):
    found = mean_interval(values)
    assert ends(found) == pytest.approx(ends(wanted), rel=1e-15, abs=1e-6) and found.n == wanted.n
    assert str(mean_interval([0.5])) == "0.500 (0.500 to 0.500)"


KINDS = {
    "tuple": tuple, "generator": lambda v: (x for x in v), "array": np.array, "tensor": torch.tensor,
    "backwards": lambda v: np.array(v[::-1])[::-1], "numpy scalars": lambda v: list(np.array(v)),
    "0-d tensors": lambda v: [torch.tensor(x) for x in v], "with a graph": lambda v: torch.tensor(v).double() * W,
    "whole floats": lambda v: [float(x) for x in v], "integers": lambda v: [int(x) for x in v],
}  # fmt: skip
W = torch.ones((), requires_grad=True)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_what_holds_the_values_does_not_matter(kind):
    a, b = [True, False, True, True], [False, False, True, False]
    assert mean_interval(kind(a)) == mean_interval(a) and share(kind(a)) == share(a)
    assert mcnemar(kind(a), kind(b)) == mcnemar(a, b) == 0.5
    assert paired_difference(kind(a), kind(b)) == paired_difference(a, b)


# ---------------------------------------------------------------- shares of right answers


def test_wilsons_interval_by_hand_and_at_the_ends():
    """(p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n), worked out for 7 of 10."""
    got = share([True] * 7 + [False] * 3)
    assert ends(got) == pytest.approx((0.3968, 0.7, 0.8922), abs=1e-4) and got.n == 10
    assert got.percent() == "70.0 (39.7 to 89.2)" and got.percent("+").startswith("+70.0 (+39.7")
    none, every = share([False] * 10), share([True] * 10)
    assert none.low == 0 and none.high == pytest.approx(0.2775, abs=1e-4)
    assert every.high == pytest.approx(1) and every.high <= 1 and every.low == pytest.approx(0.7225, abs=1e-4)


@pytest.mark.parametrize("p", [0.05, 0.25, 0.74])
def test_wilsons_interval_covers_the_truth_about_95_times_in_100(p):
    """Exactly, by summing the binomial distribution, with 100 questions."""
    found = [share([True] * hits + [False] * (100 - hits)) for hits in range(101)]
    covered = sum(stats.binom.pmf(hits, 100, p) for hits, got in enumerate(found) if got.low <= p <= got.high)
    assert 0.93 < covered < 0.98


def test_the_paired_interval_is_narrower_than_two_separate_ones():
    """Two models that mostly agree: what is hard for both does not blur the difference."""
    a = torch.rand(400, generator=torch.Generator().manual_seed(0)) < 0.5
    b = a.clone()
    b[:40] = ~b[:40]
    got, gap = paired_difference(a, b), a.double() - b.double()
    assert got.low <= got.value <= got.high and got.value == pytest.approx(gap.mean().item()) and got.n == 400
    separate = math.hypot(*(share(x).high - share(x).low for x in (a, b)))
    assert got.high - got.low < 0.6 * separate
    # The normal approximation of the same: deviation of the mean of n values in {-1, 0, 1}.
    assert got.high - got.low == pytest.approx(2 * 1.96 * gap.std().item() / 20, rel=0.1)


def test_many_questions_are_resampled_in_parts():
    """The parts draw what all at once would draw; all at once, 10,000 times 14,000 questions take a gigabyte."""
    a, b = np.arange(9_000) % 3 > 0, np.arange(9_000) % 2 > 0
    gap, rng = a.astype(float) - b, np.random.default_rng(4)
    whole = stats.bootstrap((gap,), np.mean, n_resamples=2000, method="percentile", batch=None, rng=rng)
    got = paired_difference(a, b, resamples=2000, seed=4)
    assert (got.low, got.high) == tuple(whole.confidence_interval)


def test_paired_differences_at_the_ends():
    a, b = [True] * 5, [False] * 5
    assert paired_difference(a, b) == Mean(1, 1, 1, 5) and paired_difference(b, a).value == -1
    assert paired_difference(a, a) == Mean(0, 0, 0, 5) and paired_difference([True], [False]).n == 1


@pytest.mark.parametrize(("only_a", "only_b"), [(9, 1), (1, 0), (3, 3), (0, 7), (30, 12), (0, 0)])
def test_mcnemar_counts_coins(only_a, only_b):
    a = [True] * only_a + [False] * only_b + [True] * 50
    b = [False] * only_a + [True] * only_b + [True] * 50
    coins = only_a + only_b
    tail = sum(math.comb(coins, k) for k in range(max(only_a, only_b), coins + 1)) / 2**coins
    assert mcnemar(a, b) == pytest.approx(min(1, 2 * tail)) == pytest.approx(mcnemar(b, a))


def test_questions_needed_to_tell_74_from_76():
    """The textbook formula, and a simulation: the number found has the power that was asked for."""
    assert questions_needed(0.74, 0.76) == pytest.approx(7358, abs=3)
    n = questions_needed(0.74, 0.76, disagreement=0.2)
    assert n == pytest.approx(3923, abs=3)
    generator, runs, found = torch.Generator().manual_seed(1), 400, 0
    for _ in range(runs):
        u = torch.rand(n, generator=generator)
        only_a, only_b = int((u < 0.09).sum()), int((u > 0.89).sum())  # 9 % and 11 %: they differ on 20 %
        found += abs(only_b - only_a) / math.sqrt(only_a + only_b) > 1.96
    assert found / runs == pytest.approx(0.8, abs=0.07)


NAN = math.nan
IDS = torch.zeros(3, 1, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: perplexity.token_losses(nn.Module(), IDS), r"tokens: got shape \(3, 1\)"),
        (lambda: perplexity.token_losses(nn.Module(), IDS[:0].expand(0, 4)), r"tokens: got shape \(0, 4\)"),
        (lambda: perplexity.perplexity_ratio(torch.zeros(2, 3), torch.zeros(3, 3)), "baseline: got shape"),
        (lambda: perplexity.perplexity(torch.zeros(3)), r"losses: got shape \(3,\)"),
        (lambda: perplexity.perplexity(torch.zeros(3, 0)), r"losses: got shape \(3, 0\)"),
        (lambda: perplexity.perplexity(torch.tensor([[1.0, NAN], [2.0, 2.0]])), "losses: got nan, expected finite"),
        (lambda: perplexity.perplexity(torch.tensor([[1.0], [math.inf]])), "losses: got inf, expected finite"),
        (lambda: mean_interval([]), r"values: got shape \(0,\), expected at least one"),
        (lambda: mean_interval([1.0, NAN]), "values: got nan, expected finite numbers"),
        (lambda: mean_interval([1.0, -math.inf]), "values: got -inf, expected finite numbers"),
        (lambda: mean_interval([10**400]), "values: got .*, expected numbers"),
        (lambda: mean_interval(["1", "2"]), r"values: got \['1', '2'\], expected numbers"),
        (lambda: mean_interval([[1, 2], [3, 4]]), r"values: got shape \(2, 2\)"),
        (lambda: mean_interval(3.0), "values: got 3.0, expected numbers"),
        (lambda: mean_interval(torch.tensor(3.0)), r"values: got shape \(\)"),
        (lambda: share([]), "right: got shape"),
        (lambda: share([1.0, NAN]), "right: got nan"),
        (lambda: share([0, 3]), "right: got 3, expected one truth value"),
        (lambda: paired_difference([True], [True, False]), "b: got 2 answers, expected 1"),
        (lambda: paired_difference([2], [2]), "a: got 2, expected one truth value"),
        (lambda: paired_difference([True], [True], resamples=0), "resamples: got 0"),
        (lambda: mcnemar([], []), "a: got shape"),
        (lambda: mcnemar([True, False], [0.5, 1]), "b: got 0.5, expected one truth value"),
        (lambda: mcnemar([3, 1], [3, 2]), "a: got 3, expected one truth value"),
        (lambda: mcnemar([True, NAN], [True, True]), "a: got nan"),
        (lambda: questions_needed(0.8, 0.7), "low, high: got 0.8, 0.7"),
        (lambda: questions_needed(0.7, 0.7), "low, high: got 0.7, 0.7"),
        (lambda: questions_needed(0.7, 1.2), "high: got 1.2"),
        (lambda: questions_needed(NAN, 0.7), "low: got nan"),
        (lambda: questions_needed(0.7, 0.8, power=0.2), "power: got 0.2"),
        (lambda: questions_needed(0.7, 0.8, disagreement=0.05), "disagreement: got 0.05, expected 0.1"),
        (lambda: questions_needed(0.7, 0.8, disagreement=0.9), r"disagreement: got 0.9.* to 0.5"),
        (lambda: questions_needed(0.7, 0.8, disagreement=NAN), "disagreement: got nan"),
    ],
)
def test_bad_statistics_are_named(call, said):
    with pytest.raises(ValueError, match=said):
        call()
