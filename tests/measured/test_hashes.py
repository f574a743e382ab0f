"""A change of the function, of what it calls, of a comment: another protocol, other code, nothing."""

import sys
import types

import pytest

from measured import provenance

FILES = {
    "measured/__init__.py": "",
    "measured/run.py": '''"""Runs."""
from dslib import work

ROUNDS, OTHER = 3, 4
TABLE = {"a": ROUNDS}
UNUSED = 5


def step(x):
    """Doc."""
    y = 2  # two

    return work.once(x) * y * TABLE["a"] + helper()


def helper():
    return 1
''',
    "dslib/__init__.py": "",
    "dslib/work.py": "from dslib.deep import SCALE as scale\n\n\ndef once(x):\n    return x * scale\n",
    "dslib/deep.py": "from . import deeper\nSCALE = 2\n",
    "dslib/deeper.py": "ONE = 1\n",
    "dslib/deeper.cpp": "int one = 1;\n",
    "dslib/aside.py": "X = 1\n",
}


def both(folder, monkeypatch, changes=()):
    """(protocol, code) of ``step`` in a package of which some files have some text replaced."""
    for name, text in FILES.items():
        for path, old, new in changes:
            if path == name:
                assert old in text
                text = text.replace(old, new)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    # Its imports would find the real packages, and only its text counts: run it without them.
    path = folder / "measured/run.py"
    module = types.ModuleType("measured.run")
    module.__file__ = str(path)
    exec(compile(path.read_text().replace("from dslib import work", ""), path, "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, "measured.run", module)
    return provenance.protocol(module.step), provenance.code(module.step, folder)


@pytest.mark.parametrize(
    ("change", "protocol", "code"),
    [
        (("measured/run.py", "y = 2", "y = 3"), True, True),
        (("measured/run.py", "ROUNDS, OTHER = 3, 4", "ROUNDS, OTHER = 4, 4"), True, True),
        (("measured/run.py", "UNUSED = 5", "UNUSED = 6"), False, True),
        (("measured/run.py", "return 1", "return 2"), False, True),
        (("dslib/work.py", "x * scale", "x / scale"), False, True),
        (("dslib/deep.py", "SCALE = 2", "SCALE = 3"), False, True),
        (("dslib/deeper.py", "ONE = 1", "ONE = 2"), False, True),
        (("dslib/deeper.cpp", "= 1", "= 2"), False, True),
        (("dslib/aside.py", "X = 1", "X = 2"), False, False),
        (("measured/run.py", "  # two", "  # a pair"), False, False),
        (("measured/run.py", '"""Doc."""', '"""Another\n    text."""'), False, False),
        (("measured/run.py", '"""Runs."""', ""), False, False),
        (("measured/run.py", "y = 2  # two\n\n", "# first\n    y = 2\n"), False, False),
    ],
)
def test_what_changes_which_hash(tmp_path, monkeypatch, change, protocol, code):
    before, after = both(tmp_path, monkeypatch), both(tmp_path, monkeypatch, [change])
    assert (before[0] != after[0], before[1] != after[1]) == (protocol, code)


def test_a_hash_in_a_string_is_no_comment():
    assert provenance.bare('x = "# no comment"  # one\n') == 'x = "# no comment"'
    assert provenance.bare('def f():\n    """Only this."""\n') == "def f():"
