"""GRPO and distillation against TRL's values, against finite differences, and against every answer counted."""

import itertools
import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from dslib.architecture.decoder import build
from dslib.architecture.generation import Sampling
from dslib.performance.training import next_token_loss
from dslib.scenarios import reasoning as lib
from measured.experiments import reasoning as lab

THEIRS = json.loads((Path(__file__).parents[1] / "parity/trl_losses.json").read_text(encoding="utf-8"))
GIVEN = {name: torch.tensor(value) for name, value in THEIRS["given"].items()}
GIVEN |= {name: value.double() for name, value in GIVEN.items() if value.is_floating_point()}
ANSWERS = lib.Answers(GIVEN["ids"], GIVEN["mask"])


def loss_of(logits, **rule):
    """Our loss of the given batch; in float64, where log_probs would go to float32."""
    new = logits.log_softmax(-1).gather(2, GIVEN["ids"].unsqueeze(2)).squeeze(2)
    reference = GIVEN["reference"] if rule.get("beta") else None
    return lib.grpo_loss(new, GIVEN["old"], GIVEN["advantage"], GIVEN["mask"], reference=reference, **rule)


@pytest.mark.parametrize("name", THEIRS["rules"])
def test_loss_and_gradient_are_those_of_trl(name):
    logits = torch.tensor(THEIRS["given"]["logits"], dtype=torch.float64, requires_grad=True)
    loss = loss_of(logits, **THEIRS["rules"][name])
    loss.backward()
    found = THEIRS["found"][name]
    assert loss.item() == pytest.approx(found["loss"], abs=1e-7)  # the file holds what float32 in JSON leaves of noise
    torch.testing.assert_close(logits.grad, torch.tensor(found["gradient"], dtype=torch.float64), atol=1e-7, rtol=1e-5)


def test_the_rules_differ_so_that_none_passes_for_another():
    losses = [found["loss"] for name, found in THEIRS["found"].items() if name in THEIRS["rules"]]
    assert len({round(loss, 5) for loss in losses}) == len(losses) == 5


@pytest.mark.parametrize(("scaled", "name"), [(True, "scaled"), (False, "not scaled")])
def test_advantages_are_those_that_trl_gives_to_its_answers(scaled, name):
    ours = lib.advantages(GIVEN["rewards"].float(), scaled).flatten()
    torch.testing.assert_close(ours, torch.tensor(THEIRS["found"][name]["advantages"]), atol=1e-6, rtol=1e-5)


def test_distillation_is_trls_divergence():
    student = GIVEN["logits"].float().requires_grad_(True)
    loss = lib.distillation_loss(student, GIVEN["teacher"].float(), GIVEN["mask"])
    loss.backward()
    found = THEIRS["found"]["distilled"]
    assert loss.item() == pytest.approx(found["loss"], rel=1e-5)
    torch.testing.assert_close(student.grad, torch.tensor(found["gradient"]), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("rule", [{}, {"beta": 0.3}, {"beta": 0.3, "unbiased": True}, {"clip": 0.05}])
def test_gradients_are_finite_differences(rule):
    logits = GIVEN["logits"].clone().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: loss_of(x, **rule), logits, eps=1e-6, atol=1e-6)


def test_supervised_loss_is_that_of_transformers():
    from transformers.loss.loss_utils import ForCausalLMLoss

    generator = torch.Generator().manual_seed(0)
    asked = lab.questions(9, generator)
    inputs, targets = lab.written(asked, torch.arange(9) % 3 > 0)
    table = torch.randn(13, 13, generator=generator)
    logits = table[inputs]
    theirs = ForCausalLMLoss(logits, None, vocab_size=13, shift_labels=targets.contiguous())
    assert next_token_loss(lambda ids: table[ids], inputs, targets).item() == pytest.approx(theirs.item(), rel=1e-6)


# ---------------------------------------------------------------- what the estimates estimate, every answer counted


def tables(seed=0, count=5):
    """Log-probabilities of a policy, with gradient, and of a reference, over a few answers of one token."""
    generator = torch.Generator().manual_seed(seed)
    policy = torch.randn(count, generator=generator, dtype=torch.float64).requires_grad_(True)
    return policy, torch.randn(count, generator=generator, dtype=torch.float64)


def expected_gradient(policy, reference, unbiased):
    """Of the KL term, over all answers as often as the policy writes them: only the answer's own policy is frozen."""
    new, ref = policy.log_softmax(0), reference.log_softmax(0)
    old, weight = new.detach(), new.detach().exp()
    each = [
        lib.grpo_loss(
            new[i].view(1, 1), old[i].view(1, 1), torch.zeros(1), torch.ones(1, 1, dtype=torch.bool),
            reference=ref[i].view(1, 1), beta=1.0, unbiased=unbiased,
        )
        for i in range(len(policy))
    ]  # fmt: skip
    return torch.autograd.grad((torch.stack(each) * weight).sum(), policy)[0]


