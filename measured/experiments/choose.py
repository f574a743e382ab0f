"""How fast this machine decodes small models in 32 and in 4 bits, and the line that choosing is calibrated by.

Book: ``chapters/scenarios/choose.ipynb``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dslib import check, fast
from dslib.architecture.decoder import DecoderConfig, build
from dslib.architecture.int4.layers import quantize_
from dslib.performance.speed import bytes_per_token
from dslib.scenarios.facts import Span
from measured.experiments.speed import design, latency
from measured.probes import read_bandwidth

FORMATS = ("float32", "int4")
GROUP = 32  # weights that share a scale
READ = 256 << 20  # bytes
TRUST = 0.2  # a fit that is further off than this is not used
_DENSE = design("V1", "30m")
# Larger than most caches. What the line is fitted on comes in three depths; the second has smaller layers, and more.
MODELS = {
    "dense": [replace(_DENSE, num_hidden_layers=layers) for layers in (1, 2, 4)],
    "dense, narrow and deep": [DecoderConfig(8192, 256, 704, 12, 4, 4)],
    "mixture": [replace(design("V3", "30m"), num_hidden_layers=2)],
}


def off(error: float) -> float:
    """An error, too high or too low alike: 0.25 for a prediction that is a quarter too high, or a fifth too low."""
    return max(1 + error, 1 / (1 + error)) - 1


@dataclass(frozen=True)
class Fit:
    """Seconds of a step = ``start`` + bytes / ``rate``, fitted on steps that read ``reach`` bytes (least and most).

    ``errors``: of each run that the line was not fitted on, its name and predicted over measured seconds, less 1.
    """

    start: float
    rate: float
    reach: tuple[float, float]
    errors: Sequence[tuple[str, float]] = ()

    def seconds(self, moved: float) -> float:
        """Of a step that reads ``moved`` bytes."""
        return self.start + moved / self.rate

    @property
    def off(self) -> float:
        """The worst of the errors, as :func:`off` counts them; infinite for none."""
        return max((off(error) for _, error in self.errors), default=math.inf)


@dataclass(frozen=True)
class Calibration:
    """A line for each number format, and the bytes a second that the machine reads at best, for the floor."""

    machine: str
    bandwidth: float
    fits: Mapping[str, Fit]
    basis: str = "measured"

    def step(self, fmt: str, read: Span, floor: Span) -> Span:
        """Seconds of a step that reads ``read`` bytes: by the line where it may be trusted, else the floor and why."""
        fit = self.fits.get(fmt)
        if fit is None or not read.known:
            return floor
        if fit.off > TRUST:
            why = f"off by {fit.off:.0%}" if math.isfinite(fit.off) else "held against no other run"
        elif fit.reach[0] <= read.low and read.high <= fit.reach[1]:
            low, high = fit.seconds(read.low) / (1 + fit.off), fit.seconds(read.high) * (1 + fit.off)
            text = (
                f"{read.formula} read at {fit.rate / 1e9:,.4g} GB/s after {1e3 * fit.start:.3g} ms, {fit.off:.0%} off"
            )
            return Span(low, high, text, read.source, self.basis)
        else:
            why = f"of {fit.reach[0] / 1e9:.3g} to {fit.reach[1] / 1e9:.3g} GB a step"
        return replace(floor, formula=f"{floor.formula}; the calibration is {why}: not to be trusted here")


def line(runs: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Start and seconds a byte of ``(bytes, seconds)``: least squares of relative errors, neither below 0."""
    from scipy.optimize import nnls

    runs = list(runs)
    found, _ = nnls([[1 / seconds, moved / seconds] for moved, seconds in runs], [1.0] * len(runs))
    return float(found[0]), float(found[1])


def calibrate(
    runs: Iterable[tuple[str, str, float, float]], on: str, machine: str, bandwidth: float, basis: str = "measured"
) -> Calibration:
    """Fit one line a format on the model ``on``; hold it against the other models, and against each of its own runs.

    ``runs`` are (model, format, bytes read a step, seconds a step). Of three runs of ``on`` or more each is also
    predicted by a line through the others. Raises ValueError for fewer than two runs of ``on`` in any format, and for
    times and bytes that are not above 0.
    """
    runs = list(runs)
    for model, fmt, moved, seconds in runs:
        check.above(0, **{f"bytes of {model}, {fmt}": moved, f"seconds of {model}, {fmt}": seconds})
    check.above(0, bandwidth=bandwidth)
    formats = dict.fromkeys(fmt for model, fmt, *_ in runs if model == on)
    if not formats:
        raise check.unknown("on", on, {model for model, *_ in runs}, "a model among the runs")
    fits = {}
    for fmt in formats:
        own = [(moved, seconds) for model, kind, moved, seconds in runs if (model, kind) == (on, fmt)]
        check.whole(2, **{f"runs of {on}, {fmt}": len({moved for moved, _ in own})})
        fit = _fit(own)
        errors = [
            (model, fit.seconds(moved) / seconds - 1) for model, kind, moved, seconds in runs
            if kind == fmt and model != on
        ]  # fmt: skip
        for number, (moved, seconds) in enumerate(own if len(own) > 2 else []):
            left = _fit(own[:number] + own[number + 1 :])
            errors.append((f"{on}, left out", left.seconds(moved) / seconds - 1))
        fits[fmt] = replace(fit, errors=errors)
    return Calibration(machine, bandwidth, fits, basis)


def _fit(own: Sequence[tuple[float, float]]) -> Fit:
    start, a_byte = line(own)
    moved = [one for one, _ in own]
    return Fit(start, 1 / a_byte if a_byte else math.inf, (min(moved), max(moved)))


def decode_runs(
    models: Mapping[str, Sequence[DecoderConfig]] = MODELS, prompt_tokens: int = 16, new_tokens: int = 8,
    runs: int = 2, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Decode one text with random weights on the processor, each configuration in each of :data:`FORMATS`.

    Returns:
        ``bandwidth``: bytes a second that a plain read reaches; ``runs``: one mapping each, with ``model``, ``format``,
        ``bytes`` that a token reads and ``seconds`` a token (a Timing).
    """
    rows = []
    for name, config in ((name, config) for name, configs in models.items() for config in configs):
        for fmt in FORMATS:
            model = build(config, seed=seed, dtype=torch.float32).eval()
            if fmt == "int4":
                fast.prepare(quantize_(model, GROUP, skip=("lm_head",)))
            timing = latency(model, prompt_tokens, new_tokens, runs=runs, seed=seed)["per_token"]
            moved = bytes_per_token(model, prompt_tokens + new_tokens // 2)
            rows.append({"model": name, "format": fmt, "bytes": moved, "seconds": timing})
    return {"bandwidth": read_bandwidth("cpu", size=READ, max_seconds=0.2), "runs": rows}
