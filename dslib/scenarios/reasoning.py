"""How a model learns to reason: rewards for answers, a teacher's answers, a teacher's probabilities.

A model of the right kind is asked each of P questions G times, and every answer gets a reward R. What is better than
its own group's mean becomes likelier, token by token, and what is worse becomes rarer (GRPO)::

    A_i  = (R_i - mean of its group) / deviation of its group      (P, G), one for all tokens of an answer
    r_it = pi(token) / pi_old(token)                               how far the policy has moved since it answered
    loss = - mean over i of mean over t of  min(r A, clip(r, 1 - eps, 1 + eps) A)  -  beta KL

``pi_old`` wrote the answers. The KL term holds the policy near a reference; of a drawn token it is estimated as
``k = pi_ref/pi - log(pi_ref/pi) - 1``, whose *gradient* is that of the other divergence, KL(ref || pi), unless k is
weighed by r. Where a teacher exists, there is more to learn from than one number an answer: its answers
(:func:`dslib.performance.training.next_token_loss`), or all its probabilities at each token of the student's own
(:func:`distillation_loss`).

Shapes: P questions, G answers to each, B = P G answers, T tokens of an answer, V vocabulary.

Book: ``chapters/scenarios/reasoning.ipynb``. Sources: DeepSeekMath (arXiv 2402.03300, section 4.1) for GRPO, Dr. GRPO
(arXiv 2503.20783) for leaving out the deviation, DeepSeek-V3.2 (arXiv 2512.02556, section 3.1) for ``unbiased``,
``off_policy`` and the kept sampling mask, on-policy distillation after Agarwal et al. (arXiv 2306.13649).
"""

import copy
import itertools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dslib.architecture.decoder import Decoder
from dslib.architecture.generation import Sampling, decode_loop
from dslib.check import above, at_least, whole


