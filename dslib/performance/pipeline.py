"""Pictures and text side by side: encode the next request's picture while the present one is being written.

This is what an "asynchronous pipeline of modalities" can mean. The picture of a request is needed before its first
token, and the image stream shares nothing with the text model, so it can work ahead: in a thread on a CPU, on a stream
of its own on a GPU. Whether that gains anything depends on what the two compete for.

Book: ``chapters/performance/speed.ipynb``.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dslib.architecture.fusion import ImageContext, VisionLanguageDecoder
from dslib.lab.timing import compare, ratio
from dslib.performance.generation import generate


@dataclass(frozen=True)
class Request:
    """A picture, (1, 3, H, W), and a prompt of token ids about it."""

    pixels: Tensor
    prompt: list[int]


def serve(model: VisionLanguageDecoder, requests: Sequence[Request], new_tokens: int, ahead: bool) -> list[list[int]]:
    """Answer requests one after the other, greedily; with ``ahead``, each next picture is looked at meanwhile."""
    cuda = model.embed_tokens.weight.device.type == "cuda"
    side = torch.cuda.Stream() if cuda and ahead else None

    @torch.inference_mode()  # holds for one thread, so it has to be here
    def look(request: Request) -> ImageContext:
        if side is None:
            return model.look(request.pixels)
        side.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(side):
            return model.look(request.pixels)

    answers = []
    with ThreadPoolExecutor(1) if ahead else nullcontext() as pool:
        coming = pool.submit(look, requests[0]) if ahead else None
        for index, request in enumerate(requests):
            image = coming.result() if ahead else look(request)
            if side is not None:
                torch.cuda.current_stream().wait_stream(side)
            if ahead and index + 1 < len(requests):
                coming = pool.submit(look, requests[index + 1])
            answers.append(generate(model, [request.prompt], new_tokens, image=image)[0].tokens)
    return answers


def pipeline_speed(
    model: VisionLanguageDecoder, image_size: int = 224, requests: int = 4, prompt_tokens: int = 16,
    new_tokens: int = 32, rounds: int = 3, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """The same requests served in order and with the pictures ahead, side by side, with one thread and with all.

    Returns:
        ``seconds``: a Timing for ``"in order"`` and ``"ahead"``, with ``", one thread"`` for a single thread each
        (of which ``"ahead"`` uses two). ``same_answers``; ``gain``: how many times as fast the better of the two with
        pictures ahead is as the better of the two in order.
    """
    generator = torch.Generator().manual_seed(seed)
    weight, vocabulary = model.embed_tokens.weight, model.config.vocab_size
    made = [
        Request(
            torch.randn(1, 3, image_size, image_size, generator=generator).to(weight),
            torch.randint(vocabulary, (prompt_tokens,), generator=generator).tolist(),
        )
        for _ in range(requests)
    ]
    threads = torch.get_num_threads()

    def way(ahead: bool, count: int):
        def run():
            torch.set_num_threads(count)
            try:
                return serve(model, made, new_tokens, ahead)
            finally:
                torch.set_num_threads(threads)

        return run

    ways = {"in order": way(False, threads), "ahead": way(True, threads)}
    if weight.device.type == "cpu" and threads > 1:
        ways |= {"in order, one thread": way(False, 1), "ahead, one thread": way(True, 1)}
    same = ways["in order"]() == ways["ahead"]()
    seconds = compare(ways, rounds=rounds, warmup=0, device=weight.device)
    best = {
        start: min((t for name, t in seconds.items() if name.startswith(start)), key=lambda t: t.median)
        for start in ("in order", "ahead")
    }
    return {"seconds": seconds, "same_answers": same, "gain": ratio(best["in order"], best["ahead"]).median}
