import math

import pytest
import torch

from dslib import roofline
from dslib.data import files
from dslib.roofline import CODER_1_3B, DecoderShape, Roof, Workload, decode_floor, matmul, place, published_roof
from measured import probes

ROOF = Roof("made up", bandwidth=1e12, flops={"float16": 100e12}, memory_bytes=16e9, source="test")


@pytest.mark.parametrize(("flops", "bound", "seconds"), [(50e9, "bandwidth", 1e-3), (400e9, "compute", 4e-3)])
@pytest.mark.parametrize("dtype", ["float16", torch.float16])
def test_below_the_ridge_bandwidth_is_the_bound_and_above_it_arithmetic(flops, bound, seconds, dtype):
    placed = place(Workload("w", bytes=1e9, flops=flops, dtype=dtype), ROOF)
    assert (placed.bound, placed.intensity, placed.ridge) == (bound, flops / 1e9, 100)
    assert placed.seconds == pytest.approx(seconds) and placed.fraction(2 * seconds) == pytest.approx(0.5)


def test_a_matrix_product_counts_its_bytes_and_operations():
    work = matmul(2, 3, 5, "float32")
    assert (work.bytes, work.flops) == (4 * (6 + 15 + 10), 2 * 30)
    assert matmul(1, 2, 2, "int4").bytes == 0.5 * 8


def test_a_decode_step_reads_the_weights_once_for_the_whole_batch():
    model = DecoderShape("m", parameters=1000, layers=2, hidden=8, kv_width=4)
    one, four = model.decode(10), model.decode(10, batch=4)
    assert CODER_1_3B.kv_bytes(1) == 196_608  # 24 layers, 2048 numbers each for keys and values, 2 bytes: 192 KiB
    assert one.bytes == 2000 + 2 * 2 * 4 * 2 * 11
    assert four.bytes - one.bytes == 3 * model.kv_bytes(11)
    assert four.flops == 4 * one.flops
    assert one.flops == 2 * 1000 + 4 * 2 * 8 * 11


def test_weights_may_be_stored_smaller_than_they_are_computed_with():
    plain, small = CODER_1_3B.decode(100), CODER_1_3B.decode(100, weights="int4")
    assert plain.bytes - small.bytes == 1.3e9 * 1.5
    assert (plain.flops, plain.dtype) == (small.flops, small.dtype)


def test_with_a_cache_no_batch_reaches_the_ridge():
    # Each sequence brings its own cache: at 1024 tokens the intensity tends to 14, and the A100's ridge is 153.
    roof = published_roof("A100_80GB")
    assert place(CODER_1_3B.decode(1024, batch=10**6), roof).bound == "bandwidth"
    assert place(CODER_1_3B.decode(0, batch=1000), roof).bound == "compute"


def test_prefill_equals_decoding_the_same_tokens_in_operations():
    model = DecoderShape("m", parameters=1000, layers=2, hidden=8, kv_width=4)
    assert model.prefill(5).flops == sum(model.decode(done).flops for done in range(5))
    assert model.prefill(5).bytes < sum(model.decode(done).bytes for done in range(5))


@pytest.mark.parametrize(
    ("gpu", "bytes_per_weight", "ms"),
    [("T4", 2, 1040.0), ("L4", 2, 1109.3), ("A10", 2, 554.7), ("A100_40GB", 2, 214.0), ("A100_80GB", 2, 163.2),
     ("H100_SXM", 2, 99.3), ("H200", 2, 69.3), ("A100_40GB", 1, 107.0), ("A100_80GB", 1, 81.6),
     ("A100_80GB", 0.5, 40.8)],
)  # fmt: skip
def test_floor_of_128_tokens_at_1_3b(gpu, bytes_per_weight, ms):
    floor = decode_floor(1.3e9 * bytes_per_weight, published_roof(gpu), tokens=128)
    assert floor * 1e3 == pytest.approx(ms, abs=0.05)
    assert decode_floor(1e9, Roof("r", 1e9, {}, 1e9, "test", read_bandwidth=2e9)) == 0.5  # the one that decoding has


