"""Grades follow from days, scores pay honesty, every row has rule and source, and the timeline is the data's."""

import copy
import dataclasses
import itertools
import math
import random
from datetime import date
from pathlib import Path

import pytest
import yaml

from dslib.data.files import data_path, read_yaml
from dslib.performance.prices import api_prices, workloads
from dslib.roadmap import advice, timeline
from dslib.roadmap.advice import Evidence, Forecast
from measured.claims import load_ledger

ROOT = Path(__file__).resolve().parents[2]
ROWS = advice.load()
ARTICLE = {name: row for name, row in ROWS.items() if row.by == "article"}
OURS = [row for row in ROWS.values() if row.by == "course"]
TODAY = advice.looked_until()


def one(seen, deadline="2026-03-31", conditions=("a", "b"), tier="primary", line="main"):
    """A forecast of 2026-01-01 whose conditions were seen on these days: pairs of condition and day."""
    evidence = tuple(Evidence(date.fromisoformat(day), name, line, "x", ("s",), tier) for name, day in seen)
    end, wanted = deadline and date.fromisoformat(deadline), dict.fromkeys(conditions, "c")
    return Forecast("x", "forecast", "article", date(2026, 1, 1), "s", "r", end, wanted, evidence)


# ---------------------------------------------------------------- grades


@pytest.mark.parametrize(
    ("seen", "on", "word"),
    [
        ([("a", "2026-03-31"), ("b", "2026-02-01")], "2026-12-01", "met"),
        ([("a", "2026-02-01"), ("b", "2026-02-01")], "2026-02-01", "met"),
        ([("a", "2026-02-01"), ("b", "2026-02-02")], "2026-02-01", "open"),
        ([("a", "2026-02-01"), ("b", "2026-04-01")], "2026-12-01", "met late"),
        ([("a", "2026-02-01"), ("b", "2026-04-01")], "2026-03-31", "open"),
        ([("a", "2026-02-01"), ("b", "2026-06-01")], "2026-05-01", "partly"),
        ([("a", "2026-06-01"), ("a", "2026-02-01")], "2026-12-01", "partly"),
        ([("a", "2026-06-01")], "2026-12-01", "partly"),
        ([], "2026-04-01", "not met"),
        ([], "2026-03-31", "open"),
        ([("c", "2026-02-01")], "2026-06-01", "not met"),
        ([("c", "2026-02-01"), ("a", "2026-02-01")], "2026-06-01", "partly"),
        ([("c", "2026-02-01"), ("d", "2026-02-01")], "2026-02-15", "open"),
    ],
)
def test_days_decide(seen, on, word):
    found = advice.grade(one(seen), on)
    assert found.word == word in advice.GRADES and found.deadline == date(2026, 3, 31)
    assert advice.grade(one(seen, conditions=()), on).word == "cannot be graded"


def test_only_evidence_that_counts_meets_a_condition():
    seen = [("a", "2026-02-01"), ("b", "2026-02-01")]
    for changes, wanted in (
        ({"tier": "unverified"}, "not met"), ({"tier": "secondary"}, "met"), ({"line": "side"}, "not met")
    ):  # fmt: skip
        assert advice.grade(one(seen, **changes), "2026-12-01").word == wanted
    assert advice.grade(one(seen, line="side"), "2026-12-01", lines=advice.LINES).word == "met"
    assert advice.grade(one(seen, tier="secondary"), "2026-12-01", tiers=("primary",)).word == "not met"


def test_a_forecast_without_a_day_gets_the_same_months_as_all_others():
    undated = one([("a", "2026-02-01"), ("b", "2027-01-01")], deadline=None)
    assert advice.grade(undated, "2027-06-01").deadline == date(2027, 1, 1)
    words = [advice.grade(undated, "2027-06-01", months=m).word for m in (11, 12, 24)]
    assert words == ["met late", "met", "met"]
    assert advice.grade(undated, "2026-06-01", deadline="2026-05-01").word == "partly"
    assert not advice.grade(undated, "2027-06-01").already
    assert advice.grade(one([("a", "2025-02-01"), ("b", "2026-01-01")]), "2026-02-01").already


