"""What a decoder's layers are made of, whatever their attention: RMSNorm, SwiGLU, and the block around the two halves.

Book: ``chapters/architecture/decoder.ipynb``. Sources: Llama (arXiv 2302.13971, section 2.2) for the block, GLU
variants (arXiv 2002.05202) for SwiGLU, RMSNorm (arXiv 1910.07467).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dslib.architecture.kv_cache import KVCache
from dslib.architecture.linear import Linear


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
