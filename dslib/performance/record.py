"""``make record``: measure this machine and write ``data/recordings/<machine>.json``.

On a GPU it records what the chapters' GPU cells show, with the very same functions and arguments; on a CPU it runs the
same functions at the ``tiny`` size, which proves the command and records a CPU.

Four parts take longer than a page should, and are made on a CPU with nothing else running: ``make record PART=experts``
and ``PART=experts-training`` time layers of experts (4 and 13 minutes), ``PART=training`` and ``PART=depth`` train
small models (20 and 10 minutes).
"""

import argparse
import sys

import torch

from dslib.lab import recordings
from dslib.lab.probes import launch_gap
from dslib.lab.roofline import roof_figures
from dslib.performance.depth_experiments import exit_runs
from dslib.performance.moe_experiments import train_designs
from dslib.performance.moe_speed import moe_grid
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
FORWARD_CALLS = tuple(
    (moe_grid, {"dtype": dtype, "precision": precision})
    for dtype, precision in (("float32", "highest"), ("float32", "medium"), ("bfloat16", "highest"))
)
BACKWARD_CALLS = tuple((moe_grid, {"dtype": dtype, "training": True}) for dtype in ("float32", "bfloat16"))
LARGER = {"hidden_size": 128, "length": 64, "steps": 400}
HASTY = ["bias", "64, top 8", "63, top 7, 1 shared", "dense, active size"]
TRAINING_CALLS = (
    (train_designs, {**LARGER, "seeds": 5, "learning_rate": 1.5e-3}),
    (train_designs, {**LARGER, "seeds": 3, "learning_rate": 3e-3, "designs": HASTY}),
)
DEPTH_CALLS = ((exit_runs, {"seeds": 3}),)
PARTS = {
    "machine": GPU_CALLS if torch.cuda.is_available() else CPU_CALLS,
    "experts": FORWARD_CALLS,
    "experts-training": BACKWARD_CALLS,
    "training": TRAINING_CALLS,
    "depth": DEPTH_CALLS,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dslib.performance.record", description=__doc__)
    parser.add_argument("--out", default=None, help="file to write (default: data/recordings/<machine>.json)")
    parser.add_argument("--part", choices=PARTS, default="machine", help="what to measure (default: machine)")
    options = parser.parse_args(arguments)
    for function, call in PARTS[options.part]:
        print(f"{function.__name__}({', '.join(f'{name}={value!r}' for name, value in call.items())})", flush=True)
        # After each call, so that a stop loses one and not all.
        path = recordings.write(options.out, [recordings.record(function, **call)])
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
