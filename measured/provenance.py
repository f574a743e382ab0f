"""Which code a result comes from: a commit, and a fingerprint of the files that ran.

On a machine with the checkout, git says the commit, and a checkout with changes is refused: nobody could run such
code again. A cluster node often has a copy of the files and no git. Then the commit is told (``--commit``), and so is
the fingerprint that its files must have (``--tree``); :func:`key` prints both where the checkout is. The fingerprint
is made from the files of both packages, so that the node can check itself, and so that whoever merges its results can
check them against the commit.
"""

from __future__ import annotations

import hashlib
import io
import re
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("dslib", "measured")
SUFFIXES = (".py", ".cpp")
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
