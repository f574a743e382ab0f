"""Load on a server, and what its clients wait for.

An *open loop*: a request comes when it comes, whether or not those before it have been answered. Its moment is drawn
from a Poisson process or read from the trace of a real service, and its times count from that moment, also if the
client itself was late; else a server that stands still would hide the waits that it causes (*coordinated omission*)::

    asks = poisson(rate=4, lengths=[(64, 32)] * 200)
    run = drive("http://127.0.0.1:8000", "smollm2", asks)
    report(run, ttft=0.5, tpot=0.1)["ttft"]["p99"]      # seconds: the value, and the middle 95 % of resampled ones

Prompts are random tokens, so that nothing is shared, and answers have the asked length whatever they say. Only servers
on this machine are put under load.

Recorded by ``make record PART=load``.

Book: ``chapters/scenarios/load.ipynb``.
"""

import asyncio
import csv
import datetime
import itertools
import random
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from dslib.check import above, whole

PERCENTILES = (50, 90, 99)
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Ask:
    """A request: seconds from the beginning on, and how many tokens its prompt and its answer have."""

    at: float
    prompt: int
    answer: int


@dataclass
class Life:
    """What became of it: when it was ``sent`` and each of its ``tokens`` came, in seconds from its moment on."""

    ask: Ask
    sent: float = 0.0
    tokens: list[float] = field(default_factory=list)
    problem: str | None = None

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in itertools.pairwise(self.tokens)]


@dataclass
class Run:
    """``lives`` of all requests; ``present``, how many the server said it had, looked at every so often."""

    lives: list[Life]
    present: list[float]
    seconds: float


def poisson(rate: float, lengths: Iterable[tuple[int, int]], seed: int = 0) -> list[Ask]:
    """Requests of these lengths (prompt, answer), ``rate`` a second, with independent gaps."""
    above(0, rate=rate)
    dice, now, asks = random.Random(seed), 0.0, []
    for prompt, answer in lengths:
        whole(1, prompt=prompt, answer=answer)
        now += dice.expovariate(rate)
        asks.append(Ask(now, prompt, answer))
    return asks


def read_trace(path: str | Path, count: int | None = None, factor: float = 1.0, skip: int = 0) -> list[Ask]:
    """Requests of a trace with the columns TIMESTAMP, ContextTokens and GeneratedTokens, as Azure published them.

    ``factor`` makes it bearable for a small machine: gaps are so many times as long, lengths so many times shorter.

    Raises:
        ValueError: another header; a line that is no moment and two numbers, or earlier than the one before.
    """
    above(0, factor=factor)
    asks, began, before = [], None, None
    with open(path, encoding="utf-8", newline="") as file:
        rows = csv.reader(file)
        if next(rows, None) != ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]:
            raise ValueError(f"{Path(path).name}, line 1: expected TIMESTAMP,ContextTokens,GeneratedTokens")
        for number, row in enumerate(rows, 2):
            try:
                moment = datetime.datetime.fromisoformat(row[0][:26])
                prompt, answer = (int(one) for one in row[1:])
                if prompt < 0 or answer < 0 or (before is not None and moment < before):
                    raise ValueError
            except (ValueError, IndexError) as error:
                said = f"{Path(path).name}, line {number}: got {','.join(row)!r}"
                raise ValueError(f"{said}, expected a later moment and two numbers of tokens") from error
            before = moment
            if number - 2 < skip:
                continue
            began = began or moment
            if count is not None and len(asks) == count:
                break
            shorter = (max(1, round(tokens / factor)) for tokens in (prompt, answer))
            asks.append(Ask((moment - began).total_seconds() * factor, *shorter))
    return asks


def evened(asks: Sequence[Ask], seed: int = 0) -> list[Ask]:
    """The control of a trace: the same requests in the same order and at the same mean rate, with Poisson's gaps."""
    span = asks[-1].at - asks[0].at
    above(0, span=span)
    return poisson((len(asks) - 1) / span, [(one.prompt, one.answer) for one in asks], seed)


def drive(url: str, model: str, asks: Sequence[Ask], *, vocab: int = 4096, most: float = 600.0, seed: int = 0) -> Run:
    """Send these requests to the server at ``url``, each at its moment, and watch.

    Raises:
        ValueError: a server on another machine; no request, more than 10,000, or some after ``most`` seconds.
    """
    if urlsplit(url).hostname not in LOOPBACK:
        raise ValueError(f"url: got {url!r}, expected a server on this machine")
    if not 0 < len(asks) <= 10_000 or asks[-1].at > most:
        raise ValueError(f"asks: got {len(asks)}, expected 1 to 10,000 within {most:g} s")
    return asyncio.run(_drive(url, model, asks, vocab, most, random.Random(seed)))


async def _drive(url: str, model: str, asks: Sequence[Ask], vocab: int, most: float, dice: random.Random) -> Run:
    import httpx

    prompts = [[dice.randrange(3, vocab) for _ in range(one.prompt)] for one in asks]
    lives, present = [Life(one) for one in asks], []
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
    async with httpx.AsyncClient(base_url=url, timeout=most, limits=limits) as client:

        async def one(life: Life, prompt: list[int]) -> None:
            moment = began + life.ask.at
            await asyncio.sleep(moment - time.monotonic())
            life.sent = time.monotonic() - moment
            body = {"model": model, "prompt": prompt, "max_tokens": life.ask.answer, "temperature": 0, "stream": True}
            try:
                async with client.stream("POST", "/v1/completions", json=body | {"ignore_eos": True}) as answer:
                    if answer.status_code != 200:
                        life.problem = f"status {answer.status_code}"
                        return
                    async for line in answer.aiter_lines():
                        if line.startswith('data: {"error"'):
                            life.problem = line[6:]
                        elif line.startswith("data: {"):
                            life.tokens.append(time.monotonic() - moment)
            except httpx.HTTPError as error:
                life.problem = type(error).__name__

        async def watch() -> None:
            while True:
                text = (await client.get("/metrics")).text
                seen = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[:1] not in ("", "#"))
                present.append(sum(float(seen[f"dslib_requests_{what}"]) for what in ("running", "waiting")))
                await asyncio.sleep(0.05)

        await client.get("/v1/models")  # a connection, before the clock starts
        began = time.monotonic()
        watching = asyncio.ensure_future(watch())
        await asyncio.gather(*(one(*pair) for pair in zip(lives, prompts, strict=True)))
        watching.cancel()
        return Run(lives, present, time.monotonic() - began)


