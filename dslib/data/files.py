"""Where files lie: the project's own data, and weights that are fetched once and kept.

:func:`data_path` is the one function that knows where ``data/`` is, in a checkout and in an installed wheel alike.
"""

import contextlib
import io
import os
from functools import cache
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parents[1]
# A wheel carries data/ inside the package (pyproject.toml, force-include); a checkout has it beside the package.
_CANDIDATES = (_PACKAGE / "_data", _PACKAGE.parent / "data")
# What is fetched of a model on the hub.
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt")
OTHER_LAYOUTS = ("consolidated*", "original/*")  # the same weights once more


def data_path(name: str = "") -> Path:
    """Path of a file or folder below ``data/``, e.g. ``data_path("claims.yml")``. ``FileNotFoundError`` in words."""
    for root in _CANDIDATES:
        path = root / name
        if (root / "claims.yml").exists() and path.exists():
            return path
    looked = " and ".join(str(root) for root in _CANDIDATES)
    raise FileNotFoundError(f"data file {name!r}: not in {looked}. Reinstall dslib, or run from a checkout.")


def read_yaml(name: str) -> Any:
    """The contents of a YAML file below ``data/``, read once. ValueError, with file and line, for what is no YAML."""
    return _parsed(data_path(name))


@cache
def _parsed(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path.name} line {mark.line + 1}" if mark else path.name
        raise ValueError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error


class WeightsNotFound(FileNotFoundError):
    """No source has the weights; the message says what was tried and what to install."""


def cache_root() -> Path:
    """Folder for unpacked weights, absolute: ``$DSLIB_CACHE``, else ``$XDG_CACHE_HOME/dslib``, else ``~/.cache/dslib``.

    It need not exist, and reading from it needs no right to write. A leading ``~`` is the home folder, a relative path
    starts at the current folder, and a blank one counts as none.

    Raises:
        ValueError: the path is that of a file or leads through one, or ``~`` leads nowhere.
    """
    chosen = os.environ.get("DSLIB_CACHE", "").strip()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    shared = shared if os.path.isabs(shared) else "~/.cache"  # a relative one counts as none, says its specification
    name, value = ("DSLIB_CACHE", chosen) if chosen else ("XDG_CACHE_HOME", f"{shared}/dslib")
    try:
        root = Path(value).expanduser().absolute()
    except RuntimeError as error:  # of expanduser
        raise ValueError(f"{name}: got {value!r}, expected a folder; there is no such home folder") from error
    # What cannot even be looked at counts as absent here: whoever then writes is told so by the system.
    if blocked := [one for one in (root, *root.parents) if os.path.exists(one) and not os.path.isdir(one)]:
        raise ValueError(f"{name}: got {value!r}, expected a folder, but {blocked[0]} is a file")
    return root


def from_hub(hub_id: str, revision: str | None = None) -> Path:
    """Folder with a model of the Hugging Face hub, its local cache first. ``WeightsNotFound`` says what went wrong."""
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    said = "no *.safetensors file"
    for offline in (True, False):  # what was fetched before needs no network
        try:
            folder = snapshot_download(
                hub_id, revision=revision, allow_patterns=list(HUB_FILES), ignore_patterns=list(OTHER_LAYOUTS),
                local_files_only=offline, etag_timeout=10,
            )  # fmt: skip
            if any(Path(folder).glob("*.safetensors")):
                return Path(folder)
        # Network libraries raise many kinds of OSError and of HTTP error when there is no network; a disk may be full.
        except (OSError, HfHubHTTPError, ValueError, httpx.HTTPError) as error:
            said = " ".join(str(error).split()) or type(error).__name__
    raise WeightsNotFound(f"{hub_id}: not in the local hub cache, and could not be fetched from the hub ({said})")


@contextlib.contextmanager
def quiet():
    """No progress bars or notices while transformers unpacks: a chapter's output stays clean."""
    from unittest import mock

    from transformers import modeling_gguf_pytorch_utils as reader
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()  # in a notebook they are widgets, which no redirection catches
    no_bar = mock.patch.object(reader, "tqdm", lambda items, **_: items)  # the GGUF reader's own knows no switch
    try:
        with no_bar, contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
