"""Mixture of experts: a router that chooses a few experts for each token, and the layer around it.

A dense feed-forward layer runs all of its weights on every token. A mixture keeps many smaller networks, the *experts*,
and runs ``top_k`` of them on a token. :func:`route` is one rule of choice in five lines; :class:`Router` has them all:

============================  ==============  =====================================  ===============================
model                         scores          choice                                 weights of the chosen
============================  ==============  =====================================  ===============================
DeepSeekMoE, OLMoE            softmax         top k                                  scores as they are
GShard, Mixtral, Qwen3-MoE    softmax         top k                                  scores, made to sum to 1
ERNIE 4.5                     softmax         top k of score + bias                  scores, made to sum to 1
DeepSeek-V2                   softmax         top k within the 3 best groups of 8    scores, times 16
DeepSeek-V3                   sigmoid         top k of score + bias, 4 of 8 groups   scores, made to sum to 1, x 2.5
MiniMax-M2                    sigmoid         top k of score + bias                  scores, made to sum to 1
DeepSeek-V4-Flash             sqrt(softplus)  top k of score + bias; first layers:   scores, made to sum to 1, x 1.5
                                              a table indexed by the token id
============================  ==============  =====================================  ===============================

Shapes: N tokens, E experts, k experts a token, H hidden size.

Book: ``chapters/architecture/moe.ipynb``; then :mod:`~dslib.architecture.experts`, :mod:`~dslib.architecture.balance`,
:mod:`~dslib.architecture.sparse_decoder`; the same sooner in ``fast``: ``experts``, ``lean_step``, ``training_step``.
Sources: GShard (arXiv 2006.16668), Mixtral (2401.04088), DeepSeekMoE (2401.06066) for shared experts, DeepSeek-V2
(2405.04434, section 2.2), DeepSeek-V3 (2412.19437, section 2.1.2), Hash Layers (2106.04426).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dslib.architecture.experts import ClampedSwiGLU, Experts, no_autocast
from dslib.architecture.layers import SwiGLU
from dslib.check import one_of, whole


def route(x: Tensor, weight: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The rule of DeepSeek-V3 without its groups and its factor: (N, H), (E, H), (E,) -> ids and weights, (N, k) each.

    The bias takes part in the choice only; the weights of a token sum to 1.
    """
    scores = (x @ weight.T).sigmoid()  # (N, E)
    indices = (scores + bias).topk(top_k, dim=-1).indices  # (N, k)
    weights = scores.gather(1, indices)  # (N, k), of the scores without the bias
    return indices, weights / weights.sum(-1, keepdim=True)


class MoE(nn.Module):
    """A feed-forward layer of routed experts, plus experts that every token shares if wanted (DeepSeekMoE, section 3).

    Dropless: every chosen expert runs, however many tokens choose it, unless the router says E, "none"
    (:class:`~dslib.architecture.balance.CapacityRouter`).

    Args:
        hidden_size, moe_intermediate_size: H, and the inner size of one expert.
        router: chooses among ``router.num_experts`` experts.
        n_shared_experts: how many experts' worth of always-on feed-forward network stands beside the routed ones.
        shared_expert_gate: multiply what those give by the sigmoid of a linear of the token (Qwen2-MoE, Qwen3-Next).
        swiglu_limit: bound on what is inside each expert, see :func:`~dslib.architecture.experts.swiglu` (V4: 10).

    Attributes:
        last_routing: the :class:`Routing` of the last call. While gradients are recorded it is part of the graph, so
            that balance losses can be taken from it; copies and files of the layer have it outside the graph.
    """

    def __init__(
        self, hidden_size: int, moe_intermediate_size: int, router: "Router", *, n_shared_experts: int = 0,
        shared_expert_gate: bool = False, swiglu_limit: float | None = None,
    ):  # fmt: skip
        super().__init__()
        whole(0, n_shared_experts=n_shared_experts)
        if router.hidden_size != hidden_size:
            raise ValueError(f"router: made for hidden size {router.hidden_size}, expected hidden_size={hidden_size}")
        if shared_expert_gate and not n_shared_experts:
            raise ValueError("shared_expert_gate: got True without shared experts, expected n_shared_experts above 0")
        self.router = router
        self.experts = Experts(router.num_experts, hidden_size, moe_intermediate_size, swiglu_limit)
        self.shared_experts, self.shared_expert_gate = None, None
        if n_shared_experts:
            # Several shared experts are one wider network: their hidden units lie side by side.
            sizes = hidden_size, n_shared_experts * moe_intermediate_size
            self.shared_experts = SwiGLU(*sizes) if swiglu_limit is None else ClampedSwiGLU(*sizes, swiglu_limit)
        if shared_expert_gate:
            self.shared_expert_gate = nn.Linear(hidden_size, 1, bias=False)
        self.last_routing: Routing | None = None

    def forward(self, x: Tensor, input_ids: Tensor | None = None) -> Tensor:
        """(..., H) -> the same shape; ``input_ids`` only for hash routing. An empty batch gives an empty result."""
        routing = self.router(x, input_ids)  # indices and weights: (N, k)
        self.last_routing = routing if torch.is_grad_enabled() else routing.detach()
        y = self.experts(x.reshape(-1, x.shape[-1]), routing.indices, routing.weights).view_as(x)
        if self.shared_experts is None:
            return y
        shared = self.shared_experts(x)
        if self.shared_expert_gate is not None:
            shared = self.shared_expert_gate(x).sigmoid() * shared  # (..., 1) x (..., H)
        return y + shared


