"""What is measured is what is said: experts by another road, masses by hand, sums that are read right. No timing."""

import dataclasses

import pytest
import torch

from dslib.architecture.balance import moe_layers
from dslib.architecture.decoder import DecoderConfig, build
from dslib.architecture.whole import load
from dslib.data import corpus
from dslib.performance.pretrain import bits_per_byte, byte_lengths
from measured import record
from measured.experiments import complex as lab
from measured.experiments import complex_answers as sums

SHAPE = DecoderConfig(300, 64, 128, 2, 4, 2, tie_word_embeddings=True)
SMALL = {"hidden_size": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 4, "v_head_dim": 16}


class Characters:
    """A tokenizer of single characters; a message is its text and a line break."""

    eos_token_id, eos_token = 299, "<end>"

    def __call__(self, text, **_):
        return type("Encoded", (), {"input_ids": [ord(letter) % 256 for letter in text[:4000]]})

    def decode(self, ids):
        return "".join(self.eos_token if i == self.eos_token_id else chr(i) for i in ids)

    def apply_chat_template(self, messages, **_):
        return self(messages[0]["content"] + "\n").input_ids


@pytest.fixture
def small(monkeypatch):
    model = build(SHAPE, seed=0).eval()
    for module, name in ((lab, "_smollm2"), (sums, "_model")):
        monkeypatch.setattr(module, name, lambda: (model, Characters()))
    return model


@pytest.mark.parametrize("normalised", [True, False])
def test_other_numbers_of_experts_are_what_a_model_made_so_computes(normalised):
    model = load()[0].decoder
    rows, _ = lab._held(2)
    config = dataclasses.replace(model.config, num_experts_per_tok=9, norm_topk_prob=normalised)
    other = build(config).eval()
    other.load_state_dict(model.state_dict())
    with lab.experts_of(model, 9, normalised):
        found = lab.window_bits(model, rows)
    assert found == pytest.approx(lab.window_bits(other, rows), rel=1e-4)
    assert {(layer.router.top_k, layer.router.norm_topk_prob) for layer in moe_layers(model)} == {(4, True)}
    assert found != pytest.approx(lab.window_bits(model, rows), rel=1e-4)


def test_bits_of_windows_add_up_to_bits_a_byte():
    found = lab.own_experts(top_ks=[4], windows=3)
    rows, sizes = lab._held(3)
    bits = sum(found["bits"]["normalised"]["4"]) / sum(found["bytes"])
    assert found["trained"] == 4 and found["bytes"] == sizes
    assert bits == pytest.approx(bits_per_byte(load()[0], rows, byte_lengths(corpus.tokenizer())), rel=1e-3)
    row = lab.against_trained(found)[0]
    assert row["experts"] == 4 and row["bits"] == pytest.approx(bits) and row["more"] == [0, 0, 0]
    assert lab.against_trained(found, "as they are")[0]["more"][0] > 0


def test_two_of_sixteen_is_trained_with_two():
    size = {"tokens": 128, "length": 32, "precision": "float32", "compiled": False, "changes": SMALL}
    found = lab.two_of_sixteen(steps=4, windows=2, top_ks=[2, 16], **size)
    assert found["trained"] == 2 and list(found["bits"]["as they are"]) == ["2", "16"]
    untrained = 12 * 256 * 2  # bits of 256 tokens of 4,096 in two windows
    assert 0.5 * untrained < sum(found["bits"]["normalised"]["2"]) < untrained


def test_forced_texts_are_as_long_as_asked_and_lose_the_end_tokens_mass(small):
    found = lab.forced(minimum=40, count=3, part=10)
    assert len(found["natural"]) == 3 and all(len(one) == 40 for one in found["end"] + found["control"]["end"])
    assert all(len(one) == 4 and 0 < min(one) <= 1 for one in found["distinct"])
    with torch.no_grad():
        small.embed_tokens.weight[299] += 3 * small.embed_tokens.weight.std()  # now it wants to end more often
    assert sum(map(sum, found["end"])) != sum(map(sum, lab.forced(minimum=40, count=3, part=10)["end"]))


