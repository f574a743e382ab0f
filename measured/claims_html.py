"""How a claim looks in a notebook: the card a chapter shows, and the table of the ledger page.

Only markup, no rules: :mod:`measured.claims` decides, this module shows. The verdict always stands as a word; its
symbol and the CSS class (``verdict-<verdict>``) repeat it for the eye. ``claim`` is a
``measured.claims.Claim`` throughout; that module imports this one, so the type is not named here.
"""

import html
import re
from collections.abc import Iterable, Mapping
from typing import Any

# From a page in chapters/<part>/ to the two reference pages, in the built book.
LEDGER_PAGE = "../reference/ledger.html"
BIBLIOGRAPHY_PAGE = "../reference/bibliography.html"


def card(claim: Any, symbol: str) -> str:
    """One settled claim. Quotes the ledger's figures and not the cell's, so it is the same on every machine."""
    lines = [
        f'<p class="claim-head"><strong>{_verdict(claim.verdict, symbol)}</strong> '
        f'<a href="{LEDGER_PAGE}#{claim.id}">claim {claim.id}</a></p>',
        f'<p class="claim-said"><em>The article:</em> {prose(claim.said)}</p>',
        f'<p class="claim-because"><em>We find:</em> {prose(claim.because)}</p>',
    ]
    if claim.found:
        found = ", ".join(f"<code>{name}</code> = {html.escape(shown(want))}" for name, want in claim.found.items())
        lines.append(f'<p class="claim-found">Computed by this cell, as in the ledger: {found}.</p>')
    if claim.sources:
        lines.append(f'<p class="claim-sources">Sources: {_sources(claim)}.</p>')
    body = "\n".join(lines)
    return f'<div class="claim-card {_css(claim.verdict)}" id="{claim.anchor}">\n{body}\n</div>'


def recap(claims: Iterable[Any], symbols: Mapping[str, str], page: str = "") -> str:
    """Verdicts in short, each with a link to its card on this page, or to its row on the ledger's ``page``."""
    rows = [
        f'<li class="{_css(claim.verdict)}"><strong>{_verdict(claim.verdict, symbols[claim.verdict])}</strong> '
        f'<a href="{page}#{claim.id if page else claim.anchor}">{claim.id}</a> {prose(claim.said)}</li>'
        for claim in claims
    ]
    return "\n".join(['<ul class="claim-recap">', *rows, "</ul>"])


def table(claims: Iterable[Any], symbols: Mapping[str, str]) -> str:
    """A table with one anchor a row, and the part and verdict of each as data attributes to filter by."""
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Claim", "The article says", "Verdict", "We find"))
    rows = "\n".join(_row(claim, symbols[claim.verdict]) for claim in claims)
    return f'<table class="ledger">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>'


def legend(verdicts: Mapping[str, str], symbols: Mapping[str, str]) -> str:
    """The verdicts with their meaning."""
    rows = [f"<tr>{_verdict_head(name, symbols)}<td>{html.escape(text)}</td></tr>" for name, text in verdicts.items()]
    return _small_table(("Verdict", "What it means"), rows)


def summary(counts: Mapping[str, list[int]], parts: tuple[str, ...], symbols: Mapping[str, str]) -> str:
    """Counts by verdict and part, with sums."""
    rows = []
    for verdict, row in counts.items():
        cells = "".join(f"<td>{count or '–'}</td>" for count in [*row, sum(row)])
        rows.append(f"<tr>{_verdict_head(verdict, symbols)}{cells}</tr>")
    sums = [sum(column) for column in zip(*counts.values(), strict=True)]
    cells = "".join(f"<td><strong>{count}</strong></td>" for count in [*sums, sum(sums)])
    rows.append(f'<tr><th scope="row">all</th>{cells}</tr>')
    return _small_table(("Verdict", *(part.capitalize() for part in parts), "All"), rows)


def shown(want: bool | int | float | str | tuple) -> str:
    """A ``found`` value as a reader sees it."""
    if isinstance(want, bool):
        return "yes" if want else "no"
    if isinstance(want, tuple):
        return f"{want[0]:g} to {want[1]:g}"
    if isinstance(want, int):
        return f"{want:,}"
    return f"{want:g} (within 1 %)" if isinstance(want, float) else want


def prose(text: str) -> str:
    """Escaped text in which `backticks` mark code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))


def _row(claim: Any, symbol: str) -> str:
    where = f'<a href="{claim.url}">{claim.chapter}</a>' if claim.url else f"{claim.chapter} (not written yet)"
    sources = f" Sources: {_sources(claim)}." if claim.sources else ""
    return (
        f'<tr id="{claim.id}" class="{_css(claim.verdict)}" data-part="{claim.part}" data-verdict="{claim.verdict}">'
        f'<th scope="row"><a href="#{claim.id}">{claim.id}</a></th>'
        f"<td>{prose(claim.said)}</td>"
        f'<td class="ledger-verdict">{_verdict(claim.verdict, symbol)}</td>'
        f'<td>{prose(claim.because)} <span class="ledger-where">Settled in: {where}.{sources}</span></td></tr>'
    )


def _small_table(head: tuple[str, ...], rows: list[str]) -> str:
    # A div with the class, not the table: verdicts get their colours, but not the layout of the full ledger.
    names = "".join(f'<th scope="col">{name}</th>' for name in head)
    lines = ['<div class="ledger"><table class="table">', f"<thead><tr>{names}</tr></thead>", "<tbody>"]
    return "\n".join([*lines, *rows, "</tbody>", "</table></div>"])


def _verdict_head(verdict: str, symbols: Mapping[str, str]) -> str:
    return f'<th scope="row" class="{_css(verdict)} ledger-verdict">{_verdict(verdict, symbols[verdict])}</th>'


def _css(verdict: str) -> str:
    return "verdict-" + verdict.replace(" ", "-")


def _verdict(verdict: str, symbol: str) -> str:
    return f'<span aria-hidden="true">{html.escape(symbol)}</span> {verdict}'


def _sources(claim: Any) -> str:
    """Keys of references.bib, each a link to its entry; the page's anchors have dashes for underscores."""
    return ", ".join(
        f'<a href="{BIBLIOGRAPHY_PAGE}#{html.escape(key.replace("_", "-"))}"><code>{html.escape(key)}</code></a>'
        for key in claim.sources
    )
