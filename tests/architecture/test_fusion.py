"""Eyes for the text model: nothing changes while the gate is shut, and one look serves every token."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn

from dslib import fast
from dslib.architecture.decoder import DecoderConfig, build, count_parameters, with_layers
from dslib.architecture.fusion import FusionConfig, VisionLanguageDecoder
from dslib.architecture.generation import generate, stream
from dslib.architecture.sparse_decoder import SparseConfig
from dslib.architecture.vision.cross_attention import Gate, GatedCrossAttention
from dslib.architecture.vision.swin import SwinStream
from dslib.fast.lean_step import LeanStep

SIZES = (40, 32, 48, 2, 4, 2)  # vocab, hidden, intermediate, layers, heads, kv heads
N, C = 6, 24


class Grid(nn.Module):
    """An image stream that is quick to run: each of six patches is one linear map of its pixels."""

    hidden_size = C

    def __init__(self):
        super().__init__()
        self.map = nn.Conv2d(3, C, 4, stride=4)

    def forward(self, pixels):
        return self.map(pixels).flatten(2).transpose(1, 2)


def noisy(model, std=0.3):
    """Weights that are loud enough for differences to show, gates ajar."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        loud = torch.randn(parameter.shape, generator=generator) * std
        parameter.data = (loud + (parameter.ndim == 1 and "gate" not in name)).to(parameter.dtype)
    return model.eval()


def model_of(std=0.3, **changes):
    fields = {"max_position_embeddings": 64, "image_hidden_size": C, **changes}
    torch.manual_seed(0)
    model = VisionLanguageDecoder(FusionConfig(*SIZES, **fields), Grid())
    return noisy(model, std) if std else model.eval()


def pixels(batch=2, seed=1):
    return torch.randn(batch, 3, 8, 12, generator=torch.Generator().manual_seed(seed))


def ids_of(batch=2, tokens=7):
    return torch.randint(SIZES[0], (batch, tokens), generator=torch.Generator().manual_seed(2))


KINDS = {
    "scalar gate": {"gate": "scalar"},
    "token gate": {"gate": "token"},
    "with feed-forward": {"gate": "token", "cross_intermediate_size": 20},
    "every second layer": {"cross_attention_every": 2},
    "projector": {"fusion": "projector"},
}
CROSS = {name: kind for name, kind in KINDS.items() if name != "projector"}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
every_cross = pytest.mark.parametrize("kind", CROSS.values(), ids=CROSS)


# --- the gate


@every_cross
def test_at_the_start_it_is_the_text_model_bit_for_bit(kind):
    text = build(DecoderConfig(*SIZES), seed=3).eval()
    model = VisionLanguageDecoder.from_text(text, Grid(), **kind)
    ids = ids_of()
    with torch.no_grad():
        assert torch.equal(model(ids, image=model.encode_image(pixels())), text(ids))
        assert torch.equal(model(ids), text(ids))


@every_cross
def test_a_shut_gate_still_learns(kind):
    """The gate is zero at the start, its gradient is not; behind it, gradients come once it has moved."""
    model = model_of(std=0, **kind)
    eyes = [block.cross for block in model.seeing()]
    model(ids_of(), image=model.encode_image(pixels())).square().mean().backward()
    assert all(block.gate.bias.grad.abs() > 0 for block in eyes)
    assert all(block.q_proj.weight.grad.abs().max() == 0 for block in eyes)
    with torch.no_grad():
        for block in eyes:
            block.gate.bias.add_(0.1)
    model(ids_of(), image=model.encode_image(pixels())).square().mean().backward()
    parts = ("q_proj", "kv_proj", "o_proj")
    assert all(getattr(block, part).weight.grad.abs().max() > 0 for block in eyes for part in parts)
    assert model.vision.map.weight.grad.abs().max() > 0


