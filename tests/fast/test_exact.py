"""What users change in a model has its effect everywhere, prepared or not, before the change or after it."""

import copy
import dataclasses
import functools
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from dslib import fast
from dslib.architecture import decoder
from dslib.architecture.balance import CapacityRouter
from dslib.architecture.cache import PreallocatedCache
from dslib.architecture.decoder import Decoder, DecoderConfig, build
from dslib.architecture.depth import with_mixture_of_depths
from dslib.architecture.fusion import FusionConfig
from dslib.architecture.generation import generate, stream
from dslib.architecture.int4.layers import Int4Linear, quantize_
from dslib.architecture.layers import Attention, RMSNorm, SwiGLU
from dslib.architecture.sparse_decoder import SparseConfig
from dslib.exact import exactly
from dslib.fast import scoring, token_step
from dslib.fast.lean_step import LeanStep
from dslib.fast.scoring import Row, log_likelihoods
from dslib.fast.token_step import why_not
from dslib.performance.speculative import PromptLookup, speculate

SIZES = (64, 32, 48, 2, 4, 2)
LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
MODELS = {
    "dense": DecoderConfig(*SIZES),
    "window, bias": DecoderConfig(*SIZES, sliding_window=5, qkv_bias=True),
    "experts": SparseConfig(*SIZES, num_experts=4, num_experts_per_tok=2),
    "latent": SparseConfig(*SIZES, num_experts=4, num_experts_per_tok=2, **LATENT),
}
PROMPT = [1, 2, 3, 2, 3]


def noisy(config=MODELS["dense"]):
    """With a spread of logits: the greedy choice is clear, and changes."""
    model = build(config, seed=0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3)
    return model.eval()


def used(config=MODELS["dense"]):
    """A prepared model that has already written something."""
    model = noisy(config)
    fast.prepare(model)
    generate(model, [[1, 2]], 3)
    return model


@torch.inference_mode()
def by_whole_passes(model, prompt=PROMPT, count=6):
    ids = torch.tensor([prompt])
    for _ in range(count):
        ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), dim=1)
    return ids[0, len(prompt) :].tolist()


def greedy(model, prompt=PROMPT, count=6):
    return generate(model, [prompt], count)[0].tokens


@torch.inference_mode()
def assert_scores(model, context=(1, 2, 3), ends=((5, 6), (7,))):
    found = log_likelihoods(model, [Row(context, ends)])[0]
    for end, score in zip(ends, found.tolist(), strict=True):
        logits = model(torch.tensor([[*context, *end]]))[0].log_softmax(-1)
        wanted = sum(logits[len(context) - 1 + place, token].item() for place, token in enumerate(end))
        assert score == pytest.approx(wanted, abs=2e-3)


# --- one module is changed


