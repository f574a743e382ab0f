"""The shipped text and how it is cut."""

import pytest
import torch

from dslib.data import text


def test_the_novel_is_whole():
    novel = text.moby_dick()
    assert novel.startswith("CHAPTER 1. Loomings.") and "CHAPTER 27" in novel and "CHAPTER 28" not in novel
    assert len(novel) > 200_000 and "\r" not in novel


def test_bytes_come_back_as_text():
    sample = "never mind how long precisely — Ишмаэль"
    assert bytes(text.to_bytes(sample).tolist()).decode() == sample
    assert text.to_bytes("").dtype == text.to_bytes(sample).dtype == torch.int64


def test_slices_are_spread_and_do_not_overlap():
    cut = text.slices(torch.arange(100), length=7, count=4)
    assert cut[:, 0].tolist() == [0, 25, 50, 75] and (cut.diff(dim=1) == 1).all()


def test_random_batches_shift_by_one_and_repeat_with_the_seed():
    tokens = torch.arange(1000)
    x, y = text.random_batch(tokens, 16, 5, torch.Generator().manual_seed(3))
    again, _ = text.random_batch(tokens, 16, 5, torch.Generator().manual_seed(3))
    assert x.shape == (5, 16) and torch.equal(y, x + 1) and torch.equal(x, again)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda tokens: text.slices(tokens, 51, 2), "count: 2 slices of 51 tokens need 102, the text has 100"),
        (lambda tokens: text.slices(tokens, 0, 1), "length: got 0"),
        (lambda tokens: text.slices(tokens, 1, 0), "count: got 0"),
        (lambda tokens: text.random_batch(tokens, 0, 1, torch.Generator()), "length: got 0"),
        (lambda tokens: text.random_batch(tokens, 9, 0, torch.Generator()), "batch_size: got 0"),
        (lambda tokens: text.random_batch(tokens, 100, 1, torch.Generator()), "length: got 100, .* text's 100 tokens"),
    ],
)
def test_what_cannot_be_cut(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.arange(100))


def test_words_cut_read_and_come_back():
    words = text.Words(["What is top left?", "左上是什么？", "read: 42"])
    assert words.tokens[:3] == ["<pad>", "<end>", "<unknown>"]
    assert text.Words.pieces("o'clock, 12 左上?") == ["o'clock", ",", "1", "2", "左", "上", "?"]
    for sentence in ("what is top left?", "左上是什么？", "read: 42"):
        assert text.Words.UNKNOWN not in words.encode(sentence)
    assert words.decode(words.encode("what is left top?")) == "what is left top?"
    assert words.decode(words.encode("左上是什么？")) == "左上是什么？"
    assert words.decode(words.encode("42")) == "42"
    assert words.decode([*words.encode("left"), words.END, *words.encode("top")]) == "left"
    assert words.encode("zebra") == [text.Words.UNKNOWN]
    assert len(words) == len(words.tokens) == len(set(words.tokens))
