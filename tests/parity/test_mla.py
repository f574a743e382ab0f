"""Latent attention, naive and absorbed, against transformers' DeepSeek-V2 and V3 attention: prefill, steps, ragged."""

import dataclasses

import pytest
import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

from dslib.architecture.cache import step_for
from dslib.architecture.published import Yarn
from dslib.architecture.sparse_decoder import preset
from dslib.architecture.weights.checkpoint import decoder_from_hf

SIZE, TOKENS = 48, 33
SHAPE = {
    "vocab_size": 70, "hidden_size": SIZE, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "first_k_dense_replace": 1, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10,
    "max_position_embeddings": 256, "num_experts_per_tok": 2, "n_routed_experts": 8, "moe_intermediate_size": 16,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip
FAMILIES = {"V2": (DeepseekV2Config, DeepseekV2ForCausalLM), "V3": (DeepseekV3Config, DeepseekV3ForCausalLM)}
PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 40.0, "original_max_position_embeddings": 64,
        "beta_fast": 32, "beta_slow": 1}  # fmt: skip
ROPES = {
    "plain": PLAIN,
    "linear": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    "YaRN of V2": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    "YaRN of V3": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    "YaRN, two scales": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 4, "rope_theta": 100.0},
    "YaRN, no scale": YARN,
}
FORMS = ("naive", "absorbed", "auto")


def pair(family="V3", *, rope=ROPES["YaRN of V3"], q_lora_rank=20, form="auto", **changes):
    """(our attention, theirs, our decoder, their model) with the same weights, nothing left at its easy default."""
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(0)
    shape = {**SHAPE, "q_lora_rank": q_lora_rank, "rope_parameters": dict(rope), **changes}
    config = config_class(**shape, num_key_value_heads=shape["num_attention_heads"])  # V3's default is 128
    theirs = model_class(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.25)
    ours = decoder_from_hf(config, theirs.state_dict())
    ours.layers[0].self_attn.form = form
    return ours.layers[0].self_attn, theirs.model.layers[0].self_attn, ours, theirs.model


def states(tokens=TOKENS, batch=2, seed=1):
    return torch.randn(batch, tokens, SIZE, generator=torch.Generator().manual_seed(seed))


def run_theirs(attention, model, x, start=0, cache=None):
    """Their attention on x at positions from ``start`` on, behind what the cache holds."""
    at = torch.arange(start, start + x.shape[1])
    mask = (torch.arange(start + x.shape[1]) <= at.unsqueeze(1))[None, None]  # (1, 1, T, S)
    rope = model.rotary_emb(x, position_ids=at.unsqueeze(0))
    return attention(x, position_embeddings=rope, attention_mask=mask, past_key_values=cache)[0]


def run_ours(attention, model, x, cache=None, positions=None):
    step = step_for(x, cache, positions, model.config)
    return attention(x, model.rope(step.positions, x.dtype), step, cache, 0)


