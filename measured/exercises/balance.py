"""Exercises of ``chapters/architecture/balance.ipynb``. Shapes: L layers, B sequences, T or N tokens, E experts."""

import math

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


def _settling(trace: list[float], limit: float) -> int:
    """The first step after the last one above ``limit``."""
    return max((step + 1 for step, vio in enumerate(trace) if vio > limit), default=0)


def _first_below(trace: list[float], limit: float) -> int:
    return next((step for step, vio in enumerate(trace) if vio <= limit), len(trace))


def _earliest(speeds, traces, limit, calm, start=_settling) -> float | None:
    rows = [(start(trace, limit), speed) for speed, trace in zip(speeds, traces, strict=True)]
    found = [row for row, trace in zip(rows, traces, strict=True) if len(trace) - row[0] >= calm]
    return min(found)[1] if found else None


_TRACES = {  # MaxVio at each step
    "slow": [5.8, 5.0, 4.0, 3.0, 2.0, 1.2, 0.7, 0.4, 0.2, 0.1, 0.1, 0.1],
    "middle": [5.8, 3.0, 1.4, 0.8, 0.6, 0.8, 0.6, 0.8, 0.6, 0.8, 0.6, 0.8],
    "as soon": [5.8, 4.0, 1.6, 0.6, 0.5, 0.6, 0.5, 0.6, 0.5, 0.6, 0.5, 0.6],
    "fast": [5.8, 0.9, 3.0, 0.5, 3.0, 0.9, 2.0, 0.5, 2.0, 0.9, 0.6, 0.05],
    "late": [5.8, 0.6, 1.5, 0.6, 1.5, 0.6, 1.1, 0.4, 0.6, 0.4, 0.6, 0.4],
    "never": [5.8, 0.4, 1.5, 0.4, 1.5, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 1.5],
}


@exercise(
    "balance/settled-speed",
    cases=[
        {"speeds": [0.02, 0.001, 0.005], "traces": [_TRACES[name] for name in ("fast", "slow", "middle")]}
        | {"limit": 1.0, "calm": 4},
        {"speeds": [0.01, 0.005, 0.001], "traces": [_TRACES[name] for name in ("as soon", "middle", "slow")]}
        | {"limit": 0.8, "calm": 6},
        {"speeds": [0.05, 0.02], "traces": [_TRACES[name] for name in ("never", "fast")], "limit": 1.0, "calm": 5},
        {"speeds": [0.05, 0.02], "traces": [_TRACES[name] for name in ("never", "fast")], "limit": 1.0, "calm": 3},
        {"speeds": [0.02, 0.002], "traces": [_TRACES["late"], _TRACES["middle"]], "limit": 1.0, "calm": 4},
        {"speeds": [0.001, 0.02], "traces": [_TRACES["slow"], [0.7] * 12], "limit": 0.5, "calm": 5},
        {"speeds": [0.001, 0.02], "traces": [_TRACES["slow"], [0.3] * 12], "limit": 0.5, "calm": 5},
    ],
    mistakes="""
        speeds[min(range(len(speeds)), key=lambda i: traces[i][-1])]
            You looked at the last step alone. A fast bias oscillates, and the last step may be its best phase.
        _earliest(speeds, traces, limit, calm, _first_below)
            You took the first step that is not above the limit. A fast bias gets there early and leaves again: look for
            the *last* step above the limit.
        settled_speed(speeds, traces, limit, 1)
            You did not ask for `calm` steps at the end: a trace that came below the limit only just now does not count.
        min((row for row in zip(speeds, traces) if sum(row[1][-calm:]) / calm <= limit),
        key=lambda row: _settling(row[1], limit), default=(None,))[0]
            You took the mean of the last steps. No single one of them may be above the limit.
        settled_speed(speeds, [[vio + (vio == limit) for vio in trace] for trace in traces], limit, calm)
            A MaxVio equal to the limit is not above it.
        max((speed for speed, trace in zip(speeds, traces) if len(trace) - _settling(trace, limit) >= calm),
        default=None)
            The fastest speed is not always settled first. Compare the steps, and take the slower of two equal ones.
        min((sum(trace[-calm:]), speed) for speed, trace in zip(speeds, traces))[1]
            That is the speed that is most even at the end. Asked for is the one that is settled earliest.
    """,
    hint="For each trace: the last step above `limit`, plus 1; keep those with `calm` steps left; the least of them.",
)
def settled_speed(speeds: list[float], traces: list[list[float]], limit: float, calm: int) -> float | None:
    """The speed whose MaxVio is earliest at or below ``limit`` for good, and for ``calm`` steps at least; else None."""
    return _earliest(speeds, traces, limit, calm)


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
