"""Does an idea help? The course's model against the same model with one thing changed: paired runs, three cuts.

An *arm* is a configuration and a line of why. Runs of one seed read the same rows in the same order, and start from the
same weights wherever a parameter's name and shape are the same. The learning rate stays level after its rise, and what
is judged is a running average of the weights, so that a run may be cut anywhere: at equal tokens, at equal counted
FLOPs, at equal seconds of a machine. These are three cuts through the same runs. Seconds are tokens times what a token
takes in :func:`token_seconds`, where all arms are timed in turn on a quiet machine: so the runs themselves may be made
anywhere, beside anything::

    arms = {arm: [run(arm, seed) for seed in range(5)] for arm in ARMS}
    difference(arms["frozen router"], arms[BASE], "flops")         # bits a byte; above 0: worse than the base

Every arm is tuned alike, by three rates on a seed of its own. Recorded by ``make record PART=help-rates-0``,
``PART=help-0`` and so on, and ``PART=help-seconds``.
"""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn

from dslib.architecture.balance import moe_layers, total_balance_loss
from dslib.architecture.decoder import build, count_parameters
from dslib.architecture.sparse_decoder import SparseConfig
from dslib.architecture.whole import Losses, Whole, tiny_deepseek
from dslib.check import above, one_of, whole
from dslib.data import corpus
from dslib.data.text import slices
from dslib.performance.muon import matrices_and_rest, orthogonalising_flops
from dslib.performance.pretrain import (
    WINDOW,
    WINDOWS,
    Plan,
    Progress,
    bits_per_byte,
    byte_lengths,
    pretrain,
    training_flops,
)  # fmt: skip
from dslib.performance.statistics import Mean, mean_interval
from measured import recordings
from measured.machine import best_device
from measured.timing import stopwatch

BASE = "fine-grained, shared"
LEVEL = 10**6  # steps of a schedule of which no run sees more than the rise and the level
CUTS = ("tokens", "flops", "seconds")
LONG = {"rate": 8e-3, "steps": 600, "every": 60}  # of the runs that count; the rate is each arm's best of three


@dataclass(frozen=True)
class Arm:
    """What is changed of :func:`tiny_deepseek` and of its training, and ``why``."""

    why: str
    changes: dict[str, Any] = field(default_factory=dict)
    frozen_router: bool = False
    switch: float = 0.0  # weight of a Switch loss; the bias then stands still
    prediction: bool = False


def dense_inner(active: bool) -> int:
    """Inner size of five dense MLPs with as many weights as the base's MLPs have, or as a token uses of them."""
    config = tiny_deepseek()
    experts = (config.num_experts_per_tok if active else config.num_experts) + config.n_shared_experts
    expert, mixtures = 3 * config.hidden_size * config.moe_intermediate_size, config.num_hidden_layers - 1
    router = config.hidden_size * config.num_experts
    total = 3 * config.hidden_size * config.intermediate_size + mixtures * (experts * expert + router)
    return round(total / (3 * config.hidden_size * config.num_hidden_layers))


def _dense(active: bool) -> dict[str, Any]:
    return {"first_k_dense_replace": tiny_deepseek().num_hidden_layers, "intermediate_size": dense_inner(active)}


ARMS = {
    BASE: Arm("tiny-deepseek: 16 experts of inner size 48, 4 chosen, one shared; the bias balances"),
    "dense, active size": Arm("no experts; as many weights as a token of the base uses", _dense(True)),
    "dense, total size": Arm("no experts; as many weights as the base has, all of them used", _dense(False)),
    "16 experts, top 2": Arm(
        "the article's: two large ones chosen, none shared; as many weights used as in the base",
        {"num_experts_per_tok": 2, "n_shared_experts": 0, "moe_intermediate_size": 120},
    ),
    "frozen router": Arm("the router keeps its first, random weights; only the bias moves", frozen_router=True),
    "auxiliary loss": Arm("a Switch loss of weight 0.01 balances, and no bias", switch=0.01),
    "two tokens": Arm("the base and a module that predicts one token more, for one row in four", prediction=True),
}


class Alone(Whole):
    """A decoder without a prediction module, ``switch``: that loss, not the sequence-wise."""

    def __init__(self, config: SparseConfig, switch: float = 0.0):
        nn.Module.__init__(self)
        self.decoder, self.config, self.prediction, self.switch = build(config), config, None, switch

    def losses(self, rows, predicted=None, run=None, head_loss=None) -> Losses:
        states = self.states(rows[:, :-2], run) if run else self.states(rows[:, :-2])
        loss = (head_loss or self.cross_entropy)(states, rows[:, 1:-1])
        nothing = torch.zeros((), device=loss.device)
        if not any(True for _ in moe_layers(self)):
            return Losses(loss, nothing, nothing)
        kind = {"switch": self.switch} if self.switch else {"sequence": 1.0}
        return Losses(loss, nothing, total_balance_loss(self.decoder, batch_size=len(rows), **kind))


