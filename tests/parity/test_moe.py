"""Every row of the table of routers (``measured/experiments/moe_families.py``, shown on the page) is held here against
transformers' block of that family: the experts chosen, outputs and gradients, at a tiny size."""

import pytest
import torch
from transformers import AutoConfig
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM

from dslib import fast
from dslib.architecture.moe import MoE, Router
from dslib.architecture.weights.checkpoint import decoder_from_hf
from dslib.architecture.weights.config import config_from_hf
from measured.experiments import moe_families
from measured.experiments.moe_families import NOT_EXPRESSED, ROUTERS, VOCAB, E, H, I, K, as_ours, pair, run, tokens
from measured.experiments.moe_speed import implementations

EACH = pytest.mark.parametrize("name", ROUTERS)


def close(got, wanted):
    torch.testing.assert_close(got, wanted, atol=1e-5 * max(1.0, wanted.abs().max().item()), rtol=0)


@EACH
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_same_experts_same_output_same_gradients(name, training):
    ours, theirs = (block.train(training) for block in pair(name))
    grad = torch.randn(2, 20, H, generator=torch.Generator().manual_seed(2))
    results = []
    for block in (ours, theirs):
        x = tokens().requires_grad_()
        y, chosen = run(block, x)
        y.backward(grad)
        results.append((y.detach(), x.grad, chosen))
    for got, wanted in zip(*results, strict=True):
        close(got, wanted)
    wanted = as_ours({key: p.grad for key, p in theirs.named_parameters() if p.grad is not None})
    got = {key: p.grad for key, p in ours.named_parameters()}
    assert set(got) == set(wanted)
    for key, gradient in wanted.items():
        assert gradient.abs().max() > 1e-3
        close(got[key], gradient)


def test_the_page_s_check_agrees_and_can_fail(monkeypatch):
    assert moe_families.agree("DeepSeek-V3")
    ours, theirs = pair("DeepSeek-V3")
    with torch.no_grad():
        ours.router.e_score_correction_bias[0] += 10
    monkeypatch.setattr(moe_families, "pair", lambda name: (ours, theirs))
    assert not moe_families.agree("DeepSeek-V3")


def test_the_words_of_a_row_tell_its_arguments_apart():
    same = {}
    for name, (_, _, rule, parts, _) in ROUTERS.items():
        said = moe_families.words(name)
        assert same.setdefault(tuple(said.values())[1:], (rule, {**parts})) == (rule, parts), name
    assert moe_families.words("DeepSeek-V2") == {
        "model": "DeepSeek-V2", "scores": "softmax", "top k by": "score, in 3 of 8 groups",
        "weights": "the scores, ×\u00a016", "shared experts and extras": "2 shared",
    }  # fmt: skip


def test_the_page_shows_one_row_of_each_kind():
    """What a row of KINDS does not say of scores, choice, weights or extras, no other row says either."""
    said = [
        [part.rpartition(" ×")[0] or part for part in list(moe_families.words(name).values())[1:]] for name in ROUTERS
    ]
    shown = [row for name, row in zip(ROUTERS, said, strict=True) if name in moe_families.KINDS]
    for column in range(3):
        assert {row[column] for row in said} == {row[column] for row in shown}
    extras = {word for row in said for word in row[3].split(", ") if "shared" not in word}
    assert extras == {word for row in shown for word in row[3].split(", ") if "shared" not in word}


@pytest.mark.parametrize("name", ["LFM2 MoE", "DeepSeek-V3", "DeepSeek-V3.2", "DeepSeek-V4-Flash"])
def test_factors_are_those_of_the_family_s_configuration(name):
    family, _, rule, *_ = ROUTERS[name]
    assert AutoConfig.for_model(family).routed_scaling_factor == rule.get("routed_scaling_factor", 1.0)


@EACH
@pytest.mark.parametrize("count", [1, 2, 300])
@torch.no_grad()
def test_inference_takes_other_ways_to_the_same_output(name, count):
    ours, theirs = (block.eval() for block in pair(name, seed=3))
    x = tokens(1, count)
    wanted = run(theirs, x)[0]
    close(run(ours, x)[0], wanted)
    for pack in (False, True):
        fast.prepare(ours, pack_experts=pack)
        close(run(ours, x)[0], wanted)


@EACH
@torch.no_grad()
def test_each_part_of_the_rule_matters_at_this_size(name):
    """So that no row can pass with an argument left out on both sides."""
    ours, theirs = pair(name)
    wanted, _ = run(theirs, tokens())
    *_, rule, parts, _ = ROUTERS[name]
    for left_out in {*rule, *parts} - {"topk_group", "hash_vocab_size", "n_shared_experts"}:
        without = (left_out, "topk_group") if left_out == "n_group" else (left_out,)
        changed = {key: value for key, value in rule.items() if key not in without}
        other = MoE(H, I, Router(H, E, K, **changed), **{k: v for k, v in parts.items() if k != left_out})
        other.load_state_dict(ours.state_dict(), strict=False)
        assert (run(other, tokens())[0] - wanted).abs().max() > 1e-3, left_out


@pytest.mark.parametrize("family", NOT_EXPRESSED)
def test_what_is_not_expressed_is_refused_by_name(family):
    with pytest.raises(ValueError, match=f"model_type: got '{family}', expected one of"):
        config_from_hf(AutoConfig.for_model(family))


def test_jitter_is_refused_by_name():
    with pytest.raises(ValueError, match="router_jitter_noise: got 0"):
        config_from_hf(AutoConfig.for_model("mixtral", router_jitter_noise=0.1))


@pytest.mark.parametrize(
    "implementation", [name for name in implementations() if name in ("eager", "grouped_mm", "batched_mm")]
)
@torch.no_grad()
def test_every_implementation_of_theirs_that_runs_on_a_cpu(implementation):
    ours, theirs = pair("DeepSeek-V3", implementation)
    close(ours(tokens()), theirs(tokens()))


@pytest.mark.parametrize("name", ["Mixtral", "DeepSeek-V2", "DeepSeek-V3"])
@torch.no_grad()
def test_bfloat16_chooses_the_same_experts(name):
    """The router computes in float32 on both sides, so that rounding the model does not change the choice."""
    ours, theirs = pair(name)
    x = tokens().bfloat16()
    ours, theirs = ours.bfloat16(), theirs.bfloat16()
    if ours.router.e_score_correction_bias is not None:
        ours.router.e_score_correction_bias.copy_(theirs.gate.e_score_correction_bias)
    (y, chosen), (wanted, theirs_chosen) = run(ours, x), run(theirs, x)
    same = (chosen == theirs_chosen).all(-1)
    assert same.float().mean() > 0.95
    gap = (y - wanted).float().flatten(0, 1)[same].abs().max()
    assert gap < 0.03 * wanted.float().abs().max()


@torch.no_grad()
def test_padding_on_the_right_does_not_change_the_tokens_before_it():
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mixtral", vocab_size=VOCAB, hidden_size=H, intermediate_size=I, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=E, num_experts_per_tok=K, max_position_embeddings=64,
    )  # fmt: skip
    theirs = MixtralForCausalLM(config).eval()
    ours = decoder_from_hf(config, theirs.state_dict())
    ids = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, 7:], mask[1, 7:] = 0, 0
    logits, wanted = ours(ids), theirs(ids, attention_mask=mask).logits
    close(logits[0], wanted[0])
    close(logits[1, :7], wanted[1, :7])
    close(ours(ids[1:, :7])[0], logits[1, :7])
