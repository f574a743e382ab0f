"""Pictures without limit, made from a seed, with words that are true of them: scenes of emoji, and pictures of text.

Everything about picture number i follows from ``(seed, i)``: it is the same in any order, in any process, with any
number of workers. :class:`Stream` makes batches of them for a training loop.

Book: ``chapters/architecture/fusion.ipynb`` and ``chapters/scenarios/multimodal.ipynb``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dslib import check
from dslib.data.pictures import LANGUAGES, EmojiSet

PLACES = {
    "en": ("top left", "top right", "bottom left", "bottom right"),
    "zh": ("左上", "右上", "左下", "右下"),
}
NUMBERS = {"en": ("none", "one", "two", "three", "four"), "zh": ("没有", "一个", "两个", "三个", "四个")}


def item_rng(seed: int, index: int) -> np.random.Generator:
    """The random numbers of item ``index``: independent of every other item's."""
    return np.random.default_rng((seed, index))


@dataclass(frozen=True)
class Scene:
    """A picture with up to four emoji in its quarters."""

    image: np.ndarray  # uint8, (size, size, 3)
    cells: tuple[int | None, ...]  # for each quarter, in the order of PLACES, the number of the emoji in it, or None
    names: dict[str, list[str]]  # by language, of all emoji that the maker knows

    def kinds(self) -> list[int]:
        """The different emoji in it, in the order in which one reads the quarters."""
        return list(dict.fromkeys(kind for kind in self.cells if kind is not None))

    def caption(self, language: str = "en") -> str:
        """Every kind with its place, or with its number if there are several, e.g. "cat top left, star: two"."""
        check.one_of(LANGUAGES, language=language)
        at, has, comma = (" ", ": ", ", ") if language == "en" else ("在", "有", "，")
        parts = []
        for kind in self.kinds():
            where = [place for place, cell in enumerate(self.cells) if cell == kind]
            said = at + PLACES[language][where[0]] if len(where) == 1 else has + NUMBERS[language][len(where)]
            parts.append(self.names[language][kind] + said)
        return comma.join(parts)

    def questions(self, language: str = "en") -> list[tuple[str, str, str]]:
        """Everything that can be asked: (sort, question, answer), the sorts "what", "how many" and "where"."""
        check.one_of(LANGUAGES, language=language)
        names, places, numbers, asked = self.names[language], PLACES[language], NUMBERS[language], []
        for place, kind in enumerate(self.cells):
            if kind is not None:
                question = f"what is {places[place]}?" if language == "en" else f"{places[place]}是什么？"
                asked.append(("what", question, names[kind]))
        for kind in self.kinds():
            where = [place for place, cell in enumerate(self.cells) if cell == kind]
            question = f"how many: {names[kind]}?" if language == "en" else f"{names[kind]}有几个？"
            asked.append(("how many", question, numbers[len(where)]))
            if len(where) == 1:
                question = f"where is {names[kind]}?" if language == "en" else f"{names[kind]}在哪里？"
                asked.append(("where", question, places[where[0]]))
        return asked


