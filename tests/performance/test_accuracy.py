"""Prompts, normalisation, letters and the command line; that scores equal lm-eval's is in tests/parity."""

import dataclasses
import json
import math

import pytest
import torch

from dslib import fast
from dslib.architecture import decoder, sparse_decoder
from dslib.data.questions import Question
from dslib.fast.scoring import Row
from dslib.performance import accuracy as accuracy_lib
from dslib.performance.accuracy import PROMPTS, Prompt, Scores, log_likelihoods, read_letter, score, write_letters
from measured.experiments import accuracy

ONE = Question("Which is a prime?", ("4", "6", "7", "9 or 11"), 2, "number_theory")
TWO = Question("And which is even?", ("3", "8", "5", "1"), 1, "number_theory")


class Characters:
    """A tokenizer of single bytes, with the little of transformers' interface that is used, and special tokens."""

    eos_token_id = 0

    def __init__(self, before=(), behind=()):
        self.before, self.behind = list(before), list(behind)

    def __call__(self, text, add_special_tokens=True):
        ids = list(text.encode())
        return type("Encoding", (), {"input_ids": [*self.before, *ids, *self.behind] if add_special_tokens else ids})

    def decode(self, ids, skip_special_tokens=True):
        return bytes(ids).decode("latin-1")

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        return f"<user>{messages[0]['content']}<assistant>"


@pytest.fixture(scope="module")
def model():
    return decoder.build(decoder.preset("tiny"), seed=0).eval()


def test_the_prompt_of_mmlu_word_for_word():
    assert PROMPTS["mmlu"].text(ONE, [TWO]) == (
        "The following are multiple choice questions (with answers) about number theory.\n\n"
        "And which is even?\nA. 3\nB. 8\nC. 5\nD. 1\nAnswer: B\n\n"
        "Which is a prime?\nA. 4\nB. 6\nC. 7\nD. 9 or 11\nAnswer:"
    )
    assert PROMPTS["mmlu"].replies(ONE) == [" A", " B", " C", " D"]
    assert PROMPTS["text"].text(ONE) == "Question: Which is a prime?\nAnswer:"
    assert PROMPTS["text"].replies(ONE) == [" 4", " 6", " 7", " 9 or 11"]
    assert PROMPTS["in brackets"].text(ONE).endswith("(D) 9 or 11\nAnswer:")


def test_the_prompt_is_that_of_lm_evals_own_task():
    """Its template for MMLU, filled in by jinja."""
    import importlib.util

    import jinja2
    import yaml

    folder = importlib.util.find_spec("lm_eval").submodule_search_locations[0]
    with open(f"{folder}/tasks/mmlu/default/_default_template_yaml", encoding="utf-8") as file:
        task = yaml.safe_load(file)
    wanted = jinja2.Template(task["doc_to_text"]).render(question=ONE.question, choices=ONE.choices)
    assert PROMPTS["no header"].text(ONE) == wanted and task["doc_to_choice"] == list("ABCD")
    with open(f"{folder}/tasks/mmlu/default/mmlu_professional_law.yaml", encoding="utf-8") as file:
        header = yaml.safe_load(file)["description"]
    law = Question("?", ("1", "2", "3", "4"), 0, "professional_law")
    assert PROMPTS["mmlu"].text(law) == header + PROMPTS["no header"].text(law)


def test_normalisations_choose_differently():
    values = torch.tensor([[-6.0, -4.0, -5.0, -9.0]])
    sizes = {"tokens": torch.tensor([[2, 1, 5, 3]]), "characters": torch.tensor([[6, 2, 3, 9]])}
    prior = torch.tensor([[-5.0, -1.0, -4.0, -9.5]])
    scores = Scores((ONE,), values, sizes | {"bytes": sizes["characters"]}, prior)
    assert [scores.answers(name).item() for name in ("none", "tokens", "characters", "prior")] == [1, 2, 0, 3]
    assert scores.right("tokens").tolist() == [True] and scores.right().tolist() == [False]


# What tokenizers put around a text: nothing, a start, an end, and ids that the text has as well.
AROUND = [((), ()), ((1,), ()), ((), (2,)), ((1,), (2, 3)), ((ord("A"),), (ord("A"),)), ((ord("\n"),), (ord("B"),))]


@pytest.mark.parametrize(("before", "behind"), AROUND)
@pytest.mark.parametrize("chat", [False, True])
def test_scores_are_log_probabilities_of_the_replies(model, before, behind, chat):
    """Byte by byte, with the plain model: context and reply, each reply alone; what ends a text is no part of it."""
    tokenizer, prompt = Characters(before, behind), dataclasses.replace(PROMPTS["text"], chat=chat)
    scores = score(model, tokenizer, [ONE, TWO], prompt, with_prior=True)
    for row, one in enumerate((ONE, TWO)):
        text = f"<user>{prompt.text(one)}<assistant>" if chat else prompt.text(one)
        for column, reply in enumerate(prompt.replies(one)):
            for context, found, start in (
                (text, scores.log_likelihoods, () if chat else before), ("Answer:", scores.prior, before)
            ):  # fmt: skip
                ids = torch.tensor([[*start, *(context + reply).encode()]])
                with torch.inference_mode():
                    logs = model(ids[:, :-1]).log_softmax(-1)[0]
                wanted = logs.gather(1, ids[0, 1:, None])[-len(reply.encode()) :].sum().item()
                assert found[row, column].item() == pytest.approx(wanted, abs=1e-4)
    assert scores.sizes["characters"].tolist()[0] == [1, 1, 1, 7]
    assert scores.sizes["tokens"].tolist()[0] == [2, 2, 2, 8]  # the space is scored too


