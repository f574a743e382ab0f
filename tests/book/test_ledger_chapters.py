"""The ledger and the chapters agree: each says what the other says, and neither says more.

:func:`disagreements` finds what does not fit; the first test holds the whole book to it, the others feed it one small
fault each, so that the check itself is known to work. The convention it enforces:

- a cell that settles claims has the id ``claim-<first id, dots as dashes>``, calls ``claims.check("<id>", ...)`` with
  the id written out, and is what the row's ``evidence`` names;
- a row is ``pending`` exactly as long as its chapter has no notebook;
- a number in a sentence that names a claim stands in that claim's row, up to rounding;
- the verdicts that the reading guide explains are the ones the ledger uses, in the same words.
"""

import ast
import json
import re
from pathlib import Path

import pytest

from measured import claims
from measured.claims import Claim, Ledger

ROOT = Path(__file__).resolve().parents[2]
# Section 0 is left free for made-up examples.
CLAIM_ID = re.compile(r"(?<![\w-])(?:s[1-9](?:\.\d)?-[A-Za-z0-9]+(?:-V\d)?|(?:intro|end|global)-\d+)(?![\w-])")
# A number, its grouping and decimals, and a scale; not part of a word (FP16), a version or an ordinal (4-bit).
NUMBER = re.compile(
    r"(?<![\w.])(\d{1,3}(?:,\d{3})+|\d+)(?:\.(\d+))?\s?(%|per cent|k\b|K\b|M\b|B\b|T\b|million\b|billion\b|trillion\b)?"
    r"(?![\w]|-bit|-layer|\.\d)"
)
SCALES = {"k": 1e3, "K": 1e3, "M": 1e6, "million": 1e6, "B": 1e9, "billion": 1e9, "T": 1e12, "trillion": 1e12}
REFERENCE = re.compile(r"\b(?:section|chapter|table|figure|fig\.|equation|page|part)s?\s+\d+(?:\.\d+)*", re.IGNORECASE)


