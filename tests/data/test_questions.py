"""Four-choice questions: what is read from each source, and what a bad file is told."""

import collections
import importlib.util
import json
import sys
import zipfile
from types import ModuleType, SimpleNamespace

import pytest
import yaml

from dslib.data import questions
from dslib.data.questions import AREAS, SUBJECTS, TEST_SIZES, Question

GOOD = {"question": "Which is a prime?", "choices": ["4", "6", "7", "9"], "answer": 2}


def test_281_items_of_57_subjects():
    items = questions.mmlu_examples()
    counts = collections.Counter(one.subject for one in items)
    assert len(items) == 281 and counts.keys() == TEST_SIZES.keys()
    assert set(counts.values()) == {3, 4, 5} and counts["college_chemistry"] == 3
    assert collections.Counter(one.answer for one in items) == {0: 66, 1: 70, 2: 68, 3: 77}


def test_the_text_of_an_item_is_taken_apart():
    item = questions.mmlu_examples()[0]
    assert item.subject == "abstract_algebra"
    assert item.question == "Statement 1 | Every element of a group generates a cyclic subgroup of the group. Statement 2 | The symmetric group S_10 has 10 elements."  # fmt: skip # noqa: E501
    assert item.choices == ("True, True", "False, False", "True, False", "False, True") and item.answer == 2
    # No label is left in a choice, and no choice is left in a question.
    for one in questions.mmlu_examples():
        assert not any(label in text for label in ("(B)", "(C)", "(D)") for text in (one.question, *one.choices))


def test_groups_are_those_of_lm_evals_tags_and_sizes_add_up():
    folder = importlib.util.find_spec("lm_eval").submodule_search_locations[0]
    names = {"stem": "STEM", "humanities": "humanities", "social_sciences": "social sciences", "other": "other"}
    for group, sizes in SUBJECTS.items():
        for subject in sizes:
            with open(f"{folder}/tasks/mmlu/flan_cot_fewshot/mmlu_{subject}.yaml", encoding="utf-8") as file:
                tag = yaml.load(file, questions._TaskLoader)["tag"]
            assert names[tag.removeprefix("mmlu_flan_cot_fewshot_")] == group
    assert sum(TEST_SIZES.values()) == 14042 and len(TEST_SIZES) == 57
    assert {area: questions.test_size(area) for area in AREAS} == {"mathematics": 1064, "law": 1763, "medicine": 1640}


def test_domains():
    items = questions.mmlu_examples()
    sizes = {name: len(questions.in_domain(items, name)) for name in (*SUBJECTS, *AREAS, "all")}
    assert sum(sizes[group] for group in SUBJECTS) == sizes["all"] == 281
    assert (sizes["mathematics"], sizes["law"], sizes["medicine"]) == (25, 15, 39)
    with pytest.raises(ValueError, match="'maths', expected one of 'all', 'STEM'"):
        questions.in_domain(items, "maths")


def test_rotation_keeps_the_right_choice():
    one = Question(**GOOD)
    for by in range(-3, 9):
        turned = one.rotated(by)
        assert turned.choices[turned.answer] == "7" and sorted(turned.choices) == sorted(one.choices)
        assert turned.answer == (2 + by) % 4
    assert one.rotated(1).choices == ("9", "4", "6", "7") and one.rotated(4) == one


