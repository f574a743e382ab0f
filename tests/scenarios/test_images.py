"""Everything a camera, a scanner or an attacker may deliver: the right pixels, or an error that names the picture."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from dslib.scenarios.images import ImageError, open_image

WIDTH, HEIGHT = 40, 24


@pytest.fixture(scope="module")
def picture():
    """Red to the right, green downwards, one blue corner: no turn or mirroring leaves it as it was."""
    x, y = np.meshgrid(np.linspace(0, 255, WIDTH), np.linspace(0, 255, HEIGHT))
    pixels = np.stack([x, y, np.zeros_like(x)], -1).round().astype(np.uint8)
    pixels[:6, :6] = (0, 0, 255)
    return Image.fromarray(pixels)


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(image):
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def test_bytes_path_picture_array_and_tensor_give_the_same(picture, tmp_path):
    data = saved(picture, "PNG")
    (tmp_path / "a.png").write_bytes(data)
    array = np.asarray(picture)
    sources = (data, bytearray(data), tmp_path / "a.png", str(tmp_path / "a.png"), picture, array,
               torch.from_numpy(array.copy()).permute(2, 0, 1), array.astype(np.uint16) * 257)  # fmt: skip
    for source in sources:
        assert (pixels(open_image(source)) == array).all()
    assert (pixels(open_image(array / 255)) == array).all()
    assert (pixels(open_image(torch.from_numpy(array / 255).permute(2, 0, 1).bfloat16())) - array).max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF", "BMP", "PPM", "GIF", "JPEG2000", "AVIF"])
def test_every_format_is_read(picture, kind):
    got = pixels(open_image(saved(picture, kind)))
    assert np.abs(got - np.asarray(picture)).mean() < 6  # lossy ones included


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(picture, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(picture, "PNG", exif=exif)
    wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert (pixels(open_image(data)) == np.asarray(wanted)).all()
    assert wanted.size == ((HEIGHT, WIDTH) if orientation > 4 else (WIDTH, HEIGHT))


def test_an_orientation_that_does_not_exist_turns_nothing(picture):
    exif = Image.Exif()
    exif[0x0112] = 77
    assert open_image(saved(picture, "PNG", exif=exif)).size == picture.size


def test_damaged_exif_does_not_spoil_a_good_picture(picture):
    data = saved(picture, "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff" + b"\x99" * 40)
    assert open_image(data).size == picture.size


def test_transparency_shows_the_background():
    image = Image.new("RGBA", (4, 1), (200, 100, 0, 255))
    for x, alpha in enumerate((0, 51, 204, 255)):
        image.putpixel((x, 0), (200, 100, 0, alpha))
    got = pixels(open_image(saved(image, "PNG"), background=(0, 0, 250)))
    wanted = [[c * a / 255 + b * (1 - a / 255) for c, b in zip((200, 100, 0), (0, 0, 250), strict=True)]
              for a in (0, 51, 204, 255)]  # fmt: skip
    assert np.abs(got[0] - wanted).max() <= 1
    assert (pixels(open_image(image))[0, 0] == 255).all()  # white unless told otherwise


def test_grey_with_alpha_and_palette_with_a_transparent_colour():
    grey = Image.new("LA", (2, 2), (10, 0))
    assert (pixels(open_image(saved(grey, "PNG"), background=(1, 2, 3))) == (1, 2, 3)).all()
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((0, 0), 1)
    got = pixels(open_image(saved(palette, "PNG", transparency=0), background=(9, 9, 9)))
    assert got[0, 0].tolist() == [0, 255, 0] and got[1, 1].tolist() == [9, 9, 9]
    rgb = Image.new("RGB", (2, 2), (255, 0, 0))
    assert (pixels(open_image(saved(rgb, "PNG", transparency=(255, 0, 0)), background=(9, 9, 9))) == 9).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "LAB", "RGBX"])
def test_other_colour_models_become_rgb(picture, mode):
    got = pixels(open_image(picture.convert("L" if mode == "1" else "RGB").convert(mode)))
    assert got.shape == (HEIGHT, WIDTH, 3)
    if mode in ("CMYK", "YCbCr", "HSV", "RGBX"):
        assert np.abs(got - np.asarray(picture)).mean() < 4


def test_a_cmyk_jpeg_as_scanners_write_it(picture):
    got = pixels(open_image(saved(picture.convert("CMYK"), "JPEG", quality=95)))
    assert np.abs(got - np.asarray(picture)).mean() < 8


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_and_not_clipped(kind):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    got = pixels(open_image(saved(Image.fromarray(ramp), kind)))
    assert (got[..., 0].reshape(-1) == np.arange(256)).all()
    clipped = np.asarray(Image.open(io.BytesIO(saved(Image.fromarray(ramp), kind))).convert("RGB"))
    assert (clipped == 255).mean() > 0.9  # what Pillow's own conversion does to it


def test_thirty_two_bits_and_floats():
    assert (pixels(open_image(Image.fromarray(np.full((2, 2), 65535, np.int32)))) == 255).all()
    assert (pixels(open_image(Image.fromarray(np.full((2, 2), 0.5, np.float32)))) == 128).all()
    with pytest.raises(ImageError, match="expected 0 to 65535"):
        open_image(Image.fromarray(np.full((2, 2), 70000, np.int32)))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_or_page_counts(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    extra = {"lossless": True} if kind == "WEBP" else {}
    got = pixels(open_image(saved(frames[0], kind, save_all=True, append_images=frames[1:], **extra)))
    assert got[4, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize("size", [(1, 1), (1, 10000), (10000, 1), (3, 2)])
def test_tiny_and_thin_pictures(size):
    assert open_image(saved(Image.new("RGB", size), "PNG")).size == size


def test_draft_reduces_jpegs_only(picture):
    big = picture.resize((1600, 960))
    assert open_image(saved(big, "JPEG"), draft=(224, 224)).size == (400, 240)
    assert open_image(saved(big, "PNG"), draft=(224, 224)).size == big.size


# ------------------------------------------------------------------------------------------------- what is refused


def png_that_claims(width, height):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def test_truncated_files(picture, tmp_path):
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"):
        data = saved(picture.resize((200, 120)), kind)
        (tmp_path / f"cut.{kind}").write_bytes(data[: len(data) // 2])
        with pytest.raises(ImageError, match=rf"cut\.{kind}: (cannot be decoded|not a picture)"):
            open_image(tmp_path / f"cut.{kind}")


def test_a_text_named_png(tmp_path):
    (tmp_path / "notes.png").write_text("Dear all, please find attached")
    with pytest.raises(ImageError, match=r"notes\.png: not a picture \(it starts with b'Dear all, pl'\)"):
        open_image(tmp_path / "notes.png")


@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO"])
def test_formats_that_are_not_on_the_list(picture, kind):
    with pytest.raises(ImageError, match="not a picture"):
        open_image(saved(picture, kind))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("width, height", [(50_000, 50_000), (10_000, 9_000), (100, 2_000_000)])
def test_decompression_bombs_are_refused_before_they_unpack(width, height):
    with pytest.raises(ImageError, match="pixels"):
        open_image(png_that_claims(width, height))


def test_the_limit_can_be_set():
    with pytest.raises(ImageError, match=r"100 x 100 pixels are more than max_pixels=9,999"):
        open_image(Image.new("RGB", (100, 100)), max_pixels=9_999)
    assert open_image(Image.new("RGB", (100, 100)), max_pixels=10_000).size == (100, 100)


@pytest.mark.parametrize(
    "source, message",
    [
        (b"", "file is empty"),
        (np.zeros((0, 5, 3), np.uint8), r"no pixel \(5 x 0\)"),
        (torch.zeros(3, 4, 0), "no pixel"),
        (Image.new("RGB", (0, 3)), r"no pixel \(0 x 3\)"),
        (np.array([[0.5, np.nan], [np.inf, 1]]), "2 of 4 values are NaN or infinite"),
        (np.full((2, 2, 3), 200.0), "from 200 to 200, expected 0 to 1"),
        (np.full((2, 2), -1, np.int64), "dtype int64"),
        (np.zeros((3, 8, 8), np.uint8), r"shape \(3, 8, 8\): expected .* last in an array"),
        (torch.zeros(8, 8, 3), "first in a tensor"),
        (np.zeros(7), "shape"),
        (None, "got NoneType"),
        ("no/such/file.jpg", r"no/such/file\.jpg: cannot be read \(No such file"),
        ("bad\0name", "cannot be read"),
        (".", "cannot be read"),
    ],
)
def test_bad_sources_are_named(source, message):
    with pytest.raises(ImageError, match=message):
        open_image(source)


def test_nan_pixels_in_a_float_tiff():
    values = np.full((4, 4), 0.5, np.float32)
    values[1, 1] = np.nan
    with pytest.raises(ImageError, match="1 of 16 values are NaN"):
        open_image(saved(Image.fromarray(values), "TIFF"))


# ------------------------------------------------------------------------------------------------------------- fuzz


def damaged(data, rng):
    """One of the ways in which files go bad: cut, bits turned, a piece lost, doubled, zeroed or replaced."""
    data, kind = bytearray(data), int(rng.integers(6))
    start, stop = sorted(rng.integers(0, len(data) + 1, 2).tolist())
    if kind == 0:
        return bytes(data[:start])
    if kind == 1:
        for place in rng.integers(0, len(data), int(rng.integers(1, 12))):
            data[place] ^= 1 << int(rng.integers(8))
        return bytes(data)
    if kind == 2:
        return bytes(data[:start] + data[stop:])
    if kind == 3:
        return bytes(data[:stop] + data[start:])
    if kind == 4:
        return bytes(data[:start] + bytes(stop - start) + data[stop:])
    head = bytes(rng.integers(0, 256, min(24, len(data)), dtype=np.uint8))  # wrong sizes and counts in the header
    return bytes(data[:8]) + head + bytes(data[8 + len(head) :])


@pytest.mark.filterwarnings("ignore")  # of damaged metadata
def test_a_thousand_damaged_files_neither_crash_nor_hang(picture):
    """Each is either read or refused with an ImageError; anything else fails here, and a crash of the decoder too."""
    rng, exif = np.random.default_rng(0), Image.Exif()
    exif[0x0112] = 6
    whole = [saved(picture, kind) for kind in ("PNG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "AVIF", "PPM")]
    whole += [
        saved(picture, "JPEG", exif=exif),
        saved(picture.convert("CMYK"), "JPEG"),
        saved(picture.convert("P"), "PNG"),
    ]
    whole += [saved(picture, "TIFF", compression=name) for name in ("tiff_lzw", "tiff_adobe_deflate", "jpeg")]
    read = refused = 0
    for number in range(1000):
        data = damaged(whole[number % len(whole)], rng)
        try:
            assert open_image(data, max_pixels=1_000_000).mode == "RGB"
            read += 1
        except ImageError as error:
            assert str(error)
            refused += 1
    assert read + refused == 1000
    assert min(read, refused) > 150  # the damage is neither always fatal nor always harmless
