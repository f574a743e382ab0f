"""Search pictures by words, with two frozen encoders and two trained linear maps.

A picture encoder and a sentence encoder that have never met give vectors of different lengths and meanings. Two
matrices bring both into one space, in which a picture lies near its caption. They are all that is trained:

* :func:`align` finds them in closed form (canonical correlation analysis with a ridge, Hotelling 1936): the directions
  in which pictures and captions agree most;
* :func:`contrast` finds them by descent on the loss of CLIP (arXiv 2103.00020): in a batch, each picture has to pick
  its own caption, and each caption its picture.

Book: ``chapters/scenarios/multimodal.ipynb``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dslib import check
from dslib.data.encoders import EfficientNetLite
from dslib.data.pictures import EmojiSet

PAPERS = {"white": (255, 255, 255), "black": (0, 0, 0), "grey": (127, 127, 127)}


@dataclass(frozen=True)
class Maps:
    """``image`` (D, K) and ``text`` (E, K), applied to features from which the training set's means are taken."""

    image: Tensor
    text: Tensor
    image_mean: Tensor
    text_mean: Tensor

    def images(self, features: Tensor) -> Tensor:
        """(V, N, D) -> unit vectors (N, K): every view mapped and set to length 1, then averaged over the V views."""
        views = F.normalize((features - self.image_mean) @ self.image, dim=-1)
        return F.normalize(views.mean(0), dim=-1)

    def texts(self, vectors: Tensor) -> Tensor:
        """(N, E) -> unit vectors (N, K)."""
        return F.normalize((vectors - self.text_mean) @ self.text, dim=-1)


@torch.inference_mode()
def image_features(
    encoder: EfficientNetLite, emoji: EmojiSet, sizes: Sequence[int] = (96,), papers: Sequence[str] = ("white",),
    blocks: Sequence[int] = (), batch_size: int = 64,
) -> Tensor:  # fmt: skip
    """(V, N, D): one view for each background, and in it one part after the other, each part of length 1.

    Args:
        sizes: sides to which the pictures of 64 pixels are brought, multiples of 32; a part each, its cost a square.
        papers: backgrounds, keys of ``PAPERS``: the pictures are transparent, and what is behind them is our choice.
        blocks: blocks of the encoder whose averaged outputs are parts too, beside the last feature map's (see
            ``EfficientNetLite.pooled``).

    Raises ``ValueError`` for an unknown background, none, no size and no picture.
    """
    for name in papers:
        check.one_of(PAPERS, papers=name)
    if not papers or not sizes or not len(emoji):
        raise ValueError(f"papers, sizes: got {papers!r}, {sizes!r} for {len(emoji)} pictures, expected one of each")
    given = encoder.normalisation.mean, encoder.normalisation.std
    mean, std = (torch.tensor(value, dtype=torch.float32).view(3, 1, 1) * 255 for value in given)
    views = []
    for name in papers:
        rows = []
        for pixels in emoji.images(PAPERS[name]).split(batch_size):
            pixels, parts = (pixels.float() - mean) / std, []
            for size in sizes:
                scaled = F.interpolate(pixels, size=size, mode="bicubic", antialias=True)
                parts += encoder.pooled(scaled.contiguous(memory_format=torch.channels_last), blocks)
            rows.append(torch.cat([F.normalize(part, dim=-1) for part in parts], dim=-1))
        views.append(torch.cat(rows))
    return torch.stack(views)


def align(images: Tensor, texts: Tensor, *, ridge: tuple[float, float] = (1.0, 0.6), dimensions: int = 300,
          power: float = 0.5) -> Maps:  # fmt: skip
    """Maps in closed form, from N pairs.

    Args:
        images: (V, N, D), V views of each picture. texts: (C, N, E), C wordings of each caption. Every view goes with
            every wording.
        ridge: added to the diagonals of the two covariances, in multiples of their mean: how little a direction with
            small variance is trusted.
        dimensions: K, directions kept, those of highest correlation.
        power: each direction counts with its correlation to this power; 0 counts all the same.

    Raises ``ValueError`` for other shapes, NaN, and more dimensions than the shorter of the two vectors has.
    """
    _check_pairs(images, texts, dimensions)
    check.at_least(0, **{"ridge[0]": ridge[0], "ridge[1]": ridge[1], "power": power})
    check.between(1, min(images.shape[2], texts.shape[2]), dimensions=dimensions)
    means = [side.mean((0, 1)) for side in (images, texts)]
    x, y = (side - mean for side, mean in zip((images, texts), means, strict=True))
    factors = [_factor(side.flatten(0, 1), extra) for side, extra in zip((x, y), ridge, strict=True)]
    # Over all combinations of views and wordings, the covariance between the sides is that of their means.
    between = x.mean(0).T @ y.mean(0) / x.shape[1]  # (D, E)
    white = torch.linalg.solve_triangular(factors[0], between, upper=False)
    white = torch.linalg.solve_triangular(factors[1], white.T, upper=False).T
    left, correlations, right = torch.linalg.svd(white, full_matrices=False)
    weight = correlations[:dimensions].pow(power)
    # What made the covariances into identities on the way in is undone on the way out.
    image = torch.linalg.solve_triangular(factors[0].T, left[:, :dimensions] * weight, upper=True)
    text = torch.linalg.solve_triangular(factors[1].T, right[:dimensions].T * weight, upper=True)
    return Maps(image, text, *means)


