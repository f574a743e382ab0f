"""The engine against `generate` alone: the same text whatever else is in the batch, and no block lost."""

import random

import pytest
import torch

from dslib import fast
from dslib.architecture.decoder import DecoderConfig, build
from dslib.architecture.generation import Sampling, generate
from dslib.architecture.sparse_decoder import SparseConfig
from dslib.architecture.whole import tiny_deepseek
from dslib.migration.adapters import lora
from dslib.migration.multi_lora import PerRow
from dslib.scenarios.realtime import Engine, QueueFull, Request
from dslib.scenarios.serving.blocks import chain

DENSE = DecoderConfig(50, 32, 64, 2, 4, 2, max_position_embeddings=96)
CONFIGS = {
    "dense": DENSE,
    "window": DecoderConfig(50, 32, 64, 2, 4, 2, max_position_embeddings=96, sliding_window=7, attention_sinks=1),
    "experts": SparseConfig(50, 32, 64, 2, 4, 2, max_position_embeddings=96, num_experts=4, moe_intermediate_size=32),
    "latent": tiny_deepseek(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, kv_lora_rank=16, qk_nope_head_dim=12,
        qk_rope_head_dim=4, v_head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        max_position_embeddings=96,
    ),
}  # fmt: skip
SAMPLINGS = (
    Sampling(),
    Sampling(temperature=1.0),
    Sampling(0.8, top_k=9, repetition_penalty=1.3),
    Sampling(1.2, top_p=0.9),
)


class Letters:
    """A tokenizer: every id is a letter."""

    def decode(self, ids):
        return "".join(chr(48 + one) for one in ids)


@pytest.fixture(scope="module")
def models():
    made = {}
    for name, config in CONFIGS.items():
        made[name] = build(config, seed=0, dtype=torch.float64).eval()
        with torch.no_grad():
            for weight in made[name].parameters():
                if weight.ndim > 1:
                    weight.mul_(12)  # logits that differ
    return made


def alone(model, request):
    [made] = generate(
        model, [request.prompt], request.max_new_tokens, eos_token_id=request.eos_token_id, sampling=request.sampling,
        seed=[request.seed], stop=request.stop, tokenizer=Letters(),
    )  # fmt: skip
    return made.tokens, made.finish


def some_request(rng, beginnings):
    prompt = rng.choice(beginnings)[: rng.randint(0, 20)] + [rng.randrange(50) for _ in range(rng.randint(1, 12))]
    stop = ("".join(chr(48 + rng.randrange(50)) for _ in range(rng.randint(1, 2))),) if rng.random() < 0.3 else ()
    ends = rng.randrange(50) if rng.random() < 0.3 else None
    return Request(prompt, rng.randint(1, 14), ends, rng.choice(SAMPLINGS), rng.randrange(100), stop)


