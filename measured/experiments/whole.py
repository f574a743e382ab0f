"""The course's own model, measured: bits a byte beside counting, its module as a draft, its steps beside transformers'.

Recorded by ``make record PART=whole``.

Book: ``chapters/architecture/whole.ipynb``.
"""

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dslib import fast
from dslib.architecture.generation import Sampling, generate
from dslib.architecture.whole import Whole, load, save, tiny_deepseek
from dslib.check import above, one_of, whole
from dslib.data import corpus
from dslib.data.text import slices
from dslib.fast.training_step import QuickLosses, compiler
from dslib.performance.pretrain import WINDOW, WINDOWS, Plan, byte_lengths, pretrain, rows_at
from dslib.performance.speculative import PredictionDraft, speculate
from measured.experiments.ngram import KneserNey, rate
from measured.machine import best_device
from measured.timing import Ratio, Timing, compare, measure, ratio


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


def beside_counting(ours: dict[str, Any], counted: dict[str, Any]) -> list[dict[str, Any]]:
    """Results of :func:`model_bits` and of ``ngram_baselines`` for one split, document by document.

    One row for all documents and one for each source: ``source``, ``documents``, ``ours`` and ``counted`` in bits a
    byte, and ``better``, the difference with its 95 % interval over documents (value, low, high).
    """
    if ours["documents"] != counted["documents"]:
        raise ValueError("counted: got other documents than ours, expected the same in the same order")
    bits, best, size = (np.array(part) for part in (ours["bits"], counted["bits"]["6"], ours["bytes"]))
    source = [name.split("/")[0] for name in ours["documents"]]
    rows = []
    for name in ("all", *dict.fromkeys(source)):
        at = np.array([name in ("all", one) for one in source])
        rates = {key: part[at].sum() / size[at].sum() for key, part in (("ours", bits), ("counted", best))}
        row = {"source": name, "documents": int(at.sum()), **rates}
        rows.append(row | {"better": rate((best - bits)[at], size[at])})
    return rows


def _drafted(model: Whole, texts: list, new_tokens: int, count: int, sampling: Sampling | None = None) -> list:
    """Each text continued with ``count`` guesses of the prediction module a pass; seeds are the texts' numbers."""
    made = []
    for seed, text in enumerate(texts):
        draft, drawn = PredictionDraft(model, len(text) + new_tokens + count), {}
        if sampling is not None:
            drawn = {"sampling": sampling, "seed": seed}
        made.append(speculate(model.decoder, text, new_tokens, draft, count, **drawn))
        draft.close()
    return made


def _draft_times(model: Whole, texts: list, new_tokens: int, rounds: int, sampling: Sampling | None = None, **more):
    """Readings of plain decoding, of one guess and two, and of what else is given, side by side; all texts each."""
    drawn = {} if sampling is None else {"sampling": sampling, "seed": 0}
    return compare(
        {
            "plain": lambda: [generate(model.decoder, [text], new_tokens, **drawn) for text in texts],
            "1": lambda: _drafted(model, texts, new_tokens, 1, sampling),
            "2": lambda: _drafted(model, texts, new_tokens, 2, sampling),
            **more,
        },
        rounds=rounds, warmup=0,
    )  # fmt: skip


def _triple(found: Ratio) -> list[float]:
    return [found.median, found.low, found.high]


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
    rows = [
        {
            "prompt": number, "count": count, "same_tokens": run.tokens == want, "acceptance": run.acceptance,
            "tokens_per_pass": run.tokens_per_pass,
        }
        for count in (1, 2)
        for number, (run, want) in enumerate(zip(_drafted(model, texts, new_tokens, count), wanted, strict=True))
    ]  # fmt: skip
    theirs = transformers_twin(model)
    options = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None}
    seconds = _draft_times(
        model, texts, new_tokens, rounds,
        transformers=lambda: [theirs.generate(torch.tensor([text]), **options) for text in texts],
    )  # fmt: skip
    return {
        "rows": rows,
        "times": {name: _triple(ratio(seconds["plain"], seconds[name])) for name in ("1", "2")},
        "transformers": _triple(ratio(seconds["transformers"], seconds["plain"])),
        "tokens_per_second": prompts * new_tokens / seconds["plain"].median,
    }


