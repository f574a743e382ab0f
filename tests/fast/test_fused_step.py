"""The fused step computes what the decoder computes. Without a GPU, Triton's interpreter runs the same kernels."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dslib.architecture.decoder import DecoderConfig, build
from dslib.architecture.fusion import FusionConfig
from dslib.fast.cuda_graph import StaticDecoding

pytest.importorskip("triton")
from dslib.fast import fused_step

interpreter = pytest.mark.skipif(not fused_step.INTERPRETED, reason="run by test_in_the_interpreter")
cuda = pytest.mark.skipif(fused_step.INTERPRETED or not torch.cuda.is_available(), reason="needs CUDA")
SIZES = (35, 12, 20, 2, 2, 2)
PLAIN = DecoderConfig(*SIZES, head_dim=4, rope_scaling=2.0, rms_norm_eps=1e-3)
GROUPED = DecoderConfig(33, 14, 17, 1, 4, 2, head_dim=4, tie_word_embeddings=True)


def noisy(config, dtype=torch.float32, device="cpu", std=0.3):
    """With a spread of logits: the greedy choice is clear, and changes."""
    model = build(config, seed=0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=std)
    return model.to(device, dtype).eval()


@torch.inference_mode()
def two_ways(model, prompt, steps, **options):
    """Logits of a plain and a fused loop, (steps, vocab) each, along the plain loop's tokens behind a prompt."""
    plain, fused = (StaticDecoding(model, 1, prompt + steps, **more) for more in ({}, {"fused": True, **options}))
    ids, logits = torch.randint(model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0)), []
    for loop in (plain, fused):
        loop.cache.static = True
        loop.token.zero_()  # recording a graph takes a few steps
        if prompt:
            loop.prefill(ids)
    for _ in range(steps):
        want = model(plain.token, plain.cache, plain.position)[0, 0]
        plain.step()
        chosen, got = fused.step(), fused._next.scores
        assert chosen.item() == got.argmax().item()
        chosen.copy_(plain.token)
        logits.append((want.float(), got.clone().float()))
    held, wanted = fused.cache.buffer.float(), plain.cache.buffer.float()
    assert (held - wanted).norm() < (1e-5 if got.dtype is torch.float32 else 2e-2) * wanted.norm()
    return map(torch.stack, zip(*logits, strict=True))


@pytest.mark.skipif(fused_step.INTERPRETED, reason="runs the tests below")
def test_in_the_interpreter():
    """In a process of its own: Triton looks for the variable when it is imported."""
    root, env = Path(__file__).parents[2], {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert result.returncode == 0 and "4 passed" in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=interpreter), pytest.param("cuda", marks=cuda)])
@pytest.mark.parametrize(("config", "prompt"), [(PLAIN, 246), (GROUPED, 0)])
def test_steps_equal_the_decoder(config, prompt, device, monkeypatch):
    monkeypatch.setattr(fused_step, "ROW_BLOCK", 16)  # a row takes more than one block; keys do from slot 257 on
    want, got = two_ways(noisy(config, device=device), prompt, 20, graph=device == "cuda")
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    assert torch.equal(got.argmax(-1), want.argmax(-1)) and len(set(got.argmax(-1).tolist())) > 3


@interpreter
def test_rounding_is_that_of_the_decoder():
    """In float16; on its way to bfloat16 the interpreter cuts digits off instead of rounding."""
    half = noisy(GROUPED, torch.float16)
    (want, got), (exact, _) = two_ways(half, 9, 2), two_ways(half.float(), 9, 2)
    assert 0 < (got - exact).norm() < 1.5 * (want - exact).norm()


@cuda
def test_a_recorded_step_in_bfloat16():
    config = DecoderConfig(1000, 256, 2816, 3, 8, 4, head_dim=128)
    want, got = two_ways(noisy(config, torch.bfloat16, "cuda", std=0.05), 300, 8, graph=True)
    assert (got - want).norm() < 2e-2 * want.norm()
    assert want[0, got[0].argmax()] > want[0].max() - 0.1 * want[0].std(), "another first token, and not a tie"


REFUSED = {
    "model: got <class 'dslib.architecture.fusion.VisionLanguageDecoder'>": {"config": FusionConfig(*SIZES)},
    "sliding_window and qkv_bias of model: got (8, False)": {"sliding_window": 8},
    "sliding_window and qkv_bias of model: got (None, True)": {"qkv_bias": True},
    "head_dim of model: got 6, expected a power of two": {"head_dim": 6},
    "dtype of model: got torch.float64, expected (torch.float32": {"spoil": lambda m: m.double()},
    "formats, devices and rows in order: got {": {"spoil": lambda m: m.layers[1].half()},
    "model: got layers.0.mlp has hooks": {"spoil": lambda m: m.layers[0].mlp.register_forward_hook(print)},
    "model: got has hooks": {"spoil": lambda m: m.register_forward_hook(print)},
    "model: got norm is a RMSNorm": {"spoil": lambda m: setattr(m, "norm", nn.RMSNorm(12))},
    "model: got layers.2 is not what the configuration says": {"spoil": lambda m: m.layers.append(m.layers[0])},
    "window and batch_size of cache: got (None, 2), expected (None, 1)": {"cache": {"batch_size": 2}},
    "cache: got <class 'dslib.architecture.cache.KVCache'>": {"cache": {"kind": "growing"}},
    "device of model: got cpu, expected cuda": {},
}


@pytest.mark.skipif(fused_step.INTERPRETED, reason="a CPU will do there")
@pytest.mark.parametrize(("words", "case"), REFUSED.items(), ids=map(str, range(len(REFUSED))))
def test_what_does_not_fit_is_refused(words, case):
    changes = {name: case[name] for name in case.keys() - {"spoil", "cache", "config"}}
    model = build(dataclasses.replace(case.get("config", PLAIN), **changes))
    case.get("spoil", id)(model)
    with pytest.raises(ValueError, match=re.escape(words)):
        fused_step.FusedStep(model, model.make_cache(**case.get("cache", {})))


@interpreter
@torch.no_grad()
def test_shapes_are_checked_and_a_logit_that_is_not_a_number_is_seen():
    model, one = noisy(GROUPED), torch.ones(1, 1, dtype=torch.int64)
    step = fused_step.FusedStep(model, model.make_cache(max_length=4))
    for args, name in (((one[0], one), "token"), ((one, one.expand(2, 1)), "position")):
        with pytest.raises(ValueError, match=f"{name}: got shape .*, expected .1, 1."):
            step(*args)
    model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"logits: not a number .* for sequence 0"):
        StaticDecoding(model, 1, 6, fused=True).generate(one, 3)
