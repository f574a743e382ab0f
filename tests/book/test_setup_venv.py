"""tools/setup_venv.py decides rightly when to do nothing, to update, to start afresh and to stop, and with what.

Nothing is installed here: the commands it would run are written down instead. `.ci/run` runs the real thing.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import setup_venv

ROOT = Path(__file__).resolve().parents[2]


class Checkout:
    """A checkout in which commands are written down; `fail(command)` says which ones fail."""

    def __init__(self, root, monkeypatch):
        self.commands, self.fail, self.settings = [], lambda command: False, {}
        self.monkeypatch = monkeypatch
        self.place(root)
        for name in setup_venv.WATCHED:
            shutil.copy(ROOT / name, root / name)
        monkeypatch.setattr(setup_venv, "run", self.run)
        monkeypatch.setattr(setup_venv, "attempt", lambda *arguments: "no" if self.failed(arguments[0]) else None)
        monkeypatch.setattr(setup_venv, "settings", lambda: self.settings)

    def place(self, root):
        self.root, self.venv = root, root / ".venv"
        places = {"ROOT": "", "VENV": ".venv", "OLD": ".venv.old", "PYTHON": ".venv/bin/python"}
        for name, tail in {**places, "MARKER": ".venv/setting-up", "STAMP": ".venv/set-up.json"}.items():
            self.monkeypatch.setattr(setup_venv, name, os.path.join(root, tail).rstrip("/"))

    def failed(self, command):
        self.commands.append(command)
        if "venv" in command:
            python = Path(setup_venv.PYTHON)
            python.parent.mkdir(parents=True, exist_ok=True)
            python.exists() or python.symlink_to(sys.executable)
        return self.fail(command)

    def run(self, command, env=None):
        if self.failed(command):
            sys.exit("error: stopped")

    def set_up(self):
        """The commands of one more run."""
        self.commands.clear()
        setup_venv.main()
        return self.commands

    def installs(self):
        return [command for command in self.commands if "install" in command and "uv" not in command[-1:]]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    root = tmp_path / "a b"
    root.mkdir()
    return Checkout(root, monkeypatch)


def test_first_run_installs_and_second_does_nothing(checkout):
    assert checkout.set_up()[0][1:3] == ["-m", "venv"]
    backend, book, models = checkout.installs()
    assert sorted(part.split("==")[0] for part in backend if "==" in part) == ["editables", "hatchling"]
    assert book[-2:] == ["-r", "requirements.txt"]
    assert models[-3:] == ["--no-deps", "-r", "requirements-models.txt"]
    assert checkout.commands[-1][1:4] == ["-I", "-c", setup_venv.CHECK]
    assert checkout.set_up() == []


@pytest.mark.parametrize("step", range(1, 6))
def test_an_interrupted_set_up_is_done_afresh(checkout, step):
    checkout.settings = {"proxy": "http://localhost:1"}  # pip alone: each step that fails ends the set-up
    checkout.fail = lambda command: len(checkout.commands) == step
    with pytest.raises(SystemExit):
        checkout.set_up()
    assert not Path(setup_venv.STAMP).exists()
    left = checkout.venv / "half-installed"
    left.write_text("")
    checkout.fail = lambda command: False
    checkout.set_up()
    assert len(checkout.installs()) == 3
    assert not left.exists(), "the half-made environment was used again"
    assert not (checkout.root / ".venv.old").exists()


@pytest.mark.parametrize("name", setup_venv.WATCHED)
def test_changed_requirements_are_installed(checkout, name):
    checkout.set_up()
    with open(checkout.root / name, "a") as file:
        file.write("\n# changed\n")
    checkout.set_up()
    assert len(checkout.installs()) == 3


def test_a_moved_checkout_is_installed_again_without_downloads(checkout):
    checkout.set_up()
    moved = checkout.root.with_name("moved")
    checkout.root.rename(moved)
    checkout.place(moved)
    checkout.set_up()
    (install,) = checkout.installs()
    assert install[-2:] == ["-e", "."] and "--no-deps" in install and "uv" not in install
    assert json.loads((moved / ".venv" / "set-up.json").read_text())["checkout"] == str(moved)


def test_a_venv_whose_python_is_gone_is_made_afresh(checkout):
    checkout.set_up()
    Path(setup_venv.PYTHON).unlink()
    Path(setup_venv.PYTHON).symlink_to(checkout.root / "no such python")
    checkout.set_up()
    assert len(checkout.installs()) == 3


def somebody_elses(checkout):
    checkout.venv.mkdir()
    (checkout.venv / "mine").write_text("")


def stamp_that_does_not_parse(checkout):
    checkout.set_up()
    Path(setup_venv.STAMP).write_text("{")


def link(checkout):
    """To a folder that looks as if a set-up of its own had been interrupted."""
    other = checkout.root.with_name("other")
    other.mkdir()
    (other / "setting-up").write_text("")
    checkout.venv.symlink_to(other)


def no_fcntl(checkout):
    checkout.monkeypatch.setattr(setup_venv, "fcntl", None)


def old_python(checkout):
    checkout.monkeypatch.setattr(setup_venv, "OLDEST", (99, 0))
    checkout.monkeypatch.setattr(setup_venv, "newer_python", lambda: None)


@pytest.mark.parametrize(
    ("arrange", "said"),
    [
        (somebody_elses, "Move it away"),
        (stamp_that_does_not_parse, "not made by this Makefile"),
        (link, "nothing is changed through a link"),
        (no_fcntl, "On Windows"),
        (old_python, r"needs Python 3\.11 or newer"),
    ],
)
def test_it_stops_and_touches_nothing(checkout, arrange, said):
    arrange(checkout)
    before = sorted(os.listdir(checkout.venv)) if checkout.venv.exists() else []
    checkout.commands.clear()
    with pytest.raises(SystemExit, match=said):
        setup_venv.main()
    assert checkout.commands == []
    assert (sorted(os.listdir(checkout.venv)) if checkout.venv.exists() else []) == before


def test_an_environment_that_cannot_be_used_gets_no_stamp(checkout):
    checkout.fail = lambda command: setup_venv.CHECK in command
    with pytest.raises(SystemExit, match="cannot use them"):
        checkout.set_up()
    assert not Path(setup_venv.STAMP).exists() and Path(setup_venv.MARKER).exists()


def test_without_file_locks_it_goes_on_and_says_so(checkout, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(setup_venv.fcntl, "flock", refuse)
    checkout.set_up()
    assert len(checkout.installs()) == 3 and "one make command at a time" in capsys.readouterr().out


# ---------------------------------------------------------------- the reader's settings

WHERE_TO = {"user": "true", "target": "/elsewhere", "prefix": "/elsewhere", "root": "/elsewhere", "python": "/other"}
FROM = {
    "index-url": "https://a/simple",
    "extra-index-url": "https://b/s https://c/s",
    "find-links": "/wheels",
}


@pytest.mark.parametrize("source", ["file", "variables"])
def test_only_what_says_from_where_is_read(source, tmp_path, monkeypatch):
    values = FROM | {"cert": "/my ca.pem", "constraint": "/c.txt", "trusted-host": "b", "no-index": "0"}
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(setup_venv, "PYTHON", sys.executable)
    if source == "file":
        lines = [f"{name} = {text}" for name, text in (values | WHERE_TO).items()]
        (tmp_path / "pip.conf").write_text("\n".join(["[global]", "index-url = x", "[install]", *lines]))
        monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    else:
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        for name, text in (values | WHERE_TO).items():
            monkeypatch.setenv("PIP_" + name.upper().replace("-", "_"), text)
    read = setup_venv.settings()
    assert {name: read.get(name) for name in values} == values | {"no-index": None}
    assert not read.keys() & WHERE_TO.keys()


def test_pip_and_uv_are_told_from_where_and_never_where_to(monkeypatch):
    monkeypatch.setenv("PIP_TARGET", "/elsewhere")
    monkeypatch.setenv("UV_SYSTEM_PYTHON", "1")
    monkeypatch.setenv("UV_INDEX_MINE_PASSWORD", "secret")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    env = setup_venv.environment(FROM)
    assert not {"PIP_TARGET", "UV_SYSTEM_PYTHON", "PYTHONPATH"} & env.keys()
    assert env["PIP_CONFIG_FILE"] == os.devnull and env["PIP_INDEX_URL"] == FROM["index-url"]
    assert env["UV_INDEX_MINE_PASSWORD"] == "secret"
    options = " ".join(setup_venv.uv_options(FROM | {"no-index": "1", "retries": "2", "cert": "/my ca.pem"}))
    assert "--default-index https://a/simple --index https://b/s --index https://c/s" in options
    assert options.endswith("--find-links /wheels --no-index --cert /my ca.pem")


@pytest.mark.parametrize("reason", ["a setting", "not to be had", "fails"])
def test_pip_installs_where_uv_cannot(checkout, reason):
    checkout.settings = {"client-cert": "/mine.pem"} if reason == "a setting" else {}
    fetch = {"not to be had": ["-c", "constraints.txt", "uv"], "fails": ["-r", "requirements.txt"]}.get(reason)
    checkout.fail = lambda command: "uv" in command and fetch and command[-len(fetch) :] == fetch
    checkout.set_up()
    done = [command for command in checkout.installs() if not checkout.fail(command)]
    assert [command[-1] for command in done][1:] == ["requirements.txt", "requirements-models.txt"]
    assert all("uv" not in command for command in done[1:])
    assert ("uv" in done[0]) == (reason == "fails")


# ---------------------------------------------------------------- git's hook, requirements, make


@pytest.mark.parametrize(("names", "renewed"), [("/gone/python", True), ("mine", False), (None, False)])
def test_hooks_are_renewed_after_a_move(checkout, names, renewed):
    subprocess.run(["git", "init", "-q", str(checkout.root)], check=True)
    kinds = ["pre-commit", "pre-push"] if names else []
    for kind in kinds:
        hook = checkout.root / ".git" / "hooks" / kind
        hook.parent.mkdir(exist_ok=True)
        hook.write_text(f"#!/bin/sh\nINSTALL_PYTHON='{setup_venv.PYTHON if names == 'mine' else names}'\n")
    written = [command[-1] for command in checkout.set_up() if "pre_commit" in command]
    assert written == (kinds if renewed else [])


def test_requirements_are_exact_and_end_with_the_library():
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    lines = [line for line in lines if line]
    assert lines[-1] == "-e ."
    assert [line for line in lines[1:-1] if "==" not in line] == []
    assert "\nuv==" in (ROOT / "constraints.txt").read_text()


def test_make_alone_says_what_each_target_does(tmp_path):
    if not shutil.which("make"):
        pytest.skip("needs make")
    said = subprocess.run(["make", "-C", str(ROOT)], cwd=tmp_path, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    for target in ("book", "test", "lab", "refresh", "record", "lint", "portability", "clean"):
        assert f"make {target} " in said.stdout


def test_make_keeps_the_callers_options_of_python_and_pytest_out(tmp_path):
    if not shutil.which("make"):
        pytest.skip("needs make")
    (tmp_path / "show.mk").write_text("show:\n\t@env\n")
    given = {
        "PYTHONINSPECT": "1",
        "PYTHONSAFEPATH": "1",
        "PYTEST_ADDOPTS": "-x",
        "MPLBACKEND": "svg",
        "PYTHONUTF8": "0",
    }
    env = {name: text for name, text in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))} | given
    make = ["make", "-s", "-C", str(ROOT), "-f", "Makefile", "-f", str(tmp_path / "show.mk"), "show"]
    said = subprocess.run(make, env=env, capture_output=True, text=True).stdout
    names = {line.partition("=")[0] for line in said.splitlines()}
    assert names & given.keys() == {"PYTHONUTF8"} and "PYTHONNOUSERSITE" in names
