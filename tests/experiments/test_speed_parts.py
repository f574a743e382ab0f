"""What the speed chapter measures, at small sizes: the right thing is timed, and every way gives the same result."""

from itertools import combinations

import pytest
import torch

from dslib.architecture import decoder
from dslib.architecture.generation import generate
from dslib.scenarios import pipeline, placement
from measured.experiments import speed, speed_parts


@pytest.fixture(scope="module")
def seeing():
    return decoder.build(speed.design("V2", "tiny"), seed=0).eval()


def test_latency_counts_steps_and_not_sequences(monkeypatch):
    ticks = iter(range(1000))

    class Clock:
        def __init__(self, device):
            self.start = next(ticks)

        def lap(self):
            return float(next(ticks) - self.start)

    monkeypatch.setattr(speed, "Stopwatch", Clock)
    model = decoder.build(decoder.preset("tiny"), seed=0).eval()
    found = speed.latency(model, prompt_tokens=4, new_tokens=6, batch_size=3, runs=2)
    assert found["first_token"].seconds == (1.0, 1.0) and found["per_token"].seconds == (1.0, 1.0)


def test_latency_looks_at_the_picture_before_the_first_token(seeing, monkeypatch):
    looks = []
    plain = seeing.encode_image
    monkeypatch.setattr(seeing, "encode_image", lambda pixels: looks.append(len(pixels)) or plain(pixels))
    speed.latency(seeing, 4, 3, batch_size=2, pixels=torch.randn(2, 3, 32, 32), runs=1)
    assert looks == [2, 2]


def test_without_a_cache_the_text_is_the_same():
    model = decoder.build(decoder.preset("tiny"), seed=0).eval()
    assert speed_parts.without_cache(model, [1, 2, 3], 9) == generate(model, [[1, 2, 3]], 9)[0].tokens


def test_the_bytes_of_each_kind_of_attention():
    found = speed_parts.attention_speed(context=63, hidden_size=512, heads=4, window=16, rounds=1)
    head, number = 128, 4
    assert found["MHA"]["cache_bytes"] == 64 * 2 * 4 * head * number
    assert found["MHA"]["cache_bytes"] == 4 * found["GQA"]["cache_bytes"] == 4 * found["MQA"]["cache_bytes"]
    assert found["MHA"]["cache_bytes"] == 4 * found["window"]["cache_bytes"]
    assert found["MLA"]["cache_bytes"] == 64 * (512 + 64) * number
    assert all(kind["seconds"].median > 0 for kind in found.values())
    assert found["GQA"]["weight_bytes"] == number * 512 * (2 * 512 + 2 * head)


def test_pictures_ahead_change_no_answer(seeing):
    requests = [pipeline.Request(torch.randn(1, 3, 32, 32), [1, 2, index]) for index in range(3)]
    plain = pipeline.serve(seeing, requests, 5, ahead=False)
    assert pipeline.serve(seeing, requests, 5, ahead=True) == plain
    for request, answer in zip(requests, plain, strict=True):
        with torch.inference_mode():
            image = seeing.encode_image(request.pixels)
        assert generate(seeing, [request.prompt], 5, image=image)[0].tokens == answer


def test_an_error_in_the_other_thread_is_not_lost(seeing):
    bad = [pipeline.Request(torch.randn(1, colours, 32, 32), [1]) for colours in (3, 2)]
    with pytest.raises(ValueError, match="pixels: got shape"):
        pipeline.serve(seeing, bad, 2, ahead=True)


def test_the_pipeline_is_timed_in_every_way(seeing):
    threads = torch.get_num_threads()
    found = speed_parts.pipeline_speed(seeing, image_size=32, requests=2, new_tokens=3, rounds=1)
    assert found["same_answers"] and found["gain"] > 0 and {"in order", "ahead"} <= set(found["seconds"])
    assert torch.get_num_threads() == threads


def test_routing_is_taken_apart():
    found = speed_parts.routing_speed(64, 32, 8, 2, tokens=6, vocab_size=50, rounds=1)
    assert set(found) == {"router", "table", "sort", "layer", "one by one"}


def test_even_load_needs_no_copies():
    placed = placement.place_experts([1.0] * 8, gpus=4)
    assert sorted(expert for gpu in placed for expert in gpu) == list(range(8))
    assert placement.imbalance([1.0] * 8, placed) == pytest.approx(1)


def test_a_busy_expert_is_copied_and_its_load_shared():
    load = [8.0, 1, 1, 1, 1]
    alone, copied = placement.place_experts(load, 5), placement.place_experts(load, 5, copies=5)
    assert placement.imbalance(load, alone) == pytest.approx(8 * 5 / 12)
    assert sum(experts.count(0) for experts in copied) == 6, "all five copies go to it"
    assert placement.imbalance(load, copied) < 1.5
    assert {len(experts) for experts in copied} == {2}


def test_no_placement_of_few_experts_is_better_by_more_than_greed_allows():
    """Against all placements of six experts on two GPUs: the greedy one is within a fifth of the best."""
    for seed in range(20):
        load = torch.rand(6, generator=torch.Generator().manual_seed(seed)).tolist()
        halves = ([list(half), [e for e in range(6) if e not in half]] for half in combinations(range(6), 3))
        best = min(placement.imbalance(load, half) for half in halves)
        assert best <= placement.imbalance(load, placement.place_experts(load, 2)) < 1.2 * best


@pytest.mark.parametrize(("load", "words"), [([1.0] * 5, "expected 5 experts"), ([1.0, -1.0], "load: got -1")])
def test_bad_placements_are_refused(load, words):
    with pytest.raises(ValueError, match=words):
        placement.place_experts(load, gpus=2)
