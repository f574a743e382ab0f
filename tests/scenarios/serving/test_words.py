"""Tokens as text: nothing lost, nothing shown that has to be taken back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dslib.data import corpus
from dslib.scenarios.serving.words import Words

TOKENIZER = corpus.tokenizer()


def pieces(tokens, stop=()):
    words = Words(TOKENIZER, stop)
    return [*map(words.add, tokens), words.rest()], words


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 4095), max_size=30))
def test_any_tokens_give_the_text_that_they_have_together(tokens):
    made, words = pieces(tokens)
    assert "".join(made) == words.text == TOKENIZER.decode(tokens, skip_special_tokens=True)


@settings(max_examples=200, deadline=None)
@given(st.text("ab é😀", max_size=30), st.lists(st.text("ab é😀", min_size=1, max_size=4), min_size=1, max_size=3))
def test_a_text_ends_before_the_stop_string_that_is_complete_first(text, stop):
    tokens = TOKENIZER(text, add_special_tokens=False).input_ids
    wanted = text
    for count in range(len(tokens), 0, -1):  # at the end: the first token that completes any
        if places := [at for end in stop if (at := TOKENIZER.decode(tokens[:count]).find(end)) >= 0]:
            wanted = text[: min(places)]
    assert "".join(pieces(tokens, stop)[0]) == wanted


@pytest.mark.parametrize("text", ["naïve 😀 ☃", "é"])
def test_no_half_character_is_shown(text):
    made, _ = pieces(TOKENIZER(text, add_special_tokens=False).input_ids)
    assert not any("\ufffd" in one for one in made)


def test_what_may_become_a_stop_string_waits():
    made, words = pieces([TOKENIZER(letter, add_special_tokens=False).input_ids[0] for letter in "xENEND"], ["END"])
    assert made == ["x", "", "", "EN", "", "", ""] and words.text == "xEN"
