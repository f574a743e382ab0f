"""A few rows times a weight matrix, at the speed at which memory gives the weights.

What torch calls for that is on a CPU a routine with one thread (see :mod:`dslib.fast.linear`), or one that prepares for
many rows. ``strip`` in ``rows.cpp`` is ten lines, on all threads, and reads up to twice as fast (see the chapter).

Book: ``chapters/performance/speed.ipynb``, section "Where the time of one token goes".
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from dslib.fast.kernels import compiled

SOURCE = Path(__file__).with_suffix(".cpp")
# Up to so many rows it is the quickest there is; with bf16 units in the processor, torch soon is.
FEW = {torch.float32: 8, torch.bfloat16: 4}
FUNCTIONS = {torch.float32: "rows_float32", torch.bfloat16: "rows_bfloat16"}
KINDS = {"widest": 0, "plain": 1, "avx2": 2}  # of loops; the last two are for tests


def why_not(weight: Tensor) -> str | None:
    """Why there is no product with these weights; None if there is. The first call compiles, in about a second."""
    if weight.device.type != "cpu":
        return f"is on {weight.device.type}"
    if weight.dtype not in FUNCTIONS:
        return f"is in {weight.dtype}, expected torch.float32 or torch.bfloat16"
    if weight.ndim != 2 or not weight.is_contiguous():
        return f"has strides {weight.stride()}, expected rows one after another"
    return str(found) if isinstance(found := compiled.load(SOURCE), compiled.NotCompiled) else None


def few_rows(x: Tensor, weight: Tensor, kind: str = "widest") -> Tensor:
    """``x Wᵀ``: (N, in_features) times (out_features, in_features) -> (N, out_features); sums are in float32.

    For where :func:`why_not` is None and no gradient is recorded. What is wrong about shapes and dtypes would not be
    noticed below, so it is refused here.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    if x.ndim != 2 or x.shape[1] != weight.shape[1] or x.dtype is not weight.dtype or x.device.type != "cpu":
        wanted = f"(N, {weight.shape[1]}) in {weight.dtype} on cpu"
        raise ValueError(f"x: got {tuple(x.shape)} in {x.dtype} on {x.device}, expected {wanted}")
    return multiplier(weight, kind)(x)


def multiplier(weight: Tensor, kind: str = "widest") -> Callable[[Tensor], Tensor]:
    """:func:`few_rows` by one matrix without its checks, for loops that count microseconds: (N, in) -> (N, out)."""
    out, columns = weight.shape
    multiply, address, which = _function(weight.dtype), weight.data_ptr(), KINDS[kind]

    def product(x: Tensor) -> Tensor:
        x, y = x.contiguous(), x.new_empty(len(x), out)
        multiply(x.data_ptr(), address, y.data_ptr(), len(x), columns, out, which)
        return y

    product.weight = weight  # its memory has to stay
    return product


@cache
def _function(dtype: torch.dtype):
    return compiled.function(SOURCE, FUNCTIONS[dtype], addresses=3, numbers=4)
