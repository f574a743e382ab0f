"""What a decoder's layers are made of: RMSNorm, rotary positions, attention, SwiGLU, and the block around them.

Shapes: B batch, T new tokens, S keys seen, C hidden, H query heads, K key/value heads, D head size.

Book: ``chapters/architecture/decoder.ipynb``. Sources: Llama (arXiv 2302.13971, section 2.2) for the block, RMSNorm
(arXiv 1910.07467), RoFormer (arXiv 2104.09864) for rotary positions, GQA (arXiv 2305.13245) for grouped queries, GLU
variants (arXiv 2002.05202) for SwiGLU.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dslib.architecture.cache import KVCache, Step
from dslib.architecture.config import RopeScaling
from dslib.architecture.window import window_attention


class Block(nn.Module):
    """One layer: attention, then a feed-forward network, each behind a norm and added to the residual stream.

    Args:
        attention: called as ``attention(x, rope, step, cache, layer)``. mlp: called as ``mlp(x)``.
    """

    def __init__(self, config, attention: nn.Module, mlp: nn.Module):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = mlp

    def forward(self, x: Tensor, rope, step: Step, cache: KVCache | None, layer: int, input_ids: Tensor | None = None):
        """(B, T, C) -> the same; ``layer`` is the block's number, ``input_ids`` (B, T) for blocks that look at them."""
        x = x + self.self_attn(self.input_layernorm(x), rope, step, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))

    def remember(self, x: Tensor, rope, cache: KVCache, layer: int) -> None:
        """Put (B, T, C) tokens that skip this block into the cache, for later ones to look at, and do nothing else."""
        self.self_attn.remember(self.input_layernorm(x), rope, cache, layer)


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x²) + eps) * weight``, the mean taken in float32.

    Under autocast x may be bfloat16 beside weights in float32, of which torch would warn: x takes their format first.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps).to(x.dtype)


class HeadNorm(RMSNorm):
    """RMSNorm of each head of queries or of keys (QK norm, as in Qwen3): scores then cannot grow without bound.

    A class of its own, so that whoever stands in for a decoder's modules sees that there is one more.
    """


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """``softmax(q kᵀ / sqrt(D)) v``, every score written down: what the fused calls below compute without doing so.

    Args:
        q: (B, H, T, D). k, v: (B, K, S, D); H is a multiple of K, and as many query heads share a key/value head.
        mask: bool, broadcastable to (B, H, T, S), True where a query may look; None hides no key.
    """
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)  # (B, H, S, D)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, H, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(dim=-1) @ v  # (B, H, T, S) x (B, H, S, D)


def rope_angles(
    positions: Tensor, head_dim: int, theta: float, scaling: float | RopeScaling = 1.0, dtype=torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines for :func:`apply_rope`, each (1 or B, T, 1, D); the first half of ``sin`` is negated.

    Args:
        positions: int64, (1 or B, T).
        theta: base of the frequencies; pair i of a head turns by ``theta ** (-2 i / head_dim)`` a position.
        scaling: a number divides the positions (deepseek-coder-1.3b has 4); a rule slows some pairs, see its class.
    """
    if scaled := isinstance(scaling, RopeScaling):
        frequency = scaling.frequencies(head_dim, theta, positions.device)  # (D/2,)
    else:
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
        frequency = 1.0 / (scaling * theta**exponent)  # (D/2,)
    angle = positions.to(torch.float32).unsqueeze(-1) * frequency  # (1 or B, T, D/2)
    cos, sin = angle.cos(), angle.sin()
    if scaled:
        cos, sin = cos * scaling.magnitude, sin * scaling.magnitude
    cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)  # (1 or B, T, D)
    return cos.to(dtype).unsqueeze(2), sin.to(dtype).unsqueeze(2)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (i, i + D/2) of every head by its angle: (B, T, H, D) -> the same shape.

    The pair (a, b) becomes (a cos - b sin, b cos + a sin). Rolling by half a head puts each element's partner in its
    place; the minus sign waits in ``sin``. That is the layout of Llama checkpoints in the Hugging Face format.
    """
    partner = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos, partner, sin)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions, an optional window and an optional cache.

    Queries, keys and values come from one matrix product (``qkv_proj``, rows in that order): the weights are read in
    one sweep, and two kernel launches are saved.
    """

    def __init__(self, config):
        super().__init__()
        self.query_heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.window, self.sinks = config.sliding_window, config.attention_sinks
        heads = self.query_heads + 2 * self.kv_heads
        self.qkv_proj = nn.Linear(config.hidden_size, heads * self.head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(self.query_heads * self.head_dim, config.hidden_size, bias=False)
        self.q_norm = HeadNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = HeadNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], step: Step, cache: KVCache | None = None, layer: int = 0):
        """(B, T, C) -> (B, T, C)."""
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H + 2 K, D)
        qk, v = qkv.split_with_sizes((self.query_heads + self.kv_heads, self.kv_heads), dim=2)  # H + K heads, K heads
        if self.q_norm is not None:
            q, k = qk.split_with_sizes((self.query_heads, self.kv_heads), dim=2)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=2)
        qk = apply_rope(qk, *rope)  # queries and keys together: at one position they turn by one angle
        q, k = qk.split_with_sizes((self.query_heads, self.kv_heads), dim=2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D), (B, K, T, D) twice
        if cache is not None:
            k, v = cache.update(layer, k, v)  # writes the new tokens; gives all that they may look at, (B, K, S, D)
        y = attend(q, k, v, step, self.window, self.sinks)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, H D) -> (B, T, C)

    def remember(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache, layer: int) -> None:
        """Keep keys and values of (B, T, C) tokens that skip this layer, for later ones to look at."""
        kv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))[:, :, self.query_heads :]  # (B, T, 2 K, D)
        k, v = kv.chunk(2, dim=2)
        k = k if self.k_norm is None else self.k_norm(k)
        cache.update(layer, apply_rope(k, *rope).transpose(1, 2), v.transpose(1, 2))


def attend(q: Tensor, k: Tensor, v: Tensor, step: Step, window: int | None = None, sinks: int = 0) -> Tensor:
    """:func:`plain_attention` of T new tokens over whatever the cache returned, by torch's fused kernels."""
    if step.causal and window is not None and window < q.shape[2]:
        return window_attention(q, k, v, window, sinks)
    if q.shape[2] > 1:
        shared = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=step.mask, is_causal=step.causal, enable_gqa=shared)
    # One new token. Query heads that share a key/value head become rows of one small attention problem, so that nothing
    # has to be repeated: (B, H, 1, D) -> (B, K, H/K, D).
    grouped = q.view(q.shape[0], k.shape[1], -1, q.shape[-1])
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=step.mask).view_as(q)


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``; gate and up share one matrix product (rows of gate first)."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None, sinks: int = 0) -> Tensor:
    """:func:`attend` of a whole text, (B, H, T, D) queries over (B, K, T, D), without a model around it."""
    positions = torch.arange(q.shape[2], device=q.device).unsqueeze(0)
    return attend(q, k, v, Step(positions, causal=True), window, sinks)