def disagreements(ledger, notebooks, pages, bib):
    """What does not fit between the ledger, the notebooks (chapter -> JSON), the pages (name -> text) and the keys."""
    faults = []
    for claim in ledger.values():
        faults += [
            f"claim {claim.id}: source {key!r} is not in references.bib" for key in claim.sources if key not in bib
        ]
        faults += _evidence_faults(claim, notebooks.get(claim.chapter))
    for chapter, notebook in notebooks.items():
        for cell in notebook["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "code":
                faults += _cell_faults(ledger, chapter, cell.get("id", ""), source)
            elif cell["cell_type"] == "markdown":
                faults += prose_faults(ledger, chapter, source)
    for name, text in pages.items():
        faults += prose_faults(ledger, name, text)
    return faults


def checked_ids(source):
    """Ids that a code cell passes to ``claims.check``; None stands for one that is not written out."""
    code = "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in source.split("\n"))
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    calls = [c for c in calls if isinstance(c.func, ast.Attribute) and ast.unparse(c.func).endswith("claims.check")]
    first = [call.args[0] if call.args else None for call in sorted(calls, key=lambda c: (c.lineno, c.col_offset))]
    return [a.value if isinstance(a, ast.Constant) and isinstance(a.value, str) else None for a in first]


def label(claim_id):
    return "claim-" + claim_id.replace(".", "-")


def _evidence_faults(claim, notebook):
    where = f"claim {claim.id}:"
    if claim.pending:
        return [f"{where} pending, but chapters/{claim.chapter}.ipynb is written"] if notebook else []
    if notebook is None:
        return [f"{where} evidence {claim.evidence!r}, but chapters/{claim.chapter}.ipynb does not exist"]
    cells = [cell for cell in notebook["cells"] if cell.get("id") == claim.evidence and cell["cell_type"] == "code"]
    if not cells:
        return [f"{where} evidence {claim.evidence!r} is no code cell of chapters/{claim.chapter}.ipynb"]
    if claim.id not in checked_ids("".join(cells[0]["source"])):
        return [f"{where} cell {claim.evidence!r} of {claim.chapter} does not call claims.check({claim.id!r})"]
    return []


def _cell_faults(ledger, chapter, cell_id, source):
    where = f"{chapter}, cell {cell_id!r}:"
    try:
        ids = checked_ids(source)
    except SyntaxError as error:
        return [f"{where} not Python: {error.msg}"] if "claims.check" in source else []
    faults = []
    if cell_id.startswith("claim-") and not ids:
        faults.append(f"{where} is labelled as evidence and checks no claim")
    if ids and ids[0] and cell_id != label(ids[0]):
        faults.append(f"{where} settles {ids[0]} and has to be labelled {label(ids[0])!r}")
    for claim_id in ids:
        if claim_id is None:
            faults.append(f"{where} claims.check needs the id written out")
        elif claim_id not in ledger:
            faults.append(f"{where} checks {claim_id!r}, which the ledger does not have")
        elif ledger[claim_id].pending:
            faults.append(f"{where} checks {claim_id}, which the ledger marks pending")
        elif (ledger[claim_id].chapter, ledger[claim_id].evidence) != (chapter, cell_id):
            row = ledger[claim_id]
            faults.append(f"{where} checks {claim_id}, whose evidence is {row.evidence!r} in {row.chapter}")
    return faults


def prose_faults(ledger, name, text):
    """Unknown ids, and numbers beside an id that its row does not have."""
    faults = []
    text = re.sub(r"```.*?```", " ", text, flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)|<[^>]+>|https?://\S+", " ", text)  # link targets and tags are not prose
    for sentence in re.split(r"(?<=[.!?:])\s+(?=[A-Z`*\[(])|\n\s*\n|\n\s*[-*|]", text):
        ids = CLAIM_ID.findall(sentence)
        faults += [f"{name}: names claim {i!r}, which the ledger does not have" for i in ids if i not in ledger]
        rows = [ledger[i] for i in ids if i in ledger]
        if not rows:
            continue
        plain = REFERENCE.sub(" ", CLAIM_ID.sub(" ", re.sub(r"`[^`]*`", " ", sentence)))
        known = [number for row in rows for number in _row_numbers(row)]
        for match in NUMBER.finditer(plain):
            if not any(_same(number, step, other) for number, step in _readings(match) for other in known):
                named = ", ".join(row.id for row in rows)
                faults.append(f"{name}: {match.group().strip()!r} beside {named} is not in its row of the ledger")
    return faults


def _row_numbers(claim):
    texts = f"{claim.said} {claim.because} {claim.value or ''}"
    numbers = [number for match in NUMBER.finditer(texts) for number, _ in _readings(match)]
    for want in (claim.found or {}).values():
        numbers += [float(v) for v in (want if isinstance(want, tuple) else (want,)) if isinstance(v, int | float)]
    return numbers


def _readings(match):
    """What the match may mean, as (number, half its last digit): 16k is 16,000 and 16,384, 94 % is 94 and 0.94."""
    whole, decimals, scale = match.groups()
    number, step = float(f"{whole.replace(',', '')}.{decimals or 0}"), 0.5 * 10.0 ** -len(decimals or "")
    if scale in {"%", "per cent"}:
        return [(number, step), (number / 100, step / 100)]
    factors = [SCALES.get(scale, 1.0)] + ([1024.0] if scale in {"k", "K"} else [])
    return [(number * factor, step * factor if scale else step) for factor in factors]


def _same(number, step, other):
    return abs(number - other) <= step * (1 + 1e-9)


# ---------------------------------------------------------------- the book


def read_book():
    """Chapter notebooks by chapter, other pages by name, and the keys of the bibliography."""
    chapters = ROOT / "chapters"
    paths = [p for p in sorted(chapters.rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
    notebooks = {str(p.relative_to(chapters).with_suffix("")): json.loads(p.read_text(encoding="utf-8")) for p in paths}
    pages = {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8") for p in sorted(chapters.rglob("*.md"))}
    pages |= {p.name: p.read_text(encoding="utf-8") for p in (ROOT / "index.md", ROOT / "README.md") if p.exists()}
    bib = (ROOT / "references.bib").read_text(encoding="utf-8")
    return notebooks, pages, set(re.findall(r"^@\w+\{([^,\s]+),", bib, re.MULTILINE))


def test_the_ledger_and_the_chapters_agree():
    assert disagreements(claims.load_ledger(), *read_book()) == []


def test_the_reading_guide_has_the_same_verdicts():
    guide = (ROOT / "chapters/start/how_to_read.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|\s*(\S+) ([a-z ]+?)\s*\|\s*(.+?)\s*\|$", guide, re.MULTILINE)
    explained = {name: (symbol, text) for symbol, name, text in rows if name in claims.VERDICTS}
    assert explained == {name: (claims.SYMBOLS[name], text) for name, text in claims.VERDICTS.items()}


# ---------------------------------------------------------------- the check itself

COMMON = {"chapter": "architecture/decoder", "value": None, "checks": ("arithmetic",)}
FOUND = {"parameters": 1346471936, "weights_gb": 2.69}
BECAUSE = "It has 1,346,471,936 and a window saves 93.75 % at 16,384 tokens."
ROWS = [
    Claim(**COMMON, id="s1.1-04", said="It has 1.3B parameters.", verdict="wrong", because=BECAUSE,
          evidence="claim-s1-1-04", sources=("deepseek_v3",), found=FOUND),
    Claim(**COMMON | {"chapter": "performance/speed"}, id="s2.1-02", said="It takes 82 ms.", verdict="impossible",
          because="The floor is 214.0 ms.", evidence="pending", sources=()),
]  # fmt: skip
BIB = {"deepseek_v3"}


def book(
    code='claims.check("s1.1-04", parameters=n)', cell_id="claim-s1-1-04", prose="", chapter="architecture/decoder"
):
    cells = [{"cell_type": "markdown", "id": "prose", "source": prose.splitlines(keepends=True)}]
    cells.append({"cell_type": "code", "id": cell_id, "source": code.splitlines(keepends=True), "outputs": []})
    return {chapter: {"cells": cells}}


def faults(notebooks=None, rows=ROWS, bib=BIB, pages=None):
    notebooks = book() if notebooks is None else notebooks
    return disagreements(Ledger(rows, Path("claims.yml")), notebooks, pages or {}, bib)


def test_a_book_that_agrees_has_no_faults():
    assert faults() == []
    assert faults(book('%matplotlib inline\nn = 4\nlab.claims.check("s1.1-04", parameters=n)')) == []


def also(code='claims.check("s1.1-04", parameters=n)', cell_id="claim-s1-1-04"):
    return {**book(), **book(code, cell_id, chapter="scenarios/realtime")}


@pytest.mark.parametrize(
    ("notebooks", "found"),
    [
        # A claim without evidence.
        ({}, "claim s1.1-04: evidence 'claim-s1-1-04', but chapters/architecture/decoder.ipynb does not exist"),
        (book("n = 4", "count"), "evidence 'claim-s1-1-04' is no code cell of chapters/architecture/decoder.ipynb"),
        (book("n = 4"), "cell 'claim-s1-1-04' of architecture/decoder does not call claims.check('s1.1-04')"),
        (book("n = 4"), "architecture/decoder, cell 'claim-s1-1-04': is labelled as evidence and checks no claim"),
        # Pending ends when the chapter is written.
        (
            {**book(), "performance/speed": {"cells": []}},
            "claim s2.1-02: pending, but chapters/performance/speed.ipynb is written",
        ),
        # Evidence without a claim, for a pending one, and elsewhere than its row says.
        (also('claims.check("s9.9-99")', "claim-s9-9-99"), "checks 's9.9-99', which the ledger does not have"),
        (also('claims.check("s2.1-02")', "claim-s2-1-02"), "checks s2.1-02, which the ledger marks pending"),
        (also(), "checks s1.1-04, whose evidence is 'claim-s1-1-04' in architecture/decoder"),
        (book(cell_id="count"), "cell 'count': settles s1.1-04 and has to be labelled 'claim-s1-1-04'"),
        # The id has to be written out, in Python.
        (book('claims.check("s1.1-04")\nclaims.check(name)'), "claims.check needs the id written out"),
        (also("claims.check(", "x"), "scenarios/realtime, cell 'x': not Python: '(' was never closed"),
    ],
)
def test_what_does_not_agree(notebooks, found):
    assert sum(found in fault for fault in faults(notebooks)) == 1


def test_other_checks_are_not_mistaken_for_it():
    assert checked_ids('exercises.check("decoder/kv-bytes", f)\nledger.check("s1.1-04")') == []
    assert checked_ids('x = [claims.check("a"),\n claims.check("b", n=1)]') == ["a", "b"]


def test_a_source_has_to_be_in_the_bibliography():
    assert faults(bib=set()) == ["claim s1.1-04: source 'deepseek_v3' is not in references.bib"]


@pytest.mark.parametrize(
    "prose",
    [
        "Claim s1.1-04 says 1.3B; we count 1,346,471,936.",
        "Counted in s1.1-04: 1.35B, or 1.3 billion, 2.69 GB, 93.75 % or 94 %, at 16k.",
        "In s1.1-04 the FP16 weights of V1 (see section 1.1, table 2) are `4 * n` bytes, 16-bit each.",
        "Three lines above s1.1-04. The next sentence has 12,345 of its own.",
        "[s1.1-04](../reference/ledger.html#s1.1-99) and s1.1-* as a group.",
        "| s1.1-04 | 1.3B |\n| other | 999 |",
        "An example such as s0.0-00 with 17 of anything is no claim.",
        "Both s1.1-04 and s2.1-02 hold: 82 ms, 1.3B.",
    ],
)
def test_prose_that_agrees(prose):
    assert faults(book(prose=prose)) == []
    assert faults(pages={"chapters/start/how_to_read.md": prose}) == []


@pytest.mark.parametrize(
    ("prose", "number"),
    [
        ("Claim s1.1-04 says 1.4B.", "1.4B"),
        ("We count 1,346,471,937 for s1.1-04.", "1,346,471,937"),
        ("The saving of 95 % (s1.1-04) is large.", "95 %"),
        ("In s2.1-02 the floor is\n213 ms.", "213"),
        ("- s2.1-02: 83 ms", "83"),
    ],
)
def test_a_number_in_prose_that_differs(prose, number):
    for found in (faults(book(prose=prose)), faults(pages={"page.md": prose})):
        assert len(found) == 1 and f"{number!r} beside s" in found[0], found


def test_prose_naming_an_unknown_claim():
    assert faults(pages={"page.md": "See s1.1-44."}) == [
        "page.md: names claim 's1.1-44', which the ledger does not have"
    ]
