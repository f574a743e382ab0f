"""Batches of mixed sizes, texts of mixed lengths, and a loader from which no failure gets away."""

import io
import os
import signal
import threading
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from dslib.data.encoders import load_minilm
from dslib.scenarios import batches
from dslib.scenarios.batches import ImageLoader, WorkerLost, collate, tokenise
from dslib.scenarios.images import ImageError
from dslib.scenarios.multimodal import HALF, Recipe, Views, prepare
from dslib.scenarios.pipeline import serve


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Ten pictures, each of its own grey, so that order can be seen."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(10):
        Image.new("RGB", (40 + number, 30), (number * 20,) * 3).save(folder / f"{number}.png")
    return [folder / f"{number}.png" for number in range(10)]


@pytest.fixture(scope="module")
def tokenizer():
    return load_minilm().tokenizer


RECIPE = Recipe(16, "crop", HALF)


def greys(loader):
    return [round((value.item() + 1) / 2 * 255 / 20) for batch in loader for value in batch.pixels[:, 0, 0, 0]]


@pytest.mark.parametrize("kind", [list, iter])
@pytest.mark.parametrize(("workers", "size"), [(0, 4), (1, np.int64(4)), (torch.tensor(3), torch.tensor(4))])
def test_every_picture_once_and_in_order(files, tokenizer, workers, size, kind):
    texts = kind([f"number {number}" for number in range(10)])
    loader = ImageLoader(kind(files), RECIPE, size, workers=workers, texts=texts, tokenizer=tokenizer)
    assert len(loader) == 3
    assert [batch.indices for batch in loader] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert greys(loader) == list(range(10))


def test_no_pictures_are_no_batches(tokenizer):
    loader = ImageLoader([], RECIPE, texts=[], tokenizer=tokenizer)
    assert len(loader) == 0 and list(loader) == [] == serve(None, iter([]), new_tokens=3, ahead=True)


@pytest.mark.parametrize("processes", [False, True])
def test_one_picture_that_is_not_loaded_yet_serves_several_times(files, processes):
    """Threads that read its file by turns would find it cut off; a damaged one is named in processes too."""
    with Image.open(files[3]) as whole, Image.open(io.BytesIO(files[4].read_bytes()[:60])) as damaged:
        sources = [whole] * 8 + [damaged]
        loader = ImageLoader(sources, RECIPE, 2, workers=2, processes=processes, on_error="skip")
        assert greys(loader) == [3] * 8 and list(loader.failures) == [8]
        assert "cut off or damaged" in str(loader.failures[8])


def test_processes_give_what_threads_give(files):
    together = [torch.cat([b.pixels for b in ImageLoader(files, RECIPE, 4, processes=p)]) for p in (True, False)]
    assert torch.equal(*together)


def test_views_of_mixed_number_and_size():
    pictures = [Image.new("RGB", size, "white") for size in ((64, 36), (20, 20), (36, 64))]
    torch.set_default_dtype(torch.float64)
    try:
        batch = collate(prepare(picture, Recipe(32, "shorter", HALF)) for picture in pictures)
    finally:
        torch.set_default_dtype(torch.float32)
    assert batch.pixels.shape == (3, 3, 56, 56)
    assert batch.mask.sum((1, 2)).tolist() == [56 * 32, 32 * 32, 32 * 56]
    assert (batch.pixels.mean(1)[batch.mask] == 1).all() and (batch.pixels.mean(1)[~batch.mask] == 0).all()
    assert batch.pixels.dtype is torch.float32
    tiled = collate([prepare(picture, Recipe(16, "tiles", HALF)) for picture in pictures])
    counts = [1 + columns * rows for columns, rows in tiled.grids.tolist()]
    assert tiled.pixels.shape == (sum(counts), 3, 16, 16) and tiled.mask.all()
    assert tiled.item.bincount().tolist() == counts and tiled.item.tolist() == sorted(tiled.item.tolist())


@pytest.mark.parametrize("workers, processes", [(0, False), (2, False), (1, True)])
def test_a_missing_file_in_the_middle_is_named(files, workers, processes):
    sources = [*files[:5], files[0].parent / "gone.png", *files[5:]]
    seen = []
    with pytest.raises(ImageError, match=r"picture 5: .*gone\.png: cannot be read"):
        for batch in ImageLoader(sources, RECIPE, 4, workers=workers, processes=processes):
            seen += batch.indices
    assert seen == [0, 1, 2, 3]  # what came before it was delivered


@pytest.mark.parametrize("workers", [0, 2])
def test_skipping_says_what_was_left_out(files, tokenizer, workers):
    sources = [files[0], b"not a picture", files[1], files[2], b"", np.full((4, 4), np.nan)]
    texts = [f"picture {number}" for number in range(6)]
    loader = ImageLoader(sources, RECIPE, 3, workers=workers, on_error="skip", texts=texts, tokenizer=tokenizer)
    got = list(loader)
    assert [batch.indices for batch in got] == [[0, 2], [3]]
    assert [sorted(batch.failures) for batch in got] == [[1], [4, 5]]
    assert "picture 5" in str(loader.failures[5]) and "NaN" in str(loader.failures[5])
    assert tokenizer.decode(got[0].text["input_ids"][1], skip_special_tokens=True) == "picture 2"  # texts stay in step


def test_a_batch_of_failures_only_is_left_out_and_reported(files):
    loader = ImageLoader([b"x", b"y", files[0]], RECIPE, 2, on_error="skip")
    assert [batch.indices for batch in loader] == [[2]]
    assert sorted(loader.failures) == [0, 1]