@pytest.mark.parametrize(("before", "behind"), AROUND)
def test_written_answers_are_the_greedy_continuation(model, before, behind):
    options = {"max_new_tokens": 3, "batch_size": 2}
    written = write_letters(model, Characters(before, behind), [ONE, TWO, ONE], **options)
    assert written.texts[0] == written.texts[2] and len(written.texts) == 3
    ids = [*before, *PROMPTS["mmlu"].text(ONE).encode()]
    for expected in written.texts[0].encode("latin-1"):
        with torch.inference_mode():
            assert model(torch.tensor([ids]))[0, -1].argmax().item() == expected
        ids.append(expected)
    assert written.answers.tolist() == [read_letter(text) for text in written.texts]


def test_batches_shots_and_preparing_change_nothing(model):
    asked = [ONE, TWO, Question("Zero?", ("0", "1", "2", "3"), 0, "number_theory")]
    whole = score(model, Characters(), asked, shots=2)
    for prepared in (False, True):
        for options in ({"batch_tokens": 1}, {"examples": asked}):
            again = score(model, Characters(), asked, shots=2, **options)
            assert torch.allclose(again.log_likelihoods, whole.log_likelihoods, atol=1e-4)
        fast.release(model) if prepared else fast.prepare(model)
    # Exactly what the prompt with these examples scores by itself.
    alone = PROMPTS["mmlu"].text(asked[2], asked[:2])
    got = log_likelihoods(model, [Row(list(alone.encode()), [list(f" {letter}".encode()) for letter in "ABCD"])])
    assert torch.allclose(got[0], whole.log_likelihoods[2], atol=1e-4)


LATENT = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
MODELS = {
    "plain": decoder.preset("tiny"),
    "window": decoder.preset("tiny", sliding_window=16),
    "experts": sparse_decoder.preset("tiny-moe"),
    "latent attention": sparse_decoder.preset("tiny-moe", **LATENT),
}


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_rows_of_any_model_equal_one_continuation_at_a_time(config, prepared):
    """The plainest way: each continuation alone behind its context. torch's default dtype has no say in it."""
    model, generator = decoder.build(config, seed=0).eval(), torch.Generator().manual_seed(0)
    draw = lambda size: torch.randint(256, (size,), generator=generator).tolist()  # noqa: E731
    start = draw(12)
    rows = [Row(start + draw(length), [draw(size) for size in (1, 3, 2, 5)]) for length in (4, 9, 30, 17)]
    wanted = torch.empty(len(rows), 4)
    for i, row in enumerate(rows):
        for j, end in enumerate(row.ends):
            with torch.inference_mode():
                logs = model(torch.tensor([row.context + end[:-1]]))[0, len(row.context) - 1 :].log_softmax(-1)
            wanted[i, j] = logs.gather(1, torch.tensor(end).unsqueeze(1)).sum()
    if prepared:
        fast.prepare(model)
    before = torch.get_default_dtype()
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            found = log_likelihoods(model, rows, batch_tokens=64)
        finally:
            torch.set_default_dtype(before)
        assert found.dtype is torch.float32
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-5)


ONE_END, TWO_ENDS = Row([1], [[1]]), Row([1], [[1], [2]])


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("rows", [[Row([], [[1]])], [Row([1], [[]])], [TWO_ENDS, ONE_END], [ONE_END, TWO_ENDS]])
def test_rows_that_would_be_mixed_up_are_refused(model, rows, prepared):
    (fast.prepare if prepared else fast.release)(model)
    with pytest.raises(ValueError, match=r"rows: number \d has \d tokens and continuations of"):
        log_likelihoods(model, rows)
    fast.release(model)


def scores_of(*values, **options):
    return Scores((ONE,), torch.tensor([values]), {"characters": torch.ones(1, 4)}, **options)


