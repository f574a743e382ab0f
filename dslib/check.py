"""Ranges of arguments, checked in one wording: what was given, and what is expected."""

import math
import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from difflib import get_close_matches
from typing import Any


def at_least(least: float, /, **values: Any) -> None:
    """Raise a ValueError that names the first value below ``least`` (NaN, infinity and what is no number are, too)."""
    _all(values, lambda number: least <= number < math.inf, f"at least {least}")


def above(limit: float, /, **values: Any) -> None:
    """As :func:`at_least`, for values that may not be ``limit`` itself."""
    _all(values, lambda number: limit < number < math.inf, f"a number above {limit}")


def between(low: float, high: float, /, **values: Any) -> None:
    """Raise a ValueError that names the first value outside ``low`` to ``high``, ends included."""
    _all(values, lambda number: low <= number <= high, f"{low} to {high}")


def below(low: float, high: float, /, **values: Any) -> None:
    """As :func:`between`, for values that may not be ``high`` itself."""
    _all(values, lambda number: low <= number < high, f"at least {low} and below {high}")


def _all(values: Mapping[str, Any], fits: Callable[[float], bool], expected: str) -> None:
    for name, value in values.items():
        try:
            fitting = hasattr(value, "__float__") and not isinstance(value, bool) and fits(float(value))
        except (TypeError, ValueError, RuntimeError):  # of tensors and arrays of several numbers
            fitting = False
        if not fitting:
            raise ValueError(f"{name}: got {value!r}, expected {expected}")


def whole(least: int, /, **values: Any) -> None:
    """As :func:`at_least`, for whole numbers."""
    for name, value in values.items():
        try:
            number = operator.index(value)
        except TypeError:  # also of tensors and arrays, unless they hold one whole number
            number = None
        if number is None or isinstance(value, bool):
            raise ValueError(f"{name}: got {value!r}, expected a whole number of at least {least}")
        if number < least:
            raise ValueError(f"{name}: got {value}, expected at least {least}")


def one_of(choices: Collection, /, **values: Any) -> None:
    """Raise a ValueError that names the first value that is none of ``choices``."""
    for name, value in values.items():
        if value not in tuple(choices):  # a tuple compares; a set or a dict would want a hash, which a list has not
            raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")


def texts(name: str, values: Iterable[str]) -> list[str]:
    """The list of ``values``. Raises a ValueError for one plain text, for none, and for one that says nothing."""
    found = [] if isinstance(values, (str, bytes)) else list(values)
    if not found:
        raise ValueError(f"{name}: got {values!r}, expected a list of at least one text")
    for number, text in enumerate(found):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{name}: number {number} is empty or no text, got {text!r}, expected some words")
    return found


def unknown(name: str, value: Any, known: Iterable[str], expected: str) -> ValueError:
    """The error for a name that is not among ``known``: says what is ``expected``, and the three nearest of them."""
    by_lower = {one.lower(): one for one in sorted(known)}
    near = get_close_matches(str(value).lower(), by_lower, n=3, cutoff=0.3) or list(by_lower)[:8]
    return ValueError(f"{name}: got {value!r}, expected {expected}, such as {', '.join(by_lower[one] for one in near)}")
