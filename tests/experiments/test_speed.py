"""The table that a GPU records, made small on whatever is here: the rows there should be, and sums that add up."""

from functools import partial

import pytest
import torch

from dslib.architecture import decoder
from dslib.performance import speed
from measured import probes, recordings
from measured.experiments import speed as speed_runs
from measured.experiments.training_precision import training_step

SMALL = {"size": "tiny", "batches": (1, 3), "prompts": (8,), "prompt_tokens": 6, "new_tokens": 5, "roof_seconds": 0.01}


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    """The device's own rates are asked for with buffers that take no seconds to fill."""
    for name in ("copy_bandwidth", "read_bandwidth"):
        monkeypatch.setattr(speed_runs, name, partial(getattr(probes, name), size=1 << 20))


@pytest.mark.parametrize(
    ("name", "weights"), [("V1", "plain"), ("V1", "int8"), ("V1", "int4"), ("V2", "plain"), ("V3", "plain")]
)
def test_a_table_has_every_row(name, weights):
    found = speed_runs.machine_speed(name, dtype="bfloat16", weights=weights, **SMALL)
    graphs = 2 if torch.cuda.is_available() else 1
    assert [row["kind"] for row in found["rows"]] == ["decode"] * 2 * graphs + ["prefill"]
    for row in found["rows"]:
        assert "failed" not in row and row["seconds"].median > 0
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["seconds"].median / 1e9)
        assert row["share_of_copy"] == pytest.approx(row["gb_s"] / found["copy_gb_s"])
    assert found["weight_bytes"] < 2.1 * found["parameters"] if weights == "plain" else found["parameters"]
    assert (found["image"] is not None) == (name == "V2")


@pytest.mark.parametrize("size", speed_runs.SIZES)
def test_equal_size_means_equal_weights_a_token(size):
    one, two, three = (speed_runs.design(name, size) for name in ("V1", "V2", "V3"))
    dense = speed.active_parameters(one)
    router = three.num_hidden_layers * 16 * three.hidden_size
    assert speed.active_parameters(three) == dense + router
    crosses = len(range(0, two.num_hidden_layers, 4))
    assert speed.matrix_parameters(two) == speed.matrix_parameters(one) + crosses * 2 * one.hidden_size**2
    assert decoder.count_parameters(decoder.build(three, device="meta")) > 2.5 * dense


def test_what_does_not_run_is_a_row_that_says_why():
    def broken():
        raise RuntimeError("no kernel image\nfor this device")

    row = speed_runs._measured({"kind": "decode"}, broken, torch.device("cpu"), 1.0, 1.0, 1.0)
    assert row == {"kind": "decode", "failed": "no kernel image"}


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="name: got 'V4', expected one of 'V1'"):
        speed_runs.design("V4", "tiny")
    with pytest.raises(ValueError, match="size: got '2b', expected one of 'tiny'"):
        speed_runs.design("V1", "2b")
    with pytest.raises(ValueError, match="weights: got 'int2', expected one of 'plain', 'int8', 'int4'"):
        speed_runs.with_weights(None, "int2")


# ---------------------------------------------------------------- what was recorded, and what the chapters say of it


def recorded(name, **call):
    """The recording of a call on the GPU: the medians of its decoding in ms a step, by way and batch, and all of it."""
    shown = recordings.recorded(speed_runs.machine_speed, kind="cuda", name=name, **call)
    assert shown.origin == "recorded", f"{name}: python -m measured.record gpu"
    rows = [row for row in shown.result["rows"] if row["kind"] == "decode"]
    assert all(row["seconds"]["n"] >= 5 for row in rows)
    return {(row["way"], row["batch"]): 1e3 * row["seconds"]["median"] / 127 for row in rows}, rows


def test_the_ways_to_reach_a_card_compare_as_the_chapter_says():
    ms, rows = recorded("V1")
    graph, bytes_v1 = ms["graph", 1], rows[0]["bytes"]
    assert 0.2 < graph / ms["calls", 1] < 0.3  # "a quarter of the time"
    assert 0.5 < ms["fused graph", 1] / graph < 0.6  # "little more than half of that"
    share = next(row["share_of_copy"] for row in rows if row["way"] == "fused graph")
    assert 0.5 < share < 0.8  # "still not at the bound"
    four, rows = recorded("V1", weights="int4", ways=["calls", "graph", "compiled graph"])
    assert rows[0]["bytes"] / bytes_v1 < 1 / 3 and 0.7 < four["compiled graph", 1] / ms["compiled graph", 1] < 0.8
    mixture, rows = recorded("V3", ways=["calls", "graph"])
    assert abs(rows[0]["bytes"] / bytes_v1 - 1) < 0.02 and 1.9 < mixture["graph", 1] / graph < 2.3


def test_the_batch_as_the_chapter_says():
    ms, _ = recorded("V1", batches=[1, 2, 4, 8, 16, 32, 64, 128, 256], prompts=[], ways=["graph"])
    slower = ms["graph", 256] / ms["graph", 1]
    assert 2.7 < slower < 3.3 and 80 < 256 / slower < 95


def test_a_training_step_on_the_card_as_the_chapter_says():
    shown = recordings.recorded(training_step, kind="cuda")
    full, half = (next(r for r in shown.result["rows"] if r["precision"] == p) for p in ("float32", "bfloat16"))
    rates = [row["flops"] / row["seconds"]["median"] / row["share_of_product"] for row in (full, half)]
    assert 14 < rates[1] / rates[0] < 16  # "fifteen times as fast"
    assert full["share_of_product"] > 0.8 and 4 < full["seconds"]["median"] / half["seconds"]["median"] < 10
