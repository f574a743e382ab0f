"""Imports run one way (the table below), never in a circle; and what has to work without torch does."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dslib"
BASE = {"architecture", "data", "lab"}
# Package of dslib -> packages of dslib that it may import.
MAY_IMPORT = {
    "lab": set(),
    "architecture": set(),
    "data": {"architecture", "lab"},
    "performance": BASE,
    "scenarios": BASE | {"performance"},
    "migration": BASE | {"performance"},
    "roadmap": BASE | {"performance"},
}


def imports_of(source, module):
    """Modules of dslib that `source`, the text of `module` (dotted; `….__init__` for a package), imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            # `from . import x` in a.b.c names a.b.x
            parents = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{name.name}" for name in node.names}
    return {name for name in found if name == "dslib" or name.startswith("dslib.")}


def modules():
    """Dotted name -> source text, for every module of dslib."""
    named = {}
    for path in PACKAGE.rglob("*.py"):
        named[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path.read_text(encoding="utf-8")
    return named


def forbidden(sources):
    """Imports in `sources` (dotted name -> text) that the table does not allow, one sentence each."""
    for module, source in sorted(sources.items()):
        own = module.split(".")[1]
        for target in sorted(imports_of(source, module)):
            package = target.split(".")[1] if "." in target else None
            if package in MAY_IMPORT and package != own and package not in MAY_IMPORT.get(own, set()):
                yield f"{module} imports {target}"


def cycle(sources):
    """A circle of imports among `sources`, as a list of names, or []. An import inside a function counts too."""
    names = {name.removesuffix(".__init__"): name for name in sources}
    graph = {
        short: sorted((imports_of(sources[full], full) & names.keys()) - {short, "dslib"})
        for short, full in names.items()
    }
    done, path = set(), []

    def visit(name):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        path.append(name)
        for target in graph[name]:
            # A package's __init__ may import its own modules, and they name the package by their own name only.
            if target != name.rpartition(".")[0] and (found := visit(target)):
                return found
        path.pop()
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name))), [])


def test_imports_run_the_allowed_way():
    assert list(forbidden(modules())) == []


def test_every_package_is_in_the_table():
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert packages <= MAY_IMPORT.keys()


def test_no_circles():
    assert cycle(modules()) == []


@pytest.mark.parametrize(
    "line",
    [
        "import dslib.performance.generation",
        "from dslib.performance import generation",
        "from dslib import performance",
        "def f():\n    from dslib.performance.generation import generate",
        "from ..performance import generation",
        "from .. import performance",
    ],
)
def test_a_forbidden_import_is_seen(line):
    assert list(forbidden({"dslib.architecture.decoder": line}))


def test_an_allowed_import_is_not_reported():
    assert not list(forbidden({"dslib.performance.cost": "import torch\nfrom dslib.lab import roofline"}))


def test_a_circle_is_seen():
    one, two = "from dslib.lab import b", "def f():\n    import dslib.lab.a"
    assert cycle({"dslib.lab.__init__": "", "dslib.lab.a": one, "dslib.lab.b": two})
    assert not cycle({"dslib.lab.__init__": "", "dslib.lab.a": one, "dslib.lab.b": "import json"})


HEAVY = ("torch", "transformers", "matplotlib", "IPython", "ipywidgets")


@pytest.mark.parametrize(
    "lines",
    [
        "import dslib",
        "import dslib.lab.paths",
        "import dslib.lab.exercises",
        "from dslib.performance import cost; assert cost.main(['estimate', '--parameters', '671e9']) == 0",
        "from dslib.lab import exercises; assert exercises.check('cost/replicas', lambda **_: None).status == 'todo'",
        "from dslib.performance import queueing, servers; assert queueing.erlang_c(1, 0.5) == 0.5",
        "from dslib.lab import claims; ledger = claims.load(); assert len(ledger) > 100 and ledger.counts()",
    ],
)
def test_works_without_torch(lines, tmp_path):
    """In a fresh interpreter in which every import of a heavy package fails."""
    block = f"import sys\nfor name in {HEAVY}: sys.modules[name] = None\n"
    command = [sys.executable, "-c", f"{block}sys.path.insert(0, {str(ROOT)!r})\n{lines}"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
