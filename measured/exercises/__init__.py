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
import dis
import html
import importlib
import inspect
import itertools
import pkgutil
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from measured.exercises._compare import around_the_difference, cut, difference, text

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
        cases: arguments of each call: a mapping of keywords or a sequence of positional arguments.
        reference: the right answer.
        mistakes: the known wrong answers, as above.
        tolerance: how far a number that is not whole may be off, relative to the reference (in a tensor, relative to
            its largest number).
        hint: what to say about a wrong answer that is none of the known ones.
    """

    name: str
    cases: Sequence[Mapping[str, Any] | Sequence[Any]]
    reference: Callable[..., Any]
    mistakes: str = ""
    tolerance: float = 1e-6
    hint: str = "Work the failing case through by hand and compare each step."

    def answer(self, expression: str, **names: Any) -> Callable[..., Any]:
        """The function that returns ``expression``, in the reference's arguments, the names of its module and these."""
        arguments = ", ".join(inspect.signature(self.reference).parameters)
        return eval(f"lambda {arguments}: {expression}", self.reference.__globals__ | names)

    def wrong_answers(self) -> Iterator[tuple[Callable[..., Any], str]]:
        """The known wrong answers as functions, each with its hint."""
        lines = textwrap.dedent(self.mistakes).strip().splitlines()
        blocks = itertools.groupby(lines, key=lambda line: line.startswith(" "))
        texts = [" ".join(line.strip() for line in block) for _, block in blocks]
        for expression, hint in zip(texts[::2], texts[1::2], strict=True):
            yield self.answer(expression), hint


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

    Every call gets arguments of its own. Lists, tuples, ranges, arrays and tensors are one to it, and so are numbers
    of all kinds, as long as shapes and values are right.

    Raises:
        ValueError: there is no such exercise (the message names the nearest ones).
    """
    exercise = find(name)
    if not callable(fn):
        return Report(name, "error", "Give the function itself, without calling it: check(name, my_function).")
    stub = Report(name, "todo", "Replace the stub with your answer, then run this cell again.")
    answers, written = [], None
    for case in exercise.cases:
        given = copy.deepcopy(case)
        try:
            answers.append(_call(fn, given))
        except Exception as error:  # the reader's code may raise anything; what it raised is the answer to show
            if isinstance(error, NotImplementedError) and _does_nothing(fn):
                return stub
            return Report(name, "error", f"{type(error).__name__}: {error}", (f"case: {_arguments(case)}",))
        written = written or _first_changed(exercise, given, case)
    if all(answer is None or answer is ... for answer in answers) and _does_nothing(fn):
        return stub
    report = _judge(exercise, answers)
    if report.passed and written:
        return Report(name, "mistake", f"The result is right, but {written} is changed on the way: work on a copy.")
    return report


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
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def all_exercises() -> Iterator[Exercise]:
    """Every exercise of every chapter. Imports all chapters' modules."""
    for chapter in chapters():
        yield from _of_chapter(chapter)


def _of_chapter(chapter: str) -> list[Exercise]:
    module = importlib.import_module(f"{__name__}.{chapter}")
    return [value.exercise for value in vars(module).values() if hasattr(value, "exercise")]


def _call(fn: Callable[..., Any], case: Mapping[str, Any] | Sequence[Any]) -> Any:
    return fn(**case) if isinstance(case, Mapping) else fn(*case)


def _results(fn: Callable[..., Any], exercise: Exercise) -> list[Any]:
    return [_call(fn, copy.deepcopy(case)) for case in exercise.cases]


def _judge(exercise: Exercise, answers: list[Any]) -> Report:
    """Compare a function's answers to all cases with the right ones, then with the known wrong ones."""
    wanted = _results(exercise.reference, exercise)
    found = _differences(answers, wanted, exercise)
    if not any(found):
        return Report(exercise.name, "passed", f"Agrees with the reference on every case ({len(found)}).")
    for wrong, hint in exercise.wrong_answers():
        if _agrees(wrong, exercise, answers):
            return Report(exercise.name, "mistake", hint)
    first = next(number for number, one in enumerate(found) if one)
    nothing = [answer is None for answer in answers]
    missing = all(nothing) or (nothing[first] and not any(want is None for want in wanted))
    hint = "Your function returns nothing: is `return` missing?" if missing else exercise.hint
    yours, right = around_the_difference(text(answers[first]), text(wanted[first]))
    details = (f"case: {_arguments(exercise.cases[first])}", f"your answer: {yours}", f"wanted: {right}")
    inside = () if found[first].startswith("yours") else (f"first difference: {found[first]}",)
    return Report(exercise.name, "wrong", hint, details + inside)


def _agrees(wrong: Callable[..., Any], exercise: Exercise, answers: list[Any]) -> bool:
    """Whether all answers are those of a known wrong one. One that cannot run on a case is not the one given."""
    try:
        return not any(_differences(answers, _results(wrong, exercise), exercise))
    except Exception:
        return False


# What a body that does nothing is compiled to: `...`, `pass`, `return None`, a text, `raise NotImplementedError`.
IDLE = {
    "RESUME", "NOP", "LOAD_CONST", "RETURN_VALUE", "RETURN_CONST", "LOAD_GLOBAL", "PUSH_NULL", "PRECALL", "CALL",
    "RAISE_VARARGS", "LOAD_COMMON_CONSTANT",
}  # fmt: skip


def _does_nothing(fn: Callable[..., Any]) -> bool:
    """Whether a function is an untouched stub. One that works something out and forgets to return it is none."""
    code = getattr(inspect.unwrap(fn), "__code__", None)
    if code is None or not set(code.co_names) <= {"NotImplementedError"}:
        return False
    return {instruction.opname for instruction in dis.get_instructions(code)} <= IDLE


def _first_changed(exercise: Exercise, given: Any, case: Any) -> str | None:
    """The name of an argument that a call has written into."""
    if not isinstance(case, Mapping):
        names = list(inspect.signature(exercise.reference).parameters)
        given, case = dict(zip(names, given, strict=False)), dict(zip(names, case, strict=False))
    return next((f"`{name}`" for name in case if difference(given[name], case[name], 0.0)), None)


def _differences(got: Sequence[Any], want: Sequence[Any], exercise: Exercise) -> list[str | None]:
    return [difference(g, w, exercise.tolerance) for g, w in zip(got, want, strict=True)]


def _arguments(case: Mapping[str, Any] | Sequence[Any]) -> str:
    if isinstance(case, Mapping):
        return ", ".join(f"{name}={cut(text(value))}" for name, value in case.items())
    return ", ".join(cut(text(value)) for value in case)