def make(arm: str, seed: int, **changes: Any) -> Whole:
    """The arm's model. Weights are drawn by name and shape, so that arms share what they have in common."""
    one_of(ARMS, arm=arm)
    kind = ARMS[arm]
    config = tiny_deepseek(**kind.changes | changes)
    model = Whole(config) if kind.prediction else Alone(config, kind.switch)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            drawn = zlib.crc32(f"{seed} {name} {tuple(weight.shape)}".encode())
            nn.init.normal_(weight, std=0.02, generator=torch.Generator().manual_seed(drawn))
    if kind.frozen_router:
        for layer in moe_layers(model):
            layer.router.weight.requires_grad_(False)
    return model.to(best_device())


def _plan(kind: Arm, seed: int, rate: float, tokens: int, length: int) -> Plan:
    """``rate`` is Muon's; that of AdamW, for the rest, is 3/8 of it, as in :class:`Plan`."""
    return Plan(
        steps=LEVEL, tokens=tokens, length=length, late_length=length, seed=seed, matrix_rate=rate,
        other_rate=rate * Plan.other_rate / Plan.matrix_rate, bias_speed=0.0 if kind.switch else Plan.bias_speed,
        balance_weight=1.0 if kind.switch else Plan.balance_weight,
    )  # fmt: skip


class Average:
    """A running average of a model's weights, over about 25 steps; all steps so far while they are few.

    It stands in for the fall of the learning rate at the end of a run: both average out the last steps' noise.
    """

    def __init__(self, model: nn.Module):
        self.weights = list(model.parameters())
        self.average = [weight.detach().clone() for weight in self.weights]
        self.steps = 0

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        torch._foreach_lerp_(self.average, [weight.detach() for weight in self.weights], max(0.04, 1 / self.steps))

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The model with these weights; afterwards it has its own again."""
        own = [weight.data for weight in self.weights]
        for weight, average in zip(self.weights, self.average, strict=True):
            weight.data = average
        try:
            yield
        finally:
            for weight, data in zip(self.weights, own, strict=True):
                weight.data = data


def run(
    arm: str = BASE, seed: int = 0, rate: float = 8e-3, steps: int = 480, tokens: int = 2048, length: int = 256,
    every: int = 40, windows: int = WINDOWS, precision: str = "bfloat16", compiled: bool | None = None,
    changes: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One run of an arm; ``rate`` as in :func:`_plan`.

    Returns ``rows``, one every so many steps and one at the end: ``tokens``, ``flops`` (counted), ``bits`` a byte on
    the windows of validation text, of the averaged weights, and ``busiest``, the load of the busiest expert over the
    mean; ``parameters``.
    """
    one_of(ARMS, arm=arm)
    whole(1, steps=steps, every=every, windows=windows)
    above(0, rate=rate)
    text, size = corpus.token_stream("train")
    model, plan = make(arm, seed, **changes or {}), _plan(ARMS[arm], seed, rate, tokens, length)
    held = torch.from_numpy(corpus.token_stream("validation")[0].astype("int64"))
    held, sizes = slices(held, min(WINDOW, length + 1), windows), byte_lengths(corpus.tokenizer())
    work, rows, average = training_flops(model, plan) * tokens, [], Average(model)

    def told(at: Progress) -> bool:
        average.step()
        if at.step % every == 0 or at.step == steps:
            with average():
                bits = bits_per_byte(model, held, sizes)
            rows.append({"tokens": at.step * tokens, "flops": at.step * work, "bits": bits, "busiest": at.busiest})
        return at.step == steps

    pretrain(model, text, size / len(text), plan, precision=precision, compiled=compiled, on_progress=told)
    return {"rows": rows, "parameters": count_parameters(model)}


def token_seconds(
    arms: Sequence[str] = tuple(ARMS), rounds: int = len(ARMS), steps: int = 4, tokens: int = 2048, length: int = 256,
    precision: str = "bfloat16", compiled: bool | None = None, changes: dict[str, Any] | None = None,
) -> dict[str, list[float]]:  # fmt: skip
    """Seconds of training a token, optimisers included, for each arm: one a round, in which each arm has its turn.

    Another arm begins each round, so that in as many rounds as there are arms each has had every place once.
    """
    whole(1, rounds=rounds, steps=steps)
    models = {arm: make(arm, 0, **changes or {}) for arm in arms}
    text, size = corpus.token_stream("train")

    def timed(arm: str, model: Whole) -> float:
        watch, laps = stopwatch(), []

        def told(at: Progress) -> bool:
            laps.append(watch.lap())
            return at.step > steps  # the first step is not counted

        plan = _plan(ARMS[arm], 0, 8e-3, tokens, length)
        pretrain(model, text, size / len(text), plan, precision=precision, compiled=compiled, on_progress=told)
        return (laps[-1] - laps[0]) / (steps * tokens)

    with torch._dynamo.config.patch(recompile_limit=64):  # to the compiler every arm is another function
        turns, order = [], list(models)
        for _ in range(rounds + 1):
            turns.append({arm: timed(arm, models[arm]) for arm in order})
            order = order[1:] + order[:1]
    return {arm: [turn[arm] for turn in turns[1:]] for arm in models}  # the first compiles


