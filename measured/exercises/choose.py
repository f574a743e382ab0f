"""Exercises of ``chapters/scenarios/choose.ipynb``. Figures are pairs of ends, less is better."""

import math
from collections.abc import Callable, Mapping, Sequence

from measured.exercises import exercise, named

_HOLDERS = {
    "small": (2.0, 2.1, 0.1),
    "middle": (7.0, 9.0, 0.5),
    "sparse": (16.0, 16.0, 0.05),
    "large": (30.0, 60.0, 1.0),
}
_NARROW = {"one": (5.0, 5.5, 0.25), "two": (5.0, 9.0, 0.0), "three": (40.0, 40.0, 2.0)}


def _only(pick, options, users, reserve, own: Callable = max, others: Callable = min, share: Callable | None = None):
    """The reference and, by its options, the usual ways to get it wrong."""
    share = share or (lambda reserve: 1 - reserve)
    ends = {
        name: [(end + users * cache) / share(reserve) for end in (low, high)]
        for name, (low, high, cache) in options.items()
    }
    start = own(ends[pick])
    stop = min((others(pair) for name, pair in ends.items() if name != pick), default=math.inf)
    return (start, stop) if start < stop else None


@exercise(
    "choose/only",
    cases=named(
        "pick options users reserve",
        ("small", _HOLDERS, 1, 0.1),
        ("small", _HOLDERS, 8, 0.2),
        ("middle", {name: _HOLDERS[name] for name in ("middle", "sparse", "large")}, 1, 0.1),
        ("middle", {name: _HOLDERS[name] for name in ("middle", "sparse", "large")}, 32, 0.1),
        ("one", _NARROW, 1, 0.1),
        ("one", {name: _NARROW[name] for name in ("one", "three")}, 2, 0.25),
    ),
    mistakes="""
        _only(pick, options, users, reserve, own=min)
            Your range begins where the pick may fit. For sure it fits only from its upper end on.
        _only(pick, options, users, reserve, others=max)
            Your range ends where another fits for sure. From its lower end on it cannot be ruled out any more.
        _only(pick, options, 1, reserve)
            The cache is that of one text. There are several at once.
        _only(pick, options, users, 0.0)
            Nothing is kept in reserve: that is a usable share of 1.0.
        _only(pick, options, users, reserve, share=lambda reserve: 1 / (1 - reserve))
            The need is multiplied by the usable share, so it gets smaller. The place has to be larger than the need.
        _only(pick, options, users, reserve, share=lambda reserve: 1 / (1 + reserve))
            A tenth of the memory is not a tenth of the need: need <= (1 - reserve) x memory.
    """,
    hint="Both ends of each need: (weights + users x cache) / (1 - reserve). Then the pick's upper, the others' lower.",
)
def only(pick: str, options: Mapping[str, Sequence[float]], users: int, reserve: float) -> tuple[float, float] | None:
    """The memories ``(from, below)`` at which ``pick`` is sure to fit and every other is out; None if there are none.

    Args:
        options: by name, lower and upper end of the weights, and the cache of one text.
        users: texts at once. reserve: share of the memory that may not be used.
    """
    return _only(pick, options, users, reserve)


_THREE = {
    "a": {"memory": (20.0, 20.0), "ms": (9.0, math.inf), "usd": (100.0, 300.0)},
    "b": {"memory": (30.0, 40.0), "ms": (30.0, math.inf), "usd": (50.0, 60.0)},
    "c": {"memory": (200.0, 200.0), "ms": (5.0, math.inf), "usd": (40.0, 40.0)},
}

_HIDDEN = {  # the second is the first, of which less is known
    "told": {"memory": (172.0, 180.0), "score": (14.0, 14.0)},
    "silent": {"memory": (171.0, math.inf), "score": (0.0, math.inf)},
    "small": {"memory": (150.0, 150.0), "score": (24.0, 26.0)},
    "wide": {"memory": (145.0, 300.0), "score": (9.0, 9.0)},
}


def _nearest(options, limits, end=1, worst: Callable = max, ratio: Callable | None = None, count=True, only=0.0, out=0):
    """The reference and, by its options, the usual ways to get it wrong: ``only`` counts broken limits alone."""
    ratio = ratio or (lambda value, limit: value / limit)
    found = {}
    for name, figures in options.items():
        if out is not None and all(figures[key][out] <= limit for key, limit in limits.items()):
            return None
        kept = {key: limit for key, limit in limits.items() if not only or figures[key][0] > limit}
        missed = [ratio(figures[key][end], limit) for key, limit in kept.items() if figures[key][end] > limit]
        found[name] = (len(missed) if count else 0, worst(missed, default=0.0))
    return min(found, key=found.get, default=None)


