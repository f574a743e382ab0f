"""A schedule that is played without a model is that of the engine with one, and memory is counted as the pool does."""

from collections import deque

import pytest
import torch

from dslib.architecture.decoder import DecoderConfig, build
from dslib.scenarios.realtime import Engine, Request
from measured.experiments import realtime_played as lab

ASKED = [
    ("a", 0, [1, 2, 3, 4, 5, 6, 7, 8, 9], 9),
    ("b", 1, [1, 2, 3, 4, 5, 6], 8),
    ("c", 1, [9] * 14, 5),
    ("d", 4, [2, 2], 7),
]


@pytest.mark.parametrize("blocks, chunk", [(20, 16), (12, 3), (6, 16)])
def test_the_played_schedule_is_that_of_the_engine(blocks, chunk):
    log, scheduler = lab.schedule(ASKED, blocks, chunk, size=4, slots=3)
    model = build(DecoderConfig(20, 32, 64, 2, 4, 2, max_position_embeddings=64), seed=0, dtype=torch.float64).eval()
    engine = Engine(model, blocks, 4, max_batch=3, chunk=chunk)
    plan, found, coming = engine.scheduler.plan, [], deque(ASKED)
    engine.scheduler.plan = lambda: found.append(plan()) or found[-1]
    fed = []
    while coming or engine.busy:
        while coming and coming[0][1] <= len(found):
            name, _, prompt, count = coming.popleft()
            engine.add(Request(prompt, count), id=name)
        engine.step()
        fed.append({text.id: count for text, count in found[-1]})
    assert [{name: count for name, (_, count) in now.items() if count} for now, _ in log] == fed
    assert scheduler.preempted == engine.scheduler.preempted and (scheduler.preempted > 0) == (blocks == 6)
    kinds = {kind for now, _ in log for kind, _ in now.values()}
    assert kinds == {lab.WAITS, lab.READS, lab.WRITES} | ({lab.LOST} if blocks == 6 else set())


def test_places_that_have_a_token_are_held_and_every_token_is_fed():
    tokens = sum(len(prompt) + count - 1 for _, _, prompt, count in lab.crowd())
    for run in (lab.in_blocks(64), lab.in_blocks(8), lab.first_fit()):
        pairs = list(zip(run["used"], run["held"], strict=True))
        assert all(used <= held <= lab.PLACES for used, held in pairs) and run["fed"] >= tokens
        assert (run["fed"] == tokens) == (run["preempted"] == 0) and 0 < lab.filled(run) < 1
    assert lab.first_fit()["refused"] > 0


def test_draws_differ_and_the_ratio_is_told_in_order():
    assert lab.crowd(0) == lab.crowd(0) != lab.crowd(1)
    found = lab.steps_ratio(8, range(3))
    assert found == sorted(found) and len(found) == 3 and found[0] > 1
    assert lab.steps_ratio(64, range(2)) == [1.0, 1.0]


def test_passes_are_counted_by_hand():
    requests = [Request([1], 3), Request([2, 3], 1), Request([4] * 5, 2)]
    # static: 3 and 2. The engine: both are read; the third in two pieces beside the first; then it writes.
    assert lab.passes(requests, slots=2, chunk=4) == (5, 6, 4)
