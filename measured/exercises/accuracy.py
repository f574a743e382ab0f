"""Exercises of ``chapters/performance/accuracy.ipynb``."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from measured.exercises import exercise

Z = 1.96
_VOCABULARY = {"A": 0, "B": 1, "C": 2, "D": 3, " A": 4, " B": 5, " C": 6, " D": 7, " The": 8}
_ANOTHER = {" D": 0, " The": 1, " B": 2, " A": 3, "C": 4, "A": 5, "B": 6, "D": 7, " C": 8}


@exercise(
    "accuracy/interval",
    cases=[(0, 5), (1, 5), (5, 5), (68, 281), (4, 15), (208, 272)],
    mistakes="""
        _normal(right, n)
            That is p plus or minus 1.96 standard errors. It leaves 0 to 1 when p is near an end, and has no width at
            all when no answer is right, as if five questions were proof. Wilson asks which true shares would make the
            result unsurprising.
        (max(0.0, _normal(right, n)[0]), min(1.0, _normal(right, n)[1]))
            Cutting the normal interval at 0 and 1 hides the fault and keeps it: none of five right still gives an
            interval of no width.
        _one_error(right, n)
            That is one standard error to each side, which holds the truth 68 times in 100.
        _centre_kept(right, n)
            The width is right, the centre is not: it moves from p towards one half, by more the fewer questions there
            are.
    """,
    tolerance=1e-3,
    hint="Compare centre and half-width with the formula, term by term, for 0 of 5.",
)
def interval(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of ``right`` of ``n``, with z = 1.96."""
    p = right / n
    centre = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    return centre - half, centre + half


@exercise(
    "accuracy/paired",
    cases=[
        {"a": [1, 1, 0, 1, 0, 1, 1, 0], "b": [1, 0, 0, 1, 0, 1, 0, 0]},
        {"a": [0, 1] * 20, "b": [0, 1] * 18 + [1, 1, 0, 1]},
        {"a": [1] * 30 + [0] * 20, "b": [1] * 25 + [0] * 20 + [1] * 5},
    ],
    mistakes="""
        _unpaired(a, b)
            That is the error for two separate sets of questions. Here both models answered the same ones, and a
            question that is hard for both says nothing about the difference: take the deviation of a - b.
        (difference(a, b)[0], difference(a, b)[1] * math.sqrt(len(a)))
            That is the deviation of a single question; a mean over n of them varies √n times less.
        difference(b, a)
            The sign is turned round: the difference is the first model minus the second.
    """,
    hint="First the list of differences, one a question; then its mean; then the deviation of that list, over √n.",
)
def difference(a: Sequence[int], b: Sequence[int]) -> tuple[float, float]:
    """Mean of a - b over the questions, and its standard error (dividing by n)."""
    gaps = [x - y for x, y in zip(a, b, strict=True)]
    n, mean = len(gaps), sum(gaps) / len(gaps)
    return mean, math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / n / n)


@exercise(
    "accuracy/choose",
    cases=[
        ([[-4.0], [-0.5] * 9, [-3.0, -0.1], [-2.0, -2.0]],),
        ([[-0.2, -2.5], [-1.0, -0.9], [-1.2], [-0.9, -0.8, -0.7, -1.0]],),
        ([[-0.3, -0.2, -6.0], [-1.0, -1.1, -1.2], [-0.25, -2.5]],),
        ([[-1.0, -1.0, -1.0, -1.0], [-0.1, -0.1, -0.1, -2.8]],),
    ],
    mistakes="""
        _best(token_logs, sum)
            That compares sums. Every token makes a sum smaller, so the shortest choice has a head start; here the mean
            is asked for.
        _best(token_logs, lambda logs: -sum(logs) / len(logs))
            The least likely choice is taken: log-probabilities are negative, and the largest is nearest to 0.
        _best(token_logs, lambda logs: sum(map(math.exp, logs)) / len(logs))
            That is the mean of the probabilities. Likelihoods multiply, so their logarithms are averaged.
        _best(token_logs, lambda logs: logs[0])
            Only the first token of each choice is looked at.
        _best(token_logs, _median)
            That is the median. It does not see a token that is most unlikely, and the whole choice is then unlikely.
    """,
    hint="One number for each choice, its sum over its number of tokens; then the index of the largest.",
)
def choose(token_logs: Sequence[Sequence[float]]) -> int:
    """Index of the choice whose tokens are the most likely on average, from log-probabilities."""
    return _best(token_logs, lambda logs: sum(logs) / len(logs))


@exercise(
    "accuracy/letter",
    cases=[
        {"logits": [5.0, 1.0, 2.0, 0.0, 1.0, 3.0, 2.0, 0.5, 4.0], "vocabulary": _VOCABULARY},
        {"logits": [0.0, 7.0, 2.0, 1.0, 3.0, 0.0, 2.0, 0.5, 9.0], "vocabulary": _VOCABULARY},
        {"logits": [4.0, 9.0, 1.0, 5.0, 6.0, 2.0, 8.0, 0.0, 3.0], "vocabulary": _ANOTHER},
    ],
    mistakes="""
        max(range(4), key=lambda at: logits[vocabulary["ABCD"[at]]])
            Those are the letters without a space. After 'Answer:' the text goes on with ' A', and that is another token
            with another logit.
        _any_token(logits, vocabulary)
            The most likely of all tokens need not be a letter. Compare the four letters with each other only.
    """,
    hint="Look up four ids, compare four logits, return the index of the largest.",
)
def letter(logits: Sequence[float], vocabulary: Mapping[str, int]) -> int:
    """Index of the most likely letter behind "Answer:", where a space belongs to the word that follows it."""
    return max(range(4), key=lambda at: logits[vocabulary[f" {'ABCD'[at]}"]])


def _best(items: Sequence, value: Callable) -> int:
    return max(range(len(items)), key=lambda at: value(items[at]))


_median = statistics.median


def _normal(right: int, n: int) -> tuple[float, float]:
    p = right / n
    half = Z * math.sqrt(p * (1 - p) / n)
    return p - half, p + half


def _one_error(right: int, n: int) -> tuple[float, float]:
    p = right / n
    half = math.sqrt(p * (1 - p) / n + 1 / (4 * n * n)) / (1 + 1 / n)
    centre = (p + 1 / (2 * n)) / (1 + 1 / n)
    return centre - half, centre + half


def _centre_kept(right: int, n: int) -> tuple[float, float]:
    low, high = interval(right, n)
    return right / n - (high - low) / 2, right / n + (high - low) / 2


def _unpaired(a: Sequence[int], b: Sequence[int]) -> tuple[float, float]:
    p, q, n = sum(a) / len(a), sum(b) / len(b), len(a)
    return p - q, math.sqrt((p * (1 - p) + q * (1 - q)) / n)


def _any_token(logits: Sequence[float], vocabulary: Mapping[str, int]) -> int:
    best = max(vocabulary.values(), key=lambda token: logits[token])
    return next((at for at in range(4) if vocabulary[f" {'ABCD'[at]}"] == best), -1)
