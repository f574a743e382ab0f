"""Exercises of ``chapters/architecture/sampling.ipynb``. Shapes: B rows, V tokens of the vocabulary."""

import math

import torch
from torch import Tensor

from measured.exercises import exercise, named, normal

# No two alike, and no sum near a p below: the same tokens stay on every machine, whatever order a sort gives to ties.
_SMALL = torch.tensor([[0.12, 0.5, 0.04, 0.26, 0.08], [0.5, 0.12, 0.08, 0.04, 0.26]]).log()


def _both(
    logits: Tensor, k: int, p: Tensor, renormalise: bool = True, crossing: bool = True, rows: bool = True
) -> Tensor:
    """Top-k, then top-p, and what it becomes by a usual mistake."""
    largest, ids = logits.topk(k)
    share = largest.softmax(-1) if renormalise else logits.softmax(-1).gather(-1, ids)
    stays = share.cumsum(-1) - (share if crossing else 0) < (p if rows else p[:1])[:, None]
    return torch.full_like(logits, -torch.inf).scatter(-1, ids, largest.masked_fill(~stays, -torch.inf))


def _in_sorted_places(logits: Tensor, k: int, p: Tensor) -> Tensor:
    ordered = _both(logits.sort(descending=True).values, k, p)
    return logits.masked_fill(ordered == -torch.inf, -torch.inf)


@exercise(
    "sampling/temperature",
    cases=named("ratio wanted", (100.0, 10.0), (8.0, 2.0), (3.0, 27.0), (5.0, 5.0), (1.5, 40.0)),
    mistakes="""
        math.log(wanted) / math.log(ratio)
            That is 1/T. At a temperature of 2, a ratio of 100 becomes its square root, 10.
        ratio / wanted
            A temperature does not divide the ratio: it takes a power of it. Logits are divided, ratios become powers.
        math.log(ratio / wanted)
            A quotient of logarithms is needed, and not the logarithm of a quotient.
        ratio ** (1 / wanted)
            Here T is what is asked for: solve wanted = ratio ** (1 / T) for it.
    """,
    hint="ratio ** (1 / T) = wanted. Take logarithms on both sides, and solve for T.",
)
def temperature_for(ratio: float, wanted: float) -> float:
    """The temperature that makes a token ``wanted`` times as likely as another that it beats ``ratio`` times at 1."""
    return math.log(ratio) / math.log(wanted)


@exercise(
    "sampling/top-k-top-p",
    cases=named(
        "logits k p",
        (_SMALL, 3, torch.tensor([0.8, 0.45])),
        (_SMALL, 4, torch.tensor([0.55, 0.98])),
        (3 * normal(3, 40, seed=1), 6, torch.tensor([0.8, 0.3, 0.95])),
    ),
    mistakes="""
        _both(logits, k, p, renormalise=False)
            Top-p has to work on what top-k has left: the k tokens share all of the probability, so take the softmax
            over them.
        _both(logits, k, p, crossing=False)
            The token that crosses the line is gone. Top-p keeps the smallest set that *reaches* p, so what counts is
            the sum of the tokens before it.
        _both(logits, k, p, rows=False)
            Every row has a p of its own: compare each row's sums with its own number, shape (B, 1).
        _both(logits, k, torch.ones_like(p) + 1)
            Only top-k has been at work: nothing was removed for p.
        _both(logits, logits.shape[-1], p)
            Only top-p has been at work: at most k tokens may stay.
        _in_sorted_places(logits, k, p)
            The right number of tokens, in the wrong places: what was found in sorted order has to go back to the
            tokens' own (scatter by the ids that topk gives).
        _both(logits, k, p).softmax(-1)
            Those are probabilities. The logits are asked for, with minus infinity where a token is removed.
    """,
    hint="topk sorts: take the softmax of its k values, add up what comes before each, and compare with the row's p.",
)
def top_k_top_p(logits: Tensor, k: int, p: Tensor) -> Tensor:
    """Logits (B, V) with minus infinity for what top-k, then top-p, removes; p is (B,)."""
    return _both(logits, k, p)


