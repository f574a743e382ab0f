"""Exercises of ``chapters/architecture/moe.ipynb``. Shapes: N tokens, E experts, k experts a token, H hidden size."""

import torch
from torch import Tensor

from measured.exercises import Exercise, Mistake


def choose(logits: Tensor, top_k: int) -> Tensor:
    """Ids of the ``top_k`` experts of each token, best first: (N, E) -> (N, k)."""
    return logits.topk(top_k, dim=-1).indices


def weigh(scores: Tensor, bias: Tensor, top_k: int) -> Tensor:
    """Weights of the chosen experts as in V3: (N, E) scores and (E,) bias -> (N, k), each row summing to 1."""
    indices = (scores + bias).topk(top_k, dim=-1).indices
    weights = scores.gather(1, indices)
    return weights / weights.sum(-1, keepdim=True)


def combine(outputs: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Output of the layer, from every expert's output for every token: (E, N, H), (N, k), (N, k) -> (N, H)."""
    tokens = torch.arange(len(indices)).unsqueeze(1)  # (N, 1)
    return (outputs[indices, tokens] * weights.unsqueeze(-1)).sum(1)


def _with_bias_in_the_weight(scores: Tensor, bias: Tensor, top_k: int) -> Tensor:
    weights = (scores + bias).topk(top_k, dim=-1).values
    return weights / weights.sum(-1, keepdim=True)


def _not_gathered(scores: Tensor, bias: Tensor, top_k: int) -> Tensor:
    weights = scores[:, :top_k]
    return weights / weights.sum(-1, keepdim=True)


def _divided_by_k(scores: Tensor, bias: Tensor, top_k: int) -> Tensor:
    return scores.gather(1, (scores + bias).topk(top_k, dim=-1).indices) / top_k


def _as_they_are(scores: Tensor, bias: Tensor, top_k: int) -> Tensor:
    return scores.gather(1, (scores + bias).topk(top_k, dim=-1).indices)


def _best_of_scores(scores: Tensor, bias: Tensor, top_k: int) -> Tensor:
    weights = scores.topk(top_k, dim=-1).values
    return weights / weights.sum(-1, keepdim=True)


def _over_all_experts(scores: Tensor, bias: Tensor, top_k: int) -> Tensor:
    return _as_they_are(scores, bias, top_k) / scores.sum(-1, keepdim=True)


def _no_mask(outputs: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    chosen_by_anybody = indices.unique()
    return outputs[chosen_by_anybody].mean(0) * weights.sum(-1, keepdim=True)


def _all_experts(outputs: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Each choice's column of weights on all tokens, and the expert of every row: the article's loop, mended to run."""
    total = torch.zeros_like(outputs[0])
    for row in indices:
        for place, expert in enumerate(row.tolist()):
            total += outputs[expert] * weights[:, place].unsqueeze(-1)
    return total


def _halved(outputs: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    return combine(outputs, indices, weights) / indices.shape[1]


def _without_weights(outputs: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    return combine(outputs, indices, torch.ones_like(weights))


def _swapped(outputs: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    return combine(outputs, indices, weights.flip(-1))


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _combine_case(experts: int, tokens: int, hidden: int, top_k: int, seed: int) -> dict[str, Tensor]:
    scores = _random(tokens, experts, seed=seed).softmax(-1)
    weights, indices = scores.topk(top_k, dim=-1)
    return {"outputs": _random(experts, tokens, hidden, seed=seed + 1), "indices": indices, "weights": weights}


EXERCISES = [
    Exercise(
        name="moe/choose",
        cases=[
            {"logits": _random(4, 4, seed=0), "top_k": 2},
            {"logits": _random(3, 8, seed=1), "top_k": 3},
            {"logits": _random(6, 5, seed=2), "top_k": 1},
        ],
        reference=choose,
        mistakes=[
            Mistake(
                lambda logits, top_k: logits.topk(top_k, dim=0).indices,
                "Top-k over the wrong axis: along the first, each expert chooses tokens. A token chooses experts, so "
                "the best are taken along its own row.",
            ),
            Mistake(
                lambda logits, top_k: logits.topk(top_k, dim=0).indices.T,
                "Top-k over the wrong axis, then turned round: the numbers are still tokens that an expert chose. Take "
                "the best along each token's own row.",
            ),
            Mistake(
                lambda logits, top_k: logits.topk(top_k, dim=-1, largest=False).indices,
                "Those are the lowest scores of each token. The highest are wanted.",
            ),
            Mistake(
                lambda logits, top_k: logits.topk(top_k, dim=-1).values,
                "Those are the scores of the chosen experts. The experts' ids are asked for.",
            ),
        ],
        hint="The row of a token holds a score for each expert; return the ids of the k highest, best first.",
    ),
    Exercise(
        name="moe/weights",
        cases=[
            {
                "scores": torch.tensor([[0.9, 0.8, 0.1, 0.3], [0.2, 0.3, 0.6, 0.5]], dtype=torch.float64),
                "bias": torch.tensor([0.0, -0.6, 0.0, 0.1], dtype=torch.float64),
                "top_k": 2,
            },
            {
                "scores": _random(6, 8, seed=3).sigmoid(),
                "bias": 0.3 * _random(8, seed=4),
                "top_k": 3,
            },
        ],
        reference=weigh,
        mistakes=[
            Mistake(
                _with_bias_in_the_weight,
                "The bias is in the weight. It decides who runs and must not change how much they say: take weights "
                "from the scores without it.",
            ),
            Mistake(
                _not_gathered,
                "Those are the scores of the first k experts and not of the chosen ones. Gather them by the ids.",
            ),
            Mistake(
                _divided_by_k,
                "Dividing by k does not make the weights sum to 1. Divide by the sum of the chosen scores.",
            ),
            Mistake(_as_they_are, "The right scores, but they do not sum to 1 yet."),
            Mistake(
                _over_all_experts,
                "Divided by the sum over all experts, the chosen weights sum to less than 1. Divide by the sum of the "
                "chosen scores.",
            ),
            Mistake(_best_of_scores, "The bias has no effect here. Choose by score plus bias."),
        ],
        hint="Choose by score plus bias, gather the scores of the chosen without the bias, divide by their sum.",
    ),
    Exercise(
        name="moe/combine",
        cases=[_combine_case(4, 3, 2, 2, seed=5), _combine_case(8, 5, 3, 3, seed=7), _combine_case(6, 4, 2, 2, seed=9)],
        reference=combine,
        mistakes=[
            Mistake(
                _all_experts,
                "No mask: each token receives the experts that any token chose. Only its own row of ids may count.",
            ),
            Mistake(
                _no_mask,
                "No mask: you average over all experts that anybody chose. Only a token's own row of ids may count.",
            ),
            Mistake(
                _halved,
                "Dividing by k: the weights already say how much each expert counts. Add up and leave it at that.",
            ),
            Mistake(_without_weights, "The weights are missing: each output is multiplied by its own."),
            Mistake(_swapped, "Each weight belongs to the expert at the same place in the row; here they are swapped."),
        ],
        hint="For each token: its chosen experts' outputs, each times its weight, added up.",
    ),
]
