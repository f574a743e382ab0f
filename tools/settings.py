"""The settings under which notebooks are run and compared: the book's own, whatever the reader has.

A profile of IPython may show every expression of a cell, a matplotlibrc may ask for LaTeX, TRANSFORMERS_VERBOSITY=info
fills stderr, and where the home folder cannot be written matplotlib says so in the first cell that imports it.
`conftest.py` calls `prepare` for every run of pytest, `python -m tools.notebooks refresh` for every refresh; kernels
and workers inherit what it sets.
"""

import atexit
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from dslib.data.files import cache_root

DONE = "DSLIB_BOOK_SETTINGS"  # names the folder; workers find it set
READERS = re.compile(r"MPLBACKEND|MATPLOTLIBRC|JUPYTER_(CONFIG_)?PATH|PYTHON.+|\w+_VERBOSITY|TORCH_(CPP_)?LOG\w*")
KEPT = {  # where Python finds things, how it writes them; and what makes no difference to what a cell shows
    "PYTHONHOME", "PYTHONPATH", "PYTHONNOUSERSITE", "PYTHONHASHSEED", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX",
    "PYTHONUTF8", "PYTHONIOENCODING", "PYTHONCOERCECLOCALE",
}  # fmt: skip
OURS = {
    "IPYTHONDIR": "ipython",
    "MPLCONFIGDIR": "matplotlib",
    "JUPYTER_CONFIG_DIR": "jupyter",
    "JUPYTER_RUNTIME_DIR": "runtime",
}
# IPython's own defaults once more: some clusters have a profile for all users, which only a profile's can overrule.
PROFILE = """\
c = get_config()
c.InteractiveShell.ast_node_interactivity = "last_expr"
c.InteractiveShell.ast_transformers = []
c.IPKernelApp.exec_lines = c.IPKernelApp.exec_files = c.IPKernelApp.extensions = []
c.PlainTextFormatter.float_precision = ""
c.PlainTextFormatter.pprint = True
"""


def writable(folder: Path) -> bool:
    """Whether files can be made in `folder`, which is made itself if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def prepare() -> None:
    """Change this process's environment; what it starts later has the book's settings."""
    if DONE in os.environ:
        return
    folder = Path(sys.prefix, "share", "book-settings")  # kept: the list of fonts takes seconds to make
    if sys.prefix == sys.base_prefix or not writable(folder):
        folder = Path(tempfile.mkdtemp(prefix="book-settings-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in [name for name in os.environ if READERS.fullmatch(name) and name not in KEPT]:
        del os.environ[name]
    for name, part in OURS.items():
        (folder / part).mkdir(exist_ok=True)
        os.environ[name] = str(folder / part)
    profile = folder / "ipython" / "profile_default" / "ipython_kernel_config.py"
    profile.parent.mkdir(exist_ok=True)
    if not profile.exists() or profile.read_text(encoding="utf-8") != PROFILE:
        profile.write_text(PROFILE, encoding="utf-8")
    os.environ |= {DONE: str(folder), "JUPYTER_PREFER_ENV_PATH": "1"}
    try:
        can_keep = writable(cache_root())
    except (RuntimeError, ValueError):  # no HOME, or one that leads through a file
        can_keep = False
    if not can_keep:
        os.environ["DSLIB_CACHE"] = str(folder / "weights")
    if not any((folder / "matplotlib").glob("fontlist*")):  # or the first cell says that it is being made
        subprocess.run([sys.executable, "-c", "import matplotlib.font_manager"], capture_output=True)