def advantages(rewards: Tensor, scaled: bool = True) -> Tensor:
    """(P, G) rewards -> (P, G): how much better each answer is than its group, in deviations of the group if scaled.

    The deviation divides by G - 1, and 1e-4 is added to it, as in TRL. A group of equal rewards has advantages of zero;
    if all groups are so, there is nothing to learn from, and a UserWarning says it. Raises ValueError for a group of
    one, which is its own mean, and for rewards that are not finite.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards: got shape {tuple(rewards.shape)}, expected (questions, answers), two answers or more"
        )
    _finite("rewards", rewards)
    if not tells(rewards).any():
        warnings.warn("rewards: equal within every group, so all advantages are 0 and no gradient comes", stacklevel=2)
    better = rewards - rewards.mean(1, keepdim=True)
    return better / (rewards.std(1, keepdim=True) + 1e-4) if scaled else better


def tells(rewards: Tensor) -> Tensor:
    """(P, G) rewards -> bool (P,): the groups with different rewards, which alone have a gradient."""
    return rewards.amax(1) > rewards.amin(1)


def grpo_loss(
    new: Tensor, old: Tensor, advantage: Tensor, mask: Tensor, *, clip: float = 0.2, reference: Tensor | None = None,
    beta: float = 0.0, unbiased: bool = False, off_policy: float | None = None,
) -> Tensor:  # fmt: skip
    """The loss of B answers, a scalar.

    Args:
        new, old: (B, T) log-probabilities of the drawn tokens, by the policy now and when it wrote them.
        advantage: (B,). mask: bool (B, T), the tokens of each answer, its end included.
        clip: the ratio counts up to 1 + clip for good answers and down to 1 - clip for bad ones.
        reference: (B, T) log-probabilities by the reference, for a KL term with the weight ``beta``.
        unbiased: weigh that term by the ratio, so that its gradient is that of KL(pi || reference) (V3.2).
        off_policy: leave out answers with a negative advantage whose mean log(old / new) is above it (V3.2).

    Raises:
        ValueError: shapes that differ, a token whose ratio is not finite (names the answers), an answer without a
            token, ``beta`` without a reference.
    """
    at_least(0, clip=clip, beta=beta)
    _shapes(new, old=old, mask=mask, **({} if reference is None else {"reference": reference}))
    if tuple(advantage.shape) != (len(new),):
        raise ValueError(f"advantage: got shape {tuple(advantage.shape)}, expected ({len(new)},), one for each answer")
    if (beta > 0) != (reference is not None):
        raise ValueError(f"reference: got {'one' if beta == 0 else 'None'} with beta={beta}, expected both or neither")
    gap = (new - old).masked_fill(~mask, 0.0)  # what stands behind an end counts nowhere, whatever it is
    ratio = gap.exp()  # (B, T)
    _finite("ratio", ratio)
    signal = advantage.unsqueeze(1)  # (B, 1)
    loss = -torch.minimum(ratio * signal, ratio.clamp(1 - clip, 1 + clip) * signal)
    if off_policy is not None:
        drift = -per_answer(gap.detach(), mask)  # (B,), how much rarer the policy now finds its own answer
        loss = loss * ((advantage >= 0) | (drift <= off_policy)).unsqueeze(1)
    if reference is not None:
        away = (reference - new).masked_fill(~mask, 0.0)
        loss = loss + beta * (away.exp() - away - 1) * (ratio if unbiased else 1)
    return per_answer(loss, mask).mean()


def per_answer(values: Tensor, mask: Tensor) -> Tensor:
    """(B, T) -> (B,): the mean over the tokens of each answer. Raises ValueError for an answer without any."""
    counts = mask.sum(1)
    if (counts == 0).any():
        raise ValueError(f"mask: no token of answers {_rows(counts == 0)} counts, expected one at least")
    return (values * mask).sum(1) / counts


def distillation_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """KL(student || teacher) over the whole vocabulary, mean over the tokens that count: two (B, T, V) logits, (B, T).

    The reverse divergence: it punishes what the teacher would not say. On the student's own answers that is on-policy
    distillation, as DeepSeek-V4 ends its training.
    """
    _shapes(student, teacher=teacher)
    _shapes(student[..., 0], mask=mask)
    mine, wanted = student.float().log_softmax(-1), teacher.float().log_softmax(-1).detach()
    return ((mine.exp() * (mine - wanted)).sum(-1) * mask).sum() / mask.sum()


# ---------------------------------------------------------------- answers, and the loop


class Answers(NamedTuple):
    """``ids`` int64 (B, T) and ``mask`` bool (B, T): the tokens of each answer up to its end, behind which ids repeat
    the end. ``kept`` bool (B, T, V): which tokens could be drawn, where a rule left some out."""

    ids: Tensor
    mask: Tensor
    kept: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """(B,), the end included."""
        return self.mask.sum(1)


@torch.no_grad()
def sample(
    model: Decoder, questions: Tensor, end: int, max_new_tokens: int, sampling: Sampling, generator: torch.Generator
) -> Answers:
    """An answer to each of (B, Q) questions of equal length, drawn until ``end`` or for so many tokens."""
    whole(1, max_new_tokens=max_new_tokens)
    above(0, temperature=sampling.temperature)
    rows, kept = len(questions), []

    def choose(logits: Tensor, count: int) -> Tensor:
        shares = sampling.probabilities(logits)
        kept.append(shares > 0)
        return torch.multinomial(shares, 1, generator=generator).squeeze(1)

    cache = model.make_cache("preallocated", batch_size=rows, max_length=questions.shape[1] + max_new_tokens)
    last = torch.full((rows,), questions.shape[1] - 1, device=questions.device)
    going, ids, mask = torch.ones_like(last, dtype=torch.bool), [], []
    for token in itertools.islice(decode_loop(model, questions, cache, choose, last), max_new_tokens):
        mask.append(going)
        ids.append(torch.where(going, token, end))
        going = going & (token != end)
        if not going.any():
            break
    limits = sampling.top_k is not None or sampling.top_p is not None or sampling.min_p is not None
    allowed = torch.stack(kept[: len(ids)], 1) if limits else None
    return Answers(torch.stack(ids, 1), torch.stack(mask, 1), allowed)


def answer_logits(model: nn.Module, questions: Tensor, answers: Answers) -> Tensor:
    """(B, T, V) logits, from which each token of the answers was to be foretold."""
    return model(torch.cat((questions, answers.ids[:, :-1]), 1))[:, questions.shape[1] - 1 :]


def log_probs(logits: Tensor, answers: Answers, keep: bool = False) -> Tensor:
    """(B, T, V) -> (B, T), of the answers' tokens; ``keep`` shares out among the tokens that could be drawn only."""
    logits = logits.float()
    if keep and answers.kept is not None:
        logits = logits.masked_fill(~answers.kept & answers.mask.unsqueeze(2), -torch.inf)
    return logits.log_softmax(-1).gather(2, answers.ids.unsqueeze(2)).squeeze(2)


