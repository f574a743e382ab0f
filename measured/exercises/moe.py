"""Exercises of ``chapters/architecture/moe.ipynb``. Shapes: N tokens, E experts, k experts a token, H hidden size."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from measured.exercises import exercise, named, normal

_random = partial(normal, dtype=torch.float64)


@exercise(
    "moe/route",
    cases=named(
        "logits bias top_k factor",
        (_random(4, 4, seed=0), torch.tensor([0.6, -0.6, 0.0, 0.3], dtype=torch.float64), 2, 1.5),
        (_random(6, 8, seed=1), 0.5 * _random(8, seed=2), 3, 2.5),
        (_random(3, 5, seed=3), 0.7 * _random(5, seed=4), 1, 1.0),
    ),
    mistakes="""
        factor * _spread(_scores(logits) + bias, _ids(_scores(logits) + bias, top_k))
            The bias is in the weights. It decides who runs and must not change how much they say: take the weights from
            the scores without it.
        factor * _spread(_scores(logits), _ids(_scores(logits), top_k))
            The bias has no effect here. Choose by score plus bias.
        factor * _spread(logits.sigmoid(), _ids(logits.sigmoid() + bias, top_k))
            That is V3's sigmoid. V4's score is the square root of the softplus.
        factor * _spread(F.softplus(logits), _ids(F.softplus(logits) + bias, top_k))
            The root is missing: the score is the square root of the softplus.
        factor * _spread(_scores(logits), _ids(_scores(logits) + bias, top_k), False)
            The right scores in the right places, but a token's weights do not sum to the factor: divide by the sum of
            the chosen scores first.
        _spread(_scores(logits), _ids(_scores(logits) + bias, top_k))
            The weights sum to 1. Multiply them by the factor.
        route(logits, bias, top_k, factor).gather(1, _ids(_scores(logits) + bias, top_k))
            The weights are right and packed, (tokens, k). Asked for is one column an expert, 0 where it was not chosen.
        factor * _spread(_scores(logits).T, _ids((_scores(logits) + bias).T, min(top_k, len(logits)))).T
            Top-k over the wrong axis: here each expert chooses tokens. Take the best along each token's own row.
    """,
    hint="Choose by score plus bias; put the chosen scores, without bias and divided by their sum, in their columns.",
)
def route(logits: Tensor, bias: Tensor, top_k: int, factor: float) -> Tensor:
    """Weights as in DeepSeek-V4, one column an expert: (N, E) logits and (E,) bias -> (N, E), rows sum to factor."""
    scores = F.softplus(logits).sqrt()
    indices = (scores + bias).topk(top_k, dim=-1).indices  # (N, k)
    weights = scores.gather(1, indices)
    weights = factor * weights / weights.sum(-1, keepdim=True)
    return torch.zeros_like(scores).scatter(1, indices, weights)


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


def _layer(tokens: int, experts: int, hidden: int, top_k: int, seed: int) -> dict:
    shapes = {"x": (tokens, hidden), "router": (experts, hidden), "experts": (experts, hidden, hidden)}
    made = {name: _random(*shape, seed=seed + i) for i, (name, shape) in enumerate(shapes.items())}
    return made | {"top_k": top_k}


@exercise(
    "moe/repair",
    cases=[_layer(5, 4, 3, 2, seed=10), _layer(4, 6, 2, 3, seed=20), _layer(6, 8, 3, 2, seed=30)],
    mistakes="""
        _apply(x, experts, _softmax(x, router) * _anybody(x, router, top_k))
            No mask: a token receives every expert that any token chose, each with its whole column of scores. Only the
            experts in a token's own row may reach it.
        _apply(x, experts, _normed(_softmax(x, router) * _anybody(x, router, top_k)))
            No mask: a token receives every expert that any token chose. Normalising hides it, and does not cure it.
        repair(x, router, experts, top_k) / top_k
            The division is still there. The weights already say how much each expert counts.
        _apply(x, experts, _own(x, router, top_k))
            Router, loop and mask are right. The weights are the bare scores, which sum to less than 1: divide them by
            the sum of the chosen ones.
        _apply(x, experts, _own(x, router, top_k)) / top_k
            Router, loop and mask are right. The last line is as it was: bare scores, which sum to less than 1, and then
            halved.
        _apply(x, experts, (_own(x, router, top_k) > 0) / top_k)
            A plain mean of the chosen experts: the scores no longer say how much each counts.
        _apply(x, experts, _spread(_softmax(x, router), _ids(_softmax(x, router)[:1], top_k).expand(len(x), top_k)))
            All tokens go to the experts that the first token chose. Each row of ids is of one token.
    """,
    hint="For each token: the k best of its scores, divided by their sum, times what those experts make of this token.",
)
def repair(x: Tensor, router: Tensor, experts: Tensor, top_k: int) -> Tensor:
    """The article's router, repaired: (N, H), (E, H) and one matrix an expert, (E, H, H) -> (N, H)."""
    weights, indices = (x @ router.T).softmax(-1).topk(top_k, dim=-1)  # (N, k)
    weights = weights / weights.sum(-1, keepdim=True)
    y = torch.zeros_like(x)
    for e, expert in enumerate(experts):
        token, place = (indices == e).nonzero(as_tuple=True)  # who chose it, and as which choice
        y.index_add_(0, token, weights[token, place, None] * (x[token] @ expert))
    return y


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


def _scores(logits: Tensor) -> Tensor:
    return F.softplus(logits).sqrt()


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


def _softmax(x: Tensor, router: Tensor) -> Tensor:
    return (x @ router.T).softmax(-1)


def _own(x: Tensor, router: Tensor, top_k: int) -> Tensor:
    return _spread(_softmax(x, router), _ids(_softmax(x, router), top_k), False)


def _anybody(x: Tensor, router: Tensor, top_k: int) -> Tensor:
    """Which experts any token chose, as a row of ones and zeros."""
    return (_own(x, router, top_k) > 0).any(0)


def _apply(x: Tensor, experts: Tensor, table: Tensor) -> Tensor:
    """Every expert on every token, times a table of weights, (N, E)."""
    return torch.einsum("ne,nh,ehj->nj", table.to(x), x, experts)
