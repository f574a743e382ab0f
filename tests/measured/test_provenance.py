"""A result belongs to a commit: changed checkouts are refused, and so are files that are not the commit's."""

import dataclasses
import subprocess

import pytest

from measured import provenance, record, recordings


def git(folder, *words):
    settings = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *settings, *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    """A small checkout with both packages, committed."""
    for name in ("dslib/a.py", "dslib/fast/k.cpp", "measured/b.py", "data/recordings/m.json", "chapters/c.ipynb"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def told(checkout):
    return dict(zip(("commit", "tree"), provenance.key(checkout).split()[1::2], strict=True))


def test_git_and_the_files_say_the_same(checkout):
    commit, tree = provenance.origin(None, None, checkout)
    assert commit == git(checkout, "rev-parse", "HEAD")
    assert tree == provenance.tree_here(checkout) == provenance.tree_of(commit, checkout)
    assert provenance.key(checkout) == f"--commit {commit} --tree {tree}"
    provenance.check(commit, tree, checkout)


@pytest.mark.parametrize("path", ["dslib/a.py", "measured/new.py", "tools.txt"])
def test_a_changed_checkout_is_refused(checkout, path):
    (checkout / path).write_text("x = 1\n")
    with pytest.raises(ValueError, match=f"checkout: has changes, wanted none: {path}; commit first"):
        provenance.origin(None, None, checkout)


@pytest.mark.parametrize("path", ["data/recordings/m.json", "chapters/c.ipynb", "data/recordings/new.json"])
def test_results_do_not_make_it_changed(checkout, path):
    (checkout / path).write_text("new\n")
    assert provenance.origin(None, None, checkout)


def test_a_copy_without_git_checks_itself(checkout, tmp_path_factory):
    key, copy = told(checkout), tmp_path_factory.mktemp("copy")
    subprocess.run(["cp", "-r", checkout / "dslib", checkout / "measured", copy], check=True)
    assert provenance.origin(**key, root=copy) == tuple(key.values())
    with pytest.raises(ValueError, match="no git checkout here; pass what `make record-key` prints"):
        provenance.origin(None, None, copy)
    with pytest.raises(ValueError, match="got one of them, wanted both"):
        provenance.origin(key["commit"], None, copy)
    (copy / "measured/b.py").write_text("other\n")
    with pytest.raises(provenance.NotThatCommit, match="this copy is not commit"):
        provenance.origin(**key, root=copy)


def test_a_file_that_is_moved_or_cut_differently_has_another_fingerprint():
    same = [("a.py", b"xy"), ("b.py", b"z")]
    assert provenance.fingerprint(same) == provenance.fingerprint(same[::-1])
    others = [[("a.py", b"x"), ("b.py", b"yz")], [("b.py", b"xy"), ("a.py", b"z")], same[:1]]
    assert len({provenance.fingerprint(files) for files in [same, *others]}) == 4


def test_merging_takes_what_is_the_commits_and_nothing_else(checkout, tmp_path_factory, monkeypatch, capsys):
    commit, tree = provenance.origin(None, None, checkout)
    made = recordings.record(provenance.fingerprint, (commit, tree), files=[])
    file = recordings.write(tmp_path_factory.mktemp("node") / "card.json", [made])
    check = provenance.check
    monkeypatch.setattr(provenance, "check", lambda *key: check(*key, checkout))
    monkeypatch.setattr(record, "data_path", lambda name: checkout / "data" / name)
    assert record.main(["--merge", str(file)]) == 0
    assert recordings.read(checkout / "data/recordings/card.json") == [made]
    for changes, words in (
        ({"tree": "0" * 16}, "other code than it says"),
        ({"tree": None}, "has no tree"),
        ({"commit": "1" * 40}, "wanted one that this checkout has"),
        ({"commit": "unknown"}, "wanted 7 to 40 hexadecimal digits"),
    ):
        file.write_text(file.read_text())
        file.unlink()
        recordings.write(file, [dataclasses.replace(made, **changes)])
        assert record.main(["--merge", str(file)]) == 2
        assert words in capsys.readouterr().err


def test_time_is_up_in_the_middle_of_a_call(tmp_path, monkeypatch, capsys):
    """What was done is kept, what was under way is not, and a measurement that swallows errors does not swallow it."""
    import time

    def slow():
        try:
            time.sleep(30)
        except Exception:
            return {"never": 1}

    plain = record.find
    monkeypatch.setattr(record, "find", lambda name: slow if name.endswith("slow") else plain(name))
    calls = (
        ("measured.probes:launch_gap", {"side": 16, "rounds": 1}),
        ("measured.x:slow", {}),
        ("measured.x:slow", {}),
    )
    monkeypatch.setattr(recordings, "function_name", lambda fn: "measured.x:slow" if fn is slow else "measured.y:gap")
    out, start = tmp_path / "a.json", time.monotonic()
    assert record.run(calls, str(out), 0.02, ("0" * 40, "0" * 16)) == 0
    assert time.monotonic() - start < 10 and len(recordings.read(out)) == 1
    assert "time is up; not measured: slow{}, slow{}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["machine", "--minutes", "0"], "minutes: got 0.0, wanted more than 0"),
        (["machine", "--commit", "abc"], "got one of them, wanted both"),
        (["machine", "--commit", "abc", "--tree", "0"], "this copy is not commit abc"),
        (["--merge", "nowhere.json"], "nowhere.json"),
    ],
)
def test_bad_arguments(arguments, words, capsys):
    assert record.main(arguments) == 2
    assert words in capsys.readouterr().err
