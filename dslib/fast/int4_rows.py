"""One row, or a few, times 4-bit weights: products that torch does not have, compiled at the first use.

*The row as it is.* torch's packed product reads our order of codes on CPUs with AVX-512 only. Elsewhere
``int4_product`` does the work: a code becomes a float in a register, next to the multiplication, in float32.

*The row in eight bits.* Turning every code into a float takes longer than reading it. If a row is integers too, codes
and inputs can be multiplied as they are, and what remains is to read the weights. ONNX Runtime calls this "accuracy
level 4". The price is an error of about 0.6 %, next to about 8 % that the four bits cost and 0.25 % of activations in
bfloat16.

Both are in ``int4_rows.cpp``. Compiling takes about twenty seconds and needs a C++ compiler; the result is kept in
torch's cache folder. :func:`plain` is the arithmetic of the second in torch, and what the tests hold it against.

Book: ``chapters/architecture/int4.ipynb``, section "How fast".
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dslib.architecture.int4.levels import BLOCK, unpack

SOURCE = Path(__file__).with_suffix(".cpp")
FEW = 4  # rows; each goes through the weights by itself, so that more are faster in torch's product
# Without -fopenmp, at::parallel_for runs on one thread. It is not linked: torch brings the threads it uses itself.
FLAGS = ["-O3", "-fopenmp"]


def plain(rows: Tensor, packed: Tensor, pairs: Tensor, group_size: int) -> Tensor:
    """What the compiled product computes, step by step: ``rows Wᵀ`` with rows rounded to eight bits in each group.

    (N, in) float32 or bfloat16, codes as from ``pack``, (groups, out, 2) scales and zeros -> (N, out), in the dtype of
    ``rows``. The zeros are multiplied by sums of the rows before rounding.
    """
    groups = rows.float().unflatten(1, (-1, group_size))  # (N, groups, group_size)
    largest = groups.abs().amax(-1, keepdim=True)
    codes = torch.where(largest > 0, groups * (127 / largest), 0.0).round()  # -127 to 127
    scales, zeros = pairs.float().transpose(0, 1).unbind(-1)  # (out, groups)
    weights = (unpack(packed).float().unflatten(1, (-1, group_size)) - 8) * scales.unsqueeze(-1)
    y = F.linear((codes * (largest / 127)).flatten(1), weights.flatten(1)) + F.linear(groups.sum(-1), zeros)
    return y.to(rows.dtype)


def why_not(packed: Tensor, group_size: int) -> str | None:
    """Why rows in eight bits cannot be multiplied by these weights; None if they can. The first call may compile."""
    if packed.device.type != "cpu":
        return f"device {packed.device.type!r} has no product of ours, expected 'cpu'"
    if len(packed) % BLOCK or group_size % 4:
        return f"{len(packed)} rows in groups of {group_size}, expected multiples of {BLOCK} and 4"
    reason = compiled()
    if reason is None and not torch.ops.dslib.int4_rows_supported():
        return "this CPU has neither AVX-512 with VNNI nor AVX2, which rows in eight bits need"
    return reason


@cache
def compiled() -> str | None:
    """Compile and load the products, if that was not done before; why that is not possible, or None."""
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join([torch.__version__, *FLAGS]).encode()).hexdigest()[:16]
    library = Path(torch.hub.get_dir()) / f"dslib-int4-rows-{key}.so"
    try:
        if not library.exists():
            _compile(library)
        torch.ops.load_library(library)
    except (ImportError, OSError, RuntimeError) as error:
        return f"our 4-bit products cannot be compiled: {str(error).strip().splitlines()[0]}"
    return None


def product() -> Callable[[Tensor, Tensor, Tensor, int], Tensor]:
    """``product()(rows, packed, pairs, group_size)``: rows as they are, for where :func:`compiled` is None."""
    return torch.ops.dslib.int4_product.default


def rounded_product() -> Callable[[Tensor, Tensor, Tensor, int], Tensor]:
    """The same with rows in eight bits, for where :func:`why_not` is None."""
    return torch.ops.dslib.int4_rows.default


def _compile(library: Path) -> None:
    """Compile, in a process of its own: torch loads what it compiles, and one process must not load two copies."""
    import ninja

    with tempfile.TemporaryDirectory() as folder:
        options = {"extra_cflags": FLAGS, "build_directory": folder, "is_python_module": False}
        load = f"cpp_extension.load('dslib_int4_rows', [{str(SOURCE)!r}], **{options!r})"
        # torch calls ninja by its name, but a Python called by its full path does not have its own folder in PATH.
        environment = os.environ | {"PATH": os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])}
        run = [sys.executable, "-c", f"from torch.utils import cpp_extension; {load}"]
        done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
        made = next(Path(folder).glob("*.so"))
        library.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(made, part := library.with_suffix(f".{os.getpid()}"))
        part.replace(library)  # processes that compile at the same time need not wait for each other
