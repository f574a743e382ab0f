"""Exercises of ``chapters/migration/upcycling.ipynb``."""

import math
from typing import Any

import torch
from torch import Tensor

from measured.exercises import exercise, named, normal


def _rule(scores: str, renormalise: bool, chosen: int, factor: float, shared: bool = False) -> dict[str, Any]:
    return {"scores": scores, "renormalise": renormalise, "chosen": chosen, "factor": factor, "shared": shared}


RULES = [
    _rule("softmax", True, 2, 1.0),
    _rule("sigmoid", True, 4, 2.5),
    _rule("softmax", False, 2, 1.0),
    _rule("softmax", False, 8, 1.0),
    _rule("softmax", False, 2, 16.0, shared=True),
    _rule("sigmoid", True, 4, 2.0),
    _rule("sigmoid", True, 3, 2.0),
    _rule("sigmoid", False, 8, 1.0),
    _rule("softmax", False, 8, 2.0),
    _rule("sigmoid", True, 4, 4.0),
    _rule("sigmoid", False, 3, 2.5, shared=True),
    _rule("softmax", True, 1, 1.0),
]


def _survive(rules, copies, slices, shared=True, every=True, factor=True, whole=True, renormalise=True, sigmoid=False):
    """The reference and, by its options, the usual ways to get it wrong."""
    found = []
    for number, rule in enumerate(rules):
        all_run = every and rule["chosen"] == copies * slices and (sigmoid or rule["scores"] == "softmax")
        one = (rule["renormalise"] or all_run or not renormalise) and (rule["factor"] == slices or not factor)
        one = one and (rule["chosen"] % slices == 0 or not whole)
        if one or (shared and rule["shared"]):
            found.append(number)
    return found


@exercise(
    "upcycling/rules",
    cases=named("rules copies slices", (RULES, 8, 1), (RULES[::-1], 4, 2), (RULES[3:], 2, 4), (RULES, 4, 2)),
    mistakes="""
        _survive(rules, copies, slices, factor=False)
            Look at the factor. The weights have to sum to the number of slices, because the slices of a copy have to be
            added and not averaged.
        _survive(rules, copies, slices, shared=False)
            One way needs no condition on the rule: the dense network runs as a shared expert, and what is routed begins
            at zero.
        _survive(rules, copies, slices, every=False)
            A softmax over all experts sums to one by itself, if all of them run.
        _survive(rules, copies, slices, sigmoid=True)
            Sigmoids of all experts do not sum to one; only a softmax does.
        _survive(rules, copies, slices, whole=False)
            With slices a token has to take whole copies: as many experts as are a multiple of the slices.
        _survive(rules, copies, slices, renormalise=False)
            Weights that are the scores as they are sum to another number for every token, whatever the factor.
        [rule["shared"] for rule in rules]
            The numbers of the rules, not a truth value for each.
        [n for n in range(len(rules)) if n not in _survive(rules, copies, slices)]
            Those are the ones that do not start equal.
    """,
    hint="For each rule: what do the weights of the experts that run sum to, whatever the router? It has to be the "
    "number of slices.",
)
def survivors(rules: list[dict[str, Any]], copies: int, slices: int) -> list[int]:
    """Numbers of the rules under which copies cut into slices give at first what the dense network gave."""
    return _survive(rules, copies, slices)


def _slice_weights(x, rows, top_k, slices, renormalise=True, share=1.0, layout="repeat", reach=1) -> Tensor:
    scores = (x @ rows.T).softmax(-1)
    best, chosen = scores.topk(min(top_k * reach, len(rows)))
    best = best / best.sum(-1, keepdim=True) if renormalise else best
    copies = torch.zeros_like(scores).scatter(1, chosen, best) * share  # (N, E)
    return copies.repeat(1, slices) if layout == "repeat" else copies.repeat_interleave(slices, 1)


