"""From whatever a camera, a scanner or a user delivers to one upright RGB picture, or an error that says what is wrong.

A picture file is input from outside. It may be turned, transparent, in the colours of a printing press, 16 bits deep,
cut off, a text with the wrong name, or 50 bytes that unpack to gigabytes. :func:`open_image` gives each of these a
defined result. Its errors are :class:`ImageError` and name the picture.

Not done: colour management. An embedded profile is ignored, as it is by the encoders' own preprocessing.

Book: ``chapters/scenarios/multimodal.ipynb``.
"""

import io
import math
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from PIL import ExifTags, Image

from dslib import check

# What cameras, scanners, browsers and phones write. Not the formats for which Pillow starts other programs (EPS), nor
# those that hardly anybody tests. (JPEG includes MPO, the two-picture JPEG of some cameras.)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "AVIF", "PPM")
MAX_PIXELS = 80_000_000  # 240 MB as RGB; below the size at which Pillow itself begins to warn
_LOADING = Lock()

Source = bytes | bytearray | memoryview | str | Path | Image.Image | np.ndarray | torch.Tensor


class ImageError(ValueError):
    """A picture that cannot be used. The message names it and says why."""


def open_image(
    source: Source, *, background: tuple[int, int, int] = (255, 255, 255), max_pixels: int = MAX_PIXELS,
    draft: tuple[int, int] | None = None, name: str | None = None,
) -> Image.Image:  # fmt: skip
    """One picture as 8-bit RGB, upright: pixels of its own, without metadata that could turn or recolour it once more.

    Turned as its EXIF or XMP orientation says; what is transparent shows ``background``; 16 bits become 8 by rounding;
    CMYK, palette and grey become RGB; of an animation or a document with several pages, the first. (Of 16-bit *colour*
    Pillow keeps the upper byte. We round in the files where that matters, PNG and TIFF, but not in a PIL picture, whose
    lower bytes are gone.)

    Args:
        source: a file's bytes or path; a PIL picture; an array (H, W), (H, W, 1 to 4) or a tensor (H, W),
            (1 to 4, H, W), with one channel for grey, two for grey and opacity, four for RGB and opacity: uint8, uint16
            or floating point from 0 to 1.
        background: red, green, blue, 0 to 255.
        max_pixels: refused above this, before anything is unpacked. (Above twice ``PIL.Image.MAX_IMAGE_PIXELS`` Pillow
            refuses by itself.)
        draft: (width, height): let a JPEG be decoded at the smallest eighth, quarter or half not below this size. Three
            to four times as fast, and other pixels than decoding and then shrinking gives: a setting of its own.
        name: what errors call the picture; None is :func:`name_of` it.

    Raises:
        ImageError: no such file, not a picture, cut off, no pixel, too many, NaN, values whose range is unknown.
        ValueError: another argument is out of range.
    """
    _check_arguments(background, max_pixels, draft)
    name = name or name_of(source)
    if isinstance(source, (np.ndarray, torch.Tensor)):
        image = _from_array(source, name, max_pixels)
    elif isinstance(source, Image.Image):
        image = source
    else:
        image = _from_file(source, name)
    _check_size(image.size, name, max_pixels)
    given = image is source
    try:
        # Two threads that load one PIL picture would read one file by turns; files that we open have one reader.
        with _LOADING if given else nullcontext():
            if draft is not None and not given:
                image.draft("RGB", draft)  # does nothing unless it is a JPEG
            lower = None if given else _lower_bytes(image)
            image.load()
            turn = _turn(image)
        rgb = _to_rgb(_to_8_bits(image, lower, name), background)
        rgb = rgb if turn is None else rgb.transpose(turn)
    except (ImageError, MemoryError):
        raise
    # Each format's decoder has its own: OSError, SyntaxError, ValueError, struct.error, IndexError, EOFError, ...
    except Exception as error:
        why = "its file is closed, cut off or damaged" if given else "probably cut off or damaged"
        raise ImageError(f"{name}: cannot be decoded, {why} ({_first_line(error)})") from error
    rgb = rgb.copy() if rgb is image else rgb
    rgb.info = {}  # an orientation left in here would turn the picture again, at the next opening or once it is saved
    return rgb


def _check_arguments(background: tuple[int, int, int], max_pixels: float, draft: tuple[int, int] | None) -> None:
    check.between(1, math.inf, max_pixels=max_pixels)
    for argument, value, length, least in (("background", background, 3, 0), ("draft", draft or (1, 1), 2, 1)):
        if np.shape(value) != (length,):
            raise ValueError(f"{argument}: got {value!r}, expected {length} whole numbers")
        check.whole(least, **{f"{argument}[{i}]": number for i, number in enumerate(value)})
    check.between(0, 255, background=max(background))


