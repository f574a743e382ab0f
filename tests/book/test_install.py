"""What Colab does: install dslib where torch and transformers are already, without the checkout, and run a chapter.

The environment made here sees every installed package of this one except dslib: a folder of links stands in for the
packages a hosted notebook brings. pip may not fetch anything, so it has to be content with the versions that are there.
"""

import json
import os
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHAPTER = ROOT / "chapters" / "architecture" / "published.ipynb"  # quick, with torch, transformers and data
RUN = """
import json, sys, nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell
page = nbformat.read(sys.argv[1], as_version=4)
look = "import dslib, dslib.data.files as p; print(dslib.__file__); print(p.data_path('claims.yml'))"
page.cells.append(new_code_cell(look))
NotebookClient(page, timeout=300, kernel_name="python3", extra_arguments=["--log-level=ERROR"]).execute(cwd=".")
print(json.dumps(page.cells[-1].outputs[0].text.splitlines()))
"""


def call(*command, cwd, **environment):
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PIP_"))}
    clean |= {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment}
    result = subprocess.run([str(part) for part in command], cwd=cwd, env=clean, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def installed(python, cwd):
    """name -> [version, folder] of each distribution that `python` sees."""
    code = (
        "import json, importlib.metadata as m;"
        "print(json.dumps({d.name.lower(): [d.version, str(d.locate_file(''))] for d in m.distributions()}))"
    )
    return json.loads(call(python, "-c", code, cwd=cwd))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """dslib's wheel, built without network by the build backend that is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    call(
        sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ROOT, cwd=folder
    )
    return next(folder.glob("dslib-*.whl"))


@pytest.fixture(scope="module")
def hosted(tmp_path_factory):
    """The Python of an environment with everything that is installed here, dslib excepted; in a folder with a space."""
    folder = tmp_path_factory.mktemp("a hosted notebook")
    packages = folder / "packages"
    packages.mkdir()
    for entry in next(Path(p) for p in site.getsitepackages() if Path(p).is_dir()).iterdir():
        # A .pth file would bring the checkout back; dslib's own record would tell pip that it is installed.
        if entry.suffix != ".pth" and "dslib" not in entry.name and entry.name != "__pycache__":
            (packages / entry.name).symlink_to(entry)
    venv.create(folder / "env", symlinks=True, with_pip=False)
    own = next((folder / "env" / "lib").glob("python3*")) / "site-packages"
    (own / "hosted.pth").write_text(f"{packages}\n")
    return folder / "env" / "bin" / "python"


def test_wheel_carries_the_data_and_no_tests(wheel, tmp_path):
    names = call(sys.executable, "-m", "zipfile", "-l", wheel, cwd=tmp_path)
    assert "dslib/_data/claims.yml" in names
    assert "measured/claims.py" in names
    assert "tests/" not in names and "tools/" not in names


def test_chapter_runs_where_only_the_wheel_is_installed(wheel, hosted, tmp_path):
    before = installed(hosted, tmp_path)
    assert {"torch", "transformers"} <= before.keys()
    assert "dslib" not in before

    call(hosted, "-m", "pip", "install", "-q", "--no-index", wheel, cwd=tmp_path)
    after = installed(hosted, tmp_path)
    assert after.pop("dslib")
    assert after == before, "installing dslib changed a package that was there"

    (tmp_path / "chapter.ipynb").write_bytes(CHAPTER.read_bytes())
    said = call(hosted, "-c", RUN, "chapter.ipynb", cwd=tmp_path, JUPYTER_PREFER_ENV_PATH="1")
    package, data = (Path(path) for path in json.loads(said.splitlines()[-1]))
    environment = hosted.parents[1]
    assert package.is_relative_to(environment), f"dslib came from {package}"
    assert data.is_relative_to(environment), f"its data came from {data}"
