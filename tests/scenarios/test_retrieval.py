"""Two maps into one space: against the definition, on planted data, and with real encoders."""

import math

import pytest
import torch
import torch.nn.functional as F

from dslib.data import encoders
from dslib.data.pictures import load_emoji
from dslib.scenarios.retrieval import Maps, align, contrast, crowding, image_features, ranks, search
from measured.experiments.multimodal_retrieval import character_features, folds, parts


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_nan(*shape):
    values = random(*shape)
    values.view(-1)[0] = math.nan
    return values


@pytest.fixture(scope="module")
def planted():
    """Pictures and captions that share 6 hidden numbers, each with noise of its own: (1, 400, 40) and (1, 400, 30)."""
    hidden = random(400, 6)
    return (
        (hidden @ random(6, 40, seed=1) + 0.3 * random(400, 40, seed=2)).unsqueeze(0),
        (hidden @ random(6, 30, seed=3) + 0.3 * random(400, 30, seed=4)).unsqueeze(0),
    )


def by_descent(images, texts):
    return contrast(images, texts, dimensions=10, epochs=150, learning_rate=1e-2, dropout=0.1)


@pytest.mark.parametrize("way", [lambda x, y: align(x, y, dimensions=10), by_descent], ids=["align", "contrast"])
def test_both_ways_find_what_is_shared(planted, way):
    images, texts = planted
    maps = way(images[:, :300], texts[:, :300])
    found = ranks(maps.texts(texts[0, 300:]), maps.images(images[:, 300:]))
    assert (found == 0).double().mean() > 0.8  # of 100 that were held out; by chance 0.01
    assert maps.images(images).norm(dim=-1).sub(1).abs().max() < 1e-5


def test_the_closed_form_is_canonical_correlation(planted):
    """Without ridge and power: mapped data are white on both sides, and correlate only direction by direction."""
    images, texts = planted
    maps = align(images, texts, ridge=(0, 0), dimensions=30, power=0)
    x, y = (images[0] - maps.image_mean) @ maps.image, (texts[0] - maps.text_mean) @ maps.text
    eye = torch.eye(30)
    torch.testing.assert_close(x.T @ x / 400, eye, atol=1e-3, rtol=0)
    torch.testing.assert_close(y.T @ y / 400, eye, atol=1e-3, rtol=0)
    correlations = (x.T @ y / 400).diagonal()
    torch.testing.assert_close(x.T @ y / 400, torch.diag(correlations), atol=1e-3, rtol=0)
    assert (correlations[:-1] >= correlations[1:] - 1e-3).all()
    assert (correlations[:6] > 0.9).all() and (correlations[6:] < 0.6).all()