def sqrt_softplus(logits: Tensor) -> Tensor:
    """``sqrt(log(1 + exp(x)))``. Far below 0 that is exp(x / 2), where softplus would round to 0 and have no slope."""
    far = (logits / 2).clamp(max=-10).exp()
    return torch.where(logits < -20, far, F.softplus(logits.clamp(min=-20)).sqrt())


SCORES = {"softmax": lambda logits: logits.softmax(-1), "sigmoid": torch.sigmoid, "sqrtsoftplus": sqrt_softplus}


@dataclass(frozen=True)
class Routing:
    """What a router decided for N tokens.

    Attributes:
        logits, scores: float32, (N, E).
        indices: int64, (N, k), the chosen experts, the highest choice first (hash routing: in the table's order).
        weights: float32, (N, k), what each chosen expert's output is multiplied by.
    """

    logits: Tensor
    scores: Tensor
    indices: Tensor
    weights: Tensor

    @property
    def num_experts(self) -> int:
        return self.logits.shape[1]

    def detach(self) -> "Routing":
        return Routing(self.logits.detach(), self.scores.detach(), self.indices, self.weights.detach())

    def __getstate__(self) -> dict:
        return vars(self.detach())  # torch copies no tensor that is part of a graph


class Router(nn.Module):
    """Scores all experts for a token, chooses ``top_k`` and gives each a weight.

    All in float32, whatever the model's dtype, and under autocast: a rounded score can change *which* expert runs.

    Args:
        hidden_size: H. num_experts: E. top_k: k, from 1 to E.
        scoring_func: ``"softmax"``, ``"sigmoid"`` or ``"sqrtsoftplus"``.
        norm_topk_prob: divide the chosen weights by their sum. With softmax that is the same as a softmax over the
            chosen logits alone, as Mixtral's paper writes it.
        n_group, topk_group: experts lie in ``n_group`` groups of equal size (in practice: devices), and a token may use
            experts of its best ``topk_group`` groups only.
        routed_scaling_factor: multiplies all weights at the end.
        selection_bias: keep a bias per expert, float32, that is added to the scores *for the choice only*. It carries
            no gradient; ``balance.update_bias`` moves it to even out the load.
        hash_vocab_size: number of token ids. If given, the choice is not made by score but read from a fixed table
            (``tid2eid``, here at random from ``seed``); scores still give the weights.

    Raises:
        ValueError: sizes that do not fit together, or an unknown scoring function.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *, scoring_func: str = "softmax",
        norm_topk_prob: bool = False, n_group: int = 1, topk_group: int = 1, routed_scaling_factor: float = 1.0,
        selection_bias: bool = False, hash_vocab_size: int | None = None, seed: int = 0,
    ):  # fmt: skip
        super().__init__()
        check_routing(num_experts, top_k, scoring_func, n_group, topk_group)
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k
        self.scoring_func, self.norm_topk_prob = scoring_func, norm_topk_prob
        self.n_group, self.topk_group = n_group, topk_group
        self.routed_scaling_factor = routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        nn.init.normal_(self.weight, std=0.02)
        bias, table = torch.zeros(num_experts, dtype=torch.float32) if selection_bias else None, None
        if hash_vocab_size is not None:
            # The first k of a random order of the experts: k different ones for every token id.
            generator = torch.Generator().manual_seed(seed)
            order = torch.rand(hash_vocab_size, num_experts, generator=generator, dtype=torch.float32, device="cpu")
            table = order.argsort(-1)[:, :top_k].to(self.weight.device, copy=True)
        self.register_buffer("tid2eid", table)
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x: Tensor, input_ids: Tensor | None = None) -> Routing:
        """Route every token of x, (..., H); ``input_ids``, int64, one for each token, are for hash routing only.

        Raises:
            ValueError: another hidden size; NaN or infinite logits, or fewer than k experts that the bias leaves open,
                naming the first such token (not checked on CUDA, where it would make the CPU wait); missing ids.
        """
        if x.shape[-1] != self.hidden_size:
            raise ValueError(f"x: got hidden size {x.shape[-1]}, expected {self.hidden_size}")
        x, bias = x.reshape(-1, self.hidden_size), self.e_score_correction_bias
        with no_autocast(x):
            logits = F.linear(x.float(), self.weight.float())  # (N, E)
        refuse(NOT_FINITE, ~logits.isfinite())
        scores = SCORES[self.scoring_func](logits)  # (N, E)
        if self.tid2eid is not None:
            indices = self._look_up(input_ids, len(x))
        else:
            biased = scores.detach() if bias is None else scores.detach() + bias  # (N, E), a choice has no gradient
            biased = biased if self.n_group == 1 else self._in_best_groups(biased)
            best, indices = biased.topk(self.top_k, dim=-1)  # (N, k)
            refuse(CLOSED, best == -math.inf)
        weights = scores.gather(1, indices)  # without bias: it decides who runs and not how much they say
        if self.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routing(logits, scores, indices, weights * self.routed_scaling_factor)

    def _in_best_groups(self, biased: Tensor) -> Tensor:
        """(N, E), -inf outside the best groups: by their best expert under softmax (V2), else their two best (V3)."""
        grouped = biased.unflatten(-1, (self.n_group, -1))  # (N, groups, E / groups)
        strength = grouped.topk(1 if self.scoring_func == "softmax" else 2, dim=-1).values.sum(-1)  # (N, groups)
        closed = torch.ones_like(strength, dtype=torch.bool)
        closed.scatter_(1, strength.topk(self.topk_group, dim=-1).indices, False)
        return grouped.masked_fill(closed.unsqueeze(-1), -math.inf).flatten(1)

    def _look_up(self, input_ids: Tensor | None, tokens: int) -> Tensor:
        if input_ids is None or input_ids.numel() != tokens:
            got = None if input_ids is None else tuple(input_ids.shape)
            raise ValueError(f"input_ids: got {got}, expected one id for each of {tokens} tokens (hash routing)")
        ids, last = input_ids.reshape(-1), len(self.tid2eid) - 1
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) > last):
            raise ValueError(f"input_ids: got {int(ids.min())} to {int(ids.max())}, expected 0 to {last}")
        return self.tid2eid[ids]

    def _apply(self, fn, recurse=True):
        """Moves with the model (``.to``, ``.bfloat16``), but the bias stays in float32: it settles close calls."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if bias is not None and self.e_score_correction_bias.dtype != bias.dtype:
            self.e_score_correction_bias = bias.to(self.e_score_correction_bias.device)
        return self


