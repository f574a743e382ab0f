"""What is asked: constraints with units, and the work to be done. Chapter: ``chapters/scenarios/choose.ipynb``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dslib import check, roofline

MODALITIES = ("text", "image", "picture")  # reads text, reads pictures, draws pictures
LICENCES = {"permissive": 0, "commercial": 1}  # MIT or Apache-2.0; any that allows commercial use
_SIZES = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_TIMES = {"s": 1, "ms": 1e-3, "us": 1e-6, "min": 60}
_MONEY = {"$/month": 1, "$/day": 30, "$/year": 30 / 365}  # a month of 30 days
UNITS = {"memory": _SIZES, "token_time": _TIMES, "first_token": _TIMES, "budget": _MONEY}
EXAMPLES = {"memory": "24 GB", "token_time": "100 ms", "first_token": "100 ms", "budget": "500 $/month"}


@dataclass(frozen=True)
class Needs:
    """What has to hold (None or empty: does not matter), and the work. Numbers are in bytes, seconds, dollars a month.

    Texts with a unit do as well: ``Needs(memory="24 GB", first_token="100 ms", budget="20 $/day")``. Raises ValueError
    for a value out of range, a unit that is missing or unknown, and for constraints that contradict each other.
    """

    memory: float | None = None  # of a place of which no more is known
    gpu: str | None = None  # a card of data/hardware.yml; or the calibrated machine, together with its memory
    where: str | None = None  # "api" or "own"
    model: str | None = None  # look at this one only
    modality: tuple[str, ...] = ()  # some of MODALITIES
    licence: str | None = None  # one of LICENCES
    engine: str | None = None
    context: float | None = None  # tokens of one text, prompt and answer
    token_time: float | None = None  # seconds between two tokens of a text
    first_token: float | None = None  # seconds to read a prompt
    budget: float | None = None
    stay: bool = False  # prompts may not leave the house
    score: Mapping[str, float] = field(default_factory=dict)  # the least score by benchmark, in %
    exists: bool = True  # designs that are only described do not count
    day: str | None = None  # the day to judge from; None: that of data/options.yml
    # The work, and where it is done:
    gpus: int = 1
    prompt: float = 1000  # tokens
    answer: float = 200
    users: int = 1  # concurrent texts
    requests: float = 0  # a day
    reserve: float = 0.1  # share of the memory kept for runtime, activations, fragmentation
    rent: float | None = None  # dollars a card and hour; None: what data/prices.yml knows

    def __post_init__(self) -> None:
        for name in UNITS:
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, amount(name, value))
        given = {name: value for name in ("context", "rent") if (value := getattr(self, name)) is not None}
        check.above(0, prompt=self.prompt, answer=self.answer, **given)
        check.whole(1, users=self.users, gpus=self.gpus)
        check.at_least(0, requests=self.requests)
        check.below(0, 1, reserve=self.reserve)
        check.one_of((None, "api", "own"), where=self.where)
        check.one_of((None, *LICENCES), licence=self.licence)
        for kind in self.modality:
            check.one_of(MODALITIES, modality=kind)
        check.between(0, 100, **{f"score[{name!r}]": least for name, least in self.score.items()})
        if self.gpu is not None and (self.memory is None or roofline.gpu_key(self.gpu) in roofline.published_names()):
            roofline.published_roof(self.gpu)  # names the nearest of an unknown one
            object.__setattr__(self, "gpu", roofline.gpu_key(self.gpu))
            if self.memory is not None:
                raise ValueError(f"memory: got {self.memory:g} bytes and gpu {self.gpu!r}, expected one of the two")
        if self.stay and self.where == "api":
            raise ValueError("where: got 'api' for data that has to stay, expected 'own' or None")
        if self.context is not None and self.context < (length := self.prompt + self.answer):
            raise ValueError(f"context: got {self.context:g}, expected at least {length:g}, prompt and answer")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Needs:
        """From plain data, such as JSON, in which every amount has a unit. ValueError for unknown names, too."""
        known = {one.name for one in dataclasses.fields(cls)}
        for name in given.keys() - known:
            raise check.unknown("needs", name, known, "a field of Needs")
        lists = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
        with_units = {name: str(given[name]) for name in UNITS if given.get(name) is not None}
        return cls(**{**given, **lists, **with_units})

    @property
    def length(self) -> float:
        """Tokens whose keys and values one text keeps."""
        return self.prompt + self.answer if self.context is None else self.context


def amount(name: str, value: float | str) -> float:
    """A number in base units, from itself or from a text with a unit (:data:`UNITS`)."""
    if isinstance(value, str):
        units = UNITS[name]
        found = re.fullmatch(r"\s*([0-9][0-9.]*(?:e[+-]?\d+)?)\s*(\S*)\s*", value.replace(",", ""))
        if not found or found[2] not in units:
            wanted = f"a number with a unit ({', '.join(units)}), such as {EXAMPLES[name]!r}"
            raise ValueError(f"{name}: got {value!r}, expected {wanted}")
        value = float(found[1]) * units[found[2]]
    check.above(0, **{name: value})
    return float(value)
