"""Speculative decoding: cheap guesses, checked by the model several at a time, without any change to what comes out.

Feeding five tokens reads every weight once, as feeding one does, so *checking* four guesses costs hardly more than
making one token. A draft guesses, the model looks at all guesses in one pass, and as many stay as it would have made
itself.

* Greedy: a guess stays if it is the model's own choice. The text is the one that greedy decoding gives.
* Sampling: a guess with probability q under the draft and p under the model stays with probability ``min(1, p / q)``;
  instead of the first that does not, a token is drawn from what is left, ``max(0, p - q)`` made to sum to one. Every
  token then has exactly the model's distribution.

"Exactly" is meant up to rounding: a pass over five tokens adds in another order than five passes over one, so two
tokens that are equally likely to the last digit may change places.

Book: ``chapters/performance/speculation.ipynb``. Sources: Leviathan et al. (arXiv 2211.17192, section 2), Chen et al.
(arXiv 2302.01318) for the rule; LayerSkip (arXiv 2404.16710) for drafts from a model's own layers; looking guesses up
in the text is known as prompt lookup.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from dslib import check
from dslib.architecture.cache import KVCache
from dslib.architecture.decoder import Decoder, with_blocks
from dslib.architecture.generation import Sampling, inference
from dslib.architecture.whole import Whole
from dslib.data.prompts import checked_prompts, end_tokens


def accept(
    probabilities: Tensor, guesses: Sequence[int], drawn_from: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> list[int]:  # fmt: skip
    """Which guesses stay, and the token after them, so that each has exactly the model's distribution.

    Args:
        probabilities: (K + 1, vocab_size), the model's, for each of K guesses and for the token behind them.
        guesses: K token ids. drawn_from: (K, vocab_size), the draft's; None for guesses that were certain.

    Returns 1 to K + 1 tokens. Raises ValueError for shapes that do not fit.
    """
    rows, count = len(probabilities), len(guesses)
    if rows != count + 1 or (drawn_from is not None and drawn_from.shape != (count, probabilities.shape[-1])):
        drawn = None if drawn_from is None else tuple(drawn_from.shape)
        raise ValueError(f"probabilities: got {rows} rows for {count} guesses drawn from {drawn}, expected one more")
    for place, guess in enumerate(guesses):
        p = probabilities[place]
        q = None if drawn_from is None else drawn_from[place]
        chance = p[guess] if q is None else p[guess] / q[guess]
        if torch.rand((), generator=generator, device=p.device, dtype=torch.float32) < chance:
            continue
        left = p.clone()
        if q is None:
            left[guess] = 0
        else:
            left = (left - q).clamp_(min=0)
            left = left if left.any() else p  # equal but for the last digit
        return [*guesses[:place], int(torch.multinomial(left, 1, generator=generator))]
    return [*guesses, int(torch.multinomial(probabilities[-1], 1, generator=generator))]


class Draft(Protocol):
    """Whatever guesses how a text goes on."""

    def propose(self, text: Sequence[int], count: int) -> tuple[list[int], Tensor | None]:
        """At most ``count`` guesses, and the distributions (guesses, vocab_size) they were drawn from.

        None instead of distributions means that the guesses were certain: drawn with probability 1.
        """


@dataclass
class Speculation:
    """A text and what it took."""

    tokens: list[int] = field(default_factory=list)  # the new ones
    passes: int = 0  # forward passes of the model, the prompt's not counted
    proposed: int = 0  # guesses made
    accepted: int = 0  # those that stayed

    @property
    def acceptance(self) -> float:
        """Accepted over proposed. With more than one guess a pass it is below the chance of each (see the page)."""
        return self.accepted / self.proposed if self.proposed else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """Tokens for each time the weights were read; 1 without speculation. The first token is the prompt's."""
        return (len(self.tokens) - 1) / self.passes if self.passes else 1.0