class Around(nn.Module):
    """A wrapper that passes attributes on, as adapters' libraries do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "inner" else getattr(super().__getattr__("inner"), name)

    def forward(self, *args, **kwargs):
        return 1.5 * self.inner(*args, **kwargs)


class Negative(nn.Module):
    def forward(self, weight):
        return -weight


def larger(inner, *args, **kwargs):
    return 1.5 * inner(*args, **kwargs)


def subclass(module):
    kind = type(module)

    def forward(self, *args, **kwargs):
        return larger(kind.forward, self, *args, **kwargs)

    module.__class__ = type("Larger", (kind,), {"forward": forward})


ANY = {
    "subclass": subclass,
    "wrapper": Around,
    "hook": lambda m: m.register_forward_hook(lambda *call: 1.5 * call[2]) and None,
    "own forward": lambda m: setattr(m, "forward", functools.partial(larger, m.forward)),
}
BEFORE = {"hook before": lambda m: m.register_forward_pre_hook(lambda _, args: (2 * args[0], *args[1:])) and None}
LINEAR = {
    "added bias": lambda m: setattr(m, "bias", nn.Parameter(torch.randn(m.out_features))),
    "parametrised": lambda m: parametrize.register_parametrization(m, "weight", Negative()) and None,
    "pruned": lambda m: prune.random_unstructured(m, "weight", 0.5) and None,
}


def change(model, name, how):
    torch.manual_seed(1)
    parent, _, last = name.rpartition(".")
    new = (LINEAR | ANY | BEFORE)[how](model.get_submodule(name))
    if isinstance(new, nn.Module):
        setattr(model.get_submodule(parent), last, new)


def cases():
    for kind, config in MODELS.items():
        for name, module in build(config, device="meta").named_modules():
            chosen = name.startswith(("embed", "layers.1", "norm", "lm_head")) and not isinstance(module, nn.ModuleList)
            if chosen and "router" not in name and "experts" not in name:
                hows = ANY | (LINEAR if isinstance(module, nn.Linear) else {})
                hows |= {} if isinstance(module, nn.Embedding) else BEFORE
                yield from (pytest.param(kind, name, how, id=f"{kind}-{name}-{how}") for how in hows)


@functools.cache
def wanted_text(kind, name, how):
    model = noisy(MODELS[kind])
    change(model, name, how)
    return by_whole_passes(model)


@pytest.mark.parametrize("prepared", ["never", "before the change", "after the change"])
@pytest.mark.parametrize(("kind", "name", "how"), list(cases()))
def test_texts_and_scores_are_those_of_whole_passes(kind, name, how, prepared):
    model = used(MODELS[kind]) if prepared == "before the change" else noisy(MODELS[kind])
    change(model, name, how)
    if prepared == "after the change":
        fast.prepare(model)
    wanted = wanted_text(kind, name, how)
    assert greedy(model) == wanted
    assert list(stream(model, PROMPT, 6)) == wanted
    assert speculate(model, PROMPT, 6, PromptLookup()).tokens == wanted
    assert generate(model, [PROMPT, PROMPT[:2]], 6)[0].tokens == wanted
    before = {key: vars(module).get("forward") for key, module in model.named_modules()}
    assert_scores(model)
    assert before == {key: vars(module).get("forward") for key, module in model.named_modules()}


@pytest.mark.parametrize("prepared", [False, True])
def test_a_mixture_of_depths_is_scored_by_whole_passes(prepared):
    """Its tokens compete for places, so that no continuation may share a pass with another."""
    model = with_mixture_of_depths(noisy(), 0.5)
    if prepared:
        fast.prepare(model)
    assert scoring.why_not(model) is not None
    assert_scores(model)


@pytest.mark.parametrize("prepared", [False, True])
def test_one_continuation_does_not_change_anothers_score(prepared):
    """Not even where the tokens of a batch compete for room."""
    model = noisy(MODELS["experts"])
    for layer in model.layers:
        plain = layer.mlp.router
        layer.mlp.router = CapacityRouter(32, 4, 2, capacity_factor=1.0, norm_topk_prob=True)
        layer.mlp.router.weight = plain.weight
    if prepared:
        fast.prepare(model)
    ends = [[5, 6], [7, 8], [9, 1], [4]]
    alone = [log_likelihoods(model, [Row([1, 2, 3], [end])]) for end in ends]
    torch.testing.assert_close(log_likelihoods(model, [Row([1, 2, 3], ends)]), torch.cat(alone, 1))


# --- weights that change, whatever changes them


def fused_step(model):
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW(model.parameters(), lr=0.3, fused=True).step()


def trained(model):
    with torch.enable_grad():
        model(torch.arange(6).view(2, 3))[..., 0].sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.5 * (parameter.grad.sign() if parameter.grad is not None else 0)


def new_data(model):
    for parameter in model.parameters():
        parameter.data = parameter.data.flip(0).contiguous()


def negative(model):
    return {name: -value for name, value in model.state_dict().items()}


WRITES = {
    "data": lambda m: [p.data.neg_() for p in m.parameters()],
    "new data": new_data,
    "one norm": lambda m: m.layers[1].post_attention_layernorm.weight.data.mul_(3),
    "no_grad": torch.no_grad()(lambda m: [p.neg_() for p in m.parameters()]),
    "inference mode": torch.inference_mode()(lambda m: [p.neg_() for p in m.parameters()]),
    "fused optimiser": fused_step,
    "a step": trained,
    "loaded": lambda m: m.load_state_dict(negative(m)),
    "assigned": lambda m: m.load_state_dict(negative(m), assign=True),
    "double and back": lambda m: m.bfloat16().float(),
    "parametrised": lambda m: parametrize.register_parametrization(m.layers[0].self_attn.o_proj, "weight", Negative()),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_prepared_model_sees_every_write(kind, write):
    model = noisy(MODELS[kind])
    fast.prepare(model)
    cache = model.make_cache(max_length=12)
    with torch.inference_mode():
        model(torch.tensor([[1, 2, 3]]), cache)
        model(torch.tensor([[5]]), cache)
    write(model)
    with torch.inference_mode():  # also in the middle of a text, whose keys and values stay as they are
        plain = copy.deepcopy(cache)
        got = model(torch.tensor([[7]]), cache)
        fast.release(model)
        torch.testing.assert_close(got, model(torch.tensor([[7]]), plain), atol=1e-4, rtol=1e-4)
        fast.prepare(model)
    assert greedy(model) == by_whole_passes(model)


# --- settings, structure and classes that change


def narrower(model, _):
    model.layers[0].mlp = SwiGLU(32, 20)
    for parameter in model.layers[0].mlp.parameters():
        nn.init.normal_(parameter, std=0.3)


def transposed(model, _):
    proj = model.layers[0].self_attn.o_proj  # square, so that this fits as well
    proj.weight.data = proj.weight.data.T


def patched(kind):
    """The method of a class is replaced, under its own name, as libraries do that want all models at once."""
    plain = kind.forward
    new = functools.wraps(plain)(lambda self, *args: larger(plain, self, *args))
    return lambda model, monkeypatch: monkeypatch.setattr(kind, "forward", new)


def rotating(model, monkeypatch):
    plain = Decoder.rope
    monkeypatch.setattr(Decoder, "rope", lambda self, at, dtype: plain(self, 2 * at, dtype))


def hook_for_all(model, monkeypatch):
    def hook(module, args, output):
        return 1.5 * output if type(module) is nn.Linear else None

    monkeypatch.setitem(nn.modules.module._global_forward_hooks, -1, hook)


STRUCTURES = {
    "another theta": lambda m, _: setattr(m, "config", dataclasses.replace(m.config, rope_theta=100.0)),
    "theta, in place": lambda m, _: object.__setattr__(m.config, "rope_theta", 100.0),
    "another eps": lambda m, _: setattr(m.layers[1].input_layernorm, "eps", 10.0),
    "a rope of its own": lambda m, _: setattr(m, "rope", lambda at, dtype: type(m).rope(m, 2 * at, dtype)),
    "half of the layers": lambda m, _: m.layers.__delitem__(1),
    "a block twice": lambda m, _: m.layers.__setitem__(1, m.layers[0]),
    "a narrower network": narrower,
    "one linear layer for a network": lambda m, _: setattr(m.layers[0], "mlp", m.layers[1].self_attn.o_proj),
    "a smaller head": lambda m, _: setattr(m, "lm_head", nn.Linear(32, 48, bias=False)),
    "head and embedding tied": lambda m, _: setattr(m.lm_head, "weight", m.embed_tokens.weight),
    "a transposed weight": transposed,
    "an embedding cut to a length": lambda m, _: setattr(m.embed_tokens, "max_norm", 1.0),
    "a compiled part": lambda m, _: setattr(m.layers[0], "mlp", torch.compile(m.layers[0].mlp, backend="eager")),
    "patched attention": patched(Attention),
    "patched layers": patched(nn.Linear),
    "patched rotation": rotating,
    "a hook for all": hook_for_all,
}


@pytest.mark.parametrize("prepared", ["before the change", "after the change"])
@pytest.mark.parametrize("changing", STRUCTURES.values(), ids=STRUCTURES)
def test_what_a_model_is_made_of_may_change_too(changing, prepared, monkeypatch):
    model = used() if prepared == "before the change" else noisy()
    changing(model, monkeypatch)
    if prepared == "after the change":
        fast.prepare(model)
    tokens = greedy(model)
    assert_scores(model)
    fast.release(model)
    assert tokens == by_whole_passes(model)


@torch.inference_mode()
def test_a_window_of_one_layer_counts_in_scores_too():
    model = used()
    model.layers[0].self_attn.window = 2
    assert_scores(model)


@torch.inference_mode()
@pytest.mark.parametrize("where", ["instance", "class"])
def test_what_a_cache_does_may_change(where, monkeypatch):
    model, logits, plain = used(), [], PreallocatedCache.update
    caches = [model.make_cache(max_length=8) for _ in range(2)]
    for cache in caches:
        model(torch.tensor([PROMPT]), cache)
        if where == "instance":
            cache.update = lambda layer, k, v, cache=cache: plain(cache, layer, 2 * k, v)
    if where == "class":
        monkeypatch.setattr(PreallocatedCache, "update", lambda self, layer, k, v: plain(self, layer, 2 * k, v))
    for cache in caches:
        logits.append(model(torch.tensor([[7]]), cache))
        fast.release(model)
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


# --- what steps do not know


@dataclasses.dataclass(frozen=True)
class Softened(DecoderConfig):
    logit_softcap: float = 0.0


def test_fields_parts_and_settings_that_no_step_knows_are_refused_by_name(monkeypatch):
    monkeypatch.setitem(decoder.MODELS, Softened, Decoder)
    softened = used(Softened(*SIZES, logit_softcap=30.0))
    for refusal in (why_not(softened), scoring.why_not(softened)):
        assert refusal == "has logit_softcap=30.0, which only the modules compute"
    assert why_not(used(Softened(*SIZES))) is None
    more = used()
    more.layers[1].self_attn.q_norm = RMSNorm(8, 1e-5)
    assert why_not(more) == "layers.1.self_attn.q_norm is not what the configuration says"
    for kind, known in ((Attention, "o_proj"), (RMSNorm, "eps"), (Decoder, "norm")):
        with monkeypatch.context() as patch:  # as if the class had just been given this
            patch.setitem(token_step.KNOWN, kind, token_step.KNOWN[kind].replace(known, ""))
            assert f"has a {known}, which only the modules compute" in why_not(used())


@pytest.mark.parametrize("cache", ["preallocated", "rolling"])
def test_the_shortcut_is_taken_where_nothing_was_changed(cache, monkeypatch):
    taken, step = [], LeanStep.__call__
    monkeypatch.setattr(LeanStep, "__call__", lambda *args: taken.append(args) or step(*args))
    for config in (
        MODELS["window, bias"],
        FusionConfig(*SIZES, cross_attention_every=2, sliding_window=5),
        MODELS["experts"],
        MODELS["latent"],
        MODELS["dense"],
    ):
        model, kind = used(config), cache if config.sliding_window else "preallocated"
        taken.clear()
        generate(model, [PROMPT], 6, cache=kind)
        assert why_not(model) is None and len(taken) == 5  # the first token is the prompt's
    model = used(dataclasses.replace(MODELS["experts"], num_hash_layers=1))
    assert why_not(model) == "chooses experts by token id" and scoring.why_not(model) is None


def test_kinds_biases_and_watchers(monkeypatch):
    layer = nn.Linear(4, 4)
    assert exactly(layer, nn.Linear) and not exactly(layer, nn.Embedding) and not exactly(layer, nn.Linear, bias=False)
    with torch.utils.flop_counter.FlopCounterMode(display=False):  # watches by hooks for all modules
        assert exactly(layer, nn.Linear)
    hook_for_all(None, monkeypatch)
    assert not exactly(layer, nn.Linear)


# --- prepare, describe, release


def test_prepared_twice_copied_moved_and_released():
    model = noisy()
    wanted = by_whole_passes(model)
    own = {name: dict(vars(module)) for name, module in model.named_modules()}
    first, second = fast.prepare(model), fast.prepare(model)
    assert first == second and not first.plain and len(first.fast) == 1 + 2 * 4 + 1
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.forward.stands_for is twin and fast.describe(twin) == first
        for parameter in twin.parameters():
            parameter.data.neg_()
        assert greedy(model) == wanted
        assert greedy(twin) == by_whole_passes(twin) != wanted
    half = copy.deepcopy(model).half()
    assert fast.describe(half).fast == first.fast[:1] and generate(half, [PROMPT], 3)[0].new_tokens == 3
    assert {why for _, _, why in fast.describe(half).plain} == {
        "is in torch.float16, expected torch.float32 or torch.bfloat16"
    }
    assert greedy(model.double()) == generate(model, [PROMPT, PROMPT], 6)[0].tokens == wanted
    assert fast.describe(model).plain[0] == ("", "Decoder", "is in torch.float64") and not fast.describe(model).fast
    assert_scores(model)
    assert greedy(model.float()) == wanted and fast.describe(model) == first
    assert fast.describe(copy.deepcopy(model).to("meta")).plain[0] == ("", "Decoder", "is on meta")
    fast.release(model)
    assert own.keys() == dict(model.named_modules()).keys() and not fast.is_prepared(model)
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_shallow_copy_runs_as_its_model_and_says_so_until_it_is_prepared_itself():
    model = noisy()
    wanted = greedy(model)
    fast.prepare(model)
    twin = copy.copy(model)
    twin.config = dataclasses.replace(model.config, rope_theta=20.0)
    assert greedy(twin) == wanted
    assert fast.describe(twin).plain == (("", "Decoder", "runs as the module that it was copied from"),)
    for change in (fast.prepare, fast.release):
        change(twin)
        assert greedy(twin) == by_whole_passes(twin) != wanted
        assert greedy(model) == wanted and fast.is_prepared(model)


def test_two_models_may_share_a_layer_and_threads_a_model():
    one, other = used(), noisy()
    other.layers[0] = one.layers[0]
    fast.prepare(other)
    fast.release(other)
    one.layers[0].mlp.down_proj.weight.data.mul_(2)
    assert greedy(one) == by_whole_passes(one) and greedy(other) == by_whole_passes(other)
    fast.prepare(one)
    with ThreadPoolExecutor(4) as pool:
        prompts = [[start, 2, 3] for start in range(8)]
        texts = list(pool.map(functools.partial(greedy, one), prompts))
    assert texts == [by_whole_passes(one, prompt) for prompt in prompts]


def test_a_model_that_is_trained_is_trained_as_it_is():
    ids, losses = torch.arange(12).view(2, 6), []
    for prepared in (False, True):
        model = noisy(MODELS["experts"]).train()
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
def test_autocast_and_other_defaults_change_nothing_about_the_answer(kind):
    model, token, found = noisy(MODELS[kind]), torch.tensor([[3]]), []
    before = torch.get_default_dtype()
    for prepared in (False, True):
        if prepared:
            fast.prepare(model)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(model(token, model.make_cache("growing")))
            assert log_likelihoods(copy.deepcopy(model).bfloat16(), [Row([1, 2], [[3, 4], [5]])]).dtype is torch.float32
        cache = model.make_cache(max_length=3)
        model(token, cache)
        for default in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(default)
            try:
                found += [model(token, cache), log_likelihoods(model, [Row([1, 2], [[3, 4], [5]])])]
            finally:
                torch.set_default_dtype(before)
    for plain, quick in zip(found[:5], found[5:], strict=True):
        assert plain.dtype is quick.dtype
        torch.testing.assert_close(plain, quick, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_another_default_device_changes_nothing():
    model, found = used(), []
    for default in ("cpu", "meta"):
        cache, ids = model.make_cache(max_length=8), torch.tensor([PROMPT])
        model(ids, cache)
        with torch.device(default):
            logits = model(ids[:, -1:], cache)
            scores = log_likelihoods(model, [Row([1, 2], [[3], [4, 5]])])
        found.append(torch.cat((logits.flatten(), scores.flatten())))
    assert torch.equal(*found)


ONE, TWO = Row([3, 4], [[5, 7]]), Row((3, 4), ((5, 7), (6, 8)))
BAD_ROWS = {  # rows, options, and words of the error
    "none": ([], {}, "rows: got none"),
    "no context": ([Row([], [[5, 7], [6, 8]]), TWO], {}, "number 0 has 0 tokens"),
    "no continuation": ([Row([1], [])], {}, "at least one token in each, and 1 continuations"),
    "an empty one": ([TWO, Row([3], [[5], []])], {}, r"number 1 has 1 tokens and continuations of \[1, 0\]"),
    "more than before": ([ONE, TWO], {}, r"number 1 has 2 tokens and continuations of \[2, 2\]"),
    "below the vocabulary": ([Row([1], [[-1]])], {}, "number 0 has the token id -1, expected 0 to 63"),
    "above the vocabulary": ([Row([64], [[1]])], {}, "number 0 has the token id 64"),
    "no whole number": ([Row([1.5], [[1]])], {}, "number 0 has the token id 1.5"),
    "a truth value": ([Row([True], [[1]])], {}, "number 0 has the token id True"),
    "too long": ([Row([1] * 2048, [[1, 2]])], {}, "the longest takes 2049 tokens, the model has room for 2048"),
    "too few labels": ([TWO, TWO], {"groups": [0]}, "groups: got 1 labels, expected 2"),
    "no batch": ([TWO], {"batch_tokens": 0}, "batch_tokens: got 0, expected at least 1"),
}


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize(("rows", "options", "words"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_rows_that_cannot_be_scored_are_refused(rows, options, words, prepared):
    with pytest.raises(ValueError, match=words):
        log_likelihoods(used() if prepared else noisy(), rows, **options)


@pytest.mark.parametrize("prepared", [False, True])
def test_scores_that_are_not_a_number_are_an_error(prepared):
    model = used() if prepared else noisy()
    model.embed_tokens.weight.data[9] = torch.nan
    with pytest.raises(ValueError, match="logits: not a number for row 1"):
        log_likelihoods(model, [ONE, Row([9, 4], [[5, 7]])])


@pytest.mark.parametrize("call", [fast.prepare, fast.describe, fast.release, fast.is_prepared])
@pytest.mark.parametrize("wrong", [{}, None, [nn.Linear(2, 2)], Decoder, "model"], ids=str)
def test_what_is_no_module_is_refused(call, wrong):
    with pytest.raises(ValueError, match=rf"model: got {type(wrong).__name__}, expected a torch\.nn\.Module"):
        call(wrong)


def test_what_cannot_be_prepared_is_said():
    report = fast.prepare(nn.Sequential(nn.GELU()))
    assert not report.fast and not report.plain and str(report) == "nothing here has a faster way"
    adapted = noisy()
    change(adapted, "layers.1.mlp.down_proj", "subclass")
    report = fast.prepare(adapted)
    assert ("layers.1.mlp.down_proj", "Larger", "is not exactly a Linear") in report.plain
    assert ("", "Decoder", "layers.1.mlp.down_proj is a Larger") in report.plain
    assert "plain     1 x Decoder: layers.1.mlp.down_proj is a Larger (the model)" in str(report)


def test_what_a_user_sets_is_never_taken_away():
    model = noisy(MODELS["latent"])
    layer, attention = model.layers[1].self_attn.o_proj, model.layers[0].self_attn
    layer.forward = mine = lambda x: torch.zeros(*x.shape[:-1], layer.out_features)
    fast.prepare(model)
    attention.form = "absorbed"
    log_likelihoods(model, [Row([1, 2, 3], [[5], [6]])])
    fast.release(model)
    assert vars(layer)["forward"] is mine
    assert [one.self_attn.form for one in model.layers] == ["absorbed", "naive"]


@torch.inference_mode()
def test_weights_of_four_bits_and_a_hook():
    model = quantize_(noisy(DecoderConfig(64, 64, 96, 2, 4, 2)), skip=("embed_tokens",))
    fast.prepare(model)
    before = greedy(model)
    model.layers[0].mlp.register_forward_hook(lambda module, args, out: -out)
    assert greedy(model) == by_whole_passes(model) != before


@pytest.mark.parametrize("kind, name", [
    ("latent", "self_attn.kv_b_proj"), ("window, bias", "self_attn.qkv_proj"), ("dense", "mlp.down_proj"),
])  # fmt: skip
@torch.inference_mode()
def test_four_bits_of_another_dtype_than_the_model(kind, name):
    """The answer has the model's dtype, whichever way it is computed."""
    model = noisy(dataclasses.replace(MODELS[kind], hidden_size=64, intermediate_size=64, head_dim=16))
    made = [Int4Linear.from_linear(layer.get_submodule(name), 16) for layer in model.layers]
    made = made if kind == "latent" else [Int4Linear.from_linear(layer.get_submodule(name)) for layer in model.layers]
    model.bfloat16()
    for layer, four_bits in zip(model.layers, made, strict=True):
        setattr(layer.get_submodule(name.split(".")[0]), name.split(".")[1], four_bits)
    found = []
    for prepared in (False, True):
        if prepared:
            fast.prepare(model)
        cache = model.make_cache(max_length=8)
        model(torch.tensor([PROMPT]), cache)
        found.append(model(torch.tensor([[7]]), cache))
    assert found[0].dtype is found[1].dtype is torch.bfloat16
    torch.testing.assert_close(*found, atol=0.3, rtol=0.1)


@torch.no_grad()
def test_a_latent_layer_that_was_changed_is_not_absorbed():
    model, ids, logits = noisy(MODELS["latent"]), torch.arange(12).view(1, -1), {}
    change(model, "layers.1.self_attn.kv_b_proj", "subclass")
    for form in ("naive", "absorbed", "auto"):
        for layer in model.layers:
            layer.self_attn.form = form
        logits[form] = model(ids)
    torch.testing.assert_close(logits["absorbed"], logits["naive"])
    torch.testing.assert_close(logits["auto"], logits["naive"])
