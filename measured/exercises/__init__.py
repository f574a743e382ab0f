"""A checker for the reader's own answers: it says what is wrong, not only that something is.

An exercise asks for a small function. :func:`check` runs the reader's function on a few cases and compares it with the
reference, and with the mistakes people are likely to make; whoever makes one of those gets a hint for just that one.

One module a chapter (``decoder.py`` for ``chapters/architecture/decoder.ipynb``) holds the right answers, each under
:func:`exercise`; it is imported only when one of its exercises is checked. ``tests/measured/test_exercises.py`` feeds
every exercise its reference and its mistakes.
"""

from __future__ import annotations

import copy
import difflib
import html
import importlib
import inspect
import itertools
import math
import pkgutil
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

SYMBOLS = {"passed": "✓", "mistake": "✗", "wrong": "✗", "error": "✗", "todo": "○"}
WORDS = {"passed": "Correct", "mistake": "Not yet", "wrong": "Not yet", "error": "It raised", "todo": "Not done yet"}


@dataclass(frozen=True)
class Exercise:
    """One exercise.

    Wrong answers that are known beforehand are text: what a reader would return, an expression in the arguments of the
    reference and the names of its module, and indented below it the hint for whoever returns that::

        2 * layers * heads * head_dim
            You counted query heads. Only the key-value heads are kept.

    Attributes:
        name: ``"<chapter>/<exercise>"``, e.g. ``"decoder/kv-bytes"``.
        cases: arguments of each call: a mapping of keywords or a sequence of positional arguments. They are copied for
            every call, so an answer that writes into its arguments harms nobody.
        reference: the right answer.
        mistakes: the known wrong answers, as above.
        tolerance: how far a float may be off, relative to the reference (absolute where that is 0).
        hint: what to say about a wrong answer that is none of the known ones.
    """

    name: str
    cases: Sequence[Mapping[str, Any] | Sequence[Any]]
    reference: Callable[..., Any]
    mistakes: str = ""
    tolerance: float = 1e-6
    hint: str = "Work the failing case through by hand and compare each step."

    def wrong_answers(self) -> Iterator[tuple[Callable[..., Any], str]]:
        """The known wrong answers as functions, each with its hint."""
        arguments = ", ".join(inspect.signature(self.reference).parameters)
        lines = textwrap.dedent(self.mistakes).strip().splitlines()
        blocks = itertools.groupby(lines, key=lambda line: line.startswith(" "))
        texts = [" ".join(line.strip() for line in block) for _, block in blocks]
        for answer, hint in zip(texts[::2], texts[1::2], strict=True):
            yield eval(f"lambda {arguments}: {answer}", self.reference.__globals__), hint


@dataclass(frozen=True)
class Report:
    """What came of a check. ``status``: passed, mistake, wrong, error or todo."""

    name: str
    status: str
    message: str
    details: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return self.status == "passed"

    @property
    def headline(self) -> str:
        return f"{SYMBOLS[self.status]} {WORDS[self.status]}: {self.name}"

    def __str__(self) -> str:
        return "\n".join((self.headline, self.message, *self.details))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        lines = "".join(f"<br><code>{html.escape(line)}</code>" for line in self.details)
        return (
            f'<div class="exercise-report exercise-{self.status}" style="border-left:4px solid;padding:.3em .8em">'
            f"<strong>{html.escape(self.headline)}</strong><br>{html.escape(self.message)}{lines}</div>"
        )


def exercise(name: str, **rest: Any) -> Callable[[Callable], Callable]:
    """Put above a right answer, makes it the reference of an :class:`Exercise`; ``rest`` are its other attributes."""

    def mark(reference: Callable) -> Callable:
        reference.exercise = Exercise(name, reference=reference, **rest)
        return reference

    return mark


def named(names: str, *rows: Sequence[Any]) -> list[dict[str, Any]]:
    """Cases as a table: the arguments' names, then a row of values for each case."""
    return [dict(zip(names.split(), row, strict=True)) for row in rows]


def normal(*shape: int, seed: int, **kind: Any) -> Tensor:
    """Normally distributed numbers, the same every time; ``kind`` may give another dtype than float32."""
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **kind)


def check(name: str, fn: Callable[..., Any]) -> Report:
    """Check the reader's function against the exercise called ``name``.

    Raises:
        ValueError: there is no such exercise (the message names the nearest ones).
    """
    exercise = find(name)
    if not callable(fn):
        return Report(name, "error", "Give the function itself, without calling it: check(name, my_function).")
    answers, wanted = [], []
    for case in exercise.cases:
        wanted.append(_call(exercise.reference, case))
        try:
            answers.append(_call(fn, case))
        except NotImplementedError:
            return _todo(name)
        # The reader's code may raise anything; what it raised is the answer to show.
        except Exception as error:
            return Report(name, "error", f"{type(error).__name__}: {error}", (f"case: {_arguments(case)}",))
        if len(answers) == 1 and (answers[0] is None or answers[0] is ...) and wanted[0] is not None:
            return _todo(name)
    same = _compare(answers, wanted, exercise.tolerance)
    if all(same):
        return Report(name, "passed", f"Agrees with the reference on every case ({len(same)}).")
    for wrong, hint in exercise.wrong_answers():
        if _agrees(wrong, exercise, answers):
            return Report(name, "mistake", hint)
    first = same.index(False)
    details = (
        f"case: {_arguments(exercise.cases[first])}",
        f"your answer: {_show(answers[first])}",
        f"wanted: {_show(wanted[first])}",
    )
    return Report(name, "wrong", exercise.hint, details)


