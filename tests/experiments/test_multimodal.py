"""The judge and what it is shown."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from measured.experiments import multimodal
from measured.experiments.multimodal import STRATEGIES, as_seen, read, recovered, text_page

try:
    import rapidocr_onnxruntime  # noqa: F401

    MISSING = ""
except (ImportError, OSError) as error:
    MISSING = f"the OCR engine cannot be imported: {error}"
needs_engine = pytest.mark.skipif(bool(MISSING), reason=MISSING)


def distance(a, b):
    """Edit distance by the book, for comparison."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


@settings(max_examples=300, deadline=None)
@given(text=st.text("abc", max_size=12), truth=st.text("abc", min_size=1, max_size=12))
def test_recovered_is_one_minus_the_edit_distance(text, truth):
    assert recovered(text, truth) == pytest.approx(max(0, 1 - distance(text, truth) / len(truth)))


def test_recovered_at_its_ends():
    assert recovered("the cat sat", "thecat sat") == 1
    assert recovered("", "cat") == 0
    assert recovered("xyz" * 50, "cat") == 0  # inventing much does not help
    with pytest.raises(ValueError, match="truth: got no character"):
        recovered("cat", " ")


def test_a_page_follows_from_its_seed():
    a, b, c = text_page(20, seed=1), text_page(20, seed=1), text_page(20, seed=2)
    assert a.lines == b.lines and a.image.tobytes() == b.image.tobytes()
    assert a.lines != c.lines
    assert a.image.size == (1920, 1080) and len(a.lines) == 6 and max(map(len, a.lines)) <= 32


@pytest.mark.parametrize("height", [3, 200])
def test_a_height_that_does_not_fit_is_refused(height):
    with pytest.raises(ValueError, match=f"height: got {height}"):
        text_page(height)


def test_letters_have_the_height_that_was_asked_for():
    for height in (20, 40):
        rows = np.flatnonzero((np.asarray(text_page(height, seed=3).image.convert("L")) < 128).any(1))
        lines = np.split(rows, np.flatnonzero(np.diff(rows) > 5) + 1)
        assert len(lines) == 6
        assert all(0.5 * height < len(line) < 1.3 * height for line in lines)


def test_tiles_are_put_together_again():
    page = text_page(20, seed=1)
    whole = as_seen(page.image, STRATEGIES["tiles of 384"])
    assert whole.size == (4 * 384, 2 * 384)
    plain = page.image.resize((1365, 768))
    inner = whole.crop(((1536 - 1365) // 2, 0, (1536 - 1365) // 2 + 1365, 768))
    assert np.abs(np.asarray(inner).astype(int) - np.asarray(plain)).mean() < 3
    assert as_seen(page.image, None) is page.image


@needs_engine
def test_the_engine_reads_the_page_and_not_the_stamp():
    page = text_page(28, lines=3, characters=20, seed=5)
    truth = "".join(page.lines)
    assert recovered(read(page.image), truth) > 0.95
    assert recovered(read(as_seen(page.image, STRATEGIES["tiles of 384"])), truth) > 0.9
    assert recovered(read(as_seen(page.image, STRATEGIES["letterbox 224"])), truth) < 0.3


@needs_engine
def test_runs_have_an_interval_over_pages(monkeypatch):
    monkeypatch.setattr(multimodal, "read", lambda image: "nothing")
    got = multimodal.legibility_runs(heights=(20,), pages=3)
    assert len(got["points"]) == len(STRATEGIES)
    assert all(p["pages"] == len(p["shares"]) == 3 and p["low"] <= p["mean"] <= p["high"] for p in got["points"])


def test_without_the_engine_the_error_says_what_to_install(monkeypatch):
    multimodal._engine.cache_clear()
    monkeypatch.setattr(multimodal.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        FileNotFoundError, match=r"pip install --no-deps --ignore-requires-python rapidocr-onnxruntime==1\.4\.4"
    ):
        read(text_page(20).image)
