"""Batches of pictures and texts, prepared while the model works on the batch before.

Decoding a photograph takes as long as a small encoder takes to look at it. Done in turns, each of the two waits for the
other half of the time. :class:`ImageLoader` decodes ahead in workers, keeps the order, holds only a few batches in
memory, and reports every failure with the picture's number and name: an error, a worker that died or does not answer.

Book: ``chapters/scenarios/multimodal.ipynb``.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context

import torch
from torch import Tensor

from dslib.scenarios.images import ImageError, Source
from dslib.scenarios.multimodal import Recipe, Views, prepare


class WorkerLost(RuntimeError):
    """A worker died or does not answer. The message says at which picture."""


@dataclass
class Batch:
    """What a model takes.

    Attributes:
        pixels: (V, 3, H, W) float32, the views of all pictures one after the other; H and W are the largest of the
            batch, smaller views are filled with zeros (the encoder's mean) at right and bottom.
        mask: (V, H, W) bool, True where a view has pixels of its own.
        item: (V,) int64: to which picture of the batch a view belongs.
        grids: (B, 2) int64: columns and rows of each picture's tiles.
        indices: the numbers that the B pictures have in the whole list.
        text: ``input_ids`` and ``attention_mask``, (B, T) each, and ``cut``; None without texts.
        failures: number -> error of the pictures that were skipped.
    """

    pixels: Tensor
    mask: Tensor
    item: Tensor
    grids: Tensor
    indices: list[int]
    text: dict[str, Tensor] | None = None
    failures: dict[int, ImageError] = field(default_factory=dict)


def collate(items: Sequence[Views], indices: Sequence[int] | None = None) -> Batch:
    """Pictures of any number and size of views to one batch.

    Raises:
        ValueError: no picture; as many indices as pictures are wanted.
    """
    if not items:
        raise ValueError("items: got none, expected at least one picture")
    indices = list(range(len(items))) if indices is None else list(indices)
    if len(indices) != len(items):
        raise ValueError(f"indices: got {len(indices)}, expected {len(items)}, one a picture")
    counts = torch.tensor([len(one.pixels) for one in items])
    height, width = (max(one.pixels.shape[axis] for one in items) for axis in (2, 3))
    pixels = torch.zeros(int(counts.sum()), 3, height, width)
    mask = torch.zeros(len(pixels), height, width, dtype=torch.bool)
    for one, end in zip(items, counts.cumsum(0).tolist(), strict=True):
        views, (h, w) = slice(end - len(one.pixels), end), one.pixels.shape[2:]
        pixels[views, :, :h, :w], mask[views, :h, :w] = one.pixels, True
    item = torch.arange(len(items)).repeat_interleave(counts)
    return Batch(pixels, mask, item, torch.tensor([one.grid for one in items]), indices)


def tokenise(texts: Sequence[str], tokenizer, max_length: int = 128) -> dict[str, Tensor]:
    """Texts to ``input_ids`` and ``attention_mask``, int64 (B, T), padded to the longest of *this* batch, not further.

    ``cut``, bool (B,), says which texts were longer than ``max_length`` tokens and lost their end.

    Raises:
        ValueError: a plain string, no text, an empty text, a tokenizer that cannot pad.
    """
    _check_texts(texts)
    if tokenizer.pad_token_id is None:
        raise ValueError("tokenizer: has no padding token; set tokenizer.pad_token, for example to its eos_token")
    # An own call without the limit: cutting must not be silent, and the tokenizer does not say where it cut.
    lengths = [len(ids) for ids in tokenizer(list(texts), verbose=False).input_ids]
    batch = tokenizer(list(texts), padding="longest", truncation=True, max_length=max_length, return_tensors="pt")
    cut = torch.tensor([length > max_length for length in lengths])
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "cut": cut}


def _check_texts(texts: Sequence[str]) -> None:
    if isinstance(texts, str) or not len(texts):
        raise ValueError(f"texts: got {texts!r}, expected a list of at least one text")
    for number, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"texts: number {number} is {text!r}, expected a text that says something")


class ImageLoader:
    """Iterates over batches of ``sources``, prepared ahead by workers; ``len`` is the number of batches.

    Args:
        sources: what :func:`~.decoding.open_image` takes, one a picture. texts: one a picture, or None; then
            ``tokenizer`` and ``max_length`` are for them.
        workers: 0 prepares each batch when it is asked for, in the caller's thread.
        ahead: batches prepared beyond the one being used.
        processes: workers are processes instead of threads: a fault inside a decoder then kills a worker and not the
            program, at the price of copying pixels. (Threads suffice for speed: Pillow decodes and resizes without
            holding Python's lock.)
        on_error: "raise" stops at the first picture that fails; "skip" leaves it out and lists it in ``failures`` of
            its batch. A batch of failures only is skipped whole; :attr:`failures` of the loader has them all.
        timeout: seconds to wait for one picture.

    Raises:
        ImageError: a picture cannot be used (number and name are in the message).
        WorkerLost: a worker died or timed out.
    """

    def __init__(self, sources: Sequence[Source], recipe: Recipe, batch_size: int = 16, *, texts=None, tokenizer=None,
                 max_length: int = 128, workers: int = 1, ahead: int = 2, processes: bool = False,
                 on_error: str = "raise", timeout: float = 60.0):  # fmt: skip
        for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0), ("ahead", ahead, 1)):
            if value < least:
                raise ValueError(f"{name}: got {value}, expected at least {least}")
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error: got {on_error!r}, expected 'raise' or 'skip'")
        if texts is not None and (len(texts) != len(sources) or tokenizer is None):
            raise ValueError(f"texts: got {len(texts)}, expected {len(sources)}, one a picture, and a tokenizer")
        if texts is not None:
            _check_texts(texts)  # before the first picture is decoded, not at the batch that holds the empty one
        self.sources, self.recipe, self.batch_size = sources, recipe, batch_size
        self.texts, self.tokenizer, self.max_length = texts, tokenizer, max_length
        self.workers, self.ahead, self.processes, self.on_error, self.timeout = (
            workers,
            ahead,
            processes,
            on_error,
            timeout,
        )
        self.failures: dict[int, ImageError] = {}

    def __len__(self) -> int:
        return -(-len(self.sources) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        self.failures = {}
        starts = range(0, len(self.sources), self.batch_size)
        if self.workers == 0:
            for start in starts:
                yield from self._finish(dict.fromkeys(self._numbers(start)))
            return
        pool, waiting = self._pool(), deque()
        try:
            for start in starts:
                waiting.append({i: self._submit(pool, i) for i in self._numbers(start)})
                if len(waiting) > self.ahead:
                    yield from self._finish(waiting.popleft())
            while waiting:
                yield from self._finish(waiting.popleft())
        finally:  # also when the caller stops early, or a picture fails
            workers = list((getattr(pool, "_processes", None) or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in workers:  # one that hangs would keep the program from ending
                worker.kill()

    def _numbers(self, start: int) -> range:
        return range(start, min(start + self.batch_size, len(self.sources)))

    def _pool(self) -> Executor:
        if not self.processes:
            return ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        # "spawn": a forked copy of a process with running threads may wait for ever for a lock.
        return ProcessPoolExecutor(self.workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,))

    def _submit(self, pool: Executor, index: int) -> Future | None:
        try:
            return pool.submit(prepare, self.sources[index], self.recipe)
        except BrokenProcessPool:
            return None  # a worker has died; the picture at which it did says so when its turn comes

    def _finish(self, futures: dict[int, Future | None]) -> Iterator[Batch]:
        ready, failed = {}, {}
        for index, future in futures.items():
            try:
                ready[index] = self._result(index, future)
            except ImageError as error:
                named = ImageError(f"picture {index}: {error}")
                if self.on_error == "raise":
                    raise named from error
                failed[index] = named
        self.failures |= failed
        if ready:
            batch = collate(list(ready.values()), list(ready))
            batch.failures = failed
            if self.texts is not None:
                batch.text = tokenise([self.texts[i] for i in ready], self.tokenizer, self.max_length)
            yield batch

    def _result(self, index: int, future: Future | None) -> Views:
        if self.workers == 0:
            return prepare(self.sources[index], self.recipe)
        try:
            if future is None:
                raise BrokenProcessPool
            return future.result(self.timeout)
        except BrokenProcessPool as error:
            raise WorkerLost(f"picture {index} or one after it: the worker that decoded it died") from error
        except TimeoutError as error:
            raise WorkerLost(f"picture {index}: no answer from its worker within {self.timeout:g} s") from error
        except MemoryError as error:
            error.add_note(f"while preparing picture {index}")
            raise
