"""The server as its clients see it: OpenAI's own client, and clients that misbehave."""

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from http.client import HTTPResponse

import httpx
import openai
import pytest

from dslib import serve
from dslib.architecture.generation import Sampling, generate
from dslib.data import corpus
from dslib.scenarios.realtime import Engine
from dslib.scenarios.serving.server import create_app

BLOCKS = 400


@pytest.fixture(scope="module")
def server(model, tokenizer, start):
    with start(Engine(model, BLOCKS, max_batch=8, tokenizer=tokenizer)) as made:
        yield made


@pytest.fixture
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def alone(model, tokenizer):
    def made(prompt, count, **options):
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        [text] = generate(model, [ids], count, eos_token_id=tokenizer.eos_token_id, **options)
        return tokenizer.decode(text.tokens, skip_special_tokens=True)

    return made


def streamed(chunks):
    return "".join(one.choices[0].text for one in chunks if one.choices)


def test_models_are_listed(client):
    assert [one.id for one in client.models.list()] == ["tiny"]


def test_a_completion_is_what_generate_writes(client, alone):
    made = client.completions.create(model="tiny", prompt="A ship", max_tokens=12, temperature=0)
    assert made.choices[0].text == alone("A ship", 12)
    assert made.choices[0].finish_reason == "length"
    assert made.usage.completion_tokens == 12 and made.usage.total_tokens == 12 + made.usage.prompt_tokens


def test_a_stream_has_the_same_text_and_says_what_it_used(client, alone):
    asked = {"model": "tiny", "prompt": "A ship", "max_tokens": 30, "temperature": 0}
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert streamed(chunks) == alone("A ship", 30)
    assert chunks[-1].usage.completion_tokens == 30 and not chunks[-1].choices
    assert [one.choices[0].finish_reason for one in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert len({one.id for one in chunks}) == 1


def test_a_chat_goes_through_the_models_template(client, alone):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    wanted = alone("<system>Be brief.\n<user>Who?\n<assistant>", 9)
    asked = {"model": "tiny", "messages": messages, "max_completion_tokens": 9, "temperature": 0}
    made = client.chat.completions.create(**asked)
    assert (made.choices[0].message.role, made.choices[0].message.content) == ("assistant", wanted)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant" and {one.object for one in chunks} == {
        "chat.completion.chunk"
    }
    assert "".join(one.choices[0].delta.content or "" for one in chunks) == wanted


def test_several_prompts_and_choices_come_in_order(client, alone, tokenizer):
    ids = tokenizer("The sea", add_special_tokens=False).input_ids
    made = client.completions.create(model="tiny", prompt=["A ship", "The sea"], max_tokens=6, temperature=0, n=2)
    wanted = [alone("A ship", 6)] * 2 + [alone("The sea", 6)] * 2
    assert [one.text for one in made.choices] == wanted and [one.index for one in made.choices] == [0, 1, 2, 3]
    assert made.usage.prompt_tokens == len(ids) + len(tokenizer("A ship").input_ids)
    again = client.completions.create(model="tiny", prompt=[ids, ids], max_tokens=6, temperature=0)
    assert [one.text for one in again.choices] == wanted[2:]


def test_a_seed_gives_the_text_of_generate_with_that_seed(client, alone):
    asked = {"model": "tiny", "prompt": "A ship", "max_tokens": 10, "temperature": 1.5, "top_p": 0.9}
    made = client.completions.create(**asked, seed=7, n=2, extra_body={"top_k": 50})
    sampling = Sampling(1.5, top_k=50, top_p=0.9)
    assert [one.text for one in made.choices] == [alone("A ship", 10, sampling=sampling, seed=s) for s in (7, 8)]
    assert len({client.completions.create(**asked).choices[0].text for _ in range(3)}) > 1


def test_a_stop_string_is_cut_off_and_never_shown_in_part(client, alone):
    whole = alone("A ship", 30)
    middle = next(whole[at : at + 3] for at in range(8, len(whole)) if whole.find(whole[at : at + 3]) == at)
    asked = {"model": "tiny", "prompt": "A ship", "max_tokens": 30, "temperature": 0, "stop": ["☃", middle]}
    made = client.completions.create(**asked)
    assert made.choices[0].text == whole[: whole.find(middle)] and made.choices[0].finish_reason == "stop"
    assert streamed(client.completions.create(**asked, stream=True)) == made.choices[0].text


