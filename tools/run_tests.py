"""`make test`: the tests of the library and the book, then every notebook, then what depends on the processor as on a
lesser one. All run, whatever the first one says; the last lines say what passed, how long it took and what this machine
could not run."""

import collections
import os
import re
import subprocess
import sys
import time

from tools import processor

PYTEST = [sys.executable, "-m", "pytest", "-q", "-rs", "-n", "2", "--dist", "loadfile"]
PARTS = {
    "library and book": [*PYTEST, "--durations=10", "tests"],
    "notebooks": [*PYTEST, "--nbval", "chapters"],
}
# What multiplies by kernels that are chosen by the processor. Four bits without vectors take minutes to say little.
TRAINING, INT4 = "chapters/performance/training.ipynb", "chapters/architecture/int4.ipynb"
LESSER = {
    "tests": {level: [*PYTEST, "-m", "processor", "tests"] for level in processor.LEVELS},
    "notebooks": {"AVX2": [*PYTEST, "--nbval", INT4, TRAINING], "DEFAULT": [*PYTEST, "--nbval", TRAINING]},
}
SKIPPED = re.compile(r"^SKIPPED \[(\d+)\] \S+ (?:needs (AVX-512|CUDA))?")


def run(command: list[str], env: dict[str, str], skipped: collections.Counter) -> int:
    """Run a command, passing on what it prints, and count the skipped tests by what they need."""
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            if found := SKIPPED.match(line):
                skipped[found[2] or "something else"] += int(found[1])
    return process.returncode


def main():
    results, skipped = {}, collections.Counter()
    parts = [(name, command, dict(os.environ)) for name, command in PARTS.items()]
    for level in processor.lesser():
        env = processor.environment(level)
        said = "; ".join(f"{library} uses {what}" for library, what in processor.used(env).items())
        parts += [(f"{name} as a processor with {level} ({said})", at[level], env) for name, at in LESSER.items()]
    for name, command, env in parts:
        print(f"== {name}: pytest {' '.join(command[3:])}", flush=True)
        start = time.perf_counter()
        code = run(command, env, skipped if command in PARTS.values() else collections.Counter())
        results[name] = code, time.perf_counter() - start
    print("== make test")
    for name, (code, seconds) in results.items():
        print(f"   {'passed' if code == 0 else f'FAILED (pytest exit status {code})'}: {name}, {seconds:.0f} s")
    print("   skipped here:", ", ".join(f"{n} need {what}" for what, n in skipped.items()) or "nothing")
    return int(any(code for code, _ in results.values()))


if __name__ == "__main__":
    sys.exit(main())
