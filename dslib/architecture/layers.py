"""What a decoder's layers are made of: RMSNorm, rotary positions, attention, SwiGLU, and the block around them.

Shapes: B sequences, T new tokens, S keys, C hidden size, Hq query heads, Hk key-value heads, D head size.

Book: ``chapters/architecture/decoder.ipynb``. Sources: Llama (arXiv 2302.13971, section 2.2) for the block, RMSNorm
(arXiv 1910.07467), RoFormer (arXiv 2104.09864) for rotary positions, GQA (arXiv 2305.13245) for grouped queries, GLU
variants (arXiv 2002.05202) for SwiGLU.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dslib.architecture.cache import KVCache, Step
from dslib.architecture.window import window_attention


class Block(nn.Module):
    """One layer: attention, then a feed-forward network, each behind a norm and added to the residual stream.

    Args:
        config: with ``hidden_size`` and ``rms_norm_eps``.
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
    """``x / sqrt(mean(x²) + eps) * weight``, the mean taken in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_angles(positions: Tensor, head_dim: int, theta: float, scaling: float = 1.0, dtype=torch.float32):
    """Cosines and signed sines for :func:`apply_rope`.

    Args:
        positions: int64, (1 or B, T).
        theta: base of the frequencies; pair i of a head turns by ``theta ** (-2 i / head_dim)`` a position.
        scaling: linear position scaling (positions are divided by it), as deepseek-coder-1.3b uses with 4.

    Returns:
        (cos, sin), each (1 or B, T, 1, head_dim). The first half of ``sin`` is negated, see :func:`apply_rope`.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    return cos_and_sin(positions, 1.0 / (scaling * theta**exponent), dtype)


def cos_and_sin(positions: Tensor, frequency: Tensor, dtype=torch.float32):
    """As :func:`rope_angles`, for any frequencies: float32, (D/2,), the angle by which a pair turns a position."""
    angle = positions.to(torch.float32).unsqueeze(-1) * frequency  # (B, T, D/2)
    cos, sin = angle.cos(), angle.sin()
    cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)  # (B, T, D)
    return cos.to(dtype).unsqueeze(2), sin.to(dtype).unsqueeze(2)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (i, i + D/2) of every head by its angle: (B, T, H, D) -> the same shape.

    The pair (a, b) becomes (a cos - b sin, b cos + a sin). Rolling by half a head puts each element's partner in its
    place; the minus sign waits in ``sin``. That is the layout of Llama checkpoints in the Hugging Face format.
    """
    partner = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos, partner, sin)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """``softmax(q kᵀ / sqrt(D)) v``, every score written down: what the fused calls below compute without doing so.

    Args:
        q: (B, Hq, T, D). k, v: (B, Hk, S, D); Hq is a multiple of Hk, and as many query heads share a key-value head.
        mask: bool, broadcastable to (B, Hq, T, S), True where a query may look; None lets it look everywhere.

    Returns:
        (B, Hq, T, D).
    """
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)  # (B, Hq, S, D)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, Hq, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(dim=-1) @ v  # (B, Hq, T, S) x (B, Hq, S, D)


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

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], step: Step, cache: KVCache | None = None, layer: int = 0):
        """(B, T, C) -> (B, T, C)."""
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))  # (B, T, Hq + 2 Hk, D)
        qk, v = qkv.split_with_sizes((self.query_heads + self.kv_heads, self.kv_heads), dim=2)
        q, k = apply_rope(qk, *rope).split_with_sizes((self.query_heads, self.kv_heads), dim=2)  # in one go
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, Hq, T, D), (B, Hk, T, D) twice
        if cache is not None:
            k, v = cache.update(layer, k, v)  # writes the new tokens; gives all that they may look at, (B, Hk, S, D)
        y = attend(q, k, v, step, self.window, self.sinks)  # (B, Hq, T, D)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, Hq D) -> (B, T, C)

    def remember(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache, layer: int) -> None:
        """Keep keys and values of (B, T, C) tokens that skip this layer, for later ones to look at."""
        kv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))[:, :, self.query_heads :]  # (B, T, 2 Hk, D)
        k, v = kv.chunk(2, dim=2)
        cache.update(layer, apply_rope(k, *rope).transpose(1, 2), v.transpose(1, 2))


def attend(q: Tensor, k: Tensor, v: Tensor, step: Step, window: int | None = None, sinks: int = 0) -> Tensor:
    """:func:`plain_attention` of T new tokens over whatever the cache returned, by torch's fused kernels."""
    if step.causal:
        return causal_attention(q, k, v, window, sinks)
    if step.mask is None:
        # One new token that may see every key. Query heads that share a key-value head become rows of one small
        # attention problem, so that nothing has to be repeated: (B, Hq, 1, D) -> (B, Hk, Hq/Hk, D).
        grouped = q.view(q.shape[0], k.shape[1], -1, q.shape[-1])
        return F.scaled_dot_product_attention(grouped, k, v).view_as(q)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=step.mask, enable_gqa=q.shape[1] != k.shape[1])


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None, sinks: int = 0) -> Tensor:
    """Causal self-attention over T tokens; with a window, each sees itself and the ``window - 1`` tokens before it.

    Args:
        q: (B, Hq, T, D). k, v: (B, Hk, T, D) with Hq a multiple of Hk.
        sinks: the first ``sinks`` positions stay visible whatever the window.

    Returns:
        (B, Hq, T, D).
    """
    if window is None or window >= q.shape[2]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=q.shape[1] != k.shape[1])
    return window_attention(q, k, v, window, sinks)


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
