"""From whatever a camera, a scanner or a user delivers to one upright RGB picture, or an error that says what is wrong.

A picture file is input from outside. It may be turned, transparent, in the colours of a printing press, 16 bits deep,
cut off, a text with the wrong name, or 50 bytes that unpack to gigabytes. :func:`open_image` gives each of these a
defined result. Its errors are :class:`ImageError` and name the picture.

Not done: colour management. An embedded profile is ignored, as it is by the encoders' own preprocessing.

Book: ``chapters/scenarios/multimodal.ipynb``.
"""

import io
import re
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image

# What cameras, scanners, browsers and phones write. Not the formats for which Pillow starts other programs (EPS), nor
# those that hardly anybody tests. (JPEG includes MPO, the two-picture JPEG of some cameras.)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "AVIF", "PPM")
MAX_PIXELS = 80_000_000  # 240 MB as RGB; below the size at which Pillow itself begins to warn

Source = bytes | bytearray | memoryview | str | Path | Image.Image | np.ndarray | torch.Tensor


class ImageError(ValueError):
    """A picture that cannot be used. The message names it and says why."""


def open_image(
    source: Source,
    *,
    background: tuple[int, int, int] = (255, 255, 255),
    max_pixels: int = MAX_PIXELS,
    draft: tuple[int, int] | None = None,
    name: str | None = None,
) -> Image.Image:
    """One picture as 8-bit RGB, upright.

    Turned as its EXIF orientation says; what is transparent shows ``background``; 16 bits become 8 by rounding; CMYK,
    palette and grey become RGB; of an animation or a document with several pages, the first.

    Args:
        source: a file's bytes or path; a PIL picture; an array (H, W), (H, W, 1 to 4) or a tensor (H, W),
            (1 to 4, H, W), with one channel for grey, two for grey and opacity, four for RGB and opacity: uint8, uint16
            or floating point from 0 to 1.
        background: red, green, blue, 0 to 255.
        max_pixels: refused above this, before anything is unpacked. (Above twice ``PIL.Image.MAX_IMAGE_PIXELS`` Pillow
            refuses by itself.)
        draft: (width, height): let a JPEG be decoded at the smallest eighth, quarter or half not below this size. Three
            to four times as fast, and other pixels than decoding and then shrinking gives: a setting of its own.
        name: what errors call the picture; None is the path, or what kind of thing it is.

    Raises:
        ImageError: no such file, not a picture, cut off, no pixel, too many, NaN, values whose range is unknown.
    """
    name = name or _name(source)
    if isinstance(source, (np.ndarray, torch.Tensor)):
        image = _from_array(source, name, max_pixels)
    elif isinstance(source, Image.Image):
        image = source
    else:
        image = _from_file(source, name)
    _check_size(image.size, name, max_pixels)
    try:
        if draft is not None and not isinstance(source, Image.Image):
            image.draft("RGB", draft)  # does nothing unless it is a JPEG
        image.load()
        return _to_rgb(_upright(image), background, name)
    except (ImageError, MemoryError):
        raise
    # Each format's decoder has its own: OSError, SyntaxError, ValueError, struct.error, IndexError, EOFError, ...
    except Exception as error:
        raise ImageError(f"{name}: cannot be decoded, probably cut off or damaged ({_first_line(error)})") from error


def _name(source: Source) -> str:
    if isinstance(source, (str, Path)):
        return str(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"{len(source)} bytes"
    if isinstance(source, Image.Image):
        return f"{source.mode} picture of {source.width} x {source.height}"
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
    try:
        # From memory, so that no file stays open while the picture waits to be decoded.
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: claims far more pixels than are allowed ({_first_line(error)})") from error
    except MemoryError:
        raise
    except Exception as error:  # as above: a damaged header can raise almost anything
        known = ", ".join(FORMATS)
        raise ImageError(f"{name}: not a picture (it starts with {data[:12]!r}), expected one of {known}") from error


def _from_array(array: np.ndarray | torch.Tensor, name: str, max_pixels: int) -> Image.Image:
    if isinstance(array, torch.Tensor):  # torch has channels first, NumPy and PIL last
        array = array.detach().cpu()
        array = (array.float() if array.dtype == torch.bfloat16 else array).numpy()
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
    if values.dtype == np.uint16:
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


def _upright(image: Image.Image) -> Image.Image:
    """Turned as the EXIF orientation says (1 is upright, 2 to 8 are the turns and mirrorings)."""
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # damaged EXIF beside a good picture: then nothing is known of its orientation
        return image
    return image.transpose(turn) if turn is not None else image


def _to_rgb(image: Image.Image, background: tuple[int, int, int], name: str) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        # Pillow's own conversion would clip at 255, which turns almost all of a 16-bit picture white.
        values = np.asarray(image)
        if image.mode != "F":
            if values.min() < 0 or values.max() > 65535:
                low, high = values.min(), values.max()
                raise ImageError(f"{name}: whole numbers from {low} to {high}, expected 0 to 65535 (16 bits)")
            values = values.astype(np.uint16)
        return Image.fromarray(_to_bytes(values, name)).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    paper = Image.new("RGBA", image.size, (*background, 255))
    return Image.alpha_composite(paper, image).convert("RGB")