def _factor(rows: Tensor, ridge: float) -> Tensor:
    """Cholesky factor of the covariance of centred rows, with ``ridge`` times the mean variance on its diagonal."""
    covariance = rows.T @ rows / len(rows)
    covariance.diagonal().add_(ridge * covariance.diagonal().mean())
    return torch.linalg.cholesky(covariance)


def contrast(images: Tensor, texts: Tensor, *, dimensions: int = 256, epochs: int = 60, batch_size: int = 256,
             learning_rate: float = 1e-3, dropout: float = 0.5, seed: int = 0) -> Maps:  # fmt: skip
    """Maps by descent on CLIP's loss; shapes as in :func:`align`. Every step draws a view and a wording at random."""
    _check_pairs(images, texts, dimensions)
    check.whole(1, epochs=epochs, batch_size=batch_size)
    means = [side.mean((0, 1)) for side in (images, texts)]
    scales = [(side - mean).flatten(0, 1).std(0) + 1e-5 for side, mean in zip((images, texts), means, strict=True)]
    x, y = ((side - m) / s for side, m, s in zip((images, texts), means, scales, strict=True))
    generator = torch.Generator().manual_seed(seed)
    drawn = {"generator": generator, "dtype": x.dtype}
    weights = [torch.randn(side.shape[2], dimensions, **drawn) / side.shape[2] ** 0.5 for side in (x, y)]
    weights = [nn.Parameter(weight) for weight in weights]
    log_scale = nn.Parameter(torch.tensor(20.0, dtype=x.dtype).log())
    optimizer = torch.optim.AdamW([*weights, log_scale], learning_rate, weight_decay=1e-2)
    steps = epochs * -(-x.shape[1] // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(x.shape[1], generator=generator).split(batch_size):
            view, wording = (int(torch.randint(len(side), (), generator=generator)) for side in (x, y))
            kept = torch.rand(len(batch), x.shape[2], **drawn) >= dropout
            a = F.normalize(x[view, batch] * kept / (1 - dropout) @ weights[0], dim=-1)
            b = F.normalize(y[wording, batch] @ weights[1], dim=-1)
            logits, own = log_scale.exp().clamp(max=100) * a @ b.T, torch.arange(len(batch))
            loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    image, text = (weight.detach() / scale.unsqueeze(1) for weight, scale in zip(weights, scales, strict=True))
    return Maps(image, text, *means)


def crowding(gallery: Tensor, known: Tensor, nearest: int = 10) -> Tensor:
    """How near an item is to captions in general: (N, K), (M, K) -> (N,), mean cosine with its ``nearest`` of M others.

    In many dimensions a few items are near to everything ("hubs"), and come up whatever one asks for. Half of this
    taken off the scores holds them back (half of the local scaling of Conneau et al., arXiv 1710.04087). The captions
    it is measured against are those of the training set. Raises ValueError for none of them, and for NaN.
    """
    check.whole(1, nearest=nearest, **{"known, captions": len(known)})
    return _scores(gallery, known).topk(min(nearest, len(known)), dim=-1).values.mean(-1)


def ranks(queries: Tensor, gallery: Tensor, penalty: Tensor | None = None) -> Tensor:
    """How many of the gallery come before query i's own item i, at best 0: (N, K), (N, K) unit vectors -> (N,) int64.

    ``penalty``, (N,), is taken off the score of each item of the gallery. An item that scores exactly as high as the
    own one counts as before it. Raises ValueError for other shapes, and for NaN, which would come before nothing.
    """
    if queries.shape != gallery.shape or queries.ndim != 2:
        raise ValueError(f"gallery: got shape {tuple(gallery.shape)}, expected that of queries, {tuple(queries.shape)}")
    scores = _scores(queries, gallery, penalty)  # (N, N), a query in each row
    return (scores >= scores.diagonal().unsqueeze(1)).sum(1) - 1


def search(query: Tensor, gallery: Tensor, top: int = 5, penalty: Tensor | None = None) -> list[tuple[int, float]]:
    """The ``top`` items for one query (K,), best first: (number, score). Raises ValueError for NaN, and ``top`` < 1."""
    check.whole(1, top=top)
    best = _scores(query, gallery, penalty).topk(min(top, len(gallery)))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def _scores(queries: Tensor, gallery: Tensor, penalty: Tensor | None = None) -> Tensor:
    """(..., K), (N, K) -> (..., N) cosines, less each item's penalty."""
    if penalty is not None and penalty.shape != gallery.shape[:1]:
        raise ValueError(f"penalty: got shape {tuple(penalty.shape)}, expected ({len(gallery)},), one for each item")
    scores = queries @ gallery.T
    scores = scores if penalty is None else scores - penalty
    if bad := int(scores.isnan().sum()):
        raise ValueError(f"queries, gallery, penalty: got NaN in {bad} of {scores.numel()} scores, expected numbers")
    return scores


def _check_pairs(images: Tensor, texts: Tensor, dimensions: int) -> None:
    if images.ndim != 3 or texts.ndim != 3 or images.shape[1] != texts.shape[1] or 0 in (*images.shape, *texts.shape):
        raise ValueError(
            f"images, texts: got {tuple(images.shape)}, {tuple(texts.shape)}, expected (V, N, D), (C, N, E)"
        )
    check.whole(1, dimensions=dimensions)
    for name, side in (("images", images), ("texts", texts)):
        if bad := int((~side.isfinite()).sum()):
            raise ValueError(f"{name}: got {bad} values of {side.numel()} that are NaN or infinite, expected numbers")
