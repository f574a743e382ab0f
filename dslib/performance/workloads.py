"""What decoding and prefill have to move and to compute, for any of our models: the two numbers a roof needs.

Bytes are counted from the model's own tensors, so that 4-bit weights, tied embeddings and experts need no formula of
their own; operations come from :mod:`dslib.architecture.costs`. A model on ``device="meta"`` will do: nothing is read.

Book: ``chapters/performance/speed.ipynb``. Source: Pope et al. 2022 (arXiv 2211.05102, section 2.1).
"""

from torch import nn

from dslib.architecture import costs
from dslib.architecture.decoder import Decoder
from dslib.architecture.fusion import ImageContext
from dslib.architecture.moe import MoE
from dslib.lab.roofline import Workload


def expected_experts(num_experts: int, top_k: int, tokens: int) -> float:
    """How many different experts ``tokens`` tokens use together, on average, if all are equally likely.

    A token leaves a given expert out with probability ``1 - top_k / num_experts``; with n tokens, n times over. A real
    router is less even than that, and then the number is lower.

    Raises:
        ValueError: ``top_k`` outside 1 to ``num_experts``, or fewer than 0 tokens.
    """
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k: got {top_k}, expected 1 to num_experts={num_experts}")
    if tokens < 0:
        raise ValueError(f"tokens: got {tokens}, expected 0 or more")
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
        elif not costs.once_per_picture(name) and not name.endswith("tid2eid"):
            total += shares.get(id(tensor), 1.0) * tensor.nbytes
    return total


def cache_bytes(model: Decoder, context: int, image: ImageContext | None = None) -> float:
    """Bytes of keys and values that one sequence's next token looks at after ``context`` tokens, the picture's too."""
    number = model.embed_tokens.weight.element_size()
    seen = 0 if image is None or image.tokens is not None else image.nbytes / image.batch_size
    return costs.kv_bytes(model.config, context + (0 if image is None else image.prefix), number) + seen


def bytes_per_token(model: Decoder, context: int = 0, batch_size: int = 1, image: ImageContext | None = None) -> int:
    """Bytes that one decoding step reads to give each of ``batch_size`` sequences its next token.

    Args:
        context: tokens already in the cache of each sequence.
        image: what a vision-language model has seen; cross-attention reads it at every token.
    """
    return round(weight_bytes(model, batch_size) + batch_size * cache_bytes(model, context, image))


def decode_work(model: Decoder, context: int, batch_size: int = 1, image: ImageContext | None = None) -> Workload:
    """One decoding step of ``batch_size`` sequences as a :class:`~dslib.lab.roofline.Workload`."""
    config = model.config
    pairs = costs.visible_pairs(context + 1, config.sliding_window, config.attention_sinks)
    pairs -= costs.visible_pairs(context, config.sliding_window, config.attention_sinks)
    work = costs.matrix_flops(config, 1) + 2 * config.num_hidden_layers * config.multiplications_per_pair * pairs
    moved = bytes_per_token(model, context, batch_size, image)
    return Workload(f"decode, batch {batch_size}", moved, batch_size * work, _dtype(model))


def prefill_work(model: Decoder, prompt: int, batch_size: int = 1) -> Workload:
    """One pass over prompts of ``prompt`` tokens; the output head works on the last token of each only."""
    config, tokens = model.config, batch_size * prompt
    head = 2 * model.lm_head.in_features * model.lm_head.out_features
    work = batch_size * (
        costs.matrix_flops(config, prompt) - (prompt - 1) * head + costs.attention_flops(config, prompt)
    )
    moved = weight_bytes(model, tokens) + batch_size * cache_bytes(model, prompt)
    return Workload(f"prefill, {prompt} tokens, batch {batch_size}", moved, work, _dtype(model))


def _dtype(model: Decoder) -> str:
    return str(model.embed_tokens.weight.dtype).removeprefix("torch.")


def _tensors(module: nn.Module) -> dict[str, "nn.Parameter"]:
    """Every parameter and buffer of a module by name, shared ones once; not the second copies that kernels keep."""
    named = dict(module.named_parameters()) | dict(module.named_buffers())
    return {name: tensor for name, tensor in named.items() if name.rpartition(".")[2] != "tiles"}