@exercise(
    "choose/nearest",
    cases=named(
        "options limits",
        (_THREE, {"memory": 16.0, "ms": 10.0, "usd": 99.0}),
        (_HIDDEN, {"memory": 141.0, "score": 20.0}),
        (_HIDDEN, {"memory": 120.0, "score": 10.0}),
        ({"a": {"x": (1.0, 1.0)}, "b": {"x": (3.0, 4.0)}}, {"x": 2.0}),
        ({"a": {"x": (10.0, 10.0), "y": (2.0, 2.0)}, "b": {"x": (3.0, 3.0), "y": (3.0, 3.0)}}, {"x": 1.0, "y": 1.0}),
        (_THREE, {"memory": 24.0, "ms": 8.0, "usd": 39.0}),
        (_THREE, {"memory": 24.0, "ms": 10.0, "usd": 200.0}),
        (_THREE, {"memory": 24.0, "ms": 4.0, "usd": 200.0}),
        (_THREE, {"memory": 35.0, "ms": 8.0, "usd": 55.0}),
        (
            {
                "a": {"x": (10.0, 10.0), "y": (2.0, 2.0)},
                "b": {"x": (3.0, 3.0), "y": (3.0, 3.0)},
                "c": {"x": (1.0, 1.0), "y": (13.0, 14.0)},
            },
            {"x": 1.0, "y": 1.0},
        ),
        (
            {"a": {"x": (12.0, 12.0), "y": (50.0, 50.0)}, "b": {"x": (2.0, 2.0), "y": (106.0, 110.0)}},
            {"x": 1.0, "y": 100.0},
        ),
        (
            {"a": {"x": (11.0, 11.0), "y": (100.0, 100.0)}, "b": {"x": (1.0, 2.0), "y": (115.0, 115.0)}},
            {"x": 10.0, "y": 100.0},
        ),
        (
            {"a": {"x": (13.0, 13.0), "y": (1.0, 1.0)}, "b": {"x": (1.0, 1.0), "y": (104.0, 104.0)}},
            {"x": 10.0, "y": 100.0},
        ),
    ),
    mistakes="""
        _nearest(options, limits, end=0)
            By lower ends an option is near because its figures are unknown. It is in for sure from the upper ends on.
        _nearest(options, limits, only=1.0)
            You count the broken limits alone, so an unknown figure is as good as one that keeps its limit.
        _nearest(options, limits, out=1)
            An option is out if even its lower end breaks a limit. One that may be in is not out: None.
        _nearest(options, limits, count=False)
            First the number of limits that have to change counts, and only then by how much.
        _nearest(options, limits, worst=min)
            Of several changes the largest decides: all of them have to be made.
        _nearest(options, limits, ratio=lambda value, limit: value - limit)
            You compare differences, so the answer depends on the units. Compare ratios.
        _nearest(options, limits, out=None)
            Where some option is not out, nothing is missed: None.
    """,
    hint="Is any option not out, by its lower ends? Else for each: which upper ends exceed their limit, by what ratio?",
)
def nearest(options: Mapping[str, Mapping[str, Sequence[float]]], limits: Mapping[str, float]) -> str | None:
    """Where every option is out: the one let in for sure by the fewest changes of limits, of these by the smallest.

    A change is the ratio of a figure's upper end to its limit, and of several the largest counts.
    """
    return _nearest(options, limits)


def _fraction(answers, fits: Callable = lambda need, memory: need / memory, low: Callable = max, high: Callable = min):
    """The reference and, by its options, the usual ways to get it wrong."""
    yes = [fits(need, memory) for need, memory, said in answers if said]
    no = [fits(need, memory) for need, memory, said in answers if not said]
    return [low(yes), high(no)]


@exercise(
    "choose/fraction",
    cases=named(
        "answers",
        ([(23.9, 24.0, True), (24.1, 24.0, False), (7.0, 8.0, True), (80.0, 80.0, True), (90.0, 80.0, False)],),
        ([(70.0, 80.0, True), (73.0, 80.0, False), (20.0, 24.0, True), (141.0, 141.0, False), (7.4, 8.0, False)],),
        ([(1.0, 4.0, True), (3.9, 4.0, True), (5.0, 4.0, False)],),
        ([(22.0, 24.0, False), (5.0, 10.0, True), (39.0, 40.0, False)],),
    ),
    mistakes="""
        _fraction(answers, low=min, high=max)
            Every answer has to hold at once: of the lower bounds the largest counts, of the upper ones the smallest.
        _fraction(answers, fits=lambda need, memory: memory / need)
            Turned over: a need fits if it is at most the fraction of the memory.
        [_fraction(answers)[0], max(_fraction(answers)[1], 1.0)]
            A refusal below the whole memory says that the fraction is smaller than 1.
        sum(need / memory for need, memory, said in answers if said) / max(1, sum(said for *_, said in answers))
            A mean of the ratios is no bound. Asked are the two ends between which the fraction must lie.
        [need / memory for need, memory, said in answers]
            These are the ratios. Which fractions would have given just these answers?
    """,
    hint="A yes says: fraction >= need / memory. A no says: fraction < need / memory.",
)
def fraction(answers: Sequence[tuple[float, float, bool]]) -> list[float]:
    """Between which ends the usable fraction of a planner lies that says "fits" if need <= fraction x memory.

    Args:
        answers: (need, memory, whether it said that it fits).
    """
    return _fraction(answers)