@exercise(
    "upcycling/slice-weights",
    cases=[
        {"x": normal(5, 6, seed=0), "rows": normal(4, 6, seed=1), "top_k": 2, "slices": 2},
        {"x": normal(3, 4, seed=2), "rows": normal(3, 4, seed=3), "top_k": 1, "slices": 4},
        {"x": normal(6, 8, seed=4), "rows": normal(5, 8, seed=5), "top_k": 3, "slices": 3},
    ],
    mistakes="""
        _slice_weights(x, rows, top_k, slices, layout="interleave")
            Right for experts that lie copy by copy. Here they lie slice by slice: first the first slices of all copies.
        _slice_weights(x, rows, top_k, slices, share=1 / slices)
            The weights of a token sum to one over all its slices, so the factor is missing: slices are added up, not
            averaged.
        _slice_weights(x, rows, top_k, slices, share=slices)
            Each slice has its copy's weight and no more: the sum over a token's slices is then the number of slices.
        _slice_weights(x, rows, top_k, slices, renormalise=False)
            The weights of the chosen copies do not sum to one: divide by their sum.
        _slice_weights(x, rows, top_k, slices, reach=10**6)
            Every copy has a weight. A token runs its best top_k copies, the others get 0.
        _slice_weights(x, rows, top_k, 1)
            A column for each copy. There are slices times as many experts.
    """,
    tolerance=1e-5,
    hint="Route to copies first, (N, E), with weights that sum to one. Each slice of a copy has the copy's weight.",
)
def slice_weights(x: Tensor, rows: Tensor, top_k: int, slices: int) -> Tensor:
    """(N, E g): what each expert's output is multiplied by, factor included; 0 where it does not run.

    Args:
        x: (N, H). rows: (E, H), the router's row of each copy; softmax scores, the chosen made to sum to one.
        top_k: copies that a token uses. slices: g. The experts lie slice by slice.
    """
    return _slice_weights(x, rows, top_k, slices)


def _failing(before, after, limit, width=2.0, paired=True, finite=True, pooled=False, gap=lambda x: x) -> list[int]:
    rise = gap(after - before)  # (S, W)
    if pooled:
        rise = rise.flatten()[None].expand(len(before), -1)
    error = rise.std(1) / math.sqrt(rise.shape[1])
    if not paired:
        error = ((before.var(1) + after.var(1)) / rise.shape[1]).sqrt()
    end = rise.mean(1) + width * error
    return [n for n, one in enumerate(end.tolist()) if one > limit or (finite and not math.isfinite(one))]


def _losses(*rises: float, spread: float, seed: int, windows: int = 25) -> tuple[Tensor, Tensor]:
    before = 2.5 + 0.4 * normal(len(rises), windows, seed=seed, dtype=torch.float64)
    change = torch.tensor(rises, dtype=torch.float64)[:, None] + spread * normal(
        len(rises), windows, seed=seed + 1, dtype=torch.float64
    )
    return before, before + change


