"""``python -m dslib.serve``: a model behind an address, for any client of OpenAI's API.

    python -m dslib.serve                               # SmolLM2 at http://127.0.0.1:8000/v1
    python -m dslib.serve --model tiny-deepseek --port 8001
    python -m dslib.serve --model path/to/a/checkpoint --host 0.0.0.0 --api-key "$KEY"

No hub and no account: both named models come with the course. It listens to this machine alone unless told otherwise.
Ctrl-C, or SIGTERM, lets what runs come to its end; a second one does not.

Book: ``chapters/scenarios/load.ipynb``.
"""

import argparse
import contextlib
import socket
import sys
from pathlib import Path

import uvicorn

from dslib import fast
from dslib.architecture import whole
from dslib.architecture.weights.pretrained import WeightsNotFound, load_folder, load_smollm2
from dslib.scenarios.realtime import Engine
from dslib.scenarios.serving.server import create_app


def load(name: str):
    """Model and tokenizer of a name or a folder. Raises WeightsNotFound or ValueError."""
    if name == "smollm2":
        return load_smollm2()
    if name == "tiny-deepseek":
        model, tokenizer = whole.load()
        return model.decoder, tokenizer
    if not Path(name).is_dir():
        raise ValueError(f"--model: got {name!r}, expected smollm2, tiny-deepseek or a folder with a checkpoint")
    return load_folder(name)


def main(arguments: list[str] | None = None) -> int:
    ask = argparse.ArgumentParser("python -m dslib.serve", description="A model behind an OpenAI-compatible address.")
    ask.add_argument("--model", default="smollm2", help="smollm2, tiny-deepseek, or a folder (default: smollm2)")
    ask.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for everybody (default: this machine alone)")
    ask.add_argument("--port", type=int, default=8000)
    ask.add_argument("--api-key", help="clients have to send it as a bearer token")
    ask.add_argument("--slots", type=int, default=8, help="texts that are written at once (default: 8)")
    ask.add_argument("--blocks", type=int, default=1024, help="of the cache, 16 tokens each (default: 1024)")
    ask.add_argument("--chunk", type=int, default=256, help="tokens of prompts that a step reads (default: 256)")
    ask.add_argument("--waiting", type=int, default=64, help="requests that may wait; others get 429 (default: 64)")
    given = ask.parse_args(arguments)
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:  # before the model is read, which takes longer
        listening.bind((given.host, given.port))
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", error)
        print(f"--host, --port: cannot listen at {given.host}:{given.port}: {why}", file=sys.stderr)
        return 1
    try:
        model, tokenizer = load(given.model)
        fast.prepare(model)
        engine = Engine(
            model,
            given.blocks,
            max_batch=given.slots,
            chunk=given.chunk,
            max_waiting=given.waiting,
            tokenizer=tokenizer,
        )
    except (OSError, ValueError, WeightsNotFound) as error:
        print(error, file=sys.stderr)
        return 1
    name = Path(given.model).resolve().name
    listening.listen()
    host, port = listening.getsockname()
    print(f"{name} at http://{host}:{port}/v1; Ctrl-C ends it", flush=True)
    config = uvicorn.Config(create_app(engine, name, api_key=given.api_key), log_level="warning")
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C, after what ran has come to its end
        uvicorn.Server(config).run(sockets=[listening])
    return 0


if __name__ == "__main__":
    sys.exit(main())
