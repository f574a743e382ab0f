"""The claims ledger: every checkable statement of the article, its verdict, and the cell that settles it.

``data/claims.yml`` holds one row a claim. A chapter settles a row with :func:`check`, which compares what the cell
computed with what the row says and raises when they differ, so a verdict cannot outlive its evidence. PyYAML and
pydantic only: the ledger works where torch is absent.

How a ``found`` value in a row is compared with what a cell computed:

====================  =====================================================================
in the row            the cell's value must be
====================  =====================================================================
``true`` / ``false``  the same truth value, and a truth value
whole number          equal, exactly
decimal number        within 1 per cent of it
``[low, high]``       between the two, ends included
text                  equal
====================  =====================================================================

Book: chapters/reference/ledger.ipynb shows the whole table; chapters/start/how_to_read explains the verdicts.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from difflib import get_close_matches
from functools import lru_cache
from numbers import Real
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic.dataclasses
from pydantic import Field, PlainValidator

from dslib.check import one_of
from dslib.data.files import data_path
from measured import claims_html
from measured.claims_file import read_rows
from measured.claims_html import shown

# The one definition of the verdicts. The reading guide and the ledger page both quote it.
VERDICTS = {
    "holds": "True as stated, or as good as: the figure comes out when we compute it, or the source says so.",
    "plausible": "No evidence is given, but nothing we know or compute speaks against it.",
    "misleading": "Something in it is right, and a reader who relies on it would still be led to a wrong conclusion.",
    "inconsistent": "It contradicts another statement of the article, or its own arithmetic.",
    "wrong": "A published source, a count or a measurement says otherwise.",
    "impossible": "No hardware or no set-up of the kind described could do it, whatever the software.",
    "broken code": "The code as printed does not run, or does not do what it is shown for.",
    "unsupported": "We found no source and none is given, so there is nothing to confirm or refute it with.",
    "opinion": "A framing, a premise or a piece of advice that no measurement can settle.",
}
# Shown beside the word, never instead of it, so that colour and shape only repeat what the text says.
SYMBOLS = {
    "holds": "✓",
    "plausible": "≈",
    "misleading": "◐",
    "inconsistent": "≠",
    "wrong": "✗",
    "impossible": "⊘",
    "broken code": "⌧",
    "unsupported": "?",
    "opinion": "○",
}
CHECKS = ("arithmetic", "roofline", "published", "code", "experiment", "opinion")
PARTS = ("architecture", "performance", "scenarios", "migration", "roadmap")
PENDING = "pending"
TOLERANCE = 0.01


def _found(value: Any) -> bool | int | float | str | tuple[float, float]:
    """A value that a row may have under ``found``; ``[low, high]`` becomes a pair."""
    if isinstance(value, list) and len(value) == 2 and {type(end) for end in value} <= {int, float}:
        if -math.inf < value[0] <= value[1] < math.inf:
            return tuple(value)
    if not isinstance(value, bool | int | float | str) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError("wanted a number, a truth value, text or [low, high]")
    return value


Found = Annotated[bool | int | float | str | tuple[float, float], PlainValidator(_found)]
Text = Annotated[str, Field(pattern=r"\S")]


class ClaimNotSupported(AssertionError):
    """A cell computed something that does not support the verdict in the ledger."""


class UnknownClaim(KeyError, ValueError):
    """A claim id that the ledger does not have."""

    def __str__(self) -> str:  # KeyError would show the quoted form of its argument
        return str(self.args[0])


@pydantic.dataclasses.dataclass(frozen=True)
class Claim:
    """One row of the ledger. ``evidence`` is ``pending`` or a cell's id, such as ``claim-s1-1-04``."""

    id: Annotated[str, Field(pattern=r"^[a-z0-9][A-Za-z0-9.-]*$")]
    chapter: Annotated[str, Field(pattern=rf"^({'|'.join(PARTS)})/[a-z0-9_]+$")]
    said: Text
    value: str | None
    checks: Annotated[tuple[Literal[*CHECKS], ...], Field(min_length=1)]
    verdict: Literal[*VERDICTS]
    because: Text
    evidence: Annotated[str, Field(pattern=r"^(pending|claim-[A-Za-z0-9-]+)$")]
    sources: tuple[str, ...]
    found: Annotated[dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], Found], Field(min_length=1)] | None = None

    @property
    def part(self) -> str:
        """The book part, e.g. ``architecture``, in which the claim is settled."""
        return self.chapter.split("/")[0]

    @property
    def pending(self) -> bool:
        """True while the chapter that will settle the claim is not written."""
        return self.evidence == PENDING

    @property
    def anchor(self) -> str:
        """Id of the card in the built chapter, e.g. ``claim-s1.1-04``."""
        return f"claim-{self.id}"

    @property
    def url(self) -> str | None:
        """Address of the card, relative to a page of another part; None while the claim is pending."""
        return None if self.pending else f"../{self.chapter}.html#{self.anchor}"


