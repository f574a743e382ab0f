"""The engine behind an address: what clients of OpenAI's API can talk to.

The engine steps in a thread of its own (:mod:`~dslib.scenarios.serving.runner`). The server reads requests, hands them
over, and passes events on as text; it never waits for a step::

    client  --POST-->  server  --add-->  engine's thread:  while busy: step()
    client  <--text--  server  <-event-

A client that reads slowly keeps nobody waiting, as events wait in an inbox of its own; one that leaves gives its blocks
back before the next step. More requests than may wait get status 429, and what cannot be served 400, with the field.

    app = create_app(Engine(model, tokenizer=tokenizer, max_waiting=64), "smollm2")

Book: ``chapters/scenarios/load.ipynb``. Source: the reference of OpenAI's API for paths, fields and errors.
"""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response, StreamingResponse
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException as Refused

from dslib.architecture.generation import Sampling
from dslib.scenarios.serving import engine as serving
from dslib.scenarios.serving.protocol import Chat, Completion, Limits, problem
from dslib.scenarios.serving.runner import Answer, Runner
from dslib.scenarios.serving.words import Words

FINISH = {"eos": "stop", "stop": "stop", "length": "length"}


def create_app(
    engine: serving.Engine, name: str, *, api_key: str | None = None, max_body: int = 1 << 20, seconds: float = 10
) -> FastAPI:
    """The server of one model, which clients call ``name``; the engine needs a tokenizer (ValueError).

    Paths: ``/v1/models``, ``/v1/completions``, ``/v1/chat/completions``, and ``/metrics`` for Prometheus. With an
    ``api_key`` those under ``/v1`` want it as a bearer token. A body may have ``max_body`` bytes and take ``seconds``.
    """
    if engine.tokenizer is None:
        raise ValueError("engine: made without a tokenizer, expected one with it")
    runner, began = Runner(engine), int(time.time())

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        runner.start()
        yield
        await asyncio.to_thread(runner.stop)

    async def guard(call: Request) -> None:
        given = call.headers.get("authorization", "").removeprefix("Bearer ").encode("latin-1")
        if api_key is not None and not secrets.compare_digest(given, api_key.encode()):
            raise HTTPException(401, "authorization: expected this server's key as a bearer token")

    app = FastAPI(title=f"dslib: {name}", lifespan=lifespan)
    app.add_middleware(Limits, most=max_body, seconds=seconds)
    app.exception_handler(RequestValidationError)(unfit)
    app.exception_handler(Refused)(refused)

    @app.get("/v1/models", dependencies=[Depends(guard)])
    async def models():
        return {"object": "list", "data": [{"id": name, "object": "model", "created": began, "owned_by": "dslib"}]}

    @app.get("/metrics")
    async def metrics():
        return Response(generate_latest(runner.meters.registry), media_type="text/plain; version=0.0.4")

    @app.post("/v1/completions", dependencies=[Depends(guard)])
    async def completions(body: Completion, call: Request):
        return await respond(runner, name, body, call)

    @app.post("/v1/chat/completions", dependencies=[Depends(guard)])
    async def chat(body: Chat, call: Request):
        return await respond(runner, name, body, call)

    return app


