"""Adapters: nothing at the start, peft's numbers after it, and the base bit for bit when they are gone."""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from dslib import fast
from dslib.architecture.decoder import DecoderConfig, build
from dslib.architecture.generation import generate
from dslib.architecture.int4.layers import quantize_
from dslib.architecture.whole import tiny_deepseek
from dslib.exact import exactly
from dslib.migration.adapter_files import CONFIG, WEIGHTS, load, save
from dslib.migration.adapters import bottleneck, lora
from dslib.migration.multi_lora import PerRow

DENSE = DecoderConfig(64, 64, 128, 2, 4, 2, max_position_embeddings=64)
SPARSE = tiny_deepseek(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, kv_lora_rank=16, qk_nope_head_dim=12,
    qk_rope_head_dim=4, v_head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
)  # fmt: skip
IDS = torch.randint(64, (3, 12), generator=torch.Generator().manual_seed(0))
MAKERS = {
    "lora": lambda model: lora(model, r"(o_proj|kv_b_proj|down_proj|lm_head)$", rank=4),
    "bottleneck": lambda model: bottleneck(model, r"(self_attn|mlp)$", 64, inner=4),
}


def model_of(config, **kind):
    return build(config, seed=0, **kind).eval()


def stirred(adapter, seed=1):
    """The adapter after something like training: no part of it is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in adapter.parameters():
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return adapter


@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "latent, experts"])
@pytest.mark.parametrize("kind", MAKERS)
def test_an_adapter_starts_at_the_identity_learns_and_goes_without_a_trace(config, kind):
    model = model_of(config)
    before, files = model(IDS), {name: value.clone() for name, value in model.state_dict().items()}
    adapter = MAKERS[kind](model)
    assert torch.equal(model(IDS), before)  # bit for bit
    assert not any(weight.requires_grad for weight in model.parameters())
    F.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten()).backward()
    moved = [name for name, weight in adapter.named_parameters() if weight.grad.abs().sum() > 0]
    assert len(moved) >= len(adapter.parts) and all("lora_B" in name or "up" in name for name in moved)

    stirred(adapter)
    changed = model(IDS)
    assert not torch.allclose(changed, before, atol=1e-3)
    with adapter.off():
        assert torch.equal(model(IDS), before)
    assert torch.equal(model(IDS), changed)
    assert set(model.state_dict()) == set(files)
    twin = copy.deepcopy(model)
    adapter.remove()
    for one in (model, twin):
        assert torch.equal(one(IDS), before)
    assert all(weight.requires_grad for weight in model.parameters())
    assert all(torch.equal(value, files[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "latent, experts"])
@pytest.mark.parametrize("kind", MAKERS)
@torch.no_grad()
def test_every_way_to_decode_sees_the_adapter(config, kind):
    model = model_of(config, dtype=torch.float64)
    plain = generate(model, IDS[:1], 8)[0].tokens
    stirred(MAKERS[kind](model))
    wanted = IDS[:1]
    for _ in range(8):
        wanted = torch.cat([wanted, model(wanted)[:, -1:].argmax(-1)], 1)
    wanted = wanted[0, 12:].tolist()
    assert wanted != plain
    assert generate(model, IDS[:1], 8)[0].tokens == wanted
    fast.prepare(model)
    assert generate(model, IDS[:1], 8)[0].tokens == wanted
    assert generate(copy.deepcopy(model), IDS[:1], 8)[0].tokens == wanted


def test_an_adapter_on_four_bits_is_seen_and_not_merged():
    model = model_of(DENSE)
    quantize_(model)
    before = model(IDS)
    adapter = lora(model, r"o_proj$", rank=4)
    assert torch.equal(model(IDS), before)
    stirred(adapter)
    assert not torch.allclose(model(IDS), before, atol=1e-3)
    with pytest.raises(ValueError, match=r"merge.*float weight"):
        adapter.merge()


def a_llama():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()


def test_lora_is_pefts_in_value_gradient_and_file(tmp_path):
    theirs = peft.get_peft_model(
        a_llama(), peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj", "down_proj"])
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "lora_" in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    theirs.save_pretrained(tmp_path / "theirs")
    model = a_llama()
    adapter = load(model, tmp_path / "theirs")
    for one in (model, theirs):
        F.cross_entropy(one(IDS).logits.flatten(0, 1), IDS.flatten()).backward()
    torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, atol=1e-6, rtol=1e-5)
    wanted = {name: weight.grad for name, weight in theirs.named_parameters() if "lora_" in name}
    assert len(wanted) == 2 * len(adapter.parts) == 12
    for name, part in zip(adapter.names, adapter.parts, strict=True):
        for own in ("lora_A", "lora_B"):
            grad = wanted[f"base_model.model.{name}.{own}.default.weight"]
            torch.testing.assert_close(getattr(part, own).grad, grad, atol=1e-7, rtol=1e-4)
    save(stirred(adapter), tmp_path / "back")
    again = peft.PeftModel.from_pretrained(a_llama(), tmp_path / "back").eval()
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, atol=1e-6, rtol=1e-5)


def test_a_bottleneck_sits_behind_attention_that_gives_its_scores_as_well():
    model = a_llama()
    before = model(IDS).logits
    adapter = bottleneck(model, r"(self_attn|mlp)$", 32, inner=4)
    assert torch.equal(model(IDS).logits, before)
    stirred(adapter)
    assert not torch.allclose(model(IDS).logits, before, atol=1e-3)


@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "latent, experts"])
def test_merged_is_unmerged_and_back_bit_for_bit(config):
    model = model_of(config)
    before = model(IDS)
    adapter = stirred(lora(model, r"(o_proj|kv_b_proj)$", rank=4))
    beside = model(IDS)
    adapter.merge()
    torch.testing.assert_close(model(IDS), beside, atol=1e-5, rtol=1e-4)
    assert all(exactly(model.get_submodule(name), torch.nn.Linear) for name in adapter.names)  # fast code takes it
    with adapter.off():
        assert torch.equal(model(IDS), before)
    torch.testing.assert_close(model(IDS), beside, atol=1e-5, rtol=1e-4)
    adapter.unmerge()
    assert torch.equal(model(IDS), beside)
    adapter.merge()
    adapter.remove()
    assert torch.equal(model(IDS), before)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_saved_adapter_comes_back(kind, tmp_path):
    model = model_of(SPARSE)
    adapter = stirred(MAKERS[kind](model))
    wanted = model(IDS)
    save(adapter, tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 100_000
    adapter.remove()
    load(model, tmp_path)
    assert torch.equal(model(IDS), wanted)


def test_each_row_of_a_batch_has_its_own_adapter():
    model = model_of(DENSE)
    plain, single, adapters = model(IDS), [], []
    for rank, seed in ((4, 1), (2, 2)):
        adapter = stirred(lora(model, r"(qkv_proj|down_proj)$", rank), seed)
        single.append(model(IDS))
        adapter.remove()
        adapters.append(adapter)
    adapters = [_again(model, adapter) for adapter in adapters]
    bank = PerRow(adapters)
    assert torch.equal(model(IDS), plain)  # nobody has chosen
    bank.rows = [1, None, 0]
    got = model(IDS)
    for row, wanted in enumerate((single[1], plain, single[0])):
        torch.testing.assert_close(got[row], wanted[row], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="rows"):
        model(IDS[:2])
    bank.remove()
    assert torch.equal(model(IDS), plain)


def _again(model, adapter):
    made = lora(model, r"(qkv_proj|down_proj)$", adapter.options["rank"])
    made.load_state_dict(adapter.state_dict())
    return made


def test_two_adapters_add_up_and_bfloat16_is_kept():
    model = model_of(DENSE, dtype=torch.bfloat16)
    one, two = (stirred(lora(model, rf"{name}$", 4)) for name in ("o_proj", "down_proj"))
    both = model(IDS)
    assert both.dtype == torch.bfloat16
    with two.off():
        first = model(IDS)
    with one.off(), two.off():
        assert not torch.equal(model(IDS), first) and not torch.equal(first, both)


def tampered(tmp_path, change):
    """A saved LoRA whose tensors `change` has altered."""
    save(lora(model_of(DENSE), r"o_proj$", 4), tmp_path)
    save_file(change(load_file(tmp_path / WEIGHTS)), tmp_path / WEIGHTS)
    return load(model_of(DENSE), tmp_path)


def another_base(tmp_path):
    save(lora(model_of(DENSE), r"o_proj$", 4), tmp_path)
    return load(model_of(DecoderConfig(64, 32, 64, 2, 4, 2)), tmp_path)


def another_kind(tmp_path):
    save(lora(model_of(DENSE), r"o_proj$", 4), tmp_path)
    text = (tmp_path / CONFIG).read_text()
    (tmp_path / CONFIG).write_text(text.replace("LORA", "IA3"))
    return load(model_of(DENSE), tmp_path)


def another_rule(tmp_path):
    theirs = peft.get_peft_model(a_llama(), peft.LoraConfig(r=4, target_modules=["q_proj"], use_rslora=True))
    theirs.save_pretrained(tmp_path)
    return load(a_llama(), tmp_path)


def fewer_layers(tmp_path):
    save(lora(model_of(DENSE), r"o_proj$", 4), tmp_path)
    return load(model_of(DecoderConfig(64, 64, 128, 1, 4, 2)), tmp_path)


def merged(times):
    adapter = lora(model_of(DENSE), r"o_proj$", 4)
    for _ in range(times):
        adapter.merge()


def after_removal():
    adapter = lora(model_of(DENSE), r"o_proj$", 4)
    adapter.remove()
    adapter.merge()


def tied():
    config = DecoderConfig(64, 64, 128, 1, 4, 2, tie_word_embeddings=True)
    lora(model_of(config), r"lm_head$", 4).merge()


def mixed():
    model = model_of(DENSE)
    PerRow([lora(model, r"o_proj$", 4), lora(model, r"down_proj$", 4)])


BAD_CALLS = [
    (lambda _: lora(model_of(DENSE), "query"), "pattern: 'query' is in no module"),
    (lambda _: lora(model_of(DENSE), "self_attn$"), "Attention, expected a linear layer"),
    (lambda _: lora(model_of(DENSE), "o_proj", rank=65), "rank: got 65, expected at most 64"),
    (lambda _: lora(model_of(DENSE), "o_proj", rank=0), "rank"),
    (lambda _: lora(model_of(DENSE), "o_proj", alpha=0.0), "alpha"),
    (lambda _: bottleneck(model_of(DENSE), "o_proj", 64, inner=0), "inner"),
    (lambda _: merged(2), "merged already"),
    (lambda _: bottleneck(model_of(DENSE), "mlp$", 64).merge(), "got a bottleneck"),
    (lambda _: lora(model_of(DENSE), "o_proj").unmerge(), "not merged"),
    (lambda _: tied(), "shares its weight"),
    (lambda _: after_removal(), "removed"),
    (lambda _: mixed(), "same layers"),
    (another_base, "another base"),
    (fewer_layers, "which this one has not"),
    (another_kind, "peft_type"),
    (another_rule, "use_rslora"),
    (lambda path: tampered(path, lambda tensors: dict(list(tensors.items())[1:])), "has no base_model"),
    (lambda path: tampered(path, lambda tensors: tensors | {"more": torch.ones(1)}), "has an extra more"),
]


@pytest.mark.parametrize("call, words", BAD_CALLS)
def test_bad_calls_are_refused_and_say_what_was_wrong(call, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        call(tmp_path)
