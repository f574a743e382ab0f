"""What a key-value cache saves, and what its kinds cost: bytes and time of one token's attention over a long text.

Book: ``chapters/performance/speed.ipynb``. Sources: Shazeer 2019 (arXiv 1911.02150) for shared keys and values, GQA
(arXiv 2305.13245), Mistral 7B (arXiv 2310.06825) for the window, DeepSeek-V2 (arXiv 2405.04434, section 2.1) for MLA.
"""

from typing import Any

import torch

from dslib.architecture.decoder import Decoder, DecoderConfig, build
from dslib.architecture.sparse_decoder import SparseConfig
from dslib.lab.device import as_device
from dslib.lab.timing import compare

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
            return attention(x, *reversed(model.prepare(x, cache, None)), cache, 0)

        ways[kind] = one_token
    for kind, timing in compare(ways, rounds=rounds, device=device).items():
        found[kind]["seconds"] = timing
    return found


@torch.inference_mode()
def without_cache(model: Decoder, prompt: list[int], new_tokens: int) -> list[int]:
    """Greedy decoding that keeps nothing: for every new token the whole text is read again."""
    ids = torch.tensor([prompt], device=model.embed_tokens.weight.device)
    for _ in range(new_tokens):
        logits = model.lm_head(model.hidden_states(ids)[:, -1:])
        ids = torch.cat((ids, logits.argmax(-1)), dim=1)
    return ids[0, len(prompt) :].tolist()
