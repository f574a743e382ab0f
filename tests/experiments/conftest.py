"""Experiments read the corpus anew in every call; here a file's tests read it once."""

import functools

import pytest

from dslib.data import corpus


@pytest.fixture(autouse=True, scope="module")
def _corpus_once():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("load", "token_stream"):
            patch.setattr(corpus, name, functools.cache(getattr(corpus, name)))
        yield