@pytest.mark.parametrize("seed", range(4))
def test_the_kl_term_has_the_gradient_of_the_other_divergence_unless_weighed(seed):
    policy, reference = tables(seed)
    new, ref = policy.log_softmax(0), reference.log_softmax(0)
    reverse = torch.autograd.grad((new.exp() * (new - ref)).sum(), policy, retain_graph=True)[0]
    forward = torch.autograd.grad((ref.exp() * (ref - new)).sum(), policy)[0]
    torch.testing.assert_close(expected_gradient(policy, reference, unbiased=False), forward)
    torch.testing.assert_close(expected_gradient(policy, reference, unbiased=True), reverse)
    assert not torch.allclose(forward, reverse, atol=1e-2)


def test_the_groups_mean_as_a_baseline_keeps_the_direction_and_shortens_it():
    """Over all groups of 3 answers: without the deviation, the gradient is (G - 1)/G of that of the mean reward."""
    policy, _ = tables(1, 4)
    reward, new = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64), policy.log_softmax(0)
    true = torch.autograd.grad((new.exp() * reward).sum(), policy, retain_graph=True)[0]
    total = torch.zeros(())
    for hand in itertools.product(range(4), repeat=3):
        picked, mask = torch.tensor(hand), torch.ones(3, 1, dtype=torch.bool)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            advantage = lib.advantages(reward[picked].view(1, 3), scaled=False).flatten()
        chance = new.detach()[picked].sum().exp()
        rows = new[picked].unsqueeze(1)
        total = total + chance * -lib.grpo_loss(rows, rows.detach(), advantage, mask)
    torch.testing.assert_close(torch.autograd.grad(total, policy)[0], true * 2 / 3)


def test_clipping_stops_the_push_and_never_the_pull_back():
    """A good answer beyond 1 + clip and a bad one below 1 - clip get no gradient; the reverse cases get theirs."""
    new = torch.tensor([[0.5], [-0.5], [-0.5], [0.5]], requires_grad=True)
    advantage, mask = torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.ones(4, 1, dtype=torch.bool)
    lib.grpo_loss(new, torch.zeros(4, 1), advantage, mask).backward()
    assert (new.grad.flatten() != 0).tolist() == [False, False, True, True]


def test_the_off_policy_mask_leaves_out_bad_answers_that_the_policy_has_left():
    new = torch.full((4, 2), -1.0, requires_grad=True)
    old = torch.tensor([[-0.5, -0.5], [-0.5, -0.5], [-1.5, -1.5], [-1.0, -1.0]])
    advantage, mask = torch.tensor([1.0, -1.0, -1.0, -1.0]), torch.ones(4, 2, dtype=torch.bool)
    lib.grpo_loss(new, old, advantage, mask, clip=9.0, off_policy=0.2).backward()
    assert (new.grad.abs().sum(1) > 0).tolist() == [True, False, True, True]


def test_what_stands_behind_an_end_does_not_count():
    rows = {name: GIVEN[name].clone() for name in ("old", "reference")}
    new = GIVEN["logits"].log_softmax(-1).gather(2, GIVEN["ids"].unsqueeze(2)).squeeze(2)
    first = lib.grpo_loss(new, rows["old"], GIVEN["advantage"], GIVEN["mask"], beta=0.1, reference=rows["reference"])
    behind = ~GIVEN["mask"]
    for row in (new, *rows.values()):
        row[behind] = torch.tensor([float("nan"), float("inf"), -float("inf")]).double().repeat(5)[: int(behind.sum())]
    second = lib.grpo_loss(new, rows["old"], GIVEN["advantage"], GIVEN["mask"], beta=0.1, reference=rows["reference"])
    assert first.item() == second.item()


# ---------------------------------------------------------------- answers


@pytest.fixture(scope="module")
def small():
    return build(lab.shape(hidden_size=16, layers=2), seed=3)


def test_answers_are_drawn_as_often_as_the_model_says(small):
    """4,000 draws of the first token of one question, against the model's own probabilities (chi-squared)."""
    asked = lab.questions(1, torch.Generator().manual_seed(1)).expand(4000, -1)
    drawn = lib.sample(small, asked, lab.END, 1, Sampling(1.0), torch.Generator().manual_seed(2)).ids[:, 0]
    shares = small(asked[:1])[0, -1].softmax(-1).detach()
    counts = torch.bincount(drawn, minlength=13)
    assert ((counts - 4000 * shares) ** 2 / (4000 * shares)).sum() < 32.9  # 12 degrees of freedom, 1 in 1,000


def test_log_probs_are_those_of_the_single_answer_and_kept_ones_share_out_the_rest(small):
    generator = torch.Generator().manual_seed(4)
    asked = lab.questions(6, generator)
    answers = lib.sample(small, asked, lab.END, 5, Sampling(1.0, top_k=3), generator)
    logits = lib.answer_logits(small, asked, answers)
    whole, kept = lib.log_probs(logits, answers), lib.log_probs(logits, answers, keep=True)
    assert (answers.kept.sum(-1)[answers.mask] == 3).all() and (kept >= whole - 1e-6)[answers.mask].all()
    for row in range(6):
        text = asked[row].tolist()
        for place in range(int(answers.lengths[row])):
            token = int(answers.ids[row, place])
            logits = small(torch.tensor([text]))[0, -1]
            top = logits.topk(3)
            assert whole[row, place].item() == pytest.approx(logits.log_softmax(-1)[token].item(), abs=1e-4)
            among = top.values.log_softmax(-1)[(top.indices == token).nonzero().item()]
            assert kept[row, place].item() == pytest.approx(among.item(), abs=1e-4)
            text.append(token)


