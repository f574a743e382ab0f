"""The roofline: the least time a piece of work can take on a machine, and which of two bounds sets it.

Work has to move its bytes and to do its operations. A machine moves at most ``bandwidth`` bytes per second and does at
most ``flops`` operations per second, so the work takes at least the longer of the two times. Operations per byte, the
*arithmetic intensity*, decide which it is; they are equal at the machine's *ridge*. (Williams, Waterman and Patterson,
2009.)

Units are SI throughout: bytes, bytes per second, operations per second, seconds. A multiplication and an addition are
two operations.

Arithmetic only: what a machine really does is measured by :mod:`measured.probes`.

Chapter: ``chapters/start/your_machine.ipynb``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dslib import check
from dslib.data.files import read_yaml
from dslib.html import html_table

# Bytes of one number. Four-bit formats pack two to a byte.
NUMBER_BYTES = {"float32": 4, "tfloat32": 4, "bfloat16": 2, "float16": 2, "float8": 1, "int8": 1, "int4": 0.5}


@dataclass(frozen=True)
class Roof:
    """What a machine can do at best. Raises ``ValueError`` for a figure that is none (NaN, negative)."""

    name: str
    bandwidth: float  # bytes read plus bytes written per second
    flops: Mapping[str, float]  # operations per second of a matrix product, by number format
    memory_bytes: float  # what fits
    source: str  # where the numbers come from
    read_bandwidth: float | None = None  # when nothing is written, as in decoding; None where it is the same figure

    def __post_init__(self) -> None:
        check.above(0, bandwidth=self.bandwidth, **{f"flops[{dtype!r}]": rate for dtype, rate in self.flops.items()})
        check.at_least(0, memory_bytes=self.memory_bytes)
        if self.read_bandwidth is not None:
            check.above(0, read_bandwidth=self.read_bandwidth)

    def rate(self, dtype: Any) -> float:
        """Operations per second in ``dtype``. Raises ``ValueError`` for a format this machine has no rate for."""
        name = dtype_name(dtype)
        if name not in self.flops:
            raise ValueError(f"dtype: got {name!r}, expected one that {self.name} has: {', '.join(self.flops)}")
        return self.flops[name]

    def ridge(self, dtype: Any) -> float:
        """Operations per byte from which on the arithmetic, not the memory, is the bound."""
        return self.rate(dtype) / self.bandwidth

    def rows(self) -> list[tuple[str, str]]:
        """Label and text of each figure."""
        lines = [("bandwidth, read and write", f"{self.bandwidth / 1e9:.3g} GB/s")]
        if self.read_bandwidth:
            lines.append(("bandwidth, read only", f"{self.read_bandwidth / 1e9:.3g} GB/s"))
        return lines + [(f"matrix product, {dtype}", _speed(rate)) for dtype, rate in self.flops.items()]

    def _repr_html_(self) -> str:
        return html_table(f"{self.name} ({self.source})", self.rows())

    def _repr_markdown_(self) -> str:
        body = "\n".join(f"| {label} | {text} |" for label, text in self.rows())
        return f"| {self.name} ({self.source}) | |\n|---|---|\n{body}"


@dataclass(frozen=True)
class Workload:
    """Bytes to move and operations to do. ``dtype`` is the number format of the arithmetic."""

    name: str
    bytes: float
    flops: float
    dtype: str

    def __post_init__(self) -> None:
        check.above(0, bytes=self.bytes)
        check.at_least(0, flops=self.flops)
        object.__setattr__(self, "dtype", dtype_name(self.dtype))

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flops / self.bytes


@dataclass(frozen=True)
class Placement:
    """A workload on a roof: the least ``seconds`` it takes, the ``bound`` that says so, and how far from the ridge."""

    workload: Workload
    roof: Roof
    seconds: float
    bound: str  # "bandwidth" or "compute"
    intensity: float
    ridge: float

    def fraction(self, measured: float) -> float:
        """Which part of the bound a run of ``measured`` seconds reached: 1.0 is the roof itself."""
        check.above(0, measured=measured)
        return self.seconds / measured


@dataclass(frozen=True)
class DecoderShape:
    """The few numbers of a decoder-only transformer that decide its traffic and its arithmetic."""

    name: str
    parameters: float  # number of weights, each read once per pass
    layers: int
    hidden: int  # width of the residual stream
    kv_width: int  # numbers in a layer's keys for one token (key-value heads times head size); values have as many

    def __post_init__(self) -> None:
        check.above(0, parameters=self.parameters, layers=self.layers, hidden=self.hidden, kv_width=self.kv_width)

    def kv_bytes(self, tokens: float, dtype: Any = "float16") -> float:
        """Bytes of the keys and values of ``tokens`` tokens."""
        check.at_least(0, tokens=tokens)
        return 2 * self.layers * self.kv_width * NUMBER_BYTES[dtype_name(dtype)] * tokens

    def weight_bytes(self, dtype: Any = "float16") -> float:
        """Bytes of the weights stored in ``dtype``, without the scales that 4- and 8-bit formats add."""
        return self.parameters * NUMBER_BYTES[dtype_name(dtype)]

    def decode(self, context: int, batch: int = 1, dtype: Any = "float16", weights: Any = None) -> Workload:
        """One step that gives each of ``batch`` sequences its next token, each after ``context`` tokens.

        ``dtype`` is the format of the arithmetic and of the cache, ``weights`` that of the stored weights (None: both).
        """
        return self._pass("decode", batch, 1, context, dtype, weights)

    def prefill(self, prompt: int, batch: int = 1, dtype: Any = "float16", weights: Any = None) -> Workload:
        """One pass over a prompt of ``prompt`` tokens for each of ``batch`` sequences; formats as in :meth:`decode`."""
        return self._pass("prefill", batch, prompt, 0, dtype, weights)

    def _pass(self, kind: str, batch: int, new: int, context: int, dtype: Any, weights: Any) -> Workload:
        check.above(0, batch=batch, prompt=new)
        check.at_least(0, context=context)
        name = dtype_name(dtype)
        # Weights once for everybody, keys and values for each sequence by itself. Activations are left out: they are
        # small beside the weights and mostly stay in cache.
        moved = self.weight_bytes(weights or name) + batch * self.kv_bytes(context + new, name)
        # Two operations per weight and token; in attention four per width and pair of tokens (scores, then values),
        # where a causal mask leaves a new token the context, its predecessors and itself.
        pairs = new * context + new * (new + 1) / 2
        work = batch * (2 * self.parameters * new + 4 * self.layers * self.hidden * pairs)
        return Workload(f"{kind}, batch {batch}", moved, work, name)


CODER_1_3B = DecoderShape("1.3B decoder (shape of deepseek-coder-1.3b)", 1.3e9, layers=24, hidden=2048, kv_width=2048)


def matmul(m: int, k: int, n: int, dtype: Any) -> Workload:
    """The product of an (m, k) and a (k, n) matrix, each read once from memory, the result written once."""
    check.above(0, m=m, k=k, n=n)
    moved = NUMBER_BYTES[dtype_name(dtype)] * (m * k + k * n + m * n)
    return Workload(f"({m}, {k}) @ ({k}, {n})", moved, 2 * m * k * n, dtype_name(dtype))


def place(workload: Workload, roof: Roof) -> Placement:
    """The least time of a workload on a roof, and the bound that sets it. ``ValueError`` as of :meth:`Roof.rate`."""
    moving, working = workload.bytes / roof.bandwidth, workload.flops / roof.rate(workload.dtype)
    bound = "compute" if working >= moving else "bandwidth"
    return Placement(workload, roof, max(moving, working), bound, workload.intensity, roof.ridge(workload.dtype))


def decode_floor(weight_bytes: float, roof: Roof, tokens: int = 1) -> float:
    """Least seconds to generate ``tokens`` tokens one after another: every weight is read once for each.

    Keys, values and activations come on top, so this is a floor for any context. It uses the read-only bandwidth where
    the roof has one.
    """
    check.above(0, weight_bytes=weight_bytes, tokens=tokens)
    return tokens * weight_bytes / (roof.read_bandwidth or roof.bandwidth)


def published_roof(name: str) -> Roof:
    """The published peaks of a GPU in ``data/hardware.yml``, e.g. ``"A100_80GB"``. No program reaches them.

    Raises:
        ValueError: unknown GPU (with the nearest names), or a row that lacks a number (with file, row and field).
    """
    rows, key = _hardware(), gpu_key(name)
    if key not in rows:
        raise check.unknown("name", name, rows, "a GPU of hardware.yml")
    row, where = rows[key], f"hardware.yml row {key!r}, field"
    rates = row.get("tflops") or {}
    if not isinstance(rates, dict):
        raise ValueError(f"{where} 'tflops': got {rates!r}, expected a mapping from number format to TFLOP/s")
    rates = {dtype: rate for dtype, rate in rates.items() if rate is not None and rate != 0}
    fields = {field: row.get(field) for field in ("bandwidth_gb_s", "memory_gb")} | rates
    check.above(0, **{f"{where} {field!r}": value for field, value in fields.items()})
    flops = {dtype: float(rate) * 1e12 for dtype, rate in rates.items()}
    bandwidth, memory = row["bandwidth_gb_s"] * 1e9, row["memory_gb"] * 1e9
    return Roof(row.get("name", key), bandwidth, flops, memory, source="published peak")


def published_names() -> list[str]:
    """The GPUs that :func:`published_roof` knows."""
    return list(_hardware())


def gpu_key(name: str) -> str:
    """A GPU's name as the tables of ``data/`` write it: ``"a100 80gb"`` as ``"A100_80GB"``."""
    return str(name).upper().replace(" ", "_").replace("-", "_")


def _speed(rate: float) -> str:
    return f"{rate / 1e12:.3g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.3g} GFLOP/s"


def _hardware() -> dict[str, dict[str, Any]]:
    document = read_yaml("hardware.yml")
    rows = document.get("gpus") if isinstance(document, dict) else None
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise ValueError(f"hardware.yml field 'gpus': got {rows!r}, expected a mapping from GPU to its numbers")
    return rows


def dtype_name(dtype: Any) -> str:
    """``"float16"`` for ``torch.float16`` and ``"float16"`` alike. Raises ``ValueError`` for an unknown format."""
    name = str(dtype).removeprefix("torch.")
    name = "float8" if name.startswith("float8_") else name
    check.one_of(NUMBER_BYTES, dtype=name)
    return name