@torch.inference_mode()
def speculate(
    model: Decoder, prompt: Sequence[int] | Tensor, max_new_tokens: int, draft: Draft, count: int = 4, *,
    sampling: Sampling | None = None, seed: int = 0, eos_token_id: int | Collection[int] | Tensor | None = None,
) -> Speculation:  # fmt: skip
    """Continue one prompt, with at most ``count`` guesses a pass.

    ``sampling`` None is greedy: the same tokens as :func:`~dslib.architecture.generation.generate`. ``eos_token_id`` is
    the id or ids that end the text.

    Raises:
        ValueError: an empty prompt, an id outside the vocabulary, ``max_new_tokens`` or ``count`` below 1, prompt and
            new tokens together longer than ``max_position_embeddings`` (unless the model has a window), a draft with
            another vocabulary, logits that are not a number.
    """
    check.whole(1, max_new_tokens=max_new_tokens, count=count)
    [text], result = checked_prompts(model.config, [prompt], max_new_tokens, 0), Speculation()
    ends = end_tokens(eos_token_id, model.config.vocab_size)
    sampling = sampling or Sampling()
    generator = torch.Generator(model.embed_tokens.weight.device).manual_seed(seed)
    cache = model.make_cache("preallocated", batch_size=1, max_length=len(text) + max_new_tokens)

    def kept(logits: Tensor, guesses: list[int], drawn_from: Tensor | None) -> list[int]:
        if sampling.temperature == 0:
            own = sampling.choose(logits).tolist()
            stay = next((i for i, guess in enumerate(guesses) if guess != own[i]), len(guesses))
            return own[: stay + 1]
        return accept(sampling.probabilities(logits), guesses, drawn_from, generator)

    new = kept(feed(model, text, cache)[-1:], [], None)
    while True:
        for token in new:
            text.append(token)
            result.tokens.append(token)
            if token in ends or len(result.tokens) == max_new_tokens:
                return result
        wanted = min(count, max_new_tokens - len(result.tokens) - 1)  # the pass itself gives one more
        guesses, drawn_from = draft.propose(text, wanted) if wanted else ([], None)
        if any(not 0 <= guess < model.config.vocab_size for guess in guesses):
            raise ValueError(f"draft: guessed {guesses}, expected ids below {model.config.vocab_size}")
        new = kept(feed(model, [text[-1], *guesses], cache), guesses, drawn_from)
        cache.truncate(len(text) + len(new) - 1)  # what was fed and stayed; the last new token was not fed yet
        result.passes += 1
        result.proposed += len(guesses)
        result.accepted += len(new) - 1


def feed(model: Decoder, tokens: Sequence[int], cache: KVCache) -> Tensor:
    """Logits after each of the new tokens, (tokens, vocab_size). Raises ValueError where none is the largest."""
    with inference(model):
        logits = model(torch.tensor([list(tokens)], device=model.embed_tokens.weight.device), cache)[0]
    if not logits.amax(-1).isfinite().all():  # NaN counts as the largest
        after = f"after tokens {list(tokens)[-5:]}"
        raise ValueError(f"logits: the largest is not a number, or infinite, {after}, expected a finite one")
    return logits


class PromptLookup:
    """Guess that the text repeats itself: what followed the last few tokens when they came before? Costs nothing.

    ``longest`` and ``shortest`` say how many of the last tokens have to be the same; the longest match that is found
    counts, and of several places the latest.
    """

    def __init__(self, longest: int = 3, shortest: int = 1):
        check.whole(1, longest=longest, shortest=shortest)
        check.between(1, longest, shortest=shortest)
        self.longest, self.shortest = longest, shortest

    def propose(self, text, count):
        text = list(text)
        for size in range(min(self.longest, len(text) - 1), self.shortest - 1, -1):
            last = text[-size:]
            for start in range(len(text) - size - 1, -1, -1):
                if text[start : start + size] == last:
                    return text[start + size : start + size + count], None
        return [], None


