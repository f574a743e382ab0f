"""What eyes cost: time and operations of the second stream, and of every token that is written after a look.

Book: ``chapters/architecture/fusion.ipynb``. ``python -m measured.bench fusion`` prints the first table.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dslib import fast
from dslib.architecture.decoder import MODELS, Decoder, DecoderConfig, build, count_parameters, preset
from dslib.architecture.fusion import FusionConfig, ImageContext, VisionLanguageDecoder
from dslib.architecture.generation import generate
from dslib.architecture.vision.swin import SwinStream
from measured.timing import compare, ratio

# microsoft/swin-tiny-patch4-window7-224: 224 x 224 pixels become 49 features of size 768.
SWIN_T = {
    "image_size": 224, "patch_size": 4, "embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24],
    "window_size": 7,
}  # fmt: skip
FEATURES = 768


class _NoStream(nn.Module):
    """In place of an image stream where features are handed over and pixels never come."""

    hidden_size = FEATURES


def look_cost(
    name: str = "smollm2-135m", layers: int | None = None, image_tokens: Sequence[int] = (49, 196, 576, 1024, 2048),
    every: int = 1, context: int = 64, new_tokens: int = 16, rounds: int = 7, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Time a token of one sequence after a look at a picture of so many features, on a CPU, side by side.

    All have the same text layers with random weights of a preset's shape: the text model alone, gated cross-attention
    with cached keys and values before every ``every``-th layer, and a projector, whose picture lies in the text's own
    cache. Beside them is the text model with so many layers more that it has as many parameters as cross-attention.

    Args:
        layers: None for the preset's. context: tokens of text before the first that is timed.

    Returns:
        ``seconds``: a Timing for ``new_tokens`` tokens of each way: ``"text"``, ``"text, equal size"``, ``"cross, N"``
        and ``"projector, N"``. ``over_text`` and ``over_equal_size``: the medians of the ratios, by way.
        ``parameters``: of each kind, without the stream; ``kept_bytes``: of a picture, by way.
    """
    text = build(preset(name, **({} if layers is None else {"num_hidden_layers": layers})), seed=seed).eval()
    cross = VisionLanguageDecoder.from_text(text, _NoStream(), cross_attention_every=every)
    for block in cross.seeing():
        nn.init.constant_(block.cross.gate.bias, 0.1)  # a gate that is shut costs as much, but let there be no doubt
    projector = VisionLanguageDecoder.from_text(text, _NoStream(), fusion="projector")
    equal = build(_as_large(text.config, count_parameters(cross)), seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    runs = {
        "text": _steps(text, None, context, new_tokens),
        "text, equal size": _steps(equal, None, context, new_tokens),
    }
    kept = {}
    for count in image_tokens:
        features = torch.randn(1, count, FEATURES, generator=generator)
        for kind, model in (("cross", cross), ("projector", projector)):
            with torch.inference_mode():
                image = model.image_context(features)
            runs[f"{kind}, {count}"] = _steps(model, image, context, new_tokens)
            kept[f"{kind}, {count}"] = image.nbytes if kind == "cross" else count * _cache_bytes(text.config)
    seconds = compare(runs, rounds=rounds, warmup=1)
    sizes = {"text": text, "text, equal size": equal, "cross": cross, "projector": projector}
    return {
        "seconds": seconds,
        "over_text": {way: ratio(run, seconds["text"]).median for way, run in seconds.items()},
        "over_equal_size": {way: ratio(run, seconds["text, equal size"]).median for way, run in seconds.items()},
        "parameters": {kind: count_parameters(model) for kind, model in sizes.items()},
        "kept_bytes": kept,
    }


def _as_large(config: DecoderConfig, parameters: int) -> DecoderConfig:
    """The same decoder with as many layers as bring it nearest to ``parameters``."""
    counts = [
        count_parameters(build(preset_like(config, num_hidden_layers=layers), device="meta")) for layers in (1, 2)
    ]
    return preset_like(config, num_hidden_layers=1 + round((parameters - counts[0]) / (counts[1] - counts[0])))


def preset_like(config: DecoderConfig, kind: type = DecoderConfig, **changes) -> DecoderConfig:
    """``config`` with changes, as a ``kind`` of configuration, which may have further fields."""
    return kind(**{name: getattr(config, name) for name in DecoderConfig.__dataclass_fields__} | changes)


def _cache_bytes(config: DecoderConfig) -> int:
    return config.kv_elements_per_token * 4


def _steps(model: Decoder, image: ImageContext | None, context: int, new_tokens: int):
    """A function that writes ``new_tokens`` tokens behind a prompt, prepared, again and again from the same place."""
    fast.prepare(model)
    prefix, seen = (0, {}) if image is None else (image.prefix, {"image": image})
    cache = model.make_cache(max_length=prefix + context + new_tokens)
    with torch.inference_mode():
        model(torch.zeros(1, context, dtype=torch.long), cache, **seen)
    start = cache.length

    @torch.inference_mode()
    def run() -> None:
        cache.truncate(start)
        for token in range(new_tokens):
            model(torch.tensor([[token]]), cache, **seen)

    return run


def stream_cost(
    name: str = "smollm2-135m", layers: int | None = None, prompt_tokens: int = 16, new_tokens: int = 32,
    rounds: int = 5, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Answer a question with and without a picture: the article's V1 against its V2 with a Swin-T, on a CPU.

    Returns:
        ``seconds``: a Timing each for ``"V1"``, ``"look"`` (the image stream alone), ``"V2"`` (look and answer),
        ``"V2, seen before"``, and ``"projector"`` (look and answer). ``over_v1``: medians of the ratios.
    """
    text = build(preset(name, **({} if layers is None else {"num_hidden_layers": layers})), seed=seed).eval()
    stream = SwinStream(SWIN_T).eval()
    models = {
        fusion: VisionLanguageDecoder.from_text(text, stream, fusion=fusion).eval() for fusion in ("cross", "projector")
    }
    for model in (text, *models.values()):
        fast.prepare(model)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(1, 3, 224, 224, generator=generator)
    prompt = torch.randint(text.config.vocab_size, (1, prompt_tokens), generator=generator)

    @torch.inference_mode()
    def look(fusion: str) -> ImageContext:
        return models[fusion].encode_image(pixels)

    seen = look("cross")
    ways = {
        "V1": lambda: generate(text, prompt, new_tokens),
        "look": lambda: look("cross"),
        "V2": lambda: generate(models["cross"], prompt, new_tokens, image=look("cross")),
        "V2, seen before": lambda: generate(models["cross"], prompt, new_tokens, image=seen),
        "projector": lambda: generate(models["projector"], prompt, new_tokens, image=look("projector")),
    }
    seconds = compare(ways, rounds=rounds, warmup=1)
    return {"seconds": seconds, "over_v1": {way: ratio(run, seconds["V1"]).median for way, run in seconds.items()}}


def counted_flops(config: DecoderConfig, tokens: int, image_tokens: int = 0) -> int:
    """Operations of one forward pass over ``tokens`` tokens of text that look at a picture already encoded.

    Counted by torch on tensors without memory, so that no formula can differ from the model; a multiply-add is two. For
    cross-attention, making the picture's keys and values is not in it; for a projector, the picture's tokens are.

    Args:
        config: a :class:`FusionConfig` if there are image tokens.
    """
    with torch.device("meta"):
        model = MODELS[type(config)](config, *([_NoStream()] if isinstance(config, FusionConfig) else []))
        image = model.image_context(torch.empty(1, image_tokens, FEATURES)) if image_tokens else None
        ids = torch.zeros(1, tokens, dtype=torch.long)
        return _counted(lambda: model(ids, **({} if image is None else {"image": image})))


def swin_flops(config: dict = SWIN_T) -> int:
    """Operations of the image stream for one picture, counted in the same way."""
    with torch.device("meta"):
        stream = SwinStream(config)
        pixels = torch.empty(1, 3, config["image_size"], config["image_size"])
        return _counted(lambda: stream(pixels))


def _counted(run) -> int:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        result: Tensor = run()
    del result
    return counter.get_total_flops()
