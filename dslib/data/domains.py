"""Three kinds of English that differ, of equal length: a novel, program code, and a reference manual.

The novel ships with the book (:mod:`dslib.data.text`). Code and manual lie on every machine that has Python: some
modules of its standard library, and the reference texts behind ``help()``. They are read where they lie and not shipped
(PSF licence), so they differ a little from one Python version to the next.

Book: ``chapters/performance/training.ipynb``.
"""

import importlib.util
import random
from pathlib import Path

from torch import Tensor

from dslib.data.text import moby_dick, to_bytes

NAMES = ("novel", "code", "manual")
BYTES, TRAINED = 240_000, 216_000  # of each; of these, the first to train on
MODULES = (
    "argparse", "ast", "calendar", "configparser", "difflib", "doctest", "inspect", "mailbox", "optparse", "pdb",
    "pickle", "plistlib", "statistics", "subprocess", "tarfile", "textwrap", "threading", "traceback", "turtle",
)  # fmt: skip


def domains() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The bytes to train on and those held out, by name: int64, 1-D, of equal lengths in all three domains.

    Of code and manual the pieces (modules, topics) come in a fixed random order, so that both ends hold the same sorts.
    Raises ``ValueError`` in a Python without these texts.
    """
    texts = {"novel": moby_dick(), "code": "\n".join(_shuffled(_modules())), "manual": "\n".join(_shuffled(_topics()))}
    trained, kept = {}, {}
    for name, text in texts.items():
        tokens = to_bytes(text)[:BYTES]
        if len(tokens) < BYTES:
            raise ValueError(f"{name}: got {len(tokens)} bytes in this Python, expected at least {BYTES}")
        trained[name], kept[name] = tokens[:TRAINED], tokens[TRAINED:]
    return trained, kept


def _modules() -> list[str]:
    found = (importlib.util.find_spec(name) for name in MODULES)
    paths = [Path(spec.origin) for spec in found if spec is not None and spec.has_location]
    return [path.read_text(encoding="utf-8") for path in paths if path.suffix == ".py"]


def _topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError("manual: this Python has no module pydoc_data.topics, expected one with it") from error
    return [topics[name] for name in sorted(topics)]


def _shuffled(pieces: list[str]) -> list[str]:
    return random.Random(0).sample(pieces, len(pieces))