def test_views_and_wordings_count_as_all_their_pairs(planted):
    images = torch.cat([planted[0], planted[0] + 0.1 * random(1, 400, 40, seed=5)])
    texts = torch.cat([planted[1], planted[1] + 0.1 * random(1, 400, 30, seed=6)])
    short = align(images, texts, dimensions=8)
    pairs = [(view, wording) for view in images for wording in texts]
    x, y = (torch.cat([pair[side] for pair in pairs]).unsqueeze(0) for side in (0, 1))
    long = align(x, y, dimensions=8)
    torch.testing.assert_close(short.image.abs(), long.image.abs(), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(short.text.abs(), long.text.abs(), atol=1e-4, rtol=1e-3)


def test_descent_follows_its_seed(planted):
    a, b, c = (contrast(*planted, epochs=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a.image, b.image) and not torch.equal(a.image, c.image)


def test_maps_have_the_dtype_of_the_features(planted):
    before = torch.get_default_dtype()
    for default, given in ((torch.float64, torch.float32), (torch.float32, torch.float64)):
        torch.set_default_dtype(default)
        try:
            maps = contrast(*(side.to(given) for side in planted), epochs=1)
        finally:
            torch.set_default_dtype(before)
        assert maps.images(planted[0].to(given)).dtype is given


def test_ranks_by_definition_and_ties_do_not_help():
    gallery = F.normalize(random(5, 3), dim=-1)
    queries = F.normalize(random(5, 3, seed=1), dim=-1)
    scores = queries @ gallery.T
    wanted = [sum(scores[i, j] > scores[i, i] for j in range(5)) for i in range(5)]
    assert ranks(queries, gallery).tolist() == [int(w) for w in wanted]
    same = torch.ones(4, 2) / 2**0.5
    assert ranks(same, same).tolist() == [3, 3, 3, 3]  # a model that says the same of everything finds nothing


def test_a_hub_is_held_back():
    known = F.normalize(random(200, 8), dim=-1)
    gallery = F.normalize(torch.cat([known.mean(0, keepdim=True), random(5, 8, seed=1)]), dim=-1)
    hub = crowding(torch.stack([known[:20].mean(0), -known[:20].mean(0)]), known[:20])
    assert hub[0] > hub[1]
    queries = F.normalize(gallery + 0.4 * gallery[:1], dim=-1)  # all lean towards the first
    plain = [search(query, gallery, 1)[0][0] for query in queries]
    held = [search(query, gallery, 1, torch.tensor([0.5, 0, 0, 0, 0, 0]))[0][0] for query in queries]
    assert plain.count(0) >= held.count(0) == 0


def test_search_returns_the_best_first():
    gallery = torch.eye(4)
    got = search(torch.tensor([0.1, 0.9, 0.3, 0.0]), gallery, top=9)
    assert [number for number, _ in got] == [1, 2, 0, 3] and got[0][1] == pytest.approx(0.9)


class Eyes:
    """Stands in for the encoder: mean colours, and the size it was shown."""

    normalisation = encoders.EfficientNetLite.normalisation

    def pooled(self, pixels, blocks):
        colour = pixels.mean((2, 3))
        return [torch.full((len(pixels), 2), float(block)) for block in blocks] + [colour + 1]


def test_features_have_a_view_for_each_background_and_a_part_for_each_size_and_block():
    emoji = load_emoji().take(range(10))
    features = image_features(Eyes(), emoji, (64, 96), ("white", "black"), (12, 15), batch_size=4)
    assert features.shape == (2, 10, 2 * (2 + 2 + 3))
    torch.testing.assert_close(features[..., :2].norm(dim=-1), torch.ones(2, 10))
    assert not torch.allclose(features[0, :, -3:], features[1, :, -3:])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: align(random(4, 5), random(1, 4, 3)), "images, texts: got .*expected"),
        (lambda: align(random(1, 4, 5), random(1, 3, 3)), "images, texts: got .*expected"),
        (lambda: align(random(1, 4, 5), random(1, 4, 3), dimensions=4), "dimensions: got 4, expected 1 to 3"),
        (lambda: align(random(1, 4, 5), random(1, 4, 3), dimensions=1, ridge=(math.nan, 1)), r"ridge\[0\]: got nan"),
        (lambda: align(with_nan(1, 4, 5), random(1, 4, 3), dimensions=1), "images: got 1 values of 20 that are NaN"),
        (lambda: contrast(random(1, 4, 5), with_nan(1, 4, 3)), "texts: got 1 values of 12 that are NaN"),
        (lambda: contrast(random(1, 0, 5), random(1, 0, 3)), "images, texts: got"),
        (lambda: contrast(random(1, 4, 5), random(1, 4, 3), epochs=0), "epochs: got 0"),
        (lambda: ranks(random(5, 3), random(4, 3)), "gallery: got shape"),
        (lambda: ranks(with_nan(5, 3), random(5, 3)), "got NaN in 5 of 25 scores"),
        (lambda: ranks(random(5, 3), with_nan(5, 3)), "got NaN in 5 of 25 scores"),
        (lambda: ranks(random(5, 3), random(5, 3), with_nan(5)), "got NaN in 5 of 25 scores"),
        (lambda: ranks(random(5, 3), random(5, 3), random(5, 1)), r"penalty: got shape \(5, 1\)"),
        (lambda: search(with_nan(3), random(5, 3)), "got NaN in 5 of 5 scores"),
        (lambda: search(random(3), with_nan(5, 3)), "got NaN in 1 of 5 scores"),
        (lambda: search(random(3), random(5, 3), 0), "top: got 0"),
        (lambda: crowding(random(5, 3), with_nan(4, 3)), "got NaN in 5 of 20 scores"),
        (lambda: crowding(random(5, 3), random(0, 3)), "known, captions: got 0"),
        (lambda: crowding(random(5, 3), random(4, 3), 0), "nearest: got 0"),
        (
            lambda: image_features(Eyes(), load_emoji(), papers=("green",)),
            "papers: got 'green', expected one of 'white'",
        ),
        (lambda: image_features(Eyes(), load_emoji(), papers=()), "papers, sizes: got"),
        (lambda: image_features(Eyes(), load_emoji(), sizes=()), "papers, sizes: got"),
        (lambda: parts(random(1, 1, 1792), ["128"]), "names: got '128'"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_folds_share_no_identity_and_hold_everything_out_once():
    emoji = load_emoji()
    parted = folds(emoji, 9, 200, seed=0)
    for train, held in parted:
        assert len(held) == 200
        assert not {emoji.rows[i].identity for i in train} & {emoji.rows[i].identity for i in held}
    assert len({i for _, held in parted for i in held}) == 1800


def test_parts_are_cut_by_name():
    features = torch.arange(2 * 1792).float().view(1, 1, -1)
    assert parts(features, ["96 last"])[0, 0, 0] == 1792 + 512
    assert parts(features, ["64 blocks", "64 last", "96 blocks", "96 last"]).equal(features)


def test_character_features_tell_texts_apart():
    rows = character_features(["红苹果", "青苹果", "汽车"])
    assert rows.norm(dim=1).sub(1).abs().max() < 1e-6
    assert rows[0] @ rows[1] > 0.4 > rows[0] @ rows[2]


def test_maps_average_views_of_equal_weight():
    maps = Maps(torch.eye(2), torch.eye(2), torch.zeros(2), torch.zeros(2))
    got = maps.images(torch.tensor([[[100.0, 0.0]], [[0.0, 1.0]]]))
    torch.testing.assert_close(got, torch.full((1, 2), 0.5**0.5))
