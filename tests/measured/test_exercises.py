"""The graders, graded: every exercise accepts its reference and answers each known mistake with that mistake's hint."""

import subprocess
import sys

import pytest

from measured import exercises
from measured.exercises import Exercise

ALL = list(exercises.all_exercises())
MISTAKES = [
    pytest.param(exercise, *mistake, id=f"{exercise.name}-{number}")
    for exercise in ALL
    for number, mistake in enumerate(exercise.wrong_answers())
]


@pytest.mark.parametrize("exercise", ALL, ids=lambda exercise: exercise.name)
def test_the_reference_passes(exercise):
    report = exercises.check(exercise.name, exercise.reference)
    assert report.passed, str(report)
    assert exercise.mistakes, "an exercise needs at least one known mistake"
    assert exercises.check(exercise.name, lambda *_, **__: None).status == "todo"


@pytest.mark.parametrize(("exercise", "wrong", "hint"), MISTAKES)
def test_each_mistake_gets_its_own_hint(exercise, wrong, hint):
    report = exercises.check(exercise.name, wrong)
    assert (report.status, report.message) == ("mistake", hint), str(report)


def test_names_are_unique_and_begin_with_their_chapter():
    names = [exercise.name for exercise in ALL]
    assert len(set(names)) == len(names)
    for chapter in exercises.chapters():
        assert all(exercise.name.startswith(f"{chapter}/") for exercise in exercises._of_chapter(chapter))


@pytest.fixture
def one(monkeypatch):
    """Replace the search, so that the checker can be tried on an exercise made up on the spot."""

    def place(reference, cases, **rest):
        exercise = Exercise("made/up", cases, reference, **rest)
        monkeypatch.setattr(exercises, "find", lambda name: exercise)
        return lambda fn: exercises.check("made/up", fn)

    return place


def test_unknown_names_bring_the_nearest():
    with pytest.raises(ValueError, match="your_machine/decode-floor"):
        exercises.check("your_machine/decode-flor", lambda: 0)
    with pytest.raises(ValueError, match="got 'nowhere'"):
        exercises.check("nowhere", lambda: 0)
    with pytest.raises(ValueError, match="got None"):
        exercises.check(None, lambda: 0)


def test_a_value_instead_of_a_function(one):
    assert "without calling it" in one(lambda x: x, [(1,)])(3).message


def test_an_error_shows_the_case(one):
    report = one(lambda x, y: x, [(1, 0)])(lambda x, y: x / y)
    assert report.status == "error"
    assert "ZeroDivisionError" in report.message
    assert report.details == ("case: 1, 0",)
    assert one(lambda x: x, [(1,)])(lambda: 1).status == "error"


@pytest.mark.parametrize("stub", [lambda x: None, lambda x: ...])
def test_stubs_are_not_done_yet(one, stub):
    assert one(lambda x: x, [(1,)])(stub).status == "todo"


def test_not_implemented_is_not_done_yet(one):
    def stub(x):
        raise NotImplementedError

    assert one(lambda x: x, [(1,)])(stub).status == "todo"


def test_an_unknown_wrong_answer_shows_the_first_failing_case(one):
    report = one(lambda x: x * x, [{"x": 1}, {"x": 3}], hint="Square it.")(lambda x: x)
    assert report.status == "wrong"
    assert report.message == "Square it."
    assert report.details == ("case: x=3", "your answer: 3", "wanted: 9")


def test_a_mistake_on_only_some_cases_is_not_that_mistake(one):
    check = one(lambda x: x, [(1,), (2,)], mistakes="-x\n    sign")
    assert check(lambda x: -x).message == "sign"
    assert check(lambda x: -x if x == 1 else 7).status == "wrong"


def test_a_mistake_that_cannot_run_is_passed_over(one):
    check = one(lambda x: x, [(0,)], mistakes="1 / x\n    no")
    assert check(lambda x: 5).status == "wrong"


def test_writing_into_the_arguments_harms_nobody(one):
    def spoils(values):
        values.clear()
        return 6

    check = one(sum, [([1, 2, 3],)])
    assert check(spoils).passed
    assert check(sum).passed


@pytest.mark.parametrize(
    ("want", "right", "wrong"),
    [
        (3, 3.0, 4),
        (0.5, 0.5 + 1e-9, 0.5001),
        (0.0, 1e-9, 1e-3),
        (float("inf"), float("inf"), 1.0),
        (float("nan"), float("nan"), 0.0),
        (True, True, 1),
        (1, 1, True),
        ("compute", "compute", "Compute"),
        ([1, 2], (1, 2), [1, 2, 3]),
        ({"a": 1}, {"a": 1.0}, {"b": 1}),
        (10**15, 10**15, 10**15 + 1),
        (3, 3, "3"),
    ],
)
def test_equality(one, want, right, wrong):
    check = one(lambda: want, [()])
    assert check(lambda: right).passed
    assert not check(lambda: wrong).passed


def test_tensors_and_arrays(one):
    torch = pytest.importorskip("torch")
    numpy = pytest.importorskip("numpy")
    check = one(lambda: torch.tensor([1.0, 2.0]), [()])
    assert check(lambda: torch.tensor([1.0, 2.0 + 1e-6])).passed
    assert check(lambda: numpy.array([1.0, 2.0])).passed
    near_zero = one(lambda: torch.tensor([1000.0, 0.0]), [()])
    assert near_zero(lambda: torch.tensor([1000.0, 1e-4])).passed
    assert not near_zero(lambda: torch.tensor([1000.0, 1e-2])).passed
    check = one(lambda: torch.tensor([1.0, 2.0]), [()])
    assert not check(lambda: torch.tensor([[1.0, 2.0]])).passed  # would broadcast
    assert not check(lambda: [1.0, 2.0]).passed
    assert "shape (1, 2)" in str(check(lambda: torch.tensor([[1.0, 2.0]])))
    scalar = one(lambda: 2.0, [()])
    assert scalar(lambda: torch.tensor(2.0)).passed
    assert scalar(lambda: numpy.float32(2.0)).passed
    assert one(lambda: True, [()])(lambda: torch.tensor(True)).passed
    assert one(lambda: True, [()])(lambda: numpy.bool_(True)).passed


def test_reports_say_it_in_words_and_symbols(one):
    report = one(lambda x: x, [("<b>",)])(lambda x: "<i>")
    assert str(report).startswith("✗ Not yet: made/up")
    assert "<i>" in str(report)
    assert "<i>" not in report._repr_html_()
    assert "exercise-wrong" in report._repr_html_()
    long = one(lambda: "a", [()])(lambda: "b" * 500)
    assert max(map(len, long.details)) < 150


def test_importing_it_loads_no_torch():
    code = "import sys, measured.exercises; assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