def assert_same(got, wanted, tolerance=1e-5):
    scale = wanted.abs().max().item()
    assert scale > 0.1
    torch.testing.assert_close(got, wanted, atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("q_lora_rank", [None, 20])
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_prefill(family, rope, q_lora_rank, form):
    ours, theirs, decoder, model = pair(family, rope=rope, q_lora_rank=q_lora_rank, form=form)
    assert_same(run_ours(ours, decoder, states()), run_theirs(theirs, model, states()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("changes", [
    {"v_head_dim": 28}, {"v_head_dim": 20}, {"v_head_dim": 1}, {"qk_rope_head_dim": 2}, {"qk_nope_head_dim": 3},
    {"kv_lora_rank": 3}, {"kv_lora_rank": 60}, {"num_attention_heads": 1}, {"q_lora_rank": 1},
], ids=str)  # fmt: skip
@torch.no_grad()
def test_other_sizes(changes, form):
    ours, theirs, decoder, model = pair(form=form, **changes)
    assert_same(run_ours(ours, decoder, states()), run_theirs(theirs, model, states()))


@pytest.mark.parametrize("kind", ["preallocated", "growing"])
@pytest.mark.parametrize("chunks", [[1] * 12, [9] + [1] * 8, [5, 7, 1, 3, 1]], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_steps_with_a_cache(family, form, chunks, kind):
    ours, theirs, decoder, model = pair(family, form=form)
    cache, past = decoder.make_cache(kind, batch_size=2, max_length=sum(chunks)), DynamicCache(config=model.config)
    x = states(sum(chunks))
    wanted_at_once, start = run_theirs(theirs, model, x), 0
    for part in x.split(chunks, dim=1):
        got, wanted = run_ours(ours, decoder, part, cache), run_theirs(theirs, model, part, start, past)
        assert_same(got, wanted)
        assert_same(got, wanted_at_once[:, start : start + part.shape[1]])
        start += part.shape[1]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_each_sequence_at_its_own_position(family, form):
    """Prompts of 3, 11 and 7 tokens, padded on the right, then six steps; theirs runs each sequence alone."""
    ours, theirs, decoder, model = pair(family, form=form)
    lengths, new = torch.tensor([3, 11, 7]), 6
    cache, x = decoder.make_cache(batch_size=3, max_length=17), states(17, batch=3)
    prompt = run_ours(ours, decoder, x[:, :11], cache, torch.arange(11).expand(3, -1))
    got = [[prompt[row, :length]] for row, length in enumerate(lengths)]
    for step in range(new):
        at = (lengths + step).unsqueeze(1)
        token = x[torch.arange(3).unsqueeze(1), at]
        for row, y in enumerate(run_ours(ours, decoder, token, cache, at)):
            got[row].append(y)
    for row, length in enumerate(lengths):
        wanted = run_theirs(theirs, model, x[row : row + 1, : length + new])
        assert_same(torch.cat(got[row]), wanted[0])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_the_input(family, form):
    ours, theirs, decoder, model = pair(family, form=form)
    x, y = states().requires_grad_(), states().requires_grad_()
    run_ours(ours, decoder, x).square().sum().backward()
    run_theirs(theirs, model, y).square().sum().backward()
    assert_same(x.grad, y.grad)


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "deepseek-v2", "deepseek-v3"])
def test_frequencies_of_the_published_models(name):
    """At their own sizes: 32 pairs, of which YaRN keeps some, blends some and slows the rest."""
    config = preset(name)
    rope = {"rope_type": "yarn", "rope_theta": config.rope_theta, **dataclasses.asdict(config.yarn)}
    theirs = DeepseekV3RotaryEmbedding(DeepseekV3Config(rope_parameters=rope))
    got = config.yarn.frequencies(config.head_dim, config.rope_theta)
    torch.testing.assert_close(got, theirs.inv_freq, atol=0, rtol=1e-6)
    assert config.yarn.magnitude == pytest.approx(theirs.attention_scaling)
    change = got * config.rope_theta ** (torch.arange(32) / 32)  # 1: as in pre-training
    assert [int((change > 0.999).sum()), int((change < 1.001 / 40).sum())] == [11, 9]


@pytest.mark.parametrize(
    "head_dim, theta, yarn",
    [
        (8, 100.0, Yarn(4.0, 65536)),  # every pair turns often
        (8, 100.0, Yarn(4.0, 65536, beta_fast=4096)),  # the blend would end behind the last pair
        (64, 10_000.0, Yarn(8.0, 300, beta_fast=4, beta_slow=0.5)),
        (8, 10_000.0, Yarn(2.0, 6)),  # not one pair turns even once
    ],
)
def test_frequencies_at_the_ends_of_the_blend(head_dim, theta, yarn):
    rope = {"rope_type": "yarn", "rope_theta": theta, **dataclasses.asdict(yarn)}
    theirs = DeepseekV3RotaryEmbedding(DeepseekV3Config(rope_parameters=rope, qk_rope_head_dim=head_dim))
    got = yarn.frequencies(head_dim, theta)
    torch.testing.assert_close(got, theirs.inv_freq, atol=0, rtol=1e-6)


@torch.no_grad()
def test_scaling_matters_at_this_size():
    """So that the comparison above cannot pass with YaRN, or its scale, left out on both sides."""
    results = [run_theirs(*pair(rope=rope)[1::2], states()) for rope in ROPES.values()]
    for i, one in enumerate(results):
        for other in results[:i]:
            assert (one - other).abs().max() > 1e-3


@torch.no_grad()
def test_the_order_of_rotary_rows_matters():
    """Loaded without reordering, the weights give something else: the comparison can fail."""
    ours, theirs, decoder, model = pair()
    ours.q_b_proj.weight.copy_(theirs.q_b_proj.weight)
    ours.kv_a_proj_with_mqa.weight.copy_(theirs.kv_a_proj_with_mqa.weight)
    difference = run_ours(ours, decoder, states()) - run_theirs(theirs, model, states())
    assert difference.abs().max() > 1e-2
