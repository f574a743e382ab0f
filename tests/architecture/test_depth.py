"""Early exit against a parallel reference and truncated models; mixture of depths and its look at the future."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from dslib.architecture import decoder, depth, sparse_decoder
from dslib.architecture.cache import Step
from dslib.architecture.depth import ExitRule, MixtureOfDepths, early_exit
from dslib.performance.training import next_token_loss

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


CACHED = [*[(kind, cache) for kind in SHAPES for cache in ("growing", "preallocated")], ("window", "rolling")]


@pytest.mark.parametrize(("kind", "cache_kind"), CACHED)
@torch.no_grad()
def test_token_by_token_equals_all_at_once(kind, cache_kind):
    model, tokens = make(kind), ids()
    rule = middle(model, tokens)
    whole = early_exit(model, tokens, rule)
    assert len(whole.depths.unique()) > 2, "the test needs tokens of different depths"
    cache, pieces = model.make_cache(cache_kind, batch_size=3, max_length=12), [1] * 8
    if cache_kind == "rolling":
        pieces = [3, *[1] * 5]
    parts = [early_exit(model, piece, rule, cache) for piece in tokens.split([4, *pieces], dim=1)]
    assert torch.equal(torch.cat([p.depths for p in parts], 1), whole.depths)
    assert torch.allclose(torch.cat([p.logits for p in parts], 1), whole.logits, atol=2e-3, rtol=1e-3)
    assert any(p.layers_run < LAYERS for p in parts) or whole.depths.max(0).values.min() == LAYERS


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
    inputs, targets, rule = tokens[:, :-1], tokens[:, 1:].clone(), ExitRule(0.5, 2, every=2)
    targets[0, 3:] = targets[2, :2] = -100  # no targets: they count for nothing
    losses = depth.exit_losses(model, inputs, targets, rule)
    assert losses.shape == (3, 3, 11)
    plain = F.cross_entropy(model(inputs).transpose(1, 2), targets, reduction="none")
    assert torch.allclose(losses[-1], plain, atol=1e-5)
    total = depth.exit_loss(model, inputs, targets, rule)
    a, b, c = (loss[targets >= 0].mean() for loss in losses)
    assert torch.allclose(total, (2 * a + 4 * b + 6 * c) / 12)
    alone = depth.exit_loss(model, inputs, targets, ExitRule(0.5, LAYERS))
    torch.testing.assert_close(alone, next_token_loss(model, inputs, targets))
    total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def wrapped_block(capacity, model=None):
    """A mixture of depths around the first block of a model, states for it, and a way to call either on them."""
    model, tokens = model or make(), ids()
    wrapped, x = MixtureOfDepths(model.layers[0], 32, capacity), model.embed_tokens(tokens)

    def run(block, x=x, where=slice(None)):
        step = Step(torch.arange(12).unsqueeze(0), causal=True)
        rope = tuple(part[:, where] for part in model.rope(step.positions, torch.float32))
        return block(x, rope, Step(step.positions[:, : x.shape[1]], causal=True), None, 0, tokens[:1, where])

    return wrapped, x, run


@pytest.mark.parametrize("capacity", [0.25, 1.0])
@torch.no_grad()
def test_a_mixture_of_depths_runs_the_block_on_the_chosen_alone(capacity):
    """They attend to one another only, at their own positions; what is added is scaled by the score; the rest stays."""
    wrapped, x, run = wrapped_block(capacity)
    y, places = run(wrapped), int(12 * capacity)
    assert torch.equal((y != x).any(-1), wrapped.last_choice) and (wrapped.last_choice.sum(1) == places).all()
    best = wrapped.router(x).squeeze(-1).topk(places, dim=1).indices.sort(dim=1).values
    for row, where in enumerate(best):
        given = x[row : row + 1, where]
        want = given + (run(wrapped.block, given, where) - given) * wrapped.router(given).sigmoid()
        torch.testing.assert_close(y[row : row + 1, where], want, atol=1e-4, rtol=1e-4)


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
    wrapped, x, run = wrapped_block(0.5)
    wrapped.causal = True
    torch.nn.init.constant_(wrapped.predictor.bias, -1e9)
    assert torch.equal(run(wrapped), x)


@torch.no_grad()
def test_places_are_rounded_down_from_what_was_written():
    """0.57 of 100 is 57, though in floats it is 56.999…"""
    model, tokens = depth.with_mixture_of_depths(make()), ids(batch=1, tokens=100)
    for hundredths in range(1, 101):
        model.layers[1].capacity = hundredths / 100
        model(tokens)
        assert model.layers[1].last_choice.sum() == hundredths


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_autocast_changes_no_router(dtype):
    model, tokens = make(spread=1.0), ids()
    mixture, rule = depth.with_mixture_of_depths(make(spread=1.0), every=1), middle(model, tokens)
    mixture(tokens)
    wanted, plain = mixture.layers[0].last_choice, early_exit(model, tokens, rule)
    with torch.autocast("cpu", dtype=dtype):
        mixture(tokens)
        whole = early_exit(model, tokens, rule)
        assert early_exit(model, tokens, rule, model.make_cache("growing")).logits.dtype == model(tokens).dtype
    assert torch.equal(mixture.layers[0].last_choice, wanted) and whole.confidence.dtype is torch.float32
    torch.testing.assert_close(whole.confidence, plain.confidence, atol=0.05, rtol=0)


def test_copies_after_a_training_step():
    model, tokens = depth.with_mixture_of_depths(make("experts", spread=1.0)), ids()
    (model(tokens).mean() + model.layers[1].last_predictor_loss).backward()
    twin = copy.deepcopy(model)
    assert model.layers[1].last_predictor_loss.requires_grad and not twin.layers[1].last_predictor_loss.requires_grad
    assert torch.equal(twin(tokens), model(tokens))


def subclass(module):
    base = type(module)
    body = {"forward": lambda self, x, *rest: base.forward(self, 2 * x, *rest)}
    module.__class__ = type("Twice", (base,), body)


def own_forward(module):
    module.forward = lambda x, *rest: type(module).forward(module, 2 * x, *rest)


CHANGES = {
    "hook before": lambda module: module.register_forward_pre_hook(lambda _, args: (2 * args[0], *args[1:])),
    "own forward": own_forward,
    "subclass": subclass,
}


@pytest.mark.parametrize("name", ["layers.4", "layers.4.self_attn", "layers.4.input_layernorm"])
@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("kind", ["dense", "experts", "latent"])
@torch.no_grad()
def test_skipped_layers_keep_what_a_changed_block_gives(kind, how, name):
    model, tokens = make(kind), ids()
    rule, module = middle(model, tokens), model.get_submodule(name)
    CHANGES[how](module)
    whole, cache = early_exit(model, tokens, rule), model.make_cache("growing")
    parts = [early_exit(model, piece, rule, cache) for piece in tokens.split(1, dim=1)]
    assert any(part.layers_run < 5 for part in parts), "the test needs steps that skip the layer"
    assert torch.equal(torch.cat([part.depths for part in parts], 1), whole.depths)
    assert torch.allclose(torch.cat([part.logits for part in parts], 1), whole.logits, atol=2e-3, rtol=1e-3)


def cached(call):
    model = depth.with_mixture_of_depths(make())
    call(model, model.make_cache("growing"))


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
        (lambda: depth.with_mixture_of_depths(make(), every=7), "every: got 7, expected 1 to 6"),
        (lambda: depth.with_mixture_of_depths(depth.with_mixture_of_depths(make())), "expected plain blocks"),
        (lambda: early_exit(broken(2), ids(), ExitRule(0.99, 2)), "NaN or infinite after layer 3"),
        (lambda: broken(0, mixture=True)(ids()), "router scores are NaN or infinite"),
        (lambda: cached(lambda model, cache: model(ids(), cache)), "cache: got one, expected None"),
        # also when all left below it
        (lambda: cached(lambda model, cache: early_exit(model, ids(), ExitRule(0.0, 1), cache)), "cache: got one"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def broken(layer, mixture=False):
    model = depth.with_mixture_of_depths(make()) if mixture else make()
    model.layers[layer].mlp.down_proj.weight.data[0] = math.nan
    return model


@torch.no_grad()
def test_a_mixture_of_depths_has_the_models_dtype_and_device():
    half = depth.with_mixture_of_depths(decoder.build(SHAPES["experts"](), seed=0, dtype=torch.bfloat16).eval())
    assert not any(part.training for part in half.modules())
    assert half.with_window(3)(ids()).isfinite().all()
    assert half(ids()).dtype == torch.bfloat16
    counted = depth.with_mixture_of_depths(decoder.build(SHAPES["dense"](), device="meta"))
    assert {parameter.device.type for parameter in counted.parameters()} == {"meta"}
