"""Rebuild ``data/emoji/`` from its sources: ``python -m tools.build_emoji`` (needs npm, a network, and the font).

Pictures: Noto Color Emoji (OFL-1.1), Debian's ``fonts-noto-color-emoji``. Names, tags, groups in English and Chinese:
npm ``emojibase-data`` (MIT; its names are Unicode's CLDR). Only the base form of an emoji is kept, without skin tones.

    sheet.webp     every picture at 64 x 64 pixels with transparency, 44 a row, lossless, in the order of the table
    captions.csv   one row a picture

Written so that a second run with the same sources gives the same bytes.
"""

import argparse
import csv
import hashlib
import io
import json
import re
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

PACKAGE = "emojibase-data@17.0.0"
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
TARGET = Path(__file__).resolve().parents[1] / "data" / "emoji"
STRIKE = 109  # the one size at which the font holds its bitmaps
GLYPH = (136, 128)  # their size in pixels
SIZE, COLUMNS = 64, 44
NEAR = 16.0  # root mean square difference (0 to 255) below which two pictures count as the same thing
FIELDS = ("emoji", "hexcode", "group", "subgroup", "identity", "split", "en", "zh", "tags_en", "tags_zh")


def fetch() -> tuple[list[dict], dict[str, dict], dict]:
    """English entries in Unicode's order, Chinese ones by code, and the names of groups."""
    with tempfile.TemporaryDirectory() as folder:
        packed = subprocess.run(
            ["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, capture_output=True, text=True
        ).stdout.split()[-1]
        with tarfile.open(Path(folder) / packed) as archive:
            en, zh, groups = (
                json.load(archive.extractfile(f"package/{name}.json")) for name in ("en/data", "zh/data", "meta/groups")
            )
    entries = sorted((entry for entry in en if "group" in entry), key=lambda entry: entry["order"])
    return entries, {entry["hexcode"]: entry for entry in zh}, groups


def render(text: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """One emoji as SIZE x SIZE RGBA; None if the font has no single glyph for it, or an empty one."""
    if abs(font.getlength(text) - GLYPH[0]) >= 2:
        return None
    white, black = (_on(colour, text, font) for colour in (255, 0))
    # On white a pixel is c a + 255 (1 - a), on black c a: two pictures give the transparency and the colour exactly.
    alpha = 1 - (white - black).mean(axis=-1, keepdims=True) / 255
    if alpha.max() < 0.5:
        return None
    colour = np.divide(black, alpha, out=np.zeros_like(black), where=alpha > 1 / 255)
    rgba = np.concatenate((colour, 255 * alpha), axis=-1).round().clip(0, 255).astype(np.uint8)
    square = Image.new("RGBA", (GLYPH[0], GLYPH[0]))
    square.paste(Image.fromarray(rgba), (0, (GLYPH[0] - GLYPH[1]) // 2))
    return square.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def _on(background: int, text: str, font) -> np.ndarray:
    image = Image.new("RGB", GLYPH, (background,) * 3)
    ImageDraw.Draw(image).text((0, 0), text, font=font, embedded_color=True)
    return np.asarray(image, dtype=np.float64)


def kind(hexcode: str, label: str) -> str:
    """What stays the same between variants of one emoji: its code without gender and direction."""
    code = hexcode.replace("-200D-27A1-FE0F", "").replace("-200D-27A1", "")
    code = re.sub(r"-200D-264[02](-FE0F)?", "", code)
    code = re.sub(r"\b1F46[89]\b", "1F9D1", code)
    if re.match(r"family\b|couple with|kiss$|kiss:|(people|men|women|woman and man) holding hands", label):
        return "pair-or-family"
    return code.removesuffix("-FE0F")


def identities(kinds: list[str], pictures: list[np.ndarray]) -> list[int]:
    """Number of the thing that each picture shows: same kind or nearly the same picture, joined transitively."""
    parent = list(range(len(kinds)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first: dict[str, int] = {}
    for i, name in enumerate(kinds):
        parent[root(i)] = root(first.setdefault(name, i))
    flat = np.stack(pictures).reshape(len(pictures), -1).astype(np.float32)
    squares = (flat**2).sum(1)
    distance = np.sqrt(np.maximum(squares[:, None] + squares - 2 * flat @ flat.T, 0) / flat.shape[1])
    for i, j in np.argwhere(np.triu(distance < NEAR, 1)):
        parent[root(i)] = root(j)
    numbers: dict[int, int] = {}
    return [numbers.setdefault(root(i), len(numbers)) for i in range(len(kinds))]


def split_of(name: str) -> str:
    """Train, validation or test, 76 : 12 : 12, from a hash of the identity's first emoji: no order, no seed."""
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
    return "train" if share < 0.76 else "validation" if share < 0.88 else "test"


def build(target: Path = TARGET, font_path: Path = FONT) -> dict:
    """Write sheet and table into ``target``; returns what was kept and what was dropped."""
    if not features.check("raqm"):
        raise SystemExit("Pillow was built without raqm, which composes emoji from several characters")
    font = ImageFont.truetype(font_path, STRIKE)
    entries, chinese, groups = fetch()
    kept, pictures, seen, dropped = [], [], set(), {"not in the font": 0, "same picture": 0, "no Chinese name": 0}
    for entry in entries:
        picture, other = render(entry["emoji"], font), chinese.get(entry["hexcode"])
        pixels = None if picture is None else picture.tobytes()
        reason = (
            "not in the font" if picture is None
            else "same picture" if pixels in seen
            else "no Chinese name" if other is None or other["label"] == entry["label"]
            else None
        )  # fmt: skip
        if reason:
            dropped[reason] += 1
            continue
        seen.add(pixels)
        kept.append((entry, other))
        pictures.append(np.asarray(picture))
    on_white = [p[..., :3] * (p[..., 3:] / 255.0) + 255.0 - p[..., 3:] for p in pictures]
    numbers = identities([kind(e["hexcode"], e["label"]) for e, _ in kept], on_white)
    names: dict[int, str] = {}
    for (entry, _), number in zip(kept, numbers, strict=True):
        names.setdefault(number, entry["hexcode"])

    target.mkdir(parents=True, exist_ok=True)
    sheet = Image.new("RGBA", (COLUMNS * SIZE, -(-len(kept) // COLUMNS) * SIZE))
    for i, picture in enumerate(pictures):
        sheet.paste(Image.fromarray(picture), (i % COLUMNS * SIZE, i // COLUMNS * SIZE))
    sheet.save(target / "sheet.webp", lossless=True, quality=100, method=6)
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(FIELDS)
    for (entry, other), number in zip(kept, numbers, strict=True):
        tags = ["|".join(e.get("tags", [])) for e in (entry, other)]
        group, subgroup = groups["groups"][str(entry["group"])], groups["subgroups"][str(entry["subgroup"])]
        writer.writerow(
            (entry["emoji"], entry["hexcode"], group, subgroup, number, split_of(names[number]),
             entry["label"], other["label"], *tags)
        )  # fmt: skip
    (target / "captions.csv").write_text(table.getvalue(), encoding="utf-8", newline="\n")
    return {"kept": len(kept), "identities": len(names), "dropped": dropped}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, default=TARGET)
    parser.add_argument("--font", type=Path, default=FONT)
    chosen = parser.parse_args()
    print(build(chosen.target, chosen.font))
