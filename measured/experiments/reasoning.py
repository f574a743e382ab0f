"""From a model that guesses to one that works it out: supervised, by rewards, and from a teacher.

The task: the last digit of a sum of digits. Whoever leaves out one digit knows nothing (the other digits shift every
result alike), so a guess is right one time in ten, whatever it looks at. A model may answer at once, or *think*: write
the running sum after each digit, the last of which is the answer. Both have the same form, ``[think …] digit, end``.

Each run starts from nothing: a DeepSeek of 0.19 million parameters is taught to work sums out, and then tuned on
answers nine in ten of which are short. It can think, and rarely does. What follows changes that, or does not.

Recorded by ``make record PART=reasoning-0`` (to 4), and ``PART=reasoning-…`` with ``cures``, ``apart`` (rate, reuse),
``split`` (old answers, each used once) and ``again``. Book: ``chapters/scenarios/reasoning.ipynb``.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from dslib.architecture.decoder import build, count_parameters
from dslib.architecture.generation import Sampling
from dslib.architecture.sparse_decoder import SparseConfig, SparseDecoder
from dslib.check import one_of, whole
from dslib.performance.muon import Muon, Optimizers, matrices_and_rest
from dslib.performance.training import IGNORED, fit, next_token_loss
from dslib.scenarios.reasoning import (
    Answers,
    GrpoStep,
    advantages,
    answer_logits,
    distillation_loss,
    grpo,
    grpo_loss,
    log_probs,
    per_answer,
    sample,
    tells,
)

EQUALS, THINK, END = 10, 11, 12  # 0 to 9 are the digits
DIGITS, LIMIT = 6, 10  # of a question; tokens of an answer: think, six sums and the end are eight


def questions(count: int, generator: torch.Generator, digits: int = DIGITS) -> Tensor:
    """``count`` questions as ids, (B, digits + 1): the digits, then ``=``."""
    drawn = torch.randint(10, (count, digits), generator=generator)
    return torch.cat((drawn, torch.full((count, 1), EQUALS)), 1)


def running(asked: Tensor) -> Tensor:
    """(B, digits + 1) questions -> (B, digits): the last digit of the sum after each digit."""
    return asked[:, :-1].cumsum(1) % 10


def written(asked: Tensor, worked: Tensor) -> tuple[Tensor, Tensor]:
    """Questions with right answers, worked out where bool (B,) ``worked`` says so: inputs and targets, (B, T) each.

    Targets are -100 over the question and behind the end: only the answer is learned.
    """
    count, sums = len(asked), running(asked)
    answer = torch.full((count, sums.shape[1] + 2), IGNORED)
    answer[worked] = torch.cat((torch.full((count, 1), THINK), sums, torch.full((count, 1), END)), 1)[worked]
    answer[~worked, 0], answer[~worked, 1] = sums[~worked, -1], END
    ids = torch.cat((asked, answer.clamp(min=0)), 1)
    targets = torch.cat((torch.full_like(asked, IGNORED), answer), 1)
    return ids[:, :-1], targets[:, 1:]


def results(answers: Answers) -> Tensor:
    """(B,): the digit before the end of each answer, -1 where there is none or no end came."""
    last = answers.lengths - 1
    ended = answers.ids.gather(1, last.unsqueeze(1)).squeeze(1) == END
    before = answers.ids.gather(1, (last - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
    return torch.where(ended & (last > 0) & (before < 10), before, -1)


def right(asked: Tensor, answers: Answers) -> Tensor:
    """The reward: 1 for an answer that ends with the right digit, else 0; (B,)."""
    return (results(answers) == running(asked)[:, -1]).float()


def shape(hidden_size: int = 64, layers: int = 3) -> SparseConfig:
    """The architecture of the course's own model, smaller: latent attention, 8 experts and a shared one."""
    return SparseConfig(
        13, hidden_size, 2 * hidden_size, layers, 4, 4, max_position_embeddings=32, tie_word_embeddings=True,
        kv_lora_rank=32, qk_nope_head_dim=8, qk_rope_head_dim=16, v_head_dim=16, first_k_dense_replace=1,
        num_experts=8, num_experts_per_tok=2, moe_intermediate_size=hidden_size // 2, n_shared_experts=1,
        scoring_func="sigmoid", norm_topk_prob=True, selection_bias=True,
    )  # fmt: skip


BATCH, RATE, GENTLE = 128, 2e-2, 5e-4
GROUPS, GROUP = 16, 16  # questions of a step, and answers to each


