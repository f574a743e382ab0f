"""Timings of 4-bit layers: everybody multiplies by the same weights, and all ways are there."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from dslib.architecture.decoder import DecoderConfig, build
from dslib.fast import int4_rows
from dslib.fast.int4 import cpu_kernel
from measured import probes
from measured.experiments import int4_speed

pytestmark = pytest.mark.processor


@pytest.mark.parametrize("rows", [1, 100])
def test_every_way_is_timed_and_ours_is_right(rows, monkeypatch):
    monkeypatch.setattr(int4_speed, "NOT_IN_CACHE", 1 << 20)
    monkeypatch.setattr(int4_speed, "onnxruntime_speed", lambda *call: None)  # as where it is not installed
    found = int4_speed.int4_speed(128, 192, rows, rounds=1)
    assert {"float32", "bfloat16", "ours", "ours, float32"} <= found["seconds"].keys()
    assert ("torch int4" in found["seconds"]) == cpu_kernel()
    assert found["seconds"].keys() == found["layers"].keys()
    assert ("ours, int8" in found["seconds"]) == (rows == 1 and int4_rows.compiled() is None)
    assert all(error < 0.01 for error in found["error"].values())
    assert found["bytes"] == found["bytes"] | {"float32": 4 * 128 * 192, "ours": 128 * 192 * 5 // 8}
    for name, count in found["layers"].items():
        size = found["bytes"].get(name, found["bytes"]["ours"])
        assert count == 1 if rows > 64 else (count - 1) * size < 1 << 20 <= count * size


def test_onnxruntime_multiplies_by_the_same_weights():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    exact, rounded = (int4_speed.onnxruntime_speed(level, 256, 192, 100, 32, 0) for level in (1, 4))
    assert exact["error"] < 1e-4
    assert exact["error"] < rounded["error"] < 0.05
    assert exact["layers"] == 1 and exact["bytes"] == 256 * 192 // 2 + 192 * 8 * 4 + 192 * 4


def test_what_onnxruntime_says_is_passed_on():
    pytest.importorskip("onnx")
    with pytest.raises(RuntimeError, match=r"^onnxruntime: .+"):
        int4_speed.onnxruntime_speed(4, 250, 192, 1, 32, 0)


def test_decoding_with_four_bits_reads_fewer_bytes(monkeypatch):
    monkeypatch.setattr(int4_speed, "read_bandwidth", partial(probes.read_bandwidth, size=1 << 20))  # not full buffers
    config = DecoderConfig(256, 128, 256, 2, 4, 2, tie_word_embeddings=True)  # as SmolLM2, but small
    tokenizer = lambda text: SimpleNamespace(input_ids=list(text.encode()))  # noqa: E731
    monkeypatch.setattr(int4_speed, "load_smollm2", lambda dtype: (build(config, seed=0).to(dtype).eval(), tokenizer))
    found = int4_speed.decode_int4(new_tokens=2, rounds=1)
    read = found["bytes"]
    assert read["float32"] == 2 * read["bfloat16"]
    assert read["int4"] < read["int4, head in bfloat16"] < read["bfloat16"] / 2
    assert {f"ours, {name}" for name in read} <= found["seconds"].keys()
    assert torch.is_grad_enabled()