async def respond(runner: Runner, name: str, body: Completion | Chat, call: Request) -> Response | dict:
    """Hand the request over, then answer in pieces or in one."""
    if body.model != name:
        raise HTTPException(404, f"model: got {body.model!r}, this server has {name!r}")
    answer = Answer(runner)
    try:
        requests = requests_of(body, runner.engine)
        await asyncio.wrap_future(runner.call(runner.add, requests, answer))
    except serving.QueueFull as error:
        raise HTTPException(429, str(error), {"Retry-After": "1"}) from error
    except ValueError as error:
        said = str(error).replace("prompts[0]", "prompt")
        return problem(400, said, said.partition(":")[0])
    reply = Reply(body, name, requests, answer, runner.engine.tokenizer)
    if body.stream:
        return Stream(reply.lines(), answer)
    ending, leaving = asyncio.ensure_future(reply.all()), asyncio.ensure_future(gone(call))
    try:
        await asyncio.wait({ending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return ending.result() if ending.done() else Response(status_code=499)  # which nobody reads
    except RuntimeError as error:
        return problem(500, str(error))
    finally:
        answer.close()
        ending.cancel()
        leaving.cancel()


def requests_of(body: Completion | Chat, engine: serving.Engine) -> list[serving.Request]:
    """The engine's requests, ``n`` for each prompt. Raises ValueError."""
    pool, ends = engine.scheduler.pool, None if body.ignore_eos else engine.tokenizer.eos_token_id
    room = min(engine.model.config.max_position_embeddings, pool.num_blocks * pool.size + 1)
    sampling = Sampling(body.temperature, body.top_k, body.top_p, None, body.repetition_penalty)
    seed = secrets.randbits(62) if body.seed is None else body.seed
    return [
        serving.Request(prompt, body.most(room - len(prompt)), ends, sampling, seed + k, tuple(body.stops))
        for prompt in body.prompts(engine.tokenizer)
        for k in range(body.n)
    ]


class Reply:
    """Events of the engine in the words of the API."""

    def __init__(self, body: Completion | Chat, name: str, requests: list, answer: Answer, tokenizer) -> None:
        self.body, self.answer = body, answer
        self.words = [Words(tokenizer, body.stops) for _ in requests]
        self.used = {"prompt_tokens": sum(len(one.prompt) for one in requests[:: body.n]), "completion_tokens": 0}
        kind, short = ("chat.completion", "chatcmpl") if isinstance(body, Chat) else ("text_completion", "cmpl")
        kind += ".chunk" if body.stream and isinstance(body, Chat) else ""
        self.head = {
            "id": f"{short}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": name
        }  # fmt: skip

    async def pieces(self) -> AsyncIterator[tuple[int, str, str | None]]:
        """(number of the choice, text, how it ends); RuntimeError if one of them fails."""
        async for number, event in self.answer:
            if event.finish not in (None, *FINISH):
                raise RuntimeError(event.error or event.finish)
            self.used["completion_tokens"] += 1
            text = "" if event.finish == "eos" else self.words[number].add(event.token)
            yield number, text + (self.words[number].rest() if event.finish else ""), FINISH.get(event.finish)

    async def lines(self) -> AsyncIterator[str]:
        """Server-sent events, a chunk for each token, whether it has text yet or not: so a client can measure."""
        fresh, options = set(range(len(self.words))), self.body.stream_options
        try:
            async for number, text, finish in self.pieces():
                choice = {"index": number, "finish_reason": finish} | self.body.said(text, number in fresh)
                fresh.discard(number)
                yield f"data: {json.dumps(self.head | {'choices': [choice]})}\n\n"
            if options and options.include_usage:
                yield f"data: {json.dumps(self.head | {'choices': []} | self.usage())}\n\n"
            yield "data: [DONE]\n\n"
        except RuntimeError as error:
            yield f"data: {problem(500, str(error)).body.decode()}\n\n"

    async def all(self) -> dict:
        ends = {number: finish async for number, _, finish in self.pieces() if finish}
        choices = [
            {"index": number, "finish_reason": ends[number]} | self.body.said(one.text, True)
            for number, one in enumerate(self.words)
        ]
        return self.head | {"choices": choices} | self.usage()

    def usage(self) -> dict:
        return {"usage": self.used | {"total_tokens": sum(self.used.values())}}


class Stream(StreamingResponse):
    """Text as it comes. However the response ends, also before its first word, the answer is closed."""

    def __init__(self, lines: AsyncIterator[str], answer: Answer):
        super().__init__(lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.answer = answer

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answer.close()


async def gone(call: Request) -> None:
    """Returns when the client has left; its body was read before."""
    while (await call.receive())["type"] != "http.disconnect":
        pass


async def unfit(call: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    if first["type"] == "json_invalid" or len(first["loc"]) < 2:
        return problem(400, f"body: {first['msg']}", "body")
    field = first["loc"][1]  # of several forms that it may have, the last of those that fit longest
    found = max((one for one in error.errors()[::-1] if one["loc"][1] == field), key=lambda one: len(one["loc"]))
    return problem(400, f"{field}: {found['msg']}", str(field))


async def refused(call: Request, error: Refused) -> Response:
    return problem(error.status_code, error.detail, headers=error.headers)