def play(model, seed):
    """A random schedule: arrivals, lengths, shared beginnings, cancellations, a pool small enough to run out."""
    rng = random.Random(seed)
    size = rng.choice((1, 2, 4, 8))
    blocks = -(-rng.randint(46, 90) // size)
    engine = Engine(
        model, blocks, size, max_batch=rng.randint(1, 6), chunk=rng.choice((1, 3, 8, 64)), tokenizer=Letters()
    )
    beginnings = [[rng.randrange(50) for _ in range(20)] for _ in range(2)]
    requests, found, finished = {}, {}, {}
    coming = [some_request(rng, beginnings) for _ in range(rng.randint(2, 9))]
    while coming or engine.busy:
        while coming and rng.random() < 0.4:
            request = coming.pop()
            id = engine.add(request)
            requests[id], found[id] = request, []
        if rng.random() < 0.04 and requests:
            engine.cancel(rng.choice(list(requests)))
        for event in engine.step():
            if event.token is not None:
                found[event.id].append(event.token)
            if event.finish:
                assert event.id not in finished
                finished[event.id] = event.finish
        texts = [*engine.scheduler.running, *engine.scheduler.waiting]
        engine.scheduler.pool.check([text.table for text in texts])
    assert engine.scheduler.pool.free == blocks and set(finished) == set(requests)
    for id, request in requests.items():
        tokens, finish = alone(model, request)
        if finished[id] == "cancelled":
            assert found[id] == tokens[: len(found[id])]
        else:
            assert (found[id], finished[id]) == (tokens, finish)
    return engine


@pytest.mark.parametrize("name", CONFIGS)
def test_every_request_gets_the_text_that_it_gets_alone(models, name):
    played = [play(models[name], seed) for seed in range(55)]
    assert sum(engine.scheduler.preempted > 0 for engine in played) > 5  # or the test has tested less than it says
    assert sum(engine.scheduler.shared_tokens > 0 for engine in played) > 5
    assert max(max(engine.batch) for engine in played) > 3


def test_a_prepared_model_serves_the_same(models):
    model = build(DENSE, seed=0, dtype=torch.float64).eval()
    model.load_state_dict(models["dense"].state_dict())
    fast.prepare(model)
    for seed in range(4):
        play(model, seed)


def test_a_prompt_that_is_wholly_known_computes_its_last_token_and_nothing_else(models):
    engine = Engine(models["dense"], 16, 4)
    request = Request(list(range(12)), 5)
    engine.add(request)
    engine.run()
    counted = []
    plan = engine.scheduler.plan
    engine.scheduler.plan = lambda: [counted.append(count) or (text, count) for text, count in plan()]
    engine.add(request)
    [tokens] = engine.run().values()
    assert engine.scheduler.shared_tokens == 8 and counted[0] == 4  # blocks are shared whole; one token has to be left
    assert tokens == alone(models["dense"], request)[0]


def test_the_same_tokens_behind_another_beginning_are_not_taken_for_the_same(models):
    engine = Engine(models["dense"], 32, 4)
    for first in (1, 2):
        request = Request([first, 5, 6, 7, 8, 9, 10, 11, 12], 6)
        engine.add(request)
        [tokens] = engine.run().values()
        assert tokens == alone(models["dense"], request)[0]
    assert engine.scheduler.shared_tokens == 0


class Named(str):
    """An adapter whose name is whatever bytes one likes."""

    def __repr__(self):
        return self

    def encode(self, *_):
        return self.bytes


def test_no_name_of_an_adapter_stands_for_a_block():
    first, second = list(range(4)), list(range(4, 8))
    beginning, both = chain(first, 4), chain(first + second, 4)
    adapter = Named("h0")
    adapter.bytes = beginning[0]  # a chain that began with the name itself would go on as this text does
    assert both[0] == beginning[0] and chain(second, 4, adapter)[0] != both[1]
    roots = [chain(first, 4, salt)[0] for salt in (None, "", "None", 0, "0", adapter)]
    assert len(set(roots)) == len(roots) and {len(one) for one in roots} == {32}
    assert chain(first + second, 4, known=beginning) == both


def test_a_long_prompt_holds_nobody_up_for_longer_than_a_chunk(models):
    engine = Engine(models["dense"], 64, 4, chunk=8)
    writing = engine.add(Request([1, 2, 3], 30))
    engine.step()
    engine.add(Request(list(range(48)) + [1] * 10, 2))
    for _ in range(8):
        assert writing in [event.id for event in engine.step()]
    assert {event.id for event in engine.step()} == {writing, 1}


def test_each_request_has_its_own_adapter(models):
    model = build(DENSE, seed=0, dtype=torch.float64).eval()
    model.load_state_dict(models["dense"].state_dict())
    prompt, wanted, adapters = (
        [3, 1, 4, 1, 5, 9, 2, 6, 5],
        [generate(model, [[3, 1, 4, 1, 5, 9, 2, 6, 5]], 8)[0].tokens],
        [],
    )
    for seed in (1, 2):
        adapter = lora(model, r"(qkv_proj|down_proj)$", 2)
        with torch.no_grad():
            for weight in adapter.parameters():
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))
        wanted.append(generate(model, [prompt], 8)[0].tokens)
        adapter._on = False
        adapters.append(adapter)
    assert len({tuple(one) for one in wanted}) == 3
    engine = Engine(model, 32, 4, adapters=PerRow(adapters))
    ids = [engine.add(Request(prompt, 8, adapter=which)) for which in (None, 0, 1)]
    found = engine.run()
    assert [found[id] for id in ids] == wanted
    assert engine.scheduler.shared_tokens == 0  # an adapter is part of the hash


def test_a_stream_goes_on_beside_others_and_may_be_left(models):
    model, first = models["dense"], Request([7, 8], 6)
    engine = Engine(model, 32, 4)
    id = engine.add(first)
    second = Request([1, 2, 3], 9)
    assert list(engine.stream(second)) == alone(model, second)[0]
    events = [event.token for event in engine.step() if event.id == id]
    assert events == alone(model, first)[0]
    stream = engine.stream(second)
    assert next(stream) == alone(model, second)[0][0]
    stream.close()
    assert not engine.busy and engine.scheduler.pool.free == 32


