"""Every module, function and file of ours that prose names is there: in pages, READMEs and docstrings."""

import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOTTED = re.compile(r"(?<![\w.])(?:dslib|measured)(?:\.[A-Za-z_]\w*)+")
IMPORT = re.compile(r"^\s*from ((?:dslib|measured)[\w.]*) import (.+)$", re.MULTILINE)
PATH = re.compile(r"(?<![\w/-])(?:dslib|measured|tests|tools|data)/[\w/]+\.(?:py|cpp|yml|md)\b")
PATTERN = re.compile(r"/P/|\b(test_)?c\.py$")  # CONTRIBUTING: chapter c of part P
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "data").rglob("README.md"), *(ROOT / "chapters").rglob("*.md")])
NOTEBOOKS = sorted((ROOT / "chapters").rglob("*.ipynb"))
MODULES = sorted(path for package in ("dslib", "measured") for path in (ROOT / package).rglob("*.py"))


def exists(name):
    """Whether a dotted name is a module, or what a module (or a class in it) has."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def missing(text):
    """Names in `text` that are not there."""
    names = {name.rstrip(".") for name in DOTTED.findall(text)}
    for module, imported in IMPORT.findall(text):
        words = (word.split(" as ")[0].strip() for word in imported.split("#")[0].strip("() ").split(","))
        names |= {f"{module}.{word}" for word in words if word}
    files = [name for name in PATH.findall(text) if not PATTERN.search(name) and not (ROOT / name).exists()]
    return sorted(name for name in names if not exists(name)) + files


def prose(path):
    """What a file says: a notebook only in its Markdown."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    return "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")


@pytest.mark.parametrize("path", PAGES + NOTEBOOKS + MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_is_named_is_there(path):
    assert missing(prose(path)) == []


@pytest.mark.parametrize(
    "text", ["see `dslib.lab.timing`", "from dslib.data import pretrained", "`dslib/lab/plots.py`"]
)
def test_a_name_that_is_gone_is_seen(text):
    assert missing(text)
