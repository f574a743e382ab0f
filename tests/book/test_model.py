"""`make model`: a run that is stopped and goes on, what it prints and keeps, at the size of a toy."""

import json
import re

import numpy as np
import pytest

from dslib.architecture.whole import Whole, load, read, tiny_deepseek
from dslib.performance.pretrain import Plan, training_flops
from tools import model as command

SMALL = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "kv_lora_rank": 12, "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6, "v_head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
}  # fmt: skip
TOKENS = (np.arange(4000) * 7 % 11 + 300).astype(np.uint16)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "Whole", lambda: Whole(tiny_deepseek(**SMALL)))
    monkeypatch.setattr(command, "token_stream", lambda split: (TOKENS, 14_000))
    monkeypatch.setattr(command, "WINDOWS", 2)
    monkeypatch.setattr(command, "precision_here", lambda device: "float32")
    monkeypatch.setattr(command.probes, "product_rate", lambda dtype, device: 1e11)
    monkeypatch.setattr(command, "compiler", lambda: None)
    monkeypatch.setattr("dslib.fast.training_step.compiler", lambda: None)
    plan = Plan(steps=75, tokens=64, length=16, late_length=32)
    return lambda minutes=None, name="a": command.Run(tmp_path / name, plan, minutes)


def test_a_run_in_pieces_keeps_its_history_and_ends_in_the_same_weights(run, tmp_path, capsys):
    assert not run(minutes=1e-9).go()
    assert json.loads((tmp_path / "a" / "history.json").read_text())[0]["step"] == 1
    assert run().go()
    printed = capsys.readouterr().out
    assert re.search(r"75/75 +[\d.]+ min +\d\.\d{3} bits a byte, validation \d\.\d{3}", printed)
    history = json.loads((tmp_path / "a" / "history.json").read_text())
    assert [row["step"] for row in history] == [1, 25, 50, 75]
    assert history[-1]["validation"] < 0.9 * history[0]["bits"]
    assert history[-1]["text"].startswith("The people of the United States")
    assert history[-1]["seconds"] > history[0]["seconds"] > 0
    assert run(name="b").go()
    hashes = [(tmp_path / name / "hashes.json").read_text() for name in "ab"]
    assert hashes[0] == hashes[1]
    read(Whole(tiny_deepseek(**SMALL)), tmp_path / "a")


def test_a_step_counts_what_a_token_is_multiplied_by(run):
    made = run()
    # By hand, for one mixture of 2 of 4 experts: attention, feed-forward, router, head; and a quarter of the module.
    config = made.model.config
    attention = 16 * 4 * 16 + 16 * 18 + 12 * 4 * 18 + 4 * 8 * 16
    dense, expert, router = 3 * 16 * 16, 3 * 16 * 8, 4 * 16
    mixture = attention + 3 * expert + router
    pairs = 8.5 * config.multiplications_per_pair  # a token looks at itself and at half of the others
    once = attention + dense + mixture + 4096 * 16 + 2 * pairs
    again = mixture + 2 * 16 * 16 + 4096 * 16 + pairs
    assert training_flops(made.model, made.plan) == pytest.approx(6 * (once + again / 4))


def test_the_folder_of_the_shipped_model_has_a_tokenizer_and_says_what_is_missing():
    if not (command.SHIPPED / command.WEIGHTS).exists():
        with pytest.raises(FileNotFoundError, match="make model"):
            load()
