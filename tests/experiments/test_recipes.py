"""Recipes for servers: the file holds together, and an engine's parser is really asked."""

import json
import sys
import zipfile

import pytest
import yaml

from dslib.data.files import data_path, read_yaml
from measured import recordings
from measured.experiments import recipes as lab

ROWS = yaml.safe_load(data_path("recipes.yml").read_text(encoding="utf-8"))["recipes"]


@pytest.mark.parametrize("recipe", lab.read_recipes().values(), ids=lambda one: one.id)
def test_each_recipe_fits_its_cards_and_was_checked_as_it_stands(recipe):
    assert lab.weights_fit(recipe, read_yaml("hardware.yml")["gpus"])
    assert f"{{{recipe.source}," in (data_path().parent / "references.bib").read_text(encoding="utf-8")
    assert recipe.commands
    check = {"vLLM": lab.known_to_vllm, "SGLang": lab.known_to_sglang}.get(recipe.engine)
    if check is None:
        assert recipe.version is None
    else:
        found = recordings.recorded(check).result
        assert (found["version"], found["flags"][recipe.id]) == (recipe.version, recipe.flags), "record it again"


def test_an_invented_flag_is_refused_by_both():
    assert "--no-such-flag" in recordings.recorded(lab.known_to_vllm).result["control"]
    assert recordings.recorded(lab.known_to_sglang).result["control"] == "unknown"


SOURCE = """
class Fields:
    tp_size: A[int, Arg(help="So many.", aliases=["--tensor-parallel-size"])] = 1
    port: A[int, "The port."] = 30000
    secret: A[int, Arg(help="Not for the command line.", no_cli=True)] = 1
    other_name: A[str, Arg(cli_name="--renamed")] = ""
    no_flag: int = 0

def add(parser):
    parser.add_argument("--config", type=str)
    parser.add_argument("--old", action=Deprecated, new_flag="--new <n>")
"""


def wheel_of(folder, source=SOURCE):
    path = folder / "sglang-1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("sglang/srt/arg_groups/fields/all.py", source)
        archive.writestr("sglang/srt/elsewhere.py", 'parser.add_argument("--not-the-servers")')
    return path


def test_flags_are_read_from_the_source_in_a_wheel(tmp_path, monkeypatch):
    declared = lab.declared_flags(wheel_of(tmp_path))
    plain = dict.fromkeys(("--tp-size", "--tensor-parallel-size", "--port", "--renamed", "--config"))
    assert declared == plain | {"--old": "--new <n>"}
    said = {flag: lab.state(flag, declared) for flag in ("--port", "--old", "--tp", "--tensor", "--secret", "--r")}
    assert list(said.values()) == [
        "known", "now --new <n>", "short for --tp-size", "short for --tensor-parallel-size", "unknown",
        "short for --renamed",
    ]  # fmt: skip
    monkeypatch.setenv("SGLANG_WHEEL", str(tmp_path / "sglang-1.2-py3-none-any.whl"))
    found = lab.known_to_sglang()
    assert found["version"] == "1.2" and found["control"] == "unknown"
    assert found["said"]["sglang-experts"]["--tp-size"] == "known"


ANSWERS = """
import json, sys
flags = json.loads(sys.argv[1])
print("noise")
print("SAID", json.dumps(["9.9", [f"{len(one)} words" for one in flags]]))
"""


def test_vllm_is_asked_in_its_own_python(monkeypatch):
    monkeypatch.setenv("VLLM_PYTHON", sys.executable)
    monkeypatch.setattr(lab, "VLLM", ANSWERS)
    found = lab.known_to_vllm()
    assert found["version"] == "9.9" and found["control"] == "1 words"
    assert found["said"]["vllm-two-nodes"] == [f"{len(line)} words" for line in found["flags"]["vllm-two-nodes"]]


def written(folder, **change):
    row = {**ROWS[0], **change}
    path = folder / "recipes.yml"
    path.write_text(json.dumps({"recipes": [{k: v for k, v in row.items() if v != "gone"}, ROWS[1], ROWS[1]]}))
    return path


@pytest.mark.parametrize("change, words", [
    ({"way": "gone"}, ["vllm-one-card", "way"]),
    ({"speed": 3}, ["vllm-one-card", "speed"]),
    ({"engine": "llama.cpp"}, ["vllm-one-card", "engine"]),
    ({"smallest": {"gpu": "T4", "count": 0}}, ["vllm-one-card", "count"]),
    ({}, ["vllm-tensor", "already"]),
])  # fmt: skip
def test_a_faulty_row_is_named(tmp_path, change, words):
    with pytest.raises(ValueError) as caught:
        lab.read_recipes(written(tmp_path, **change))
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("call, variable, value, words", [
    (lab.known_to_vllm, "VLLM_PYTHON", None, "VLLM_PYTHON: not set"),
    (lab.known_to_sglang, "SGLANG_WHEEL", None, "got 'nothing'"),
    (lab.known_to_sglang, "SGLANG_WHEEL", __file__, "test_recipes.py"),
])  # fmt: skip
def test_what_is_missing_is_named(monkeypatch, call, variable, value, words):
    monkeypatch.delenv(variable, raising=False)
    if value:
        monkeypatch.setenv(variable, value)
    with pytest.raises(RuntimeError, match=words):
        call()


def test_a_vllm_that_does_not_start_says_why(monkeypatch):
    monkeypatch.setenv("VLLM_PYTHON", sys.executable)
    monkeypatch.setattr(lab, "VLLM", "raise SystemExit('no vLLM here')")
    with pytest.raises(RuntimeError, match="no vLLM here"):
        lab.known_to_vllm()
