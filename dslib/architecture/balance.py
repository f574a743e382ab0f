"""Keeping the experts of a mixture busy: auxiliary losses, the selection bias, and statistics of the load.

Left alone, a router may send ever more tokens to the experts that were a little better at the start, because only those
get gradients. There are two kinds of cure. A *loss* pulls the scores of busy experts down, with a gradient that also
moves what the model learns. The *bias* of DeepSeek-V3 only changes who is chosen, by a rule outside the gradient::

    f, P = load / tokens, scores.mean(0)                    # (E,) each: who was chosen, and how much they are liked
    loss = loss + alpha * E * (f * P).sum()                 # Switch: over the batch
    loss = loss + alpha * E / k * (f * P).sum()             # V3: the same within each sequence, then the mean
    bias = bias + speed * (load.mean() - load).sign()       # V3: after the step; the router chooses by scores + bias

Shapes: N tokens, E experts, k experts a token, B sequences. A ``mask`` is bool with one entry a token, True where the
token is real; padding then counts for nothing. The losses are for one layer and have no weight in front.

Book: ``chapters/architecture/balance.ipynb``. Sources: GShard (arXiv 2006.16668, section 2.2), Switch (arXiv
2101.03961, eq. 4 to 6), ST-MoE (arXiv 2202.08906, eq. 5), loss-free balancing (arXiv 2408.15664), DeepSeek-V3 (arXiv
2412.19437, eq. 16 to 20).
"""

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dslib.architecture.experts import count
from dslib.architecture.moe import MoE, Router, Routing
from dslib.check import above, at_least, whole


def switch_loss(scores: Tensor, indices: Tensor, mask: Tensor | None = None) -> Tensor:
    """``E x sum of f_i P_i``: the share of tokens that chose expert i, times its mean score.

    Only P carries a gradient; f says which experts to push down. With k choices the shares sum to k, as in Mixtral's
    code (Switch has k = 1): even routing gives k, and all tokens on the same k experts up to E.

    Args:
        scores: (N, E), not negative; scores that do not sum to 1, as a sigmoid's, are divided by their sum.
        indices: int64, (N, k). Assignments with index E (dropped) count for no expert.

    Raises:
        ValueError: shapes that do not fit, an index out of range, no real token.
    """
    real = _real(scores, indices, mask)
    share = expert_load(indices, scores.shape[1], real).to(scores.dtype) / real.sum()
    mean_score = (_probabilities(scores) * real.unsqueeze(1)).sum(0) / real.sum()
    return scores.shape[1] * (share * mean_score).sum()


def sequence_loss(scores: Tensor, indices: Tensor, batch_size: int, mask: Tensor | None = None) -> Tensor:
    """DeepSeek-V3's loss: :func:`switch_loss` within each sequence, divided by k; then the mean over sequences.

    Even routing gives 1. The paper counts the top k of the scores *without* the selection bias (eq. 18); for that, pass
    ``scores.topk(k).indices``, as :func:`total_balance_loss` does.

    Args:
        batch_size: B; the first N/B tokens are the first sequence, and so on. Sequences of padding alone are left out.

    Raises: as :func:`switch_loss`, and ValueError for a batch size that does not divide N.
    """
    real, (tokens, experts), top_k = _real(scores, indices, mask), scores.shape, indices.shape[1]
    if batch_size < 1 or tokens % batch_size:
        raise ValueError(f"batch_size: got {batch_size}, expected a divisor of the {tokens} tokens")
    real = real.to(scores.dtype).view(batch_size, -1, 1)  # (B, T, 1)
    length = real.sum(1).clamp(min=1)  # (B, 1)
    # A row of counters for each sequence, with one more at its end for assignments that were dropped.
    counts = scores.new_zeros(batch_size, experts + 1)
    counts.scatter_add_(1, indices.reshape(batch_size, -1), real.expand(-1, -1, top_k).flatten(1))
    share = counts[:, :experts] * experts / (top_k * length)  # (B, E), f of eq. 18
    mean_score = (_probabilities(scores).view(batch_size, -1, experts) * real).sum(1) / length  # (B, E), P of eq. 20
    return (share * mean_score).sum() / real.amax(1).sum()


