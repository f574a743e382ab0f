"""The small trainings with pictures: equal starts and batches, nothing held out is trained on, figures that mean it."""

import dataclasses

import numpy as np
import pytest
import torch

from dslib.architecture.decoder import preset
from dslib.architecture.fusion import FusionConfig
from dslib.architecture.generation import generate
from dslib.data.scenes import item_rng
from dslib.data.text import Words
from measured.experiments import fusion, fusion_evaluation, fusion_speed
from measured.experiments.fusion import IGNORED, VARIANTS, World, held_out

FEW = {"steps": 2, "batch_size": 4}


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def start(world):
    return fusion.text_start(world, **FEW), fusion.taught_stream(world, **FEW)


@pytest.fixture(scope="module")
def loud(world, start):
    """A token-gate model whose gates are open and whose weights are loud, so that pictures change what it says."""
    model, _ = fusion.train_variant("token gate", world, *start, **FEW)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(model.named_parameters(), key=lambda named: "cross" in named[0]):
        if not name.startswith("vision"):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2 + (parameter.ndim == 1)
    model.embed_tokens.weight.data[Words.END] *= 2  # so that it often comes to an end
    return model


# --- examples


def test_held_out_numbers_are_in_no_training_picture(world):
    trained = {world.example(item_rng(0, i), "read").answer for i in range(500)}
    trained |= {"".join(map(str, d)) for _, _, d in (world.labelled(item_rng(0, i)) for i in range(300)) if d[0] >= 0}
    kept_back = {item.answer for item in held_out(world, 200, "read")}
    assert not trained & kept_back and len(kept_back) > 80
    assert {int(number) % 7 for number in kept_back} == {3} and 3 not in {int(number) % 7 for number in trained}
    for sort in fusion_evaluation.SORTS:
        assert {world.example(item_rng(1, i), sort).sort for i in range(20)} == {sort}


def test_all_sorts_come_every_word_is_known_and_only_answers_and_their_end_count(world):
    items = [world.example(item_rng(0, i)) for i in range(300)]
    counts = {sort: sum(item.sort == sort for item in items) for sort in ("caption", *fusion_evaluation.SORTS)}
    assert min(counts["caption"], counts["read"]) > 75 and min(counts.values()) > 15
    assert 110 < sum(item.language == "zh" for item in items) < 190
    images, inputs, targets = world.collate(items)
    assert images.shape == (300, 3, 32, 32) and images.min() >= -1 and images.max() <= 1
    assert not (inputs == Words.UNKNOWN).any() and not (targets == Words.UNKNOWN).any()
    for item, row, wanted in zip(items, inputs, targets, strict=True):
        counts = wanted != IGNORED
        assert wanted[counts].tolist() == [*world.words.encode(item.answer), Words.END]
        first = int(counts.nonzero()[0])
        assert row[: first + 1].tolist() == [Words.END, *world.words.encode(item.prompt)]


def test_labels_say_what_is_there(world):
    for i in range(40):
        image, cells, digits = world.labelled(item_rng(3, i))
        quarters = image.reshape(2, 16, 2, 16, 3).swapaxes(1, 2).reshape(4, 256, 3)
        if digits[0] == IGNORED:
            drawn = [len(np.unique(quarter, axis=0)) > 1 for quarter in quarters]
            assert drawn == [cell < 16 for cell in cells]
        else:
            assert cells == [IGNORED] * 4 and all(0 <= digit <= 9 for digit in digits)


# --- training


def test_all_variants_start_as_the_same_text_model(world, start):
    """Before any step: equal weights, and with the gate shut equal losses; the batches are the same too."""
    firsts, sizes = {}, {}
    for name in VARIANTS:
        model, losses = fusion.train_variant(name, world, *start, **FEW | {"steps": 1})
        firsts[name], sizes[name] = losses[0], sum(p.numel() for p in model.parameters())
        assert not model.training
    assert firsts["text only"] == firsts["scalar gate"] == firsts["token gate"] != firsts["projector"]
    assert sizes["text only"] < sizes["projector"] < sizes["scalar gate"] < sizes["token gate"]
    with pytest.raises(ValueError, match="variant: got 'mixer', expected one of 'text only'"):
        fusion.train_variant("mixer", world, *start, **FEW)


