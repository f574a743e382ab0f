"""A training step of the whole model, sooner: :class:`QuickLosses` computes what ``Whole.losses`` computes.

At this size the products of matrices take half of a plain step on a CPU; the rest moves numbers between them. Three
changes, each by itself the same function of the same weights:

* **experts** (:class:`Mixture`): one product after another on slices of the sorted rows, written where they belong,
  with a backward pass of its own, which inverts the order of rows by looking up, not by adding; slices are
  :class:`Filled` up, so that few shapes occur;
* **head and loss** (:class:`HeadLoss`): 1,024 tokens at a time, gradient included, so that the (tokens x vocabulary)
  logits stay in the processor's cache and are never read again;
* **everything between products** (norms, rotations, softmax, SwiGLU) is fused by ``torch.compile``, where a C++
  compiler is there. Attention is written out for that (scores, softmax): torch's fused kernel has a slow backward pass
  on CPUs.

Book: ``chapters/architecture/whole.ipynb``, section "How fast a step is". The tests hold losses and
gradients to the plain way's.
"""

import shutil
from contextlib import nullcontext
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dslib.architecture.experts import Pairs, autocast_dtype
from dslib.architecture.layers import Block
from dslib.architecture.moe import MoE
from dslib.architecture.whole import Losses, Whole


