"""Early exit against a parallel reference and truncated models; mixture of depths and its look at the future."""

import math

import pytest
import torch
import torch.nn.functional as F

from dslib.architecture import decoder, depth, sparse_decoder
from dslib.architecture.cache import Step
from dslib.architecture.depth import ExitRule, MixtureOfDepths, early_exit

LAYERS = 6
MLA = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
SHAPES = {
    "dense": lambda: decoder.preset("tiny", num_hidden_layers=LAYERS, hidden_size=32, intermediate_size=48),
    "window": lambda: decoder.preset("tiny", num_hidden_layers=LAYERS, hidden_size=32, sliding_window=5),
    "biased": lambda: decoder.preset("tiny", num_hidden_layers=LAYERS, hidden_size=32, qkv_bias=True),
    "experts": lambda: sparse_decoder.preset("tiny-moe", num_hidden_layers=LAYERS, hidden_size=32),
    "hashed": lambda: sparse_decoder.preset("tiny-moe", num_hidden_layers=LAYERS, hidden_size=32, num_hash_layers=2),
    "latent": lambda: sparse_decoder.preset("tiny-moe", num_hidden_layers=LAYERS, hidden_size=32, **MLA),
}


def make(kind="dense", spread=8.0):
    """A random model whose exits are unsure to very different degrees from token to token."""
    model = decoder.build(SHAPES[kind](), seed=0).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.mul_(spread)
        model.embed_tokens.weight.mul_(15)
    return model


