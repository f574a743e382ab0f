"""The load generator: times from arrival on, real gaps, and a check by the server's own count."""

import itertools
import statistics

import pytest

from dslib.scenarios.realtime import Engine
from measured.experiments import realtime_load as lab

TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
2023-11-16 18:17:06.0319600,10,0
"""


def written(tmp_path, text=TRACE):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    return path


def test_a_trace_is_stretched_and_shortened_by_one_factor(tmp_path):
    first, second, third = lab.read_trace(written(tmp_path), factor=10)
    assert (first.at, first.prompt, first.answer) == (0, 481, 1)
    assert (second.at, second.prompt) == (pytest.approx(0.52), 318) and third.answer == 1
    assert [one.prompt for one in lab.read_trace(written(tmp_path), count=1, skip=1)] == [3180]
    evened = lab.evened([first, second, third])
    assert [(one.prompt, one.answer) for one in evened] == [(one.prompt, one.answer) for one in (first, second, third)]


def test_poisson_has_its_rate_and_its_spread():
    asks = lab.poisson(4, [(1, 1)] * 4000)
    gaps = [after.at - before.at for before, after in itertools.pairwise(asks)]
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.06)
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(1, rel=0.06)


def life(at, *tokens, answer=None, **more):
    return lab.Life(lab.Ask(at, 1, len(tokens) if answer is None else answer), tokens=list(tokens), **more)


def test_a_report_counts_from_arrival_and_pools_gaps():
    lives = [life(0, 1.0, 1.1, 1.3), life(1, 0.2), life(2, 0.4, 0.9), life(3, problem="status 429", answer=4)]
    found = lab.report(lab.Run(lives, [1, 2], 4.0), ttft=0.5, tpot=0.2)
    assert found["ttft"]["p50"][0] == 0.4 and found["e2e"]["p50"][0] == 0.9
    assert found["itl"]["p50"][0] == pytest.approx(0.2) and found["tpot"]["p50"][0] == pytest.approx((0.15 + 0.5) / 2)
    assert (found["requests"], found["failed"], found["good"]) == (4, 1, 0.25)  # the second: no gap, and soon
    assert found["goodput"] == pytest.approx(1 / 3)
    assert found["little"] == {"watched": 1.5, "rate x time": (1.3 + 0.2 + 0.9) / 4}
    warm = lab.report(lab.Run(lives, [1, 2], 4.0), ttft=0.5, tpot=0.2, skip=1)["little"]
    assert warm == found["little"]  # the server was watched while it warmed up, too
    low, high = found["ttft"]["p90"][1:]
    assert low < found["ttft"]["p90"][0] <= high
    nothing = lab.report(lab.Run(lives, [1], 4.0), ttft=1e-9, tpot=1e-9)
    assert nothing["goodput"] == nothing["good"] == 0 and nothing["ttft"] == found["ttft"]


def test_the_knee_is_the_last_rate_before_the_first_that_fails():
    assert lab.knee([(4, 0.5), (1, 1.0), (2, 0.95), (8, 0.99)]) == 2
    assert lab.knee([(1, 0.2)]) is None


def test_a_server_under_load(model, tokenizer, start):
    with start(Engine(model, 400, max_batch=8, tokenizer=tokenizer)) as server:
        asks = lab.poisson(40, [(10, 8)] * 60)
        run = lab.drive(server.url, "tiny", asks)
        found = lab.report(run, ttft=5, tpot=5, skip=5)
        assert found["failed"] == 0 and found["good"] == 1 and found["requests"] == 55
        assert all(0 <= one.sent <= one.tokens[0] for one in run.lives)
        assert found["ttft"]["p50"][0] < found["e2e"]["p50"][0]
        full = lab.drive(server.url, "other", asks[:2])
        assert [one.problem for one in full.lives] == ["status 404"] * 2


def test_a_stall_is_seen_by_all_who_came_meanwhile(model, tokenizer, start, monkeypatch):
    engine = Engine(model, 400, max_batch=8, tokenizer=tokenizer)
    with start(engine) as server:
        plan, stalls = engine.scheduler.plan, iter([0.6])
        monkeypatch.setattr(engine.scheduler, "plan", lambda: lab.time.sleep(next(stalls, 0)) or plan())
        run = lab.drive(server.url, "tiny", [lab.Ask(0.02 * n, 4, 1) for n in range(20)])
    assert sum(one.tokens[0] > 0.15 for one in run.lives) > 15


def test_a_sweep_reports_every_rate():
    slow, quick = lab.sweep("tiny-deepseek", rates=(20, 40), count=12)
    assert (slow["rate"], quick["rate"]) == (20, 40) and slow["failed"] == quick["failed"] == 0
    with pytest.raises(RuntimeError, match="expected smollm2"), lab.serving("gpt"):
        pass


@pytest.mark.parametrize(("call", "words"), [
    (lambda path: lab.poisson(0, [(1, 1)]), "rate"),
    (lambda path: lab.sweep(rates=(1, 0)), "rates.1."),
    (lambda path: lab.sweep(count=10), "count"),
    (lambda path: lab.poisson(1, [(0, 1)]), "prompt"),
    (lambda path: lab.read_trace(written(path), factor=0), "factor"),
    (lambda path: lab.read_trace(written(path, "a,b\n")), "line 1: expected TIMESTAMP"),
    (lambda path: lab.read_trace(written(path, TRACE + "2023-11-16 18:17:07,5\n")), "line 5: got '2023"),
    (lambda path: lab.read_trace(written(path, TRACE + "soon,5,5\n")), "line 5: got 'soon,5,5'"),
    (lambda path: lab.read_trace(written(path, TRACE + "2023-11-16 18:17:03.98,5,5\n")), "later moment"),
    (lambda path: lab.drive("http://example.org", "m", [lab.Ask(0, 1, 1)]), "this machine"),
    (lambda path: lab.drive("http://127.0.0.1:1", "m", []), "1 to 10,000"),
    (lambda path: lab.drive("http://127.0.0.1:1", "m", [lab.Ask(999, 1, 1)]), "within 600 s"),
    (lambda path: lab.report(lab.Run([life(0, 1.0)], [1], 1.0), ttft=0, tpot=1), "ttft"),
    (lambda path: lab.report(lab.Run([life(0, 1.0)], [1], 1.0), ttft=1, tpot=1, skip=1), "skip"),
])  # fmt: skip
def test_bad_calls_are_refused_by_name(tmp_path, call, words):
    with pytest.raises(ValueError, match=words):
        call(tmp_path)
