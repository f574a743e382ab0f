"""The shipped emoji: complete, in two languages, split so that nothing seen in training is asked about later."""

import re
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from dslib.data.files import data_path
from dslib.data.pictures import LANGUAGES, SIZE, SPLITS, load_emoji
from tools import build_emoji


@pytest.fixture(scope="module")
def emoji():
    return load_emoji()


def test_counts(emoji):
    assert len(emoji) == len(emoji.rows) == len(emoji.pixels) == 1895
    assert emoji.pixels.shape == (1895, SIZE, SIZE, 4) and emoji.pixels.dtype == np.uint8
    assert Counter(row.split for row in emoji.rows) == {"train": 1434, "validation": 229, "test": 232}
    assert sum(len(emoji.split(name)) for name in SPLITS) == 1895
    assert len({row.identity for row in emoji.rows}) == 1664
    assert {row.group for row in emoji.rows} >= {"animals-nature", "food-drink", "flags", "smileys-emotion"}


def test_the_sheet_is_small_and_licences_travel_with_it():
    folder = data_path("emoji")
    assert (folder / "sheet.webp").stat().st_size <= 8_000_000
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("LICENSE-*.txt"))]
    for words in ("SIL OPEN FONT LICENSE Version 1.1", "Google Inc.", "Miles Johnson", "UNICODE LICENSE V3"):
        assert any(words in text for text in texts), words


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_picture_has_words_in_both_languages(emoji, language):
    names = emoji.names(language)
    assert len(set(names)) == 1895 and all(name.strip() for name in names)
    assert all(row.tags[language] and all(row.tags[language]) for row in emoji.rows)


def test_the_two_languages_are_two(emoji):
    chinese = re.compile("[一-鿿]")
    latin = [row.name["zh"] for row in emoji.rows if not chinese.search(row.name["zh"])]
    assert len(latin) < 30, latin  # such as the keycaps, which are digits in both
    assert not [row.name["en"] for row in emoji.rows if chinese.search(row.name["en"])]


def test_every_picture_shows_something_and_none_is_there_twice(emoji):
    opaque = (emoji.pixels[..., 3] > 127).mean((1, 2))
    assert opaque.min() > 0.01
    assert len({picture.tobytes() for picture in emoji.pixels}) == 1895


def test_no_identity_is_on_two_sides_of_the_split(emoji):
    sides = defaultdict(set)
    for row in emoji.rows:
        sides[row.identity].add(row.split)
    assert all(len(side) == 1 for side in sides.values())


def test_nearly_equal_pictures_and_variants_are_on_one_side(emoji):
    """What the build promises, checked on what it shipped: no pair across the split nearer than NEAR."""
    flat = emoji.images().reshape(1895, -1).float()
    squares = flat.square().sum(1)
    distance = ((squares[:, None] + squares - 2 * flat @ flat.T).clamp(min=0) / flat.shape[1]).sqrt()
    split = np.array([row.split for row in emoji.rows])
    apart = split[:, None] != split[None]
    assert distance.numpy()[apart].min() >= build_emoji.NEAR - 0.1
    running = [row for row in emoji.rows if re.match(r"(man|woman|person) running", row.name["en"])]
    assert len(running) >= 3 and len({row.identity for row in running}) == 1


def test_kind_forgets_gender_and_direction():
    kinds = {build_emoji.kind(code, "") for code in ("1F3C3", "1F3C3-200D-2640-FE0F", "1F3C3-200D-27A1-FE0F")}
    assert kinds == {"1F3C3"}
    assert build_emoji.kind("1F468-200D-1F373", "man cook") == build_emoji.kind("1F469-200D-1F373", "woman cook")
    assert build_emoji.kind("1F436", "dog face") != build_emoji.kind("1F431", "cat face")


def test_identities_join_transitively():
    black, grey, white = (np.full((2, 2), value) for value in (0, 20, 200))
    near = np.full((2, 2), 10)  # near to black and to grey, which are far from each other
    assert build_emoji.identities(["a", "b", "c", "d"], [black, grey, near, white]) == [0, 0, 0, 1]
    assert build_emoji.identities(["a", "b", "a"], [black, white, white + 50]) == [0, 1, 0]


def test_split_depends_on_the_thing_alone():
    names = [f"{number:X}" for number in range(2000)]
    share = Counter(map(build_emoji.split_of, names))
    assert 0.72 < share["train"] / 2000 < 0.80 and 0.09 < share["test"] / 2000 < 0.15
    assert [build_emoji.split_of(name) for name in reversed(names)] == list(map(build_emoji.split_of, names))[::-1]


def test_parts_of_the_set(emoji):
    two = emoji.named("dog", "cat")
    assert two.names() == ["dog", "cat"] and two.names("zh") == ["狗", "猫"]
    assert np.array_equal(two.pixels[0], emoji.pixels[emoji.names().index("dog")])
    assert emoji.take([5, 3]).rows == (emoji.rows[5], emoji.rows[3])


def test_pictures_over_a_background(emoji):
    one = emoji.named("dog")
    clear = one.pixels[0, ..., 3] == 0
    red = one.images((255, 0, 0))
    assert red.shape == (1, 3, SIZE, SIZE) and clear.any()
    assert (red[0, 0].numpy()[clear] == 255).all() and (red[0, 1:].numpy()[:, clear] == 0).all()
    solid = one.pixels[0, ..., 3] == 255
    assert (red[0].permute(1, 2, 0).numpy()[solid] == one.pixels[0, solid, :3]).all()
    assert one.image(0).mode == "RGBA" and one.image(0).size == (SIZE, SIZE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda emoji: emoji.split("dev"), "split: got 'dev', expected one of 'train', 'validation', 'test'"),
        (lambda emoji: emoji.named("unicorn horse"), "no picture is called 'unicorn horse'"),
        (lambda emoji: emoji.names("de"), "language: got 'de', expected one of 'en', 'zh'"),
    ],
)
def test_what_is_refused(emoji, call, message):
    with pytest.raises(ValueError, match=message):
        call(emoji)


@pytest.mark.benchmark
def test_a_rebuild_gives_the_same_bytes(tmp_path):
    """Needs npm, a network and Debian's font (version 2.042), and takes a minute and a half."""
    if not build_emoji.FONT.exists() or not shutil.which("npm"):
        pytest.skip("needs npm and the Debian package fonts-noto-color-emoji")
    build_emoji.build(tmp_path)
    for name in ("captions.csv", "sheet.webp"):
        assert (tmp_path / name).read_bytes() == Path(data_path(f"emoji/{name}")).read_bytes(), name
