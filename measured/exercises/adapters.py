"""Exercises of ``chapters/migration/adapters.ipynb``. Shapes: C hidden size, r rank, S tokens."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from measured.exercises import exercise, named, normal


def _rows(down: Tensor, up: Tensor, shift: Tensor) -> Tensor:
    return torch.cat((down, up.T, shift[None]))


@exercise(
    "adapters/start",
    cases=named(
        "down up shift",
        (normal(2, 5, seed=1), normal(5, 2, seed=2), normal(5, seed=3)),
        (normal(3, 4, seed=4), normal(4, 3, seed=5), normal(4, seed=6)),
        (normal(1, 6, seed=7), normal(6, 1, seed=8), normal(6, seed=9)),
    ),
    mistakes="""
        _rows(down * 0, up * 0, shift * 0)
            It starts at the identity and stays there: with both matrices at zero each one's gradient has the other, or
            what comes through it, as a factor. Keep one.
        _rows(down * 0, up, shift * 0)
            Identity, but it does not learn. Behind `down` at zero, relu gives 0, so `up` has no gradient; and relu's
            slope at 0 counts as 0, so `down` has none either. Close the other end.
        _rows(down * 0, up, shift)
            Behind `down` at zero nothing comes through, and what is left is `shift`: no identity. And relu's slope at 0
            counts as 0, so that neither matrix would get a gradient.
        _rows(down, up * 0, shift)
            What comes out is y + shift. The shift has to begin at zero as well.
        _rows(down, up, shift * 0)
            That is the article's start with one vector less: `up` still adds what random numbers make of y.
        _rows(down, up, shift)
            Nothing is changed, so the first output is not y.
        _rows(down, 0.01 * up, 0.01 * shift)
            Near the identity is not the identity. Houlsby et al. begin so; here it has to be exact.
    """,
    hint="Set the output to y for every y, and ask of each number that you zero whether it had to be.",
)
def start(down: Tensor, up: Tensor, shift: Tensor) -> Tensor:
    """(2 r + 1, C): rows of ``down``, then columns of ``up``, then ``shift``, as ``y + up @ relu(down @ y) + shift``
    should begin, all numbers kept that may be: ``down`` (r, C), ``up`` (C, r), ``shift`` (C,)."""
    return _rows(down, up * 0, shift * 0)


def _model(seed: int, tied: str = "", packed: str = "") -> dict[str, Tensor]:
    """Weights by name; ``tied`` is a view of the embedding's memory, ``packed`` holds codes."""
    weights = {"embed": normal(6, 4, seed=seed), "q": normal(4, 4, seed=seed + 1), "down": normal(4, 6, seed=seed + 2)}
    if tied:
        weights[tied] = weights["embed"][:]
    if packed:
        weights[packed] = torch.arange(24, dtype=torch.uint8).view(4, 6)
    return weights


def _with(weights: dict, name: str, A: Tensor, B: Tensor, scale: float, ties: bool = True, codes: bool = True):
    """The merged weight; None where one of the two reasons that are asked about speaks against it."""
    weight = weights[name]
    shared = [other for other in weights.values() if other.data_ptr() == weight.data_ptr()]
    if (ties and len(shared) > 1) or (codes and not weight.is_floating_point()):
        return None
    return weight + scale * B @ A


@exercise(
    "adapters/merge",
    cases=named(
        "weights name A B alpha",
        (_model(1), "q", normal(2, 4, seed=20), normal(4, 2, seed=21), 4.0),
        (_model(5, tied="head"), "head", normal(2, 4, seed=22), normal(6, 2, seed=23), 2.0),
        (_model(9, tied="head"), "down", normal(1, 6, seed=24), normal(4, 1, seed=25), 3.0),
        (_model(13, packed="up"), "up", normal(3, 6, seed=26), normal(4, 3, seed=27), 1.0),
        (_model(17, tied="head"), "embed", normal(3, 4, seed=28), normal(6, 3, seed=29), 2.5),
        (_model(21, packed="up"), "embed", normal(4, 4, seed=30), normal(6, 4, seed=31), 5.0),
    ),
    mistakes="""
        _with(weights, name, A, B, alpha / len(A), ties=False)
            The head shares its memory with the embedding: adding to one changes the other. Refuse, whichever of the two
            is asked for. (They are two tensors over one memory: `is` does not see it, `data_ptr()` does.)
        _with(weights, name, A, B, alpha / len(A), codes=False)
            The weight holds codes of a quantised layer. A code plus a fraction is no code, and rounding it to the
            nearest loses what the adapter adds. Refuse.
        _with(weights, name, A, B, alpha / len(A), ties=False, codes=False)
            Two of these weights must not be merged into: one shares its memory with another, one holds codes.
        _with(weights, name, A, B, alpha)
            The scale is alpha / r, and r is the number of rows of A.
        _with(weights, name, A, B, 1.0)
            The scale alpha / r is missing.
        _with(weights, name, A, B, alpha / len(A)) if name in ("q", "down", "embed") and "head" not in weights else None
            That refuses every weight of a model with a tied head. Only the two that share memory are concerned.
    """,
    tolerance=1e-5,
    hint="W + alpha / r · B A; None where the weight's memory has a second owner, or where it is no float.",
)
def merge(weights: dict[str, Tensor], name: str, A: Tensor, B: Tensor, alpha: float) -> Tensor | None:
    """The weight ``name`` with the LoRA in it, (out, in), nothing given changed; None where it must not be merged."""
    return _with(weights, name, A, B, alpha / len(A))


