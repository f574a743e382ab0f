"""Decoding in steps of one shape, positions and tokens in tensors: what a CUDA graph can record once and replay.

An ordinary decoding loop asks the device for each token and tells it the next position, and launches hundreds of small
kernels for every token. On a large GPU, launching takes longer than running them. Here a step reads its token and its
position from two tensors and writes the next ones back, always over the whole cache behind a mask. Nothing in it
depends on the host, so CUDA can record the launches of one step as a graph and replay them with a single call.

The same step runs on any device without a graph, which is how the tests hold it to :func:`generate` on a CPU.

Book: ``chapters/performance/speed.ipynb``. Source: gpt-fast (github.com/pytorch-labs/gpt-fast) for what it brings.
"""

import torch
from torch import Tensor

from dslib.architecture.decoder import Decoder
from dslib.architecture.fusion import ImageContext


class StaticDecoding:
    """Greedy decoding of a batch of equally long prompts.

    Args:
        max_length: tokens of a prompt and its continuation together.
        image: what a vision-language model has seen, one picture a sequence.
        graph: record a step as a CUDA graph and replay it.
        fused: use the kernels of :mod:`dslib.fast.fused_step` (a plain decoder, one sequence, CUDA).
        backend: of ``torch.compile`` for the step, e.g. ``"inductor"``, which fuses the small operations between the
            products; None does not compile. The first step then takes as long as compiling does.

    Raises:
        ValueError: ``graph`` elsewhere than on CUDA; ``fused`` with an image or a backend, or for another model.
        RuntimeError: a step that cannot be recorded, such as one whose kernels make the host wait.

    Example:
        >>> loop = StaticDecoding(model, batch_size=2, max_length=40)
        >>> loop.generate(prompts, 8).shape  # prompts: (2, T) with T + 8 <= 40
        torch.Size([2, 8])
    """

    def __init__(
        self, model: Decoder, batch_size: int, max_length: int, *, image: ImageContext | None = None,
        graph: bool = False, fused: bool = False, backend: str | None = None,
    ):  # fmt: skip
        device = model.embed_tokens.weight.device
        if graph and device.type != "cuda":
            raise ValueError(f"graph: got True on device {device}, expected a CUDA device")
        if fused and (image is not None or backend is not None):
            raise ValueError("fused: got True, expected neither an image nor a backend with it")
        self.model, self.seen = model, {} if image is None else {"image": image}
        prefix = 0 if image is None else image.prefix
        self.max_length = max_length
        self.cache = model.make_cache("preallocated", batch_size=batch_size, max_length=prefix + max_length)
        # Read and written by every step, always at the same addresses: (B, 1).
        self.token = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros_like(self.token)
        self.broken = torch.zeros_like(self.token, dtype=torch.bool)  # whether logits of this text were NaN or infinite
        if fused:
            from dslib.fast.fused_step import FusedStep  # here: it needs Triton

            self._next = FusedStep(model, self.cache)
        elif backend is None:
            self._next = self._forward
        else:
            self._next = torch.compile(self._forward, backend=backend, dynamic=False)
        self._run = self._record() if graph else self._step

    def _forward(self, token: Tensor, position: Tensor) -> Tensor:
        return self.model(token, self.cache, position, **self.seen)[:, 0]  # (B, vocab_size)

    @torch.inference_mode()
    def _step(self) -> None:
        self._choose(self._next(self.token, self.position))
        self.position.add_(1)

    def _choose(self, logits: Tensor) -> None:
        """(B, vocab_size) -> the next token. NaN counts as the largest, so the largest tells of it."""
        largest, token = logits.max(-1, keepdim=True)
        self.token.copy_(token)
        self.broken.logical_or_(largest.isfinite().logical_not_())

    @torch.inference_mode()
    def prefill(self, prompts: Tensor) -> Tensor:
        """Read the prompts, int64 (B, T), anew; returns the first new token of each, (B, 1)."""
        batch, length = self.token.shape[0], prompts.shape[1]
        if len(prompts) != batch or not 0 < length < self.max_length:
            wanted = f"({batch}, 1 to {self.max_length - 1})"
            raise ValueError(f"prompts: got shape {tuple(prompts.shape)}, expected {wanted}")
        self.cache.static = False
        self.cache.truncate(0)
        # A step looks at all slots and gives those behind the text a weight of zero, which a NaN there would survive.
        self.cache.buffer.zero_()
        self.broken.zero_()
        last = torch.full_like(self.token, length - 1)
        logits = self.model(
            prompts.to(self.token.device), self.cache, logits_at=last, **self.seen
        )  # (B, 1, vocab_size)
        self._choose(logits[:, 0])
        self.position.fill_(length)
        self.cache.static = True
        return self.token

    def step(self) -> Tensor:
        """Feed the last token and get the next one of each sequence, (B, 1): a view that the next step overwrites.

        Nothing asks the device, so whether logits were numbers is for the caller to look at, in ``broken``, (B, 1).
        """
        self._run()
        return self.token

    def generate(self, prompts: Tensor, new_tokens: int) -> Tensor:
        """(B, T) prompts -> (B, new_tokens). The host waits for the device once, at the end.

        Raises:
            ValueError: prompt and new tokens do not fit into ``max_length``; logits that are not a number.
        """
        most = self.max_length - prompts.shape[1] + 1
        if not 1 <= new_tokens <= most:
            raise ValueError(f"new_tokens: got {new_tokens}, expected 1 to {most} with max_length={self.max_length}")
        out = torch.empty(len(self.token), new_tokens, dtype=torch.int64, device=self.token.device)
        out[:, :1] = self.prefill(prompts)
        for index in range(1, new_tokens):
            out[:, index : index + 1] = self.step()
        if broken := self.broken.flatten().nonzero().flatten().tolist():
            raise ValueError(f"logits: not a number (NaN or infinite) for sequence {broken[0]}, expected finite logits")
        return out

    def _record(self):
        """Run a step a few times where CUDA wants it (kernels load and libraries get memory then), and record one."""
        self.cache.static = True
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        self.position.zero_()
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(graph):
            self._step()
        return graph.replay
