"""Exercises of ``chapters/architecture/published.ipynb``."""

from measured.exercises import exercise, named


@exercise(
    "published/latent-elements",
    cases=[
        {"layers": 60, "heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64},
        {"layers": 27, "heads": 16, "kv_lora_rank": 512, "qk_rope_head_dim": 64},
        {"layers": 3, "heads": 4, "kv_lora_rank": 32, "qk_rope_head_dim": 8},
    ],
    mistakes="""
        layers * kv_lora_rank
            The key that carries the position is missing. It is not part of the latent and is kept beside it.
        layers * (kv_lora_rank + heads * qk_rope_head_dim)
            The rotated key is counted for each head, but all heads share one.
        layers * heads * (kv_lora_rank + qk_rope_head_dim)
            Counted for each head: that is what latent attention avoids. All heads read the same latent.
        2 * layers * (kv_lora_rank + qk_rope_head_dim)
            Twice too much: key and value are both made from the one latent.
        kv_lora_rank + qk_rope_head_dim
            That is one layer. Every layer keeps a latent of its own.
    """,
)
def latent_elements(layers: int, heads: int, kv_lora_rank: int, qk_rope_head_dim: int) -> int:
    """Numbers that latent attention keeps for one token."""
    return layers * (kv_lora_rank + qk_rope_head_dim)


@exercise(
    "published/tokens-a-pass",
    cases=named("acceptance drafts", (0.85, 1), (0.9, 2), (0.5, 3)),
    mistakes="""
        1 + drafts
            As if every draft were accepted. A share of them is thrown away.
        1 + acceptance * drafts
            Nearly: but a draft counts only if all drafts before it were accepted too.
        sum(acceptance**count for count in range(1, drafts + 1))
            The token that the model itself predicts comes for certain, whatever happens to the drafts.
        1 + acceptance**drafts
            That counts only the case in which all drafts are right. A few may be right and the rest wrong.
    """,
)
def tokens_a_pass(acceptance: float, drafts: int) -> float:
    """Tokens that one pass of the model yields on average, with so many drafted tokens checked in it."""
    return sum(acceptance**count for count in range(drafts + 1))
