"""The runs that choosing is calibrated by: each model in both formats, with the bytes that it reads."""

from dslib.architecture.decoder import DecoderConfig, build
from dslib.performance.speed import bytes_per_token
from measured.experiments.choose import FORMATS, calibrate, decode_runs

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