NAN_PRIOR = torch.tensor([[0.0, -math.inf, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: score(m, Characters(), []), "questions: got none"),
        (lambda m: write_letters(m, Characters(), []), "questions: got none"),
        (lambda m: score(m, Characters(), [ONE, TWO], shots=2), "shots: got 2, but there are only 1 other"),
        (lambda m: Prompt(answer="word"), "answer: got 'word', expected one of 'letter', 'text'"),
        (lambda m: Prompt(listed=False), "listed: got False"),
        (lambda m: score(m, Characters(), [LONG]), r"the longest takes \d+ tokens, the model has room for 512"),
        (lambda m: score(m, Characters(), [ONE], Prompt(reply="")), "reply: '' after .* no token of its own"),
        (
            lambda m: score(m, Shifting(), [ONE]),
            r"tokenizer: got \[66, 33, 99\] for 'A b', expected \[65, 32, 98\]",
        ),
        (lambda m: scores_of(0.0, 1.0, 2.0, 3.0).values("mean"), "normalisation: got 'mean', expected one of 'none'"),
        (lambda m: scores_of(0.0, 1.0, 2.0, 3.0).values("prior"), "with_prior=True"),
        (lambda m: scores_of(-9.0, math.nan, -1.0, -2.0).answers(), "log_likelihoods: got NaN for question 0"),
        (lambda m: scores_of(-9.0, math.nan, -1.0, -2.0).right("characters"), "log_likelihoods: got NaN"),
        (lambda m: scores_of(-9.0, -math.inf, 0.0, 0.0, prior=NAN_PRIOR).answers("prior"), "log_likelihoods: got NaN"),
    ],
)
def test_bad_input_is_named(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


LONG = Question("x" * 600, ("1", "2", "3", "4"), 0)


class Shifting(Characters):
    """Not a special token more, but other tokens."""

    def __call__(self, text, add_special_tokens=True):
        return type("Encoding", (), {"input_ids": [one + add_special_tokens for one in text.encode()]})


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (" B", 1), ("C. 7", 2), ("(D) because", 3), ("The answer is A.", 0), ("answer is: (B)", 1), ("**C**", 2),
        ("\n\nA", 0), ("__D__", 3), ("Because", -1), ("A's", -1), ("", -1), ("E", -1), ("I think it is 7", -1),
        # The statement counts however it is written ...
        ("Answer is B", 1), ("ANSWER IS B", 1), ("the answer is b.", 1), ("The answer is a", 0), ("answer is (a).", 0),
        ("The correct answer is **C**", 2), ("The answer is:\n\nD", 3), ("Answer: C", 2), ("answer = D", 3),
        ("The answer is option B", 1), ("the answer is the letter d", 3), (r"The answer is $\boxed{\text{C}}$", 2),
        ("So the answer is \u201cB\u201d", 1), ("The answer is __B__.", 1), ("the final answer is\tC!", 2),
        ("The **answer** is **B**.", 1), ("**Answer**: C", 2), ("`answer` is `C`", 2), ("_answer_: D", 3),
        ('{"answer": "C"}', 2), ("the answer's B", 1), ("Answer (final): B", 1), ("The answer is: \u2018B\u2019", 1),
        ("answer is <b>C</b>", 2), ("The answer is therefore D", 3), ("The answer is most likely B", 1),
        ("The answer, then, is B.", 1), ("The answer to the question is C.", 2), ("Answer: B, as the sum is C", 1),
        # ... and more than a letter that begins a sentence; but a word is no letter.
        ("A good question. The answer is C.", 2), ("B is even, so the answer is D", 3), ("A\nAnswer: B", 1),
        ("Answer - B", 1), ("The answer should be D.", 3), ("The answer is a. So", 0), ("the answer is a\nSo", 0),
        ("The answer is a prime", -1), ("The answer is Because", -1), ("The answer is D'Alembert", -1),
        ("The answer is not B", -1), ("The answer B is wrong, it is C", -1), ("answer is <b>Bern</b>", -1),
        ("The answer isn't B", -1), ("Answers B", -1), ("manifold answering is B", -1),
    ],
)  # fmt: skip
def test_letters_are_read(text, wanted):
    assert read_letter(text) == wanted


def test_the_command_line(monkeypatch, capsys, tmp_path, model):
    monkeypatch.setattr(accuracy, "load_smollm2", lambda **_: (model, Characters()))
    path = tmp_path / "mine.jsonl"
    rows = [{"question": one.question, "choices": one.choices, "answer": one.answer} for one in (ONE, TWO)]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert accuracy.main([str(path), "--prompt", "text"]) == 0
    out = capsys.readouterr().out
    assert "2 questions" in out and "all, by tokens" in out and "n=2)" in out
    path.write_text(json.dumps({**rows[0], "answer": 9}))
    assert accuracy.main([str(path)]) == 1
    assert "mine.jsonl line 1, answer: got 9" in capsys.readouterr().err


def test_runs_are_plain_data(monkeypatch, model):
    monkeypatch.setattr(accuracy, "_model", lambda dtype: (model, Characters()))
    monkeypatch.setattr(accuracy.data, "load_questions", lambda name: [ONE, TWO])
    run = accuracy.answer_run(prompt="text", rotate=1)
    assert run["key"] == "DC" and run["n"] == 2 and set(run["answers"]) == set(accuracy_lib.NORMALISATIONS)
    assert json.loads(json.dumps(run)) == run and len(run["log_likelihoods"][0].split()) == 4
    hits = accuracy.right(run, "tokens")
    assert hits == [given == key for given, key in zip(run["answers"]["tokens"], "DC", strict=True)]
    assert accuracy.written_run(max_new_tokens=2)["answers"].keys() == {"written"}
