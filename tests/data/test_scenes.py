"""Generated pictures: what the words say is what was drawn, and a seed decides it all."""

import numpy as np
import pytest

from dslib.data.pictures import load_emoji
from dslib.data.scenes import NUMBERS, PLACES, Scene, SceneMaker, Stream, TextMaker, item_rng, plain_fonts

NUMBERS_TO_READ = [f"{number:03}" for number in range(1000)]


@pytest.fixture(scope="module")
def make():
    return SceneMaker(load_emoji().named("dog", "cat", "star"), size=32)


def scene(*cells):
    names = {"en": ["dog", "cat", "star"], "zh": ["狗", "猫", "星星"]}
    return Scene(np.zeros((8, 8, 3), np.uint8), cells, names)


# --- words


def test_captions():
    assert scene(0, None, None, 1).caption() == "dog top left, cat bottom right"
    assert scene(0, None, None, 1).caption("zh") == "狗在左上，猫在右下"
    assert scene(2, 1, 2, 2).caption() == "star: three, cat top right"
    assert scene(2, 1, 2, 2).caption("zh") == "星星有三个，猫在右上"


def test_questions():
    assert scene(None, 0, 1, 0).questions() == [
        ("what", "what is top right?", "dog"),
        ("what", "what is bottom left?", "cat"),
        ("what", "what is bottom right?", "dog"),
        ("how many", "how many: dog?", "two"),
        ("how many", "how many: cat?", "one"),
        ("where", "where is cat?", "bottom left"),
    ]
    assert scene(None, None, 2, None).questions("zh") == [
        ("what", "左下是什么？", "星星"),
        ("how many", "星星有几个？", "一个"),
        ("where", "星星在哪里？", "左下"),
    ]


def test_the_two_languages_say_the_same():
    assert {len(table) for table in PLACES.values()} == {4} and {len(table) for table in NUMBERS.values()} == {5}
    made = scene(0, 1, 1, None)
    assert [sort for sort, *_ in made.questions("en")] == [sort for sort, *_ in made.questions("zh")]


# --- pictures


def test_what_is_said_to_be_there_is_there_and_nothing_else(make):
    for index in range(200):
        made = make(item_rng(0, index))
        assert made.image.shape == (32, 32, 3) and made.image.dtype == np.uint8
        quarters = made.image.reshape(2, 16, 2, 16, 3).swapaxes(1, 2).reshape(4, 256, 3)
        drawn = [len(np.unique(quarter, axis=0)) > 1 for quarter in quarters]
        assert drawn == [cell is not None for cell in made.cells]
        assert 1 <= sum(drawn) <= 4


def test_an_emoji_looks_like_itself():
    """The mean colour of what stands before the ground is nearest to that of the emoji it should be, every time."""
    make = SceneMaker(load_emoji().named("red heart", "evergreen tree", "umbrella"), size=32)  # red, green, blue
    pixels = make.emoji.pixels.astype(float)
    own = np.stack([(p[..., :3] * p[..., 3:]).sum((0, 1)) / p[..., 3].sum() for p in pixels])
    for index in range(60):
        kind = index % 3
        image = make.draw([kind] * 4, item_rng(1, index)).image.reshape(-1, 3).astype(float)
        colours, counts = np.unique(image, axis=0, return_counts=True)
        ground = colours[counts.argmax()]
        seen = image[np.abs(image - ground).max(1) > 60].mean(0)
        assert np.abs(own - seen).sum(1).argmin() == kind
    empty = make.draw([None] * 4, item_rng(1, 0)).image
    assert len(np.unique(empty.reshape(-1, 3), axis=0)) == 1 and empty.min() >= 200


def test_numbers_of_things_and_repetitions(make):
    counts = [sum(cell is not None for cell in make(item_rng(2, i)).cells) for i in range(400)]
    assert {1, 2, 3, 4} == set(counts) and all(70 < counts.count(k) < 130 for k in range(1, 5))
    kinds = [len(scene.kinds()) for scene in (make(item_rng(3, i)) for i in range(400)) if None not in scene.cells]
    assert set(kinds) == {1, 2, 3} and kinds.count(1) < kinds.count(2)


@pytest.mark.parametrize("kind", ["scene", "text"])
def test_a_seed_decides_everything_and_an_index_is_independent(make, kind):
    maker = make if kind == "scene" else TextMaker(NUMBERS_TO_READ, size=(48, 32), points=(8, 14))
    first, again = (maker(item_rng(5, 7)).image for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, maker(item_rng(5, 8)).image)
    assert not np.array_equal(first, maker(item_rng(6, 7)).image)


def test_text_pictures_fit_and_vary():
    maker = TextMaker(NUMBERS_TO_READ, size=(48, 32), points=(8, 40), noise=0.0)
    made = [maker(item_rng(0, i)) for i in range(100)]
    assert all(one.image.shape == (32, 48, 3) and one.text in NUMBERS_TO_READ for one in made)
    assert len({one.text for one in made}) > 80
    for one in made:  # ink, and a border that was not cut: the edge is paper
        edge = np.concatenate((one.image[0], one.image[-1], one.image[:, 0], one.image[:, -1]))[:, 0].astype(int)
        assert one.image.min() < 120 and np.median(edge) >= 190 and (edge < 120).mean() < 0.05
    noisy = TextMaker(NUMBERS_TO_READ, size=(48, 32), noise=30.0)(item_rng(0, 1)).image[..., 0]
    assert 15 < noisy[:3].std() < 45


def test_fonts_come_with_the_libraries():
    assert all(font.exists() for font in plain_fonts()) and len(plain_fonts()) >= 6


# --- streams


def test_a_batch_of_a_stream_is_the_same_whatever_came_before(make):
    stream, other = (Stream(make, 4, seed, collate=lambda scenes: [one.cells for one in scenes]) for seed in (3, 4))
    batches = [stream.batch(number) for number in range(5)]
    assert [stream.batch(number) for number in reversed(range(5))] == batches[::-1]
    assert batches[2] == [make(item_rng(3, i)).cells for i in range(8, 12)] != other.batch(2)
    assert len({cells for batch in batches for cells in batch}) > 10


# --- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: SceneMaker(e.take([])), "emoji: got an empty set"),
        (lambda e: SceneMaker(e, size=8), "size: got 8, expected at least 16"),
        (lambda e: SceneMaker(e).draw([0, None, 7, None], item_rng(0, 0)), r"cells: got \[0, None, 7, None\]"),
        (lambda e: SceneMaker(e).draw([0], item_rng(0, 0)), r"cells: got \[0\], expected four"),
        (lambda e: scene(0, None, None, None).questions("fr"), "language: got 'fr', expected one of 'en'"),
        (lambda e: TextMaker([]), "words: got none"),
        (lambda e: TextMaker(["cat"], points=(0, 5)), r"points: got \(0, 5\)"),
        (lambda e: Stream(len, 0, 0, list), "batch_size: got 0"),
    ],
)
def test_what_is_refused(make, call, message):
    with pytest.raises(ValueError, match=message):
        call(make.emoji)