def report(
    run: Run, ttft: float, tpot: float, *, skip: int = 0, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Percentiles with bootstrap intervals, and the goodput: requests a second that meet both limits.

    ``ttft``: time to the first token. ``itl``: all gaps between tokens. ``tpot``: the mean gap of an answer of two
    tokens or more. ``e2e``: time to the last. All in seconds from the moment of arrival on; whole requests are
    resampled, so that the gaps of one stay together. The first ``skip`` requests warm up and do not count.
    """
    above(0, ttft=ttft, tpot=tpot)
    counted = run.lives[skip:]
    if not counted:
        raise ValueError(f"skip: got {skip}, expected fewer than the {len(run.lives)} requests")
    whole_ones = [life for life in counted if life.problem is None and len(life.tokens) == life.ask.answer]
    kinds = {
        "ttft": [[life.tokens[0]] for life in whole_ones],
        "itl": [life.gaps for life in whole_ones],
        "tpot": [[float(np.mean(life.gaps))] for life in whole_ones if life.gaps],
        "e2e": [[life.tokens[-1]] for life in whole_ones],
    }
    good = sum(life.tokens[0] <= ttft and (not life.gaps or np.mean(life.gaps) <= tpot) for life in whole_ones)
    span = max(life.ask.at + (life.tokens or [0.0])[-1] for life in counted) - counted[0].ask.at
    times = sum(life.tokens[-1] for life in run.lives if life.tokens)  # of all: the server was watched all the time
    return {
        **{name: percentiles(groups, resamples, seed) for name, groups in kinds.items()},
        "requests": len(counted),
        "failed": len(counted) - len(whole_ones),
        "good": good / len(counted),
        "goodput": good / span,
        "late": max(life.sent for life in counted),
        "little": {"watched": float(np.mean(run.present)), "rate x time": times / run.seconds},
    }


def percentiles(groups: Sequence[Sequence[float]], resamples: int = 1000, seed: int = 0) -> dict[str, list[float]]:
    """p50, p90 and p99 of all values together: the value, and the middle 95 % of those of resampled groups."""
    groups = [np.asarray(group) for group in groups if len(group)]
    if not groups:
        return {}
    draw, points = np.random.default_rng(seed), [p / 100 for p in PERCENTILES]
    found = np.quantile(np.concatenate(groups), points)
    again = [
        np.quantile(np.concatenate([groups[i] for i in draw.integers(len(groups), size=len(groups))]), points)
        for _ in range(resamples)
    ]
    low, high = np.quantile(again, (0.025, 0.975), axis=0)
    return {f"p{p}": [float(v), float(a), float(b)] for p, v, a, b in zip(PERCENTILES, found, low, high, strict=True)}


def knee(rows: Iterable[tuple[float, float]], share: float = 0.9) -> float | None:
    """Of (rate, share of requests within the limits), the largest rate up to which all have at least ``share``."""
    best = None
    for rate, good in sorted(rows):
        if good < share:
            break
        best = rate
    return best


@contextmanager
def serving(model: str, *options: str) -> Iterator[str]:
    """The address of ``python -m dslib.serve`` in a process of its own; RuntimeError with what that says instead."""
    command = [sys.executable, "-m", "dslib.serve", "--model", model, "--port", "0", *options]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        said = process.stdout.readline()
        if " at http" not in said:
            raise RuntimeError(f"dslib.serve: {said}{process.stdout.read()}".strip())
        try:
            yield said.split()[2].removesuffix(";").removesuffix("/v1")
        finally:
            process.terminate()


def mixed(count: int, prompt: tuple[int, int] = (16, 160), answer: tuple[int, int] = (8, 96), seed: int = 0):
    """(prompt, answer) of ``count`` requests, drawn evenly between these limits."""
    dice = random.Random(seed)
    return [(dice.randint(*prompt), dice.randint(*answer)) for _ in range(count)]


def sweep(
    model: str = "smollm2", rates: Sequence[float] = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0), count: int = 60,
    ttft: float = 2.0, tpot: float = 0.2, seed: int = 0,
) -> list[dict[str, Any]]:  # fmt: skip
    """What clients wait for at each rate (requests a second, Poisson), with the server on this machine.

    Requests of the same ``count`` lengths each time (:func:`mixed`), with other prompts, as the server would find equal
    ones in its cache; the first ten warm up. Returns :func:`report` for each ``rate``, with limits ``ttft`` and
    ``tpot`` in seconds.
    """
    above(0, **{f"rates[{n}]": rate for n, rate in enumerate(rates)})
    whole(12, count=count)
    rows = []
    with serving(model) as url:
        drive(url, model, poisson(4, mixed(4)), seed=seed)  # what is done once in a process
        for number, rate in enumerate(rates, 1):
            asks = poisson(rate, mixed(count, seed=seed), seed)
            run = drive(url, model, asks, seed=seed + number)  # another seed: other prompts
            rows.append({"rate": rate} | report(run, ttft, tpot, skip=10))
    return rows