def ids(batch=3, tokens=12, seed=0):
    return torch.randint(256, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def middle(model, tokens, min_layers=2):
    """A threshold that about half of the tokens pass before the end."""
    with torch.no_grad():
        seen = torch.cat([early_exit(model, tokens, ExitRule(0.0, d)).confidence.flatten() for d in range(2, LAYERS)])
    return ExitRule(float(seen.quantile(0.7)), min_layers)


@pytest.mark.parametrize("kind", SHAPES)
@torch.no_grad()
def test_a_threshold_of_one_is_the_plain_model(kind):
    model, tokens = make(kind), ids()
    result = early_exit(model, tokens, ExitRule(1.0, 2))
    assert torch.equal(result.logits, model(tokens))
    assert (result.depths == LAYERS).all() and result.layers_run == LAYERS and result.mean_depth == LAYERS
    assert torch.allclose(result.confidence, result.logits.softmax(-1).amax(-1))


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("cache_kind", ["growing", "preallocated"])
@torch.no_grad()
def test_token_by_token_equals_all_at_once(kind, cache_kind):
    model, tokens = make(kind), ids()
    rule = middle(model, tokens)
    whole = early_exit(model, tokens, rule)
    assert len(whole.depths.unique()) > 2, "the test needs tokens of different depths"
    cache = model.make_cache(cache_kind, batch_size=3, max_length=12)
    parts = [early_exit(model, piece, rule, cache) for piece in tokens.split([4, *[1] * 8], dim=1)]
    assert torch.equal(torch.cat([p.depths for p in parts], 1), whole.depths)
    assert torch.allclose(torch.cat([p.logits for p in parts], 1), whole.logits, atol=2e-3, rtol=1e-3)
    assert any(p.layers_run < LAYERS for p in parts) or whole.depths.max(0).values.min() == LAYERS


@torch.no_grad()
def test_a_ring_of_a_window_remembers_too():
    model, tokens = make("window"), ids()
    rule = middle(model, tokens)
    whole = early_exit(model, tokens, rule)
    cache = model.make_cache("rolling", batch_size=3)
    parts = [early_exit(model, piece, rule, cache) for piece in tokens.split([4, 3, *[1] * 5], dim=1)]
    assert torch.equal(torch.cat([p.depths for p in parts], 1), whole.depths)
    assert torch.allclose(torch.cat([p.logits for p in parts], 1), whole.logits, atol=2e-3, rtol=1e-3)


@torch.no_grad()
def test_a_cache_that_the_model_refuses_is_refused_and_left_untouched():
    model, tokens = make(), ids()
    for cache, message in (
        (make("window").make_cache("growing"), "cache: made for window=5"),
        (model.make_cache("preallocated", batch_size=2, max_length=12), "cache: made for 2 sequences"),
    ):
        with pytest.raises(ValueError, match=message):
            early_exit(model, tokens, ExitRule(), cache)
        assert cache.length == 0


@pytest.mark.parametrize("kind", ["dense", "experts", "latent"])
@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch(kind):
    model, tokens = make(kind), ids()
    rule = middle(model, tokens)
    whole = early_exit(model, tokens, rule)
    for row in range(3):
        alone = early_exit(model, tokens[row : row + 1], rule)
        assert torch.equal(alone.depths[0], whole.depths[row])
        assert torch.allclose(alone.logits[0], whole.logits[row], atol=2e-3, rtol=1e-3)
        assert alone.layers_run == int(whole.depths[row].max())
    assert whole.layers_run == int(whole.depths.max())


@torch.no_grad()
def test_sequences_at_their_own_positions():
    model, tokens = make(), ids(batch=2)
    rule = middle(model, tokens)
    cache = model.make_cache("preallocated", batch_size=2, max_length=12)
    positions = torch.arange(8).repeat(2, 1)
    early_exit(model, tokens[:, :8], rule, cache, positions)
    where = torch.tensor([[8], [5]])  # the second sequence goes back to position 5
    step = early_exit(model, torch.stack([tokens[0, 8:9], tokens[1, 5:6]]), rule, cache, where)
    first = early_exit(model, tokens[:1, :9], rule)
    second = early_exit(model, tokens[1:, :6], rule)
    assert step.depths.flatten().tolist() == [int(first.depths[0, -1]), int(second.depths[0, -1])]
    assert torch.allclose(step.logits[0, 0], first.logits[0, -1], atol=2e-3, rtol=1e-3)
    assert torch.allclose(step.logits[1, 0], second.logits[0, -1], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["dense", "biased", "latent"])
@torch.no_grad()
def test_skipped_layers_keep_what_the_propagated_state_gives(kind):
    """A threshold of 0 sends every token out after two layers: the model cut there, and its last state above."""
    model, tokens = make(kind), ids(batch=1, tokens=5)
    cache = model.make_cache("preallocated", max_length=5)
    result = early_exit(model, tokens, ExitRule(0.0, 2), cache)
    assert (result.depths == 2).all() and result.layers_run == 2
    step = Step(torch.arange(5).unsqueeze(0), causal=True)
    rope = model.rope(step.positions, torch.float32)
    x = model.embed_tokens(tokens)
    for index in range(2):
        x = model.layers[index](x, rope, step, None, index, tokens)
    assert torch.allclose(result.logits, model.lm_head(model.norm(x)), atol=1e-4, rtol=1e-4)
    full = model.make_cache("preallocated", max_length=5)
    step = full.advance(5, None, tokens.device)
    for index in range(2, LAYERS):
        layer = model.layers[index]
        layer.self_attn(layer.input_layernorm(x), rope, step, full, index)
        for kept, want in zip(cache._layers[index], full._layers[index], strict=True):
            assert torch.allclose(kept, want, atol=1e-4, rtol=1e-4)


def test_exits_are_asked_every_so_often():
    assert ExitRule(0.5, 4).exits(8) == (4, 5, 6, 7, 8)
    assert ExitRule(0.5, 4, every=3).exits(8) == (4, 7, 8)
    assert ExitRule(0.5, 8).exits(8) == (8,)
    model, tokens = make(), ids()
    with torch.no_grad():
        depths = early_exit(model, tokens, ExitRule(middle(model, tokens).threshold, 2, every=2)).depths
    assert set(depths.unique().tolist()) <= {2, 4, 6}


def test_the_loss_weights_each_exit_by_its_depth():
    model, tokens = make(spread=1.0), ids()
    inputs, targets, rule = tokens[:, :-1], tokens[:, 1:], ExitRule(0.5, 2, every=2)
    losses = depth.exit_losses(model, inputs, targets, rule)
    assert losses.shape == (3, 3, 11)
    plain = F.cross_entropy(model(inputs).transpose(1, 2), targets, reduction="none")
    assert torch.allclose(losses[-1], plain, atol=1e-5)
    total = depth.exit_loss(model, inputs, targets, rule)
    a, b, c = losses.mean((1, 2))
    assert torch.allclose(total, (2 * a + 4 * b + 6 * c) / 12)
    total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_mixture_of_depths_with_room_for_all_is_the_block_scaled():
    model, tokens = make(), ids()
    step = Step(torch.arange(12).unsqueeze(0), causal=True)
    rope, x = model.rope(step.positions, torch.float32), model.embed_tokens(tokens)
    wrapped = MixtureOfDepths(model.layers[0], 32, capacity=1.0)
    plain = model.layers[0](x, rope, step, None, 0, tokens)
    want = x + (plain - x) * wrapped.router(x).sigmoid()
    assert torch.allclose(wrapped(x, rope, step, None, 0, tokens), want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_mixture_of_depths_leaves_the_others_as_they_are():
    model, tokens = make(), ids()
    step = Step(torch.arange(12).unsqueeze(0), causal=True)
    rope, x = model.rope(step.positions, torch.float32), model.embed_tokens(tokens)
    wrapped = MixtureOfDepths(model.layers[0], 32, capacity=0.25)
    y = wrapped(x, rope, step, None, 0, tokens)
    changed = (y != x).any(-1)
    assert torch.equal(changed, wrapped.last_choice) and (changed.sum(1) == 3).all()
    best = wrapped.router(x).squeeze(-1).topk(3, dim=1).indices.sort(dim=1).values
    assert torch.equal(changed.nonzero()[:, 1].view(3, 3), best)
    # The chosen attend to one another only, at their own positions: the block on those tokens alone says the same.
    row, where = 1, best[1]
    turns = tuple(part[0][where].unsqueeze(0) for part in rope)
    alone = model.layers[0](
        x[row : row + 1, where], turns, Step(torch.arange(3).unsqueeze(0), causal=True), None, 0, None
    )
    want = x[row, where] + (alone[0] - x[row, where]) * wrapped.router(x[row, where]).sigmoid()
    assert torch.allclose(y[row, where], want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_choice_by_rank_looks_at_the_future_and_the_predictor_does_not():
    model = depth.with_mixture_of_depths(make(), capacity=0.25, every=1)
    tokens = ids(batch=1, tokens=16)
    changed = tokens.clone()
    changed[0, 10:] = ids(batch=1, tokens=6, seed=1)[0]
    before, after = model(tokens)[:, :10], model(changed)[:, :10]
    assert not torch.allclose(before, after, atol=1e-3)
    for block in model.layers:
        block.causal = True
    assert torch.allclose(model(tokens)[:, :10], model(changed)[:, :10], atol=1e-3, rtol=1e-3)


def test_the_predictor_learns_the_choice_and_its_loss_moves_nothing_else():
    model = depth.with_mixture_of_depths(decoder.build(SHAPES["dense"](), seed=0), capacity=0.5)
    block, tokens = model.layers[1], ids(batch=8, tokens=32)
    assert isinstance(block, MixtureOfDepths) and not isinstance(model.layers[0], MixtureOfDepths)
    optimizer = torch.optim.Adam(block.predictor.parameters(), lr=0.1)
    losses = []
    for _ in range(120):
        model(tokens)
        losses.append(block.last_predictor_loss)
        model.zero_grad()
        losses[-1].backward()
        assert block.router.weight.grad is None and model.embed_tokens.weight.grad is None
        optimizer.step()
    with torch.no_grad():
        model(tokens)
        ranked, block.causal = block.last_choice, True
        model(tokens)
    assert losses[-1] < 0.7 * losses[0]
    assert (block.last_choice == ranked).float().mean() > 0.8


def test_nobody_chosen_leaves_the_sequence_as_it_is():
    model, tokens = make(), ids()
    wrapped = MixtureOfDepths(model.layers[0], 32)
    wrapped.causal = True
    torch.nn.init.constant_(wrapped.predictor.bias, -1e9)
    step = Step(torch.arange(12).unsqueeze(0), causal=True)
    x = model.embed_tokens(tokens)
    assert torch.equal(wrapped(x, model.rope(step.positions, torch.float32), step, None, 0, tokens), x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ExitRule(1.5), "threshold: got 1.5, expected 0 to 1"),
        (lambda: ExitRule(-0.1), "threshold: got -0.1"),
        (lambda: ExitRule(math.nan), "threshold: got nan"),
        (lambda: ExitRule(0.5, 0), "min_layers: got 0, expected at least 1"),
        (lambda: ExitRule(0.5, 1, 0), "every: got 0"),
        (lambda: early_exit(make(), ids(), ExitRule(0.5, 7)), "min_layers: got 7, expected at most the model's 6"),
        (lambda: early_exit(make(), ids()[:0], ExitRule()), r"input_ids: got shape \(0, 12\)"),
        (lambda: early_exit(make(), ids()[0], ExitRule()), r"input_ids: got shape \(12,\)"),
        (lambda: MixtureOfDepths(torch.nn.Identity(), 8, 0.0), "capacity: got 0.0"),
        (lambda: MixtureOfDepths(torch.nn.Identity(), 8, 1.5), "capacity: got 1.5"),
        (lambda: early_exit(make(), ids().float(), ExitRule()), "input_ids: got dtype torch.float32"),
        (lambda: depth.with_mixture_of_depths(make())(ids()[:0]), r"input_ids: got shape \(0, 12\)"),
        (lambda: depth.with_mixture_of_depths(make(), every=0), "every: got 0"),
        (lambda: depth.with_mixture_of_depths(make(), every=7), "every: got 7, expected 1 to the model's 6 layers"),
        (lambda: depth.with_mixture_of_depths(depth.with_mixture_of_depths(make())), "expected plain blocks"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_nan_is_named_with_its_layer():
    model = make()
    model.layers[2].mlp.down_proj.weight.data[0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite after layer 3"):
        early_exit(model, ids(), ExitRule(0.99, 2))


def test_a_mixture_of_depths_refuses_a_cache():
    model = depth.with_mixture_of_depths(make())
    with pytest.raises(ValueError, match="cache: got one, expected None"):
        model(ids(), model.make_cache("growing"))


@torch.no_grad()
def test_a_mixture_of_depths_refuses_a_cache_also_when_all_left_below_it():
    model = depth.with_mixture_of_depths(make())
    with pytest.raises(ValueError, match="cache: got one, expected None"):
        early_exit(model, ids(), ExitRule(0.0, 1), model.make_cache("growing"))


@torch.no_grad()
def test_a_mixture_of_depths_names_nan():
    model = depth.with_mixture_of_depths(make())
    model.layers[0].mlp.down_proj.weight.data[0] = math.nan
    with pytest.raises(ValueError, match="router scores are NaN or infinite"):
        model(ids())


@torch.no_grad()
def test_a_mixture_of_depths_has_the_models_dtype_and_device():
    half = depth.with_mixture_of_depths(decoder.build(SHAPES["experts"](), seed=0, dtype=torch.bfloat16))
    assert half(ids()).dtype == torch.bfloat16
    counted = depth.with_mixture_of_depths(decoder.build(SHAPES["dense"](), device="meta"))
    assert {parameter.device.type for parameter in counted.parameters()} == {"meta"}


@torch.no_grad()
def test_the_number_of_places_is_not_rounded_down_by_floats():
    model, tokens = depth.with_mixture_of_depths(make(), capacity=0.57), ids(tokens=100)
    model(tokens)
    assert (model.layers[1].last_choice.sum(1) == 57).all()
