"""The whole model against transformers: logits, prediction module, files; and its losses against plain ones."""

import json
import logging

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from dslib.architecture import whole
from dslib.architecture.decoder import build, count_parameters, with_blocks
from dslib.architecture.generation import generate
from dslib.architecture.sparse_decoder import SparseConfig
from dslib.architecture.weights.config import config_to_hf
from dslib.architecture.whole import PREDICTION, WEIGHTS, Whole, load, save, tiny_deepseek
from dslib.data.files import WeightsNotFound

SMALL = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "kv_lora_rank": 12,
    "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 8, "num_experts": 6, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    """A small one whose logits have a spread of about one; its weights are those that bfloat16 can hold."""
    torch.manual_seed(0)
    made = Whole(tiny_deepseek(**SMALL))
    for name, value in (*made.named_parameters(), *made.named_buffers()):
        std = 1.0 if name.endswith("router.weight") else 0.2
        torch.nn.init.normal_(value, mean=float(value.ndim == 1 and not name.endswith("bias")), std=std)
        if not name.endswith("bias"):
            value.data = value.data.bfloat16().float()
    made.decoder.tie_weights()
    return made.eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    where = tmp_path_factory.mktemp("saved")
    save(model, where)
    return where


def some_ids(*shape, seed=0):
    return torch.randint(60, shape, generator=torch.Generator().manual_seed(seed))


def reloaded(folder, config):
    """As `load`, for a folder without a tokenizer."""
    made = Whole(config)
    whole.read(made, folder)
    return made.eval()


def test_transformers_reads_the_files_without_a_word_and_gives_the_same_logits(model, folder, caplog):
    with caplog.at_level(logging.WARNING, "transformers"):
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert isinstance(theirs, DeepseekV3ForCausalLM)
    assert not caplog.records
    ids = some_ids(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(reloaded(folder, model.config)(ids), model(ids), atol=0, rtol=0)


def in_plain_lines(folder, ids):
    """The whole decoder from its files, one text, token by token and expert by expert: (T,) -> (T, vocabulary)."""
    c = json.loads((folder / "config.json").read_text())
    W = {name.removeprefix("model."): value.float() for name, value in load_file(folder / WEIGHTS).items()}
    H, N, R, V = (c[name] for name in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))

    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * W[name]

    def rotate(x):  # (T, heads, R): neighbours turn together, as a complex number
        turn = torch.arange(len(x))[:, None] * c["rope_theta"] ** (-torch.arange(0, R, 2) / R)  # (T, R / 2)
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(turn), turn)[:, None]).flatten(-2)

    def attention(x, at):  # (T, C) -> (T, C)
        q = (x @ W[at + "q_proj.weight"].T).unflatten(-1, (H, -1))  # (T, H, N + R)
        latent, key = (x @ W[at + "kv_a_proj_with_mqa.weight"].T).split([c["kv_lora_rank"], R], -1)
        both = norm(latent, at + "kv_a_layernorm.weight") @ W[at + "kv_b_proj.weight"].T
        k, v = both.unflatten(-1, (H, -1)).split([N, V], -1)
        scores = torch.einsum("thn,shn->hts", q[..., :N], k)
        scores = scores + torch.einsum("thr,sr->hts", rotate(q[..., N:]), rotate(key[:, None])[:, 0])
        scores = scores / (N + R) ** 0.5 + torch.full((len(x), len(x)), -torch.inf).triu(1)
        return torch.einsum("hts,shv->thv", scores.softmax(-1), v).flatten(1) @ W[at + "o_proj.weight"].T

    def swiglu(x, at):
        return (F.silu(x @ W[at + "gate_proj.weight"].T) * (x @ W[at + "up_proj.weight"].T)) @ W[
            at + "down_proj.weight"
        ].T

    def mixture(x, at):
        scores = (x @ W[at + "gate.weight"].T).sigmoid()  # (T, E)
        chosen = (scores + W[at + "gate.e_score_correction_bias"]).topk(c["num_experts_per_tok"]).indices
        weights = scores.gather(1, chosen)
        weights = weights / weights.sum(-1, keepdim=True)
        y = swiglu(x, at + "shared_experts.")
        for t in range(len(x)):
            for expert, weight in zip(chosen[t].tolist(), weights[t], strict=True):
                y[t] += weight * swiglu(x[t], f"{at}experts.{expert}.")
        return y

    x = W["embed_tokens.weight"][ids]  # (T, C)
    for layer in range(c["num_hidden_layers"]):
        at = f"layers.{layer}."
        x = x + attention(norm(x, at + "input_layernorm.weight"), at + "self_attn.")
        feed_forward = swiglu if layer < c["first_k_dense_replace"] else mixture
        x = x + feed_forward(norm(x, at + "post_attention_layernorm.weight"), at + "mlp.")
    return norm(x, "norm.weight") @ W["embed_tokens.weight"].T


def test_forty_plain_lines_read_the_files_and_give_the_same_logits(model, folder):
    ids = some_ids(20)
    with torch.no_grad():
        torch.testing.assert_close(in_plain_lines(folder, ids), model(ids[None])[0], atol=2e-5, rtol=1e-5)


@pytest.fixture
def with_module(model, tmp_path, monkeypatch):
    """The model in transformers, with its prediction module where DeepSeek's files have it."""
    save(model, tmp_path, joined=True)
    pattern = [rf"model\.layers\.{model.config.num_hidden_layers}\..*"]
    monkeypatch.setattr(DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", pattern)
    return AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()


@torch.no_grad()
def test_the_prediction_module_is_transformers(model, with_module):
    ids = some_ids(1, 20)
    states = model.states(ids[:, :-1])
    theirs = MtpModel.from_pretrained(with_module).forward_layer(
        0, states, torch.arange(1, 20).unsqueeze(0), None, input_ids=ids[:, 1:]
    )
    torch.testing.assert_close(model.prediction(model.decoder, states, ids[:, 1:]), theirs, atol=2e-5, rtol=1e-5)


def test_transformers_speculates_with_it_and_writes_the_same_text(model, with_module):
    prompt = some_ids(1, 6).clamp(min=1)  # 0 pads, and transformers would hide it
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = with_module.generate(prompt, **options)
    assert torch.equal(with_module.generate(prompt, use_mtp=True, **options), plain)
    assert generate(model.decoder, prompt, 12)[0].tokens == plain[0, 6:].tolist()


def test_a_cached_module_answers_as_a_whole_pass(model):
    ids = some_ids(1, 12)
    with torch.no_grad():
        states = model.states(ids[:, :-1])
        at_once = model.prediction(model.decoder, states, ids[:, 1:])
        alone = with_blocks(model.decoder, [model.prediction.block], [model.config.num_hidden_layers])
        cache = alone.make_cache(max_length=16)
        parts = [
            model.prediction(model.decoder, states[:, a:b], ids[:, a + 1 : b + 1], cache)
            for a, b in ((0, 5), (5, 6), (6, 11))
        ]
    torch.testing.assert_close(torch.cat(parts, dim=1), at_once, atol=1e-5, rtol=1e-5)


def test_losses_are_those_of_the_next_token_and_of_the_one_after(model):
    rows = some_ids(4, 18)
    found = model.losses(rows, predicted=2)
    logits = model.decoder(rows[:, :-2])
    torch.testing.assert_close(found.next_token, F.cross_entropy(logits.flatten(0, 1), rows[:, 1:-1].flatten()))
    states = model.states(rows[:2, :-2])
    further = model.decoder.lm_head(model.prediction(model.decoder, states, rows[:2, 1:-1]))
    torch.testing.assert_close(found.after_next, F.cross_entropy(further.flatten(0, 1), rows[:2, 2:].flatten()))
    assert found.balance > 0.9 * 3  # even routing gives 1 for each of the three mixtures
    assert model.losses(rows).after_next != found.after_next


def test_the_courses_model_is_small_enough_to_ship():
    config = tiny_deepseek()
    with torch.device("meta"):
        parameters = count_parameters(Whole(config))
    assert parameters == 4_770_880 + 943_424
    assert 2 * parameters < 12e6
    assert tiny_deepseek(num_experts=32).num_experts == 32


BAD = {
    "no weights": (lambda f: (f / WEIGHTS).unlink(), WeightsNotFound, "model.safetensors", "make model"),
    "no module": (lambda f: (f / PREDICTION).unlink(), WeightsNotFound, "prediction.safetensors", "make model"),
    "cut short": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]), ValueError, "altered", "sha256",
    ),
    "another shape": (
        lambda f: (f / "config.json").write_text(json.dumps(config_to_hf(tiny_deepseek(**SMALL | {"vocab_size": 50})))),
        ValueError, "misshapen", "embed_tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_files_that_cannot_be_the_model_are_named(model, tmp_path, name):
    change, error, *words = BAD[name]
    save(model, tmp_path)
    change(tmp_path)
    with pytest.raises(error) as raised:
        load(tmp_path)
    assert all(word in str(raised.value) for word in words)


def test_only_deepseek_v3s_rule_has_such_files():
    with pytest.raises(ValueError, match="rule of choice"):
        config_to_hf(tiny_deepseek(scoring_func="softmax"))


def test_the_articles_v3_is_a_configuration_of_the_same_code():
    config = SparseConfig(60, 32, 48, 4, 4, 4, num_experts=16, num_experts_per_tok=2, first_k_dense_replace=1)
    torch.manual_seed(0)
    made = Whole(config)
    assert made.losses(some_ids(2, 10)).next_token.isfinite()
    assert count_parameters(made.decoder) == count_parameters(build(config, device="meta"))
