"""`make test`: the tests of the library and the book, then every notebook, then what depends on the processor as on a
lesser one. All run, whatever the first one says."""

import os
import subprocess
import sys
import time

from tools import processor

PYTEST = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile"]
PARTS = {
    "library and book": [*PYTEST, "tests"],
    "notebooks": [*PYTEST, "--nbval", "chapters"],
}
LESSER = [*PYTEST, "-m", "processor", "tests"]


def main():
    results = {}
    parts = [(name, command, dict(os.environ)) for name, command in PARTS.items()]
    parts += [(f"as a processor with {level}", LESSER, processor.environment(level)) for level in processor.lesser()]
    for name, command, env in parts:
        print(f"== {name}: pytest {' '.join(command[3:])}", flush=True)
        if command is LESSER:
            print(
                "  ", "; ".join(f"{library} uses {what}" for library, what in processor.used(env).items()), flush=True
            )
        start = time.perf_counter()
        code = subprocess.call(command, env=env)
        results[name] = code, time.perf_counter() - start
    print("== make test")
    for name, (code, seconds) in results.items():
        print(f"   {'passed' if code == 0 else f'FAILED (pytest exit status {code})'}: {name}, {seconds:.0f} s")
    return int(any(code for code, _ in results.values()))


if __name__ == "__main__":
    sys.exit(main())