def test_the_end_tokens_mass_is_what_the_model_gave_it(small):
    ids = [5, 6, 7, 8, 9]
    with torch.inference_mode():
        wanted = [small(torch.tensor([ids[:n]]))[0, -1].softmax(-1)[299].item() for n in (2, 3, 4)]
    assert lab._end_mass(small, ids[:2], ids[2:], 299) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("source", ["novel", "own"])
def test_the_atlas_is_sorted_and_its_rules_keep_what_they_say(small, source):
    found = lab.atlas(steps=60, bins=6, source=source)
    assert found["entropy"] == sorted(found["entropy"]) and len(found["entropy"]) == 6
    assert set(found["counts"]["top-k 40"]) == {40}
    assert min(found["mass"]["top-p 0.95"]) >= 0.95
    assert found["ranks"]["0.95"] == found["counts"]["top-p 0.95"], "a rule by another road"
    assert sum(found["shares"][name] for name in ("top-k cuts deeper", "equally deep")) <= 1
    assert found["taken"]["top-k 40, then top-p 0.95"][0] <= found["taken"]["top-p 0.95, then top-k 40"][0]


@pytest.mark.parametrize(
    ("line", "number"),
    [
        (" 16", 16), ("16", 16), (" 3 + 8 = 11. 11 + 5 = 16", 16), (" 11 + 5 =16.", 16), (" 11 + 5", None), ("", None),
        (" sixteen", None), (" 16 apples", None), (" 3 = 4 = 5", 5), (" -3", None),
    ],
)  # fmt: skip
def test_what_is_read_in_a_line(line, number):
    assert sums.read(line) == number


@pytest.mark.parametrize("way", sums.WAYS)
def test_what_is_written_is_read_again(way):
    for numbers in sums.problems(20, terms=4, digits=2):
        line = sums.written(numbers, way).removeprefix(sums.question(numbers, way))
        assert sums.read(line) == sum(numbers)
    assert sums.written([3, 8, 5], "worked") == "3 + 8 + 5: 3 + 8 = 11. 11 + 5 = 16"
    assert sums.prompt([1, 2], "at once", [[3, 4]]) == "3 + 4 = 7\n1 + 2 ="


def test_answers_have_an_entry_for_each_draw_and_seeds_of_their_own(small):
    found = sums.answers(count=3, n=4, shots=1)
    assert [len(found[key]) for key in ("truth", "answers", "scores", "tokens", "greedy")] == [3] * 5
    assert all(len(row) == 4 and max(row) < 0 for row in found["scores"])
    again = sums.answers(count=3, n=4, shots=1, slots=1)
    assert found["answers"] == again["answers"] and found["tokens"] == again["tokens"], "whoever sits beside it"


def test_scores_are_mean_log_probabilities(small, monkeypatch):
    """Of the tokens that the engine wrote, by a pass over prompt and answer."""
    written = []
    run = sums.Engine.run
    monkeypatch.setattr(sums.Engine, "run", lambda engine: written.append(run(engine)) or written[-1])
    found = sums.answers(count=1, n=2, shots=1)
    shown, asked = sums.problems(2, 3, 1, 0)
    ids = Characters()(sums.prompt(asked, "at once", [shown])).input_ids
    for draw, score in enumerate(found["scores"][0]):
        new = written[0][0, draw]
        with torch.inference_mode():
            log_p = small(torch.tensor([ids + new]))[0, len(ids) - 1 : -1].log_softmax(-1)
        wanted = log_p.gather(1, torch.tensor(new)[:, None]).mean().item()
        assert score == pytest.approx(wanted, abs=1e-3)


def test_no_call_of_the_part_is_a_timing():
    assert all(name.startswith("measured.experiments.complex") for name, _ in record.PARTS["complex"])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: lab.own_experts(top_ks=[17], windows=1), "top_k: got 17, expected 1 to 16"),
        (lambda: lab.own_experts(windows=0), "windows: got 0"),
        (lambda: lab.forced(minimum=0), "minimum: got 0"),
        (lambda: lab.atlas(source="web"), "source: got 'web'"),
        (lambda: lab.atlas(steps=0), "steps: got 0"),
        (lambda: sums.written([1, 2], "slowly"), "way: got 'slowly'"),
        (lambda: sums.problems(0), "count: got 0"),
        (lambda: sums.problems(1, terms=1), "terms: got 1"),
        (lambda: sums.answers(n=0), "n: got 0"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
