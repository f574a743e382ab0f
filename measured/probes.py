"""The measurements behind a machine's roof: how fast it moves bytes and multiplies matrices, at best.

The best reading counts, not the median: a bound says what the machine *can* do, and whatever else runs on it only ever
makes a reading worse. :func:`measure_roof` puts the figures together.

Chapter: ``chapters/start/your_machine.ipynb``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dslib.check import above, whole
from dslib.roofline import Roof, dtype_name
from measured.machine import as_device, describe
from measured.timing import Stopwatch, Timing, measure

if TYPE_CHECKING:
    import torch

LARGEST_PRODUCT = {"cpu": 2048, "mps": 4096, "cuda": 8192}


def copy_bandwidth(
    device: str | torch.device | None = None,
    size: int | None = None,
    max_seconds: float = 1.0,
    threads: int | None = None,
) -> float:
    """Bytes per second, read plus written, when one large buffer is copied to another.

    Args:
        size: bytes of each buffer; by default larger than the last-level cache (:func:`buffer_bytes`).
        threads: CPU threads to copy with; ``None`` for the better of all and one. On a machine that is busy with other
            things, a second thread that has to wait for its turn makes the first one wait too.

    Raises:
        ValueError: a device that is absent, a size or a number of threads below 1, no time.
    """
    here = as_device(device)
    source = _filled(size, here)
    target = source.clone()
    return 2 * source.nbytes / _best(lambda: target.copy_(source), here, max_seconds, threads)


def read_bandwidth(
    device: str | torch.device | None = None,
    size: int | None = None,
    max_seconds: float = 1.0,
    threads: int | None = None,
) -> float:
    """Bytes per second when large buffers are read and next to nothing is written; arguments as in the copy.

    Decoding does that: it reads the weights and writes one vector. The better of a sum and a dot product counts.
    """
    here = as_device(device)
    a = _filled(size, here)
    b = a.clone()
    total = _best(a.sum, here, max_seconds / 2, threads)
    both = _best(lambda: a.dot(b), here, max_seconds / 2, threads)
    return max(a.nbytes / total, 2 * a.nbytes / both)


def product_rate(
    dtype: Any, device: str | torch.device | None = None, size: int | None = None, max_seconds: float = 1.0
) -> float | None:
    """Operations per second of a square matrix product, or ``None`` where the device cannot do one in ``dtype``.

    The size doubles until a product takes long enough, because a format without hardware support can be a thousand
    times slower than its neighbour: at a fixed size that would take minutes. ``size`` fixes it, rows and columns.
    """
    import torch

    here, side, best = as_device(device), 128 if size is None else size, None
    whole(1, size=side)
    while True:
        pair = _pair(side, dtype, here)
        if pair is None:
            return None
        for product in _products(*pair):
            # A format whose products are slow gets no budget beyond the fewest calls.
            seconds = _best(product, here, max_seconds / 8, torch.get_num_threads())
            best = max(best or 0.0, 2 * side**3 / seconds)
        # The next size needs eight times as long, and at least four calls.
        if size or side >= LARGEST_PRODUCT[here.type] or 32 * seconds > max_seconds:
            return best
        side *= 2


def launch_gap(side: int = 8192, rounds: int = 9) -> dict[str, Timing]:
    """When a matrix product on the best device *returns*, and when it is *finished*: on a GPU these differ."""
    here = as_device()
    pair = _pair(side, "float16" if here.type == "cuda" else "float32", here)
    returned, finished = [], []
    for _ in range(rounds + 2):
        watch = Stopwatch(here)
        product = pair[0] @ pair[1]
        returned.append(watch.lap(wait=False))
        finished.append(watch.lap())
        del product
    # The first two rounds warm up.
    return {"call returned": Timing(tuple(returned[2:])), "work finished": Timing(tuple(finished[2:]))}


@contextmanager
def peak_memory(device: str | torch.device | None = None) -> Iterator[dict[str, int | None]]:
    """Afterwards the mapping's ``"bytes"`` is the most that tensors took on a CUDA device meanwhile; elsewhere None."""
    import torch

    here, found = as_device(device), {"bytes": None}
    if here.type == "cuda":
        torch.cuda.reset_peak_memory_stats(here)
    yield found
    if here.type == "cuda":
        found["bytes"] = torch.cuda.max_memory_allocated(here)