class SceneMaker:
    """Callable ``make(rng) -> Scene``, of ``size`` pixels a side (at least 16); an emoji fills most of a quarter."""

    AGAIN = 0.35  # how often a quarter repeats the kind of an earlier one, so that counting is worth asking for

    def __init__(self, emoji: EmojiSet, size: int = 64):
        if not len(emoji):
            raise ValueError("emoji: got an empty set, expected at least one picture")
        check.whole(16, size=size)
        self.emoji, self.size = emoji, size
        self.names = {language: emoji.names(language) for language in PLACES}

    def __call__(self, rng: np.random.Generator) -> Scene:
        """A scene of its own invention."""
        cells: list[int | None] = [None] * 4
        for place in rng.permutation(4)[: rng.integers(1, 5)]:
            used = [kind for kind in cells if kind is not None]
            fresh = not used or rng.random() >= self.AGAIN
            cells[place] = int(rng.integers(len(self.emoji))) if fresh else int(rng.choice(used))
        return self.draw(cells, rng)

    def draw(self, cells: Sequence[int | None], rng: np.random.Generator) -> Scene:
        """A scene with these four kinds (or None) in its quarters; ground, sizes and places are left to ``rng``."""
        if len(cells) != 4 or not all(cell is None or 0 <= cell < len(self.emoji) for cell in cells):
            raise ValueError(f"cells: got {list(cells)}, expected four of None and 0 to {len(self.emoji) - 1}")
        half = self.size // 2
        canvas = Image.new("RGB", (self.size, self.size), tuple(rng.integers(200, 256, 3).tolist()))
        for place, kind in enumerate(cells):
            side = int(rng.integers(round(0.7 * half), half + 1))
            left, top = rng.integers(0, half - side + 1, 2).tolist()
            if kind is not None:
                picture = _scaled(self.emoji.pixels[kind].tobytes(), side)
                canvas.paste(picture, (place % 2 * half + left, place // 2 * half + top), picture)
        return Scene(np.asarray(canvas), tuple(cells), self.names)


@lru_cache(maxsize=4096)
def _scaled(pixels: bytes, side: int) -> Image.Image:
    picture = Image.frombytes("RGBA", (64, 64), pixels)
    return picture.resize((side, side), Image.Resampling.LANCZOS)


def plain_fonts() -> list[Path]:
    """Fonts that are on every machine that runs the book: the three families that matplotlib brings along."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    names = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Italic", "DejaVuSansMono", "STIXGeneral")
    return [folder / f"{name}.ttf" for name in names]


@lru_cache(maxsize=256)
def _font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), size)


@dataclass(frozen=True)
class TextPicture:
    """A picture of one line of text: ``image`` uint8 (height, width, 3), and the ``text``."""

    image: np.ndarray
    text: str


class TextMaker:
    """Callable ``make(rng) -> TextPicture``: a word, in some font, size and colour, turned and with noise.

    Args:
        words: what may be written, in letters that :func:`plain_fonts` have.
        size: (width, height) in pixels. points: least and greatest height of the letters; what does not fit is shrunk.
        angle: greatest turn to either side, degrees. noise: standard deviation, in steps of 255.

    Raises ``ValueError`` for no word, and for sizes or heights that cannot be.
    """

    def __init__(self, words: Sequence[str], *, size: tuple[int, int] = (64, 64), points: tuple[int, int] = (14, 24),
                 angle: float = 10.0, noise: float = 8.0):  # fmt: skip
        if not len(words):
            raise ValueError("words: got none, expected at least one")
        if not 1 <= points[0] <= points[1]:
            raise ValueError(f"points: got {points}, expected (least, greatest), at least 1")
        check.whole(1, width=size[0], height=size[1])
        check.at_least(0, angle=angle, noise=noise)
        self.words, self.size, self.points, self.angle, self.noise = words, size, points, angle, noise
        self.fonts = plain_fonts()

    def __call__(self, rng: np.random.Generator) -> TextPicture:
        text = self.words[int(rng.integers(len(self.words)))]
        paper, ink = int(rng.integers(190, 256)), int(rng.integers(0, 90))
        points = int(rng.integers(self.points[0], self.points[1] + 1))
        path = self.fonts[int(rng.integers(len(self.fonts)))]
        angle = float(rng.uniform(-self.angle, self.angle))
        while True:
            font = _font(path, points)
            left, top, right, bottom = font.getbbox(text)
            mask = Image.new("L", (right - left + 2, bottom - top + 2))
            ImageDraw.Draw(mask).text((1 - left, 1 - top), text, font=font, fill=255)
            mask = mask.rotate(angle, Image.Resampling.BICUBIC, expand=True)
            room = (self.size[0] - mask.width, self.size[1] - mask.height)
            if min(room) >= 0 or points <= 4:
                break
            points -= 1
        x, y = (int(rng.integers(0, max(0, free) + 1)) for free in room)
        canvas = Image.new("L", self.size, paper)
        canvas.paste(ink, (x, y), mask)
        grey = np.asarray(canvas, dtype=np.float32) + rng.normal(0, self.noise, self.size[::-1])
        grey = grey.round().clip(0, 255).astype(np.uint8)
        return TextPicture(np.repeat(grey[..., None], 3, axis=2), text)


@dataclass(frozen=True)
class Stream:
    """Batches of generated items, each the same whatever came before it."""

    make: Callable[[np.random.Generator], Any]  # make(rng) -> item, such as SceneMaker
    batch_size: int
    seed: int
    collate: Callable[[list], Any]  # makes a batch of a list of items

    def __post_init__(self):
        check.whole(1, batch_size=self.batch_size)

    def batch(self, number: int) -> Any:
        """Batch ``number``, from 0 on without end."""
        first = number * self.batch_size
        return self.collate([self.make(item_rng(self.seed, first + i)) for i in range(self.batch_size)])
