"""Many adapters in one batch: a step of decoding in which every row has its own LoRA, beside one without any.

The large weights are read once for all rows; each row reads two thin matrices besides. On the best device here.
Recorded by ``make record PART=adapters-many`` and, on a GPU, ``PART=gpu``.
"""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dslib.architecture.cache import PreallocatedCache
from dslib.architecture.decoder import Decoder, build, preset
from dslib.check import one_of, whole
from dslib.migration.adapters import Adapter, lora
from dslib.migration.multi_lora import PerRow
from measured.machine import as_device
from measured.timing import compare, ratio

TARGETS = {"queries, keys, values": r"qkv_proj$", "every linear layer": r"\d\..*_proj$"}


def step_times(
    size: str = "tiny", targets: str = "queries, keys, values", batch: int = 8, rank: int = 8, length: int = 64,
    dtype: str = "float32", rounds: int = 7,
) -> dict[str, Any]:  # fmt: skip
    """Time a step of decoding behind ``length`` tokens, random weights of a preset's shape, plain modules throughout.

    Returns a Timing each of ``ways``: ``merged`` (one adapter in the weights, so as many products as without any),
    ``own`` (every row its own adapter, in one step) and ``apart`` (every row its own adapter, a step for each row); and
    ``share``: merged over own (median, low, high), 1 where adapters cost nothing.
    """
    one_of(TARGETS, targets=targets)
    whole(1, batch=batch, rank=rank, length=length, rounds=rounds)
    device, kind = as_device(None), getattr(torch, dtype)
    model = build(preset(size), seed=0, device=device, dtype=kind).eval()
    merged = copy.deepcopy(model)
    adapters = [_stirred(lora(model, TARGETS[targets], rank, seed=seed)) for seed in range(batch)]
    _stirred(lora(merged, TARGETS[targets], rank)).merge()
    bank = PerRow(adapters)
    caches = {count: _filled(model, count, length) for count in (1, batch)}
    token = torch.zeros(batch, 1, dtype=torch.long, device=device)

    @torch.inference_mode()
    def step(which: Decoder, rows: list[int]) -> Tensor:
        bank.rows, cache = rows, caches[len(rows)]
        cache.length = length  # the token before is written over
        return which(token[: len(rows)], cache)

    def apart() -> None:
        for row in range(batch):
            step(model, [row])

    every = list(range(batch))
    ways = {"merged": partial(step, merged, every), "own": partial(step, model, every), "apart": apart}
    seconds = compare(ways, rounds=rounds, warmup=2, device=device)
    share = ratio(seconds["merged"], seconds["own"])
    return {"ways": seconds, "share": [share.median, share.low, share.high], "batch": batch, "rank": rank}


@torch.no_grad()
def _stirred(adapter: Adapter) -> Adapter:
    """As after training: no product of the two matrices is zero."""
    for part in adapter.parts:
        part.lora_B.normal_(std=0.02)
    return adapter


@torch.inference_mode()
def _filled(model: Decoder, rows: int, length: int) -> PreallocatedCache:
    cache = model.make_cache(batch_size=rows, max_length=length + 1)
    model(torch.zeros(rows, length, dtype=torch.long, device=model.embed_tokens.weight.device), cache)
    return cache