@cache
def _taught(seed: int, worked: int, short: int, hidden_size: int = 64, layers: int = 3) -> dict[str, Any]:
    """The weights of a model that saw ``worked`` batches of worked sums, and then ``short`` ones of mostly short."""
    generator = torch.Generator().manual_seed(seed)
    model = build(shape(hidden_size, layers), seed=seed)

    def batch(share: float) -> tuple[Tensor, Tensor]:
        asked = questions(BATCH, generator)
        return written(asked, torch.rand(BATCH, generator=generator) < share)

    matrices, rest = matrices_and_rest(model)
    both = Optimizers(Muon(matrices, RATE, 0.01), torch.optim.AdamW(rest, RATE, weight_decay=0.01))
    learn = partial(fit, model, loss=next_token_loss, warmup=0.2)
    if worked:
        learn(lambda step: batch(1.0), steps=worked, learning_rate=RATE, optimizer=both)
    seen = look(model)
    if short:
        learn(lambda step: batch(0.1), steps=short, learning_rate=GENTLE)
    return {"weights": model.state_dict(), "taught": seen, "start": look(model)}


def taught(seed: int, worked: int = 120, short: int = 40, **sizes) -> SparseDecoder:
    """A model that can think and rarely does; with fewer ``worked`` batches, one that thinks and gets nowhere."""
    model = build(shape(**sizes), seed=seed)
    model.load_state_dict(_taught(seed, worked, short, **sizes)["weights"])
    return model