def test_training_leaves_the_start_alone_and_repeats_exactly(world, start):
    before = {name: tensor.clone() for part in start for name, tensor in part.state_dict().items()}
    runs = [fusion.train_variant("projector", world, *start, **FEW) for _ in range(2)]
    assert runs[0][1] == runs[1][1]
    other, losses = fusion.train_variant("projector", world, *start, **FEW, seed=1)
    assert losses != runs[0][1]
    after = {name: tensor for part in start for name, tensor in part.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert any(not torch.equal(p, q) for p, q in zip(other.vision.parameters(), start[1].parameters(), strict=True))


# --- figures


def test_right_is_what_greedy_decoding_says(world, loud):
    """One pass over the answer, against writing it token by token."""
    items = [world.example(item_rng(5, i)) for i in range(40)]

    def say(item):
        prompt, image = [Words.END, *world.words.encode(item.prompt)], fusion.pixels([item.image])
        return generate(loud, [prompt], 6, eos_token_id=Words.END, image=loud.encode_image(image))[0]

    said = [say(item) for item in items]
    # Where it came to an end, let what it said be the answer that is asked for: then it is right.
    for i, one in enumerate(said):
        text = world.words.decode(one.tokens)
        if one.finish == "eos" and world.words.encode(text) == one.tokens[:-1]:
            items[i] = dataclasses.replace(items[i], answer=text)
    scores, right = fusion_evaluation.log_probabilities(loud, world, items)
    assert scores.shape == right.shape == (40,) and (scores <= 0).all()
    for item, one, ok in zip(items, said, right.tolist(), strict=True):
        wanted = [*world.words.encode(item.answer), Words.END]
        assert ok == (one.tokens[: len(wanted)] == wanted)
    assert set(right.tolist()) == {True, False}


def test_a_score_is_the_sum_over_the_answer(world, loud):
    item = world.example(item_rng(6, 1), "caption")
    scores, _ = fusion_evaluation.log_probabilities(loud, world, [item])
    ids = torch.tensor([[Words.END, *world.words.encode(item.answer), Words.END]])
    with torch.no_grad():
        logits = loud(ids[:, :-1], image=loud.encode_image(fusion.pixels([item.image])))
    wanted = logits.log_softmax(-1)[0].gather(1, ids[0, 1:, None]).sum()
    torch.testing.assert_close(scores[0], wanted, atol=1e-4, rtol=1e-4)


def test_pairs_differ_in_one_thing(world):
    for one in fusion_evaluation.pairs(world, 60):
        first, second = (sorted(world.words.encode(caption)) for caption in one.captions)
        assert (first == second) is (one.sort == "swapped") and one.captions[0] != one.captions[1]
        quarters = [im.reshape(2, 16, 2, 16, 3).swapaxes(1, 2).reshape(4, -1) for im in one.images]
        changed = sum(not np.array_equal(a, b) for a, b in zip(*quarters, strict=True))
        assert changed == (2 if one.sort == "swapped" else 1)
    assert {one.sort for one in fusion_evaluation.pairs(world, 60)} == {"swapped", "replaced"}


def test_who_does_not_look_is_right_exactly_half_the_time(world, start, loud):
    given = fusion_evaluation.pairs(world, 30)
    assert fusion_evaluation.choices(start[0].eval(), world, given) == [0.5] * 30
    assert set(fusion_evaluation.choices(loud, world, given)) > {0.5}


def test_choices_count(world, monkeypatch):
    given = fusion_evaluation.pairs(world, 4)
    table = torch.tensor([[2.0, 1, 1, 2], [1, 2, 2, 1], [2, 1, 2, 1], [1, 1, 3, 3]])  # both, none, one, two ties
    monkeypatch.setattr(fusion_evaluation, "log_probabilities", lambda *_: (table.flatten(), None))
    assert fusion_evaluation.choices(None, world, given) == [1.0, 0.0, 0.5, 0.5]


def test_the_control_exchanges_pictures_and_nothing_else(world):
    items = [item for sort in ("what", "read") for item in held_out(world, 5, sort)]
    others = fusion_evaluation.exchanged(items)
    assert [(o.sort, o.prompt, o.answer) for o in others] == [(i.sort, i.prompt, i.answer) for i in items]
    assert all(o.image is not i.image for o, i in zip(others, items, strict=True))
    assert sorted(id(o.image) for o in others) == sorted(id(i.image) for i in items)
    assert {id(o.image) for o in others[:5]} == {id(i.image) for i in items[:5]}  # within a sort


def test_a_run_has_every_figure():
    found = fusion_evaluation.vision_run(steps=1, text_steps=1, label_steps=1, batch_size=2, variants=("scalar gate",))
    assert set(found) == {"scalar gate"} and len(found["scalar gate"]["gates"]) == 3
    assert all(sum(n for _, n in by.values()) == 200 for by in found["scalar gate"]["right"].values())
    assert len(found["scalar gate"]["matching"]) == len(found["scalar gate"]["pair_sorts"]) == 200


# --- speed


def test_look_cost_compares_like_with_like():
    found = fusion_speed.look_cost("tiny", layers=2, image_tokens=(4, 9), context=3, new_tokens=2, rounds=1)
    assert set(found["seconds"]) == {"text", "text, equal size", "cross, 4", "cross, 9", "projector, 4", "projector, 9"}
    sizes = found["parameters"]
    layer = preset("tiny", num_hidden_layers=2)
    assert abs(sizes["text, equal size"] - sizes["cross"]) <= 200_000 // 2  # within half a layer
    assert layer.num_hidden_layers == 2 and sizes["text"] < sizes["projector"] < sizes["cross"]
    assert found["over_text"]["text"] == found["over_equal_size"]["text, equal size"] == 1
    assert found["kept_bytes"]["cross, 4"] == 2 * 2 * 4 * 2 * 32 * 4
    answers = fusion_speed.stream_cost("tiny", layers=1, prompt_tokens=2, new_tokens=2, rounds=1)
    assert set(answers["over_v1"]) == {"V1", "look", "V2", "V2, seen before", "projector"}


def test_counted_operations_are_the_formula():
    config = preset("tiny", num_hidden_layers=1)
    heads = 128 * 128 * 2 + 128 * 64 * 2  # q and o, k and v
    mlp, head = 3 * 128 * 352, 128 * 256
    pairs = 2 * 128 * 1
    assert fusion_speed.counted_flops(config, 1) == 2 * (heads + mlp + head + pairs)
    fields = {"image_hidden_size": fusion_speed.FEATURES}
    cross = fusion_speed.preset_like(config, FusionConfig, **fields)
    more = fusion_speed.counted_flops(cross, 1, 10) - fusion_speed.counted_flops(config, 1)
    assert more == 2 * (2 * 128 * 128 + 2 * 128 * 10)  # q and o, scores and weighted sums
    assert 8.5e9 < fusion_speed.swin_flops() < 9.5e9  # the paper says 4.5 G multiply-adds


@pytest.mark.benchmark
def test_a_token_after_a_look_costs_at_most_a_quarter_more():
    """At SmolLM2's size, up to 1,024 features, against the text-only decoder with as many parameters."""
    torch.set_num_threads(2)
    found = fusion_speed.look_cost(image_tokens=(49, 576, 1024), rounds=5)
    for count in (49, 576, 1024):
        assert found["over_equal_size"][f"cross, {count}"] < 1.25
