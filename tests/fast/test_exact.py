"""What users change in a model has its effect everywhere, prepared or not, before the change or after it."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from dslib import fast
from dslib.architecture.decoder import DecoderConfig, build
from dslib.architecture.depth import with_mixture_of_depths
from dslib.architecture.fusion import FusionConfig
from dslib.architecture.generation import generate, stream
from dslib.architecture.int4.layers import quantize_
from dslib.architecture.layers import RMSNorm, SwiGLU
from dslib.architecture.sparse_decoder import SparseConfig
from dslib.exact import exactly
from dslib.fast import scoring
from dslib.fast.scoring import Row
from dslib.fast.token_step import why_not
from dslib.performance.accuracy import log_likelihoods
from dslib.performance.speculative import PromptLookup, speculate

SIZES = (64, 32, 48, 2, 4, 2)
LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
MODELS = {
    "dense": DecoderConfig(*SIZES),
    "window, bias": DecoderConfig(*SIZES, sliding_window=5, qkv_bias=True),
    "experts": SparseConfig(*SIZES, num_experts=4, num_experts_per_tok=2),
    "latent": SparseConfig(*SIZES, num_experts=4, num_experts_per_tok=2, **LATENT),
}


class LowRank(nn.Linear):
    """The weights of a layer and an adapter beside them."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.weight = layer.weight
        self.a, self.b = (
            nn.Parameter(torch.randn(2, layer.in_features)),
            nn.Parameter(torch.randn(layer.out_features, 2)),
        )

    def forward(self, x):
        return super().forward(x) + x @ self.a.T @ self.b.T


