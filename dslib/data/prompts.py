"""How a text begins and ends: prompts and end tokens as plain lists of ids, whatever they came as; stop strings."""

from collections.abc import Iterable
from typing import Any


def checked_prompts(config, prompts, max_new_tokens: int, prefix: int) -> list[list[int]]:
    """The prompts as lists of numbers; a ValueError for those that cannot be continued so far."""
    if getattr(prompts, "ndim", 2) != 2:
        raise ValueError(f"prompts: got a tensor of shape {tuple(prompts.shape)}, expected (batch, tokens)")
    texts = [plain(ids) for ids in prompts]
    if not texts:
        raise ValueError("prompts: got none, expected at least one")
    for index, ids in enumerate(texts):
        name = f"prompts[{index}]"
        if isinstance(ids, str) or not isinstance(ids, Iterable):
            raise ValueError(f"{name}: got {ids!r}, expected a sequence of token ids")
        texts[index] = ids = token_ids(name, ids, config.vocab_size)
        if not ids:
            raise ValueError(f"{name}: got an empty prompt, expected at least one token (a start token will do)")
        total = prefix + len(ids) + max_new_tokens
        if config.sliding_window is None and total > config.max_position_embeddings:
            raise ValueError(
                f"{name}: {prefix + len(ids)} tokens and {max_new_tokens} new ones make {total}, more than "
                f"the model's max_position_embeddings={config.max_position_embeddings}"
            )
    return texts


def end_tokens(eos_token_id: Any, vocab_size: int) -> frozenset[int]:
    """The ids that end a text, from None, one id or several: numbers, tensors, arrays or collections of them.

    Raises:
        ValueError: anything else, or an id outside the vocabulary.
    """
    found = plain(eos_token_id)
    if found is None:
        return frozenset()
    several = isinstance(found, Iterable) and not isinstance(found, str)
    return frozenset(token_ids("eos_token_id", found if several else [found], vocab_size))


def completes(stop: tuple[str, ...], text: list[int], tokenizer: Any) -> bool:
    """Whether the newest token completes one of the strings, which may have begun before it, or in the prompt."""
    recent = text[-4 * max(map(len, stop)) - 8 :]  # a character has at most four bytes, and a token at least one
    before = tokenizer.decode(recent[:-1]).rstrip("\ufffd")  # half a character, which the newest token may complete
    after = tokenizer.decode(recent)
    return any(after.find(end, max(0, len(before) - len(end) + 1)) >= 0 for end in stop)


def plain(value: Any) -> Any:
    """Numbers and lists instead of tensors and arrays."""
    return value.tolist() if hasattr(value, "tolist") else value


def token_ids(name: str, values: Iterable, vocab_size: int) -> list[int]:
    ids = [plain(value) for value in values]
    for value in ids:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab_size:
            raise ValueError(f"{name}: token id {value!r} is outside the vocabulary, 0 to {vocab_size - 1}")
    return ids
