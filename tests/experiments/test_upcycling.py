"""Growing a mixture, at a size of seconds: arms differ in what they say, and measures measure what they are called."""

from types import SimpleNamespace

import pytest
import torch

from dslib.architecture.balance import moe_layers
from dslib.architecture.decoder import DecoderConfig, build
from dslib.architecture.whole import tiny_deepseek
from dslib.migration.upcycling import upcycle
from measured import record
from measured.experiments import upcycling as lab

SMALL = {"hidden_size": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 4, "v_head_dim": 16}
SHORT = {
    "before": 1, "steps": 2, "every": 1, "windows": 2, "tokens": 128, "length": 32, "precision": "float32",
    "compiled": False, "changes": SMALL,
}  # fmt: skip
DENSE = DecoderConfig(64, 32, 48, 2, 4, 2, max_position_embeddings=64, tie_word_embeddings=True)
IDS = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def runs():
    return {arm: lab.grow(arm, **SHORT) for arm in lab.GROWN}


def test_arms_share_the_dense_start_and_the_turn_changes_nothing_but_by_noise(runs):
    for arm, made in runs.items():
        assert [row["tokens"] for row in made["rows"]] == [128, 256, 384]
        before, after = made["turn"]
        assert (made["rows"][0]["bits"] == runs["slices"]["rows"][0]["bits"]) == (arm != "from scratch")
        assert (abs(after - before) < 1e-5) == (arm != "copies with noise")
    assert [arm for arm, made in runs.items() if made["home"] is not None] == ["copies with noise"]


def test_slices_cost_what_the_dense_model_did_and_whole_copies_more(runs):
    work = {arm: made["rows"][2]["flops"] - made["rows"][1]["flops"] for arm, made in runs.items()}
    dense = work["dense, continued"]
    assert work["slices"] == pytest.approx(dense, rel=0.02) and work["from scratch"] == pytest.approx(dense, rel=0.02)
    assert min(work["copies with noise"], work["shared"]) > 1.2 * dense
    parameters = {arm: made["parameters"] for arm, made in runs.items()}
    assert parameters["dense, continued"] < parameters["from scratch"] < parameters["copies with noise"]


def test_experts_diverge_and_a_dense_model_has_none(runs):
    for arm, made in runs.items():
        last = made["rows"][-1]
        assert (last["divergence"] is None) == (last["busiest"] == 0) == (arm == "dense, continued")
        assert last["divergence"] is None or 0.1 < last["divergence"] < 1.9


@torch.no_grad()
def test_divergence_is_zero_for_equal_moves_one_for_unrelated_ones_and_looks_at_slices_of_one_place():
    mixture = upcycle(build(DENSE, seed=0), 2, 1, split=2)
    kept, layers = lab.expert_weights(mixture), list(moe_layers(mixture))
    assert lab.divergence(kept, layers) == 0
    for layer in layers:
        layer.experts.down_proj[0] += 1
    assert lab.divergence(kept, layers) == 0  # only one of each pair has moved
    for layer in layers:
        layer.experts.down_proj[1:] += 1
    assert lab.divergence(kept, layers) == pytest.approx(0, abs=1e-6)
    for layer in layers:
        layer.experts.down_proj[2:] -= 2  # the second copy goes the other way, with both of its slices
    assert lab.divergence(kept, layers, split=2) == pytest.approx(2, abs=1e-4)
    assert lab.divergence(kept, layers) == pytest.approx(8 / 6, abs=1e-4)  # four of six pairs


def latent():
    sizes = {"vocab_size": 64, "num_hidden_layers": 2, "first_k_dense_replace": 2, "intermediate_size": 48}
    return build(tiny_deepseek(**SMALL, **sizes), seed=0).eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["copies", "shared"])
def test_transformers_gets_the_very_tensors_and_computes_what_the_dense_model_did(kind):
    dense = build(DENSE, seed=0).eval() if kind == "copies" else latent()
    rule = {} if kind == "copies" else {"split": 2, "way": "shared", **lab.V3}
    mixture = upcycle(dense, 4, 2, **rule)
    theirs = lab.in_transformers(mixture)
    assert type(theirs).__name__ == ("MixtralForCausalLM" if kind == "copies" else "DeepseekV3ForCausalLM")
    assert theirs.model.layers[0].mlp.experts.down_proj.data_ptr() == mixture.layers[0].mlp.experts.down_proj.data_ptr()
    torch.testing.assert_close(theirs(IDS).logits, dense(IDS), atol=1e-5, rtol=1e-4)


def test_a_real_model_is_the_same_as_a_mixture_and_another_without_weights_that_sum_to_one(monkeypatch):
    dense = build(DENSE, seed=0).eval()
    for weight in dense.parameters():
        weight.data *= 10 if weight.ndim > 1 else 1
    tokenizer = lambda text, verbose: SimpleNamespace(input_ids=[ord(letter) % 64 for letter in text])  # noqa: E731
    monkeypatch.setattr(lab, "load_smollm2", lambda: (dense, tokenizer))
    found = lab.smollm2_mixture(tokens=20)
    assert found["parameters"][1] > 1.5 * found["parameters"][0] and found["seconds"] > 0
    assert max(found["ours"], found["transformers"]) < 1e-5 and found["kept"] == 1
    assert found["error_as_they_are"] > 0.05 and found["kept_as_they_are"] < 1


def test_every_way_of_a_layer_is_timed_at_every_number_of_tokens():
    rows = lab.layer_cost(hidden_size=16, inner=16, tokens=(1, 5), rounds=2)["rows"]
    assert [row["tokens"] for row in rows] == [1, 5]
    assert all(row[way].median > 0 for row in rows for way in ("dense", "copies", "slices"))


def test_what_is_recorded_are_the_arms_by_three_seeds_and_three_rates():
    assert list(record.GROWN) == list(lab.GROWN)
    calls = [call for name, part in record.PARTS.items() if name.startswith("upcycling-") for _, call in part]
    assert len({(call["arm"], call["seed"], call.get("rate")) for call in calls}) == len(calls) == 5 * 3 + 5 * 3


BAD_CALLS = [
    (lambda: lab.grow("drop"), "arm"),
    (lambda: lab.grow(before=0), "before"),
    (lambda: lab.grow(rate=0.0), "rate"),
    (lambda: lab.in_transformers(upcycle(latent(), **lab.V3)), "n_shared_experts"),
    (lambda: lab.in_transformers(upcycle(latent(), way="shared", scoring_func="softmax")), "another rule of choice"),
]


@pytest.mark.parametrize("call, words", BAD_CALLS)
def test_bad_calls_are_refused_by_name(call, words):
    with pytest.raises(ValueError, match=words):
        call()
