"""``make record``: measure this machine and write ``data/recordings/<machine>.json``.

On a GPU it records what the chapters' GPU cells show, with the very same functions and arguments; on a CPU it runs the
same functions at the ``tiny`` size, which proves the command and records a CPU.
"""

import argparse
import sys

import torch

from dslib.lab import recordings
from dslib.lab.probes import launch_gap
from dslib.lab.roofline import roof_figures
from dslib.performance.speed import decode_speed, window_speed

# What the GPU cells of the chapters ask for; tests hold the two together.
GPU_CALLS = (
    (roof_figures, {}),
    (launch_gap, {"side": 8192}),
    (decode_speed, {"name": "1.3b", "dtype": "bfloat16"}),
    (decode_speed, {"name": "1.3b", "dtype": "bfloat16", "batch_size": 32}),
    (window_speed, {"length": 16384, "window": 1024, "heads": 16, "head_dim": 128, "dtype": "bfloat16"}),
)
CPU_CALLS = (
    (roof_figures, {"dtypes": ["float32"], "max_seconds": 0.2}),
    (launch_gap, {"side": 256}),
    (decode_speed, {"name": "tiny", "dtype": "float32", "prompt_tokens": 16, "new_tokens": 32}),
    (window_speed, {"length": 1024, "window": 64, "heads": 2, "head_dim": 32, "rounds": 3}),
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dslib.performance.record", description=__doc__)
    parser.add_argument("--out", default=None, help="file to write (default: data/recordings/<machine>.json)")
    options = parser.parse_args(arguments)
    made = []
    for function, call in GPU_CALLS if torch.cuda.is_available() else CPU_CALLS:
        print(f"{function.__name__}({', '.join(f'{name}={value!r}' for name, value in call.items())})", flush=True)
        made.append(recordings.record(function, **call))
    print(f"wrote {recordings.write(options.out, made)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
