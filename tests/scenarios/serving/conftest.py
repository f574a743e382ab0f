"""A tiny model behind the server, for clients of every kind."""

import copy
import socket
import threading
import time

import httpx
import openai
import pytest
import torch
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from dslib.architecture.decoder import DecoderConfig, build
from dslib.data import corpus
from dslib.scenarios.serving.server import create_app

BLOCKS = 400
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


@pytest.fixture(scope="session")
def tokenizer():
    made = copy.copy(corpus.tokenizer())
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="session")
def model():
    config = DecoderConfig(4096, 32, 64, 2, 4, 2, max_position_embeddings=600)
    made = build(config, seed=0, dtype=torch.float64).eval()
    with torch.no_grad():
        for weight in made.parameters():
            if weight.ndim > 1:
                weight.mul_(12)
    return made


class Server:
    """A server in a thread; ``url`` is its address, ``engine`` its engine."""

    def __init__(self, engine, **options):
        self.engine, self.socket = engine, socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = uvicorn.Server(uvicorn.Config(create_app(engine, "tiny", **options), log_level="warning"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join()
        self.socket.close()

    def client(self, kind=openai.OpenAI, key="none"):
        return kind(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def post(self, body, path="/v1/completions", **options):
        return httpx.post(f"{self.url}{path}", json=body, timeout=20, **options)

    def settles(self, seconds=5):
        """Whether within so long nobody runs, waits or holds a block."""
        scheduler, until = self.engine.scheduler, time.monotonic() + seconds
        while time.monotonic() < until:
            if not scheduler.running and not scheduler.waiting and scheduler.pool.free == BLOCKS:
                return True
            time.sleep(0.02)
        return False

    def meters(self):
        text = httpx.get(f"{self.url}/metrics").text
        return {
            sample.name + "".join(f" {value}" for value in sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if "le" not in sample.labels
        }


@pytest.fixture(scope="session")
def start():
    """``with start(engine, …) as server``: see :class:`Server`."""
    return Server
