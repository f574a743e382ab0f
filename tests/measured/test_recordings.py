import copy
import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from dslib.data.files import data_path
from measured import record, recordings
from measured.timing import Timing

RUNS = []


def speed(size, seed=0):
    """Something to record. Its module can be imported again by name."""
    RUNS.append(size)
    return {"tokens": size * 2, "time": Timing((0.001, 0.002, 0.003)), "text": "ok"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(recordings, "data_path", lambda name: tmp_path)
    return tmp_path


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def on_gpu(**changes):
    made = recordings.record(speed, size=3)
    machine = made.machine | {"kind": "cuda", "name": "NVIDIA A100-SXM4-80GB"}
    return dataclasses.replace(made, machine=machine, **changes)


def test_a_recording_says_all_that_is_needed_to_judge_it():
    made = recordings.record(speed, size=3)
    assert made.function.endswith("test_recordings:speed")
    assert made.arguments == {"size": 3, "seed": 0}
    assert made.seed == 0
    assert made.result["tokens"] == 6
    assert made.result["time"] == {"median": 0.002, "low": 0.0015, "high": 0.0025, "n": 3, "settled": False}
    assert {"python", "torch"} <= set(made.versions)
    assert made.commit
    assert "/" not in made.command
    assert made.versions["torch"] in made.where


def test_written_recordings_are_read_back(folder):
    made = recordings.record(speed, size=3)
    path = recordings.write(folder / "here.json", [made])
    assert recordings.read(path) == [made]
    assert recordings.read_all() == [made]
    assert not list(folder.glob("*.part"))


def test_the_same_call_replaces_the_older_recording_and_others_stay(folder):
    path = recordings.write(folder / "a.json", [on_gpu(date="2026-01-01"), on_gpu(arguments={"size": 9, "seed": 0})])
    recordings.write(path, [on_gpu(date="2026-02-02")])
    assert sorted(r.date for r in recordings.read(path) if r.arguments["size"] == 3) == ["2026-02-02"]
    assert len(recordings.read(path)) == 2


def test_the_default_file_is_named_after_the_machine(folder):
    path = recordings.write(None, [recordings.record(speed, size=1)])
    assert path.parent == folder
    assert path.stem == path.stem.lower()


def test_one_machine_a_file(folder):
    with pytest.raises(ValueError, match="wanted one machine a file"):
        recordings.write(folder / "a.json", [on_gpu(), recordings.record(speed, size=4)])
    made = recordings.record(speed, size=3)
    newer = dataclasses.replace(made, arguments={"size": 4, "seed": 0}, machine=made.machine | {"isa": "AVX-9000"})
    with pytest.raises(ValueError, match="with AVX-9000, wanted one machine a file"):
        recordings.write(folder / "a.json", [made, newer])
    assert "with AVX-9000, 20" in newer.where


def test_without_a_recording_the_page_says_so(folder, no_cuda):
    shown = recordings.live_or_recorded(speed, size=3)
    assert shown.origin == "absent" and not shown and not shown.result
    assert "no recording" in shown._repr_markdown_()
    assert "<code>" in shown._repr_html_()


USES = {
    "item": lambda gone: gone["loss"],
    "attribute": lambda gone: gone.items(),
    "loop": lambda gone: dict(gone),
    "number": lambda gone: 2 * gone + 1,
    "comparison": lambda gone: gone == 0,
    "order": lambda gone: min(gone, 1),
    "format": lambda gone: f"{gone:.2f}",
    "mean": lambda gone: np.mean([gone, 1.0]),
    "update": lambda gone: {}.update(gone),
}


@pytest.mark.parametrize("use", USES)
def test_any_use_of_what_is_absent_says_what_is(use, folder, no_cuda):
    gone = recordings.recorded(speed, size=3).result
    assert not gone and (gone or 7) == 7 and copy.deepcopy([gone]) and "No recording of" in repr(gone)
    with pytest.raises(recordings.NotRecorded, match=r"No recording of `.*:speed` with these arguments exists yet"):
        USES[use](gone)


# The first cell fetches; what a later one shows, where there is no recording and where there is one.
PAGE = (
    ("from lab import speed\nfrom measured import recordings\nt = 5\nfar = {}", None, None),
    ("def get(): return recordings.recorded(speed).result", None, None),
    ("print('before')\nruns = get()\nt = runs['s']\nt + 1", "before\nSkipped", "before\n3"),
    ("for t in [9]:\n    far[t] = 1\n'not touched'", "'not touched'", "'not touched'"),
    ("t = 5\n[runs[k] for k in ('s',)]", "Skipped", "[2]"),
    ("def twice(): return 2 * runs['s']\ntwice", "function", "function"),
    ("u = twice()", "Skipped", None),
    ("print(u)\nu", "No recording", "4"),
    ("f'{u}'", "Skipped", "'4'"),
    ("sum(t for t in [1]), bool(runs), far", "(1, False, {9: 1})", "(1, True, {9: 1})"),
    ("far['s'] = u + 1", "Skipped", None),
    ("len(far)", "Skipped", "2"),
    ("from __future__ import annotations\n'first'", "'first'", "'first'"),
    ("1 / 0", "ZeroDivisionError", "ZeroDivisionError"),
)


@pytest.mark.parametrize("there", [False, True])
def test_cells_end_where_they_use_what_is_absent(there):
    """In a shell of its own, so that nothing of it stays here."""
    code = f"""
import sys, types
lab = types.ModuleType("lab"); sys.modules["lab"] = lab
exec("def speed(): return 1", lab.__dict__); lab.speed.__module__ = "lab"
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance(colors="NoColor", history_length=0)
from measured import recordings
shown = recordings.Shown({{"s": 2}}, "recorded", "")
recordings.recorded = lambda fn: shown if {there} else recordings.Shown(
    recordings.Absent("No recording of speed exists yet."), "absent", "")
for source, *_ in {PAGE!r}:
    print("<cell>")
    shell.run_cell(source)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    shown = done.stdout.split("<cell>\n")[1:]
    assert len(shown) == len(PAGE), done.stderr
    for text, (source, without, present) in zip(shown, PAGE, strict=True):
        wanted = present if there else without
        assert (wanted in re.sub(r"Out\[\d+\]: ", "", text)) if wanted else not text.strip(), f"{source}\n{text}"
        assert ("Traceback" in text) == (source == "1 / 0"), text


def test_a_missing_folder_is_no_recording(monkeypatch, no_cuda):
    def missing(name):
        raise FileNotFoundError(name)

    monkeypatch.setattr(recordings, "data_path", missing)
    assert recordings.read_all() == []
    assert recordings.live_or_recorded(speed, size=3).origin == "absent"


def test_the_recording_of_the_same_call_is_shown(folder, no_cuda):
    recordings.write(folder / "gpu.json", [on_gpu()])
    shown = recordings.live_or_recorded(speed, size=3)
    assert shown.origin == "recorded" and recordings.OLDER not in shown.note
    text = repr(shown)
    assert "Recorded on NVIDIA A100-SXM4-80GB" in text
    assert "2 ms (1.5 to 2.5, n=3)" in text
    assert "2 ms (1.5 to 2.5, n=3)" in shown._repr_html_()
    assert "<em>Recorded on" in shown._repr_html_()
    assert recordings.live_or_recorded(speed, size=4).origin == "absent"
    assert recordings.live_or_recorded(speed, size=3, seed=1).origin == "absent"


def test_a_cpu_recording_does_not_stand_in_for_a_gpu(folder, no_cuda):
    recordings.write(folder / "cpu.json", [dataclasses.replace(on_gpu(), machine={"kind": "cpu", "name": "x"})])
    assert recordings.live_or_recorded(speed, size=3).origin == "absent"


CURRENT, OLDER, STALE = {}, {"code": None}, {"protocol": "0" * 16}


@pytest.mark.parametrize(
    ("recorded", "shown"),  # (date, what is different about it), and the date of the one that is shown
    [
        ([("2026-01-01", OLDER)], "2026-01-01"),
        ([("2026-01-01", STALE)], None),
        ([("2026-01-01", CURRENT), ("2026-09-09", OLDER)], "2026-01-01"),
        ([("2026-01-01", OLDER), ("2026-09-09", STALE)], "2026-01-01"),
        ([("2026-01-01", OLDER), ("2026-09-09", OLDER)], "2026-09-09"),
    ],
)
def test_which_of_several_recordings_is_shown(folder, no_cuda, recorded, shown):
    for number, (date, changes) in enumerate(recorded):
        machine = {"kind": "cuda", "name": f"card {number}"}
        recordings.write(
            folder / f"{number}.json", [dataclasses.replace(on_gpu(date=date, **changes), machine=machine)]
        )
    found = recordings.live_or_recorded(speed, size=3)
    if shown is None:
        assert found.origin == "absent" and not found.result
        assert "the one of 2026-01-01 is of an older version" in found.note
    else:
        assert found.origin == "recorded" and shown in found.note
        assert (recordings.OLDER in found.note) == (dict(recorded)[shown] is OLDER)
    assert recordings.best_standing(speed, {"size": 3}) == (
        "stale" if shown is None else "older code" if recordings.OLDER in found.note else "current"
    )


@pytest.mark.parametrize("name", ["nowhere.at.all:f", "measured.recordings:gone"])
def test_a_function_that_is_gone_is_stale(name):
    assert recordings.standing(on_gpu(function=name)) == "stale"


def test_a_page_says_the_whole_commit_state():
    assert on_gpu(commit="a" * 40).where.endswith("commit aaaaaaaaaa)")
    assert on_gpu(commit="a" * 40 + "-changed").where.endswith("commit aaaaaaaaaa with changes)")


def test_with_cuda_the_function_runs(folder, monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("measured.machine.describe", lambda device=None: SimpleNamespace(name="NVIDIA T4"))
    shown = recordings.live_or_recorded(speed, size=5)
    assert shown.origin == "live"
    assert shown.result["tokens"] == 10
    assert shown.result["time"]["n"] == 3  # the shape of a recorded result
    assert "Measured here, on NVIDIA T4" in repr(shown)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"date": "May"}, "field 'date': got 'May'"),
        ({"function": "speed"}, "field 'function': got 'speed'"),
        ({"machine": {"name": "x"}}, "field 'machine': .* wanted a mapping with kind, name"),
        ({"versions": []}, r"field 'versions': got \[\]"),
        ({"seed": "one"}, "field 'seed': got 'one'"),
        ({"tree": "xyz"}, "field 'tree': got 'xyz'"),
        ({"result": None}, "field 'result': got null"),
        ({"result": {"time": {"median": 0.1}}}, "wanted a timing with low, median, high and n"),
        ({"result": [{"median": 0.1, "low": 0, "high": 1, "n": True}]}, "wanted a timing"),
        ({"result": {"median": 2, "low": 3, "high": 4, "n": 5}}, "wanted 0 < low <= median <= high"),
        ({"result": {"median": 0, "low": 0, "high": 4, "n": 5}}, "wanted 0 < low <= median <= high"),
        ({"result": {"median": 2, "low": 1, "high": 4, "n": 0}}, "a whole n from 1"),
        ({"date": "2026-02-30"}, "field 'date': got '2026-02-30', wanted a day that exists"),
        ({"protocol": "xyz"}, "field 'protocol'"),
        ({"code": 3}, "field 'code'"),
        ({"extra": 1}, "field 'extra': unknown"),
        ({"commit": ...}, "field 'commit': missing"),
    ],
)
def test_a_bad_field_is_named_with_its_line(tmp_path, change, message):
    row = dataclasses.asdict(on_gpu()) | change
    row = {name: value for name, value in row.items() if value is not ...}
    text = json.dumps({"recordings": [row]}, indent=1)
    (tmp_path / "bad.json").write_text(text)
    lines = [
        number for number, line in enumerate(text.splitlines(), 1) if line.startswith(f'   "{next(iter(change))}"')
    ]
    with pytest.raises(ValueError, match=rf"bad.json line {(lines or [3])[0]}, recording 0, .*{message}"):
        recordings.read(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"recordings": [\n{"function"', "bad.json line 2: not valid JSON"),
        ("[]", "bad.json line 1, field 'recordings'"),
        ('{"recordings": 3}', "field 'recordings'"),
        ('{"recordings": [3]}', "recording 0, field 'recording': got 3"),
        ('{"recordings": NaN}', "bad.json: got NaN, wanted numbers only"),
        ('{"recordings": [], "recordings": []}', "bad.json: key 'recordings' twice"),
        (b'{"recordings": "\xff"}', "bad.json: byte 16 is no UTF-8"),
        ("[" * 100_000, "bad.json: nested too deeply"),
    ],
)
def test_a_file_that_is_no_list_of_recordings(tmp_path, text, message):
    (tmp_path / "bad.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        recordings.read(tmp_path / "bad.json")


def test_an_invalid_recording_is_not_written(folder):
    with pytest.raises(ValueError, match="field 'date'"):
        recordings.write(folder / "a.json", [on_gpu(date="May")])
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: recordings.record(lambda: 1), "fn: got"),
        (lambda: recordings.record(speed), "arguments: missing a required argument: 'size'"),
        (lambda: recordings.recorded(speed, length=3), "arguments: "),
        (lambda: recordings.record(speed, size=torch.ones(1)), "size: wanted numbers"),
        (lambda: recordings._plain("result", float("nan")), "result: wanted numbers"),
    ],
)
def test_what_cannot_be_recorded_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_recordings_of_the_book_answer_what_is_asked_now():
    stale = [f"{r.function} {r.arguments}" for r in recordings.read_all() if recordings.standing(r) == "stale"]
    assert not stale, "make record STALE=1"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ({"a": [1, 2.0, "x", None, True]}, {"a": [1, 2.0005, "x", None, True]}, None),
        ({"a": [1, 2.0]}, {"a": [1, 2.01]}, "result['a'][1]: 2.0 was recorded, 2.01 now"),
        ({"a": 1}, {"b": 1}, "result: "),
        ([1], [1, 2], "result: "),
        ([True], [1.0], "result[0]: "),
        (["x"], ["y"], "result[0]: "),
        ([0.0], [1e-7], None),
    ],
)
def test_where_two_results_differ(old, new, words):
    found = recordings.difference(old, new)
    assert found is None if words is None else found.startswith(words)


@pytest.mark.parametrize(("name", "arguments"), record.PROBES, ids=[name.split(":")[1] for name, _ in record.PROBES])
def test_what_is_no_timing_still_gives_what_was_recorded(name, arguments):
    """The functions at a size of a second: another result here is another result at full size."""
    made = recordings.record(record.find(name), None, **arguments)
    recorded = {(r.function, json.dumps(r.arguments)): r.result for r in recordings.read(data_path(record.PROBES_FILE))}
    differs = recordings.difference(recorded[made.function, json.dumps(made.arguments)], made.result)
    assert differs is None, f"{differs}; if that is right: make record PART=probes"


def test_a_recording_is_shown_without_running_the_function(folder):
    recordings.write(folder / "a.json", [recordings.record(speed, size=3)])
    recordings.write(folder / "b.json", [on_gpu()])
    runs = len(RUNS)
    for kind in ("cpu", "cuda"):
        shown = recordings.recorded(speed, kind=kind, size=3)
        assert shown.origin == "recorded" and shown.result["tokens"] == 6
        assert ("A100" in shown.note) == (kind == "cuda")
    assert len(RUNS) == runs
    absent = recordings.recorded(speed, size=4)
    assert absent.origin == "absent" and not absent.result and "No recording of" in absent.note
