"""A resumed run is the run that never stopped, to the last bit; damaged files and other settings are named."""

import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from dslib.architecture import decoder
from dslib.performance import resume
from dslib.performance.loss_scaling import LossScaler
from dslib.performance.training import fit, next_token_loss, train

TOKENS = torch.arange(400) % 7
SHAPE = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
RUN = {"steps": 12, "batch_size": 4, "length": 8, "every": 5, "learning_rate": 1e-2}


class Stop(Exception):
    pass


class Dropped(nn.Module):
    """A model that draws from every global generator at every step: torch's, Python's and numpy's."""

    def __init__(self):
        super().__init__()
        self.inner, self.dropout = decoder.build(decoder.preset("tiny", **SHAPE), seed=0), nn.Dropout(0.2)

    def forward(self, ids):
        return self.dropout(self.inner(ids)) * (1 + 0.1 * random.gauss(0, 1) + 0.1 * np.random.randn())


def seed_all(seed):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def model():
    return decoder.build(decoder.preset("tiny", **SHAPE), seed=0)


def stop_at(number):
    def on_step(step):
        if step.number == number:
            raise Stop

    return on_step


def assert_same_weights(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


OPTIONS = {
    "float32": dict,
    "accumulated": lambda: {"accumulate": 2},
    "bfloat16": lambda: {"precision": "bfloat16"},
    # Starts too high, so that the scale moves before and after the stop.
    "float16": lambda: {"precision": "float16", "scaler": LossScaler(2.0**30, growth_interval=3)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", [model, Dropped])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(tmp_path, options, kind):
    path, whole, stopped, scales = tmp_path / "run.pt", kind(), kind(), []
    seed_all(1)
    losses = train(whole, TOKENS, **RUN, **options(), on_step=lambda step: scales.append(step.scale))
    seed_all(1)
    with pytest.raises(Stop):
        train(stopped, TOKENS, **RUN, **options(), checkpoint=path, on_step=stop_at(7))
    resumed, seen = kind(), []
    seed_all(99)  # another process would have another state
    assert train(resumed, TOKENS, **RUN, **options(), checkpoint=path, on_step=seen.append) == losses
    assert [step.number for step in seen] == list(range(5, 12))
    assert_same_weights(resumed, whole)
    assert [step.scale for step in seen] == scales[5:]
    assert len(set(scales)) > 2 or options().get("precision") != "float16"
    # A finished run gives its losses and weights without a step.
    again, more = kind(), []
    assert train(again, TOKENS, **RUN, **options(), checkpoint=path, on_step=more.append) == losses and not more
    assert_same_weights(again, whole)


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: torch.rand(()).item()])
def test_batches_that_come_from_a_global_generator_go_on(tmp_path, draw):
    def run(**options):
        batches, net = [], nn.Linear(1, 1)
        loss = lambda m, x: m(x).square().mean()  # noqa: E731
        batch = lambda step: (torch.full((2, 1), batches.append(draw()) or batches[-1]),)  # noqa: E731
        try:
            fit(net, batch, steps=6, every=2, loss=loss, settings={"loss": "square"}, **options)
        except Stop:
            pass
        return batches

    seed_all(3)
    whole = run()
    seed_all(3)
    run(checkpoint=tmp_path / "run.pt", on_step=stop_at(3))
    seed_all(4)
    assert run(checkpoint=tmp_path / "run.pt") == whole[2:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 2e-2}, r"learning_rate: got 0.02, expected 0.01, as in checkpoint run.pt"),
        ({"steps": 20}, "steps: got 20, expected 12"),
        ({"batch_size": 8}, "batch_size: got 8, expected 4"),
        ({"seed": 3}, "seed: got 3, expected 0"),
        ({"clip": 2.0, "warmup": 0.2}, "warmup: got 0.2, expected 0.1; clip: got 2.0, expected 1.0"),
        ({"precision": "bfloat16"}, "precision: got bfloat16, expected float32"),
        ({"precision": "float16"}, "scaler.growth_interval: got 2000, expected None"),
        ({"accumulate": 2}, "accumulate: got 2, expected 1"),
        ({"tokens": TOKENS.flip(0)}, "tokens: got 400 tokens, [0-9a-f]{12}, expected 400 tokens"),
        ({"loss": lambda m, x, y: 2 * next_token_loss(m, x, y)}, "loss: got .*<lambda>, expected .*next_token_loss"),
        ({"model": nn.Linear(2, 2)}, "model: got Linear, 2 tensors"),
    ],
)
def test_a_run_with_other_settings_is_refused_and_says_which(tmp_path, change, message):
    path = tmp_path / "run.pt"
    train(model(), TOKENS, **RUN, checkpoint=path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        train(**{"model": model(), "tokens": TOKENS, **RUN, "checkpoint": path} | change)
    assert path.read_bytes() == before


def damaged(whole):
    """The bytes of files that are no whole checkpoint."""
    middle = len(whole) // 2
    yield from (b"", whole[:middle], whole[:-1], b"learning_rate: 0.01\n" * 50)
    yield whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]  # one bit


def test_damaged_and_foreign_files_are_refused_and_kept(tmp_path):
    path = tmp_path / "run.pt"
    train(model(), TOKENS, **RUN, checkpoint=path)
    files = [(data, "(cannot be read|its part .* is damaged)") for data in damaged(path.read_bytes())]
    for state, message in (
        (model().state_dict(), "got something else, expected a whole training checkpoint"),
        ({"kind": resume.KIND, "settings": {}}, "has no 'losses'"),
        (model(), "cannot be read"),  # a pickled object could run code
    ):
        torch.save(state, path)
        files.append((path.read_bytes(), message))
    for data, message in files:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"checkpoint run.pt: {message}"):
            train(model(), TOKENS, **RUN, checkpoint=path)
        assert path.read_bytes() == data


def test_a_place_that_cannot_be_written_is_named_before_the_first_step(tmp_path):
    for path in (tmp_path / "none" / "run.pt", tmp_path):
        with pytest.raises(ValueError, match=r"checkpoint: got .*, expected a file in a folder that exists"):
            train(model(), TOKENS, **RUN, checkpoint=path, loss=lambda *_: pytest.fail("it began"))


# ---------------------------------------------------------------- killed

CHILD = """
import io, sys, time, torch
sys.path.insert(0, {tests!r})
import test_resume as t
save, written = torch.save, []

def half(state, file):
    written.append(io.BytesIO())
    save(state, written[-1])
    data = written[-1].getvalue()
    if len(written) <= 4:
        return file.write(data)
    file.write(data[: len(data) // 2])
    file.flush()
    print("half", flush=True)
    time.sleep(600)

torch.save = half
t.train(t.model(), t.TOKENS, **t.RUN | {{"every": 1}}, checkpoint=sys.argv[1])
"""


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_killed_in_the_middle_of_writing_the_last_whole_checkpoint_serves(tmp_path):
    path = tmp_path / "run.pt"
    command = [sys.executable, "-c", CHILD.format(tests=os.path.dirname(__file__)), str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline().strip()
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    assert line == "half" and process.returncode == -signal.SIGKILL
    assert (tmp_path / "run.pt.part").stat().st_size > 0  # what was cut off
    run, seen, resumed, whole = RUN | {"every": 1}, [], model(), model()
    losses = train(resumed, TOKENS, **run, checkpoint=path, on_step=seen.append)
    assert [step.number for step in seen] == list(range(4, 12)) and losses == train(whole, TOKENS, **run)
    assert_same_weights(resumed, whole)
    assert not (tmp_path / "run.pt.part").exists()
