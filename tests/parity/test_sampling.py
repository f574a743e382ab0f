"""What tokens are drawn from, and which text comes of it: bit for bit as in transformers."""

import itertools

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dslib.architecture.generation import Sampling, generate
from dslib.architecture.weights.checkpoint import decoder_from_hf

INF = float("inf")
VOCAB = 60


def warped(logits, written, temperature, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0):
    """Probabilities by transformers' processors, in the order of its ``generate``."""
    chain = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if repetition_penalty != 1:
        chain.insert(0, RepetitionPenaltyLogitsProcessor(repetition_penalty))
    chain += [TopKLogitsWarper(top_k)] if top_k else []
    chain += [TopPLogitsWarper(top_p)] if top_p else []
    chain += [MinPLogitsWarper(min_p)] if min_p else []
    return chain(written, logits.float()).softmax(-1)


def some_logits(kind):
    torch.manual_seed(0)
    logits = 3 * torch.randn(6, 200)
    if kind == "ties":
        return logits.round()
    if kind == "half":
        return logits.bfloat16()
    if kind == "double":
        return logits.double()
    if kind == "minus infinity":
        return logits.masked_fill(torch.rand(6, 200) < 0.9, -INF)
    if kind == "all equal":
        return torch.full((6, 200), 1.5) * torch.tensor([0, 1, -1, 1e-30, 1e4, -1e4]).unsqueeze(1)
    return logits


@pytest.mark.parametrize("kind", ["plain", "ties", "half", "double", "minus infinity", "all equal"])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_probabilities_equal_those_of_transformers(kind, temperature):
    logits = some_logits(kind)
    before = logits.clone()
    text = torch.randint(200, (6, 30))
    written = torch.zeros(6, 200, dtype=torch.bool).scatter(1, text, True)
    options = itertools.product(
        [None, 1, 5, 200, 1000], [None, 0.05, 0.5, 0.9, 0.999, 1.0], [None, 0.1, 1.0], [1.0, 0.7, 1.3]
    )
    for top_k, top_p, min_p, penalty in options:
        rule = Sampling(temperature, top_k, top_p, min_p, penalty)
        got, wanted = rule.probabilities(logits, written), warped(logits, text, *vars(rule).values())
        assert torch.equal(got, wanted), rule
        assert got.dtype is torch.float32 and (got > 0).any(-1).all()
    assert torch.equal(logits, before)


def test_top_p_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for top_p, kept in [(0.4, 1), (0.6, 2), (0.9, 3), (0.96, 4)]:
        assert int((Sampling(1.0, top_p=top_p).probabilities(logits) > 0).sum()) == kept


@pytest.mark.parametrize("one_each", [False, True])
def test_draws_follow_the_probabilities(one_each):
    """Many draws: a share differs from its probability by less than five standard deviations."""
    count = 2_000 if one_each else 20_000
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(count, -1)
    generator = torch.Generator().manual_seed(0)
    if one_each:
        generator = [torch.Generator().manual_seed(seed) for seed in range(count)]
    share = torch.bincount(Sampling(2.0, top_k=3).choose(logits, generator), minlength=4) / count
    wanted = warped(logits[:1], None, 2.0, 3)[0]
    assert ((share - wanted).abs() <= 5 * (wanted * (1 - wanted) / count).sqrt()).all()


@pytest.fixture(scope="module")
def pair():
    """(ours, theirs) in float64, with weights so loud that a text has no near ties."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).double().eval()
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3)
    return decoder_from_hf(config, theirs.state_dict(), dtype=torch.float64), theirs


def their_text(theirs, prompt, new, **options):
    ids = torch.tensor([prompt])
    out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, use_cache=True, **options)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "rules",
    [
        {"temperature": 1.3, "top_k": 10}, {"temperature": 0.8, "top_p": 0.9}, {"temperature": 2.0, "min_p": 0.05},
        {"temperature": 1.5, "top_k": 30, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.4},
        {"repetition_penalty": 1.8}, {"repetition_penalty": 0.6},
    ],
    ids=str,
)  # fmt: skip
def test_texts_equal_those_of_transformers(pair, rules, seed):
    """The same draws from torch's own generator; an end token, but not before twelve new ones."""
    ours, theirs = pair
    prompt, drawn = [seed, 7, seed + 20], "temperature" in rules
    torch.manual_seed(seed)
    wanted = their_text(
        theirs, prompt, 30, **{"top_k": 0, **rules} if drawn else rules, do_sample=drawn, eos_token_id=[5, 9],
        min_new_tokens=12,
    )  # fmt: skip
    options = {"sampling": Sampling(**rules), "eos_token_id": torch.tensor([5, 9]), "min_new_tokens": 12}
    for own in (None, seed, [seed]):
        torch.manual_seed(seed)
        (got,) = generate(ours, [prompt], 30, seed=own, **options)
        assert got.tokens == wanted
        assert got.finish == ("eos" if wanted[-1] in (5, 9) else "length")


def test_stop_strings_end_a_text_where_transformers_ends_it(pair):
    """Strings of one to seven characters from the text: within a token, over several, with more behind them."""
    ours, theirs = pair
    parts = [
        *"abcdef.",
        "\u0120",
        "\u010a",
        "\u00c3",
        "\u00a9",
    ]  # space, line end, the two bytes of an e with an accent
    vocab = {part: i for i, part in enumerate([*parts, *map("".join, itertools.permutations(parts[:9], 2))][:VOCAB])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
    prompt = [3, 14, 15, 9]
    tokens = their_text(theirs, prompt, 16, do_sample=False)
    text, finishes = tokenizer.decode(tokens), set()
    for start, length in itertools.product(range(0, len(text), 2), (1, 2, 4, 7)):
        if "\ufffd" in text[start : start + length]:
            continue
        stop = ["nowhere", text[start : start + length]]
        wanted = their_text(theirs, prompt, 16, do_sample=False, stop_strings=stop, tokenizer=tokenizer)
        (got,) = generate(ours, [prompt], 16, stop=stop, tokenizer=tokenizer)
        assert got.tokens == wanted, stop
        finishes.add(got.finish)
    assert finishes == {"stop"}
