"""The course's own model, measured: bits a byte beside counting, its module as a draft, its steps beside transformers'.

Recorded by ``make record PART=whole-bits``, ``whole-draft`` and ``whole-step``.

Book: ``chapters/architecture/whole.ipynb``.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dslib import fast
from dslib.architecture.generation import generate
from dslib.architecture.whole import Whole, load, save
from dslib.check import whole
from dslib.data import corpus
from dslib.fast.training_step import QuickLosses
from dslib.performance.pretrain import Plan, rows_at
from dslib.performance.speculative import PredictionDraft, speculate
from measured.timing import compare, ratio


@torch.inference_mode()
def document_bits(model: Whole, tokens: np.ndarray, length: int = 512) -> float:
    """Bits that a model needs for a document, its end token included; the same token stands before its first.

    Windows of ``length`` tokens, each but the first with half of it as context, so that every token is predicted once,
    from at least half a window where there is so much before it.
    """
    ids = torch.from_numpy(np.concatenate([tokens[-1:], tokens]).astype(np.int64))
    nats, done = 0.0, 1  # ids[0] is given
    while done < len(ids):
        start = 0 if done == 1 else done - length // 2
        end = min(len(ids), start + length)
        logits = model(ids[None, start : end - 1])[0, done - 1 - start :]
        nats += float(F.cross_entropy(logits.float(), ids[done:end], reduction="sum"))
        done = end
    return nats / math.log(2)


def model_bits(split: str = "validation", every: int = 1) -> dict[str, Any]:
    """The shipped model on every n-th document of a split: ``documents``, their ``bytes`` and ``bits``."""
    whole(1, every=every)
    model, _ = load()
    documents = corpus.load(split)[::every]
    tokens = corpus.encode(document.text for document in documents)
    return {
        "documents": [f"{document.source}/{document.id}" for document in documents],
        "bytes": [len(document.text.encode()) for document in documents],
        "bits": [round(document_bits(model, one), 1) for one in tokens],
    }


def prompts_of(split: str, count: int, length: int = 32) -> list[list[int]]:
    """The first tokens of ``count`` documents, evenly spread over a split."""
    documents = [one for one in corpus.load(split) if len(one.text) > 8 * length]
    chosen = [documents[at] for at in np.linspace(0, len(documents) - 1, count).astype(int)]
    ends = corpus.tokenizer().eos_token_id
    return [[ends, *one[: length - 1].tolist()] for one in corpus.encode(document.text for document in chosen)]


def module_drafts(prompts: int = 24, new_tokens: int = 96, rounds: int = 5) -> dict[str, Any]:
    """The prediction module as a draft, greedy, float32, on the beginnings of validation documents.

    Returns ``rows``, one a prompt and number of guesses: ``count``, ``same_tokens``, ``acceptance``,
    ``tokens_per_pass``. And, of all prompts together in rounds side by side: ``times``, speed over plain decoding by
    number of guesses, and ``transformers``, plain decoding's over ``transformers.generate``, each (median, low, high).
    """
    model, _ = load()
    texts = prompts_of("validation", prompts)
    fast.prepare(model.decoder)
    wanted = [generate(model.decoder, [text], new_tokens)[0].tokens for text in texts]

    def drafted(count: int) -> list:
        made = []
        for text in texts:
            draft = PredictionDraft(model, len(text) + new_tokens + count)
            made.append(speculate(model.decoder, text, new_tokens, draft, count))
            draft.close()
        return made

    rows = []
    for count in (1, 2):
        for text, (run, want) in enumerate(zip(drafted(count), wanted, strict=True)):
            rows.append({
                "prompt": text, "count": count, "same_tokens": run.tokens == want, "acceptance": run.acceptance,
                "tokens_per_pass": run.tokens_per_pass,
            })  # fmt: skip
    theirs = transformers_twin(model)
    ways = {
        "plain": lambda: [generate(model.decoder, [text], new_tokens) for text in texts],
        "1": lambda: drafted(1),
        "2": lambda: drafted(2),
        "transformers": lambda: [
            theirs.generate(torch.tensor([text]), max_new_tokens=new_tokens, do_sample=False, eos_token_id=None)
            for text in texts
        ],
    }
    seconds = compare(ways, rounds=rounds, warmup=0)
    times = {name: ratio(seconds["plain"], seconds[name]) for name in ("1", "2")}
    against = ratio(seconds["transformers"], seconds["plain"])
    return {
        "rows": rows,
        "times": {name: [one.median, one.low, one.high] for name, one in times.items()},
        "transformers": [against.median, against.low, against.high],
        "tokens_per_second": prompts * new_tokens / seconds["plain"].median,
    }


def transformers_twin(model: Whole, experts: str = "grouped_mm", dtype: torch.dtype = torch.float32) -> Any:
    """The decoder in transformers' class, by way of its files, with one of its ways to run experts."""
    import tempfile

    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        twin = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation=experts)
    return twin


def step_speed(length: int = 256, rows: int = 32, rounds: int = 7, compiled: bool | None = None) -> dict[str, Any]:
    """A training step of the decoder, forward and backward, without the prediction module: ours beside transformers'.

    Batches are new ones of the corpus at every step, so that loads change, as in training. float32.

    Returns ``tokens_per_second`` of each way (median), and ``ratios`` of the quick step's speed to each other way's
    (median, low, high).
    """
    model, _ = load()
    tokens, _ = corpus.token_stream("validation")
    plan = Plan(steps=10**6, tokens=length * rows, length=length)
    quick = QuickLosses(model, compiled)
    ways, number = {"quick": lambda batch: quick(batch, 1).next_token}, [0]
    ways["plain"] = lambda batch: model.losses(batch, 1).next_token
    for name in ("eager", "grouped_mm"):
        theirs = transformers_twin(model, name).train()
        ways[f"transformers, {name}"] = lambda batch, theirs=theirs: theirs(batch[:, :-1], labels=batch[:, :-1]).loss

    def step(way) -> None:
        number[0] += 1
        way(rows_at(tokens, number[0] % 30, plan)).backward()

    seconds = compare({name: lambda way=way: step(way) for name, way in ways.items()}, rounds=rounds, warmup=2)
    ratios = {name: ratio(seconds[name], seconds["quick"]) for name in ways if name != "quick"}
    return {
        "compiled": quick.compiled,
        "tokens_per_second": {name: round(length * rows / one.median) for name, one in seconds.items()},
        "ratios": {name: [one.median, one.low, one.high] for name, one in ratios.items()},
    }
