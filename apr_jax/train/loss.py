"""Log-probabilities of packed rows, and the supervised loss on them."""

import jax
import jax.numpy as jnp

from apr_jax.data.store import CALL_SAMPLED, FORCED, JOIN, SAMPLED, SAMPLED_ROLES
from apr_jax.model.attention import packed_attention
from apr_jax.model.llama import Llama

Array = jax.Array
# What a token is to whoever wrote it, by the name under which its validation loss is told.
KINDS = {"written": SAMPLED, "call": CALL_SAMPLED, "prompt": FORCED, "join": JOIN}


def row_logits(model: Llama, rows: dict[str, Array]) -> Array:
    """float32 logits [B, T, V] that predict each token of packed rows: those of its predecessor.
    A token without one gets those of token 0; its weight must be 0."""
    attend = packed_attention(rows["enter"], rows["exit"], model.config.attention, model.config.dtype)
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
        written = [rows["role"] == role for role in SAMPLED_ROLES]
        return (predicted & (written[0] | written[1])).astype(jnp.float32)
    raise ValueError(f"loss mode is 'sampled' or 'all', was given {mode!r}")


def supervised_loss(model: Llama, rows: dict[str, Array], mode: str) -> tuple[Array, dict[str, Array]]:
    """(sum of cross-entropies, sums that make metrics); divide by ``metrics['weight']`` after adding up
    over devices and microbatches, so that every token of a step weighs the same."""
    logits = row_logits(model, rows)
    weight = trained_tokens(rows, mode)
    loss = -jnp.sum(weight * token_logprobs(logits, rows["tokens"]))
    right = jnp.sum(weight * (jnp.argmax(logits, axis=-1) == rows["tokens"]))
    return loss, {"weight": jnp.sum(weight), "right": right, **row_sums(rows)}


def row_sums(rows: dict[str, Array]) -> dict[str, Array]:
    """Of the tokens that are no padding: `tokens`, how many; `seen`, what they see together, each its own path up to
    itself; `unshared`, how many they would be with every path written out from its beginning."""
    real, before = rows["exit"] > rows["enter"], rows["predecessors"]
    B, T = before.shape
    goes_on = jnp.zeros((B, T + 1), bool).at[jnp.arange(B)[:, None], before].set(True)[:, :T]  # -1 is the last, cut off
    path = rows["positions"] + 1
    sums = {"tokens": real, "seen": jnp.where(real, path, 0), "unshared": jnp.where(real & ~goes_on, path, 0)}
    return {name: jnp.sum(values.astype(jnp.float32)) for name, values in sums.items()}  # int32 could overflow


def loss_by_kind(model: Llama, rows: dict[str, Array]) -> dict[str, Array]:
    """Sums of cross-entropies, of right guesses and of tokens for each of `KINDS`, whatever the loss trains on."""
    logits = row_logits(model, rows)
    loss, right = -token_logprobs(logits, rows["tokens"]), jnp.argmax(logits, axis=-1) == rows["tokens"]
    sums = {}
    for name, role in KINDS.items():
        of_kind = (rows["predecessors"] >= 0) & (rows["role"] == role)
        for what, values in (("loss", loss), ("right", right), ("count", 1.0)):
            sums[f"{what}/{name}"] = jnp.sum(jnp.where(of_kind, values, 0.0))
    return sums