def _packed(x, W, A, B, scales, lengths, adapters, base=True, last=False, at=None) -> Tensor:
    """The reference and, by its options, the usual ways to get it wrong."""
    out = []
    for tokens, adapter in zip(x.split(lengths), adapters, strict=True):
        y = tokens @ W.T if base else tokens @ W.T * 0
        if adapter >= 0 or last:
            y = y + scales[adapter if at is None else at] * tokens @ A[adapter].T @ B[adapter].T
        out.append(y)
    return torch.cat(out)


def _requests(seed: int, rank: int, lengths: list[int], adapters: list[int]) -> tuple:
    count = 3
    return (
        normal(sum(lengths), 5, seed=seed), normal(4, 5, seed=seed + 1), normal(count, rank, 5, seed=seed + 2),
        normal(count, 4, rank, seed=seed + 3), [0.5 + seed / 10 + i for i in range(count)], lengths, adapters,
    )  # fmt: skip


@exercise(
    "adapters/packed",
    cases=named(
        "x W A B scales lengths adapters",
        _requests(1, 2, [3, 1, 4], [2, -1, 0]),
        _requests(6, 1, [1, 1, 1, 2], [0, 1, 0, -1]),
        _requests(11, 3, [5, 2], [1, 2]),
    ),
    mistakes="""
        _packed(x, W, A, B, scales, lengths, adapters, last=True)
            An index of -1 takes the last adapter. A request with -1 has none.
        _packed(x, W, A, B, [1.0] * len(scales), lengths, adapters)
            Each adapter has a scale of its own.
        _packed(x, W, A, B, scales, lengths, adapters, at=0)
            Each adapter has a scale of its own; here all have that of the first.
        _packed(x, W, A, B, scales, lengths, adapters, base=False)
            The product with W is missing.
        x @ W.T
            That is the model without any adapter.
        packed(x, W, A, B, scales, lengths, adapters)[: len(lengths)]
            One row for each request is too few: every token has an output.
    """,
    tolerance=1e-5,
    hint="Give every token the number of its request's adapter first, and leave out those without.",
)
def packed(
    x: Tensor, W: Tensor, A: Tensor, B: Tensor, scales: list[float], lengths: list[int], adapters: list[int],
) -> Tensor:  # fmt: skip
    """(S, out) outputs of the tokens ``x`` (S, in) of several requests, one after the other.

    Request i has ``lengths[i]`` tokens and the adapter ``adapters[i]`` (-1: none) of ``A`` (n, r, in), ``B``
    (n, out, r), with ``scales[n]``.
    """
    return _packed(x, W, A, B, scales, lengths, adapters)


def _at(path: Sequence, level: float, between: bool = True) -> float:
    for (new, old), (lower, later) in pairwise(path):
        if lower <= level < new:
            share = (new - level) / (new - lower) if between else 1.0
            return old + share * (later - old)
    return path[0][1]


def _level(one: Sequence, other: Sequence) -> float:
    return max(min(new for new, _ in one), min(new for new, _ in other))


def _unfair(reports: Sequence, **how: bool) -> list[int]:
    wrong = []
    for number, (one, other) in enumerate(reports):
        level = _level(one, other)
        if _at(one, level, **how) >= _at(other, level, **how):
            wrong.append(number)
    return wrong


_REPORTS = [
    # The first has learned less, and at its own end has forgotten more than the second had when it was there.
    ([[3.0, 1.0], [2.6, 1.10], [2.4, 1.20]], [[3.0, 1.0], [2.5, 1.05], [2.3, 1.10], [2.0, 1.40]]),
    # It has forgotten less at an equal loss too.
    ([[3.0, 1.0], [2.5, 1.02], [2.2, 1.05]], [[3.0, 1.0], [2.4, 1.10], [1.9, 1.30]]),
    # Between two looks.
    ([[3.0, 1.0], [2.8, 1.10]], [[3.0, 1.0], [2.0, 1.30]]),
    # It has learned more as well.
    ([[3.0, 1.0], [2.0, 1.10], [1.5, 1.20]], [[3.0, 1.0], [2.0, 1.20], [1.8, 1.30]]),
    # Only rounding up to the next look makes it look fair.
    ([[3.0, 1.0], [2.0, 1.28]], [[3.0, 1.0], [2.5, 1.05], [1.5, 1.45]]),
]


@exercise(
    "adapters/unfair",
    cases=[
        {"reports": _REPORTS},
        {"reports": [_REPORTS[i] for i in (1, 4, 3)]},
        {"reports": [_REPORTS[i] for i in (3, 2, 0, 1)]},
    ],
    mistakes="""
        [n for n, (one, other) in enumerate(reports) if one[-1][1] >= other[-1][1]]
            That compares the ends. All reports say that the first ends lower; the question is what it had learned.
        [n for n, (one, other) in enumerate(reports) if one[-1][0] > other[-1][0]]
            Those are the ones in which the first has learned less. Some of them have forgotten less at an equal loss
            too: look at the point of the other path where its loss on the new text was the same.
        _unfair(reports, between=False)
            The level lies between two looks: take the straight line between them, not the look after it.
        [n for n in range(len(reports)) if n not in _unfair(reports)]
            Those hold. The others are asked for.
        [n + 1 for n in _unfair(reports)]
            Count reports from 0.
        len(_unfair(reports))
            That is how many there are. Which ones?
    """,
    hint="The level is the lowest loss on the new text that both paths reach. Read both old losses there.",
)
def unfair(reports: Sequence) -> list[int]:
    """Numbers of the reports whose first path has not forgotten less at an equal loss on the new text.

    A report is two paths, a path a list of [new, old] losses from before training on; each report says that the first
    forgets less, because its last old loss is lower.
    """
    return _unfair(reports)
