"""Shapes of decoders: one dataclass, rules for rotary positions beyond the trained length, and models that exist.

Book: ``chapters/architecture/decoder.ipynb``. Sources: DeepSeek LLM (arXiv 2401.02954, table 2) for DeepSeek's own
dense models; the presets' model cards; YaRN (arXiv 2309.00071, section 3); Llama 3 (arXiv 2407.21783).
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dslib.check import above, at_least, one_of, whole


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder; names as in Hugging Face configs where one exists.

    Attributes:
        head_dim: size of a head; None means ``hidden_size / num_attention_heads``.
        rope_scaling: factor by which positions are divided (1.0: none), or a :class:`RopeScaling`.
        sliding_window: tokens that a token may look at, itself included; None for full causal attention.
        attention_sinks: first positions that stay visible whatever the window.
        qkv_bias: biases on the query, key and value projections (Qwen2 has them, Llama and Mistral do not).
        qk_norm: a norm of each query and key head before it is turned (Qwen3 has them).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rope_theta: float = 10_000.0
    rope_scaling: "float | RopeScaling" = 1.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    attention_sinks: int = 0
    qkv_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self):
        whole(1, **{name: getattr(self, name) for name in _SIZES})
        whole(0, attention_sinks=self.attention_sinks)
        if self.sliding_window is not None:
            whole(1, sliding_window=self.sliding_window)
        if not isinstance(self.rope_scaling, RopeScaling):
            above(0, rope_scaling=self.rope_scaling)
        above(0, rope_theta=self.rope_theta)
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size: got {self.hidden_size}, expected a multiple of "
                    f"num_attention_heads={self.num_attention_heads} (or give head_dim)"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        whole(2, head_dim=self.head_dim)
        if self.head_dim % 2:
            raise ValueError(f"head_dim: got {self.head_dim}, expected an even number (rotary positions turn pairs)")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: got {self.num_key_value_heads}, expected a divisor of "
                f"num_attention_heads={self.num_attention_heads}"
            )

    def of_layers(self, layers: Sequence[int]) -> "DecoderConfig":
        """The configuration of a decoder made of these layers of this one."""
        return dataclasses.replace(self, num_hidden_layers=len(layers))

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """What a cache keeps of one token in one layer: tensors (key and value), heads, size of a head."""
        return 2, self.num_key_value_heads, self.head_dim

    @property
    def kv_elements_per_token(self) -> int:
        """Elements that the cache keeps for one token, all layers; times bytes an element gives bytes."""
        return self.num_hidden_layers * math.prod(self.cache_shape)

    @property
    def multiplications_per_pair(self) -> int:
        """Multiplications by which one token looks at one other in one layer: the score, and the weighted sum."""
        return 2 * self.num_attention_heads * self.head_dim


_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings",
)  # fmt: skip


@dataclass(frozen=True)
class RopeScaling:
    """Rotary positions for a context ``factor`` times as long as that of pre-training; a base class of rules.

    Pairs that turn fast tell near tokens apart and keep their frequency. Pairs that turn slowly have not come round
    within the old context and are slowed by ``factor``. Those between are blended; who is between, the rules say.

    Attributes:
        factor: how many times longer, at least 1.
        original_max_position_embeddings: context length of pre-training, in tokens.
    """

    factor: float
    original_max_position_embeddings: int

    def __post_init__(self):
        at_least(1, factor=self.factor)
        whole(1, original_max_position_embeddings=self.original_max_position_embeddings)

    @property
    def magnitude(self) -> float:
        """Multiplies the rotated part of queries and keys."""
        return 1.0

    def slowed(self, plain: Tensor, theta: float) -> Tensor:
        """Share of the slowed frequency in that of each pair, (D/2,), given the frequencies without scaling."""
        raise NotImplementedError

    def frequencies(self, head_dim: int, theta: float, device=None) -> Tensor:
        """Angle by which each pair turns at one position: float32, (head_dim / 2,)."""
        pair = torch.arange(head_dim // 2, dtype=torch.float32, device=device)
        plain = 1.0 / theta ** (2 * pair / head_dim)
        slowed = self.slowed(plain, theta)
        return plain * (1 - slowed) + plain / self.factor * slowed


@dataclass(frozen=True)
class Llama3(RopeScaling):
    """The rule of Llama 3.1: pairs that turn at most ``low_freq_factor`` times within the old context are slowed, those
    that turn at least ``high_freq_factor`` times are kept."""

    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self):
        super().__post_init__()
        above(0, low_freq_factor=self.low_freq_factor)
        above(self.low_freq_factor, high_freq_factor=self.high_freq_factor)

    def slowed(self, plain, theta):
        turns = self.original_max_position_embeddings * plain / (2 * math.pi)
        return ((self.high_freq_factor - turns) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)


@dataclass(frozen=True)
class Yarn(RopeScaling):
    """The rule of YaRN: as Llama 3.1's, but even in the number of the pair; and attention is sharpened.

    Attributes:
        beta_fast, beta_slow: pairs that turn more than ``beta_fast`` times within the old context are kept, those that
            turn less than ``beta_slow`` times are slowed.
        mscale, mscale_all_dim: how much larger attention scores become, see :attr:`magnitude` and
            :attr:`softmax_factor`; names as in DeepSeek's configurations.
    """

    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        at_least(0, mscale=self.mscale, mscale_all_dim=self.mscale_all_dim)
        if not 0 < self.beta_slow < self.beta_fast:
            raise ValueError(
                f"beta_slow, beta_fast: got {self.beta_slow} and {self.beta_fast}, expected 0 < beta_slow < beta_fast"
            )

    def _growth(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0

    @property
    def magnitude(self) -> float:
        return self._growth(self.mscale) / self._growth(self.mscale_all_dim)

    @property
    def softmax_factor(self) -> float:
        """Multiplies all scores of latent attention (once for the query and once for the key, hence squared)."""
        return self._growth(self.mscale_all_dim) ** 2

    def slowed(self, plain, theta):
        pair, head_dim = torch.arange(len(plain), dtype=plain.dtype, device=plain.device), 2 * len(plain)

        def pair_that_turns(times: float) -> float:
            length = self.original_max_position_embeddings / (2 * math.pi * times)
            return head_dim * math.log(length) / (2 * math.log(theta))

        first = max(math.floor(pair_that_turns(self.beta_fast)), 0)
        last = min(math.ceil(pair_that_turns(self.beta_slow)), head_dim - 1)
        return ((pair - first) / max(last - first, 1e-3)).clamp(0, 1)


PRESETS = {
    # Trains on characters or bytes in seconds on a laptop.
    "tiny": DecoderConfig(256, 128, 352, 4, 4, 2, max_position_embeddings=512, tie_word_embeddings=True),
    # HuggingFaceTB/SmolLM2-135M-Instruct, the real model that the chapters run.
    "smollm2-135m": DecoderConfig(
        49152, 576, 1536, 30, 9, 3,
        max_position_embeddings=8192, rope_theta=100_000.0, tie_word_embeddings=True,
    ),
    # deepseek-ai/deepseek-coder-1.3b: the one text-only 1.3B model that DeepSeek published.
    "1.3b": DecoderConfig(
        32256, 2048, 5504, 24, 16, 16,
        max_position_embeddings=16384, rope_theta=100_000.0, rope_scaling=4.0, rms_norm_eps=1e-6,
    ),
}  # fmt: skip


def preset(name: str, **changes) -> DecoderConfig:
    """A named configuration, with ``changes`` to some fields, e.g. ``preset("tiny", sliding_window=64)``."""
    return choose(PRESETS, name, changes)


def choose(presets: dict[str, DecoderConfig], name: str, changes: dict) -> DecoderConfig:
    """:func:`preset` for any table of configurations; a ValueError names an unknown preset or field."""
    one_of(presets, preset=name)
    fields = {field.name for field in dataclasses.fields(presets[name])}
    if unknown := sorted(set(changes) - fields):
        raise ValueError(f"preset {name!r}: unknown field {unknown[0]!r}, expected one of {', '.join(sorted(fields))}")
    if {"hidden_size", "num_attention_heads"} & set(changes):
        changes.setdefault("head_dim", None)  # derived from the new sizes, not kept from the old ones
    return dataclasses.replace(presets[name], **changes)
