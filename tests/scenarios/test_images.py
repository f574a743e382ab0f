"""Everything a camera, a scanner or an attacker may deliver: the right pixels, or an error that names the picture."""

import io
import math
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from dslib.scenarios.images import ImageError, open_image

WIDTH, HEIGHT = 40, 24
BOMB = "ignore::PIL.Image.DecompressionBombWarning"


@pytest.fixture(scope="module")
def picture():
    """Red to the right, green downwards, one blue corner: no turn or mirroring leaves it as it was."""
    x, y = np.meshgrid(np.linspace(0, 255, WIDTH), np.linspace(0, 255, HEIGHT))
    values = np.stack([x, y, np.zeros_like(x)], -1).round().astype(np.uint8)
    values[:6, :6] = (0, 0, 255)
    return Image.fromarray(values)


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(image):
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def oriented(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def png(rows, size, depth, colour, transparent=b""):
    """A PNG file by hand, of rows of bytes; ``colour`` is 0 grey, 2 RGB, 4 grey and opacity, 6 RGB and opacity."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
    key = chunk(b"tRNS", transparent) if transparent else b""
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + key + data + chunk(b"IEND", b"")


def png_16(values, transparent=b""):
    height, width, channels = values.shape
    rows = [row.astype(">u2").tobytes() for row in values]
    return png(rows, (width, height), 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], transparent)


def tiff(values, order, compression):
    """A 16-bit colour TIFF by hand; ``order`` of the bytes is "<" or ">", ``compression`` 1 (none) or 8 (deflate)."""
    height, width, channels = values.shape
    data = values.astype(f"{order}u2").tobytes()
    data = zlib.compress(data) if compression == 8 else data
    count = 9 + (channels == 4)
    bits = 8 + 2 + 12 * count + 4
    rows = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, channels, bits), (259, 3, 1, compression), (262, 3, 1, 2),
            (273, 4, 1, bits + 2 * channels), (277, 3, 1, channels), (278, 3, 1, height), (279, 4, 1, len(data)),
            (338, 3, 1, 2)][:count]  # fmt: skip
    fields = [
        struct.pack(f"{order}HHI", *row[:3])
        + (struct.pack(f"{order}I", row[3]) if row[1] == 4 or row[2] > 1 else struct.pack(f"{order}HH", row[3], 0))
        for row in rows
    ]
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, count)
    return start + b"".join(fields) + bytes(4) + struct.pack(f"{order}{channels}H", *[16] * channels) + data


def test_bytes_path_picture_array_and_tensor_give_the_same(picture, tmp_path):
    data = saved(picture, "PNG")
    (tmp_path / "a.png").write_bytes(data)
    array = np.asarray(picture)
    sources = (data, bytearray(data), tmp_path / "a.png", str(tmp_path / "a.png"), picture, array,
               torch.from_numpy(array.copy()).permute(2, 0, 1), array.astype(np.uint16) * 257, array / 255,
               array.astype(">u2") * 257)  # fmt: skip
    for source in sources:
        assert (pixels(open_image(source)) == array).all()
    assert (pixels(open_image(torch.from_numpy(array / 255).permute(2, 0, 1).bfloat16())) - array).max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF", "BMP", "PPM", "GIF", "JPEG2000", "AVIF"])
def test_every_format_is_read(picture, kind):
    got = pixels(open_image(saved(picture, kind)))
    assert np.abs(got - np.asarray(picture)).mean() < 6  # lossy ones included


def test_a_pillow_that_lacks_a_format_reads_the_others(picture, monkeypatch):
    Image.init()
    monkeypatch.delitem(Image.OPEN, "AVIF")
    assert (pixels(open_image(saved(picture, "PPM"))) == np.asarray(picture)).all()
    with pytest.raises(ImageError, match=r"not a picture .* JPEG2000, PPM$"):
        open_image(b"text")


# ----------------------------------------------------------------------------------------------------- orientation


@pytest.mark.parametrize("orientation", [*range(1, 9), 77])
def test_exif_orientation_is_applied(picture, orientation):
    data = saved(picture, "PNG", exif=oriented(orientation))
    wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert (pixels(open_image(data)) == np.asarray(wanted)).all()
    assert wanted.size == ((HEIGHT, WIDTH) if 4 < orientation < 9 else (WIDTH, HEIGHT))


def turned(picture, kind, where):
    """Files that say, each in its own way, that the camera was held upright."""
    if where == "exif":
        return saved(picture, kind, exif=oriented(6))
    xmp = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    if kind != "PNG":
        return saved(picture, kind, xmp=xmp.encode())
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp)
    return saved(picture, kind, pnginfo=info)


@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.parametrize(
    ("kind", "where"),
    [*((kind, "exif") for kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF")),
     *((kind, "xmp") for kind in ("JPEG", "PNG", "WEBP"))],
)  # fmt: skip
def test_a_picture_is_turned_once_whatever_follows(picture, kind, where, lazily):
    data = turned(picture, kind, where)
    source = Image.open(io.BytesIO(data)) if lazily else data
    upright = open_image(source)
    assert upright.size == (HEIGHT, WIDTH) and not upright.getexif() and not upright.info
    later = (upright, upright.copy(), upright.convert("RGB"), upright.resize(upright.size), upright.crop(),
             saved(upright, "PNG"), saved(upright, "TIFF"), saved(upright, "PNG", exif=upright.getexif()),
             source)  # fmt: skip
    for again in later:
        assert (pixels(open_image(again)) == pixels(upright)).all()


def test_the_result_has_pixels_of_its_own(picture):
    open_image(picture).paste((9, 9, 9), (0, 0, WIDTH, HEIGHT))
    assert picture.getpixel((0, 0)) == (0, 0, 255)
    noted = Image.open(io.BytesIO(saved(picture, "PNG", exif=oriented(6))))
    open_image(noted)
    assert noted.getexif()[0x0112] == 6  # nor is the given picture changed


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_spoil_a_good_picture(picture):
    data = saved(picture, "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff" + b"\x99" * 40)
    assert open_image(data).size == picture.size


# -------------------------------------------------------------------------------------------- transparency, colours


def test_transparency_shows_the_background():
    image = Image.new("RGBA", (4, 1), (200, 100, 0, 255))
    for x, alpha in enumerate((0, 51, 204, 255)):
        image.putpixel((x, 0), (200, 100, 0, alpha))
    got = pixels(open_image(saved(image, "PNG"), background=(0, 0, 250)))
    wanted = [[c * a / 255 + b * (1 - a / 255) for c, b in zip((200, 100, 0), (0, 0, 250), strict=True)]
              for a in (0, 51, 204, 255)]  # fmt: skip
    assert np.abs(got[0] - wanted).max() <= 1
    assert (pixels(open_image(image))[0, 0] == 255).all()  # white unless told otherwise
    grey = Image.new("LA", (2, 2), (10, 0))
    assert (pixels(open_image(saved(grey, "PNG"), background=(1, 2, 3))) == (1, 2, 3)).all()
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((0, 0), 1)
    got = pixels(open_image(saved(palette, "PNG", transparency=0), background=(9, 9, 9)))
    assert got[0, 0].tolist() == [0, 255, 0] and got[1, 1].tolist() == [9, 9, 9]


@pytest.mark.parametrize(("depth", "colour"), [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2)])
def test_the_one_transparent_colour_of_a_png_is_found_at_every_depth(depth, colour):
    values = np.arange(1, -1, -1).repeat(3 if colour else 1)  # a pixel of 1, which is transparent, and one of 0
    bits = "".join(f"{value:0{depth}b}" for value in values)
    row = bytes(int(bits[start : start + 8].ljust(8, "0"), 2) for start in range(0, len(bits), 8))
    data = png([row], (2, 1), depth, colour, struct.pack(">H", 1) * (3 if colour else 1))
    assert pixels(open_image(data, background=(7, 8, 9)))[0].tolist() == [[7, 8, 9], [0, 0, 0]]


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
    ramp = Image.fromarray(np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16))
    got = pixels(open_image(saved(ramp, kind)))
    assert (got[..., 0].reshape(-1) == np.arange(256)).all()
    clipped = np.asarray(Image.open(io.BytesIO(saved(ramp, kind))).convert("RGB"))
    assert (clipped == 255).mean() > 0.9  # what Pillow's own conversion does to it


@pytest.mark.parametrize(
    ("channels", "write"),
    [*((channels, png_16) for channels in (2, 3, 4)),
     *((channels, partial(tiff, order=order, compression=compression))
       for channels in (3, 4) for order in "<>" for compression in (1, 8))],
)  # fmt: skip
def test_sixteen_bits_of_colour_are_rounded(channels, write):
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, channels), dtype=np.uint16)
    colours = values[..., :1] if channels == 2 else values[..., :3]
    if channels != 3:
        values[..., -1] = 65535
    assert (pixels(open_image(write(values))) == (colours / 257).round()).all()


def test_thirty_two_bits_and_floats():
    assert (pixels(open_image(Image.fromarray(np.full((2, 2), 65535, np.int32)))) == 255).all()
    assert (pixels(open_image(Image.fromarray(np.full((2, 2), 0.5, np.float32)))) == 128).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_or_page_counts(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    extra = {"lossless": True} if kind == "WEBP" else {}
    got = pixels(open_image(saved(frames[0], kind, save_all=True, append_images=frames[1:], **extra)))
    assert got[4, 4].tolist() == [255, 0, 0]


def test_sizes(picture):
    for size in ((1, 1), (1, 10_000), (10_000, 1), (3, 2)):
        assert open_image(saved(Image.new("RGB", size), "PNG")).size == size
    big = picture.resize((1600, 960))
    assert open_image(saved(big, "JPEG"), draft=(224, 224)).size == (400, 240)  # draft reduces JPEGs only
    assert open_image(saved(big, "PNG"), draft=(224, 224)).size == big.size
    assert open_image(Image.new("RGB", (100, 100)), max_pixels=1e4).size == (100, 100)


def test_threads_may_share_a_picture_that_is_not_loaded_yet(picture, tmp_path):
    picture.resize((800, 480)).save(tmp_path / "a.jpg", exif=oriented(6))
    wanted = pixels(open_image(tmp_path / "a.jpg"))
    for _ in range(10):
        together = threading.Barrier(4).wait
        with Image.open(tmp_path / "a.jpg") as shared, ThreadPoolExecutor(4, initializer=together) as pool:
            got = list(pool.map(open_image, [shared] * 4))
        assert all((pixels(one) == wanted).all() for one in got)


# ------------------------------------------------------------------------------------------------- what is refused


def cut(kind):
    data = saved(Image.effect_noise((200, 120), 64), kind)
    return data[: len(data) // 2]


def closed():
    image = Image.open(io.BytesIO(saved(Image.new("RGB", (9, 9)), "JPEG")))
    image.fp.close()
    return image


def nan_tiff():
    values = np.full((4, 4), 0.5, np.float32)
    values[1, 1] = np.nan
    return saved(Image.fromarray(values), "TIFF")


@pytest.mark.filterwarnings(BOMB)
@pytest.mark.parametrize(
    ("source", "message"),
    [
        *((cut(kind), "cannot be decoded, probably cut off|not a picture")
          for kind in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "JPEG2000", "AVIF")),
        *((saved(Image.new("RGB", (9, 9)), kind), "not a picture") for kind in ("EPS", "PDF", "ICO")),
        *((png([bytes(100)], size, 8, 2), "pixels") for size in ((50_000, 50_000), (10_000, 9_000), (100, 2_000_000))),
        (b"Dear all, please find attached", r"not a picture \(it starts with b'Dear all, pl'\)"),
        (b"", "file is empty"),
        (closed(), "cannot be decoded, its file is closed"),
        (np.zeros((0, 5, 3), np.uint8), r"no pixel \(5 x 0\)"),
        (torch.zeros(3, 4, 0), "no pixel"),
        (Image.new("RGB", (0, 3)), r"no pixel \(0 x 3\)"),
        (np.array([[0.5, np.nan], [np.inf, 1]]), "2 of 4 values are NaN or infinite"),
        (nan_tiff(), "1 of 16 values are NaN"),
        (np.full((2, 2, 3), 200.0), "from 200 to 200, expected 0 to 1"),
        (np.full((2, 2), -1, np.int64), "dtype int64"),
        (Image.fromarray(np.full((2, 2), 70000, np.int32)), "expected 0 to 65535"),
        (np.zeros((3, 8, 8), np.uint8), "expected .* last in an array"),
        (torch.zeros(8, 8, 3), "first in a tensor"),
        (np.zeros(7), "expected .* 1 to 4 channels"),
        ("no/such/file.jpg", r"cannot be read \(No such file"),
        ("bad\0name", "cannot be read"),
        (".", "cannot be read"),
    ],
)  # fmt: skip
def test_bad_sources_are_named(source, message):
    with pytest.raises(ImageError, match=rf"^mine\.png: .*({message})"):
        open_image(source, name="mine.png")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("no/such.jpg", "no/such.jpg: "),
        (b"xyz", "3 bytes: "),
        (np.zeros((3, 8, 8), np.uint8), r"array of shape \(3, 8, 8\): "),
        (Image.new("RGB", (0, 3)), "RGB picture of 0 x 3: "),
        (None, "source: got NoneType"),
    ],
)
def test_without_a_name_errors_say_what_it_was(source, name):
    with pytest.raises(ImageError, match=f"^{name}"):
        open_image(source)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_pixels": 9_999}, "100 x 100 pixels are more than max_pixels=9,999"),
        ({"max_pixels": math.nan}, "max_pixels: got nan"),
        ({"background": None}, "background: got None"),
        ({"background": "red"}, "background: got 'red', expected 3"),
        ({"background": (0, 0)}, r"background: got \(0, 0\), expected 3"),
        ({"background": (0, 0, 256)}, "background: got 256, expected 0 to 255"),
        ({"background": (0.5, 0, 0)}, r"background\[0\]: got 0.5"),
        ({"draft": (0, 224)}, r"draft\[0\]: got 0"),
    ],
)
def test_bad_arguments_are_not_blamed_on_the_picture(arguments, message):
    with pytest.raises(ValueError, match=message):
        open_image(Image.new("RGB", (100, 100)), **arguments)


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
    rng = np.random.default_rng(0)
    deep = np.asarray(picture).astype(np.uint16) * 257
    whole = [saved(picture, kind) for kind in ("PNG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "AVIF", "PPM")]
    whole += [saved(picture, "JPEG", exif=oriented(6)), saved(picture.convert("CMYK"), "JPEG")]
    whole += [saved(picture.convert("P"), "PNG"), tiff(deep, "<", 8), png_16(deep, b"\0\1" * 3)]
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
