"""Text from a decoder: greedy or sampled, streamed, one prompt or a batch of different lengths.

Prompts of different lengths are padded on the right and decoded with one position per sequence: no token is ever moved,
and nothing has to be un-padded.

Book: ``chapters/architecture/decoder.ipynb``. Sources: nucleus sampling (arXiv 1904.09751) for ``top_p``.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dslib.architecture.decoder import Decoder
from dslib.architecture.fusion import ImageContext


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its logits; the default is greedy.

    Attributes:
        temperature: 0 takes the most likely token; otherwise logits are divided by it before the softmax.
        top_k: keep the k most likely tokens (ties at the limit stay); None keeps all.
        top_p: then keep the smallest set of most likely tokens whose probability reaches ``top_p``; None keeps all.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: got {self.temperature}, expected 0 (greedy) or a finite number above 0")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: got {self.top_k}, expected at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: got {self.top_p}, expected more than 0 and at most 1")

    def choose(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B, vocab_size) logits -> (B,) token ids."""
        if self.temperature == 0:
            return logits.argmax(-1)
        return torch.multinomial(self.probabilities(logits), 1, generator=generator).squeeze(-1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """What tokens are drawn from: (B, vocab_size) logits -> the same shape; ``temperature`` must be above 0."""
        logits = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        probabilities = logits.softmax(-1)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = probabilities.sort(dim=-1, descending=True)
            # A token stays if those before it have not reached top_p yet; the first always stays.
            ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= self.top_p, 0.0)
            probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered / ordered.sum(-1, keepdim=True))
        return probabilities


@dataclass
class Generation:
    """What :func:`generate` made of one prompt.

    Attributes:
        prompt_tokens: length of the prompt.
        tokens: the new token ids; the last one is an end-of-sequence id if ``finish`` is ``"eos"``.
        finish: ``"eos"`` or ``"length"``.
    """

    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    finish: str = "length"

    @property
    def new_tokens(self) -> int:
        return len(self.tokens)


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]] | Tensor,
    max_new_tokens: int,
    *,
    eos_token_id: int | Collection[int] | None = None,
    sampling: Sampling | None = None,
    seed: int | None = None,
    cache: str = "preallocated",
    image: ImageContext | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> list[Generation]:
    """Continue every prompt by up to ``max_new_tokens`` tokens.

    Args:
        prompts: token ids, one sequence a prompt (lengths may differ), or an int64 tensor (B, T).
        eos_token_id: the id or ids that end a sequence; None never ends early.
        sampling: None is greedy.
        seed: of the sampling; the same seed gives the same text on the same device.
        cache: kind of cache, see :meth:`Decoder.make_cache`; prompts of different lengths need ``"preallocated"``.
        image: what a :class:`~dslib.architecture.fusion.VisionLanguageDecoder` has seen, one picture (or several) a
            prompt: ``model.encode_image(pixels)``.
        on_token: called as ``on_token(index of the prompt, token id)`` as soon as a token is known.

    Returns:
        One :class:`Generation` a prompt, in order.

    Raises:
        ValueError: no prompt, an empty prompt, an id outside the vocabulary, ``max_new_tokens`` below 1, or prompt and
            new tokens together longer than ``max_position_embeddings`` (unless the model has a window).
    """
    results: list[Generation] = []
    options = (eos_token_id, sampling, seed, image, cache)
    for index, token, finish in _decode(model, prompts, max_new_tokens, *options, results):
        results[index].tokens.append(token)
        results[index].finish = finish
        if on_token is not None:
            on_token(index, token)
    return results


def stream(model: Decoder, prompt: Sequence[int] | Tensor, max_new_tokens: int, **options) -> Iterator[int]:
    """The new token ids of one prompt, one by one as they are decided; options as for :func:`generate`."""
    keys = ("eos_token_id", "sampling", "seed", "image")
    chosen = {key: options.pop(key, None) for key in keys}
    kind = options.pop("cache", "preallocated")
    if options:
        raise TypeError(f"stream: unknown option {sorted(options)[0]!r}, expected one of {', '.join((*keys, 'cache'))}")
    for _, token, _ in _decode(model, [prompt], max_new_tokens, *chosen.values(), kind, []):
        yield token


def _decode(model, prompts, max_new_tokens, eos_token_id, sampling, seed, image, kind, results):
    """Yield (prompt index, token id, finish) for every new token; fills ``results`` with one Generation a prompt."""
    prefix = 0 if image is None else image.prefix  # positions that a picture takes before the text
    seen = {} if image is None else {"image": image}
    sequences = _checked(model, prompts, max_new_tokens, prefix)
    results.extend(Generation(len(ids)) for ids in sequences)
    ends = frozenset(() if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id)
    sampling = sampling or Sampling()
    device = model.embed_tokens.weight.device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    lengths = [len(ids) for ids in sequences]
    ragged = len(set(lengths)) > 1
    longest = max(lengths)

    # Right-padded; the id of the padding is never looked at (see PreallocatedCache).
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in sequences], device=device)  # (B, T)
    last = torch.tensor(lengths, device=device) - 1  # (B,)
    positions = torch.arange(longest, device=device).expand(len(sequences), -1) if ragged else None
    # Not `with inference_mode()` around the loop: a generator would leave the mode on in its caller between two tokens.
    with torch.inference_mode():
        cache = model.make_cache(kind, batch_size=len(sequences), max_length=prefix + longest + max_new_tokens)
        # Of each prompt, only what follows its last real token is wanted: (B, 1, vocab_size).
        logits = model(ids, cache, positions, last.unsqueeze(1), **seen)
    alive = set(range(len(sequences)))
    for count in range(1, max_new_tokens + 1):
        with torch.inference_mode():
            token = sampling.choose(logits[:, -1], generator)  # (B,)
        values = token.tolist()
        for index, value in enumerate(values):
            if index in alive:
                done = value in ends
                yield index, value, "eos" if done else "length"
                if done:
                    alive.discard(index)
        if not alive or count == max_new_tokens:
            return
        with torch.inference_mode():
            # Finished sequences ride along (their tokens are dropped): the batch keeps its shape.
            where = (last + count).unsqueeze(1) if ragged else None
            logits = model(token.unsqueeze(1), cache, where, **seen)  # (B, 1, vocab_size)


def _checked(model: Decoder, prompts, max_new_tokens: int, prefix: int) -> list[list[int]]:
    config = model.config
    if isinstance(prompts, Tensor):
        if prompts.ndim != 2:
            raise ValueError(f"prompts: got a tensor of shape {tuple(prompts.shape)}, expected (batch, tokens)")
        prompts = prompts.tolist()
    sequences = [ids.tolist() if isinstance(ids, Tensor) else list(ids) for ids in prompts]
    if not sequences:
        raise ValueError("prompts: got none, expected at least one")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: got {max_new_tokens}, expected at least 1")
    for index, ids in enumerate(sequences):
        if not ids:
            raise ValueError(
                f"prompts[{index}]: got an empty prompt, expected at least one token (a start token will do)"
            )
        bad = next((i for i in ids if not hasattr(i, "__index__") or not 0 <= i < config.vocab_size), None)
        if bad is not None:
            raise ValueError(
                f"prompts[{index}]: token id {bad!r} is outside the vocabulary, 0 to {config.vocab_size - 1}"
            )
        total = prefix + len(ids) + max_new_tokens
        if config.sliding_window is None and total > config.max_position_embeddings:
            raise ValueError(
                f"prompts[{index}]: {prefix + len(ids)} tokens and {max_new_tokens} new ones make {total}, more than "
                f"the model's max_position_embeddings={config.max_position_embeddings}"
            )
    return sequences
