"""What is asked of a server, and what one copy of a model can do: two rates, one for prompts and one for answers.

A request takes ``tokens_in / prefill + tokens_out / decode`` seconds of a server, whatever else is batched with it.
That is a line where the truth is a curve (long prompts cost more a token, small batches less), and :func:`rates` fits
it to measured runs. Published deployments of V3 and R1 are ready under :func:`published_replica`.

Chapter: ``chapters/performance/cost.ipynb``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dslib import check
from dslib.data import published_figures
from dslib.performance.prices import gpu_id


@dataclass(frozen=True)
class Traffic:
    """Requests a day and what one is on average."""

    requests_per_day: float
    tokens_in: float  # of the prompt
    tokens_out: float  # of the answer
    cached: float = 0.0  # share of the prompt that a prefix cache holds, from 0 to 1
    peak: float = 1.0  # arrivals at the busiest time over the mean, at least 1

    def __post_init__(self) -> None:
        check.above(0, requests_per_day=self.requests_per_day)
        check.at_least(0, tokens_in=self.tokens_in, tokens_out=self.tokens_out)
        check.between(0, 1, cached=self.cached)
        check.above(0, **{"tokens to compute (tokens_in not cached, tokens_out)": self.computed + self.tokens_out})
        check.at_least(1, peak=self.peak)

    @property
    def computed(self) -> float:
        """Tokens of the prompt that the cache does not have."""
        return self.tokens_in * (1 - self.cached)


@dataclass(frozen=True)
class Replica:
    """One copy of a model, or one node of a large deployment, kept busy all the time."""

    gpu: str  # an id of data/hardware.yml or data/prices.yml
    gpus: int  # how many of them it takes
    prefill: float  # prompt tokens a second while it does nothing else; those found in the prefix cache do not count
    decode: float  # answer tokens a second, over all users, while it does nothing else
    apart: bool = False  # prompts and answers are worked on by different machines, each for one of the two
    at_least: int = 1  # with fewer such nodes these rates are not reached: experts are spread over all of them
    source: tuple[str, ...] = ()  # keys of references.bib for the rates

    def __post_init__(self) -> None:
        object.__setattr__(self, "gpu", gpu_id(self.gpu))
        check.whole(1, gpus=self.gpus, at_least=self.at_least)
        check.above(0, prefill=self.prefill, decode=self.decode)

    def seconds(self, tokens_in: float, tokens_out: float) -> tuple[float, float]:
        """Seconds of this replica for the prompt and for the answer of one request."""
        check.at_least(0, tokens_in=tokens_in, tokens_out=tokens_out)
        return tokens_in / self.prefill, tokens_out / self.decode


def rates(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Prefill and decode rate, in tokens a second, from two measured runs (tokens in, tokens out, seconds).

    Solves ``tokens_in / prefill + tokens_out / decode = seconds`` for both runs. Their mixes have to differ. Raises
    ValueError for a number that is not above 0, and for two runs that no pair of positive rates explains.
    """
    runs = {"first": first, "second": second}
    for name, run in runs.items():
        check.above(0, **{f"{name}[{i}]": value for i, value in enumerate(run)})
        if len(run) != 3:
            raise ValueError(f"{name}: got {run!r}, expected three numbers: tokens in, tokens out, seconds")
    (in1, out1, time1), (in2, out2, time2) = first, second
    area = in1 * out2 - in2 * out1
    per_in, per_out = time1 * out2 - time2 * out1, in1 * time2 - in2 * time1
    if area == 0 or per_in / area <= 0 or per_out / area <= 0:
        raise ValueError(f"first, second: got {runs}, expected different mixes that two positive rates explain")
    return area / per_in, area / per_out


def published_replicas() -> list[str]:
    """The names that :func:`published_replica` knows."""
    return list(_BUILDERS)


def published_replica(name: str) -> Replica:
    """A deployment of V3 or R1 whose speed was published, by name.

    ``h200`` one node of 8 H200, FP8 (GPUStack); ``h100-4bit`` one node of 8 H100 with 4-bit weights (one user's runs);
    ``h100-large`` 12 nodes of 8 H100 with prompts and answers apart (SGLang team); ``h800-deepseek`` a node in
    DeepSeek's own service, which had 227 of them, with prompts from the cache counted as work. Raises ValueError for
    another name.
    """
    if name not in _BUILDERS:
        raise check.unknown("name", name, _BUILDERS, "a published deployment")
    return _BUILDERS[name]()


def _h200() -> Replica:
    chat, long = (published_figures.figure("serving_gpustack", run) for run in ("chat_run", "long_run"))
    return Replica("H200", 8, *rates(chat.value, long.value), source=chat.source)


def _h100_4bit() -> Replica:
    total, out = (published_figures.figure("serving_awq", name) for name in ("total_tokens", "output_tokens"))
    # One run is one equation. The second is an assumption: the two rates stand to each other as on the H200.
    ratio = _h200().prefill / _h200().decode
    decode = out.value + (total.value - out.value) / ratio
    return Replica("H100_SXM", 8, ratio * decode, decode, source=total.source)


def _apart(gpu: str, entry: str) -> Replica:
    prefill, decode = (published_figures.figure(entry, name) for name in ("prefill_per_node", "decode_per_node"))
    nodes = published_figures.figure(entry, "nodes").value
    return Replica(gpu, 8, prefill.value, decode.value, apart=True, at_least=int(nodes), source=prefill.source)


_BUILDERS = {
    "h200": _h200,
    "h100-4bit": _h100_4bit,
    "h100-large": lambda: _apart("H100_SXM", "serving_sglang"),
    "h800-deepseek": lambda: _apart("H800", "serving"),
}