def test_fifty_streams_at_once(server, alone):
    prompts = [f"Ship {number}" for number in range(50)]

    async def one(client, prompt):
        chunks = await client.completions.create(model="tiny", prompt=prompt, max_tokens=12, temperature=0, stream=True)
        return "".join([chunk.choices[0].text async for chunk in chunks])

    async def all_of_them():
        async with server.client(openai.AsyncOpenAI) as client:
            return await asyncio.gather(*(one(client, prompt) for prompt in prompts))

    assert asyncio.run(all_of_them()) == [alone(prompt, 12) for prompt in prompts]
    assert server.settles()


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_gives_the_blocks_back(server, stream):
    before = server.meters()
    with contextlib.suppress(httpx.ReadTimeout):
        body = {"model": "tiny", "prompt": "A ship", "max_tokens": 590, "temperature": 0, "stream": stream}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=0.1) as answer:
            next(answer.iter_lines())
    name, until = "dslib_requests_total cancelled", time.monotonic() + 5
    while (now := server.meters().get(name, 0)) == before.get(name, 0) and time.monotonic() < until:
        time.sleep(0.02)
    assert now == before.get(name, 0) + 1 and server.settles(3)


def raw(server, body, head="", length=None):
    """A connection on which a request was sent, and nothing is read."""
    made = socket.create_connection(("127.0.0.1", server.port))
    length = len(body) if length is None else length
    made.sendall(
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{head}"
        f"Content-Length: {length}\r\n\r\n".encode()
        + body
    )
    return made


def test_who_never_reads_holds_nobody_up(server, client, alone):
    body = {"model": "tiny", "prompt": ["A ship"] * 8, "max_tokens": 60, "temperature": 0, "stream": True}
    with contextlib.closing(raw(server, json.dumps(body).encode())):
        made = client.completions.create(model="tiny", prompt="The sea", max_tokens=5, temperature=0)
        assert made.choices[0].text == alone("The sea", 5)
        assert server.settles()


def test_half_a_body_is_waited_for_a_while(model, tokenizer, start):
    with start(Engine(model, BLOCKS, tokenizer=tokenizer), seconds=0.3) as server:
        raw(server, b'{"model": "ti', length=100).close()  # left
        with contextlib.closing(raw(server, b'{"model": "ti', length=100)) as waits:
            answer = HTTPResponse(waits)
            answer.begin()  # the body may come after the head, in a packet of its own
            assert answer.status == 408 and "within 0.3 s" in answer.read().decode()
        assert server.post({"model": "tiny", "prompt": "A", "max_tokens": 1}).status_code == 200


def test_a_full_queue_is_429_and_heals(model, tokenizer, start):
    with start(Engine(model, BLOCKS, max_batch=1, max_waiting=2, tokenizer=tokenizer)) as server:
        client, asked = server.client(), {"model": "tiny", "prompt": "A ship", "temperature": 0}
        with client.completions.create(**asked, max_tokens=500, stream=True) as busy:
            next(iter(busy))
            with pytest.raises(openai.RateLimitError, match="wait already") as refused:
                client.completions.create(**asked, max_tokens=500, n=3)  # all of it or nothing
            assert refused.value.response.headers["retry-after"] == "1"
        assert server.settles()
        assert client.completions.create(**asked, max_tokens=2, n=2).usage.completion_tokens == 4


COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
BAD = [
    ({"prompt": None}, 400, "prompt", "prompt"),
    ({"prompt": ""}, 400, "prompt", "token"),
    ({"prompt": []}, 400, "prompt", "prompt"),
    ({"prompt": [4096]}, 400, "prompt", "4096"),
    ({"prompt": [[1], []]}, 400, "prompt", "at least 1 item"),
    ({"prompt": "word " * 700}, 400, "prompt", "600"),
    ({"max_tokens": 0}, 400, "max_tokens", "greater"),
    ({"max_tokens": "9"}, 400, "max_tokens", "integer"),
    ({"max_tokens": 600}, 400, "prompt", "600"),
    ({"temperature": -1}, 400, "temperature", "greater"),
    ({"temperature": "hot"}, 400, "temperature", "number"),
    ({"top_p": 0}, 400, "top_p", "greater"),
    ({"n": 17}, 400, "n", "less"),
    ({"stop": [""]}, 400, "stop", "character"),
    ({"seed": -1}, 400, "seed", "greater"),
    ({"stream": "yes"}, 400, "stream", "boolean"),
    ({"best_of": 2}, 400, "best_of", "not permitted"),
    ({"model": "gpt"}, 404, None, "'tiny'"),
]


@pytest.mark.parametrize(("change", "status", "field", "words"), BAD)
def test_what_cannot_be_served_is_refused_by_name(server, change, status, field, words):
    answer = server.post({"model": "tiny", "prompt": "A ship", "max_tokens": 2} | change)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, field) and words in error["message"]
    assert error["type"] == "invalid_request_error" and "/" not in error["message"].replace("/v1/", "")


