"""Shapes of decoders: one dataclass, and the shapes of models that exist.

Book: ``chapters/architecture/decoder.ipynb``. Sources: DeepSeek LLM (arXiv 2401.02954, table 2) for DeepSeek's own
dense models; the presets' model cards.
"""

import dataclasses
import math
from dataclasses import dataclass

from dslib.check import one_of, whole


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder; names as in Hugging Face configs where one exists.

    Attributes:
        head_dim: size of a head; None means ``hidden_size / num_attention_heads``.
        rope_scaling: linear factor by which positions are divided (1.0: none).
        sliding_window: tokens that a token may look at, itself included; None for full causal attention.
        attention_sinks: first positions that stay visible whatever the window.
        qkv_bias: biases on the query, key and value projections (Qwen2 has them, Llama and Mistral do not).
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
    rope_scaling: float = 1.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    attention_sinks: int = 0
    qkv_bias: bool = False

    def __post_init__(self):
        whole(1, **{name: getattr(self, name) for name in _SIZES})
        whole(0, attention_sinks=self.attention_sinks)
        if self.sliding_window is not None:
            whole(1, sliding_window=self.sliding_window)
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
