"""V1: a decoder-only transformer, the design that the article describes and that real language models share.

Token ids become vectors; each layer adds to them what attention finds in earlier tokens, then what a feed-forward
network makes of each; a last product gives a score for every token of the vocabulary. Positions are rotary, heads of
keys and values may be shared by several heads of queries, attention may see a local window only. With the right
configuration this *is* Llama, Mistral, Qwen2, Qwen3 or deepseek-coder-1.3b: the tests load the same weights into ours
and into transformers' classes and compare the logits.

To follow a token from id to logits, read :meth:`Decoder.forward` here, then ``Block``, ``Attention``, ``attend`` and
``SwiGLU`` in :mod:`~dslib.architecture.layers`; with a cache, ``KVCache.advance`` and ``update`` in
:mod:`~dslib.architecture.cache`. Shapes: B batch, T new tokens, C hidden, V vocabulary.

Book: ``chapters/architecture/decoder.ipynb``, where the same stands in forty plain lines. Of that chapter are also, in
reading order: :mod:`~dslib.architecture.layers`, :mod:`~dslib.architecture.config`,
:mod:`~dslib.architecture.weights`. Sources: Llama (arXiv 2302.13971, section 2.2) and DeepSeek LLM (arXiv 2401.02954).
"""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dslib.architecture.cache import BufferCache, KVCache, PreallocatedCache, Step, step_for
from dslib.architecture.config import DecoderConfig
from dslib.architecture.config import preset as preset
from dslib.architecture.layers import Attention, Block, RMSNorm, SwiGLU, rope_angles
from dslib.architecture.window import RollingCache
from dslib.check import one_of
from dslib.exact import as_shapes


