"""Log-probabilities of the tokens of packed rows, and the supervised loss."""

import jax
import jax.numpy as jnp

from apr_jax.data.packing import PackedBatch
from apr_jax.data.store import CALL_SAMPLED, FORCED, JOIN, SAMPLED, SAMPLED_ROLES
from apr_jax.model.attention import packed_attention
from apr_jax.model.family import Model

Array = jax.Array
# Roles of tokens (who wrote them, and where) by the name under which their validation loss is logged.
KINDS = {"written": SAMPLED, "call": CALL_SAMPLED, "prompt": FORCED, "join": JOIN}


def row_logits(model: Model, batch: PackedBatch) -> Array:
    """float32 logits [B, T, V] that predict each token of packed rows. Token t's are computed at its predecessor, since
    a row holds a tree: the predecessor is not always token t - 1. A token without a predecessor gets meaningless logits
    (those of token 0), so its weight must be 0."""
    attend = packed_attention(batch.enter, batch.exit, model.config.attention, model.config.dtype)
    hidden_BxTxD, _ = model.hidden(batch.tokens, batch.positions, attend)
    predecessors_BxTx1 = jnp.maximum(batch.predecessors, 0)[:, :, None]
    return model.logits(jnp.take_along_axis(hidden_BxTxD, predecessors_BxTx1, axis=1))


def token_logprobs(logits_BxTxV: Array, tokens_BxT: Array) -> Array:
    """The log-probability of each token [B, T] under its own logits."""
    logits_BxT = jnp.take_along_axis(logits_BxTxV, tokens_BxT[:, :, None], axis=-1)[:, :, 0]
    return logits_BxT - jax.nn.logsumexp(logits_BxTxV, axis=-1)


def trained_tokens(batch: PackedBatch, mode: str) -> Array:
    """float32 [B, T]: 1 for each token that is trained on, else 0.

    `mode` "sampled" selects the tokens that the model writes, spawn calls included. "all" selects prompts and join
    blocks too, as the paper does. A token without a predecessor is never trained on. Raises ValueError for other modes.
    """
    predicted_BxT = batch.predecessors >= 0
    if mode == "all":
        return predicted_BxT.astype(jnp.float32)
    if mode == "sampled":
        body_BxT, call_BxT = (batch.role == role for role in SAMPLED_ROLES)
        return (predicted_BxT & (body_BxT | call_BxT)).astype(jnp.float32)
    raise ValueError(f"loss mode is 'sampled' or 'all', was given {mode!r}")


def supervised_loss(model: Model, batch: PackedBatch, mode: str) -> tuple[Array, dict[str, Array]]:
    """The sum of cross-entropies over the tokens of `trained_tokens(batch, mode)`, and sums for metrics by name.

    Among these are "weight", the number of trained tokens, "correct", how many of them have the highest logit, and
    `batch_sums`. Divide by "weight" after adding up devices and microbatches, so that all tokens weigh the same.
    """
    logits_BxTxV = row_logits(model, batch)
    weight_BxT = trained_tokens(batch, mode)
    loss = -jnp.sum(weight_BxT * token_logprobs(logits_BxTxV, batch.tokens))
    correct = jnp.sum(weight_BxT * (jnp.argmax(logits_BxTxV, axis=-1) == batch.tokens))
    return loss, {"weight": jnp.sum(weight_BxT), "correct": correct, **batch_sums(batch)}


def batch_sums(batch: PackedBatch) -> dict[str, Array]:
    """Counts of a batch as float32 scalars. Padding is not counted.

    "tokens" is the number of tokens. "attended" is the number of pairs that attention compares: each token with all
    tokens on its path up to itself. "unshared" is the number of tokens that the batch would have if its paths did not
    share their common prefixes.
    """
    real_BxT, predecessors_BxT = batch.real, batch.predecessors
    B, T = predecessors_BxT.shape
    # A token without a predecessor (-1) sets column T, which is cut off.
    continued_BxT = jnp.zeros((B, T + 1), bool).at[jnp.arange(B)[:, None], predecessors_BxT].set(True)[:, :T]
    path_length_BxT = batch.positions + 1
    counts = {
        "tokens": real_BxT,
        "attended": jnp.where(real_BxT, path_length_BxT, 0),
        "unshared": jnp.where(real_BxT & ~continued_BxT, path_length_BxT, 0),
    }
    return {name: jnp.sum(count_BxT.astype(jnp.float32)) for name, count_BxT in counts.items()}  # int32 could overflow


def loss_by_kind(model: Model, batch: PackedBatch) -> dict[str, Array]:
    """Sums over the tokens of each kind of `KINDS`, trained on or not: "loss/KIND", of cross-entropies; "correct/KIND",
    the number of tokens that have the highest logit; "count/KIND", the number of tokens."""
    logits_BxTxV = row_logits(model, batch)
    loss_BxT = -token_logprobs(logits_BxTxV, batch.tokens)
    correct_BxT = jnp.argmax(logits_BxTxV, axis=-1) == batch.tokens
    sums = {}
    for name, role in KINDS.items():
        of_kind_BxT = (batch.predecessors >= 0) & (batch.role == role)
        for quantity, value_BxT in (("loss", loss_BxT), ("correct", correct_BxT), ("count", 1.0)):
            sums[f"{quantity}/{name}"] = jnp.sum(jnp.where(of_kind_BxT, value_BxT, 0.0))
    return sums
