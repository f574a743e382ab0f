"""Serving measured: the engine beside static batches and transformers' continuous batching, and what each step buys.

All on one machine in one run, float32, the same requests: prompts cut from the novel, lengths of answers fixed, so that
every way writes as many tokens. Recorded by ``make record PART=realtime``.

Book: ``chapters/scenarios/realtime.ipynb``.
"""

from collections.abc import Callable
from typing import Any

import torch

from dslib import fast
from dslib.architecture.decoder import Decoder, inference
from dslib.architecture.generation import generate
from dslib.architecture.weights.pretrained import load_smollm2
from dslib.architecture.weights.twin import hf_twin
from dslib.check import whole
from dslib.data.text import moby_dick
from dslib.scenarios.realtime import Engine, Request
from measured.timing import compare, quartiles, ratio

SLOTS = 8


def requests_of(count: int, tokenizer: Any, prompt: tuple[int, int] = (16, 160), answer: tuple[int, int] = (8, 96)):
    """``count`` requests of the novel, lengths drawn evenly between these limits, the same every time."""
    ids, draw = tokenizer(moby_dick(), verbose=False).input_ids, torch.Generator().manual_seed(0)

    def between(limits: tuple[int, int]) -> int:
        return int(torch.randint(limits[0], limits[1] + 1, (), generator=draw))

    made = []
    for _ in range(count):
        length, start = between(prompt), between((0, len(ids) - prompt[1]))
        made.append(Request(ids[start : start + length], between(answer)))
    return made


def serve(model: Decoder, requests: list[Request], **options: Any) -> Engine:
    """All requests at once through a new engine."""
    engine = Engine(model, num_blocks=1024, max_batch=SLOTS, **options)
    for request in requests:
        engine.add(request)
    engine.run()
    return engine


def static(model: Decoder, requests: list[Request]) -> None:
    """Batches of as many slots, in order of arrival: each ends when its longest answer does."""
    for start in range(0, len(requests), SLOTS):
        batch = requests[start : start + SLOTS]
        generate(model, [one.prompt for one in batch], max(one.max_new_tokens for one in batch))


def throughput(count: int = 32, rounds: int = 5) -> dict[str, Any]:
    """Tokens a second of each way to serve ``count`` requests of mixed lengths; SmolLM2, float32.

    Returns ``tokens_per_second`` by way, ``ratios`` of the engine's to each other's (median, low, high), and ``same``:
    for how many requests the engine wrote what ``generate`` alone writes.
    """
    whole(1, count=count, rounds=rounds)
    model, tokenizer = load_smollm2()
    fast.prepare(model)
    requests, theirs = requests_of(count, tokenizer), hf_twin(model)
    ways: dict[str, Callable[[], Any]] = {
        "engine": lambda: serve(model, requests),
        "static, ours": lambda: static(model, requests),
        "static, transformers": lambda: _static_transformers(theirs, requests),
        "continuous, transformers": lambda: _continuous_transformers(theirs, requests),
    }
    seconds = compare(ways, rounds=rounds, warmup=0)
    engine, tokens = Engine(model, num_blocks=1024, max_batch=SLOTS), sum(one.max_new_tokens for one in requests)
    ids = [engine.add(request) for request in requests]
    written = engine.run()
    same = sum(
        written[id] == generate(model, [one.prompt], one.max_new_tokens)[0].tokens
        for id, one in zip(ids, requests, strict=True)
    )
    ratios = {name: ratio(timing, seconds["engine"]) for name, timing in seconds.items() if name != "engine"}
    return {
        "tokens_per_second": {name: timing.per_second(tokens) for name, timing in seconds.items()},
        "ratios": {name: [one.median, one.low, one.high] for name, one in ratios.items()},
        "same": same,
    }


def _static_transformers(model: Any, requests: list[Request]) -> None:
    for start in range(0, len(requests), SLOTS):
        batch = requests[start : start + SLOTS]
        longest = max(len(one.prompt) for one in batch)
        ids = torch.tensor([[0] * (longest - len(one.prompt)) + list(one.prompt) for one in batch])
        mask = torch.tensor([[0] * (longest - len(one.prompt)) + [1] * len(one.prompt) for one in batch])
        new = max(one.max_new_tokens for one in batch)
        model.generate(
            ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        )