def test_more_evidence_or_time_never_makes_a_grade_worse():
    """Random histories: a met forecast stays met with a later deadline, and with evidence added."""
    order = {word: n for n, word in enumerate(("not met", "partly", "met late", "met"))}
    draw = random.Random(0)
    days = [f"2026-{m:02}-01" for m in range(2, 13)]
    for _ in range(300):
        seen = [(draw.choice("ab"), draw.choice(days)) for _ in range(draw.randrange(4))]
        early, late = sorted(draw.sample(days, 2))
        words = [advice.grade(one(seen, deadline=end), "2027-01-01").word for end in (early, late)]
        more = advice.grade(one([*seen, (draw.choice("ab"), draw.choice(days))], deadline=early), "2027-01-01").word
        assert order[words[0]] <= order[words[1]] and order[words[0]] <= order[more]


# ---------------------------------------------------------------- scores


def test_scores_by_hand():
    assert advice.brier([0.9, 0.2], [1, 0]) == pytest.approx((0.01 + 0.04) / 2)
    assert advice.brier([0.5] * 7, [1, 0, 1, 1, 0, 0, 1]) == 0.25 and advice.brier([1, 0], [1, 0]) == 0
    assert advice.base_rate(0, 0) == 0.5 and advice.base_rate(3, 3) == pytest.approx(0.8)
    assert advice.base_rate(0, 9, 3) == pytest.approx(1 - 10 / 13)
    assert advice.skill([0.25, 0.25], [0, 1], 0.25) == pytest.approx(0) and advice.skill([0, 1], [0, 1], 0.4) == 1
    rows = advice.calibration([0.1, 0.15, 0.9, 1.0], [0, 1, 1, 1], bins=5)
    assert [row["forecasts"] for row in rows] == [2, 2]
    assert rows[0]["said"] == pytest.approx(0.125) and (rows[0]["came"], rows[1]["came"]) == (0.5, 1.0)


def test_honesty_pays_whatever_the_chance():
    told = [n / 100 for n in range(101)]
    for chance in (0.05, 0.3, 0.5, 0.71, 0.99):
        paid = [chance * advice.brier([t], [1]) + (1 - chance) * advice.brier([t], [0]) for t in told]
        assert told[paid.index(min(paid))] == pytest.approx(chance)


@pytest.mark.parametrize(("chance", "told"), [(0.7, 0.9), (0.5, 0.8), (0.9, 0.6)])
def test_the_number_of_forecasts_is_the_one_at_which_the_gap_is_so_many_errors(chance, told):
    """Against the exact distribution of the difference of two scores over n forecasts."""
    n = advice.forecasts_needed(chance, told)
    each = [advice.brier([told], [y]) - advice.brier([chance], [y]) for y in (0, 1)]
    mean = chance * each[1] + (1 - chance) * each[0]
    deviation = math.sqrt(chance * (each[1] - mean) ** 2 + (1 - chance) * (each[0] - mean) ** 2)
    assert mean == pytest.approx((told - chance) ** 2)
    assert mean / (deviation / math.sqrt(n)) >= 1.96 > mean / (deviation / math.sqrt(n - 1))


# ---------------------------------------------------------------- the rows


def test_every_sentence_of_the_article_is_there_and_sources_exist():
    keys = set((ROOT / "references.bib").read_text(encoding="utf-8").replace("{", ",").split(","))
    assert {row.claim for row in ARTICLE.values()} == {f"s5-0{n}" for n in range(1, 8)} | {"end-01"}
    assert all(row.claim in load_ledger() and row.made == date(2025, 9, 17) for row in ARTICLE.values())
    assert all(set(piece.source) <= keys for row in ROWS.values() for piece in row.evidence)
    assert all(row.looked for row in ARTICLE.values() if advice.grade(row, TODAY).word == "not met")


