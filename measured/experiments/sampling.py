"""What it costs to choose a token from its logits, what text each rule writes, and what induction heads do in a loop.

Book: ``chapters/architecture/sampling.ipynb``. Heads are found and silenced as in Olsson et al. (arXiv 2209.11895).
"""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import fmean

import torch
from torch import Tensor

from dslib.architecture.decoder import Decoder
from dslib.architecture.generation import Sampling, generate
from dslib.architecture.layers import apply_rope
from dslib.architecture.weights.pretrained import load_smollm2
from dslib.check import one_of
from dslib.data import text
from measured.machine import as_device
from measured.timing import Timing, compare

RULES = {
    "argmax": Sampling(),
    "temperature": Sampling(temperature=1.0),
    "top-k 40": Sampling(temperature=1.0, top_k=40),
    "top-p 0.95": Sampling(temperature=1.0, top_p=0.95),
    "min-p 0.1": Sampling(temperature=1.0, min_p=0.1),
}
TEXTS = {
    "greedy": Sampling(),
    "T 0.6, top-p 0.95": Sampling(temperature=0.6, top_p=0.95),
    "T 0.6": Sampling(temperature=0.6),
    "T 1, top-p 0.95": Sampling(temperature=1.0, top_p=0.95),
    "T 1": Sampling(temperature=1.0),
    "the novel": None,  # what its author wrote
}
Heads = Iterable[Sequence[int]]


def sampling_times(vocab_size: int = 49_152, batch: int = 1, rounds: int = 5, seed: int = 0) -> dict[str, Timing]:
    """Seconds in which each rule chooses a token for each of ``batch`` rows of float32 logits, and those of a sort.

    Runs on the GPU if there is one. Logits are normal with a standard deviation of 3, about as peaked as those of a
    small language model; the times of these rules do not depend on it, but for the order of the sort.
    """
    device = as_device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(batch, vocab_size, generator=generator)).to(device)
    ways = {name: (lambda rule=rule: rule.choose(logits)) for name, rule in RULES.items()}
    ways["one sort"] = lambda: logits.sort(dim=-1)  # what top-p cannot do without
    with torch.inference_mode():
        return compare(ways, rounds=rounds, device=device)


def repeats(ids: Sequence[int], length: int = 4) -> list[bool]:
    """For each run of ``length`` tokens, in order: did the text have it before?"""
    runs = [tuple(ids[start : start + length]) for start in range(len(ids) - length + 1)]
    return [run in runs[:start] for start, run in enumerate(runs)]


def rule_text(rule: str, passages: int = 20, prompt_tokens: int = 24, new_tokens: int = 40) -> dict[str, list]:
    """SmolLM2 goes on with passages of *Moby-Dick* by a rule of ``TEXTS``; the seed is the passage's number.

    Returns:
        One entry a passage: ``repeats``, the share of runs of four tokens that the continuation already had; ``tens``,
        the same of the runs that end in its first ten tokens, the next ten, and so on; ``log_p``, the mean logarithm of
        the probability that the model, without any rule, gives to what was written.
    """
    one_of(TEXTS, rule=rule)
    model, rows = _novel(passages, prompt_tokens + new_tokens)
    prompts, sampling = rows[:, :prompt_tokens].tolist(), TEXTS[rule]
    texts = rows[:, prompt_tokens:].tolist()
    if sampling is not None:
        written = generate(model, prompts, new_tokens, sampling=sampling, seed=list(range(passages)))
        texts = [one.tokens for one in written]
    seen = [[False] * 3 + repeats(new) for new in texts]  # by the place where a run ends
    return {
        "repeats": [fmean(row[3:]) for row in seen],
        "tens": [[fmean(row[max(i, 3) : i + 10]) for i in range(0, new_tokens, 10)] for row in seen],
        "log_p": [fmean(_log_p(model, old, new)) for old, new in zip(prompts, texts, strict=True)],
    }


