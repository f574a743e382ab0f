"""Serving's experiments, at a size of seconds: every way writes the same requests."""

import sys

import pytest

from dslib.architecture import whole
from dslib.architecture.decoder import with_layers
from dslib.architecture.weights.pretrained import load_smollm2
from measured.experiments import realtime as lab
from measured.experiments import realtime_vllm


@pytest.fixture
def shallow(monkeypatch):
    """SmolLM2's first two layers: what is shown here does not depend on how deep a model is."""
    model, tokenizer = load_smollm2()
    for module in (lab, realtime_vllm):
        monkeypatch.setattr(module, "load_smollm2", lambda: (with_layers(model, [0, 1]), tokenizer))


def test_requests_are_the_same_every_time_and_of_mixed_lengths():
    _, tokenizer = load_smollm2()
    made = lab.requests_of(12, tokenizer)
    assert made == lab.requests_of(12, tokenizer)
    assert len({len(one.prompt) for one in made}) > 6 and len({one.max_new_tokens for one in made}) > 6
    assert all(16 <= len(one.prompt) <= 160 and 8 <= one.max_new_tokens <= 96 for one in made)


def test_all_ways_serve_and_the_engine_writes_what_generate_writes(shallow, monkeypatch):
    monkeypatch.setattr(lab, "SLOTS", 2)
    monkeypatch.setattr(lab.requests_of, "__defaults__", ((4, 8), (2, 5)))
    made = lab.throughput(count=3, rounds=1)
    assert set(made["tokens_per_second"]) == {
        "engine", "static, ours", "static, transformers", "continuous, transformers",
    }  # fmt: skip
    assert made["same"] == 3 and min(made["tokens_per_second"].values()) > 0


def test_a_prompt_that_was_served_comes_sooner():
    made = lab.prefix(length=96, rounds=2)
    assert made["again"][1] < made["first"][1]  # 16 tokens to compute instead of 96


def test_gaps_are_told_with_chunks_and_without(monkeypatch):
    model, tokenizer = whole.load()
    monkeypatch.setattr(lab, "load_smollm2", lambda: (model.decoder, tokenizer))
    gaps = lab.long_prompt(length=60, chunk=16, rounds=1)
    assert set(gaps) == {"chunks", "at once", "alone"}
    assert {name for name, one in gaps.items() if "first" in one} == {"chunks", "at once"}
    assert all(0 < one["middle"] <= one["p99"] <= one["most"] for one in gaps.values())


def test_overhead_is_a_ratio_of_a_step_to_its_pass(shallow):
    low, high = lab.overhead(rounds=3)["ratio"][1:]
    assert 0.5 < low <= high


# What beside_vllm talks to, without vLLM: it says what the other process says, and one text right of two.
TURNS = """
import json, sys
asked = json.loads(sys.argv[2])
print("loading")
print("SAID", json.dumps("0.0"), flush=True)
for _ in sys.stdin:
    print("SAID", json.dumps([0.5, [[7] * count for _, count in asked]]), flush=True)
"""


def test_vllm_has_its_turns_in_a_process_of_its_own(shallow, monkeypatch):
    monkeypatch.setattr(lab.requests_of, "__defaults__", ((4, 8), (2, 5)))
    monkeypatch.setenv("VLLM_PYTHON", sys.executable)
    monkeypatch.setattr(realtime_vllm, "VLLM", TURNS)
    made = realtime_vllm.beside_vllm(count=2, rounds=2)
    tokens = sum(one.max_new_tokens for one in lab.requests_of(2, load_smollm2()[1]))
    assert made["tokens_per_second"]["vLLM"] == pytest.approx(tokens / 0.5) and made["same"] == 0
    assert made["version"] == "0.0" and made["ratio"][1] <= made["ratio"][0] <= made["ratio"][2]
    monkeypatch.setattr(realtime_vllm, "VLLM", "raise SystemExit('no vLLM here')")
    with pytest.raises(RuntimeError, match="no vLLM here"):
        realtime_vllm.beside_vllm(count=2, rounds=1)
    monkeypatch.delenv("VLLM_PYTHON")
    with pytest.raises(RuntimeError, match="VLLM_PYTHON"):
        realtime_vllm.beside_vllm()


@pytest.mark.parametrize("call, words", [
    (lambda: realtime_vllm.beside_vllm(count=0), "count"),
    (lambda: lab.throughput(count=0), "count"),
    (lambda: lab.prefix(length=0), "length"),
    (lambda: lab.long_prompt(chunk=0), "chunk"),
    (lambda: lab.overhead(rounds=0), "rounds"),
])  # fmt: skip
def test_bad_calls_are_refused_by_name(call, words):
    with pytest.raises(ValueError, match=words):
        call()
