"""Pictures with their names in English and Chinese: 1,895 emoji, shipped in ``data/emoji``.

It is a real set of pictures and words, small enough for a laptop: every picture has a name and tags in both languages,
a group, and a place in train, validation or test. The split is by *identity*: variants of one thing (a man, a woman
and a person running; two nearly equal pictures) are never on both sides of it.

Book: ``chapters/architecture/fusion.ipynb`` and ``chapters/scenarios/multimodal.ipynb``. Origin, licences and how it is
rebuilt: ``data/README.md``.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dslib import check
from dslib.data.files import data_path

LANGUAGES = ("en", "zh")
SPLITS = ("train", "validation", "test")
SIZE, COLUMNS = 64, 44  # of the sheet, see tools/build_emoji.py


@dataclass(frozen=True)
class Emoji:
    """One picture's words. ``name`` and ``tags`` are by language, ``"en"`` or ``"zh"``."""

    symbol: str
    group: str
    subgroup: str
    identity: int
    split: str
    name: dict[str, str]
    tags: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class EmojiSet:
    """Pictures and their words, in Unicode's order. ``ValueError`` for a split, name or language that it has not."""

    rows: tuple[Emoji, ...]  # one a picture
    pixels: np.ndarray  # uint8, (N, 64, 64, 4): red, green, blue, opacity

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Sequence[int]) -> "EmojiSet":
        """The pictures with these numbers, in this order."""
        chosen = [int(i) for i in indices]
        return EmojiSet(tuple(self.rows[i] for i in chosen), self.pixels[chosen])

    def split(self, name: str) -> "EmojiSet":
        """``"train"``, ``"validation"`` or ``"test"``."""
        check.one_of(SPLITS, split=name)
        return self.take([i for i, row in enumerate(self.rows) if row.split == name])

    def named(self, *names: str) -> "EmojiSet":
        """The pictures with these English names, in this order."""
        where = {row.name["en"]: i for i, row in enumerate(self.rows)}
        if unknown := [name for name in names if name not in where]:
            raise ValueError(f"named: no picture is called {unknown[0]!r}")
        return self.take([where[name] for name in names])

    def names(self, language: str = "en") -> list[str]:
        """Every picture's name, in order."""
        check.one_of(LANGUAGES, language=language)
        return [row.name[language] for row in self.rows]

    def images(self, background: tuple[int, int, int] = (255, 255, 255)) -> Tensor:
        """All pictures over one colour: uint8, (N, 3, 64, 64)."""
        colour, alpha = self.pixels[..., :3].astype(np.float32), self.pixels[..., 3:].astype(np.float32) / 255
        flat = colour * alpha + np.asarray(background, dtype=np.float32) * (1 - alpha)
        return torch.from_numpy(flat.round().astype(np.uint8)).permute(0, 3, 1, 2).contiguous()

    def image(self, index: int) -> Image.Image:
        """One picture as PIL sees it, RGBA."""
        return Image.fromarray(self.pixels[index])


def load_emoji() -> EmojiSet:
    """The whole set. For a part: ``load_emoji().split("test")``, ``.named("cat", "dog")``."""
    with data_path("emoji/captions.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    rows = tuple(
        Emoji(
            row["emoji"], row["group"], row["subgroup"], int(row["identity"]), row["split"],
            {language: row[language] for language in LANGUAGES},
            {language: tuple(filter(None, row[f"tags_{language}"].split("|"))) for language in LANGUAGES},
        )
        for row in table
    )  # fmt: skip
    with Image.open(data_path("emoji/sheet.webp")) as sheet:
        pixels = np.asarray(sheet.convert("RGBA"))
    lines = pixels.shape[0] // SIZE
    tiles = pixels.reshape(lines, SIZE, COLUMNS, SIZE, 4).swapaxes(1, 2).reshape(-1, SIZE, SIZE, 4)
    return EmojiSet(rows, np.ascontiguousarray(tiles[: len(rows)]))
