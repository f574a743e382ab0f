"""What it costs to choose experts, and what choosing or placing them in advance can save.

"Pre-allocating" experts can mean three things that exist. A table from token ids to experts (hash routing) makes the
choice before the layer runs. Sorting the tokens by expert before multiplying makes a choice cheap to carry out. And
*placing* experts, with copies of the busy ones, spreads the load over the GPUs that share a layer: it happens minutes
ahead, from statistics, and it is what DeepSeek does.

Book: ``chapters/performance/speed.ipynb``. Sources: Hash Layers (arXiv 2106.04426), MegaBlocks (arXiv 2211.15841),
DeepSeek-V3 (arXiv 2412.19437, section 3.4) and its load balancer EPLB for copies and placement.
"""

from collections.abc import Sequence
from typing import Any

import torch

from dslib.architecture.experts import Pairs
from dslib.architecture.moe import MoE, Router
from dslib.lab.device import as_device
from dslib.lab.timing import compare


@torch.inference_mode()
def routing_speed(
    hidden_size: int = 1024, intermediate_size: int = 1408, num_experts: int = 16, top_k: int = 2, tokens: int = 64,
    vocab_size: int = 32256, rounds: int = 7, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """One mixture's forward pass taken apart, in float32 on the best device.

    Returns:
        Timings: ``router`` (scores, choice, weights), ``table`` (looking the choice up by token id, and nothing else),
        ``sort`` (pairs by expert), ``layer`` (all of it, experts included), ``one by one`` (experts on one token after
        the other, without sorting).
    """
    device = as_device(None)
    torch.manual_seed(seed)
    layer = MoE(hidden_size, intermediate_size, Router(hidden_size, num_experts, top_k, norm_topk_prob=True))
    table = Router(hidden_size, num_experts, top_k, hash_vocab_size=vocab_size, seed=seed).to(device).tid2eid
    layer = layer.to(device).eval()
    x, ids = torch.randn(tokens, hidden_size, device=device), torch.randint(vocab_size, (tokens,), device=device)
    routing = layer.router(x)

    def one_by_one():
        return torch.cat([layer.experts(*(part[row : row + 1] for part in parts)) for row in range(tokens)])

    parts = (x, routing.indices, routing.weights)
    torch.testing.assert_close(one_by_one(), layer(x), atol=1e-4, rtol=1e-4)
    ways = {
        "router": lambda: layer.router(x),
        "table": lambda: table[ids],
        "sort": lambda: Pairs(routing.indices, num_experts).counts,
        "layer": lambda: layer(x),
        "one by one": one_by_one,
    }
    return compare(ways, rounds=rounds, device=device)


def place_experts(load: Sequence[float], gpus: int, copies: int = 0) -> list[list[int]]:
    """Which experts each GPU holds, for a load that is known in advance.

    Copies go to the expert whose copies are busiest, one at a time; then, the busiest first, every copy goes to the GPU
    with the least load that still has a place. All GPUs hold equally many.

    Args:
        load: of each expert, any unit. copies: how many experts are held twice (or more often).

    Returns:
        A list of expert numbers a GPU.

    Raises:
        ValueError: experts and copies that cannot be dealt out evenly, a negative load.
    """
    slots = len(load) + copies
    if gpus < 1 or copies < 0 or slots % gpus:
        raise ValueError(
            f"gpus, copies: got {gpus} and {copies}, expected {len(load)} experts + copies to fill all GPUs"
        )
    if min(load) < 0:
        raise ValueError(f"load: got {min(load)}, expected 0 or more")
    held = [1] * len(load)
    for _ in range(copies):
        held[max(range(len(load)), key=lambda expert: load[expert] / held[expert])] += 1
    pieces = sorted(((load[e] / held[e], e) for e in range(len(load)) for _ in range(held[e])), reverse=True)
    placed: list[list[int]] = [[] for _ in range(gpus)]
    busy = [0.0] * gpus
    for share, expert in pieces:
        free = [gpu for gpu in range(gpus) if len(placed[gpu]) < slots // gpus]
        # Not beside a copy of itself where that can be helped: it would balance nothing.
        gpu = min(free, key=lambda gpu: (busy[gpu], expert in placed[gpu]))
        placed[gpu].append(expert)
        busy[gpu] += share
    return placed


def imbalance(load: Sequence[float], placed: Sequence[Sequence[int]]) -> float:
    """Load of the busiest GPU over the mean: how much longer the layer takes than if the load were even."""
    held = [sum(experts.count(expert) for experts in placed) for expert in range(len(load))]
    busy = [sum(load[expert] / held[expert] for expert in experts) for experts in placed]
    return max(busy) / (sum(busy) / len(busy))
