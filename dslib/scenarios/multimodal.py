"""Pictures and texts of any size to one batch that a model takes.

An encoder sees squares of one size, with one normalisation. What becomes of a picture of another shape is a choice, and
:class:`Recipe` names it:

========== ==================================================== =======================================
strategy   what is done                                         what is lost
========== ==================================================== =======================================
crop       shorter side to ``size``, middle square kept         the ends of the longer side, detail
stretch    both sides to ``size``                               proportions, detail
letterbox  longer side to ``size``, the rest filled             detail, and pixels spent on filling
tiles      a letterbox of everything, then squares of ``size``  less detail; up to ten times the work
shorter    shorter side to ``size``, nothing cut                equal sizes: only with padding in a batch
========== ==================================================== =======================================

The tiles are those of DeepSeek-VL2 (arXiv 2412.10302, section 3.1). For the same settings the pixels are those of
transformers' image processors. Book: ``chapters/scenarios/multimodal.ipynb``. Of that
chapter are also, in reading order: :mod:`~dslib.scenarios.images`, :mod:`~dslib.scenarios.batches`,
:mod:`~dslib.scenarios.retrieval`, :mod:`dslib.data.encoders`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dslib import check
from dslib.data.encoders import EfficientNetLite, Normalisation
from dslib.scenarios.images import MAX_PIXELS, ImageError, Source, name_of, open_image

IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = Normalisation((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
LARGEST_BETWEEN = 4_000_000  # pixels of a picture that is made only to be cropped
STRATEGIES = ("crop", "stretch", "letterbox", "tiles", "shorter")


@dataclass(frozen=True)
class Recipe:
    """How one encoder wants its pictures."""

    size: int = 224  # side of the square, pixels
    strategy: str = "crop"  # one of the table above
    normalisation: Normalisation = IMAGENET
    resample: str = "bicubic"  # or "bilinear", both with antialiasing
    shorter: int | None = None  # (crop) the shorter side before the middle is cut out; None is size
    max_tiles: int = 9  # (tiles) at most so many beside the view of everything
    min_side: int = 1  # (letterbox) the shorter side is not made thinner than this
    background: tuple[int, int, int] = (255, 255, 255)  # this, max_pixels and draft as of open_image
    max_pixels: int = MAX_PIXELS
    draft: bool = False  # let JPEGs be decoded at a reduced size: faster, other pixels

    def __post_init__(self):
        check.one_of(STRATEGIES, strategy=self.strategy)
        check.one_of(("bicubic", "bilinear"), resample=self.resample)
        check.whole(1, size=self.size, max_tiles=self.max_tiles, min_side=self.min_side, max_pixels=self.max_pixels)
        if self.shorter is not None:
            check.whole(self.size, shorter=self.shorter)  # to have what to cut from

    @property
    def filling(self) -> tuple[int, int, int]:
        """Colour of the bars of a letterbox: the encoder's mean, which is close to zero once normalised."""
        return tuple(int(value * 255) for value in self.normalisation.mean)


RECIPES = {
    "efficientnet-lite0": Recipe(normalisation=EfficientNetLite.normalisation),
    "imagenet": Recipe(shorter=256, resample="bilinear"),
    "clip": Recipe(normalisation=CLIP),
    "vit": Recipe(strategy="stretch", normalisation=HALF, resample="bilinear"),
    "siglip": Recipe(strategy="stretch", normalisation=HALF),
    "deepseek-vl": Recipe(384, "letterbox", CLIP, min_side=14),
    "deepseek-vl2": Recipe(384, "tiles", HALF),
}


@dataclass(frozen=True)
class Views:
    """One picture, ready."""

    pixels: Tensor  # (V, 3, H, W) float32, the view of everything first, then the tiles row by row
    grid: tuple[int, int]  # columns and rows of the tiles, (0, 0) without
    original: tuple[int, int]  # the upright picture's width and height


def prepare(source: Source, recipe: Recipe) -> Views:
    """A picture from anywhere to normalised pixels.

    Raises ``ImageError`` as :func:`~.images.open_image`, and where "shorter" would make more than ``max_pixels`` of it.
    """
    size = (recipe.shorter or recipe.size,) * 2
    draft = size if recipe.draft and recipe.strategy != "tiles" else None
    image = open_image(source, background=recipe.background, max_pixels=recipe.max_pixels, draft=draft)
    try:
        pictures, grid = views(image, recipe)
    except ImageError as error:
        raise ImageError(f"{name_of(source)}: {error}") from error
    return Views(torch.stack([normalise(picture, recipe.normalisation) for picture in pictures]), grid, image.size)


