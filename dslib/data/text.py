"""Real text that needs no network: 27 chapters of *Moby-Dick* (1851, public domain), shipped in ``data/text``.

Book: used wherever a chapter trains or evaluates a language model. Origin and licence: ``data/README.md``.
"""

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from dslib import check
from dslib.data.files import data_path


def moby_dick() -> str:
    """The text, chapters 1 to 27, about 240,000 characters of English."""
    return data_path("text/moby_dick.txt").read_text(encoding="utf-8")


def to_bytes(text: str) -> Tensor:
    """UTF-8 bytes as int64 token ids 0 to 255: the vocabulary of the ``tiny`` preset."""
    return torch.tensor(list(text.encode("utf-8")), dtype=torch.int64)


def slices(tokens: Tensor, length: int, count: int) -> Tensor:
    """``count`` slices of ``length`` tokens, spread evenly and not overlapping: (count, length).

    Raises ``ValueError`` where the text is too short for that many.
    """
    check.whole(1, length=length, count=count)
    if count * length > len(tokens):
        raise ValueError(f"count: {count} slices of {length} tokens need {count * length}, the text has {len(tokens)}")
    step = len(tokens) // count
    return torch.stack([tokens[start : start + length] for start in range(0, count * step, step)])


def random_batch(tokens: Tensor, length: int, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs and next-token targets from random places: two (batch_size, length) tensors.

    Raises ``ValueError`` where the text is shorter than ``length + 1``, or nothing is asked for.
    """
    check.whole(1, length=length, batch_size=batch_size)
    if len(tokens) <= length:
        raise ValueError(f"length: got {length}, expected less than the text's {len(tokens)} tokens")
    starts = torch.randint(len(tokens) - length, (batch_size,), generator=generator)
    rows = torch.stack([tokens[start : start + length + 1] for start in starts])
    return rows[:, :-1], rows[:, 1:]


class Words:
    """A small vocabulary: English words, digits, punctuation and single Chinese characters are tokens.

    For models that learn on a laptop: a sentence is a handful of tokens, and every token can be read. Id 0 pads, id 1
    ends a text, id 2 stands for whatever is not known.

    Example:
        >>> words = Words(["what is top left?", "左上是什么？"])
        >>> words.decode(words.encode("left top?"))
        'left top?'
    """

    PAD, END, UNKNOWN = 0, 1, 2
    _PIECES = re.compile(r"[A-Za-z]+(?:['’-][A-Za-z]+)*|\S")

    def __init__(self, texts: Iterable[str]):
        pieces = sorted({piece for text in texts for piece in self.pieces(text)})
        self.tokens = ["<pad>", "<end>", "<unknown>", *pieces]
        self._ids = {token: i for i, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def pieces(cls, text: str) -> list[str]:
        """The text cut into tokens, lower case."""
        return cls._PIECES.findall(text.lower())

    def encode(self, text: str) -> list[int]:
        """Token ids, without an end."""
        return [self._ids.get(piece, self.UNKNOWN) for piece in self.pieces(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text up to the first end; a space stands between two words and after English punctuation only."""
        text = ""
        for i in ids:
            if i == self.END:
                break
            token = self.tokens[i]
            word = token[0].isascii() and token[0].isalpha()
            text += f" {token}" if word and text and text[-1].isascii() else token
        return text
