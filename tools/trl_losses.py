"""Write ``tests/parity/trl_losses.json``: losses and gradients by TRL. By hand, in its own environment:

    python -m venv trl && trl/bin/pip install trl==1.16.0 torch==2.13.0 && trl/bin/python tools/trl_losses.py

A "model" whose logits are a parameter stands for a policy, so that a gradient is one of logits. TRL computes in float64
what it computes in training: the loss of a GRPO trainer, the advantages that such a trainer gives to its answers, and
the divergence of its distillation trainer.
"""

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
import trl
from datasets import Dataset
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.gkd import GKDTrainer

B, Q, T, V = 6, 3, 5, 11
P, G = 4, 3  # questions and answers to each, for the advantages
# Ours -> theirs.
RULES = {
    "plain": ({}, {}),
    "KL": ({"beta": 0.3}, {"beta": 0.3, "use_bias_correction_kl": False}),
    "KL, unbiased": ({"beta": 0.3, "unbiased": True}, {"beta": 0.3, "use_bias_correction_kl": True}),
    "off-policy mask": ({"off_policy": 0.1}, {"off_policy_mask_threshold": 0.1}),
    "narrow clip": ({"clip": 0.05}, {"epsilon": 0.05}),
}


class Table(nn.Module):
    """A policy of (B, T, V) logits, whatever it is asked. TRL has its models give log-probabilities of labels."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, labels, **_):
        shares = self.logits.log_softmax(-1)
        drawn = shares.gather(2, labels[:, -T:].clamp(min=0).unsqueeze(2)).squeeze(2)
        return SimpleNamespace(log_probs=drawn, entropy=-(shares.exp() * shares).sum(-1).detach())


def trainer(folder: str, rewards: list[float], **options) -> GRPOTrainer:
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({str(n): n for n in range(V)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1")
    size = {
        "vocab_size": V,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**size, pad_token_id=0, eos_token_id=1))
    fixed = {
        "use_cpu": True,
        "report_to": "none",
        "num_generations": G,
        "per_device_train_batch_size": P * G,
        "bf16": False,
    }
    arguments = GRPOConfig(folder, loss_type="grpo", max_completion_length=T, **fixed, **options)
    data = Dataset.from_dict({"prompt": ["2 3", "4 5"]})
    return GRPOTrainer(model, lambda completions, **_: rewards, arguments, data, processing_class=tokenizer)


def main() -> None:
    draw = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(B, T, V, generator=draw, dtype=torch.float64) for _ in range(2))
    ids = torch.randint(2, V, (B, T), generator=draw)
    lengths = torch.tensor([5, 3, 1, 4, 5, 2])
    mask = torch.arange(T) < lengths.unsqueeze(1)
    noise = lambda: 0.3 * torch.randn(B, T, generator=draw, dtype=torch.float64)  # noqa: E731
    now = logits.log_softmax(-1).gather(2, ids.unsqueeze(2)).squeeze(2)
    old, reference = now + noise(), now + noise()
    rewards = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.5], [0.2, 0.9, 0.4]], dtype=torch.float64)
    advantage = torch.tensor([1.2, -0.7, 0.4, -1.1, -0.2, 0.0], dtype=torch.float64)

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (_, theirs) in RULES.items():
            made, model = (
                trainer(folder, [0.0] * (P * G), **{name: value for name, value in theirs.items() if name != "beta"}),
                Table(logits.clone()),
            )
            made.beta = theirs.get("beta", 0.0)  # set now: it would look for a reference model in a folder
            made.current_gradient_accumulation_steps = 1
            inputs = {
                "prompt_ids": torch.full((B, Q), 2), "prompt_mask": torch.ones(B, Q, dtype=torch.long),
                "completion_ids": ids, "completion_mask": mask.long(), "advantages": advantage,
                "old_per_token_logps": old, "ref_per_token_logps": reference,
            }  # fmt: skip
            loss = made._compute_loss(model, inputs)
            loss.backward()
            found[name] = {"loss": loss.item(), "gradient": model.logits.grad.tolist()}
        for name, scale in (("scaled", "group"), ("not scaled", "none")):
            made = trainer(folder, rewards.flatten().tolist(), scale_rewards=scale)
            asked = [{"prompt": "2 3"}] * (P * G)
            found[name] = {"advantages": made._generate_and_score_completions(asked)["advantages"].tolist()}
    free = logits.clone().requires_grad_(True)
    loss = GKDTrainer.generalized_jsd_loss(
        free, teacher, labels=ids.masked_fill(~mask, -100), beta=1.0, num_items_in_batch=int(mask.sum())
    )
    loss.backward()
    found["distilled"] = {"loss": loss.item(), "gradient": free.grad.tolist()}
    given = {
        "logits": logits, "teacher": teacher, "ids": ids, "mask": mask, "old": old, "reference": reference,
        "advantage": advantage, "rewards": rewards,
    }  # fmt: skip
    versions = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    text = {"versions": versions, "rules": {name: ours for name, (ours, _) in RULES.items()}, "found": found}
    text["given"] = {name: value.tolist() for name, value in given.items()}
    (Path(__file__).parents[1] / "tests/parity/trl_losses.json").write_text(json.dumps(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