def test_the_grades_and_what_they_hang_on():
    words = {name: advice.grade(row, TODAY).word for name, row in ARTICLE.items()}
    assert words == {
        "roadmap": "not met", "unified": "met", "elastic": "not met", "chips": "met", "v25": "not met",
        "production": "cannot be graded", "edge": "cannot be graded", "best-fit": "cannot be graded",
    }  # fmt: skip
    assert advice.grade(ARTICLE["unified"], TODAY, deadline="2026-04-24").word == "met late"
    assert advice.grade(ARTICLE["unified"], TODAY, lines=advice.LINES).already
    assert advice.grade(ARTICLE["chips"], TODAY).already
    assert not advice.grade(ARTICLE["chips"], TODAY, tiers=("primary",)).already


def test_ours_are_open_and_say_what_they_stand_on():
    assert len(OURS) == 5 and [advice.grade(row, TODAY).word for row in OURS] == ["open"] * 5
    assert all(0 < row.probability < 1 and row.deadline >= row.opens > row.made == TODAY for row in OURS)
    only_then = next(row for row in OURS if row.id == "price")
    assert only_then.opens == only_then.deadline, "only the page of that day decides"
    assert all(advice.base_rate(row.base["met"], row.base["total"]) for row in OURS)


def test_what_was_written_stays_and_is_only_made_clear():
    """Probabilities, days and bases as on the day of writing; a clarification comes before the row opens."""
    first, second = "2027-06-30", "2027-12-31"
    assert {r.id: (r.probability, str(r.opens), str(r.deadline), *list(r.base.values())[:2]) for r in OURS} == {
        "next-mit": (0.88, "2026-11-29", first, 7, 7), "v5": (0.35, "2026-11-29", first, 1, 2),
        "price": (0.6, first, first, 3, 5), "pictures-out": (0.12, "2026-11-29", second, 0, 9),
        "elastic-again": (0.08, "2026-11-29", second, 0, 15),
    }  # fmt: skip
    assert all(row.clarified["day"] == "2026-11-28" < str(row.opens) for row in OURS)
    assert DOCUMENT["unreadable"]["day"] == "2026-11-28" and "archive" in DOCUMENT["unreadable"]["how"]
    chat, now = workloads()["chat"], [p for p in api_prices() if p.model == "deepseek-flash"][-1]
    thousand = (chat["tokens_in"] * now.input + chat["tokens_out"] * now.output) / 1000
    assert now.date == "2026-11-15" and f"{thousand:.2f} dollars a thousand" in ROWS["price"].clarified["how"]


def test_what_was_seen_before_the_opening_day_does_not_count():
    early = one([("a", "2026-01-15"), ("a", "2026-02-15"), ("b", "2026-02-20")])
    assert advice.grade(early, "2026-12-01", opens="2026-02-01").met["a"] == date(2026, 2, 15)
    assert advice.grade(early, "2026-12-01", opens="2026-02-16").word == "partly"
    assert advice.grade(dataclasses.replace(early, opens=date(2026, 3, 1)), "2026-12-01").word == "not met"
    after = {name: advice.grade(row, TODAY, opens="2025-09-18") for name, row in ARTICLE.items()}
    assert [name for name, grade in after.items() if grade.word == "met"] == ["unified", "chips"]
    assert not after["chips"].already and after["chips"].met["new-chips"] == date(2026, 4, 24)


def test_other_wordings_stand_on_evidence_that_is_listed():
    days = {str(piece.date) for row in ARTICLE.values() for piece in row.evidence}
    told = {}
    for row in DOCUMENT["wordings"]:
        assert row["seen"] is None or row["seen"] in days, row["rule"]
        assert ARTICLE[row["of"]].conditions and set(row) <= {"of", "rule", "seen", "deadline"}
        told.setdefault(row["of"], []).append(row["seen"])
    assert len(told) == 5 and all(len(seen) >= 2 for seen in told.values())


