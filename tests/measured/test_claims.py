"""The ledger loads, is complete, says where a faulty row is wrong, and holds a cell to its row."""

import re
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from measured import claims
from measured.claims import SYMBOLS, VERDICTS, ClaimNotSupported, UnknownClaim

ROOT = Path(__file__).resolve().parents[2]

# The ids of the research that the ledger was written from: nothing may get lost on the way.
SECTIONS = {
    "s1.1": 11,
    "s1.2": 12,
    "s1.3": 12,
    "s2.1": 9,
    "s3.1": 8,
    "s3.2": 8,
    "s3.3": 5,
    "s4.1": 6,
    "s4.2": 4,
    "s5": 7,
}
RESEARCHED = [f"{section}-{number:02d}" for section, count in SECTIONS.items() for number in range(1, count + 1)]
RESEARCHED += "intro-01 intro-02 intro-03 s2.2-01 s2.2-avg s2.2-se s2.2-10 s2.2-11 s2.2-12 s2.2-13 end-01".split()
RESEARCHED += "s2.3-01 s2.3-02 s2.3-03 s2.3-04 s2.3-11 s2.3-12 global-01".split()
RESEARCHED += [f"s2.2-{domain}-V{v}" for domain in ("math", "law", "medicine") for v in (1, 2, 3)]
RESEARCHED += [f"s2.3-{what}-V{v}" for what in ("cost", "year") for v in (1, 2, 3)]

ROW = """\
claims:
- id: s9.9-01
  chapter: architecture/decoder
  said: It has `n` layers & more.
  value: "4"
  checks: [arithmetic]
  verdict: wrong
  because: It has 5 < 6.
  found: {layers: 5, share: 0.5, fits: true, speed: [2, 3], kind: dense}
  evidence: claim-s9-9-01
  sources: [deepseek_v3]
- id: s9.9-02
  chapter: performance/cost
  said: It is cheap.
  value: null
  checks: [published]
  verdict: holds
  because: The list price says so.
  evidence: pending
  sources: [deepseek_v3]
- id: s9.9-03
  chapter: performance/cost
  said: It is nice.
  value: null
  checks: [opinion]
  verdict: opinion
  because: Tastes differ.
  evidence: pending
  sources: []
"""
FOUND = {"layers": 5, "share": 0.5, "fits": True, "speed": 2.5, "kind": "dense"}


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    """A ledger of three rows in place of the real one."""
    path = tmp_path / "claims.yml"
    path.write_text(ROW, encoding="utf-8")
    ledger = claims.load_ledger(path)
    monkeypatch.setattr(claims, "load_ledger", lambda: ledger)
    return ledger


# ---------------------------------------------------------------- the real ledger


def test_every_researched_claim_is_there_once_in_the_words_of_the_ledger():
    ledger = claims.load_ledger()
    assert len(RESEARCHED) == 115 and sorted(ledger) == sorted(RESEARCHED)
    assert VERDICTS.keys() == SYMBOLS.keys() and len(set(SYMBOLS.values())) == len(SYMBOLS)
    assert all(ledger.counts().values()), "a verdict that no claim has needs no definition"
    assert claims.load_ledger() is ledger, "parsed once"


@pytest.mark.parametrize("claim", claims.load_ledger().values(), ids=lambda claim: claim.id)
def test_sentences_are_sentences_and_a_verdict_from_sources_names_one(claim):
    for text in (claim.said, claim.because):
        assert text[0].isupper() or text[0] in "`$0123456789"
        assert text.endswith(".") and "\n" not in text and len(text) < 330
    assert not re.search(r"[\u3000-\u9fff]", claim.said + claim.because), "own words, in English"
    by_sources = claim.checks == ("published",) and claim.verdict in {"wrong", "holds"}
    assert claim.sources or not (by_sources or (not claim.pending and not claim.found))