@pytest.mark.parametrize("name", ["A100_80GB", "a100 80gb", "a100-80gb"])
def test_published_names_are_found_however_they_are_written(name):
    roof = published_roof(name)
    assert (roof.bandwidth, roof.rate(torch.bfloat16), roof.source) == (2.039e12, 312e12, "published peak")
    assert all(published_roof(name).bandwidth > 0 for name in roofline.published_names())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Workload("w", -1, 1, "float32"), "bytes: got -1"),
        (lambda: Workload("w", 0, 1, "float32"), "bytes: got 0"),
        (lambda: Workload("w", 1, -1, "float32"), "flops: got -1"),
        (lambda: Workload("w", 1, math.nan, "float32"), "flops: got nan"),
        (lambda: Roof("r", 0, {}, 1, ""), "bandwidth: got 0"),
        (lambda: Roof("r", 1, {"float32": -1}, 1, ""), "flops"),
        (lambda: Roof("r", 1, {}, math.nan, ""), "memory_bytes: got nan"),
        (lambda: Roof("r", 1, {}, 1, "", read_bandwidth=-1), "read_bandwidth: got -1"),
        (lambda: DecoderShape("m", math.nan, 1, 1, 1), "parameters: got nan"),
        (lambda: CODER_1_3B.kv_bytes(math.nan), "tokens: got nan"),
        (lambda: place(matmul(1, 1, 1, "float16"), ROOF).fraction(math.nan), "measured: got nan"),
        (lambda: decode_floor(-2.6e9, ROOF), "weight_bytes: got"),
        (lambda: decode_floor(1, ROOF, tokens=0), "tokens: got 0"),
        (lambda: matmul(0, 1, 1, "float32"), "m: got 0"),
        (lambda: CODER_1_3B.decode(-1), "context: got -1"),
        (lambda: CODER_1_3B.decode(1, batch=0), "batch: got 0"),
        (lambda: published_roof("A100_80"), "got 'A100_80', expected a GPU of hardware.yml, such as A100_80GB"),
        (lambda: published_roof(None), "got None"),
        (
            lambda: published_roof("T4").ridge("bfloat16"),
            "dtype: got 'bfloat16', expected one that NVIDIA T4 has: float32",
        ),
        (lambda: matmul(1, 1, 1, "float12"), "got 'float12'"),
        (lambda: probes.copy_bandwidth("cpu", size=-4), "size: got -4"),
        (lambda: probes.measure_roof("abacus"), "device: got 'abacus'"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpus: [1, 2", "hardware.yml line"),
        ("gpus: []", "field 'gpus': got \\[\\]"),
        ("gpus: {X: {memory_gb: 1}}", "row 'X', field 'bandwidth_gb_s': got None"),
        ("gpus: {X: 5}", "field 'gpus': got {'X': 5}"),
        ("gpus: {X: {memory_gb: 1, bandwidth_gb_s: .nan}}", "row 'X', field 'bandwidth_gb_s': got nan"),
        ("gpus: {X: {memory_gb: 1, bandwidth_gb_s: 3, tflops: [1]}}", "row 'X', field 'tflops': got \\[1\\]"),
        ("gpus: {X: {memory_gb: 1, bandwidth_gb_s: 3, tflops: {int8: much}}}", "row 'X', field 'int8': got 'much'"),
        ("gpus: {X: {memory_gb: fast, bandwidth_gb_s: 3}}", "row 'X', field 'memory_gb': got 'fast'"),
    ],
)
def test_a_hardware_file_that_does_not_parse(tmp_path, monkeypatch, text, message):
    path = tmp_path / "hardware.yml"
    path.write_text(text)
    monkeypatch.setattr(files, "data_path", lambda name: path)
    with pytest.raises(ValueError, match=message):
        published_roof("X")


def test_small_measurements_are_of_the_right_kind():
    # No absolute speed is asserted: only that each figure is a rate, and that formats without a product are left out.
    size = 2**20
    assert probes.copy_bandwidth("cpu", size=size, max_seconds=0.05) > 0
    assert probes.read_bandwidth("cpu", size=size, max_seconds=0.05) > 0
    assert probes.product_rate("float32", "cpu", size=64, max_seconds=0.05) > 0
    assert probes.product_rate("int4", "cpu", size=64) is None


def test_the_number_of_threads_is_restored():
    before = torch.get_num_threads()
    assert probes.read_bandwidth("cpu", size=2**16, max_seconds=0.02, threads=1) > 0
    with pytest.raises(ValueError, match="threads: got 0"):
        probes.read_bandwidth("cpu", size=2**16, threads=0)
    assert torch.get_num_threads() == before


def test_a_slow_format_does_not_grow_the_product(monkeypatch):
    from measured.timing import Timing

    sides = []

    def slow(fn, **_):
        sides.append(fn().shape[0])
        return Timing((1.0, 1.0))

    monkeypatch.setattr(probes, "measure", slow)
    assert probes.product_rate("bfloat16", "cpu") == 2 * 128**3
    assert sides == [128]


def test_buffers_are_larger_than_the_cache(monkeypatch):
    from types import SimpleNamespace

    def pretend(cache, memory):
        monkeypatch.setattr(probes, "describe", lambda d: SimpleNamespace(cache_bytes=cache, memory_bytes=memory))
        return probes.buffer_bytes()

    assert pretend(None, 64 * 2**30) == 256 * 2**20
    assert pretend(100 * 2**20, 64 * 2**30) == 800 * 2**20
    assert pretend(100 * 2**20, 2**30) == 64 * 2**20
    assert pretend(None, 0) == 256 * 2**20


def test_launch_gap_is_ordered():
    gap = probes.launch_gap(side=64, rounds=3)
    assert gap["call returned"].median <= gap["work finished"].median
    assert gap["call returned"].n == 3


def test_roof_figures_are_plain(monkeypatch):
    roof = Roof("r", 2e9, {"float32": 3e12}, 1e9, "test", read_bandwidth=4e9)
    monkeypatch.setattr(probes, "measure_roof", lambda **_: roof)
    assert probes.roof_figures() == {
        "copy, GB/s": 2.0,
        "read, GB/s": 4.0,
        "matrix product in float32, TFLOP/s": 3.0,
    }
