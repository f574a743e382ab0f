"""Side-by-side timings of preprocessing: ``python -m measured.experiments.multimodal_speed``.

Nothing else should run meanwhile.

Book: ``chapters/scenarios/multimodal.ipynb``.
"""

import argparse
import io
import math
import sys
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from dslib.data.encoders import load_efficientnet
from dslib.scenarios.batches import ImageLoader
from dslib.scenarios.multimodal import RECIPES, Recipe, prepare
from measured import timing
from measured.machine import describe

SIZES = (96, 128, 160, 192, 224)


def photo(width: int = 1920, height: int = 1080, seed: int = 0, quality: int = 90) -> bytes:
    """A JPEG with the large shapes and the fine grain of a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 16, 3), dtype=np.uint8))
    shapes = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    grain = rng.integers(-10, 11, (height, width, 1), dtype=np.int16)
    file = io.BytesIO()
    Image.fromarray(np.clip(shapes + grain, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=quality)
    return file.getvalue()


def preparation(rounds: int = 15, seed: int = 0) -> dict:
    """One 1080p JPEG to CLIP's normalised 224 x 224, ours against transformers' processor, same settings.

    Returns:
        seconds by way; ``ratio``, how many times as fast ours is; the largest difference of the two results, and the
        same for JPEG draft mode, which is another setting: the decoder itself leaves pixels out.
    """
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    data, processor = photo(seed=seed), CLIPImageProcessorPil()
    quick = replace(RECIPES["clip"], draft=True)

    def theirs() -> torch.Tensor:
        with Image.open(io.BytesIO(data)) as image:
            return processor(image, return_tensors="pt")["pixel_values"]

    ways = {
        "transformers": theirs,
        "ours": lambda: prepare(data, RECIPES["clip"]).pixels,
        "ours, draft": lambda: prepare(data, quick).pixels,
    }
    results = {name: way() for name, way in ways.items()}
    times = timing.compare(ways, rounds=rounds)
    gaps = {name: (result - results["transformers"]).abs() for name, result in results.items()}
    return {
        "seconds": times,
        "ratio": _plain(timing.ratio(times["transformers"], times["ours"])),
        "draft_ratio": _plain(timing.ratio(times["transformers"], times["ours, draft"])),
        "largest_difference": gaps["ours"].max().item(),
        "draft_difference": {"mean": gaps["ours, draft"].mean().item(), "largest": gaps["ours, draft"].max().item()},
    }


def overlap(images: int = 64, batch_size: int = 4, rounds: int = 5, seed: int = 0) -> dict:
    """Batches of 1080p JPEGs through EfficientNet-Lite0, prepared in turns with the model or ahead of it.

    The model's input is chosen among ``SIZES`` so that it takes about as long as preparing a picture. Its thread is one
    in both ways (the caller sets it), so that the loader's worker does not merely use a core that was idle.

    Returns:
        seconds of a pass; ``ratio``, how many times as fast the loader that works ahead is; the two halves, seconds a
        picture; and ``bound``, the ratio if the shorter half were hidden whole, but for the first batch.
    """
    sources, model = [photo(seed=seed + number % 4) for number in range(images)], load_efficientnet()
    model.to(memory_format=torch.channels_last)

    def look(pixels: torch.Tensor) -> None:
        with torch.inference_mode():
            model.extract_features(pixels.contiguous(memory_format=torch.channels_last))

    def recipe(size: int) -> Recipe:
        return replace(RECIPES["efficientnet-lite0"], size=size)

    prepared = timing.measure(lambda: prepare(sources[0], recipe(160)), max_seconds=1).median
    models = {
        size: timing.measure(lambda size=size: look(torch.zeros(batch_size, 3, size, size)), max_seconds=1).median
        / batch_size
        for size in SIZES
    }
    size = min(SIZES, key=lambda size: abs(math.log(models[size] / prepared)))

    def one_pass(workers: int) -> None:
        for batch in ImageLoader(sources, recipe(size), batch_size, workers=workers):
            look(batch.pixels)

    times = timing.compare({"in turns": lambda: one_pass(0), "ahead": lambda: one_pass(1)}, rounds=rounds)
    first, longer = prepared * batch_size, max(prepared, models[size]) * images
    return {
        "seconds": times,
        "ratio": _plain(timing.ratio(times["in turns"], times["ahead"])),
        "prepare": prepared, "model": models[size], "size": size, "threads": torch.get_num_threads(),
        "bound": (prepared + models[size]) * images / (longer + first),
    }  # fmt: skip


def _plain(ratio: timing.Ratio) -> dict:
    return {"median": ratio.median, "low": ratio.low, "high": ratio.high, "n": ratio.n}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m measured.experiments.multimodal_speed", description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the model")
    parser.add_argument("--rounds", type=int, default=5, help="paired rounds")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(f"{describe()}; {options.threads} threads")
    for function in (preparation, overlap):
        print(f"\n{function.__doc__.splitlines()[0]}")
        for name, value in function(rounds=options.rounds).items():
            for key, one in (value if isinstance(value, dict) and name == "seconds" else {name: value}).items():
                print(f"  {key:22} {one}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