def test_works_without_torch():
    code = (
        "import sys; sys.modules.update(torch=None, transformers=None, matplotlib=None)\n"
        "from dslib.data import published_figures\nfrom measured import claims\n"
        "assert len(claims.load_ledger().table().html) > 10_000\n"
        "print(claims.check('s1.1-04', parameters=1346471936), published_figures.figure('deepseek_v3', 'layers'))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "s1.1-04 wrong" in done.stdout and "61" in done.stdout


# ---------------------------------------------------------------- looking up, filtering, counting


def test_filter_and_counts(ledger):
    assert list(ledger.filter(part="performance")) == ["s9.9-02", "s9.9-03"]
    assert list(ledger.filter(chapter="performance/cost", verdict="holds")) == ["s9.9-02"]
    assert ledger.counts()["wrong"] == 1 and sum(ledger.counts("part").values()) == 3
    with pytest.raises(ValueError, match="verdict: got 'false', expected one of None, 'holds'"):
        ledger.filter(verdict="false")
    with pytest.raises(ValueError, match="by: got 'colour'"):
        ledger.counts("colour")


def test_unknown_id_names_the_nearest(ledger):
    assert issubclass(UnknownClaim, KeyError) and issubclass(UnknownClaim, ValueError)
    with pytest.raises(UnknownClaim, match=r"no claim 's9\.9-1' in claims\.yml; nearest: s9\.9-0"):
        ledger["s9.9-1"]
    with pytest.raises(UnknownClaim, match="no claim None"):
        claims.check(None)


# ---------------------------------------------------------------- settling


def test_check_accepts_what_the_row_says(ledger):
    assert claims.check("s9.9-01", **FOUND).claim is ledger["s9.9-01"]
    for near in (
        {"share": 0.5049, "speed": 2},
        {"layers": np.int64(5), "share": np.float32(0.5), "fits": np.bool_(True)},
        {"layers": torch.tensor(5), "share": torch.tensor(0.5)},
        {"layers": Fraction(5), "share": Fraction(1, 2), "speed": Decimal("2.5")},
    ):
        assert repr(claims.check("s9.9-01", **{**FOUND, **near})) == repr(claims.check("s9.9-01", **FOUND))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 4}, "layers: got 4, wanted 5"),
        ({"layers": True}, "layers: got True, wanted 5"),
        ({"layers": "5"}, "layers: got '5', wanted 5"),
        ({"share": 0.51}, "share: got 0.51, wanted 0.5 "),
        ({"share": float("nan")}, "share: got nan"),
        ({"fits": False}, "fits: got False, wanted yes"),
        ({"fits": 1}, "fits: got 1, wanted yes"),
        ({"speed": 3.01}, "speed: got 3.01, wanted 2 to 3"),
        ({"kind": "Dense"}, "kind: got 'Dense', wanted dense"),
        ({"extra": 1}, "extra: got 1, but the row has no such quantity"),
        ({"layers": ...}, "layers: not computed, wanted 5"),
    ],
)
def test_check_raises_on_a_different_extra_or_missing_quantity(ledger, change, message):
    with pytest.raises(ClaimNotSupported, match=re.escape(message)) as error:
        claims.check("s9.9-01", **{name: value for name, value in {**FOUND, **change}.items() if value is not ...})
    assert "claim s9.9-01 (wrong)" in str(error.value)


def test_a_row_without_quantities_is_settled_by_its_sources(ledger):
    assert "settled by deepseek_v3" in repr(claims.check("s9.9-02"))
    with pytest.raises(ClaimNotSupported, match="no such quantity"):
        claims.check("s9.9-02", price=1)
    with pytest.raises(ClaimNotSupported, match="neither quantities"):
        claims.check("s9.9-03")


def test_card_is_the_same_every_time_and_escapes(ledger):
    card = claims.check("s9.9-01", **FOUND)._repr_html_()
    assert card == claims.check("s9.9-01", **{**FOUND, "share": 0.503})._repr_html_()
    assert 'class="claim-card verdict-wrong" id="claim-s9.9-01"' in card
    assert 'href="../reference/ledger.html#s9.9-01"' in card
    assert "<code>n</code> layers &amp; more" in card and "5 &lt; 6" in card
    assert SYMBOLS["wrong"] in card and "</span> wrong" in card, "the verdict stands as a word beside its symbol"


def test_table_has_a_row_with_an_anchor_for_each_claim(ledger):
    table = ledger.table().html
    assert '<tr id="s9.9-02" class="verdict-holds" data-part="performance" data-verdict="holds">' in table
    assert 'href="../architecture/decoder.html#claim-s9.9-01"' in table
    assert table.count("(not written yet)") == 2
    assert claims.load_ledger().table().html == table, "the table does not depend on when it is made"


def test_summary_adds_up(ledger):
    table = ledger.summary().html
    assert '<th scope="col">Performance</th>' in table
    assert table.rstrip().endswith("</table></div>") and "<td><strong>3</strong></td></tr>" in table
    assert all(f"<td>{meaning}</td>" in claims.legend().html for meaning in VERDICTS.values())


# ---------------------------------------------------------------- faulty files

