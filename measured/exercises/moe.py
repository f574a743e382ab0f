"""Exercises of ``chapters/architecture/moe.ipynb``. Shapes: N tokens, E experts, k experts a token, H hidden size."""

from functools import partial

import torch
from torch import Tensor

from measured.exercises import exercise, named, normal

_random = partial(normal, dtype=torch.float64)


def _combine_case(experts: int, tokens: int, hidden: int, top_k: int, seed: int) -> dict[str, Tensor]:
    scores = _random(tokens, experts, seed=seed).softmax(-1)
    weights, indices = scores.topk(top_k, dim=-1)
    return {"outputs": _random(experts, tokens, hidden, seed=seed + 1), "indices": indices, "weights": weights}


@exercise(
    "moe/choose",
    cases=named("logits top_k", (_random(4, 4, seed=0), 2), (_random(3, 8, seed=1), 3), (_random(6, 5, seed=2), 1)),
    mistakes="""
        logits.topk(top_k, dim=0).indices
            Top-k over the wrong axis: along the first, each expert chooses tokens. A token chooses experts, so the best
            are taken along its own row.
        logits.topk(top_k, dim=0).indices.T
            Top-k over the wrong axis, then turned round: the numbers are still tokens that an expert chose. Take the
            best along each token's own row.
        logits.topk(top_k, dim=-1, largest=False).indices
            Those are the lowest scores of each token. The highest are wanted.
        logits.topk(top_k, dim=-1).values
            Those are the scores of the chosen experts. The experts' ids are asked for.
    """,
    hint="The row of a token holds a score for each expert; return the ids of the k highest, best first.",
)
def choose(logits: Tensor, top_k: int) -> Tensor:
    """Ids of the ``top_k`` experts of each token, best first: (N, E) -> (N, k)."""
    return logits.topk(top_k, dim=-1).indices


@exercise(
    "moe/weights",
    cases=[
        {
            "scores": torch.tensor([[0.9, 0.8, 0.1, 0.3], [0.2, 0.3, 0.6, 0.5]], dtype=torch.float64),
            "bias": torch.tensor([0.0, -0.6, 0.0, 0.2], dtype=torch.float64),
            "top_k": 2,
        },
        {"scores": _random(6, 8, seed=3).sigmoid(), "bias": 0.3 * _random(8, seed=4), "top_k": 3},
    ],
    mistakes="""
        _normalised((scores + bias).topk(top_k, dim=-1).values)
            The bias is in the weight. It decides who runs and must not change how much they say: take weights from the
            scores without it.
        _normalised(scores[:, :top_k])
            Those are the scores of the first k experts and not of the chosen ones. Gather them by the ids.
        scores.gather(1, (scores + bias).topk(top_k, dim=-1).indices) / top_k
            Dividing by k does not make the weights sum to 1. Divide by the sum of the chosen scores.
        scores.gather(1, (scores + bias).topk(top_k, dim=-1).indices)
            The right scores, but they do not sum to 1 yet.
        scores.gather(1, (scores + bias).topk(top_k, dim=-1).indices) / scores.sum(-1, keepdim=True)
            Divided by the sum over all experts, the chosen weights sum to less than 1. Divide by the sum of the chosen
            scores.
        _normalised(scores.topk(top_k, dim=-1).values)
            The bias has no effect here. Choose by score plus bias.
    """,
    hint="Choose by score plus bias, gather the scores of the chosen without the bias, divide by their sum.",
)
def weigh(scores: Tensor, bias: Tensor, top_k: int) -> Tensor:
    """Weights of the chosen experts as in V3: (N, E) scores and (E,) bias -> (N, k), each row summing to 1."""
    indices = (scores + bias).topk(top_k, dim=-1).indices
    return _normalised(scores.gather(1, indices))


@exercise(
    "moe/combine",
    cases=[_combine_case(4, 3, 2, 2, seed=5), _combine_case(8, 5, 3, 3, seed=7), _combine_case(6, 4, 2, 2, seed=9)],
    mistakes="""
        _all_experts(outputs, indices, weights)
            No mask: each token receives the experts that any token chose. Only its own row of ids may count.
        outputs[indices.unique()].mean(0) * weights.sum(-1, keepdim=True)
            No mask: you average over all experts that anybody chose. Only a token's own row of ids may count.
        combine(outputs, indices, weights) / indices.shape[1]
            Dividing by k: the weights already say how much each expert counts. Add up and leave it at that.
        combine(outputs, indices, torch.ones_like(weights))
            The weights are missing: each output is multiplied by its own.
        combine(outputs, indices, weights.flip(-1))
            Each weight belongs to the expert at the same place in the row; here they are swapped.
    """,
    hint="For each token: its chosen experts' outputs, each times its weight, added up.",
)
def combine(outputs: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Output of the layer, from every expert's output for every token: (E, N, H), (N, k), (N, k) -> (N, H)."""
    tokens = torch.arange(len(indices)).unsqueeze(1)  # (N, 1)
    return (outputs[indices, tokens] * weights.unsqueeze(-1)).sum(1)


def _normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)


def _all_experts(outputs: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Each choice's column of weights on all tokens, and the expert of every row: the article's loop, mended to run."""
    total = torch.zeros_like(outputs[0])
    for row in indices:
        for place, expert in enumerate(row.tolist()):
            total += outputs[expert] * weights[:, place].unsqueeze(-1)
    return total