@every_kind
def test_the_picture_matters_and_the_future_does_not(kind):
    model, ids = model_of(**kind), ids_of()
    with torch.no_grad():
        one, other = (model(ids, image=model.encode_image(pixels(seed=seed))) for seed in (1, 2))
        assert (one - other).abs().min(-1).values.max() > 1e-3
        changed = ids.clone()
        changed[:, -1] = (changed[:, -1] + 1) % SIZES[0]
        again = model(changed, image=model.encode_image(pixels(seed=1)))
        torch.testing.assert_close(again[:, :-1], one[:, :-1], atol=1e-5, rtol=1e-4)
        assert (again[:, -1] - one[:, -1]).abs().max() > 1e-2


def test_a_scalar_gate_is_one_number_and_a_token_gate_one_for_each_token():
    h = torch.randn(2, 5, 8)
    scalar, token = Gate("scalar", 8), Gate("token", 8)
    assert count_parameters(scalar) == 1
    assert count_parameters(token) == 9
    assert scalar(h).item() == 0 and token(h).shape == (2, 5, 1) and not token(h).any()
    nn.init.normal_(token.weight)
    assert token(h).std() > 0.1 and token(h).abs().max() <= 1
    nn.init.constant_(scalar.bias, 0.5)
    assert scalar(h).item() == pytest.approx(0.46211716)  # tanh(0.5)


# --- against the formula, and one look for all tokens