def z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of ``logsumexp(logits) ** 2``: keeps router logits, (N, E), small. It does not balance anything."""
    if logits.ndim != 2 or len(logits) == 0:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, expected (tokens, experts), at least one token")
    real = _mask(mask, len(logits), logits.device)
    return (logits.logsumexp(-1).square() * real).sum() / real.sum()


@torch.no_grad()
def update_bias(router: Router, load: Tensor, speed: float) -> None:
    """Move the selection bias of every expert by ``speed``: up if it had less than the mean load, down if more.

    Call it after each optimiser step with the load of the whole batch, (E,), all ranks summed. Published: 0.001. With
    ``fit(accumulate=k)``, ``last_routing`` is that of the last part: a fair sample, and only the sign counts. To have
    the load of all parts, add up ``expert_load(…)`` in ``loss``, and use and clear the sum in ``after_step``.

    Raises:
        ValueError: no selection bias, another number of experts, a load or a speed that is no number or below 0.
    """
    bias = router.e_score_correction_bias
    if bias is None:
        raise ValueError("router: got one without selection bias, expected Router(…, selection_bias=True)")
    if load.shape != bias.shape:
        raise ValueError(f"load: got shape {tuple(load.shape)}, expected ({router.num_experts},)")
    at_least(0, speed=speed)
    # Compared as whole numbers: in float32, near-even loads beyond 2 ** 24 would be one and the same.
    load = load.double() if load.is_floating_point() else load.long()
    at_least(0, load=load.min().item() if load.isfinite().all() else math.nan)
    bias += speed * (load.sum() - load * len(load)).sign().to(bias)


def expert_load(indices: Tensor, num_experts: int, mask: Tensor | None = None) -> Tensor:
    """How many real tokens each expert gets: int64 (N, k) -> int64 (E,). Index E (dropped) is not counted."""
    return _counts(indices, num_experts, mask)[:num_experts]


@dataclasses.dataclass(frozen=True, eq=False)
class LoadStats:
    """What the experts of one layer had to do: int64 (E,) tokens of each, and assignments that found no room."""

    counts: Tensor
    dropped: int = 0

    @property
    def share(self) -> Tensor:
        """float32, (E,), each expert's share of the assignments that were served; sums to 1 (if none was, to 0)."""
        return (self.counts.double() / self.counts.sum().clamp(min=1)).float()

    @property
    def max_vio(self) -> float:
        """(largest load - mean load) / mean load: 0 is even (or no load); E / k - 1 if all choose the same k."""
        return int(self.counts.max()) * len(self.counts) / total - 1 if (total := int(self.counts.sum())) else 0.0

    @property
    def entropy(self) -> float:
        """Entropy of the shares over its maximum, log E: 1 is even, 0 is a single expert."""
        return float(torch.special.entr(self.share).sum() / math.log(max(2, len(self.counts))))

    @property
    def idle(self) -> float:
        """Share of the experts that got no token at all."""
        return float((self.counts == 0).float().mean())


def load_statistics(indices: Tensor, num_experts: int, mask: Tensor | None = None) -> LoadStats:
    """Statistics of some choices, int64 (N, k). For the load over many batches, pass their indices concatenated.

    Raises:
        ValueError: not (N, k) integers, an index outside 0 to E, no real token, a mask of another length.
    """
    *counts, dropped = _counts(indices, num_experts, mask).tolist()
    return LoadStats(torch.tensor(counts), dropped)


def moe_layers(model: nn.Module) -> Iterator[MoE]:
    """The mixtures in a model, in the order of its modules."""
    return (module for module in model.modules() if isinstance(module, MoE))


