"""The pixels are those of transformers' image processors, and of Pillow's padding for the tiles of DeepSeek-VL2."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from transformers.image_processing_utils import select_best_resolution
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deepseek_ocr2.image_processing_pil_deepseek_ocr2 import DeepseekOcr2ImageProcessorPil
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from dslib.data.encoders import EfficientNetLite
from dslib.scenarios import multimodal
from dslib.scenarios.multimodal import (
    HALF,
    IMAGENET,
    RECIPES,
    Recipe,
    closest_grid,
    cut,
    prepare,
    shorter_side_to,
    tile_grid,
    views,
)

PROCESSORS = {
    "clip": CLIPImageProcessorPil(),
    "vit": ViTImageProcessorPil(),
    "siglip": SiglipImageProcessorPil(),
    "deepseek-vl": DeepseekVLImageProcessorPil(),
    "imagenet": CLIPImageProcessorPil(
        size={"shortest_edge": 256},
        image_mean=IMAGENET.mean,
        image_std=IMAGENET.std,
        resample=Image.Resampling.BILINEAR,
    ),
}
SIZES = [(1920, 1080), (1080, 1920), (800, 600), (224, 224), (37, 501), (333, 777), (5, 3), (1000, 10)]


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", PROCESSORS)
def test_equal_to_the_transformers_processor(name, size):
    image = noise(*size)
    wanted = torch.from_numpy(np.asarray(PROCESSORS[name](image)["pixel_values"][0]))
    got = prepare(image, RECIPES[name])
    assert got.pixels.shape == (1, *wanted.shape) and got.pixels.dtype == torch.float32
    assert got.pixels.is_contiguous() and got.original == size
    torch.testing.assert_close(got.pixels[0], wanted.float(), atol=2e-6, rtol=0)


@pytest.mark.parametrize("size", [(1920, 1080), (600, 800), (1000, 100), (333, 777)], ids=str)
def test_tiles_are_those_of_deepseek_vl2(size):
    """The released processor pads with Pillow, on a canvas of the list of its configuration."""
    image, recipe = noise(*size), RECIPES["deepseek-vl2"]
    pictures, (columns, rows) = views(image, recipe)
    canvas = ImageOps.pad(image, (columns * 384, rows * 384), color=(127, 127, 127))
    wanted = [ImageOps.pad(image, (384, 384), color=(127, 127, 127))]
    wanted += [
        canvas.crop((x, y, x + 384, y + 384)) for y in range(0, rows * 384, 384) for x in range(0, columns * 384, 384)
    ]
    assert len(pictures) == len(wanted) == 1 + columns * rows
    assert all(got.tobytes() == want.tobytes() for got, want in zip(pictures, wanted, strict=True))
    ready = prepare(image, recipe)
    assert ready.pixels.shape == (1 + columns * rows, 3, 384, 384) and ready.grid == (columns, rows)


@settings(max_examples=300, deadline=None)
@given(width=st.integers(1, 4000), height=st.integers(1, 4000))
def test_the_canvas_is_the_one_that_keeps_most(width, height):
    """The same choice as the rule that transformers has from LLaVA-NeXT, over DeepSeek-VL2's 23 canvases."""
    canvases = [(n * 384, m * 384) for m in range(1, 10) for n in range(1, 10) if m * n <= 9]
    assert len(canvases) == 23
    rows, columns = (side // 384 for side in select_best_resolution((height, width), canvases))
    assert tile_grid((width, height), 384) == (columns, rows)


@pytest.mark.parametrize("size", [(1920, 1080), (900, 1600), (800, 800), (3000, 500)], ids=str)
def test_stretched_tiles_are_those_of_deepseek_ocr2(size):
    image = noise(*size)
    columns, rows = closest_grid(size, 768, 2, 6)
    tiles = cut(image.resize((columns * 768, rows * 768), Image.Resampling.BICUBIC), 768)
    wanted = DeepseekOcr2ImageProcessorPil()(image)["pixel_values_local"]
    got = [multimodal.normalise(tile, HALF) for tile in tiles]
    torch.testing.assert_close(torch.stack(got), torch.from_numpy(np.stack(wanted)).float(), atol=2e-6, rtol=0)


@settings(max_examples=200, deadline=None)
@given(width=st.integers(1, 4000), height=st.integers(1, 4000))
def test_the_closest_grid_is_transformers_own(width, height):
    from transformers.models.deepseek_ocr2.image_processing_pil_deepseek_ocr2 import get_optimal_tiled_canvas

    assert closest_grid((width, height), 768, 2, 6) == get_optimal_tiled_canvas((height, width), (768, 768), 2, 6)


def test_a_1080p_picture_by_every_strategy():
    assert [shorter_side_to(size, 224) for size in ((1920, 1080), (600, 800))] == [(398, 224), (224, 298)]
    image = noise(1920, 1080)
    shapes = {name: tuple(prepare(image, Recipe(224, name)).pixels.shape) for name in multimodal.STRATEGIES}
    assert shapes == {
        "crop": (1, 3, 224, 224), "stretch": (1, 3, 224, 224), "letterbox": (1, 3, 224, 224),
        "tiles": (9, 3, 224, 224), "shorter": (1, 3, 224, 398),
    }  # fmt: skip


@pytest.mark.parametrize("strategy", ["crop", "stretch", "letterbox", "tiles"])
@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1), (1, 1)], ids=str)
def test_a_strip_is_neither_an_error_nor_a_gigabyte(strategy, size):
    image = Image.new("RGB", size, (255, 0, 0))
    pixels = prepare(image, Recipe(224, strategy, HALF)).pixels
    assert pixels.shape[1:] == (3, 224, 224)
    assert (pixels[0, 0] == 1).any()  # the red is still there


