"""What each step of the retrieval chapter is worth, on every picture of the set, each held out once.

Book: ``chapters/scenarios/multimodal.ipynb``.
"""

import random
import zlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dslib.data.encoders import load_efficientnet, load_minilm
from dslib.data.pictures import EmojiSet, load_emoji
from dslib.performance.statistics import mcnemar, paired_difference, share
from dslib.scenarios.retrieval import Maps, align, contrast, crowding, image_features, ranks

SIZES, BLOCKS, PAPERS = (64, 96), (12, 15), ("white", "black")
WIDTHS = (192, 320, 1280)  # of one size's parts: the two blocks, then the last map


def parts(features: Tensor, names: Sequence[str]) -> Tensor:
    """Some columns of features made with ``SIZES`` and ``BLOCKS``: ``"96 last"``, ``"64 blocks"`` and so on."""
    small, large = features[..., : sum(WIDTHS)], features[..., sum(WIDTHS) :]
    edge = sum(WIDTHS[:2])
    known = {"64 blocks": small[..., :edge], "64 last": small[..., edge:],
             "96 blocks": large[..., :edge], "96 last": large[..., edge:]}  # fmt: skip
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"names: got {unknown[0]!r}, expected some of {', '.join(known)}")
    return torch.cat([known[name] for name in names], dim=-1)


def character_features(texts: Sequence[str], buckets: int = 2048) -> Tensor:
    """(N, buckets): counts of characters and pairs of characters, hashed, each row of length 1. Needs no vocabulary."""
    counts = torch.zeros(len(texts), buckets)
    for row, text in enumerate(texts):
        for piece in [*text, *(text[i : i + 2] for i in range(len(text) - 1))]:
            counts[row, zlib.crc32(piece.encode()) % buckets] += 1
    return F.normalize(counts, dim=-1)


def folds(emoji: EmojiSet, count: int, pool: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """(training, held-out) numbers, ``count`` times: by identity, so that variants of one thing are on one side.

    ``pool`` pictures are drawn from each held-out part, to make all searches equally hard.
    """
    rng = random.Random(seed)
    groups: dict[int, list[int]] = {}
    for number, row in enumerate(emoji.rows):
        groups.setdefault(row.identity, []).append(number)
    order = sorted(groups)
    rng.shuffle(order)
    held: list[list[int]] = [[] for _ in range(count)]
    for identity in order:
        min(held, key=len).extend(groups[identity])  # identities differ in size; the parts should not
    found = []
    for part in held:
        out = set(part)
        found.append(([i for i in range(len(emoji)) if i not in out], sorted(rng.sample(part, pool))))
    return found


def retrieval_runs(count: int = 9, pool: int = 200, seed: int = 0) -> dict:
    """Search by name among ``pool`` pictures that were held out, in ``count`` folds; each step adds to the one before.

    Returns:
        ``steps``: name, recall at 1 and at 10 with 95 % intervals over all ``count * pool`` searches, and the
        difference to the step before and to the first (bootstrap interval, McNemar's p). ``chinese``: the same for
        Chinese names, through MiniLM and through characters.
    """
    emoji, encoder, text = load_emoji(), load_efficientnet().to(memory_format=torch.channels_last), load_minilm()
    images = image_features(encoder, emoji, SIZES, PAPERS, BLOCKS)
    names, full = text(emoji.names()), text([", ".join((row.name["en"], *row.tags["en"])) for row in emoji.rows])
    one, last, every = names.unsqueeze(0), ("96 last",), ("64 blocks", "64 last", "96 blocks", "96 last")

    def closed(x: Tensor, y: Tensor) -> Maps:
        return align(x, y)

    def descent(x: Tensor, y: Tensor) -> Maps:
        return contrast(x, y, seed=seed)

    steps = {  # name: how the maps are found, pictures, texts, whether crowding is taken off
        "CLIP's loss, 96 pixels": (descent, parts(images[:1], last), one, False),
        "closed form": (closed, parts(images[:1], last), one, False),
        "and 64 pixels": (closed, parts(images[:1], ("64 last", "96 last")), one, False),
        "and earlier blocks": (closed, parts(images[:1], every), one, False),
        "and a black background": (closed, parts(images, every), one, False),
        "less crowding": (closed, parts(images, every), one, True),
        "and tags as captions": (closed, parts(images, every), torch.stack([names, full]), True),
    }
    chinese = emoji.names("zh")
    languages = {
        "MiniLM": (closed, parts(images, every), text(chinese).unsqueeze(0), True),
        "characters": (closed, parts(images, every), character_features(chinese).unsqueeze(0), True),
    }
    held = folds(emoji, count, pool, seed)
    found = {name: torch.cat([_ranks(*way, *fold) for fold in held]) for name, way in (steps | languages).items()}
    order = list(steps)
    rows = []
    for number, name in enumerate(order):
        row = {"step": name} | _recalls(found[name])
        for other, key in ((order[max(0, number - 1)], "gain"), (order[0], "gain_in_all")):
            row[key] = {f"R@{k}": _gain(found[name] < k, found[other] < k) for k in (1, 10)}
        rows.append(row)
    return {
        "searches": count * pool, "pool": pool, "folds": count, "steps": rows,
        "chinese": [{"text": name, "unknown": text.unknown_share("".join(chinese)) if name == "MiniLM" else 0.0}
                    | _recalls(found[name]) for name in languages],
    }  # fmt: skip


def _ranks(way, images: Tensor, texts: Tensor, crowded: bool, train: list[int], held: list[int]) -> Tensor:
    maps = way(images[:, train], texts[:, train])
    gallery, queries = maps.images(images[:, held]), maps.texts(texts[0, held])
    penalty = crowding(gallery, maps.texts(texts[0, train])) / 2 if crowded else None
    return ranks(queries, gallery, penalty)


def _recalls(found: Tensor) -> dict:
    shares = {f"R@{k}": share(found < k) for k in (1, 10)}
    return {name: {"value": one.value, "low": one.low, "high": one.high} for name, one in shares.items()}


def _gain(a: Tensor, b: Tensor) -> dict:
    gap = paired_difference(a, b)
    return {"value": gap.value, "low": gap.low, "high": gap.high, "p": mcnemar(a, b)}
