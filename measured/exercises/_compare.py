"""When two answers to an exercise are the same, and where they differ if not.

Lists, tuples, ranges, arrays and tensors are one here, and so are numbers of all kinds and precisions; shapes are not.
Neither torch nor NumPy has to be imported for that: their values are told by ``shape`` and ``tolist``.
"""

import os
from collections.abc import Mapping, Sequence
from decimal import Decimal
from numbers import Real
from typing import Any


def difference(got: Any, want: Any, tolerance: float, at: tuple = (), scale: float = 0.0) -> str | None:
    """The first place where two values differ, and in what (``"[1, 0]: yours 2.5, wanted 0.5"``), or None.

    Args:
        at: keys and indices that led here.
        scale: an element of a tensor is judged by the size of the whole: rounding errors come from the large terms.
    """
    if len(getattr(want, "shape", ())) > 0:
        # Shapes first: broadcasting would make a wrong shape look right.
        if _shape(got) != tuple(want.shape):
            return f"{_place(at)}shape: yours {_shape(got)}, wanted {tuple(want.shape)}"
        scale = max((abs(x) for x in _plain(want.reshape(-1)) if abs(x) < float("inf")), default=0.0)
    got, want = _plain(got), _plain(want)
    if _kind(got) != _kind(want):
        return f"{_place(at)}kind: yours {type(got).__name__}, wanted {type(want).__name__}"
    if _is_sequence(want):
        if len(got) != len(want):
            return f"{_place(at)}length: yours {len(got)}, wanted {len(want)}"
        inside = enumerate(zip(got, want, strict=True))
    elif isinstance(want, Mapping):
        if got.keys() != want.keys():
            return f"{_place(at)}keys: yours {list(got)}, wanted {list(want)}"
        inside = ((key, (got[key], want[key])) for key in want)
    elif _same(got, want, tolerance, scale):
        return None
    else:
        yours, right = around_the_difference(text(got), text(want))
        return f"{_place(at)}yours {yours}, wanted {right}"
    found = (difference(*pair, tolerance, (*at, key), scale) for key, pair in inside)
    return next((one for one in found if one), None)


def _same(got: Any, want: Any, tolerance: float, scale: float) -> bool:
    if _kind(want) != "number":
        return bool(got == want)
    room = max(tolerance * max(abs(want), scale), 1e-9)  # a zero may come out as the rounding error of its terms
    if isinstance(want, int):
        room = min(room, 0.1)  # a count has no tolerance that would hide one more
    try:
        got = float(got) if isinstance(got, Decimal) else got
        return got == want or abs(got - want) <= room < float("inf") or (got != got and want != want)  # the last: NaN
    except (OverflowError, ValueError):  # the latter from a Decimal that signals
        return False


def _kind(value: Any) -> Any:
    """What can be compared at all: all numbers are one kind, but truth values are none of them."""
    if isinstance(value, Real | Decimal) and not isinstance(value, bool):
        return "number"
    return "sequence" if _is_sequence(value) else "mapping" if isinstance(value, Mapping) else type(value)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _shape(value: Any) -> tuple[int, ...]:
    if hasattr(value, "shape"):
        return tuple(value.shape)
    return (len(value), *(_shape(value[0]) if value else ())) if _is_sequence(value) else ()


def _plain(value: Any) -> Any:
    """Tensors and NumPy values as Python numbers, nested as their shape says. Neither has to be imported for it."""
    try:
        return value.tolist() if hasattr(value, "tolist") and hasattr(value, "shape") else value
    except RuntimeError:  # a tensor that is sparse, quantised or on the device "meta" has no list of its values
        return value


def _place(at: tuple) -> str:
    return f"[{', '.join(map(repr, at))}]: " if at else ""


def text(value: Any) -> str:
    """A value as a reader sees it, with the shape that a tensor has."""
    shape = f"shape {tuple(value.shape)}: " if len(getattr(value, "shape", ())) > 0 else ""
    return f"{shape}{_plain(value)!r}"


def around_the_difference(yours: str, wanted: str) -> tuple[str, str]:
    """Both texts, each short enough for one line, cut so that the first character that differs is in sight."""
    before = len(os.path.commonprefix([yours, wanted])) - 60  # noqa: RUF071 (no paths)
    return cut(yours, before), cut(wanted, before)


def cut(text: str, start: int = 0, length: int = 114) -> str:
    """``length`` characters of a long text, from ``start`` on; a short one whole."""
    if len(text) <= length:
        return text
    start = max(0, start)
    end = "..." if start + length < len(text) else ""
    return ("..." if start else "") + text[start : start + length] + end
