"""One thread for every test that is not about speed.

Both sides of a comparison then add in one order, and tests do not wait for each other's threads: OpenMP threads wait by
spinning, so two of them on busy cores can take ten times as long as one. Set before anything imports torch.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