def name_of(source: Source) -> str:
    """What errors call a picture: its path, or what kind of thing it is."""
    if isinstance(source, (str, Path)):
        return str(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"{len(source)} bytes"
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", "") or f"{source.mode} picture of {source.width} x {source.height}")
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return f"array of shape {tuple(source.shape)}"
    raise ImageError(f"source: got {type(source).__name__}, expected bytes, path, PIL picture, array or tensor")


def _first_line(error: Exception) -> str:
    """Kind and first line of a decoder's message, without memory addresses."""
    text = re.sub(r" at 0x[0-9a-f]+", "", (str(error).splitlines() or [""])[0])
    return f"{type(error).__name__}: {text}"[:160]


def _from_file(source: bytes | bytearray | memoryview | str | Path, name: str) -> Image.Image:
    try:
        data = Path(source).read_bytes() if isinstance(source, (str, Path)) else bytes(source)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        why = getattr(error, "strerror", None) or str(error)
        raise ImageError(f"{name}: cannot be read ({why})") from error
    if not data:
        raise ImageError(f"{name}: the file is empty")
    Image.init()
    known = [one for one in FORMATS if one in Image.OPEN]  # an older Pillow has no AVIF
    try:
        # From memory, so that no file stays open while the picture waits to be decoded.
        image = Image.open(io.BytesIO(data), formats=known)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: claims far more pixels than are allowed ({_first_line(error)})") from error
    except MemoryError:
        raise
    except Exception as error:  # as above: a damaged header can raise almost anything
        expected = ", ".join(known)
        raise ImageError(f"{name}: not a picture (it starts with {data[:12]!r}), expected one of {expected}") from error
    if image.format == "PNG" and image.mode == "L" and "transparency" in image.info:
        # Pillow scales grey of 2 and 4 bits (byte 24 of a PNG) to 0 to 255, but not the grey that is transparent.
        image.info["transparency"] = image.info["transparency"] * 255 // (2 ** data[24] - 1)
    return image


def _from_array(array: np.ndarray | torch.Tensor, name: str, max_pixels: int) -> Image.Image:
    if isinstance(array, torch.Tensor):  # torch has channels first, NumPy and PIL last
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() and array.element_size() < 4 else array).numpy()
        array = np.moveaxis(array, 0, -1) if array.ndim == 3 else array
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 2, 3, 4):
        raise ImageError(f"{name}: expected (H, W) or 1 to 4 channels: last in an array, first in a tensor")
    _check_size(array.shape[1::-1], name, max_pixels)
    array = _to_bytes(array, name)
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: has no pixel ({width} x {height})")
    if width * height > max_pixels:
        raise ImageError(f"{name}: {width} x {height} pixels are more than max_pixels={max_pixels:,}")


def _to_bytes(values: np.ndarray, name: str) -> np.ndarray:
    """Any array of brightness as uint8; refused where the range is a guess."""
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:  # in either order of bytes
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 257 = 65535 / 255
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255
    if np.issubdtype(values.dtype, np.floating):
        if bad := int((~np.isfinite(values)).sum()):
            raise ImageError(f"{name}: {bad} of {values.size} values are NaN or infinite")
        low, high = float(values.min()), float(values.max())
        if low < 0 or high > 1:
            raise ImageError(f"{name}: floating-point values from {low:.4g} to {high:.4g}, expected 0 to 1")
        return (values * 255).round().astype(np.uint8)
    raise ImageError(f"{name}: dtype {values.dtype}, expected uint8, uint16 or floating point from 0 to 1")


_TURNS = dict(enumerate((
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90,
), start=2))  # fmt: skip


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes it upright, by its EXIF or XMP orientation (1 is upright, 2 to 8 are the turns and mirrorings)."""
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # damaged EXIF beside a good picture: then nothing is known of its orientation
        return None


# Names of orders of bytes in Pillow: B high byte first, L low byte first, N as this machine has it.
_REVERSED = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}


def _lower_bytes(image: Image.Image) -> np.ndarray | None:
    """Of a 16-bit colour PNG or TIFF that is not loaded yet: uint8 (H, W, C), what Pillow leaves out. Else None.

    Pillow keeps the upper byte of each value. Told that the bytes stand the other way round, it keeps the lower one.
    """
    tiles = image.tile if image.format in ("PNG", "TIFF") else ()
    raw = {one.args if isinstance(one.args, str) else one.args[0] for one in tiles}
    match = re.fullmatch("(RGBA?|LA);16([BLN])", raw.pop()) if len(raw) == 1 else None
    if match is None:
        return None
    mode, order = match.groups()
    # Grey and opacity have no such twin, but four bytes a pixel, as 8-bit RGBA: upper, lower, upper, lower.
    other = "RGBA" if mode == "LA" else f"{mode};16{_REVERSED[order]}"
    again = Image.open(io.BytesIO(image.fp.getvalue()), formats=[image.format])
    again.tile = [
        one._replace(args=other if isinstance(one.args, str) else (other, *one.args[1:])) for one in again.tile
    ]
    return np.asarray(again)[..., 1::2] if mode == "LA" else np.asarray(again)


def _to_8_bits(image: Image.Image, lower: np.ndarray | None, name: str) -> Image.Image:
    """A picture of 16 bits rounded to 8, its transparent colour as a channel of opacity; others as they are."""
    if lower is not None:
        upper = np.asarray(image)
        upper = upper[..., ::3] if lower.shape[2] == 2 else upper  # grey and opacity, which Pillow makes RGBA
        values = upper.astype(np.uint16) * 256 + lower
    elif image.mode in ("I", "F") or image.mode.startswith("I;16"):
        # Pillow's own conversion would clip at 255, which turns almost all of a 16-bit picture white.
        values = np.asarray(image)[..., None]
        if image.mode == "F":
            return Image.fromarray(_to_bytes(values[..., 0], name))
        if values.min() < 0 or values.max() > 65535:
            low, high = values.min(), values.max()
            raise ImageError(f"{name}: whole numbers from {low} to {high}, expected 0 to 65535 (16 bits)")
        values = values.astype(np.uint16)
    else:
        return image
    if "transparency" in image.info:  # the one colour that is, compared in all of its bits
        opaque = (values != image.info["transparency"]).any(-1, keepdims=True)
        values = np.concatenate([values, opaque * np.uint16(65535)], axis=-1)
    values = _to_bytes(values, name)
    return Image.fromarray(values[..., 0] if values.shape[2] == 1 else values)


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode == "La":
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    image = image.convert("RGBA")
    paper = Image.new("RGBA", image.size, (*background, 255))
    return Image.alpha_composite(paper, image).convert("RGB")
