"""What breaks where recordings are missing: pages run without any of them, then without each file by itself.

    python -m tools.unrecorded                   all cases on all pages that show recordings (20 minutes)
    python -m tools.unrecorded none --page moe   one case (none, or the name of a file), one page

The checkout is left alone: a copy loses its files. Cells that fail are named, cells that end early counted; exit status
1 if one failed. It is no test, as it takes that long; `make portability ROWS=unrecorded` runs it.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from tools import notebooks, settings
from tools.workflow import ROOT

NONE = "none"
SAYS = "Skipped from here on: "


def copy(folder: Path, missing: str) -> Path:
    """What a page needs, without recordings or without one file of them."""
    for part in ("dslib", "measured", "data", "chapters"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for file in (folder / "data" / "recordings").glob("*.json"):
        if missing in (NONE, file.name):
            file.unlink()
    return folder


def shows(page: Path, missing: str) -> bool:
    """Whether a page may show one of the recordings that are missing: it names their functions."""
    text = page.read_text(encoding="utf-8")
    if missing == NONE:
        return bool(re.search(r"\brecorded\(|\blive_or_recorded\(", text))
    stored = (ROOT / "data" / "recordings" / missing).read_text(encoding="utf-8")
    return any(f".{name}" in text for name in set(re.findall(r'"function": "[\w.]+:(\w+)"', stored)))


def failures(page: Path) -> tuple[list[str], int]:
    """The cells that fail, in words, and how many end early because something is not recorded."""
    notebook = nbformat.read(page, as_version=4)
    for cell in notebook.cells:
        cell.get("outputs", []).clear()
    options = {"allow_errors": True, "timeout": 600, "kernel_name": "python3"}
    folder = {"metadata": {"path": str(page.parent)}}
    NotebookClient(notebook, resources=folder, extra_arguments=["--log-level=ERROR"], **options).execute()
    failed, early = [], 0
    for cell in notebooks.code_cells(notebook):
        for output in cell.outputs:
            early += SAYS in output.get("text", "")
            if output.output_type == "error" and "raises-exception" not in notebooks.tags(cell):
                failed.append(f"{page.parent.name}/{page.stem}, {cell.id}: {output.ename}: {output.evalue[:90]}")
    return failed, early


def main(arguments: list[str] | None = None) -> int:
    files = sorted(file.name for file in (ROOT / "data" / "recordings").glob("*.json"))
    parser = argparse.ArgumentParser(prog="python -m tools.unrecorded", description="Run pages without recordings.")
    parser.add_argument("cases", nargs="*", help=f"{NONE} or names of files (default: all of them)")
    parser.add_argument("--page", action="append", help="only pages with this name")
    options = parser.parse_args(arguments)
    if unknown := set(options.cases) - {NONE, *files}:
        parser.error(f"no such file: {', '.join(sorted(unknown))}; known: {', '.join(files)}")
    settings.prepare()
    total = 0
    for missing in options.cases or [NONE, *files]:
        start, failed, early = time.perf_counter(), [], 0
        with tempfile.TemporaryDirectory(prefix="unrecorded-") as name:
            folder = copy(Path(name), missing)
            os.environ["PYTHONPATH"] = str(folder)
            pages = [page for page in notebooks.find() if page.stem in (options.page or [page.stem])]
            pages = [page for page in pages if shows(page, missing)]
            for page in pages:
                found, ended = failures(folder / page.relative_to(ROOT))
                failed, early = failed + found, early + ended
        print(*failed, sep="\n", end="\n" if failed else "")
        what = "no recordings at all" if missing == NONE else f"without {missing}"
        said = f"{len(failed)} cells fail, {early} end early, on {len(pages)} pages"
        print(f"== {what}: {said}, {time.perf_counter() - start:.0f} s", flush=True)
        total += len(failed)
    return int(total > 0)


if __name__ == "__main__":
    sys.exit(main())