def test_shorter_refuses_what_would_not_fit_into_memory(tmp_path):
    Image.new("RGB", (1, 10_000)).save(tmp_path / "strip.png")
    with pytest.raises(ValueError, match=r"strip\.png: 1 x 10000: would become 224 x 2240000"):
        prepare(tmp_path / "strip.png", Recipe(224, "shorter"))


def test_the_middle_of_a_strip_is_the_middle(monkeypatch):
    image = noise(3000, 900)  # shrunk: both ways agree to one step of 255
    exact, _ = views(image, RECIPES["clip"])
    monkeypatch.setattr(multimodal, "LARGEST_BETWEEN", 1)
    alone, _ = views(image, RECIPES["clip"])
    assert np.abs(np.asarray(exact[0]).astype(int) - np.asarray(alone[0])).max() <= 1


def test_normalisation_belongs_to_the_encoder():
    grey = Image.new("RGB", (8, 8), (127, 127, 127))
    assert prepare(grey, RECIPES["efficientnet-lite0"]).pixels.abs().max() < 1e-6
    assert RECIPES["efficientnet-lite0"].normalisation == EfficientNetLite.normalisation
    assert RECIPES["deepseek-vl2"].filling == (127, 127, 127)
    assert prepare(grey, RECIPES["imagenet"]).pixels.abs().max() > 0.05


def test_draft_changes_pixels_a_little_and_is_off_by_default():
    smooth = noise(48, 27).resize((1920, 1080), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    smooth.save(file, "JPEG", quality=90)
    plain = prepare(file.getvalue(), Recipe())
    quick = prepare(file.getvalue(), Recipe(draft=True))
    gap = (plain.pixels - quick.pixels).abs()
    assert 0 < gap.max() < 0.2 and gap.mean() < 0.02


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"strategy": "squash"}, "strategy: got 'squash', expected one of 'crop'"),
        ({"resample": "nearest"}, "resample"),
        ({"size": 0}, "size: got 0"),
        ({"max_tiles": 0}, "max_tiles"),
        ({"shorter": 100}, "shorter: got 100, expected at least 224"),
    ],
)
def test_bad_recipes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**arguments)


@pytest.mark.benchmark
def test_not_slower_than_transformers():
    """One 1080p JPEG to a 224 tensor, side by side, one thread."""
    from measured.experiments.multimodal_speed import preparation

    torch.set_num_threads(1)
    assert preparation()["ratio"]["low"] > 1.2
