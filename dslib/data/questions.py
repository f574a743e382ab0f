"""Four-choice questions, read where they already are: in a Python package, in a wheel, on the hub, or in a file.

===============  =======  =====================================================================================
set              items    from
===============  =======  =====================================================================================
``mmlu-281``     281      the package ``lm-eval`` (MIT): the worked examples of all 57 subjects of MMLU, at most five
                          of each; installed with the book
``mmlu``         14,042   MMLU's test questions, from the Hugging Face hub
``us_tort_law``  340      the wheel of the package ``evals`` (MIT), which is opened as an archive and never installed
``medmcqa``      300      the same: entrance examinations for medical schools in India
``jee-math``     433      the same: mathematics of entrance examinations for engineering schools in India (one more
                          lost a choice and is left out)
a path           any      the reader's own JSON Lines, see :func:`read_jsonl`
===============  =======  =====================================================================================

Book: ``chapters/performance/accuracy.ipynb``. Source: MMLU (arXiv 2009.03300); the subjects of an area are as in the
evaluation code that its authors published.
"""

import codecs
import contextlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from dslib import check
from dslib.data.files import cache_root, read_yaml

LETTERS = "ABCD"
_MMLU = read_yaml("mmlu.yml")
SUBJECTS: dict[str, dict[str, int]] = _MMLU["subjects"]  # group -> subject -> number of its test questions
TEST_SIZES = {subject: size for sizes in SUBJECTS.values() for subject, size in sizes.items()}
AREAS = {area: tuple(subjects) for area, subjects in _MMLU["areas"].items()}  # the article's three
EVALS = "evals==3.0.1.post1"
_EVALS_WHEEL = "evals-3.0.1.post1-py3-none-any.whl"
# How the three sets label their choices; each begins a line there.
_LABELS = {"us_tort_law": r"\n *{}\.", "medmcqa": r"\n *(?i:{})\)", "jee-math": r"\n *\({}\)"}
SETS = ("mmlu-281", "mmlu", *_LABELS)


class QuestionsNotFound(FileNotFoundError):
    """A set is neither installed nor to be had; the message says what would bring it."""


@dataclass(frozen=True)
class Question:
    """A question with four choices. ``answer`` is the index of the right one, 0 to 3."""

    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str = ""

    def __post_init__(self):
        if isinstance(self.choices, str) or not isinstance(self.choices, Sequence) or len(self.choices) != len(LETTERS):
            raise ValueError(f"choices: got {self.choices!r}, expected a list of four texts")
        choices = {f"choices, {letter}": choice for letter, choice in zip(LETTERS, self.choices, strict=True)}
        for name, text in {"question": self.question, **choices}.items():
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{name}: got {text!r}, expected some text")
        if isinstance(self.answer, bool) or not isinstance(self.answer, int) or not 0 <= self.answer < len(LETTERS):
            raise ValueError(f"answer: got {self.answer!r}, expected 0 to 3 or a letter from A to D")
        object.__setattr__(self, "choices", tuple(self.choices))

    def rotated(self, by: int) -> "Question":
        """The same question with every choice ``by`` places further down, the last ones coming round to the top."""
        by %= len(LETTERS)
        choices = (*self.choices[-by:], *self.choices[:-by]) if by else self.choices
        return replace(self, choices=choices, answer=(self.answer + by) % len(LETTERS))


def load_questions(name: str | Path) -> list[Question]:
    """A set by its name, or the questions in a JSON Lines file.

    Raises:
        QuestionsNotFound: the set is not installed and cannot be fetched; or there is no such file.
        ValueError: a question that is none, with file and line.
    """
    whole = {"mmlu-281": mmlu_examples, "mmlu": mmlu_test}
    if name in whole:
        return whole[name]()
    if name in _LABELS:
        return evals_set(name)
    if not Path(name).is_file():
        raise QuestionsNotFound(f"questions: got {str(name)!r}, expected a file or one of {', '.join(SETS)}")
    return read_jsonl(name)


def in_domain(questions: Iterable[Question], domain: str) -> list[Question]:
    """The questions whose subject belongs to ``domain``: a group of MMLU, one of :data:`AREAS`, or ``"all"``."""
    subjects = _subjects(domain)
    return [one for one in questions if domain == "all" or one.subject in subjects]


def test_size(domain: str) -> int:
    """How many test questions the real MMLU has in a domain, see :func:`in_domain`."""
    return sum(TEST_SIZES[subject] for subject in _subjects(domain))


def _subjects(domain: str) -> tuple[str, ...]:
    known = {"all": tuple(TEST_SIZES), **{group: tuple(sizes) for group, sizes in SUBJECTS.items()}, **AREAS}
    check.one_of(known, domain=domain)
    return known[domain]


def read_jsonl(path: str | Path) -> list[Question]:
    """Questions from JSON Lines: objects with ``question``, ``choices`` (four texts), ``answer`` (0 to 3 or A to D).

    ``subject`` is optional, empty lines are skipped. Only a line feed ends a line (jsonlines.org).

    Raises:
        ValueError: naming file and line of what is wrong; or the file has no question.
    """
    path, found = Path(path), []
    for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            found.append(_from_mapping(json.loads(line.decode("utf-8"))))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.name} line {number}: not valid JSON: {error.msg}") from error
        except ValueError as error:  # also of decode
            raise ValueError(f"{path.name} line {number}, {error}") from error
    if not found:
        raise ValueError(f"{path.name}: got no question, expected at least one")
    return found