@exercise(
    "sampling/penalty",
    cases=named(
        "logits written theta",
        (torch.tensor([[2.0, -1.0, 0.0, -3.0, 1.5]]), torch.tensor([[True, True, True, False, False]]), 1.3),
        (2 * normal(3, 7, seed=8), normal(3, 7, seed=9) > 0, 2.0),
    ),
    mistakes="""
        torch.where(written, logits / theta, logits)
            A negative logit divided by a number above 1 comes nearer to 0: it gets *larger*, and the token likelier.
        torch.where(written, logits * theta, logits)
            Now positive logits grow. Which way is down depends on the sign.
        torch.where(logits < 0, logits * theta, logits / theta)
            Every token is penalised. Only those that the text has are to be.
        torch.where(written, logits - theta, logits)
            That makes written tokens less likely, but it is another penalty (a presence penalty): this one multiplies.
        torch.where(written, torch.where(logits < 0, logits / theta, logits * theta), logits)
            Just the other way round: written tokens get more likely.
    """,
    hint="Look at a written token with a negative logit: does dividing make it smaller?",
)
def penalise(logits: Tensor, written: Tensor, theta: float) -> Tensor:
    """Logits (B, V) in which every token that is in ``written`` (bool, (B, V)) is less likely."""
    return torch.where(written, torch.where(logits < 0, logits * theta, logits / theta), logits)


@exercise(
    "sampling/shift",
    cases=named(
        "logits written theta",
        (torch.tensor([[2.0, 1.0]]), torch.tensor([[True, False]]), 1.2),
        (torch.tensor([[12.0, 11.0], [-8.0, -9.0]]), torch.tensor([[True, False], [False, True]]), 1.2),
        (2 * normal(3, 7, seed=8) + 4, normal(3, 7, seed=9) > 0, 1.5),
    ),
    mistakes="""
        penalise(logits, written, theta)
            The penalty still multiplies logits, so it depends on where their zero lies. Take log_softmax first.
        torch.where(written, logits.log_softmax(-1) / theta, logits.log_softmax(-1))
            ln p is never above 0: dividing it brings it nearer to 0, and the token gets *likelier*.
        logits.log_softmax(-1) * theta
            Every token is penalised. Only those that the text has are to be.
        torch.where(written, logits.log_softmax(-1) * theta, logits)
            Tokens that are not written have to be on the same scale, ln p, or the shift is back between the two kinds.
        penalise(logits - logits.amax(-1, keepdim=True), written, theta)
            A shift changes nothing here either, but the best token's logit is now 0, which no penalty moves. Use ln p.
        torch.where(written, logits.log_softmax(-1) - math.log(theta), logits.log_softmax(-1))
            Subtracting a constant is a presence penalty, which needs no log_softmax. This one multiplies ln p by theta.
        torch.where(written, logits.log_softmax(-1) * theta, logits.log_softmax(-1)).log_softmax(-1)
            Normalised once more: right as probabilities, but what is asked for is ln p with the penalty, as it stands.
    """,
    hint="log_softmax gives ln p, which no shift changes and which is never above 0: multiply it where written.",
)
def penalise_log_p(logits: Tensor, written: Tensor, theta: float) -> Tensor:
    """ln p (B, V), times theta for every token in ``written`` (bool, (B, V)): a shift of the logits changes nothing."""
    log_p = logits.log_softmax(-1)
    return torch.where(written, log_p * theta, log_p)


def _cut(text: str, stops: list[str], end: bool = False) -> str:
    found = [text.find(stop) + (len(stop) if end else 0) for stop in stops if stop in text]
    return text[: min(found)] if found else text


def _held(text: str, stops: list[str]) -> list[int]:
    return [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]


@exercise(
    "sampling/shown",
    cases=named(
        "text stops",
        ("4\n", ["\n\nQ"]),
        ("Answer: 4\n\nQuestion", ["\n\nQ"]),
        ("aab", ["abac", "b c"]),
        ("one, two", ["three", "END"]),
        ("abcabd", ["abdx", "cab"]),
        ("so <en", ["<end>", "<<", "n>"]),
        ("ab ab", ["ab ab ab"]),
        ("stop later STOP now", ["STOP", "later"]),
    ),
    mistakes="""
        _cut(text, stops)
            Complete stop strings are cut off, but the end of the text may be the beginning of one: hold it back.
        text[: len(text) - max(_held(text, stops), default=0)]
            Where a stop string is complete, nothing from its beginning on may be shown.
        _cut(text, stops, end=True) if any(s in text for s in stops) else shown(text, stops)
            The stop string itself is not shown either: cut where it begins.
        _cut(text, stops) if any(s in text for s in stops) else text[: len(text) - min(_held(text, stops), default=0)]
            Of several beginnings that the text may end in, the longest has to be held back.
        _cut(text, stops) if any(s in text for s in stops) else text[: len(text) - max(map(len, stops)) + 1]
            Safe, but too careful: it holds back as much as a stop string is long, whatever the text ends in.
        text
            Nothing is held back.
    """,
    hint="First cut at the earliest complete stop string. Else hold back the longest end that begins one.",
)
def shown(text: str, stops: list[str]) -> str:
    """The part of ``text`` that may be shown: no stop string, and nothing that may become one."""
    whole = _cut(text, stops)
    return whole if whole != text else text[: len(text) - max(_held(text, stops), default=0)]
