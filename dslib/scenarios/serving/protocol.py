"""What a client may ask for, and how a question is refused: the fields and errors of OpenAI's API.

The fields are those whose wish the engine can fulfil; any other is refused by name, as an answer that ignores half of a
question is worse than none. ``top_k``, ``repetition_penalty`` and ``ignore_eos`` come on top, as vLLM has them.

Source: the reference of OpenAI's API.
"""

import asyncio
from typing import Annotated, Any, Literal

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

Ids = Annotated[list[int], Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=200)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    include_usage: bool = False


class Common(Strict):
    """What both kinds of requests have."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    repetition_penalty: float = Field(1.0, gt=0)
    n: int = Field(1, ge=1, le=16)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    seed: int | None = Field(None, ge=0, lt=2**62)
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    user: str | None = None  # a note of the caller's; nothing is made of it

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class Completion(Common):
    """``prompt``: a text, its token ids, or several of either."""

    prompt: str | Ids | Annotated[list[str] | list[Ids], Field(min_length=1, max_length=256)]

    def prompts(self, tokenizer: Any) -> list[Ids]:
        one_alone = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        prompts = [self.prompt] if one_alone else self.prompt
        return [_ids(tokenizer, one) if isinstance(one, str) else one for one in prompts]

    def most(self, room: int) -> int:
        """Tokens that the answer may have."""
        return self.max_tokens or 16

    def said(self, text: str, first: bool) -> dict[str, Any]:
        """A piece of an answer, or all of it."""
        return {"text": text, "logprobs": None}


class Message(Strict):
    role: Literal["system", "user", "assistant"]
    content: str


class Chat(Common):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    def prompts(self, tokenizer: Any) -> list[Ids]:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("messages: this model has no chat template; use /v1/completions")
        said = [message.model_dump() for message in self.messages]
        return [_ids(tokenizer, tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False))]

    def most(self, room: int) -> int:
        """As many as there is ``room`` for, unless something is said."""
        return self.max_completion_tokens or self.max_tokens or max(room, 1)

    def said(self, text: str, first: bool) -> dict[str, Any]:
        if not self.stream:
            return {"message": {"role": "assistant", "content": text}}
        return {"delta": ({"role": "assistant"} if first else {}) | ({"content": text} if text else {})}


def _ids(tokenizer: Any, text: str) -> Ids:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def problem(status: int, message: str, field: str | None = None, headers: Any = None) -> JSONResponse:
    """An error in the form that clients of this API read."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": field, "code": None}
    return JSONResponse({"error": error}, status, headers=headers)


class Limits:
    """Around an application: a body of too many bytes gets status 413, one that does not come to its end 408."""

    def __init__(self, app: Any, most: int, seconds: float):
        self.app, self.most, self.seconds = app, most, seconds

    async def __call__(self, scope, receive, send):
        read, ended = 0, scope["type"] != "http"
        until = asyncio.get_running_loop().time() + self.seconds

        async def limited():
            nonlocal read, ended
            if ended:  # whoever asks now waits for the client to leave
                return await receive()
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError as error:
                raise HTTPException(408, f"body: not all of it came within {self.seconds:g} s") from error
            read += len(message.get("body", b""))
            if read > self.most:
                raise HTTPException(413, f"body: more than {self.most} bytes")
            ended = not message.get("more_body", False)
            return message

        await self.app(scope, limited, send)
