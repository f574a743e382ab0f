"""Text from a decoder: greedy or sampled, streamed, one prompt or a batch of different lengths.

``logits = model(prompt, cache)``; then ``token = choose(logits)``, ``logits = model(token, cache)``, again and again.
Prompts of different lengths are padded on the right and decoded with one position per sequence: no token is ever moved,
and nothing has to be un-padded. Shapes: B batch, T new tokens, V vocabulary.

Book: ``chapters/architecture/sampling.ipynb``. Sources: nucleus sampling (arXiv 1904.09751) for ``top_p``, min-p
(arXiv 2407.01082), CTRL (arXiv 1909.05858, section 4.1) for the repetition penalty. Every rule, and their order, is
that of transformers' ``generate``.
"""

import inspect
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dslib.architecture.cache import KVCache
from dslib.architecture.decoder import Decoder, inference
from dslib.architecture.fusion import ImageContext
from dslib.check import above, at_least, between, whole
from dslib.data.prompts import checked_prompts, completes, end_tokens, plain


def decode_loop(
    model: Decoder, ids: Tensor, cache: KVCache, choose: Callable[[Tensor, int], Tensor], last: Tensor,
    positions: Tensor | None = None, **seen,
) -> Iterator[Tensor]:  # fmt: skip
    """The next token of each text, (B,), without end: a pass over the prompts, then one over each new token.

    ``last`` (B,) says where the prompts ``ids`` (B, T) end, and ``choose(logits, count)`` is (B, V) -> (B,).
    """
    with inference(model):  # not around the loop: a generator would leave its modes on in its caller between two tokens
        logits = model(ids, cache, positions, last.unsqueeze(1), **seen)  # (B, 1, V), after each one's last token
        token = choose(logits[:, -1], 1)  # (B,)
    for count in itertools.count(1):
        yield token
        with inference(model):
            where = None if positions is None else (last + count).unsqueeze(1)  # (B, 1)
            logits = model(token.unsqueeze(1), cache, where, **seen)  # (B, 1, V)
            token = choose(logits[:, -1], count + 1)


