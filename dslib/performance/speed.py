"""What decoding and prefill have to move and to compute, for any of our models: the two numbers a roof needs.

*Operations* come from the configuration alone. A multiply-add counts as two; norms, rotary positions and the softmax
are left out: they grow like the hidden size, not like its square, and come to a percent or so. Parameters are counted
on a model without memory (on the meta device), so that no formula can differ from the model.

*Bytes* are counted from the model's own tensors, so that 4-bit weights, tied embeddings and experts need no formula of
their own. A model on ``device="meta"`` will do: nothing is read.

Book: ``chapters/performance/speed.ipynb``, and the chapters on architecture. Of that chapter are also, in reading
order: :mod:`~dslib.architecture.generation`, :mod:`dslib.fast.cuda_graph`, :mod:`dslib.fast.int8`,
:mod:`~dslib.performance.speculative`, :mod:`dslib.scenarios.pipeline`, and
:mod:`dslib.scenarios.placement`. Sources: Kaplan et al. 2020 (arXiv 2001.08361, section 2.1) for the count of
operations, Pope et al. 2022 (arXiv 2211.05102, section 2.1) for that of bytes.
"""

from collections.abc import Iterator
from functools import cache

from torch import nn

from dslib import check
from dslib.architecture.decoder import Decoder, DecoderConfig, build
from dslib.architecture.fusion import ImageContext
from dslib.architecture.moe import MoE
from dslib.roofline import Workload


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
        return _used_once.__wrapped__(config)


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
    return parts[0] in ("vision", "projector") or ("cross" in parts and "kv_proj" in parts)


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


def expected_experts(num_experts: int, top_k: int, tokens: int) -> float:
    """How many different experts ``tokens`` tokens use together, on average, if all are equally likely.

    A token leaves a given expert out with probability ``1 - top_k / num_experts``; with n tokens, n times over. A real
    router is less even than that, and then the number is lower. Raises ValueError for ``top_k`` outside 1 to
    ``num_experts``, or fewer than 0 tokens.
    """
    check.whole(1, num_experts=num_experts, top_k=top_k)
    check.between(1, num_experts, top_k=top_k)
    check.whole(0, tokens=tokens)
    return num_experts * (1 - (1 - top_k / num_experts) ** tokens)


def weight_bytes(model: Decoder, tokens: int = 1) -> float:
    """Bytes of weights that one pass over ``tokens`` tokens has to read, all sequences together.

    Every weight once, except: of routed experts the expected number of different ones; of an untied embedding a row a
    token; of an image stream, of what it hands to the text model, and of a hash table of experts nothing.
    """
    shares = {}  # id of a tensor -> share of it that is read
    for module in model.modules():
        if isinstance(module, MoE):
            router = module.router
            share = expected_experts(router.num_experts, router.top_k, tokens) / router.num_experts
            shares |= {id(tensor): share for tensor in _tensors(module.experts).values()}
    total = 0.0
    for name, tensor in _tensors(model).items():
        if name == "embed_tokens.weight" and not model.config.tie_word_embeddings:
            total += min(tokens, len(tensor)) * tensor[0].nbytes
        elif not once_per_picture(name) and not name.endswith("tid2eid"):
            total += shares.get(id(tensor), 1.0) * tensor.nbytes
    return total


def cache_bytes(model: Decoder, context: int, image: ImageContext | None = None) -> float:
    """Bytes of keys and values that one sequence's next token looks at after ``context`` tokens, the picture's too."""
    number = model.embed_tokens.weight.element_size()
    seen = 0 if image is None or image.tokens is not None else image.nbytes / image.batch_size
    return kv_bytes(model.config, context + (0 if image is None else image.prefix), number) + seen


def bytes_per_token(model: Decoder, context: int = 0, batch_size: int = 1, image: ImageContext | None = None) -> int:
    """Bytes that one decoding step reads to give each of ``batch_size`` sequences its next token.

    ``context`` tokens are already in the cache of each; cross-attention reads the ``image`` at every token.
    """
    return round(weight_bytes(model, batch_size) + batch_size * cache_bytes(model, context, image))


def decode_work(model: Decoder, context: int, batch_size: int = 1, image: ImageContext | None = None) -> Workload:
    """One decoding step of ``batch_size`` sequences as a :class:`~dslib.roofline.Workload`."""
    config = model.config
    pairs = visible_pairs(context + 1, config.sliding_window, config.attention_sinks)
    pairs -= visible_pairs(context, config.sliding_window, config.attention_sinks)
    work = matrix_flops(config, 1) + 2 * config.num_hidden_layers * config.multiplications_per_pair * pairs
    moved = bytes_per_token(model, context, batch_size, image)
    return Workload(f"decode, batch {batch_size}", moved, batch_size * work, _dtype(model))


def prefill_work(model: Decoder, prompt: int, batch_size: int = 1) -> Workload:
    """One pass over prompts of ``prompt`` tokens; the output head works on the last token of each only."""
    config, tokens = model.config, batch_size * prompt
    head = 2 * model.lm_head.in_features * model.lm_head.out_features
    work = batch_size * (matrix_flops(config, prompt) - (prompt - 1) * head + attention_flops(config, prompt))
    moved = weight_bytes(model, tokens) + batch_size * cache_bytes(model, prompt)
    return Workload(f"prefill, {prompt} tokens, batch {batch_size}", moved, work, _dtype(model))


def _dtype(model: Decoder) -> str:
    return str(model.embed_tokens.weight.dtype).removeprefix("torch.")


def _tensors(module: nn.Module) -> dict[str, "nn.Parameter"]:
    """Every parameter and buffer of a module by name, shared ones once."""
    return dict(module.named_parameters()) | dict(module.named_buffers())
