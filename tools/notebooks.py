"""Run, normalise and check the notebooks.

    python -m tools.notebooks refresh [paths]     run from top to bottom, measure, normalise and write back;
                                                  --keep-timings: those of unchanged cells stay as they are
    python -m tools.notebooks normalise [paths]   only normalise (what the pre-commit hook does)
    python -m tools.notebooks setup [paths]       only write set-up cell and opening block anew; no cell is run
    python -m tools.notebooks check [paths]       say what is wrong, exit 1 if anything is
    python -m tools.notebooks student [paths]     copies without solutions below student/

Without paths: every notebook below chapters/. A refresh without a change gives the same file again, the run line and
the outputs of cells tagged nbval-ignore-output excepted.
"""

import argparse
import copy
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import psutil
import yaml
from nbclient import NotebookClient

from tools import opening, settings

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = ROOT / "chapters"
IGNORE = "nbval-ignore-output"
TAGS = frozenset(
    "setup hide-input hide-output hide-cell remove-cell gpu exercise solution widget whole raises-exception".split()
) | {IGNORE}
MAX_LINES = 15  # of a cell that teaches
MAX_WHOLE = 40  # of the one tagged "whole", the whole thing on one screen; and of those that are folded away
MAX_SECONDS, MAX_GIB = 80, 3  # on two slow cores without AVX-512; half of that on newer ones
COMPARED = 2 / 3
CORES = 2  # what the run line speaks of, and what a small hosted machine has
WIDGET = "application/vnd.jupyter.widget-view+json"
# A page that names the machine it was run on does not reproduce elsewhere.
MACHINE_PATH = re.compile(
    r"(?<![\w.:/])/(?:home|root|tmp|Users|opt|usr|mnt|srv|var|work(?:space)?s?)/|\b[A-Z]:\\{1,2}(?:Users|Windows|Program|Temp)|file:///"
)

SETUP_TAGS = ("setup", "hide-input")  # every page has it, so the built one folds it away
SETUP = """\
import importlib.util

if importlib.util.find_spec("dslib") is None:  # on Colab, Kaggle or Binder
    print("Installing dslib; torch and transformers stay as they are.")
    %pip install -q "dslib[ocr,serve] @ git+{url}"
    %pip install -q --no-deps --ignore-requires-python {models}

import dslib
"""


def find(paths=()):
    """The notebooks among files and folders `paths`; all chapters when empty. Raises SystemExit on a path not there."""
    found = []
    for path in [Path(p) for p in paths] or [CHAPTERS]:
        if not path.exists():
            raise SystemExit(f"error: no such notebook or folder: {path}")
        found += sorted(path.rglob("*.ipynb")) if path.is_dir() else [path]
    return [p for p in found if ".ipynb_checkpoints" not in p.parts]


def read(path):
    try:
        return nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat raises several unrelated types
        raise SystemExit(f"error: {path} is not a notebook: {error}") from error


def write(path, notebook):
    """Write with a fixed key order and one newline at the end; a file that stays the same is not touched."""
    text = nbformat.writes(notebook, version=4) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        part = path.with_suffix(".ipynb.part")
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)


def tags(cell):
    return list(cell.metadata.get("tags", []))


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


# ---------------------------------------------------------------- what refresh writes


