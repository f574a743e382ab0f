"""DeepSeek's releases in order, with what each was: from ``data/published.yml`` and ``data/prices.yml``.

    >>> [release.name for release in releases("main")][-1]
    'DeepSeek-V4.1-Flash'

:func:`waits` gives the days between one release and the next, which is what a base rate for the next one is made of.
Plain Python and PyYAML. Chapter: ``chapters/roadmap/advice.ipynb``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from itertools import pairwise

from dslib import check
from dslib.data.files import read_yaml
from dslib.data.published_figures import TIERS
from dslib.performance.prices import TokenPrice, api_prices
from dslib.roadmap.advice import LINES


@dataclass(frozen=True)
class Release:
    """A model on the timeline; what no source of ours states is empty, or None.

    ``day`` is the first of its month where only that is known; ``number`` is 2.5 for V2.5; ``price`` is the first that
    we have for it; ``tiers`` say how close its sources are.
    """

    entry: str
    name: str
    day: date
    line: str
    number: float | None
    modality: str
    architecture: str
    licence: str
    context: str
    price: TokenPrice | None
    tiers: tuple[str, ...]

    @property
    def takes_images(self) -> bool:
        """Whether images are among what goes in."""
        return "images" in self.modality.split(" to ")[0]


def releases(line: str | None = None) -> list[Release]:
    """The releases in ``data/published.yml``, oldest first; of one ``line``, or of all. ValueError for another line."""
    check.one_of((None, *LINES), line=line)
    priced: dict[str, TokenPrice] = {}
    for price in api_prices():
        priced.setdefault(price.serves, price)
    found = [_release(entry, model, priced) for entry, model in read_yaml("published.yml")["models"].items()]
    return sorted((r for r in found if r and line in (None, r.line)), key=lambda release: release.day)


def waits(days: Sequence[date]) -> list[int]:
    """Days from each of these to the next. ValueError where they are not in order."""
    found = [(after - before).days for before, after in pairwise(days)]
    if any(wait < 0 for wait in found):
        raise ValueError(f"days: got {', '.join(map(str, days))}, expected them in order")
    return found


def _release(entry: str, model: dict, priced: dict[str, TokenPrice]) -> Release | None:
    told, figures = model.get("release"), model["figures"]
    if not told:
        return None
    rows = {name: told.get(name) or {} for name in ("architecture", "licence", "context")}
    rows["context"] = rows["context"] or figures.get("context", {})
    values = {name: str(row.get("value", "")) for name, row in rows.items()}
    values["context"] = re.sub(r"^\d+$", lambda number: f"{int(number[0]) // 1024}K", values["context"])
    day = re.match(r"\d{4}-\d\d(-\d\d)?", figures["released"]["value"])[0]
    day = date.fromisoformat(day if len(day) == 10 else f"{day}-01")
    tiers = {row["tier"] for row in (*rows.values(), figures["released"]) if row}
    tiers = tuple(sorted(tiers, key=TIERS.index))
    price = priced.get(told.get("priced_as"))
    kept = {"line": told["line"], "number": told.get("number"), "modality": model["modality"]}
    return Release(entry=entry, name=model["name"], day=day, price=price, tiers=tiers, **kept, **values)
