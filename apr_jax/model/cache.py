"""The key/value cache of a pool of slots: per layer a pair of arrays [S, K, W, H].

A slot is a row, W the most tokens it can hold. A token attends over the whole width of the arrays it is
given, so a decode loop takes out the rows and the width that it needs (`take`), works on those, and puts
them back (`put`): a slice inside the loop would copy the cache at every token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from apr_jax.model.attention import MASKED
from apr_jax.model.llama import LlamaConfig

Array = jax.Array


class LayerCache(NamedTuple):
    k_SxKxWxH: Array
    v_SxKxWxH: Array


def make_cache(config: LlamaConfig, slots: int, window: int) -> list[LayerCache]:
    shape = (slots, config.kv, window, config.head_size)
    zeros = lambda: jnp.zeros(shape, jnp.dtype(config.dtype))  # noqa: E731
    return [LayerCache(zeros(), zeros()) for _ in range(config.layers)]


def take(cache: list[LayerCache], rows_B: Array, width: int) -> list[LayerCache]:
    """A cache [B, K, width, H] of some slots; a row past the last slot gives some slot's, of no use."""
    return jax.tree.map(lambda x: x.at[rows_B, :, :width].get(mode="clip"), cache)


def put(cache: list[LayerCache], rows_B: Array, taken: list[LayerCache]) -> list[LayerCache]:
    """Puts back what `take` took; a row past the last slot is dropped."""
    width = taken[0].k_SxKxWxH.shape[2]
    return jax.tree.map(lambda x, new: x.at[rows_B, :, :width].set(new, mode="drop"), cache, taken)


def cached_attention(rows_B: Array, positions_BxT: Array):
    """An `Attend` that writes T new tokens of B slots into the cache, then attends over the window.

    `rows_B` are slot indices; one past the end means "no slot": nothing is written and what comes out is
    of no use. None: B is all slots in order. A token sees the positions up to its own.
    """

    def attend(q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, layer: LayerCache):
        B, T, N, H = q_BxTxNxH.shape
        K = k_BxTxKxH.shape[2]
        slots, window = layer.k_SxKxWxH.shape[0], layer.k_SxKxWxH.shape[2]
        rows = jnp.arange(slots) if rows_B is None else rows_B
        where = (rows[:, None, None], jnp.arange(K)[None, None, :], positions_BxT[:, :, None])
        layer = LayerCache(
            layer.k_SxKxWxH.at[where].set(k_BxTxKxH, mode="drop"),
            layer.v_SxKxWxH.at[where].set(v_BxTxKxH, mode="drop"),
        )
        k, v = layer if rows_B is None else (x.at[rows].get(mode="clip") for x in layer)
        seen = jnp.arange(window)[None, None, :] <= positions_BxT[:, :, None]
        q = q_BxTxNxH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
        q = q.reshape(B, K, (N // K) * T, H)
        scores = jnp.einsum("bkqh,bkwh->bkqw", q, k, preferred_element_type=jnp.float32) * H**-0.5
        seen = jnp.tile(seen, (1, N // K, 1))[:, None]
        weights = jax.nn.softmax(jnp.where(seen, scores, MASKED), axis=-1).astype(v.dtype)
        out = jnp.einsum("bkqw,bkwh->bkqh", weights, v).reshape(B, K, N // K, T, H)
        return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H), layer

    return attend