class ModelDraft:
    """Guesses of a smaller, or coarser, model with the same vocabulary. It keeps a cache of its own.

    ``max_length`` is that of the longest text, guesses included. ``sampling`` says how it draws; greedy guesses (None,
    or temperature 0) count as certain.
    """

    def __init__(self, model: Decoder, max_length: int, sampling: Sampling | None = None, seed: int = 0):
        self.model, self.sampling = model, sampling or Sampling()
        self.cache = model.make_cache("preallocated", batch_size=1, max_length=max_length)
        self.held: list[int] = []  # the tokens that the cache stands for
        self.generator = torch.Generator(model.embed_tokens.weight.device).manual_seed(seed)

    @torch.inference_mode()
    def propose(self, text, count):
        text = list(text)
        # Back to where the text and what was fed agree; the last token has to be fed in any case.
        same = next((i for i, (a, b) in enumerate(zip(text, self.held, strict=False)) if a != b), len(self.held))
        self.cache.truncate(min(same, len(text) - 1))
        logits = feed(self.model, text[self.cache.length :], self.cache)[-1:]  # (1, V)
        guesses, drawn_from = [], []
        while True:
            if self.sampling.temperature == 0:
                guesses.append(int(self.sampling.choose(logits)))
            else:
                drawn_from.append(self.sampling.probabilities(logits))
                guesses.append(int(torch.multinomial(drawn_from[-1], 1, generator=self.generator)))
            if len(guesses) == count:
                break
            logits = feed(self.model, guesses[-1:], self.cache)
        self.held = (text + guesses)[: self.cache.length]
        return guesses, torch.cat(drawn_from) if drawn_from else None


class PredictionDraft:
    """Guesses of a model's own module for multi-token prediction, from the states that the model has just computed.

    The module was trained to predict one token beyond the model's. For further guesses it is run again, on its own
    state and guess. Greedy. While it is in use, it listens to the model's last norm: :meth:`close` ends that.

    Args:
        model: what is given to :func:`speculate` is its ``decoder``. max_length: as of :class:`ModelDraft`.
    """

    def __init__(self, model: Whole, max_length: int):
        alone = with_blocks(model.decoder, [model.prediction.block], [model.config.num_hidden_layers])
        self.model, self.cache = model, alone.make_cache(max_length=max_length)  # of the module's own block
        self._listener = model.decoder.norm.register_forward_hook(self._listen)

    def _listen(self, norm: nn.Module, inputs: tuple[Tensor], states: Tensor) -> None:
        self.states = states  # (1, tokens of the last pass, C)

    def close(self) -> None:
        self._listener.remove()

    @torch.inference_mode()
    def propose(self, text, count):
        decoder, module, held = self.model.decoder, self.model.prediction, self.cache.length
        # The module has seen `held` pairs (state, next token); the last pass began there. Its states of guesses that
        # did not stay are left out.
        ids = torch.tensor([list(text)[held + 1 :]], device=decoder.embed_tokens.weight.device)
        states, guesses = self.states[:, : ids.shape[1]], []
        while True:
            states = module(decoder, states, ids, self.cache)[:, -1:]  # (1, 1, C)
            ids = decoder.lm_head(states).argmax(-1)  # (1, 1)
            guesses.append(int(ids))
            if len(guesses) == count:
                break
        self.cache.truncate(len(text) - 1)
        return guesses, None


def expected_gain(acceptance: float, count: int, draft_cost: float, pass_cost: float = 1.0) -> float:
    """How many times as fast as plain decoding, if each guess stays with the same chance (Leviathan, theorem 3.8).

    ``acceptance`` is that chance, for a guess behind none that failed; it is not accepted over proposed. ``draft_cost``
    is the time of one guess, ``pass_cost`` that of a checking pass, both in times of one plain step.
    """
    check.between(0, 1, acceptance=acceptance)
    check.whole(0, count=count)
    check.at_least(0, draft_cost=draft_cost)
    check.above(0, pass_cost=pass_cost)
    tokens = sum(acceptance**power for power in range(count + 1))
    return tokens / (count * draft_cost + pass_cost)
