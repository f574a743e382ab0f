"""Which GPU holds which experts: a load that is known in advance, spread by placing experts and copying the busy ones.

This happens minutes ahead, from statistics, and it is what DeepSeek does. Choosing experts in advance (hash routing)
and sorting tokens by expert are other things that "pre-allocating experts" can mean.

Book: ``chapters/performance/speed.ipynb``. Sources: DeepSeek-V3 (arXiv 2412.19437, section 3.4) and its load balancer
EPLB for copies and placement.
"""

from collections.abc import Sequence

from dslib import check


def place_experts(load: Sequence[float], gpus: int, copies: int = 0) -> list[list[int]]:
    """The numbers of the experts that each GPU holds; ``load`` is each expert's, ``copies`` how many are held again.

    Copies go to the expert whose copies are busiest, one at a time; then, the busiest first, every copy goes to the GPU
    with the least load that still has a place. All GPUs hold equally many.

    Raises:
        ValueError: experts and copies that cannot be dealt out evenly, no load, or one that is negative or NaN.
    """
    _check_load(load)
    check.whole(1, gpus=gpus)
    check.whole(0, copies=copies)
    slots = len(load) + copies
    if slots % gpus:
        raise ValueError(
            f"gpus, copies: got {gpus} and {copies}, expected {len(load)} experts + copies to fill all GPUs"
        )
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
    """Load of the busiest GPU over the mean: how much longer the layer takes than if the load were even.

    Raises:
        ValueError: no load anywhere, a negative or NaN one, or an expert that no GPU holds.
    """
    _check_load(load)
    held = [sum(experts.count(expert) for experts in placed) for expert in range(len(load))]
    check.whole(1, **{f"placed, copies of expert {expert}": copies for expert, copies in enumerate(held)})
    busy = [sum(load[expert] / held[expert] for expert in experts) for experts in placed]
    check.above(0, **{"load, sum": sum(busy)})
    return float(max(busy) / (sum(busy) / len(busy)))


def _check_load(load: Sequence[float]) -> None:
    check.whole(1, **{"load, experts": len(load)})
    for value in load:
        check.at_least(0, load=value)
