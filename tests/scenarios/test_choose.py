"""Choosing, held against a second reckoning from the raw data, and the rules that any choice has to keep."""

import datetime
import io
import itertools
import json
import math
import random
import re
from dataclasses import replace

import pytest
import yaml

from dslib import choose as command
from dslib.data import published_figures
from dslib.data.files import data_path
from dslib.data.published_figures import TIERS
from dslib.scenarios import facts
from dslib.scenarios.choose import STATES, WISHES, Constraint, beats, changes, choose, front, nearest, points
from dslib.scenarios.facts import Span, document, models
from dslib.scenarios.needs import Needs
from dslib.scenarios.options import CARDS, offered
from measured.experiments.choose import TRUST, Calibration, Fit, calibrate

RAW = yaml.safe_load(data_path("options.yml").read_text(encoding="utf-8"))
HARDWARE = yaml.safe_load(data_path("hardware.yml").read_text(encoding="utf-8"))["gpus"]
PRICES = yaml.safe_load(data_path("prices.yml").read_text(encoding="utf-8"))
CHAT = Needs(memory="24 GB", modality=("text",))


def drawn(seed):
    """A need and weights, at random."""
    dice = random.Random(seed)

    def maybe(name, *values):
        return {name: dice.choice(values)} if dice.random() < 0.5 else {}

    place = dice.choice([{}, {"memory": dice.choice([1e9, 2e9, 4e9, 8e9, 24e9, 80e9])}, {"gpu": dice.choice(CARDS)}])
    fields = place | {"prompt": dice.choice([100, 1000]), "users": dice.choice([1, 4, 32]), "requests": 1000}
    fields |= maybe("modality", ("text",), ("text", "image"), ("picture",)) | maybe("context", 2000, 8000, 100_000)
    fields |= maybe("licence", "permissive", "commercial") | maybe("budget", 30.0, 1000.0, 30_000.0)
    fields |= maybe("token_time", 1e-3, 2e-2) | maybe("first_token", 1e-3, 0.1) | maybe("stay", True)
    fields |= maybe("score", {"mmlu": 60}, {"mmlu_chat": 80}) | maybe("day", "2024-06-30", "2025-09-17", "2026-11-15")
    fields |= maybe("exists", False) | maybe("engine", "vLLM") | maybe("reserve", 0.0, 0.3)
    names = dice.sample([name for name in WISHES if name != "token_time"], 2)
    share = dice.choice([0.2, 0.5, 0.9])
    return Needs(**fields), {names[0]: share, names[1]: 1 - share}


# ---------------------------------------------------------------- a second reckoning


def raw_ends(row, name):
    """Both ends of a fact from the file; a figure is looked up in published.yml."""
    fact = row["facts"].get(name)
    if fact is None:
        return -math.inf, math.inf
    value = fact.get("value")
    if "figure" in fact:
        value = published_figures.figure(row["published"], fact["figure"]).value
        value = value[row["variant"]] if isinstance(value, tuple) else value
    return tuple(value) if isinstance(value, list) else (value, value)


def raw_bytes(row, fmt, needs):
    """(low, high) bytes of weights and caches over the usable share, by plain arithmetic."""
    low, high = raw_ends(row, "weights" if fmt == "released" else "parameters")
    per = (1, 1) if fmt == "released" else RAW["formats"][fmt]["value"]
    shape = row["facts"].get("cache", {}).get("value")
    length = needs.context or needs.prompt + needs.answer
    if shape is None:
        caches = (0, math.inf)
    elif shape["kind"] == "bytes":
        caches = [shape["per_token"] * length + shape.get("fixed", 0)] * 2
    elif shape["kind"] == "latent":
        caches = [shape["layers"] * (shape["rank"] + shape["rope"]) * length * 2] * 2
    else:
        caches = [2 * shape["layers"] * shape["kv_heads"] * shape["head_dim"] * length * 2] * 2
    share = 1 - needs.reserve
    return [(max(w, 0) * p + needs.users * c) / share for w, p, c in zip((low, high), per, caches, strict=True)]