def check_routing(num_experts: int, top_k: int, scoring_func: str, n_group: int, topk_group: int) -> None:
    """Raise a ValueError unless a router can be built with these sizes."""
    whole(1, num_experts=num_experts)
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k: got {top_k}, expected 1 to num_experts={num_experts}")
    one_of(SCORES, scoring_func=scoring_func)
    if n_group < 1 or num_experts % n_group:
        raise ValueError(f"n_group: got {n_group}, expected a divisor of num_experts={num_experts}")
    if not 1 <= topk_group <= n_group:
        raise ValueError(f"topk_group: got {topk_group}, expected 1 to n_group={n_group}")
    size = num_experts // n_group
    if top_k > topk_group * size:
        raise ValueError(f"top_k: got {top_k}, expected at most {topk_group * size}, those in {topk_group} groups")
    if n_group > 1 and scoring_func != "softmax" and size < 2:
        raise ValueError(f"n_group: got {n_group}, expected groups of at least 2 experts (a group's two best count)")


NOT_FINITE = "router logits: NaN or infinite for {} of {} tokens, first at {}; expected finite states and weights"
CLOSED = (
    "router: fewer than top_k experts are open to {} of {} tokens, first at {}; expected top_k finite biases in reach"
)


def refuse(message: str, bad: Tensor) -> None:
    """Raise a ValueError if any of (N, ...) is True, with the tokens in its text."""
    if bad.device.type != "cuda" and bad.any():
        tokens = bad.flatten(1).any(1)
        raise ValueError(message.format(int(tokens.sum()), len(tokens), int(tokens.nonzero()[0])))