def write(tmp_path, *rows, start=b""):
    """Rows as JSON Lines; bytes as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    (tmp_path / "mine.jsonl").write_bytes(start + b"".join(line + b"\n" for line in lines))
    return tmp_path / "mine.jsonl"


def test_a_readers_file(tmp_path):
    path = write(tmp_path, GOOD, b"", {**GOOD, "answer": "A", "subject": "numbers"})
    first, second = questions.load_questions(path)
    assert first == Question(**GOOD) and (second.answer, second.subject) == (0, "numbers")


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85", "\x1c", "\x0b", "\x0c", "\r", "\n"])
def test_only_a_line_feed_ends_a_line(tmp_path, inside):
    row = {**GOOD, "question": f"a{inside}b?"}
    first, second = questions.load_questions(write(tmp_path, row, json.dumps(GOOD).encode() + b"\r"))
    assert first.question == f"a{inside}b?" and second == Question(**GOOD)


def test_a_mark_of_the_order_of_bytes_is_no_text(tmp_path):
    assert questions.load_questions(write(tmp_path, GOOD, start=b"\xef\xbb\xbf")) == [Question(**GOOD)]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({**GOOD, "choices": ["4", "6", "7"]}, r"choices: got \[.4., .6., .7.\], expected a list of four"),
        ({**GOOD, "choices": ["4", "6", "7", "9", "11"]}, r"choices: got \[.*11"),
        ({**GOOD, "choices": ["4", "", "7", "9"]}, "choices, B: got ''"),
        ({**GOOD, "choices": "4679"}, "choices: got '4679', expected a list"),
        ({**GOOD, "choices": ["4", "6", 7, "9"]}, "choices, C: got 7"),
        ({**GOOD, "answer": 4}, "answer: got 4, expected 0 to 3"),
        ({**GOOD, "answer": -1}, "answer: got -1"),
        ({**GOOD, "answer": "E"}, "answer: got 'E'"),
        ({**GOOD, "answer": ""}, "answer: got ''"),
        ({**GOOD, "answer": True}, "answer: got True"),
        ({**GOOD, "answer": 2.0}, "answer: got 2.0"),
        ({**GOOD, "question": " "}, "question: got ' '"),
        ({"question": "?", "choices": GOOD["choices"]}, "answer: missing"),
        ([1, 2], r"got \[1, 2\], expected an object"),
        (b"{", "not valid JSON"),
        (b'{"question": "\xff"}', "codec can't decode"),
    ],
)
def test_a_bad_line_is_reported_with_file_and_line(tmp_path, row, said):
    with pytest.raises(ValueError, match=rf"mine\.jsonl line 3.*{said}"):
        questions.load_questions(write(tmp_path, GOOD, b"", row))


def test_an_empty_file_and_a_missing_one(tmp_path):
    with pytest.raises(ValueError, match=r"mine\.jsonl: got no question"):
        questions.load_questions(write(tmp_path, b""))
    with pytest.raises(questions.QuestionsNotFound, match=r"nowhere\.jsonl', expected a file or one of mmlu-281"):
        questions.load_questions("nowhere.jsonl")


@pytest.mark.parametrize("spec", [None, SimpleNamespace(submodule_search_locations=["/nowhere"])])
def test_without_the_package_or_its_tasks_it_says_what_to_install(monkeypatch, spec):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(questions.QuestionsNotFound, match=r"pip install --no-deps lm-eval==0\.4\.13"):
        questions.mmlu_examples()


ROWS = {
    "us_tort_law": ("Is it?\nA. Yes, A. Smith\nB. No\nC. Both\nD. None\nAnswer:", "B"),
    "medmcqa": ("Subject: Anatomy\n\nWhich (b) one\n\na) Left\nb) Right\nc) Up\nd) Down", "d) Down"),
    "jee-math": ("f(A) is\n(A) 1\n(B) f(B)\n(C) 3\n(D) 4\n", ["the correct answer is (C)", "other"]),
}
WANTED = {
    "us_tort_law": ("Is it?", ("Yes, A. Smith", "No", "Both", "None"), 1),
    "medmcqa": ("Which (b) one", ("Left", "Right", "Up", "Down"), 3),
    "jee-math": ("f(A) is", ("1", "f(B)", "3", "4"), 2),
}


@pytest.fixture
def wheel(tmp_path):
    """An archive laid out like the wheel of evals, one good and one damaged question a set."""
    path = tmp_path / questions._EVALS_WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        for name, (text, ideal) in ROWS.items():
            good = {"input": [{"role": "system", "content": "Be right."}, {"role": "user", "content": text}]}
            bad = {"input": [{"role": "user", "content": text.replace("1", "").replace("C", "").replace("c)", "")}]}
            rows = [json.dumps({**row, "ideal": ideal}) for row in (good, bad)]
            archive.writestr(f"evals/registry/data/{name}/samples.jsonl", "\n".join(rows))
    return path


@pytest.mark.parametrize("name", ROWS)
def test_sets_of_evals_are_read_in_place(wheel, name):
    (one,) = questions.evals_set(name, wheel)  # the damaged one is left out
    assert (one.question, one.choices, one.answer) == WANTED[name] and one.subject == name


def test_the_wheel_is_looked_for_in_the_cache_then_fetched(wheel, monkeypatch, tmp_path):
    monkeypatch.setenv("DSLIB_CACHE", str(wheel.parent))
    assert len(questions.load_questions("medmcqa")) == 1
    monkeypatch.setenv("DSLIB_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(questions, "EVALS", "--no-such-option")
    with pytest.raises(questions.QuestionsNotFound, match="pip could not fetch"):
        questions.load_questions("medmcqa")
    with pytest.raises(ValueError, match="'law', expected one of 'us_tort_law'"):
        questions.evals_set("law", wheel)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(questions.tempfile, "TemporaryFile", refuse)
    with pytest.raises(
        questions.QuestionsNotFound, match=r"other cannot be written \(Permission denied\).*DSLIB_CACHE"
    ):
        questions.load_questions("medmcqa")


@pytest.mark.parametrize(
    ("missing", "message"), [(None, "no network"), ("pyarrow.parquet", r"takes pyarrow .*Run: pip install pyarrow")]
)
def test_mmlu_from_the_hub_says_why_not(monkeypatch, missing, message):
    import huggingface_hub

    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    for name in ("pyarrow", "pyarrow.parquet"):  # need not be installed here
        monkeypatch.setitem(sys.modules, name, None if name == missing else ModuleType(name))
    with pytest.raises(questions.QuestionsNotFound, match=message):
        questions.load_questions("mmlu")