def total_balance_loss(
    model: nn.Module, *, switch: float = 0.0, sequence: float = 0.0, z: float = 0.0, batch_size: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Weighted losses of all layers that have just been run, summed, float32; call it after the forward pass.

    Layers with hash routing are left out: nothing moves their choice. transformers pools the tokens of all layers
    instead of summing, so that there an expert that is busy in one layer may make up for its idle namesake in another.

    Args:
        switch, sequence, z: weights of the three losses; 0.01 (Switch), 0.0001 (V3) and 0.001 (ST-MoE) were published.
        batch_size: sequences in the batch; needed for ``sequence`` only.

    Raises:
        ValueError: no layer to balance, a layer that has not been run with gradients, ``batch_size`` missing.
    """
    layers = [layer for layer in moe_layers(model) if layer.router.tid2eid is None]
    if not layers:
        raise ValueError("model: got no mixture of experts with a choice to balance, expected at least one")
    if sequence and batch_size is None:
        raise ValueError("batch_size: got None, expected the number of sequences (for the sequence-wise loss)")
    total = torch.zeros((), dtype=torch.float32, device=layers[0].router.weight.device)
    for layer in layers:
        routing = layer.last_routing
        if routing is None or not routing.logits.requires_grad:
            raise ValueError("model: got a layer not yet run with gradients, expected a forward pass in training first")
        if switch:
            total = total + switch * switch_loss(routing.scores, routing.indices, mask)
        if sequence:
            biased = layer.router.e_score_correction_bias is not None
            chosen = routing.scores.topk(layer.router.top_k, dim=-1).indices if biased else routing.indices
            total = total + sequence * sequence_loss(routing.scores, chosen, batch_size, mask)
        if z:
            total = total + z * z_loss(routing.logits, mask)
    return total


def limited(routing: Routing, capacity: int) -> Routing:
    """The same decisions with at most ``capacity`` tokens an expert: how models were kept in step before dropless ones.

    First choices are served before second choices, and earlier tokens before later ones, as in GShard. What finds no
    room is dropped: it gets index E, one past the last expert, and weight 0; the remaining weights stay as they are.

    Raises: ValueError for a negative capacity.
    """
    whole(0, capacity=capacity)
    tokens, top_k = routing.indices.shape
    served = routing.indices.T.reshape(-1)  # (k N): all first choices, then all second choices, …
    order = served.argsort(stable=True)
    load = torch.bincount(served, minlength=routing.num_experts)
    first = (load.cumsum(0) - load)[served[order]]  # where this expert's run begins in the sorted list
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device) - first
    full = (place >= capacity).view(top_k, tokens).T
    indices, weights = routing.indices.masked_fill(full, routing.num_experts), routing.weights.masked_fill(full, 0.0)
    return dataclasses.replace(routing, indices=indices, weights=weights)


class CapacityRouter(Router):
    """A router whose experts take at most ``capacity_factor * N * k / E``, rounded down, of a call's N tokens (Switch).

    The rest is dropped, see :func:`limited`: such a token has only what its other experts and the shared ones give.

    Raises: ValueError for a factor that is not above 0, and what :class:`Router` refuses.
    """

    def __init__(self, *sizes: int, capacity_factor: float, **rule):
        super().__init__(*sizes, **rule)
        above(0, capacity_factor=capacity_factor)
        self.capacity_factor = capacity_factor

    def forward(self, x: Tensor, input_ids: Tensor | None = None) -> Routing:
        routing = super().forward(x, input_ids)
        room = self.capacity_factor * routing.indices.numel() / routing.num_experts
        return limited(routing, math.floor(room * (1 + 1e-9)))  # 0.29 of 100 is 28.99… in floats


def _probabilities(scores: Tensor) -> Tensor:
    return scores / (scores.sum(-1, keepdim=True) + 1e-20)


def _counts(indices: Tensor, num_experts: int, mask: Tensor | None) -> Tensor:
    """int64, (E + 1,): real assignments of every index, the dropped ones last."""
    if indices.ndim != 2 or indices.dtype != torch.int64 or indices.numel() == 0:
        got = f"{indices.dtype} of shape {tuple(indices.shape)}"
        raise ValueError(f"indices: got {got}, expected int64, (tokens, top_k), at least one token")
    real = _mask(mask, len(indices), indices.device).repeat_interleave(indices.shape[1])
    return count(indices.flatten(), num_experts + 1, real)


def _real(scores: Tensor, indices: Tensor, mask: Tensor | None) -> Tensor:
    if scores.ndim != 2 or len(scores) != len(indices):
        raise ValueError(f"scores: got shape {tuple(scores.shape)}, expected ({len(indices)}, experts) as for indices")
    _counts(indices, scores.shape[1], None)
    return _mask(mask, len(scores), scores.device)


def _mask(mask: Tensor | None, tokens: int, device: torch.device) -> Tensor:
    """The mask flat and bool; all True if there is none."""
    if mask is None:
        return torch.ones(tokens, dtype=torch.bool, device=device)
    if mask.numel() != tokens:
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, expected one entry for each of {tokens} tokens")
    mask = mask.flatten().bool()
    if mask.device.type != "cuda" and not mask.any():
        raise ValueError("mask: got no real token, expected at least one")
    return mask