def find(name: str) -> Exercise:
    """The exercise called ``name``. Raises ``ValueError`` with the nearest names when there is none."""
    chapter = name.partition("/")[0] if isinstance(name, str) else ""
    if chapter in chapters():
        for exercise in _of_chapter(chapter):
            if exercise.name == name:
                return exercise
    known = [exercise.name for exercise in all_exercises()]
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4) or known
    raise ValueError(f"name: got {name!r}, wanted an exercise such as {', '.join(near) or '(none written yet)'}")


def chapters() -> list[str]:
    """Chapters that have exercises, by module name."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def all_exercises() -> Iterator[Exercise]:
    """Every exercise of every chapter. Imports all chapters' modules."""
    for chapter in chapters():
        yield from _of_chapter(chapter)


def _of_chapter(chapter: str) -> list[Exercise]:
    module = importlib.import_module(f"{__name__}.{chapter}")
    return [value.exercise for value in vars(module).values() if hasattr(value, "exercise")]


def _todo(name: str) -> Report:
    return Report(name, "todo", "Replace the stub with your answer, then run this cell again.")


def _call(fn: Callable[..., Any], case: Mapping[str, Any] | Sequence[Any]) -> Any:
    case = copy.deepcopy(case)
    return fn(**case) if isinstance(case, Mapping) else fn(*case)


def _agrees(wrong: Callable[..., Any], exercise: Exercise, answers: list[Any]) -> bool:
    """Whether all answers are those of a known wrong one. One that cannot run on a case is not the one given."""
    try:
        results = [_call(wrong, case) for case in exercise.cases]
    except Exception:
        return False
    return all(_compare(answers, results, exercise.tolerance))


def _compare(got: Sequence[Any], want: Sequence[Any], tolerance: float) -> list[bool]:
    return [_same(g, w, tolerance) for g, w in zip(got, want, strict=True)]


def _same(got: Any, want: Any, tolerance: float, scale: float | None = None) -> bool:
    """Equality for what an exercise may ask for: numbers, booleans, text, sequences, mappings, tensors."""
    if _is_array(want):
        # Shapes first: broadcasting would make a wrong shape look right.
        if not _is_array(got) or tuple(got.shape) != tuple(want.shape):
            return False
        # An element near zero is judged by the size of the whole: rounding errors come from the large terms.
        got_flat, want_flat = _plain(got.reshape(-1)), _plain(want.reshape(-1))
        sizes = [abs(value) for value in want_flat if not isinstance(value, bool) and math.isfinite(abs(value))]
        scale = max(sizes, default=0.0) or 1.0
        return all(_same(g, w, tolerance, scale) for g, w in zip(got_flat, want_flat, strict=True))
    got, want = _plain(got), _plain(want)
    if isinstance(want, (bool, str)) or want is None:
        return type(got) is type(want) and got == want
    if isinstance(want, (int, float, complex)):
        if isinstance(got, bool) or not isinstance(got, (int, float, complex)):
            return False
        if isinstance(want, int) and isinstance(got, int):
            return got == want
        if not (math.isfinite(abs(want)) and math.isfinite(abs(got))):
            return got == want or (got != got and want != want)  # infinities of one sign, or two NaNs
        return abs(got - want) <= tolerance * (scale or abs(want) or 1.0)
    if isinstance(want, Mapping):
        alike = isinstance(got, Mapping) and got.keys() == want.keys()
        return alike and all(_same(got[key], want[key], tolerance) for key in want)
    if isinstance(want, (list, tuple)):
        alike = isinstance(got, (list, tuple)) and len(got) == len(want)
        return alike and all(_compare(got, want, tolerance))
    return bool(got == want)


def _is_array(value: Any) -> bool:
    """A torch tensor or NumPy array with at least one axis. Told by its shape, so that neither has to be imported."""
    return hasattr(value, "tolist") and len(getattr(value, "shape", ())) > 0


def _plain(value: Any) -> Any:
    """Tensors and NumPy values as Python numbers, nested as their shape says."""
    return value.tolist() if hasattr(value, "tolist") and hasattr(value, "shape") else value


def _arguments(case: Mapping[str, Any] | Sequence[Any]) -> str:
    if isinstance(case, Mapping):
        return ", ".join(f"{name}={_show(value)}" for name, value in case.items())
    return ", ".join(_show(value) for value in case)


def _show(value: Any) -> str:
    """A value short enough for one line."""
    shape = f"shape {tuple(value.shape)}: " if _is_array(value) else ""
    text = f"{shape}{_plain(value)!r}"
    return text if len(text) <= 120 else text[:117] + "..."
