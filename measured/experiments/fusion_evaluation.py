"""How well a model sees: right answers, paired choices, and the control in which pictures have been exchanged.

Book: ``chapters/architecture/fusion.ipynb``. Source: the paired choice follows Winoground (arXiv 2204.03162): two
pictures and two captions that differ in one thing, so that whoever does not look is right exactly half the time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dslib.architecture.decoder import Decoder
from dslib.architecture.fusion import VisionLanguageDecoder
from dslib.data.pictures import LANGUAGES
from dslib.data.scenes import item_rng
from measured.experiments.fusion import (
    HELD_OUT,
    IGNORED,
    VARIANTS,
    Example,
    World,
    held_out,
    see,
    taught_stream,
    text_start,
    train_variant,
)

SORTS = ("what", "how many", "where", "read")
CHUNK = 128  # examples at a time


@dataclass(frozen=True)
class Pair:
    """Two pictures that differ in one thing, and a caption for each. ``sort``: "swapped" or "replaced"."""

    sort: str
    language: str
    images: tuple[np.ndarray, np.ndarray]
    captions: tuple[str, str]


def pair(world: World, rng: np.random.Generator) -> Pair:
    """Two to four different things; in the other picture two have changed places, or one has become another."""
    language, kinds = LANGUAGES[int(rng.integers(2))], len(world.scenes.emoji)
    count = int(rng.integers(2, 5))
    places, shown = rng.permutation(4)[:count], rng.permutation(kinds)[: count + 1].tolist()
    cells: list[int | None] = [None] * 4
    for place, kind in zip(places, shown, strict=False):
        cells[place] = kind
    other, sort = list(cells), str(rng.choice(("swapped", "replaced")))
    if sort == "swapped":
        other[places[0]], other[places[1]] = cells[places[1]], cells[places[0]]
    else:
        other[places[0]] = shown[count]
    look = int(rng.integers(2**32))  # the same ground, sizes and places in both
    scenes = [world.scenes.draw(each, np.random.default_rng(look)) for each in (cells, other)]
    return Pair(sort, language, tuple(s.image for s in scenes), tuple(s.caption(language) for s in scenes))


def pairs(world: World, count: int, seed: int = 0) -> list[Pair]:
    """Held-out pairs."""
    return [pair(world, item_rng(HELD_OUT + seed, 10**6 + i)) for i in range(count)]


@torch.no_grad()
def log_probabilities(model: Decoder, world: World, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """The log-probability of each answer, and whether greedy decoding would say exactly that: (n,) each.

    Greedy decoding says the answer if and only if every token of it is the most likely one after those before it, so
    one pass over the whole answer tells.
    """
    scores, right = [], []
    for start in range(0, len(examples), CHUNK):
        images, inputs, targets = world.collate(list(examples[start : start + CHUNK]))
        logits = model(inputs, **see(model, images))
        counts = targets != IGNORED
        losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
        scores.append(-losses.sum(1))
        right.append(((logits.argmax(-1) == targets) | ~counts).all(1))
    return torch.cat(scores), torch.cat(right)


def exchanged(examples: Sequence[Example]) -> list[Example]:
    """The control: every question keeps its words and gets the picture of the next one of its sort."""
    chosen = {}
    for sort in {item.sort for item in examples}:
        numbers = [i for i, item in enumerate(examples) if item.sort == sort]
        chosen |= dict(zip(numbers, [*numbers[1:], numbers[0]], strict=True))
    return [replace(item, image=examples[chosen[i]].image) for i, item in enumerate(examples)]


def choices(model: Decoder, world: World, given: Sequence[Pair], exchange: bool = False) -> list[float]:
    """Share of right choices in each pair, 0, ½ or 1: for each picture, which caption is the more likely one?

    ``exchange`` is the control, in which each pair gets the pictures of the next one.
    """
    items = []
    for i, one in enumerate(given):
        images = given[(i + 1) % len(given)].images if exchange else one.images
        items += [Example(image, "caption", one.language, "", text) for image in images for text in one.captions]
    scores, _ = log_probabilities(model, world, items)
    first, second = scores.view(-1, 2, 2).unbind(1)  # (n, 2) each: both captions for the first picture, for the second
    right = ((first[:, 0] - first[:, 1]).sign() + (second[:, 1] - second[:, 0]).sign()) / 4 + 0.5  # a tie is a half
    return right.tolist()


def figures(model: Decoder, world: World, questions: int = 200, count: int = 200, seed: int = 0) -> dict[str, Any]:
    """What a model can do on held-out pictures: so many questions of each sort, and so many pairs.

    Returns:
        ``right``: for each sort and language, how many answers are right, and of how many; ``control``: the same with
        exchanged pictures. ``matching`` and ``matching_control``: the share of right choices in each pair, and
        ``pair_sorts``, what each pair differs in.
    """
    examples = [item for i, sort in enumerate(SORTS) for item in held_out(world, questions, sort, seed + i)]
    given = pairs(world, count, seed)
    found: dict[str, Any] = {"matching": choices(model, world, given), "pair_sorts": [one.sort for one in given]}
    found["matching_control"] = choices(model, world, given, exchange=True)
    for name, items in (("right", examples), ("control", exchanged(examples))):
        _, right = log_probabilities(model, world, items)
        found[name] = {
            sort: {language: _count(items, right, sort, language) for language in LANGUAGES} for sort in SORTS
        }
    return found


def _count(items: Sequence[Example], right: Tensor, sort: str, language: str) -> list[int]:
    chosen = [bool(r) for item, r in zip(items, right, strict=True) if (item.sort, item.language) == (sort, language)]
    return [sum(chosen), len(chosen)]


def vision_run(
    seed: int = 0, steps: int = 450, text_steps: int = 60, label_steps: int = 300, batch_size: int = 64,
    variants: Sequence[str] = tuple(VARIANTS),
) -> dict[str, Any]:  # fmt: skip
    """Train every variant once, from the same start and on the same batches, and measure it on held-out pictures.

    Returns:
        By variant what :func:`figures` gives, with ``loss`` (mean of the last tenth of the training) and, for gated
        ones, ``gates``: how far each block's gate opens in the mean, as a share of 1, on held-out captions.
    """
    world = World()
    text = text_start(world, steps=text_steps, seed=seed, batch_size=batch_size)
    stream = taught_stream(world, steps=label_steps, seed=seed, batch_size=batch_size)
    results = {}
    for variant in variants:
        model, losses = train_variant(variant, world, text, stream, steps=steps, seed=seed, batch_size=batch_size)
        last = losses[-max(1, steps // 10) :]
        results[variant] = figures(model, world, seed=seed) | {"loss": sum(last) / len(last)}
        if isinstance(model, VisionLanguageDecoder) and model.config.fusion == "cross":
            images, inputs, targets = world.collate(held_out(world, 64, "caption", seed))
            gates, _ = model.openings(inputs, model.encode_image(images))
            results[variant]["gates"] = [gate[targets != IGNORED].abs().mean().item() for gate in gates]
    return results
