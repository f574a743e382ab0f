"""One token of one sequence on a CPU: the decoder's forward pass with everything but the arithmetic taken away.

Decoding a small model on a CPU spends a third of its time outside the matrix products: dozens of tiny operations a
layer, and the module calls around them, each running with caches that the weights have just swept clean.
:class:`LeanStep` computes what :class:`~dslib.architecture.decoder.Decoder` computes with about half the operations.
What it leaves out:

* module calls: the loop runs over plain tensors, collected once;
* residual additions: ``baddbmm`` (or ``addmm``) adds while it multiplies;
* the copies of key and value: both are written to the cache by one copy, as they lie side by side in the projection;
* most of the norm: ``x / hypot(|x|, sqrt(C eps))`` times ``sqrt(C) weight`` is RMSNorm in four operations.

The weights are those of the model, not copies. When it may stand for the model is the business of
:mod:`dslib.fast.token_step`.

Book: ``chapters/architecture/decoder.ipynb``, section "Where the time goes".
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dslib.architecture.cache import BufferCache
from dslib.architecture.decoder import Decoder
from dslib.architecture.int4.layers import Int4Linear
from dslib.architecture.layers import RMSNorm, rope_angles
from dslib.architecture.vision.cross_attention import Gate, GatedCrossAttention, ImageContext, SeeingBlock
from dslib.architecture.window import RollingCache
from dslib.fast.linear import cut_rows, one_row_linear, row_chunks
from dslib.fast.shortcut import shortcut_of

Matrix = Tensor | Callable[[Tensor], Tensor]  # something to multiply a row by, or what does it


class LeanStep:
    """``step(token, cache, image)`` -> (1, vocab_size) logits, for a model that ``token_step.why_not`` lets pass.

    ``image`` is what a vision-language model has seen, for one sequence; its cached keys and values are what every new
    token looks at. (A projector's picture is in the cache of the text already.)
    """

    def __init__(self, model: Decoder):
        weight = model.embed_tokens.weight
        self.config, self.dtype, self.embedding = model.config, weight.dtype, weight.detach()
        config = model.config
        size, heads = config.hidden_size, config.num_attention_heads + 2 * config.num_key_value_heads
        # A float32 row runs on one thread unless the rows of W are cut into a batch, see linear.py. Other dtypes have
        # a threaded kernel of their own.
        rows = (heads * config.head_dim, size, 2 * config.intermediate_size, config.vocab_size)
        rows += (2 * getattr(config, "cross_intermediate_size", 0),)
        int4 = any(isinstance(module, Int4Linear) for module in model.modules())
        split = self.dtype is torch.float32 and shortcut_of(model.lm_head) is not None
        self.chunks = row_chunks(*rows) if split and not int4 else 1
        self.product, self.add_product = (torch.mm, torch.addmm) if self.chunks == 1 else (torch.bmm, torch.baddbmm)
        if int4:  # then every matrix is a function
            self.product, self.add_product = _product, _add_product
        self.functions = int4
        # The one row, and with chunks one copy of it for each: (1, size) or (chunks, 1, size).
        self.lead = (1,) if self.chunks == 1 else (self.chunks, 1)
        self.eps = torch.tensor(math.sqrt(size * config.rms_norm_eps), dtype=torch.float32)
        self.norm_weights: list[Tensor] = []  # of all norms; below, a norm is its place in this list
        self.layers = [
            (
                self._norm(layer.input_layernorm),
                self._matrix(layer.self_attn.qkv_proj),
                self._bias(layer.self_attn.qkv_proj.bias),
                self._matrix(layer.self_attn.o_proj),
                self._norm(layer.post_attention_layernorm),
                self._matrix(layer.mlp.gate_up_proj),
                self._matrix(layer.mlp.down_proj),
            )
            for layer in model.layers
        ]
        self.last_norm, self.head = self._norm(model.norm), self._matrix(model.lm_head)
        self.eyes = [self._eye(layer.cross) if isinstance(layer, SeeingBlock) else None for layer in model.layers]

    def _matrix(self, linear: nn.Linear | Int4Linear) -> Matrix:
        """(out, in) -> a view (in, out), or with chunks (chunks, in, out / chunks), or a function of the row."""
        if isinstance(linear, Int4Linear):
            return shortcut_of(linear).row_product(self.dtype)
        weight = linear.weight.detach()
        if self.functions:
            return lambda row: one_row_linear(row, weight) if row.dtype is torch.float32 else F.linear(row, weight)
        return weight.t() if self.chunks == 1 else cut_rows(weight, self.chunks)

    def _bias(self, bias: Tensor | None) -> Tensor | None:
        return None if bias is None else bias.detach().view(*self.lead, -1)

    def _norm(self, norm: RMSNorm) -> int:
        self.norm_weights.append(norm.weight.detach())
        return len(self.norm_weights) - 1

    def _scaled_norms(self) -> tuple[Tensor, ...]:
        """The weights of all norms, times sqrt(C): made anew for every token, so that they are never out of date.

        Each as often as there are chunks, so that the product comes out once per chunk of the next matrix.
        """
        count, size = len(self.norm_weights), self.config.hidden_size
        scaled = torch.stack(self.norm_weights).float().mul_(math.sqrt(size))
        return scaled.view(count, *[1] * len(self.lead), size).expand(count, *self.lead, size).unbind(0)

    def _eye(self, block: GatedCrossAttention) -> tuple:
        """What a gated cross-attention block needs."""
        mlp = None
        if block.mlp is not None:
            weights = (self._matrix(w) for w in (block.mlp.gate_up_proj, block.mlp.down_proj))
            mlp = (self._norm(block.post_attention_layernorm), *weights, _opening(block.mlp_gate))
        projections = (self._matrix(block.q_proj), self._matrix(block.o_proj))
        return self._norm(block.input_layernorm), *projections, _opening(block.gate), mlp

    def _looks(self, image: ImageContext | None) -> list[tuple | None]:
        """For every layer the block and its keys and values, or None."""
        if image is None or not image.keys_values:
            return [None] * len(self.layers)
        real = slice(None) if image.mask is None else image.mask[0]
        if image.mask is not None and not real.any():
            return [None] * len(self.layers)
        seen = iter(image.keys_values)
        return [eye and (eye, *(part[:, :, real] for part in next(seen))) for eye in self.eyes]

    def _look(self, x: Tensor, h: Tensor, look: tuple, norms: tuple[Tensor, ...]) -> Tensor:
        """One gated cross-attention block; ``h`` is room for the normed row. The gate scales the last product."""
        (norm, w_q, w_o, opening, mlp), k, v = look
        size, lead = self.config.hidden_size, self.lead
        product, add_product = self.product, self.add_product
        self._normed(x.view(1, size), norms[norm], h)
        q = product(h, w_q).view(1, k.shape[1], -1, k.shape[3])
        y = F.scaled_dot_product_attention(q, k, v)
        x = add_product(x, y.view(1, -1).expand(*lead, -1), w_o, alpha=opening(h))
        if mlp is None:
            return x
        norm, w_gate_up, w_down, opening = mlp
        self._normed(x.view(1, size), norms[norm], h)
        gate, up = product(h, w_gate_up).view(2, -1).unbind(0)
        return add_product(x, F.silu(gate).mul_(up).expand(*lead, -1), w_down, alpha=opening(h))

    def _normed(self, row: Tensor, weight: Tensor, out: Tensor) -> None:
        torch.div(
            torch.mul(row, weight), torch.hypot(torch.linalg.vector_norm(row, dtype=torch.float32), self.eps), out=out
        )

    def __call__(self, token: int, cache: BufferCache, image: ImageContext | None = None) -> Tensor:
        """Append ``token`` to ``cache`` (at the cache's one position) and return the logits that follow it."""
        config, lead, dtype = self.config, self.lead, self.dtype
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        size, inner = config.hidden_size, config.intermediate_size
        # Looked up once: the loop below runs them thirty times over.
        norm, hypot, mul, div, float32 = torch.linalg.vector_norm, torch.hypot, torch.mul, torch.div, torch.float32
        attention, eps = F.scaled_dot_product_attention, self.eps
        product, add_product = self.product, self.add_product

        position = torch.tensor([[cache.length]])
        cos, sin = rope_angles(position, dim, config.rope_theta, config.rope_scaling, dtype)
        # Values are not rotated: for their heads, the cosine is one and the sine zero.
        turn = (heads + kv_heads, dim)
        cos = torch.cat((cos.view(1, dim).expand(turn), cos.new_ones(kv_heads, dim)))  # (Hq + 2 Hk, D)
        sin = torch.cat((sin.view(1, dim).expand(turn), sin.new_zeros(kv_heads, dim)))
        slots, keys, values = room(cache)
        norms = self._scaled_norms()
        h = torch.empty(*lead, size, dtype=dtype)
        x = self.embedding[token].view(*lead, -1)  # (1, C) or (chunks, 1, C / chunks): one row, cut up
        for (n1, w_qkv, b_qkv, w_o, n2, w_gate_up, w_down), look, slot, k, v in zip(
            self.layers, self._looks(image), slots, keys, values, strict=True
        ):
            if look is not None:
                x = self._look(x, h, look, norms)
            row = x.view(1, size)
            div(mul(row, norms[n1]), hypot(norm(row, dtype=float32), eps), out=h)
            qkv = product(h, w_qkv) if b_qkv is None else add_product(b_qkv, h, w_qkv)
            qkv = qkv.view(-1, dim)  # (Hq + 2 Hk, D)
            qkv = torch.addcmul(qkv * cos, qkv.roll(dim // 2, -1), sin)
            q, kv = qkv.split_with_sizes((heads, 2 * kv_heads))
            slot.copy_(kv.view(2, 1, kv_heads, dim))
            y = attention(q.view(1, kv_heads, -1, dim), k, v)  # query heads of a group as rows
            x = add_product(x, y.view(1, -1).expand(*lead, -1), w_o)
            row = x.view(1, size)
            div(mul(row, norms[n2]), hypot(norm(row, dtype=float32), eps), out=h)
            gate, up = product(h, w_gate_up).view(2, inner).unbind(0)
            x = add_product(x, F.silu(gate).mul_(up).expand(*lead, inner), w_down)
        row = x.view(1, size)
        div(mul(row, norms[self.last_norm]), hypot(norm(row, dtype=float32), eps), out=h)
        return product(h, self.head).view(1, -1)


def room(cache: BufferCache) -> tuple[tuple[Tensor, ...], ...]:
    """Room for one more token: per layer the slot to write, (2, 1, Hk, D), and the keys and values to attend to.

    The views for all layers are made in one go, which is what makes the loop quick. The keys and values already include
    the slot: write it first.
    """
    cache.advance(1, None, cache.buffer.device)
    if isinstance(cache, RollingCache):
        slot, first, stop = int(cache._write), 0, cache._filled
    else:
        slot, first, stop = cache._start, cache._from or 0, cache._stop
    seen = cache.buffer.narrow(4, first, stop - first)
    return cache.buffer.select(4, slot).unbind(0), *(part.unbind(0) for part in seen.unbind(1))


def _product(row: Tensor, matrix: Callable[[Tensor], Tensor]) -> Tensor:
    return matrix(row)


def _add_product(x: Tensor, row: Tensor, matrix: Callable[[Tensor], Tensor], alpha: float = 1.0) -> Tensor:
    return torch.add(x, matrix(row), alpha=alpha)


def _opening(gate: Gate) -> Callable[[Tensor], float]:
    """``opening(h)`` -> how far the gate opens for the one normed row of ``h`` (which may hold copies of it)."""
    bias = gate.bias.detach()
    if gate.weight is None:
        return lambda h: torch.tanh(bias).item()
    weight = gate.weight.detach()
    return lambda h: torch.tanh(h.view(-1, len(weight))[0] @ weight + bias).item()
