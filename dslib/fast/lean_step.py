"""One token of one sequence on a CPU: the decoder's forward pass with everything but the arithmetic taken away.

Decoding a small model on a CPU spends a third of its time outside the matrix products: dozens of tiny operations a
layer, and the module calls around them, each running with caches that the weights have just swept clean.
:class:`LeanStep` computes what :class:`~dslib.architecture.decoder.Decoder` computes with about half the operations.
What it leaves out:

* module calls: the loop runs over functions and plain tensors, collected once;
* the copies of key and value: both are written to the cache by one copy, as they lie side by side in the projection;
* most of the norm: ``x / hypot(|x|, sqrt(C eps))`` times ``sqrt(C) weight`` is RMSNorm in four operations.

The weights are those of the model, not copies. When it may stand for the model is the business of
:mod:`dslib.fast.token_step`.

Shapes: C hidden size, Hq query heads, Hk key-value heads, D head size, S keys.

Book: ``chapters/performance/speed.ipynb``, section "Where the time of one token goes".
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dslib.architecture.cache import BufferCache
from dslib.architecture.decoder import Decoder
from dslib.architecture.experts import Experts
from dslib.architecture.int4.layers import Int4Linear
from dslib.architecture.layers import Attention, RMSNorm, SwiGLU
from dslib.architecture.moe import SCORES, MoE, Routing
from dslib.architecture.published import MultiHeadLatentAttention
from dslib.architecture.vision.cross_attention import GatedCrossAttention, ImageContext, SeeingBlock
from dslib.architecture.window import RollingCache
from dslib.fast.linear import row_product
from dslib.fast.shortcut import shortcut_of

Product = Callable[[Tensor], Tensor]  # one row times a matrix, (1, in) -> (1, out)


class LeanStep:
    """``step(token, cache, image)`` -> (1, vocab_size) logits, for a model that ``token_step.why_not`` lets pass.

    ``image`` is what a vision-language model has seen, for one sequence; its cached keys and values are what every new
    token looks at. (A projector's picture is in the cache of the text already.)
    """

    def __call__(self, token: int, cache: BufferCache, image: ImageContext | None = None) -> Tensor:
        """Append ``token`` to ``cache`` (at the cache's one position) and return the logits that follow it."""
        turns, looks, norms = self._turns(cache.length), self._looks(image), self._scaled_norms()
        slots, *seen = room(cache)
        x = self.embedding[token].unsqueeze(0)  # (1, C)
        for (norm_1, attend, norm_2, mlp), look, slot, *keys_values in zip(
            self.layers, looks, slots, *seen, strict=True
        ):
            if look is not None:
                x = self._look(x, look, norms)
            x = x + attend(self._normed(x, norms[norm_1]), turns, slot, *keys_values)
            x = x + mlp(self._normed(x, norms[norm_2]))
        return self.head(self._normed(x, norms[self.last_norm]))

    def _normed(self, row: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm of (1, C), where ``weight`` has been multiplied by sqrt(C)."""
        length = torch.linalg.vector_norm(row, dtype=torch.float32)
        return torch.div(row * weight, torch.hypot(length, self.eps)).to(row.dtype)

    def _turns(self, position: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines, (heads or 1, D) each. Values are not rotated: for them, these are one and zero."""
        cos, sin = self.rope(torch.tensor([[position]], device="cpu"), self.embedding.dtype)
        cos, sin = cos.view(1, -1), sin.view(1, -1)
        if self.rotated is None:
            return cos, sin
        rotated, still = self.rotated
        cos, sin = cos.expand(rotated, -1), sin.expand(rotated, -1)
        ones = cos.new_ones(still, cos.shape[1])
        return torch.cat((cos, ones)), torch.cat((sin, 0 * ones))

    def _look(self, x: Tensor, look: tuple, norms: tuple[Tensor, ...]) -> Tensor:
        """One gated cross-attention block."""
        (norm, w_q, w_o, gate, mlp), k, v = look
        h = self._normed(x, norms[norm])
        y = F.scaled_dot_product_attention(w_q(h).view(1, k.shape[1], -1, k.shape[3]), k, v)
        x = x + gate(h) * w_o(y.view(1, -1))
        if mlp is not None:
            norm, w_gate_up, w_down, gate = mlp
            h = self._normed(x, norms[norm])
            inner, up = w_gate_up(h).chunk(2, dim=-1)
            x = x + gate(h) * w_down(F.silu(inner).mul_(up))
        return x

    # What the loop runs over, collected once.

    def __init__(self, model: Decoder):
        config = model.config
        self.embedding, self.rope = model.embed_tokens.weight.detach(), model.rope
        self.eps = torch.tensor(math.sqrt(config.hidden_size * config.rms_norm_eps), dtype=torch.float32, device="cpu")
        self.norm_weights: list[Tensor] = []  # of all norms; below, a norm is its place in this list
        kv_heads, latent = config.num_key_value_heads, isinstance(model.layers[0].self_attn, MultiHeadLatentAttention)
        self.rotated = None if latent else (config.num_attention_heads + kv_heads, kv_heads)
        attention = self._latent if latent else self._attention
        self.layers = [
            (
                self._norm(layer.input_layernorm),
                attention(layer.self_attn),
                self._norm(layer.post_attention_layernorm),
                (self._mixture if isinstance(layer.mlp, MoE) else self._swiglu)(layer.mlp),
            )
            for layer in model.layers
        ]
        self.last_norm, self.head = self._norm(model.norm), self._product(model.lm_head)
        self.eyes = [self._eye(layer.cross) if isinstance(layer, SeeingBlock) else None for layer in model.layers]

    def _attention(self, part: Attention) -> Callable[..., Tensor]:
        heads, kv_heads, dim = part.query_heads, part.kv_heads, part.head_dim
        w_qkv, w_o = self._product(part.qkv_proj), self._product(part.o_proj)

        def attend(h: Tensor, turns: tuple[Tensor, Tensor], slot: Tensor, k: Tensor, v: Tensor) -> Tensor:
            qkv = w_qkv(h).view(-1, dim)  # (Hq + 2 Hk, D)
            qkv = torch.addcmul(qkv * turns[0], qkv.roll(dim // 2, -1), turns[1])
            q, kv = qkv.split_with_sizes((heads, 2 * kv_heads))
            slot.copy_(kv.view(2, 1, kv_heads, dim))
            y = F.scaled_dot_product_attention(q.view(1, kv_heads, -1, dim), k, v)  # query heads of a group as rows
            return w_o(y.view(1, -1))

        return attend

    def _latent(self, part: MultiHeadLatentAttention) -> Callable[..., Tensor]:
        """The absorbed form; N, R, V: what of a head is not rotated, what is, and its value; L: the latent."""
        heads, rank, nope, rope = part.heads, part.rank, part.nope, part.rope
        w_q = self._product(part.q_b_proj if part.compressed_queries else part.q_proj)
        if part.compressed_queries:
            w_q_b, w_q_a, q_norm = w_q, self._product(part.q_a_proj), part.q_a_layernorm
            w_q = lambda h: w_q_b(q_norm(w_q_a(h)))  # noqa: E731
        w_kv, w_o, kv_norm = self._product(part.kv_a_proj_with_mqa), self._product(part.o_proj), part.kv_a_layernorm
        w_k, w_v = part.kv_b_proj.weight.detach().unflatten(0, (heads, -1)).split((nope, part.value), 1)
        w_v = w_v.mT  # (H, N, L), (H, L, V)

        def attend(h: Tensor, turns: tuple[Tensor, Tensor], slot: Tensor, kept: Tensor) -> Tensor:
            q, q_rope = w_q(h).view(heads, -1).split_with_sizes((nope, rope), 1)
            latent, key = w_kv(h).split_with_sizes((rank, rope), 1)
            turned = torch.cat((q_rope, key))  # (H + 1, R)
            turned = torch.addcmul(turned * turns[0], turned.roll(rope // 2, -1), turns[1])
            slot.copy_(torch.cat((kv_norm(latent), turned[heads:]), 1).view_as(slot))
            q = torch.cat((torch.bmm(q.unsqueeze(1), w_k).squeeze(1), turned[:heads]), 1)  # (H, L + R)
            y = F.scaled_dot_product_attention(q.view(1, 1, heads, -1), kept, kept, scale=part.scale)[0, 0, :, :rank]
            return w_o(torch.bmm(y.unsqueeze(1), w_v).view(1, -1))

        return attend

    def _mixture(self, part: MoE) -> Callable[[Tensor], Tensor]:
        router, experts = part.router, part.experts
        plain = type(experts) is Experts and experts.swiglu_limit is None and len(experts.down_proj)  # not packed
        if not plain or router.n_group > 1 or part.shared_expert_gate is not None:
            return part
        weight, bias, score = router.weight.detach(), router.e_score_correction_bias, SCORES[router.scoring_func]
        product = row_product if shortcut_of(experts) else lambda weight: partial(F.linear, weight=weight)
        w_gate_up, w_down = ([*map(product, one.detach())] for one in (experts.gate_up_proj, experts.down_proj))
        shared = part.shared_experts and self._swiglu(part.shared_experts)

        def mlp(h: Tensor) -> Tensor:
            logits = F.linear(h.float(), weight.float())  # (1, E)
            scores = score(logits)
            best, indices = (scores if bias is None else scores + bias).topk(router.top_k)
            if not math.isfinite(logits.sum() + best.sum()):
                return part(h)  # which says what is wrong
            weights = scores.gather(1, indices)
            if router.norm_topk_prob:
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
            part.last_routing = routing = Routing(logits, scores, indices, weights * router.routed_scaling_factor)
            chosen = indices[0].tolist()
            gate, up = torch.cat([w_gate_up[expert](h) for expert in chosen]).chunk(2, dim=-1)  # (k, I) each
            inner = F.silu(gate).mul_(up).split(1)
            out = torch.cat([w_down[expert](row) for expert, row in zip(chosen, inner, strict=True)])  # (k, C)
            y = routing.weights.to(h.dtype) @ out
            return y if shared is None else y + shared(h)

        return mlp

    def _swiglu(self, part: SwiGLU) -> Callable[[Tensor], Tensor]:
        w_gate_up, w_down = self._product(part.gate_up_proj), self._product(part.down_proj)

        def mlp(h: Tensor) -> Tensor:
            gate, up = w_gate_up(h).chunk(2, dim=-1)
            return w_down(F.silu(gate).mul_(up))

        return mlp

    def _norm(self, norm: RMSNorm) -> int:
        self.norm_weights.append(norm.weight.detach())
        return len(self.norm_weights) - 1

    def _product(self, linear: nn.Linear | Int4Linear) -> Product:
        if isinstance(linear, Int4Linear):
            product = shortcut_of(linear).row_product(self.embedding.dtype)
        else:
            weight = linear.weight.detach()
            product = row_product(weight) if shortcut_of(linear) else partial(F.linear, weight=weight)
        if linear.bias is None:
            return product
        bias = linear.bias.detach()
        return lambda row: product(row) + bias.to(row.dtype)  # that of four bits may be of another dtype

    def _eye(self, block: GatedCrossAttention) -> tuple:
        """What a gated cross-attention block needs."""
        mlp = None
        if block.mlp is not None:
            products = self._product(block.mlp.gate_up_proj), self._product(block.mlp.down_proj)
            mlp = (self._norm(block.post_attention_layernorm), *products, block.mlp_gate)
        products = self._product(block.q_proj), self._product(block.o_proj)
        return self._norm(block.input_layernorm), *products, block.gate, mlp

    def _scaled_norms(self) -> tuple[Tensor, ...]:
        """The weights of all norms, times sqrt(C): made anew for every token, so that they are never out of date."""
        return torch.stack(self.norm_weights).float().mul_(math.sqrt(self.embedding.shape[1])).unbind(0)

    def _looks(self, image: ImageContext | None) -> list[tuple | None]:
        """For every layer the block and its keys and values, or None."""
        if image is None or not image.keys_values or (image.mask is not None and not image.mask.any()):
            return [None] * len(self.layers)
        real = slice(None) if image.mask is None else image.mask[0]
        seen = iter(image.keys_values)
        return [eye and (eye, *(part[:, :, real] for part in next(seen))) for eye in self.eyes]


def room(cache: BufferCache) -> tuple[tuple[Tensor, ...], ...]:
    """Count one more token in: per layer the slot to write, (2, 1, Hk, D), and the keys and values to attend to.

    The views for all layers are made in one go, which is what makes the loop quick. The keys and values, (1, Hk, S, D)
    each, already include the slot: write it first. (Of latents: slots (1, 1, 1, L + R), one part (1, 1, S, L + R).)
    """
    at, window, sinks = cache.length, cache.window, cache.sinks
    if isinstance(cache, RollingCache):
        slot, first, stop = at if at < sinks else sinks + (at - sinks) % window, 0, min(at + 1, sinks + window)
    else:
        slot, first, stop = at, 0 if window is None else max(0, at + 1 - window), at + 1
    cache.length = at + 1
    seen = cache.buffer.narrow(4, first, stop - first)
    return cache.buffer.select(4, slot).unbind(0), *(part.unbind(0) for part in seen.unbind(1))
