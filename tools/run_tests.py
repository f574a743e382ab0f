"""`make test`: the tests of the library and the book, then every notebook; both run, whatever the first one says."""

import subprocess
import sys
import time

PYTEST = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile"]
PARTS = {
    "library and book": [*PYTEST, "tests"],
    "notebooks": [*PYTEST, "--nbval", "chapters"],
}


def main():
    results = {}
    for name, command in PARTS.items():
        print(f"== {name}: pytest {' '.join(command[3:])}", flush=True)
        start = time.perf_counter()
        code = subprocess.call(command)
        results[name] = code, time.perf_counter() - start
    print("== make test")
    for name, (code, seconds) in results.items():
        print(f"   {'passed' if code == 0 else f'FAILED (pytest exit status {code})'}: {name}, {seconds:.0f} s")
    return int(any(code for code, _ in results.values()))


if __name__ == "__main__":
    sys.exit(main())
