"""Settings for every pytest run from here, `pytest --nbval chapters/` included."""

from pathlib import Path


def pytest_configure(config):
    # Two machines draw the same figure with other bytes. Its text alternative, beside it, is compared.
    if getattr(config.option, "nbval_sanitize_with", False) is None:
        config.option.nbval_sanitize_with = str(Path(__file__).parent / "tests" / "notebooks" / "sanitize.cfg")