def _from_mapping(row: object) -> Question:
    if not isinstance(row, Mapping):
        raise ValueError(f"got {row!r}, expected an object with question, choices and answer")
    missing = [name for name in ("question", "choices", "answer") if name not in row]
    if missing:
        raise ValueError(f"{missing[0]}: missing, expected question, choices and answer")
    answer = row["answer"]
    if isinstance(answer, str) and answer in tuple(LETTERS):
        answer = LETTERS.index(answer)
    return Question(row["question"], row["choices"], answer, str(row.get("subject", "")))


def mmlu_examples() -> list[Question]:
    """The 281 worked examples of MMLU's 57 subjects that come with lm-eval, sorted by subject.

    They are what other evaluations show a model before the question. One of the 282, in college chemistry, has five
    choices and lost its fourth line on the way; it is left out.

    Raises:
        QuestionsNotFound: the package is not installed, or has no such files.
    """
    spec = importlib.util.find_spec("lm_eval")  # does not import it
    folders = spec.submodule_search_locations if spec else None
    files = sorted(Path(folders[0], "tasks/mmlu/flan_cot_fewshot").glob("mmlu_*.yaml")) if folders else []
    if not files:
        what = "lm-eval has no tasks here" if folders else "lm-eval is not installed"
        raise QuestionsNotFound(f"{what}. Run: pip install --no-deps lm-eval==0.4.13")
    found = []
    for file in files:
        task = yaml.load(file.read_text(encoding="utf-8"), _TaskLoader)
        for sample in task["fewshot_config"]["samples"]:
            answer = re.findall(r"answer is \(([A-D])\)", sample["target"])
            if "(E)" in sample["question"] or len(answer) != 1:
                continue
            found.append(_split(sample["question"], r"\({}\)", LETTERS.index(answer[0]), task["dataset_name"]))
    return found


class _TaskLoader(yaml.SafeLoader):
    """lm-eval's task files name Python functions behind a tag of their own; nothing is run, they are read as None."""


_TaskLoader.add_multi_constructor("!", lambda loader, suffix, node: None)


def _split(text: str, label: str, answer: int, subject: str) -> Question:
    """A question that has its choices in one text; ``label`` is a pattern with {} for the letter."""
    places = "".join(rf"\s*?{label.format(letter)}(.+?)" for letter in LETTERS)
    match = re.fullmatch(rf"(.+?){places}(?:\nAnswer:)?\s*", text, re.DOTALL)
    if match is None:
        raise ValueError(f"question: got {text[-80:]!r}, expected four choices, labelled A to D")
    question, *choices = match.groups()
    return Question(question.strip(), tuple(choice.strip() for choice in choices), answer, subject)


def evals_set(name: str, wheel: str | Path | None = None) -> list[Question]:
    """One of the sets in the wheel of ``evals``: ``"us_tort_law"``, ``"medmcqa"`` or ``"jee-math"``.

    ``wheel`` is its file; None looks in the cache folder, and fetches it with pip on the first call (46 MB). It is
    read in place: installing it would take 755 MB.

    Raises:
        QuestionsNotFound: pip could not fetch it, or ``wheel`` is not there.
        ValueError: an unknown set, or a line that is no question.
    """
    check.one_of(_LABELS, name=name)
    path = Path(wheel) if wheel is not None else _fetched_wheel()
    if not path.is_file():
        raise QuestionsNotFound(f"no such wheel: {path}. Run: pip download --no-deps {EVALS}")
    with zipfile.ZipFile(path) as archive:
        lines = archive.read(f"evals/registry/data/{name}/samples.jsonl").split(b"\n")
    rows = [json.loads(line) for line in lines if line.strip()]
    found = []
    for row in rows:
        text = re.sub(r"^Subject: .*\n+", "", row["input"][-1]["content"])
        ideal = row["ideal"][0] if isinstance(row["ideal"], list) else row["ideal"]
        answer = re.search(r"\(([A-D])\)|^([A-D])$|^([a-d])\)", ideal)
        with contextlib.suppress(ValueError):  # left out, see above
            found.append(_split(text, _LABELS[name], LETTERS.index(answer[answer.lastindex].upper()), name))
    return found


def _fetched_wheel() -> Path:
    path = cache_root() / _EVALS_WHEEL
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise QuestionsNotFound(
            f"{EVALS} cannot be kept: {path.parent} cannot be written ({error.strerror}). "
            "Set DSLIB_CACHE to a folder that can be."
        ) from error
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(path.parent), EVALS]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode or not path.is_file():
        raise QuestionsNotFound(f"pip could not fetch {EVALS}: {result.stderr.strip()[-300:]}")
    return path


def mmlu_test() -> list[Question]:
    """All 14,042 test questions of MMLU, from the hub or its local cache; needs ``pyarrow``.

    Raises ``QuestionsNotFound`` where the hub is out of reach, or a package cannot be imported.
    """
    try:
        import pyarrow.parquet
        from huggingface_hub import hf_hub_download

        file = hf_hub_download("cais/mmlu", "all/test-00000-of-00001.parquet", repo_type="dataset", etag_timeout=10)
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except ImportError as error:
        raise QuestionsNotFound(
            f"reading MMLU's test questions takes pyarrow ({error}). Run: pip install pyarrow huggingface_hub"
        ) from error
    except Exception as error:  # network libraries raise many unrelated types
        raise QuestionsNotFound(f"cais/mmlu: the hub did not give MMLU's test questions ({error})") from error
    return [_from_mapping(row) for row in rows]
