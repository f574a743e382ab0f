"""Which code a result comes from: a commit, and a fingerprint of the files that ran.

On a machine with the checkout, git says the commit, and a checkout with changes is refused: nobody could run such
code again. A cluster node often has a copy of the files and no git. Then the commit is told (``--commit``), and so is
the fingerprint that its files must have (``--tree``); :func:`key` prints both where the checkout is. The fingerprint
is made from the files of both packages, so that the node can check itself, and so that whoever merges its results can
check them against the commit.

Later, two hashes say whether the result still holds. *Protocol* is that of the function itself, its own lines and the
constants of its module that it names: another protocol measures something else, so an older result no longer answers
the question. *Code* is that of every module of ours that the function reaches: with other code the question is the same
and the answer may have moved, and a page says which commit it is from. Comments, docstrings and blank lines count for
neither.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import re
import subprocess
import sys
import tarfile
import textwrap
import tokenize
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("dslib", "measured")
SUFFIXES = (".py", ".cpp", ".h")
# What a recording itself changes does not make a checkout modified.
RESULTS = re.compile(r"data/recordings/.*\.json|.*\.ipynb")


class NotThatCommit(ValueError):
    """The files are not those of the commit that they are said to be of."""


def fingerprint(files: Iterable[tuple[str, bytes]]) -> str:
    """16 hexadecimal digits for (path below the checkout, content) of the packages' source files, in any order."""
    digest = hashlib.sha256()
    for name, content in sorted(files):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def tree_here(root: Path = ROOT) -> str:
    """The fingerprint of the files that are running."""
    paths = [path for package in PACKAGES for path in (root / package).rglob("*") if path.suffix in SUFFIXES]
    return fingerprint((path.relative_to(root).as_posix(), path.read_bytes()) for path in paths)


def tree_of(commit: str, root: Path = ROOT) -> str:
    """The fingerprint of a commit's files.

    Raises:
        ValueError: no such commit here, or no git.
    """
    if not re.fullmatch(r"[0-9a-f]{7,40}", commit):
        raise ValueError(f"commit: got {commit!r}, wanted 7 to 40 hexadecimal digits")
    packed = _git(root, "archive", commit, *PACKAGES)
    if packed is None:
        raise ValueError(f"commit: got {commit!r}, wanted one that this checkout has")
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        members = [m for m in archive if m.isfile() and m.name.endswith(SUFFIXES)]
        return fingerprint((m.name, archive.extractfile(m).read()) for m in members)


def modified(root: Path = ROOT) -> list[str]:
    """Files that differ from the commit, or that it does not have; recordings and notebooks aside."""
    rows = (_git(root, "status", "--porcelain", "--untracked-files=all") or b"").decode().splitlines()
    paths = [row[3:].rpartition(" -> ")[2].strip('"') for row in rows]
    return [path for path in paths if not RESULTS.fullmatch(path)]


def key(root: Path = ROOT) -> str:
    """``--commit … --tree …`` for a machine that has the files and no git.

    Raises:
        ValueError: no checkout, or one with changes.
    """
    return "--commit {} --tree {}".format(*origin(None, None, root))


def origin(commit: str | None, tree: str | None, root: Path = ROOT) -> tuple[str, str]:
    """Commit and fingerprint of what is running: as git says, or as told, checked against the files.

    Raises:
        ValueError: no git and nothing told, only one of the two told, or a checkout with changes.
        NotThatCommit: the files here have another fingerprint than the one told.
    """
    here = tree_here(root)
    if commit is None and tree is None:
        found = _git(root, "rev-parse", "HEAD")
        if not found:
            raise ValueError("commit: no git checkout here; pass what `make record-key` prints: --commit … --tree …")
        if changed := modified(root):
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise ValueError(f"checkout: has changes, wanted none: {', '.join(changed[:3])}{more}; commit first")
        return found.decode().strip(), here
    if commit is None or tree is None:
        raise ValueError("commit, tree: got one of them, wanted both, as `make record-key` prints them")
    if tree != here:
        raise NotThatCommit(f"tree: the files here are {here}, wanted {tree}: this copy is not commit {commit[:10]}")
    return commit, tree


def check(commit: str, tree: str, root: Path = ROOT) -> None:
    """Whether a result's fingerprint is that of its commit, as this checkout has it.

    Raises:
        ValueError: unknown commit. NotThatCommit: it is not.
    """
    if (wanted := tree_of(commit, root)) != tree:
        raise NotThatCommit(f"tree: got {tree}, but commit {commit[:10]} is {wanted}: other code than it says")


def _git(root: Path, *words: str) -> bytes | None:
    try:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None


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
            beside = [loops, *sorted(path.parent.rglob("*.h"))] if loops.exists() else []
            reached[name] = _bare_file(text) + "".join(file.read_text(encoding="utf-8") for file in beside)
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


@cache
def _imports(name: str, text: str, path: Path) -> tuple[str, ...]:
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
    return tuple(one for one in found if one.split(".")[0] in PACKAGES)


def _file(name: str, root: Path) -> Path | None:
    place = root.joinpath(*name.split("."))
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


def _digest(parts) -> str:
    return hashlib.sha256("\n\0".join(parts).encode()).hexdigest()[:16]
