"""Prices come with source and date, unknown names bring the nearest, and memory is counted."""

import math

import pytest

from dslib.data import files, published_figures
from dslib.performance import prices, servers
from dslib.performance.prices import DoesNotFit, TokenPrice


def test_prices_of_a_gpu():
    found = prices.gpu_prices("A100 80GB")
    assert [row.usd for row in found] == sorted(row.usd for row in found)
    assert {row.gpu for row in found} == {"A100_80GB"}
    assert all(row.source and row.tier for row in prices.gpu_prices())
    assert found[0].usd <= prices.gpu_price("a100-80gb").usd <= found[-1].usd
    assert prices.gpu_price("A100_80GB", "lambda").date == "2026-09-20", "the newest of a provider"
    assert str(prices.gpu_price("A10")) == "A10 $0.75 an hour, Lambda, undated [lambda_catalog]"


def test_prices_of_an_api_and_workloads():
    assert [row.date for row in prices.api_prices("deepseek-chat")] == ["2025-02", "2025-09-05", "2025-12-09"]
    assert prices.api_price("deepseek-chat", "2025-09-17").serves == "DeepSeek-V3.1"
    assert prices.api_price("deepseek-v3") == prices.api_price("deepseek-chat", "2025-06")
    usd = prices.api_price("DeepSeek-R1").per_request(1_000_000, 500_000, cached=0.5)
    assert usd == pytest.approx(0.5 * 0.14 + 0.5 * 0.55 + 0.5 * 2.19)
    for row in prices.workloads().values():
        assert row["median_in"] < row["tokens_in"] and row["median_out"] < row["tokens_out"] and row["source"]


R1 = prices.api_price("DeepSeek-R1")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prices.gpu_prices("H20"), "gpu: got 'H20', expected a GPU that prices.yml has .*, such as H200"),
        (lambda: prices.gpu_price("A100_80GB", "Amazon"), "provider: got 'Amazon', expected one .* for A100_80GB"),
        (lambda: prices.gpu_id("A10 40GB"), "gpu: got 'A10 40GB', expected a GPU .*A100_40GB"),
        (lambda: prices.api_price("gpt"), "model: got 'gpt', expected one"),
        (lambda: prices.api_price("deepseek-chat", "2024"), "date: got '2024', expected 2025-02 or later"),
        (lambda: prices.memory("H300"), ".*got 'H300', expected a GPU of hardware.yml, such as H200"),
        (lambda: TokenPrice("m", "m", "2026", 0, 1, 1, "s", "primary"), "cached: got 0"),
        (lambda: TokenPrice("m", "m", None, 1, 1, 1, "s", "primary"), "date: got None, expected the day or month"),
        (lambda: R1.per_request(-1, 0), "tokens_in: got -1"),
        (lambda: R1.per_request(1, 0, cached=2), "cached: got 2"),
        (lambda: prices.least_gpus(0, "H200"), "weight_bytes: got 0"),
        (lambda: prices.least_gpus(math.nan, "H200"), "weight_bytes: got nan"),
        (lambda: prices.least_gpus(1, "H200", cache_bytes=-1), "cache_bytes: got -1"),
        (lambda: prices.least_gpus(1, "H200", reserve=1), "reserve: got 1, expected at least 0 and below 1"),
        (lambda: prices.least_gpus(1, "H200", multiple=0), "multiple: got 0"),
        (lambda: prices.check_fits(671e9, "A100_80GB", 8), "gpus: got 8 x A100_80GB with 640 GB to use, .* 9 for 671"),
        (lambda: servers.published_replica("h900"), "name: got 'h900', expected a published deployment"),
        (lambda: servers.rates((10, 10, 1), (20, 20, 2)), "first, second: got .* different mixes"),
        (lambda: servers.rates((10, 10, 1), (1000, 10, 0.5)), "first, second: got .* different mixes"),
        (lambda: servers.rates((1, 1), (1, 2, 3)), r"first: got \(1, 1\), expected three numbers"),
        (lambda: servers.rates((1, 2, 3), (1, 0, 3)), r"second\[1\]: got 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
    assert issubclass(DoesNotFit, ValueError)


@pytest.mark.parametrize(
    ("bytes_per_weight", "gpu", "gpus", "in_nodes"),
    [(1, "A100_80GB", 9, 16), (0.5, "A100_80GB", 5, 8), (2, "A100_80GB", 17, 24), (1, "H200", 5, 8),
     (1, "H100_SXM", 9, 16)],
)  # fmt: skip
def test_gpus_for_v3(bytes_per_weight, gpu, gpus, in_nodes):
    size = published_figures.figure("deepseek_v3", "params_total").value * bytes_per_weight
    assert prices.least_gpus(size, gpu) == gpus and prices.least_gpus(size, gpu, multiple=8) == in_nodes


def test_memory_at_the_edge():
    assert prices.least_gpus(160e9, "A100_80GB") == 2 and prices.least_gpus(160.1e9, "A100_80GB") == 3
    assert prices.least_gpus(144e9, "A100_80GB", reserve=0.1) == 2
    assert prices.least_gpus(100e9, "A100_80GB", cache_bytes=60e9) == 2
    prices.check_fits(160e9, "A100_80GB", 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu_hours: [", r"prices.yml line \d: not valid YAML"),
        ("api_tokens: []", r"prices.yml: expected a list 'gpu_hours'"),
        ("", "gpu_hours"),
    ],
)
def test_a_faulty_file_says_where(tmp_path, monkeypatch, text, message):
    path = tmp_path / "prices.yml"
    path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(files, "data_path", lambda name: path)
    with pytest.raises(ValueError, match=message):
        prices.gpu_prices()


def test_two_rates_from_two_runs():
    assert servers.rates((1000, 0.001, 1), (0.001, 100, 1)) == pytest.approx((1000, 100), rel=1e-4)
    runs = (5000, 800, 5000 / 8000 + 800 / 900), (900, 100, 900 / 8000 + 100 / 900)
    assert servers.rates(*runs) == pytest.approx((8000, 900))


def test_published_replicas_have_sources_and_agree_with_what_was_measured():
    for name in servers.published_replicas():
        replica = servers.published_replica(name)
        assert replica.source and replica.prefill > replica.decode > 100
    h200 = servers.published_replica("h200")
    for run, off in (("chat_run", 1e-9), ("long_run", 1e-9), ("medium_run", 0.2), ("very_long_run", 0.15)):
        tokens_in, tokens_out, seconds = published_figures.figure("serving_gpustack", run).value
        assert sum(h200.seconds(tokens_in, tokens_out)) == pytest.approx(seconds, rel=off), run
    assert sum(servers.published_replica("h100-4bit").seconds(3000 - 620, 620)) == pytest.approx(1)
