"""Whole models with experts: our V3 decoder and transformers' Mixtral, DeepSeek-V2 and V3 with the same weights."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from dslib.architecture.decoder import build
from dslib.architecture.generation import generate
from dslib.architecture.moe import MoE
from dslib.architecture.sparse_decoder import SparseDecoder
from dslib.architecture.weights.checkpoint import decoder_from_hf, load_hf_state_dict, to_hf_state_dict

VOCAB = 70
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 256, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
LATENT = {
    **SHAPE, "kv_lora_rank": 16, "q_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10,
    "first_k_dense_replace": 1, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
    "n_shared_experts": 2,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 40.0, "original_max_position_embeddings": 32,
        "mscale": 0.707, "mscale_all_dim": 0.707}  # fmt: skip
V2, V3 = (DeepseekV2Config, DeepseekV2ForCausalLM), (DeepseekV3Config, DeepseekV3ForCausalLM)
MIXTRAL = (MixtralConfig, MixtralForCausalLM)
GROUPS = {"n_group": 4, "topk_group": 2}
FAMILIES = {
    "Mixtral": (*MIXTRAL, {**SHAPE, "num_key_value_heads": 2, "num_local_experts": 6}),
    "Mixtral, window, tied": (
        *MIXTRAL,
        {**SHAPE, "num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 7, "tie_word_embeddings": True},
    ),
    "V2": (*V2, {**LATENT, **GROUPS, "topk_method": "group_limited_greedy", "routed_scaling_factor": 2.0}),
    "V2-Lite": (*V2, {**LATENT, "q_lora_rank": None, "rope_parameters": YARN}),
    "V3": (*V3, {**LATENT, **GROUPS, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}),
    "V3, weights as they are": (*V3, {**LATENT, "n_group": 1, "topk_group": 1, "norm_topk_prob": False}),
    "V3, all sparse": (*V3, {**LATENT, **GROUPS, "first_k_dense_replace": 0, "n_shared_experts": 1}),
}
EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def noisy(model):
    """Random weights everywhere: their routers start with zeros or nearly so, and their bias with zeros."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("gate.weight", "router.weight")):
            torch.nn.init.normal_(tensor, std=0.5)
        elif name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(tensor, std=0.2)
        elif "rotary" not in name:
            torch.nn.init.normal_(tensor, mean=float(tensor.ndim == 1), std=0.15)
    return model


def theirs_of(family):
    config_class, model_class, shape = family
    torch.manual_seed(0)
    model = model_class(config_class(**shape, attn_implementation="sdpa"))
    model.set_experts_implementation("eager")  # the plain loop over experts
    return noisy(model).eval()


def pair(family):
    theirs = theirs_of(family)
    return decoder_from_hf(theirs.config, theirs.state_dict()), theirs