def test_other_bodies_and_paths(server):
    url = f"{server.url}{COMPLETION}"
    assert (
        httpx.post(url, content=b"{", headers={"content-type": "application/json"}).json()["error"]["param"] == "body"
    )
    assert httpx.post(url, content=b"x" * (1 << 20) + b"x").status_code == 413
    assert httpx.post(url, content=iter([b"x" * 700_000] * 2)).status_code == 413  # in chunks, its length not told
    assert httpx.get(url).json()["error"]["message"] == "Method Not Allowed"
    assert httpx.get(f"{server.url}/v2").status_code == 404
    assert server.post({"model": "tiny", "messages": []}, CHAT).json()["error"]["param"] == "messages"
    asked = {"model": "tiny", "messages": [{"role": "tool", "content": "x"}]}
    assert server.post(asked, CHAT).status_code == 400


def test_a_model_without_a_chat_template_says_so(model, start):
    with start(Engine(model, BLOCKS, tokenizer=corpus.tokenizer())) as server:
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            server.client().chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}])


def test_a_key_is_asked_for(model, tokenizer, start):
    with start(Engine(model, BLOCKS, tokenizer=tokenizer), api_key="clé") as server:
        for key in ("none", "cl"):
            with pytest.raises(openai.AuthenticationError):
                server.client(key=key).models.list()
        ask = {"authorization": "Bearer clé".encode()}
        assert server.post({"model": "tiny", "prompt": "A"}, headers=ask).status_code == 200
        assert httpx.get(f"{server.url}/metrics").status_code == 200
    with pytest.raises(ValueError, match="tokenizer"):
        create_app(Engine(model, BLOCKS), "tiny")


def test_meters_count_what_was_done(model, tokenizer, start):
    with start(Engine(model, BLOCKS, tokenizer=tokenizer)) as server:
        made = [server.client().completions.create(model="tiny", prompt="A ship", max_tokens=n + 1) for n in range(4)]
        found = server.meters()
        assert found["dslib_generation_tokens_total"] == sum(one.usage.completion_tokens for one in made)
        assert found["dslib_prompt_tokens_total"] == sum(one.usage.prompt_tokens for one in made)
        assert found["dslib_time_to_first_token_seconds_count"] == found["dslib_request_seconds_count"] == 4
        assert found["dslib_inter_token_latency_seconds_count"] == found["dslib_generation_tokens_total"] - 4
        assert found["dslib_cache_usage_ratio"] == found["dslib_requests_running"] == 0
        assert not server.engine.lives and not server.engine.batch  # nothing grows for ever


def test_a_fault_ends_its_requests_and_no_others(model, tokenizer, monkeypatch, caplog, start):
    with start(Engine(model, BLOCKS, tokenizer=tokenizer)) as server:
        asked = {"model": "tiny", "prompt": "A ship", "max_tokens": 3}
        with monkeypatch.context() as at_once:
            at_once.setattr(model.norm, "forward", lambda x: x * float("nan"))
            assert "NaN" in server.post(asked).json()["error"]["message"]
            assert '"type": "server_error"' in server.post(asked | {"stream": True}).text.replace('":"', '": "')
        with monkeypatch.context() as at_once:
            at_once.setattr(server.engine.scheduler, "plan", lambda: 1 / 0)
            assert server.post(asked).status_code == 500 and "a step failed" in caplog.text
        assert server.post(asked).status_code == 200 and server.settles()


def started(*arguments):
    process = subprocess.Popen(
        [sys.executable, "-m", "dslib.serve", "--model", "tiny-deepseek", *arguments], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return process, process.stdout.readline()


def test_the_command_serves_and_lets_what_runs_come_to_its_end(capsys):
    process, said = started("--port", "0")
    assert said.startswith("tiny-deepseek at http://127.0.0.1:"), said
    url = said.split()[2].removesuffix(";")
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    chunks = iter(client.completions.create(model="tiny-deepseek", prompt="The", max_tokens=200, stream=True))
    next(chunks)
    assert serve.main(["--model", "tiny-deepseek", "--port", url.split(":")[2].removesuffix("/v1")]) == 1
    assert "cannot listen at 127.0.0.1" in capsys.readouterr().err
    process.send_signal(signal.SIGINT)
    assert [one.choices[0].finish_reason for one in chunks][-1] in ("length", "stop")
    assert process.wait(10) == 0 and process.stdout.read() == ""


def test_the_command_refuses_what_it_does_not_know(capsys, tmp_path):
    assert serve.main(["--model", "gpt", "--port", "0"]) == 1
    assert "expected smollm2, tiny-deepseek or a folder" in capsys.readouterr().err
    assert serve.main(["--model", str(tmp_path), "--port", "0"]) == 1
    assert "cannot listen" not in capsys.readouterr().err
    assert serve.main(["--model", "tiny-deepseek", "--port", "70000"]) == 1
    assert "cannot listen at 127.0.0.1:70000" in capsys.readouterr().err
    assert serve.main(["--model", "tiny-deepseek", "--port", "0", "--slots", "0"]) == 1
    assert "max_batch" in capsys.readouterr().err
