"""The text that the course's own language model learns from: 37 million characters of English, shipped packed.

Speeches, novels, a Bible, country reports and three manuals, all free to pass on; nothing is fetched. Split by document
into train, validation and test. Origin, licences, how it was cleaned: ``data/README.md``.

    documents = load("validation")                # texts
    tokens, size = token_stream("validation")     # ids, and how many bytes of UTF-8 they stand for

Losses a token depend on the tokenizer. Bits a byte do not: bits of all tokens, ends of texts included, over ``size``.
"""

import contextlib
import hashlib
import json
import lzma
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from dslib import check
from dslib.data.files import cache_root, data_path

SPLITS = ("train", "validation", "test")
VOCABULARY = 4096
END_OF_TEXT = "<|end▁of▁text|>"  # it follows every document, and also begins and pads a text
REBUILD = "python -m tools.corpus build"


@dataclass(frozen=True)
class Document:
    """One text: a speech, a chapter, a country, a page of a manual. ``id`` is unique within its ``source``."""

    source: str
    id: str
    text: str


def load(split: str) -> list[Document]:
    """The documents of a split, by source. ValueError for another split, or where the packed file was altered."""
    check.one_of(SPLITS, split=split)
    rows = (json.loads(line) for line in _lines(_folder()))
    return [Document(row["source"], row["id"], row["text"]) for row in rows if row["split"] == split]


def manifest() -> dict:
    """What the packed file holds: sources, versions, licences, counts, and its hash."""
    return json.loads((_folder() / "manifest.json").read_text(encoding="utf-8"))


def encode(texts: Iterable[str]) -> list[np.ndarray]:
    """The token ids of each text, END_OF_TEXT at its end: uint16."""
    found = tokenizer().backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array([*text.ids, tokenizer().eos_token_id], np.uint16) for text in found]


def token_stream(split: str) -> tuple[np.ndarray, int]:
    """All documents of a split one after the other, END_OF_TEXT after each (uint16), and their bytes of UTF-8.

    Tokenising the training split takes half a minute; so the ids are kept in :func:`dslib.data.files.cache_root`.
    """
    texts = [document.text for document in load(split)]
    rules = data_path("tiny-deepseek/tokenizer.json").read_bytes()
    key = hashlib.sha256(rules + "\0".join(texts).encode()).hexdigest()[:16]
    kept = cache_root() / "corpus" / f"{split}-{key}.npy"
    size = sum(len(text.encode()) for text in texts)
    with contextlib.suppress(OSError, ValueError, EOFError):  # not there, or cut short
        return np.load(kept), size
    tokens = np.concatenate(encode(texts))
    with contextlib.suppress(OSError):  # no right to write, or a full disk: then it is done again next time
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_name(f"{kept.stem}-{os.getpid()}.part.npy")
        np.save(part, tokens)
        part.replace(kept)
    return tokens, size


def _folder() -> Path:
    try:
        return data_path("corpus")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} Or rebuild it: {REBUILD}") from None


def _lines(folder: Path) -> list[str]:
    """The lines of the packed file, one a document, if it is the one that the manifest names."""
    try:
        wanted = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        path, expected = folder / wanted["file"], wanted["sha256"]
        packed = path.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error.filename}: missing. Restore it, or rebuild it: {REBUILD}") from None
    except (ValueError, KeyError) as error:
        raise ValueError(f"{folder / 'manifest.json'}: not a manifest ({error}). Rebuild it: {REBUILD}") from None
    if (found := hashlib.sha256(packed).hexdigest()) != expected:
        raise ValueError(
            f"{path}: altered: its sha256 is {found[:12]}…, expected {expected[:12]}…. "
            f"Restore it, or rebuild it: {REBUILD}"
        )
    return lzma.decompress(packed).decode().split("\n")[:-1]  # splitlines() would also cut at other separators


@cache
def tokenizer():
    """The byte-level BPE of ``data/tiny-deepseek``, as transformers loads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(data_path("tiny-deepseek"))
