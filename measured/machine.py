"""Which machine this is: the device to compute on, and the words with which a page names it.

Chapter: ``chapters/start/your_machine.ipynb``.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from dslib.html import html_table

if TYPE_CHECKING:
    import torch

KINDS = ("cuda", "mps", "cpu")
# Instruction sets that decide which matrix kernels a CPU runs, the newest first, by the flag in /proc/cpuinfo.
INSTRUCTION_SETS = {
    "amx_tile": "AMX", "avx512_bf16": "AVX-512 BF16", "avx512_vnni": "AVX-512 VNNI", "avx512f": "AVX-512",
}  # fmt: skip


def best_device() -> torch.device:
    """The fastest device PyTorch can use here: CUDA, else Apple's MPS, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def as_device(device: str | torch.device | None = None) -> torch.device:
    """``None`` becomes :func:`best_device`; a name becomes a ``torch.device`` that is present on this machine.

    Raises:
        ValueError: a name PyTorch does not know, a kind this project does not use, or a device that is absent.
    """
    import torch

    if device is None:
        return best_device()
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError):
        wanted = None
    if wanted is None or wanted.type not in KINDS:
        raise ValueError(f"device: got {device!r}, wanted one of {', '.join(KINDS)} (or e.g. 'cuda:1')")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: got {device!r}, wanted one that is here; CUDA devices: {torch.cuda.device_count()}")
    if wanted.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device: got {device!r}, wanted one that is here; this machine has no MPS device")
    return wanted


def synchronize(device: str | torch.device | None = None) -> None:
    """Wait until the device has finished what it was given. The CPU has always finished.

    ``None`` waits for every accelerator this process has used so far, and starts none.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return
    if device is not None:
        used = [as_device(device)]
    elif torch.cuda.is_available() and torch.cuda.is_initialized():
        used = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    else:
        used = [torch.device("mps")] if torch.backends.mps.is_available() else []
    for one in used:
        if one.type == "cuda":
            torch.cuda.synchronize(one)
        elif one.type == "mps":
            torch.mps.synchronize()


@dataclass(frozen=True)
class Machine:
    """What a page has to say about the machine a number comes from; None is what the system does not tell.

    Cloud machines name generations of a chip alike; ``isa``, the newest of ``INSTRUCTION_SETS`` that a CPU has (None
    for AVX2 or less), tells them apart.
    """

    kind: str  # "cuda", "mps" or "cpu"
    name: str  # the chip's own, e.g. "NVIDIA A100-SXM4-80GB"
    cores: int  # CPU cores this process may use
    threads: int  # that PyTorch computes with on the CPU
    memory_bytes: int  # of the device; for a CPU, the machine's
    cache_bytes: int | None  # of the last level
    python: str
    torch: str
    transformers: str | None
    cuda: str | None = None  # version of the runtime PyTorch was built for
    driver: str | None = None
    isa: str | None = None

    def slug(self) -> str:
        """A file name for this machine: the chip, and for a CPU what changes its speed: instruction set and cores."""
        name = re.sub(r"\((r|tm)\)|\b(processor|cpu)\b|@.*", " ", self.name.lower())
        words = re.sub(r"[^a-z0-9]+", "-", name).strip("-") or "unknown"
        if self.kind == "cuda":
            return words
        isa = [self.isa.lower().replace("-", "").replace(" ", "-")] if self.isa else []  # avx512-bf16
        return "-".join([words, *isa, f"{self.cores}-cores"])

    def versions(self) -> dict[str, str]:
        """The versions that decide a result, without the unknown ones."""
        found = {"python": self.python, "torch": self.torch, "transformers": self.transformers}
        found |= {"cuda": self.cuda, "driver": self.driver}
        return {name: version for name, version in found.items() if version}

    def rows(self) -> list[tuple[str, str]]:
        """Label and text of each line the page shows."""
        kinds = {"cuda": "NVIDIA GPU (CUDA)", "mps": "Apple GPU (MPS)", "cpu": "CPU"}
        lines = [("device", kinds[self.kind]), ("name", self.name), ("CPU cores", str(self.cores))]
        lines += [("instruction set", self.isa)] if self.isa else []
        lines += [("CPU threads used", str(self.threads)), ("memory", f"{self.memory_bytes / 1e9:.1f} GB")]
        if self.cache_bytes:
            lines.append(("last-level cache", f"{self.cache_bytes / 2**20:.0f} MiB"))
        return lines + list(self.versions().items())

    def _repr_html_(self) -> str:
        return html_table("This machine", self.rows())

    def _repr_markdown_(self) -> str:
        body = "\n".join(f"| {label} | {text} |" for label, text in self.rows())
        return f"| this machine | |\n|---|---|\n{body}"

    def __str__(self) -> str:
        return f"{self.name}, {self.cores} cores, torch {self.torch}"


def describe(device: str | torch.device | None = None) -> Machine:
    """Describe this machine as seen from ``device`` (default: the best one), which :func:`as_device` looks up."""
    import torch

    chosen = as_device(device)
    name, memory, last_level = cpu_name(), cpu_memory(), cpu_cache()
    if chosen.type == "cuda":
        properties = torch.cuda.get_device_properties(chosen)
        name, memory = properties.name, properties.total_memory
        last_level = getattr(properties, "L2_cache_size", None)
    return Machine(
        kind=chosen.type,
        name=name,
        cores=usable_cores(),
        threads=torch.get_num_threads(),
        memory_bytes=memory,
        cache_bytes=last_level,
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=_version("transformers"),
        cuda=torch.version.cuda,
        driver=_driver() if chosen.type == "cuda" else None,
        isa=cpu_isa() if chosen.type == "cpu" else None,
    )


def usable_cores() -> int:
    """CPU cores this process may run on: fewer than the machine has inside many containers."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """The CPU's marketing name, or the architecture where the system does not give one."""
    if name := _cpuinfo("model name"):
        return name
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine() or "unknown CPU"


def cpu_isa() -> str | None:
    """The newest of ``INSTRUCTION_SETS`` this CPU has; ``None`` for an older one, or where the system does not tell."""
    flags = _cpuinfo("flags").split()
    return next((name for flag, name in INSTRUCTION_SETS.items() if flag in flags), None)


def _cpuinfo(field: str) -> str:
    """What Linux says of the first core; empty on another system, or where it does not tell."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(errors="replace") if path.exists() else ""
    found = re.search(rf"^{field}\s*:(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else ""


def cpu_memory() -> int:
    """Main memory in bytes, or 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def cpu_cache() -> int | None:
    """Size of the CPU's largest cache in bytes, or ``None`` where the system does not tell.

    A virtual machine reports the chip's whole cache even when it may use only a share of it.
    """
    texts = [path.read_text() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    found = [re.fullmatch(r"(\d+)([KM])", text.strip()) for text in texts]
    sizes = [int(size[1]) * {"K": 2**10, "M": 2**20}[size[2]] for size in found if size]
    if not sizes and sys.platform == "darwin":
        keys = ("hw.l3cachesize", "hw.perflevel0.l2cachesize", "hw.l2cachesize")
        told = [_output("sysctl", "-n", key) for key in keys]
        sizes = [int(text) for text in told if text and text.isdigit()]
    return max(sizes, default=None)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache
def _driver() -> str | None:
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0].strip() if found else None


def _output(*command: str) -> str | None:
    """What a command prints, or ``None`` if it is absent or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
