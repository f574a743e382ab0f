"""`make test`: the tests of the library and the book, then every notebook, then what depends on the processor as on a
lesser one. All run, whatever the first one says; the last lines say what passed, how long it took and what this machine
could not run."""

import collections
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from tools import notebooks, opening, processor

# The files in the order in which they are collected (tests/conftest.py), not by the number of their tests.
PYTEST = [sys.executable, "-m", "pytest", "-q", "-rs", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]


def pages() -> list[str]:
    """The notebooks, those that take longest first: a long one that began last would leave one core idle."""
    seconds = {path: (opening.run_of(notebooks.read(path)) or [0])[0] for path in notebooks.find()}
    return [path.relative_to(notebooks.ROOT).as_posix() for path in sorted(seconds, key=seconds.get, reverse=True)]


PARTS = {
    "library and book": [*PYTEST, "--durations=10", "tests"],
    "notebooks": [*PYTEST, "--nbval", *pages()],
}
# What multiplies by kernels that are chosen by the processor: every test of a file that has the mark, and two pages, in
# one run, as either alone would leave a core idle. Without vectors only four bits go another way than with AVX2, and
# their page would take minutes.
MARKED = sorted(str(path) for path in Path("tests").rglob("test_*.py") if "mark.processor" in path.read_text("utf-8"))
BITS = ["tests/fast/test_int4.py", "tests/fast/test_int4_rows.py"]
PAGES = ["chapters/performance/training.ipynb", "chapters/architecture/int4.ipynb"]
LESSER = {
    "AVX2": {"tests and notebooks": [*PYTEST, "--nbval", *PAGES, *MARKED]},
    "DEFAULT": {"tests of four bits": [*PYTEST, *BITS]},
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
        parts += [(f"{name} as a processor with {level} ({said})", tests, env) for name, tests in LESSER[level].items()]
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
