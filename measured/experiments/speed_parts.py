"""Parts of decoding, each timed alone: attention by kind of cache, the choice of experts, pictures ahead of text.

Book: ``chapters/performance/speed.ipynb``. Sources: Shazeer 2019 (arXiv 1911.02150) for shared keys and values, GQA
(arXiv 2305.13245), Mistral 7B (arXiv 2310.06825) for the window, DeepSeek-V2 (arXiv 2405.04434, section 2.1) for MLA;
Hash Layers (arXiv 2106.04426), MegaBlocks (arXiv 2211.15841).
"""

from typing import Any

import torch

from dslib.architecture.cache import step_for
from dslib.architecture.decoder import Decoder, DecoderConfig, build
from dslib.architecture.experts import Pairs
from dslib.architecture.fusion import VisionLanguageDecoder
from dslib.architecture.moe import MoE, Router
from dslib.architecture.sparse_decoder import SparseConfig
from dslib.scenarios.pipeline import Request, serve
from measured.machine import as_device
from measured.timing import compare, ratio

LATENT = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}


def kinds(hidden_size: int = 2048, heads: int = 16, window: int = 1024) -> dict[str, DecoderConfig]:
    """One layer of each kind of attention: as many query heads, and keys and values shared, cut off or compressed."""
    sizes = {"vocab_size": 16, "hidden_size": hidden_size, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": heads, "max_position_embeddings": 1 << 17}
    return {
        "MHA": DecoderConfig(**sizes, num_key_value_heads=heads),
        "GQA": DecoderConfig(**sizes, num_key_value_heads=heads // 4),
        "MQA": DecoderConfig(**sizes, num_key_value_heads=1),
        "window": DecoderConfig(**sizes, num_key_value_heads=heads, sliding_window=window),
        "MLA": SparseConfig(**sizes, num_key_value_heads=heads, **LATENT),
    }


@torch.inference_mode()
def attention_speed(
    context: int = 8192, hidden_size: int = 2048, heads: int = 16, window: int = 1024, dtype: str = "float32",
    rounds: int = 5, seed: int = 0,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """One new token's attention after ``context`` tokens, projections included, for every kind side by side.

    Returns:
        For each kind ``seconds`` (a Timing), ``cache_bytes`` (keys and values that the token looks at) and
        ``weight_bytes`` (of the layer's projections).
    """
    device, number = as_device(None), getattr(torch, dtype)
    generator = torch.Generator().manual_seed(seed)
    ways, found = {}, {}
    for kind, config in kinds(hidden_size, heads, window).items():
        model = build(config, seed=seed, device=device, dtype=number).eval()
        attention = model.layers[0].self_attn
        cache = model.make_cache("rolling" if kind == "window" else "preallocated", max_length=context + 1)
        cache.buffer.copy_(torch.randn(cache.buffer.shape, generator=generator))
        x = torch.randn(1, 1, hidden_size, generator=generator).to(device, number)
        seen = min(context + 1, window) if kind == "window" else context + 1
        found[kind] = {
            "cache_bytes": seen * config.kv_elements_per_token * x.element_size(),
            "weight_bytes": sum(p.nbytes for p in attention.parameters()),
        }

        def one_token(model=model, attention=attention, cache=cache, x=x):
            cache.length = context  # the same token over and over
            step = step_for(x, cache, None, model.config)
            return attention(x, model.rope(step.positions, x.dtype), step, cache, 0)

        ways[kind] = one_token
    for kind, timing in compare(ways, rounds=rounds, device=device).items():
        found[kind]["seconds"] = timing
    return found


@torch.inference_mode()
def without_cache(model: Decoder, prompt: list[int], new_tokens: int) -> list[int]:
    """Greedy decoding that keeps nothing: for every new token the whole text is read again."""
    ids = torch.tensor([prompt], device=model.embed_tokens.weight.device)
    for _ in range(new_tokens):
        logits = model(ids, logits_at=torch.tensor([[ids.shape[1] - 1]], device=ids.device))
        ids = torch.cat((ids, logits.argmax(-1)), dim=1)
    return ids[0, len(prompt) :].tolist()


@torch.inference_mode()
def routing_speed(
    hidden_size: int = 1024, intermediate_size: int = 1408, num_experts: int = 16, top_k: int = 2, tokens: int = 64,
    vocab_size: int = 32256, rounds: int = 7, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """One mixture's forward pass taken apart, in float32 on the best device.

    Returns:
        Timings: ``router`` (scores, choice, weights), ``table`` (looking the choice up by token id, and nothing else),
        ``sort`` (pairs by expert), ``layer`` (all of it, experts included), ``one by one`` (experts on one token after
        the other, without sorting).
    """
    device = as_device(None)
    torch.manual_seed(seed)
    layer = MoE(hidden_size, intermediate_size, Router(hidden_size, num_experts, top_k, norm_topk_prob=True))
    table = Router(hidden_size, num_experts, top_k, hash_vocab_size=vocab_size, seed=seed).to(device).tid2eid
    layer = layer.to(device).eval()
    x, ids = torch.randn(tokens, hidden_size, device=device), torch.randint(vocab_size, (tokens,), device=device)
    routing = layer.router(x)

    def one_by_one():
        return torch.cat([layer.experts(*(part[row : row + 1] for part in parts)) for row in range(tokens)])

    parts = (x, routing.indices, routing.weights)
    torch.testing.assert_close(one_by_one(), layer(x), atol=1e-4, rtol=1e-4)
    ways = {
        "router": lambda: layer.router(x),
        "table": lambda: table[ids],
        "sort": lambda: Pairs(routing.indices, num_experts).counts,
        "layer": lambda: layer(x),
        "one by one": one_by_one,
    }
    return compare(ways, rounds=rounds, device=device)


def pipeline_speed(
    model: VisionLanguageDecoder, image_size: int = 224, requests: int = 4, prompt_tokens: int = 16,
    new_tokens: int = 32, rounds: int = 3, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """The same requests served in order and with the pictures ahead, side by side, with one thread and with all.

    Returns:
        ``seconds``: a Timing for ``"in order"`` and ``"ahead"``, with ``", one thread"`` for a single thread each
        (of which ``"ahead"`` uses two). ``same_answers``; ``gain``: how many times as fast the better of the two with
        pictures ahead is as the better of the two in order.
    """
    generator = torch.Generator().manual_seed(seed)
    weight, vocabulary = model.embed_tokens.weight, model.config.vocab_size
    made = [
        Request(
            torch.randn(1, 3, image_size, image_size, generator=generator).to(weight),
            torch.randint(vocabulary, (prompt_tokens,), generator=generator).tolist(),
        )
        for _ in range(requests)
    ]
    threads = torch.get_num_threads()

    def way(ahead: bool, count: int):
        def run():
            torch.set_num_threads(count)
            try:
                return serve(model, made, new_tokens, ahead)
            finally:
                torch.set_num_threads(threads)

        return run

    ways = {"in order": way(False, threads), "ahead": way(True, threads)}
    if weight.device.type == "cpu" and threads > 1:
        ways |= {"in order, one thread": way(False, 1), "ahead, one thread": way(True, 1)}
    same = ways["in order"]() == ways["ahead"]()
    seconds = compare(ways, rounds=rounds, warmup=0, device=weight.device)
    best = {
        start: min((t for name, t in seconds.items() if name.startswith(start)), key=lambda t: t.median)
        for start in ("in order", "ahead")
    }
    return {"seconds": seconds, "same_answers": same, "gain": ratio(best["in order"], best["ahead"]).median}
