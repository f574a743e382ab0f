"""What a decoder costs before it is built: bytes and floating-point operations from its configuration alone.

A multiply-add counts as two operations. Norms, rotary positions and the softmax are left out: they grow like the hidden
size, not like its square, and come to a percent or so.

Book: ``chapters/architecture/decoder.ipynb``. Source: Kaplan et al. 2020 (arXiv 2001.08361, section 2.1) for the count.
"""

from dslib.architecture.decoder import DecoderConfig


def matrix_parameters(config: DecoderConfig) -> int:
    """Parameters that every token is multiplied by: all matrices and the output head, not the embedding look-up."""
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    attention = config.hidden_size * (2 * query + 2 * key)
    mlp = 3 * config.hidden_size * config.intermediate_size
    return config.num_hidden_layers * (attention + mlp) + config.vocab_size * config.hidden_size


def visible_pairs(length: int, window: int | None = None, sinks: int = 0) -> int:
    """(query, key) pairs that causal attention over ``length`` tokens looks at; with a window, fewer."""
    if window is None:
        return length * (length + 1) // 2
    near = min(length, window)
    pairs = near * (near + 1) // 2 + (length - near) * window
    # A sink counts on its own only for queries whose window has left it behind.
    return pairs + sum(max(0, length - window - sink) for sink in range(min(sinks, length)))


def attention_flops(config: DecoderConfig, length: int) -> int:
    """Operations for the scores and the weighted sums of ``length`` tokens, all layers (not the projections)."""
    pairs = visible_pairs(length, config.sliding_window, config.attention_sinks)
    return 2 * 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs


def matrix_flops(config: DecoderConfig, length: int) -> int:
    """Operations for all matrix products of ``length`` tokens: two for each parameter and token."""
    return 2 * matrix_parameters(config) * length


def kv_bytes(config: DecoderConfig, length: int, bytes_per_number: float = 2, batch_size: int = 1) -> float:
    """Bytes of keys and values that must be kept after ``length`` tokens; a window limits how many."""
    kept = length
    if config.sliding_window is not None:
        kept = min(length, config.sliding_window + config.attention_sinks)
    return batch_size * kept * config.kv_elements_per_token * bytes_per_number