FIRST = "row 's9.9-01', field"
SECOND = "row 's9.9-02', field"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("verdict: wrong", "verdict: false", f"line 7, {FIRST} 'verdict': got False, Input should be 'holds'"),
        ("verdict: wrong", "verdict: bad", f"line 7, {FIRST} 'verdict': got 'bad', Input should be 'holds'"),
        ("[arithmetic]", "[magic]", f"line 6, {FIRST} 'checks': 0: got 'magic', Input should be 'arithmetic'"),
        ("[arithmetic]", "[]", f"line 6, {FIRST} 'checks': got [], Tuple should have at least 1"),
        ("[arithmetic]", "arithmetic", f"line 6, {FIRST} 'checks': got 'arithmetic', Input should be a valid list"),
        (
            "sources: [deepseek_v3]",
            "sources: [7]",
            f"line 11, {FIRST} 'sources': 0: got 7, Input should be a valid str",
        ),
        ('value: "4"', "value: 4", f"line 5, {FIRST} 'value': got 4, Input should be a valid string"),
        ("architecture/decoder", "decoder", f"line 3, {FIRST} 'chapter': got 'decoder', String should match pattern"),
        ("claim-s9-9-01", "s9.9-01", f"line 10, {FIRST} 'evidence': got 's9.9-01', String should match pattern"),
        ("layers: 5", "layers: null", f"line 9, {FIRST} 'found': layers: got None, Value error, wanted a number"),
        ("layers: 5", "layers: .nan", f"line 9, {FIRST} 'found': layers: got nan, Value error, wanted a number"),
        ("layers: 5", "layers: -.inf", f"line 9, {FIRST} 'found': layers: got -inf, Value error, wanted a number"),
        ("layers: 5", "layers: 2026-01-01", f"line 9, {FIRST} 'found': layers: got datetime.date(2026, 1, 1), Value"),
        ("layers: 5", "layers: 2026-02-30", f"line 9, {FIRST} 'found': got"),
        ("layers: 5", "layers: !!timestamp soon", f"line 9, {FIRST} 'found': got"),
        ("layers: 5", f"layers: {'9' * 5000}", f"line 9, {FIRST} 'found': got"),
        (
            "[2, 3]",
            "[3, 2]",
            f"line 9, {FIRST} 'found': speed: got [3, 2], Value error, wanted a number, a truth value",
        ),
        ("[2, 3]", "[2.0, .nan]", f"line 9, {FIRST} 'found': speed: got [2.0, nan], Value error"),
        ("[2, 3]", "[2.0, .inf]", f"line 9, {FIRST} 'found': speed: got [2.0, inf], Value error"),
        ("layers: 5", "layers: 5, layers: 6", f"line 9, {FIRST} 'found', field 'layers': given twice, first at line 9"),
        ("layers: 5", "no. of layers: 5", f"line 9, {FIRST} 'found': no. of layers: [key]: got 'no. of layers'"),
        ("layers: 5", "[a]: 5", "line 9: not valid YAML: found unhashable key"),
        ("  found:", "  fuond:", f"line 9, {FIRST} 'fuond': unknown field, wanted one of id, chapter"),
        ("said: It has", "said: ' '\n  sdai: It has", f"line 5, {FIRST} 'sdai': unknown field"),
        ("said: It has `n` layers & more.", "said: ' '", f"line 4, {FIRST} 'said': got ' ', String should match"),
        ("because: It has 5 < 6.", "because: 5", f"line 8, {FIRST} 'because': got 5, Input should be a valid string"),
        ("id: s9.9-01", "id: Claim 1", "line 2, row 'Claim 1', field 'id': got 'Claim 1', String should match pattern"),
        ("  said: It is cheap.\n", "", f"line 12, {SECOND} 'said': missing"),
        ("said: It is cheap.", "said:", f"line 14, {SECOND} 'said': got None, Input should be a valid string"),
        ("said: It is cheap.", "said: 2026-02-30", f"line 14, {SECOND} 'said': got '2026-02-30': day is out of range"),
        ("id: s9.9-02", "id: s9.9-01", f"line 12, {FIRST} 'id': already used at line 2"),
        (
            "  value: null\n",
            "  value: null\n  value: null\n",
            f"line 16, {SECOND} 'value': given twice, first at line 15",
        ),
        ("- id: s9.9-03", "- nothing\n- id: s9.9-03", "line 21: got 'nothing', wanted a row of fields"),
        ("  said: It is cheap.", "  ? [a, b]\n  : 1", f"line 14, {SECOND} '?': the name of a field has to be a word"),
        ("said: It is cheap.", "said: [open", "line 15: not valid YAML"),
        ("said: It is cheap.", "said: Cheap: yes", "line 14: not valid YAML"),
        ("said: It is cheap.", "said: \tnot: fine", "line 14: not valid YAML"),
        ("said: It is cheap.", "said: !!python/name:os.system", "line 14: not valid YAML"),
        ("[arithmetic]", "&all [*all]", "line 6: not valid YAML: found unconstructable recursive node"),
        ("said: It is cheap.", "said: *nobody", "line 14: not valid YAML: found undefined alias"),
        ("cheap", "ch\x00ap", "not valid YAML"),
        ("said: It is cheap.", "said: " + "[" * 40 + "]" * 40, "line 14: nested 9 deep, wanted at most 8"),
        ("said: It is cheap.", "said: " + "[" * 100_000 + "]" * 100_000, "line 14: n"),  # newer PyYAML refuses it first
        (ROW, "", "line 1, field 'claims': wanted a list of rows"),
        (ROW, "claims: 7", "line 1, field 'claims': wanted a list of rows"),
        ("claims:", "claims: []\nclaims:", "line 2, field 'claims': given twice, first at line 1"),
        ("claims:", "others: []\nclaims:", "line 1, field 'claims': wanted a list of rows under the key 'claims', not"),
        ("cheap", "ch\udcffap", "line 14: not UTF-8 text"),
    ],
)
def test_a_faulty_file_says_where(tmp_path, old, new, message):
    path = tmp_path / "claims.yml"
    path.write_bytes(ROW.replace(old, new, 1).encode(errors="surrogateescape"))
    with pytest.raises(ValueError) as error:
        claims.load_ledger(path)
    assert str(error.value).startswith(f"claims.yml {message}" if "line" in message else f"claims.yml: {message}")