def test_a_block_is_the_formula_written_out():
    model = model_of(gate="token", cross_intermediate_size=20)
    block = model.layers[1].cross
    x, features = torch.randn(2, 5, 32), torch.randn(2, N, C)
    mask = torch.tensor([[True, True, False, True, False, False], [True] * 6])
    with torch.no_grad():
        got = block(x, block.keys_values(features), mask)
        for b in range(2):
            real = features[b, mask[b]]
            keys, values = (real @ block.kv_proj.weight.T).view(len(real), 2, 2, 8).unbind(1)  # (N, Hk, D)
            h = block.input_layernorm(x[b])
            q = block.q_proj(h).view(5, 4, 8)
            heads = []
            for head in range(4):
                scores = q[:, head] @ keys[:, head // 2].T / 8**0.5
                heads.append(scores.softmax(-1) @ values[:, head // 2])
            opening = torch.tanh(h @ block.gate.weight + block.gate.bias)[:, None]
            wanted = x[b] + opening * block.o_proj(torch.cat(heads, -1))
            h = block.post_attention_layernorm(wanted)
            opening = torch.tanh(h @ block.mlp_gate.weight + block.mlp_gate.bias)[:, None]
            wanted = wanted + opening * block.mlp(h)
            torch.testing.assert_close(got[b], wanted, atol=1e-5, rtol=1e-4)


@every_kind
@pytest.mark.parametrize("cache_kind", ["growing", "preallocated"])
def test_cached_equals_uncached(kind, cache_kind):
    """Looked once, decoded token by token, against the whole text with the features computed anew."""
    model, ids = model_of(**kind), ids_of(tokens=9)
    with torch.no_grad():
        image = model.encode_image(pixels())
        cache = model.make_cache(cache_kind, batch_size=2, max_length=9 + image.prefix)
        steps = [model(part, cache, image=image) for part in (ids[:, :4], *ids[:, 4:].split(1, dim=1))]
        whole = model(ids, image=model.encode_image(pixels()))
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=2e-5, rtol=1e-4)
    assert cache.length == 9 + image.prefix
    assert image.prefix == (N if model.config.fusion == "projector" else 0)
    each = N * 32 if image.prefix else len(model.seeing()) * 2 * N * 2 * 8
    assert (image.nbytes, image.batch_size) == (2 * each * 4, 2)


def test_several_pictures_for_a_text_are_one_long_row_of_features():
    model, ids = model_of(), ids_of(batch=1)
    several = torch.stack([pixels(3)])  # (1, 3, 3, 8, 12)
    with torch.no_grad():
        features = model.vision(several[0]).flatten(0, 1)[None]
        torch.testing.assert_close(
            model(ids, image=model.encode_image(several)), model(ids, image=model.image_context(features))
        )
        one_hidden = model(ids, image=model.encode_image(several, torch.tensor([[True, False, True]])))
        without = model(ids, image=model.encode_image(several[:, [0, 2]]))
        torch.testing.assert_close(one_hidden, without, atol=1e-5, rtol=1e-4)


@every_cross
def test_one_batch_may_hold_texts_with_and_without_a_picture(kind):
    model, ids = model_of(**kind), ids_of()
    with torch.no_grad():
        mixed = model(ids, image=model.encode_image(pixels(), torch.tensor([True, False])))
        torch.testing.assert_close(
            mixed[:1], model(ids[:1], image=model.encode_image(pixels()[:1])), atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(mixed[1], model(ids)[1], atol=1e-5, rtol=1e-4)
        assert (mixed[1] - model(ids, image=model.encode_image(pixels()))[1]).abs().max() > 1e-2


def test_a_sequence_without_a_picture_is_left_exactly_as_it_was_and_gives_finite_gradients():
    block = GatedCrossAttention(FusionConfig(*SIZES, image_hidden_size=C, cross_intermediate_size=8))
    for gate in (block.gate, block.mlp_gate):
        nn.init.ones_(gate.bias)
    x = torch.randn(2, 3, 32, requires_grad=True)
    out = block(x, block.keys_values(torch.randn(2, N, C)), torch.tensor([[True] * N, [False] * N]))
    assert torch.equal(out[1], x[1]) and not torch.equal(out[0], x[0])
    out.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in block.parameters())
    assert torch.equal(x.grad[1], torch.ones(3, 32))


def story(tokens=9):
    """Two texts of three pictures each, and which of them each token may see: none, then the first, and so on."""
    mask = torch.zeros(2, tokens, 3, dtype=torch.bool)
    for token in range(tokens):
        mask[0, token, : token // 2] = True  # a picture after every second token
        mask[1, token, max(0, token // 3 - 1) : token // 3] = True  # only the latest, of three tokens each
    return torch.stack((pixels(3), pixels(3, seed=5))), mask


@every_cross
def test_each_token_may_see_other_pictures(kind):
    """Against the block as it is when all tokens see just what that one does."""
    model, ids, (pictures, mask) = model_of(**kind), ids_of(tokens=9), story()
    with torch.no_grad():
        image, x, block = model.encode_image(pictures, mask), model.embed_tokens(ids), model.layers[0].cross
        got = block(x, image.keys_values[0], image.mask)
        for token in range(9):
            alone = model.encode_image(pictures, mask[:, token]).mask  # (2, N)
            torch.testing.assert_close(got[:, token], block(x, image.keys_values[0], alone)[:, token])
        assert torch.equal(got[:, 0], x[:, 0]) and not torch.equal(got[0, 2], x[0, 2])  # the first sees none


@every_cross
@pytest.mark.parametrize("cache_kind, window", [("growing", None), ("preallocated", None), ("rolling", 4)])
def test_masks_for_each_token_go_with_the_cache_and_the_last_row_serves_what_follows(kind, cache_kind, window):
    model, ids, (pictures, mask) = model_of(**kind, sliding_window=window), ids_of(tokens=9), story()
    longer = torch.cat((mask[:, :5], mask[:, 4:5].expand(-1, 4, -1)), dim=1)  # (2, 9, 3)
    with torch.no_grad():
        image = model.encode_image(pictures, mask[:, :5])
        cache = model.make_cache(cache_kind, batch_size=2, max_length=9)
        parts = [model(part, cache, image=image) for part in (ids[:, :3], *ids[:, 3:].split(1, dim=1))]
        whole = model(ids, image=model.encode_image(pictures, longer))
        assert (whole - model(ids, image=model.encode_image(pictures, mask))).abs().max() > 1e-2
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=1e-4)


def test_masks_for_each_token_in_a_batch_of_different_lengths():
    model, (pictures, mask), prompts = model_of(), story(), [[1, 2, 3, 4, 5, 6, 7], [9, 8, 7]]
    last = torch.stack(
        (mask[0, :7], torch.cat((mask[1, 3:6], mask[1, 5:6].expand(4, -1))))
    )  # each as long as the longest
    together = generate(model, prompts, 8, image=model.encode_image(pictures, last))
    for i, prompt in enumerate(prompts):
        image = model.encode_image(pictures[i : i + 1], last[i : i + 1])
        assert together[i].tokens == generate(model, [prompt], 8, image=image)[0].tokens


# --- padding, windows, weights


@every_kind
@pytest.mark.parametrize("cache_kind", [None, "growing", "preallocated"])
@torch.no_grad()
def test_padded_texts_with_a_picture_equal_each_alone(kind, cache_kind):
    model, ids, images, mask = model_of(**kind), ids_of(), pixels(), torch.ones(2, 7, dtype=torch.int64)
    mask[0, :3] = 0
    parts, image = ((0, 7),) if cache_kind is None else ((0, 4), (4, 5), (5, 7)), model.encode_image(images)
    cache = cache_kind and model.make_cache(cache_kind, batch_size=2, max_length=7 + image.prefix)
    got = [model(ids[:, a:b], cache, image=image, attention_mask=mask[:, :b]) for a, b in parts]
    for row, real in enumerate(mask.bool()):
        alone = model.encode_image(images[row : row + 1])
        want = model(ids[row : row + 1, real], image=alone)[0]
        torch.testing.assert_close(torch.cat(got, 1)[row, real], want, atol=2e-5, rtol=1e-4)
        blind = model(ids, attention_mask=mask)[row, real]
        torch.testing.assert_close(blind, model(ids[row : row + 1, real])[0], atol=2e-5, rtol=1e-4)


@every_kind
def test_prompts_of_different_lengths_each_get_the_text_they_get_alone(kind):
    model, prompts = model_of(**kind), [[1, 2, 3], [7], [9, 8, 7, 6, 5]]
    images = pixels(3)
    alone = [
        generate(model, [prompt], 12, image=model.encode_image(images[i : i + 1]))[0].tokens
        for i, prompt in enumerate(prompts)
    ]
    together = generate(model, prompts, 12, image=model.encode_image(images))
    assert [result.tokens for result in together] == alone
    assert alone != [generate(model, [prompt], 12)[0].tokens for prompt in prompts]


@torch.no_grad()
def argmax_loop(model, prompt, new, images):
    ids = list(prompt)
    for _ in range(new):
        ids.append(int(model(torch.tensor([ids]), image=model.encode_image(images))[0, -1].argmax()))
    return ids[len(prompt) :]


@every_kind
@pytest.mark.parametrize(
    "cache, window", [("growing", None), ("growing", 20), ("preallocated", None), ("preallocated", 20), ("rolling", 20)]
)
def test_generation_with_a_picture_equals_the_argmax_loop(kind, cache, window):
    """Plain, and prepared, where growing takes the plain path all the same."""
    model, image = model_of(**kind, sliding_window=window), pixels(1)
    wanted = argmax_loop(model, [1, 2, 3], 15, image)
    assert len(set(wanted)) > 2
    assert generate(model, [[1, 2, 3]], 15, cache=cache, image=model.encode_image(image))[0].tokens == wanted
    assert not fast.prepare(model).plain
    assert list(stream(model, [1, 2, 3], 15, cache=cache, image=model.encode_image(image))) == wanted


@every_cross
@pytest.mark.parametrize("size", [SIZES, (50, 36, 50, 2, 3, 1), (51, 33, 25, 2, 3, 3)], ids=["4", "2", "1"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_lean_step_computes_what_the_model_computes(kind, size, masked):
    """With weights cut into 4, 2 or 1 chunks, and features left out."""
    torch.manual_seed(0)
    extra = {"head_dim": 10} if size[1] == 33 else {}
    model = noisy(VisionLanguageDecoder(FusionConfig(*size, **extra, **kind, image_hidden_size=C), Grid()))
    ids = torch.randint(size[0], (1, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        image = model.encode_image(
            pixels(1)[:, None].repeat(1, 2, 1, 1, 1), torch.tensor([[True, False]]) if masked else None
        )
        caches = [model.make_cache(max_length=12) for _ in range(2)]
        for cache in caches:
            model(ids[:, :3], cache, image=image)
        fast.prepare(model)
        step = LeanStep(model)
        lean = torch.cat([step(token, caches[0], image) for token in ids[0, 3:].tolist()])
        fast.release(model)
        full = torch.cat([model(token, caches[1], image=image)[:, 0] for token in ids[:, 3:].split(1, dim=1)])
    assert full.std() > 0.1
    assert (lean - full).norm() < 2e-5 * full.norm()  # a gate near its turning point enlarges float32's own rounding


def test_the_lean_step_without_any_picture_is_the_text_model():
    model = model_of()
    with torch.no_grad():
        none = model.encode_image(pixels(1), torch.tensor([False]))
        caches = [model.make_cache(max_length=8) for _ in range(2)]
        assert torch.equal(LeanStep(model)(3, caches[0], none), LeanStep(model)(3, caches[1]))


def test_bfloat16_generates_with_a_picture():
    model = model_of().bfloat16()
    image = model.encode_image(pixels(1).bfloat16())
    assert generate(model, [[1, 2]], 5, image=image)[0].new_tokens == 5


@every_kind
def test_with_window_shares_weights_and_stream(kind):
    model, ids = model_of(**kind), ids_of(tokens=12)
    local = model.with_window(3)
    assert local.config.sliding_window == 3 and model.config.sliding_window is None
    assert {p.data_ptr() for p in local.parameters()} == {p.data_ptr() for p in model.parameters()}
    with torch.no_grad():
        image = model.encode_image(pixels())
        assert torch.equal(local.with_window(None)(ids, image=image), model(ids, image=image))
        assert (local(ids, image=image) - model(ids, image=image)).abs().max() > 1e-2
        near = model.with_window(64)(ids, image=image)
    torch.testing.assert_close(near, model(ids, image=image), atol=1e-5, rtol=1e-4)


def test_a_text_model_gets_eyes_and_keeps_its_weights():
    text = build(DecoderConfig(*SIZES, tie_word_embeddings=True), seed=0, dtype=torch.bfloat16)
    model = VisionLanguageDecoder.from_text(text, Grid(), gate="token", cross_attention_every=2)
    assert model.embed_tokens is text.embed_tokens and model.lm_head.weight is text.embed_tokens.weight
    assert model.seeing() == [model.layers[0]] and model.layers[0].cross.q_proj.weight.dtype is torch.bfloat16
    names = set(text.state_dict())
    assert {name.split(".q_")[0].split(".")[0] for name in set(model.state_dict()) - names} == {"vision", "layers"}
    assert all("cross" in name or "vision" in name for name in set(model.state_dict()) - names)
    assert names < set(model.state_dict())
    assert isinstance(model.config, FusionConfig) and model.config.image_hidden_size == C


def test_what_gets_eyes_keeps_its_modes():
    text, grid = build(DecoderConfig(*SIZES)), Grid().eval()
    text.layers[1].eval()
    model = VisionLanguageDecoder.from_text(text, grid, cross_attention_every=2)
    assert model.training and model.layers[0].cross.q_proj.training and model.layers[0].mlp.training
    assert not model.vision.training and not model.vision.map.training and not model.layers[1].mlp.training


@every_kind
@pytest.mark.parametrize("layers", [[0], [1], [1, 0]])
@torch.no_grad()
def test_drafts_see_what_their_target_sees(kind, layers):
    """Whichever of the two encoded the picture: blocks keep the numbers that they had."""
    model, ids = model_of(**kind), ids_of()
    twin, plain = with_layers(model, layers), copy.deepcopy(model)
    plain.layers = nn.ModuleList(plain.layers[layer] for layer in layers)
    want = plain(ids, image=model.encode_image(pixels()))
    for other in (model, twin):
        torch.testing.assert_close(twin(ids, image=other.encode_image(pixels())), want)
    torch.testing.assert_close(twin(ids), plain(ids))
    assert {id(part) for part in twin.parameters()} <= {id(part) for part in model.parameters()}


@torch.no_grad()
def test_a_cache_with_a_picture_can_be_copied():
    model = model_of(fusion="projector")
    with torch.enable_grad():
        image = model.encode_image(pixels(1))
    cache = model.make_cache(max_length=40)
    model(ids_of(1), cache, image=image)
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        torch.testing.assert_close(model(ids_of(1), twin, image=image), model(ids_of(1), cache, image=image))
        cache.truncate(N + 7)


# --- which words open the gate


def test_openings_are_what_the_gates_did():
    model, ids = model_of(gate="token"), ids_of()
    image = model.encode_image(pixels())
    gates, shares = model.openings(ids, image)
    assert gates.shape == shares.shape == (2, 2, 7)
    with torch.no_grad():
        x = model.embed_tokens(ids)
        block = model.layers[0].cross
        passed = block(x, image.keys_values[0]) - x
        torch.testing.assert_close(gates[0], block.gate(block.input_layernorm(x)).squeeze(-1))
        torch.testing.assert_close(shares[0], passed.norm(dim=-1) / x.norm(dim=-1), atol=1e-4, rtol=1e-4)
    scalar = model_of(gate="scalar")
    gates, _ = scalar.openings(ids, scalar.encode_image(pixels()))
    assert (gates == gates[:, :1, :1]).all() and not any(block.cross._forward_hooks for block in scalar.seeing())


# --- bad input


def hooked():
    text = build(DecoderConfig(*SIZES))
    text.layers[1].register_forward_hook(lambda *_: None)
    return text


def broken():
    bad = pixels()
    bad[1, 0, 2, 3] = torch.nan
    return bad


config = FusionConfig(*SIZES)
model, projector = model_of(), model_of(fusion="projector")
MASKS = r"expected bool \(2, 3\), or \(2, tokens, 3\)"
BAD = [
    *[(lambda field=field: dataclasses.replace(config, **field), words) for field, words in (
        ({"fusion": "add"}, "fusion: got 'add', expected one of 'cross', 'projector'"),
        ({"gate": "vector"}, "gate: got 'vector', expected one of 'scalar', 'token'"),
        ({"image_hidden_size": 0}, "image_hidden_size: got 0, expected at least 1"),
        ({"cross_attention_every": 0}, "cross_attention_every: got 0"),
        ({"cross_intermediate_size": -1}, "cross_intermediate_size: got -1, expected at least 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: got 0"),
    )],
    (lambda: VisionLanguageDecoder(config, Grid()), "features of size 24, but image_hidden_size=64"),
    *[(lambda size=size: model.encode_image(torch.zeros(size)), "pixels: got shape")
      for size in ((3, 8, 12), (2, 4, 8, 12), (2, 3, 0, 12))],
    (lambda: model.encode_image(torch.zeros(2, 3, 8, 12, dtype=torch.uint8)), "pixels: got dtype torch.uint8"),
    (lambda: model.encode_image(broken()), "pixels: NaN or infinite in 1 of 2 pictures, first in number 1"),
    (lambda: model.encode_image(pixels(), torch.tensor([1, 0])), r"mask: got torch.int64 of .*, expected bool \(2,\)"),
    *[(lambda size=size: model.encode_image(pixels(), torch.ones(size).bool()), r"mask: got torch.bool of shape")
      for size in ((3,), (2, 2), (2, 4, 2), (2, 0, 1), ())],
    *[(lambda size=size: model.encode_image(story()[0], torch.ones(size).bool()), MASKS)
      for size in ((2,), (3, 3), (2, 9, 2), (1, 9, 3))],
    (lambda: model.image_context(torch.zeros(2, N, C), torch.ones(2, N)), r"mask: got torch.float32 of shape \(2, 6\)"),
    (lambda: projector.encode_image(pixels(), torch.tensor([True, False])), "every sequence needs as many"),
    (lambda: projector.encode_image(*story()), "mask: a projector puts image tokens"),
    *[(lambda size=size: model.image_context(torch.zeros(size)), r"features: got .*, expected \(batch, features, 24\)")
      for size in ((2, C), (2, N, C + 1), (2, 0, C))],
    (lambda: model(ids_of(), image=model.encode_image(pixels(3))), "image: made for 3 sequences, input_ids has 2"),
    (lambda: model(ids_of(), image=projector.encode_image(pixels())), "image: made by another kind of model"),
    (lambda: projector(ids_of(), image=model.encode_image(pixels())), "image: made by another kind of model"),
    (lambda: projector.openings(ids_of(), projector.encode_image(pixels())), "'projector', which has no gates"),
    *[(lambda text=text: VisionLanguageDecoder.from_text(build(text), Grid()), r"text: got a \w+Decoder, expected a")
      for text in (SparseConfig(*SIZES), FusionConfig(*SIZES))],
    (lambda: VisionLanguageDecoder.from_text(hooked(), Grid()), "text: layer 1 has hooks .*, expected a plain Block"),
    (lambda: SwinStream()(torch.zeros(1, 3, 32, 64)), r"pixels: got \(32, 64\), expected 64 x 64"),
    (lambda: SwinStream({"image_size": 64}, Grid()), "config and model: got both"),
]  # fmt: skip


@pytest.mark.parametrize("call, words", BAD)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_projectors_picture_counts_towards_the_length():
    model = model_of(fusion="projector", max_position_embeddings=16)
    image = model.encode_image(pixels(1))
    assert generate(model, [[1, 2, 3]], 7, image=image)[0].new_tokens == 7
    with pytest.raises(ValueError, match=r"9 tokens and 8 new ones make 17"):
        generate(model, [[1, 2, 3]], 8, image=image)


@pytest.mark.parametrize("prepared", [False, True])
def test_a_projectors_picture_that_comes_too_late_is_refused(prepared):
    model, ids, late = model_of(fusion="projector"), ids_of(1), r"image: the cache holds \d+ tokens that do not begin"
    if prepared:
        fast.prepare(model)
    with torch.no_grad():
        one, other, same = (model.encode_image(pixels(1, seed=seed)) for seed in (1, 2, 1))
        for first, image in (({}, one), ({"image": one}, other), ({"image": other}, one)):
            for more in (ids, ids[:, :1]):
                cache = model.make_cache(max_length=40)
                model(ids, cache, **first)
                with pytest.raises(ValueError, match=late):
                    model(more, cache, image=image)
        cache = model.make_cache(max_length=40)
        model(ids, cache, image=one)
        want = model(torch.cat((ids, ids), 1), image=one)[:, -7:]
        for known in (one, same, None):  # it is there already, and may be handed over again or not
            cache.truncate(N + 7)
            torch.testing.assert_close(model(ids, cache, image=known), want, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(model(ids, copy.deepcopy(cache), image=one).shape, want.shape)
        cache.truncate(3)  # in the middle of the picture
        with pytest.raises(ValueError, match=late):
            model(ids, cache, image=one)
        cache.truncate(0)
        torch.testing.assert_close(model(ids, cache, image=other), model(ids, image=other), atol=2e-5, rtol=1e-4)
        cache.truncate(0)
        model(torch.cat((ids, ids), 1), cache)
        with pytest.raises(ValueError, match=late):
            model(ids, cache, image=other)


# --- streams


def test_a_config_alone_builds_the_swin_too():
    model = build(FusionConfig(*SIZES), seed=0)
    assert isinstance(model, VisionLanguageDecoder) and isinstance(model.vision, SwinStream)
    with torch.no_grad():
        assert model.vision(torch.zeros(2, 3, 64, 64)).shape == (2, 64, model.vision.hidden_size) == (2, 64, 64)
        assert model.encode_image(torch.zeros(1, 3, 64, 64)).keys_values[0][0].shape == (1, 2, 64, 8)
