"""Adapters on the course's own model: what a new domain costs the old one, and LoRA's step beside peft's.

The new domain is what numpy's functions say about themselves (docstrings of the installed numpy, read in place; none of
them is in the training text). Learned in six ways, each at its own best rate: all weights; LoRA; and the article's
adapter, as it is (random in both of its layers, beside weights that go on moving), with a zero start, with a frozen
base, and with both, which makes it what the literature calls a bottleneck adapter. So the start and the freezing are
told apart.

Compared at equal tokens, and at equal loss on the new domain: who has learned less has often forgotten less. The rate
stays level after its rise, and a running average of the weights is judged, so that a run may be cut anywhere. The rate
of an arm is picked on other windows of the new domain than those by which arms are compared.

Recorded by ``make record PART=adapters-rates-0`` (to 5), ``PART=adapters-0`` (to 4) and ``PART=adapters-step``.
"""

import zlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dslib.architecture.decoder import Decoder
from dslib.architecture.weights.pretrained import load_smollm2
from dslib.architecture.weights.twin import hf_twin
from dslib.architecture.whole import load
from dslib.check import above, one_of, whole
from dslib.data import corpus
from dslib.data.text import slices
from dslib.migration.adapters import Adapter, lora
from dslib.performance.pretrain import bits_per_byte, byte_lengths
from dslib.performance.training import TrainingStep, fit, next_token_loss
from measured.experiments.does_it_help import LEVEL, Average
from measured.timing import compare, ratio

LENGTH = 256


class ArticleAdapter(nn.Module):
    """The article's: as torch makes its layers, so that it changes what the model computes at once."""

    def __init__(self, size: int, inner: int):
        super().__init__()
        self.proj = nn.Sequential(nn.Linear(size, inner), nn.ReLU(), nn.Linear(inner, size))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.proj(y)


def _article(model: Decoder, zero: bool = False, frozen: bool = False, inner: int = 20) -> Adapter:
    """The article's adapter behind attention and MLP of each layer; ``zero``: its last layer begins at nothing."""
    size = model.config.hidden_size
    parts = {
        name: ArticleAdapter(size, inner) for name, _ in model.named_modules() if name.endswith(("self_attn", "mlp"))
    }
    for part in parts.values() if zero else ():
        nn.init.zeros_(part.proj[2].weight)
        nn.init.zeros_(part.proj[2].bias)
    adapter = Adapter(model, "bottleneck", {"size": size, "inner": inner}, parts)
    for weight in model.parameters():
        weight.requires_grad_(not frozen)
    return adapter


# About as many new numbers each: 0.1 million beside 4.8.
ARMS = {
    "all weights": lambda model: None,
    "LoRA": lambda model: lora(model, r"(q_proj|kv_b_proj|o_proj)$", rank=12),
    "the article's": _article,
    "zero start": partial(_article, zero=True),
    "frozen base": partial(_article, frozen=True),
    "zero start, frozen base": partial(_article, zero=True, frozen=True),
}


def numpy_documents() -> list[str]:
    """What numpy's public functions and classes say, each once, in order of their names."""
    spaces = (np, np.linalg, np.fft, np.random, np.ma, np.ndarray, np.ma.MaskedArray, np.random.Generator)
    found = {}
    for space in spaces:
        for name in sorted(vars(space)):
            text = getattr(getattr(space, name), "__doc__", None)
            if not name.startswith("_") and isinstance(text, str) and len(text) > 400:
                found.setdefault(text, f"{space.__name__}.{name}")
    return sorted(found, key=found.get)


def new_domain() -> tuple[Tensor, Tensor]:
    """Token ids of the new domain, documents one after the other: to learn from, and held out (one in eight)."""
    documents = numpy_documents()
    held = [zlib.crc32(text.encode()) % 8 == 0 for text in documents]
    parts = [[text for text, out in zip(documents, held, strict=True) if out == want] for want in (False, True)]
    train, test = (torch.from_numpy(np.concatenate(corpus.encode(part)).astype(np.int64)) for part in parts)
    return train, test


class Both(nn.Module):
    """A model and what stands beside it, as one thing to train."""

    def __init__(self, model: Decoder, adapter: Adapter | None):
        super().__init__()
        self.model, self.adapter = model, adapter

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids)