def test_an_answer_ends_at_its_end_and_repeats_it_behind(small):
    generator = torch.Generator().manual_seed(0)
    answers = lib.sample(small, lab.questions(64, generator), lab.END, 6, Sampling(1.0), generator)
    for ids, mask in zip(answers.ids.tolist(), answers.mask.tolist(), strict=True):
        length = ids.index(lab.END) + 1 if lab.END in ids else len(ids)
        assert mask == [place < length for place in range(len(ids))] and set(ids[length:]) <= {lab.END}


def test_a_run_of_grpo_repeats_bit_for_bit_and_its_seed_matters(small):
    def run(seed):
        model = build(lab.shape(hidden_size=16, layers=2), seed=3)
        rows = []
        lib.grpo(
            model, lambda g: lab.questions(3, g), lab.thinks, end=lab.END, max_new_tokens=4, steps=3, group=4,
            updates=2, seed=seed, beta=0.1, on_step=rows.append,
        )  # fmt: skip
        return rows, torch.cat([weight.flatten() for weight in model.parameters()])

    (rows, weights), (again, same), (_, other) = run(0), run(0), run(1)
    assert rows == again and torch.equal(weights, same) and not torch.equal(weights, other)
    assert [row.number for row in rows] == [0, 1, 2] and rows[0].ratio > 0


def test_grpo_learns_what_is_rewarded():
    """From an untrained model: to begin with think, against the share of 1 in 13 at the start."""
    model = build(lab.shape(hidden_size=16, layers=2), seed=3)
    rows = []
    lib.grpo(
        model, lambda g: lab.questions(8, g), lab.thinks, end=lab.END, max_new_tokens=3, steps=25, group=8,
        learning_rate=1e-2, on_step=rows.append,
    )  # fmt: skip
    assert rows[0].reward < 0.3 and rows[-1].reward > 0.6


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


HALF, LINE = torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3)
BAD = [
    (lambda: lib.advantages(torch.zeros(4, 1)), "two answers or more"),
    (lambda: lib.advantages(torch.zeros(4)), r"shape \(4,\)"),
    (lambda: lib.advantages(torch.tensor([[1.0, float("nan")], [0.0, 1.0]])), r"rewards.*rows \[0\]"),
    (lambda: lib.grpo_loss(LINE, LINE * float("nan"), torch.ones(2), HALF), r"ratio: not a number.*rows \[0, 1\]"),
    (lambda: lib.grpo_loss(LINE, LINE - 1e3, torch.ones(2), HALF), r"ratio: not a number or infinite"),
    (lambda: lib.grpo_loss(LINE, LINE[:1], torch.ones(2), HALF), r"old: got shape \(1, 3\)"),
    (lambda: lib.grpo_loss(LINE, LINE, torch.ones(3), HALF), r"advantage: got shape \(3,\)"),
    (lambda: lib.grpo_loss(LINE, LINE, torch.ones(2), HALF, beta=0.1), "reference: got None with beta=0.1"),
    (lambda: lib.grpo_loss(LINE, LINE, torch.ones(2), HALF, reference=LINE), "reference: got one with beta=0"),
    (lambda: lib.grpo_loss(LINE, LINE, torch.ones(2), HALF, clip=-1), "clip: got -1"),
    (lambda: lib.grpo_loss(LINE, LINE, torch.ones(2), HALF & False), r"mask: no token of answers \[0, 1\]"),
    (lambda: lib.distillation_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4), HALF[:1, :2]), "teacher: got shape"),
    (lambda: lib.distillation_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), HALF), "mask: got shape"),
    (lambda: lib.grpo(Frozen(), None, None, end=1, max_new_tokens=2, steps=1, group=1), "group: got 1, expected at"),
    (lambda: lib.grpo(Frozen(), None, None, end=1, max_new_tokens=2, steps=0), "steps: got 0"),
    (lambda: lib.sample(None, LINE.long(), 1, 0, Sampling(1.0), None), "max_new_tokens: got 0"),
    (lambda: lib.sample(None, LINE.long(), 1, 2, Sampling(), None), "temperature: got 0"),
    (lambda: lab.learned("luck"), "arm: got 'luck'"),
    (lambda: lab.distilled("by heart"), "way: got 'by heart'"),
]


@pytest.mark.parametrize(("call", "words"), BAD)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_rewards_that_are_all_equal_are_said_to_teach_nothing():
    with pytest.warns(UserWarning, match="no gradient"):
        found = lib.advantages(torch.ones(3, 4))
    assert not found.any() and lib.tells(torch.tensor([[1.0, 1.0], [0.0, 1.0]])).tolist() == [False, True]
