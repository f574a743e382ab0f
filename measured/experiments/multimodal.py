"""What is left of a page of text once a preprocessing strategy is done with it, with an OCR engine as judge.

The page is 1920 x 1080, as a screen or a camera delivers it. Each strategy makes of it what an encoder would see,
PP-OCRv4 (through ``rapidocr-onnxruntime``) reads that, and we count the characters that survived. The engine is no
vision-language model. It is a reader that works well on the whole page, so that what it no longer finds is gone, or
nearly.

Book: ``chapters/scenarios/multimodal.ipynb``.
"""

import importlib.util
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dslib.data.files import WeightsNotFound
from dslib.data.scenes import plain_fonts
from dslib.data.text import moby_dick
from dslib.performance.statistics import mean_interval
from dslib.scenarios.multimodal import Recipe, views

PAGE = (1920, 1080)
# None is the page as it is: what the judge can read at best.
STRATEGIES: dict[str, Recipe | None] = {
    "as it is": None,
    "shorter side 224": Recipe(224, "shorter"),
    "crop 224": Recipe(224, "crop"),
    "letterbox 224": Recipe(224, "letterbox"),
    "letterbox 384": Recipe(384, "letterbox"),
    "letterbox 1024": Recipe(1024, "letterbox"),
    "tiles of 384": Recipe(384, "tiles"),
}


@dataclass(frozen=True)
class Page:
    """A picture and what is written on it, line by line."""

    image: Image.Image
    lines: tuple[str, ...]


def text_page(height: int, lines: int = 6, characters: int = 32, seed: int = 0) -> Page:
    """Dark text on white, spread over the page: ``lines`` of at most ``characters``, in letters of ``height`` pixels.

    ``height`` is the font's size, from the top of a "d" to the bottom of a "g". Font, place in the novel and margins
    follow from ``seed``.

    A height below 4, or lines that do not fit on the page, are a ``ValueError``.
    """
    if height < 4 or lines * height * 1.5 > PAGE[1] or characters * height * 0.7 > PAGE[0]:
        fits = f"at least 4 and {lines} lines of {characters} to fit on the page"
        raise ValueError(f"height: got {height}, expected {fits}")
    rng = np.random.default_rng((seed, height))
    words = moby_dick()[(start := int(rng.integers(200_000))) : start + 40 * characters * lines].split()[1:]
    font = ImageFont.truetype(str(plain_fonts()[int(rng.integers(4))]), height)
    written: list[str] = []
    while len(written) < lines:
        line = words.pop(0)
        while len(line) + 1 + len(words[0]) <= characters:
            line += " " + words.pop(0)
        written.append(line)
    image = Image.new("RGB", PAGE, "white")
    draw, step = ImageDraw.Draw(image), PAGE[1] / (lines + 1)
    left = int(rng.integers(40, max(41, int(PAGE[0] - characters * height * 0.7))))
    for number, line in enumerate(written):
        draw.text((left, round(step * (number + 0.6))), line, font=font, fill=(20, 20, 20))
    return Page(image, tuple(written))


def as_seen(image: Image.Image, recipe: Recipe | None) -> Image.Image:
    """What the encoder sees, as one picture: tiles are put side by side again, as the model knows their places."""
    if recipe is None:
        return image
    pictures, (columns, rows) = views(image, recipe)
    if not columns:
        return pictures[0]
    whole = Image.new("RGB", (columns * recipe.size, rows * recipe.size))
    for number, tile in enumerate(pictures[1:]):
        whole.paste(tile, (number % columns * recipe.size, number // columns * recipe.size))
    return whole


_INSTALL = (
    "Run: pip install 'dslib[ocr]' and pip install --no-deps --ignore-requires-python rapidocr-onnxruntime==1.4.4"
)


@cache
def _engine():
    if importlib.util.find_spec("rapidocr_onnxruntime") is None:
        raise WeightsNotFound(f"PP-OCRv4: the package is not installed. {_INSTALL}")
    try:
        from rapidocr_onnxruntime import RapidOCR
    except (ImportError, OSError) as error:  # the package is there, what it needs is not
        raise WeightsNotFound(f"PP-OCRv4 cannot be imported ({error}). {_INSTALL}") from error

    # One thread: the same numbers on every machine, and the other cores stay free.
    return RapidOCR(intra_op_num_threads=1, inter_op_num_threads=1)


def read(image: Image.Image) -> str:
    """The text that the engine finds in an RGB picture, from top to bottom, without spaces.

    Without the engine: ``WeightsNotFound``, which says what to install.
    """
    found, _ = _engine()(np.asarray(image)[..., ::-1].copy(), use_cls=False)  # it wants blue first
    boxes = sorted(found or [], key=lambda one: (one[0][0][1] + one[0][2][1], one[0][0][0]))
    return "".join("".join(text.split()) for _, text, _ in boxes)


def recovered(text: str, truth: str) -> float:
    """Share of the characters of ``truth`` that are right in ``text``: 1 - edit distance / length, at least 0.

    Spaces do not count: the engine often leaves them out. Inserted, missing and wrong characters each cost one.
    """
    text, truth = "".join(text.split()), "".join(truth.split())
    if not truth:
        raise ValueError("truth: got no character, expected at least one")
    a, places = np.array([ord(c) for c in truth]), np.arange(len(truth) + 1)
    distance = places.copy()  # from the first j characters of truth to nothing of text
    for row, character in enumerate(text, start=1):
        # Replace or insert first; then deletions, which run along the row, as a running minimum.
        step = np.minimum(distance[1:] + 1, distance[:-1] + (a != ord(character)))
        distance = np.minimum.accumulate(np.concatenate(([row], step)) - places) + places
    return max(0.0, 1 - int(distance[-1]) / len(truth))


def legibility_runs(heights=(12, 16, 20, 28, 40), pages: int = 8, seed: int = 0) -> dict:
    """Share of characters recovered by every strategy and letter height: a mean over pages with its 95 % interval.

    Pages are the sample, because the characters of a page share font and place and are right or wrong together.
    """
    points = []
    for height in heights:
        sheets = [text_page(height, seed=seed + number) for number in range(pages)]
        for name, recipe in STRATEGIES.items():
            shares = [recovered(read(as_seen(sheet.image, recipe)), "".join(sheet.lines)) for sheet in sheets]
            mean = mean_interval(shares)
            points.append({
                "strategy": name, "height": height, "pages": pages, "shares": [round(one, 4) for one in shares],
                "characters": sum(len("".join(sheet.lines).replace(" ", "")) for sheet in sheets),
                "mean": mean.value, "low": max(0.0, mean.low), "high": min(1.0, mean.high),
            })  # fmt: skip
    return {"page": list(PAGE), "engine": "PP-OCRv4, rapidocr-onnxruntime", "points": points}
