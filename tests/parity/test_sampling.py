"""Which tokens our filters keep, and with which probability: as transformers' logits warpers do."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from dslib.architecture.generation import Sampling


@pytest.fixture
def drawn_from(monkeypatch):
    """The probabilities that ``choose`` hands to the draw, normalised."""

    def probabilities(sampling, logits):
        seen = []
        real = torch.multinomial
        with monkeypatch.context() as patch:
            patch.setattr(torch, "multinomial", lambda p, *args, **kwargs: seen.append(p) or real(p, *args, **kwargs))
            sampling.choose(logits, torch.Generator().manual_seed(0))
        (p,) = seen
        return p / p.sum(-1, keepdim=True)

    return probabilities


def warped(logits, temperature, top_k, top_p):
    """transformers' order: temperature, top-k, top-p."""
    warpers = [TemperatureLogitsWarper(float(temperature))]
    warpers += [TopKLogitsWarper(top_k)] if top_k is not None else []
    warpers += [TopPLogitsWarper(top_p)] if top_p is not None else []
    for warper in warpers:
        logits = warper(None, logits)
    return logits.softmax(-1)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [None, 1, 5, 200, 1000])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.5, 0.9, 0.999, 1.0])
def test_filters_equal_transformers_warpers(drawn_from, temperature, top_k, top_p):
    logits = 3 * torch.randn(6, 200, generator=torch.Generator().manual_seed(0))
    got = drawn_from(Sampling(temperature, top_k, top_p), logits)
    wanted = warped(logits, temperature, top_k, top_p)
    assert torch.equal(got > 0, wanted > 0)
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-4)


def test_top_k_keeps_ties_as_transformers_does(drawn_from):
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    got = drawn_from(Sampling(1.0, top_k=2), logits)
    assert (got > 0).tolist() == [[False, True, True, True, True, False]]
    torch.testing.assert_close(got, warped(logits, 1.0, 2, None))


def test_top_p_by_hand(drawn_from):
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for top_p, kept in [(0.4, 1), (0.6, 2), (0.9, 3), (0.96, 4)]:
        assert int((drawn_from(Sampling(1.0, top_p=top_p), logits) > 0).sum()) == kept


def test_draws_follow_the_probabilities():
    """20,000 draws: a share differs from its probability by less than five standard deviations."""
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20_000, -1)
    tokens = Sampling(2.0, top_k=3).choose(logits, torch.Generator().manual_seed(0))
    share = torch.bincount(tokens, minlength=4) / 20_000
    wanted = warped(logits[:1], 2.0, 3, None)[0]
    assert ((share - wanted).abs() <= 5 * (wanted * (1 - wanted) / 20_000).sqrt()).all()
