"""Decoding in steps of one shape gives what the ordinary loop gives, for every kind of model, and never asks back."""

import dataclasses

import pytest
import torch

from dslib.architecture import decoder, sparse_decoder
from dslib.architecture.fusion import FusionConfig
from dslib.architecture.generation import generate
from dslib.fast.cuda_graph import StaticDecoding

LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
CONFIGS = {
    "V1": decoder.preset("tiny"),
    "V1, window": decoder.preset("tiny", sliding_window=6),
    "V2, cross": FusionConfig(256, 128, 352, 4, 4, 2, cross_attention_every=2),
    "V2, projector": FusionConfig(256, 128, 352, 4, 4, 2, fusion="projector"),
    "V3": sparse_decoder.preset("tiny-moe"),
    "V3, latent": dataclasses.replace(sparse_decoder.preset("tiny-moe"), **LATENT),
}


def made(name):
    model = decoder.build(CONFIGS[name], seed=0).eval()
    for part, parameter in model.named_parameters():  # a spread of logits: the greedy choice is clear, and changes
        if not part.startswith("vision"):
            torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    image = None
    if name.startswith("V2"):
        with torch.no_grad():
            image = model.encode_image(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    prompts = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(2))
    return model, prompts, image


@pytest.mark.parametrize("name", CONFIGS)
def test_the_tokens_are_those_of_the_ordinary_loop(name):
    model, prompts, image = made(name)
    want = [result.tokens for result in generate(model, prompts, 12, image=image)]
    loop = StaticDecoding(model, 2, 24, image=image)
    assert loop.generate(prompts, 12).tolist() == want
    assert loop.generate(prompts, 12).tolist() == want, "a second text begins afresh"
    assert len({token for row in want for token in row}) > 3


def test_a_step_does_not_ask_the_device(monkeypatch):
    """What would make a CUDA graph impossible, and a GPU wait: reading a number back into Python."""
    model, prompts, _ = made("V1")
    loop = StaticDecoding(model, 2, 24)
    loop.prefill(prompts)

    def asked(*_):
        raise AssertionError("read back")

    for name in ("item", "tolist", "__int__", "__bool__", "__float__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, asked)
    loop.step()


@pytest.mark.parametrize("name", ["V1", "V1, window", "V2, cross"])
def test_a_compiled_step_gives_the_same_tokens(name):
    """Traced whole, and then run by torch's own operations: what a compiler on a GPU starts from."""
    model, prompts, image = made(name)
    plain = StaticDecoding(model, 2, 24, image=image).generate(prompts, 6).tolist()
    torch._dynamo.reset()
    loop = StaticDecoding(model, 2, 24, image=image, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert loop.generate(prompts, 6).tolist() == plain


WRONG = {
    "graph: got True on device cpu": lambda m, ids: StaticDecoding(m, 2, 24, graph=True),
    "fused: got True, expected neither": lambda m, ids: StaticDecoding(m, 1, 9, fused=True, backend="inductor"),
    "new_tokens: got 5, expected 1 to 4": lambda m, ids: StaticDecoding(m, 2, 12).generate(ids, 5),
    r"prompts: got shape \(1, 9\), expected \(2, 1 to 11\)": lambda m, ids: StaticDecoding(m, 2, 12).prefill(ids[:1]),
}


@pytest.mark.parametrize(("words", "call"), WRONG.items())
def test_what_does_not_fit_is_refused(words, call):
    model, prompts, _ = made("V1")
    with pytest.raises(ValueError, match=words):
        call(model, prompts)
    assert StaticDecoding(model, 2, 12).generate(prompts, 4).shape == (2, 4)


@pytest.mark.parametrize("name", ["V1", "V2, cross", "V3, latent"])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_text_that_overflows_is_an_error_and_spoils_no_later_one(name, broken):
    model, prompts, image = made(name)
    loop = StaticDecoding(model, 2, 24, image=image)
    want = loop.generate(prompts, 6).tolist()
    weight = model.layers[1].self_attn.o_proj.weight.data
    kept = weight[3, 4].clone()
    weight[3, 4] = broken
    with pytest.raises(ValueError, match="logits"):  # a router says so too
        loop.generate(torch.cat((prompts, prompts), dim=1), 3)  # longer than the next text
    weight[3, 4] = kept
    assert loop.generate(prompts, 6).tolist() == want


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_the_sequence_is_named(broken):
    model, prompts, _ = made("V1, window")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    model.embed_tokens.weight.data[prompts[1, -1]] = broken
    prompts[0] = (prompts[1, -1] + 1) % 256
    with pytest.raises(ValueError, match=r"logits: not a number .* for sequence 1"):
        StaticDecoding(model, 2, 12).generate(prompts, 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", CONFIGS)
def test_a_replayed_graph_gives_the_same_tokens(name):
    model, prompts, image = made(name)
    model, prompts = model.to("cuda", torch.bfloat16), prompts.cuda()
    if image is not None:
        with torch.no_grad():
            pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
            image = model.encode_image(pixels.to("cuda", torch.bfloat16))
    plain = StaticDecoding(model, 2, 24, image=image).generate(prompts, 12)
    assert StaticDecoding(model, 2, 24, image=image, graph=True).generate(prompts, 12).tolist() == plain.tolist()
