"""Perplexity on text, with an interval over slices of it, and two models compared on the same slices.

Book: ``chapters/architecture/decoder.ipynb``, ``chapters/architecture/int4.ipynb``.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dslib.architecture.decoder import Decoder
from dslib.performance.statistics import mean_interval


@dataclass(frozen=True)
class Perplexity:
    """exp(mean loss) over slices of text, with a 95 % interval over slices.

    Attributes:
        value: perplexity; a model that guesses among k equally likely tokens has perplexity k.
        low, high: 95 % interval (Student's t over the mean losses of the slices); equal to ``value`` if n = 1.
        n: number of slices.
    """

    value: float
    low: float
    high: float
    n: int


@torch.inference_mode()
def token_losses(model: Decoder, tokens: Tensor) -> Tensor:
    """Loss of every token but the first, in nats: (n, T) token ids -> (n, T - 1), float32.

    Raises:
        ValueError: fewer than two tokens a slice.
    """
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise ValueError(f"tokens: got shape {tuple(tokens.shape)}, expected (slices, at least 2 tokens)")
    # One slice at a time: the logits of a large vocabulary are the biggest tensor here.
    rows = [
        F.cross_entropy(model(row.unsqueeze(0))[0, :-1].float(), row[1:], reduction="none")
        for row in tokens.to(model.embed_tokens.weight.device)
    ]
    return torch.stack(rows)


def perplexity(losses: Tensor) -> Perplexity:
    """Perplexity of (n, T) token losses, every slice counting the same; the slices are the sample."""
    mean = mean_interval(losses.double().mean(dim=1).tolist())
    return Perplexity(math.exp(mean.value), math.exp(mean.low), math.exp(mean.high), mean.n)


def perplexity_ratio(losses: Tensor, baseline: Tensor) -> Perplexity:
    """How many times the baseline's perplexity, from losses on the same slices: (n, T) each.

    The interval is of the paired differences, so it is not widened by some slices being harder than others.

    Raises:
        ValueError: the two have different shapes.
    """
    if losses.shape != baseline.shape:
        raise ValueError(f"baseline: got shape {tuple(baseline.shape)}, expected {tuple(losses.shape)}")
    return perplexity(losses - baseline)