def setup_source():
    """The setup cell; address and version come from the one place that names each."""
    url = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["repository"]["url"]
    lines = (ROOT / "requirements-models.txt").read_text(encoding="utf-8").splitlines()
    models = " ".join(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    return SETUP.format(url=url, models=models).rstrip()


def inject_setup(notebook):
    """Put the setup cell in second place, in place of an older one, whose number it keeps."""
    older = [cell for cell in notebook.cells if cell.get("id") == "setup" or "setup" in tags(cell)]
    cells = [cell for cell in notebook.cells if cell not in older]
    fold = {"code_prompt_show": "Show the set-up cell", "code_prompt_hide": "Hide the set-up cell"}
    metadata = {"mystnb": fold, "tags": list(SETUP_TAGS)}
    cell = nbformat.v4.new_code_cell(setup_source(), id="setup", metadata=metadata)
    cell.execution_count = older[0].get("execution_count") if older else None
    notebook.cells = [*cells[:1], cell, *cells[1:]]


def _normal_output(output):
    data = output.get("data", {})
    if len(data) > 1:
        # The live view needs a kernel and has a random id; the figure stored beside it is what a page can show.
        data.pop(WIDGET, None)
    output.pop("transient", None)
    return output


def normalise(notebook):
    """Take out of `notebook`, in place, what differs from run to run or from machine to machine. Returns it."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            # The exporter's name: without it, `nbconvert --to script` leaves the magics of the set-up cell as they are.
            "language_info": {"name": "python", "nbconvert_exporter": "python"},
        }
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    count = 0
    for cell in notebook.cells:
        # "mystnb" holds a figure's alt text and caption; the rest is timing and editor state.
        cell.metadata = nbformat.from_dict(
            {key: cell.metadata[key] for key in ("mystnb", "tags") if cell.metadata.get(key)}
        )
        if cell.cell_type != "code":
            continue
        executed = cell.get("execution_count") is not None and bool(cell.source.strip())
        count += executed
        cell.execution_count = count if executed else None
        cell.outputs = _merged_streams([_normal_output(output) for output in cell.outputs])
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = cell.execution_count
    return notebook


def _merged_streams(outputs):
    """Join neighbouring pieces of one stream: where a kernel cuts them is chance."""
    merged = []
    for output in outputs:
        last = merged[-1] if merged else None
        if last is not None and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
        else:
            merged.append(output)
    return merged


# ---------------------------------------------------------------- running


class PeakMemory:
    """Peak resident memory, in bytes, of the process `pid` and its children, sampled in a thread."""

    def __init__(self, pid):
        self.process, self.peak, self._stop = psutil.Process(pid), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _sample(self):
        family = [self.process, *self.process.children(recursive=True)]
        self.peak = max(self.peak, sum(member.memory_info().rss for member in family))

    def _watch(self):
        while not self._stop.wait(0.05):
            try:
                self._sample()
            except psutil.Error:
                return

    def stop(self):
        """End the watch; on Linux the kernel's own high-water mark catches what fell between two samples."""
        self._stop.set()
        self._thread.join()
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
            self.peak = max(self.peak, int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) * 1024)
        except (OSError, AttributeError):
            pass
        return self.peak


