"""dslib's scheduler played without a model: who gets which block does not depend on what the tokens say.

A request is (name, step of arrival, prompt, tokens of the answer); what is written is made up, and never shared.

Book: ``chapters/scenarios/realtime.ipynb``.
"""

import itertools
import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from dslib.scenarios.realtime import BlockPool, Scheduler
from dslib.scenarios.realtime import Request as EngineRequest
from dslib.scenarios.serving.scheduler import Text
from measured.experiments.realtime_simulator import Step

Request = tuple[Any, int, list[int], int]
ANSWERS = (4, 6, 8, 12, 16, 24, 32)
PLACES, LONGEST = 192, 64  # of the memory below; tokens of a text at most


def play(scheduler: Scheduler, coming: Iterable[Request]) -> Iterator[list[tuple[Text, int]]]:
    """The plan of each step, before it is carried out: (text, how many of its next tokens)."""
    coming = deque(coming)
    for step in itertools.count():
        while coming and coming[0][1] <= step:
            name, _, prompt, count = coming.popleft()
            scheduler.waiting.append(Text(name, list(prompt), len(prompt), request=len(prompt) + count))
        if not (coming or scheduler.waiting or scheduler.running):
            return
        work = scheduler.plan()
        yield work
        for text, count in work:
            scheduler.advance(text, count)
            if text.left == 0:
                text.tokens.append(-1 - len(text.tokens))  # no real token: never shared
                if len(text.tokens) == text.request:
                    scheduler.drop(text)


def crowd(seed: int = 0) -> list[Request]:
    """32 requests of 8 to 60 tokens, all at once; no two prompts have a token in common."""
    dice, number, made = random.Random(seed), itertools.count(), []
    for name in range(32):
        prompt = [next(number) for _ in range(dice.randint(4, 28))]
        made.append((name, 0, prompt, dice.choice(ANSWERS)))
    return made


def in_blocks(size: int, seed: int = 0) -> dict[str, Any]:
    """The crowd in blocks of ``size``, which are strips if they are as long as a text may get.

    Returns of each step the places that are ``held`` and ``used`` (have a token); ``preempted``, and tokens ``fed``.
    """
    pool = BlockPool(PLACES // size, size)
    scheduler, held, used, fed = Scheduler(pool, max_batch=32, chunk=64), [], [], 0
    for work in play(scheduler, crowd(seed)):
        held.append((pool.num_blocks - pool.free) * size)
        new = dict(work)
        fed += sum(new.values())
        used.append(sum(text.done + new.get(text, 0) for text in scheduler.running))
    return {"held": held, "used": used, "preempted": scheduler.preempted, "fed": fed}


def first_fit(seed: int = 0) -> dict[str, Any]:
    """The crowd in strips of each text's own length, as if it were known, in the first hole that is long enough.

    Returns the same, and ``refused``: steps in which somebody waits though as many places as he needs are free.
    """
    waiting, strips, held, used, refused = deque(crowd(seed)), {}, [], [], 0
    while waiting or strips:
        while waiting:
            name, _, prompt, count = waiting[0]
            need = len(prompt) + count - 1  # the last token is never fed
            ends = [0, *sorted(end for _, end, *_ in strips.values())]
            starts = [*sorted(start for start, *_ in strips.values()), PLACES]
            hole = next((at for at, to in zip(ends, starts, strict=True) if to - at >= need), None)
            if hole is None:
                refused += PLACES - sum(end - start for start, end, *_ in strips.values()) >= need
                break
            strips[name] = [hole, hole + need, len(prompt), count]
            waiting.popleft()
        held.append(sum(end - start for start, end, *_ in strips.values()))
        used.append(sum(done for _, _, done, _ in strips.values()))
        for strip in strips.values():
            strip[2:] = strip[2] + 1, strip[3] - 1
        strips = {name: strip for name, strip in strips.items() if strip[3]}
    fed = sum(len(prompt) + count - 1 for _, _, prompt, count in crowd(seed))
    return {"held": held, "used": used, "preempted": 0, "fed": fed, "refused": refused}


def filled(run: dict[str, Any]) -> float:
    """Share of the places that have a token, mean over the steps."""
    return float(np.mean(run["used"])) / PLACES


def steps_ratio(size: int, seeds: Iterable[int] = range(10)) -> list[float]:
    """How many times as many steps strips of the longest text take, for each draw of the crowd; in order of size."""
    return sorted(len(in_blocks(LONGEST, seed)["used"]) / len(in_blocks(size, seed)["used"]) for seed in seeds)


def passes(requests: Sequence[EngineRequest], slots: int = 8, chunk: int = 256) -> tuple[int, int, int]:
    """Of these requests: passes in static batches and in the engine, with room for all, and the engine's steps."""
    answers = [one.max_new_tokens for one in requests]
    static = sum(max(answers[start : start + slots]) for start in range(0, len(answers), slots))
    number = itertools.count()
    coming = [(n, 0, [next(number) for _ in one.prompt], one.max_new_tokens) for n, one in enumerate(requests)]
    steps = [Step.of(work) for work in play(Scheduler(BlockPool(100_000, 16), slots, chunk), coming)]
    return static, sum((step.writes > 0) + step.reads for step in steps), len(steps)


WAITS, READS, WRITES, LOST = 1, 2, 3, 4


def schedule(coming: list[Request], blocks: int, chunk: int, size: int, slots: int) -> tuple[list, Scheduler]:
    """Of each step ({name: (what it does, tokens fed)}, {name: its table}), and the scheduler afterwards.

    A text waits, reads, writes, or waits because it has lost its blocks.
    """
    scheduler, log, begun = Scheduler(BlockPool(blocks, size), slots, chunk), [], set()
    for work in play(scheduler, coming):
        now = {text.id: (LOST if text.id in begun else WAITS, 0) for text in scheduler.waiting}
        now |= {text.id: (WAITS, 0) for text in scheduler.running}  # no budget was left
        now |= {text.id: (READS if text.left > 1 else WRITES, count) for text, count in work}
        begun |= {text.id for text in scheduler.running}
        log.append((now, {text.id: list(text.table) for text in scheduler.running}))
    return log, scheduler