class Filled:
    """Sorted :class:`Pairs`, each expert's filled up to a multiple of ``UNIT`` rows with pairs of weight 0.

    oneDNN, which multiplies bfloat16 on CPUs, builds a kernel for every new number of rows: 2 to 6 ms, for products of
    0.15 ms. Loads change with every step; rounded up they soon repeat.

    Attributes:
        tokens: int64, (S',): whose state each row holds; token 0's where it only fills.
        rows: int64, (S,): where each sorted pair is. places: int64, (N, k): where each token's pairs are.
        slices: (expert, its rows), for experts that have any.
    """

    UNIT = 64

    def __init__(self, pairs: Pairs):
        filling = -pairs.load % self.UNIT  # (E,)
        before = filling.cumsum(0) - filling
        self.rows = torch.arange(len(pairs.order), device=before.device) + before[pairs.experts]
        self.places, self.order = self.rows[pairs.places], pairs.order
        ends = list(accumulate(-(-count // self.UNIT) * self.UNIT for count in pairs.counts))
        starts = [0, *ends[:-1]]
        self.tokens = pairs.tokens.new_zeros(ends[-1]).index_copy(0, self.rows, pairs.tokens)
        self.slices = [(e, slice(*at)) for e, at in enumerate(zip(starts, ends, strict=True)) if at[0] < at[1]]


class Mixture(torch.autograd.Function):
    """``sum over k of weight * expert(x)``: (N, H), (N, k), (E, 2 I, H), (E, H, I), pairs -> (N, H)."""

    @staticmethod
    def forward(ctx, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, pairs: Filled) -> Tensor:
        rows = x[pairs.tokens]  # (S', H), sorted by expert
        inside = rows.new_empty(len(rows), gate_up.shape[1])  # (S', 2 I)
        for expert, at in pairs.slices:
            torch.mm(rows[at], gate_up[expert].T, out=inside[at])
        gate, up = inside.chunk(2, dim=-1)
        inner, out = F.silu(gate) * up, torch.empty_like(rows)  # (S', I), (S', H)
        for expert, at in pairs.slices:
            torch.mm(inner[at], down[expert].T, out=out[at])
        ctx.save_for_backward(rows, weights, gate_up, down, inside, out)
        ctx.pairs = pairs
        return F.embedding_bag(pairs.places, out, mode="sum", per_sample_weights=weights.to(out.dtype))

    @staticmethod
    def backward(ctx, gradient: Tensor):
        rows, weights, gate_up, down, inside, out = ctx.saved_tensors
        pairs, gradient = ctx.pairs, gradient[ctx.pairs.tokens]  # (S', H): every pair gets its token's gradient
        by_weight = (gradient * out).sum(-1)[pairs.places]  # (N, k)
        sorted_weights = weights.flatten()[pairs.order].to(gradient.dtype)
        by_out = gradient * gradient.new_zeros(len(rows)).index_copy(0, pairs.rows, sorted_weights).unsqueeze(1)
        gate, up = inside.chunk(2, dim=-1)
        slope = gate.sigmoid()
        silu = gate * slope
        inner, by_inner, by_down = silu * up, torch.empty_like(gate), torch.zeros_like(down)
        for expert, at in pairs.slices:
            torch.mm(by_out[at], down[expert], out=by_inner[at])
            torch.mm(by_out[at].T, inner[at], out=by_down[expert])
        # silu'(g) = s(g) (1 + g (1 - s(g)))
        by_inside = torch.cat((by_inner * up * torch.addcmul(slope, silu, 1 - slope), by_inner * silu), dim=-1)
        by_rows, by_gate_up = torch.empty_like(rows), torch.zeros_like(gate_up)
        for expert, at in pairs.slices:
            torch.mm(by_inside[at], gate_up[expert], out=by_rows[at])
            torch.mm(by_inside[at].T, rows[at], out=by_gate_up[expert])
        by_x = F.embedding_bag(pairs.places, by_rows, mode="sum")  # each token's k rows, added up
        return by_x, by_weight.to(weights.dtype), by_gate_up, by_down, None


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of ``x weightᵀ``: (N, C) states, (V, C), int64 (N,) targets -> scalar, float32."""

    ROWS = 1024  # their logits, 16 MB for 4,096 tokens in float32, are the largest tensor there is

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        by_x, by_weight = torch.empty_like(x), torch.zeros_like(weight)
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        for part, wanted, out in zip(*(t.split(HeadLoss.ROWS) for t in (x, targets, by_x)), strict=True):
            logits, wanted = (part @ weight.T).float(), wanted.unsqueeze(1)  # (rows, V), (rows, 1)
            logits -= logits.logsumexp(-1, keepdim=True)
            total -= logits.gather(1, wanted).sum()
            minus_one = torch.full_like(wanted, -1, dtype=logits.dtype)
            logits.exp_().scatter_add_(1, wanted, minus_one)  # p, and p - 1 at the target
            error = logits.to(x.dtype)
            torch.mm(error, weight, out=out)
            by_weight.addmm_(error.T, part)
        ctx.save_for_backward(by_x, by_weight)
        return total / len(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        by_x, by_weight = ctx.saved_tensors
        share = gradient / len(by_x)
        return by_x * share, by_weight * share, None


class QuickLosses:
    """``QuickLosses(model)(rows, predicted)`` gives the :class:`Losses` of ``model.losses(rows, predicted)``.

    Gradients go to the model's own weights. Under autocast, products run in its dtype.

    Args:
        compiled: fuse by ``torch.compile``; None where a compiler is there (:func:`compiler`). The first step, and the
            first with another shape, then takes about a minute.
    """

    def __init__(self, model: Whole, compiled: bool | None = None):
        self.model = model
        self.compiled = compiler() is not None if compiled is None else compiled
        self._front = torch.compile(_front, dynamic=False) if self.compiled else _front

    def __call__(self, rows: Tensor, predicted: int | None = None) -> Losses:
        # Each layer and each shape has code of its own; beyond torch's limit of 8 the rest would run unfused.
        with torch._dynamo.config.patch(recompile_limit=64) if self.compiled else nullcontext():
            return self.model.losses(rows, predicted, self._block, self._loss)

    def _block(self, block: Block, x: Tensor, rope, step, *_) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH) if self.compiled else nullcontext():
            x, normed = self._front(block, x, rope, step)
        if not isinstance(mixture := block.mlp, MoE):
            return x
        mixture.last_routing = routing = mixture.router(normed)
        flat, experts = normed.flatten(0, -2), mixture.experts
        dtype = autocast_dtype(flat) or flat.dtype
        weights = experts.gate_up_proj.to(dtype), experts.down_proj.to(dtype)
        pairs = Filled(Pairs(routing.indices, experts.num_experts))
        return x + Mixture.apply(flat.to(dtype), routing.weights, *weights, pairs).view_as(x)

    def _loss(self, states: Tensor, targets: Tensor) -> Tensor:
        dtype, head = autocast_dtype(states) or states.dtype, self.model.decoder.lm_head.weight
        return HeadLoss.apply(states.flatten(0, 1).to(dtype), head.to(dtype), targets.flatten())


def _front(block: Block, x: Tensor, rope, step) -> tuple[Tensor, Tensor]:
    """A block but for its routed experts, and what those are to work on: (B, T, C) each."""
    x = x + block.self_attn(block.input_layernorm(x), rope, step)
    normed, mlp = block.post_attention_layernorm(x), block.mlp
    always = getattr(mlp, "shared_experts", None) if isinstance(mlp, MoE) else mlp
    return (x if always is None else x + always(normed)), normed


def compiler() -> str | None:
    """The C++ compiler that ``torch.compile`` would use for a CPU, or None."""
    return next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