def test_lives_are_told_on_the_engines_clock(models):
    ticks = iter(range(100))
    engine = Engine(models["dense"], 32, 4, clock=lambda: next(ticks))
    id = engine.add(Request([1, 2, 3], 4))
    engine.run()
    life = engine.lives[id]
    assert (life.arrived, life.first_token, life.gaps) == (0, 1, [1, 1, 1]) and engine.batch == [1, 1, 1, 1]


def test_a_text_with_nan_logits_fails_alone(models):
    model = models["dense"]
    engine = Engine(model, 32, 4)
    good, bad = engine.add(Request([1, 2, 3], 5)), engine.add(Request([4, 5, 6], 5), id="bad")

    def spoil(head, inputs, logits):
        if len(logits) == 2:
            logits = logits.clone()
            logits[1] = torch.nan
            return logits

    hook = model.lm_head.register_forward_hook(spoil)
    events = []
    while engine.busy:
        events += engine.step()
    hook.remove()
    failed = [event for event in events if event.finish == "error"]
    assert [event.id for event in failed] == [bad] and "not a number" in failed[0].error
    assert [event.token for event in events if event.id == good] == alone(model, Request([1, 2, 3], 5))[0]
    engine.scheduler.pool.check([])


def test_a_model_that_raises_ends_those_of_its_pass_and_no_others(models):
    model, engine = models["dense"], Engine(models["dense"], 32, 4)
    engine.add(Request([1, 2, 3], 5), id="first")
    engine.step()
    engine.add(Request([4, 5, 6, 7], 5), id="second")

    def fail(module, inputs):
        if inputs[0].shape[1] == 4:
            raise RuntimeError("out of memory, say")

    hook = model.embed_tokens.register_forward_pre_hook(fail)
    events = []
    while engine.busy:
        events += engine.step()
    hook.remove()
    assert [event.id for event in events if event.finish == "error"] == ["second"]
    assert [event.finish for event in events if event.id == "first"][-1] == "length"
    engine.scheduler.pool.check([])
    with pytest.raises(RuntimeError, match=r"second.*say"):
        hook = model.embed_tokens.register_forward_pre_hook(fail)
        try:
            engine.add(Request([4, 5, 6, 7], 5), id="second")
            engine.run()
        finally:
            hook.remove()


def small(models, **kind):
    return Engine(models["dense"], 4, 4, **kind)


def full(models):
    engine = small(models, max_waiting=1)
    for _ in range(2):
        engine.add(Request([1], 1))


BAD_CALLS = [
    (lambda m: small(m).add(Request([], 4)), ValueError, "empty prompt"),
    (lambda m: small(m).add(Request([1], 0)), ValueError, "max_new_tokens"),
    (lambda m: small(m).add(Request([1, 50], 4)), ValueError, "vocabulary"),
    (lambda m: small(m).add(Request([1] * 10, 8)), ValueError, "17 tokens, more than the 16"),
    (lambda m: small(m).add(Request([1] * 90, 8)), ValueError, "max_position_embeddings"),
    (lambda m: small(m).add(Request([1], 4, stop=("a",))), ValueError, "tokenizer"),
    (lambda m: small(m).add(Request([1], 4, adapter=0)), ValueError, "adapter: got 0, the engine has 0"),
    (lambda m: small(m).add(Request([1], 4, eos_token_id=77)), ValueError, "vocabulary"),
    (lambda m: twice(m), ValueError, "in use"),
    (lambda m: Request([1], 4, sampling=Sampling(temperature=-1)), ValueError, "temperature"),
    (full, QueueFull, "1 requests wait"),
    (lambda m: small(m, max_batch=0), ValueError, "max_batch"),
    (lambda m: small(m, chunk=0), ValueError, "chunk"),
    (lambda m: Engine(m["dense"], 0, 4), ValueError, "num_blocks"),
]


def twice(models):
    engine = small(models)
    for _ in range(2):
        engine.add(Request([1], 4), id="a")


@pytest.mark.parametrize("call, kind, words", BAD_CALLS)
def test_bad_calls_are_refused_at_once(models, call, kind, words):
    with pytest.raises(kind, match=words):
        call(models)


def test_cancelling_twice_or_nobody_is_no_error(models):
    engine = small(models)
    id = engine.add(Request([1, 2], 4))
    assert engine.cancel(id) and not engine.cancel(id) and not engine.cancel("nobody")
    assert [event.finish for event in engine.step()] == ["cancelled"] and not engine.busy
