"""The load-balancing loss of transformers' Mixtral and ours: the same values, the same gradients, with padding."""

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from dslib.architecture.balance import switch_loss


def some_logits(tokens, experts, seed=0):
    """Uneven ones: every expert has its own level."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, experts, generator=generator) + torch.randn(experts, generator=generator)


def ours(logits, top_k, mask=None):
    scores = logits.softmax(-1)
    return switch_loss(scores, scores.topk(top_k, dim=-1).indices, mask)


@pytest.mark.parametrize(("experts", "top_k"), [(4, 1), (8, 2), (16, 2), (64, 6), (5, 5)])
@pytest.mark.parametrize("padded", [False, True])
def test_one_layer(experts, top_k, padded):
    mask = torch.ones(3, 20, dtype=torch.long)
    if padded:
        mask[0, 15:] = mask[2, :7] = 0
    logits = some_logits(60, experts).requires_grad_()
    wanted = load_balancing_loss_func((logits,), experts, top_k, mask if padded else None)
    got = ours(logits, top_k, mask if padded else None)
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (got, wanted)]
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-5)
    # All experts chosen is always even; otherwise these logits are not.
    assert (gradients[0].abs().max() > 1e-4 and wanted.item() > 1.05 * top_k) or experts == top_k


def test_theirs_pools_the_layers():
    """Two layers as one long list of tokens: what is busy in one may hide what is idle in the other."""
    layers = some_logits(40, 8, seed=1), some_logits(40, 8, seed=2)
    pooled = load_balancing_loss_func(layers, 8, 2)
    torch.testing.assert_close(ours(torch.cat(layers), 2), pooled)
    mean = sum(ours(logits, 2) for logits in layers) / 2
    assert mean > 1.05 * pooled
