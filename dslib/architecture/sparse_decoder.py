"""V3: the V1 decoder with mixtures of experts for feed-forward networks, and latent attention where wanted.

One configuration covers the article's V3 (16 experts, two for a token), Mixtral, and the published DeepSeek-V2 and V3:
the tests load the same weights into ours and into transformers' classes and compare logits and gradients.

Book: ``chapters/architecture/moe.ipynb`` and ``chapters/architecture/published.ipynb``. Sources: DeepSeek-V2 (arXiv
2405.04434, section 3.1.2 and appendix B) and DeepSeek-V3 (arXiv 2412.19437, section 4.2) for the shapes.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dslib.architecture.cache import KVCache, Step
from dslib.architecture.config import DecoderConfig, RopeScaling, choose
from dslib.architecture.decoder import MODELS, Decoder
from dslib.architecture.layers import Attention, Block, SwiGLU, rope_angles
from dslib.architecture.moe import MoE, Router, check_routing
from dslib.architecture.published import MultiHeadLatentAttention, Yarn
from dslib.check import between, whole

_LATENT = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_RULE = ("scoring_func", "norm_topk_prob", "n_group", "topk_group", "routed_scaling_factor")
_EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")


@dataclass(frozen=True)
class SparseConfig(DecoderConfig):
    """Shape of a decoder with experts; names as in Hugging Face configs where one exists.

    Attributes:
        num_experts: routed experts of a layer. num_experts_per_tok: how many of them a token uses.
        moe_intermediate_size: inner size of one expert; None means ``intermediate_size``, which is that of the dense
            layers.
        n_shared_experts: experts that every token uses besides.
        first_k_dense_replace: how many layers at the start keep a dense feed-forward network.
        num_hash_layers: how many of the layers behind those choose experts by token id from a fixed table (V4).
        scoring_func, norm_topk_prob, n_group, topk_group, routed_scaling_factor, selection_bias: the rule of the
            router, see :class:`~dslib.architecture.moe.Router`.
        kv_lora_rank: size of the latent; None for plain attention. With latent attention, ``q_lora_rank``,
            ``qk_nope_head_dim``, ``qk_rope_head_dim`` and ``v_head_dim`` are as in
            :class:`~dslib.architecture.published.MultiHeadLatentAttention`; ``num_key_value_heads`` is then the number
            of heads, and ``head_dim`` the size of the rotated part, whatever is given.
        yarn: stretched rotary positions of latent attention; None for plain (or linearly scaled) ones.
    """

    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    n_shared_experts: int = 0
    first_k_dense_replace: int = 0
    num_hash_layers: int = 0
    scoring_func: str = "softmax"
    norm_topk_prob: bool = True
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    selection_bias: bool = False
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    yarn: Yarn | None = None

    def __post_init__(self):
        if self.kv_lora_rank is not None:
            self._check_latent()
            object.__setattr__(self, "head_dim", self.qk_rope_head_dim)  # the part of a head that is rotated
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)  # each rebuilds its own
        for name in ("q_lora_rank", *_LATENT, "yarn"):
            if self.kv_lora_rank is None and getattr(self, name) is not None:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected None without kv_lora_rank")
        super().__post_init__()
        if self.moe_intermediate_size is None:
            object.__setattr__(self, "moe_intermediate_size", self.intermediate_size)
        whole(1, **{name: getattr(self, name) for name in _EXPERTS})
        whole(0, n_shared_experts=self.n_shared_experts)
        whole(0, first_k_dense_replace=self.first_k_dense_replace, num_hash_layers=self.num_hash_layers)
        between(0, self.num_hidden_layers, first_k_dense_replace=self.first_k_dense_replace)
        between(0, self.num_hidden_layers - self.first_k_dense_replace, num_hash_layers=self.num_hash_layers)
        check_routing(self.num_experts, self.num_experts_per_tok, self.scoring_func, self.n_group, self.topk_group)

    def _check_latent(self) -> None:
        whole(1, **{name: getattr(self, name) for name in ("kv_lora_rank", *_LATENT)})  # they are all needed
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim: got {self.qk_rope_head_dim}, expected an even number")
        if self.q_lora_rank is not None:
            whole(1, q_lora_rank=self.q_lora_rank)
        if self.sliding_window is not None or self.attention_sinks or self.qkv_bias:
            raise ValueError("sliding_window, attention_sinks, qkv_bias: expected none of them with latent attention")
        if self.qk_norm:
            raise ValueError("qk_norm: got True, expected False with latent attention")
        if isinstance(self.rope_scaling, RopeScaling):
            raise ValueError(f"rope_scaling: got {self.rope_scaling}, expected a number with latent attention, or yarn")
        if self.yarn is not None and self.rope_scaling != 1.0:
            raise ValueError(f"rope_scaling: got {self.rope_scaling}, expected 1.0 beside yarn")

    def of_layers(self, layers: Sequence[int]) -> "SparseConfig":
        """The configuration of a decoder made of these layers of this one: every field that counts layers, counted."""
        dense, hashed = self.first_k_dense_replace, self.first_k_dense_replace + self.num_hash_layers
        counts = {"first_k_dense_replace": sum(n < dense for n in layers)}
        counts["num_hash_layers"] = sum(dense <= n < hashed for n in layers)
        return dataclasses.replace(self, num_hidden_layers=len(layers), **counts)

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        if self.kv_lora_rank is None:
            return super().cache_shape
        return 1, 1, self.kv_lora_rank + self.qk_rope_head_dim  # one vector for all heads, both key and value

    @property
    def multiplications_per_pair(self) -> int:
        if self.kv_lora_rank is None:
            return super().multiplications_per_pair
        return self.num_attention_heads * (self.qk_nope_head_dim + self.qk_rope_head_dim + self.v_head_dim)


def _deepseek(kind: dict, *sizes: int, **rest) -> SparseConfig:
    """A published shape. ``sizes``: vocabulary, hidden, dense intermediate, layers, heads."""
    latent = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    return SparseConfig(*sizes, sizes[-1], max_position_embeddings=163840, rms_norm_eps=1e-6, **latent, **kind, **rest)


_V2 = {"norm_topk_prob": False, "yarn": Yarn(40.0, 4096, mscale=0.707, mscale_all_dim=0.707)}
_V3 = {
    "norm_topk_prob": True, "scoring_func": "sigmoid", "selection_bias": True,
    "yarn": Yarn(40.0, 4096, mscale=1.0, mscale_all_dim=1.0),
}  # fmt: skip
PRESETS = {
    # The "tiny" decoder with 8 experts of half its feed-forward size: trains in seconds, as many active parameters.
    "tiny-moe": SparseConfig(
        256, 128, 352, 4, 4, 2, max_position_embeddings=512, tie_word_embeddings=True,
        num_experts=8, num_experts_per_tok=2, moe_intermediate_size=176,
    ),
    # The article's V3: 16 experts, 2 for a token, 24 layers. It gives no other size; we take the "1.3b" decoder and
    # experts of half its feed-forward size, so that a token costs in V3 what it costs in V1 (plus the router).
    "article": SparseConfig(
        32256, 2048, 5504, 24, 16, 16,
        max_position_embeddings=16384, rope_theta=100_000.0, rope_scaling=4.0, rms_norm_eps=1e-6,
        num_experts=16, num_experts_per_tok=2, moe_intermediate_size=2752,
    ),
    "deepseek-v2-lite": _deepseek(
        _V2, 102400, 2048, 10944, 27, 16, first_k_dense_replace=1,
        num_experts=64, num_experts_per_tok=6, moe_intermediate_size=1408, n_shared_experts=2,
    ),
    "deepseek-v2": _deepseek(
        _V2, 102400, 5120, 12288, 60, 128, first_k_dense_replace=1, q_lora_rank=1536,
        num_experts=160, num_experts_per_tok=6, moe_intermediate_size=1536, n_shared_experts=2,
        n_group=8, topk_group=3, routed_scaling_factor=16.0,
    ),
    # Without the module for multi-token prediction, which generation does not need.
    "deepseek-v3": _deepseek(
        _V3, 129280, 7168, 18432, 61, 128, first_k_dense_replace=3, q_lora_rank=1536,
        num_experts=256, num_experts_per_tok=8, moe_intermediate_size=2048, n_shared_experts=1,
        n_group=8, topk_group=4, routed_scaling_factor=2.5,
    ),
}  # fmt: skip


def preset(name: str, **changes) -> SparseConfig:
    """A named configuration, with ``changes`` to some fields, e.g. ``preset("tiny-moe", num_experts=32)``."""
    return choose(PRESETS, name, changes)


class SparseBlock(Block):
    """A block whose feed-forward network is a :class:`~dslib.architecture.moe.MoE`."""

    def forward(self, x: Tensor, rope, step: Step, cache: KVCache | None, layer: int, input_ids: Tensor | None = None):
        x = x + self.self_attn(self.input_layernorm(x), rope, step, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x), input_ids)


class SparseDecoder(Decoder):
    """Token ids in, logits out, as :class:`~dslib.architecture.decoder.Decoder`; a few experts work on each token.

    Example:
        >>> model = SparseDecoder(preset("tiny-moe"))
        >>> model(torch.zeros(1, 5, dtype=torch.long)).shape
        torch.Size([1, 5, 256])
        >>> model.layers[0].mlp.last_routing.indices.shape
        torch.Size([5, 2])
    """

    config: SparseConfig

    def make_block(self, layer: int) -> Block:
        config = self.config
        attention = (Attention if config.kv_lora_rank is None else MultiHeadLatentAttention)(config)
        sparse_layer = layer - config.first_k_dense_replace
        if sparse_layer < 0:
            return Block(config, attention, SwiGLU(config.hidden_size, config.intermediate_size))
        hashed = sparse_layer < config.num_hash_layers
        rule = {name: getattr(config, name) for name in _RULE} | {
            "selection_bias": config.selection_bias and not hashed
        }
        table = {"hash_vocab_size": config.vocab_size, "seed": layer} if hashed else {}  # another one in every layer
        router = Router(config.hidden_size, config.num_experts, config.num_experts_per_tok, **rule, **table)
        mlp = MoE(config.hidden_size, config.moe_intermediate_size, router, n_shared_experts=config.n_shared_experts)
        return SparseBlock(config, attention, mlp)

    def rope(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        config = self.config
        scaling = config.rope_scaling if config.yarn is None else config.yarn
        return rope_angles(positions, config.head_dim, config.rope_theta, scaling, dtype)


MODELS[SparseConfig] = SparseDecoder