def look(model: SparseDecoder, count: int = 2000, seed: int = 10_000) -> dict[str, Any]:
    """What a model answers to ``count`` questions drawn by a seed of their own, at temperature 1.

    There are a million; training draws about 21,000, so one in fifty has come up before.

    Counts: ``asked``, ``right``, ``thought`` (began with think), ``thought_right``; and ``length``, mean tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    asked = questions(count, generator)
    answers = sample(model, asked, END, LIMIT, Sampling(1.0), generator)
    good, thought = right(asked, answers) > 0, answers.ids[:, 0] == THINK
    counts = {"right": good, "thought": thought, "thought_right": good & thought}
    found = {name: int(which.sum()) for name, which in counts.items()}
    return {"asked": count, **found, "length": round(answers.lengths.float().mean().item(), 3)}


def thinks(asked: Tensor, answers: Answers) -> Tensor:
    """Another reward: 1 for an answer that begins with think, whatever comes of it; (B,)."""
    return (answers.ids[:, 0] == THINK).float()


def _coins(seed: int) -> Callable[[Tensor, Answers], Tensor]:
    generator = torch.Generator().manual_seed(seed + 20_000)
    return lambda asked, answers: torch.randint(2, (len(asked),), generator=generator).float()


STALE = {"updates": 8, "learning_rate": 1e-3}
# What each arm changes. ``worked``: batches of worked sums before; ``reward``: of the seed; the rest goes to grpo.
ARMS: dict[str, dict[str, Any]] = {
    "GRPO": {},
    "knows nothing": {"worked": 40},
    "coins": {"reward": _coins},
    "form only": {"reward": lambda seed: thinks},
    "KL": {"beta": 0.1},
    "stale": STALE,
    "stale, KL": STALE | {"beta": 0.05},
    # V3.2's cures, and leaving the deviation out
    "stale, masked": STALE | {"off_policy": 0.05},
    "stale, KL unbiased": STALE | {"beta": 0.05, "unbiased": True},
    "stale, not scaled": STALE | {"scaled": False},
    "stale, top-p": STALE | {"sampling": Sampling(1.0, top_p=0.9)},
    "stale, top-p kept": STALE | {"sampling": Sampling(1.0, top_p=0.9), "keep": True},
}


def learned(arm: str = "GRPO", seed: int = 0, steps: int = 40, again: int = 0, **changes) -> dict[str, Any]:
    """A start of its own for each seed, then ``steps`` steps of GRPO; ``again`` changes only what GRPO draws.

    Returns ``taught``, ``start`` and ``end`` as :func:`look` has them, and ``rows``, one a step: reward, mean length,
    share of groups that tell, and how far the policy has moved from its own answers.
    """
    one_of(ARMS, arm=arm)
    whole(1, steps=steps)
    options = {"learning_rate": 3e-4, **ARMS[arm], **changes}
    worked, reward = options.pop("worked", 120), options.pop("reward", lambda seed: right)(seed)
    model, rows = taught(seed, worked), []

    def told(step: GrpoStep) -> None:
        rows.append([round(value, 4) for value in step[1:]])

    ask = partial(questions, GROUPS)
    drawn = {"end": END, "max_new_tokens": LIMIT, "steps": steps, "group": GROUP, "seed": 1000 * again + seed}
    grpo(model, ask, reward, on_step=told, **drawn, **options)
    before = {name: _taught(seed, worked, 40)[name] for name in ("taught", "start")}
    return {**before, "end": look(model), "rows": rows}


def split(seed: int = 0, steps: int = 40, parts: int = 8) -> dict[str, Any]:
    """As many updates as *stale* at its rate, on answers as old, each used once; results as of :func:`learned`.

    A rollout asks ``parts`` times as many questions, and each part of its answers makes one update: the last one is
    ``parts - 1`` updates old, and no answer is seen twice.
    """
    whole(1, steps=steps, parts=parts)
    model, generator, rows = taught(seed), torch.Generator().manual_seed(seed), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(steps):
        asked = questions(parts * GROUPS, generator).repeat_interleave(GROUP, 0)  # (B, 7)
        answers = sample(model, asked, END, LIMIT, Sampling(1.0), generator)
        rewards = right(asked, answers).view(-1, GROUP)
        with torch.no_grad():
            old = log_probs(answer_logits(model, asked, answers), answers)
        advantage, moved = advantages(rewards).flatten(), 0.0
        for one in torch.arange(len(asked)).view(parts, -1):
            if not tells(rewards.flatten()[one].view(-1, GROUP)).any():
                continue
            drawn = Answers(answers.ids[one], answers.mask[one])
            new = log_probs(answer_logits(model, asked[one], drawn), drawn)
            optimizer.zero_grad()
            grpo_loss(new, old[one], advantage[one], drawn.mask).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            moved = per_answer((new - old[one]).detach().abs(), drawn.mask).mean().item()
        seen = (rewards.mean().item(), answers.lengths.float().mean().item(), tells(rewards).float().mean().item())
        rows.append([round(value, 4) for value in (*seen, moved)])
    before = {name: _taught(seed, 120, 40)[name] for name in ("taught", "start")}
    return {**before, "end": look(model), "rows": rows}


WAYS = ("teacher's answers", "teacher's probabilities", "rewards")


@cache
def _teacher(seed: int) -> SparseDecoder:
    model = taught(seed)
    grpo(model, partial(questions, GROUPS), right, end=END, max_new_tokens=LIMIT, steps=30, seed=seed)
    return model.requires_grad_(False)


def distilled(way: str = "teacher's answers", seed: int = 0, steps: int = 160, every: int = 20) -> dict[str, Any]:
    """A student of 0.07 million parameters that only ever saw short answers, and a teacher that works sums out.

    It learns from the teacher's right answers, drawn by the teacher; from all the teacher's probabilities on answers of
    its own; or from rewards alone. Returns ``teacher`` and ``start`` as :func:`look` has them, the numbers of
    ``weights``, and ``rows``: answer tokens that the student has learned from so far, and what it then gets right.
    """
    one_of(WAYS, way=way)
    whole(1, steps=steps, every=every)
    generator, sizes = torch.Generator().manual_seed(30_000 + seed), {"hidden_size": 48, "layers": 2}
    student, teacher = taught(seed, 0, 60, **sizes), _teacher(seed)
    found = {"teacher": look(teacher), "start": look(student), "weights": count_parameters(student), "rows": []}
    tokens = 0

    def told(number: int) -> None:
        if (number + 1) % every == 0 or number + 1 == steps:
            seen = look(student)
            found["rows"].append([tokens, seen["right"] / seen["asked"]])

    def count(more: int) -> None:
        nonlocal tokens
        tokens += more

    def rewarded(at: GrpoStep) -> None:
        count(round(at.length * GROUPS * GROUP))
        told(at.number)

    def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
        asked, own = questions(BATCH, generator), way == "teacher's probabilities"
        answers = sample(student if own else teacher, asked, END, LIMIT, Sampling(1.0), generator)
        used = right(asked, answers) > 0 if not own else torch.ones(BATCH, dtype=torch.bool)
        count(int(answers.mask[used].sum()))
        return asked[used], answers.ids[used], answers.mask[used]

    def loss(model: SparseDecoder, asked: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        answers = Answers(ids, mask)
        logits = answer_logits(model, asked, answers)
        if way == "teacher's probabilities":
            return distillation_loss(logits, answer_logits(teacher, asked, answers), mask)
        return -(log_probs(logits, answers) * mask).sum() / mask.sum()

    if way == "rewards":
        drawn = {"end": END, "max_new_tokens": LIMIT, "steps": steps, "group": GROUP, "seed": seed}
        grpo(student, partial(questions, GROUPS), right, learning_rate=1e-3, on_step=rewarded, **drawn)
    else:
        matrices, rest = matrices_and_rest(student)
        both = Optimizers(Muon(matrices, RATE, 0.01), torch.optim.AdamW(rest, RATE, weight_decay=0.01))
        options = {"warmup": 0.1, "learning_rate": RATE, "optimizer": both, "on_step": lambda at: told(at.number)}
        fit(student, batch, steps=steps, loss=loss, **options)
    return found
