"""What a decoder's layers are made of: rotary positions, attention, RMSNorm, SwiGLU, and the block around them.

The local window is the mechanism that the article gives its "V1". :func:`window_attention` computes it in blocks, so
that its cost grows with length x window instead of length squared.

Shapes: B batch, T new tokens, S keys, Hq query heads, Hk key-value heads, D head size, W window.

Book: ``chapters/architecture/decoder.ipynb``. Sources: RoFormer (arXiv 2104.09864) for rotary positions, GQA (arXiv
2305.13245) for grouped queries, Longformer (arXiv 2004.05150) and Mistral 7B (arXiv 2310.06825) for the window,
StreamingLLM (arXiv 2309.17453) for sinks; Llama (arXiv 2302.13971, section 2.2) for the block, GLU variants (arXiv
2002.05202) for SwiGLU, RMSNorm (arXiv 1910.07467).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dslib.architecture.cache import KVCache, Step, visible
from dslib.fast.exact import exactly
from dslib.fast.linear import Linear


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
        self.qkv_proj = Linear(config.hidden_size, heads * self.head_dim, bias=config.qkv_bias)
        self.o_proj = Linear(self.query_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], step: Step, cache: KVCache | None = None, layer: int = 0):
        """(B, T, hidden_size) -> (B, T, hidden_size)."""
        batch, tokens, _ = x.shape
        qkv = self.qkv_proj(x).view(batch, tokens, -1, self.head_dim)  # (B, T, Hq + 2 Hk, D)
        qk, v = qkv.split_with_sizes((self.query_heads + self.kv_heads, self.kv_heads), dim=2)
        q, k = apply_rope(qk, *rope).split_with_sizes((self.query_heads, self.kv_heads), dim=2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        if cache is not None:
            k, v = cache.update(layer, k, v)
        y = attend(q, k, v, step, self.window, self.sinks)  # (B, Hq, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(batch, tokens, -1))

    def remember(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache, layer: int) -> None:
        """Keep keys and values of (B, T, hidden_size) tokens that skip this layer, for later ones to look at."""
        first = self.query_heads * self.head_dim
        if exactly(self.qkv_proj, Linear, nn.Linear):  # the rows of queries need not be multiplied
            bias = None if self.qkv_proj.bias is None else self.qkv_proj.bias[first:]
            kv = F.linear(x, self.qkv_proj.weight[first:], bias)
        else:
            kv = self.qkv_proj(x)[..., first:]
        k, v = kv.view(*x.shape[:2], -1, self.head_dim).chunk(2, dim=2)  # (B, T, Hk, D)
        cache.update(layer, apply_rope(k, *rope).transpose(1, 2), v.transpose(1, 2))


class RMSNorm(nn.Module):
    """``x / rms(x) * weight``, the mean square taken in float32 (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``; gate and up share one matrix product (rows of gate first)."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden_size) -> (..., hidden_size)."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


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

    def forward(self, x: Tensor, rope, step, cache: KVCache | None, layer: int, input_ids: Tensor | None = None):
        """(B, T, hidden_size) -> the same; ``input_ids`` (B, T) is for feed-forward networks that look at it."""
        x = x + self.self_attn(self.input_layernorm(x), rope, step, cache, layer)
        return x + self.feed_forward(self.post_attention_layernorm(x), input_ids)

    def remember(self, x: Tensor, rope, cache: KVCache, layer: int) -> None:
        """Put (B, T, hidden_size) tokens that skip this block into the cache, and do nothing else."""
        self.self_attn.remember(self.input_layernorm(x), rope, cache, layer)

    def feed_forward(self, x: Tensor, input_ids: Tensor | None) -> Tensor:
        return self.mlp(x)


def attend(q: Tensor, k: Tensor, v: Tensor, step: Step, window: int | None = None, sinks: int = 0) -> Tensor:
    """Attention of T new tokens over whatever the cache returned; (B, Hq, T, D) -> (B, Hq, T, D)."""
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


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int = 0, block: int | None = None) -> Tensor:
    """Local causal attention in blocks: time and memory O(T (W + block)) instead of O(T²).

    Queries are cut into blocks. A block's queries can only see keys from ``window - 1`` before its first token to its
    last token, so each block attends to that slice alone, under one small mask that is the same for all blocks. The
    first tokens, whose slice would begin before the text does, are one small dense problem; so is a last, short block.

    Args:
        q: (B, Hq, T, D). k, v: (B, Hk, T, D).
        window: W >= 1, the query's own position included (the convention of Mistral's ``sliding_window``).
        sinks: the first ``sinks`` positions stay visible.
        block: queries per block; None chooses an eighth of the window, at least 32.

    Returns:
        (B, Hq, T, D), equal to attention under a band mask.

    Raises:
        ValueError: window below 1, negative sinks, block below 1.
    """
    for name, value, least in (("window", window, 1), ("sinks", sinks, 0), ("block", 1 if block is None else block, 1)):
        if value < least:
            raise ValueError(f"{name}: got {value}, expected at least {least}")
    batch, tokens, device = q.shape[0], q.shape[2], q.device
    grouped = q.shape[1] != k.shape[1]
    block = block or max(32, window // 8)
    reach = window - 1  # how far before a query its keys begin
    # The dense start is long enough that no later slice touches the sinks or the beginning of the text.
    start = min(tokens, -(-(reach + sinks) // block) * block)
    blocks = (tokens - start) // block
    stop = start + blocks * block

    at = torch.arange(max(start, reach + block), device=device)
    first = F.scaled_dot_product_attention(
        q[:, :, :start], k[:, :, :start], v[:, :, :start],
        attn_mask=visible(at[:start], at[:start], window, sinks), enable_gqa=grouped,
    )  # fmt: skip
    parts = [first]

    def slices(x: Tensor) -> Tensor:
        """Overlapping slices of keys or values, one a block: views, no copy. -> (B * blocks, Hk, reach + block, D)."""
        cut = x[:, :, start - reach : stop].unfold(2, reach + block, block).permute(0, 2, 1, 4, 3)
        if sinks:
            cut = torch.cat((x[:, None, :, :sinks].expand(-1, blocks, -1, -1, -1), cut), dim=3)
        return cut.flatten(0, 1)

    # In a slice, the query number i is key number reach + i.
    mask = visible(at[reach : reach + block], at[: reach + block], window)  # (block, reach + block)
    mask = torch.cat((mask.new_ones(block, sinks), mask), dim=1)
    if blocks:
        # Blocks are folded into the batch, so that one call of the fused kernel does them all.
        queries = q[:, :, start:stop].unflatten(2, (blocks, block)).transpose(1, 2).flatten(0, 1)
        out = F.scaled_dot_product_attention(queries, slices(k), slices(v), attn_mask=mask, enable_gqa=grouped)
        parts.append(out.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3))
    if rest := tokens - stop:
        keys, values = (torch.cat((x[:, :, :sinks], x[:, :, stop - reach :]), dim=2) for x in (k, v))
        mask = mask[:rest, : sinks + reach + rest]
        last = F.scaled_dot_product_attention(q[:, :, stop:], keys, values, attn_mask=mask, enable_gqa=grouped)
        parts.append(last)
    return torch.cat(parts, dim=2)
