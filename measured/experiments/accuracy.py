"""SmolLM2 on four-choice questions: runs that are recorded, the comparison with lm-eval, and a command line.

    python -m measured.experiments.accuracy mmlu-281                     share of right answers, by domain
    python -m measured.experiments.accuracy us_tort_law medmcqa jee-math --dtype bfloat16
    python -m measured.experiments.accuracy mmlu --shots 5 --model deepseek-ai/DeepSeek-V2-Lite      (needs the hub)
    python -m measured.experiments.accuracy my_questions.jsonl --prompt text

Book: ``chapters/performance/accuracy.ipynb``.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from dslib import fast
from dslib.architecture.weights.pretrained import load_pretrained, load_smollm2
from dslib.architecture.weights.twin import hf_twin
from dslib.data import questions as data
from dslib.performance import statistics
from dslib.performance.accuracy import NORMALISATIONS, PROMPTS, Prompt, Scores, score, write_letters
from measured.timing import compare, ratio

DOMAINS = ("mathematics", "law", "medicine", "STEM", "humanities", "social sciences", "other", "all")


@cache
def _model(dtype: str):
    model, tokenizer = load_smollm2(dtype=getattr(torch, dtype))
    fast.prepare(model)
    return model, tokenizer


def answer_run(
    questions: str = "mmlu-281", prompt: str = "mmlu", dtype: str = "float32", shots: int = 0, rotate: int = 0
) -> dict[str, Any]:
    """Score a set with SmolLM2; plain data, to be recorded.

    Args:
        questions: a set, see :func:`dslib.data.questions.load_questions`. prompt: a key of
            :data:`~dslib.performance.accuracy.PROMPTS`. rotate: by how many places the choices are moved.

    Returns:
        ``n``; ``key``, the right letters in one string; ``answers``, the letters given, a string for each normalisation
        that makes sense for the prompt; ``log_likelihoods``, four numbers in a string for each question.
    """
    model, tokenizer = _model(dtype)
    asked = [one.rotated(rotate) for one in data.load_questions(questions)]
    texts = PROMPTS[prompt].answer == "text"
    scores = score(model, tokenizer, asked, PROMPTS[prompt], shots=shots, with_prior=texts)
    return {
        "n": len(asked),
        "key": _letters([one.answer for one in asked]),
        "answers": {name: _letters(scores.answers(name).tolist()) for name in (NORMALISATIONS if texts else ("none",))},
        "log_likelihoods": [" ".join(f"{value:.3f}" for value in row) for row in scores.log_likelihoods.tolist()],
    }


def written_run(
    questions: str = "mmlu-281", prompt: str = "mmlu", dtype: str = "float32", max_new_tokens: int = 8
) -> dict[str, Any]:
    """Let SmolLM2 write its answers; as :func:`answer_run`, with ``-`` where no letter can be read, and ``samples``."""
    model, tokenizer = _model(dtype)
    asked = data.load_questions(questions)
    written = write_letters(model, tokenizer, asked, PROMPTS[prompt], max_new_tokens=max_new_tokens)
    return {
        "n": len(asked),
        "key": _letters([one.answer for one in asked]),
        "answers": {"written": _letters(written.answers.tolist())},
        "samples": list(written.texts[:: max(1, len(asked) // 8)]),
    }


def _letters(answers: Sequence[int]) -> str:
    return "".join("-" if at < 0 else data.LETTERS[at] for at in answers)


def right(run: dict[str, Any], normalisation: str = "none") -> list[bool]:
    """Which answers of a recorded run are right, in the order of the set."""
    return [given == key for given, key in zip(run["answers"][normalisation], run["key"], strict=True)]


def against_lm_eval(
    prompt: str = "mmlu",
    dtype: str = "float32",
    every: int = 1,
    batch_sizes: Sequence[int] = (1, 2, 4, 8),
    sweep_every: int = 24,
    rounds: int = 2,
) -> dict[str, Any]:
    """Ours and lm-eval's Hugging Face model on the same questions and weights, side by side.

    lm-eval's batch size is the quickest of ``batch_sizes`` on every ``sweep_every``-th question, ours is the default.

    Returns:
        Timings ``lm_eval`` and ``ours``, and in float32 ``ours_same_kernel``, without oneDNN; ``times`` and
        ``times_same_kernel``: how many times as fast ours is (median of the rounds); ``questions_per_second`` of both;
        ``batch_size``, lm-eval's; ``same_answers`` of ``n``; ``largest_difference`` of log-likelihoods, in nats.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns that a model came ready-made
    import lm_eval.models.huggingface as harness
    from lm_eval.api.instance import Instance

    model, tokenizer = _model(dtype)
    twin, format_ = hf_twin(model), PROMPTS[prompt]
    every_one = data.mmlu_examples()

    def theirs(asked: Sequence[data.Question], batch_size: int) -> torch.Tensor:
        # Log-probabilities in float32, as ours are: in bfloat16 lm-eval would round them to two or three digits.
        hf = harness.HFLM(pretrained=twin, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
        requests = [
            Instance("loglikelihood", {}, (format_.text(one), reply), index)
            for index, one in enumerate(asked)
            for reply in format_.replies(one)
        ]
        return torch.tensor([value for value, _ in hf.loglikelihood(requests, disable_tqdm=True)]).view(len(asked), -1)

    few, asked = every_one[::sweep_every], every_one[::every]
    score(model, tokenizer, few, format_), theirs(few, 2)  # both sides warm
    sweep = compare({str(size): lambda size=size: theirs(few, size) for size in batch_sizes}, rounds=1, warmup=0)
    best = min(batch_sizes, key=lambda size: sweep[str(size)].median)
    found: dict[str, torch.Tensor] = {}

    def kept(name: str, run) -> None:
        found[name] = run()

    def same_kernel() -> None:
        fast.prepare(model, quick_products=False)
        score(model, tokenizer, asked, format_)
        fast.prepare(model)

    ways = {
        "lm_eval": lambda: kept("lm_eval", lambda: theirs(asked, best)),
        "ours": lambda: kept("ours", lambda: score(model, tokenizer, asked, format_).log_likelihoods),
    }
    if dtype == "float32":  # in other formats there is nothing to choose
        ways["ours_same_kernel"] = same_kernel
    times = compare(ways, rounds=rounds, warmup=0)
    ours, other = found["ours"], found["lm_eval"]
    return {
        **times,
        "times": ratio(times["lm_eval"], times["ours"]).median,
        "times_same_kernel": ratio(times["lm_eval"], times.get("ours_same_kernel", times["ours"])).median,
        "questions_per_second": {name: len(asked) / times[name].median for name in ("lm_eval", "ours")},
        "batch_size": best,
        "n": len(asked),
        "same_answers": int((ours.argmax(1) == other.argmax(1)).sum()),
        "largest_difference": (ours - other).abs().max().item(),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m measured.experiments.accuracy", description="Four-choice questions, with intervals."
    )
    parser.add_argument("sets", nargs="+", help=f"{', '.join(data.SETS)}, or a JSON Lines file")
    parser.add_argument("--prompt", choices=PROMPTS, default="mmlu")
    parser.add_argument("--shots", type=int, default=0, help="answered examples before each question")
    parser.add_argument("--model", help="a model of the Hugging Face hub (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    place = {"dtype": getattr(torch, options.dtype), "device": options.device}
    try:
        # Before the model: a bad file should show at once.
        chosen = {name: data.load_questions(name) for name in options.sets}
        model, tokenizer = load_pretrained(options.model, **place) if options.model else load_smollm2(**place)
        fast.prepare(model)
        for name, asked in chosen.items():
            examples = data.mmlu_examples() if name == "mmlu" else None
            scores = score(model, tokenizer, asked, PROMPTS[options.prompt], shots=options.shots, examples=examples,
                           progress=True)  # fmt: skip
            _report(name, scores, PROMPTS[options.prompt])
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _report(name: str, scores: Scores, prompt: Prompt) -> None:
    """Print the share of right answers by domain, each with its interval and n; for texts, by normalisation."""
    print(f"\n{name}: {len(scores.questions)} questions, right in per cent with 95 % interval (chance 25)")
    for normalisation in NORMALISATIONS[:-1] if prompt.answer == "text" else ("none",):
        right_ones = scores.right(normalisation)
        for domain in DOMAINS:
            inside = set(data.in_domain(scores.questions, domain))
            picked = [bool(hit) for one, hit in zip(scores.questions, right_ones, strict=True) if one in inside]
            if picked:
                said = statistics.share(picked)
                label = domain if prompt.answer == "letter" else f"{domain}, by {normalisation}"
                low, high = 100 * said.low, 100 * said.high
                print(f"  {label:30} {100 * said.value:5.1f}  ({low:.1f} to {high:.1f}, n={said.n})")


if __name__ == "__main__":
    sys.exit(main())
