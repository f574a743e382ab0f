"""Settings for every pytest run from here, `pytest --nbval chapters/` included."""

import os
from pathlib import Path

from tools import settings

# Workers that each start a thread per core fight over the cores: OpenMP threads wait by spinning, and two kernels with
# two threads each on two cores run ten times slower than one after the other. Set before anything imports torch.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _WORKERS > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _WORKERS)))
settings.prepare()


def pytest_configure(config):
    # Two machines draw the same figure with other bytes. Its text alternative, beside it, is compared.
    if getattr(config.option, "nbval_sanitize_with", False) is None:
        config.option.nbval_sanitize_with = str(Path(__file__).parent / "tests" / "notebooks" / "sanitize.cfg")
