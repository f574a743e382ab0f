"""Where the project's data files lie: the one function that knows, in a checkout and in an installed wheel alike."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
# A wheel carries data/ inside the package (pyproject.toml, force-include); a checkout has it beside the package.
_CANDIDATES = (_PACKAGE / "_data", _PACKAGE.parent / "data")


def data_path(name: str = "") -> Path:
    """Path of a file or folder below ``data/``, e.g. ``data_path("claims.yml")``.

    Raises:
        FileNotFoundError: naming the file and the places looked in.
    """
    for root in _CANDIDATES:
        path = root / name
        if (root / "claims.yml").exists() and path.exists():
            return path
    looked = " and ".join(str(root) for root in _CANDIDATES)
    raise FileNotFoundError(
        f"data file {name!r} not found; looked in {looked}. Reinstall dslib, or run from a checkout."
    )
