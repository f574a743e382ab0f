"""Multi-head latent attention: keys and values of all heads rebuilt from one short vector a token.

Grouped-query attention shrinks the cache by letting heads share keys and values. Latent attention (DeepSeek-V2 and V3)
goes another way: each token is compressed to one *latent* of ``kv_lora_rank`` numbers, and every head makes its own key
and value from it with its own matrices. Only the latent is cached. A rotated key cannot be part of that (the rotation
would come between the two matrices that the absorbed form below multiplies together), so positions travel apart, in
one small key that all heads share and in a matching slice of every query: *decoupled* RoPE.

The same weights can be used in two ways, which give the same result:

* *naive*: rebuild every head's keys and values of all tokens, then attend as usual. Costs once per key.
* *absorbed*: multiply the query by the key matrix instead of the keys, and the output by the value matrix instead of
  the values. What remains is attention in which all heads share one key, and that key's first ``kv_lora_rank`` numbers
  are the value. Costs once per query, so it is the one for decoding.

Shapes: B batch, T new tokens, S keys, H heads; C = kv_lora_rank, N = qk_nope_head_dim, R = qk_rope_head_dim,
V = v_head_dim.

Book: ``chapters/architecture/published.ipynb``. The whole decoder is in :mod:`~dslib.architecture.sparse_decoder`,
its checkpoints in :mod:`~dslib.architecture.weights`. Sources: DeepSeek-V2 (arXiv 2405.04434, section 2.1 and
appendix C) for the mechanism, YaRN (arXiv 2309.00071, section 3) for long contexts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dslib.architecture.cache import KVCache, Step, visible
from dslib.architecture.config import Yarn as Yarn  # the rule that DeepSeek's models stretch their positions by
from dslib.architecture.int4.layers import Int4Linear
from dslib.architecture.layers import RMSNorm, apply_rope
from dslib.check import one_of
from dslib.exact import exactly

# Of the two inner norms. DeepSeek's code does not take it from the configuration's rms_norm_eps.
LATENT_NORM_EPS = 1e-6


class MultiHeadLatentAttention(nn.Module):
    """Latent attention with decoupled rotary positions and an optional cache.

    Args:
        config: with ``kv_lora_rank``, ``q_lora_rank`` (None: queries are not compressed), ``qk_nope_head_dim``,
            ``qk_rope_head_dim``, ``v_head_dim``, ``num_attention_heads``, ``hidden_size`` and ``yarn``.

    Attributes:
        form: ``"naive"``, ``"absorbed"``, or ``"auto"`` for the one that multiplies less: naive for a prompt, absorbed
            for new tokens behind a history. May be set at any time. A ``kv_b_proj`` that is no plain layer (an adapter,
            hooks) cannot be absorbed and is always called. The default is naive; ``fast.prepare`` chooses auto.
        scale: what scores are multiplied by before the softmax.

    Raises:
        ValueError: unknown form.
    """

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], step: Step, cache: KVCache | None = None, layer: int = 0):
        """(B, T, hidden_size) -> (B, T, hidden_size); ``rope`` for heads of ``qk_rope_head_dim``."""
        q, q_rope = self._queries(x, rope)  # (B, T, H, N), (B, T, H, R)
        kept = self._kept(x, rope)  # (B, 1, T, C + R)
        if cache is not None:
            (kept,) = cache.update(layer, kept)  # writes the new tokens; gives all: (B, 1, S, C + R)
        attend = self._absorbed if self._absorbs(x.shape[1], kept.shape[2]) else self._naive
        y = attend(q, q_rope, kept.squeeze(1), step)  # (B, T, H, V)
        return self.o_proj(y.flatten(2))

    def _queries(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if self.compressed_queries else self.q_proj(x)
        q, q_rope = q.unflatten(-1, (self.heads, -1)).split((self.nope, self.rope), dim=-1)
        return q, apply_rope(q_rope, *rope)

    def _kept(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """All that a cache has to hold: the normalised latent and, behind it, the rotated key. (B, 1, T, C + R)."""
        latent, key = self.kv_a_proj_with_mqa(x).split((self.rank, self.rope), dim=-1)
        key = apply_rope(key.unsqueeze(2), *rope).squeeze(2)  # one head, which all share
        return torch.cat((self.kv_a_layernorm(latent), key), dim=-1).unsqueeze(1)

    def _naive(self, q: Tensor, q_rope: Tensor, kept: Tensor, step: Step) -> Tensor:
        """Every head's keys and values are rebuilt: k = W_k c and v = W_v c for each of the S latents c."""
        latent, k_rope = kept.split((self.rank, self.rope), dim=-1)  # (B, S, C), (B, S, R)
        k, v = self.kv_b_proj(latent).unflatten(-1, (self.heads, -1)).split((self.nope, self.value), dim=-1)
        q = torch.cat((q, q_rope), dim=-1)  # (B, T, H, N + R)
        k = torch.cat((k, k_rope.unsqueeze(2).expand(-1, -1, self.heads, -1)), dim=-1)  # (B, S, H, N + R)
        # The fused kernels want values as wide as keys; without them, the T x S scores are written out, which takes
        # twice as long at 1,024 tokens. So the values are widened with zeros.
        v = F.pad(v, (0, max(0, k.shape[-1] - self.value)))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T or S, ·)
        causal = step.causal and q.shape[2] > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=step.mask, is_causal=causal, scale=self.scale)
        return y.transpose(1, 2)[..., : self.value]

    def _absorbed(self, q: Tensor, q_rope: Tensor, kept: Tensor, step: Step) -> Tensor:
        """q · (W_k c) = (W_kᵀ q) · c, so W_k moves to the query; and W_v is applied to the sum of c, not to each."""
        weight = self.kv_b_proj.weight.to(q.dtype)  # that of four bits may be of another dtype
        make_keys, make_values = weight.unflatten(0, (self.heads, -1)).split((self.nope, self.value), 1)
        q = torch.einsum("bthn,hnc->bthc", q, make_keys)
        q = torch.cat((q, q_rope), dim=-1)  # (B, T, H, C + R)
        batch, tokens, heads, _ = q.shape
        mask = step.mask
        if step.causal and tokens > 1:
            mask = visible(*[torch.arange(tokens, device=q.device)] * 2).expand(1, 1, -1, -1)
        if mask is not None:
            mask = mask.repeat_interleave(heads, dim=2)  # (1 or B, 1, T H, S)
        # One key for all heads: the heads' queries become rows of one attention problem, and nothing is repeated. The
        # values are the keys, whole; their rotary part is dropped from the result.
        rows, keys = q.flatten(1, 2).unsqueeze(1), kept.unsqueeze(1)  # (B, 1, T H, C + R), (B, 1, S, C + R)
        y = F.scaled_dot_product_attention(rows, keys, keys, attn_mask=mask, scale=self.scale)[..., : self.rank]
        return torch.einsum("bthc,hvc->bthv", y.view(batch, tokens, heads, -1), make_values)

    def __init__(self, config, form: str = "naive"):
        super().__init__()
        self.heads, self.rank = config.num_attention_heads, config.kv_lora_rank
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.form = form
        size, query = config.hidden_size, self.heads * (self.nope + self.rope)
        self.compressed_queries = config.q_lora_rank is not None
        if not self.compressed_queries:
            self.q_proj = nn.Linear(size, query, bias=False)
        else:
            self.q_a_proj = nn.Linear(size, config.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, query, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(size, self.rank + self.rope, bias=False)
        self.kv_a_layernorm = RMSNorm(self.rank, LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(self.rank, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value, size, bias=False)
        self.scale = (self.nope + self.rope) ** -0.5 * (1.0 if config.yarn is None else config.yarn.softmax_factor)

    def remember(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache, layer: int) -> None:
        """Keep what the cache holds of (B, T, hidden_size) tokens that skip this layer, for later ones to look at."""
        cache.update(layer, self._kept(x, rope))

    @property
    def form(self) -> str:
        return self._form

    @form.setter
    def form(self, form: str) -> None:
        one_of(("naive", "absorbed", "auto"), form=form)
        self._form = form

    def _absorbs(self, tokens: int, keys: int) -> bool:
        """Whether this call takes the absorbed form."""
        if self.form == "naive" or not exactly(self.kv_b_proj, nn.Linear, Int4Linear, bias=False):
            return False  # the layer is called; absorbing reads its weight
        # A head's multiplications besides the projections that both forms have, with the values widened as above.
        key = self.nope + self.rope
        naive = keys * self.rank * (self.nope + self.value) + tokens * keys * (key + max(key, self.value))
        absorbed = tokens * self.rank * (self.nope + self.value) + tokens * keys * 2 * (self.rank + self.rope)
        return self.form == "absorbed" or absorbed < naive
