"""Two hashes of a recorded function: has what it measures changed, and has anything that it calls changed?

*Protocol*: its own lines and the constants of its module that it names. Another protocol measures something else, so an
older recording no longer answers the question. *Code*: every module of ours that it reaches. Then the question is the
same and the answer may have moved, and a page says which commit it is from. Comments, docstrings and blank lines count
for neither.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import sys
import textwrap
import tokenize
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from measured.provenance import PACKAGES, ROOT


def protocol(fn: Callable[..., Any]) -> str:
    """16 hexadecimal digits for a function's own lines and the constants that it names."""
    parts = [bare(textwrap.dedent(inspect.getsource(fn)))]
    constants = _constants(inspect.getsource(sys.modules[fn.__module__]))
    wanted, done = _names(textwrap.dedent(inspect.getsource(fn))), set()
    while found := sorted((wanted & constants.keys()) - done):
        parts += [constants[name] for name in found]
        done.update(found)
        wanted |= set().union(*(_names(constants[name]) for name in found))
    return _digest(parts)


def code(fn: Callable[..., Any], root: Path = ROOT) -> str:
    """16 hexadecimal digits for all modules of ours that the function's module reaches, with the C++ beside them."""
    reached, todo = {}, [fn.__module__]
    while todo:
        name = todo.pop()
        if name not in reached and (path := _file(name, root)) is not None:
            text = path.read_text(encoding="utf-8")
            loops = path.with_suffix(".cpp")
            reached[name] = _bare_file(text) + (loops.read_text(encoding="utf-8") if loops.exists() else "")
            todo += _imports(name, text, path)
    return _digest(f"{name}\n{reached[name]}" for name in sorted(reached))


def bare(text: str) -> str:
    """Python source without comments, docstrings and blank lines."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documented and ast.get_docstring(node, clean=False) is not None:
            first, last = node.body[0].lineno, node.body[0].end_lineno
            lines[first - 1 : last] = [""] * (last - first + 1)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(line.rstrip() for line in lines if line.strip())


_bare_file = cache(bare)


@cache
def _constants(text: str) -> dict[str, str]:
    """Name -> its lines, for what a module assigns at its top level."""
    found = {}
    for node in ast.parse(text).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if hasattr(node, "target") else []
        for target in (name for one in targets for name in ast.walk(one) if isinstance(name, ast.Name)):
            found[target.id] = found.get(target.id, "") + bare(ast.get_source_segment(text, node))
    return found


def _names(text: str) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}


def _imports(name: str, text: str, path: Path) -> list[str]:
    """Modules that a module may import from anywhere in it; ``from a import b`` may mean the module ``a.b``."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = name if path.name == "__init__.py" else name.rpartition(".")[0]
            package = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (package, node.module) if part)
            found += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return [one for one in found if one.split(".")[0] in PACKAGES]


def _file(name: str, root: Path) -> Path | None:
    place = root.joinpath(*name.split("."))
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


def _digest(parts) -> str:
    return hashlib.sha256("\n\0".join(parts).encode()).hexdigest()[:16]
