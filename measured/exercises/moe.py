"""Exercises of ``chapters/architecture/moe.ipynb``. Shapes: N tokens, E experts, k experts a token, H hidden size."""

import itertools
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from measured.exercises import exercise, named, normal

_random = partial(normal, dtype=torch.float64)


def _skewed(experts: int, top_k: int, skew: float) -> list[float]:
    """Probabilities that sum to top_k: one half of the experts at ``skew`` times the mean, the other at 2 - skew."""
    return [top_k / experts * part for part in (skew, 2 - skew) for _ in range(experts // 2)]


@exercise(
    "moe/fills",
    cases=named(
        "chance bytes_a_weight bandwidth rate",
        (_skewed(16, 2, 1.0), 4, 32e9, 204e9),  # a processor: 102
        (_skewed(64, 6, 1.8), 0.5, 32e9, 160e9),  # few operations for a byte: long before all are touched
        (_skewed(8, 2, 1.5), 2, 2e12, 19.5e12),
        ([1.0, 0.5, 0.25, 0.25], 1, 1e11, 5.5e11),
    ),
    mistakes="""
        fills([sum(chance) / len(chance)] * len(chance), bytes_a_weight, bandwidth, rate)
            You take every expert to be chosen alike. An expert is touched by N tokens with the probability
            1 - (1 - p) ** N, with its own p.
        math.ceil(len(chance) / sum(chance) * rate * bytes_a_weight / (2 * bandwidth) - 1e-9)
            That is N*, for which all experts have to be touched. Fewer tokens touch fewer experts: try one number of
            tokens after another.
        fills(chance, 2 * bytes_a_weight, bandwidth, rate)
            A multiplication and an addition for each weight and row: two operations.
        fills(chance, 1, bandwidth, rate)
            A weight has `bytes_a_weight` bytes, and you read one of each.
        fills(chance, bytes_a_weight, bandwidth, rate) - 1
            One too few: with so many tokens reading still takes longer.
        math.ceil(rate * bytes_a_weight / (2 * bandwidth) - 1e-9)
            That is the number for a dense layer, which multiplies by all that it reads. A mixture reads E experts and
            multiplies each token by k.
        _fills(chance, bytes_a_weight, bandwidth, rate, lambda p, n: min(1.0, n * p))
            n tokens do not touch an expert n times as often as one does: some choose the same. It stays untouched with
            the probability (1 - p) ** n.
        fills(chance, bytes_a_weight * sum(chance), bandwidth, rate)
            Each token is multiplied by k experts, and you count one: the probabilities sum to k.
    """,
    hint="For n = 1, 2, …: seconds to read the sum of 1 - (1 - p) ** n experts, and to multiply n tokens by k of them.",
)
def fills(chance: list[float], bytes_a_weight: float, bandwidth: float, rate: float) -> int:
    """Tokens from which on multiplying by a mixture's experts takes at least as long as reading those touched.

    chance: for each expert the probability that a token chooses it. The size of an expert cancels.
    """
    return _fills(chance, bytes_a_weight, bandwidth, rate, lambda p, n: 1 - (1 - p) ** n)


def _fills(chance: list[float], bytes_a_weight: float, bandwidth: float, rate: float, touched: Callable) -> int:
    for tokens in itertools.count(1):
        reading = bytes_a_weight * sum(touched(p, tokens) for p in chance) / bandwidth
        if 2 * tokens * sum(chance) / rate >= reading:
            return tokens


def _choices(tokens: int, experts: int, top_k: int, seed: int) -> dict[str, Tensor]:
    return {"indices": _random(tokens, experts, seed=seed).topk(top_k, dim=-1).indices}


@exercise(
    "moe/places",
    cases=[_choices(4, 4, 2, seed=5), _choices(7, 3, 2, seed=6), _choices(5, 8, 3, seed=7)],
    mistakes="""
        indices.flatten().argsort(stable=True).view_as(indices)
            That is `order`: which pair stands at each row. Asked for is its inverse: at which row each pair stands.
        indices.flatten().argsort(stable=True).view_as(indices) // indices.shape[1]
            That is the token of each row. Asked for is the row of each pair.
        _in_slice(indices)
            You count from 0 within each expert. An expert's rows begin where those of the experts before it end: add
            how many rows those have.
        places(indices.T).T
            You number all first choices before all second ones. Pairs are counted token by token, as `flatten` does.
        (-indices).flatten().argsort(stable=True).argsort().view_as(indices)
            You sort from the last expert to the first. Expert 0 comes first.
        indices.flatten().bincount()[indices]
            That is how many rows the expert of each pair has. Asked for is at which row the pair itself stands.
    """,
    hint="A pair stands behind all pairs of the experts before its own, and behind earlier pairs of the same expert.",
)
def places(indices: Tensor) -> Tensor:
    """Row of each pair once pairs are sorted by expert, ties in token order: int (N, k) -> int (N, k)."""
    order = indices.flatten().argsort(stable=True)  # (S,): row -> pair
    return order.argsort().view_as(indices)  # its inverse: pair -> row


@exercise(
    "moe/busiest",
    cases=named(
        "loads spare",
        ([9, 2, 1, 4], 3),
        ([18] * 4 + [2] * 4, 3),  # two halves: the hottest are too many for so few copies
        ([60 / rank for rank in range(1, 9)], 4),
        ([5, 3, 1], 0),
    ),
    mistakes="""
        busiest(loads, 0) * (len(loads) + spare) / len(loads)
            The copies have no effect on the load: an expert's tokens are divided among all cards that hold it.
        busiest(loads, 0)
            `spare` has no effect: further cards take copies, and they count in the mean.
        busiest(loads, spare) * len(loads) / (len(loads) + spare)
            The mean is that of all cards, those with copies included.
        busiest(loads, spare) * sum(loads) / (len(loads) + spare)
            That is the busiest card's load itself. Asked for is how many times the mean it is.
        _shared(loads, [1 + spare * (e == loads.index(max(loads))) for e in range(len(loads))])
            You give all copies to one expert. Once its cards have less than another's, the next copy belongs there.
        _shared(loads, [1 + (sorted(loads, reverse=True).index(load) < spare) for load in loads])
            You copy each of the busiest experts once. The hottest may need two copies before the next needs one.
    """,
    hint="One copy after another, each to the expert whose cards now have most: load over the number of its cards.",
)
def busiest(loads: list[float], spare: int) -> float:
    """Least load of the busiest card over the mean: one expert a card, and ``spare`` more cards with copies."""
    copies = [1] * len(loads)
    for _ in range(spare):
        shares = [load / n for load, n in zip(loads, copies, strict=True)]
        copies[shares.index(max(shares))] += 1
    return _shared(loads, copies)


def _shared(loads: list[float], copies: list[float]) -> float:
    """The same for given numbers of cards an expert."""
    return max(load / n for load, n in zip(loads, copies, strict=True)) * sum(copies) / sum(loads)


def _config(
    scoring_func: str, topk_method: str, k: int, groups: tuple[int, int], norm_topk_prob: bool, factor: float
) -> dict:
    """Lines of a config.json under their names there; groups: how many there are, and how many of them stay open."""
    return {
        "scoring_func": scoring_func, "topk_method": topk_method, "num_experts_per_tok": k, "n_group": groups[0],
        "topk_group": groups[1], "norm_topk_prob": norm_topk_prob, "routed_scaling_factor": factor,
    }  # fmt: skip


@exercise(
    "moe/configuration",
    cases=named(
        "config logits bias",
        (_config("softmax", "greedy", 2, (1, 1), False, 1.0), _random(5, 6, seed=40), 0.3 * _random(6, seed=41)),
        (_config("softmax", "greedy", 2, (1, 1), True, 1.5), _random(5, 6, seed=42), 0.3 * _random(6, seed=43)),
        (
            _config("softmax", "group_limited_greedy", 3, (4, 2), False, 16.0),
            2 * _random(8, 12, seed=44),
            0.3 * _random(12, seed=45),
        ),
        (
            _config("sigmoid", "noaux_tc", 5, (4, 2), True, 2.5),
            _random(9, 12, seed=46),
            0.5 * _random(12, seed=47) - 0.6,
        ),
        (_config("sigmoid", "noaux_tc", 3, (1, 1), True, 1.0), _random(5, 8, seed=48), 0.5 * _random(8, seed=49)),
    ),
    mistakes="""
        configuration({**config, "routed_scaling_factor": 1.0}, logits, bias)
            `routed_scaling_factor` is not used: multiply all weights by it at the end.
        configuration({**config, "norm_topk_prob": True}, logits, bias)
            You always divide by the sum. Do so only where `norm_topk_prob` is true.
        configuration({**config, "norm_topk_prob": False}, logits, bias)
            `norm_topk_prob` is not used: where it is true, divide the chosen scores by their sum.
        configuration({**config, "n_group": 1, "topk_group": 1}, logits, bias)
            The groups are not used: only the experts of the best `topk_group` of `n_group` groups may be chosen.
        configuration({**config, "scoring_func": "softmax"}, logits, bias)
            You always take a softmax. `scoring_func` says which function makes the scores.
        configuration(config, logits, 0 * bias)
            The bias has no effect. Under `noaux_tc` the choice goes by score plus bias.
        _by_rule(config, logits, bias, biased=("greedy", "group_limited_greedy", "noaux_tc"))
            You add the bias under every method. Only `noaux_tc` has one; the two greedy methods choose by score.
        _by_rule(config, logits, bias, best={"noaux_tc": 1})
            Under `noaux_tc` a group is as strong as its two best experts together, and you rank it by its best one.
        _by_rule(config, logits, bias, best={"group_limited_greedy": 2})
            Under `group_limited_greedy` a group is as strong as its best expert, and you add its two best.
        _by_rule(config, logits, bias, best={"noaux_tc": 1, "group_limited_greedy": 2})
            You have the two rules for the strength of a group the wrong way round: the best expert under
            `group_limited_greedy`, the sum of the two best under `noaux_tc`.
        _by_rule(config, logits, bias, closed=0.0)
            You put 0 in place of what is closed. Score plus bias can lie below 0, so a closed expert can win: use -inf.
    """,
    hint="Go line by line: scores, plus bias if noaux_tc, groups closed with -inf, top k, their scores, norm, factor.",
)
def configuration(config: dict, logits: Tensor, bias: Tensor) -> Tensor:
    """The rule that a config.json names, (N, E) logits and (E,) bias -> (N, E) weights, 0 where not chosen."""
    return _by_rule(config, logits, bias)


def _by_rule(
    config: dict, logits: Tensor, bias: Tensor, biased: tuple = ("noaux_tc",), best: dict | None = None,
    closed: float = -math.inf,
) -> Tensor:  # fmt: skip
    """The rule; ``biased`` methods add the bias, ``best`` of a group's experts give its strength."""
    scores = logits.softmax(-1) if config["scoring_func"] == "softmax" else logits.sigmoid()
    method, groups = config["topk_method"], config["n_group"]
    choice = scores + bias if method in biased else scores
    if method != "greedy" and groups > 1:
        best = {"group_limited_greedy": 1, "noaux_tc": 2} | (best or {})
        grouped = choice.unflatten(-1, (groups, -1))  # (N, groups, E / groups)
        strength = grouped.topk(best[method], dim=-1).values.sum(-1)  # (N, groups)
        kept = torch.zeros_like(strength).scatter(1, strength.topk(config["topk_group"], dim=-1).indices, 1.0)
        choice = grouped.masked_fill(kept[..., None] == 0, closed).flatten(1)
    table = _spread(scores, _ids(choice, config["num_experts_per_tok"]), config["norm_topk_prob"])
    return config["routed_scaling_factor"] * table


def _ids(scores: Tensor, top_k: int) -> Tensor:
    return scores.topk(top_k, dim=-1).indices


def _spread(scores: Tensor, indices: Tensor, normed: bool = True) -> Tensor:
    """Scores of the chosen in their columns, 0 elsewhere: (N, E), (N, k) -> (N, E)."""
    table = torch.zeros_like(scores).scatter(1, indices, scores.gather(1, indices))
    return _normed(table) if normed else table


def _normed(table: Tensor) -> Tensor:
    return table / table.sum(-1, keepdim=True)


def _in_slice(indices: Tensor) -> Tensor:
    """How many pairs of the same expert come before each pair."""
    flat = indices.flatten()
    return (flat[:, None] == flat).tril(-1).sum(1).view_as(indices)
