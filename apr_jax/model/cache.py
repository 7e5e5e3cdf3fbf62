"""The key/value cache of a pool of slots: for each layer two arrays [P, K, W, H].

Each of the P slots holds up to W tokens of one sequence. Attention computes over the whole width of its arrays. So
prefill and decode copy the slots and the width that they need out of the pool (`take`), work on the copy, and write new
positions back (`put`). A slice of the pool inside the decode loop would copy the cache at every token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from apr_jax.model.attention import MASKED
from apr_jax.model.family import ModelConfig

Array = jax.Array


class LayerCache(NamedTuple):
    """Keys and values of one layer: of the whole pool, or of the slots of one call."""

    k_PxKxWxH: Array
    v_PxKxWxH: Array


def make_cache(config: ModelConfig, slots: int, window: int) -> list[LayerCache]:
    """Return an empty pool: one `LayerCache` per layer, of `slots` slots of `window` tokens, in the config's dtype."""
    shape = (slots, config.kv, window, config.head_size)
    zeros = lambda: jnp.zeros(shape, jnp.dtype(config.dtype))  # noqa: E731
    return [LayerCache(zeros(), zeros()) for _ in range(config.layers)]


def take(cache: list[LayerCache], rows_B: Array, width: int) -> list[LayerCache]:
    """Return a copy of the first `width` positions of the slots `rows_B`: arrays [B, K, width, H] for each layer. An
    index above the last slot stands for no slot; its copy is that of the last slot and must be ignored."""
    return jax.tree.map(lambda x: x.at[rows_B, :, :width].get(mode="clip"), cache)


def put(cache: list[LayerCache], rows_B: Array, taken: list[LayerCache], first_B: Array, count: int):
    """Return `cache` with `count` positions of `taken`, which `take` returned, written back to the slots `rows_B`.

    They are the positions from `first_B` on, or the last `count` positions if those would end after the width. An index
    above the last slot is skipped.
    """
    width, K = taken[0].k_PxKxWxH.shape[2], taken[0].k_PxKxWxH.shape[1]
    start_B = jnp.minimum(first_B, width - count)
    positions_Bx1xT = (start_B[:, None] + jnp.arange(count)[None])[:, None, :]
    where = (rows_B[:, None, None], jnp.arange(K)[None, :, None], positions_Bx1xT)

    def new(x_BxKxWxH: Array) -> Array:
        cut = lambda row_KxWxH, start: jax.lax.dynamic_slice_in_dim(row_KxWxH, start, count, axis=1)  # noqa: E731
        return jax.vmap(cut)(x_BxKxWxH, start_B)

    return jax.tree.map(lambda x, y: x.at[where].set(new(y), mode="drop"), cache, taken)


def copy(cache: list[LayerCache], sources_B: Array, targets_B: Array, width: int) -> list[LayerCache]:
    """Return `cache` with the first `width` positions of the slots `sources_B` copied to the slots `targets_B`. All
    sources are read before a target is written. A target above the last slot is skipped."""
    return jax.tree.map(
        lambda x, new: x.at[targets_B, :, :width].set(new, mode="drop"), cache, take(cache, sources_B, width)
    )


def cached_attention(positions_BxT: Array):
    """Return the attention function of prefill and decode, an `Attend` of apr_jax.model.family whose carry is a
    layer's cache, of the B slots of one call. It writes the T new tokens of each slot into the cache; then each new
    token attends to all positions up to its own. A token whose position is at or above the cache's width is padding: it
    is not written."""

    def attend(q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, layer: LayerCache):
        B, T, N, H = q_BxTxNxH.shape
        K, width = layer.k_PxKxWxH.shape[1:3]
        where = (jnp.arange(B)[:, None, None], jnp.arange(K)[None, None, :], positions_BxT[:, :, None])
        layer = LayerCache(
            layer.k_PxKxWxH.at[where].set(k_BxTxKxH, mode="drop"),
            layer.v_PxKxWxH.at[where].set(v_BxTxKxH, mode="drop"),
        )
        seen = jnp.arange(width)[None, None, :] <= positions_BxT[:, :, None]
        q = q_BxTxNxH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
        q = q.reshape(B, K, (N // K) * T, H)
        scores = jnp.einsum("bkqh,bkwh->bkqw", q, layer.k_PxKxWxH, preferred_element_type=jnp.float32) * H**-0.5
        seen = jnp.tile(seen, (1, N // K, 1))[:, None]
        weights = jax.nn.softmax(jnp.where(seen, scores, MASKED), axis=-1).astype(v_BxTxKxH.dtype)
        out = jnp.einsum("bkqw,bkwh->bkqh", weights, layer.v_PxKxWxH).reshape(B, K, N // K, T, H)
        return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H), layer

    return attend
