"""Losses and perplexities, against torch's own loss and numbers worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dslib.architecture import decoder
from dslib.performance import perplexity, statistics


def test_losses_are_the_cross_entropy_of_the_next_token():
    model = decoder.build(decoder.preset("tiny"), seed=0).eval()
    tokens = torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(0))
    want = F.cross_entropy(model(tokens)[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    assert torch.allclose(perplexity.token_losses(model, tokens), want, atol=1e-5)


def test_perplexity_of_a_known_sample():
    losses = torch.tensor([[1.0, 3.0], [2.0, 2.0], [3.0, 3.0]])  # means 2, 2, 3: sd 0.57735, t(2) = 4.302653
    result = perplexity.perplexity(losses)
    half = 4.302653 * 0.5773503 / math.sqrt(3)
    assert result.n == 3 and result.value == pytest.approx(math.exp(7 / 3))
    assert (result.low, result.high) == pytest.approx((math.exp(7 / 3 - half), math.exp(7 / 3 + half)), rel=1e-4)


def test_one_slice_has_no_interval():
    result = perplexity.perplexity(torch.full((1, 4), 2.0))
    assert result.value == result.low == result.high == pytest.approx(math.exp(2))


def test_a_constant_gap_is_a_certain_ratio_however_hard_the_slices_are():
    base = torch.tensor([[1.0, 2.0], [5.0, 6.0], [0.1, 0.2]])
    result = perplexity.perplexity_ratio(base + math.log(3), base)
    assert (result.value, result.low, result.high) == pytest.approx((3, 3, 3), rel=1e-5)


def test_the_interval_of_a_mean_is_students():
    """Worked by hand: mean 3, standard deviation 1, n 3, so 3 -+ 4.302653 / sqrt(3)."""
    mean = statistics.mean_interval([2.0, 3.0, 4.0])
    assert (mean.value, mean.n) == (3.0, 3)
    assert mean.high - 3 == pytest.approx(4.302653 / 3**0.5) == 3 - mean.low
    assert str(statistics.mean_interval([0.5])) == "0.500 (0.500 to 0.500)"


# --- shares of right answers


def test_wilsons_interval_by_hand_and_at_the_ends():
    """(p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n), worked out for 7 of 10."""
    got = statistics.share([True] * 7 + [False] * 3)
    assert (got.value, got.n) == (0.7, 10)
    assert (got.low, got.high) == pytest.approx((0.3968, 0.8922), abs=1e-4)
    assert got.percent() == "70.0 (39.7 to 89.2)" and got.percent("+").startswith("+70.0 (+39.7")
    none, all_ = statistics.share([False] * 10), statistics.share([True] * 10)
    assert none.low == 0 and none.high == pytest.approx(0.2775, abs=1e-4)
    assert all_.high == pytest.approx(1) and all_.high <= 1 and all_.low == pytest.approx(0.7225, abs=1e-4)


@pytest.mark.parametrize("p", [0.05, 0.25, 0.74])
def test_wilsons_interval_covers_the_truth_about_95_times_in_100(p):
    """Exactly, by summing the binomial distribution, with 100 questions."""
    n, covered = 100, 0.0
    for hits in range(n + 1):
        got = statistics.share([True] * hits + [False] * (n - hits))
        if got.low <= p <= got.high:
            covered += math.comb(n, hits) * p**hits * (1 - p) ** (n - hits)
    assert 0.93 < covered < 0.98


def test_the_paired_interval_is_narrower_than_two_separate_ones():
    """Two models that mostly agree: what is hard for both does not blur the difference."""
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(400, generator=generator) < 0.5
    b = a.clone()
    b[:40] = ~b[:40]
    got = statistics.paired_difference(a, b)
    assert got.value == pytest.approx(a.double().mean().item() - b.double().mean().item())
    assert got.low <= got.value <= got.high and got.n == 400
    separate = math.hypot(*(statistics.share(x).high - statistics.share(x).low for x in (a, b)))
    assert got.high - got.low < 0.6 * separate
    # The normal approximation of the same: deviation of the mean of n values in {-1, 0, 1}.
    gap = a.double() - b.double()
    assert got.high - got.low == pytest.approx(2 * 1.96 * gap.std().item() / 20, rel=0.1)


def test_the_paired_interval_is_reproducible_and_handles_extremes():
    a, b = [True] * 5, [False] * 5
    assert statistics.paired_difference(a, b) == statistics.paired_difference(a, b)
    sure = statistics.paired_difference(a, b)
    assert (sure.low, sure.value, sure.high) == (1, 1, 1)
    same = statistics.paired_difference(a, a)
    assert (same.low, same.value, same.high) == (0, 0, 0)
    assert statistics.paired_difference(b, a).value == -1


def test_mcnemar_counts_coins():
    a = [True] * 9 + [False] * 1 + [True] * 50
    b = [False] * 9 + [True] * 1 + [True] * 50
    assert statistics.mcnemar(a, b) == statistics.mcnemar(b, a) == pytest.approx(2 * (1 + 10) / 1024)
    assert statistics.mcnemar(a, a) == 1


def test_questions_needed_to_tell_74_from_76():
    """The textbook formula, and a simulation: the number found has the power that was asked for."""
    assert statistics.questions_needed(0.74, 0.76) == pytest.approx(7358, abs=3)
    n = statistics.questions_needed(0.74, 0.76, disagreement=0.2)
    assert n == pytest.approx(3923, abs=3)
    generator, runs, found = torch.Generator().manual_seed(1), 400, 0
    for _ in range(runs):
        u = torch.rand(n, generator=generator)
        only_a, only_b = int((u < 0.09).sum()), int((u > 0.89).sum())  # 9 % and 11 %: they differ on 20 %
        found += abs(only_b - only_a) / math.sqrt(only_a + only_b) > 1.96
    assert found / runs == pytest.approx(0.8, abs=0.07)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: perplexity.token_losses(nn.Module(), torch.zeros(3, 1, dtype=torch.long)), "tokens"),
        (lambda: perplexity.perplexity_ratio(torch.zeros(2, 3), torch.zeros(3, 3)), "baseline"),
        (lambda: statistics.mean_interval([]), "values: got none"),
        (lambda: statistics.share([]), "right: got no question"),
        (lambda: statistics.paired_difference([True], [True, False]), r"b: got shape \(2,\), expected 1 answers"),
        (lambda: statistics.mcnemar([], []), "a: got shape"),
        (lambda: statistics.questions_needed(0.8, 0.7), "low, high: got 0.8, 0.7"),
        (lambda: statistics.questions_needed(0.7, 1.2), "low, high"),
        (lambda: statistics.questions_needed(0.7, 0.8, power=0.2), "power: got 0.2"),
        (lambda: statistics.questions_needed(0.7, 0.8, disagreement=0.05), "disagreement: got 0.05, expected 0.1"),
        (lambda: statistics.questions_needed(0.7, 0.8, disagreement=0.9), r"disagreement: got 0.9.* to 0.5"),
    ],
)
def test_bad_statistics_are_named(call, said):
    with pytest.raises(ValueError, match=said):
        call()