def forgetting(
    arm: str = "LoRA", seed: int = 0, rate: float = 1e-3, steps: int = 160, rows: int = 8, every: int = 20,
    windows: int = 24,
) -> dict[str, Any]:  # fmt: skip
    """One run on the new domain. ``rows`` of 256 tokens a step, AdamW at a level ``rate`` after 16 steps of rise.

    Returns ``trained``, how many numbers; and ``rows``, one every so many steps from 0 on, of the averaged weights:
    ``tokens``; bits a byte on held-out windows of the new domain, ``new`` and, on others, ``pick``; ``old``, on
    windows of the validation text.
    """
    one_of(ARMS, arm=arm)
    whole(1, steps=steps, rows=rows, every=every, windows=windows)
    above(0, rate=rate)
    torch.manual_seed(seed)
    model = load()[0].decoder
    adapter = ARMS[arm](model)
    both, (train, test), sizes = Both(model, adapter), new_domain(), byte_lengths(corpus.tokenizer())
    old = torch.from_numpy(corpus.token_stream("validation")[0].astype(np.int64))
    unseen = slices(test, LENGTH + 1, 2 * windows)
    looked = {"new": unseen[::2], "pick": unseen[1::2], "old": slices(old, LENGTH + 1, windows)}
    average, found = Average(both), []

    def look(step: int) -> None:
        with average():
            bits = {name: bits_per_byte(model, held, sizes) for name, held in looked.items()}
        found.append({"tokens": step * rows * LENGTH, **bits})

    def batch(step: int) -> tuple[Tensor, Tensor]:
        starts = np.random.default_rng((seed, step)).integers(len(train) - LENGTH, size=rows)
        drawn = torch.stack([train[start : start + LENGTH + 1] for start in starts])
        return drawn[:, :-1], drawn[:, 1:]

    def told(at: TrainingStep) -> bool:
        average.step()
        if (at.number + 1) % every == 0 or at.number + 1 == steps:
            look(at.number + 1)
        return at.number + 1 == steps

    look(0)
    fit(both, batch, steps=LEVEL, warmup=16 / LEVEL, loss=next_token_loss, learning_rate=rate, on_step=told)
    trained = sum(weight.numel() for weight in both.parameters() if weight.requires_grad)
    return {"trained": trained, "rows": found}


def old_at(made: dict[str, Any], new: float) -> float | None:
    """Bits a byte on the old text when the new domain had come down to ``new``; None if it never did."""
    for before, after in zip(made["rows"], made["rows"][1:], strict=False):
        if after["new"] <= new < before["new"]:
            share = (before["new"] - new) / (before["new"] - after["new"])
            return before["old"] + share * (after["old"] - before["old"])
    return None


def beside_peft(rank: int = 8, rows: int = 4, length: int = 128, rounds: int = 9) -> dict[str, Any]:
    """A training step of LoRA on SmolLM2 in transformers' class: our hooks beside peft's wrappers, the same targets.

    Returns ``ratio``: peft's time over ours (median, low, high); and the difference of the two losses.
    """
    import peft

    ids = torch.randint(40_000, (rows, length), generator=torch.Generator().manual_seed(0))
    base, _ = load_smollm2()
    ours, targets = hf_twin(base).train(), ["q_proj", "v_proj"]
    adapter = lora(ours, r"(q_proj|v_proj)$", rank, alpha=2.0 * rank)
    theirs = peft.get_peft_model(
        hf_twin(base), peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    ).train()
    steps = {
        name: _step(model, [weight for weight in weights if weight.requires_grad], ids)
        for name, model, weights in (("ours", ours, adapter.parameters()), ("peft", theirs, theirs.parameters()))
    }
    losses = {name: step() for name, step in steps.items()}
    seconds = compare(steps, rounds=rounds, warmup=1)
    found = ratio(seconds["peft"], seconds["ours"])
    return {"ratio": [found.median, found.low, found.high], "difference": abs(losses["ours"] - losses["peft"])}


def _step(model: nn.Module, weights: Sequence[Tensor], ids: Tensor) -> Any:
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)

    def step() -> float:
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step
