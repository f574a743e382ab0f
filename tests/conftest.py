"""One thread for every test that is not about speed.

Both sides of a comparison then add in one order, and tests do not wait for each other's threads: OpenMP threads wait by
spinning, so two of them on busy cores can take ten times as long as one. Set before anything imports torch.
"""

import gc
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

# Above ten seconds each. `make test` hands out files in this order: a long one that began last would leave a core idle.
LONG = [
    "fast/test_exact.py", "scenarios/serving/test_engine.py", "measured/test_exercises.py",
    "notebooks/test_notebooks.py", "measured/test_recordings.py", "performance/test_speculative.py",
    "book/test_install.py",
    "experiments/test_whole.py", "experiments/test_reasoning.py", "experiments/test_int4_speed.py",
    "fast/test_cuda_graph.py",
    "scenarios/serving/test_load.py", "experiments/test_realtime.py", "experiments/test_decoder.py",
    "book/test_workflow.py", "scenarios/serving/test_server.py", "measured/test_plots.py", "book/test_explore.py",
    "experiments/test_adapters.py", "experiments/test_speed.py", "book/test_model.py", "book/test_processor.py",
]  # fmt: skip


def pytest_collection_modifyitems(items):
    place = {Path(__file__).parent / name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path, len(LONG)))


def pytest_collection_finish():
    # Before each reading of a time garbage is collected. What all the imports brought stays; looking through it would
    # take a quarter of a second every time.
    gc.collect()
    gc.freeze()