@cache
def token_flops(arm: str, tokens: int = 2048, length: int = 256) -> dict[str, float]:
    """Operations a token in training: of the ``model``, forward and backward, and of the ``optimizer``'s products.

    Those are done once a step for every expert, chosen or not; ``tokens`` of a step share them.
    """
    model = make(arm, 0)
    used = training_flops(model, _plan(ARMS[arm], 0, 8e-3, tokens, length))
    return {"model": used, "optimizer": orthogonalising_flops(matrices_and_rest(model)[0]) / tokens}


def recorded_runs(*arms: str) -> dict[str, list[dict[str, Any]]]:
    """The recorded runs that count, by arm, of those seeds of which each of these arms has one.

    Their ``flops`` are all of :func:`token_flops`; :func:`run` counts those of the model.
    """
    found = {arm: [recordings.recorded(run, arm=arm, seed=seed, **LONG) for seed in range(5)] for arm in arms}
    there = [seed for seed in range(5) if all(found[arm][seed] for arm in arms)]
    each = {arm: sum(token_flops(arm).values()) for arm in arms}
    return {arm: [_with("flops", found[arm][seed].result, each[arm]) for seed in there] for arm in arms}


def with_seconds(made: dict[str, Any], a_token: float) -> dict[str, Any]:
    """A run whose rows also have ``seconds``, at so many a token."""
    return _with("seconds", made, a_token)


def _with(cut: str, made: dict[str, Any], a_token: float) -> dict[str, Any]:
    return made | {"rows": [row | {cut: row["tokens"] * a_token} for row in made["rows"]]}


def bits_at(made: dict[str, Any], cut: str, value: float) -> float:
    """Bits a byte of a run when it had used so many tokens, FLOPs or seconds, between two rows along a line.

    Raises ValueError for another cut, or a value that the run does not reach, or reached before its first row.
    """
    one_of(CUTS, cut=cut)
    at = [row[cut] for row in made["rows"]]
    if not at[0] <= value <= at[-1] * (1 + 1e-9):
        raise ValueError(f"value: got {value:g} {cut}, expected {at[0]:g} to {at[-1]:g}, which the run covers")
    return float(np.interp(value, at, [row["bits"] for row in made["rows"]]))


def difference(arm: Sequence[dict], base: Sequence[dict], cut: str) -> Mean:
    """Bits a byte of ``arm`` less those of ``base``, paired run by run, at what both of a pair have used at the end.

    Mean and 95 % interval over the pairs (Student's t). Above 0: the arm is worse.
    """
    pairs = list(zip(arm, base, strict=True))
    ends = [min(one["rows"][-1][cut] for one in pair) for pair in pairs]
    return mean_interval([bits_at(a, cut, end) - bits_at(b, cut, end) for (a, b), end in zip(pairs, ends, strict=True)])


def saving(arm: Sequence[dict], base: Sequence[dict], cut: str = "flops") -> Mean | None:
    """Share of the FLOPs of ``arm``, or of another ``cut``, that ``base`` does without for the last bits of ``arm``.

    Mean and 95 % interval over the pairs; None if ``base`` never comes there in one of them.
    """
    one_of(CUTS, cut=cut)
    ends = [made["rows"][-1] for made in arm]
    if any(_least(other) > end["bits"] for end, other in zip(ends, base, strict=True)):
        return None
    pairs = zip(ends, base, strict=True)
    return mean_interval([1 - _needed(other, cut, end["bits"]) / end[cut] for end, other in pairs])


def level_pace(arm: Sequence[dict], base: Sequence[dict]) -> Mean:
    """Seconds a token of ``arm``, over those of ``base``, at which the two are level at equal seconds.

    An arm that is slower than that is worse. Mean and 95 % interval over the pairs.
    """
    ratios = []
    for one, other in zip(arm, base, strict=True):
        level = max(_least(one), _least(other))  # the lowest bits that both come to
        ratios.append(_needed(other, "tokens", level) / _needed(one, "tokens", level))
    return mean_interval(ratios)


def _least(made: dict[str, Any]) -> float:
    return min(row["bits"] for row in made["rows"])


def _needed(made: dict[str, Any], cut: str, bits: float) -> float:
    """How much of a cut a run had used when it first came down to these bits."""
    fallen = np.maximum.accumulate([-row["bits"] for row in made["rows"]])
    return float(np.interp(-bits, fallen, [row[cut] for row in made["rows"]]))
