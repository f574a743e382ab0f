"""Exercises of ``chapters/architecture/balance.ipynb``. Shapes: L layers, B sequences, T or N tokens, E experts."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from measured.exercises import exercise, named, normal


def _choices(*shape: int, experts: int, top_k: int, seed: int) -> Tensor:
    """int64, (*shape, k): the experts with the largest of some numbers that favour the first ones."""
    lean = torch.linspace(1.5, 0, experts)
    return (normal(*shape, experts, seed=seed) + lean).topk(top_k).indices


def _mask(*shape: int, seed: int) -> Tensor:
    """bool: True where a token is real, three quarters of them, and always the first."""
    mask = normal(*shape, seed=seed) > -0.67
    mask[..., 0] = True
    return mask


def _loads(indices: Tensor, mask: Tensor, experts: int) -> Tensor:
    """(L, N, k) choices -> float64, (L, E): how often real tokens chose each expert of each layer."""
    return (F.one_hot(indices, experts) * mask[:, None, None]).sum((1, 2)).double()


def _below(loads: Tensor) -> Tensor:
    """By how much each load lies below the mean of its row: (L, E) -> (L, E)."""
    return loads.mean(1, keepdim=True) - loads


@exercise(
    "balance/bias-update",
    cases=[
        {
            "bias": torch.zeros(2, 4, dtype=torch.float64),
            "indices": torch.tensor([[[0, 1], [0, 2], [0, 1], [3, 2]], [[3, 1], [3, 2], [3, 0], [3, 2]]]),
            "mask": torch.tensor([True, True, True, False]),
            "speed": 0.001,
        },
        {
            "bias": 0.1 * normal(3, 8, seed=0, dtype=torch.float64),
            "indices": _choices(3, 24, experts=8, top_k=2, seed=1),
            "mask": _mask(24, seed=2),
            "speed": 0.01,
        },
    ],
    mistakes="""
        2 * bias - new_bias(bias, indices, mask, speed)
            The wrong way round: an expert with too many tokens has to become *less* likely to be chosen.
        bias + speed * _below(_loads(indices, mask, bias.shape[1]).sum(0, keepdim=True)).sign()
            You added up the loads of all layers. Expert 3 of one layer is another network than expert 3 of the next:
            each layer is balanced by itself.
        new_bias(bias, indices, mask | True, speed)
            Padding is counted. Only tokens where `mask` is True have a load.
        bias + speed * _below(_loads(indices, mask, bias.shape[1]))
            The step is proportional to the difference. Here only its sign counts: a bias moves by `speed`, or stays.
        bias + speed * (mask.sum() / bias.shape[1] - _loads(indices, mask, bias.shape[1])).sign()
            The mean load is tokens times k over experts: each token brings k assignments.
        speed * _below(_loads(indices, mask, bias.shape[1])).sign()
            That is the step. The new bias is the old one plus the step.
    """,
    hint="In each layer: how often real tokens chose each expert; compare with the layer's mean; move by speed.",
)
def new_bias(bias: Tensor, indices: Tensor, mask: Tensor, speed: float) -> Tensor:
    """Bias after the update: (L, E) bias, (L, N, k) choices, (N,) bool mask -> (L, E)."""
    return bias + speed * _below(_loads(indices, mask, bias.shape[1])).sign()


def _shares(scores: Tensor, mask: Tensor, top_k: int) -> Tensor:
    """f of each sequence: (B, T, E) and (B, T) -> (B, E)."""
    chosen = F.one_hot(scores.topk(top_k).indices, scores.shape[-1]).sum(2)  # (B, T, E)
    return (chosen * mask[..., None]).sum(1) * scores.shape[-1] / (top_k * mask.sum(1, keepdim=True))


def _means(scores: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real tokens of each sequence: (B, T, E) and (B, T) -> (B, E)."""
    return (scores * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def _scores(*shape: int, seed: int) -> Tensor:
    return (normal(*shape, seed=seed, dtype=torch.float64) + torch.linspace(1, 0, shape[-1])).sigmoid()


@exercise(
    "balance/sequence-loss",
    cases=named(
        "scores mask top_k",
        (_scores(2, 5, 4, seed=3), torch.tensor([[True] * 5, [True] * 3 + [False] * 2]), 2),
        (_scores(3, 12, 8, seed=4), _mask(3, 12, seed=5), 3),
    ),
    mistakes="""
        sequence_loss(scores.flatten(0, 1)[None], mask.flatten()[None], top_k)
            That is the loss over the whole batch, where two uneven sequences may cancel. Take f and P within each
            sequence, and the mean over sequences at the end.
        sequence_loss(scores, mask | True, top_k)
            Padding is counted. Leave out tokens where `mask` is False, in f and in P, and divide by the real ones.
        top_k * sequence_loss(scores, mask, top_k)
            Even load should give 1: f has k in its denominator.
        (_shares(scores, mask, top_k) * _means(scores, mask)).sum(1).mean()
            P takes scores that sum to 1 over the experts of a token; a sigmoid's do not. Divide by their sum first.
        sequence_loss(scores, mask, top_k) / scores.shape[-1]
            The number of experts is missing: even load should give 1.
        (_shares(scores, mask, top_k) ** 2).sum(1).mean() / scores.shape[-1]
            Without P there is no gradient: a count has none. Multiply f by the mean score.
    """,
    hint="For each sequence: f from its real tokens' top k, P from their scores, made to sum to 1; then sum f P.",
)
def sequence_loss(scores: Tensor, mask: Tensor, top_k: int) -> float:
    """V3's loss without alpha: (B, T, E) scores, (B, T) bool mask -> a number, 1 for even load."""
    probabilities = scores / scores.sum(-1, keepdim=True)
    return (_shares(scores, mask, top_k) * _means(probabilities, mask)).sum(1).mean().item()


def _judged(gaps, margin: float, t: float, spread: float, room: float | None = None, root: float = 0.5) -> str | int:
    """``room``: below what half an interval has to stay to be decided, if not the larger distance to 0 and margin."""
    mean = float(np.mean(gaps))
    half = t * spread / len(gaps) ** root
    if mean + half < margin:
        return "free"
    if mean - half > 0:
        return "costs"
    return math.floor((t * spread / (room or max(mean, margin - mean))) ** 2) + 1


def _gaps(cured: list[float], base: list[float]) -> np.ndarray:
    return np.subtract(cured, base)


def _sd(values) -> float:
    return float(np.std(values, ddof=1))


_BASES = [2.31, 2.12, 2.4, 2.05, 2.22]  # losses that differ more between seeds than between designs


@exercise(
    "balance/judge",
    cases=named(
        "cured base margin t",
        ([2.32, 2.125, 2.42, 2.055, 2.238], _BASES, 0.03, 2.776),  # 0.003 to 0.020
        ([2.33, 2.11, 2.39, 2.09, 2.24], _BASES, 0.03, 2.776),  # -0.015 to 0.039
        ([2.36, 2.19, 2.44, 2.11, 2.25], _BASES, 0.06, 2.776),  # 0.030 to 0.070
        ([2.27, 2.13, 2.37, 2.03], [2.3, 2.12, 2.4, 2.07], 0.02, 3.182),  # -0.058 to 0.013
        ([2.16, 2.52, 2.1], [2.14, 2.43, 2.09], 0.1, 4.303),  # -0.068 to 0.148
    ),
    mistakes="""
        _judged(_gaps(cured, base), margin, t, math.hypot(_sd(cured), _sd(base)))
            You took the spread of the two lists. Runs of one seed share their start and their batches: subtract first,
            seed by seed, and take the spread of the differences.
        _judged(_gaps(cured, base), margin, t, float(np.std(_gaps(cured, base))))
            Your standard deviation divides by n. With few seeds that is too small: divide by n - 1 (`ddof=1`).
        _judged(_gaps(cured, base), margin, t, _sd(_gaps(cured, base)), root=0)
            That is how far single differences scatter. The mean of n scatters less: divide by the root of n.
        "free" if t * _sd(_gaps(cured, base)) / len(base) ** 0.5 > abs(np.mean(_gaps(cured, base)))
        else judge(cured, base, margin, t)
            An interval that contains 0 is not "free". It may hold a cost too: its upper end has to lie below `margin`.
        "free" if np.mean(_gaps(cured, base)) < margin else "costs"
            You judged by the mean alone. The ends of its interval decide.
        judge(base, cured, margin, t)
            The wrong way round: a loss that is higher with the cure is a cost, so take `cured` minus `base`.
        "costs" if np.mean(_gaps(cured, base)) > t * _sd(_gaps(cured, base)) / len(base) ** 0.5
        else judge(cured, base, margin, t)
            You asked for "costs" first. A cost that is there, but surely below `margin`, is free by the rule given.
        _judged(_gaps(cured, base), margin, t, _sd(_gaps(cured, base)), margin)
            Half an interval as long as `margin` decides only if the mean is 0. It has to end before `margin` or before
            0, whichever is farther from the mean.
        _judged(_gaps(cured, base), margin, t, _sd(_gaps(cured, base)), min(margin - np.mean(_gaps(cured, base)),
        np.mean(_gaps(cured, base)), key=abs))
            You took the nearer of 0 and `margin`. To leave either out of the interval is enough, and the farther one is
            left out first.
        judge(cured, base, margin, t) if isinstance(judge(cured, base, margin, t), str)
        else judge(cured, base, margin, t) - len(base)
            That is how many more. How many seeds in all?
    """,
    hint="Differences seed by seed; half = t x their standard deviation (n - 1) / sqrt(n). Neither: for which n would "
    "the interval end below margin, or lie above 0?",
)
def judge(cured: list[float], base: list[float], margin: float, t: float) -> str | int:
    """Paired losses -> "free" or "costs"; if neither, the seeds from which on it would be one, all else staying."""
    return _judged(_gaps(cured, base), margin, t, _sd(_gaps(cured, base)))


def _in_order(indices: Tensor, places: list[tuple[int, int]], room: float, experts: int) -> list[int]:
    """How many choices of each token are served, if they come in this order."""
    left, found = [math.floor(room)] * experts, [0] * len(indices)
    for token, choice in places:
        expert = int(indices[token, choice])
        if left[expert] > 0:
            left[expert] -= 1
            found[token] += 1
    return found


def _room(indices: Tensor, experts: int, factor: float) -> float:
    return factor * indices.numel() / experts + 1e-9


@exercise(
    "balance/served",
    cases=named(
        "indices num_experts capacity_factor",
        (torch.tensor([[0, 1], [0, 2], [1, 0], [0, 1], [2, 0]]), 3, 0.75),
        (_choices(16, experts=4, top_k=2, seed=6), 4, 1.2),
        (_choices(20, experts=8, top_k=3, seed=7), 8, 1.0),
    ),
    mistakes="""
        _in_order(indices, [(t, c) for t in range(len(indices)) for c in range(indices.shape[1])],
        _room(indices, num_experts, capacity_factor), num_experts)
            You served token by token. The first choices of all tokens come before anybody's second choice.
        served(indices, num_experts, capacity_factor / indices.shape[1])
            Room for an expert is factor times N k / E: there are k assignments a token, not one.
        [indices.shape[1] - n for n in served(indices, num_experts, capacity_factor)]
            Those are the choices that were dropped. How many were served?
        served(indices.flip(0), num_experts, capacity_factor)[::-1]
            You served later tokens first. Among choices of one rank, earlier tokens come first.
        served(indices.flip(1), num_experts, capacity_factor)
            You served second choices before first ones.
        [math.floor(min(n, 1)) for n in served(indices, num_experts, capacity_factor)]
            You say whether a token was served at all. How many of its choices were?
    """,
    hint="Room is floor(factor x N k / E) for each expert; go through all first choices, then all second ones.",
)
def served(indices: Tensor, num_experts: int, capacity_factor: float) -> list[int]:
    """How many of each token's k choices find room, first choices first: int64 (N, k) -> N whole numbers."""
    order = [(token, choice) for choice in range(indices.shape[1]) for token in range(len(indices))]
    return _in_order(indices, order, _room(indices, num_experts, capacity_factor), num_experts)
