"""Intervals: of a mean, of a share of right answers, and of the difference of two models on the same questions.

Book: ``chapters/performance/accuracy.ipynb``; every chapter that trains. Sources: Wilson 1927 for the interval of a
share, McNemar 1947 for the paired test, Miller 2024 (arXiv 2411.00640) for all of it together.

The distributions are scipy's, imported where they are needed: recordings are made on machines that may not have it.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dslib import check


@dataclass(frozen=True)
class Mean:
    """A mean with its 95 % interval; ``n`` is what it is a mean of (seeds, slices, questions)."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"

    def percent(self, sign: str = "") -> str:
        """In per cent, e.g. ``24.2 (19.6 to 29.5)``; ``sign="+"`` for a difference."""
        value, low, high = (f"{100 * x:{sign}.1f}" for x in (self.value, self.low, self.high))
        return f"{value} ({low} to {high})"


def mean_interval(values: Sequence[float]) -> Mean:
    """Mean of independent values, such as one a seed, with Student's t interval (no width if there is one value).

    For two designs with the same seeds, pass their differences.

    Raises:
        ValueError: no value.
    """
    if not values:
        raise ValueError("values: got none, expected at least one")
    centre, n = statistics.fmean(values), len(values)
    if n == 1:
        return Mean(centre, centre, centre, 1)
    from scipy.stats import t

    half = float(t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return Mean(centre, centre - half, centre + half, n)


def share(right: Sequence[bool] | Tensor) -> Mean:
    """The share of right answers with Wilson's interval, which never leaves 0 to 1, not even with few questions.

    Args:
        right: one truth value a question.

    Raises:
        ValueError: no question.
    """
    n, hits = len(right), int(sum(bool(one) for one in right))
    if n == 0:
        raise ValueError("right: got no question, expected at least one")
    from scipy.stats import binomtest

    interval = binomtest(hits, n).proportion_ci(method="wilson")
    return Mean(hits / n, interval.low, interval.high, n)


def paired_difference(
    a: Sequence[bool] | Tensor, b: Sequence[bool] | Tensor, *, resamples: int = 10_000, seed: int = 0
) -> Mean:
    """Share of right answers of ``a`` minus that of ``b`` on the same questions, with a bootstrap interval.

    Questions are drawn with replacement and both answers of a question go together: a question that is hard for both
    then says nothing about the difference. The interval is the middle 95 % of the resampled differences.

    Raises:
        ValueError: different numbers of answers, or none.
    """
    from scipy.stats import bootstrap

    gap = (_answers("a", a) - _answers("b", b, len(a))).numpy()  # (n,): 1, 0 or -1
    if (gap == gap[0]).all():
        return Mean(gap[0].item(), gap[0].item(), gap[0].item(), len(gap))
    found = bootstrap((gap,), np.mean, n_resamples=resamples, method="percentile", rng=np.random.default_rng(seed))
    low, high = found.confidence_interval
    return Mean(gap.mean().item(), float(low), float(high), len(gap))


def mcnemar(a: Sequence[bool] | Tensor, b: Sequence[bool] | Tensor) -> float:
    """p-value of "a and b are equally good" from the questions that only one of them got right (exact, two-sided).

    Under that hypothesis each of these questions is a fair coin. Questions that both got right or wrong do not count.

    Raises:
        ValueError: different numbers of answers, or none.
    """
    gap = _answers("a", a) - _answers("b", b, len(a))
    only_a, only_b = int((gap == 1).sum()), int((gap == -1).sum())
    if only_a + only_b == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(only_a, only_a + only_b).pvalue)


def questions_needed(low: float, high: float, *, disagreement: float | None = None, power: float = 0.8) -> int:
    """How many questions it takes to tell two shares of right answers apart (5 % level, two-sided).

    Args:
        low, high: the two true shares.
        disagreement: None if each model answers its own questions; otherwise both answer the same ones, and this is the
            share of questions that exactly one of them gets right.
        power: how often the difference should be found.

    Returns:
        Questions for each of the two models, by the usual normal approximation.

    Raises:
        ValueError: shares outside 0 to 1 or equal; a disagreement smaller than the difference, or above what the shares
            allow; a power not between 0.5 and 1.
    """
    if not 0 <= low < high <= 1:
        raise ValueError(f"low, high: got {low}, {high}, expected 0 <= low < high <= 1")
    check.below(0.5, 1, power=power)
    gap, (z_level, z_power) = high - low, map(statistics.NormalDist().inv_cdf, (0.975, power))
    if disagreement is None:
        mean = (low + high) / 2
        by_chance, by_truth = 2 * mean * (1 - mean), low * (1 - low) + high * (1 - high)
    else:
        most = min(low + high, 2 - low - high)
        # Half a unit in the last place of a sum of two shares must not count.
        if not gap - 1e-9 <= disagreement <= most + 1e-9:
            raise ValueError(f"disagreement: got {disagreement}, expected {gap:.3g} (the difference) to {most:.3g}")
        by_chance, by_truth = disagreement, max(0.0, disagreement - gap * gap)
    return math.ceil(((z_level * math.sqrt(by_chance) + z_power * math.sqrt(by_truth)) / gap) ** 2)


def _answers(name: str, right: Sequence[bool] | Tensor, n: int | None = None) -> Tensor:
    """Truth values as (n,) float64; ``n`` is how many there should be."""
    values = torch.as_tensor(right).double()
    if values.ndim != 1 or len(values) == 0 or (n is not None and len(values) != n):
        wanted = "one truth value a question" if n is None else f"{n} answers, to the same questions"
        raise ValueError(f"{name}: got shape {tuple(values.shape)}, expected {wanted}")
    return values
