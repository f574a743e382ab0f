"""Loops of our own in C++, compiled at the first use and kept: for what torch has no quick product for.

The files are plain C++ and know nothing of torch, so that compiling takes a second. They are called through ``ctypes``
with the addresses of tensors, which nobody checks: the caller does. Threads are torch's own: the file is compiled for
OpenMP and finds its functions in the copy that torch has loaded, as two copies would fight over the cores.
"""

import ctypes
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

LIBRARIES = Path(torch.__file__).parent / "lib"
FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-Wno-psabi"]
THREADS = {  # not tried on macOS: no such machine was at hand
    "linux": "-fopenmp -nodefaultlibs -Wl,--no-as-needed -ltorch_cpu -lstdc++ -lm -lc -lgcc".split(),
    "darwin": "-Xpreprocessor -fopenmp -undefined dynamic_lookup".split(),
}


class NotCompiled(Exception):
    """Why there is no library."""


@cache
def load(source: Path) -> ctypes.CDLL | NotCompiled:
    """The compiled file, or why there is none: no compiler, or what the compiler says."""
    compiler, flags = os.environ.get("CXX", "c++"), [*FLAGS, *THREADS.get(sys.platform, [])]
    texts = [source, *sorted(Path(__file__).parent.glob("*.h"))]
    made_of = (
        b"".join(text.read_bytes() for text in texts)
        + " ".join([torch.__version__, platform.machine(), compiler, *flags]).encode()
    )
    name = f"{source.stem}-{hashlib.sha256(made_of).hexdigest()[:16]}.so"
    try:
        folder = Path(torch.hub.get_dir()) / "dslib"
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / name).exists():
            with tempfile.TemporaryDirectory(dir=folder) as own:  # whole or not at all, whoever else compiles it now
                _run([compiler, str(source), "-o", f"{own}/{name}", f"-L{LIBRARIES}", *flags])
                os.replace(f"{own}/{name}", folder / name)
        return ctypes.CDLL(str(folder / name))
    except OSError as error:
        return NotCompiled(f"cannot be compiled: {error}")


def function(source: Path, name: str, addresses: int, numbers: int) -> ctypes._CFuncPtr:
    """A function of the compiled file that takes so many addresses, then so many whole numbers, and returns nothing."""
    found = getattr(load(source), name)
    found.argtypes, found.restype = [ctypes.c_void_p] * addresses + [ctypes.c_int64] * numbers, None
    return found


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError((done.stderr.strip().splitlines() or ["no message"])[-1])