def limit_cores():
    """Keep this process and its kernels to two cores where the system can (Linux); return how many there are then."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def execute(notebook, folder, timeout=600):
    """Run `notebook`, in place, with `folder` as working directory. Returns (seconds, peak bytes of the kernel).

    Raises nbclient.exceptions.CellExecutionError on the first cell that fails.
    """
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        extra_arguments=["--log-level=ERROR"],  # ipykernel warns of an unencrypted connection to this same machine
    )
    start = time.perf_counter()
    with client.setup_kernel():
        memory = PeakMemory(client.km.provisioner.pid)
        try:
            for index, cell in enumerate(notebook.cells):
                client.execute_cell(cell, index, execution_count=client.code_cells_executed + 1)
        finally:
            peak = memory.stop()
    return time.perf_counter() - start, peak


def keep_timings(notebook, before):
    """Give cells whose output is not compared what they showed `before`, if their source is as it was.

    The timings of a page are of one machine and one run, and its words speak of them: a change elsewhere on the page is
    no reason to exchange some of them. What a GPU cell shows belongs to the recordings and is taken anew.
    """
    shown = {cell.get("id"): cell for cell in before.cells if cell.cell_type == "code" and cell.outputs}
    for cell in code_cells(notebook):
        old = shown.get(cell.get("id"))
        if old is not None and old.source == cell.source and IGNORE in tags(cell) and "gpu" not in tags(cell):
            cell.outputs = old.outputs
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = cell.execution_count


def committed(path):
    """The notebook as it was last committed, whose outputs belong to its cells; as it is where there is no commit.

    In a file that is being edited, a cell may still show what an earlier version of it printed.
    """
    show = ["git", "show", f"HEAD:./{path.name}"]
    done = subprocess.run(show, cwd=path.parent, capture_output=True, text=True, encoding="utf-8", check=False)
    return nbformat.reads(done.stdout, as_version=4) if done.returncode == 0 else read(path)


def refresh(path, cores=CORES, keep=False):
    """Run one notebook from its own folder and write it back; returns (seconds, peak bytes).

    With `keep`, timings of unchanged cells and the run line stay those of the page's last whole run.
    """
    notebook = read(path)
    before = committed(path) if keep else None
    inject_setup(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    seconds, peak = execute(notebook, path.parent)
    run = (round(seconds), peak / 2**30, cores, opening.today())
    if keep:
        keep_timings(notebook, before)
        run = opening.run_of(before) or run
    opening.fill(notebook, run, opening.page_of(path))
    write(path, normalise(notebook))
    return seconds, peak


# ---------------------------------------------------------------- checks: each yields sentences


def check_executed(notebook):
    """Every code cell ran, in order, from a fresh kernel."""
    counts = [cell.execution_count for cell in code_cells(notebook)]
    if counts != list(range(1, len(counts) + 1)):
        yield f"did not run from top to bottom: execution counts {counts}, wanted 1 to {len(counts)}"
    if not any(cell.outputs for cell in code_cells(notebook)):
        yield "has no outputs"


def check_outputs_present(notebook):
    """nbval passes a cell without stored output unseen: a cell that ends in something to show has to show it."""
    for cell in code_cells(notebook):
        last = cell.source.rstrip().splitlines()[-1]
        shows = re.match(r"(print|display|plots\.show|claims\.check|exercises\.check)\(", last) or re.fullmatch(
            r"[A-Za-z_][\w.]*", last.strip()
        )
        if shows and last == last.lstrip() and not cell.outputs and last not in ("pass", "break", "continue"):
            yield f"cell {cell.id!r} ends in {last!r} but has no output"
        if last.split("#")[0].rstrip().endswith(";"):
            yield f"cell {cell.id!r} ends in a semicolon: nbval shows the value all the same; write `_ = …`"


def check_clean_outputs(notebook):
    """No error, no stderr, no path of the machine, no widget state in what the page shows."""
    if "widgets" in notebook.metadata:
        yield "stores widget state"
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if output.output_type == "error" and "raises-exception" not in tags(cell):
                yield f"cell {cell.id!r} shows an error: {output.ename}: {output.evalue}"
            if output.output_type == "stream" and output.name == "stderr":
                yield f"cell {cell.id!r} shows stderr: {output.text.strip().splitlines()[0][:80]}"
            if WIDGET in output.get("data", {}):
                yield f"cell {cell.id!r} stores a live widget without a static figure"
            text = str(output.get("text", "")) + " ".join(
                str(value) for kind, value in output.get("data", {}).items() if not kind.startswith("image/png")
            )
            text = re.sub(r"base64,[A-Za-z0-9+/=\s]+", "", text) + str(output.get("traceback", ""))
            if found := MACHINE_PATH.search(text):
                yield f"cell {cell.id!r} shows a path of this machine: {text[found.start() :][:40]!r}"
    for cell in notebook.cells:
        if found := MACHINE_PATH.search(cell.source):
            yield f"cell {cell.id!r} names a path of this machine: {cell.source[found.start() :][:40]!r}"


def check_tags(notebook):
    for cell in notebook.cells:
        if unknown := sorted(set(tags(cell)) - TAGS):
            yield f"cell {cell.id!r} has the unknown tag {', '.join(unknown)}; known: {', '.join(sorted(TAGS))}"


def check_compared(notebook):
    """At least two thirds of the cells that show something are compared, and the others assert what has to hold."""
    showing = [cell for cell in code_cells(notebook) if cell.outputs]
    compared = [cell for cell in showing if IGNORE not in tags(cell) and _comparable(cell)]
    if showing and len(compared) < COMPARED * len(showing):
        yield f"only {len(compared)} of {len(showing)} cells with output are compared by nbval; wanted two thirds"
    for cell in code_cells(notebook):
        asserts = re.search(r"^\s*assert\b|\bclaims\.check\(", cell.source, re.MULTILINE)
        if IGNORE in tags(cell) and not asserts:
            yield f"cell {cell.id!r} is tagged {IGNORE} but asserts nothing"


def _comparable(cell):
    """nbval skips images and widgets: a cell that shows nothing else is not compared, whatever its tags say."""
    return any(
        output.output_type in ("stream", "error")
        or any(not kind.startswith("image/") for kind in output.get("data", {}))
        for output in cell.outputs
    )


def check_cells(notebook):
    """Short cells, unique and meaningful ids, no empty cell."""
    whole = [cell.id for cell in notebook.cells if "whole" in tags(cell)]
    if len(whole) > 1:
        yield f"more than one cell is tagged whole: {', '.join(whole)}"
    for cell in notebook.cells:
        lines = len(cell.source.strip().splitlines())
        most = MAX_WHOLE if {"whole", "hide-input"} & set(tags(cell)) else MAX_LINES
        if cell.cell_type == "code" and lines > most:
            yield f"cell {cell.id!r} has {lines} lines; at most {most}"
        if not lines:
            yield f"cell {cell.get('id')!r} is empty"
        if re.fullmatch(r"[0-9a-f]{8}", cell.get("id", "")):
            yield f"cell {cell.id!r}: give it an id that says what it is"
    ids = [cell.get("id") for cell in notebook.cells]
    if doubles := sorted({str(i) for i in ids if ids.count(i) > 1}):
        yield f"cell ids used twice: {', '.join(doubles)}"


def check_frame(notebook):
    """Title and run line first, then the setup cell that refresh would write."""
    cells = notebook.cells
    title = cells[0].source if cells and cells[0].cell_type == "markdown" else ""
    if not title.startswith("# "):
        yield "does not begin with a title"
    if not opening.run_of(notebook):
        yield "has no run line; make refresh writes it"
    second = cells[1] if len(cells) > 1 else None
    if second is None or (second.get("id"), second.source, tags(second)) != ("setup", setup_source(), list(SETUP_TAGS)):
        yield "its second cell is not the setup cell that make refresh writes"


def check_budget(notebook):
    """Within 80 s and 3 GiB, as measured when the notebook was last refreshed."""
    found = opening.run_of(notebook)
    if found and (found[0] > MAX_SECONDS or found[1] > MAX_GIB):
        yield f"is too heavy: {found[0]} s and {found[1]} GiB; at most {MAX_SECONDS} s and {MAX_GIB} GiB"


def check_normal(notebook):
    if nbformat.writes(normalise(copy.deepcopy(notebook))) != nbformat.writes(notebook):
        yield "is not normalised: run python -m tools.notebooks normalise on it"


CHECKS = (
    check_executed,
    check_outputs_present,
    check_clean_outputs,
    check_tags,
    check_compared,
    check_cells,
    check_frame,
    check_budget,
    check_normal,
)


def check_opening(notebook, path):
    """The block under the title is the one that pages.yml, the contents and the page itself give."""
    run = opening.run_of(notebook)
    if run and opening.title_cell(notebook, run, opening.page_of(path)) != notebook.cells[0].source:
        yield "its opening block is not up to date: run python -m tools.notebooks setup on it"


def without_solutions(notebook):
    """For a class: the notebook without its solution cells, the answers to be written."""
    notebook.cells = [cell for cell in notebook.cells if "solution" not in tags(cell)]
    return notebook


def write_student(paths, folder=ROOT / "student"):
    """Copies without solutions of these notebooks, with the drawings they show, below `folder`."""
    for path in paths:
        target = folder / path.resolve().relative_to(CHAPTERS)
        target.parent.mkdir(parents=True, exist_ok=True)
        for drawing in path.parent.glob("*.svg"):
            shutil.copy(drawing, target.parent)
        write(target, without_solutions(read(path)))
        print(target)


def problems(notebook):
    """Everything that is wrong with `notebook`, one sentence each."""
    return [problem for check in CHECKS for problem in check(notebook)]


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tools.notebooks", description="Run, normalise, check notebooks.")
    parser.add_argument("command", choices=("refresh", "normalise", "setup", "check", "student"))
    parser.add_argument("paths", nargs="*", help="notebooks or folders (default: all chapters)")
    parser.add_argument("--keep-timings", action="store_true", help="of cells that did not change, and the run line")
    options = parser.parse_intermixed_args(arguments)
    failed = 0
    if options.command == "refresh":
        settings.prepare()
    cores = limit_cores() if options.command == "refresh" else None
    if options.command == "student":
        write_student(find(options.paths))
        return 0
    for path in find(options.paths):
        if options.command == "refresh":
            try:
                seconds, peak = refresh(path, cores, options.keep_timings)
                print(f"{path}: {seconds:.0f} s, {peak / 2**30:.2f} GiB", flush=True)
            except Exception as error:  # go on with the others; the file on disk is left as it was
                failed += 1
                plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
                print(f"{path}: failed, not written\n{plain}", file=sys.stderr, flush=True)
        elif options.command == "normalise":
            write(path, normalise(read(path)))
        elif options.command == "setup":
            notebook = read(path)
            inject_setup(notebook)
            if run := opening.run_of(notebook):
                opening.fill(notebook, run, opening.page_of(path))
            write(path, normalise(notebook))
        else:
            notebook = read(path)
            for problem in [*problems(notebook), *check_opening(notebook, path)]:
                failed += 1
                print(f"{path}: {problem}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
