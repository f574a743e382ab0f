"""Pictures and text side by side: encode the next request's picture while the present one is being written.

This is what an "asynchronous pipeline of modalities" can mean. The picture of a request is needed before its first
token, and the image stream shares nothing with the text model, so it can work ahead: in a thread on a CPU, on a stream
of its own on a GPU. Whether that gains anything depends on what the two compete for.

Book: ``chapters/performance/speed.ipynb``.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from dslib.architecture.fusion import ImageContext, VisionLanguageDecoder
from dslib.architecture.generation import generate


@dataclass(frozen=True)
class Request:
    """A picture, (1, 3, H, W), and a prompt of token ids about it."""

    pixels: Tensor
    prompt: list[int]


def serve(model: VisionLanguageDecoder, requests: Iterable[Request], new_tokens: int, ahead: bool) -> list[list[int]]:
    """Answer requests one after the other, greedily; with ``ahead``, each next picture is looked at meanwhile."""
    requests = list(requests)
    if not requests:
        return []
    cuda = model.embed_tokens.weight.device.type == "cuda"
    side = torch.cuda.Stream() if cuda and ahead else None

    @torch.inference_mode()  # holds for one thread, so it has to be here
    def look(request: Request) -> ImageContext:
        if side is None:
            return model.encode_image(request.pixels)
        side.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(side):
            return model.encode_image(request.pixels)

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