def generate(
    model: Decoder, prompts: Sequence[Sequence[int]] | Tensor, max_new_tokens: int, *,
    eos_token_id: int | Collection[int] | Tensor | None = None, min_new_tokens: int = 0,
    stop: str | Collection[str] = (), tokenizer: Any = None,
    sampling: "Sampling | None" = None, seed: int | Sequence[int] | None = None,
    cache: str = "preallocated", image: ImageContext | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> "list[Generation]":  # fmt: skip
    """Continue every prompt by up to ``max_new_tokens`` tokens; one result a prompt, in order.

    The model runs in evaluation mode, and is in its own again afterwards.

    Args:
        prompts: token ids, one sequence a prompt (lengths may differ), or an int64 tensor (B, T).
        eos_token_id: the id or ids that end a sequence; None never ends early.
        min_new_tokens: so many tokens have to come before one of those ids may.
        stop: strings that end a text as soon as they stand in it, the newest token being part of one; they stay in it.
        tokenizer: with a ``decode`` from ids to text, for ``stop``.
        sampling: None is greedy.
        seed: of the sampling; the same seed gives the same text on the same device. One for each prompt makes a text
            independent of the others in its batch.
        cache: kind of cache, see :meth:`Decoder.make_cache`; prompts of different lengths need ``"preallocated"``.
        image: what a vision-language model has seen, a picture or several a prompt: ``model.encode_image(pixels)``.
        on_token: called as ``on_token(index of the prompt, token id)`` as soon as a token is known.

    Raises:
        ValueError: no or an empty prompt, an id outside the vocabulary, ``max_new_tokens`` below 1, or prompt and new
            tokens together longer than ``max_position_embeddings`` (unless there is a window); logits that are NaN.
    """
    options = eos_token_id, sampling, seed, image, cache, min_new_tokens, stop, tokenizer
    texts, steps = _decode(model, prompts, max_new_tokens, *options)
    results = [Generation(len(ids)) for ids in texts]
    for index, token, finish in steps:
        results[index].tokens.append(token)
        results[index].finish = finish
        if on_token is not None:
            on_token(index, token)
    return results


def stream(model: Decoder, prompt: Sequence[int] | Tensor, max_new_tokens: int, **options) -> Iterator[int]:
    """The new token ids of one prompt, one by one as they are decided; options and errors as for :func:`generate`."""
    known = list(inspect.signature(_decode).parameters)[3:]
    if unknown := sorted(set(options) - set(known)):
        raise TypeError(f"stream: unknown option {unknown[0]!r}, expected one of {', '.join(known)}")
    _, steps = _decode(model, [prompt], max_new_tokens, **options)
    return (token for _, token, _ in steps)


def _decode(
    model, prompts, max_new_tokens, eos_token_id=None, sampling=None, seed=None, image=None, cache="preallocated",
    min_new_tokens=0, stop=(), tokenizer=None,
) -> tuple[list[list[int]], Iterator[tuple[int, int, str]]]:  # fmt: skip
    """The checked prompts, and an iterator of (prompt index, token id, finish) that decodes as it is asked."""
    device, vocab_size = model.embed_tokens.weight.device, model.config.vocab_size
    max_new_tokens, min_new_tokens = plain(max_new_tokens), plain(min_new_tokens)
    whole(1, max_new_tokens=max_new_tokens)
    whole(0, min_new_tokens=min_new_tokens)
    for name, value, kind in (("sampling", sampling, Sampling), ("image", image, ImageContext)):
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{name}: got a {type(value).__name__}, expected {kind.__name__} or None")
    prefix = 0 if image is None else image.prefix  # positions that a picture takes before the text
    texts = checked_prompts(model.config, prompts, max_new_tokens, prefix)
    ends, stop = end_tokens(eos_token_id, vocab_size), (stop,) if isinstance(stop, str) else tuple(stop or ())
    if not all(isinstance(end, str) and end for end in stop) or (stop and tokenizer is None):
        raise ValueError(f"stop: got {stop!r}, expected strings of a character or more, and a tokenizer beside them")
    sampling, generator = sampling or Sampling(), _generators(seed, len(texts), device)

    lengths = [len(ids) for ids in texts]
    longest, ragged = max(lengths), len(set(lengths)) > 1
    # Right-padded by a token of the text itself, whose numbers are as finite: behind a mask NaN would still count.
    ids = torch.tensor([[*row, *row[-1:] * (longest - len(row))] for row in texts], device=device)  # (B, T)
    last = torch.tensor(lengths, device=device) - 1  # (B,)
    positions = torch.arange(longest, device=device).expand(len(texts), -1) if ragged else None
    cache = model.make_cache(cache, batch_size=len(texts), max_length=prefix + longest + max_new_tokens)
    written = torch.zeros(len(texts), vocab_size, dtype=torch.bool, device=device).scatter_(1, ids, True)

    def choose(logits: Tensor, count: int) -> Tensor:
        if ends and count <= min_new_tokens:
            logits[:, list(ends)] = -torch.inf
        token = sampling.choose(logits, generator, written)
        written.scatter_(1, token.unsqueeze(1), True)
        return token

    seen = {} if image is None else {"image": image}
    tokens = itertools.islice(decode_loop(model, ids, cache, choose, last, positions, **seen), max_new_tokens)
    return texts, _until_finished(tokens, texts, ends, stop, tokenizer)


def _until_finished(tokens: Iterable[Tensor], texts, ends, stop, tokenizer) -> Iterator[tuple[int, int, str]]:
    """(prompt index, token id, finish) of every token that belongs to a text, which it is appended to."""
    alive = set(range(len(texts)))
    for token in tokens:
        for index, value in enumerate(token.tolist()):
            if index not in alive:  # finished sequences ride along: the batch keeps its shape
                continue
            texts[index].append(value)
            stopped = stop and completes(stop, texts[index], tokenizer)
            finish = "eos" if value in ends else "stop" if stopped else "length"
            if finish != "length":
                alive.discard(index)
            yield index, value, finish
        if not alive:
            return


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its logits; the default is greedy.

    Attributes:
        temperature: 0 takes the most likely token; otherwise logits are divided by it before the softmax.
        top_k: keep the k most likely tokens (ties at the limit stay); None keeps all.
        top_p: then keep the smallest set of most likely tokens whose probability reaches ``top_p``; None keeps all.
        min_p: then keep those at least ``min_p`` times as likely as the most likely one; None keeps all.
        repetition_penalty: logits of tokens that the text has are divided by it, negative ones multiplied; 1 is none.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self):
        at_least(0, temperature=self.temperature)  # 0 is greedy
        above(0, repetition_penalty=self.repetition_penalty)
        if self.top_k is not None:
            whole(1, top_k=self.top_k)
        if self.top_p is not None:
            above(0, top_p=self.top_p)
            between(0, 1, top_p=self.top_p)
        if self.min_p is not None:
            between(0, 1, min_p=self.min_p)

    def choose(self, logits: Tensor, generator=None, written: Tensor | None = None) -> Tensor:
        """(B, V) logits -> (B,) token ids.

        Args:
            generator: a ``torch.Generator``, or one for each row; None is torch's own.
            written: bool (B, V), the tokens that each text has so far; needed for a repetition penalty.

        Raises:
            ValueError: logits that are NaN or infinite, or all minus infinity: no token is most likely then.
        """
        best = logits.amax(-1)
        if not best.isfinite().all():
            rows = (~best.isfinite()).nonzero().flatten().tolist()
            raise ValueError(f"logits: not a number (NaN or infinite) in rows {rows}, expected a finite largest one")
        if self.temperature == 0:
            return self._penalised(logits, written).argmax(-1)
        rows = self.probabilities(logits, written)
        if not isinstance(generator, list):
            return torch.multinomial(rows, 1, generator=generator).squeeze(-1)
        drawn = [torch.multinomial(row, 1, generator=own) for row, own in zip(rows, generator, strict=True)]
        return torch.cat(drawn)

    def probabilities(self, logits: Tensor, written: Tensor | None = None) -> Tensor:
        """What tokens are drawn from: (B, V) logits -> the same shape, float32; ValueError for a temperature of 0."""
        above(0, temperature=self.temperature)
        logits = self._penalised(logits.float(), written) / self.temperature
        if self.top_k is not None:
            least = logits.topk(min(self.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = logits.sort(dim=-1)  # least likely first
            spared = ordered.softmax(-1).cumsum(-1) <= 1 - self.top_p  # with all before it, it is not needed
            spared[:, -1] = False
            logits = logits.masked_fill(spared.scatter(-1, order, spared), -torch.inf)
        if self.min_p is not None:
            share = logits.softmax(-1)
            logits = logits.masked_fill(share < self.min_p * share.amax(-1, keepdim=True), -torch.inf)
        return logits.softmax(-1)

    def _penalised(self, logits: Tensor, written: Tensor | None) -> Tensor:
        if self.repetition_penalty == 1:
            return logits
        if written is None:
            raise ValueError("repetition_penalty: needs the tokens of the text, which are not known here; expected 1")
        logits = logits.float()
        less = torch.where(logits < 0, logits * self.repetition_penalty, logits / self.repetition_penalty)
        return torch.where(written, less, logits)


@dataclass
class Generation:
    """What :func:`generate` made of one prompt.

    Attributes:
        prompt_tokens: length of the prompt.
        tokens: the new token ids; the last one ends the text if ``finish`` is ``"eos"`` or ``"stop"``.
        finish: ``"eos"``, ``"stop"`` (a stop string) or ``"length"``.
    """

    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    finish: str = "length"

    @property
    def new_tokens(self) -> int:
        return len(self.tokens)


def _generators(seed: Any, batch: int, device: torch.device) -> torch.Generator | list[torch.Generator] | None:
    seeds = plain(seed)
    if isinstance(seeds, int):
        return torch.Generator(device).manual_seed(seeds)
    if seeds is None:
        return None
    if not isinstance(seeds, Iterable) or len(seeds) != batch or not all(hasattr(one, "__index__") for one in seeds):
        raise ValueError(f"seed: got {seed!r}, expected a whole number, or one for each of {batch} prompts")
    return [torch.Generator(device).manual_seed(int(one)) for one in seeds]
