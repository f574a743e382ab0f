"""Speed, measured: decoding and windowed attention, beside the bound and beside what people use.

Every function returns plain data, so that it can be shown live, recorded on a GPU (``make record``) or printed
(``python -m measured.bench``).

Book: ``chapters/architecture/decoder.ipynb``, ``chapters/performance/speed.ipynb``. Source of the bound: Pope et al.
2022 (arXiv 2211.05102, section 2.1): decoding one sequence takes at least the time to read every weight once a token.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from dslib import fast
from dslib.architecture.cache import visible
from dslib.architecture.decoder import Decoder, build, preset
from dslib.architecture.generation import generate
from dslib.architecture.layers import causal_attention
from dslib.architecture.weights.twin import hf_twin
from dslib.architecture.window import window_attention
from dslib.performance.speed import bytes_per_token
from measured.machine import as_device
from measured.probes import read_bandwidth
from measured.timing import Timing, compare, measure, ratio


def decode_speed(
    name: str = "1.3b",
    dtype: str = "bfloat16",
    batch_size: int = 1,
    prompt_tokens: int = 128,
    new_tokens: int = 128,
    seed: int = 0,
) -> dict[str, Any]:
    """Decode ``new_tokens`` with random weights of a preset's shape on the best device, prompt included.

    Returns:
        ``seconds`` for the whole of it (a Timing), ``tokens_per_second``, ``bytes_per_token``, and ``share_of_read``:
        the bytes that had to be read over the measured read bandwidth, as a share of the time it took.
    """
    device = as_device(None)
    model = build(preset(name), seed=seed, device=device, dtype=getattr(torch, dtype)).eval()
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(model.config.vocab_size, (batch_size, prompt_tokens), generator=generator)
    timing = measure(lambda: generate(model, prompts, new_tokens), device=device, min_runs=5, max_runs=7, warmup=1)
    read = bytes_per_token(model, prompt_tokens + new_tokens // 2)
    return {
        "seconds": timing,
        "tokens_per_second": batch_size * new_tokens / timing.median,
        "bytes_per_token": read,
        "share_of_read": read * new_tokens / read_bandwidth(device) / timing.median,
    }


def window_speed(
    length: int = 4096, window: int = 256, heads: int = 8, head_dim: int = 64, dtype: str = "float32", rounds: int = 5
) -> dict[str, Any]:
    """Windowed attention in blocks against full causal attention and against a band mask, side by side.

    Returns:
        Timings ``blocks``, ``causal``, ``band``; ``times_causal`` and ``times_band``: how many times as fast blocks are
        (median of paired rounds); ``largest_difference`` between blocks and band mask.
    """
    device = as_device(None)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, length, head_dim, generator=generator).to(device, getattr(torch, dtype)) for _ in range(3)
    )
    at = torch.arange(length, device=device)
    mask = visible(at, at, window)
    ways = {
        "blocks": lambda: window_attention(q, k, v, window),
        "causal": lambda: causal_attention(q, k, v),
        "band": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
    }
    with torch.inference_mode():
        difference = (ways["blocks"]() - ways["band"]()).abs().max().item()
        times = compare(ways, rounds=rounds, device=device)
    return {
        **times,
        "times_causal": ratio(times["causal"], times["blocks"]).median,
        "times_band": ratio(times["band"], times["blocks"]).median,
        "largest_difference": difference,
    }


def decode_comparison(
    model: Decoder, prompt: list[int], new_tokens: int = 128, rounds: int = 3, kernels: bool = True
) -> dict[str, Any]:
    """Greedy decoding of one prompt, ours against ``transformers.generate`` with its default cache, side by side.

    Args:
        kernels: also time ours prepared but for the one-row products, so that both sides use the same matrix product.

    Returns:
        Timings ``transformers``, ``plain`` (the modules, as the chapter shows them), ``ours`` (prepared) and (with
        ``kernels``) ``ours_same_kernel``; ``times``, ``times_plain`` and ``times_same_kernel``: how many times as fast
        as transformers; ``same_tokens``; ``tokens_per_second``. The model itself is left as it is.
    """
    twin = hf_twin(model)
    ids = torch.tensor([prompt], device=model.embed_tokens.weight.device)

    @torch.inference_mode()
    def theirs() -> list[int]:
        out = twin.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
        return out[0, len(prompt) :].tolist()

    def ours(quick_products: bool | None) -> Callable[[], list[int]]:
        """Decoding by a model of its own that shares the weights, prepared beforehand; None leaves it plain."""
        own = model.with_window(model.config.sliding_window, model.config.attention_sinks)
        fast.release(own)
        if quick_products is not None:
            fast.prepare(own, quick_products=quick_products)
        return lambda: generate(own, [prompt], new_tokens)[0].tokens

    ways = {"transformers": theirs, "plain": ours(None), "ours": ours(True)}
    if kernels:
        ways["ours_same_kernel"] = ours(False)
    same = theirs() == ways["ours"]() == ways["plain"]()
    times: dict[str, Timing] = compare(ways, rounds=rounds, warmup=0)
    out: dict[str, Any] = {
        **times,
        "times": ratio(times["transformers"], times["ours"]).median,
        "times_plain": ratio(times["transformers"], times["plain"]).median,
        "same_tokens": same,
        "tokens_per_second": new_tokens / times["ours"].median,
    }
    if kernels:
        out["times_same_kernel"] = ratio(times["transformers"], times["ours_same_kernel"]).median
    return out
