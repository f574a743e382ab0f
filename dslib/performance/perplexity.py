"""Perplexity on text, with an interval over slices of it, and two models compared on the same slices.

Book: ``chapters/architecture/decoder.ipynb``, ``chapters/architecture/int4.ipynb``.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dslib.architecture.decoder import Decoder
from dslib.performance.statistics import mean_interval


@dataclass(frozen=True)
class Perplexity:
    """exp(mean loss) over ``n`` slices of text, with a 95 % interval over slices.

    A model that guesses among k equally likely tokens has perplexity k. The interval (``low`` to ``high``) is Student's
    t over the mean losses of the slices; it has no width if n = 1. What is too large for a float is infinite.
    """

    value: float
    low: float
    high: float
    n: int


@torch.inference_mode()
def token_losses(model: Decoder, tokens: Tensor) -> Tensor:
    """Loss of every token but the first, in nats: (n, T) token ids -> (n, T - 1), float32.

    Raises ValueError for no slice, or fewer than two tokens a slice.
    """
    if tokens.ndim != 2 or tokens.shape[1] < 2 or not len(tokens):
        raise ValueError(f"tokens: got shape {tuple(tokens.shape)}, expected (slices, at least 2 tokens)")
    # One slice at a time: the logits of a large vocabulary are the biggest tensor here.
    rows = [
        F.cross_entropy(model(row.unsqueeze(0))[0, :-1].float(), row[1:], reduction="none")
        for row in tokens.to(model.embed_tokens.weight.device)
    ]
    return torch.stack(rows)


def perplexity(losses: Tensor) -> Perplexity:
    """Perplexity of (n, T) token losses, every slice counting the same; the slices are the sample.

    Raises ValueError for another shape, and for losses that are not finite.
    """
    losses = torch.as_tensor(losses, dtype=torch.float64)
    if losses.ndim != 2 or not losses.numel():
        raise ValueError(f"losses: got shape {tuple(losses.shape)}, expected (slices, losses), at least one of each")
    if not losses.isfinite().all():
        raise ValueError(f"losses: got {losses[~losses.isfinite()][0]:g}, expected finite numbers")
    mean = mean_interval(losses.mean(1))
    # torch's exp, because Python's raises where the result is too large for a float.
    numbers = torch.tensor([mean.value, mean.low, mean.high], dtype=torch.float64).exp()
    return Perplexity(*numbers.tolist(), mean.n)


def perplexity_ratio(losses: Tensor, baseline: Tensor) -> Perplexity:
    """How many times the baseline's perplexity, from losses on the same slices: (n, T) each.

    The interval is of the paired differences, so it is not widened by some slices being harder than others. Raises
    ValueError as :func:`perplexity`, and for two different shapes.
    """
    losses, baseline = (torch.as_tensor(one, dtype=torch.float64) for one in (losses, baseline))
    if losses.shape != baseline.shape:
        raise ValueError(f"baseline: got shape {tuple(baseline.shape)}, expected {tuple(losses.shape)}")
    return perplexity(losses - baseline)
