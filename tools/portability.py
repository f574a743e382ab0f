"""Where a reader's machine may differ from ours: each row of a table is set up in a clone of its own and tried.

    python -m tools.portability              all rows, then the table; exit status 1 if a row failed
    python -m tools.portability chinese …    some of them;  --list prints what each one sets

What is committed is what is tried. A row whose Python is not on the PATH is named and not counted. `--torch 2.13.0+cpu`
takes that version in the row of lowest versions, where the lowest that is promised comes with gigabytes of CUDA.
"""

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

from tools import setup_venv
from tools.workflow import ROOT, clean, clone, find_python

PYTEST = [".venv/bin/python", "-m", "pytest", "-q"]
TRIES = {  # a part of everything that is quick: files, subprocesses, weights, figures, OCR where it is installed
    "tests": [*PYTEST, "tests/data", "tests/performance/test_cost.py", "tests/architecture/test_decoder.py"],
    "notebooks": [*PYTEST, "--nbval", "chapters/start/your_machine.ipynb", "chapters/architecture/decoder.ipynb"],
    "ocr": [*PYTEST, "--nbval", "chapters/scenarios/multimodal.ipynb"],
    "book": ["make", "book"],
    "unrecorded": [".venv/bin/python", "-m", "tools.unrecorded"],
    "recipes": [".venv/bin/python", "-m", "tools.recipes"],
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One way in which a machine differs, and what is tried there after `make venv`."""

    what: str
    python: str = "3.11"
    folder: str = "book"
    variables: dict[str, str] = dataclasses.field(default_factory=dict)
    lowest: bool = False  # the lowest versions that pyproject.toml promises, instead of the pinned ones
    read_only: bool = False  # once it is set up
    tries: tuple[str, ...] = ("tests", "notebooks", "book")


ROWS = {
    "chinese": Row("a folder named in Chinese, with a blank", folder="书 一"),
    "locale": Row("LANG=C", variables={"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    "home": Row("a HOME that is not there", variables={"HOME": f"{os.devnull}/home", "XDG_CACHE_HOME": ""}),
    "readonly": Row("a checkout that cannot be written", read_only=True, tries=("tests", "notebooks")),
    "3.12": Row("Python 3.12", python="3.12", tries=("tests", "ocr", "book")),
    "3.13": Row("Python 3.13", python="3.13", tries=("tests", "ocr", "book")),
    "recipes": Row("the recipes of README, index and CONTRIBUTING", tries=("recipes",)),
    "unrecorded": Row("no recordings, or one file of them less", tries=("unrecorded",)),
    "lowest": Row("the lowest versions that pyproject.toml promises", lowest=True),
}


def requirements() -> list[str]:
    """What pyproject.toml promises, its extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    return project["dependencies"] + [line for line in extras if not line.startswith("dslib[")]


def install_lowest(checkout: Path, env: dict[str, str], torch: str | None) -> bool:
    """Replace the pinned versions of an environment by the lowest promised ones that are there as wheels."""
    values = setup_venv.settings()
    uv = [str(checkout / ".venv/bin/python"), "-m", "uv", "pip", "install", "-q", "--no-config", "--reinstall"]
    uv += ["--python", uv[0], "--index-strategy", "unsafe-best-match", *(setup_venv.uv_options(values) or [])]
    wanted = [*requirements(), *([f"torch=={torch}"] if torch else [])]
    uv += ["--only-binary", ":all:", "--resolution", "lowest-direct", *wanted]
    return subprocess.run(uv, cwd=checkout, env=env).returncode == 0


def read_only(command: list[str], folder: Path) -> list[str]:
    """`command` with `folder` read-only: root writes wherever a permission forbids it, so for root it is mounted so."""
    if os.geteuid():
        return command
    mount = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && cd "$0" && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", mount, str(folder), *command]


def attempt(row: Row, python: str, torch: str | None) -> str:
    """Set up and try one row; says what failed, or passed."""
    with tempfile.TemporaryDirectory(prefix="portability-") as name:
        checkout = clone(Path(name, row.folder))
        env = clean(checkout / ".venv", **row.variables)
        steps: dict[str, Callable[[], bool]] = {}

        def command(arguments: list[str]) -> bool:
            return subprocess.run(arguments, cwd=checkout, env=env, stdin=subprocess.DEVNULL).returncode == 0

        steps["make venv"] = lambda: command(["make", "venv", f"PYTHON={python}"])
        if row.lowest:
            steps["lowest versions"] = lambda: install_lowest(checkout, env, torch)
        failed = next((step for step, done in steps.items() if not done()), None)
        if failed:
            return f"FAILED: {failed}"
        if row.read_only and os.geteuid():
            subprocess.run(["chmod", "-R", "a-w", str(checkout)], check=True)
        tries = {what: read_only(TRIES[what], checkout) if row.read_only else TRIES[what] for what in row.tries}
        failures = [what for what, arguments in tries.items() if not command(arguments)]
        if row.read_only and os.geteuid():
            subprocess.run(["chmod", "-R", "u+w", str(checkout)], check=True)
        return f"FAILED: {', '.join(failures)}" if failures else "passed"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.portability", description="Try the book on other machines.")
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(ROWS)} (default: all)")
    parser.add_argument("--list", action="store_true", help="only print the table")
    parser.add_argument("--torch", help="this version of torch, with the lowest of everything else")
    options = parser.parse_args(arguments)
    if unknown := set(options.rows) - set(ROWS):
        parser.error(f"no row {', '.join(sorted(unknown))}; known: {', '.join(ROWS)}")
    results = {}
    for name in options.rows or ROWS:
        row, start = ROWS[name], time.perf_counter()
        python = find_python(row.python)
        if options.list:
            results[name] = f"make venv, {', '.join(row.tries)}"
        elif python is None:
            results[name] = f"Python {row.python} is not on the PATH, not run"
        else:
            print(f"== {name}: {row.what}", flush=True)
            results[name] = f"{attempt(row, python, options.torch)}, {time.perf_counter() - start:.0f} s"
    print("== portability")
    for name, result in results.items():
        print(f"   {name:9} {ROWS[name].what:50} {result}")
    return int(any(result.startswith("FAILED") for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