def views(image: Image.Image, recipe: Recipe) -> tuple[list[Image.Image], tuple[int, int]]:
    """The RGB pictures that the encoder will see, before normalisation, and the grid of the tiles."""
    how, square = Image.Resampling[recipe.resample.upper()], (recipe.size, recipe.size)
    if recipe.strategy == "stretch":
        return [image.resize(square, how)], (0, 0)
    if recipe.strategy == "crop":
        return [_resize_and_crop(image, recipe.shorter or recipe.size, recipe.size, how)], (0, 0)
    if recipe.strategy == "shorter":
        size = shorter_side_to(image.size, recipe.size)
        if size[0] * size[1] > recipe.max_pixels:
            raise ImageError(f"{image.width} x {image.height}: would become {size[0]} x {size[1]}")
        return [image.resize(size, how)], (0, 0)
    if recipe.strategy == "letterbox":
        return [letterbox(image, square, how, recipe.filling, recipe.min_side)], (0, 0)
    grid = tile_grid(image.size, recipe.size, recipe.max_tiles)
    canvas = (grid[0] * recipe.size, grid[1] * recipe.size)
    # An odd rest is halved by rounding to even here and by rounding down above, as DeepSeek's VL2 and VL do.
    whole, sharp = (letterbox(image, room, how, recipe.filling, recipe.min_side, round) for room in (square, canvas))
    return [whole, *cut(sharp, recipe.size)], grid


def normalise(image: Image.Image, normalisation: Normalisation) -> Tensor:
    """RGB picture -> (3, H, W) float32: ``(pixels / 255 - mean) / std``."""
    mean = torch.tensor(normalisation.mean, dtype=torch.float32).view(3, 1, 1)
    std = torch.tensor(normalisation.std, dtype=torch.float32).view(3, 1, 1)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, H, W) uint8, strided
    # One multiplication and one addition a value, written in the order in which a convolution reads.
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).mul_(1 / (255 * std)).sub_(mean / std)


def shorter_side_to(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    """(width, height) with the shorter side set to ``shorter``, the other in proportion, rounded down."""
    width, height = size
    return (shorter, int(shorter * height / width)) if width <= height else (int(shorter * width / height), shorter)


def _resize_and_crop(image: Image.Image, shorter: int, size: int, how: Image.Resampling) -> Image.Image:
    width, height = shorter_side_to(image.size, shorter)
    left, top = (width - size) // 2, (height - size) // 2
    if width * height <= LARGEST_BETWEEN:
        return image.resize((width, height), how).crop((left, top, left + size, top + size))
    # A strip of 1 x 10,000 pixels would become one of 224 x 2,240,000. The middle can be computed alone; it may differ
    # by rounding, because Pillow then takes rows and columns in another order.
    across, down = image.width / width, image.height / height  # source pixels for each pixel of the result
    box = (left * across, top * down, min(image.width, (left + size) * across), min(image.height, (top + size) * down))
    return image.resize((size, size), how, box=box)


def letterbox(
    image: Image.Image, size: tuple[int, int], how: Image.Resampling, filling: tuple[int, int, int], min_side: int = 1,
    whole: Callable[[float], int] = int,
) -> Image.Image:  # fmt: skip
    """The whole picture in the middle of ``size`` (width, height), with bars of ``filling`` where it does not reach.

    ``whole`` makes a whole number of the width of the left or upper bar: ``int`` or ``round``.
    """
    scale = min(size[0] / image.width, size[1] / image.height)
    inner = tuple(min(room, max(round(side * scale), min_side)) for side, room in zip(image.size, size, strict=True))
    canvas = Image.new("RGB", size, filling)
    canvas.paste(image.resize(inner, how), (whole((size[0] - inner[0]) / 2), whole((size[1] - inner[1]) / 2)))
    return canvas


def tile_grid(size: tuple[int, int], tile: int, max_tiles: int = 9) -> tuple[int, int]:
    """(columns, rows) of the canvas in which a picture of ``size`` (width, height) keeps most of its pixels.

    Of all canvases of at most ``max_tiles`` tiles: where the picture, fitted inside, has most pixels without being
    enlarged; of equally good ones the smallest.
    """
    width, height = size

    def kept(grid: tuple[int, int]) -> int:
        scale = min(grid[0] * tile / width, grid[1] * tile / height)
        return min(int(width * scale) * int(height * scale), width * height)

    grids = [(m, n) for m in range(1, max_tiles + 1) for n in range(1, max_tiles // m + 1)]
    return max(grids, key=lambda grid: (kept(grid), -grid[0] * grid[1]))


def closest_grid(size: tuple[int, int], tile: int, min_tiles: int, max_tiles: int) -> tuple[int, int]:
    """(columns, rows) of the shape nearest to the picture's: the rule of DeepSeek-OCR 2, which then stretches.

    Of shapes equally near the one with more tiles, as long as the picture has more than half of their pixels.
    """
    width, height = size
    sides = range(1, max_tiles + 1)
    grids = [(m, n) for m in sides for n in sides if min_tiles <= m * n <= max_tiles]
    best, gap = (1, 1), float("inf")
    for grid in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        away = abs(width / height - grid[0] / grid[1])
        if away < gap or (away == gap and width * height > 0.5 * tile * tile * grid[0] * grid[1]):
            best, gap = grid, away
    return best


def cut(canvas: Image.Image, tile: int) -> list[Image.Image]:
    """Squares of side ``tile``, row by row."""
    corners = [(x, y) for y in range(0, canvas.height, tile) for x in range(0, canvas.width, tile)]
    return [canvas.crop((x, y, x + tile, y + tile)) for x, y in corners]
