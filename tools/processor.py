"""What the libraries under torch really use of this processor, and how to play a lesser one.

torch's own kernels, oneDNN and MKL each choose their instructions for themselves, so each has to be told. Products of
our own (`dslib/fast/int4_rows.cpp`, `dslib/fast/kernels/rows.cpp`) ask the processor and cannot be told.

    python -m tools.processor                 print what each library uses, here and as each lesser processor
    python -m tools.processor COMMAND …       run a command once as each lesser processor; exit status 1 if one fails
"""

import os
import re
import subprocess
import sys

# From the better to the lesser; nothing plays a better one.
LEVELS = {
    "AVX512": {},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "DEFAULT": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
}
ASK = """
import torch
print("torch:", torch.backends.cpu.get_cpu_capability())
x = torch.ones(64, 64)
x @ x, torch.nn.functional.conv2d(x[None, None], x[None, None])
"""


def environment(level: str) -> dict[str, str]:
    """The environment in which the libraries behave like a processor of this level."""
    return {name: value for name, value in os.environ.items() if name not in LEVELS["AVX2"]} | LEVELS[level]


def used(env: dict[str, str]) -> dict[str, str]:
    """Library -> what it says it uses, asked in a process of its own."""
    loud = env | {"ONEDNN_VERBOSE": "1", "MKL_VERBOSE": "1"}
    run = subprocess.run([sys.executable, "-c", ASK], env=loud, capture_output=True, text=True, check=True)
    patterns = {
        "torch": r"^torch: (.*)$",
        "oneDNN": r"info,cpu,isa:(.*)$",
        "MKL": r"^MKL_VERBOSE oneMKL .* for (.*), Lnx",
    }
    found = {name: re.search(pattern, run.stdout, re.MULTILINE) for name, pattern in patterns.items()}
    return {name: match[1].strip() if match else "not there" for name, match in found.items()}


def lesser() -> list[str]:
    """Levels below this processor's, which can be played here."""
    levels = list(LEVELS)
    here = used(dict(os.environ))["torch"]
    return levels[levels.index(here) + 1 :] if here in levels else []


def main(command: list[str]) -> int:
    levels = [(f"as {level}", environment(level)) for level in lesser()]
    failed = 0
    for name, env in levels if command else [("here", dict(os.environ)), *levels]:
        print(f"{name:11}", "; ".join(f"{library} {what}" for library, what in used(env).items()), flush=True)
        failed += bool(command and subprocess.call(command, env=env))
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
