"""How well a model predicts text it was not trained on, with an interval.

Book: ``chapters/architecture/decoder.ipynb`` and ``chapters/architecture/moe.ipynb``; the accuracy chapter will add
multiple-choice scoring.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dslib.architecture.decoder import Decoder


@dataclass(frozen=True)
class Mean:
    """A mean with its 95 % interval (Student's t); ``low`` and ``high`` equal ``value`` if n = 1."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


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


# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom; beyond, the normal one is close enough.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def mean_interval(values: Sequence[float]) -> Mean:
    """Mean of independent values, such as one a seed. For two designs with the same seeds, pass their differences.

    Raises:
        ValueError: no value.
    """
    if not values:
        raise ValueError("values: got none, expected at least one")
    centre, n = statistics.fmean(values), len(values)
    if n == 1:
        return Mean(centre, centre, centre, 1)
    t = _T95[n - 2] if n - 2 < len(_T95) else 1.96
    half = t * statistics.stdev(values) / math.sqrt(n)
    return Mean(centre, centre - half, centre + half, n)


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
