"""Intervals: of a mean, of a share of right answers, and of the difference of two models on the same questions.

Book: ``chapters/performance/accuracy.ipynb``; every chapter that trains. Sources: Wilson 1927 for the interval of a
share, McNemar 1947 for the paired test, Miller 2024 (arXiv 2411.00640) for all of it together.

The distributions are scipy's, imported where they are needed: recordings are made on machines that may not have it.
"""

import math
import statistics
from collections.abc import Iterable
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


def mean_interval(values: Iterable[float]) -> Mean:
    """Mean of independent values, such as one a seed, with Student's t interval (no width if there is one value).

    For two designs with the same seeds, pass their differences. Raises ValueError for no value, or one that is not
    finite.
    """
    numbers = _numbers("values", values).tolist()
    centre, n = statistics.mean(numbers), len(numbers)
    if n == 1:
        return Mean(centre, centre, centre, 1)
    from scipy.stats import t

    half = float(t.ppf(0.975, n - 1)) * statistics.stdev(numbers) / math.sqrt(n)
    return Mean(centre, centre - half, centre + half, n)


def share(right: Iterable[bool]) -> Mean:
    """The share of right answers with Wilson's interval, which never leaves 0 to 1, not even with few questions.

    ``right`` holds one truth value a question. Raises ValueError for no question, or what is no truth value.
    """
    answers = _truths("right", right)
    from scipy.stats import binomtest

    n, hits = len(answers), int(answers.sum())
    interval = binomtest(hits, n).proportion_ci(method="wilson")
    return Mean(hits / n, float(interval.low), float(interval.high), n)


def paired_difference(a: Iterable[bool], b: Iterable[bool], *, resamples: int = 10_000, seed: int = 0) -> Mean:
    """Share of right answers of ``a`` minus that of ``b`` on the same questions, with a bootstrap interval.

    Questions are drawn with replacement and both answers of a question go together: a question that is hard for both
    then says nothing about the difference. The interval is the middle 95 % of the resampled differences. Raises
    ValueError for different numbers of answers, none, or what is no truth value.
    """
    check.whole(1, resamples=resamples)
    gap = _gap(a, b).numpy()  # (n,): 1, 0 or -1
    centre, n = gap.mean().item(), len(gap)
    if (gap == gap[0]).all():
        return Mean(centre, centre, centre, n)
    from scipy.stats import bootstrap

    rows = max(1, 10_000_000 // n)  # resamples at once: 80 MB, however many questions there are
    options = {"n_resamples": resamples, "method": "percentile", "batch": rows, "rng": np.random.default_rng(seed)}
    low, high = bootstrap((gap,), np.mean, **options).confidence_interval
    return Mean(centre, float(low), float(high), n)


def mcnemar(a: Iterable[bool], b: Iterable[bool]) -> float:
    """p-value of "a and b are equally good" from the questions that only one of them got right (exact, two-sided).

    Under that hypothesis each of these questions is a fair coin. Questions that both got right or wrong do not count.
    Raises ValueError as :func:`paired_difference`.
    """
    gap = _gap(a, b)
    only_a, only_b = int((gap == 1).sum()), int((gap == -1).sum())
    if only_a + only_b == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(only_a, only_a + only_b).pvalue)


def questions_needed(low: float, high: float, *, disagreement: float | None = None, power: float = 0.8) -> int:
    """How many questions it takes to tell two shares of right answers apart (5 % level, two-sided).

    ``low`` and ``high`` are the two true shares, ``power`` is how often the difference should be found.
    ``disagreement`` is None if each model answers its own questions; otherwise both answer the same ones, and this is
    the share of questions that exactly one of them gets right. Returns questions for each of the two models, by the
    usual normal approximation. Raises ValueError for shares outside 0 to 1 or not rising, a disagreement smaller than
    the difference or above what the shares allow, and a power below 0.5 or from 1 on.
    """
    check.between(0, 1, low=low, high=high)
    if not low < high:
        raise ValueError(f"low, high: got {low}, {high}, expected low < high")
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


def _gap(a: Iterable[bool], b: Iterable[bool]) -> Tensor:
    """(n,) float64: 1 where only ``a`` is right, -1 where only ``b`` is, else 0."""
    first, second = _truths("a", a), _truths("b", b)
    if len(first) != len(second):
        raise ValueError(f"b: got {len(second)} answers, expected {len(first)}, to the same questions as a")
    return first - second


def _truths(name: str, values: Iterable[bool]) -> Tensor:
    found = _numbers(name, values)
    other = found[(found != 0) & (found != 1)]
    if len(other):
        raise ValueError(f"{name}: got {other[0]:g}, expected one truth value (True or False) a question")
    return found


def _numbers(name: str, values: Iterable[float]) -> Tensor:
    """(n,) float64 from a list, a generator, an array or a tensor."""
    try:
        found = torch.tensor(values.tolist() if hasattr(values, "tolist") else list(values), dtype=torch.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name}: got {values!r:.80}, expected numbers in one row") from error
    if found.ndim != 1 or not len(found):
        raise ValueError(f"{name}: got shape {tuple(found.shape)}, expected at least one number, in one row")
    if not found.isfinite().all():
        raise ValueError(f"{name}: got {found[~found.isfinite()][0]:g}, expected finite numbers")
    return found