class Around(nn.Module):
    """A wrapper that passes attributes on, as adapters' libraries do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "inner" else getattr(super().__getattr__("inner"), name)

    def forward(self, *args, **kwargs):
        return 1.5 * self.inner(*args, **kwargs)


class Doubled(RMSNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def own_forward(module):
    plain = module.forward
    module.forward = lambda *args, **kwargs: 1.5 * plain(*args, **kwargs)


def with_bias(module):
    module.bias = nn.Parameter(torch.randn(module.out_features))


LINEAR = {"subclass": LowRank, "added bias": with_bias}
ANY = {
    "wrapper": Around,
    "hook": lambda m: m.register_forward_hook(lambda *call: 1.5 * call[2]) and None,
    "hook before": lambda m: m.register_forward_pre_hook(lambda _, args: (2 * args[0], *args[1:])) and None,
    "own forward": own_forward,
}


def changed(kind, name, how):
    """A model of a kind with one module changed; with none where there is no name."""
    model = build(MODELS[kind], seed=0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3)
    if name is not None:
        change(model, name, how)
    return model.eval()


def change(model, name, how):
    torch.manual_seed(1)
    parent, _, last = name.rpartition(".")
    module = model.get_submodule(name)
    new = {**LINEAR, **ANY, "kind of norm": lambda m: _doubled(m)}[how](module)
    if isinstance(new, nn.Module):
        setattr(model.get_submodule(parent), last, new)


def _doubled(norm):
    new = Doubled(norm.weight.numel(), norm.eps)
    new.weight = norm.weight
    return new


def cases():
    for kind, config in MODELS.items():
        for name, module in build(config, device="meta").named_modules():
            inside = name.startswith(("layers.1", "norm", "lm_head")) and not isinstance(module, nn.ModuleList)
            if inside and "router" not in name and "experts" not in name:
                hows = {**ANY, **(LINEAR if isinstance(module, nn.Linear) else {})}
                if isinstance(module, RMSNorm):
                    hows = {**hows, "kind of norm": None}
                for how in hows:
                    yield pytest.param(kind, name, how, id=f"{kind}-{name}-{how}")


@torch.inference_mode()
def by_whole_passes(model, prompt, count):
    ids = torch.tensor([prompt])
    for _ in range(count):
        ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), dim=1)
    return ids[0, len(prompt) :].tolist()


def greedy_texts(model, prompt, count):
    """One text, in every way in which text is made."""
    yield "generate", generate(model, [prompt], count)[0].tokens
    yield "stream", list(stream(model, prompt, count))
    yield "speculate", speculate(model, prompt, count, PromptLookup()).tokens
    yield "batch", generate(model, [prompt, prompt[:2]], count)[0].tokens


PREPARED = ("never", "before the change", "after the change")


def changed_and_prepared(kind, name, how, prepared):
    """As :func:`changed`; the model may have been prepared, and used, before it was changed."""
    model = changed(kind, None, None)
    if prepared == "before the change":
        fast.prepare(model)
        generate(model, [[1, 2]], 3)
    change(model, name, how)
    if prepared == "after the change":
        fast.prepare(model)
    return model


@pytest.mark.parametrize("prepared", PREPARED)
@pytest.mark.parametrize(("kind", "name", "how"), list(cases()))
def test_greedy_text_is_that_of_whole_passes(kind, name, how, prepared):
    model, prompt = changed_and_prepared(kind, name, how, prepared), [1, 2, 3, 2, 3]
    untouched = changed(kind, name, how)
    wanted = by_whole_passes(untouched, prompt, 6)
    for way, tokens in greedy_texts(model, prompt, 6):
        assert tokens == wanted, way


@torch.inference_mode()
@pytest.mark.parametrize("prepared", PREPARED)
@pytest.mark.parametrize(("kind", "name", "how"), list(cases()))
def test_scores_are_those_of_whole_passes(kind, name, how, prepared):
    model, context, ends = changed_and_prepared(kind, name, how, prepared), [1, 2, 3], [[5, 6], [7]]
    before = {key: module.__dict__.get("forward") for key, module in model.named_modules()}
    assert_scores(model, context, ends)
    assert before == {key: module.__dict__.get("forward") for key, module in model.named_modules()}


def assert_scores(model, context, ends):
    found = log_likelihoods(model, [Row(context, ends)])[0]
    for end, score in zip(ends, found.tolist(), strict=True):
        logits = model(torch.tensor([context + end]))[0].log_softmax(-1)
        wanted = sum(logits[len(context) - 1 + place, token].item() for place, token in enumerate(end))
        assert score == pytest.approx(wanted, abs=2e-3)


@torch.inference_mode()
@pytest.mark.parametrize("prepared", [False, True])
def test_a_mixture_of_depths_is_scored_by_whole_passes(prepared):
    """Its tokens compete for places, so that no continuation may share a pass with another."""
    model = with_mixture_of_depths(changed("dense", None, None), 0.5)
    if prepared:
        fast.prepare(model)
    assert scoring.why_not(model) is not None
    assert_scores(model, [1, 2, 3], [[5, 6], [7]])


# --- weights that change, whatever changes them


def fused_step(model):
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW(model.parameters(), lr=0.3, fused=True).step()


def in_inference_mode(model):
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.neg_()


def new_data(model):
    for parameter in model.parameters():
        parameter.data = parameter.data.flip(0).contiguous()


def one_norm(model):
    model.layers[1].post_attention_layernorm.weight.data.mul_(3)


def trained(model):
    with torch.enable_grad():
        model(torch.arange(6).view(2, 3))[..., 0].sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.5 * (parameter.grad.sign() if parameter.grad is not None else 0)


WRITES = {
    "data": lambda m: [p.data.neg_() for p in m.parameters()],
    "new data": new_data,
    "one norm": one_norm,
    "no_grad": torch.no_grad()(lambda m: [p.neg_() for p in m.parameters()]),
    "inference mode": in_inference_mode,
    "fused optimiser": fused_step,
    "a step": trained,
    "loaded": lambda m: m.load_state_dict({k: -v for k, v in m.state_dict().items()}),
    "assigned": lambda m: m.load_state_dict({k: -v for k, v in m.state_dict().items()}, assign=True),
    "double and back": lambda m: m.bfloat16().float(),
    "parametrised": lambda m: parametrize.register_parametrization(m.layers[0].self_attn.o_proj, "weight", Negative()),
}


class Negative(nn.Module):
    def forward(self, weight):
        return -weight


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_prepared_model_sees_every_write(kind, write):
    if (
        kind != "dense"
        and write is WRITES["parametrised"]
        and not hasattr(build(MODELS[kind]).layers[0].mlp, "down_proj")
    ):
        pytest.skip("a mixture has no such layer")
    model, prompt = changed(kind, None, None), [1, 2, 3]
    fast.prepare(model)
    cache = model.make_cache(max_length=12)
    with torch.inference_mode():
        model(torch.tensor([prompt]), cache)
        model(torch.tensor([[5]]), cache)
    write(model)
    with torch.inference_mode():  # also in the middle of a text, whose keys and values stay as they are
        plain = copy.deepcopy(cache)
        got = model(torch.tensor([[7]]), cache)
        fast.release(model)
        torch.testing.assert_close(got, model(torch.tensor([[7]]), plain), atol=1e-4, rtol=1e-4)
        fast.prepare(model)
    tokens, wanted = generate(model, [prompt], 6)[0].tokens, by_whole_passes(model, prompt, 6)
    assert tokens == wanted


# --- settings and structure that change


def with_theta(model):
    model.config = dataclasses.replace(model.config, rope_theta=100.0)


def half_of_the_layers(model):
    del model.layers[1]


def a_block_twice(model):
    model.layers[1] = model.layers[0]


def narrower(model):
    model.layers[0].mlp = SwiGLU(32, 20)
    for parameter in model.layers[0].mlp.parameters():
        nn.init.normal_(parameter, std=0.3)


def transposed(model):
    proj = model.layers[0].self_attn.o_proj
    proj.weight.data = proj.weight.data.T


STRUCTURES = {
    "another theta": with_theta,
    "another eps": lambda m: setattr(m.layers[1].input_layernorm, "eps", 10.0),
    "a rope of its own": lambda m: setattr(m, "rope", lambda at, dtype: type(m).rope(m, 2 * at, dtype)),
    "half of the layers": half_of_the_layers,
    "a block twice": a_block_twice,
    "a narrower network": narrower,
    "one linear layer for a network": lambda m: setattr(m.layers[0], "mlp", m.layers[1].self_attn.o_proj),
    "a smaller head": lambda m: setattr(m, "lm_head", nn.Linear(32, 48, bias=False)),
    "a transposed weight": transposed,
}


@pytest.mark.parametrize("prepared", PREPARED[1:])
@pytest.mark.parametrize("change", STRUCTURES.values(), ids=STRUCTURES)
def test_what_a_model_is_made_of_may_change_too(change, prepared):
    """Square projections, so that a transposed one fits as well."""
    model, prompt = build(MODELS["dense"], seed=0).eval(), [1, 2, 3]
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3)
    if prepared == "before the change":
        fast.prepare(model)
        generate(model, [prompt], 2)
    change(model)
    if prepared == "after the change":
        fast.prepare(model)
    tokens = generate(model, [prompt], 6)[0].tokens
    fast.release(model)
    assert tokens == by_whole_passes(model, prompt, 6)


# --- prepare, describe, release


def test_prepared_twice_copied_moved_and_released():
    model, prompt = changed("dense", None, None), [1, 2, 3]
    wanted = by_whole_passes(model, prompt, 6)
    own = {name: dict(vars(module)) for name, module in model.named_modules()}
    first, second = fast.prepare(model), fast.prepare(model)
    assert first == second and not first.plain and len(first.fast) == 1 + 2 * 4 + 1
    twin = copy.deepcopy(model)
    assert twin.forward.stands_for is twin and fast.describe(twin) == first
    for parameter in twin.parameters():
        parameter.data.neg_()
    assert generate(model, [prompt], 6)[0].tokens == wanted
    assert generate(twin, [prompt], 6)[0].tokens == by_whole_passes(twin, prompt, 6) != wanted
    half = copy.deepcopy(model).bfloat16()
    assert fast.describe(half).fast == first.fast[:1] and generate(half, [prompt], 3)[0].new_tokens == 3
    assert {why for _, _, why in fast.describe(half).plain} == {"is in torch.bfloat16, expected torch.float32"}
    assert generate(model.double(), [prompt], 6)[0].tokens == wanted
    assert fast.describe(model).plain[0] == ("", "Decoder", "is in torch.float64") and not fast.describe(model).fast
    fast.release(model.float())
    assert own.keys() == dict(model.named_modules()).keys() and not fast.is_prepared(model)
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_model_that_is_trained_is_trained_as_it_is():
    ids, losses = torch.arange(12).view(2, 6), []
    for prepared in (False, True):
        model = changed("experts", None, None).train()
        if prepared:
            fast.prepare(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(3):
            loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_autocast_and_another_default_dtype_change_nothing_about_the_answer(kind):
    model, token = changed(kind, None, None), torch.tensor([[3]])
    before = torch.get_default_dtype()
    found = []
    for prepared in (False, True):
        if prepared:
            fast.prepare(model)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(model(token, model.make_cache("growing")))
        torch.set_default_dtype(torch.float64)
        try:
            cache = model.make_cache(max_length=3)
            model(token, cache)
            found.append(model(token, cache))
        finally:
            torch.set_default_dtype(before)
    for plain, quick in zip(found[:2], found[2:], strict=True):
        assert plain.dtype is quick.dtype
        torch.testing.assert_close(plain, quick, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_prepared_is_refused_or_said():
    with pytest.raises(ValueError, match=r"model: got dict, expected a torch\.nn\.Module"):
        fast.prepare({})
    report = fast.prepare(nn.Sequential(nn.GELU()))
    assert not report.fast and not report.plain and str(report) == "nothing here has a faster way"
    adapted = changed("dense", "layers.1.mlp.down_proj", "subclass")
    report = fast.prepare(adapted)
    assert ("layers.1.mlp.down_proj", "LowRank", "is not exactly a Linear") in report.plain
    assert ("", "Decoder", "layers.1.mlp.down_proj is a LowRank") in report.plain
    assert "plain     1 x Decoder: layers.1.mlp.down_proj is a LowRank (the model)" in str(report)


def test_a_forward_that_a_user_sets_is_never_taken_away():
    model = changed("dense", None, None)
    layer = model.layers[1].mlp.down_proj
    layer.forward = mine = lambda x: torch.zeros(*x.shape[:-1], layer.out_features)
    fast.prepare(model)
    log_likelihoods(model, [Row([1, 2, 3], [[5], [6]])])
    fast.release(model)
    assert layer.__dict__["forward"] is mine


@torch.inference_mode()
def test_weights_of_four_bits_and_a_hook():
    model, prompt = build(DecoderConfig(64, 64, 96, 2, 4, 2), seed=0).eval(), [1, 2, 3]
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3)
    quantize_(model, skip=("embed_tokens",))
    fast.prepare(model)
    before = generate(model, [prompt], 6)[0].tokens
    model.layers[0].mlp.register_forward_hook(lambda module, args, out: -out)
    tokens, wanted = generate(model, [prompt], 6)[0].tokens, by_whole_passes(model, prompt, 6)
    assert tokens == wanted != before


def test_a_latent_layer_that_was_changed_is_not_absorbed():
    model = changed("latent", "layers.1.self_attn.kv_b_proj", "subclass")
    ids, logits = torch.arange(12).view(1, -1), {}
    for form in ("naive", "absorbed", "auto"):
        for layer in model.layers:
            layer.self_attn.form = form
        with torch.no_grad():
            logits[form] = model(ids)
    torch.testing.assert_close(logits["absorbed"], logits["naive"])
    torch.testing.assert_close(logits["auto"], logits["naive"])


def test_the_shortcut_is_taken_where_nothing_was_changed():
    for config in (MODELS["dense"], MODELS["window, bias"], FusionConfig(*SIZES, cross_attention_every=2)):
        model = build(config)
        fast.prepare(model)
        assert why_not(model) is None
    model = build(MODELS["experts"])
    fast.prepare(model)
    assert why_not(model) == "layers.0 is a SparseBlock" or "is a MoE" in why_not(model)
    assert scoring.why_not(model) is None


def test_kinds_biases_and_watchers():
    layer = nn.Linear(4, 4)
    assert exactly(layer, nn.Linear) and not exactly(layer, nn.Embedding) and not exactly(layer, nn.Linear, bias=False)
    handle = nn.modules.module.register_module_forward_hook(lambda *call: None)  # as a profiler does
    try:
        assert exactly(layer, nn.Linear)
    finally:
        handle.remove()
