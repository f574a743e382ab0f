"""Exercises of ``chapters/architecture/balance.ipynb``. Shapes: L layers, B sequences, T or N tokens, E experts."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dslib.performance.statistics import mean_interval
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


_BASE = [2.20, 2.31, 2.25, 2.18]
_AWAY = {  # what is added to the losses without a cure, seed by seed
    "none": [0.01, -0.01, 0.00, 0.01],
    "surely": [0.06, 0.05, 0.07, 0.05],
    "better": [-0.03, -0.02, -0.04, -0.03],
    "perhaps": [0.10, -0.06, 0.02, -0.09],
    "slightly": [0.012, 0.011, 0.013, 0.012],
    "edge": [0.004, 0.024, 0.017, 0.003],
}


def _sweep(limit: float, margin: float, base: list[float] = _BASE, **ways: tuple[float, float]) -> dict[str, object]:
    """A case: for each way of ``_AWAY`` its alpha and MaxVio."""
    losses = [[round(b + d, 6) for b, d in zip(base, _AWAY[way], strict=False)] for way in ways]
    alphas, max_vio = ([pair[i] for pair in ways.values()] for i in (0, 1))
    return {"alphas": alphas, "losses": losses, "base": base, "max_vio": max_vio, "limit": limit, "margin": margin}


def _free(alphas, losses, base, max_vio, limit, margin, highest) -> list[float]:
    rows = zip(alphas, losses, max_vio, strict=True)
    return [alpha for alpha, run, vio in rows if vio <= limit and highest(run, base) < margin]


def _gaps(run: list[float], base: list[float]) -> list[float]:
    return [a - b for a, b in zip(run, base, strict=True)]


def _highest(run: list[float], base: list[float]) -> float:
    """The upper end of the interval of the differences."""
    return mean_interval(_gaps(run, base)).high


def _by_normal(run: list[float], base: list[float]) -> float:
    gaps = torch.tensor(_gaps(run, base))
    return float(gaps.mean() + 1.96 * gaps.std() / len(gaps) ** 0.5)


@exercise(
    "balance/free-alpha",
    cases=[
        _sweep(1.0, 0.03, edge=(0.001, 0.9), surely=(0.01, 0.5), better=(0.02, 0.4), perhaps=(0.1, 0.2)),
        _sweep(0.7, 0.025, slightly=(0.003, 0.65), none=(0.01, 0.9), edge=(0.02, 0.6), better=(0.1, 0.3)),
        _sweep(1.0, 0.02, _BASE[:3], better=(0.001, 2.5), none=(0.01, 1.0), perhaps=(0.03, 0.2), slightly=(0.1, 0.1)),
    ],
    mistakes="""
        _free(alphas, losses, base, max_vio, limit, margin, lambda run, base: sum(_gaps(run, base)) / len(base))
            You compared means alone. With a few seeds a mean moves by chance: take the interval of the differences, and
            its upper end.
        _free(alphas, losses, base, max_vio, limit, 0, lambda run, base: mean_interval(_gaps(run, base)).low)
            An interval that contains 0 does not show that a cure is free. It is free within the margin only if the
            upper end lies below the margin; else the runs leave it open.
        _free(alphas, losses, base, max_vio, limit, margin,
        lambda run, base: mean_interval(run).high - mean_interval(base).low)
            You compared the interval of one with the interval of the other. The seeds are the same: take the difference
            seed by seed first, and the interval of those.
        _free(alphas, losses, base, max_vio, limit, margin, _by_normal)
            1.96 is for many values. With three or four seeds the interval is wider: Student's t, as `mean_interval`.
        free(alphas, losses, base, [0 * vio for vio in max_vio], limit, margin)
            A weight that leaves the load uneven balances nothing, whatever it costs: look at MaxVio too.
        free(alphas, losses, base, max_vio, limit, 0)
            "Free within the margin" asks for the upper end to be below the margin, not below 0: a certain gain is more
            than was asked.
    """,
    hint="MaxVio at most `limit`, and the upper end of the interval of the differences, seed by seed, below `margin`.",
)
def free(
    alphas: list[float], losses: list[list[float]], base: list[float], max_vio: list[float], limit: float, margin: float
) -> list[float]:
    """The weights that even out the load and are surely less than ``margin`` worse, in the order given."""
    return _free(alphas, losses, base, max_vio, limit, margin, _highest)


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
