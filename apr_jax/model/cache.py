"""The key/value cache of a pool of slots: per layer a pair of arrays [S, K, W, H].

A slot is a row, W the most tokens it can hold. A token attends over the whole width of the arrays it is
given, so prefill and decode take out the rows and the width that they need (`take`), work on those, and put
back what is new (`put`): a slice inside the decode loop would copy the cache at every token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from apr_jax.model.attention import MASKED
from apr_jax.model.family import ModelConfig

Array = jax.Array


class LayerCache(NamedTuple):
    k_SxKxWxH: Array
    v_SxKxWxH: Array


def make_cache(config: ModelConfig, slots: int, window: int) -> list[LayerCache]:
    shape = (slots, config.kv, window, config.head_size)
    zeros = lambda: jnp.zeros(shape, jnp.dtype(config.dtype))  # noqa: E731
    return [LayerCache(zeros(), zeros()) for _ in range(config.layers)]


def take(cache: list[LayerCache], rows_B: Array, width: int) -> list[LayerCache]:
    """A cache [B, K, width, H] of some slots; a row past the last slot gives some slot's, of no use."""
    return jax.tree.map(lambda x: x.at[rows_B, :, :width].get(mode="clip"), cache)


def put(cache: list[LayerCache], rows_B: Array, taken: list[LayerCache], first_B: Array, count: int):
    """Puts back the `count` positions from `first_B` on of what `take` took, or its last ones where it ends before;
    a row past the last slot is dropped."""
    width, K = taken[0].k_SxKxWxH.shape[2], taken[0].k_SxKxWxH.shape[1]
    start_B = jnp.minimum(first_B, width - count)
    positions_Bx1xn = (start_B[:, None] + jnp.arange(count)[None])[:, None, :]
    where = (rows_B[:, None, None], jnp.arange(K)[None, :, None], positions_Bx1xn)

    def new(x_BxKxWxH: Array) -> Array:
        cut = lambda row_KxWxH, start: jax.lax.dynamic_slice_in_dim(row_KxWxH, start, count, axis=1)  # noqa: E731
        return jax.vmap(cut)(x_BxKxWxH, start_B)

    return jax.tree.map(lambda x, y: x.at[where].set(new(y), mode="drop"), cache, taken)


def copy(cache: list[LayerCache], sources_B: Array, targets_B: Array, width: int) -> list[LayerCache]:
    """Copies the first `width` positions of some slots to others; all are read before any is written. A target past the
    last slot is dropped."""
    return jax.tree.map(
        lambda x, new: x.at[targets_B, :, :width].set(new, mode="drop"), cache, take(cache, sources_B, width)
    )


def cached_attention(positions_BxT: Array):
    """An `Attend` that writes T new tokens of each of B slots into their cache, then attends over its width. A token
    sees the positions up to its own; one whose position is past the width is written nowhere."""

    def attend(q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, layer: LayerCache):
        B, T, N, H = q_BxTxNxH.shape
        K, width = layer.k_SxKxWxH.shape[1:3]
        where = (jnp.arange(B)[:, None, None], jnp.arange(K)[None, None, :], positions_BxT[:, :, None])
        layer = LayerCache(
            layer.k_SxKxWxH.at[where].set(k_BxTxKxH, mode="drop"),
            layer.v_SxKxWxH.at[where].set(v_BxTxKxH, mode="drop"),
        )
        seen = jnp.arange(width)[None, None, :] <= positions_BxT[:, :, None]
        q = q_BxTxNxH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
        q = q.reshape(B, K, (N // K) * T, H)
        scores = jnp.einsum("bkqh,bkwh->bkqw", q, layer.k_SxKxWxH, preferred_element_type=jnp.float32) * H**-0.5
        seen = jnp.tile(seen, (1, N // K, 1))[:, None]
        weights = jax.nn.softmax(jnp.where(seen, scores, MASKED), axis=-1).astype(v_BxTxKxH.dtype)
        out = jnp.einsum("bkqw,bkwh->bkqh", weights, layer.v_SxKxWxH).reshape(B, K, N // K, T, H)
        return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H), layer

    return attend
