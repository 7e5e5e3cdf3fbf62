"""Log-probabilities of packed rows, and the supervised loss on them."""

import jax
import jax.numpy as jnp

from apr_jax.data.packing import PackedBatch
from apr_jax.data.store import CALL_SAMPLED, FORCED, JOIN, SAMPLED, SAMPLED_ROLES
from apr_jax.model.attention import packed_attention
from apr_jax.model.family import Model

Array = jax.Array
# What a token is to whoever wrote it, by the name under which its validation loss is told.
KINDS = {"written": SAMPLED, "call": CALL_SAMPLED, "prompt": FORCED, "join": JOIN}


def row_logits(model: Model, batch: PackedBatch) -> Array:
    """float32 logits [B, T, V] that predict each token of packed rows: those of its predecessor.
    A token without one gets those of token 0; its weight must be 0."""
    attend = packed_attention(batch.enter, batch.exit, model.config.attention, model.config.dtype)
    hidden_BxTxD, _ = model.hidden(batch.tokens, batch.positions, attend)
    before_BxTx1 = jnp.maximum(batch.predecessors, 0)[:, :, None]
    return model.logits(jnp.take_along_axis(hidden_BxTxD, before_BxTx1, axis=1))


def token_logprobs(logits_BxTxV: Array, tokens_BxT: Array) -> Array:
    """Log-probability of each token [B, T] under its logits."""
    chosen_BxT = jnp.take_along_axis(logits_BxTxV, tokens_BxT[:, :, None], axis=-1)[:, :, 0]
    return chosen_BxT - jax.nn.logsumexp(logits_BxTxV, axis=-1)


def trained_tokens(batch: PackedBatch, mode: str) -> Array:
    """1.0 for each token [B, T] that is trained on, else 0.0, from who wrote it: 'sampled' (what a thread writes) or
    'all' (the paper's: prompts and join blocks too)."""
    predicted_BxT = batch.predecessors >= 0
    if mode == "all":
        return predicted_BxT.astype(jnp.float32)
    if mode == "sampled":
        written = [batch.role == role for role in SAMPLED_ROLES]
        return (predicted_BxT & (written[0] | written[1])).astype(jnp.float32)
    raise ValueError(f"loss mode is 'sampled' or 'all', was given {mode!r}")


def supervised_loss(model: Model, batch: PackedBatch, mode: str) -> tuple[Array, dict[str, Array]]:
    """(sum of cross-entropies, sums that make metrics); divide by ``metrics['weight']`` after adding up
    over devices and microbatches, so that every token of a step weighs the same."""
    logits_BxTxV = row_logits(model, batch)
    weight_BxT = trained_tokens(batch, mode)
    loss = -jnp.sum(weight_BxT * token_logprobs(logits_BxTxV, batch.tokens))
    right = jnp.sum(weight_BxT * (jnp.argmax(logits_BxTxV, axis=-1) == batch.tokens))
    return loss, {"weight": jnp.sum(weight_BxT), "right": right, **batch_sums(batch)}


def batch_sums(batch: PackedBatch) -> dict[str, Array]:
    """Of the tokens that are no padding: `tokens`, how many; `seen`, what they see together, each its own path up to
    itself; `unshared`, how many they would be with every path written out from its beginning."""
    real_BxT, before_BxT = batch.real, batch.predecessors
    B, T = before_BxT.shape
    continued_BxT = (
        jnp.zeros((B, T + 1), bool).at[jnp.arange(B)[:, None], before_BxT].set(True)[:, :T]  # -1 is the last, cut off
    )
    path_BxT = batch.positions + 1
    sums = {
        "tokens": real_BxT,
        "seen": jnp.where(real_BxT, path_BxT, 0),
        "unshared": jnp.where(real_BxT & ~continued_BxT, path_BxT, 0),
    }
    return {name: jnp.sum(values.astype(jnp.float32)) for name, values in sums.items()}  # int32 could overflow


def loss_by_kind(model: Model, batch: PackedBatch) -> dict[str, Array]:
    """Sums of cross-entropies, of right guesses and of tokens for each of `KINDS`, whatever the loss trains on."""
    logits_BxTxV = row_logits(model, batch)
    loss_BxT = -token_logprobs(logits_BxTxV, batch.tokens)
    right_BxT = jnp.argmax(logits_BxTxV, axis=-1) == batch.tokens
    sums = {}
    for name, role in KINDS.items():
        of_kind_BxT = (batch.predecessors >= 0) & (batch.role == role)
        for what, values in (("loss", loss_BxT), ("right", right_BxT), ("count", 1.0)):
            sums[f"{what}/{name}"] = jnp.sum(jnp.where(of_kind_BxT, values, 0.0))
    return sums
