"""Which GPU holds which experts: a load that is known in advance, spread by placing experts and copying the busy ones.

This happens minutes ahead, from statistics, and it is what DeepSeek does. Choosing experts in advance (hash routing)
and sorting tokens by expert are other things that "pre-allocating experts" can mean.

Book: ``chapters/performance/speed.ipynb``. Sources: DeepSeek-V3 (arXiv 2412.19437, section 3.4) and its load balancer
EPLB for copies and placement.
"""

from collections.abc import Sequence

from dslib import check


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
    check.at_least(0, load=min(load))
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
