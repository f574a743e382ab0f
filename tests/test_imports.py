"""Imports go one way (ORDER below) and never in a circle; what has to work without torch does."""

import ast
import subprocess
import sys
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("dslib", "measured")
# A module may import from its own step and from those before it. The first prefix that fits decides.
ORDER = (
    ("dslib.html", "dslib.check", "dslib.exact", "dslib.data", "dslib.roofline"),
    ("dslib.architecture",),
    ("dslib.fast",),
    ("dslib.performance",),
    ("dslib.scenarios",),
    ("dslib.migration",),
    ("dslib.roadmap",),
    ("dslib.serve", "dslib.choose"),
    tuple(f"measured.{name}" for name in "timing machine probes plots tables claims recordings provenance".split()),
    ("measured.exercises", "measured.experiments"),
    ("measured.record", "measured.bench"),
)
FLAT = ("measured/exercises", "measured/experiments", "tests/experiments")  # one file a chapter, however many there are
MOST_FILES = 14


def step(module):
    """Number of the step a module stands on. Packages that span several steps hold a docstring only: below all."""
    if module in PACKAGES:
        return -1
    fits = [number for number, prefixes in enumerate(ORDER) if any(f"{module}.".startswith(f"{p}.") for p in prefixes)]
    # claims_file and claims_html belong to claims, recordings_file to recordings
    fits = fits or [n for n, prefixes in enumerate(ORDER) if any(module.startswith(f"{p}_") for p in prefixes)]
    return fits[0] if fits else None


def imports_of(source, module):
    """Modules of ours that `source`, the text of `module` (dotted; `….__init__` for a package), imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            # `from . import x` in a.b.c names a.b.x
            parents = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{name.name}" for name in node.names}
    return {name for name in found if name.split(".")[0] in PACKAGES}


def modules():
    """Dotted name -> source text, for every module of ours."""
    named = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            named[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path.read_text(encoding="utf-8")
    return named


def forbidden(sources):
    """Imports in `sources` (dotted name -> text) that climb, one sentence each."""
    for module, source in sorted(sources.items()):
        own = step(module.removesuffix(".__init__"))
        for target in sorted(imports_of(source, module)):
            # `from dslib import data` names dslib.data, the package; `from dslib.fast import linear` the module.
            if own is not None and (above := step(target)) is not None and above > own:
                yield f"{module} imports {target}"


def cycle(sources):
    """Some names among `sources` that import each other in a circle, or []. An import inside a function counts too."""
    names = {name.removesuffix(".__init__"): name for name in sources}
    # A package's __init__ may import its own modules, and they name the package by their own name only.
    graph = {
        short: (imports_of(sources[full], full) & names.keys()) - {short, short.rpartition(".")[0], *PACKAGES}
        for short, full in names.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


@pytest.fixture(scope="module")
def ours():
    return modules()


def test_imports_climb_no_step_and_go_in_no_circle(ours):
    assert list(forbidden(ours)) == []
    assert cycle(ours) == []
    assert [name for name in ours if step(name.removesuffix(".__init__")) is None] == [], "every module has a step"


def test_the_library_never_imports_the_laboratory(ours):
    library = {name: source for name, source in ours.items() if name.startswith("dslib")}
    assert not [name for name in library if any(t.startswith("measured") for t in imports_of(library[name], name))]


def test_no_folder_is_crowded():
    files = [path for folder in (*PACKAGES, "tests") for path in (ROOT / folder).rglob("*.*") if path.suffix != ".pyc"]
    files = [path for path in files if path.is_file() and path.name != "__init__.py"]  # those hold a docstring
    counts = Counter(path.parent.relative_to(ROOT).as_posix() for path in files)
    assert {folder: n for folder, n in counts.items() if n > MOST_FILES and folder not in FLAT} == {}


FORBIDDEN = [
    ("dslib.architecture.decoder", "import dslib.performance.speculative"),
    ("dslib.architecture.decoder", "from dslib.performance import speculative"),
    ("dslib.architecture.decoder", "def f():\n    from dslib.performance.speculative import speculate"),
    ("dslib.architecture.decoder", "from ..performance import speculative"),
    ("dslib.architecture.decoder", "from ..fast import token_step"),
    ("dslib.architecture.moe", "from dslib.fast.experts import QuickExperts"),
    ("dslib.performance.cost", "from measured import timing"),
    ("measured.claims", "from measured.experiments import moe"),
]


@pytest.mark.parametrize(("module", "line"), FORBIDDEN)
def test_a_forbidden_import_is_seen(module, line):
    assert list(forbidden({module: line}))


def test_an_allowed_import_is_not_reported_and_a_circle_is():
    assert not list(forbidden({"dslib.performance.cost": "import torch\nfrom dslib import roofline"}))
    assert not list(forbidden({"dslib.fast.linear": "from dslib.architecture.layers import SwiGLU"}))
    one, two = "from measured import b", "def f():\n    import measured.a"
    assert cycle({"measured.__init__": "", "measured.a": one, "measured.b": two})
    assert not cycle({"measured.__init__": "", "measured.a": one, "measured.b": "import json"})


HEAVY = ("torch", "transformers", "matplotlib", "IPython", "ipywidgets")


LIGHT = [
    "import dslib, measured",
    "import dslib.data.files, dslib.data.published_figures",
    "from dslib.roofline import decode_floor, published_roof as roof; assert decode_floor(2e9, roof('T4'))",
    "import measured.exercises",
    "from dslib.performance import cost; assert cost.main(['estimate', '--parameters', '671e9']) == 0",
    "from measured import exercises; assert exercises.check('cost/replicas', lambda **_: None).status == 'todo'",
    "from dslib.scenarios import queueing; assert queueing.erlang_c(1, 0.5) == 0.5",
    "from dslib.roadmap import advice, timeline; assert advice.load() and timeline.releases()",
    "from dslib import choose; assert choose.main(['--vram', '24GB', '--modality', 'image']) == 0",
    "from measured import claims; ledger = claims.load_ledger(); assert len(ledger) > 100 and ledger.counts()",
]


@pytest.mark.parametrize("lines", LIGHT)
def test_works_without_torch(lines, tmp_path):
    """In a fresh interpreter in which every import of a heavy package fails."""
    block = f"import sys\nfor name in {HEAVY}: sys.modules[name] = None\n"
    command = [sys.executable, "-c", f"{block}sys.path.insert(0, {str(ROOT)!r})\n{lines}"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