def sampled_drafts(
    temperature: float = 0.8, prompts: int = 24, new_tokens: int = 96, rounds: int = 3
) -> dict[str, Any]:
    """As :func:`module_drafts`, with drawn tokens: greedy text of a small model goes round in circles, easy to guess.

    ``rows`` without ``same_tokens``: another way of drawing gives other texts, of the same distribution.
    """
    above(0, temperature=temperature)
    model, _ = load()
    texts, sampling = prompts_of("validation", prompts), Sampling(temperature=temperature)
    fast.prepare(model.decoder)
    rows = [
        {"count": count, "acceptance": run.acceptance, "tokens_per_pass": run.tokens_per_pass}
        for count in (1, 2)
        for run in _drafted(model, texts, new_tokens, count, sampling)
    ]
    seconds = _draft_times(model, texts, new_tokens, rounds, sampling)
    return {"rows": rows, "times": {name: _triple(ratio(seconds["plain"], seconds[name])) for name in ("1", "2")}}


def transformers_twin(model: Whole, experts: str = "grouped_mm", dtype: torch.dtype = torch.float32) -> Any:
    """The decoder in transformers' class, by way of its files, with one of its ways to run experts."""
    import tempfile

    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        twin = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation=experts)
    return twin


def step_speed(
    length: int = 256, rows: tuple[int, ...] = (16, 32), rounds: int = 7, compiled: bool | None = None,
    precision: str = "float32",
) -> dict[str, Any]:  # fmt: skip
    """A training step of the decoder: forward, backward and AdamW, ours beside transformers' class.

    Weights are float32; with ``precision`` bfloat16 all ways run under autocast.

    Each way reads eight batches of the corpus in turn, so that loads change as in training; "quick, one batch" reads
    one again and again. All ways and numbers of rows have a turn in every round. Ours runs the prediction module on one
    row besides.

    Returns ``tokens_per_second`` of each way by number of rows (median), and ``ratios``: the quick step's speed over
    each other way's, both at the number of rows that is best for it (median, low, high).
    """
    one_of(("float32", "bfloat16"), precision=precision)
    tokens, _ = corpus.token_stream("validation")
    ways, brief, calls = _steps(compiled), precision == "bfloat16", {}

    def step(way: str, plan: Plan, batches: Iterator[int]) -> None:
        loss, optimizer = ways[way]
        with torch.autocast("cpu", torch.bfloat16, enabled=brief):
            found = loss(rows_at(tokens, next(batches), plan))
        found.backward()
        optimizer.step()
        optimizer.zero_grad()

    for count in rows:
        plan = Plan(steps=10**6, tokens=length * count, length=length)
        for way in ways:
            calls[way, count] = partial(step, way, plan, itertools.cycle(range(8)))
        calls["quick, one batch", count] = partial(step, "quick", plan, itertools.repeat(0))
    seconds: dict[str, dict[int, Timing]] = {}
    for (name, count), timing in compare(calls, rounds=rounds, warmup=2).items():
        seconds.setdefault(name, {})[count] = Timing(tuple(t / (length * count) for t in timing.seconds))
    best = {name: min(by_rows.values(), key=lambda timing: timing.median) for name, by_rows in seconds.items()}
    ratios = {name: ratio(timing, best["quick"]) for name, timing in best.items() if name != "quick"}
    return {
        "compiled": compiler() is not None if compiled is None else compiled,
        "tokens_per_second": {
            name: {str(count): round(1 / timing.median) for count, timing in by_rows.items()}
            for name, by_rows in seconds.items()
        },
        "ratios": {name: [one.median, one.low, one.high] for name, one in ratios.items()},
    }


def _steps(compiled: bool | None) -> dict[str, tuple[Any, torch.optim.Optimizer]]:
    """A loss of (B, T + 2) rows and an optimiser, for each way to train the same decoder."""

    def ours(quick: bool):
        model = load()[0].train()
        losses = QuickLosses(model, compiled) if quick else model.losses
        return lambda batch: losses(batch, 1).next_token, torch.optim.AdamW(model.decoder.parameters(), fused=True)

    def theirs(experts: str):
        model = transformers_twin(load()[0], experts).train()

        def loss(batch):
            return model(batch[:, :-2], labels=batch[:, :-2], shift_labels=batch[:, 1:-1].contiguous()).loss

        return loss, torch.optim.AdamW(model.parameters(), fused=True)

    made = {"quick": ours(True), "plain": ours(False)}
    return made | {f"transformers {experts}": theirs(experts) for experts in ("eager", "grouped_mm")}


