"""What users change in a model has its effect everywhere: shortcuts stand aside for adapters, hooks and the like."""

import pytest
import torch
from torch import nn

from dslib.architecture.decoder import DecoderConfig, build
from dslib.architecture.depth import with_mixture_of_depths
from dslib.architecture.fusion import FusionConfig
from dslib.architecture.layers import RMSNorm
from dslib.architecture.sparse_decoder import SparseConfig
from dslib.fast.exact import exactly
from dslib.fast.linear import Linear
from dslib.fast.scoring import Row, log_likelihoods
from dslib.fast.token_step import TokenStep
from dslib.performance.generation import generate
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
    """A model of a kind with one module changed."""
    torch.manual_seed(0)
    model = build(MODELS[kind], seed=0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3)
    parent, _, last = name.rpartition(".")
    module = model.get_submodule(name)
    new = {**LINEAR, **ANY, "kind of norm": lambda m: _doubled(m)}[how](module)
    if isinstance(new, nn.Module):
        setattr(model.get_submodule(parent), last, new)
    return model.eval()


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


@pytest.mark.parametrize(("kind", "name", "how"), list(cases()))
def test_greedy_text_is_that_of_whole_passes(kind, name, how):
    model, prompt = changed(kind, name, how), [1, 2, 3, 2, 3]
    wanted = by_whole_passes(model, prompt, 6)
    assert generate(model, [prompt], 6)[0].tokens == wanted
    assert speculate(model, prompt, 6, PromptLookup()).tokens == wanted


@torch.inference_mode()
@pytest.mark.parametrize(("kind", "name", "how"), list(cases()))
def test_scores_are_those_of_whole_passes(kind, name, how):
    model, context, ends = changed(kind, name, how), [1, 2, 3], [[5, 6], [7]]
    before = {key: module.__dict__.get("forward") for key, module in model.named_modules()}
    found = log_likelihoods(model, [Row(context, ends)])[0]
    for end, score in zip(ends, found.tolist(), strict=True):
        logits = model(torch.tensor([context + end]))[0].log_softmax(-1)
        wanted = sum(logits[len(context) - 1 + place, token].item() for place, token in enumerate(end))
        assert score == pytest.approx(wanted, abs=2e-3)
    assert before == {key: module.__dict__.get("forward") for key, module in model.named_modules()}


def test_a_mixture_of_depths_is_not_scored():
    model = with_mixture_of_depths(build(MODELS["dense"], seed=0), 0.5)
    with pytest.raises(ValueError, match="model: has a MixtureOfDepths"):
        log_likelihoods(model, [Row([1, 2], [[3]])])


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


def test_the_shortcut_is_still_taken_where_nothing_was_changed():
    assert TokenStep.fits(build(MODELS["dense"])) and TokenStep.fits(build(MODELS["window, bias"]))
    assert TokenStep.fits(build(FusionConfig(*SIZES, cross_attention_every=2)))


def test_kinds_biases_and_watchers():
    layer = Linear(4, 4)
    assert exactly(layer, Linear) and not exactly(layer, nn.Linear) and not exactly(layer, Linear, bias=False)
    handle = nn.modules.module.register_module_forward_hook(lambda *call: None)  # as a profiler does
    try:
        assert exactly(layer, Linear)
    finally:
        handle.remove()
