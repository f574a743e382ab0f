"""Serving by a clock of one's own: the engine's scheduler, and a model of what a step takes.

:class:`~dslib.scenarios.serving.scheduler.Scheduler` knows no model, so who takes part in which step does not depend on
what the tokens say. Add what each step takes, and one has a server without the machine::

    asks = poisson(rate=60, lengths=[(128, 128)] * 1000)
    lives = simulate(asks, floor_clock(CODER_1_3B, published_roof("A100_80GB")), slots=32)
    report(Run(lives, [0], 1), ttft=0.1, tpot=0.05)["ttft"]["p99"]

A clock is a function of the sizes of a step. :func:`floor_clock` gives the least that a card can take by its published
peaks: every real time is longer. :func:`fit` makes one of steps that were measured, as those of :func:`serve_live`,
which plays the same requests with the real engine, so that a simulation can be held against it.

Recorded by ``make record PART=load``, the traces where the variable ``AZURE_TRACES`` names their folder.

Book: ``chapters/scenarios/load.ipynb``.
"""

import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dslib import fast
from dslib.architecture.decoder import Decoder
from dslib.architecture.weights.pretrained import load_smollm2
from dslib.check import above, whole
from dslib.roofline import CODER_1_3B, DecoderShape, Roof, published_roof
from dslib.scenarios.realtime import BlockPool, Engine, Request, Scheduler
from dslib.scenarios.serving.scheduler import Text
from measured.experiments.realtime_load import Ask, Life, evened, percentiles, poisson, read_trace


@dataclass(frozen=True)
class Step:
    """The sizes of a step: texts that write, pieces that are read, their ``tokens``, and what all have ``cached``."""

    writes: int
    reads: int
    tokens: int
    cached: int

    @classmethod
    def of(cls, work: Sequence[tuple[Text, int]]) -> "Step":
        """Of a plan of the scheduler, before it is fed."""
        pieces = [count for text, count in work if text.left > 1]
        return cls(len(work) - len(pieces), len(pieces), sum(pieces), sum(text.done for text, _ in work))


Clock = Callable[[Step], float]


def floor_clock(shape: DecoderShape, roof: Roof, dtype: str = "float16") -> Clock:
    """A step that packs all its tokens into one pass, at the card's peaks: its bytes or its operations, the slower."""

    def seconds(step: Step) -> float:
        moved = shape.weight_bytes(dtype) + shape.kv_bytes(step.cached, dtype)
        return max(moved / roof.bandwidth, 2 * shape.parameters * (step.writes + step.tokens) / roof.rate(dtype))

    return seconds


def _features(step: Step) -> list[float]:
    """What a step of our engine pays for: a pass for all that write, one for each piece, rows in both, caches."""
    return [float(step.writes > 0), step.writes, step.reads, step.tokens, step.cached]


def priced(prices: Sequence[float]) -> Clock:
    """The clock of these prices in seconds, in the order of :func:`held_against`'s."""
    return lambda step: float(np.dot(prices, _features(step)))


def fit(steps: Sequence[tuple[Step, float]]) -> tuple[Clock, list[float]]:
    """The clock that is nearest to measured steps (least squares, no negative price), and its prices in seconds.

    Raises ValueError for fewer steps than prices.
    """
    whole(len(_features(Step(0, 0, 0, 0))), steps=len(steps))
    from scipy.optimize import nnls

    prices, _ = nnls(np.array([_features(step) for step, _ in steps]), np.array([seconds for _, seconds in steps]))
    return priced(prices), prices.tolist()


def simulate(
    asks: Sequence[Ask], clock: Clock, *, slots: int = 8, chunk: int = 256, blocks: int = 4096, size: int = 16
) -> list[Life]:
    """The life of each request, by this clock. No two prompts have a token in common.

    Raises ValueError for a request that would not fit into the blocks even alone.
    """
    scheduler, numbers, now = Scheduler(BlockPool(blocks, size), slots, chunk), itertools.count(), 0.0
    for ask in asks:
        if ask.prompt + ask.answer - 1 > blocks * size:
            raise ValueError(f"asks: one takes {ask.prompt + ask.answer - 1} tokens, the blocks have {blocks * size}")
    lives, coming = [Life(ask) for ask in asks], deque(sorted(range(len(asks)), key=lambda n: asks[n].at))
    while coming or scheduler.waiting or scheduler.running:
        if not (scheduler.waiting or scheduler.running):
            now = max(now, asks[coming[0]].at)  # nothing to do until somebody comes
        while coming and asks[coming[0]].at <= now:
            number = coming.popleft()
            prompt = [next(numbers) for _ in range(asks[number].prompt)]
            scheduler.waiting.append(Text(number, prompt, len(prompt)))
        work = scheduler.plan()
        now += clock(Step.of(work))
        for text, count in work:
            scheduler.advance(text, count)
            if text.left == 0:
                life = lives[text.id]
                life.tokens.append(now - life.ask.at)
                text.tokens.append(-1 - len(text.tokens))  # no real token: never shared
                if len(life.tokens) == life.ask.answer:
                    scheduler.drop(text)
    return lives


def static(asks: Sequence[Ask], clock: Clock, size: int = 32, patience: float = float("inf")) -> list[Life]:
    """The same requests in batches: one begins when it is full, or its first request has waited so long.

    A batch is padded to its longest prompt, and ends with its longest answer.
    """
    whole(1, size=size)
    lives, free, at = [Life(ask) for ask in asks], 0.0, 0
    while at < len(asks):
        full = asks[min(at + size, len(asks)) - 1].at
        start = max(free, min(full, asks[at].at + patience))
        batch = [life for life in lives[at : at + size] if life.ask.at <= start]
        prompt, count = max(life.ask.prompt for life in batch), len(batch)
        now = start + clock(Step(0, 1, prompt * count, 0))
        for step in range(max(life.ask.answer for life in batch)):
            if step:
                now += clock(Step(count, 0, 0, count * (prompt + step - 1)))
            for life in batch:
                if step < life.ask.answer:
                    life.tokens.append(now - life.ask.at)
        free, at = now, at + count
    return lives


