"""The runs that choosing is calibrated by: each model in both formats, with the bytes that it reads."""

import json

import pytest

from dslib.architecture.decoder import DecoderConfig, build
from dslib.data.files import data_path
from dslib.performance.speed import bytes_per_token
from measured.experiments.choose import FORMATS, TRUST, calibrate, decode_runs, off

TINY = {
    "a": [DecoderConfig(96, 64, 96, layers, 4, 2) for layers in (1, 2, 3)],
    "b": [DecoderConfig(96, 64, 96, 3, 4, 4)],
}


def test_each_model_in_both_formats():
    found = decode_runs(TINY, prompt_tokens=4, new_tokens=4, runs=1)
    rows = [(row["model"], row["format"]) for row in found["runs"]]
    assert rows == [(name, fmt) for name, configs in TINY.items() for _ in configs for fmt in FORMATS]
    plain, packed = found["runs"][::2], found["runs"][1::2]
    for config, whole, small in zip([*TINY["a"], *TINY["b"]], plain, packed, strict=True):
        exact = bytes_per_token(build(config, seed=0).eval(), 6)
        assert whole["bytes"] == exact > small["bytes"] > exact / 8
        assert small["seconds"].median > 0
    timed = [(row["model"], row["format"], row["bytes"], row["seconds"].median) for row in found["runs"]]
    fits = calibrate(timed, "a", "here", found["bandwidth"]).fits
    assert set(fits) == set(FORMATS)
    assert [name for name, _ in fits["int4"].errors] == ["b", *["a, left out"] * 3]


def recorded():
    return json.loads(data_path("recordings/nvidia-h200.json").read_text(encoding="utf-8"))["recordings"]


def test_the_recorded_steps_are_those_that_the_page_speaks_of():
    """V2 falls into the band that V1's own runs give, V3 does not; the page's nine pairs are V1's, rounded."""
    runs = []
    for one in recorded():
        asked = one["arguments"]
        if one["function"].endswith("speed:machine_speed") and asked["weights"] == "plain":
            if asked["name"] != "V1" or len(asked["batches"]) == 9:
                runs += [
                    (asked["name"], "float16", row["bytes"] / 127, row["seconds"]["median"] / 127)
                    for row in one["result"]["rows"] if row["way"] == "graph"
                ]  # fmt: skip
    fit = calibrate(runs, "V1", "H200", 4.8e12, "recorded").fits["float16"]
    errors = {name: [error for one, error in fit.errors if one == name] for name, _ in fit.errors}
    band = max(map(off, errors["V1, left out"]))
    assert len(errors["V1, left out"]) == 9 and round(100 * band) == 8
    assert len(errors["V2"]) == 2 and max(map(off, errors["V2"])) < band
    assert len(errors["V3"]) == 2 and min(map(off, errors["V3"])) > TRUST
    assert [round(1 / (1 + error), 1) for error in errors["V3"]] == [2.0, 1.3]
    read = {name: sorted(moved for one, _, moved, _ in runs if one == name) for name in errors if "left" not in name}
    dense = [moved for one, _, moved, _ in runs if one == "V1"]
    assert all(1 < more / dense[at] < 1.05 for more, at in zip(read["V2"], (0, 5), strict=True)), "nearly a repetition"
    page = (data_path().parent / "chapters/scenarios/choose.ipynb").read_text(encoding="utf-8")
    for _, _, moved, seconds in [run for run in runs if run[0] == "V1"]:
        assert f"({moved / 1e9:.2f}, {1e3 * seconds:.2f})" in page


def test_in_four_bits_the_line_fails_its_own_two_points():
    """It would start below 0; kept at 0 it misses both, by what the page says."""
    steps = [
        (row["bytes"] / 127, row["seconds"]["median"] / 127)
        for one in recorded()
        if one["function"].endswith("speed:machine_speed") and one["arguments"]["weights"] == "int4"
        for row in one["result"]["rows"] if row["way"] == "graph"
    ]  # fmt: skip
    (least, quick), (most, slow) = steps
    assert round(1e3 * (quick - least * (slow - quick) / (most - least)), 2) == -0.48
    fit = calibrate([("V1", "int4", *step) for step in steps], "V1", "H200", 4.8e12, "recorded").fits["int4"]
    assert fit.start == 0 and [round(100 * (fit.seconds(m) / s - 1)) for m, s in steps] == [7, -9]


def test_an_error_counts_alike_too_high_and_too_low():
    assert off(0.25) == pytest.approx(off(-0.2)) == pytest.approx(0.25) and off(0) == 0