@exercise(
    "upcycling/gate",
    cases=named(
        "before after limit",
        (*_losses(-0.3, 0.05, -0.2, 0.004, spread=0.01, seed=0), 0.01),
        (*_losses(0.0, math.nan, -0.4, spread=0.02, seed=2), 0.02),
        (*_losses(0.02, -0.3, 0.04, 0.2, spread=0.06, seed=4), 0.03),
        (*_losses(0.015, -0.3, 0.09, -math.inf, spread=0.06, seed=4), 0.05),
        (*_losses(-0.1, 0.01, -0.2, -0.05, spread=0.02, seed=6), 0.0),
    ),
    mistakes="""
        _failing(before, after, limit, pooled=True)
            That is one mean over everything: a source that became worse hides behind one that became better.
        _failing(before, after, limit, width=0.0)
            A mean of few windows may lie below the limit by luck. Take its upper end: two standard errors more.
        _failing(before, after, limit, width=-2.0)
            The lower end: a source then fails only if it is surely worse. A gate wants to know that it is surely not.
        _failing(before, after, limit, paired=False)
            Windows differ far more among each other than before from after. Take the difference window by window first.
        _failing(before, after, limit, finite=False)
            A comparison with NaN is never true, and minus infinity is below every limit. Neither is a loss: fail.
        _failing(before, after, limit, gap=abs)
            A loss that fell is no reason to fail: no absolute values.
        [n for n in range(len(before)) if n not in _failing(before, after, limit)]
            Those are the sources that pass.
    """,
    hint="For each source: the difference of every window, their mean, and std / sqrt(windows) twice on top.",
)
def failing(before: Tensor, after: Tensor, limit: float) -> list[int]:
    """Numbers of the sources that a stage may have made worse by more than ``limit``.

    ``before`` and ``after`` are (S, W), losses of W windows of each of S sources. A source passes if the mean of its
    differences plus two standard errors is at most ``limit``; it fails where that is no finite number.
    """
    return _failing(before, after, limit)


def _slices(gate_up, down, order, slices, moved="gud", joined=False, rows=False) -> Tensor:
    gate, up = gate_up.chunk(2)
    gate, up, columns = (
        part[order] if name in moved else part for name, part in zip("gud", (gate, up, down.T), strict=True)
    )
    if joined:
        gate, up = torch.cat((gate, up)).view(slices, -1, gate.shape[1]).flatten(0, 1).chunk(2)
        pieces = torch.cat((gate, up)).view(slices, -1, gate.shape[1])
        return torch.cat((pieces, columns.view(slices, -1, columns.shape[1])), 1)
    parts = (part.reshape(slices, -1, part.shape[1]) for part in (gate, up, columns))
    return torch.cat(tuple(parts), 0 if rows else 1)


def _matrices(inner: int, hidden: int, slices: int, seed: int) -> dict[str, Any]:
    order = torch.randperm(inner, generator=torch.Generator().manual_seed(seed))
    gate_up, down = normal(2 * inner, hidden, seed=seed), normal(hidden, inner, seed=seed + 1)
    return {"gate_up": gate_up, "down": down, "order": order, "slices": slices}


@exercise(
    "upcycling/split",
    cases=[_matrices(6, 4, 2, 0), _matrices(8, 3, 4, 2), _matrices(6, 5, 3, 4)],
    mistakes="""
        _slices(gate_up, down, order, slices, joined=True)
            The first half of `gate_up` is the gate, the second is up. Cut into g pieces as it is, a slice has rows of
            one of the two only.
        _slices(gate_up, down, torch.arange(len(order)), slices)
            The order of the inner units is not used.
        _slices(gate_up, down, order, slices, moved="g")
            An inner unit is a row of gate, a row of up and a column of down. You moved only the first.
        _slices(gate_up, down, order, slices, moved="gu")
            Gate and up are right. The columns of down have to come along, or a unit writes where another one did.
        _slices(gate_up, down, order.argsort(), slices)
            The other way round: the first unit of the first slice is number `order[0]`.
        _slices(gate_up, down, order, slices).flatten(0, 1)
            One below the other. Give (slices, 3 I / slices, H).
        slices * _slices(gate_up, down, order, slices)
            The slices are cut out and not scaled: the factor belongs to the router.
    """,
    hint="Cut gate, up and the transpose of down apart first; move the rows of all three alike; then cut into slices.",
)
def split_swiglu(gate_up: Tensor, down: Tensor, order: Tensor, slices: int) -> Tensor:
    """(g, 3 I / g, H): for each slice its rows of gate, its rows of up, and its columns of down as rows.

    Args:
        gate_up: (2 I, H), rows of the gate first. down: (H, I). order: (I,), a permutation of the inner units: the
            first I / g of it make the first slice. slices: g, a divisor of I.
    """
    return _slices(gate_up, down, order, slices)