def raw_status(row, option, needs):
    """In, cannot be said, or out, by the constraints that :func:`drawn` makes; speeds from the raw peaks."""
    bad, unsure = False, False

    def at_most(low, high, limit):
        nonlocal bad, unsure
        bad, unsure = bad or low > limit, unsure or (low <= limit < high)

    article = row["facts"]["modality"]["tier"] == "article"
    when = str(raw_ends(row, "released")[0])
    today = needs.day or RAW["as_of"]
    bad |= when[:10] > today if len(when) > 7 else when > today[:7]
    bad |= needs.exists and article
    bad |= any(kind not in row["facts"]["modality"]["value"] for kind in needs.modality)
    bad |= needs.stay and option.where == "api"
    if needs.licence and option.where != "api":
        name = row["facts"].get("licence", {}).get("value")
        unsure |= name is None
        bad |= name is not None and RAW["licences"][name] > (0 if needs.licence == "permissive" else 1)
    own = option.where == "own"
    if needs.engine and own:
        unsure |= needs.engine not in row["facts"].get("engines", {}).get("value", [])
    card = HARDWARE.get(option.card) if own and option.roof else None
    if own:
        at_most(*raw_bytes(row, option.fmt, needs), needs.memory or card["memory_gb"] * 1e9 * option.count)
    elif article and needs.memory:
        at_most(*raw_ends(row, "memory"), needs.memory)
    if needs.context:
        low, high = raw_ends(row, "context")
        at_most(-high, -low, -needs.context)
    active = max(raw_ends(row, "active")[0], 0)
    per = {"float32": 4, "float16": 2, "float8": 1, "int4": 0.5, "released": 0.5 + 1 / 32}.get(option.fmt)
    if needs.token_time:
        if article:
            at_most(*raw_ends(row, "token_time"), needs.token_time)
        elif card is None:
            unsure = True
        else:
            cache = raw_bytes(
                row | {"facts": row["facts"] | {"parameters": {"value": 0.0}, "weights": {"value": 0.0}}},
                option.fmt,
                needs,
            )
            moved = active * per + cache[0] * (1 - needs.reserve)
            at_most(moved / (card["bandwidth_gb_s"] * 1e9 * option.count), math.inf, needs.token_time)
    if needs.first_token:
        if card is None:
            unsure = True
        else:
            rates = card["tflops"]
            rate = rates.get("float8", rates["float16"]) if option.fmt in ("float8", "released") else rates["float16"]
            floor = max(2 * active * needs.prompt / rate / 1e12, active * per / card["bandwidth_gb_s"] / 1e9)
            at_most(floor / option.count, math.inf, needs.first_token)
    if needs.budget:
        at_most(*raw_dollars(row, option, needs), needs.budget)
    for name, least in needs.score.items():
        low, high = raw_score(row, name, option)
        at_most(-high, -low, -least)
    return "out" if bad else "cannot be said" if unsure else "in"


def raw_score(row, name, option):
    """A fact; of four bits only the upper end of a score is known."""
    low, high = raw_ends(row, name)
    return (-math.inf, high) if option.fmt == "int4" and name.startswith("mmlu") else (low, high)


def raw_dollars(row, option, needs):
    if option.where == "own":
        usd = [r["usd"] for r in PRICES["gpu_hours"] if r["gpu"] == option.card and r["kind"] != "assumed"]
        return (0, math.inf) if not usd else [one * option.count * 720 for one in (min(usd), max(usd))]
    if option.where == "said":
        return [raw_ends(row, "request_price")[0] * needs.requests * 30] * 2
    today = needs.day or RAW["as_of"]
    rows = [r for r in PRICES["api_tokens"] if r["serves"] == row["name"] and r["date"] <= today]
    last = max(rows, key=lambda r: r["date"])
    one = (needs.prompt * last["input"] + needs.answer * last["output"]) / 1e6 * needs.requests * 30
    return one, one * last.get("peak", 1)


@pytest.mark.parametrize("seed", range(24))
def test_verdicts_and_ranking_are_those_of_the_second_reckoning(seed):
    needs, weights = drawn(seed)
    answer = choose(needs, weights)
    keys = []
    for row in answer.rows:
        raw = RAW["models"][row.option.model.id]
        assert row.status == raw_status(raw, row.option, needs), (row.option.name, needs)
        ends = []
        for name, weight in weights.items():
            low, high = raw_score(raw, name, row.option)
            if name == "dollars":
                low, high = raw_dollars(raw, row.option, needs)
            elif name == "memory" and row.option.where != "said":
                low, high = raw_bytes(raw, row.option.fmt, needs) if row.option.where == "own" else (0, math.inf)
            elif name == "context":
                low, high = (1 / high, 1 / low) if 0 < low and high < math.inf else (0, math.inf)
            elif name not in ("memory", "dollars"):
                low, high = 100 - high, 100 - low
            usable = 0 < low and high < math.inf  # both ends
            ends.append((weight * math.log2(low), weight * math.log2(high)) if usable else (0, math.inf))
        keys.append((STATES.index(row.status), sum(low + high for low, high in ends)))
        assert (row.points is None) == (keys[-1][1] == math.inf)
    for before, after in itertools.pairwise(keys):
        assert before[0] < after[0] or (before[0] == after[0] and before[1] <= after[1] + 1e-9)
    assert len(answer.rows) == len({row.option.name for row in answer.rows}), "each option once"


