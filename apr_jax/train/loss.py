"""Log-probabilities of packed rows, and the supervised loss on them."""

import jax
import jax.numpy as jnp

from apr_jax.model.attention import packed_attention
from apr_jax.model.llama import Llama

Array = jax.Array


def row_logits(model: Llama, rows: dict[str, Array]) -> Array:
    """float32 logits [B, T, V] that predict each token of packed rows: those of its predecessor.
    A token without one gets those of token 0; its weight must be 0."""
    attend = packed_attention(rows["enter"], rows["exit"])
    hidden_BxTxD, _ = model.hidden(rows["tokens"], rows["positions"], attend)
    before_BxTx1 = jnp.maximum(rows["predecessors"], 0)[:, :, None]
    return model.logits(jnp.take_along_axis(hidden_BxTxD, before_BxTx1, axis=1))


def token_logprobs(logits: Array, tokens: Array) -> Array:
    """Log-probability of each token [B, T] under its logits [B, T, V]."""
    chosen = jnp.take_along_axis(logits, tokens[:, :, None], axis=-1)[:, :, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def trained_tokens(rows: dict[str, Array], mode: str) -> Array:
    """Weight [B, T] of each token, from who wrote it: 'sampled' (what a thread writes) or 'all' (the
    paper's: prompts and join blocks too)."""
    predicted = rows["predecessors"] >= 0
    if mode == "all":
        return predicted.astype(jnp.float32)
    if mode == "sampled":
        return (predicted & rows["sampled"]).astype(jnp.float32)
    raise ValueError(f"loss mode is 'sampled' or 'all', was given {mode!r}")


def supervised_loss(model: Llama, rows: dict[str, Array], mode: str) -> tuple[Array, dict[str, Array]]:
    """(sum of cross-entropies, sums that make metrics); divide by ``metrics['weight']`` after adding up
    over devices and microbatches, so that every token of a step weighs the same."""
    logits = row_logits(model, rows)
    weight = trained_tokens(rows, mode)
    loss = -jnp.sum(weight * token_logprobs(logits, rows["tokens"]))
    right = jnp.sum(weight * (jnp.argmax(logits, axis=-1) == rows["tokens"]))
    return loss, {"weight": jnp.sum(weight), "right": right, "tokens": jnp.sum(rows["exit"] > rows["enter"])}
