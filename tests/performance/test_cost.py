"""The bill: by hand, in its scaling laws, where it breaks even, with bad input, and from the command line."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dslib.data import published_figures
from dslib.performance import cost as module
from dslib.performance import prices, servers
from dslib.performance.cost import break_even, cost
from dslib.performance.servers import Replica, Traffic

FEW = settings(max_examples=60, deadline=None, derandomize=True, database=None)
NODE = Replica("H200", 8, prefill=10_000, decode=2_000)
DAY = Traffic(100_000, tokens_in=1000, tokens_out=500)


def close(value):
    return pytest.approx(value, rel=1e-9)


# ---------------------------------------------------------------- by hand


def test_a_bill_by_hand():
    # 0.1 + 0.25 s a request, 100,000 a day: 0.405 nodes busy; one node of 8 at $4 is $768 a day.
    bill = cost(DAY, NODE, 4.0)
    assert bill.replicas == (1,) and bill.gpus == 8
    assert bill.busy == close(100_000 * 0.35 / 86_400)
    assert bill.per_day == close(768) and bill.per_request == close(0.00768)
    assert bill.per_year == close(768 * 365)
    assert bill.per_million == close(768 / 150)
    assert bill.per_million_in == close(768 * (0.1 / 0.35) / 100) and bill.per_million_out == close(
        768 * (0.25 / 0.35) / 50
    )


def test_each_link_of_the_chain():
    ten = dataclasses.replace(DAY, requests_per_day=1_000_000)  # 4.05 nodes busy
    assert cost(ten, NODE, 4.0, utilisation=1.0).replicas == (5,)
    assert cost(ten, NODE, 4.0, utilisation=0.5).replicas == (9,)
    assert cost(dataclasses.replace(ten, peak=2), NODE, 4.0, utilisation=1.0).replicas == (9,)
    assert cost(ten, NODE, 4.0, utilisation=1.0, redundancy=2).replicas == (7,)
    apart = dataclasses.replace(NODE, apart=True)  # 1.16 for prompts, 2.89 for answers
    assert cost(ten, apart, 4.0, utilisation=1.0).replicas == (2, 3)
    assert cost(ten, apart, 4.0, utilisation=1.0, redundancy=1).replicas == (3, 4)
    assert cost(ten, dataclasses.replace(apart, at_least=12), 4.0, utilisation=1.0).replicas == (2, 10)
    assert cost(ten, NODE, 4.0, fixed_per_year=36_500).per_day - cost(ten, NODE, 4.0).per_day == close(100)
    assert cost(dataclasses.replace(ten, cached=1.0), NODE, 4.0, utilisation=1.0).replicas == (3,)
    fraction = cost(ten, NODE, 4.0, utilisation=0.5, whole=False)
    assert fraction.replicas[0] == close(1_000_000 * 0.35 / 86_400 / 0.5) and fraction.busy == close(0.5)


def test_a_load_that_is_whole_up_to_rounding_needs_no_further_replica():
    for nodes in range(1, 200):
        exact = Traffic(86_400 * nodes / 0.35 * 0.7, 1000, 500)
        assert cost(exact, NODE, 1.0, utilisation=0.7).replicas == (nodes,)


def test_prompts_or_answers_alone():
    only_in, only_out = Traffic(1000, 100, 0), Traffic(1000, 0, 100)
    assert cost(only_in, NODE, 1.0).per_million_out is None and cost(only_out, NODE, 1.0).per_million_in is None
    assert cost(only_in, dataclasses.replace(NODE, apart=True), 1.0, redundancy=1).replicas == (2, 0)


def test_the_serving_day_of_deepseek():
    """Tokens over published rates give the published nodes; nodes give the published cost; prices the revenue."""
    day = {name: figure.value for name, figure in published_figures.entries()["serving"].items()}
    tokens = Traffic(1.0, day["input_tokens"], day["output_tokens"])
    node = servers.published_replica("h800-deepseek")
    fleet = cost(tokens, node, 2.0, utilisation=1.0, whole=False)
    assert sum(fleet.replicas) == pytest.approx(day["nodes"], rel=2e-3)
    assert fleet.per_day == pytest.approx(day["cost_usd_per_day"], rel=2e-3)
    r1 = prices.api_price("DeepSeek-R1")
    revenue = r1.per_request(day["input_tokens"], day["output_tokens"], day["cached_tokens"] / day["input_tokens"])
    assert revenue == pytest.approx(day["revenue_usd_per_day"], rel=1e-3)
    ratio = (day["revenue_usd_per_day"] - day["cost_usd_per_day"]) / day["cost_usd_per_day"]
    assert ratio == pytest.approx(day["cost_profit_ratio"], abs=0.005)


# ---------------------------------------------------------------- laws

rates_st = st.floats(10, 1e5)
traffics = st.builds(
    Traffic, st.floats(1, 1e9), st.floats(1, 1e5), st.floats(1, 1e5), cached=st.floats(0, 1), peak=st.floats(1, 10)
)
replicas = st.builds(
    Replica, st.sampled_from(["A10", "H100_SXM", "H800"]), st.integers(1, 64), rates_st, rates_st,
    apart=st.booleans(), at_least=st.integers(1, 20),
)  # fmt: skip
options = st.fixed_dictionaries(
    {"utilisation": st.floats(0.05, 1), "redundancy": st.integers(0, 3), "fixed_per_year": st.floats(0, 1e6)}
)
rents = st.floats(0.1, 20)


@FEW
@given(traffics, replicas, rents, options, st.booleans())
def test_sums_agree(traffic, replica, rent, extra, whole):
    bill = cost(traffic, replica, rent, **extra, whole=whole)
    assert bill.per_year == close(bill.per_day * 365)
    assert bill.per_request * traffic.requests_per_day == close(bill.per_day)
    millions = traffic.requests_per_day / 1e6
    parts = bill.per_million_in * traffic.tokens_in * millions, bill.per_million_out * traffic.tokens_out * millions
    assert (
        sum(parts)
        == close(bill.per_day)
        == close(bill.per_million * (traffic.tokens_in + traffic.tokens_out) * millions)
    )
    assert bill.gpus == close(sum(bill.replicas) * replica.gpus) and 0 < bill.busy <= extra["utilisation"] * (1 + 1e-9)
    if whole:
        assert all(part == int(part) for part in bill.replicas) and sum(bill.replicas) >= replica.at_least


@FEW
@given(traffics, replicas, rents, options, st.floats(1, 100))
def test_dearer_with_price_volume_tokens_peak_and_idle_time(traffic, replica, rent, extra, times):
    day = cost(traffic, replica, rent, **extra).per_day * (1 - 1e-12)
    assert cost(traffic, replica, rent * times, **extra).per_day >= day
    for name in ("requests_per_day", "tokens_in", "tokens_out", "peak"):
        more = dataclasses.replace(traffic, **{name: getattr(traffic, name) * times})
        assert cost(more, replica, rent, **extra).per_day >= day, name
    assert cost(traffic, replica, rent, **extra | {"utilisation": extra["utilisation"] / times}).per_day >= day
    assert cost(traffic, replica, rent, **extra | {"redundancy": extra["redundancy"] + 1}).per_day > day


@FEW
@given(traffics, replicas, rents, st.floats(0.05, 1), st.floats(0.01, 100))
def test_straight_lines(traffic, replica, rent, utilisation, times):
    """Whole or not, the rent is proportional to its price; in fractions it is proportional to everything else too."""

    def per_day(price=rent, whole=False, busy=utilisation, copy=replica, **change):
        return cost(dataclasses.replace(traffic, **change), copy, price, utilisation=busy, whole=whole).per_day

    for whole in (True, False):
        assert per_day(rent * times, whole) == close(per_day(rent, whole) * times)
    assert per_day(requests_per_day=traffic.requests_per_day * times) == close(per_day() * times)
    assert per_day(busy=utilisation / 2) == close(2 * per_day())
    twice = dataclasses.replace(replica, prefill=2 * replica.prefill, decode=2 * replica.decode)
    assert per_day(copy=twice) == close(per_day() / 2)


@FEW
@given(traffics, replicas, rents, options)
def test_whole_replicas_cost_at_least_the_fraction_and_at_most_one_more_of_each_kind(traffic, replica, rent, extra):
    replica = dataclasses.replace(replica, at_least=1)
    whole, part = (cost(traffic, replica, rent, **extra, whole=kind) for kind in (True, False))
    one = replica.gpus * rent * 24
    assert part.per_day * (1 - 1e-9) <= whole.per_day <= part.per_day * (1 + 1e-9) + one * len(whole.replicas)


# ---------------------------------------------------------------- break-even


def test_break_even_by_hand():
    # A node of $768 a day pays off at 76,800 requests of one cent; 70 % busy, at 0.35 s each, it serves 172,800 a day.
    assert break_even(DAY, NODE, 4.0, 0.01, utilisation=0.7) == close(76_800)
    # At a tenth of a cent it would take 768,000.
    assert break_even(DAY, NODE, 4.0, 0.001, utilisation=0.7) is None
    # With a spare at $0.006 a request: two nodes need 256,000 and can 172,800; three need 384,000 and can 345,600;
    # four need 512,000 and can 518,400.
    assert break_even(DAY, NODE, 4.0, 0.006, utilisation=0.7, redundancy=1) == close(512_000)


@FEW
@given(traffics, replicas, rents, options, st.floats(1e-7, 1))
def test_break_even_is_the_first_volume_that_pays(traffic, replica, rent, extra, api):
    def at(volume):
        return cost(dataclasses.replace(traffic, requests_per_day=volume), replica, rent, **extra).per_request

    limit = cost(traffic, replica, rent, utilisation=extra["utilisation"], whole=False).per_request
    volume = break_even(traffic, replica, rent, api, **extra)
    if volume is None:
        assert limit >= api and all(at(10.0**power) > api for power in range(12))
    else:
        assert at(volume) <= api * (1 + 1e-9)
        assert all(at(volume * share) > api for share in (1e-6, 0.01, 0.3, 0.7, 0.9, 0.99, 0.99999))


@pytest.mark.parametrize("above", [1e-2, 1e-4, 1e-6, 1e-9, 1e-12])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("extra", [{}, {"redundancy": 2}, {"fixed_per_year": 1e6}])
def test_near_its_limit_break_even_takes_few_steps(monkeypatch, above, apart, extra):
    """A hair above the price of a fleet without idle time, millions of replicas have to share what is constant."""
    replica, bills = Replica("H200", 8, prefill=9_700, decode=2_310, apart=apart), []
    api = cost(DAY, replica, 4.0, whole=False).per_request * (1 + above)
    monkeypatch.setattr(module, "cost", lambda *a, **k: bills.append(cost(*a, **k)) or bills[-1])
    volume = break_even(DAY, replica, 4.0, api, **extra)
    assert len(bills) < 5000
    at = [cost(traffic(requests_per_day=volume * part), replica, 4.0, **extra).per_request for part in (1, 1 - 1e-6)]
    assert at[0] <= api * (1 + 2e-12) and at[1] > api * (1 - 2e-12)


def test_break_even_falls_with_the_price_of_the_api_and_takes_token_prices():
    found = [break_even(DAY, NODE, 4.0, usd, redundancy=1) for usd in (0.005, 0.006, 0.01, 0.1)]
    assert found == sorted(found, reverse=True)
    r1 = prices.api_price("deepseek-reasoner")
    assert break_even(DAY, NODE, 1.0, r1) == break_even(DAY, NODE, 1.0, r1.per_request(1000, 500))
    assert break_even(dataclasses.replace(DAY, requests_per_day=7), NODE, 4.0, 0.01) == break_even(DAY, NODE, 4.0, 0.01)


# ---------------------------------------------------------------- bad input

WRONG = [0, -1, math.nan, math.inf, -math.inf, "4", None, True]
BAD = [
    *((lambda v: traffic(requests_per_day=v), "requests_per_day", value) for value in WRONG),
    *((lambda v: dataclasses.replace(NODE, prefill=v), "prefill", value) for value in WRONG),
    *((lambda v: dataclasses.replace(NODE, decode=v), "decode", value) for value in WRONG),
    *((lambda v: dataclasses.replace(NODE, gpus=v), "gpus", value) for value in WRONG),
    *((lambda v: cost(DAY, NODE, v), "usd_per_gpu_hour", value) for value in WRONG),
    *((lambda v: cost(DAY, NODE, 4.0, utilisation=v), "utilisation", value) for value in [*WRONG, 1.01]),
    *((lambda v: break_even(DAY, NODE, 4.0, v), "api", value) for value in WRONG),
    *((lambda v: cost(DAY, NODE, 4.0, redundancy=v), "redundancy", value) for value in (-1, 0.5)),
    *((lambda v: traffic(tokens_out=v), "tokens_out", value) for value in (-1, math.nan)),
    (lambda v: traffic(tokens_in=v), "tokens_in", -1),
    (lambda v: traffic(tokens_in=v, tokens_out=0), "tokens to compute .*", 0.0),
    (lambda v: traffic(cached=1, tokens_out=v), "tokens to compute .*", 0.0),
    (lambda v: traffic(cached=v), "cached", 1.01),
    (lambda v: traffic(peak=v), "peak", 0.9),
    (lambda v: cost(DAY, NODE, 4.0, fixed_per_year=v), "fixed_per_year", -1),
    (lambda v: break_even(DAY, NODE, 4.0, 0.01, utilisation=v), "utilisation", 1.01),
    (lambda v: break_even(DAY, NODE, 4.0, 0.01, redundancy=v), "redundancy", -1),
    (lambda v: cost(Traffic(1e308, 1e308, 1), NODE, 1.0), "replicas kept busy", math.inf),
]


def traffic(**change):
    return dataclasses.replace(DAY, **change)


@pytest.mark.parametrize(("call", "name", "value"), BAD)
def test_numbers_out_of_range_are_named(call, name, value):
    with pytest.raises(ValueError, match=rf"^{name}: got {value!r}, expected (a number above|at least|a whole|0 to 1)"):
        call(value)


# ---------------------------------------------------------------- command line


def run(capsys, *arguments):
    status = module.main(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


OWN = ("--gpu", "h200", "--gpus", "8", "--prefill", "10000", "--decode", "2000", "--usd-per-hour", "4")
A100 = ("--gpu", "A100_80GB", "--gpus", "8", "--prefill", "5000", "--decode", "1000")


def test_the_command_prints_the_bill(capsys):
    status, out, err = run(capsys, "estimate", *OWN)
    lines = {line[:11].strip(): line[12:] for line in out.splitlines()}
    assert status == 0 and not err
    assert lines["a request"] == "$0.007680" and lines["a day"] == "$768.00" and lines["a year"] == "$280,320"
    assert lines["replica"] == "8 x H200: 10,000 prompt or 2,000 answer tokens/s [as given]"
    assert "busy 41%" in lines["fleet"] and lines["break-even"].startswith("never")
    assert max(map(len, out.splitlines())) < 160


def test_the_command_as_json_says_the_same_as_the_function(capsys):
    arguments = ("--json", "--server", "h100-large", "--per-day", "2e7", "--api", "deepseek-reasoner")
    found = json.loads(run(capsys, "estimate", *arguments)[1])
    bill = cost(Traffic(2e7, 1000, 500), servers.published_replica("h100-large"), prices.gpu_price("H100_SXM").usd)
    assert found["per_request"] == bill.per_request and found["replicas"] == list(bill.replicas)
    assert 0 < found["break_even"] < 2e7


def test_the_command_says_at_which_rent_it_would_pay(capsys):
    base = ("estimate", "--peak", "1.5", "--redundancy", "1", "--fixed", "1000")
    matching = json.loads(run(capsys, *base, "--json")[1])["matching_rent"]
    for times, pays in ((0.99, True), (1.01, False)):
        found = json.loads(run(capsys, *base, "--json", "--usd-per-hour", str(times * matching))[1])
        assert (found["break_even"] is not None) is pays and found["matching_rent"] == close(matching)
    assert f"below ${matching:.2f} an hour" in run(capsys, *base)[1]


def test_the_command_lists_prices(capsys):
    assert run(capsys, "prices", "A10")[1] == "A10 $0.75 an hour, Lambda, undated [lambda_catalog]  list, secondary\n"
    assert len(run(capsys, "prices")[1].splitlines()) == len(prices.gpu_prices()) + len(prices.api_prices())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--usd-per-hour", "nan"], "usd_per_gpu_hour: got nan"),
        (["--per-day", "1e308", "--tokens-in", "1e308"], "replicas kept busy: got inf"),
        (["--server", "h20"], "name: got 'h20', expected a published deployment, such as h200"),
        (["--gpu", "H20", "--prefill", "1", "--decode", "1"], "gpu: got 'H20', expected a GPU"),
        (["--gpu", "A100_80GB"], "prefill, decode: got none for another machine, expected both: h200 is 8 x H200"),
        (["--gpus", "0", "--prefill", "1", "--decode", "1"], "gpus: got 0"),
        (["--provider", "Lamda", "--server", "h100-4bit"], "provider: got 'Lamda', expected one with a price"),
        (["--api", "deepseek-caht"], "model: got 'deepseek-caht', expected one that prices.yml has a price for"),
        (["--parameters", "-1"], "parameters: got -1.0"),
        (["--parameters", "1e9", "--weights", "fp8"], "weights: got 'fp8', expected one of"),
        (["--parameters", "1e9", "--reserve", "1"], "reserve: got 1.0"),
    ],
)
def test_bad_arguments_end_with_2_and_a_sentence(capsys, arguments, message):
    status, out, err = run(capsys, "estimate", *arguments)
    assert status == 2 and not out
    assert err.startswith("python -m dslib.performance.cost: error: ") and message in err and err.count("\n") == 1


def test_what_does_not_fit_ends_with_1(capsys):
    status, out, err = run(capsys, "estimate", *A100, "--parameters", "671e9")
    assert status == 1 and not out
    assert err == "does not fit: gpus: got 8 x A100_80GB with 576 GB to use, expected at least 10 for 671.0 GB\n"
    assert run(capsys, "estimate", *A100, "--parameters", "671e9", "--weights", "int4")[0] == 0
    assert run(capsys, "estimate", "--parameters", "671e9")[0] == 0


def test_as_a_program():
    command = [sys.executable, "-m", "dslib.performance.cost"]
    helped = subprocess.run([*command, "estimate", "--help"], capture_output=True, text=True)
    assert helped.returncode == 0 and "--utilisation FLOAT" in helped.stdout and "(default: 0.7)" in helped.stdout
    for wrong in (["estimate", "--per-day", "many"], [], ["prices", "H20"]):
        assert subprocess.run([*command, *wrong], capture_output=True).returncode == 2