# ---------------------------------------------------------------- rules


@pytest.mark.parametrize("seed", range(12))
def test_what_is_beaten_for_sure_never_stands_above(seed):
    answer = choose(*drawn(seed))
    for status in STATES:
        rows = [row for row in answer.having(status) if row.points is not None][:60]
        for place, row in enumerate(rows):
            assert not any(beats(later, row) for later in rows[place + 1 :])
    best = front(answer.having("in"))
    assert bool(best) == bool(answer.having("in"))
    for row in answer.having("in"):
        assert (row in best) != any(beats(other, row) for other in answer.having("in"))


RELAXED = {
    "memory": lambda v: v * 2, "token_time": lambda v: v * 2, "first_token": lambda v: v * 2, "budget": lambda v: v * 2,
    "modality": lambda v: v[1:], "licence": lambda v: "commercial" if v == "permissive" else None,
    "stay": lambda v: False, "exists": lambda v: False, "score": lambda v: {},
    "engine": lambda v: None, "reserve": lambda v: v / 2, "users": lambda v: max(1, v // 2),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_relaxing_removes_nothing(seed):
    needs, _ = drawn(seed)
    before = {row.option.name: STATES.index(row.status) for row in choose(needs, {"context": 1}).rows}
    for name, relax in RELAXED.items():
        if value := getattr(needs, name):
            easier = replace(needs, **{name: relax(value)})
            after = {row.option.name: STATES.index(row.status) for row in choose(easier, {"context": 1}).rows}
            assert all(after[option] <= state for option, state in before.items()), name


@pytest.mark.parametrize("seed", range(12))
def test_removing_the_stated_blockers_lets_it_pass(seed):
    """Each broken limit is set to what the answer says would do, one option at a time."""
    needs, _ = drawn(seed)
    out = choose(needs, {"context": 1}).having("out")
    for row in random.Random(seed).sample(out, min(8, len(out))):
        fields = {}
        for test in row.blockers:
            field = {"dollars": "budget", "data stays": "stay", "to be had": "exists"}
            name = field.get(test.name, test.name)
            if name in ("modality", "stay", "exists", "licence", "engine"):
                fields[name] = {"modality": (), "stay": False, "exists": False}.get(name)
            elif name in needs.score:
                fields["score"] = {k: v for k, v in (fields.get("score") or needs.score).items() if k != name}
            elif name == "released":
                fields["day"] = datetime.date.fromordinal(int(test.would_pass)).isoformat()
            elif name == "memory" and row.option.where == "own":
                enough = test.would_pass if math.isfinite(test.would_pass) else test.span.low
                fields |= {"gpu": None, "memory": enough, "first_token": None, "token_time": None, "budget": None}
            else:
                fields[name] = test.would_pass if math.isfinite(test.would_pass) else None
        if fields.get("context", 1) is None or 0 < (fields.get("context") or 1e9) < needs.prompt + needs.answer:
            continue
        eased = replace(needs, **fields)
        again = [one for one in choose(eased, {"context": 1}).rows if one.option.model.id == row.option.model.id]
        same = [one for one in again if (one.option.where, one.option.fmt) == (row.option.where, row.option.fmt)]
        if row.option.where == "api" and "day" in fields:
            continue  # other prices on that day
        assert same and any(one.status != "out" for one in same), (row.option.name, row.blockers, fields)


def never(row):
    return sum(test.miss() == math.inf for test in row.blockers)


def undecided(row):
    return [test for test in row.tests if test.verdict != "in"]


@pytest.mark.parametrize("seed", range(12))
def test_the_nearest_miss_is_let_in_by_the_fewest_and_smallest_changes(seed):
    answer = choose(*drawn(seed))
    near = nearest(answer.having("out"))
    for row in answer.having("out"):
        assert (never(near), len(undecided(near))) <= (never(row), len(undecided(row)))
        if never(near) == never(row) and len(undecided(near)) == len(undecided(row)) == 1:
            assert near.blockers[0].miss() <= row.blockers[0].miss()


@pytest.mark.parametrize("seed", range(12))
def test_knowing_less_of_an_option_never_brings_it_nearer(seed):
    """Each figure in turn becomes unknown, but a plain no: of that an unknown is indeed the better half."""
    out = choose(*drawn(seed)).having("out")
    for row in random.Random(seed).sample(out, min(8, len(out))):
        for number, test in enumerate(row.tests):
            if test.verdict == "out" and test.miss() == math.inf:
                continue
            blurred = [*row.tests[:number], replace(test, span=Span(-math.inf, math.inf)), *row.tests[number + 1 :]]
            less = replace(row, tests=blurred)
            assert not less.blockers or nearest([row, less]) is row, (row.option.name, test.name)


def test_the_nearest_miss_is_not_the_one_of_which_less_is_known():
    """V4-Flash needs at most 180 GB; with a vision encoder and a cache of unknown size nobody knows the upper end."""
    out = choose(Needs(gpu="H200", stay=True, score={"mmlu_pro": 80}, context=16_000)).having("out")
    known, unknown = (next(r for r in out if r.option.model.id == name) for name in ("v4_flash", "v4_vision"))
    assert unknown.blockers[0].miss(sure=False) < known.blockers[0].miss(sure=False), "its unknown cache counts as 0"
    assert nearest(out) is known and known.blockers[0].miss() < unknown.blockers[0].miss() == math.inf
    assert round(known.blockers[0].would_pass / 1e9) == 180


def test_nobody_is_named_first_where_nothing_can_be_ranked():
    """Of several that are in, the first letter of a name decides nothing."""
    plain = choose(CHAT)
    assert len(plain.having("in")) > 1 and plain.best is None and plain.first == "nothing that can be ranked"
    desk = choose(Needs(memory="20 GB", modality=("text",), where="own", users=8), {"mmlu": 0.7, "memory": 0.3})
    assert len(desk.having("in")) == 9 and not any(row.points for row in desk.having("in"))
    assert desk.best is None and desk.first == "nothing that can be ranked"
    wider = choose(replace(desk.needs, memory=40e9), desk.weights)
    assert wider.best and changes(wider)["memory / 2"] == desk.first
    alone = choose(Needs(memory="1.3 GB", modality=("text",), where="own", prompt=500))
    assert alone.first == alone.best.option.name == "DeepSeek-Coder-1.3B, int4, the memory given"
    tight = choose(Needs(memory="1 MB", where="own"))
    assert tight.best is None and tight.first == "nothing for sure"


def test_units_do_not_matter():
    a = Needs(memory="24 GB", token_time="50 ms", first_token="0.1 s", budget="900 $/month", requests=10)
    b = Needs(memory="24000 MB", token_time="0.05 s", first_token=0.1, budget="30 $/day", requests=10)
    assert a == b and Needs(memory="1 GiB").memory == 2**30 and Needs(budget="365 $/year").budget == 30
    rows = choose(CHAT, {"memory": 1}).rows
    ranked = [row for row in rows if row.points]
    assert len(ranked) > 5
    for factor in (1e-9, 8.0):  # GB, bits: the same amount is added to everybody
        for row in ranked:
            span = row.wished["memory"]
            scaled = points({"memory": replace(span, low=span.low * factor, high=span.high * factor)}, {"memory": 1})
            assert scaled.low - row.points.low == pytest.approx(math.log2(factor))


def test_three_verdicts():
    exact, floor, range_ = Span(5, 5), Span(5, math.inf), Span(4, 6)
    assert [Constraint("t", span, 5).verdict for span in (exact, floor, range_)] == [
        "in",
        "cannot be said",
        "cannot be said",
    ]
    assert [Constraint("t", span, 4).verdict for span in (exact, floor, range_)] == ["out", "out", "cannot be said"]
    assert [Constraint("t", span, 6, at_least=True).verdict for span in (exact, floor, range_)] == [
        "out",
        *["cannot be said"] * 2,
    ]
    assert Constraint("t", Span(8, 9), 4).miss(sure=False) == 1 and Constraint("t", Span(8, 16), 4).miss() == 2
    more = Constraint("t", Span(1, 2), 4, at_least=True)
    assert (more.miss(), more.miss(sure=False)) == (2, 1) and Constraint("t", Span(8, math.inf), 4).miss() == math.inf
    assert Constraint("t", Span(1, 1), 0).miss() == math.inf


# ---------------------------------------------------------------- data


def test_every_fact_has_a_source_and_the_sums_are_right():
    bib = set(re.findall(r"^@\w+\{(\w+),", (data_path().parent / "references.bib").read_text(encoding="utf-8"), re.M))
    used = {key for one in models().values() for fact in one.facts.values() for key in fact.source}
    used |= {key for part in ("formats", "apis") for row in RAW[part].values() for key in row["source"]}
    used |= {key for row in RAW["workloads"] for key in row["source"]}
    assert used <= bib
    for row in RAW["models"].values():
        for fact in row["facts"].values():
            assert "figure" in fact or (fact["source"] and fact["tier"] in (*TIERS, "article") and "value" in fact)
    for one in models().values():
        assert {"released", "modality"} <= set(one.facts), one.id
        assert one.imaginary or one.formats, one.id
    for name, layers, experts, hidden, wide, total in (
        ("v4_flash", 43, 256, 4096, 2048, 284.33e9), ("v4_pro", 61, 384, 7168, 3072, 1573.0e9),
    ):  # fmt: skip
        expert = layers * experts * 3 * hidden * wide
        low, high = (expert * (0.5 + 1 / 32) + (total - expert) * per for per in (1, 2))
        stored = models()[name].span("weights")
        assert stored.low <= low * 1.001 and high <= stored.high * 1.001 and stored.high < 1.07 * stored.low
    v41 = models()["v41_flash"].span("weights")
    assert v41.low == pytest.approx(545.0e9 * (0.5 + 1 / 32) + 7.0e9 + 196.6e9, rel=1e-3)
    awq = published_figures.figure("deepseek_coder_1_3b", "int4_file_bytes").value
    coder = models()["coder_1_3b"].stored("int4")
    assert coder.low < awq < coder.high == pytest.approx(909_512_704, rel=1e-4)


def test_prices_are_those_of_the_day():
    assert [one.serves for one in offered("2025-09-17")] == ["DeepSeek-V3.1"]
    assert {one.serves for one in offered("2026-11-15")} == {"DeepSeek-V4.1-Flash", "DeepSeek-V4-Pro"}
    assert {one.serves for one in offered("2025-02")} == {"DeepSeek-V3", "DeepSeek-R1"}
    assert not offered("2024-12-31")


def test_each_recommendation_is_right_where_the_data_says_so():
    for row in document()["recommendations"]:
        assert row.get("right") or row.get("lacks"), row["claim"]
        Needs.of(row["asked"]["needs"])
        if right := row.get("right"):
            answer = choose(Needs.of(right["needs"]), right.get("wishes"))
            ranked = [r for r in answer.having("in") if r.points]
            level = {r.option.model.id for r in ranked if r.points.low <= ranked[0].points.low}
            assert level == {right.get("picks", row["picks"])}, row["claim"]


RESTS = {  # claim -> models of which it cannot be said, models that are in and have no score
    "s3.1-01": (2, 0), "s3.2-01": (2, 0), "s3.3-01": (4, 8), "s3.3-02": (4, 0), "s4.2-04": (1, 0), "s5-05": (4, 14),
    "s5-06": (2, 0), "s5-07": (0, 0),
}  # fmt: skip


def test_each_reason_says_how_much_of_it_rests_on_what_is_not_known():
    found = {}
    for row in document()["recommendations"]:
        if right := row.get("right"):
            answer = choose(Needs.of(right["needs"]), right.get("wishes"))
            states = {r.option.model.id: r.status for r in reversed(answer.rows)}
            ranked = {r.option.model.id for r in answer.rows if r.points}
            unsure = sum(state == "cannot be said" for state in states.values())
            found[row["claim"]] = unsure, sum(s == "in" and one not in ranked for one, s in states.items())
    assert found == RESTS
    rows = {row["claim"]: row for row in document()["recommendations"]}
    own = [claim for claim in RESTS if "picks" not in rows[claim]["right"]]
    assert len(own) == 7 and all(any(RESTS[claim]) for claim in own), "none of the seven is free of it"
    assert sum("kind" not in row for row in rows.values()) == 10 and not any("kind" in rows[claim] for claim in RESTS)


def asked(row):
    """The answers to a workload's question, as it is put first and again."""
    first = Needs.of(row["needs"])
    return choose(first), choose(replace(first, **row["again"]))


def test_real_workloads_are_answered_and_argued_with_as_the_rows_say():
    code, chats, day = RAW["workloads"]
    first, again = asked(code)
    open_, left = first.having("cannot be said"), again.having("cannot be said")
    assert (len(open_), len(left), len(first.having("in"))) == (13, 7, 0), code["disagree"]
    assert [row.option.model.id for row in left].count("coder_1_3b") == 3
    trace = {row["name"]: row for row in PRICES["workloads"]}["code completion"]
    assert (round(trace["tokens_in"]), round(trace["tokens_out"]), trace["requests"]) == (2048, 28, 8819)
    assert trace["peak_minute"] == 2.95

    served = published_figures.entries()["serving_gpustack"]
    tokens = served["chat_run"].value
    assert (round(tokens[0] / 1000), round(tokens[1] / 1000)) == (219, 201)
    gaps, four = served["thousand_gaps"].value, served["four_at_a_time"].value[:1]
    for answer, measured, floor, times in zip(asked(chats), (gaps, four), (1.7, 1.0), ([69, 38], [20]), strict=True):
        row = next(row for row in answer.rows if row.option.fmt == "float8")
        held = {test.name: test for test in row.tests}
        assert held["memory"].verdict == "in" and held["token_time"].verdict == "cannot be said"
        low = 1e3 * held["token_time"].span.low
        assert round(low, 1) == floor and [round(one / low) for one in measured] == times
        if answer.needs.users == 1000:
            assert round((held["memory"].limit - held["memory"].span.high) / 1e9) == 349
    assert round(671e9 / (8 * 4.8e12) * 1e3) == 17

    own, api = asked(day)
    node = next(row for row in own.having("in") if row.option.fmt == "float8")
    assert node.tests[-1].span.high == 40_320
    serving = published_figures.entries()["serving"]
    inside, cached, out = (serving[name].value for name in ("input_tokens", "cached_tokens", "output_tokens"))
    assert day["needs"]["requests"] * 1000 == inside and day["needs"]["answer"] == round(1000 * out / inside, 1)
    assert (serving["nodes"].value, serving["nodes_peak"].value) == (226.75, 278)
    assert serving["cost_usd_per_day"].value == 87_072 and "227 ran on average and 278 at" in day["disagree"]
    assert "119 ms" in chats["known"] and "69 times" in chats["disagree"] and "38 times" in chats["disagree"]
    price = next(r for r in PRICES["api_tokens"] if r["serves"] == "DeepSeek-R1")
    real = ((inside - cached) * price["input"] + cached * price["cached"] + out * price["output"]) / 1e6
    told = api.rows[0].tests[-1].span.low / 30
    assert real == pytest.approx(serving["revenue_usd_per_day"].value, rel=1e-3)
    assert round(told, -3) == 702_000 and round(100 * (told / real - 1)) == 25
    assert round(100 * cached / inside) == 56 and price["cached"] / price["input"] == pytest.approx(0.25, abs=0.01)


# ---------------------------------------------------------------- speed, changes


RUNS = [("a", "float16", x, 1 + x / 100) for x in (50.0, 100.0, 200.0)] + [("b", "float16", 100.0, 2.5)]
RUNS += [("a", "int4", 20.0, 0.4), ("a", "int4", 40.0, 0.8), ("c", "int4", 30.0, 1.2)]


def test_a_calibration_is_fitted_on_one_and_held_against_the_others():
    fit = calibrate(RUNS, "a", "H200", bandwidth=4e12)
    half, four = fit.fits["float16"], fit.fits["int4"]
    assert (half.start, half.rate, half.reach) == (pytest.approx(1), pytest.approx(100), (50.0, 200.0))
    assert (four.start, four.rate) == (pytest.approx(0, abs=1e-9), pytest.approx(50))
    assert dict(half.errors) == pytest.approx({"b": -0.2, "a, left out": 0}, abs=1e-6) and len(half.errors) == 4
    assert four.off == pytest.approx(1.0), "half as long as measured is off by a factor of 2"
    assert half.off == pytest.approx(0.25) and calibrate(RUNS[:3], "a", "H200", 4e12).fits["float16"].off < 1e-6
    assert calibrate(RUNS[-3:-1], "a", "H200", 4e12).fits["int4"].off == math.inf, "held against none"


def test_the_band_is_as_wide_as_the_worst_run_that_was_left_out():
    dice = random.Random(0)
    runs = [("a", "float16", x, (1 + x) * dice.uniform(0.9, 1.1)) for x in range(1, 10)]
    fit = calibrate(runs, "a", "H200", bandwidth=4e12).fits["float16"]
    for number, (_, _, moved, seconds) in enumerate(runs):
        left = calibrate(runs[:number] + runs[number + 1 :], "a", "H200", 4e12).fits["float16"]
        guess = left.seconds(moved)
        assert guess / (1 + fit.off) <= seconds * (1 + 1e-9) and seconds <= guess * (1 + fit.off) * (1 + 1e-9)


def test_a_speed_is_calibrated_only_where_that_may_be_trusted():
    needs = Needs(gpu="H200", token_time="10 ms", model="coder_1_3b")
    floor = {r.option.fmt: r.tests[-1].span for r in choose(needs).rows}
    close, wide = Fit(1e-3, 1e12, (2e9, 9e9), [("b", 0.1)]), Fit(0, 1e12, (0.5e9, 9e9), [("c", -0.375)])
    fit = Calibration("H200", 4e12, {"float16": close, "int4": wide, "float32": replace(close, reach=(1e9, 2e9))})
    found = {r.option.fmt: r.tests[-1].span for r in choose(needs, calibration=fit).rows}
    seconds = 1e-3 + (1346471936 * 2 + 1200 * 196608) / 1e12
    assert (found["float16"].low, found["float16"].high) == pytest.approx((seconds / 1.1, seconds * 1.1))
    assert found["float16"].basis == "measured" and floor["float16"].basis == "roofline"
    assert found["int4"].low == floor["int4"].low and "60%: not to be trusted" in found["int4"].formula
    assert "of 1 to 2 GB a step: not to be trusted" in found["float32"].formula and found["float32"].high == math.inf
    assert floor["float16"].high == math.inf and TRUST == 0.2
    here = Needs(gpu="my laptop", memory="16 GB", token_time="100 ms")
    mine = Calibration("my laptop", 20e9, {"int4": Fit(0, 15e9, (0.5e9, 2e9), [("b", 0.1)])})
    assert choose(here, {"token_time": 1}, mine).best.option.name == "DeepSeek-Coder-1.3B, int4, 1 x my laptop"


def test_what_would_change_the_answer():
    answer = choose(Needs(memory="2 GB", modality=("text",), where="own", prompt=500), {"memory": 1})
    assert answer.best.option.fmt == "int4"
    assert changes(answer)["memory / 2"] == "nothing for sure"
    for name, new in changes(answer).items():
        field, sign, factor = name.split()
        value = getattr(answer.needs, field) * (float(factor) if sign == "x" else 1 / float(factor))
        value = round(value) if field == "users" else value
        again = choose(replace(answer.needs, **{field: value}), answer.weights)
        assert again.first == new != answer.first


# ---------------------------------------------------------------- command line and bad input


def test_the_command_line(capsys, monkeypatch, tmp_path):
    assert command.main("--vram 24GB --modality image --licence commercial".split()) == 0
    assert "DeepSeek-VL2-tiny, float16, the memory given" in str(yaml.safe_load(capsys.readouterr().out)["in"])
    assert command.main("--vram 24 --modality picture --context 8000".split()) == 1
    miss = yaml.safe_load(capsys.readouterr().out)["nearest miss"]
    assert (
        miss["option"].startswith("Janus-Pro-1B") and "would pass if 4,096 were the limit" in miss["tests"]["context"]
    )
    asked = {"memory": "24 GB", "modality": ["text"], "where": "own", "wishes": {"memory": 1}}
    path = tmp_path / "needs.json"
    path.write_text(json.dumps(asked), encoding="utf-8")
    assert command.main(["--json", str(path)]) == 0
    found = json.loads(capsys.readouterr().out)
    best = choose(CHAT, {"memory": 1}).best
    assert found["in"][0]["option"] == best.option.name and found["in"][0]["points"] == [
        best.points.low,
        best.points.high,
    ]
    assert list(found["in"][0]["tests"]) == [test.name for test in best.tests]
    assert set(found) == {"first", "in", "cannot be said", "counts", "front", "nearest miss", "changes"}
    assert found["first"] == best.option.name
    monkeypatch.setattr("sys.stdin", io.StringIO('{"memory": 24}'))
    assert command.main(["--json", "-"]) == 2
    assert "unit" in capsys.readouterr().err
    assert command.main(["--gpu", "A100 90GB"]) == 2 and "A100_80GB" in capsys.readouterr().err
    for reserve, share in (((), "/ 0.9)"), (("--reserve", "0"), "/ 1)")):  # a zero is a number too
        assert command.main(["--vram", "24", *reserve]) == 0
        assert share in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        command.main(["--vram", "24", "--wish", "memory"])
    assert "NAME=NUMBER" in (told := capsys.readouterr().err) and "'memory'" in told
    assert command.main("--vram 24 --modality text --wish mmlu=0.5 --wish memory=0.5".split()) == 0
    known = yaml.safe_load(capsys.readouterr().out)["in"]
    assert len(known[0]["points"]) == 2 and "none, not known: mmlu" in known[-1]["points"]


@pytest.mark.parametrize(
    ("call", "first", "second"),
    [
        (lambda: choose(Needs()), "no constraint", "no wish"),
        (lambda: Needs(stay=True, where="api"), "where: got 'api'", "stay"),
        (lambda: Needs(context=100, prompt=90, answer=20), "context: got 100", "at least 110"),
        (lambda: Needs(gpu="H200", memory="24 GB"), "memory: got", "one of the two"),
        (lambda: Needs(gpu="A100 90GB"), "A100 90GB", "A100_80GB"),
        (lambda: choose(Needs(model="DeepSeek-V9")), "model: got 'DeepSeek-V9'", "DeepSeek-V"),
        (lambda: Needs(memory="24"), "memory: got '24'", "with a unit"),
        (lambda: Needs.of({"memory": 24}), "memory: got '24'", "24 GB"),
        (lambda: Needs(token_time="5 GB"), "token_time: got '5 GB'", "100 ms"),
        (lambda: Needs(memory=-1), "memory: got -1", "above 0"),
        (lambda: Needs.of({"memroy": "24 GB"}), "needs: got 'memroy'", "memory"),
        (lambda: Needs(modality=("video",)), "modality: got 'video'", "'image'"),
        (lambda: Needs(licence="GPL"), "licence: got 'GPL'", "permissive"),
        (lambda: Needs(score={"mmlu": 101}), "score['mmlu']: got 101", "0 to 100"),
        (lambda: Needs(users=0), "users: got 0", "at least 1"),
        (lambda: Needs(reserve=1.0), "reserve: got 1.0", "below 1"),
        (lambda: choose(CHAT, {"memory": 0.5}), "weights: got", "sum of 1"),
        (lambda: choose(CHAT, {"memory": 1.5, "context": -0.5}), "weights, context: got -0.5", "at least 0"),
        (lambda: choose(CHAT, {"speed": 1}), "weights: got 'speed'", "'token_time'"),
        (
            lambda: choose(CHAT, calibration=calibrate(RUNS, "a", "H200", 4e12)),
            "calibration: got one of 'H200'",
            "gpu None",
        ),
        (lambda: calibrate(RUNS, "z", "H200", 4e12), "on: got 'z'", "among the runs"),
        (lambda: calibrate(RUNS[:1], "a", "H200", 4e12), "runs of a, float16: got 1", "at least 2"),
        (lambda: calibrate([("a", "int4", 0.0, 1.0)], "a", "H200", 4e12), "bytes of a, int4: got 0", "above 0"),
        (lambda: facts.days("last week"), "date: got 'last week'", "2025-09-17"),
        (lambda: choose(Needs(memory="1 GB", day="2025-13")), "date: got '2025-13'", "a day or a month"),
        (lambda: facts.cache_bytes({"kind": "ring"}, 1), "kind: got 'ring'", "latent"),
        (lambda: models()["v3"].stored("int3"), "format: got 'int3'", "int4"),
        (lambda: Span(2, 1), "low, high: got 2 and 1", "at most"),
    ],
)
def test_bad_input_is_named(call, first, second):
    with pytest.raises(ValueError, match=re.escape(first)) as error:
        call()
    assert second in str(error.value)
