"""What the GitHub workflow runs, run here: each job's `run:` lines in an empty environment and a clone of their own.

    python -m tools.workflow --list                       print the lines, one matrix entry after another
    python -m tools.workflow library                      run a job, with those of its Pythons that are on the PATH
    python -m tools.workflow library --set python=3.11 --set torch=2.13.0      … with another value

What is committed is what is tried. Exit status 1 if a line fails; a Python that is missing is named, not counted.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKFLOW = ROOT / ".github" / "workflows" / "book.yml"


def entries(job: dict) -> list[dict[str, str]]:
    """The matrix of a job, one dict an entry; one without values where it has none. Only `include` is understood."""
    matrix = job.get("strategy", {}).get("matrix", {"include": [{}]})
    if set(matrix) != {"include"}:
        raise ValueError(f"matrix has {sorted(matrix)}, wanted only include")
    return [{name: str(value) for name, value in entry.items()} for entry in matrix["include"]]


def fill(text: str, values: dict[str, str]) -> str:
    """`text` with the matrix' values in it. Raises ValueError for any other expression of GitHub's."""
    filled = re.sub(r"\$\{\{\s*matrix\.(\w+)\s*\}\}", lambda found: values[found[1]], text)
    if "${{" in filled:
        raise ValueError(f"cannot fill in {filled!r}")
    return filled


def lines(job: dict, values: dict[str, str]) -> list[str]:
    """What a job runs, in order; steps that use somebody's action are GitHub's own affair."""
    return [fill(step["run"], values).strip() for step in job["steps"] if "run" in step]


def python_of(job: dict, values: dict[str, str]) -> str:
    """The version of Python that a job asks setup-python for; this one's where it does not ask."""
    asked = [step["with"]["python-version"] for step in job["steps"] if "setup-python" in step.get("uses", "")]
    if not asked:
        return f"{sys.version_info.major}.{sys.version_info.minor}"
    return fill(str(asked[0]), values).split()[-1]  # of several, the last is what `python` starts


def find_python(version: str) -> str | None:
    """A Python of this version on the PATH that starts and can make environments."""
    path = shutil.which(f"python{version}")
    works = path and subprocess.run([path, "-c", "import venv, ensurepip"], capture_output=True).returncode == 0
    return path if works else None


def clean(folder: Path, **variables: str) -> dict[str, str]:
    """The present variables without those of Python, with the environment in `folder` first on the PATH."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return kept | {"VIRTUAL_ENV": str(folder), "PATH": f"{folder / 'bin'}{os.pathsep}{kept['PATH']}"} | variables


def clone(folder: Path) -> Path:
    """The last commit, in a new folder."""
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(folder)], check=True)
    return folder


def run(commands: list[str], python: str) -> str | None:
    """Run the lines as GitHub does, up to the first that fails, which is returned."""
    with tempfile.TemporaryDirectory(prefix="workflow-") as name:
        environment, checkout = Path(name, "environment"), clone(Path(name, "checkout"))
        subprocess.run([python, "-m", "venv", str(environment)], check=True)
        for command in commands:
            print(f"$ {command}", flush=True)
            shell = ["bash", "-e", "-c", command]
            if subprocess.run(shell, cwd=checkout, env=clean(environment, CI="true")).returncode:
                return command
    return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.workflow", description="Run the GitHub workflow's lines.")
    parser.add_argument("jobs", nargs="*", help="names of jobs (default: all that run something)")
    parser.add_argument("--list", action="store_true", help="only print what would be run")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="python=… picks an entry")
    options = parser.parse_args(arguments)
    known = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"]
    if unknown := set(options.jobs) - set(known):
        parser.error(f"no job {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    chosen = dict(pair.split("=", 1) for pair in options.set)
    failed = 0
    for name in options.jobs or known:
        for values in entries(known[name]):
            version = python_of(known[name], values)
            commands = lines(known[name], values | chosen)
            if not commands or chosen.get("python", version) != version:
                continue
            print(f"== {name}, Python {version}", flush=True)
            if options.list:
                print(*commands, sep="\n")
            elif python := find_python(version):
                stopped = run(commands, python)
                print(f"== {name}, Python {version}: " + (f"FAILED at {stopped}" if stopped else "passed"), flush=True)
                failed += bool(stopped)
            else:
                print(f"== {name}: Python {version} is not on the PATH, not run", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
