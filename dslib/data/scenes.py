"""Pictures without limit, made from a seed, with words that are true of them: scenes of emoji, and pictures of text.

Everything about picture number i follows from ``(seed, i)``: it is the same in any order, in any process, with any
number of workers. :class:`Stream` feeds batches of them to a training loop.

Book: ``chapters/architecture/fusion.ipynb`` and ``chapters/scenarios/multimodal.ipynb``.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import IterableDataset, get_worker_info

from dslib.data.pictures import EmojiSet, check_language

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
    """A picture with up to four emoji in its quarters.

    Attributes:
        image: uint8, (size, size, 3).
        cells: for each quarter, in the order of ``PLACES``, the number of the emoji in it, or None.
        names: the emoji's names by language, for all that the maker knows.
    """

    image: np.ndarray
    cells: tuple[int | None, ...]
    names: dict[str, list[str]]

    def kinds(self) -> list[int]:
        """The different emoji in it, in the order in which one reads the quarters."""
        return list(dict.fromkeys(kind for kind in self.cells if kind is not None))

    def caption(self, language: str = "en") -> str:
        """Every kind with its place, or with its number if there are several, e.g. "cat top left, star: two"."""
        check_language(language)
        parts = []
        for kind in self.kinds():
            where = [place for place, cell in enumerate(self.cells) if cell == kind]
            if len(where) == 1:
                parts.append((self.names[language][kind], PLACES[language][where[0]], " ", "在"))
            else:
                parts.append((self.names[language][kind], NUMBERS[language][len(where)], ": ", "有"))
        if language == "zh":
            return "，".join(name + joint + rest for name, rest, _, joint in parts)
        return ", ".join(name + joint + rest for name, rest, joint, _ in parts)

    def questions(self, language: str = "en") -> list[tuple[str, str, str]]:
        """Everything that can be asked: (sort, question, answer), the sorts "what", "how many" and "where"."""
        check_language(language)
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
    """Callable ``make(rng) -> Scene``.

    Args:
        emoji: what may appear. size: pixels a side of the picture; an emoji fills most of a quarter.
        fill: least and greatest number of quarters that are filled.
        again: probability that a quarter repeats the kind of an earlier one, so that counting is worth asking for.

    Raises:
        ValueError: no emoji, a size below 16 pixels, or numbers of quarters outside 1 to 4.
    """

    def __init__(self, emoji: EmojiSet, size: int = 64, fill: tuple[int, int] = (1, 4), again: float = 0.35):
        if not len(emoji):
            raise ValueError("emoji: got an empty set, expected at least one picture")
        if size < 16:
            raise ValueError(f"size: got {size}, expected at least 16 pixels")
        if not 1 <= fill[0] <= fill[1] <= 4:
            raise ValueError(f"fill: got {fill}, expected (least, greatest) within 1 to 4")
        self.emoji, self.size, self.fill, self.again = emoji, size, fill, again
        self.names = {language: emoji.names(language) for language in PLACES}

    def __call__(self, rng: np.random.Generator) -> Scene:
        """A scene of its own invention."""
        cells: list[int | None] = [None] * 4
        for place in rng.permutation(4)[: rng.integers(self.fill[0], self.fill[1] + 1)]:
            used = [kind for kind in cells if kind is not None]
            fresh = not used or rng.random() >= self.again
            cells[place] = int(rng.integers(len(self.emoji))) if fresh else int(rng.choice(used))
        return self.draw(cells, rng)

    def draw(self, cells: Sequence[int | None], rng: np.random.Generator) -> Scene:
        """A scene with these kinds in its quarters; ground, sizes and exact places are left to ``rng``.

        Raises:
            ValueError: not four cells, or a number that no kind has.
        """
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
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype(path, size)
    except OSError as error:
        raise ValueError(f"fonts: {path} cannot be read as a font ({error})") from error


@dataclass(frozen=True)
class TextPicture:
    """A picture of one line of text: ``image`` uint8 (height, width, 3), and the ``text``."""

    image: np.ndarray
    text: str


class TextMaker:
    """Callable ``make(rng) -> TextPicture``: a word or number, in some font, size and colour, turned and with noise.

    Args:
        words: what may be written; None writes numbers of ``length`` digits. For Chinese, pass words and a font with
            Chinese characters: there is none on every machine.
        size: (width, height) in pixels. points: least and greatest height of the letters; what does not fit is shrunk.
        angle: greatest turn to either side, degrees. noise: standard deviation, in steps of 255.

    Raises:
        ValueError: no word, no font, a font that cannot be read.
    """

    def __init__(self, words: Sequence[str] | None = None, *, length: int = 4, size: tuple[int, int] = (64, 64),
                 points: tuple[int, int] = (14, 24), angle: float = 10.0, noise: float = 8.0,
                 fonts: Sequence[str | Path] | None = None):  # fmt: skip
        if words is not None and not len(words):
            raise ValueError("words: got none, expected at least one, or None for numbers")
        self.fonts = [str(path) for path in (plain_fonts() if fonts is None else fonts)]
        if not self.fonts:
            raise ValueError("fonts: got none, expected at least one path")
        if not 1 <= points[0] <= points[1]:
            raise ValueError(f"points: got {points}, expected (least, greatest), at least 1")
        for path in self.fonts:
            _font(path, points[0])
        self.words, self.length, self.size, self.points = words, length, size, points
        self.angle, self.noise = angle, noise

    def __call__(self, rng: np.random.Generator) -> TextPicture:
        text = (
            "".join(map(str, rng.integers(0, 10, self.length)))
            if self.words is None
            else self.words[int(rng.integers(len(self.words)))]
        )
        paper, ink = int(rng.integers(190, 256)), int(rng.integers(0, 90))
        points, path = (
            int(rng.integers(self.points[0], self.points[1] + 1)),
            self.fonts[int(rng.integers(len(self.fonts)))],
        )
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


class Stream(IterableDataset):
    """Batches of generated items for a ``torch.utils.data.DataLoader(stream, batch_size=None, num_workers=…)``.

    Worker w of W makes the batches w, w + W, w + 2 W, …, and the loader takes one from each in turn: the stream is the
    same for any number of workers, batch for batch.

    Args:
        make: ``make(rng) -> item``, such as :class:`SceneMaker`; must be picklable for workers.
        collate: makes a batch of a list of items; None yields the list.
        first: number of the first batch, to continue where an earlier run stopped. batches: None never ends.

    Raises:
        ValueError: batch_size below 1, or a negative number of batches.
    """

    def __init__(self, make: Callable[[np.random.Generator], Any], batch_size: int, seed: int, *,
                 collate: Callable[[list], Any] | None = None, first: int = 0, batches: int | None = None):  # fmt: skip
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
        if first < 0 or (batches is not None and batches < 0):
            raise ValueError(f"first and batches: got {first} and {batches}, expected 0 or more")
        self.make, self.batch_size, self.seed, self.collate = make, batch_size, seed, collate
        self.first, self.batches = first, batches

    def batch(self, number: int) -> Any:
        """Batch ``number``, whatever came before."""
        items = [self.make(item_rng(self.seed, number * self.batch_size + i)) for i in range(self.batch_size)]
        return items if self.collate is None else self.collate(items)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        number, step = self.first + (worker.id if worker else 0), worker.num_workers if worker else 1
        while self.batches is None or number < self.first + self.batches:
            yield self.batch(number)
            number += step
