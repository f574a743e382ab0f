"""The simulator: the engine's own steps, by any clock."""

import numpy as np
import pytest

from dslib import roofline
from dslib.architecture.decoder import DecoderConfig, build
from measured.experiments import realtime_simulator as lab
from measured.experiments.realtime_load import Ask, Run, poisson, report

LENGTHS = [(5 + n % 7, 1 + n % 5) for n in range(30)]


@pytest.fixture(scope="module")
def model():
    return build(DecoderConfig(64, 32, 64, 1, 4, 2, max_position_embeddings=96), seed=0).eval()


def test_the_simulator_takes_the_steps_of_the_engine(model):
    asks = [Ask(0.0, *lengths) for lengths in LENGTHS]
    lives, steps = lab.serve_live(model, asks, max_batch=4, chunk=8, num_blocks=64)
    seen = []
    told = lab.simulate(asks, lambda step: seen.append(step) or 1.0, slots=4, chunk=8, blocks=64)
    assert seen == [step for step, _ in steps]
    assert [len(life.tokens) for life in told] == [len(life.tokens) for life in lives] == [one.answer for one in asks]
    assert max(life.tokens[-1] for life in told) == len(seen)
    assert sum(step.tokens for step in seen) == sum(one.prompt for one in asks)


def test_idle_time_passes_and_arrivals_are_waited_for():
    lives = lab.simulate([Ask(0.0, 4, 2), Ask(10.0, 4, 1), Ask(10.1, 4, 1)], lambda step: 1.0, slots=1)
    assert [life.tokens for life in lives] == [[1.0, 2.0], [1.0], [pytest.approx(1.9)]]


def test_a_fit_finds_the_prices_that_steps_were_made_with(model):
    prices = [0.02, 0.001, 0.01, 0.0005, 1e-6]
    steps = []
    lab.simulate(poisson(20, LENGTHS), lambda step: steps.append(step) or 0.05, slots=4, chunk=8)
    clock, found = lab.fit([(step, float(np.dot(prices, lab._features(step)))) for step in steps])
    assert found == pytest.approx(prices, rel=1e-4)
    assert clock(lab.Step(3, 1, 8, 100)) == pytest.approx(0.02 + 0.003 + 0.01 + 0.004 + 1e-4)


def test_floors_are_bytes_or_operations():
    shape, roof = roofline.CODER_1_3B, roofline.published_roof("A100_80GB")
    clock = lab.floor_clock(shape, roof)
    assert clock(lab.Step(1, 0, 0, 0)) == pytest.approx(shape.weight_bytes("float16") / roof.bandwidth)
    assert clock(lab.Step(0, 1, 4096, 0)) == pytest.approx(2 * shape.parameters * 4096 / roof.rate("float16"))
    assert clock(lab.Step(1, 0, 0, 10**6)) > 10 * clock(lab.Step(1, 0, 0, 0))


def test_a_full_batch_waits_for_its_last_and_pays_for_its_longest():
    asks = [Ask(float(n), 10, 1 + 2 * n) for n in range(4)]
    first, second, *rest = lab.static(asks, lambda step: 1.0, size=2)
    assert (first.tokens, second.tokens) == ([2.0], [1.0, 2.0, 3.0])  # the second came at 1
    assert rest[0].tokens[0] == 4 + 1 - 2  # the batch before ended at 4
    timed = lab.static(asks, lambda step: 1.0, size=2, patience=0.5)
    assert timed[0].tokens == [1.5]


def test_slots_bring_more_than_batches_under_load():
    asks = poisson(64, [(128, 128)] * 300)
    clock = lab.floor_clock(roofline.CODER_1_3B, roofline.published_roof("A100_80GB"))
    found = [
        report(Run(lives, [0.0], 1.0), ttft=0.1, tpot=0.05, resamples=10)
        for lives in (lab.simulate(asks, clock, slots=32, chunk=512, blocks=10_000), lab.static(asks, clock))
    ]
    assert found[0]["good"] > 0.95 > 0.2 > found[1]["good"]


def test_the_clock_is_held_against_another_run():
    found = lab.held_against(rate=5, count=6, prompt=16, answer=4)
    assert len(found["prices"]) == 5 and min(found["prices"]) >= 0 and found["step"] >= 0
    assert all(len(one) == 6 and min(one) > 0 for pair in found["times"].values() for one in pair)


def test_bursts_wait_longer_than_their_control(tmp_path, monkeypatch):
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    for burst in range(20):  # a hundred at once, once a second
        lines += [f"2023-11-16 18:17:{burst:02}.0000000,500,5"] * 100
    (tmp_path / "AzureLLMInferenceTrace_code.csv").write_text("\n".join(lines))
    monkeypatch.setenv("AZURE_TRACES", str(tmp_path))
    found = lab.real_gaps(loads=(1, 2))
    assert found["rate"] == pytest.approx(105, rel=0.01) and found["variation"] > 5
    assert found["prompt"] == [500, 500, 500] and found["answer"] == [5, 5, 5]
    assert all(row["real"]["p50"][0] > 3 * row["poisson"]["p50"][0] for row in found["rows"])
    monkeypatch.delenv("AZURE_TRACES")
    with pytest.raises(RuntimeError, match="AZURE_TRACES"):
        lab.real_gaps()


@pytest.mark.parametrize(("call", "words"), [
    (lambda: lab.simulate([Ask(0.0, 100, 5)], lambda step: 1.0, blocks=2), "104 tokens"),
    (lambda: lab.static([Ask(0.0, 1, 1)], lambda step: 1.0, size=0), "size"),
    (lambda: lab.fit([(lab.Step(1, 0, 0, 0), 1.0)]), "steps"),
    (lambda: lab.held_against(rate=0), "rate"),
    (lambda: lab.held_against(count=0), "count"),
    (lambda: lab.floor_clock(roofline.CODER_1_3B, roofline.published_roof("A100_8GB")), "A100_8"),
])  # fmt: skip
def test_bad_calls_are_refused_by_name(call, words):
    with pytest.raises(ValueError, match=words):
        call()