def step_parts(length: int = 256, rows: int = 32, rounds: int = 5, compiled: bool | None = None) -> dict[str, float]:
    """Where the time of a training step goes on a CPU, forward and backward, both losses: shares of the profiler's.

    ``products`` of matrices, what is ``fused`` between them, and the ``rest``.
    """
    whole(1, length=length, rows=rows, rounds=rounds)
    tokens, _ = corpus.token_stream("validation")
    quick, plan = QuickLosses(load()[0].train(), compiled), Plan(steps=10**6, tokens=length * rows, length=length)

    def step(number: int) -> None:
        losses = quick(rows_at(tokens, number, plan), max(1, rows // plan.predicted))
        (losses.next_token + plan.prediction_weight * losses.after_next).backward()

    for number in range(2):  # compiles
        step(number)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for number in range(rounds):
            step(number)
    parts = {"products": 0.0, "fused": 0.0, "rest": 0.0}
    for event in profile.key_averages():
        product = event.key in ("aten::mm", "aten::bmm", "aten::addmm", "aten::addmm_", "aten::baddbmm")
        fused = "Compiled" in event.key
        parts["products" if product else "fused" if fused else "rest"] += event.self_cpu_time_total
    return {name: time / sum(parts.values()) for name, time in parts.items()}


def training_speed(
    size: str = "full", steps: int = 20, tokens: int = 8192, precision: str = "bfloat16"
) -> dict[str, Any]:
    """Tokens a second of ``make model``'s steps, optimisers included, from fresh weights on the best device here."""
    one_of(("full", "tiny"), size=size)
    device = best_device()
    small = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32, "moe_intermediate_size": 16}
    torch.manual_seed(0)
    model = Whole(tiny_deepseek(**(small if size == "tiny" else {}))).to(device)
    text, _ = corpus.token_stream("validation")
    length = min(256, tokens // 8)
    plan = Plan(steps=steps, tokens=tokens, length=length, late_length=length)
    compiled = None if size == "full" else False
    timing = measure(
        lambda: pretrain(model, text, 3.6, plan, precision=precision, compiled=compiled), min_runs=5, max_runs=5,
        warmup=1,
    )  # fmt: skip
    rate = [steps * tokens / seconds for seconds in (timing.median, timing.high, timing.low)]
    minutes = Plan.steps * Plan.tokens / rate[0] / 60
    return {"tokens_per_second": rate, "full_size": size == "full", "minutes_for_the_plan": minutes}


PROMPTS = ("The people of the United States", "It is a truth universally acknowledged, that", "The SELECT statement")


def texts(temperature: float = 0.8, seed: int = 0, new_tokens: int = 80) -> dict[str, str]:
    """How the shipped model goes on with three fixed prompts; the first draw of each, whatever it is."""
    model, tokenizer = load()
    ends = tokenizer.eos_token_id
    ids = [[ends, *tokenizer.encode(prompt, add_special_tokens=False)] for prompt in PROMPTS]
    sampling = Sampling(temperature=temperature)
    made = [generate(model.decoder, [one], new_tokens, sampling=sampling, seed=seed)[0].tokens for one in ids]
    return dict(zip(PROMPTS, map(tokenizer.decode, made), strict=True))


def window_lines(order: int = 6) -> dict[str, float]:
    """N-gram models of orders 1 to ``order`` on the windows that ``make model`` looks at as it runs: bits a byte.

    The same tokens are predicted. In a window's first places an n-gram sees the tokens before it, the model does not.
    """
    counted = KneserNey(corpus.encode(one.text for one in corpus.load("train")), order, corpus.VOCABULARY)
    validation = corpus.encode(one.text for one in corpus.load("validation"))
    bits = torch.from_numpy(counted.bits(validation))  # (order, tokens)
    places = slices(torch.arange(bits.shape[1]), WINDOW, WINDOWS)[:, 1:]  # (windows, predicted)
    ids = torch.from_numpy(np.concatenate(validation).astype(np.int64))[places]
    size = byte_lengths(corpus.tokenizer())[ids].sum().item()
    return {str(k + 1): round(bits[k][places].sum().item() / size, 4) for k in range(order)}
