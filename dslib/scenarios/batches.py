"""Batches of pictures and texts, prepared while the model works on the batch before.

Decoding a photograph takes as long as a small encoder takes to look at it. Done in turns, each of the two waits for the
other half of the time. :class:`ImageLoader` decodes ahead in workers, keeps the order, holds only a few batches in
memory, and reports every failure with the picture's number and name: an error, a worker that died or does not answer.

Book: ``chapters/scenarios/multimodal.ipynb``.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dslib import check
from dslib.scenarios.images import ImageError, Source, open_image
from dslib.scenarios.multimodal import Recipe, Views, prepare


class WorkerLost(RuntimeError):
    """A worker died or does not answer. The message says at which picture."""


@dataclass
class Batch:
    """What a model takes: the V views of B pictures."""

    pixels: Tensor  # (V, 3, H, W) float32, of the largest H and W; smaller views have zeros (the mean) right and below
    mask: Tensor  # (V, H, W) bool, True where a view has pixels of its own
    item: Tensor  # (V,) int64, to which picture of the batch a view belongs
    grids: Tensor  # (B, 2) int64, columns and rows of each picture's tiles
    indices: list[int]  # the numbers that the B pictures have in the whole list
    text: dict[str, Tensor] | None = None  # as of tokenise; None without texts
    failures: dict[int, ImageError] = field(default_factory=dict)  # number -> error of the pictures that were skipped


def collate(items: Iterable[Views], indices: Iterable[int] | None = None) -> Batch:
    """Pictures of any number and size of views to one batch.

    Raises ``ValueError`` for no picture, one without a view, and other than as many indices as pictures.
    """
    items = list(items)
    if not items:
        raise ValueError("items: got none, expected at least one picture")
    indices = list(range(len(items))) if indices is None else [int(index) for index in indices]
    if len(indices) != len(items):
        raise ValueError(f"indices: got {len(indices)}, expected {len(items)}, one a picture")
    check.whole(1, **{f"views of picture {index}": len(one.pixels) for index, one in zip(indices, items, strict=True)})
    counts = torch.tensor([len(one.pixels) for one in items])  # (B,)
    height, width = (max(one.pixels.shape[axis] for one in items) for axis in (2, 3))
    pixels = torch.zeros(int(counts.sum()), 3, height, width, dtype=torch.float32)
    mask = torch.zeros(len(pixels), height, width, dtype=torch.bool)
    for one, end in zip(items, counts.cumsum(0).tolist(), strict=True):
        views, (h, w) = slice(end - len(one.pixels), end), one.pixels.shape[2:]
        pixels[views, :, :h, :w], mask[views, :h, :w] = one.pixels, True
    item = torch.arange(len(items)).repeat_interleave(counts)
    return Batch(pixels, mask, item, torch.tensor([one.grid for one in items]), indices)


def tokenise(texts: Iterable[str], tokenizer, max_length: int = 128) -> dict[str, Tensor]:
    """Texts to ``input_ids`` and ``attention_mask``, int64 (B, T), padded to the longest of *this* batch, not further.

    ``cut``, bool (B,), says which texts were longer than ``max_length`` tokens and lost their end. ``ValueError`` for a
    plain string, no text, an empty one, a tokenizer that cannot pad, and no room beside the special tokens.
    """
    texts = check.texts("texts", texts)
    _check_tokenizer(tokenizer, max_length)
    # An own call without the limit: cutting must not be silent, and the tokenizer does not say where it cut.
    lengths = [len(ids) for ids in tokenizer(texts, verbose=False).input_ids]
    batch = tokenizer(texts, padding="longest", truncation=True, max_length=int(max_length), return_tensors="pt")
    cut = torch.tensor([length > max_length for length in lengths])
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "cut": cut}


def _check_tokenizer(tokenizer, max_length: int) -> None:
    if getattr(tokenizer, "pad_token_id", None) is None:
        raise ValueError(
            f"tokenizer: got {type(tokenizer).__name__}, expected one with a padding token; "
            "set tokenizer.pad_token, for example to its eos_token"
        )
    # Below this, a tokenizer either cuts everything or, without a word, nothing.
    check.whole(1 + tokenizer.num_special_tokens_to_add(), max_length=max_length)


class ImageLoader:
    """Iterates over batches of ``sources``, prepared ahead by workers; ``len`` is the number of batches.

    Args:
        sources: what :func:`~.images.open_image` takes, one a picture. texts: one a picture, or None; then
            ``tokenizer`` and ``max_length`` are for them. Both are read to the end at once, generators too.
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
        ValueError: an argument is out of range, a text empty, or there is not one text a picture.
    """

    def __init__(self, sources: Iterable[Source], recipe: Recipe, batch_size: int = 16, *, texts=None, tokenizer=None,
                 max_length: int = 128, workers: int = 1, ahead: int = 2, processes: bool = False,
                 on_error: str = "raise", timeout: float = 60.0):  # fmt: skip
        check.whole(1, batch_size=batch_size, ahead=ahead)
        check.whole(0, workers=workers)
        check.one_of(("raise", "skip"), on_error=on_error)
        check.above(0, timeout=timeout)
        if isinstance(sources, (str, bytes, bytearray, memoryview, Path, Image.Image)):
            raise ValueError(f"sources: got one {type(sources).__name__}, expected a list of pictures")
        self.sources, self.recipe, self.batch_size = list(sources), recipe, int(batch_size)
        if texts is not None:  # checked before the first picture is decoded, not at the batch that holds the empty one
            texts = check.texts("texts", texts) if len(self.sources) else list(texts)
            _check_tokenizer(tokenizer, max_length)
            if len(texts) != len(self.sources):
                raise ValueError(f"texts: got {len(texts)}, expected {len(self.sources)}, one a picture")
        self.texts, self.tokenizer, self.max_length = texts, tokenizer, max_length
        self.workers, self.ahead, self.processes = int(workers), int(ahead), processes
        self.on_error, self.timeout = on_error, float(timeout)
        self.failures: dict[int, ImageError] = {}

    def __len__(self) -> int:
        return -(-len(self.sources) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        self.failures = {}
        numbers = range(len(self.sources))
        batches = [numbers[start : start + self.batch_size] for start in numbers[:: self.batch_size]]
        if self.workers == 0:
            for batch in batches:
                yield from self._finish(dict.fromkeys(batch))
            return
        pool, waiting = self._pool(), deque()
        try:
            for batch in batches:
                waiting.append({i: self._submit(pool, i) for i in batch})
                if len(waiting) > self.ahead:
                    yield from self._finish(waiting.popleft())
            while waiting:
                yield from self._finish(waiting.popleft())
        finally:  # also when the caller stops early, or a picture fails
            workers = list((getattr(pool, "_processes", None) or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in workers:  # one that hangs would keep the program from ending
                worker.kill()

    def _pool(self) -> Executor:
        if not self.processes:
            return ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        # "spawn": a forked copy of a process with running threads may wait for ever for a lock.
        return ProcessPoolExecutor(self.workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,))

    def _submit(self, pool: Executor, index: int) -> Future:
        source = self.sources[index]
        try:
            if self.processes and isinstance(source, Image.Image):
                # Its file cannot travel to another process, only pixels can: read them here, where errors have a name.
                source = open_image(source, background=self.recipe.background, max_pixels=self.recipe.max_pixels)
            return pool.submit(prepare, source, self.recipe)
        except (BrokenProcessPool, ImageError) as error:
            failed = Future()  # a worker has died, or the picture is bad: said when its turn comes
            failed.set_exception(error)
            return failed

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
            batch = collate(ready.values(), ready)
            batch.failures = failed
            if self.texts is not None:
                batch.text = tokenise([self.texts[i] for i in ready], self.tokenizer, self.max_length)
            yield batch

    def _result(self, index: int, future: Future | None) -> Views:
        if future is None:
            return prepare(self.sources[index], self.recipe)
        try:
            return future.result(self.timeout)
        except BrokenProcessPool as error:
            raise WorkerLost(f"picture {index} or one after it: the worker that decoded it died") from error
        except TimeoutError as error:
            raise WorkerLost(f"picture {index}: no answer from its worker within {self.timeout:g} s") from error
        except MemoryError as error:
            error.add_note(f"while preparing picture {index}")
            raise