def induction_scores(model: Decoder, length: int = 48, lists: int = 6, seed: int = 1) -> Tensor:
    """(layers, heads): in lists of random tokens, written twice, the weight on what followed a token the first time."""
    generator, scores = torch.Generator().manual_seed(seed), []
    vocab = model.config.vocab_size
    ids = torch.randint(min(1000, vocab // 2), min(20_000, vocab), (lists, length), generator=generator).repeat(1, 2)
    later = torch.ones(2 * length, 2 * length).triu(1).bool()

    def look(attention, args):
        x, rope, heads = args[0], args[1], attention.query_heads
        qkv = attention.qkv_proj(x).unflatten(-1, (-1, attention.head_dim))  # (B, 2N, H + 2 K, D)
        qk = apply_rope(qkv[:, :, : heads + attention.kv_heads], *rope).transpose(1, 2)
        q, k = qk[:, :heads], qk[:, heads:].repeat_interleave(heads // attention.kv_heads, dim=1)
        weights = (q @ k.mT / math.sqrt(attention.head_dim)).masked_fill(later, -torch.inf).softmax(-1)
        scores.append(weights[:, :, length:].diagonal(1, -2, -1).mean((0, -1)))  # query N + i, key 1 + i

    with ExitStack() as hooks, torch.inference_mode():
        for layer in model.layers:
            hooks.callback(layer.self_attn.register_forward_pre_hook(look).remove)
        model(ids)
    return torch.stack(scores)


@contextmanager
def without(model: Decoder, heads: Heads) -> Iterator[None]:
    """Inside, these heads, ``(layer, head)``, add nothing to the residual stream."""
    with ExitStack() as hooks:
        for layer, head in heads:
            attention = model.layers[layer].self_attn
            start = head * attention.head_dim

            def silence(_, args, start=start, end=start + attention.head_dim):
                y = args[0].clone()  # (B, T, H D): what the heads have found, side by side
                y[..., start:end] = 0
                return (y,)

            hooks.callback(attention.o_proj.register_forward_pre_hook(silence).remove)
        yield


def loop_heads(
    silent: str, seed: int = 0, passages: int = 20, prompt_tokens: int = 24, new_tokens: int = 40, least: float = 0.25
) -> dict[str, list]:
    """Greedy text of SmolLM2 without some heads.

    Args:
        silent: ``"none"``, ``"induction"`` (heads that score ``least`` or more) or ``"others"``: as many of the same
            layers, drawn with ``seed``.

    Returns:
        ``heads``, ``[layer, head, score]``, and by passage of *Moby-Dick*: ``repeats`` as in :func:`rule_text`;
        ``copied``, of a piece of 16 tokens written five times, the share of tokens of rounds 2 to 5 that the model
        found most likely; ``loss`` on the novel itself, in nats a token.
    """
    one_of(("none", "induction", "others"), silent=silent)
    model, rows = _novel(passages, 80)
    scores, heads = induction_scores(model), []
    if silent != "none":
        heads = [(layer, head) for layer, head in (scores >= least).nonzero().tolist()]
    if silent == "others":
        heads = _others(heads, scores.shape[1], torch.Generator().manual_seed(seed))
    with without(model, heads):
        texts = generate(model, rows[:, :prompt_tokens].tolist(), new_tokens)
        return {
            "heads": [[*place, scores[place].item()] for place in heads],
            "repeats": [fmean(repeats(one.tokens)) for one in texts],
            "copied": [_copied(model, row[:16]) for row in rows],
            "loss": [-fmean(_log_p(model, row[:1], row[1:])) for row in rows.tolist()],
        }


def _others(heads: Heads, per_layer: int, generator: torch.Generator) -> list[tuple[int, int]]:
    """As many heads of the same layers, drawn from those that are not among ``heads``."""
    chosen = []
    for layer in sorted({layer for layer, _ in heads}):
        taken = [head for where, head in heads if where == layer]
        free = torch.tensor([head for head in range(per_layer) if head not in taken])
        chosen += [(layer, int(i)) for i in free[torch.randperm(len(free), generator=generator)][: len(taken)]]
    return chosen


def _novel(passages: int, length: int) -> tuple[Decoder, Tensor]:
    """SmolLM2, and so many passages of the novel (passages, length)."""
    model, novel = _loaded()
    return model, text.slices(novel, length, passages)


@functools.cache
def _loaded() -> tuple[Decoder, Tensor]:
    model, tokenizer = load_smollm2()
    return model, torch.tensor(tokenizer(text.moby_dick(), verbose=False).input_ids)


def _log_p(model: Decoder, before: list[int], new: list[int]) -> list[float]:
    """The logarithm of the probability of each new token."""
    ids = torch.tensor([[*before, *new]])  # (1, T)
    with torch.inference_mode():
        log_p = model(ids)[0, len(before) - 1 : -1].log_softmax(-1)  # (new, V)
    return log_p.gather(-1, torch.tensor(new)[:, None]).flatten().tolist()


def _copied(model: Decoder, piece: Tensor) -> float:
    row = piece.repeat(5)
    with torch.inference_mode():
        best = model(row[None])[0].argmax(-1)
    return (best[len(piece) - 1 : -1] == row[len(piece) :]).float().mean().item()