def _continuous_transformers(model: Any, requests: list[Request]) -> None:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    # Its default takes most of the memory there is; as many tokens as our blocks hold.
    sizes = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=256)
    with model.continuous_batching_context_manager(config, continuous_batching_config=sizes) as manager:
        for one in requests:
            manager.add_request(list(one.prompt), max_new_tokens=one.max_new_tokens)
        left = len(requests)
        while left:
            made = manager.get_result(timeout=1)
            left -= made is not None and made.is_finished()


def prefix(length: int = 512, rounds: int = 5) -> dict[str, list[float]]:
    """Time to the first token of a prompt of so many tokens, when it is new, and when it was served before."""
    whole(1, length=length, rounds=rounds)
    model, tokenizer = load_smollm2()
    fast.prepare(model)
    ids = tokenizer(moby_dick(), verbose=False).input_ids
    found: dict[str, list[float]] = {"first": [], "again": []}
    for number in range(rounds):
        engine, text = Engine(model, num_blocks=128), ids[number * length : (number + 1) * length]
        for name in found:
            id = engine.add(Request(text, 1))
            engine.run()
            found[name].append(engine.lives[id].first_token)
    return {name: list(quartiles(seconds)) for name, seconds in found.items()}


def long_prompt(length: int = 2000, chunk: int = 64, rounds: int = 3) -> dict[str, dict[str, float]]:
    """Gaps between the tokens of seven texts while a prompt of ``length`` tokens arrives: in chunks, and at once.

    Returns for both, and for seven texts without such a prompt (``alone``), the ``middle``, ``p99`` and ``most`` of the
    gaps, in seconds, of all rounds together; and ``first``, the newcomer's time to its first token (median).
    """
    whole(1, length=length, chunk=chunk, rounds=rounds)
    model, tokenizer = load_smollm2()
    fast.prepare(model)
    ids, found = tokenizer(moby_dick(), verbose=False).input_ids, {}
    for name, tokens in (("chunks", chunk), ("at once", length), ("alone", chunk)):
        gaps: list[float] = []
        firsts: list[float] = []
        for _ in range(rounds):
            engine = Engine(model, num_blocks=512, chunk=tokens)
            writing = [engine.add(Request(ids[20 * n : 20 * n + 16], 60)) for n in range(SLOTS - 1)]
            for _ in range(10):
                engine.step()
            late = engine.add(Request(ids[-length:], 1)) if name != "alone" else None
            while engine.busy:
                engine.step()
            gaps += [gap for id in writing for gap in engine.lives[id].gaps[5:]]
            firsts += [engine.lives[late].first_token] if late is not None else []
        gaps.sort()
        found[name] = {"middle": gaps[len(gaps) // 2], "p99": gaps[int(0.99 * len(gaps))], "most": gaps[-1]}
        found[name] |= {"first": quartiles(firsts)[1]} if firsts else {}
    return found


def overhead(rounds: int = 30) -> dict[str, Any]:
    """A step of the engine with all slots writing, beside the model's pass on the same tokens and blocks alone.

    Returns ``ratio`` of the two times (median, low, high); 1.1 means that a tenth of a pass comes on top.
    """
    whole(1, rounds=rounds)
    model, tokenizer = load_smollm2()
    fast.prepare(model)
    engine = Engine(model, num_blocks=256, max_batch=SLOTS)
    for request in requests_of(SLOTS, tokenizer, prompt=(64, 64), answer=(2 * rounds + 8, 2 * rounds + 8)):
        engine.add(request)
    while len(texts := engine.scheduler.running) < SLOTS or any(text.left > 1 for text in texts):
        engine.step()
    texts = list(texts)

    def alone() -> None:
        ids = torch.tensor([text.tokens[-1:] for text in texts])
        at = torch.tensor([[text.done - 1] for text in texts])  # once more at the last place: nothing else is changed
        engine.cache.show([text.table for text in texts])
        with inference(model):
            model(ids, engine.cache, at)

    seconds = compare({"step": engine.step, "model": alone}, rounds=rounds, warmup=1)
    found = ratio(seconds["step"], seconds["model"])
    return {"ratio": [found.median, found.low, found.high]}
