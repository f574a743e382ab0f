"""Four-choice questions put to a language model: how likely is each answer, and which letter does it write?

A question becomes a *context*; each choice becomes a *continuation*, either its letter or its full text. The score of a
choice is the log-likelihood of the continuation after the context, as in lm-eval, with which the tests compare item by
item. A prepared model does not compute anything twice, see :mod:`dslib.fast.scoring`.

Book: ``chapters/performance/accuracy.ipynb``, with :mod:`~dslib.performance.statistics`. Sources: MMLU (arXiv
2009.03300) for letters, GPT-3 (arXiv 2005.14165, section 2.4) for full answers, their length and their prior.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dslib import check
from dslib.architecture.decoder import Decoder
from dslib.architecture.generation import generate
from dslib.data.questions import LETTERS, Question
from dslib.fast.scoring import Row, log_likelihoods

NORMALISATIONS = ("none", "tokens", "characters", "bytes", "prior")


@dataclass(frozen=True)
class Prompt:
    """How a question becomes text."""

    answer: str = "letter"  # or "text": what is scored
    listed: bool = True  # whether the four choices are shown before the answer
    header: str = ""  # first lines; {subject} in it becomes the subject
    stem: str = ""  # stands before the question
    label: str = "{}."  # how a letter is written before a choice
    lead: str = "Answer:"  # stands before the answer
    reply: str = " {}"  # how an answer follows the lead; the letter or the text takes the place of {}
    chat: bool = False  # wrap it all as a user's message in the tokenizer's chat template

    def __post_init__(self):
        check.one_of(("letter", "text"), answer=self.answer)
        if self.answer == "letter" and not self.listed:
            raise ValueError("listed: got False with answer='letter'; a letter means nothing without the list")

    def body(self, one: Question) -> str:
        """The question as it is put, up to and with the lead."""
        lines = [self.stem + one.question.strip()]
        if self.listed:
            lines += [f"{self.label.format(x)} {choice}" for x, choice in zip(LETTERS, one.choices, strict=True)]
        return "\n".join([*lines, self.lead] if self.lead else lines)

    def replies(self, one: Question) -> list[str]:
        """The four continuations."""
        return [self.reply.format(x) for x in (LETTERS if self.answer == "letter" else one.choices)]

    def text(self, one: Question, examples: Sequence[Question] = ()) -> str:
        """The whole context: header, answered examples, the question."""
        shown = [self.body(example) + self.replies(example)[example.answer] for example in examples]
        return self.header.format(subject=one.subject.replace("_", " ")) + "\n\n".join([*shown, self.body(one)])


_HEADER = "The following are multiple choice questions (with answers) about {subject}.\n\n"
PROMPTS = {
    "mmlu": Prompt(header=_HEADER),  # as MMLU's authors put it, and lm-eval's tasks of that name
    "no header": Prompt(),
    "in brackets": Prompt(header=_HEADER, label="({})", reply=" ({})"),
    "no space": Prompt(header=_HEADER, reply="{}"),
    "chat": Prompt(lead="Answer with the letter of the right choice.", reply="{}", chat=True),
    "text, listed": Prompt(answer="text", header=_HEADER),
    "text": Prompt(answer="text", listed=False, stem="Question: "),
}


@dataclass(frozen=True)
class Scores:
    """Log-likelihoods of the choices of n questions, in nats, and what they were given for."""

    questions: tuple[Question, ...]
    log_likelihoods: Tensor  # float32 (n, 4): the sum over the tokens of a choice's continuation
    sizes: dict[str, Tensor]  # per unit of length ("tokens", "characters", "bytes") int64 (n, 4)
    prior: Tensor | None = None  # float32 (n, 4), the log-likelihoods after the lead alone; None if not asked for

    def values(self, normalisation: str = "none") -> Tensor:
        """(n, 4): what the choices are compared by.

        ``"none"`` is the sum; ``"tokens"``, ``"characters"`` and ``"bytes"`` divide it by the length of the choice
        (lm-eval's ``acc_norm`` divides by characters); ``"prior"`` subtracts what the choice scores when the question
        is hidden. Raises ValueError for another name, and for NaN, which would count as the best.
        """
        check.one_of(NORMALISATIONS, normalisation=normalisation)
        if normalisation == "prior" and self.prior is None:
            raise ValueError("normalisation: got 'prior', but these were scored without with_prior=True")
        values = self.log_likelihoods
        if normalisation == "prior":
            values = values - self.prior
        elif normalisation != "none":
            values = values / self.sizes[normalisation]
        if broken := values.isnan().any(1).nonzero().flatten().tolist():
            raise ValueError(f"log_likelihoods: got NaN for question {broken[0]}, expected numbers")
        return values

    def answers(self, normalisation: str = "none") -> Tensor:
        """int64 (n,): the choice with the highest value; the first of equals."""
        return self.values(normalisation).argmax(1)

    def right(self, normalisation: str = "none") -> Tensor:
        """bool (n,): whether the answer is the right one."""
        return self.answers(normalisation) == torch.tensor([one.answer for one in self.questions])


def score(
    model: Decoder, tokenizer, questions: Sequence[Question], prompt: Prompt = PROMPTS["mmlu"], *, shots: int = 0,
    examples: Sequence[Question] | None = None, with_prior: bool = False, batch_tokens: int = 512,
    progress: bool = False,
) -> Scores:  # fmt: skip
    """Score the four choices of every question.

    Args:
        tokenizer: a transformers tokenizer. What it puts behind a text, such as an end token, is left out.
        shots: how many others of the same subject stand before each question, answered; from ``examples``, if given.
        with_prior: also score every continuation after the lead alone, for ``normalisation="prior"``.
        batch_tokens: of a prepared model, see :func:`dslib.fast.scoring.log_likelihoods`.

    Raises ValueError for no question, a subject with too few others for ``shots``, a prompt longer than
    ``max_position_embeddings``, and a continuation that has no token of its own.
    """
    questions = tuple(questions)
    if not questions:
        raise ValueError("questions: got none, expected at least one")
    pool = questions if examples is None else tuple(examples)
    texts = [prompt.text(one, _examples(one, pool, shots)) for one in questions]
    replies = [prompt.replies(one) for one in questions]
    rows = [_row(tokenizer, text, ends, prompt.chat) for text, ends in zip(texts, replies, strict=True)]
    units = {"characters": len, "bytes": lambda text: len(text.encode("utf-8"))}
    bare = [LETTERS if prompt.answer == "letter" else one.choices for one in questions]
    sizes = {name: torch.tensor([[size(text) for text in four] for four in bare]) for name, size in units.items()}
    sizes["tokens"] = torch.tensor([[len(end) for end in row.ends] for row in rows])
    options = {"batch_tokens": batch_tokens, "progress": progress}
    prior = None
    if with_prior:
        alone = [_row(tokenizer, prompt.lead or "\n", ends, False) for ends in replies]
        prior = log_likelihoods(model, alone, **options)
    groups = [one.subject for one in questions] if shots else None  # the examples before a question are its subject's
    return Scores(questions, log_likelihoods(model, rows, groups=groups, **options), sizes, prior)


def _examples(one: Question, pool: tuple[Question, ...], shots: int) -> list[Question]:
    found = [other for other in pool if other.subject == one.subject and other != one][:shots] if shots else []
    if len(found) < shots:
        raise ValueError(f"shots: got {shots}, but there are only {len(found)} other questions on {one.subject!r}")
    return found


def _row(tokenizer, text: str, ends: Sequence[str], chat: bool) -> Row:
    special = {}
    if chat:  # the template brings the special tokens itself
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        special = {"add_special_tokens": False}
    behind = 0 if chat else _tokens_behind(tokenizer)

    def ids(text: str) -> list[int]:
        found = list(tokenizer(text, **special).input_ids)
        return found[: len(found) - behind]

    # A space at the end would be a token of its own, which the model never saw before a word: it moves to the answer.
    kept = text.rstrip(" ")
    context, found = ids(kept), []
    for end in ends:
        # Together, then cut: a word's first token depends on what stands before it.
        found.append(ids(text + end)[len(context) :])
        if not found[-1]:
            raise ValueError(f"reply: {end!r} after {kept[-20:]!r} has no token of its own; put a space between them")
    return Row(context, found)


def _tokens_behind(tokenizer) -> int:
    """How many special tokens, such as that of the end, a tokenizer puts behind every text. No answer follows those."""
    whole, bare = (list(tokenizer("A b", **extra).input_ids) for extra in ({}, {"add_special_tokens": False}))
    places = [start for start in range(len(whole)) if whole[start : start + len(bare)] == bare]
    if not places:
        raise ValueError(f"tokenizer: got {whole} for 'A b', expected {bare} inside, as without special tokens")
    return len(whole) - len(bare) - places[-1]


@dataclass(frozen=True)
class Written:
    """What a model wrote as its answer: the text, and the choice read from it (-1 if there is none)."""

    texts: tuple[str, ...]
    answers: Tensor


def write_letters(
    model: Decoder, tokenizer, questions: Sequence[Question], prompt: Prompt = PROMPTS["mmlu"], *,
    max_new_tokens: int = 8, batch_size: int = 16,
) -> Written:  # fmt: skip
    """Let the model continue greedily, and read the letter from what it writes, see :func:`read_letter`.

    Raises ValueError for no question.
    """
    if not questions:
        raise ValueError("questions: got none, expected at least one")
    contexts = [_row(tokenizer, prompt.text(one), (), prompt.chat).context for one in questions]
    order = sorted(range(len(contexts)), key=lambda index: len(contexts[index]), reverse=True)
    texts = [""] * len(contexts)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        options = {"eos_token_id": tokenizer.eos_token_id}
        written = generate(model, [contexts[i] for i in batch], max_new_tokens, **options)
        for index, result in zip(batch, written, strict=True):
            texts[index] = tokenizer.decode(result.tokens, skip_special_tokens=True)
    return Written(tuple(texts), torch.tensor([read_letter(text) for text in texts]))


# "answer", perhaps in marks or with some words behind it ("the answer to this, then,"), and what says that it comes.
IS = r"(?:['’]s|(?:\s*|(?-i:[^.;!?\nA-D]){0,40}?)\b(?:is|was|(?:would|should|must|will)\s+be))\b"
SAID = rf"(?<![^\W_])answer(?![^\W_])(?:(?:\s*\([a-z]{{2,}}\))?[\s*_`\"”]*[:=–—-]|{IS})"
# Marks, tags, commands of LaTeX and words that say nothing.
WORDS = r"(?:the|option|choice|letter|answer|boxed|text|most|indeed|therefore|thus|then|\w+ly)\b"
BETWEEN = rf"(?:<(?-i:b|i|em|strong|code)>|\\[a-z]+|{WORDS}|[\W_])*+"
# In any case, then a letter that stands alone. A small "a" with a word behind it is no letter.
ALONE = r"(?!['’]?[^\W_])"
STATED = re.compile(rf"(?i:{SAID}{BETWEEN})([A-Db-d]|a(?![ \t]+[^\W_])){ALONE}")
FIRST = re.compile(rf"[\W_]*([A-D]){ALONE}")


def read_letter(text: str) -> int:
    """The choice that a reply names, 0 to 3; -1 if it names none.

    It names one if it says "answer is" and a letter from A to D that stands alone, or else begins with such a letter.
    """
    match = STATED.search(text) or FIRST.match(text)
    return LETTERS.index(match[1].upper()) if match else -1