def some_ids(tokens, batch=2, seed=1):
    return torch.randint(VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def assert_same(got, wanted, tolerance=1e-5):
    torch.testing.assert_close(got, wanted, atol=tolerance * max(1.0, wanted.abs().max().item()), rtol=0)


@EACH_FAMILY
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@torch.no_grad()
def test_logits_and_choices(family, training):
    ours, theirs = (model.train(training) for model in pair(family))
    chosen = []
    for layer in theirs.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(lambda module, given, out: chosen.append(out[-1]))
    wanted = theirs(some_ids(41)).logits
    assert wanted.std() > 0.5
    assert_same(ours(some_ids(41)), wanted)
    layers = [layer.mlp for layer in ours.layers if isinstance(layer.mlp, MoE)]
    assert len(layers) == len(chosen) == len(ours.layers) - ours.config.first_k_dense_replace
    for layer, indices in zip(layers, chosen, strict=True):
        assert torch.equal(layer.last_routing.indices.sort(-1).values, indices.sort(-1).values)
        assert len(indices.unique()) == ours.config.num_experts, "every expert has work, so every one is compared"


@EACH_FAMILY
def test_gradients(family):
    ours, theirs = (model.train() for model in pair(family))
    ids = some_ids(33)
    for logits in (ours(ids), theirs(ids).logits):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    with torch.no_grad():  # put the gradients where the weights are, and let the export name them
        for parameter in ours.parameters():
            parameter.copy_(parameter.grad)
    got = to_hf_state_dict(ours)
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert set(got) == set(wanted) | {name for name in got if name.endswith("e_score_correction_bias")}
    for name, gradient in wanted.items():
        scale = gradient.abs().max().item()
        assert scale > 1e-6, name
        torch.testing.assert_close(
            got[name], gradient, atol=1e-5 * scale, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
        )


@EACH_FAMILY
@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_padding(family, side):
    """Theirs masks the padding; ours puts it on the right, where no token looks. The real tokens' logits agree."""
    ours, theirs = pair(family)
    lengths, longest = [5, 19, 12], 19
    ids, mask, right = torch.zeros(3, longest, dtype=torch.long), torch.zeros(3, longest, dtype=torch.long), []
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(longest - length, longest)
        ids[row, place], mask[row, place] = some_ids(length, 1, seed=row)[0], 1
        right.append(place)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    wanted = theirs(ids, attention_mask=mask, position_ids=positions).logits
    padded = torch.stack(
        [F.pad(ids[row, place], (0, longest - n)) for row, (place, n) in enumerate(zip(right, lengths, strict=True))]
    )
    got = ours(padded)
    cache = ours.make_cache(batch_size=3, max_length=longest)
    cached = ours(padded, cache, torch.arange(longest).expand(3, -1))
    for row, (place, length) in enumerate(zip(right, lengths, strict=True)):
        assert_same(got[row, :length], wanted[row, place])
        assert_same(cached[row, :length], wanted[row, place])


@EACH_FAMILY
@torch.no_grad()
def test_decoding_equals_theirs_step_by_step(family):
    ours, theirs = pair(family)
    ids, cache, past = some_ids(24), ours.make_cache(batch_size=2, max_length=24), None
    for part in ids.split([9] + [1] * 10 + [5], dim=1):
        wanted = theirs(part, past_key_values=past, use_cache=True)
        past = wanted.past_key_values
        assert_same(ours(part, cache), wanted.logits)


@EACH_FAMILY
@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_generation_is_theirs_token_for_token(family, batch):
    """Prompts of different lengths in one batch; theirs is asked with padding on the left, as it has to be."""
    ours, theirs = pair(family)
    lengths = [7, 12, 4][:batch]
    prompts = [some_ids(length, 1, seed=row)[0] for row, length in enumerate(lengths)]
    ids = torch.stack([F.pad(prompt, (max(lengths) - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([F.pad(torch.ones_like(prompt), (max(lengths) - len(prompt), 0)) for prompt in prompts])
    wanted = theirs.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False, pad_token_id=0)
    got = generate(ours, prompts, 30)
    assert [result.tokens for result in got] == wanted[:, max(lengths) :].tolist()
    assert len({token for result in got for token in result.tokens}) > 5, "not stuck in a loop"


@EACH_FAMILY
@torch.no_grad()
def test_a_saved_checkpoint_loads(family, tmp_path):
    """What save_pretrained writes: the layout of the hub's files, where every expert has matrices of its own."""
    theirs = theirs_of(family)
    theirs.save_pretrained(tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    last = theirs.config.num_hidden_layers - 1
    one = "block_sparse_moe.experts.0.w2" if theirs.config.model_type == "mixtral" else "mlp.experts.0.down_proj"
    assert f"model.layers.{last}.{one}.weight" in files
    ours = decoder_from_hf(json.loads((tmp_path / "config.json").read_text()), files)
    assert isinstance(ours, SparseDecoder)
    assert_same(ours(some_ids(29)), theirs(some_ids(29)).logits)
    again = load_hf_state_dict(build(ours.config, seed=5).eval(), theirs.state_dict())
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in ours.state_dict().items())
    layout = "mixtral" if theirs.config.model_type == "mixtral" else "apart"
    exported = to_hf_state_dict(ours, layout)
    assert all(torch.equal(exported[name], tensor) for name, tensor in files.items() if name in exported)
    assert set(files) - set(exported) <= {"lm_head.weight"}


@torch.no_grad()
def test_bias_and_groups_matter_at_this_size():
    """So that the comparison above cannot pass with either left out on both sides."""
    ours, theirs = pair(FAMILIES["V3"])
    wanted = theirs(some_ids(41)).logits
    for change in ("no bias", "no groups"):
        ours, _ = pair(FAMILIES["V3"])
        for layer in ours.layers[1:]:
            if change == "no bias":
                layer.mlp.router.e_score_correction_bias.zero_()
            else:
                layer.mlp.router.n_group = layer.mlp.router.topk_group = 1
        assert (ours(some_ids(41)) - wanted).abs().max() > 0.1, change
