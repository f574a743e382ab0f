"""V1: a decoder-only transformer, the design that the article describes and that real language models share.

RMSNorm before each block, rotary positions, grouped-query attention with an optional local window, SwiGLU, tied or
untied embeddings. With the right configuration it *is* Llama, Mistral, Qwen2 or deepseek-coder-1.3b: the tests load the
same weights into ours and into transformers' classes and compare the logits.

Book: ``chapters/architecture/decoder.ipynb``. Of that chapter are also, in reading order:
:mod:`~dslib.architecture.layers`, :mod:`~dslib.architecture.cache`, :mod:`dslib.performance.generation`,
:mod:`~dslib.architecture.weights`, :mod:`dslib.performance.perplexity`, and the shortcuts :mod:`dslib.fast.linear`,
:mod:`dslib.fast.token_step`. Sources: Llama (arXiv 2302.13971, section 2.2), DeepSeek LLM (arXiv 2401.02954) for
DeepSeek's own dense model.
"""

import copy
import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dslib.architecture.cache import GrowingCache, KVCache, PreallocatedCache, RollingCache, no_cache_step
from dslib.architecture.layers import Attention, Block, RMSNorm, SwiGLU, rope_angles
from dslib.fast.linear import Linear


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
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is None and name in ("head_dim", "sliding_window"):
                continue
            if value is None or value < least:
                raise ValueError(f"{name}: got {value}, expected at least {least}")
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size: got {self.hidden_size}, expected a multiple of "
                    f"num_attention_heads={self.num_attention_heads} (or give head_dim)"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.head_dim % 2:
            raise ValueError(f"head_dim: got {self.head_dim}, expected an even number (rotary positions turn pairs)")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: got {self.num_key_value_heads}, expected a divisor of "
                f"num_attention_heads={self.num_attention_heads}"
            )

    def model(self) -> "Decoder":
        """A model of this shape; :func:`build` is the way to get one."""
        return Decoder(self)

    @property
    def kv_elements_per_token(self) -> int:
        """Elements that the cache keeps for one token, all layers; times bytes an element gives bytes."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim

    @property
    def multiplications_per_pair(self) -> int:
        """Multiplications by which one token looks at one other in one layer: the score, and the weighted sum."""
        return 2 * self.num_attention_heads * self.head_dim


_LEAST = {
    "vocab_size": 1, "hidden_size": 1, "intermediate_size": 1, "num_hidden_layers": 1, "num_attention_heads": 1,
    "num_key_value_heads": 1, "head_dim": 2, "max_position_embeddings": 1, "sliding_window": 1, "attention_sinks": 0,
}  # fmt: skip

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
    if name not in presets:
        raise ValueError(f"preset: got {name!r}, expected one of {', '.join(map(repr, presets))}")
    fields = {field.name for field in dataclasses.fields(presets[name])}
    if unknown := sorted(set(changes) - fields):
        raise ValueError(f"preset {name!r}: unknown field {unknown[0]!r}, expected one of {', '.join(sorted(fields))}")
    if {"hidden_size", "num_attention_heads"} & set(changes):
        changes.setdefault("head_dim", None)  # derived from the new sizes, not kept from the old ones
    return dataclasses.replace(presets[name], **changes)


class Decoder(nn.Module):
    """Token ids in, logits out.

    Example:
        >>> model = Decoder(preset("tiny"))
        >>> model(torch.zeros(1, 5, dtype=torch.long)).shape
        torch.Size([1, 5, 256])
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(self.make_block(layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(initialise)
        self.tie_weights()

    def make_block(self, layer: int) -> Block:
        """Block number ``layer``. This, :meth:`rope` and :meth:`preallocated_cache` are what other kinds replace."""
        config = self.config
        return Block(config, Attention(config), SwiGLU(config.hidden_size, config.intermediate_size))

    def rope(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What the blocks' attention rotates by at these positions, (1 or B, T)."""
        config = self.config
        return rope_angles(positions, config.head_dim, config.rope_theta, config.rope_scaling, dtype)

    def tie_weights(self) -> None:
        """Make head and embedding one tensor where the configuration says so; needed after either was replaced."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def hidden_states(self, input_ids: Tensor, cache: KVCache | None = None, positions: Tensor | None = None) -> Tensor:
        """(B, T) token ids -> (B, T, hidden_size), after the last norm.

        Args:
            input_ids: int64, the *new* tokens; the cache stands for those before them.
            cache: filled in place.
            positions: int64 (B, T), needed only when the sequences of a batch are at different positions.

        Raises:
            ValueError: ids of the wrong shape or dtype, or a cache made for another window.
            IndexError: a token id outside the vocabulary (from the embedding).
        """
        x, step, rope = self.begin(input_ids, cache, positions)
        for index, layer in enumerate(self.layers):
            x = layer(x, rope, step, cache, index, input_ids)
        return self.norm(x)

    def begin(self, input_ids: Tensor, cache: KVCache | None, positions: Tensor | None):
        """What a pass over the layers starts with, once all is checked: states (B, T, hidden_size), step, rotations.

        For whoever runs the layers in another way; arguments and errors as for :meth:`hidden_states`.
        """
        x = self.embed(input_ids)  # first, so that a bad id leaves the cache untouched
        return x, *self.prepare(x, cache, positions)

    def embed(self, input_ids: Tensor) -> Tensor:
        """(B, T) token ids -> (B, T, hidden_size); errors as for :meth:`hidden_states`."""
        if input_ids.ndim != 2 or input_ids.numel() == 0:
            raise ValueError(
                f"input_ids: got shape {tuple(input_ids.shape)}, expected (batch, tokens), at least one of each"
            )
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids: got dtype {input_ids.dtype}, expected torch.int64")
        return self.embed_tokens(input_ids)

    def prepare(self, x: Tensor, cache: KVCache | None, positions: Tensor | None):
        """Step and rotations for new states (B, T, hidden_size), which are counted into the cache."""
        config, (batch, tokens, _), device = self.config, x.shape, x.device
        if cache is None:
            step = no_cache_step(tokens, positions, device)
        else:
            if (cache.window, cache.sinks) != (config.sliding_window, config.attention_sinks):
                raise ValueError(
                    f"cache: made for window={cache.window}, sinks={cache.sinks}, but the model has "
                    f"sliding_window={config.sliding_window}, attention_sinks={config.attention_sinks}"
                )
            if cache.batch_size not in (None, batch):
                raise ValueError(f"cache: made for {cache.batch_size} sequences, input_ids has {batch}")
            step = cache.begin(tokens, positions, device)
        return step, self.rope(step.positions, x.dtype)

    def forward(self, input_ids: Tensor, cache: KVCache | None = None, positions: Tensor | None = None) -> Tensor:
        """(B, T) token ids -> (B, T, vocab_size) logits; arguments as in :meth:`hidden_states`."""
        return self.lm_head(self.hidden_states(input_ids, cache, positions))

    def with_window(self, window: int | None, sinks: int = 0) -> "Decoder":
        """The same weights, shared and not copied, behind another attention window."""
        config = dataclasses.replace(self.config, sliding_window=window, attention_sinks=sinks)
        twin = copy.deepcopy(self, {id(kept): kept for kept in (*self.parameters(), *self.buffers())})
        twin.config = config
        for layer in twin.layers:
            layer.self_attn.window, layer.self_attn.sinks = window, sinks
        return twin

    def make_cache(self, kind: str = "preallocated", *, batch_size: int = 1, max_length: int | None = None) -> KVCache:
        """An empty cache that fits this model: ``"growing"``, ``"preallocated"`` or ``"rolling"``.

        Raises:
            ValueError: unknown kind, a rolling cache for a model without a window, a length below 1.
        """
        config, weight = self.config, self.embed_tokens.weight
        place = {"dtype": weight.dtype, "device": weight.device}
        if kind == "growing":
            return GrowingCache(config.num_hidden_layers, config.sliding_window, config.attention_sinks)
        if kind == "preallocated":
            length = config.max_position_embeddings if max_length is None else max_length
            return self.preallocated_cache(batch_size, length, **place)
        if kind == "rolling":
            if config.sliding_window is None:
                raise ValueError("kind: got 'rolling', but the model has no sliding_window; forgetting would change it")
            shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads)
            return RollingCache(*shape, config.sliding_window, config.head_dim, **place, sinks=config.attention_sinks)
        raise ValueError(f"kind: got {kind!r}, expected 'growing', 'preallocated' or 'rolling'")

    def preallocated_cache(self, batch_size: int, max_length: int, *, dtype, device) -> PreallocatedCache:
        """An empty buffer of this model's shape, see :meth:`make_cache`."""
        config = self.config
        return PreallocatedCache(
            config.num_hidden_layers, batch_size, config.num_key_value_heads, max_length, config.head_dim,
            dtype=dtype, device=device, window=config.sliding_window, sinks=config.attention_sinks,
        )  # fmt: skip


def build(config: DecoderConfig, *, seed: int | None = None, device="cpu", dtype=torch.float32) -> Decoder:
    """The decoder of ``config``, with random weights; on ``device="meta"`` shapes without memory, to count them."""
    if seed is not None:
        torch.manual_seed(seed)
    with torch.device(device):
        model = config.model()
    for parameter in model.parameters():  # not the buffers: a router's bias settles close calls, so it stays in float32
        parameter.data = parameter.data.to(dtype)
    return model


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def initialise(module: nn.Module) -> None:
    """Fresh weights for one module, as ``model.apply(initialise)`` gives to all: normal with deviation 0.02."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