def buffer_bytes(device: str | torch.device | None = None) -> int:
    """A buffer large enough to have to come from memory: eight times the last-level cache, 256 MiB at least.

    Never more than a sixteenth of the memory, so that the three buffers of a measurement fit beside a model.
    """
    machine = describe(device)
    wanted = max(256 * 2**20, 8 * (machine.cache_bytes or 0))
    return min(wanted, machine.memory_bytes // 16) if machine.memory_bytes else wanted


def _best(fn: Callable[[], Any], device: torch.device, max_seconds: float, threads: int | None = None) -> float:
    """The shortest time of a call, looked for until the budget ends: readings may agree and all be disturbed.

    PyTorch's number of threads is as before afterwards.
    """
    import torch

    above(0, max_seconds=max_seconds)
    before, times = torch.get_num_threads(), []
    counts = [before] if device.type != "cpu" else [before, 1] if threads is None else [threads]
    limits = {"max_seconds": max_seconds / len(counts), "min_runs": 2, "max_runs": 300}
    try:
        for count in counts:
            whole(1, threads=count)
            torch.set_num_threads(count)
            times.append(measure(fn, device=device, warmup=1, target_spread=1e-9, **limits).best)
    finally:
        torch.set_num_threads(before)
    return min(times)


def _filled(size: int | None, device: torch.device) -> torch.Tensor:
    """A float32 buffer of ``size`` bytes (None: :func:`buffer_bytes`) that has been written.

    Memory that was asked for but never written has no pages of its own: every read of it is served from one shared page
    of zeros, which sits in the cache, and the bandwidth comes out too good to be true.
    """
    import torch

    size = buffer_bytes(device) if size is None else size
    whole(1, size=size)
    return torch.ones(max(1, size // 4), dtype=torch.float32, device=device)


def _pair(side: int, dtype: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Two square matrices, or ``None`` where the device has no product for them."""
    import torch

    kind = getattr(torch, dtype_name(dtype), None)
    if kind is None:
        return None
    generator = torch.Generator().manual_seed(0)
    try:
        a, b = (torch.randn(side, side, generator=generator).to(device, kind) for _ in range(2))
        a @ b
    except (RuntimeError, TypeError):
        return None
    return a, b


def _products(a: torch.Tensor, b: torch.Tensor) -> list[Callable[[], Any]]:
    """The ways to multiply ``a`` and ``b`` that this build of PyTorch offers.

    On a CPU a float32 product goes to MKL, which is slow on some processors; oneDNN, which PyTorch brings too, can be
    more than twice as fast. The roof is the better one.
    """
    import torch

    ways: list[Callable[[], Any]] = [lambda: a @ b]
    if a.device.type == "cpu" and a.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
        if linear is not None:
            ways.append(lambda: linear(a, b, None, "none", [], ""))
    return ways


def measure_roof(
    device: str | torch.device | None = None, dtypes: Sequence[Any] = ("float32", "bfloat16"), max_seconds: float = 1.0
) -> Roof:
    """Measure what this machine can do at best: copy and read bandwidth, and the matrix product in each format.

    See :mod:`measured.probes` for how. Takes about ``max_seconds`` for each of the figures.

    Args:
        dtypes: number formats to try; one in which the device cannot multiply is left out.
    """
    here = as_device(device)
    rates = {dtype_name(dtype): product_rate(dtype, here, max_seconds=max_seconds) for dtype in dtypes}
    machine, copied = describe(here), copy_bandwidth(here, max_seconds=max_seconds)
    return Roof(
        name=machine.name,
        bandwidth=copied,
        # What a memory moves both ways it can also move one way; a busy moment may have hidden it.
        read_bandwidth=max(copied, read_bandwidth(here, max_seconds=max_seconds)),
        flops={name: rate for name, rate in rates.items() if rate},
        memory_bytes=machine.memory_bytes,
        source="measured here",
    )


def roof_figures(
    dtypes: Sequence[str] = ("float32", "bfloat16", "float16"), max_seconds: float = 1.0
) -> dict[str, float]:
    """:func:`measure_roof` on the best device as plain data, for a recording: GB/s and TFLOP/s."""
    roof = measure_roof(dtypes=dtypes, max_seconds=max_seconds)
    figures = {"copy, GB/s": roof.bandwidth / 1e9, "read, GB/s": roof.read_bandwidth / 1e9}
    return figures | {f"matrix product in {dtype}, TFLOP/s": rate / 1e12 for dtype, rate in roof.flops.items()}