def die(source, recipe):
    if source == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return prepare(source, recipe)


def test_a_worker_that_is_killed_does_not_go_unnoticed(files, monkeypatch):
    """As by a fault inside a decoder, or by the system when memory runs out."""
    monkeypatch.setattr(batches, "prepare", die)
    with pytest.raises(WorkerLost, match=r"picture \d or one after it: the worker that decoded it died"):
        list(ImageLoader([*files[:5], "die", *files[5:]], RECIPE, 4, processes=True))


def test_an_error_of_another_kind_is_not_swallowed_either(files, monkeypatch):
    def broken(source, recipe):
        raise ZeroDivisionError("a mistake in the code")

    monkeypatch.setattr(batches, "prepare", broken)
    with pytest.raises(ZeroDivisionError):
        list(ImageLoader(files, RECIPE, on_error="skip"))


def test_a_worker_that_does_not_answer(files, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(batches, "prepare", lambda source, recipe: release.wait(10))
    start = time.monotonic()
    with pytest.raises(WorkerLost, match=r"picture 0: no answer from its worker within 0\.2 s"):
        list(ImageLoader(files, RECIPE, timeout=0.2))
    release.set()
    assert time.monotonic() - start < 5


def test_only_a_few_batches_are_ahead(files, monkeypatch):
    started = []
    monkeypatch.setattr(batches, "prepare", lambda source, recipe: started.append(source) or prepare(source, recipe))
    stream = iter(ImageLoader(files * 20, RECIPE, 5, ahead=2))
    next(stream)
    time.sleep(0.3)
    assert len(started) <= 15
    stream.close()
    time.sleep(0.1)
    stopped = len(started)
    time.sleep(0.2)
    assert len(started) == stopped < 20  # leaving the loop early ends the work


def test_decoding_runs_while_the_model_works(files, monkeypatch):
    """With a decoder and a model that each take 20 ms a picture, both waiting outside Python."""
    monkeypatch.setattr(batches, "prepare", lambda source, recipe: time.sleep(0.02) or prepare(source, recipe))

    def seconds(workers):
        start = time.monotonic()
        for batch in ImageLoader(files * 4, RECIPE, 2, workers=workers):
            time.sleep(0.02 * len(batch.indices))
        return time.monotonic() - start

    assert seconds(0) / seconds(1) > 1.5


# ------------------------------------------------------------------------------------------------------------ texts


def test_padding_goes_to_the_longest_of_the_batch(tokenizer):
    batch = tokenise(["a cat", "a cat on a very long wall"], tokenizer)
    assert batch["input_ids"].shape == (2, 9) and batch["attention_mask"].sum(1).tolist() == [4, 9]
    assert tokenise(["a cat"], tokenizer)["input_ids"].shape == (1, 4)
    assert not batch["cut"].any()


def test_what_is_far_too_long_is_cut_and_said_to_be(tokenizer):
    batch = tokenise(["word " * 10_000, "short"], tokenizer, max_length=128)
    assert batch["input_ids"].shape == (2, 128)
    assert batch["cut"].tolist() == [True, False]


class Bare:
    pad_token_id = None


ONE = Views(torch.zeros(1, 3, 8, 8), (0, 0), (8, 8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda load, tok: collate([]), "items: got none, expected at least one picture"),
        (lambda load, tok: collate([ONE], [0, 1]), "indices: got 2, expected 1"),
        (lambda load, tok: collate([replace(ONE, pixels=ONE.pixels[:0])]), "views of picture 0: got 0"),
        (lambda load, tok: load(batch_size=0), "batch_size: got 0"),
        (lambda load, tok: load(batch_size=2.0), "batch_size: got 2.0, expected a whole number"),
        (lambda load, tok: load(workers=-1), "workers: got -1"),
        (lambda load, tok: load(ahead=0), "ahead: got 0"),
        (lambda load, tok: load(timeout=0), "timeout: got 0"),
        (lambda load, tok: load(on_error="ignore"), "on_error: got 'ignore', expected one of 'raise'"),
        (lambda load, tok: load(texts=["one"], tokenizer=tok), "texts: got 1, expected 10"),
        (lambda load, tok: load(texts=["one"]), "tokenizer: got NoneType"),
        (lambda load, tok: load(texts=["a", ""], tokenizer=tok), "texts: number 1 is empty"),
        (lambda load, tok: ImageLoader("a.png", RECIPE), "sources: got one str, expected a list"),
        (lambda load, tok: tokenise("a cat", tok), "texts: got 'a cat', expected a list"),
        (lambda load, tok: tokenise([" \n"], tok), "texts: number 0 is empty"),
        (lambda load, tok: tokenise(["a", "b", None], tok), "texts: number 2 is .* None"),
        (lambda load, tok: tokenise(["a"], tok, 2), "max_length: got 2, expected at least 3"),
        (lambda load, tok: tokenise(["a"], Bare()), r"expected one with a padding token; set tokenizer\.pad_token"),
    ],
)
def test_what_is_refused(files, tokenizer, call, message):
    with pytest.raises(ValueError, match=message):
        call(partial(ImageLoader, files, RECIPE), tokenizer)


@pytest.mark.benchmark
def test_working_ahead_pays():
    from measured.experiments.multimodal_speed import overlap

    torch.set_num_threads(1)
    assert overlap()["ratio"]["median"] > 1.5