def serve_live(model: Decoder, asks: Sequence[Ask], **options: Any) -> tuple[list[Life], list[tuple[Step, float]]]:
    """The same requests in real time with the real engine: their lives, and the sizes and seconds of each step."""
    engine, steps, lives = Engine(model, **options), [], [Life(ask) for ask in asks]
    draw, vocab = torch.Generator().manual_seed(0), model.config.vocab_size
    prompts = [torch.randint(3, vocab, (ask.prompt,), generator=draw).tolist() for ask in asks]
    plan, coming = engine.scheduler.plan, deque(range(len(asks)))

    def noted() -> list[tuple[Text, int]]:
        work = plan()
        steps.append(Step.of(work))
        return work

    engine.scheduler.plan = noted
    taken, began = [], time.monotonic()
    while coming or engine.busy:
        now = time.monotonic() - began
        if not engine.busy and asks[coming[0]].at > now:
            time.sleep(asks[coming[0]].at - now)
        while coming and asks[coming[0]].at <= time.monotonic() - began:
            number = coming.popleft()
            engine.add(Request(prompts[number], asks[number].answer), id=number)
        start = time.monotonic()
        events = engine.step()
        end = time.monotonic()
        taken.append(end - start)
        for event in events:
            lives[event.id].tokens.append(end - began - asks[event.id].at)
    return lives, list(zip(steps, taken, strict=True))


def held_against(
    rate: float = 1.0, count: int = 60, prompt: int = 100, answer: int = 40, slots: int = 8, seed: int = 0
) -> dict[str, Any]:
    """A clock fitted to the steps of one run of SmolLM2 on this machine, and how well it foretells another one.

    The other run has other arrivals. Returns ``prices`` (seconds: of a pass of those that write, of each of them, of a
    piece that is read, of each of its tokens, of each token in a cache); ``times`` of the other run, ``ttft`` and
    ``e2e``, each a list of measured and one of simulated seconds; and ``step``, the median error of a step, relative.
    """
    above(0, rate=rate)
    whole(1, count=count, prompt=prompt, answer=answer, slots=slots)
    model, _ = load_smollm2()
    fast.prepare(model)
    dice = np.random.default_rng(seed)
    both = ((1 + middle // 4, 2 * middle) for middle in (prompt, answer))
    lengths = list(zip(*(dice.integers(*limits, count).tolist() for limits in both), strict=True))
    _, steps = serve_live(model, poisson(rate, lengths, seed), max_batch=slots, num_blocks=1024)
    clock, prices = fit(steps)
    others = poisson(rate, lengths[::-1], seed + 1)
    real, again = serve_live(model, others, max_batch=slots, num_blocks=1024)
    told = simulate(others, clock, slots=slots, blocks=1024)
    errors = [abs(clock(step) / seconds - 1) for step, seconds in again]
    return {
        "prices": prices,
        "times": {
            "ttft": [[life.tokens[0] for life in lives] for lives in (real, told)],
            "e2e": [[life.tokens[-1] for life in lives] for lives in (real, told)],
        },
        "step": float(np.median(errors)),
    }


def real_gaps(
    trace: str = "code", card: str = "A100_80GB", loads: Sequence[float] = (1, 4, 16, 64), count: int = 2000,
    slots: int = 64,
) -> dict[str, Any]:  # fmt: skip
    """A trace of a real service on a card at its floors, with its own gaps and with Poisson's at the same mean rate.

    ``loads``: so many times the trace's own traffic, all gaps shortened alike. Azure's traces of November 2023
    (CC-BY-4.0; ``AzureLLMInferenceTrace_code.csv`` or ``…_conv.csv`` in the folder ``AZURE_TRACES``), the first
    ``count`` requests.

    Returns of the trace its ``rate`` (requests a second), the ``variation`` of its gaps (standard deviation over mean;
    1 is Poisson's), and ``prompt`` and ``answer`` tokens, each as p50, p90, p99; and for each load both times to the
    first token, as :func:`percentiles` has them.

    Raises:
        RuntimeError: ``AZURE_TRACES`` names no folder. ValueError: as :func:`read_trace`.
    """
    folder = os.environ.get("AZURE_TRACES")
    if not folder:
        raise RuntimeError("AZURE_TRACES: not set, expected the folder of Azure's traces")
    asks = read_trace(Path(folder) / f"AzureLLMInferenceTrace_{trace}.csv", count)
    gaps = np.diff([one.at for one in asks])
    shape = {name: [[getattr(one, name)] for one in asks] for name in ("prompt", "answer")}
    clock, rows = floor_clock(CODER_1_3B, published_roof(card)), []
    for load in loads:
        sooner = [Ask(one.at / load, one.prompt, one.answer) for one in asks]
        waits = {
            name: percentiles([[life.tokens[0]] for life in simulate(arrivals, clock, slots=slots, blocks=2**16)], 200)
            for name, arrivals in (("real", sooner), ("poisson", evened(sooner)))
        }
        rows.append({"load": load} | waits)
    return {
        "rate": float(1 / gaps.mean()),
        "variation": float(gaps.std() / gaps.mean()),
        **{name: [value for value, *_ in percentiles(values, 2).values()] for name, values in shape.items()},
        "rows": rows,
    }
