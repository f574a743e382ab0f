"""What a decoder costs before it is built: bytes and floating-point operations from its configuration alone.

A multiply-add counts as two operations. Norms, rotary positions and the softmax are left out: they grow like the hidden
size, not like its square, and come to a percent or so. Parameters are counted on a model without memory (on the meta
device), so that no formula can differ from the model.

Book: ``chapters/architecture/decoder.ipynb``, ``chapters/architecture/moe.ipynb``. Source: Kaplan et al. 2020 (arXiv
2001.08361, section 2.1) for the count.
"""

from collections.abc import Iterator
from functools import cache

from torch import nn

from dslib.architecture.decoder import DecoderConfig, build
from dslib.architecture.moe import MoE


def active_parameters(config: DecoderConfig) -> int:
    """Parameters that take part in one token: of routed experts only the chosen ones, of a dense decoder all.

    The embedding is left out (a token reads one row of it), unless it is the output head as well. Counted so, the
    published 2.4B, 21B and 37B of DeepSeek-V2-Lite, V2 and V3 are 2.45, 20.9 and 36.6; with the embedding they would be
    2.66, 21.4 and 37.6. Modules for multi-token prediction are not part of our models.
    """
    return sum(count for _, count in _used(config))


def matrix_parameters(config: DecoderConfig) -> int:
    """Of the :func:`active_parameters`, those in matrices: what every token is multiplied by. Not the norms."""
    return sum(count for dimensions, count in _used(config) if dimensions > 1)


def _used(config: DecoderConfig) -> tuple[tuple[int, int], ...]:
    """(number of dimensions, elements that one token uses) of every parameter."""
    try:
        return _used_once(config)
    except TypeError:  # a configuration that holds a dict, as that of an image stream, cannot be looked up
        return tuple(_count(build(config, device="meta")))


@cache
def _used_once(config: DecoderConfig) -> tuple[tuple[int, int], ...]:
    return tuple(_count(build(config, device="meta")))


def _count(model: nn.Module) -> Iterator[tuple[int, int]]:
    experts = {}  # a parameter of routed experts -> (experts that a token uses, experts)
    for module in model.modules():
        if isinstance(module, MoE):
            share = (module.router.top_k, module.router.num_experts)
            experts.update(dict.fromkeys(module.experts.parameters(), share))
    for name, parameter in model.named_parameters():  # a tied head is listed once, as the embedding
        used, of = experts.get(parameter, (1, 1))
        lookup = name == "embed_tokens.weight" and not model.config.tie_word_embeddings
        if not lookup and not once_per_picture(name):
            yield parameter.ndim, parameter.numel() * used // of


def once_per_picture(name: str) -> bool:
    """Whether a vision-language model uses the parameter of this name for a picture only, and for no token of text."""
    parts = name.split(".")
    return parts[0] in ("vision", "projector") or (parts[0] == "cross" and "kv_proj" in parts)


def visible_pairs(length: int, window: int | None = None, sinks: int = 0) -> int:
    """(query, key) pairs that causal attention over ``length`` tokens looks at; with a window, fewer."""
    if window is None:
        return length * (length + 1) // 2
    near = min(length, window)
    pairs = near * (near + 1) // 2 + (length - near) * window
    # A sink counts on its own only for queries whose window has left it behind.
    return pairs + sum(max(0, length - window - sink) for sink in range(min(sinks, length)))


def attention_flops(config: DecoderConfig, length: int) -> int:
    """Operations for the scores and the weighted sums of ``length`` tokens, all layers (not the projections).

    For latent attention, those of the naive form.
    """
    pairs = visible_pairs(length, config.sliding_window, config.attention_sinks)
    return 2 * config.num_hidden_layers * config.multiplications_per_pair * pairs


def matrix_flops(config: DecoderConfig, length: int) -> int:
    """Operations for all matrix products of ``length`` tokens: two for each parameter and token."""
    return 2 * matrix_parameters(config) * length


def kv_bytes(config: DecoderConfig, length: int, bytes_per_number: float = 2, batch_size: int = 1) -> float:
    """Bytes of keys and values that must be kept after ``length`` tokens; a window limits how many."""
    kept = length
    if config.sliding_window is not None:
        kept = min(length, config.sliding_window + config.attention_sinks)
    return batch_size * kept * config.kv_elements_per_token * bytes_per_number