def test_base_rates_are_those_of_the_timeline():
    base = {row.id: (row.base["met"], row.base["total"]) for row in OURS}
    main = timeline.releases("main")
    numbered = [r for r in main if r.number]
    ends = {row.id: row.deadline for row in OURS}
    for name, chosen in (("next-mit", numbered), ("v5", [r for r in numbered if r.number == int(r.number)])):
        room = (ends[name] - chosen[-1].day).days
        waited = (TODAY - chosen[-1].day).days if name == "v5" else 0
        gaps = [gap for gap in timeline.waits([r.day for r in chosen]) if gap > waited]
        assert base[name] == (sum(gap < room for gap in gaps), len(gaps)), name
    everyday = ("deepseek-chat", "deepseek-v4-flash", "deepseek-flash")
    paid = [price.output for price in api_prices() if price.model in everyday]
    steps = [after - before for before, after in itertools.pairwise(paid) if after != before]
    assert base["price"] == (sum(step < 0 for step in steps), len(steps))
    assert base["pictures-out"] == (0, len(main)) and base["elastic-again"] == (0, len(timeline.releases()))
    assert not any("images" in r.modality.split(" to ")[-1] for r in main)
    for name, all_of_them in (("pictures-out", main), ("elastic-again", timeline.releases())):
        pace = len(all_of_them) / (TODAY - all_of_them[0].day).days
        assert next(row for row in OURS if row.id == name).base["chances"] == round(pace * (ends[name] - TODAY).days)


# ---------------------------------------------------------------- the timeline


def test_releases_are_in_order_and_carry_what_the_data_say():
    found = timeline.releases()
    assert [r.day for r in found] == sorted(r.day for r in found) and len(found) >= 15
    assert {r.line for r in found} == set(advice.LINES)
    v3 = next(r for r in found if r.entry == "deepseek_v3")
    assert (v3.day, v3.number, v3.context, v3.price.output) == (date(2024, 12, 26), 3, "128K", 1.10)
    assert next(r for r in found if r.entry == "deepseek_vl2").context == "4K"
    assert [r.number for r in timeline.releases("main") if r.number] == [1, 2, 2.5, 3, 3.1, 3.2, 4, 4.1]
    takes = [r.entry for r in timeline.releases("main") if r.takes_images]
    assert takes == ["deepseek_v4_vision", "deepseek_v41"]
    assert sum(timeline.waits([r.day for r in found])) == (found[-1].day - found[0].day).days


def test_the_price_is_the_first_that_is_known(monkeypatch):
    later = dataclasses.replace(api_prices("DeepSeek-V3")[0], date="2026-01", output=9.0)
    monkeypatch.setattr(timeline, "api_prices", lambda: [*api_prices(), later])
    assert next(r for r in timeline.releases() if r.entry == "deepseek_v3").price.output == 1.10


def test_rows_of_the_timeline_have_sources():
    keys = set((ROOT / "references.bib").read_text(encoding="utf-8").replace("{", ",").split(","))
    for name, model in read_yaml("published.yml")["models"].items():
        for field in ("architecture", "licence", "context"):
            if row := (model.get("release") or {}).get(field):
                assert row["source"] in keys and row["tier"] in advice.TIERS and row["value"], (name, field)


# ---------------------------------------------------------------- bad input

DOCUMENT = yaml.safe_load(data_path("forecasts.yml").read_text(encoding="utf-8"))


def faulty(row, **changes):
    """The file with fields of one row changed; None takes a field out."""
    document = copy.deepcopy(DOCUMENT)
    found = next(one for one in document["forecasts"] if one["id"] == row)
    for name, value in changes.items():
        found.pop(name) if value is None else found.update({name: value})
    return lambda: advice.load(document)


