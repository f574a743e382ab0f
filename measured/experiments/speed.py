"""What a machine makes of the article's three designs: decoding and prefill beside their bounds, in one table.

This is what ``make record`` runs on a GPU, and the very same functions run on a CPU at small sizes. One call makes one
model and measures all of it, so that a recording that stops half-way has lost a model and not the rest.

Book: ``chapters/performance/speed.ipynb``.
"""

from typing import Any

import torch
from torch import nn

from dslib import fast
from dslib.architecture import decoder, sparse_decoder
from dslib.architecture.decoder import Decoder, build
from dslib.architecture.fusion import FusionConfig, ImageContext
from dslib.architecture.generation import generate
from dslib.architecture.int4.layers import nbytes, quantize_
from dslib.check import one_of
from dslib.fast.cuda_graph import StaticDecoding
from dslib.fast.int8 import quantize_int8_, quickest_way
from dslib.performance.speed import decode_work, prefill_work
from measured.machine import as_device
from measured.probes import copy_bandwidth, peak_memory, product_rate, read_bandwidth
from measured.timing import Stopwatch, Timing, measure

WEIGHTS = ("plain", "int8", "int4")
# Kernels launched one by one; replayed as a CUDA graph; the same after torch.compile has fused the small ones, or with
# five kernels a layer written by hand (dslib.fast.fused_step). The last two for the smallest batch only.
WAYS = ("calls", "graph", "compiled graph", "fused graph")
INT4_GROUPS = (128, 64, 32)  # the largest that divides every layer
# Swin-T (arXiv 2103.14030, section 3.3) at its published size, and a thumbnail of one.
SWIN_T = {"image_size": 224, "patch_size": 4, "embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]}
SWIN_XS = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
SIZES = {
    "tiny": (decoder.preset("tiny"), SWIN_XS),
    # Larger than the caches of most processors, small enough to decode in a notebook.
    "30m": (decoder.DecoderConfig(8192, 512, 1408, 8, 8, 8), SWIN_T),
    "1.3b": (decoder.preset("1.3b"), SWIN_T),
}


def design(name: str, size: str) -> decoder.DecoderConfig:
    """The article's ``"V1"``, ``"V2"`` or ``"V3"`` at one of ``SIZES``.

    Equal size means: a token is multiplied by as many weights of feed-forward network in all three. V2 adds a Swin and
    a gated cross-attention before every fourth layer. V3 has 16 experts of half V1's feed-forward size, two for a
    token, so it is stored several times as large.
    """
    one_of(("V1", "V2", "V3"), name=name)
    one_of(SIZES, size=size)
    base, swin = SIZES[size]
    if name == "V1":
        return base
    fields = {key: getattr(base, key) for key in base.__dataclass_fields__}
    if name == "V3":
        experts = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": base.intermediate_size // 2}
        return sparse_decoder.SparseConfig(**fields, **experts)
    width = swin["embed_dim"] * 2 ** (len(swin["depths"]) - 1)
    return FusionConfig(**fields, cross_attention_every=4, image_hidden_size=width, swin=swin)


def with_weights(model: Decoder, weights: str) -> Decoder:
    """The model with its linear layers in 8 or 4 bits, changed in place; the output head stays."""
    one_of(WEIGHTS, weights=weights)
    if weights == "int8":
        quantize_int8_(model)
    elif weights == "int4":
        sizes = {layer.in_features for layer in model.layers.modules() if isinstance(layer, nn.Linear)}
        group = next(group for group in INT4_GROUPS if not any(size % group for size in sizes))
        quantize_(model, group_size=group, skip=("lm_head",))
        fast.prepare(model)  # puts the kernels in place
    return model


def latency(
    model: Decoder, prompt_tokens: int = 128, new_tokens: int = 128, batch_size: int = 1,
    pixels: torch.Tensor | None = None, runs: int = 3, seed: int = 0,
) -> dict[str, Timing]:  # fmt: skip
    """Time to the first token apart from time per token after it, greedy, with a random prompt.

    Args:
        pixels: pictures for a vision-language model, (batch_size, 3, H, W); looking at them counts, as it happens
            before the first token.

    Returns:
        Timings ``first_token`` and ``per_token`` (of a whole step, however large the batch).
    """
    prompts = torch.randint(
        model.config.vocab_size, (batch_size, prompt_tokens), generator=torch.Generator().manual_seed(seed)
    )

    def laps(new_tokens: int) -> list[float]:
        """Seconds until each token is known."""
        times: list[float] = []
        watch = Stopwatch(model.embed_tokens.weight.device)
        seen = {}
        if pixels is not None:
            with torch.inference_mode():
                seen = {"image": model.encode_image(pixels)}
        # Called for every sequence of a step; the clock is read once a step.
        generate(model, prompts, new_tokens, on_token=lambda row, _: row or times.append(watch.lap()), **seen)
        return times

    laps(min(new_tokens, 4))  # warms up
    kept = [laps(new_tokens) for _ in range(runs)]
    return {
        "first_token": Timing(tuple(times[0] for times in kept)),
        "per_token": Timing(tuple((times[-1] - times[0]) / (new_tokens - 1) for times in kept)),
    }


def machine_speed(
    name: str = "V1", size: str = "1.3b", dtype: str = "bfloat16", weights: str = "plain",
    batches: tuple[int, ...] = (1, 32), prompts: tuple[int, ...] = (512, 4096), new_tokens: int = 128,
    prompt_tokens: int = 128, ways: tuple[str, ...] = WAYS, roof_seconds: float = 0.5, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Decode and prefill with random weights of one design on the best device, eager and as a CUDA graph.

    Args:
        size: one of ``SIZES``. weights: one of ``WEIGHTS``, see :func:`with_weights`.
        batches: of decoding, after prompts of ``prompt_tokens``. prompts: lengths for prefill, at batch 1.
        ways: of decoding on CUDA, some of ``WAYS``; compiling takes half a minute. Elsewhere there are only calls.
        roof_seconds: time for each of the device's own rates.

    Returns:
        ``parameters``, ``weight_bytes`` (all that is stored), ``int8_way``; ``copy_gb_s``, ``read_gb_s`` and
        ``tflops``: the device's own rates, measured in the same run; ``image``: a Timing of looking at a picture (V2).
        ``rows``: one mapping for each measurement, with ``kind`` (``"decode"`` or ``"prefill"``), ``batch``, ``tokens``
        (of the prompt), ``way``, ``seconds`` (a Timing of the ``new_tokens - 1`` steps after the first token, or of
        the prefill), ``bytes`` and ``flops`` of it all, ``gb_s``, ``share_of_copy`` and ``peak_memory_gb``; or
        ``failed``, why that one does not run here.
    """
    device, kind = as_device(None), getattr(torch, dtype)
    model = build(design(name, size), seed=seed, device=device, dtype=kind).eval()
    parameters = decoder.count_parameters(model)
    model = with_weights(model, weights)
    stored = nbytes(model)
    copied, read = (rate(device, max_seconds=roof_seconds) for rate in (copy_bandwidth, read_bandwidth))
    rate = product_rate(dtype, device, max_seconds=roof_seconds)
    rows = []
    generator = torch.Generator().manual_seed(seed)
    image, looking = _look(model, max(batches), device, kind, generator)
    for batch in batches:
        prompt = torch.randint(model.config.vocab_size, (batch, prompt_tokens), generator=generator).to(device)
        seen = _first(image, batch)
        steps = new_tokens - 1
        work = decode_work(model, prompt_tokens + new_tokens // 2, batch, seen)
        for way in ways if device.type == "cuda" else WAYS[:1]:
            if way in WAYS[2:] and batch > min(batches):
                continue
            row = {"kind": "decode", "batch": batch, "tokens": prompt_tokens, "way": way}
            call = _decode(model, prompt, new_tokens, seen, way)
            rows.append(_measured(row, call, device, work.bytes * steps, work.flops * steps, copied))
    for length in prompts:
        prompt = torch.randint(model.config.vocab_size, (1, length), generator=generator).to(device)
        work = prefill_work(model, length)
        row = {"kind": "prefill", "batch": 1, "tokens": length, "way": "calls"}

        def call(prompt=prompt):
            loop = StaticDecoding(model, 1, prompt.shape[1] + 1, image=_first(image, 1))
            return lambda: loop.prefill(prompt)

        rows.append(_measured(row, call, device, work.bytes, work.flops, copied))
    return {
        "parameters": parameters,
        "weight_bytes": stored,
        "int8_way": quickest_way(device.type, kind) if weights == "int8" else None,
        "copy_gb_s": copied / 1e9, "read_gb_s": read / 1e9, "tflops": rate and rate / 1e12,
        "image": looking, "rows": rows,
    }  # fmt: skip


def _decode(model: Decoder, prompt, new_tokens: int, image: ImageContext | None, way: str):
    def prepare():
        options = {"graph": "graph" in way, "fused": "fused" in way}
        options |= {"backend": "inductor" if "compiled" in way else None}
        loop = StaticDecoding(model, len(prompt), prompt.shape[1] + new_tokens, image=image, **options)
        loop.prefill(prompt)
        if "fused" in way:
            _check_logits(model, loop, prompt)

        def steps():
            loop.position.fill_(prompt.shape[1])  # the same positions again: only the time is of interest
            for _ in range(new_tokens - 1):
                loop.step()

        return steps

    return prepare


@torch.inference_mode()
def _check_logits(model: Decoder, loop: StaticDecoding, prompt) -> None:
    """Refuse to time a fused step that computes something else than the model does for the same text.

    Raises:
        RuntimeError: logits that differ by more than the rounding of 16 bits through all layers.
    """
    found = loop._next.logits(loop.token, loop.position).float()
    wanted = model(torch.cat((prompt, loop.token), dim=1))[:, -1].float()
    gap = ((found - wanted).norm() / wanted.norm()).item()
    if not gap < 0.05:
        raise RuntimeError(f"the fused step's logits differ from the model's by {gap:.1%}")


def _measured(row, prepare, device, moved: float, work: float, copied: float) -> dict[str, Any]:
    with peak_memory(device) as peak:
        try:
            timing = measure(prepare(), device=device, min_runs=5, max_runs=10, max_seconds=3.0, warmup=1)
        except Exception as error:  # out of memory, a kernel that the device has not: whatever it is, it is the answer
            return row | {"failed": (str(error).splitlines() or [type(error).__name__])[0][:160]}
    rate = moved / timing.median
    found = {"seconds": timing, "bytes": moved, "flops": work, "gb_s": rate / 1e9, "share_of_copy": rate / copied}
    return row | found | {"peak_memory_gb": peak["bytes"] and peak["bytes"] / 1e9}


@torch.inference_mode()
def _look(model: nn.Module, batch: int, device, kind, generator):
    """What the model sees of random pictures, one a sequence, and how long one picture takes; (None, None) for text."""
    if not isinstance(model.config, FusionConfig):
        return None, None
    size = model.config.swin["image_size"]
    pixels = torch.randn(batch, 3, size, size, generator=generator).to(device, kind)
    timing = measure(torch.inference_mode()(lambda: model.encode_image(pixels[:1])), device=device, max_seconds=1.0)
    return model.encode_image(pixels), timing


def _first(image: ImageContext | None, batch: int) -> ImageContext | None:
    return image and ImageContext(tuple((k[:batch], v[:batch]) for k, v in image.keys_values))
