"""What CI runs is what its tests need: the workflow's lines, the extra that it installs, the rows of odd machines."""

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib import metadata

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools import portability, recipes, workflow

ROOT = workflow.ROOT
JOBS = yaml.safe_load(workflow.WORKFLOW.read_text(encoding="utf-8"))["jobs"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OURS = {"dslib", "measured", "tests", "tools", "conftest"}
# Written with a guard: found by importorskip, or in a function that says what is missing.
OPTIONAL = {"triton"} | {"trl", "datasets"}  # the latter by hand, for tools/trl_losses.py


def pinned(*names):
    """name -> version of every requirement with == in the files."""
    lines = [line.split("#")[0].strip() for name in names for line in (ROOT / name).read_text().splitlines()]
    wanted = [Requirement(line) for line in lines if "==" in line]
    return {canonicalize_name(one.name): str(one.specifier).removeprefix("==") for one in wanted}


def installed_by(wanted):
    """Names of all that pip installs for these requirements, as the metadata of what is installed here has it."""
    seen, stack = {}, [Requirement(line) for line in wanted]
    while stack:
        one = stack.pop()
        name = canonicalize_name(one.name)
        extras = {"", *one.extras}
        if one.marker and not any(one.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        if extras <= seen.get(name, set()):
            continue
        seen[name] = seen.get(name, set()) | extras
        if name == "dslib":
            stack += [Requirement(line) for extra in one.extras for line in PROJECT["optional-dependencies"][extra]]
            continue
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for line in map(Requirement, requires):
            if line.marker is None or any(line.marker.evaluate({"extra": extra}) for extra in extras):
                stack.append(line)
    return set(seen)


@cache
def imports(path):
    """Top-level names of all imports of a file, wherever they stand."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def missing(paths, wanted):
    """Names that these files import and these requirements, with the packages of weights, do not bring."""
    there = installed_by(wanted) | pinned("requirements-models.txt").keys()
    owners = metadata.packages_distributions()
    names = {name for path in paths for name in imports(path)} - sys.stdlib_module_names - OURS - OPTIONAL
    return {name for name in names if not there & {canonicalize_name(owner) for owner in owners.get(name, [])}}


def test_the_extra_brings_all_that_the_job_imports():
    paths = [path for path in (ROOT / "tests").rglob("*.py") if path.parts[-2] not in ("book", "notebooks")]
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]
    assert missing(paths, wanted) == set()
    assert missing(paths, [line for line in wanted if "hypothesis" not in line]) == {"hypothesis"}
    book = PROJECT["optional-dependencies"]["book"]
    assert missing([*(ROOT / "tests").rglob("*.py"), *(ROOT / "tools").glob("*.py")], wanted + book) <= {"emoji"}


def test_the_ranges_hold_the_pinned_versions():
    pins = pinned("requirements.txt", "constraints.txt")
    lines = [*PROJECT["dependencies"], *(line for extra in PROJECT["optional-dependencies"].values() for line in extra)]
    for wanted in (Requirement(line) for line in lines if not line.startswith("dslib[")):
        assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)]), wanted


def test_the_lines_of_the_workflow():
    library = JOBS["library"]
    versions = [workflow.python_of(library, values) for values in workflow.entries(library)]
    promised = [line.split()[-1] for line in PROJECT["classifiers"] if re.search(r"3\.\d+$", line)]
    assert versions == promised == sorted({row.python for row in portability.ROWS.values()})
    for values in workflow.entries(library):
        install, models, *tests = workflow.lines(library, values)
        assert f"torch=={values['torch']}" in install and "[test]" in install and "requirements-models.txt" in models
        assert any("tools.processor" in line and "-m processor" in line for line in tests)
    assert workflow.lines(JOBS["portability"], {}) == ["make portability"]
    assert set(JOBS["publish"]["needs"]) >= {"book", "library"}


def test_every_recipe_of_the_pages_is_executed(monkeypatch, tmp_path):
    """By the workflow's own lines, or by the row of `make portability` that reads the pages."""
    lines = [line for job in JOBS.values() for values in workflow.entries(job) for line in workflow.lines(job, values)]
    lines += (ROOT / ".ci" / "run").read_text().splitlines()
    known = {*recipes.WORKFLOW, *recipes.SHORTER, *recipes.OWN_WAY, *recipes.WITH_ANOTHER, *recipes.AS_IT_STANDS}
    assert set(recipes.found()) == known and all(map(recipes.how, known))
    for recipe, runs in recipes.WORKFLOW.items():
        assert any(line.startswith(runs) for line in lines) and (
            runs != ".ci/run" or any(recipe in line for line in lines)
        )
    assert any(row.tries == ("recipes",) for row in portability.ROWS.values())
    for page in recipes.PAGES:
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / page).write_text("Do `make all` or\n\n    pip install x    # or so\n\nwith .venv.\n")
    monkeypatch.setattr(recipes, "ROOT", tmp_path)
    assert recipes.found() == ["pip install x", "make all"] and recipes.how("make all") is None


def test_a_recipe_that_fails_is_named(monkeypatch, capsys):
    def no_answer(recipe):
        raise RuntimeError("no answer")

    monkeypatch.setattr(recipes, "found", lambda: ["make", "make lab"])
    monkeypatch.setattr(recipes, "run", lambda command: "")
    monkeypatch.setattr(recipes, "OWN_WAY", {"make lab": no_answer})
    assert recipes.main([]) == 1
    said = capsys.readouterr().out
    assert "make: passed" in said and "make lab: FAILED: no answer" in said


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: workflow.fill("${{ secrets.KEY }}", {}), "cannot fill in"),
        (lambda: workflow.entries({"strategy": {"matrix": {"python": ["3.11"]}}}), "wanted only include"),
    ],
)
def test_what_is_not_understood_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()


@pytest.mark.parametrize(("line", "status"), [("test -n $VIRTUAL_ENV && python -m pip --version", 0), ("false", 1)])
def test_a_job_runs_in_an_empty_environment(line, status, tmp_path, monkeypatch, capfd):
    """Of this Python, in a clone; what is installed here is not seen there."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    steps = [{"run": "! python -c 'import torch' 2> /dev/null"}, {"run": "test -f pyproject.toml"}, {"run": line}]
    job = {"steps": [{"uses": "actions/setup-python@v5", "with": {"python-version": python}}, *steps]}
    monkeypatch.setattr(workflow, "WORKFLOW", tmp_path / "book.yml")
    workflow.WORKFLOW.write_text(yaml.safe_dump({"jobs": {"only": job}}))
    monkeypatch.setattr(workflow, "find_python", lambda version: sys.executable)
    tracked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True)
    if tracked.returncode:
        pytest.skip("needs a git checkout")
    assert workflow.main([]) == status
    assert ("passed" if status == 0 else "FAILED at false") in capfd.readouterr().out