class Ledger(Mapping[str, Claim]):
    """The rows in the order of the article, by id."""

    def __init__(self, claims: list[Claim], path: Path):
        self._claims = {claim.id: claim for claim in claims}
        self.path = path

    def __getitem__(self, claim_id: str) -> Claim:
        try:
            return self._claims[claim_id]
        except (KeyError, TypeError):
            near = get_close_matches(str(claim_id), self._claims, n=3, cutoff=0.4)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise UnknownClaim(f"no claim {claim_id!r} in {self.path.name}{hint}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._claims)

    def __len__(self) -> int:
        return len(self._claims)

    def filter(self, *, chapter: str | None = None, part: str | None = None, verdict: str | None = None) -> "Ledger":
        """The rows that match every argument given. An unknown ``verdict`` raises ValueError."""
        one_of((None, *VERDICTS), verdict=verdict)
        wanted = {"chapter": chapter, "part": part, "verdict": verdict}
        kept = [c for c in self.values() if all(v is None or getattr(c, k) == v for k, v in wanted.items())]
        return Ledger(kept, self.path)

    def counts(self, by: str = "verdict") -> dict[str, int]:
        """Number of rows by ``verdict`` (in the order of :data:`VERDICTS`), ``part``, ``chapter`` or ``evidence``."""
        one_of(("verdict", "part", "chapter", "evidence"), by=by)
        count = Counter(getattr(claim, by) for claim in self.values())
        order = {"verdict": list(VERDICTS), "part": list(PARTS)}.get(by, list(count))
        return {name: count[name] for name in order}

    def recap(self, elsewhere: bool = False) -> "Html":
        """Verdict and statement of each row in a line; what stands at the end of the chapter, or ``elsewhere``."""
        text = "\n".join(f"{SYMBOLS[c.verdict]} {c.verdict:12} {c.id:8} {c.said}" for c in self.values())
        page = claims_html.LEDGER_PAGE if elsewhere else ""
        return Html(claims_html.recap(self.values(), SYMBOLS, page), text)

    def summary(self) -> "Html":
        """How many rows have which verdict, by part of the book, as an HTML table."""
        counts = {part: self.filter(part=part).counts() for part in PARTS}
        rows = {verdict: [counts[part][verdict] for part in PARTS] for verdict in VERDICTS}
        return Html(claims_html.summary(rows, PARTS, SYMBOLS), f"<verdicts of {len(self)} claims by part>")

    def table(self) -> "Html":
        """The rows as an HTML table with one anchor a row; what the ledger page shows."""
        return Html(claims_html.table(self.values(), SYMBOLS), f"<ledger of {len(self)} claims>")


@dataclass(frozen=True)
class Html:
    """Shows ``html`` in a notebook and ``text`` in a terminal."""

    html: str
    text: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.text


def legend() -> Html:
    """The verdicts and what each means, as an HTML table."""
    return Html(claims_html.legend(VERDICTS, SYMBOLS), "\n".join(f"{name}: {text}" for name, text in VERDICTS.items()))


@lru_cache(maxsize=8)
def load_ledger(path: str | Path | None = None) -> Ledger:
    """Read a ledger file, ``data/claims.yml`` by default, once.

    Raises:
        ValueError: naming file, line, row and field of what is wrong.
    """
    file = Path(path) if path is not None else data_path("claims.yml")
    return Ledger(read_rows(file, Claim), file)


@dataclass(frozen=True)
class Card:
    """What a settled claim shows: the same on every machine, so it quotes the ledger and not the cell's own digits."""

    claim: Claim

    def _repr_html_(self) -> str:
        return claims_html.card(self.claim, SYMBOLS[self.claim.verdict])

    def __repr__(self) -> str:
        claim = self.claim
        found = "; ".join(f"{name} = {shown(want)}" for name, want in (claim.found or {}).items())
        settled = f"computed here: {found}" if found else f"settled by {', '.join(claim.sources)}"
        return f"{SYMBOLS[claim.verdict]} {claim.id} {claim.verdict}: {claim.because} ({settled})"


def check(claim_id: str, **found: Found) -> Card:
    """Settle a claim: compare what a cell computed with what the ledger says, quantity by quantity.

    A row without ``found`` is settled by its sources; then no quantities are given and the row must name a source.

    Raises:
        UnknownClaim: (a KeyError and a ValueError) with the nearest ids.
        ClaimNotSupported: a quantity is missing, unknown to the row, or different; the message names each.
    """
    claim = load_ledger()[claim_id]
    wanted = dict(claim.found or {})
    if not wanted and not found and not claim.sources:
        raise ClaimNotSupported(f"claim {claim_id}: the row has neither quantities (found) nor sources to settle it by")
    faults = [f"{name}: not computed, wanted {shown(wanted[name])}" for name in wanted if name not in found]
    faults += [f"{name}: got {found[name]!r}, but the row has no such quantity" for name in found if name not in wanted]
    for name in wanted.keys() & found.keys():
        if not _agrees(found[name], wanted[name]):
            faults.append(f"{name}: got {found[name]!r}, wanted {shown(wanted[name])}")
    if faults:
        raise ClaimNotSupported(f"claim {claim_id} ({claim.verdict}) is not supported: " + "; ".join(sorted(faults)))
    return Card(claim)


def _agrees(got: object, want: Found) -> bool:
    if getattr(got, "shape", None) == ():  # numpy and torch scalars, without importing either
        got = got.item()
    if isinstance(want, bool) or isinstance(got, bool):
        return got is want
    if isinstance(want, str):
        return got == want
    if not isinstance(got, Real | Decimal):
        return False
    if isinstance(want, tuple):
        return want[0] <= got <= want[1]
    if isinstance(want, int):
        return got == want
    return abs(float(got) - want) <= TOLERANCE * abs(want)
