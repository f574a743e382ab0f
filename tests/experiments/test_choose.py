"""The runs that choosing is calibrated by: each model in both formats, with the bytes that it reads."""

from dslib.architecture.decoder import DecoderConfig, build
from dslib.performance.speed import bytes_per_token
from dslib.scenarios.needs import calibrate
from measured.experiments.choose import FORMATS, decode_runs

TINY = {"a": DecoderConfig(96, 64, 96, 2, 4, 2), "b": DecoderConfig(96, 64, 96, 3, 4, 4)}


def test_each_model_in_both_formats():
    found = decode_runs(TINY, prompt_tokens=4, new_tokens=4, runs=1)
    rows = {(row["model"], row["format"]): row for row in found["runs"]}
    assert list(rows) == [(name, fmt) for name in TINY for fmt in FORMATS]
    for name, config in TINY.items():
        exact = bytes_per_token(build(config, seed=0).eval(), 6)
        assert rows[name, "float32"]["bytes"] == exact > rows[name, "int4"]["bytes"] > exact / 8
        assert rows[name, "int4"]["seconds"].median > 0
    timed = [(row["model"], row["format"], row["bytes"], row["seconds"].median) for row in found["runs"]]
    fit = calibrate(timed, "a", "here", found["bandwidth"])
    assert set(fit.rates) == set(FORMATS) and set(fit.errors["int4"]) == {"b"}
