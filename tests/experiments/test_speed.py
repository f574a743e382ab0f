"""The table that a GPU records, made small on whatever is here: the rows there should be, and sums that add up."""

import pytest
import torch

from dslib.architecture import decoder
from dslib.performance import speed
from measured.experiments import speed as speed_runs

SMALL = {"size": "tiny", "batches": (1, 3), "prompts": (8,), "prompt_tokens": 6, "new_tokens": 5, "roof_seconds": 0.01}


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
    with pytest.raises(ValueError, match="got 'V4', 'tiny'"):
        speed_runs.design("V4", "tiny")
    with pytest.raises(ValueError, match="weights: got 'int2', expected one of plain, int8, int4"):
        speed_runs.with_weights(None, "int2")
