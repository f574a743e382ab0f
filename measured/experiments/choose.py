"""How fast this machine decodes three small models in 32 and in 4 bits: what choosing is calibrated by.

Book: ``chapters/scenarios/choose.ipynb``.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from dslib import fast
from dslib.architecture.decoder import DecoderConfig, build
from dslib.architecture.int4.layers import quantize_
from dslib.performance.speed import bytes_per_token
from measured.experiments.speed import design, latency
from measured.probes import read_bandwidth

FORMATS = ("float32", "int4")
GROUP = 32  # weights that share a scale
READ = 256 << 20  # bytes
# Larger than most caches. The second has three times as many layers, each a quarter as large.
MODELS = {
    "dense": replace(design("V1", "30m"), num_hidden_layers=4),
    "dense, narrow and deep": DecoderConfig(8192, 256, 704, 12, 4, 4),
    "mixture": replace(design("V3", "30m"), num_hidden_layers=2),
}


def decode_runs(
    models: Mapping[str, DecoderConfig] = MODELS, prompt_tokens: int = 16, new_tokens: int = 8, runs: int = 2,
    seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Decode one text with random weights on the processor, each model in each of :data:`FORMATS`.

    Returns:
        ``bandwidth``: bytes a second that a plain read reaches; ``runs``: one mapping each, with ``model``, ``format``,
        ``bytes`` that a token reads and ``seconds`` a token (a Timing).
    """
    rows = []
    for name, config in models.items():
        for fmt in FORMATS:
            model = build(config, seed=seed, dtype=torch.float32).eval()
            if fmt == "int4":
                fast.prepare(quantize_(model, GROUP, skip=("lm_head",)))
            timing = latency(model, prompt_tokens, new_tokens, runs=runs, seed=seed)["per_token"]
            moved = bytes_per_token(model, prompt_tokens + new_tokens // 2)
            rows.append({"model": name, "format": fmt, "bytes": moved, "seconds": timing})
    return {"bandwidth": read_bandwidth("cpu", size=READ, max_seconds=0.2), "runs": rows}