class GrpoStep(NamedTuple):
    """What ``on_step`` is told: means over the answers of a step, before it is learned from."""

    number: int
    reward: float
    length: float  # tokens, the end included
    telling: float  # share of groups with different rewards
    ratio: float  # mean |log ratio| in the last update: how far off its own answers the policy has gone


def grpo(
    model: Decoder, ask: Callable[[torch.Generator], Tensor], reward: Callable[[Tensor, Answers], Tensor], *, end: int,
    max_new_tokens: int, steps: int, group: int = 16, updates: int = 1, learning_rate: float = 3e-4, seed: int = 0,
    sampling: Sampling | None = None, keep: bool = False, scaled: bool = True, beta: float = 0.0,
    on_step: Callable[[GrpoStep], None] | None = None, **rule,
) -> None:  # fmt: skip
    """Train ``model`` in place by GRPO, with AdamW at a level rate and gradients cut to a norm of 1.

    Args:
        ask: (P, Q) questions of equal length, other ones at each call.
        reward: called with (B, Q) questions and their answers -> (B,) rewards.
        group: answers to a question. updates: steps of the optimiser on the same answers.
        sampling: how answers are drawn; at temperature 1 by default.
        keep: share out probability among the tokens that ``sampling`` left, now as then (V3.2's sampling mask).
        scaled: as for :func:`advantages`. rule: ``clip``, ``unbiased`` and ``off_policy`` of :func:`grpo_loss`.
    """
    whole(1, steps=steps, updates=updates)
    whole(2, group=group)
    above(0, learning_rate=learning_rate)
    sampling = sampling or Sampling(temperature=1.0)
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    reference = copy.deepcopy(model).requires_grad_(False) if beta else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    for number in range(steps):
        questions = ask(generator).repeat_interleave(group, 0)  # (B, Q)
        answers = sample(model, questions, end, max_new_tokens, sampling, generator)
        rewards = reward(questions, answers).float().view(-1, group)  # (P, G)
        telling, moved = tells(rewards).float().mean().item(), 0.0
        if telling or beta:  # else there is nothing to learn from
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore", UserWarning)  # ``telling`` says it
                advantage = advantages(rewards, scaled).flatten()
                old = log_probs(answer_logits(model, questions, answers), answers, keep)
                held = log_probs(answer_logits(reference, questions, answers), answers, keep) if beta else None
            for _ in range(updates):
                new = log_probs(answer_logits(model, questions, answers), answers, keep)
                loss = grpo_loss(new, old, advantage, answers.mask, beta=beta, reference=held, **rule)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            moved = per_answer((new - old).detach().abs(), answers.mask).mean().item()
        if on_step is not None:
            lengths = answers.lengths.float().mean().item()
            on_step(GrpoStep(number, rewards.mean().item(), lengths, telling, moved))


def _shapes(first: Tensor, **others: Tensor) -> None:
    for name, other in others.items():
        if other.shape != first.shape:
            raise ValueError(f"{name}: got shape {tuple(other.shape)}, expected {tuple(first.shape)}")


def _finite(name: str, values: Tensor) -> None:
    bad = ~values.isfinite().all(1)
    if bad.any():
        raise ValueError(f"{name}: not a number or infinite in rows {_rows(bad)}, expected finite numbers")


def _rows(bad: Tensor) -> list[int]:
    return bad.nonzero().flatten().tolist()
