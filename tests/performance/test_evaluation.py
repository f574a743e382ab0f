"""Losses and perplexities, against torch's own loss and numbers worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from dslib.architecture import decoder
from dslib.performance import evaluation


def test_losses_are_the_cross_entropy_of_the_next_token():
    model = decoder.build(decoder.preset("tiny"), seed=0).eval()
    tokens = torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(0))
    want = F.cross_entropy(model(tokens)[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    assert torch.allclose(evaluation.token_losses(model, tokens), want, atol=1e-5)


def test_perplexity_of_a_known_sample():
    losses = torch.tensor([[1.0, 3.0], [2.0, 2.0], [3.0, 3.0]])  # means 2, 2, 3: sd 0.57735, t(2) = 4.303
    result = evaluation.perplexity(losses)
    half = 4.303 * 0.5773503 / math.sqrt(3)
    assert result.n == 3 and result.value == pytest.approx(math.exp(7 / 3))
    assert (result.low, result.high) == pytest.approx((math.exp(7 / 3 - half), math.exp(7 / 3 + half)), rel=1e-4)


def test_one_slice_has_no_interval():
    result = evaluation.perplexity(torch.full((1, 4), 2.0))
    assert result.value == result.low == result.high == pytest.approx(math.exp(2))


def test_a_constant_gap_is_a_certain_ratio_however_hard_the_slices_are():
    base = torch.tensor([[1.0, 2.0], [5.0, 6.0], [0.1, 0.2]])
    result = evaluation.perplexity_ratio(base + math.log(3), base)
    assert (result.value, result.low, result.high) == pytest.approx((3, 3, 3), rel=1e-5)


def test_bad_input_is_named():
    model = decoder.build(decoder.preset("tiny"), seed=0)
    with pytest.raises(ValueError, match="tokens"):
        evaluation.token_losses(model, torch.zeros(3, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="baseline"):
        evaluation.perplexity_ratio(torch.zeros(2, 3), torch.zeros(3, 3))


def test_the_interval_of_a_mean_is_students():
    """Worked by hand: mean 3, standard deviation 1, n 3, so 3 -+ 4.303 / sqrt(3)."""
    mean = evaluation.mean_interval([2.0, 3.0, 4.0])
    assert (mean.value, mean.n) == (3.0, 3)
    assert mean.high - 3 == pytest.approx(4.303 / 3**0.5) == 3 - mean.low
    assert str(evaluation.mean_interval([0.5])) == "0.500 (0.500 to 0.500)"
    with pytest.raises(ValueError, match="values: got none"):
        evaluation.mean_interval([])
