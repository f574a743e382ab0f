"""What is asked: constraints with units, the work to be done, and how fast the machine at hand reads.

Chapter: ``chapters/scenarios/choose.ipynb``, with :mod:`dslib.scenarios.options` and :mod:`dslib.scenarios.choose`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dslib import check, roofline

MODALITIES = ("text", "image", "picture")  # reads text, reads pictures, draws pictures
LICENCES = {"permissive": 0, "commercial": 1}  # MIT or Apache-2.0; any that allows commercial use
TRUST = 0.2  # a calibration that is further off than this on another model is not used
_SIZES = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_TIMES = {"s": 1, "ms": 1e-3, "us": 1e-6, "min": 60}
_MONEY = {"$/month": 1, "$/day": 30, "$/year": 30 / 365}  # a month of 30 days
UNITS = {"memory": _SIZES, "token_time": _TIMES, "first_token": _TIMES, "budget": _MONEY}


@dataclass(frozen=True)
class Needs:
    """What has to hold (None or empty: does not matter), and the work. Numbers are in bytes, seconds, dollars a month.

    Texts with a unit do as well: ``Needs(memory="24 GB", first_token="100 ms", budget="20 $/day")``. Raises ValueError
    for a value out of range, a unit that is missing or unknown, and for constraints that contradict each other.
    """

    memory: float | None = None  # of a place of which no more is known
    gpu: str | None = None  # a card of data/hardware.yml; or the calibrated machine, together with its memory
    gpus: int = 1
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
    exists: bool = True  # designs that are only described do not count
    score: Mapping[str, float] = field(default_factory=dict)  # the least score by benchmark, in %
    day: str | None = None  # the day to judge from; None: that of data/options.yml
    # The work:
    prompt: float = 1000  # tokens
    answer: float = 200
    users: int = 1  # texts at once
    requests: float = 0  # a day
    reserve: float = 0.1  # share of the memory kept for runtime, activations, fragmentation
    rent: float | None = None  # dollars a card and hour; None: what data/prices.yml knows

    def __post_init__(self) -> None:
        for name in UNITS:
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, amount(name, value))
        check.above(0, prompt=self.prompt, answer=self.answer)
        check.whole(1, users=self.users, gpus=self.gpus)
        check.at_least(0, requests=self.requests)
        check.below(0, 1, reserve=self.reserve)
        for name, choices in (("where", ("api", "own")), ("licence", LICENCES)):
            if getattr(self, name) is not None:
                check.one_of(choices, **{name: getattr(self, name)})
        for kind in self.modality:
            check.one_of(MODALITIES, modality=kind)
        check.between(0, 100, **{f"score[{name!r}]": least for name, least in self.score.items()})
        for name in ("context", "rent"):
            if getattr(self, name) is not None:
                check.above(0, **{name: getattr(self, name)})
        if self.gpu is not None and (self.memory is None or roofline.gpu_key(self.gpu) in roofline.published_names()):
            roofline.published_roof(self.gpu)  # names the nearest of an unknown one
            object.__setattr__(self, "gpu", roofline.gpu_key(self.gpu))
            if self.memory is not None:
                raise ValueError(f"memory: got {self.memory:g} bytes and gpu {self.gpu!r}, expected one of the two")
        if self.stay and self.where == "api":
            raise ValueError("where: got 'api' for data that has to stay, expected 'own' or None")
        if self.context is not None and self.context < self.prompt + self.answer:
            raise ValueError(
                f"context: got {self.context:g}, expected at least {self.prompt + self.answer:g}, prompt and answer"
            )

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Needs:
        """From plain data, such as JSON, in which every amount has a unit. ValueError for unknown names, too."""
        known = [one.name for one in dataclasses.fields(cls)]
        for name, value in given.items():
            if name not in known:
                raise check.unknown("needs", name, known, "a field of Needs")
            if name in UNITS and value is not None and not isinstance(value, str):
                amount(name, str(value))  # raises: the unit is missing
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})

    @property
    def length(self) -> float:
        """Tokens whose keys and values one text keeps."""
        return self.prompt + self.answer if self.context is None else self.context

    def constraints(self) -> dict[str, Any]:
        """The fields that ask for something, without the work."""
        names = [one.name for one in dataclasses.fields(self)]
        names = [name for name in names[: names.index("day")] if name not in ("gpus", "exists")]
        return {name: value for name in names if (value := getattr(self, name))}

    def numbers(self) -> dict[str, float]:
        """The figures that may turn out to be others: the work, and the limits that are set."""
        names = ("requests", "users", "prompt", "answer", *UNITS, "context")
        return {name: value for name in names if (value := getattr(self, name))}


@dataclass(frozen=True)
class Calibration:
    """How fast a machine reads weights while it decodes, by format: fitted on one model, held against others."""

    machine: str
    bandwidth: float  # bytes a second that it reads at best: for the floor
    rates: Mapping[str, float]  # format -> bytes a second while decoding, of the model it was fitted on
    errors: Mapping[str, Mapping[str, float]]  # format -> other model -> predicted over measured seconds, less 1
    basis: str = "measured"

    def worst(self, fmt: str) -> float:
        """The largest error on another model; infinite where it was held against none."""
        return max((abs(error) for error in self.errors.get(fmt, {}).values()), default=float("inf"))

    def trusted(self, fmt: str) -> bool:
        """Whether the worst error is at most :data:`TRUST`."""
        return self.worst(fmt) <= TRUST


def calibrate(
    runs: Iterable[tuple[str, str, float, float]], on: str, machine: str, bandwidth: float, basis: str = "measured"
) -> Calibration:
    """Fit one rate a format on the model ``on``, and predict the other runs by it.

    ``runs`` are (model, format, bytes read a token, seconds a token). Raises ValueError without a run of ``on``.
    """
    runs = list(runs)
    for model, fmt, moved, seconds in runs:
        check.above(0, **{f"bytes of {model}, {fmt}": moved, f"seconds of {model}, {fmt}": seconds})
    check.above(0, bandwidth=bandwidth)
    rates = {fmt: moved / seconds for model, fmt, moved, seconds in runs if model == on}
    if not rates:
        raise check.unknown("on", on, {model for model, *_ in runs}, "a model among the runs")
    errors: dict[str, dict[str, float]] = {fmt: {} for fmt in rates}
    for model, fmt, moved, seconds in runs:
        if model != on and fmt in rates:
            errors[fmt][model] = moved / rates[fmt] / seconds - 1
    return Calibration(machine, bandwidth, rates, errors, basis)


def amount(name: str, value: float | str) -> float:
    """A number in base units, from itself or from a text with a unit (:data:`UNITS`)."""
    if isinstance(value, str):
        units = UNITS[name]
        found = re.fullmatch(r"\s*([0-9][0-9.]*(?:e[+-]?\d+)?)\s*(\S*)\s*", value.replace(",", ""))
        if not found or found[2] not in units:
            example = {"B": "24 GB", "s": "100 ms"}.get(next(iter(units)), "500 $/month")
            raise ValueError(
                f"{name}: got {value!r}, expected a number with a unit ({', '.join(units)}), such as {example!r}"
            )
        value = float(found[1]) * units[found[2]]
    check.above(0, **{name: value})
    return float(value)
