"""Quote a published figure together with its source, so that no chapter carries one by hand.

``data/published.yml`` holds what DeepSeek published; :func:`figure` returns one entry::

    >>> figure("deepseek_v3", "params_total")
    671B parameters [deepseek_v3, p. 1, primary]

Plain Python and PyYAML only.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

from dslib import check
from dslib.data.files import read_yaml

TIERS = ("primary", "secondary", "derived", "unverified")


@dataclass(frozen=True)
class Figure:
    """A published value: a number, text, truth value, None, or a tuple of them (one for each variant of the model).

    ``source`` are keys of references.bib; ``tier`` says how close to DeepSeek the source is (:data:`TIERS`).
    """

    value: Any
    unit: str
    source: tuple[str, ...]
    tier: str
    at: str = ""
    note: str = ""

    def __str__(self) -> str:
        """The value as one writes it: ``671B parameters``, ``30 / 95``."""
        values = self.value if isinstance(self.value, tuple) else (self.value,)
        return " / ".join(_short(value) for value in values) + (f" {self.unit}" if self.unit else "")

    def __repr__(self) -> str:
        where = ", ".join([*self.source, *([self.at] if self.at else []), self.tier])
        return f"{self} [{where}]"

    def _repr_markdown_(self) -> str:
        at = f", {self.at}" if self.at else ""
        return f"{self} ({', '.join(f'`{key}`' for key in self.source)}{at}; {self.tier})"


def figure(entry: str, name: str) -> Figure:
    """The figure ``name`` of a model, e.g. ``("deepseek_v3", "layers")``, or of ``serving``, ``sampling_advice``.

    Raises ``ValueError`` for an unknown entry or figure, with the nearest known ones.
    """
    known = entries()
    if entry not in known:
        raise check.unknown("entry", entry, known, "one of data/published.yml")
    if name not in known[entry]:
        raise check.unknown(f"figure of {entry}", name, known[entry], "one of data/published.yml")
    return known[entry][name]


@cache
def entries() -> dict[str, dict[str, Figure]]:
    """Every figure, by entry and name. Read once. Raises ValueError, with entry and field, for a faulty file."""
    document = read_yaml("published.yml")
    try:
        raw = {**document["models"], **{key: value for key, value in document.items() if key != "models"}}
        figures = {entry: dict(fields["figures"]) for entry, fields in raw.items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"published.yml: expected 'models' and entries with 'figures' each; {error!r}") from error
    return {
        entry: {name: _figure(f"published.yml, {entry}, figure {name!r}", row) for name, row in rows.items()}
        for entry, rows in figures.items()
    }


def hub_ids() -> dict[str, tuple[str, ...]]:
    """Names on the Hugging Face hub under which each model is published, by entry (if it has any)."""
    models = read_yaml("published.yml")["models"]
    return {entry: tuple(model["hub_ids"]) for entry, model in models.items() if model.get("hub_ids")}


def _figure(where: str, row: Any) -> Figure:
    if not isinstance(row, dict) or not {"value", "source", "tier"} <= set(row):
        raise ValueError(f"{where}: got {row!r}, expected value, source and tier")
    check.one_of(TIERS, **{f"{where}, field 'tier'": row["tier"]})
    value = tuple(row["value"]) if isinstance(row["value"], list) else row["value"]
    source = row["source"] if isinstance(row["source"], list) else [row["source"]]
    return Figure(value, row.get("unit", ""), tuple(source), row["tier"], str(row.get("at", "")), row.get("note", ""))


def _short(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "not stated" if value is None else str(value)
    for factor, letter in ((1e12, "T"), (1e9, "B")):
        if abs(value) >= factor:
            return f"{value / factor:.4g}{letter}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.10g}"
