"""Make .venv, or repair it. Run by every Makefile target; when nothing has changed it returns at once.

Only the standard library is used and the syntax is old on purpose: this file is what an old Python sees first, and it
has to get as far as saying that it is too old.

    .venv/setting-up     exists while packages are being installed: found at the start, the last set-up was interrupted
    .venv/set-up.json    written last: the checkout's path and a hash of the requirements
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
OLD = os.path.join(ROOT, ".venv.old")
PYTHON = os.path.join(VENV, "bin", "python")
MARKER = os.path.join(VENV, "setting-up")
STAMP = os.path.join(VENV, "set-up.json")
WATCHED = ("requirements.txt", "constraints.txt", "requirements-models.txt", "pyproject.toml")
OLDEST = (3, 11)


def newer_python():
    """Another Python on the PATH that is new enough, or None."""
    for minor in (13, 12, 11, 14):
        path = shutil.which("python3.%d" % minor)
        works = path and subprocess.call([path, "-c", "import venv"], stderr=subprocess.DEVNULL) == 0
        if works:
            return path
    return None


def choose_python():
    """Return at once under a good Python; under an old one run this file again with a newer one, or stop."""
    if sys.version_info >= OLDEST:
        return
    have = "%d.%d" % sys.version_info[:2]
    other = newer_python()
    if other is None:
        sys.exit(
            "error: this book needs Python 3.11 or newer; %s is Python %s. "
            "Install a newer one, or name it: make book PYTHON=/path/to/python3.12" % (sys.executable, have)
        )
    sys.exit(subprocess.call([other, os.path.abspath(__file__)]))


def wanted():
    """What a finished set-up of this checkout has in its stamp."""
    digest = hashlib.sha256()
    for name in WATCHED:
        with open(os.path.join(ROOT, name), "rb") as file:
            digest.update(name.encode() + b"\0" + file.read() + b"\0")
    return {"checkout": ROOT, "requirements": digest.hexdigest()}


def found():
    """The stamp of the present .venv, {} when there is none or it does not parse."""
    try:
        with open(STAMP) as file:
            stamp = json.load(file)
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def python_runs():
    """Whether .venv's interpreter starts: it stops doing so when the Python it was made from is removed."""
    try:
        return subprocess.call([PYTHON, "-c", "import pip"], stderr=subprocess.DEVNULL) == 0
    except OSError:
        return False


def run(*command):
    code = subprocess.call(command, cwd=ROOT)
    if code:
        sys.exit("error: the set-up stopped at: %s\nRun the same make command again to repair it." % " ".join(command))


def pip(*arguments):
    run(PYTHON, "-m", "pip", "install", "-qq", *arguments)


def remove_venv():
    """Move .venv aside first: a removal that is interrupted must not leave half of it under its own name."""
    shutil.rmtree(OLD, ignore_errors=True)
    if os.path.lexists(VENV):
        os.rename(VENV, OLD)
        shutil.rmtree(OLD, ignore_errors=True)


def set_up():
    want, have = wanted(), found()
    shutil.rmtree(OLD, ignore_errors=True)
    interrupted = os.path.exists(MARKER)
    if not interrupted and have == want and python_runs():
        return
    if os.path.isdir(VENV) and not have and not interrupted:
        sys.exit("error: .venv exists but was not made by this Makefile. Move it away, then run make again.")

    if interrupted or (have and not python_runs()):
        print("An earlier set-up of .venv was interrupted or is broken: starting afresh.", flush=True)
        remove_venv()
        have = {}
    only_moved = bool(have) and have.get("requirements") == want["requirements"]
    os.makedirs(VENV, exist_ok=True)
    open(MARKER, "w").close()
    if have:
        print(
            "The checkout was moved." if only_moved else "The requirements have changed.", "Updating .venv.", flush=True
        )
    else:
        print("Setting up .venv with Python %d.%d (once; a few minutes)." % sys.version_info[:2], flush=True)
    run(sys.executable, "-m", "venv", VENV)
    if not only_moved:
        # The build backend first, so that `-e .` in requirements.txt builds without an isolated environment.
        with open(os.path.join(ROOT, "requirements.txt")) as file:
            backend = [line.strip() for line in file if line.startswith(("hatchling==", "editables=="))]
        pip(*backend)
        pip("--no-build-isolation", "-r", "requirements.txt")
        pip("--no-deps", "-r", "requirements-models.txt")
    else:
        pip("--no-build-isolation", "--no-deps", "--force-reinstall", "-e", ".")
    with open(STAMP + ".part", "w") as file:
        json.dump(want, file, indent=1)
    os.replace(STAMP + ".part", STAMP)
    os.remove(MARKER)


def main():
    choose_python()
    # Two make commands started side by side must not install over each other: the second waits, then finds it done.
    with open(os.path.join(ROOT, ".venv.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        set_up()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nThe set-up was interrupted. Run the same make command again to repair it.")