class Decoder(nn.Module):
    """Token ids in, logits out."""

    def forward(
        self, input_ids: Tensor, cache: KVCache | None = None, positions: Tensor | None = None,
        logits_at: Tensor | None = None, **seen,
    ) -> Tensor:  # fmt: skip
        """(B, T) token ids -> (B, T, V) logits of the token after each.

        Args:
            input_ids: int64, the *new* tokens; the cache stands for those before them.
            cache, positions, seen: what each token may look at, see :meth:`place`.
            logits_at: int64 (B, N), the only tokens of this call whose logits are wanted, (B, N, V).

        Raises:
            ValueError: ids of the wrong shape or dtype, or a cache made for another window or batch.
            IndexError: a token id outside the vocabulary (from the embedding).
        """
        check_ids(input_ids)
        x = self.embed_tokens(input_ids)  # (B, T, C)
        # step: positions, and who sees whom; rope: cos and sin, (1 or B, T, 1, D); x: longer if a picture enters.
        x, step, rope = self.place(x, cache, positions, **seen)
        for layer, block in enumerate(self.layers):
            x = block(x, rope, step, cache, layer, input_ids)  # (B, T, C)
        if logits_at is not None:
            x = x[torch.arange(len(x), device=x.device).unsqueeze(1), logits_at]  # (B, N, C)
        return self.lm_head(self.norm(x))  # (B, T or N, V)

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(self.make_block(layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(initialise)
        self.tie_weights()

    def place(
        self, x: Tensor, cache: KVCache | None = None, positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Step, tuple[Tensor, Tensor]]:  # fmt: skip
        """What the layers need besides: states (B, T, C), the step that they are, and what attention rotates by.

        New tokens are counted into the cache here, before the layers write them.

        Args:
            cache: filled in place.
            positions: int64 (B, T), needed only when the sequences of a batch are at different positions. Without a
                cache they say how tokens are rotated and not who sees whom: a text that is packed into a row behind
                another would see it. Give each text a row.
            attention_mask: for padded batches, see :func:`~dslib.architecture.cache.step_for`.
        """
        before = 0 if cache is None else cache.length
        step = step_for(x, cache, positions, self.config, attention_mask)
        if isinstance(cache, BufferCache) and torch.is_grad_enabled():
            if x.requires_grad or any(p.requires_grad for p in self.parameters()):
                cache.length = before
                raise ValueError(
                    f"cache: a {type(cache).__name__} is written in place, which gradients cannot follow; "
                    "call the model under torch.no_grad(), or use make_cache('growing')"
                )
        return x, step, self.rope(step.positions, x.dtype)

    def rope(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What the blocks' attention rotates by at these positions, (1 or B, T)."""
        config = self.config
        return rope_angles(positions, config.head_dim, config.rope_theta, config.rope_scaling, dtype)

    def make_block(self, layer: int) -> Block:
        """Block number ``layer``; this, :meth:`place` and :meth:`rope` are what other kinds of model replace."""
        config = self.config
        return Block(config, Attention(config), SwiGLU(config.hidden_size, config.intermediate_size))

    def make_cache(self, kind: str = "preallocated", *, batch_size: int = 1, max_length: int | None = None) -> KVCache:
        """An empty cache for this model: ``"growing"``, ``"preallocated"`` or ``"rolling"``.

        Args:
            max_length: positions of a preallocated one; None for ``max_position_embeddings``.

        Raises:
            ValueError: unknown kind, a rolling cache for a model without a window, a length below 1.
        """
        one_of(("growing", "preallocated", "rolling"), kind=kind)
        config, weight = self.config, self.embed_tokens.weight
        like = {"dtype": weight.dtype, "device": weight.device}
        if kind == "growing":
            return KVCache(config)
        if kind == "rolling":
            return RollingCache(config, batch_size, **like)
        length = config.max_position_embeddings if max_length is None else max_length
        return PreallocatedCache(config, batch_size, length, **like)

    def tie_weights(self) -> None:
        """Make head and embedding one tensor where the configuration says so; needed after either was replaced."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def with_window(self, window: int | None, sinks: int = 0) -> "Decoder":
        """The same weights, shared and not copied, behind another attention window."""
        config = dataclasses.replace(self.config, sliding_window=window, attention_sinks=sinks)
        twin = copy.deepcopy(self, {id(kept): kept for kept in (*self.parameters(), *self.buffers())})
        twin.config = config
        for part in twin.modules():  # also those inside of wrapped blocks
            if isinstance(part, Attention):
                part.window, part.sinks = window, sinks
        return twin


MODELS: dict[type[DecoderConfig], type[Decoder]] = {DecoderConfig: Decoder}  # other kinds add themselves


def with_layers(model: Decoder, layers: Sequence[int]) -> Decoder:
    """Only some layers of ``model``, its weights shared and not copied: a draft, for speculation.

    Raises ValueError for no layer, or one that the model has not.
    """
    count, chosen = model.config.num_hidden_layers, list(layers)
    if not chosen or any(not 0 <= layer < count for layer in chosen):
        raise ValueError(f"layers: got {chosen}, expected some of 0 to {count - 1}")
    return with_blocks(model, [model.layers[layer] for layer in chosen], chosen)


def with_blocks(model: Decoder, blocks: Sequence[Block], layers: Sequence[int]) -> Decoder:
    """``blocks``, of the kinds that these layers of ``model`` are, between its embedding and its head, all shared."""
    twin = type(model).__new__(type(model))
    nn.Module.__init__(twin)
    for name, part in model.named_children():  # an image stream as well
        setattr(twin, name, part)
    twin.config, twin.layers = model.config.of_layers(layers), nn.ModuleList(blocks)
    twin.training = twin.layers.training = model.training  # what is shared keeps its own mode
    return twin


def build(config: DecoderConfig, *, seed: int | None = None, device="cpu", dtype=torch.float32) -> Decoder:
    """The decoder of ``config``, with random weights; on ``device="meta"`` shapes without memory, to count them.

    Example:
        >>> model = build(preset("tiny"))
        >>> model(torch.zeros(1, 5, dtype=torch.long)).shape
        torch.Size([1, 5, 256])
    """
    if seed is not None:
        torch.manual_seed(seed)
    with as_shapes() if torch.device(device).type == "meta" else torch.device(device):
        model = MODELS[type(config)](config)
    for parameter in model.parameters():  # not the buffers: a router's bias settles close calls, so it stays in float32
        parameter.data = parameter.data.to(dtype)
    return model


@contextmanager
def inference(model: Decoder) -> Iterator[None]:
    """Inference with every part of the model in evaluation mode; afterwards each is in its own again."""
    training = [part for part in model.modules() if part.training]
    for part in training:
        part.training = False
    try:
        with torch.inference_mode():
            yield
    finally:
        for part in training:
            part.training = True


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def initialise(module: nn.Module) -> None:
    """Fresh weights for one module, as ``model.apply(initialise)`` gives to all: normal with deviation 0.02."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


def check_ids(input_ids: Tensor) -> Tensor:
    """The same ids; a ValueError unless they are (B, T) and whole numbers."""
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ValueError(
            f"input_ids: got shape {tuple(input_ids.shape)}, expected (batch, tokens), at least one of each"
        )
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids: got dtype {input_ids.dtype}, expected torch.int64")
    return input_ids