def piece(**changes):
    return faulty("v25", evidence=[DOCUMENT["forecasts"][4]["evidence"][0] | changes])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (faulty("unified", made=None), ("row unified, made: got nothing", "expected id")),
        (faulty("unified", made=""), ("row unified, made", "a day such as")),
        (faulty("unified", made="last week"), ("made: got 'last week'", "2025-09-17")),
        (faulty("v25", deadline="2025-09-01"), ("row v25, deadline", "or later")),
        (faulty("v25", deadline="Q3"), ("deadline: got 'Q3'", "a day such as")),
        (faulty("edge", why=None), ("row edge, why", "nobody can grade")),
        (faulty("edge", kind="hint"), ("row edge, kind: got 'hint'", "'advice'")),
        (faulty("edge", by="us"), ("row edge, by: got 'us'", "'course'")),
        (faulty("edge", deadlin="2026-01-01"), ("field: got 'deadlin'", "deadline")),
        (faulty("edge", id="v25"), ("got 'v25' twice", "one row for each")),
        (faulty("v5", probability=None), ("row v5, probability: got None", "above 0")),
        (faulty("v5", probability=1), ("row v5, probability: got 1", "below 1")),
        (faulty("v5", base=None), ("row v5", "a base beside")),
        (faulty("v5", deadline=None), ("row v5", "a deadline, conditions")),
        (faulty("v5", opens=None), ("row v5", "expected opens")),
        (faulty("v5", opens="2027-07-01"), ("row v5, deadline", "opens, or later")),
        (faulty("v5", clarified={"how": "so", "day": "2026-11-29"}), ("row v5, clarified", "before it opens")),
        (faulty("v5", clarified={"how": "so", "day": "2026-11-27"}), ("row v5, clarified", "before it opens")),
        (faulty("v5", clarified={"day": "2026-11-28"}), ("row v5, clarified", "expected how")),
        (faulty("v5", opens="soon"), ("row v5, opens: got 'soon'", "a day such as")),
        (piece(shows="colour"), ("evidence 1, shows: got 'colour'", "'takes-images'")),
        (piece(date="2027-01-01"), ("evidence 1, date", "or earlier")),
        (piece(date="2024-09"), ("evidence 1, date: got '2024-09'", "a day such as")),
        (piece(tier="good"), ("evidence 1, tier: got 'good'", "'primary'")),
        (piece(line="left"), ("evidence 1, line: got 'left'", "'side'")),
        (piece(source=[]), ("evidence 1, source", "got nothing")),
        (lambda: advice.load({}), ("got dict", "'looked_until'")),
        (
            lambda: advice.load({"looked_until": "2026-01-01", "forecasts": [3]}),
            ("row 3, id: got nothing", "in each row"),
        ),
        (lambda: advice.grade(ROWS["v25"], "2025-01-01"), ("on: got 2025-01-01", "or later")),
        (lambda: advice.grade(ROWS["v25"], 2026), ("on: got 2026", "a day such as")),
        (lambda: advice.grade(ROWS["unified"], TODAY, months=0), ("months: got 0", "at least 1")),
        (lambda: advice.grade(ROWS["unified"], TODAY, deadline="soon"), ("deadline: got 'soon'", "a day")),
        (lambda: advice.brier([], []), ("outcomes: got 0", "and some")),
        (lambda: advice.brier([0.5], [1, 0]), ("outcomes: got 2 for 1", "one for each")),
        (lambda: advice.brier([1.5], [1]), ("probabilities[0]: got 1.5", "0 to 1")),
        (lambda: advice.brier([math.nan], [1]), ("probabilities[0]: got nan", "0 to 1")),
        (lambda: advice.brier([0.5], [0.5]), ("outcomes[0]: got 0.5", "one of 0, 1")),
        (lambda: advice.skill([0.5], [1], 0), ("base: got 0", "above 0")),
        (lambda: advice.skill([0.5], [1], 1), ("base: got 1", "below 1")),
        (lambda: advice.base_rate(3, 2), ("total: got 2", "at least 3")),
        (lambda: advice.calibration([0.5], [1], bins=0), ("bins: got 0", "at least 1")),
        (lambda: advice.forecasts_needed(0.5, 0.5), ("told: got 0.5", "another number")),
        (lambda: advice.forecasts_needed(1.2, 0.5), ("chance: got 1.2", "0 to 1")),
        (lambda: timeline.releases("left"), ("line: got 'left'", "'main'")),
        (lambda: timeline.waits([date(2026, 2, 1), date(2026, 1, 1)]), ("days: got", "in order")),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words), str(error.value)
